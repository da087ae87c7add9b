// Where a set lies, which parameter scales its elements, and its statistics.
//
// Apart from the kernels, because all that walk sets ask the same questions. Elements of a set are
// numbered along its segments; numbers stay below 2^31 within a set that is on chip and within a chunk.
#pragma once
#include "moments.cuh"

struct Place {
    u64 set, outer, base, first_param;
};

__device__ inline Place place_set(const Params& p, u64 set) {
    u64 o = 0, q = set;
    if (p.outer > 1) {
        if (p.sets_per_outer == 1) {
            o = set, q = 0;
        } else if (p.sets <= 0xffffffffu) {
            o = u32(set) / u32(p.sets_per_outer), q = set - o * p.sets_per_outer;
        } else {
            o = set / p.sets_per_outer, q = set - o * p.sets_per_outer;
        }
    }
    return {set, o, o * p.rows * p.width + q * p.run, q * p.set_params};
}

// Where element e of the set lies behind its base.
__device__ inline u64 offset_of(const Params& p, u32 e) {
    if (p.segs == 1) return e;
    const u32 seg = p.by_seg(e);
    return seg * p.seg_stride + (e - seg * p.by_seg.divisor);
}

// Parameters of V neighbouring elements of a set; `e` counts along its columns.
template <int V, class A>
__device__ inline void load_affine(const Params& p, const void* from, u32 dtype, u64 first, u32 e, A (&to)[V]) {
    if (p.has(PER_COLUMN)) {
        load_neighbours(from, dtype, p.has(PARAMS_ALIGNED), first + e, to);
        return;
    }
    u32 param = p.has(PER_SET) ? 0 : p.by_span(e);
    u32 rest = p.has(PER_SET) ? 0 : e - param * p.by_span.divisor;
    A value = load_param<A>(from, dtype, first + param);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!p.has(PER_SET) && rest++ == p.by_span.divisor) {
            rest = 1;
            value = load_param<A>(from, dtype, first + ++param);
        }
        to[v] = value;
    }
}

template <int V, class A>
__device__ inline void load_weight(const Params& p, u64 first, u32 e, A (&w)[V]) {
    if (p.weight) {
        load_affine(p, p.weight, p.weight_dtype, first, e, w);
    } else {
#pragma unroll
        for (int v = 0; v < V; ++v) w[v] = 1;
    }
}

template <int V, class A>
__device__ inline void load_bias(const Params& p, u64 first, u32 e, A (&b)[V]) {
    if (p.bias) {
        load_affine(p, p.bias, p.bias_dtype, first, e, b);
    } else {
#pragma unroll
        for (int v = 0; v < V; ++v) b[v] = 0;
    }
}

template <class A> struct Stats {
    A mean, low, rstd;
    // The element normalized.
    __device__ A operator()(A x) const { return ((x - mean) - low) * rstd; }
};

template <class A> __device__ inline Stats<A> load_stats(const Params& p, u64 set) {
    const A* stats = static_cast<const A*>(p.stats);
    return {stats[set], stats[p.sets + set], inverse_sqrt(stats[2 * p.sets + set] + A(p.eps))};
}

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

// running = (1 - momentum) * running + momentum * batch, the variance unbiased.
__device__ inline void move_running(const Params& p, u64 channel, double mean, double var, double n) {
    const double old_mean = load_param<double>(p.running_mean, p.running_mean_dtype, channel);
    const double old_var = load_param<double>(p.running_var, p.running_var_dtype, channel);
    const double keep = 1 - p.momentum;
    store_param(p.running_mean, p.running_mean_dtype, channel, keep * old_mean + p.momentum * mean);
    store_param(p.running_var, p.running_var_dtype, channel, keep * old_var + p.momentum * (var * (n / (n - 1))));
}

// From the moments of a whole set to its statistics. `writer` is true in one thread of the set.
template <class A, class N>
__device__ inline Stats<A> finish_moments(const Params& p, u64 set, Moments<A, N> m, bool writer) {
    normalize_pair(m.mean, m.low);
    const A var = p.set_len ? m.m2 / A(p.set_len) : A(0);
    if (writer) {
        if (p.stats) {
            A* stats = static_cast<A*>(p.stats);
            stats[set] = m.mean;
            stats[p.sets + set] = m.low;
            stats[2 * p.sets + set] = var;
        }
        if (p.running_mean && p.outer == 1) {
            move_running(p, set, double(m.mean) + double(m.low), double(var), double(p.set_len));
        }
    }
    return {m.mean, m.low, inverse_sqrt(var + A(p.eps))};
}

// A parameter's gradient, or the part of it that one copy has: `copy` of `p.copies`.
template <class A>
__device__ inline void put_param_gradient(const Params& p, u64 copy, u64 param, A weight, A bias) {
    if (p.param_parts) {
        A* parts = static_cast<A*>(p.param_parts);
        parts[copy * p.param_width + param] = bias;
        parts[(p.copies + copy) * p.param_width + param] = weight;
        return;
    }
    if (p.dweight) store_param(p.dweight, p.dweight_dtype, param, weight);
    if (p.dbias) store_param(p.dbias, p.dbias_dtype, param, bias);
}
