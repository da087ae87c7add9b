// Statistics and output of sets that fit on chip: read once, written once.
//
// A set is walked three times: mean, deviations, output. Most lie in registers meanwhile, a few packs of each of 2
// lanes to a whole block, or of a cluster of C blocks; larger ones, and those with something around the norm, in
// shared memory. All of a set is under way at once when it is asked for, and several blocks share a multiprocessor:
// one loads while another stores. Threads without work stay in the loops: every one of them is needed at the
// shuffles and barriers.
#pragma once
#include "epilogue.cuh"
#include "input.cuh"

// A thread's share of a set, or of a chunk, in shared memory. `each` calls f with the number of each pack and its
// values; `last` is the last to do so, `SOME` packs at a time.
template <class T, int V, int C> struct InMemory {
    using Value = typename Accumulator<T>::type;

    static constexpr int KEPT = 2;

    const Slice<V, C>& slice;
    const T* held;

    template <int SOME, class F> __device__ void walk(F f) const {
#pragma unroll SOME
        for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
            Value values[V];
            load<T, V>(held + unit * V, values);
            f(unit, values);
        }
    }
    template <class F> __device__ void each(F f) const { walk<2>(f); }
    template <int SOME, class F> __device__ void last(F f) const { walk<SOME>(f); }
};

// The same in registers, of BYTES at most: no way to shared memory and back for each walk.
template <class T, int V, int C, int BYTES> struct InRegisters {
    using Value = typename Accumulator<T>::type;
    static constexpr int KEPT = BYTES / Pack<T, V>::BYTES;

    const Slice<V, C>& slice;
    Pack<T, V> packs[KEPT];

    // What lies in memory that nobody writes meanwhile.
    template <class Where> __device__ InRegisters(const Params& p, const Slice<V, C>& slice, const Where& at, const T* from) : slice(slice) {
        if (at.contiguous(p)) {
            from += at.offset(p, 0) + u64(slice.first) * V;
            take(BEYOND, [&](u32 unit, Pack<T, V>& pack) { pack.fetch(from + u64(unit) * V); });
        } else {
            take(BEYOND, [&](u32 unit, Pack<T, V>& pack) { pack.fetch(from + at.offset(p, (slice.first + unit) * V)); });
        }
    }
    // What has come to shared memory.
    __device__ InRegisters(const Slice<V, C>& slice, const T* held) : slice(slice) {
        take(0, [&](u32 unit, Pack<T, V>& pack) { pack.load(held + unit * V); });
    }
    template <class F> __device__ void each(F f) {
#pragma unroll
        for (int k = 0; k < KEPT; ++k) {
            const u32 unit = slice.lane + k * slice.lanes;
            if (unit >= slice.units) continue;
            Value values[V];
            packs[k].get(values);
            packs[k].forget();
            f(unit, values);
        }
    }
    // In a loop the packs move up: a register has no number that a loop could count.
    template <int SOME, class F> __device__ void last(F f) {
#pragma unroll 1
        for (u32 from = slice.lane; from < slice.units; from += SOME * slice.lanes) {
#pragma unroll
            for (int k = 0; k < SOME; ++k) {
                const u32 unit = from + k * slice.lanes;
                if (unit >= slice.units) continue;
                Value values[V];
                packs[k].forget();
                packs[k].get(values);
                f(unit, values);
            }
#pragma unroll
            for (int k = 0; k + SOME < KEPT; ++k) packs[k] = packs[k + SOME];
        }
    }

  private:
    template <class F> __device__ void take(u32 beyond, F from) {
#pragma unroll
        for (int k = 0; k < KEPT; ++k) {
            packs[k] = {};
            const u32 unit = slice.lane + k * slice.lanes;
            if (unit < slice.units + beyond) from(unit, packs[k]);
        }
    }
};

// Sums that do not wait for each other: what one thread adds up.
constexpr int CHAINS = 4;

template <class A> __device__ inline A sum_of(const A (&chains)[CHAINS]) { return (chains[0] + chains[1]) + (chains[2] + chains[3]); }

