// Elements: accumulation types, conversions, packs of up to 16 bytes, parameters of any dtype.
//
// A pack stays packed in registers and is widened where it is used: half the registers of widened
// 16-bit values, for a conversion that costs nothing beside the memory.
#pragma once
#include "params.cuh"

#ifdef NORM_EMULATION
using std::erfc;
using std::exp;
#endif
// A function that stays one, where copies of it would be most of a kernel.
#define NORM_CALL __attribute__((noinline))

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

// Memory that no kernel of this launch writes. Said to the compiler, which may then load it ahead of a
// store: plain pointers could be the same memory.
template <class R> __device__ inline R load_constant(const R* from) {
#ifdef NORM_EMULATION
    return *from;
#else
    return __ldg(from);
#endif
}

// Ends the program: where the plan has promised what is not so.
__device__ inline void fail() {
#ifdef NORM_EMULATION
    abort();
#else
    __trap();
#endif
}

// A product that is rounded before anything is done with it. The compiler fuses a plain one into the sum behind it: a
// mean that is subtracted would then be another number than the mean that is kept, by half a unit of its last place, and
// lanes that add each other's products would not have the same sum.
#ifdef NORM_EMULATION
template <class A> __device__ inline A rounded_product(A a, A b) { return a * b; }
#else
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// Asks for the line of an address, to come into the L1 cache.
__device__ inline void prefetch(const void* at) {
#ifndef NORM_EMULATION
    asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
#endif
}

#if !defined(NORM_EMULATION) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
constexpr bool HAS_COPIES = true;
#else
constexpr bool HAS_COPIES = false;
#endif

// Shared memory as its instructions name it: worked out once, where a loop's own pointer costs four instructions a copy.
#ifdef NORM_EMULATION
using SharedAddress = char*;
__device__ inline SharedAddress shared_address(void* shared) { return static_cast<char*>(shared); }
__device__ inline void* shared_pointer(SharedAddress shared) { return shared; }
#else
using SharedAddress = u32;
__device__ inline SharedAddress shared_address(void* shared) { return u32(__cvta_generic_to_shared(shared)); }
__device__ inline void* shared_pointer(SharedAddress shared) { return __cvta_shared_to_generic(shared); }
#endif

// Copies BYTES from global to shared memory, past the registers where the device can (8.0 and up): any
// number are in flight at once. Complete after `copies_done` in the thread that asked for them.
template <int BYTES> __device__ inline void copy_async(SharedAddress shared, const void* global) {
    using R = typename Raw<BYTES>::type;
#if !defined(NORM_EMULATION) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
        return;
    } else if constexpr (BYTES >= 4) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(BYTES) : "memory");
        return;
    }
#endif
    *static_cast<R*>(shared_pointer(shared)) = load_constant(static_cast<const R*>(global));
}
template <int BYTES> __device__ inline void copy_async(void* shared, const void* global) {
    if constexpr (HAS_COPIES && BYTES >= 4) {
        copy_async<BYTES>(shared_address(shared), global);
    } else {
        using R = typename Raw<BYTES>::type;
        *static_cast<R*>(shared) = load_constant(static_cast<const R*>(global));
    }
}

