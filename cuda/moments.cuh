// Mean and variance in parts: Chan's merge on means kept as pairs, and reductions over threads.
//
// A part is (count, mean + low, M2) with M2 the sum of squared differences from its own mean. The mean
// is an unevaluated pair, so that x - mean keeps the digits that a mean rounded to f32 would lose. Each
// part is computed in two passes over resident values, from a first mean that serves as the pivot.
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
#pragma once
#include "affine.cuh"

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

// Sum over groups of WIDTH lanes (a power of two), the same bits in every lane. Without a loop it has half the
// instructions.
template <int WIDTH, class A> __device__ inline A lanes_sum(A v) {
#pragma unroll
    for (u32 o = WIDTH / 2; o > 0; o /= 2) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

template <class A> __device__ inline A lanes_sum(A v, u32 width) {
    if (width == 32) return lanes_sum<32>(v);
#pragma unroll 1
    for (u32 o = width / 2; o > 0; o /= 2) v += __shfl_xor_sync(FULL, v, o);
    return v;
}

// The same of K values: steps of one do not wait for those of another.
template <int K, class A> __device__ inline void lanes_sums(A (&v)[K], u32 width) {
    if (width == 32) {
#pragma unroll
        for (u32 o = 16; o > 0; o /= 2) {
#pragma unroll
            for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(FULL, v[k], o);
        }
        return;
    }
#pragma unroll 1
    for (u32 o = width / 2; o > 0; o /= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(FULL, v[k], o);
    }
}

// Close to 1 / v, for numbers that choose a pivot or scale what a rounding has left.
template <class A> __device__ inline A quick_inverse(A v) {
#ifndef NORM_EMULATION
    if constexpr (sizeof(A) == 4) {
        asm("rcp.approx.f32 %0, %1;" : "=f"(v) : "f"(v));
        return v;
    }
#endif
    return A(1) / v;
}

// Takes in what the rounding of the mean has left, the mean of the differences to it.
template <class A, class N> __device__ inline void correct(A low, A count, Moments<A, N>& m) {
    m.low = low;
    m.m2 -= low * low * count;
    m.m2 = m.m2 < 0 ? A(0) : m.m2;
}

// Merges the moments of some lanes at once, around the mean of their means; `total` is all that they count, `sum` adds up
// what they have. Fewer steps than merging them by pairs, no division, and the result in every lane.
template <class A, class N, class S> __device__ inline void combine_by(Moments<A, N>& m, N total, S sum) {
    const A count = A(m.count), share = total != 0 ? count * quick_inverse(A(total)) : A(0);
    const A mean = sum(rounded_product(m.mean, share)), d = (m.mean - mean) + m.low;
    const A m2 = sum(m.m2 + count * d * d);
    m = {mean, 0, m2, total};
    correct(sum(rounded_product(share, d)), A(total), m);
}

template <class A, class N> __device__ inline void lanes_combine(Moments<A, N>& m, N total, u32 width) {
    combine_by(m, total, [&](A v) { return lanes_sum(v, width); });
}

template <int WIDTH, class A, class N> __device__ inline void lanes_combine(Moments<A, N>& m, N total) {
    combine_by(m, total, [](A v) { return lanes_sum<WIDTH>(v); });
}

// The number of this block in its cluster of C.
template <int C> __device__ inline u32 block_rank() {
    if constexpr (C == 1) {
        return 0;
    } else {
        // A discarded branch still has its names looked up, and architectures below 9.0 lack these.
#if NORM_HAS_CLUSTERS
        return __clusterRelativeBlockRank();
#endif
    }
}

// Values from every block of a cluster to every other, without a fence: a store into the other block's
// shared memory carries its own notice of arrival (st.async on an mbarrier of the receiver). A cluster
// barrier would first drain all stores of the block, those of the output too, and empty its L1 cache.
//
// Two boxes and two mbarriers are used in turn. A block that sends for the second time into a box has
// had the receiver's values of the exchange between, which the receiver sends after all its threads
// have read the box. Nobody leaves before all values have come, and then nothing is under way.
// Source: PTX ISA, "mbarrier" and "st.async".
template <class A, int C> struct Exchange {
    static constexpr u32 VALUES = 3 * 8; // a box: three values of up to eight blocks

    A* boxes;
    u64* barriers;
    u32 turn;

    __device__ Exchange(A* boxes, u64* barriers) : boxes(boxes), barriers(barriers), turn(0) {
        if constexpr (C > 1) {
#ifdef NORM_EMULATION
            __cluster_barrier_arrive();
#elif NORM_HAS_CLUSTERS
            if (threadIdx.x == 0) {
                for (int i = 0; i < 2; ++i) {
                    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
                }
                asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            }
            // Waited for before the first value is sent; loads go on meanwhile.
            asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
        }
    }

    // `v` is the same in all threads of a block. Afterwards value k of block r is `box[k * C + r]`.
    template <int K> __device__ const A* all(const A (&v)[K]) {
        A* box = boxes + turn % 2 * VALUES;
#ifdef NORM_EMULATION
        if (turn == 0) __cluster_barrier_wait();
        if (threadIdx.x < C) {
            A* theirs = static_cast<A*>(__cluster_map_shared_rank(box, threadIdx.x));
            for (int k = 0; k < K; ++k) theirs[k * C + block_rank<C>()] = v[k];
        }
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
#elif NORM_HAS_CLUSTERS
        if (turn == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        const u32 barrier = shared_address(barriers + turn % 2);
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(u32(C * K * sizeof(A)))
                         : "memory");
        }
        if (threadIdx.x < C) {
            u32 to, notice;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(box + block_rank<C>())), "r"(threadIdx.x));
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(notice) : "r"(barrier), "r"(threadIdx.x));
#pragma unroll
            for (int k = 0; k < K; ++k) {
                asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                                 to + u32(k * C * sizeof(A))),
                             "r"(__float_as_uint(v[k])), "r"(notice)
                             : "memory");
            }
        }
        const u32 phase = turn / 2 % 2;
        u32 done = 0;
        while (!done) {
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                         : "=r"(done)
                         : "r"(barrier), "r"(phase)
                         : "memory");
        }
