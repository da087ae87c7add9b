// Kernels for sets that do not fit on chip: chunks of a set on blocks of their own.
//
// Forward: moments of the chunks, combined (combine.cuh), then the output: three passes over memory.
// Backward: gradient sums of the chunks, combined, then dx: five. Where the statistics are given, the
// last pass alone. A chunk is a piece of one segment, or several whole segments.
#pragma once
#include "rows_backward.cuh"

// The chunk of a block, and its elements by number: 32 bits within a chunk.
struct Chunk {
    u64 set, index, seg, first;
    u32 len, seg_len;

    __device__ Chunk(const Params& p, u64 block) : set(block / p.chunks), index(block % p.chunks) {
        if (p.pieces > 1) {
            seg = index / p.pieces;
            first = index % p.pieces * p.chunk_len;
            len = u32(p.seg_len - first < p.chunk_len ? p.seg_len - first : p.chunk_len);
            seg_len = len;
        } else {
            seg = index * p.segs_per_chunk;
            first = 0;
            seg_len = u32(p.seg_len);
            len = u32(p.segs - seg < p.segs_per_chunk ? p.segs - seg : p.segs_per_chunk) * seg_len;
        }
    }
    // Where element e lies behind the base of the set.
    __device__ u64 offset(const Params& p, u32 e) const {
        if (e < seg_len) return seg * p.seg_stride + first + e;
        const u32 more = p.by_seg(e);
        return (seg + more) * p.seg_stride + (e - more * seg_len);
    }
};

// Weight and bias of V elements of a chunk, whose columns start anywhere in a set of any length.
struct Columns {
    u64 first_param;
    u32 start;

    // A chunk starts `first` columns into a run, which may exceed 31 bits: whole parameters go into
    // the first one, the rest stays below a span.
    __device__ Columns(const Params& p, const Place& at, const Chunk& chunk) {
        const u64 column = chunk.seg * p.seg_len % p.run + chunk.first;
        if (p.has(PER_SET)) {
            first_param = at.first_param, start = 0;
        } else if (p.has(PER_COLUMN)) {
            first_param = at.first_param + column, start = 0;
        } else {
            first_param = at.first_param + column / p.span, start = u32(column % p.span);
        }
    }
};

// Streams over values in steps of K units, each step in two passes, merged into the thread's moments.
template <class T, int V, int K, class A, class F>
__device__ inline void stream_moments(const Params& p, u32 units, F load, Moments<A>& m) {
    for (u32 unit = threadIdx.x; unit < units; unit += blockDim.x * K) {
        Pack<T, V> packs[K];
        u32 have = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (unit + k * blockDim.x < units) packs[k] = load(unit + k * blockDim.x), have = k + 1;
        }
        const auto each = [&](auto f) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (u32(k) >= have) continue;
                A values[V];
                packs[k].get(values);
#pragma unroll
                for (int v = 0; v < V; ++v) f(values[v]);
            }
        };
        A sum = 0, low = 0, m2 = 0;
        const A mean_of = A(1) / A(have * V);
        if (p.has(CENTER)) each([&](A x) { sum += x; });
        const A mean = sum * mean_of;
        each([&](A x) { low += x - mean, m2 += (x - mean) * (x - mean); });
        low = p.has(CENTER) ? low * mean_of : A(0);
        m2 -= low * low * A(have * V);
        merge(m, Moments<A>{mean, low, m2 < 0 ? A(0) : m2, have * V});
    }
}

// Merges the moments of a block's threads; the result in every thread.
template <class A> __device__ inline void block_merge(Moments<A>& m, char* shared) {
    lanes_merge(m, 32);
    A* slots = reinterpret_cast<A*>(shared);
    u32* counts = reinterpret_cast<u32*>(slots + 3 * 32);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) slots[warp] = m.mean, slots[32 + warp] = m.low, slots[64 + warp] = m.m2, counts[warp] = m.count;
    __syncthreads();
    m = Moments<A>{0, 0, 0, 0};
    if (lane < warps) m = Moments<A>{slots[lane], slots[32 + lane], slots[64 + lane], counts[lane]};
    lanes_merge(m, 32);
}

