// What the kernels take from CUDA, for a host compiler: so that the same .cu files run without a GPU.
//
// The threads of a block are fibers of one thread (run.cpp). A shuffle or a barrier gives way to the
// other fibers until all that take part have come. Nothing here is faster or slower in proportion to a
// GPU: it is there to be right, and strict about what CUDA leaves undefined.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
using std::memcpy;
using std::sqrt;

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

// The running fiber. A launch of a cluster runs the blocks of one cluster together.
struct Thread {
    dim3 thread, block;
    unsigned rank, lane, warp; // rank of the block in its cluster, warp counted over the cluster
    char* shared;
};

extern thread_local Thread* current;
extern thread_local dim3 block_dim, grid_dim;

// Leaves `value` for the other lanes of the warp, and returns once all have; reads lane `from`.
uint64_t exchange(uint64_t value, unsigned from);
void block_barrier();
void cluster_arrive();
void cluster_wait();
void* in_block(void* shared, unsigned rank);

template <class V> V shuffle(V value, unsigned from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    bits = exchange(bits, from);
    memcpy(&value, &bits, sizeof(value));
    return value;
}

using Kernel = void (*)(const void* params);
struct Registered {
    Registered(const char* name, Kernel kernel);
};

} // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

// All lanes take part in every shuffle of the kernels, so the mask is not looked at.
template <class V> V __shfl_xor_sync(unsigned, V value, unsigned mask) {
    return emulation::shuffle(value, emulation::current->lane ^ mask);
}
template <class V> V __shfl_sync(unsigned, V value, unsigned lane, unsigned width = 32) {
    const unsigned first = emulation::current->lane / width * width;
    return emulation::shuffle(value, first + lane % width);
}
template <class V> V __shfl_down_sync(unsigned, V value, unsigned delta, unsigned width = 32) {
    const unsigned lane = emulation::current->lane;
    return emulation::shuffle(value, lane % width + delta < width ? lane + delta : lane);
}
inline void __syncthreads() { emulation::block_barrier(); }
inline void __cluster_barrier_arrive() { emulation::cluster_arrive(); }
inline void __cluster_barrier_wait() { emulation::cluster_wait(); }
inline unsigned __clusterRelativeBlockRank() { return emulation::current->rank; }
inline void* __cluster_map_shared_rank(void* shared, unsigned rank) { return emulation::in_block(shared, rank); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }

// 16-bit floats, rounded to nearest even from any wider type in one step.
namespace emulation {

// v as an integer multiple of the last place of a format with `digits` bits and exponents from `least`.
inline double last_place(double v, int digits, int least) {
    const int exponent = v == 0 ? least : std::ilogb(v);
    return std::ldexp(1.0, (exponent < least ? least : exponent) - digits + 1);
}

// Bits of a format with `digits` bits of significand (one implied) and exponents from `least`, in which
// infinity has the bits `infinity`.
inline uint16_t pack(double v, int digits, int least, uint16_t infinity) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) return sign | infinity | 1 << (digits - 2);
    if (std::isinf(v)) return sign | infinity;
    const double place = last_place(v, digits, least);
    const double units = std::nearbyint(std::fabs(v) / place);
    // Neighbours in order have neighbouring bits, so rounding up may carry into the exponent.
    const int scale = std::ilogb(place) - (least - digits + 1);
    const uint32_t bits = uint32_t(units) + (uint32_t(scale) << (digits - 1));
    return sign | uint16_t(bits > infinity ? infinity : bits);
}

inline double unpack(uint16_t bits, int digits, int least, uint16_t infinity) {
    const uint16_t magnitude = bits & 0x7fff;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (magnitude > infinity) return std::nan("");
    if (magnitude == infinity) return sign * INFINITY;
    const int exponent = magnitude >> (digits - 1), implied = exponent ? 1 << (digits - 1) : 0;
    const int units = (magnitude & ((1 << (digits - 1)) - 1)) | implied;
    return sign * std::ldexp(double(units), (exponent ? exponent - 1 : 0) + least - digits + 1);
}

} // namespace emulation

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
inline __half __double2half(double v) { return {emulation::pack(v, 11, -14, 0x7c00)}; }
inline __half __float2half_rn(float v) { return __double2half(v); }
inline float __half2float(__half v) { return float(emulation::unpack(v.bits, 11, -14, 0x7c00)); }
inline __nv_bfloat16 __double2bfloat16(double v) { return {emulation::pack(v, 8, -126, 0x7f80)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __double2bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

inline char* shared_memory() { return emulation::current->shared; }

// An entry point is a function of the argument's address, found by its name.
#define NORM_ENTRY(name, threads, blocks) NORM_ENTRY_(name)
#define NORM_ENTRY_(name) \
    static void name(const Params& p); \
    static const emulation::Registered name##_registered(#name, [](const void* p) { \
        name(*static_cast<const Params*>(p)); \
    }); \
    static void name(const Params& p)
#define NORM_CLUSTER_ENTRY(name, threads, size) NORM_ENTRY(name, threads, 1)