// Two passes over the values that are held, then the warps' moments together, for ALL or the block's first warp. `between` is
// called once all values have been seen.
template <bool ALL, class A, int V, int C, class H, class F>
__device__ inline Moments<A> group_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, H& held, F between) {
    if (!p.has(CENTER)) {
        A squares[CHAINS] = {};
        held.each([&](u32, const A(&x)[V]) {
#pragma unroll
            for (int v = 0; v < V; ++v) squares[v % CHAINS] += x[v] * x[v];
        });
        A m2[1] = {sum_of(squares)};
        between();
        group.sum(m2);
        return {0, 0, m2[0], slice.set_units * V};
    }
    const u32 count = slice.in_warp(slice.lane / 32);
    A sums[CHAINS] = {}, rests[CHAINS] = {}, squares[CHAINS] = {};
    held.each([&](u32, const A(&x)[V]) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v % CHAINS] += x[v];
    });
    between();
    // A slice, or a warp's part of it, may be empty.
    const A inverse = count ? quick_inverse(A(count)) : A(0), mean = rounded_product(lanes_sum(sum_of(sums), group.width), inverse);
    held.each([&](u32, const A(&x)[V]) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A d = x[v] - mean;
            rests[v % CHAINS] += d;
            squares[v % CHAINS] += d * d;
        }
    });
    Moments<A> m{mean, 0, lanes_sum(sum_of(squares), group.width), count};
    correct(lanes_sum(sum_of(rests), group.width) * inverse, A(count), m);
    group.template merge_all<ALL>(
        m, slice.set_units * V, [&](u32 warp) { return slice.in_warp(warp); }, [&](u32 rank) { return slice.in_rank(rank); });
    return m;
}

template <bool ALL = true, class A, int V, int C, class H>
__device__ inline Moments<A> group_moments(const Params& p, Group<A, C>& group, const Slice<V, C>& slice, H& held) {
    return group_moments<ALL>(p, group, slice, held, [] {});
}

// The output of a held set, whatever stands around it and wherever its parameters lie.
template <class T, int V, int C, class Where, class A>
__device__ inline void put_any_output(const Params& p, const Where& at, const Stats<A>& stats, const InMemory<T, V, C>& held) {
    const Affine<A, T> affine(p, at.first_param);
    T* out = static_cast<T*>(p.out) + at.base;
    held.template last<1>([&](u32 unit, A(&values)[V]) {
        const u32 e = (held.slice.first + unit) * V;
        if (SKIP_FIRST && e == 0) return;
        A w[V], b[V];
        affine.weight(at.column(e), w);
        affine.bias(at.column(e), b);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        const u64 offset = at.offset(p, e);
        if (p.has(FUSED)) finish<T, V>(p, at.base + offset, values);
        store<T, V>(out + offset, values);
    });
}

// The same where nothing is fused and `params` knows where the parameters lie: a third of the instructions.
template <bool CONTIGUOUS, class T, int V, class Where, class A, class H, class P>
__device__ inline void put_plain_output(const Params& p, const Where& at, const Stats<A>& stats, H& held, const P& params) {
    T* out = static_cast<T*>(p.out) + at.base + (CONTIGUOUS ? at.offset(p, 0) + u64(held.slice.first) * V : 0);
    held.template last<P::USUAL ? H::KEPT : 2>([&](u32 unit, A(&values)[V]) {
        const u32 e = (held.slice.first + unit) * V;
        if (SKIP_FIRST && e == 0) return;
        A w[V], b[V];
        params.get(at.column(e), w, b);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = stats(values[v]) * w[v] + b[v];
        store_global<T, V>(out + (CONTIGUOUS ? u64(unit) * V : at.offset(p, e)), values);
    });
}

template <class T, int V, int C, class Where, class A>
__device__ inline void put_output(const Params& p, const Where& at, const Stats<A>& stats, InMemory<T, V, C>& held) {
    const auto plain = [&](const auto& params) { put_plain_output<true, T, V>(p, at, stats, held, params); };
    const bool known = !p.has(FUSED) && p.weight_offset == 0;
    if (known && p.has(PER_SET)) {
        const Affine<A, T> affine(p, at.first_param);
        const OneParam<A> params{affine.weight_at(at.first_param), affine.bias_at(at.first_param)};
        if (at.contiguous(p)) return plain(params);
        return put_plain_output<false, T, V>(p, at, stats, held, params);
    }
    if (known && at.contiguous(p) && with_plain_params<T>(p, at.first_param, plain)) return;
    put_any_output<T, V>(p, at, stats, held);
}

// Asks for the parameters of a slice together with x, for a block that is the first to use them: all of its threads once,
// since every line of them is asked for by every block at the same time.
template <class T, int V, int C> __device__ inline void ask_params(const Params& p, const Slice<V, C>& slice, const Place& at) {
    if (!p.has(PER_COLUMN)) return;
    const Affine<typename Accumulator<T>::type, T> affine(p, at.first_param);
    affine.ask(slice.first * V, (slice.first + slice.units) * V, threadIdx.x, blockDim.x);
}

