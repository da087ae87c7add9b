// The one argument of every kernel, and the few names that differ between nvcc and the emulation.
//
// Field for field `src/cuda/params.rs`, which says what each means. Kept separate from the kernels
// because the combine kernels need it without an element type.
#pragma once

#ifdef NORM_EMULATION
#include "emulation/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

using u32 = unsigned int;
using u64 = unsigned long long;

// Exact division of numbers below 2^31; see Divisor::new for the magic.
struct Divisor {
    u32 divisor, magic, shift;
    __device__ u32 operator()(u32 n) const { return (__umulhi(n, magic) + n) >> shift; }
};

enum Flag : u32 {
    CENTER = 1,
    FIXED = 1 << 1,
    PER_SET = 1 << 2,
    PER_COLUMN = 1 << 3,
    PER_ROW = 1 << 4,
    UNWEIGHTED = 1 << 5,
    PART_WEIGHTED = 1 << 6,
    WANT_PARAMS = 1 << 7,
    FUSED = 1 << 8,
    BLOCKS = 1 << 9,
    SUMS_WRITE = 1 << 10,
    PLAIN_NORM = 1 << 11,
};

// What is done to z before it is stored: `Fusion::activation`. A gate behind the norm is known by its pointer.
enum Activation : u32 { NONE, RELU, RELU6, LEAKY_RELU, SILU, SIGMOID, HARD_SWISH, GELU, GELU_TANH };

struct Arguments {
    const void *x, *dy;
    void* out;
    const void *weight, *bias, *residual, *skip, *gate;
    void *sum, *dskip, *dgate;
    void *stats, *sums, *part_moments, *part_sums, *param_parts;
    const void *given_mean, *given_low, *given_var;
    void *running_mean, *running_var, *dweight, *dbias;
    u32 weight_dtype, bias_dtype, given_mean_dtype, given_var_dtype;
    u32 running_mean_dtype, running_var_dtype, dweight_dtype, dbias_dtype;
};

struct Shape {
    u64 outer, rows, width, run, span, sets, sets_per_outer, set_len, params, set_params, tokens;
    u64 block_dims[4], block_strides[4];
    double eps, momentum, count, weight_offset, slope;
    Divisor by_span, by_sets;
    u32 flags, activation;
};

struct Schedule {
    u64 segs, seg_len, seg_stride, chunk_len, pieces, segs_per_chunk, chunks, chunk_rows;
    u64 part_chunks, part_width, part_run, part_span, copies, param_width, param_span;
    Divisor by_seg, by_chunks, by_pieces;
    u32 lanes, segment_lanes, combine_lanes, reduce_columns, stages;
};

struct Params : Arguments, Shape, Schedule {
    __device__ bool has(u32 flag) const { return (flags & flag) != 0; }
};

static_assert(sizeof(Arguments) == 23 * 8 + 8 * 4 && sizeof(Shape) == 24 * 8 + 8 * 4 && sizeof(Schedule) == 15 * 8 + 14 * 4 &&
                  sizeof(Params) == sizeof(Arguments) + sizeof(Shape) + sizeof(Schedule),
              "Params differs from src/cuda/params.rs");

#ifdef NORM_EMULATION
#define NORM_HAS_CLUSTERS 1
#else
// The host's pass over a .cu file sees no architecture, and needs the names all the same.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define NORM_HAS_CLUSTERS 1
#else
#define NORM_HAS_CLUSTERS 0
#endif
extern __shared__ uint4 dynamic_shared[];
// All shared memory is dynamic: one base, carved by the kernel as the plan has counted it.
__device__ inline char* shared_memory() { return reinterpret_cast<char*>(dynamic_shared); }

// The next launch of the same op may have its blocks in place while this one works; what they do waits, here, for all
// that this one writes. Where launch.rs does not ask for it, both are without effect. Source: PTX ISA, "griddepcontrol".
__device__ inline void in_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Entry points differ from device functions in these words alone.
#define NORM_ENTRY_(name, ...) \
    static __device__ __forceinline__ void name##_body(const Params& p); \
    extern "C" __global__ void __VA_ARGS__ name(const __grid_constant__ Params p) { \
        in_turn(); \
        name##_body(p); \
    } \
    static __device__ __forceinline__ void name##_body(const Params& p)
#define NORM_ENTRY(name, threads, blocks) NORM_ENTRY_(name, __launch_bounds__(threads, blocks))
#define NORM_CLUSTER_ENTRY(name, threads, blocks, size) \
    NORM_ENTRY_(name, __cluster_dims__(size, 1, 1) __launch_bounds__(threads, blocks))
#endif
