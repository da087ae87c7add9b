// Kernels that merge what others left in parts, always in the same order.
//
// Parts lie in blocks `[outer, chunks, width]`; a set has `part_run` neighbouring columns of all chunks,
// a parameter `param_span` neighbouring columns of all copies. Small beside the passes over the data.
#pragma once
#include "sets.cuh"

// Part i of a set, in its block and beyond the first `part_run` columns of the set.
struct Parts {
    u64 base, run, width, count;

    __device__ Parts(const Params& p, u64 set)
        : base(set / p.sets_per_outer * p.part_chunks * p.part_width + set % p.sets_per_outer * p.part_run),
          run(p.part_run), width(p.part_width), count(p.part_chunks * p.part_run) {}
    __device__ u64 address(u64 i) const { return base + i / run * width + i % run; }
};

// Elements behind part i: column kernels cut rows, the others the set itself.
__device__ inline u64 part_count(const Params& p, u64 i) {
    if (p.chunk_rows == 0) {
        if (p.pieces > 1) {
            const u64 first = i % p.pieces * p.chunk_len;
            return p.seg_len - first < p.chunk_len ? p.seg_len - first : p.chunk_len;
        }
        const u64 first = i * p.segs_per_chunk;
        return (p.segs - first < p.segs_per_chunk ? p.segs - first : p.segs_per_chunk) * p.seg_len;
    }
    const u64 first = i / p.part_run * p.chunk_rows;
    return p.rows - first < p.chunk_rows ? p.rows - first : p.chunk_rows;
}

template <class A> __device__ void combine_moments(const Params& p) {
    const u64 set = (blockIdx.x * u64(blockDim.x) + threadIdx.x) / p.combine_lanes;
    const u32 lane = threadIdx.x % p.combine_lanes;
    const bool active = set < p.sets;
    const Parts parts(p, active ? set : 0);
    const u64 total = p.outer * p.part_chunks * p.part_width;
    const A* moments = static_cast<const A*>(p.part_moments);
    Moments<A, u64> m{0, 0, 0, 0};
    for (u64 i = lane; i < parts.count; i += p.combine_lanes) {
        const u64 at = parts.address(i);
        merge(m, Moments<A, u64>{moments[at], moments[total + at], moments[2 * total + at], part_count(p, i)});
    }
    lanes_merge(m, p.combine_lanes);
    if (active && lane == 0) finish_moments(p, set, m, true);
}

template <class A> __device__ void combine_sums(const Params& p) {
    const u64 set = (blockIdx.x * u64(blockDim.x) + threadIdx.x) / p.combine_lanes;
    const u32 lane = threadIdx.x % p.combine_lanes;
    const bool active = set < p.sets;
    const Parts parts(p, active ? set : 0);
    const u64 total = p.outer * p.part_chunks * p.part_width;
    const u64 first_param = place_set(p, active ? set : 0).first_param;
    const A* sums = static_cast<const A*>(p.part_sums);
    const bool weighted = p.weight && !p.has(UNWEIGHTED) && !p.has(PART_WEIGHTED);
    A a = 0, b = 0;
    for (u64 i = lane; i < parts.count; i += p.combine_lanes) {
        const u64 at = parts.address(i);
        A w = 1;
        if (weighted) w = load_param<A>(p.weight, p.weight_dtype, first_param + i % p.part_run / p.part_span);
        a += w * sums[at];
        b += w * sums[total + at];
    }
    a = lanes_sum(a, p.combine_lanes);
    b = lanes_sum(b, p.combine_lanes);
    if (!active || lane != 0) return;
    if (p.sums) static_cast<A*>(p.sums)[set] = a, static_cast<A*>(p.sums)[p.sets + set] = b;
    // A set that is all there is of a parameter has its gradients.
    if (p.has(PER_SET) && p.has(UNWEIGHTED) && p.outer == 1) {
        if (p.dweight) store_param(p.dweight, p.dweight_dtype, set, b);
        if (p.dbias) store_param(p.dbias, p.dbias_dtype, set, a);
    }
}

template <class A> __device__ void reduce_params(const Params& p) {
    const u32 columns = p.reduce_columns, lanes = blockDim.x / columns;
    const u64 param = u64(blockIdx.x) * columns + threadIdx.x % columns;
    const u32 lane = threadIdx.x / columns;
    const A* parts = static_cast<const A*>(p.param_parts);
    A a = 0, b = 0;
    if (param < p.params) {
        for (u64 i = lane; i < p.copies * p.param_span; i += lanes) {
            const u64 at = i / p.param_span * p.param_width + param * p.param_span + i % p.param_span;
            a += parts[at];
            b += parts[p.copies * p.param_width + at];
        }
    }
    A* shared = reinterpret_cast<A*>(shared_memory());
    for (u32 half = lanes / 2; half > 0; half /= 2) {
        A* slot = shared + 2 * ((lane % half) * columns + threadIdx.x % columns);
        if (lane >= half && lane < 2 * half) slot[0] = a, slot[1] = b;
        __syncthreads();
        if (lane < half) a += slot[0], b += slot[1];
        __syncthreads();
    }
    if (lane != 0 || param >= p.params) return;
    if (p.dweight) store_param(p.dweight, p.dweight_dtype, param, b);
    if (p.dbias) store_param(p.dbias, p.dbias_dtype, param, a);
}

// Averages the statistics of all samples into the running ones: instance norm.
template <class A> __device__ void move_running_averages(const Params& p) {
    const u64 channel = blockIdx.x * u64(blockDim.x) + threadIdx.x;
    if (channel >= p.sets_per_outer) return;
    const A* stats = static_cast<const A*>(p.stats);
    double mean = 0, var = 0;
    for (u64 o = 0; o < p.outer; ++o) {
        const u64 set = o * p.sets_per_outer + channel;
        mean += double(stats[set]) + double(stats[p.sets + set]);
        var += double(stats[2 * p.sets + set]);
    }
    move_running(p, channel, mean / double(p.outer), var / double(p.outer), double(p.set_len));
}