// What was asked for so far is a batch.
__device__ inline void copies_batch() {
#if !defined(NORM_EMULATION) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `PENDING` of the youngest batches are under way.
template <int PENDING = 0> __device__ inline void copies_done() {
#if !defined(NORM_EMULATION) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

template <class T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;

// V neighbouring elements, loaded and stored in one access.
template <class T, int V> struct Pack {
    static constexpr int BYTES = int(sizeof(T)) * V;
    typename Raw<BYTES>::type raw;

    // From memory that the launch does not write.
    __device__ void fetch(const T* from) { raw = load_constant(reinterpret_cast<const decltype(raw)*>(from)); }
    __device__ void load(const T* from) { raw = *reinterpret_cast<const decltype(raw)*>(from); }
    __device__ void store(T* to) const { *reinterpret_cast<decltype(raw)*>(to) = raw; }

    // Keeps the compiler from keeping what a walk has widened for the next one: that takes more registers than the
    // packs, for an instruction an element.
    __device__ void forget() {
#ifndef NORM_EMULATION
        if constexpr (BYTES == 16) {
            asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
        } else if constexpr (BYTES == 8) {
            asm volatile("" : "+l"(raw));
        }
#endif
    }

    template <class A> __device__ void get(A (&values)[V]) const {
        if constexpr (IS_BF16<T> && V % 2 == 0) {
            // An f32 has a bf16 in its upper half: one instruction an element, where taking the halves apart is two.
            u32 words[V / 2];
            memcpy(words, &raw, sizeof(raw));
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const u32 bits = v % 2 ? words[v / 2] & 0xffff0000u : words[v / 2] << 16;
                float value;
                memcpy(&value, &bits, sizeof(bits));
                values[v] = A(value);
            }
            return;
        }
        T elements[V];
        memcpy(elements, &raw, sizeof(raw));
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = widen<A>(elements[v]);
    }
    template <class A> __device__ void set(const A (&values)[V]) {
#ifndef NORM_EMULATION
        if constexpr (IS_BF16<T> && V % 2 == 0 && sizeof(A) == 4) {
            // Two conversions are one instruction, which the compiler does not find in a pack of 8 bytes.
            __nv_bfloat162 pairs[V / 2];
#pragma unroll
            for (int v = 0; v < V; v += 2) pairs[v / 2] = __floats2bfloat162_rn(values[v], values[v + 1]);
            memcpy(&raw, pairs, sizeof(raw));
        } else
#endif
        {
            T elements[V];
#pragma unroll
            for (int v = 0; v < V; ++v) elements[v] = narrow<T>(values[v]);
            memcpy(&raw, elements, sizeof(raw));
        }
    }
};

template <class T, int V, class A> __device__ inline void fetch(const T* from, A (&values)[V]) {
    Pack<T, V> pack;
    pack.fetch(from);
    pack.get(values);
}

template <class T, int V, class A> __device__ inline void load(const T* from, A (&values)[V]) {
    Pack<T, V> pack;
    pack.load(from);
    pack.get(values);
}

template <class T, int V, class A> __device__ inline void store(T* to, const A (&values)[V]) {
    Pack<T, V> pack;
    pack.set(values);
    pack.store(to);
}

// Into global memory. The compiler takes packs apart, and does not always find that their words are one access.
template <class T, int V, class A> __device__ inline void store_global(T* to, const A (&values)[V]) {
    Pack<T, V> pack;
    pack.set(values);
#ifndef NORM_EMULATION
    if constexpr (pack.BYTES == 16) {
        u32 w[4];
        memcpy(w, &pack.raw, sizeof(w));
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                     "r"(w[3]));
        return;
    }
#endif
    pack.store(to);
}

template <class P, class A> __device__ inline A element_at(const void* from, u64 i) {
    A value[1];
    fetch<P, 1>(static_cast<const P*>(from) + i, value);
    return value[0];
}

// Parameters come in any dtype, known by a code that is the same for all threads. Those of x's own dtype T and
// f32 are loaded in place; the others by a call, since the code for four of them would be most of a kernel.
template <class T> constexpr u32 DTYPE = 0;
template <> constexpr u32 DTYPE<__half> = 1;
template <> constexpr u32 DTYPE<__nv_bfloat16> = 2;
template <> constexpr u32 DTYPE<double> = 3;

template <class A> __device__ NORM_CALL A load_any_param(const void* from, u32 dtype, u64 i) {
    switch (dtype) {
    case 0: return element_at<float, A>(from, i);
    case 1: return element_at<__half, A>(from, i);
    case 2: return element_at<__nv_bfloat16, A>(from, i);
    default: return element_at<double, A>(from, i);
    }
}

template <class A, class T = float> __device__ inline A load_param(const void* from, u32 dtype, u64 i) {
    if (dtype == DTYPE<T>) return element_at<T, A>(from, i);
    if (dtype == DTYPE<float>) return element_at<float, A>(from, i);
    return load_any_param<A>(from, dtype, i);
}

// A call, since it stands beside every gradient of a parameter that a thread has.
template <class A> __device__ NORM_CALL void store_param(void* to, u32 dtype, u64 i, A value) {
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
        A part[STEP];
        fetch<P, STEP>(static_cast<const P*>(from) + i + at, part);
#pragma unroll
        for (int v = 0; v < STEP; ++v) to[at + v] = part[v];
    }
}

template <class T, int V, class A> __device__ inline void load_neighbours(const void* from, u32 dtype, u64 i, A (&to)[V]) {
    if (dtype == DTYPE<T>) {
        load_params_as<T>(from, i, to);
    } else if (dtype == DTYPE<float>) {
        load_params_as<float>(from, i, to);
    } else {
        // Rare and slow: one call in a loop, its place chosen by comparison, which keeps `to` in registers.
#pragma unroll
        for (int k = 0; k < V; ++k) to[k] = 0;
#pragma unroll 1
        for (int v = 0; v < V; ++v) {
            const A value = load_any_param<A>(from, dtype, i + v);
#pragma unroll
            for (int k = 0; k < V; ++k) to[k] = k == v ? value : to[k];
        }
    }
}

// Of a power of two. Threads that share something always are one, and a division by a number takes twenty
// instructions.
__device__ inline u32 log2_of(u32 power) {
#ifdef NORM_EMULATION
    return u32(__builtin_ctz(power));
#else
    return 31 - __clz(power);
#endif
}

template <class A> __device__ inline A inverse_sqrt(A v) { return A(1) / sqrt(v); }
