// Kernels where lanes own columns and walk rows: channels-last tensors, layer norm over dimensions that
// are not innermost, batch norm whose runs are too short to be read as segments.
//
// A block has `lanes` threads along the columns (V columns each) and the rest along the rows, and works
// on a tile of columns over a chunk of rows of one outer block. Coefficients of a column are computed
// once per thread. Parts go to `[outer, chunks, width]`, which combine.cuh merges.
#pragma once
#include "rows_backward.cuh"

struct Tile {
    u64 outer, chunk, column, first, last;
    u32 lane, row_lane, row_lanes;
    u64 tile, tiles;

    template <int V> __device__ static Tile of(const Params& p) {
        Tile t;
        const u64 tile_width = u64(p.lanes) * V;
        t.tiles = (p.width + tile_width - 1) / tile_width;
        t.tile = blockIdx.x % t.tiles;
        const u64 rest = blockIdx.x / t.tiles;
        t.chunk = rest % p.chunks;
        t.outer = rest / p.chunks;
        t.lane = threadIdx.x % p.lanes;
        t.row_lane = threadIdx.x / p.lanes;
        t.row_lanes = blockDim.x / p.lanes;
        t.column = t.tile * tile_width + t.lane * V;
        t.first = t.chunk * p.chunk_rows;
        t.last = t.first + p.chunk_rows < p.rows ? t.first + p.chunk_rows : p.rows;
        return t;
    }
    // Width is a multiple of V wherever V > 1.
    __device__ bool inside(const Params& p) const { return column < p.width; }
    __device__ u64 address(const Params& p, u64 row) const { return (outer * p.rows + row) * p.width + column; }
    __device__ u64 part(const Params& p) const { return (outer * p.part_chunks + chunk) * p.part_width + column; }
};

__device__ inline u64 divide(u64 n, const Divisor& by, u64 exact) {
    return exact == 1 ? n : n < 0x80000000u ? by(u32(n)) : n / exact;
}

__device__ inline u64 set_of(const Params& p, const Tile& tile, int v) {
    return tile.outer * p.sets_per_outer + divide(tile.column + v, p.by_seg, p.run);
}

template <class A> __device__ inline A column_param(const Params& p, const void* from, u32 dtype, u64 column, A otherwise) {
    return from ? load_param<A>(from, dtype, divide(column, p.by_span, p.span)) : otherwise;
}

template <class A> __device__ inline A row_param(const Params& p, const void* from, u32 dtype, u64 row, A otherwise) {
    return from && p.has(PER_ROW) ? load_param<A>(from, dtype, row) : otherwise;
}

// Halves the rows of threads again and again: `add(i)` takes in the values that `put(i)` left at i.
template <class P, class G> __device__ inline void fold_rows(const Params& p, const Tile& tile, P put, G add) {
    for (u32 half = tile.row_lanes / 2; half > 0; half /= 2) {
        const u32 slot = (tile.row_lane % half) * p.lanes + tile.lane;
        if (tile.row_lane >= half && tile.row_lane < 2 * half) put(slot);
        __syncthreads();
        if (tile.row_lane < half) add(slot);
        __syncthreads();
    }
}

template <class T, int V> __device__ void column_moments(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int K = 4;
    const Tile tile = Tile::of<V>(p);
    A mean[V] = {}, low[V] = {}, m2[V] = {};
    u32 count = 0;
    for (u64 row = tile.first + tile.row_lane; tile.inside(p) && row < tile.last; row += K * tile.row_lanes) {
        Pack<T, V> packs[K];
        u32 have = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const u64 at = row + k * tile.row_lanes;
            if (at < tile.last) packs[k].load(static_cast<const T*>(p.x) + tile.address(p, at)), have = k + 1;
        }
        A sum[V] = {}, rest[V] = {}, squares[V] = {}, values[V];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (u32(k) >= have || !p.has(CENTER)) continue;
            packs[k].get(values);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += values[v];
        }
        const A inverse = A(1) / A(have);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] *= inverse;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (u32(k) >= have) continue;
            packs[k].get(values);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A d = values[v] - sum[v];
                rest[v] += d;
                squares[v] += d * d;
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            rest[v] = p.has(CENTER) ? rest[v] * inverse : A(0);
            squares[v] -= rest[v] * rest[v] * A(have);
            Moments<A> m{mean[v], low[v], m2[v], count};
            merge(m, Moments<A>{sum[v], rest[v], squares[v] < 0 ? A(0) : squares[v], have});
            mean[v] = m.mean, low[v] = m.low, m2[v] = m.m2;
        }
        count += have;
    }
    const u32 slots = blockDim.x / 2;
    A* shared = reinterpret_cast<A*>(shared_memory());
    u32* counts = reinterpret_cast<u32*>(shared + 3 * V * slots);
    const auto put = [&](u32 slot) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            shared[v * slots + slot] = mean[v];
            shared[(V + v) * slots + slot] = low[v];
            shared[(2 * V + v) * slots + slot] = m2[v];
        }
        counts[slot] = count;
    };
    const auto add = [&](u32 slot) {
        const u32 more = counts[slot];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            Moments<A> m{mean[v], low[v], m2[v], count};
            merge(m, Moments<A>{shared[v * slots + slot], shared[(V + v) * slots + slot], shared[(2 * V + v) * slots + slot], more});
            mean[v] = m.mean, low[v] = m.low, m2[v] = m.m2;
        }
        count += more;
    };
    fold_rows(p, tile, put, add);
    if (tile.row_lane != 0 || !tile.inside(p)) return;
    A* parts = static_cast<A*>(p.part_moments) + tile.part(p);
    const u64 total = p.outer * p.part_chunks * p.part_width;
