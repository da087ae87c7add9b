// What stands behind the affine map: skip, activation, gate, forward and backward.
//
//     z = xhat * weight + bias + skip
//     y = activation(z)               or z * silu(gate)
//
// Where z becomes y and dy becomes dz; kernels load and store them by `Pack` of element.cuh. z is not rounded. A norm with
// nothing around it does not have the flag FUSED, and takes the loops that never come here.
// Activations are within 2 ulp of f64 except GELU near and below -1, where CUDA's erfc has 4.
#pragma once
#include "affine.cuh"

template <class A> __device__ inline A sigmoid(A v) { return A(1) / (A(1) + exp(-v)); }

// The standard normal distribution up to z, without cancellation on the left.
template <class A> __device__ inline A normal_below(A z) { return A(0.5) * erfc(z * A(-0.70710678118654752440)); }

// tanh-GELU is z * sigmoid(t) with t = 2 sqrt(2 / pi) (z + 0.044715 z^3).
template <class A> __device__ inline A gelu_argument(A z) {
    return A(1.5957691216057307117) * (z + A(0.044715) * z * z * z);
}

// The smooth ones, as calls: eight copies of each in a loop would be most of a kernel.
template <class A> __device__ NORM_CALL A activate_smooth(u32 activation, A z) {
    switch (activation) {
    case SILU: return z * sigmoid(z);
    case SIGMOID: return sigmoid(z);
    case HARD_SWISH: return z <= -3 ? A(0) : z >= 3 ? z : z * (z + 3) / 6;
    case GELU: return z * normal_below(z);
    case GELU_TANH:
    default: return z * sigmoid(gelu_argument(z));
    }
}

template <class A> __device__ NORM_CALL A slope_smooth(u32 activation, A z) {
    switch (activation) {
    case SILU: {
        const A s = sigmoid(z);
        return s * (1 + z * (1 - s));
    }
    case SIGMOID: {
        const A s = sigmoid(z);
        return s * (1 - s);
    }
    case HARD_SWISH: return z <= -3 ? A(0) : z >= 3 ? A(1) : (2 * z + 3) / 6;
    case GELU: return normal_below(z) + z * A(0.39894228040143267794) * exp(A(-0.5) * z * z);
    case GELU_TANH:
    default: {
        const A s = sigmoid(gelu_argument(z)), rest = s * (1 - s);
        // Where it is 0 the factor may be infinite.
        return rest == 0 ? s : s + z * rest * A(1.5957691216057307117) * (1 + A(3 * 0.044715) * z * z);
    }
    }
}

// Those of straight pieces: no slope but `p.slope` on the left, none beyond 6 for ReLU6.
template <class A> __device__ inline A activate(const Params& p, A z) {
    if (p.activation > LEAKY_RELU) return activate_smooth(p.activation, z);
    if (z < 0) return p.activation == LEAKY_RELU ? A(p.slope) * z : A(0);
    return p.activation == RELU6 && z > 6 ? A(6) : z;
}

// The derivative of `activate`; at kinks as PyTorch has it.
template <class A> __device__ inline A slope(const Params& p, A z) {
    if (p.activation > LEAKY_RELU) return slope_smooth(p.activation, z);
    if (!(z > 0)) return p.activation == LEAKY_RELU ? A(p.slope) : A(0);
    return p.activation == RELU6 && z >= 6 ? A(0) : A(1);
}

template <class A> __device__ NORM_CALL A call_sigmoid(A v) { return sigmoid(v); }

// z, without skip, of V elements at `at` becomes y.
template <class T, int V, class A> __device__ inline void finish(const Params& p, u64 at, A (&z)[V]) {
    if (p.skip) {
        A skip[V];
        fetch<T, V>(static_cast<const T*>(p.skip) + at, skip);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += skip[v];
    }
    if (p.gate) {
        A gate[V];
        fetch<T, V>(static_cast<const T*>(p.gate) + at, gate);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] *= gate[v] * call_sigmoid(gate[v]);
    }
    if (p.activation == NONE) return;
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = activate(p, z[v]);
}

// z, without skip, and dy of V elements at `at`: dy becomes dz. `write` stores the gradients of skip and
// gate, which is to happen once.
template <class T, int V, class A>
__device__ inline void make_dz(const Params& p, u64 at, bool write, A (&z)[V], A (&d)[V]) {
    if (p.skip) {
        A skip[V];
        fetch<T, V>(static_cast<const T*>(p.skip) + at, skip);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += skip[v];
    }
    if (p.gate) {
        A gate[V], dgate[V];
        fetch<T, V>(static_cast<const T*>(p.gate) + at, gate);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A s = call_sigmoid(gate[v]);
            dgate[v] = d[v] * z[v] * s * (1 + gate[v] * (1 - s));
            d[v] *= gate[v] * s;
        }
        if (write && p.dgate) store<T, V>(static_cast<T*>(p.dgate) + at, dgate);
    }
    if (p.activation != NONE) {
#pragma unroll
        for (int v = 0; v < V; ++v) d[v] *= slope(p, z[v]);
    }
    if (write && p.dskip) store<T, V>(static_cast<T*>(p.dskip) + at, d);
}
