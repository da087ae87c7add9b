// Gradients of sets that fit on chip: x and dy read once, dx written once.
//
// With xhat = (x - mean) * rstd and g = dy * weight, over n elements of a set:
//     dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n),
// without the first sum where nothing was centered. Apart from the forward, which needs fewer registers
// and none of the gradients of parameters.
#pragma once
#include "rows.cuh"

// dx from its parts; sums[0] and sums[1] are the two sums already divided by n.
template <class A> __device__ inline A input_gradient(const Stats<A>& stats, A x, A g, const A (&sums)[2]) {
    return (g - sums[0] - stats(x) * sums[1]) * stats.rstd;
}

// Weights of V neighbouring elements where they differ within a set, else ones: a weight that a whole
// set shares is multiplied into the sums instead.
template <int V, class A>
__device__ inline void element_weight(const Params& p, u64 first, u32 e, A (&w)[V]) {
    if (p.weight && !p.has(PER_SET)) {
        load_affine(p, p.weight, p.weight_dtype, first, e, w);
    } else {
#pragma unroll
        for (int v = 0; v < V; ++v) w[v] = 1;
    }
}

template <class A> __device__ inline A set_weight(const Params& p, const Place& at) {
    return p.has(PER_SET) && p.weight ? load_param<A>(p.weight, p.weight_dtype, at.first_param) : A(1);
}

// Sums over a group of what `each` adds up in a thread, divided by n. `weight` multiplies them where the
// whole set shares it; then the parameter's gradient comes from the same sums.
template <class A, int C, class F>
__device__ inline void set_sums(const Params& p, Group<A, C>& group, const Place& at, bool writer, A weight, F each, A (&sums)[2]) {
    each(sums);
    group.sum(sums);
    if (p.has(PER_SET) && p.has(WANT_PARAMS) && writer) {
        put_param_gradient(p, at.outer, at.first_param, sums[1], sums[0]);
    }
    sums[0] = p.has(CENTER) ? sums[0] * weight / A(p.count) : A(0);
    sums[1] = sums[1] * weight / A(p.count);
}

// Adds up what the groups of a block have in the same columns, group after group; the last one has
// the total.
template <class A, int K>
__device__ inline void add_groups(A (&values)[K], A* shared, u32 lanes) {
    const u32 mine = threadIdx.x / lanes, groups = blockDim.x / lanes;
    A* slot = shared + threadIdx.x % lanes;
    for (u32 turn = 0; turn < groups; ++turn) {
        if (mine == turn) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (turn > 0) values[k] += slot[k * lanes];
                slot[k * lanes] = values[k];
            }
        }
        __syncthreads();
    }
}

// Which sets a block works on. Where every column has its own gradient, a thread keeps to its columns:
// a block then stays with one set of each outer block.
struct Work {
    u64 first, last, stride, offset, copy;

    __device__ Work(const Params& p, bool columns, u32 cluster) {
        const u64 block = blockIdx.x / cluster, blocks = gridDim.x / cluster;
        const u64 lines = columns ? p.sets_per_outer : 1;
        const u64 items = p.sets / lines, workers = blocks / lines, each = (items + workers - 1) / workers;
        copy = block / lines;
        first = copy * each;
        last = first + each < items ? first + each : items;
        stride = lines;
        offset = block % lines;
    }
    __device__ u64 set(u64 item) const { return item * stride + offset; }
};

