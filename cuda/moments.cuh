// Mean and variance in parts: Chan's merge on means kept as pairs, and reductions over threads.
//
// A part is (count, mean + low, M2) with M2 the sum of squared differences from its own mean. The mean
// is an unevaluated pair, so that x - mean keeps the digits that a mean rounded to f32 would lose. Each
// part is computed in two passes over resident values, from a first mean that serves as the pivot.
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
#pragma once
#include "element.cuh"

constexpr u32 FULL = 0xffffffffu;

template <class A, class N = u32> struct Moments {
    A mean, low, m2;
    N count;
};

// a becomes the moments of both. Without centering all means are 0 and the M2 add up.
template <class A, class N> __device__ inline void merge(Moments<A, N>& a, const Moments<A, N>& b) {
    if (b.count == 0) return;
    if (a.count == 0) {
        a = b;
        return;
    }
    const N count = a.count + b.count;
    const A ratio = A(b.count) / A(count);
    const A delta = (b.mean - a.mean) + (b.low - a.low);
    a.low += delta * ratio;
    a.m2 += b.m2 + delta * delta * ratio * A(a.count);
    a.count = count;
}

// mean + low becomes the rounded sum and what the rounding left (Knuth's two-sum).
template <class A> __device__ inline void normalize_pair(A& mean, A& low) {
    const A sum = mean + low;
    const A rest = sum - mean;
    low = (mean - (sum - rest)) + (low - rest);
    mean = sum;
}

// Sum over groups of `width` lanes (a power of two), the same bits in every lane.
template <class A> __device__ inline A lanes_sum(A v, u32 width) {
    for (u32 o = width / 2; o > 0; o /= 2) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

// Merges moments over groups of `width` lanes in a fixed order, the result in every lane.
template <class A, class N> __device__ inline void lanes_merge(Moments<A, N>& m, u32 width) {
    for (u32 o = width / 2; o > 0; o /= 2) {
        Moments<A, N> other;
        other.mean = __shfl_down_sync(FULL, m.mean, o, width);
        other.low = __shfl_down_sync(FULL, m.low, o, width);
        other.m2 = __shfl_down_sync(FULL, m.m2, o, width);
        other.count = __shfl_down_sync(FULL, m.count, o, width);
        merge(m, other);
    }
    m.mean = __shfl_sync(FULL, m.mean, 0, width);
    m.low = __shfl_sync(FULL, m.low, 0, width);
    m.m2 = __shfl_sync(FULL, m.m2, 0, width);
    m.count = __shfl_sync(FULL, m.count, 0, width);
}

template <int C> __device__ inline void group_barrier() {
    if constexpr (C == 1) {
        __syncthreads();
    } else {
        // A discarded branch still has its names looked up, and architectures below 9.0 lack these.
#if NORM_HAS_CLUSTERS
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
#endif
    }
}

// The same shared address in another block of the cluster.
template <int C, class A> __device__ inline A* in_block(A* here, u32 rank) {
    if constexpr (C == 1) {
        return here;
    } else {
#if NORM_HAS_CLUSTERS
        return static_cast<A*>(__cluster_map_shared_rank(here, rank));
#endif
    }
}

template <int C> __device__ inline u32 block_rank() {
    if constexpr (C == 1) {
        return 0;
    } else {
#if NORM_HAS_CLUSTERS
        return __clusterRelativeBlockRank();
#endif
    }
}

// The threads that share a set: 8, 16 or 32 lanes of a warp, or a whole block, or a cluster of C.
//
// Values cross warps through `slots`, of which there are two sets used in turn: whoever writes a set
// again is past a barrier that all threads reached after they had read it. So one barrier is enough.
template <class A, int C> struct Group {
    static constexpr u32 SLOTS = 32;
    // Bytes of shared memory that the slots take.
    static constexpr u32 BYTES = 2 * 3 * SLOTS * sizeof(A);

    u32 lanes;   // threads of this block that share a set
    u32 lane;    // this thread among those of all blocks
    u32 threads; // threads of all blocks that share a set
    u32 width;   // lanes of a warp that share a set
    A* slots;
    u32 parity;

    __device__ Group(u32 lanes, char* shared)
        : lanes(lanes), lane(threadIdx.x % lanes + block_rank<C>() * lanes), threads(lanes * C),
          width(lanes < 32 ? lanes : 32), slots(reinterpret_cast<A*>(shared)), parity(0) {}

    __device__ bool within_warp() const { return C == 1 && lanes <= 32; }
    __device__ u32 warps() const { return lanes / 32; }

    __device__ A* next_slots() {
        A* mine = slots + parity * 3 * SLOTS;
        parity ^= 1;
        return mine;
    }

    // Sums of K values over the group, the same bits in every thread.
    template <int K> __device__ void sum(A (&v)[K]) {
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] = lanes_sum(v[k], width);
        if (within_warp()) return;
        A* mine = next_slots();
        const u32 warp_lane = threadIdx.x % 32;
        if (warp_lane == 0) {
#pragma unroll
            for (int k = 0; k < K; ++k) mine[k * SLOTS + threadIdx.x / 32] = v[k];
        }
        group_barrier<C>();
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] = 0;
        for (u32 i = warp_lane; i < warps() * C; i += 32) {
            const A* theirs = in_block<C>(mine, i / warps());
#pragma unroll
            for (int k = 0; k < K; ++k) v[k] += theirs[k * SLOTS + i % warps()];
        }
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] = lanes_sum(v[k], 32);
    }

    // Merges a warp's moments (the same in its lanes) over the group. `count_of` tells the count of
    // warp `i`, so that counts need not travel.
    template <class F> __device__ void merge_warps(Moments<A>& m, F count_of) {
        if (within_warp()) return;
        A* mine = next_slots();
        const u32 warp_lane = threadIdx.x % 32;
        if (warp_lane == 0) {
            mine[threadIdx.x / 32] = m.mean;
            mine[SLOTS + threadIdx.x / 32] = m.low;
            mine[2 * SLOTS + threadIdx.x / 32] = m.m2;
        }
        group_barrier<C>();
        m.count = 0;
        for (u32 i = warp_lane; i < warps() * C; i += 32) {
            const A* theirs = in_block<C>(mine, i / warps()) + i % warps();
            merge(m, Moments<A>{theirs[0], theirs[SLOTS], theirs[2 * SLOTS], count_of(i)});
        }
        lanes_merge(m, 32);
    }

    // Nobody leaves while its shared memory may still be read.
    __device__ void leave() const {
        if constexpr (C > 1) group_barrier<C>();
    }
};