template <class T, int V> __device__ void split_moments(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, blockIdx.x);
    const T* x = static_cast<const T*>(p.x) + place_set(p, chunk.set).base;
    Moments<A> m{0, 0, 0, 0};
    const auto load = [&](u32 unit) {
        Pack<T, V> pack;
        pack.load(x + chunk.offset(p, unit * V));
        return pack;
    };
    stream_moments<T, V, V == 1 ? 8 : 4>(p, chunk.len / V, load, m);
    block_merge(m, shared_memory());
    if (threadIdx.x == 0) {
        A* parts = static_cast<A*>(p.part_moments);
        const u64 total = p.sets * p.chunks;
        parts[blockIdx.x] = m.mean;
        parts[total + blockIdx.x] = m.low;
        parts[2 * total + blockIdx.x] = m.m2;
    }
}

template <class T, int V> __device__ void split_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    // From the end: what the first pass has read last may still be in the L2 cache.
    const Chunk chunk(p, gridDim.x - 1 - blockIdx.x);
    const Place at = place_set(p, chunk.set);
    const Columns columns(p, at, chunk);
    const Stats<A> stats = forward_stats<A>(p, chunk.set, chunk.index == 0 && threadIdx.x == 0);
#pragma unroll 2
    for (u32 e = threadIdx.x * V; e < chunk.len; e += blockDim.x * V) {
        const u64 i = at.base + chunk.offset(p, e);
        Pack<T, V> pack;
        A values[V], w[V], b[V];
        pack.read(static_cast<const T*>(p.x) + i, values);
        load_weight(p, columns.first_param, columns.start + e, w);
        load_bias(p, columns.first_param, columns.start + e, b);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        pack.set(values);
        pack.store(static_cast<T*>(p.out) + i);
    }
}

// Adds dy and dy * xhat of elements [from, to) of a chunk, `step` apart, and writes dx where that needs
// no sums.
template <class T, int V, class A>
__device__ inline void chunk_sums(const Params& p, const Chunk& chunk, const Place& at, const Columns& columns,
                                  const Stats<A>& stats, u32 from, u32 to, u32 step, A (&sums)[2]) {
#pragma unroll 2
    for (u32 e = from; e < to; e += step) {
        const u64 i = at.base + chunk.offset(p, e);
        A values[V], d[V];
        Pack<T, V>{}.read(static_cast<const T*>(p.x) + i, values);
        Pack<T, V>{}.read(static_cast<const T*>(p.dy) + i, d);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            sums[0] += d[v];
            sums[1] += d[v] * stats(values[v]);
        }
        if (!p.has(FIXED) || !p.out) continue;
        A w[V];
        load_weight(p, columns.first_param, columns.start + e, w);
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) d[v] = d[v] * w[v] * stats.rstd;
        pack.set(d);
        pack.store(static_cast<T*>(p.out) + i);
    }
}

template <class T, int V> __device__ void split_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, blockIdx.x);
    const Place at = place_set(p, chunk.set);
    const Columns columns(p, at, chunk);
    const Stats<A> stats = load_stats<A>(p, chunk.set);
    A* parts = static_cast<A*>(p.part_sums);
    const u64 total = p.outer * p.part_width;
    if (p.has(PER_SET) || p.pieces > 1) {
        Group<A, 1> group(blockDim.x, shared_memory());
        A sums[2] = {};
        chunk_sums<T, V>(p, chunk, at, columns, stats, threadIdx.x * V, chunk.len, blockDim.x * V, sums);
        group.sum(sums);
        if (threadIdx.x == 0) parts[blockIdx.x] = sums[0], parts[total + blockIdx.x] = sums[1];
        return;
    }
    // Whole segments, each with its own parameter, by `lanes` threads each.
    const u32 lane = threadIdx.x % p.lanes, groups = blockDim.x / p.lanes, segs = chunk.len / chunk.seg_len;
    for (u32 i = 0; i < segs; i += groups) {
        const u32 seg = i + threadIdx.x / p.lanes;
        const u32 from = seg < segs ? seg * chunk.seg_len : 0, to = seg < segs ? from + chunk.seg_len : 0;
        A sums[2] = {};
        chunk_sums<T, V>(p, chunk, at, columns, stats, from + lane * V, to, p.lanes * V, sums);
        sums[0] = lanes_sum(sums[0], p.lanes);
        sums[1] = lanes_sum(sums[1], p.lanes);
        const u64 part = chunk.set * p.part_run + chunk.seg + seg;
        if (lane == 0 && seg < segs) parts[part] = sums[0], parts[total + part] = sums[1];
    }
}

