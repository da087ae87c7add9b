// Gradients of sets that fit on chip: x and dy read once, dx written once.
//
// With xhat = (x - mean) * rstd and g = dy * weight, over n elements of a set:
//     dx = rstd * (g - sum(g) / n - xhat * sum(g * xhat) / n),
// without the first sum where nothing was centered. `backward_rows` is for sets whose every column has
// its own parameter: a thread keeps to its columns and adds up their gradients in registers, while the
// next rows are on their way. `backward_sets` is for all others.
#pragma once
#include "held.cuh"

// Elements of x, and of dy, that a thread of backward_rows has: src/cuda/plan/held.rs counts the same.
template <class T> constexpr int BACKWARD_ELEMENTS = sizeof(T) == 8 ? 8 : 16;

// dx from its parts; sums[0] and sums[1] are the two sums already divided by n.
template <class A> __device__ inline A input_gradient(const Stats<A>& stats, A x, A g, const A (&sums)[2]) {
    return (g - sums[0] - stats(x) * sums[1]) * stats.rstd;
}

// dy becomes dz where it is held: what comes after knows of no fusion.
// `write` stores the gradients of skip and gate.
template <class T, int V, int C, class Where, class A>
__device__ inline void take_dz(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, bool write,
                                     const T* held, const HeldGradient<T, V>& dheld) {
    const Affine<A, T> affine(p, at.first_param);
#pragma unroll 1
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        A z[V], d[V], w[V], b[V];
        load<T, V>(held + unit * V, z);
        dheld.get_raw(unit * V, d);
        affine.weight(at.column(e), w);
        affine.bias(at.column(e), b);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] = stats(z[v]) * w[v] + b[v];
        make_dz<T, V>(p, at.base + at.offset(p, e), write, z, d);
        dheld.set(unit * V, d);
    }
}

// The sums of a set become the two means of the formula, times the weight that the whole set shares.
template <class A> __device__ inline void to_means(const Params& p, A weight, A (&sums)[2]) {
    sums[0] = p.has(CENTER) ? sums[0] * weight / A(p.count) : A(0);
    sums[1] = sums[1] * weight / A(p.count);
}

// dx of a held set or chunk where nothing is fused and `params` knows the weights, the one that the whole set shares
// included.
template <bool CONTIGUOUS, class T, int V, int C, class Where, class A, class P>
__device__ inline void put_plain_gradient(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats,
                                          const A (&sums)[2], const T* held, const T* dheld, const P& params) {
    T* out = static_cast<T*>(p.out) + at.base + (CONTIGUOUS ? at.offset(p, 0) + u64(slice.first) * V : 0);
#pragma unroll 2
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        A values[V], d[V], w[V], none[V];
        params.get(at.column(e), w, none);
        load<T, V>(held + unit * V, values);
        load<T, V>(dheld + unit * V, d);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = input_gradient(stats, values[v], d[v] * w[v], sums);
        store_global<T, V>(out + (CONTIGUOUS ? u64(unit) * V : at.offset(p, e)), values);
    }
}

// The same whatever it is. `weight` is the one that the whole set shares.
template <class T, int V, int C, class Where, class A>
__device__ inline void put_any_gradient(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, A weight,
                                          const A (&sums)[2], const T* held, const HeldGradient<T, V>& dheld) {
    const Affine<A, T> affine(p, at.first_param);
    T* out = static_cast<T*>(p.out) + at.base;
#pragma unroll 1
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u32 e = (slice.first + unit) * V;
        A values[V] = {}, d[V], w[V];
        dheld.get(unit * V, d);
        affine.varying_weight(at.column(e), w);
#pragma unroll
        for (int v = 0; v < V; ++v) d[v] *= w[v] * weight;
        if (p.has(FIXED)) {
            // Without sums dx does not depend on x.
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = d[v] * stats.rstd;
        } else {
            load<T, V>(held + unit * V, values);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = input_gradient(stats, values[v], d[v], sums);
        }
        store_global<T, V>(out + at.offset(p, e), values);
    }
}

