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

    // Of block `block` of the grid.
    template <int V> __device__ static Tile of(const Params& p, u64 block) {
        Tile t;
        const u64 tile_width = u64(p.lanes) * V;
        t.tiles = quotient(p.width + tile_width - 1, tile_width);
        const u64 rest = quotient(block, t.tiles);
        t.tile = block - rest * t.tiles;
        t.outer = quotient(rest, p.chunks, p.by_chunks);
        t.chunk = rest - t.outer * p.chunks;
        const u32 shift = log2_of(p.lanes);
        t.lane = threadIdx.x & (p.lanes - 1);
        t.row_lane = threadIdx.x >> shift;
        t.row_lanes = blockDim.x >> shift;
        t.column = t.tile * tile_width + t.lane * V;
        t.first = t.chunk * p.chunk_rows;
        t.last = t.first + p.chunk_rows < p.rows ? t.first + p.chunk_rows : p.rows;
        return t;
    }
    // Width is a multiple of V wherever V > 1.
    __device__ bool inside(const Params& p) const { return column < p.width; }
    __device__ u64 address(const Params& p, u64 row) const { return (outer * p.rows + row) * p.width + column; }
    // The rows of this thread.
    __device__ u32 count() const {
        const u64 rows = last - first;
        return row_lane < rows ? (u32(rows) - row_lane + row_lanes - 1) >> log2_of(row_lanes) : 0;
    }
    __device__ u64 row(u32 i) const { return first + row_lane + u64(i) * row_lanes; }
    __device__ u64 part(const Params& p) const { return (outer * p.part_chunks + chunk) * p.part_width + column; }
};

// Second passes start where the first have ended: what was read last may still be in the L2 cache.
__device__ inline u64 from_the_end() { return gridDim.x - 1 - blockIdx.x; }

// Calls f(v) for the columns of a thread, or for the first alone where all of them are of the same `len`
// neighbours; then copy(v), for the others.
template <int V, class F, class G> __device__ inline void each_column(u64 len, F f, G copy) {
    const bool alike = len % V == 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (v > 0 && alike) {
            copy(v);
        } else {
            f(v);
        }
    }
}

__device__ inline u64 set_of(const Params& p, const Tile& tile, int v) {
    return tile.outer * p.sets_per_outer + quotient(tile.column + v, p.run, p.by_seg);
}

template <int V, class A> __device__ inline void load_tile_stats(const Params& p, const Tile& tile, Stats<A> (&stats)[V]) {
    each_column<V>(p.run, [&](int v) { stats[v] = load_stats<A>(p, set_of(p, tile, v)); }, [&](int v) { stats[v] = stats[0]; });
}

// What the loops over rows know when they are compiled. What stands around a norm would make all of them long.
enum Loop { PLAIN, BY_ROW, WITH_FUSION };
template <Loop LOOP> struct LoopOf {
    static constexpr Loop VALUE = LOOP;
    static constexpr int ROWS = LOOP == WITH_FUSION ? 1 : 4; // under way at once
};

template <class F> __device__ inline void choose_loop(const Params& p, F f) {
    if (p.has(FUSED)) return f(LoopOf<WITH_FUSION>());
    if (p.has(PER_ROW)) return f(LoopOf<BY_ROW>());
    f(LoopOf<PLAIN>());
}

// Weight and bias of a thread's columns, or of the row that it is at.
template <Loop LOOP, class T, int V, class A> struct TileAffine {
    const Params& p;
    Affine<A, T> affine;
    A w[V], b[V];

    __device__ TileAffine(const Params& p, const Tile& tile) : p(p), affine(p, 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) w[v] = 1, b[v] = 0;
        if (by_row() || !tile.inside(p)) return;
        const auto load = [&](int v) {
            const u64 param = quotient(tile.column + v, p.span, p.by_span);
            w[v] = affine.weight_at(param);
            b[v] = affine.bias_at(param);
        };
        each_column<V>(p.span, load, [&](int v) { w[v] = w[0], b[v] = b[0]; });
    }
    __device__ bool by_row() const { return LOOP != PLAIN && p.has(PER_ROW); }
    __device__ A row_weight(u64 row) const { return by_row() ? affine.weight_at(row) : A(1); }
    __device__ A row_bias(u64 row) const { return by_row() ? affine.bias_at(row) : A(0); }
    __device__ void forward(u64 row, const Stats<A> (&stats)[V], A (&values)[V]) const {
        const A row_w = row_weight(row), row_b = row_bias(row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A weight = LOOP == PLAIN ? w[v] : w[v] * row_w, bias = LOOP == PLAIN ? b[v] : b[v] + row_b;
            values[v] = stats[v](values[v]) * weight + bias;
        }
    }
};

