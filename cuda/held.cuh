// Statistics and output of sets that fit on chip: read once, written once.
//
// A set lies in shared memory, where 8 lanes to a whole block, or a cluster of C blocks, walk it three
// times: mean, deviations, output. All of it is under way at once when it is asked for, and takes no
// registers, so that several blocks share a multiprocessor: one loads while another stores. Threads
// without work stay in the loops: every one of them is needed at the shuffles and barriers.
#pragma once
#include "epilogue.cuh"
#include "input.cuh"

// Two passes over the values that `each(f)` feeds to f, then the warps' moments together.
template <class A, int V, int C, class F>
__device__ inline Moments<A> group_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, F each) {
    if (!p.has(CENTER)) {
        A m2[1] = {};
        each([&](A x) { m2[0] += x * x; });
        group.sum(m2);
        return {0, 0, m2[0], slice.set_units * V};
    }
    const u32 count = slice.in_warp(slice.lane / 32);
    A sum = 0, rest = 0, m2 = 0;
    each([&](A x) { sum += x; });
    // A slice, or a warp's part of it, may be empty.
    const A inverse = count ? quick_inverse(A(count)) : A(0), mean = lanes_sum(sum, group.width) * inverse;
    each([&](A x) {
        const A d = x - mean;
        rest += d;
        m2 += d * d;
    });
    Moments<A> m{mean, 0, lanes_sum(m2, group.width), count};
    correct(lanes_sum(rest, group.width) * inverse, A(count), m);
    group.merge_all(
        m, slice.set_units * V, [&](u32 warp) { return slice.in_warp(warp); }, [&](u32 rank) { return slice.in_rank(rank); });
    return m;
}

// The output of a held set, whatever stands around it and wherever its parameters lie.
template <class T, int V, int C, class Where, class A>
__device__ inline void put_any_output(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, const T* held) {
    const Affine<A, T> affine(p, at.first_param);
    T* out = static_cast<T*>(p.out) + at.base;
#pragma unroll 1
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        if (SKIP_FIRST && e == 0) continue;
        A values[V], w[V], b[V];
        load<T, V>(held + unit * V, values);
        affine.weight(at.column(e), w);
        affine.bias(at.column(e), b);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        const u64 offset = at.offset(p, e);
        if (p.has(FUSED)) finish<T, V>(p, at.base + offset, values);
        store<T, V>(out + offset, values);
    }
}

// The same where nothing is fused and `params` knows where the parameters lie: a third of the instructions.
template <bool CONTIGUOUS, class T, int V, int C, class Where, class A, class P>
__device__ inline void put_plain_output(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, const T* held,
                                        const P& params) {
    T* out = static_cast<T*>(p.out) + at.base + (CONTIGUOUS ? at.offset(p, 0) + u64(slice.first) * V : 0);
#pragma unroll 2
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        if (SKIP_FIRST && e == 0) continue;
        A values[V], w[V], b[V];
        params.get(at.column(e), w, b);
        load<T, V>(held + unit * V, values);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        store_global<T, V>(out + (CONTIGUOUS ? u64(unit) * V : at.offset(p, e)), values);
    }
}

template <class T, int V, int C, class Where, class A>
__device__ inline void put_output(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, const T* held) {
    const auto plain = [&](const auto& params) { put_plain_output<true>(p, slice, at, stats, held, params); };
    const bool known = !p.has(FUSED) && p.weight_offset == 0;
    if (known && p.has(PER_SET)) {
        const Affine<A, T> affine(p, at.first_param);
        const OneParam<A> params{affine.weight_at(at.first_param), affine.bias_at(at.first_param)};
        if (at.contiguous(p)) return plain(params);
        return put_plain_output<false>(p, slice, at, stats, held, params);
    }
    if (known && at.contiguous(p) && with_plain_params<T>(p, at.first_param, plain)) return;
    put_any_output(p, slice, at, stats, held);
}

// Moments of a held set or chunk.
template <class T, int V, int C, class A>
__device__ inline Moments<A> held_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, const T* held) {
    return group_moments(p, group, slice, [&](auto f) {
#pragma unroll 2
        for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
            A values[V];
            load<T, V>(held + unit * V, values);
#pragma unroll
            for (int v = 0; v < V; ++v) f(values[v]);
        }
    });
}

template <class T, int V, int C> __device__ void forward_held(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), sets_per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    T* held = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES + mine * held_bytes<T>(slice.each * V));
    for (u64 first = u64(blockIdx.x / C) * sets_per_block; first < p.sets; first += u64(gridDim.x / C) * sets_per_block) {
        const bool active = first + mine < p.sets;
        const Place at = place_set(p, active ? first + mine : first);
        hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, held);
        copies_batch();
        if (p.has(PER_COLUMN)) {
            // On their way together with x, for a block that is the first to use them.
            const Affine<A, T> affine(p, at.first_param);
            affine.ask(slice.first * V, (slice.first + slice.units) * V, slice.lane, slice.lanes);
        }
        copies_done();
        if (p.residual && active) add_residual(p, slice, at, held);
        const Moments<A> m = held_moments(p, group, slice, held);
        const Stats<A> stats = finish_moments(p, at.set, m, active && group.first());
        if (p.out && active) put_output(p, slice, at, stats, held);
    }
    group.leave();
}
