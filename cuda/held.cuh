// Statistics and output of sets that fit on chip: read once, written once.
//
// A set lies in shared memory, where 8 lanes to a whole block, or a cluster of C blocks, walk it three
// times: mean, deviations, output. All of it is under way at once when it is asked for, and takes no
// registers, so that several blocks share a multiprocessor: one loads while another stores. Threads
// without work stay in the loops: every one of them is needed at the shuffles and barriers.
#pragma once
#include "epilogue.cuh"
#include "input.cuh"

// Two passes over the values that `each(f)` feeds to f, then Chan's merge over the warps.
template <class A, int V, int C, class F>
__device__ inline Moments<A> group_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, F each) {
    const u32 count = slice.in_warp(slice.lane / 32);
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
    group.merge_all(
        m, [&](u32 warp) { return slice.in_warp(warp); }, [&](u32 rank) { return slice.in_rank(rank); });
    return m;
}

// The output of a held set. `FUSED_TOO`: with what stands behind the affine map, and with an offset of the weight.
template <bool FUSED_TOO, class T, int V, int C, class Where, class A>
__device__ inline void put_output_as(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, const T* held) {
    const Affine<A, T> affine(p, at.first_param);
    T* out = static_cast<T*>(p.out) + at.base;
#pragma unroll(FUSED_TOO ? 1 : 2)
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        if (SKIP_FIRST && e == 0) continue;
        A values[V], w[V], b[V];
        load<T, V>(held + unit * V, values);
        affine.template weight<V, FUSED_TOO>(at.column(e), w);
        affine.bias(at.column(e), b);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        const u64 offset = at.offset(p, e);
        if (FUSED_TOO && p.has(FUSED)) finish<T, V>(p, at.base + offset, values);
        store<T, V>(out + offset, values);
    }
}

template <class T, int V, int C, class Where, class A>
__device__ inline void put_output(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, const T* held) {
    if (p.has(FUSED) || p.weight_offset != 0) {
        put_output_as<true>(p, slice, at, stats, held);
    } else {
        put_output_as<false>(p, slice, at, stats, held);
    }
}

// Moments of a held set or chunk.
template <class T, int V, int C, class A>
__device__ inline Moments<A> held_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, const T* held) {
    return group_moments(p, group, slice, [&](auto f) {
#pragma unroll 2
        for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
            A values[V];
            load<T, V>(held + unit * V, values);
#pragma unroll
            for (int v = 0; v < V; ++v) f(values[v]);
        }
    });
}

template <class T, int V, int C> __device__ void forward_held(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), sets_per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    T* held = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES + mine * held_bytes<T>(slice.each * V));
    for (u64 first = u64(blockIdx.x / C) * sets_per_block; first < p.sets; first += u64(gridDim.x / C) * sets_per_block) {
        const bool active = first + mine < p.sets;
        const Place at = place_set(p, active ? first + mine : first);
        hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, held);
        copies_batch();
        if (p.has(PER_COLUMN)) {
            // On their way together with x, for a block that is the first to use them.
            const Affine<A, T> affine(p, at.first_param);
            affine.ask(slice.first * V, (slice.first + slice.units) * V, slice.lane, slice.lanes);
        }
        copies_done();
        if (p.residual && active) add_residual(p, slice, at, held);
        const Moments<A> m = held_moments(p, group, slice, held);
        const Stats<A> stats = finish_moments(p, at.set, m, active && group.first());
        if (p.out && active) put_output(p, slice, at, stats, held);
    }
    group.leave();
}