#endif
        ++turn;
        return box;
    }

    __device__ void leave() const {
        if (turn != 0) return;
#ifdef NORM_EMULATION
        __cluster_barrier_wait();
#elif NORM_HAS_CLUSTERS
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }
};

// The threads that share a set: 2 to 32 lanes of a warp, or a whole block, or a cluster of C.
//
// Values cross warps through `slots`, of which there are two sets used in turn: whoever writes a set
// again is past a barrier that all threads reached after they had read it. So one barrier is enough.
template <class A, int C> struct Group {
    static constexpr u32 WARPS = 16; // of a block at most
    // Bytes of shared memory at its start that the group takes: `slots` in src/cuda/plan/held.rs counts the same.
    static constexpr u32 BYTES = 2 * (3 * WARPS + Exchange<A, C>::VALUES) * sizeof(A) + 2 * sizeof(u64);

    u32 lanes; // threads of this block that share a set
    u32 lane;  // this thread among them
    u32 width; // lanes of a warp that share a set
    A* slots;
    u32 parity;
    Exchange<A, C> exchange;

    __device__ Group(u32 lanes, char* shared)
        : lanes(lanes), lane(threadIdx.x & (lanes - 1)), width(lanes < 32 ? lanes : 32), slots(reinterpret_cast<A*>(shared)), parity(0),
          exchange(slots + 2 * 3 * WARPS, reinterpret_cast<u64*>(shared + BYTES - 2 * sizeof(u64))) {}

    // Whether this thread is the one of its kind, in all blocks that share the set.
    __device__ bool first() const { return lane == 0 && block_rank<C>() == 0; }

    // Sums of K values over the group, the same bits in every thread.
    template <int K> __device__ void sum(A (&v)[K]) {
        lanes_sums(v, width);
        if (lanes > 32) {
            const A* all = in_block(v);
            const u32 i = threadIdx.x & (WARPS - 1);
#pragma unroll
            for (int k = 0; k < K; ++k) v[k] = lanes_sum<WARPS>(i < lanes / 32 ? all[k * WARPS + i] : A(0));
        }
        if constexpr (C > 1) {
            const A* box = exchange.all(v);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                v[k] = 0;
                for (int r = 0; r < C; ++r) v[k] += box[k * C + r];
            }
        }
    }

    // Merges the moments of warps (the same in its lanes) over the group. Counts need not travel:
    // `in_warp(i)` tells that of warp i of this block, `in_rank(r)` that of block r, of `total`. Without ALL the
    // block's first warp alone has the result.
    template <bool ALL, class F, class G> __device__ void merge_all(Moments<A>& m, u32 total, F in_warp, G in_rank) {
        static_assert(ALL || C == 1, "all warps of a cluster exchange");
        if (lanes > 32) {
            const A* all = in_block(parts(m));
            if (!ALL && threadIdx.x >= 32) return;
            // Warps that the block does not have count nothing.
            const u32 i = threadIdx.x & (WARPS - 1);
            m = {0, 0, 0, 0};
            if (i < lanes / 32) m = {all[i], all[WARPS + i], all[2 * WARPS + i], in_warp(i)};
            lanes_combine<WARPS>(m, in_rank(block_rank<C>()));
        }
        if constexpr (C > 1) {
            const A* box = exchange.all(parts(m).v);
            const u32 r = threadIdx.x % C;
            m = {box[r], box[C + r], box[2 * C + r], in_rank(r)};
            lanes_combine<C>(m, total);
        }
    }

    // Before the kernel ends: what the constructor began may not have been waited for.
    __device__ void leave() const {
        if constexpr (C > 1) exchange.leave();
    }

  private:
    struct Three {
        A v[3];
    };
    __device__ static Three parts(const Moments<A>& m) { return {{m.mean, m.low, m.m2}}; }
    __device__ const A* in_block(const Three& parts) { return in_block(parts.v); }

    // Leaves a warp's values for the others of the block; value k of warp i is then at [k * WARPS + i].
    template <int K> __device__ const A* in_block(const A (&v)[K]) {
        A* mine = slots + parity * 3 * WARPS;
        parity ^= 1;
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int k = 0; k < K; ++k) mine[k * WARPS + threadIdx.x / 32] = v[k];
        }
        __syncthreads();
        return mine;
    }
};
