// Kernels for sets that do not fit on chip: chunks of a set on blocks of their own.
//
// Forward: moments of the chunks, combined (combine.cuh), then the output: three passes over memory.
// Backward: gradient sums of the chunks, combined, then dx: five. Where the statistics are given, the
// last pass alone. A chunk is a piece of one segment, or several whole segments, and is held on
// chip as a small set is.
#pragma once
#include "held_backward.cuh"

// The chunk of a block: its elements by number, 32 bits within a chunk.
struct Chunk {
    u64 set, outer, base, x_base, first_param;
    u64 index, seg, first;
    u32 len, seg_len, start;

    __device__ Chunk(const Params& p, u64 block) : set(quotient(block, p.chunks, p.by_chunks)), index(block - set * p.chunks) {
        if (p.pieces > 1) {
            seg = quotient(index, p.pieces, p.by_pieces);
            first = (index - seg * p.pieces) * p.chunk_len;
            len = u32(p.seg_len - first < p.chunk_len ? p.seg_len - first : p.chunk_len);
            seg_len = len;
        } else {
            seg = index * p.segs_per_chunk;
            first = 0;
            seg_len = u32(p.seg_len);
            len = u32(p.segs - seg < p.segs_per_chunk ? p.segs - seg : p.segs_per_chunk) * seg_len;
        }
        const Place at = place_set(p, set);
        outer = at.outer, base = at.base, x_base = at.x_base;
        place_params(p, at.first_param);
    }
    // Where element e lies behind the base of the set.
    __device__ u64 offset(const Params& p, u32 e) const {
        if (e < seg_len) return seg * p.seg_stride + first + e;
        const u32 more = p.by_seg(e);
        return (seg + more) * p.seg_stride + (e - more * seg_len);
    }
    __device__ bool contiguous(const Params&) const { return len == seg_len; }
    __device__ u32 column(u32 e) const { return start + e; }

  private:
    // A chunk starts `column` columns into a run, which may exceed 31 bits: whole parameters go into
    // the first one, and what is left of a span longer than the divisor takes is counted from its end.
    __device__ void place_params(const Params& p, u64 param) {
        const u64 before = seg * p.seg_len, column = before - quotient(before, p.run) * p.run + first;
        first_param = param, start = 0;
        if (p.has(PER_SET)) return;
        if (p.has(PER_COLUMN)) {
            first_param += column;
            return;
        }
        const u64 more = quotient(column, p.span);
        first_param += more;
        const u64 in_span = column - more * p.span, left = p.span - in_span;
        start = p.span < 0x80000000u ? u32(in_span) : left < 0x80000000u ? 0x80000000u - u32(left) : 0;
    }
};

// Threads of a split kernel, and the shared memory behind their slots.
template <class T> __device__ inline T* chunk_memory() {
    return reinterpret_cast<T*>(shared_memory() + Group<typename Accumulator<T>::type, 1>::BYTES);
}

// Bytes of a thread of split_moments and split_forward, where accesses are of 8 bytes and more: FORWARD_BYTES of
// src/cuda/plan/split.rs, for 256 threads.
constexpr int CHUNK_BYTES = 64;
template <class T, int V> using KeptChunk = InRegisters<T, V, 1, CHUNK_BYTES>;
template <class T, int V> constexpr bool KEEPS_CHUNKS = Pack<T, V>::BYTES >= 8;

template <class T, int V, class A> __device__ inline void put_part_moments(const Params& p, const Moments<A>& m) {
    if (threadIdx.x != 0) return;
    A* parts = static_cast<A*>(p.part_moments);
    const u64 total = p.sets * p.chunks;
    parts[blockIdx.x] = m.mean;
    parts[total + blockIdx.x] = m.low;
    parts[2 * total + blockIdx.x] = m.m2;
}

template <class T, int V> __device__ void split_moments(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, blockIdx.x);
    Group<A, 1> group(blockDim.x, shared_memory());
    const Slice<V, 1> slice(chunk.len, blockDim.x, threadIdx.x);
    const T* x = static_cast<const T*>(p.x) + chunk.x_base;
    if constexpr (KEEPS_CHUNKS<T, V>) {
        if (!p.residual) {
            KeptChunk<T, V> kept(p, slice, chunk, x);
            return put_part_moments<T, V>(p, group_moments<false>(p, group, slice, kept));
        }
    }
    InMemory<T, V, 1> held{slice, chunk_memory<T>()};
    hold_async(p, slice, chunk, x, chunk_memory<T>());
    copies_batch();
    copies_done();
    if (p.residual) add_residual(p, slice, chunk, chunk_memory<T>());
    put_part_moments<T, V>(p, group_moments<false>(p, group, slice, held));
}