template <class T, int V, int C, class Where, class A>
__device__ inline void put_input_gradient(const Params& p, const Slice<V, C>& slice, const Where& at, const Stats<A>& stats, A weight,
                                          const A (&sums)[2], const T* held, const HeldGradient<T, V>& dheld) {
    const auto plain = [&](const auto& params) { put_plain_gradient<true>(p, slice, at, stats, sums, held, dheld.at, params); };
    const bool known = !p.has(FUSED) && !p.has(FIXED);
    if (known && p.has(PER_SET)) {
        const OneParam<A> params{weight, A(0)};
        if (at.contiguous(p)) return plain(params);
        return put_plain_gradient<false>(p, slice, at, stats, sums, held, dheld.at, params);
    }
    if (known && at.contiguous(p) && with_plain_weight<T>(p, at.first_param, plain)) return;
    put_any_gradient(p, slice, at, stats, weight, sums, held, dheld);
}

// Adds up what the groups of a block have in the same columns, within warps and then warp after warp; the last
// group has the total. Groups are of at most a warp where a block has several.
template <class A, int K>
__device__ inline void add_groups(A (&values)[K], A* shared, u32 lanes) {
#pragma unroll 1
    for (u32 o = lanes; o < 32; o *= 2) {
#pragma unroll
        for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(FULL, values[k], o);
    }
    const u32 warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool last_of_warp = threadIdx.x % 32 + lanes >= 32;
    A* slot = shared + threadIdx.x % lanes;
    for (u32 turn = 0; turn < warps; ++turn) {
        __syncthreads();
        if (warp != turn || !last_of_warp) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (turn > 0) values[k] += slot[k * lanes];
            slot[k * lanes] = values[k];
        }
    }
}

// The gradients of V neighbouring parameters where nobody else has parts of them: the plan sees to their dtype.
template <class T, int V, class A> __device__ inline void put_param_gradients(const Params& p, u64 param, const A* dweight, const A* dbias) {
    A w[V], b[V];
#pragma unroll
    for (int v = 0; v < V; ++v) w[v] = dweight[v], b[v] = dbias[v];
    if (p.dweight) store<T, V>(static_cast<T*>(p.dweight) + param, w);
    if (p.dbias) store<T, V>(static_cast<T*>(p.dbias) + param, b);
}

// The rows of a block of backward_rows: one set of each outer block, all of one sample; those of its groups are neighbours.
// Workers take turns where TURNS, so that what all of them read and write at one time lies together: 8192 rows of 4096 bf16
// 1.03 times as fast on an H100. Rows of a cluster, or of single elements, are a range of neighbours for each worker: by turns
// they took 1.05 to 1.15 times as long.
template <int V, int C> struct Work {
    static constexpr bool TURNS = C == 1 && V > 1;
    u64 first, end, step, line, sample, copy; // items: outer blocks

    __device__ Work(const Params& p, u32 per_block) {
        const u64 block = blockIdx.x / C, tokens = p.tokens ? p.tokens : p.outer;
        const u64 worker = quotient(block, p.sets_per_outer, p.by_sets);
        sample = quotient(worker, p.copies);
        line = block - worker * p.sets_per_outer;
        copy = worker - sample * p.copies;
        const u64 start = sample * tokens, stop = start + tokens;
        if (TURNS) {
            first = start + copy * per_block, end = stop;
            step = p.copies * per_block;
        } else {
            const u64 each = quotient(tokens + p.copies - 1, p.copies);
            first = start + copy * each, end = first + each < stop ? first + each : stop;
            step = per_block;
        }
    }
    // Rows of a group of the block: one in each turn. The first group has the most.
    __device__ u32 turns(u32 group) const { return first + group < end ? u32(quotient(end - first - group + step - 1, step)) : 0; }
    __device__ u64 item(u32 group, u32 turn) const { return first + group + turn * step; }
    // All rows of a worker lie alike in their blocks, and are of one sample.
    __device__ u64 in_block(const Params& p) const { return line * p.run; }
    __device__ u64 first_param(const Params& p) const { return line * p.set_params + (p.tokens ? sample * p.params : 0); }
};

