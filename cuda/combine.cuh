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
        : base(quotient(set, p.sets_per_outer, p.by_sets) * (p.part_chunks * p.part_width - p.sets_per_outer * p.part_run) + set * p.part_run),
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
            const u64 first = (at.i - quotient(at.i, p.pieces, p.by_pieces) * p.pieces) * p.chunk_len;
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
    // Counts are weights here, and need no more digits than the others.
    Moments<A, A> m{0, 0, 0, 0};
    PartWalk walk(parts, mine.lane, mine.lanes);
    while (walk.i < parts.count) {
        Moments<A, A> batch[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k, walk.next(parts)) {
            batch[k] = {0, 0, 0, 0};
            if (walk.i >= parts.count) continue;
            const u64 at = walk.address(parts);
            batch[k] = {load_constant(moments + at), load_constant(moments + total + at), load_constant(moments + 2 * total + at),
                        A(part_count(p, walk))};
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) merge(m, batch[k]);
    }
    const u32 width = mine.lanes < 32 ? mine.lanes : 32;
    lanes_combine(m, lanes_sum(m.count, width), width);
    if (mine.lanes > 32) {
        A* slots = reinterpret_cast<A*>(shared_memory());
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) slots[warp] = m.mean, slots[32 + warp] = m.low, slots[64 + warp] = m.m2, slots[96 + warp] = m.count;
        __syncthreads();
        m = {0, 0, 0, 0};
        if (lane < mine.lanes / 32) m = {slots[lane], slots[32 + lane], slots[64 + lane], slots[96 + lane]};
        lanes_combine(m, lanes_sum(m.count, 32), 32);
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

// Parts that a thread of reduce_params has in flight.
constexpr int MORE = 8;

// A thread's share of the copies of one parameter, where a parameter is one column of each.
template <class A> __device__ inline void add_copies(const Params& p, u64 param, u32 lane, u32 lanes, A (&sums)[2]) {
    const u64 step = lanes * p.param_width, second = p.copies * p.param_width;
    const A *at = static_cast<const A*>(p.param_parts) + lane * p.param_width + param, *end = static_cast<const A*>(p.param_parts) + second;
    while (at < end) {
        A as[MORE] = {}, bs[MORE] = {};
#pragma unroll
        for (int k = 0; k < MORE; ++k, at += step) {
            if (p.dbias && at < end) as[k] = load_constant(at);
            if (p.dweight && at < end) bs[k] = load_constant(at + second);
        }
#pragma unroll
        for (int k = 0; k < MORE; ++k) sums[0] += as[k], sums[1] += bs[k];
    }
}

// The same where a parameter has `param_span` neighbouring columns of each.
template <class A> __device__ inline void add_spans(const Params& p, u64 param, u32 lane, u32 lanes, A (&sums)[2]) {
    const A *parts = static_cast<const A*>(p.param_parts), *second = parts + p.copies * p.param_width;
    const Parts all(param * p.param_span, p.param_span, p.param_width, p.copies * p.param_span);
    PartWalk walk(all, lane, lanes);
    while (walk.i < all.count) {
        A as[MORE] = {}, bs[MORE] = {};
#pragma unroll
        for (int k = 0; k < MORE; ++k, walk.next(all)) {
            if (walk.i < all.count) as[k] = load_constant(parts + walk.address(all)), bs[k] = load_constant(second + walk.address(all));
        }
#pragma unroll
        for (int k = 0; k < MORE; ++k) sums[0] += as[k], sums[1] += bs[k];
    }
}

// Adds up the copies of the parameters' gradients: `reduce_columns` parameters side by side, the other
// threads of a block share out their copies (and their `param_span` columns of each), many at once. What
// they have is added up within warps, then over warps.
template <class A> __device__ void reduce_params(const Params& p) {
    constexpr u32 WARPS = 8; // COMBINE_BLOCK of src/cuda/plan.rs
    const u32 columns = p.reduce_columns, shift = log2_of(columns), lanes = blockDim.x >> shift;
    const u32 lane = threadIdx.x >> shift, column = threadIdx.x & (columns - 1);
    const u64 param = u64(blockIdx.x) * columns + column, params = p.params * (p.tokens ? quotient(p.outer, p.tokens) : 1);
    A sums[2] = {};
    if (param < params && p.param_span == 1) add_copies(p, param, lane, lanes, sums);
    if (param < params && p.param_span != 1) add_spans(p, param, lane, lanes, sums);
    for (u32 o = 16; o >= columns; o /= 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) sums[k] += __shfl_xor_sync(FULL, sums[k], o);
    }
    const u32 in_warp = shift < 5 ? 5 - shift : 0, groups = lanes >> in_warp, group = lane >> in_warp;
    if (groups > 1) {
        A* shared = reinterpret_cast<A*>(shared_memory());
        A* slot = shared + (group << shift) + column;
        if (lane == group << in_warp) slot[0] = sums[0], slot[blockDim.x] = sums[1];
        __syncthreads();
        if (lane != 0) return;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            A v[WARPS];
#pragma unroll
            for (u32 i = 0; i < WARPS; ++i) v[i] = i < groups ? shared[k * blockDim.x + (i << shift) + column] : A(0);
#pragma unroll
            for (u32 half = WARPS / 2; half > 0; half /= 2) {
#pragma unroll
                for (u32 i = 0; i < half; ++i) v[i] += v[i + half];
            }
            sums[k] = v[0];
        }
    }
    if (lane != 0 || param >= params) return;
    if (p.dweight) store_param(p.dweight, p.dweight_dtype, param, sums[1]);
    if (p.dbias) store_param(p.dbias, p.dbias_dtype, param, sums[0]);
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