template <class T, int V, int C> __device__ void forward_held(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), sets_per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    T* memory = reinterpret_cast<T*>(shared_memory() + Group<A, C>::BYTES + mine * apart<T>(slice.each * V));
    for (u64 first = u64(blockIdx.x / C) * sets_per_block; first < p.sets; first += u64(gridDim.x / C) * sets_per_block) {
        const bool active = first + mine < p.sets;
        const Place at = place_set(p, active ? first + mine : first);
        hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, memory);
        copies_batch();
        ask_params<T>(p, slice, at);
        copies_done();
        if (p.residual && active) add_residual(p, slice, at, memory);
        InMemory<T, V, C> held{slice, memory};
        const Stats<A> stats = finish_moments(p, at.set, group_moments(p, group, slice, held), active && group.first());
        if (p.out && active) put_output<T, V>(p, at, stats, held);
    }
    group.leave();
}

// Of a thread of forward_kept and forward_several: src/cuda/plan/held.rs counts the same. A pack of one element takes a
// register, whatever its size. Packs of 16 bytes in a block alone are few, for which more threads load: rows of 1024 f32 on an
// H100 1.15 times as fast as with 128 bytes, a single row of 4096 bf16 1.28 times, 8192 of them 0.97 times.
template <class T, int V, int C = 1>
constexpr int KEPT_BYTES = V == 1 && sizeof(T) == 2 ? 32 : Pack<T, V>::BYTES == 16 && C == 1 ? 64 : 128;

// The output of a set or chunk in registers, with plain parameters. `one` is the whole set's, where it has one.
template <class T, int V, class Where, class A, class H>
__device__ inline void put_kept_output(const Params& p, const Where& at, const Stats<A>& stats, H& held, const OneParam<A>& one) {
    const auto put = [&](const auto& params) { put_plain_output<true, T, V>(p, at, stats, held, params); };
    if (p.has(PER_SET) && at.contiguous(p)) {
        put(one);
    } else if (p.has(PER_SET)) {
        put_plain_output<false, T, V>(p, at, stats, held, one);
    } else if (!with_plain_params<T>(p, at.first_param, put)) {
        fail();
    }
}

// For norms with nothing around them, and with plain parameters: the plan sees to it. A call in here would push the
// packs out of the registers. A block, or a cluster, has one set.
template <class T, int V, int C> __device__ void forward_kept(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(blockDim.x, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), blockDim.x, threadIdx.x);
    const Place at = place_set(p, blockIdx.x / C);
    InRegisters<T, V, C, KEPT_BYTES<T, V, C>> held(p, slice, at, static_cast<const T*>(p.x) + at.x_base);
    ask_params<T>(p, slice, at);
    const OneParam<A> one = plain_param<A, T>(p, at.first_param);
    const Summary<A> summary(p, group_moments(p, group, slice, held));
    if (p.out) put_kept_output<T, V>(p, at, summary.stats(p), held, one);
    if (group.first()) summary.write(p, at.set);
    group.leave();
}

// The same where a block has several small sets, and after them others. The next are on their way to shared memory
// while these are worked on: blocks that start together would else all load, then all compute, and memory would stand
// still meanwhile (a quarter of the time of 16384 rows of 1024 f32 on an H100).
template <class T, int V> __device__ void forward_several(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, 1> group(p.lanes, shared_memory());
    const Slice<V, 1> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), sets_per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    T* memory = reinterpret_cast<T*>(shared_memory() + Group<A, 1>::BYTES + mine * apart<T>(slice.each * V));
    const u32 sets = u32(p.sets), step = gridDim.x * sets_per_block;
    const auto ask = [&](u32 set) {
        if (set < sets) {
            const Place at = place_set(p, set);
            hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, memory);
            if (p.has(PER_SET)) ask_param<T>(p, at.first_param);
        }
        copies_batch();
    };
    u32 set = blockIdx.x * sets_per_block + mine;
    ask(set);
    ask_params<T>(p, slice, place_set(p, set - mine));
    for (; set - mine < sets; set += step) {
        copies_done();
        InRegisters<T, V, 1, KEPT_BYTES<T, V>> held(slice, memory);
        const Summary<A> summary(p, group_moments<true>(p, group, slice, held, [&] { ask(set + step); }));
        if (set >= sets) continue;
        const Place at = place_set(p, set);
        const OneParam<A> one = plain_param<A, T>(p, at.first_param);
        if (p.out) put_kept_output<T, V>(p, at, summary.stats(p), held, one);
        if (group.lane == 0) summary.write(p, set);
    }
}