template <class T, int V> __device__ void split_forward(const Params& p) {
    using A = typename Accumulator<T>::type;
    // From the end: what the first pass has read last may still be in the L2 cache.
    const Chunk chunk(p, gridDim.x - 1 - blockIdx.x);
    const Slice<V, 1> slice(chunk.len, blockDim.x, threadIdx.x);
    const bool writer = chunk.index == 0 && threadIdx.x == 0;
    if constexpr (KEEPS_CHUNKS<T, V>) {
        if (p.has(PLAIN_NORM)) {
            KeptChunk<T, V> kept(p, slice, chunk, input_of<T>(p, chunk));
            const OneParam<A> one = plain_param<A, T>(p, chunk.first_param);
            return put_kept_output<T, V>(p, chunk, forward_stats<A>(p, chunk.set, writer), kept, one);
        }
    }
    InMemory<T, V, 1> held{slice, chunk_memory<T>()};
    hold_async(p, slice, chunk, input_of<T>(p, chunk), chunk_memory<T>());
    copies_batch();
    const Stats<A> stats = forward_stats<A>(p, chunk.set, writer);
    copies_done();
    put_output<T, V>(p, chunk, stats, held);
}

// A chunk of x and of dy, and what every pass of the backward does with them first.
template <class T, int V, class A> struct HeldChunk {
    Slice<V, 1> slice;
    T* x;
    HeldGradient<T, V> dy;
    Stats<A> stats;

    // `with_x`: dx does not depend on x where there are no sums in it and nothing is fused.
    __device__ HeldChunk(const Params& p, const Chunk& chunk, bool with_x, bool write)
        : slice(chunk.len, blockDim.x, threadIdx.x), x(chunk_memory<T>()), dy(p, x + held_bytes<T>(chunk.len) / sizeof(T)) {
        if (with_x || p.has(FUSED)) hold_async(p, slice, chunk, static_cast<const T*>(p.x) + chunk.x_base, x);
        dy.ask(p, slice, chunk);
        copies_batch();
        stats = load_stats<A>(p, chunk.set);
        copies_done();
        if (p.has(FUSED)) take_dz(p, slice, chunk, stats, write, x, dy);
    }
    // Adds dy and dy * xhat of elements [from, to), `step` apart.
    __device__ void sum(u32 from, u32 to, u32 step, A (&sums)[2]) const {
#pragma unroll 1
        for (u32 e = from; e < to; e += step) {
            A values[V], d[V];
            load<T, V>(x + e, values);
            dy.get(e, d);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sums[0] += d[v];
                sums[1] += d[v] * stats(values[v]);
            }
        }
    }
};

template <class T, int V> __device__ void split_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, blockIdx.x);
    Group<A, 1> group(blockDim.x, shared_memory());
    const HeldChunk<T, V, A> held(p, chunk, true, p.has(SUMS_WRITE));
    A* parts = static_cast<A*>(p.part_sums);
    const u64 total = p.outer * p.part_width;
    if (p.has(FIXED) && p.out) {
        const A none[2] = {};
        put_any_gradient(p, held.slice, chunk, held.stats, Affine<A>(p, chunk.first_param).shared_weight(), none, held.x, held.dy);
    }
    if (p.has(PER_SET) || p.pieces > 1) {
        A sums[2] = {};
        held.sum(threadIdx.x * V, chunk.len, blockDim.x * V, sums);
        group.sum(sums);
        if (threadIdx.x == 0) parts[blockIdx.x] = sums[0], parts[total + blockIdx.x] = sums[1];
        return;
    }
    // Whole segments, each with its own parameter, by a few threads each.
    __syncthreads();
    const u32 lanes = p.segment_lanes, lane = threadIdx.x % lanes, groups = blockDim.x / lanes, segs = chunk.len / chunk.seg_len;
    for (u32 i = 0; i < segs; i += groups) {
        const u32 seg = i + threadIdx.x / lanes;
        const u32 from = seg < segs ? seg * chunk.seg_len : 0, to = seg < segs ? from + chunk.seg_len : 0;
        A sums[2] = {};
        held.sum(from + lane * V, to, lanes * V, sums);
        sums[0] = lanes_sum(sums[0], lanes);
        sums[1] = lanes_sum(sums[1], lanes);
        const u64 part = chunk.set * p.part_run + chunk.seg + seg;
        if (lane == 0 && seg < segs) parts[part] = sums[0], parts[total + part] = sums[1];
    }
}

