// RMS norm of x * silu(gate): a row in a block's registers, forward and backward.
//
// Apart from held.cuh, whose sets are held in x's type: here what is normalized is a product that must
// not be rounded. It is 16 values a thread (8 of f64), and takes a row of 512 threads and no shared memory.
//
// With s = sigmoid(gate), u = x * gate * s, xhat = u * rstd and g = dy * weight, over n elements of a row:
//     du    = rstd * (g - xhat * sum(g * xhat) / n)
//     dx    = du * gate * s
//     dgate = du * x * s * (1 + gate * (1 - s))
// A thread keeps to its columns, and adds up the gradients of their weights over the rows of its block.
#pragma once
#include "held_backward.cuh"

// As `sigmoid`; f32 with a reciprocal of 1 ulp in place of a division, which would be half of the instructions.
template <class A> __device__ inline A gate_sigmoid(A v) {
    if constexpr (sizeof(A) == 8) {
        return call_sigmoid(v);
    } else {
        return quick_inverse(A(1) + exp(-v));
    }
}

// A thread's share of a row: every `lanes`-th pack. Those beyond the row's end are never asked for.
template <class T, int V> struct Columns {
    static constexpr int N = BACKWARD_ELEMENTS<T> / V;
    u32 lane, lanes, units;

    __device__ Columns(const Params& p, u32 lane) : lane(lane), lanes(p.lanes), units(u32(p.set_len) / V) {}

    // Calls f(k, element) for pack k of this thread.
    template <class F> __device__ void each(F f) const {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const u32 unit = lane + k * lanes;
            if (unit < units) f(k, unit * V);
        }
    }
    __device__ void fetch(const T* from, Pack<T, V> (&packs)[N]) const {
        each([&](int k, u32 e) { packs[k].fetch(from + e); });
    }
};

template <class T, int V> __device__ void gated_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = Columns<T, V>::N;
    Group<A, 1> group(p.lanes, shared_memory());
    const Columns<T, V> columns(p, group.lane);
    const u32 shift = log2_of(p.lanes), per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    for (u64 first = u64(blockIdx.x) * per_block; first < p.sets; first += u64(gridDim.x) * per_block) {
        const bool active = first + mine < p.sets;
        const Place at = place_set(p, active ? first + mine : first);
        Pack<T, V> x[N], gate[N];
        columns.fetch(static_cast<const T*>(p.x) + at.x_base, x);
        columns.fetch(static_cast<const T*>(p.gate) + at.base, gate);
        const Affine<A, T> affine(p, at.first_param);
        if (p.has(PER_COLUMN)) affine.ask(0, u32(p.set_len), threadIdx.x, blockDim.x);
        A u[N][V], m2[1] = {};
        columns.each([&](int k, u32) {
            A g[V];
            x[k].get(u[k]);
            gate[k].get(g);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                u[k][v] *= g[v] * gate_sigmoid(g[v]);
                m2[0] += u[k][v] * u[k][v];
            }
        });
        group.sum(m2);
        const Stats<A> stats = finish_moments(p, at.set, Moments<A>{0, 0, m2[0], u32(p.set_len)}, active && group.first());
        if (!active) continue;
        T* out = static_cast<T*>(p.out) + at.base;
        columns.each([&](int k, u32 e) {
            A w[V];
            affine.weight(e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] *= u[k][v] * stats.rstd;
            store_global<T, V>(out + e, w);
        });
    }
}