template <class T, int V, int C> __device__ void backward_registers(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = BACKWARD_ELEMENTS<T> / V, E = N * V;
    Group<A, C> group(p.lanes, shared_memory());
    const Share<V> share{u32(p.set_len) / V, group.lane, group.threads, group.width};
    const bool columns = p.has(PER_COLUMN) && p.has(WANT_PARAMS);
    const Work work(p, columns, C);
    const u32 per_block = blockDim.x / p.lanes;
    A dweight[E] = {}, dbias[E] = {};
    for (u64 item = work.first; item < work.last; item += per_block) {
        const bool active = item + threadIdx.x / p.lanes < work.last;
        const Place at = place_set(p, work.set(active ? item + threadIdx.x / p.lanes : item));
        const T* x = static_cast<const T*>(p.x) + at.base;
        const T* dy = static_cast<const T*>(p.dy) + at.base;
        Pack<T, V> packs[N], dpacks[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (!share.has(k)) continue;
            packs[k].load(x + offset_of(p, share.element(k)));
            dpacks[k].load(dy + offset_of(p, share.element(k)));
        }
        const Stats<A> stats = load_stats<A>(p, at.set);
        const A weight = set_weight<A>(p, at);
        A sums[2] = {};
        const auto each = [&](A(&sums)[2]) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (!share.has(k)) continue;
                A values[V], d[V], w[V];
                packs[k].get(values);
                dpacks[k].get(d);
                element_weight(p, at.first_param, share.element(k), w);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const A xhat = stats(values[v]);
                    sums[0] += d[v] * w[v];
                    sums[1] += d[v] * w[v] * xhat;
                    if (!columns || !active) continue;
                    dweight[k * V + v] += d[v] * xhat;
                    dbias[k * V + v] += d[v];
                }
            }
        };
        set_sums(p, group, at, active && group.lane == 0, weight, each, sums);
        if (!p.out || !active) continue;
        T* out = static_cast<T*>(p.out) + at.base;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (!share.has(k)) continue;
            A values[V], d[V], w[V];
            packs[k].get(values);
            dpacks[k].get(d);
            // Loaded again rather than kept: the registers of the gradients are all there is.
            element_weight(p, at.first_param, share.element(k), w);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = input_gradient(stats, values[v], d[v] * w[v] * weight, sums);
            packs[k].set(values);
            packs[k].store(out + offset_of(p, share.element(k)));
        }
    }
    if (columns) {
        if (per_block > 1) {
            A* shared = reinterpret_cast<A*>(shared_memory() + Group<A, C>::BYTES);
            add_groups(dweight, shared, p.lanes);
            add_groups(dbias, shared, p.lanes);
        }
        if (threadIdx.x / p.lanes == per_block - 1) {
#pragma unroll
            for (int i = 0; i < E; ++i) {
                if (!share.has(i / V)) continue;
                const u64 param = work.offset * p.set_params + share.element(i / V) + i % V;
                put_param_gradient(p, work.copy, param, dweight[i], dbias[i]);
            }
        }
    }
    group.leave();
}

// The segments of a set that lie in one block's slice, cut into pieces that lanes can share out evenly.
struct Segments {
    u32 first, count, start, end, span, pieces, piece_len;

    __device__ Segments(const Params& p, u32 start, u32 len)
        : first(len ? p.by_span(start) : 0), count(len ? p.by_span(start + len - 1) - first + 1 : 0), start(start),
          end(start + len), span(p.by_span.divisor), pieces(u32(p.pieces)), piece_len(u32(p.chunk_len)) {}
    __device__ u32 items() const { return count * pieces; }
    // First and past-the-last element of an item, within the slice.
    __device__ void range(u32 item, u32& from, u32& to) const {
        const u32 base = (first + item / pieces) * span, at = item % pieces * piece_len;
        from = base + (at < span ? at : span);
        to = base + (at + piece_len < span ? at + piece_len : span);
        from = from < start ? start : from;
        to = to > end ? end : to;
    }
};

