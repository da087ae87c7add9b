// Elements: accumulation types, conversions, 16-byte packs, parameters of any dtype.
//
// A pack stays packed in registers and is widened where it is used: half the registers of widened
// 16-bit values, for a conversion that costs nothing beside the memory.
#pragma once
#include "params.cuh"

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

template <class A> __device__ inline A widen(float v) { return A(v); }
template <class A> __device__ inline A widen(double v) { return A(v); }
template <class A> __device__ inline A widen(__half v) { return A(__half2float(v)); }
template <class A> __device__ inline A widen(__nv_bfloat16 v) { return A(__bfloat162float(v)); }

// One rounding from the accumulation type.
template <class T> __device__ inline T narrow(float v) { return T(v); }
template <class T> __device__ inline T narrow(double v) { return T(v); }
template <> __device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __half narrow<__half>(double v) { return __double2half(v); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(double v) { return __double2bfloat16(v); }

template <int BYTES> struct Raw;
template <> struct Raw<2> { using type = unsigned short; };
template <> struct Raw<4> { using type = u32; };
template <> struct Raw<8> { using type = u64; };
template <> struct Raw<16> { using type = uint4; };

// V neighbouring elements, loaded and stored in one access.
template <class T, int V> struct Pack {
    typename Raw<sizeof(T) * V>::type raw;

    __device__ void load(const T* from) { raw = *reinterpret_cast<const decltype(raw)*>(from); }
    __device__ void store(T* to) const { *reinterpret_cast<decltype(raw)*>(to) = raw; }

    template <class A> __device__ void get(A (&values)[V]) const {
        T elements[V];
        memcpy(elements, &raw, sizeof(raw));
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = widen<A>(elements[v]);
    }
    template <class A> __device__ void read(const T* from, A (&values)[V]) {
        load(from);
        get(values);
    }
    template <class A> __device__ void set(const A (&values)[V]) {
        T elements[V];
#pragma unroll
        for (int v = 0; v < V; ++v) elements[v] = narrow<T>(values[v]);
        memcpy(&raw, elements, sizeof(raw));
    }
};

// Parameters come in any dtype, known by a code that is the same for all threads.
template <class A> __device__ inline A load_param(const void* from, u32 dtype, u64 i) {
    switch (dtype) {
    case 0: return A(static_cast<const float*>(from)[i]);
    case 1: return widen<A>(static_cast<const __half*>(from)[i]);
    case 2: return widen<A>(static_cast<const __nv_bfloat16*>(from)[i]);
    default: return A(static_cast<const double*>(from)[i]);
    }
}

template <class A> __device__ inline void store_param(void* to, u32 dtype, u64 i, A value) {
    switch (dtype) {
    case 0: static_cast<float*>(to)[i] = narrow<float>(value); break;
    case 1: static_cast<__half*>(to)[i] = narrow<__half>(value); break;
    case 2: static_cast<__nv_bfloat16*>(to)[i] = narrow<__nv_bfloat16>(value); break;
    default: static_cast<double*>(to)[i] = narrow<double>(value); break;
    }
}

// V neighbouring parameters of type P in accesses of at most 16 bytes.
template <class P, int V, class A> __device__ inline void load_params_as(const void* from, u64 i, A (&to)[V]) {
    constexpr int STEP = V * sizeof(P) <= 16 ? V : int(16 / sizeof(P));
#pragma unroll
    for (int at = 0; at < V; at += STEP) {
        Pack<P, STEP> pack;
        pack.load(static_cast<const P*>(from) + i + at);
        A part[STEP];
        pack.get(part);
#pragma unroll
        for (int v = 0; v < STEP; ++v) to[at + v] = part[v];
    }
}

template <int V, class A>
__device__ inline void load_neighbours(const void* from, u32 dtype, bool aligned, u64 i, A (&to)[V]) {
    if (V > 1 && aligned) {
        switch (dtype) {
        case 0: load_params_as<float>(from, i, to); return;
        case 1: load_params_as<__half>(from, i, to); return;
        case 2: load_params_as<__nv_bfloat16>(from, i, to); return;
        default: load_params_as<double>(from, i, to); return;
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = load_param<A>(from, dtype, i + v);
}

template <class A> __device__ inline A inverse_sqrt(A v) { return A(1) / sqrt(v); }