#pragma unroll
    for (int v = 0; v < V; ++v) parts[v] = mean[v], parts[total + v] = low[v], parts[2 * total + v] = m2[v];
}

template <class T, int V> __device__ void column_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    if (!tile.inside(p)) return;
    Stats<A> stats[V];
    A w[V], b[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const bool writer = tile.chunk == 0 && tile.row_lane == 0 && (tile.column + v) % p.run == 0;
        stats[v] = forward_stats<A>(p, set_of(p, tile, v), writer);
        w[v] = b[v] = 0;
        if (p.has(PER_ROW)) continue;
        w[v] = column_param(p, p.weight, p.weight_dtype, tile.column + v, A(1));
        b[v] = column_param(p, p.bias, p.bias_dtype, tile.column + v, A(0));
    }
#pragma unroll 4
    for (u64 row = tile.first + tile.row_lane; row < tile.last; row += tile.row_lanes) {
        Pack<T, V> pack;
        A values[V];
        pack.read(static_cast<const T*>(p.x) + tile.address(p, row), values);
        const A row_w = row_param(p, p.weight, p.weight_dtype, row, A(1));
        const A row_b = row_param(p, p.bias, p.bias_dtype, row, A(0));
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A xhat = stats[v](values[v]);
            values[v] = p.has(PER_ROW) ? xhat * row_w + row_b : xhat * w[v] + b[v];
        }
        pack.set(values);
        pack.store(static_cast<T*>(p.out) + tile.address(p, row));
    }
}

template <class T, int V> __device__ void column_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    Stats<A> stats[V];
    A w[V] = {}, a[V] = {}, b[V] = {};
    const bool write = p.has(FIXED) && p.out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!tile.inside(p)) continue;
        stats[v] = load_stats<A>(p, set_of(p, tile, v));
        w[v] = p.has(PER_ROW) || !write ? A(1) : column_param(p, p.weight, p.weight_dtype, tile.column + v, A(1));
    }
#pragma unroll 2
    for (u64 row = tile.first + tile.row_lane; tile.inside(p) && row < tile.last; row += tile.row_lanes) {
        A values[V], d[V];
        Pack<T, V> pack;
        Pack<T, V>{}.read(static_cast<const T*>(p.x) + tile.address(p, row), values);
        pack.read(static_cast<const T*>(p.dy) + tile.address(p, row), d);
        const A row_w = row_param(p, p.weight, p.weight_dtype, row, A(1));
#pragma unroll
        for (int v = 0; v < V; ++v) {
            a[v] += d[v] * row_w;
            b[v] += d[v] * row_w * stats[v](values[v]);
            d[v] = d[v] * w[v] * row_w * stats[v].rstd;
        }
        if (!write) continue;
        pack.set(d);
        pack.store(static_cast<T*>(p.out) + tile.address(p, row));
    }
    const u32 slots = blockDim.x / 2;
    A* shared = reinterpret_cast<A*>(shared_memory());
    const auto put = [&](u32 slot) {
#pragma unroll
        for (int v = 0; v < V; ++v) shared[v * slots + slot] = a[v], shared[(V + v) * slots + slot] = b[v];
    };
    const auto add = [&](u32 slot) {
#pragma unroll
        for (int v = 0; v < V; ++v) a[v] += shared[v * slots + slot], b[v] += shared[(V + v) * slots + slot];
    };
    fold_rows(p, tile, put, add);
    if (tile.row_lane != 0 || !tile.inside(p)) return;
    A* parts = static_cast<A*>(p.part_sums) + tile.part(p);
#pragma unroll
    for (int v = 0; v < V; ++v) parts[v] = a[v], parts[p.outer * p.part_chunks * p.part_width + v] = b[v];
}

// dx, and the parameters' gradients where rows have them: a warp then works on one row at a time.
template <class T, int V> __device__ void column_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    const bool inside = tile.inside(p), row_gradients = p.has(PER_ROW) && p.has(WANT_PARAMS);
    Stats<A> stats[V];
    A w[V] = {}, sums[V][2] = {};
    const A* sums_of = static_cast<const A*>(p.sums);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!inside) continue;
        const u64 set = set_of(p, tile, v);
        stats[v] = load_stats<A>(p, set);
        w[v] = p.has(PER_ROW) ? A(1) : column_param(p, p.weight, p.weight_dtype, tile.column + v, A(1));
        const A scale = (p.has(UNWEIGHTED) ? w[v] : A(1)) / A(p.count);
        if (!sums_of) continue;
        if (p.has(CENTER)) sums[v][0] = scale * sums_of[set];
        sums[v][1] = scale * sums_of[p.sets + set];
    }
    for (u64 row = tile.first + tile.row_lane; row < tile.last; row += tile.row_lanes) {
        const A row_w = row_param(p, p.weight, p.weight_dtype, row, A(1));
        A row_a = 0, row_b = 0;
        if (inside) {
            A values[V] = {}, d[V];
            Pack<T, V> pack;
            if (!p.has(FIXED) || row_gradients) pack.read(static_cast<const T*>(p.x) + tile.address(p, row), values);
            pack.read(static_cast<const T*>(p.dy) + tile.address(p, row), d);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                row_a += d[v];
                row_b += d[v] * stats[v](values[v]);
                values[v] = input_gradient(stats[v], values[v], d[v] * w[v] * row_w, sums[v]);
            }
            pack.set(values);
            if (p.out) pack.store(static_cast<T*>(p.out) + tile.address(p, row));
        }
        if (!row_gradients) continue;
        row_a = lanes_sum(row_a, 32);
        row_b = lanes_sum(row_b, 32);
        if (tile.lane == 0) put_param_gradient(p, tile.outer * tile.tiles + tile.tile, row, row_b, row_a);
    }
}
