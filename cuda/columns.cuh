// Kernels where lanes own columns and walk rows: channels-last tensors, layer norm over dimensions that
// are not innermost, batch norm whose runs are too short to be read as segments.
//
// A block has `lanes` threads along the columns (V columns each) and the rest along the rows, and works
// on a tile of columns over a chunk of rows of one outer block. Coefficients of a column are computed
// once per thread. Parts go to `[outer, chunks, width]`, which combine.cuh merges.
#pragma once
#include "held_backward.cuh"

struct Tile {
    u64 outer, chunk, column, first, last;
    u32 lane, row_lane, row_lanes;
    u64 tile, tiles;

    template <int V> __device__ static Tile of(const Params& p) {
        Tile t;
        const u64 tile_width = u64(p.lanes) * V;
        t.tiles = quotient(p.width + tile_width - 1, tile_width);
        const u64 rest = quotient(blockIdx.x, t.tiles);
        t.tile = blockIdx.x - rest * t.tiles;
        t.outer = quotient(rest, p.chunks);
        t.chunk = rest - t.outer * p.chunks;
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
    return exact == 1 ? n : n < 0x80000000u ? by(u32(n)) : divide_call(n, exact);
}

__device__ inline u64 set_of(const Params& p, const Tile& tile, int v) {
    return tile.outer * p.sets_per_outer + divide(tile.column + v, p.by_seg, p.run);
}

// Weight and bias of a thread's columns, or of the row that it is at.
template <int V, class A> struct TileAffine {
    const Params& p;
    Affine<A> affine;
    A w[V], b[V];

    __device__ TileAffine(const Params& p, const Tile& tile) : p(p), affine(p, 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            w[v] = 1, b[v] = 0;
            if (p.has(PER_ROW) || !tile.inside(p)) continue;
            const u64 param = divide(tile.column + v, p.by_span, p.span);
            w[v] = affine.weight_at(param);
            b[v] = affine.bias_at(param);
        }
    }
    __device__ A row_weight(u64 row) const { return p.has(PER_ROW) ? affine.weight_at(row) : A(1); }
    __device__ A row_bias(u64 row) const { return p.has(PER_ROW) ? affine.bias_at(row) : A(0); }
};

// Calls f(row, pack, pack) for a thread's rows of two tensors, of which either may be absent; K rows are
// loaded before the first is worked on.
template <class T, int V, int K, class F>
__device__ inline void each_row(const Params& p, const Tile& tile, const T* one, const T* two, F f) {
    for (u64 row = tile.first + tile.row_lane; row < tile.last; row += K * tile.row_lanes) {
        Pack<T, V> ones[K] = {}, twos[K] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const u64 at = row + k * tile.row_lanes;
            if (at >= tile.last) continue;
            if (one) ones[k].fetch(one + tile.address(p, at));
            if (two) twos[k].fetch(two + tile.address(p, at));
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const u64 at = row + k * tile.row_lanes;
            if (at < tile.last) f(at, ones[k], twos[k]);
        }
    }
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
            if (at < tile.last) packs[k].fetch(static_cast<const T*>(p.x) + tile.address(p, at)), have = k + 1;
        }
        A sum[V] = {}, rest[V] = {}, squares[V] = {}, values[V];
        if (p.residual) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (u32(k) >= have) continue;
                const u64 at = tile.address(p, row + k * tile.row_lanes);
                A more[V];
                fetch<T, V>(static_cast<const T*>(p.residual) + at, more);
                packs[k].get(values);
#pragma unroll
                for (int v = 0; v < V; ++v) values[v] += more[v];
                packs[k].set(values);
                packs[k].store(static_cast<T*>(p.sum) + at);
            }
        }
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

template <bool FUSED_TOO, class T, int V, class A>
__device__ inline void put_columns(const Params& p, const Tile& tile, const Stats<A> (&stats)[V]) {
    const TileAffine<V, A> affine(p, tile);
    const T* from = static_cast<const T*>(p.residual ? p.sum : p.x);
    each_row<T, V, FUSED_TOO ? 1 : 4>(p, tile, from, static_cast<const T*>(nullptr), [&](u64 row, auto& x, auto&) {
        A values[V];
        x.get(values);
        const A row_w = affine.row_weight(row), row_b = affine.row_bias(row);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats[v](values[v]) * (affine.w[v] * row_w) + (affine.b[v] + row_b);
        if (FUSED_TOO) finish<T, V>(p, tile.address(p, row), values);
        store<T, V>(static_cast<T*>(p.out) + tile.address(p, row), values);
    });
}

template <class T, int V> __device__ void column_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    if (!tile.inside(p)) return;
    Stats<A> stats[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const bool writer = tile.chunk == 0 && tile.row_lane == 0 && (tile.column + v) == divide(tile.column + v, p.by_seg, p.run) * p.run;
        stats[v] = forward_stats<A>(p, set_of(p, tile, v), writer);
    }
    if (p.has(FUSED)) {
        put_columns<true, T, V>(p, tile, stats);
    } else {
        put_columns<false, T, V>(p, tile, stats);
    }
}

