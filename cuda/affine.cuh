// The affine map's parameters: which of them V neighbouring elements of a set have.
//
// The one place that reads weight and bias. Neighbours of one access have neighbouring parameters, aligned
// as 16 bytes, or one parameter: the plan sees to it. The dtype is a run-time value, the same for all threads.
#pragma once
#include "element.cuh"

// One parameter for all.
template <class A> struct OneParam {
    static constexpr bool USUAL = true; // worth a copy of the loop for every pack of a thread
    A weight, bias;

    template <int V> __device__ void get(u32, A (&w)[V], A (&b)[V]) const {
#pragma unroll
        for (int v = 0; v < V; ++v) w[v] = weight, b[v] = bias;
    }
};

// A parameter of x's type T, or of f32.
template <class A, class T> __device__ inline A plain_at(const void* from, u32 dtype, u64 i) {
    return sizeof(T) != 2 || dtype == DTYPE<T> ? element_at<T, A>(from, i) : element_at<float, A>(from, i);
}

// The parameter that a whole set has, if it has one for all of it.
template <class A, class T> __device__ inline OneParam<A> plain_param(const Params& p, u64 param) {
    if (!p.has(PER_SET)) return {1, 0};
    return {p.weight ? plain_at<A, T>(p.weight, p.weight_dtype, param) : A(1), p.bias ? plain_at<A, T>(p.bias, p.bias_dtype, param) : A(0)};
}

// Asks for the line of a set's own parameter.
template <class T> __device__ inline void ask_param(const Params& p, u64 param) {
    const auto line = [&](const void* params, u32 dtype) {
        if (params) prefetch(static_cast<const char*>(params) + param * (dtype == DTYPE<T> ? sizeof(T) : sizeof(float)));
    };
    line(p.weight, p.weight_dtype);
    line(p.bias, p.bias_dtype);
}

// A parameter of type P for every element, from that of element 0 on. `OWN`: P is x's type.
template <class P, bool BIAS, bool OWN> struct ColumnParams {
    static constexpr bool USUAL = OWN;
    const P *weight, *bias;

    template <int V, class A> __device__ void get(u32 e, A (&w)[V], A (&b)[V]) const {
        load_params_as<P>(weight, e, w);
        if constexpr (BIAS) {
            load_params_as<P>(bias, e, b);
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) b[v] = 0;
        }
    }
};

// One for every `span` elements.
template <class P, bool BIAS> struct SpanParams {
    static constexpr bool USUAL = false;
    const P *weight, *bias;
    Divisor by_span;

    template <int V, class A> __device__ void get(u32 e, A (&w)[V], A (&b)[V]) const {
        const u32 i = by_span(e);
        OneParam<A>{element_at<P, A>(weight, i), BIAS ? element_at<P, A>(bias, i) : A(0)}.get(e, w, b);
    }
};

// Calls f with the parameters of type P of a set, if it has a weight and all are of that type.
template <class P, bool OWN, class F> __device__ inline bool with_params_as(const Params& p, u64 first, F f) {
    if (!p.weight || p.weight_dtype != DTYPE<P> || (p.bias && p.bias_dtype != DTYPE<P>)) return false;
    const P *weight = static_cast<const P*>(p.weight) + first, *bias = static_cast<const P*>(p.bias) + first;
    if (!p.has(PER_COLUMN)) {
        if (!p.bias) return false;
        f(SpanParams<P, true>{weight, bias, p.by_span});
    } else if (p.bias) {
        f(ColumnParams<P, true, OWN>{weight, bias});
    } else {
        f(ColumnParams<P, false, OWN>{weight, bias});
    }
    return true;
}

// The same for those that are usual: of x's type T, and f32.
template <class T, class F> __device__ inline bool with_plain_params(const Params& p, u64 first, F f) {
    if (with_params_as<T, true>(p, first, f)) return true;
    if constexpr (sizeof(T) == 2) return with_params_as<float, false>(p, first, f);
    return false;
}