// Sums of a set whose segments have parameters of their own: first of every piece, by a few lanes, then
// of every segment, which are the parameters' gradients, then of the set.
template <class T, int V, int C, class A>
__device__ inline void segment_sums(const Params& p, const Segments& segments, const Place& at, const T* x, const T* dy,
                                    const Stats<A>& stats, A* parts, A (&sums)[2]) {
    const u32 lane = threadIdx.x % p.lanes, groups = blockDim.x / p.lanes, items = segments.items();
    for (u32 i = 0; i < items; i += groups) {
        const u32 item = i + threadIdx.x / p.lanes;
        u32 from = 0, to = 0;
        if (item < items) segments.range(item, from, to);
        A a = 0, b = 0;
        for (u32 e = from + lane * V; e < to; e += p.lanes * V) {
            Pack<T, V> pack;
            A values[V], d[V];
            pack.load(x + e - segments.start);
            pack.get(values);
            pack.load(dy + e - segments.start);
            pack.get(d);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                a += d[v];
                b += d[v] * stats(values[v]);
            }
        }
        a = lanes_sum(a, p.lanes);
        b = lanes_sum(b, p.lanes);
        if (lane == 0 && item < items) parts[2 * item] = a, parts[2 * item + 1] = b;
    }
    __syncthreads();
    const u64 copy = at.outer * C + block_rank<C>();
    for (u32 i = threadIdx.x; i < u32(p.set_params); i += blockDim.x) {
        A a = 0, b = 0;
        if (i >= segments.first && i - segments.first < segments.count) {
            const A* part = parts + 2 * (i - segments.first) * segments.pieces;
            for (u32 piece = 0; piece < segments.pieces; ++piece) a += part[2 * piece], b += part[2 * piece + 1];
            const A w = p.weight ? load_param<A>(p.weight, p.weight_dtype, at.first_param + i) : A(1);
            sums[0] += w * a;
            sums[1] += w * b;
        }
        put_param_gradient(p, copy, at.first_param + i, b, a);
    }
}

template <class T, int V, int C> __device__ void backward_shared(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(blockDim.x, shared_memory());
    const Slices<V, C> slices{u32(p.set_len)};
    const u32 start = slices.first(block_rank<C>()), len = slices.len(block_rank<C>());
    const u32 room = (slices.each * V * u32(sizeof(T)) + 15) / 16 * 16;
    T* held = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES);
    T* dheld = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES + room);
    A* parts = reinterpret_cast<A*>(shared_memory() + Group<A, C>::BYTES + 2 * room);
    const bool by_segment = !p.has(PER_SET) && !p.has(PER_COLUMN);
    for (u64 set = blockIdx.x / C; set < p.sets; set += gridDim.x / C) {
        const Place at = place_set(p, set);
        Pack<T, V> pack;
        for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
            const u64 from = at.base + offset_of(p, start + e);
            pack.load(static_cast<const T*>(p.x) + from);
            pack.store(held + e);
            pack.load(static_cast<const T*>(p.dy) + from);
            pack.store(dheld + e);
        }
        const Stats<A> stats = load_stats<A>(p, set);
        const A weight = set_weight<A>(p, at);
        A sums[2] = {};
        if (by_segment) __syncthreads();
        const auto each = [&](A(&sums)[2]) {
            if (by_segment) {
                segment_sums<T, V, C>(p, Segments(p, start, len), at, held, dheld, stats, parts, sums);
                return;
            }
            for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
                A values[V], d[V], w[V];
                Pack<T, V>{}.read(held + e, values);
                Pack<T, V>{}.read(dheld + e, d);
                element_weight(p, at.first_param, start + e, w);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    sums[0] += d[v] * w[v];
                    sums[1] += d[v] * w[v] * stats(values[v]);
                }
            }
        };
        set_sums(p, group, at, group.lane == 0, weight, each, sums);
        if (!p.out) continue;
        for (u32 e = threadIdx.x * V; e < len; e += blockDim.x * V) {
            A values[V], d[V], w[V];
            Pack<T, V>{}.read(held + e, values);
            Pack<T, V>{}.read(dheld + e, d);
            element_weight(p, at.first_param, start + e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = input_gradient(stats, values[v], d[v] * w[v] * weight, sums);
            pack.set(values);
            pack.store(static_cast<T*>(p.out) + at.base + offset_of(p, start + e));
        }
    }
    group.leave();
}