// What a thread has of a row, as it lies in memory.
template <class T, int V> struct GatedRow {
    using A = typename Accumulator<T>::type;
    static constexpr int N = Columns<T, V>::N;
    Pack<T, V> x[N], gate[N], dy[N];
    Summary<A> stats;

    __device__ void fetch(const Params& p, const Columns<T, V>& columns, u64 row) {
        const u64 base = row * p.width;
        columns.fetch(static_cast<const T*>(p.x) + (p.has(BLOCKS) ? block_start(p, row) : base), x);
        columns.fetch(static_cast<const T*>(p.gate) + base, gate);
        columns.fetch(static_cast<const T*>(p.dy) + base, dy);
        stats = Summary<A>(p, row);
    }
    // silu(gate) and its derivative.
    __device__ void silu(int k, A (&value)[V], A (&slope)[V]) const {
        gate[k].get(value);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A s = gate_sigmoid(value[v]);
            slope[v] = s * (A(1) + value[v] * (A(1) - s));
            value[v] *= s;
        }
    }
};

template <class T, int V> __device__ void gated_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = Columns<T, V>::N;
    // Elements of 16 bits leave registers for the next row.
    constexpr bool AHEAD = sizeof(T) == 2 && V > 1;
    Group<A, 1> group(p.lanes, shared_memory());
    const Columns<T, V> columns(p, group.lane);
    const u32 shift = log2_of(p.lanes), per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    const Work<V, 1> work(p, per_block);
    const Affine<A, T> affine(p, 0);
    A weights[N][V] = {}, dweight[N * V] = {}, none[N * V] = {};
    // Kept for all rows; with an element an access there is no register for them.
    if constexpr (V > 1) columns.each([&](int k, u32 e) { affine.weight(e, weights[k]); });
    const auto weight_of = [&](int k, u32 e, A(&w)[V]) {
        if constexpr (V > 1) {
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] = weights[k][v];
        } else {
            affine.weight(e, w);
        }
    };
    GatedRow<T, V> next = {};
    const u32 turns = work.turns(0), own_turns = work.turns(mine);
    const auto ask = [&](u32 turn) {
        if (turn < own_turns) next.fetch(p, columns, work.item(mine, turn));
    };
    const A inverse = A(1) / A(p.count);
    ask(0);
    for (u32 turn = 0; turn < turns; ++turn) {
        const bool active = turn < own_turns;
        GatedRow<T, V> of = next;
        if constexpr (AHEAD) ask(turn + 1);
        const A rstd = of.stats.stats(p).rstd;
        A sums[1] = {};
        columns.each([&](int k, u32 e) {
            A x[V], d[V], w[V], silu[V], slope[V];
            if (!active) return;
            of.x[k].get(x);
            of.dy[k].get(d);
            of.silu(k, silu, slope);
            weight_of(k, e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A xhat = x[v] * silu[v] * rstd;
                sums[0] += d[v] * w[v] * xhat;
                dweight[k * V + v] += d[v] * xhat;
            }
        });
        group.sum(sums);
        const A mean = sums[0] * inverse;
        const u64 base = work.item(mine, turn) * p.width;
        T *dx = static_cast<T*>(p.out) + base, *dgate = static_cast<T*>(p.dgate) + base;
        columns.each([&](int k, u32 e) {
            A x[V], d[V], w[V], silu[V], slope[V];
            if (!active) return;
            of.x[k].get(x);
            of.dy[k].get(d);
            of.silu(k, silu, slope);
            weight_of(k, e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A du = rstd * (d[v] * w[v] - x[v] * silu[v] * rstd * mean);
                slope[v] *= du * x[v];
                silu[v] *= du;
            }
            if (p.out) store_global<T, V>(dx + e, silu);
            if (p.dgate) store_global<T, V>(dgate + e, slope);
        });
        if constexpr (!AHEAD) ask(turn + 1);
    }
    if (!p.has(WANT_PARAMS)) return;
    if (per_block > 1) add_groups(dweight, reinterpret_cast<A*>(shared_memory() + Group<A, 1>::BYTES), p.lanes);
    columns.each([&](int k, u32 e) {
        if (mine != per_block - 1) return;
        if (p.param_parts) {
            put_param_parts<V>(p, work.copy, e, dweight + k * V, none + k * V);
        } else {
            put_param_gradients<T, V>(p, e, dweight + k * V, none + k * V);
        }
    });
}