// The gradients of a thread's columns, or a worker's parts of them, once all rows are seen. `memory` held the rows.
template <class T, int V, int N, int C, class A>
__device__ inline void put_columns(const Params& p, const Work<V, C>& work, const Slice<V, C>& slice, A* memory, u32 per_block, u32 mine,
                                   A (&dweight)[N * V], A (&dbias)[N * V]) {
    if (!p.has(WANT_PARAMS)) return;
    if (per_block > 1) {
        add_groups(dweight, memory, p.lanes);
        add_groups(dbias, memory, p.lanes);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const u32 unit = slice.lane + k * slice.lanes;
        if (mine != per_block - 1 || unit >= slice.units) continue;
        const u64 param = work.first_param(p) + (slice.first + unit) * V;
        if (p.param_parts) {
            put_param_parts<V>(p, work.copy, param, dweight + k * V, dbias + k * V);
        } else {
            put_param_gradients<T, V>(p, param, dweight + k * V, dbias + k * V);
        }
    }
}

// A row, or a tile of one: its elements are neighbours, and so are their parameters.
struct Row {
    u64 base, x_base, first_param;

    __device__ u64 offset(const Params&, u32 e) const { return e; }
    __device__ bool contiguous(const Params&) const { return true; }
    __device__ u32 column(u32 e) const { return e; }
};

template <class T, int V, int C> __device__ void backward_rows(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = BACKWARD_ELEMENTS<T> / V, E = N * V;
    Group<A, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), per_block = blockDim.x >> shift, mine = threadIdx.x >> shift, room = held_bytes<T>(slice.each * V);
    const Work<V, C> work(p, per_block);
    const u32 both = room + HeldGradient<T, V>::bytes(p, slice.each * V);
    char* memory = shared_memory() + Group<A, C>::BYTES;
    const auto x_of = [&](u32 stage) { return reinterpret_cast<T*>(memory + (mine * p.stages + stage) * both); };
    const auto dy_of = [&](u32 stage) { return HeldGradient<T, V>(p, memory + (mine * p.stages + stage) * both + room); };
    const auto place = [&](u64 item) {
        const u64 in_block = work.in_block(p), base = item * p.width + in_block;
        return Row{base, p.has(BLOCKS) ? block_start(p, item) + in_block : base, work.first_param(p)};
    };
    Summary<A> ahead_stats = {};
    const u32 turns = work.turns(0), own_turns = work.turns(mine);
    const auto ask = [&](u32 turn, u32 stage) {
        if (turn < own_turns) {
            const u64 item = work.item(mine, turn);
            const Row at = place(item);
            if constexpr (V > 1) {
                hold_few<N>(slice, static_cast<const T*>(p.x) + at.x_base, x_of(stage));
                dy_of(stage).template ask_few<N>(p, slice, at.base);
            } else {
                hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, x_of(stage));
                dy_of(stage).ask(p, slice, at);
            }
            ahead_stats = Summary<A>(p, item * p.sets_per_outer + work.line);
        }
        copies_batch();
    };
    A weights[E] = {}, dweight[E] = {}, dbias[E] = {};
    const Affine<A, T> affine(p, work.first_param(p));
    // Weights of a thread's columns are kept for all rows. With an element an access there is no register for them.
    const auto weight_of = [&](int k, bool kept, A(&w)[V]) {
        if constexpr (V > 1) {
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] = weights[k * V + v];
            if (kept) return;
        }
        affine.weight((slice.first + slice.lane + k * slice.lanes) * V, w);
    };
    if constexpr (V > 1) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            A w[V] = {};
            if (slice.lane + k * slice.lanes < slice.units) weight_of(k, false, w);