template <class T, int V> __device__ void split_backward(const Params& p) {
    using A = typename Accumulator<T>::type;
    const Chunk chunk(p, gridDim.x - 1 - blockIdx.x);
    const HeldChunk<T, V, A> held(p, chunk, !p.has(FIXED), !p.has(SUMS_WRITE));
    const A weight = Affine<A>(p, chunk.first_param).shared_weight();
    const A* sums_of = static_cast<const A*>(p.sums);
    A sums[2] = {};
    if (sums_of) {
        sums[0] = sums_of[chunk.set];
        sums[1] = sums_of[p.sets + chunk.set];
        to_means(p, p.has(UNWEIGHTED) ? weight : A(1), sums);
    }
    if (p.out) put_input_gradient(p, held.slice, chunk, held.stats, weight, sums, held.x, held.dy);
}

// Sums of the tile of columns that a block holds of every row of some outer blocks: the weighted sums go
// to the set, the others add up per column. As in backward_rows the next row is on its way meanwhile.
template <class T, int V> __device__ void split_column_sums(const Params& p) {
    using A = typename Accumulator<T>::type;
    constexpr int N = BACKWARD_ELEMENTS<T> / V, E = N * V;
    Group<A, 1> group(blockDim.x, shared_memory());
    const u64 slab = quotient(blockIdx.x, p.part_width), line = blockIdx.x - slab * p.part_width, q = quotient(line, p.part_run);
    const u64 tokens = p.tokens ? p.tokens : p.outer, sample = quotient(slab, p.copies), start = sample * tokens;
    const u64 copy = slab - sample * p.copies, tile = (line - q * p.part_run) * (blockDim.x * E), total = p.outer * p.part_width;
    const u64 left = p.run - tile;
    const Slice<V, 1> slice(u32(left < blockDim.x * E ? left : blockDim.x * E), blockDim.x, threadIdx.x);
    const u64 first = start + copy * p.chunk_rows;
    const u64 last = (copy + 1) * p.chunk_rows < tokens ? first + p.chunk_rows : start + tokens;
    const u32 room = held_bytes<T>(blockDim.x * E), both = room + HeldGradient<T, V>::bytes(p, blockDim.x * E);
    char* memory = reinterpret_cast<char*>(chunk_memory<T>());
    const auto x_of = [&](u32 stage) { return reinterpret_cast<T*>(memory + stage * both); };
    const auto dy_of = [&](u32 stage) { return HeldGradient<T, V>(p, memory + stage * both + room); };
    const auto place = [&](u64 o) {
        const Place at = place_set(p, o * p.sets_per_outer + q);
        return Row{at.base + tile, at.x_base + tile, at.first_param + tile};
    };
    const auto ask = [&](u64 o, u32 stage) {
        if (o < last) {
            const Row at = place(o);
            hold_async(p, slice, at, static_cast<const T*>(p.x) + at.x_base, x_of(stage));
            dy_of(stage).ask(p, slice, at);
        }
        copies_batch();
    };
    A dweight[E] = {}, dbias[E] = {};
    u32 stage = 0;
    ask(first, stage);
    for (u64 o = first; o < last; ++o, stage ^= 1) {
        ask(o + 1, stage ^ 1);
        const Row at = place(o);
        const Affine<A, T> affine(p, at.first_param);
        const Stats<A> stats = load_stats<A>(p, o * p.sets_per_outer + q);
        copies_done<1>();
        const T* x = x_of(stage);
        const HeldGradient<T, V> dy = dy_of(stage);
        if (p.has(FUSED)) take_dz(p, slice, at, stats, p.has(SUMS_WRITE), x, dy);
        A sums[2] = {};
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const u32 unit = slice.lane + k * slice.lanes;
            if (unit >= slice.units) continue;
            A values[V], d[V], w[V];
            load<T, V>(x + unit * V, values);
            dy.get(unit * V, d);
            affine.weight(unit * V, w);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A xhat = stats(values[v]);
                sums[0] += d[v] * w[v];
                sums[1] += d[v] * w[v] * xhat;
                dweight[k * V + v] += d[v] * xhat;
                dbias[k * V + v] += d[v];
            }
        }
        A* parts = static_cast<A*>(p.part_sums);
        if (!parts) continue;
        group.sum(sums);
        const u64 part = o * p.part_width + line;
        if (threadIdx.x == 0) parts[part] = sums[0], parts[total + part] = sums[1];
    }
    if (!p.has(WANT_PARAMS)) return;
    const u64 param = place(first).first_param;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const u32 unit = slice.lane + k * slice.lanes;
        if (unit >= slice.units) continue;
        put_param_parts<V>(p, copy, param + unit * V, dweight + k * V, dbias + k * V);
    }
}
