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
        : base(quotient(set, p.sets_per_outer) * (p.part_chunks * p.part_width - p.sets_per_outer * p.part_run) + set * p.part_run),
          run(p.part_run), width(p.part_width), count(p.part_chunks * p.part_run) {}
    __device__ Parts(u64 base, u64 run, u64 width, u64 count) : base(base), run(run), width(width), count(count) {}
};

// A thread's parts of a set, `lanes` apart: part i is column `column` of chunk `chunk`. Counted on by
// additions: a division takes as long as the part's memory.
struct PartWalk {
    u64 i, chunk, column;
    u32 lanes;
    u64 chunks_more, columns_more;

    __device__ PartWalk(const Parts& parts, u32 lane, u32 lanes)
        : i(lane), chunk(quotient(lane, parts.run)), column(lane - chunk * parts.run), lanes(lanes), chunks_more(quotient(lanes, parts.run)),
          columns_more(lanes - chunks_more * parts.run) {}
    __device__ u64 address(const Parts& parts) const { return parts.base + chunk * parts.width + column; }
    __device__ void next(const Parts& parts) {
        i += lanes, chunk += chunks_more, column += columns_more;
        if (column >= parts.run) column -= parts.run, ++chunk;
    }
};

// Elements behind a part: column kernels cut rows, the others the set itself.
__device__ inline u64 part_count(const Params& p, const PartWalk& at) {
    if (p.chunk_rows == 0) {
        if (p.pieces > 1) {
            const u64 first = (at.i - quotient(at.i, p.pieces) * p.pieces) * p.chunk_len;
            return p.seg_len - first < p.chunk_len ? p.seg_len - first : p.chunk_len;
        }
        const u64 first = at.i * p.segs_per_chunk;
        return (p.segs - first < p.segs_per_chunk ? p.segs - first : p.segs_per_chunk) * p.seg_len;
    }
    const u64 first = at.chunk * p.chunk_rows;
    return p.rows - first < p.chunk_rows ? p.rows - first : p.chunk_rows;
}

// Parts in flight before the first is used.
constexpr int BATCH = 4;

// A set of `combine_lanes` threads: some lanes of a warp, or the whole block.
struct SetLanes {
    u32 lanes, lane;
    u64 set;
    bool active;

    __device__ explicit SetLanes(const Params& p)
        : lanes(p.combine_lanes), lane(threadIdx.x % lanes), set((blockIdx.x * u64(blockDim.x) + threadIdx.x) / lanes), active(set < p.sets) {}
};

template <class A> __device__ void combine_moments(const Params& p) {
    const SetLanes mine(p);
    const Parts parts(p, mine.active ? mine.set : 0);
    const u64 total = p.outer * p.part_chunks * p.part_width;
    const A* moments = static_cast<const A*>(p.part_moments);
    Moments<A, u64> m{0, 0, 0, 0};
    PartWalk walk(parts, mine.lane, mine.lanes);
    while (walk.i < parts.count) {
        Moments<A, u64> batch[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k, walk.next(parts)) {
            batch[k] = {0, 0, 0, 0};
            if (walk.i >= parts.count) continue;
            const u64 at = walk.address(parts);
            batch[k] = {load_constant(moments + at), load_constant(moments + total + at), load_constant(moments + 2 * total + at),
                        part_count(p, walk)};
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) merge(m, batch[k]);
    }
    lanes_merge(m, mine.lanes < 32 ? mine.lanes : 32);
    if (mine.lanes > 32) {
        A* slots = reinterpret_cast<A*>(shared_memory());
        u64* counts = reinterpret_cast<u64*>(slots + 3 * 32);
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) slots[warp] = m.mean, slots[32 + warp] = m.low, slots[64 + warp] = m.m2, counts[warp] = m.count;
        __syncthreads();
        m = {0, 0, 0, 0};
        if (lane < mine.lanes / 32) m = {slots[lane], slots[32 + lane], slots[64 + lane], counts[lane]};
        lanes_merge(m, 32);
    }
    if (mine.active && mine.lane == 0) finish_moments(p, mine.set, m, true);
}

