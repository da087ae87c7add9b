// Where a set lies, which parameter scales its elements, and its statistics.
//
// Apart from the kernels, because all that walk sets ask the same questions. Elements of a set are
// numbered along its segments; numbers stay below 2^31 within a set that is on chip and within a chunk.
#pragma once
#include "moments.cuh"

struct Place {
    u64 set, outer;
    u64 base;        // of everything but x
    u64 x_base;      // of x, which may lie in blocks apart
    u64 first_param;

    // Where element e of the set lies behind its base.
    __device__ u64 offset(const Params& p, u32 e) const {
        if (p.segs == 1) return e;
        const u32 seg = p.by_seg(e);
        return seg * p.seg_stride + (e - seg * p.by_seg.divisor);
    }
    // Whether all elements are neighbours.
    __device__ bool contiguous(const Params& p) const { return p.segs == 1; }
    // The element that Affine counts it as.
    __device__ u32 column(u32 e) const { return e; }
};

// A division takes a hundred instructions of 64 bits, and is met a few times a set.
__device__ NORM_CALL inline u64 divide_call(u64 n, u64 by) { return (n | by) <= 0xffffffffu ? u32(n) / u32(by) : n / by; }

__device__ inline u64 quotient(u64 n, u64 by) { return by == 1 ? n : divide_call(n, by); }

// The same by a number that the plan knows: without a call where that of a block or a set is below 2^31.
__device__ inline u64 quotient(u64 n, u64 by, const Divisor& quick) { return n >> 31 ? divide_call(n, by) : quick(u32(n)); }

// Where block `o` of an x in blocks apart starts.
__device__ NORM_CALL inline u64 block_start(const Params& p, u64 o) {
    u64 start = 0;
    for (int d = 3; d >= 0; --d) {
        const u64 rest = quotient(o, p.block_dims[d]);
        start += (o - rest * p.block_dims[d]) * p.block_strides[d];
        o = rest;
    }
    return start;
}

__device__ inline Place place_set(const Params& p, u64 set) {
    const u64 o = p.outer > 1 ? quotient(set, p.sets_per_outer, p.by_sets) : 0, q = set - o * p.sets_per_outer;
    const u64 base = o * p.rows * p.width + q * p.run;
    const u64 sample = p.tokens ? quotient(o, p.tokens) * p.params : 0;
    return {set, o, base, p.has(BLOCKS) ? block_start(p, o) + q * p.run : base, q * p.set_params + sample};
}

template <class A> struct Stats {
    A mean, rstd, shift;

    Stats() = default;
    // A root of infinity makes no difference out of none.
    __device__ Stats(A mean, A low, A rstd) : mean(mean), rstd(rstd), shift(low == 0 ? A(0) : -low * rstd) {}
    // The element normalized: (x - mean - low) * rstd.
    __device__ A operator()(A x) const { return (x - mean) * rstd + shift; }
};

// running = (1 - momentum) * running + momentum * batch, the variance unbiased.
__device__ inline void move_running(const Params& p, u64 channel, double mean, double var, double n) {
    const double old_mean = load_param<double>(p.running_mean, p.running_mean_dtype, channel);
    const double old_var = load_param<double>(p.running_var, p.running_var_dtype, channel);
    const double keep = 1 - p.momentum;
    store_param(p.running_mean, p.running_mean_dtype, channel, keep * old_mean + p.momentum * mean);
    store_param(p.running_var, p.running_var_dtype, channel, keep * old_var + p.momentum * (var * (n / (n - 1))));
}

// What is kept of a set between the forward and the backward.
template <class A> struct Summary {
    A mean, low, var;

    Summary() = default;
    // From its moments.
    template <class N> __device__ Summary(const Params& p, Moments<A, N> m) : mean(m.mean), low(m.low), var(p.set_len ? m.m2 / A(p.set_len) : A(0)) {
        normalize_pair(mean, low);
    }
    // As an earlier launch has left it: asked for at once, worked out when it is needed.
    __device__ Summary(const Params& p, u64 set) : Summary(p, static_cast<const A*>(p.stats) + set) {}
    __device__ Summary(const Params& p, const A* at)
        : mean(load_constant(at)), low(load_constant(at + p.sets)), var(load_constant(at + 2 * p.sets)) {}
    __device__ Stats<A> stats(const Params& p) const { return {mean, low, inverse_sqrt(var + A(p.eps))}; }
    // Keeps it for the backward, and moves the running statistics where the set is all that there is of a channel.
    __device__ void write(const Params& p, u64 set) const {
        if (p.stats) {
            A* stats = static_cast<A*>(p.stats);
            stats[set] = mean;
            stats[p.sets + set] = low;
            stats[2 * p.sets + set] = var;
        }
        if (p.running_mean && p.outer == 1) move_running(p, set, double(mean) + double(low), double(var), double(p.set_len));
    }
};

template <class A> __device__ inline Stats<A> load_stats(const Params& p, u64 set) { return Summary<A>(p, set).stats(p); }

// Statistics for a forward: the given ones, whatever their dtype, or those that an earlier kernel wrote.
// `writer` is true in one thread of the set: it copies given ones where the backward wants them.
template <class A> __device__ inline Stats<A> forward_stats(const Params& p, u64 set, bool writer) {
    if (!p.given_mean) return load_stats<A>(p, set);
    const double exact = load_param<double>(p.given_mean, p.given_mean_dtype, set);
    const A mean = A(exact), var = load_param<A>(p.given_var, p.given_var_dtype, set);
    A low = A(exact - double(mean));
    if (p.given_low) low += load_param<A>(p.given_low, p.given_mean_dtype, set);
    if (p.stats && writer) {
        A* stats = static_cast<A*>(p.stats);
        stats[set] = mean;
        stats[p.sets + set] = low;
        stats[2 * p.sets + set] = var;
    }
    return {mean, low, inverse_sqrt(var + A(p.eps))};
}

// From the moments of a whole set to its statistics. `writer` is true in one thread of the set.
template <class A, class N> __device__ inline Stats<A> finish_moments(const Params& p, u64 set, Moments<A, N> m, bool writer) {
    const Summary<A> summary(p, m);
    if (writer) summary.write(p, set);
    return summary.stats(p);
}

// One copy's part of the gradients of V neighbouring parameters: `copy` of `p.copies`.
template <int V, class A>
__device__ inline void put_param_parts(const Params& p, u64 copy, u64 param, const A* weight, const A* bias) {
    constexpr int STEP = V * sizeof(A) <= 16 ? V : int(16 / sizeof(A));
    A* parts = static_cast<A*>(p.param_parts) + copy * p.param_width + param;
#pragma unroll
    for (int at = 0; at < V; at += STEP) {
        A w[STEP], b[STEP];
#pragma unroll
        for (int v = 0; v < STEP; ++v) w[v] = weight[at + v], b[v] = bias[at + v];
        store<A, STEP>(parts + at, b);
        store<A, STEP>(parts + p.copies * p.param_width + at, w);
    }
}

// A parameter's gradient, or the part of it that one copy has.
template <class A>
__device__ inline void put_param_gradient(const Params& p, u64 copy, u64 param, A weight, A bias) {
    if (p.param_parts) {
        put_param_parts<1>(p, copy, param, &weight, &bias);
        return;
    }
    if (p.dweight) store_param(p.dweight, p.dweight_dtype, param, weight);
    if (p.dbias) store_param(p.dbias, p.dbias_dtype, param, bias);
}