// Calls f(row, address, pack, pack) for a thread's rows of two tensors, of which either may be absent; K rows are
// loaded before the first is worked on.
template <class T, int V, int K, class F>
__device__ inline void each_row(const Params& p, const Tile& tile, const T* one, const T* two, F f) {
    const u32 count = tile.count();
    const u64 step = u64(tile.row_lanes) * p.width;
    u64 at = tile.address(p, tile.row(0));
    u32 i = 0;
    const auto rows = [&](auto& ones, auto& twos, int n) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (one) ones[k].fetch(one + at + k * step);
            if (two) twos[k].fetch(two + at + k * step);
        }
#pragma unroll
        for (int k = 0; k < n; ++k) f(tile.row(i + k), at + k * step, ones[k], twos[k]);
        i += n;
        at += n * step;
    };
#pragma unroll 1
    while (i + K <= count) {
        Pack<T, V> ones[K] = {}, twos[K] = {};
        rows(ones, twos, K);
    }
#pragma unroll 1
    while (K > 1 && i < count) {
        Pack<T, V> ones[1] = {}, twos[1] = {};
        rows(ones, twos, 1);
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

// The moments of a thread's columns, all of the same number of rows.
template <int V, class A> struct ColumnMoments {
    A mean[V] = {}, low[V] = {}, m2[V] = {};
    u32 count = 0;

    // Takes in K rows, in two passes over them.
    template <class T, int K> __device__ void take(bool center, const Pack<T, V> (&packs)[K]) {
        A values[V], first[V] = {}, rest[V] = {}, squares[V] = {};
        const auto each = [&](auto f) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                packs[k].get(values);
#pragma unroll
                for (int v = 0; v < V; ++v) f(v, values[v]);
            }
        };
        if (center) {
            each([&](int v, A x) { first[v] += x; });
#pragma unroll
            for (int v = 0; v < V; ++v) first[v] *= A(1) / K;
        }
        each([&](int v, A x) {
            const A d = x - first[v];
            rest[v] += d;
            squares[v] += d * d;
        });
#pragma unroll
        for (int v = 0; v < V; ++v) {
            rest[v] = center ? rest[v] * (A(1) / K) : A(0);
            squares[v] -= rest[v] * rest[v] * A(K);
            squares[v] = squares[v] < 0 ? A(0) : squares[v];
        }
        add(first, rest, squares, K);
    }
    // Merges with the moments of `more` other rows: `merge`, with a ratio for all columns. What is first is taken as it
    // is: the square of a difference from nothing may be infinite.
    __device__ void add(const A (&other)[V], const A (&other_low)[V], const A (&other_m2)[V], u32 more) {
        const A ratio = A(more) / A(count + more), weight = ratio * A(count);
        const bool first = count == 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A delta = (other[v] - mean[v]) + (other_low[v] - low[v]);
            mean[v] = first ? other[v] : mean[v];
            low[v] = first ? other_low[v] : low[v] + delta * ratio;
            m2[v] = first ? other_m2[v] : m2[v] + other_m2[v] + delta * delta * weight;
        }
        count += more;
    }
};

// Adds the residual to K rows of x, and writes the sums down.
template <class T, int V, int K>
__device__ inline void add_residual_rows(const Params& p, u64 at, u64 step, Pack<T, V> (&packs)[K]) {
    using A = typename Accumulator<T>::type;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        A values[V], more[V];
        fetch<T, V>(static_cast<const T*>(p.residual) + at + k * step, more);
        packs[k].get(values);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] += more[v];
        packs[k].set(values);
        packs[k].store(static_cast<T*>(p.sum) + at + k * step);
    }
}

