// Kernels for sets that fit on chip: read once, written once.
//
// `*_registers` holds a set in the registers of 8 lanes to a whole block, or of a cluster of C blocks;
// `*_shared` holds it in the shared memory of a block or of a cluster. Element e of a set belongs to the
// same thread in every pass, so data needs no barriers, only sums do. Threads without work stay in the
// loops: every one of them is needed at the shuffles and barriers.
#pragma once
#include "sets.cuh"

// Bytes of a set that a thread of forward_registers holds, and elements (x and dy) that one of
// backward_registers does: src/cuda/plan.rs counts with the same numbers.
constexpr int FORWARD_BYTES = 64;
template <class T> constexpr int BACKWARD_ELEMENTS = sizeof(T) == 8 ? 8 : 16;

// ci/sanitize.sh plants these faults to see them caught: a unit beyond the end of a set is read, the first
// unit of an output is not written.
#ifdef NORM_FAULT_READ
constexpr u32 BEYOND = 1;
#else
constexpr u32 BEYOND = 0;
#endif
#ifdef NORM_FAULT_UNWRITTEN
constexpr bool SKIP_FIRST = true;
#else
constexpr bool SKIP_FIRST = false;
#endif

// Units of V elements, shared out among `threads` threads in turn, of which `width` neighbours are a
// warp, or the part of a warp that has a set of its own.
template <int V> struct Share {
    u32 units, lane, threads, width;

    __device__ bool has(u32 k) const { return lane + k * threads < units + BEYOND; }
    __device__ u32 element(u32 k) const { return (lane + k * threads) * V; }
    // Elements of warp `warp`.
    __device__ u32 count(u32 warp) const {
        const u32 first = warp * width, rest = units % threads;
        const u32 last = rest <= first ? 0 : (rest - first < width ? rest - first : width);
        return (units / threads * width + last) * V;
    }
};

// Two passes over the values that `each(f)` feeds to f, then Chan's merge over the warps. `count` is the
// number of values in this thread's warp, `count_of(i)` that in warp i of the group.
template <class A, int C, class F, class N>
__device__ inline Moments<A> group_moments(const Params& p, Group<A, C>& group, u32 count, N count_of, F each) {
    A sum = 0, low = 0, m2 = 0;
    if (p.has(CENTER)) {
        each([&](A x) { sum += x; });
        sum = lanes_sum(sum, group.width);
    }
    const A mean = count && p.has(CENTER) ? sum / A(count) : A(0);
    each([&](A x) {
        const A d = x - mean;
        low += d;
        m2 += d * d;
    });
    m2 = lanes_sum(m2, group.width);
    if (p.has(CENTER)) {
        // What the rounding of the mean has left; it moves M2 by a square of a rounding.
        const A rest = lanes_sum(low, group.width);
        low = count ? rest / A(count) : A(0);
        m2 -= rest * low;
        m2 = m2 < 0 ? A(0) : m2;
    } else {
        low = 0;
    }
    Moments<A> m{mean, low, m2, count};
    group.merge_warps(m, count_of);
    return m;
}

template <class T, int V, int C> __device__ void forward_registers(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = FORWARD_BYTES / int(sizeof(T) * V);
    Group<A, C> group(p.lanes, shared_memory());
    const Share<V> share{u32(p.set_len) / V, group.lane, group.threads, group.width};
    const u32 sets_per_block = blockDim.x / p.lanes;
    for (u64 first = u64(blockIdx.x / C) * sets_per_block; first < p.sets; first += u64(gridDim.x / C) * sets_per_block) {
        const u64 set = first + threadIdx.x / p.lanes;
        const bool active = set < p.sets;
        const Place at = place_set(p, active ? set : first);
        const T* x = static_cast<const T*>(p.x) + at.base;
        Pack<T, V> packs[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (share.has(k)) packs[k].load(x + offset_of(p, share.element(k)));
        }
        const auto each = [&](auto f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (!share.has(k)) continue;
                A values[V];
                packs[k].get(values);
#pragma unroll
                for (int v = 0; v < V; ++v) f(values[v]);
            }
        };
        const auto count_of = [&](u32 warp) { return share.count(warp); };
        const Moments<A> m = group_moments(p, group, share.count(share.lane / share.width), count_of, each);
        const Stats<A> stats = finish_moments(p, set, m, active && group.lane == 0);
        if (!p.out || !active) continue;
        T* out = static_cast<T*>(p.out) + at.base;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (!share.has(k)) continue;
            const u32 e = share.element(k);
            if (SKIP_FIRST && e == 0) continue;
            A values[V], w[V], b[V];
            packs[k].get(values);
            load_weight(p, at.first_param, e, w);
            load_bias(p, at.first_param, e, b);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
            packs[k].set(values);
            packs[k].store(out + offset_of(p, e));
        }
    }
    group.leave();
}

// The elements of a set that each block of a cluster holds: whole units, about as many in each.
template <int V, int C> struct Slices {
    u32 units, each;

    __device__ explicit Slices(u32 set_len) : units(set_len / V), each((units + C - 1) / C) {}
    __device__ u32 first(u32 rank) const { return (rank * each < units ? rank * each : units) * V; }
    __device__ u32 len(u32 rank) const { return first(rank + 1) - first(rank); }
    // Elements that warp `i` of the cluster walks.
    __device__ u32 count(u32 i) const {
        const u32 warps = blockDim.x / 32;
        return Share<V>{len(i / warps) / V, 0, blockDim.x, 32}.count(i % warps);
    }
};

template <class T, int V, int C> __device__ void forward_shared(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(blockDim.x, shared_memory());
    T* held = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES);
    const Slices<V, C> slices{u32(p.set_len)};
    const u32 start = slices.first(block_rank<C>()), len = slices.len(block_rank<C>());
    for (u64 set = blockIdx.x / C; set < p.sets; set += gridDim.x / C) {
        const Place at = place_set(p, set);
        const T* x = static_cast<const T*>(p.x) + at.base;
        Pack<T, V> pack;
        A values[V];
        for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
            pack.load(x + offset_of(p, start + e));
            pack.store(held + e);
        }
        const auto each = [&](auto f) {
            for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
                pack.read(held + e, values);
#pragma unroll
                for (int v = 0; v < V; ++v) f(values[v]);
            }
        };
        const auto count_of = [&](u32 warp) { return slices.count(warp); };
        const u32 own = count_of(group.lane / 32);
        const Moments<A> m = group_moments(p, group, own, count_of, each);
        const Stats<A> stats = finish_moments(p, set, m, group.lane == 0);
        if (!p.out) continue;
        T* out = static_cast<T*>(p.out) + at.base;
        for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
            A w[V], b[V];
            pack.read(held + e, values);
            load_weight(p, at.first_param, start + e, w);
            load_bias(p, at.first_param, start + e, b);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
            pack.set(values);
            pack.store(out + offset_of(p, start + e));
        }
    }
    group.leave();
}