// dz of a row of a tile, from what was loaded of x and dy.
template <class T, int V, class A>
__device__ inline void row_upstream(const Params& p, const Tile& tile, u64 row, const TileAffine<V, A>& affine, const Stats<A> (&stats)[V],
                                    bool write, const A (&values)[V], A (&d)[V]) {
    const A row_w = affine.row_weight(row), row_b = affine.row_bias(row);
    A z[V];
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = stats[v](values[v]) * (affine.w[v] * row_w) + (affine.b[v] + row_b);
    upstream<T, V>(p, tile.address(p, row), write, z, d);
}

template <bool FUSED_TOO, class T, int V, class A>
__device__ inline void sum_columns(const Params& p, const Tile& tile, const Stats<A> (&stats)[V], A (&a)[V], A (&b)[V]) {
    const TileAffine<V, A> affine(p, tile);
    const bool write = p.has(FIXED) && p.out;
    each_row<T, V, FUSED_TOO ? 1 : 4>(p, tile, static_cast<const T*>(p.x), static_cast<const T*>(p.dy), [&](u64 row, auto& x, auto& dy) {
        A values[V], d[V];
        x.get(values);
        dy.get(d);
        if (FUSED_TOO) row_upstream<T, V>(p, tile, row, affine, stats, p.has(SUMS_WRITE), values, d);
        const A row_w = affine.row_weight(row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            a[v] += d[v] * row_w;
            b[v] += d[v] * row_w * stats[v](values[v]);
            d[v] = d[v] * (affine.w[v] * row_w) * stats[v].rstd;
        }
        if (write) store<T, V>(static_cast<T*>(p.out) + tile.address(p, row), d);
    });
}

template <class T, int V> __device__ void column_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    A a[V] = {}, b[V] = {};
    if (tile.inside(p)) {
        Stats<A> stats[V];
#pragma unroll
        for (int v = 0; v < V; ++v) stats[v] = load_stats<A>(p, set_of(p, tile, v));
        if (p.has(FUSED)) {
            sum_columns<true, T, V>(p, tile, stats, a, b);
        } else {
            sum_columns<false, T, V>(p, tile, stats, a, b);
        }
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
template <bool FUSED_TOO, class T, int V, class A>
__device__ inline void put_column_gradients(const Params& p, const Tile& tile, const Stats<A> (&stats)[V], const A (&sums)[V][2]) {
    const TileAffine<V, A> affine(p, tile);
    const bool row_gradients = p.has(PER_ROW) && p.has(WANT_PARAMS), with_x = !p.has(FIXED) || row_gradients || FUSED_TOO;
    const bool inside = tile.inside(p);
    // Lanes beyond the width stay for the sums of rows.
    const T *x = inside && with_x ? static_cast<const T*>(p.x) : nullptr, *dy = inside ? static_cast<const T*>(p.dy) : nullptr;
    each_row<T, V, FUSED_TOO ? 1 : 4>(p, tile, x, dy, [&](u64 row, auto& xs, auto& dys) {
        A row_a = 0, row_b = 0;
        if (inside) {
            A values[V] = {}, d[V];
            if (with_x) xs.get(values);
            dys.get(d);
            if (FUSED_TOO) row_upstream<T, V>(p, tile, row, affine, stats, !p.has(SUMS_WRITE), values, d);
            const A row_w = affine.row_weight(row);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                row_a += d[v];
                row_b += d[v] * stats[v](values[v]);
                values[v] = input_gradient(stats[v], values[v], d[v] * (affine.w[v] * row_w), sums[v]);
            }
            if (p.out) store<T, V>(static_cast<T*>(p.out) + tile.address(p, row), values);
        }
        if (!row_gradients) return;
        row_a = lanes_sum(row_a, 32);
        row_b = lanes_sum(row_b, 32);
        if (tile.lane == 0) put_param_gradient(p, tile.outer * tile.tiles + tile.tile, row, row_b, row_a);
    });
}

template <class T, int V> __device__ void column_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p);
    const A* sums_of = static_cast<const A*>(p.sums);
    Stats<A> stats[V] = {};
    A sums[V][2] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!tile.inside(p)) continue;
        const u64 set = set_of(p, tile, v);
        stats[v] = load_stats<A>(p, set);
        if (!sums_of) continue;
        const u64 param = divide(tile.column + v, p.by_span, p.span);
        sums[v][0] = sums_of[set];
        sums[v][1] = sums_of[p.sets + set];
        to_means(p, p.has(UNWEIGHTED) && !p.has(PER_ROW) ? Affine<A>(p, 0).weight_at(param) : A(1), sums[v]);
    }
    if (p.has(FUSED)) {
        put_column_gradients<true, T, V>(p, tile, stats, sums);
    } else {
        put_column_gradients<false, T, V>(p, tile, stats, sums);
    }
}