// Calls f with the weights of type P of a set whose elements have different ones, if they are of that type.
template <class P, class F> __device__ inline bool with_weight_as(const Params& p, u64 first, F f) {
    if (!p.weight || p.weight_dtype != DTYPE<P> || p.weight_offset != 0) return false;
    const P* weight = static_cast<const P*>(p.weight) + first;
    if (p.has(PER_COLUMN)) {
        f(ColumnParams<P, false, true>{weight, nullptr});
    } else {
        f(SpanParams<P, false>{weight, nullptr, p.by_span});
    }
    return true;
}

template <class T, class F> __device__ inline bool with_plain_weight(const Params& p, u64 first, F f) {
    if (with_weight_as<T>(p, first, f)) return true;
    if constexpr (sizeof(T) == 2) return with_weight_as<float>(p, first, f);
    return false;
}

// T is x's element, in the loops over elements: there its own dtype comes first.
template <class A, class T = float> struct Affine {
    const Params& p;
    u64 first; // parameter of element 0

    __device__ Affine(const Params& p, u64 first) : p(p), first(first) {}

    // Elements e .. e + V of the set, counted from the one that `first` belongs to.
    template <int V> __device__ void weight(u32 e, A (&w)[V]) const {
        if (p.weight) {
            load(p.weight, p.weight_dtype, e, w);
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] += A(p.weight_offset);
        } else {
            fill(w, A(1));
        }
    }
    template <int V> __device__ void bias(u32 e, A (&b)[V]) const {
        if (p.bias) {
            load(p.bias, p.bias_dtype, e, b);
        } else {
            fill(b, A(0));
        }
    }
    // The weight that a whole set, column or row has.
    __device__ A weight_at(u64 param) const {
        return p.weight ? load_param<A, T>(p.weight, p.weight_dtype, param) + A(p.weight_offset) : A(1);
    }
    __device__ A bias_at(u64 param) const { return p.bias ? load_param<A, T>(p.bias, p.bias_dtype, param) : A(0); }
    // Weights where they differ within a set, else ones: a weight that a whole set shares is
    // multiplied into the sums instead.
    template <int V> __device__ void varying_weight(u32 e, A (&w)[V]) const {
        if (p.has(PER_SET)) {
            fill(w, A(1));
        } else {
            weight(e, w);
        }
    }
    __device__ A shared_weight() const { return p.has(PER_SET) ? weight_at(first) : A(1); }

    // Asks for the parameters of elements from .. to ahead of their use: a cache line by each lane.
    __device__ void ask(u32 from, u32 to, u32 lane, u32 lanes) const {
        const auto lines = [&](const void* params, u32 dtype) {
            const u32 shift = dtype == 0 ? 2 : dtype == 3 ? 3 : 1;
            const char* start = static_cast<const char*>(params) + ((first + from) << shift);
            if (!params) return;
#pragma unroll 1
            for (u32 at = lane * 128; at < (to - from) << shift; at += lanes * 128) prefetch(start + at);
        };
        lines(p.weight, p.weight_dtype);
        lines(p.bias, p.bias_dtype);
    }

  private:
    template <int V> __device__ static void fill(A (&to)[V], A value) {
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = value;
    }
    template <int V> __device__ void load(const void* from, u32 dtype, u32 e, A (&to)[V]) const {
        if (p.has(PER_COLUMN)) {
            load_neighbours<T>(from, dtype, first + e, to);
        } else {
            fill(to, load_param<A, T>(from, dtype, first + (p.has(PER_SET) ? 0 : p.by_span(e))));
        }
    }
};

// The weights of any set, as those above are asked for theirs.
template <class A, class T> struct AnyWeight {
    const Affine<A, T>& affine;

    template <int V> __device__ void get(u32 e, A (&w)[V], A (&)[V]) const { affine.weight(e, w); }
};