template <class A> __device__ void combine_sums(const Params& p) {
    const SetLanes mine(p);
    const Parts parts(p, mine.active ? mine.set : 0);
    const u64 total = p.outer * p.part_chunks * p.part_width;
    const Affine<A> affine(p, place_set(p, mine.active ? mine.set : 0).first_param);
    const A* sums = static_cast<const A*>(p.part_sums);
    const bool weighted = p.weight && !p.has(UNWEIGHTED) && !p.has(PART_WEIGHTED);
    A v[2] = {};
    PartWalk walk(parts, mine.lane, mine.lanes);
    while (walk.i < parts.count) {
        A as[BATCH] = {}, bs[BATCH] = {};
#pragma unroll
        for (int k = 0; k < BATCH; ++k, walk.next(parts)) {
            if (walk.i >= parts.count) continue;
            const u64 at = walk.address(parts);
            as[k] = load_constant(sums + at), bs[k] = load_constant(sums + total + at);
            if (!weighted) continue;
            const A w = affine.weight_at(affine.first + quotient(walk.column, p.part_span));
            as[k] *= w, bs[k] *= w;
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) v[0] += as[k], v[1] += bs[k];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) v[k] = lanes_sum(v[k], mine.lanes < 32 ? mine.lanes : 32);
    if (mine.lanes > 32) {
        A* slots = reinterpret_cast<A*>(shared_memory());
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) slots[warp] = v[0], slots[32 + warp] = v[1];
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 2; ++k) v[k] = lanes_sum(lane < mine.lanes / 32 ? slots[32 * k + lane] : A(0), 32);
    }
    if (!mine.active || mine.lane != 0) return;
    const u64 set = mine.set;
    if (p.sums) static_cast<A*>(p.sums)[set] = v[0], static_cast<A*>(p.sums)[p.sets + set] = v[1];
    // A set that is all there is of a parameter has its gradients.
    if (p.has(PER_SET) && p.has(UNWEIGHTED) && p.outer == 1) {
        if (p.dweight) store_param(p.dweight, p.dweight_dtype, set, v[1]);
        if (p.dbias) store_param(p.dbias, p.dbias_dtype, set, v[0]);
    }
}

// Adds up the copies of the parameters' gradients: `reduce_columns` parameters side by side, the other
// threads of a block share out their copies (and their `param_span` columns of each), many at once.
template <class A> __device__ void reduce_params(const Params& p) {
    constexpr int MORE = 8;
    const u32 columns = p.reduce_columns, lanes = blockDim.x / columns, lane = threadIdx.x / columns;
    const u64 param = u64(blockIdx.x) * columns + threadIdx.x % columns;
    const u64 params = p.params * (p.tokens ? quotient(p.outer, p.tokens) : 1), second = p.copies * p.param_width;
    const A* parts = static_cast<const A*>(p.param_parts);
    const Parts all(param * p.param_span, p.param_span, p.param_width, param < params ? p.copies * p.param_span : 0);
    A a = 0, b = 0;
    PartWalk walk(all, lane, lanes);
    while (walk.i < all.count) {
        A as[MORE] = {}, bs[MORE] = {};
#pragma unroll
        for (int k = 0; k < MORE; ++k, walk.next(all)) {
            if (walk.i < all.count) as[k] = load_constant(parts + walk.address(all)), bs[k] = load_constant(parts + second + walk.address(all));
        }
#pragma unroll
        for (int k = 0; k < MORE; ++k) a += as[k], b += bs[k];
    }
    A* shared = reinterpret_cast<A*>(shared_memory());
    for (u32 half = lanes / 2; half > 0; half /= 2) {
        A* slot = shared + 2 * ((lane % half) * columns + threadIdx.x % columns);
        if (lane >= half && lane < 2 * half) slot[0] = a, slot[1] = b;
        __syncthreads();
        if (lane < half) a += slot[0], b += slot[1];
        __syncthreads();
    }
    if (lane != 0 || param >= params) return;
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