template <class T, int V> __device__ void column_moments(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int K = 4;
    const Tile tile = Tile::of<V>(p, blockIdx.x);
    ColumnMoments<V, A> moments;
    const u64 step = u64(tile.row_lanes) * p.width;
    u64 at = tile.address(p, tile.row(0));
    u32 left = tile.inside(p) ? tile.count() : 0;
    const auto rows = [&](auto& packs, int n) {
#pragma unroll
        for (int k = 0; k < n; ++k) packs[k].fetch(static_cast<const T*>(p.x) + at + k * step);
        if (p.residual) add_residual_rows(p, at, step, packs);
        moments.take(p.has(CENTER), packs);
        left -= n;
        at += n * step;
    };
#pragma unroll 1
    while (left >= K) {
        Pack<T, V> packs[K];
        rows(packs, K);
    }
#pragma unroll 1
    while (left > 0) {
        Pack<T, V> packs[1];
        rows(packs, 1);
    }
    A(&mean)[V] = moments.mean, (&low)[V] = moments.low, (&m2)[V] = moments.m2;
    u32& count = moments.count;
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
        A other[V], other_low[V], other_m2[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            other[v] = shared[v * slots + slot];
            other_low[v] = shared[(V + v) * slots + slot];
            other_m2[v] = shared[(2 * V + v) * slots + slot];
        }
        if (counts[slot] > 0) moments.add(other, other_low, other_m2, counts[slot]);
    };
    fold_rows(p, tile, put, add);
    if (tile.row_lane != 0 || !tile.inside(p)) return;
    A* parts = static_cast<A*>(p.part_moments) + tile.part(p);
    const u64 total = p.outer * p.part_chunks * p.part_width;
#pragma unroll
    for (int v = 0; v < V; ++v) parts[v] = mean[v], parts[total + v] = low[v], parts[2 * total + v] = m2[v];
}

template <Loop LOOP, class T, int V, class A>
__device__ inline void put_columns(const Params& p, const Tile& tile, const Stats<A> (&stats)[V]) {
    const TileAffine<LOOP, T, V, A> affine(p, tile);
    const T* from = static_cast<const T*>(p.residual ? p.sum : p.x);
    each_row<T, V, LoopOf<LOOP>::ROWS>(p, tile, from, static_cast<const T*>(nullptr), [&](u64 row, u64 at, auto& x, auto&) {
        A values[V];
        x.get(values);
        affine.forward(row, stats, values);
        if (LOOP == WITH_FUSION) finish<T, V>(p, at, values);
        store<T, V>(static_cast<T*>(p.out) + at, values);
    });
}

template <class T, int V> __device__ void column_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p, from_the_end());
    if (!tile.inside(p)) return;
    Stats<A> stats[V];
    if (p.given_mean) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const u64 set = set_of(p, tile, v), first = (set - tile.outer * p.sets_per_outer) * p.run;
            stats[v] = forward_stats<A>(p, set, tile.chunk == 0 && tile.row_lane == 0 && tile.column + v == first);
        }
    } else {
        load_tile_stats(p, tile, stats);
    }
    choose_loop(p, [&](auto loop) { put_columns<decltype(loop)::VALUE, T, V>(p, tile, stats); });
}

// dz of a row of a tile, from what was loaded of x and dy.
template <class T, int V, class A>
__device__ inline void row_dz(const Params& p, u64 row, u64 at, const TileAffine<WITH_FUSION, T, V, A>& affine,
                                    const Stats<A> (&stats)[V], bool write, const A (&values)[V], A (&d)[V]) {
    A z[V];
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = values[v];
    affine.forward(row, stats, z);
    make_dz<T, V>(p, at, write, z, d);
}