#pragma unroll
            for (int v = 0; v < V; ++v) weights[k * V + v] = w[v];
        }
    }
    const A inverse = A(1) / A(p.count);
    u32 stage = 0;
    ask(0, stage);
    for (u32 turn = 0; turn < turns; ++turn, stage ^= p.stages > 1) {
        const bool active = turn < own_turns;
        const Row at = place(work.item(mine, active ? turn : 0));
        // Loaded a row ahead: two trips to memory, one behind the other, would be most of a row's time.
        const Summary<A> kept = ahead_stats;
        if (p.stages > 1) {
            ask(turn + 1, stage ^ 1);
            copies_done<1>();
        } else {
            copies_done();
        }
        const Stats<A> stats = kept.stats(p);
        const T* x = x_of(stage);
        const HeldGradient<T, V> dy = dy_of(stage);
        if (p.has(FUSED) && active) take_dz(p, slice, at, stats, true, x, dy);
        // Calls f(k, x, dy, weight) for this thread's packs of the row.
        const auto each = [&](auto f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const u32 unit = slice.lane + k * slice.lanes;
                if (unit >= slice.units || !active) continue;
                A values[V], d[V], w[V];
                load<T, V>(x + unit * V, values);
                dy.get(unit * V, d);
                weight_of(k, true, w);
                f(k, values, d, w);
            }
        };
        A sums[2] = {};
        each([&](int k, const A(&values)[V], const A(&d)[V], const A(&w)[V]) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A xhat = stats(values[v]);
                sums[0] += d[v] * w[v];
                sums[1] += d[v] * w[v] * xhat;
                dweight[k * V + v] += d[v] * xhat;
                dbias[k * V + v] += d[v];
            }
        });
        if (p.out) {
            group.sum(sums);
            const A mean = p.has(CENTER) ? sums[0] * inverse * stats.rstd : A(0), slope = sums[1] * inverse * stats.rstd;
            T* out = static_cast<T*>(p.out) + at.base + u64(slice.first + slice.lane) * V;
            each([&](int k, A(&values)[V], const A(&d)[V], const A(&w)[V]) {
#pragma unroll
                for (int v = 0; v < V; ++v) values[v] = (d[v] * w[v] * stats.rstd - mean) - stats(values[v]) * slope;
                store_global<T, V>(out + k * slice.lanes * V, values);
            });
        }
        if (p.stages == 1) ask(turn + 1, 0);
    }
    put_columns<T, V, N>(p, work, slice, reinterpret_cast<A*>(memory), per_block, mine, dweight, dbias);
    group.leave();
}

// The segments of a set that lie in one block's slice, cut into pieces that lanes can share out evenly.
struct Segments {
    u32 first, count, start, end, span, pieces, piece_len;

    __device__ Segments(const Params& p, u32 start, u32 len)
        : first(len ? p.by_span(start) : 0), count(len ? p.by_span(start + len - 1) - first + 1 : 0), start(start),
          end(start + len), span(p.by_span.divisor), pieces(u32(p.pieces)), piece_len(u32(p.chunk_len)) {}
    __device__ u32 items() const { return count * pieces; }
    // First and past-the-last element of an item, within the slice.
    __device__ void range(u32 item, u32& from, u32& to) const {
        const u32 base = (first + item / pieces) * span, at = item % pieces * piece_len;
        from = base + (at < span ? at : span);
        to = base + (at + piece_len < span ? at + piece_len : span);
        from = from < start ? start : from;
        to = to > end ? end : to;
    }
};