// Sums of the tile of a set that a block's threads hold, over some of the outer blocks: the weighted
// sums go to the set, the others add up per column.
template <class T, int V> __device__ void split_column_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = BACKWARD_ELEMENTS<T> / V, E = N * V;
    Group<A, 1> group(blockDim.x, shared_memory());
    const u64 line = blockIdx.x % p.part_width, slab = blockIdx.x / p.part_width;
    const u64 q = line / p.part_run, tile = line % p.part_run * (blockDim.x * E);
    const u64 left = (p.run - tile) / V;
    const Share<V> share{u32(left < blockDim.x * N ? left : blockDim.x * N), threadIdx.x, blockDim.x, 32};
    const u64 param = q * p.set_params + tile, total = p.outer * p.part_width;
    const u64 last = (slab + 1) * p.chunk_rows < p.outer ? (slab + 1) * p.chunk_rows : p.outer;
    A dweight[E] = {}, dbias[E] = {};
    for (u64 o = slab * p.chunk_rows; o < last; ++o) {
        const u64 base = o * p.width + q * p.run + tile;
        const Stats<A> stats = load_stats<A>(p, o * p.sets_per_outer + q);
        A sums[2] = {};
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (!share.has(k)) continue;
            A values[V], d[V], w[V];
            Pack<T, V>{}.read(static_cast<const T*>(p.x) + base + share.element(k), values);
            Pack<T, V>{}.read(static_cast<const T*>(p.dy) + base + share.element(k), d);
            element_weight(p, param, share.element(k), w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A xhat = stats(values[v]);
                sums[0] += d[v] * w[v];
                sums[1] += d[v] * w[v] * xhat;
                dweight[k * V + v] += d[v] * xhat;
                dbias[k * V + v] += d[v];
            }
        }
        group.sum(sums);
        const u64 part = o * p.part_width + line;
        A* parts = static_cast<A*>(p.part_sums);
        if (parts && threadIdx.x == 0) parts[part] = sums[0], parts[total + part] = sums[1];
    }
    if (!p.has(WANT_PARAMS)) return;
#pragma unroll
    for (int i = 0; i < E; ++i) {
        if (share.has(i / V)) put_param_gradient(p, slab, param + share.element(i / V) + i % V, dweight[i], dbias[i]);
    }
}

template <class T, int V> __device__ void split_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, gridDim.x - 1 - blockIdx.x);
    const Place at = place_set(p, chunk.set);
    const Columns columns(p, at, chunk);
    const Stats<A> stats = load_stats<A>(p, chunk.set);
    const A* sums_of = static_cast<const A*>(p.sums);
    const A weight = p.has(UNWEIGHTED) ? set_weight<A>(p, at) : A(1);
    A sums[2] = {};
    if (sums_of) {
        if (p.has(CENTER)) sums[0] = weight * sums_of[chunk.set] / A(p.count);
        sums[1] = weight * sums_of[p.sets + chunk.set] / A(p.count);
    }
#pragma unroll 2
    for (u32 e = threadIdx.x * V; e < chunk.len; e += blockDim.x * V) {
        const u64 i = at.base + chunk.offset(p, e);
        Pack<T, V> pack;
        A values[V] = {}, d[V], w[V];
        // Without sums dx does not depend on x.
        if (!p.has(FIXED)) pack.read(static_cast<const T*>(p.x) + i, values);
        pack.read(static_cast<const T*>(p.dy) + i, d);
        load_weight(p, columns.first_param, columns.start + e, w);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A g = d[v] * w[v];
            values[v] = p.has(FIXED) ? g * stats.rstd : input_gradient(stats, values[v], g, sums);
        }
        pack.set(values);
        pack.store(static_cast<T*>(p.out) + i);
    }
}
