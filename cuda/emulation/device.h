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
    // Barriers that it has passed: of its warp, its block, its cluster (arrived at, waited for).
    unsigned warp_syncs, block_syncs, arrivals, waits;
};

// `__thread` rather than `thread_local`: it promises that nothing has to run before the first use, which is
// every access of a kernel.
extern __thread Thread* current;
extern __thread dim3 block_dim, grid_dim;

// Where in the kernels a shuffle or a barrier stands. Threads that meet must meet at the same one.
struct Site {
    const char* file;
    int line, bytes; // bytes of the value that a shuffle moves, 0 of a barrier
};
#define NORM_SITE(bytes) \
    emulation::Site { file, line, int(bytes) }
// The caller's place, as default arguments of what stands for a CUDA intrinsic.
#define NORM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Leaves `value` for the other lanes of the warp, and returns once all have; reads lane `from`.
uint64_t exchange(uint64_t value, unsigned from, Site site);
void warp_barrier(Site site);
void block_barrier(Site site);
// An arrival that is relaxed orders no writes before it.
void cluster_arrive(Site site, bool relaxed);
void cluster_wait(Site site);
void* in_block(void* shared, unsigned rank);

template <class V> V shuffle(V value, unsigned from, Site site) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    bits = exchange(bits, from, site);
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// An entry point with what its launch bounds say: threads of a block at most, blocks that a
// multiprocessor has to hold at least, blocks of a cluster exactly.
using Kernel = void (*)(const void* params);
struct Entry {
    const char* name;
    Kernel kernel;
    unsigned threads, blocks, cluster;
};
struct Registered {
    explicit Registered(Entry entry);
};

} // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

// All lanes take part in every shuffle of the kernels, so the mask is not looked at.
template <class V> V __shfl_xor_sync(unsigned, V value, unsigned mask, unsigned = 32, NORM_CALLER) {
    return emulation::shuffle(value, emulation::current->lane ^ mask, NORM_SITE(sizeof(V)));
}
template <class V> V __shfl_sync(unsigned, V value, unsigned lane, unsigned width = 32, NORM_CALLER) {
    const unsigned first = emulation::current->lane / width * width;
    return emulation::shuffle(value, first + lane % width, NORM_SITE(sizeof(V)));
}
template <class V> V __shfl_down_sync(unsigned, V value, unsigned delta, unsigned width = 32, NORM_CALLER) {
    const unsigned lane = emulation::current->lane;
    return emulation::shuffle(value, lane % width + delta < width ? lane + delta : lane, NORM_SITE(sizeof(V)));
}
inline void __syncwarp(unsigned = 0xffffffffu, NORM_CALLER) { emulation::warp_barrier(NORM_SITE(0)); }
inline void __syncthreads(NORM_CALLER) { emulation::block_barrier(NORM_SITE(0)); }
inline void __cluster_barrier_arrive(NORM_CALLER) { emulation::cluster_arrive(NORM_SITE(0), false); }
inline void __cluster_barrier_arrive_relaxed(NORM_CALLER) { emulation::cluster_arrive(NORM_SITE(0), true); }
inline void __cluster_barrier_wait(NORM_CALLER) { emulation::cluster_wait(NORM_SITE(0)); }
inline unsigned __clusterRelativeBlockRank() { return emulation::current->rank; }
inline void* __cluster_map_shared_rank(void* shared, unsigned rank) { return emulation::in_block(shared, rank); }
// Hints to caches change no value.
template <class V> V __ldg(const V* from) { return *from; }
template <class V> V __ldcs(const V* from) { return *from; }
template <class V> V __ldcg(const V* from) { return *from; }
template <class V> void __stcs(V* to, V value) { *to = value; }
template <class V> void __stcg(V* to, V value) { *to = value; }
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
namespace emulation {
inline uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return bits;
}
inline float of_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}
// The upper bits, rounded to nearest even.
inline uint32_t without(uint32_t bits, int last) { return (bits + (1u << (last - 1)) - 1 + ((bits >> last) & 1)) >> last; }
} // namespace emulation

// By bits where the result is no NaN and not below the normal range, which is nearly always: `pack` and
// `unpack`, which do the rest, are most of a test's time otherwise.
inline __half __double2half(double v) { return {emulation::pack(v, 11, -14, 0x7c00)}; }
inline __half __float2half_rn(float v) {
    const uint32_t bits = emulation::bits_of(v), magnitude = bits & 0x7fffffff, least = 113u << 23, most = 142u << 23;
    if (magnitude < least || magnitude >= most) return __double2half(v);
    return {uint16_t((bits >> 16 & 0x8000) | emulation::without(magnitude - (112u << 23), 13))};
}
inline float __half2float(__half v) {
    const uint32_t magnitude = v.bits & 0x7fff;
    if (magnitude < 0x400 || magnitude >= 0x7c00) return float(emulation::unpack(v.bits, 11, -14, 0x7c00));
    return emulation::of_bits((uint32_t(v.bits & 0x8000) << 16) | ((magnitude << 13) + (112u << 23)));
}
inline __nv_bfloat16 __double2bfloat16(double v) { return {emulation::pack(v, 8, -126, 0x7f80)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    if (std::isnan(v)) return __double2bfloat16(v);
    return {uint16_t(emulation::without(emulation::bits_of(v), 16))};
}
inline float __bfloat162float(__nv_bfloat16 v) { return emulation::of_bits(uint32_t(v.bits) << 16); }

inline char* shared_memory() { return emulation::current->shared; }

// An entry point is a function of the argument's address, found by its name.
#define NORM_ENTRY(name, threads, blocks) NORM_ENTRY_(name, threads, blocks, 1)
#define NORM_ENTRY_(name, threads, blocks, cluster) \
    static void name(const Params& p); \
    static const emulation::Registered name##_registered({#name, [](const void* p) { name(*static_cast<const Params*>(p)); }, \
                                                          threads, blocks, cluster}); \
    static void name(const Params& p)
#define NORM_CLUSTER_ENTRY(name, threads, blocks, size) NORM_ENTRY_(name, threads, 1, size)