template <Loop LOOP, class T, int V, class A>
__device__ inline void sum_columns(const Params& p, const Tile& tile, const Stats<A> (&stats)[V], A (&a)[V], A (&b)[V]) {
    const TileAffine<LOOP, T, V, A> affine(p, tile);
    const bool write = p.has(FIXED) && p.out;
    const auto row_sums = [&](u64 row, u64 at, auto& x, auto& dy) {
        A values[V], d[V];
        x.get(values);
        dy.get(d);
        if constexpr (LOOP == WITH_FUSION) row_dz<T, V>(p, row, at, affine, stats, p.has(SUMS_WRITE), values, d);
        const A row_w = affine.row_weight(row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (LOOP != PLAIN) d[v] *= row_w;
            a[v] += d[v];
            b[v] += d[v] * stats[v](values[v]);
        }
        if (!write) return;
#pragma unroll
        for (int v = 0; v < V; ++v) d[v] = d[v] * affine.w[v] * stats[v].rstd;
        store<T, V>(static_cast<T*>(p.out) + at, d);
    };
    each_row<T, V, LoopOf<LOOP>::ROWS>(p, tile, static_cast<const T*>(p.x), static_cast<const T*>(p.dy), row_sums);
}

template <class T, int V> __device__ void column_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p, blockIdx.x);
    A a[V] = {}, b[V] = {};
    if (tile.inside(p)) {
        Stats<A> stats[V];
        load_tile_stats(p, tile, stats);
        choose_loop(p, [&](auto loop) { sum_columns<decltype(loop)::VALUE, T, V>(p, tile, stats, a, b); });
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
template <Loop LOOP, class T, int V, class A>
__device__ inline void put_column_gradients(const Params& p, const Tile& tile, const Stats<A> (&stats)[V], const A (&sums)[V][2]) {
    const TileAffine<LOOP, T, V, A> affine(p, tile);
    const bool row_gradients = affine.by_row() && p.has(WANT_PARAMS), with_x = !p.has(FIXED) || row_gradients || LOOP == WITH_FUSION;
    const bool inside = tile.inside(p);
    // Lanes beyond the width stay for the sums of rows.
    const T *x = inside && with_x ? static_cast<const T*>(p.x) : nullptr, *dy = inside ? static_cast<const T*>(p.dy) : nullptr;
    each_row<T, V, LoopOf<LOOP>::ROWS>(p, tile, x, dy, [&](u64 row, u64 at, auto& xs, auto& dys) {
        A row_a = 0, row_b = 0;
        if (inside) {
            A values[V], d[V];
            xs.get(values);
            dys.get(d);
            if constexpr (LOOP == WITH_FUSION) row_dz<T, V>(p, row, at, affine, stats, !p.has(SUMS_WRITE), values, d);
            const A row_w = affine.row_weight(row);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (LOOP != PLAIN) row_a += d[v], row_b += d[v] * stats[v](values[v]);
                values[v] = input_gradient(stats[v], values[v], d[v] * (affine.w[v] * row_w), sums[v]);
            }
            if (p.out) store<T, V>(static_cast<T*>(p.out) + at, values);
        }
        if (!row_gradients) return;
        row_a = lanes_sum(row_a, 32);
        row_b = lanes_sum(row_b, 32);
        if (tile.lane == 0) put_param_gradient(p, tile.outer * tile.tiles + tile.tile, row, row_b, row_a);
    });
}

template <class T, int V> __device__ void column_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Tile tile = Tile::of<V>(p, from_the_end());
    const A* sums_of = static_cast<const A*>(p.sums);
    Stats<A> stats[V] = {};
    A sums[V][2] = {};
    if (tile.inside(p)) load_tile_stats(p, tile, stats);
    if (tile.inside(p) && sums_of) {
        const auto load = [&](int v) {
            const u64 set = set_of(p, tile, v);
            sums[v][0] = sums_of[set];
            sums[v][1] = sums_of[p.sets + set];
            const u64 param = quotient(tile.column + v, p.span, p.by_span);
            to_means(p, p.has(UNWEIGHTED) && !p.has(PER_ROW) ? Affine<A, T>(p, 0).weight_at(param) : A(1), sums[v]);
        };
        each_column<V>(p.run, load, [&](int v) { sums[v][0] = sums[0][0], sums[v][1] = sums[0][1]; });
    }
    choose_loop(p, [&](auto loop) { put_column_gradients<decltype(loop)::VALUE, T, V>(p, tile, stats, sums); });
}