// Sums of a set whose segments have parameters of their own: first of every piece, by a few lanes, then
// of every segment, which are the parameters' gradients, then of the set.
template <class T, int V, int C, class A>
__device__ inline void segment_sums(const Params& p, const Segments& segments, const Place& at, const T* x,
                                    const HeldGradient<T, V>& dy, const Stats<A>& stats, A* parts, A (&sums)[2]) {
    const u32 lanes = p.segment_lanes, lane = threadIdx.x % lanes, groups = blockDim.x / lanes, items = segments.items();
    const Affine<A, T> affine(p, at.first_param);
    for (u32 i = 0; i < items; i += groups) {
        const u32 item = i + threadIdx.x / lanes;
        u32 from = 0, to = 0;
        if (item < items) segments.range(item, from, to);
        A a = 0, b = 0;
        for (u32 e = from + lane * V; e < to; e += lanes * V) {
            A values[V], d[V];
            load<T, V>(x + e - segments.start, values);
            dy.get(e - segments.start, d);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                a += d[v];
                b += d[v] * stats(values[v]);
            }
        }
        a = lanes_sum(a, lanes);
        b = lanes_sum(b, lanes);
        if (lane == 0 && item < items) parts[2 * item] = a, parts[2 * item + 1] = b;
    }
    __syncthreads();
    const u64 copy = at.outer * C + block_rank<C>();
    for (u32 i = threadIdx.x; i < u32(p.set_params); i += blockDim.x) {
        A a = 0, b = 0;
        if (i >= segments.first && i - segments.first < segments.count) {
            const A* part = parts + 2 * (i - segments.first) * segments.pieces;
            for (u32 piece = 0; piece < segments.pieces; ++piece) a += part[2 * piece], b += part[2 * piece + 1];
            const A w = affine.weight_at(at.first_param + i);
            sums[0] += w * a;
            sums[1] += w * b;
        }
        put_param_gradient(p, copy, at.first_param + i, b, a);
    }
}

// Adds up dy * weight and dy * weight * xhat over a held set.
template <class T, int V, int C, class A, class P>
__device__ inline void add_gradients(const Slice<V, C>& slice, const Stats<A>& stats, const T* held, const HeldGradient<T, V>& dheld,
                                     const P& params, A (&sums)[2]) {
#pragma unroll 2
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        A values[V], d[V], w[V], none[V];
        params.get((slice.first + unit) * V, w, none);
        load<T, V>(held + unit * V, values);
        dheld.get(unit * V, d);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A g = d[v] * w[v];
            sums[0] += g;
            sums[1] += g * stats(values[v]);
        }
    }
}

template <class T, int V, int C> __device__ void backward_sets(const Params& p) {
    using A = typename Accumulator<T>::type;
    Group<A, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), sets_per_block = blockDim.x >> shift, mine = threadIdx.x >> shift, room = held_bytes<T>(slice.each * V);
    const u32 both = room + HeldGradient<T, V>::bytes(p, slice.each * V);
    char* memory = shared_memory() + Group<A, C>::BYTES;
    T* held = reinterpret_cast<T*>(memory + mine * both);
    const HeldGradient<T, V> dheld(p, memory + mine * both + room);
    A* parts = reinterpret_cast<A*>(memory + both);
    const bool by_segment = !p.has(PER_SET) && !p.has(PER_COLUMN);
    for (u64 first = u64(blockIdx.x / C) * sets_per_block; first < p.sets; first += u64(gridDim.x / C) * sets_per_block) {
        const bool active = first + mine < p.sets;
        const Place at = place_set(p, active ? first + mine : first);
        hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, held);
        dheld.ask(p, slice, at);
        copies_batch();
        const Stats<A> stats = load_stats<A>(p, at.set);
        const Affine<A, T> affine(p, at.first_param);
        copies_done();
        if (p.has(FUSED) && active) take_dz(p, slice, at, stats, true, held, dheld);
        A sums[2] = {};
        if (by_segment) {
            __syncthreads();
            segment_sums<T, V, C>(p, Segments(p, slice.first * V, slice.units * V), at, held, dheld, stats, parts, sums);
        } else if (p.has(PER_SET)) {
            add_gradients(slice, stats, held, dheld, OneParam<A>{A(1), A(0)}, sums);
        } else {
            add_gradients(slice, stats, held, dheld, AnyWeight<A, T>{affine}, sums);
        }
        group.sum(sums);
        if (p.has(PER_SET) && p.has(WANT_PARAMS) && active && group.first()) {
            put_param_gradient(p, at.outer, at.first_param, sums[1], sums[0]);
        }
        const A weight = affine.shared_weight();
        to_means(p, weight, sums);
        if (p.out && active) put_input_gradient(p, slice, at, stats, weight, sums, held, dheld);
    }
    group.leave();
}
