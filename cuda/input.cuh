// The first touch of an element: x on its way into shared memory, a residual added on the way.
//
// Sets that shared memory holds come in here, x and dy, but for those of plain_backward.cuh, which copies them itself. What
// goes straight into registers (held.cuh's `InRegisters`, columns.cuh, gated.cuh) is read by `Pack` of element.cuh. `sum` is rounded as
// add-then-norm would round it, and the rounded sum is what is normalized.
#pragma once
#include "sets.cuh"

// ci/sanitize.sh plants these faults to see them caught: a unit beyond the end of a set is read, the first
// unit of an output is not written.
#ifdef NORM_FAULT_READ
constexpr u32 BEYOND = 1;
#else
constexpr u32 BEYOND = 0;
#endif
#ifdef NORM_FAULT_UNWRITTEN
constexpr bool SKIP_FIRST = true;
#else
constexpr bool SKIP_FIRST = false;
#endif

// The part of a set (or of a chunk) that one block of a cluster of C holds, in units of V elements, and this thread's
// share of it: every `lanes`-th unit. A unit stays with its thread, so data needs no barriers.
template <int V, int C> struct Slice {
    u32 set_units, each, lanes, lane;
    u32 first, units; // of this block

    __device__ Slice(u32 set_len, u32 lanes, u32 lane)
        : set_units(set_len / V), each((set_units + C - 1) / C), lanes(lanes), lane(lane), first(start_of(block_rank<C>())),
          units(start_of(block_rank<C>() + 1) - first) {}

    // Elements of block `rank`, and of warp `warp` of this block.
    __device__ u32 in_rank(u32 rank) const { return (start_of(rank + 1) - start_of(rank)) * V; }
    __device__ u32 in_warp(u32 warp) const {
        const u32 width = lanes < 32 ? lanes : 32, start = warp * width, rest = units & (lanes - 1);
        const u32 last = rest <= start ? 0 : (rest - start < width ? rest - start : width);
        return ((units >> log2_of(lanes)) * width + last) * V;
    }

  private:
    __device__ u32 start_of(u32 rank) const { return rank * each < set_units ? rank * each : set_units; }
};

// Shared memory for a slice of `len` elements, as the plan counts it.
template <class T> __device__ inline u32 held_bytes(u32 len) { return (len * u32(sizeof(T)) + 15) / 16 * 16; }

// Bytes from one group's slice to the next where a block has several: few lanes read 128 bytes together with those of
// groups beside them, which must come from other banks.
template <class T> __device__ inline u32 apart(u32 len) { return (len * u32(sizeof(T)) + 127) / 128 * 128 + 32; }

// Asks for this thread's share of a set, to come to `held`, `step` elements of room for each. `Where` is a
// Place, or a Chunk of a set.
template <class T, int V, int C, class Where>
__device__ inline void hold_async(const Params& p, const Slice<V, C>& slice, const Where& at, const T* from, T* held, u32 step = 1) {
    const u32 units = slice.units + BEYOND;
    if (at.contiguous(p)) {
        from += at.offset(p, 0) + u64(slice.first) * V;
#pragma unroll(Pack<T, V>::BYTES >= 4 && HAS_COPIES ? 4 : 8)
        for (u32 unit = slice.lane; unit < units; unit += slice.lanes) {
            copy_async<Pack<T, V>::BYTES>(held + unit * V * step, from + u64(unit) * V);
        }
        return;
    }
    // Copies are under way whatever the loop does; loads, where there are no copies, before the first store.
#pragma unroll(Pack<T, V>::BYTES >= 4 && HAS_COPIES ? 2 : 8)
    for (u32 unit = slice.lane; unit < units; unit += slice.lanes) {
        copy_async<Pack<T, V>::BYTES>(held + unit * V * step, from + at.offset(p, (slice.first + unit) * V));
    }
}

// The same for neighbours of which a thread has N units at most: no loop, and an address is a sum.
template <int N, class T, int V, int C>
__device__ inline void hold_few(const Slice<V, C>& slice, const T* from, T* held, u32 step = 1) {
    from += u64(slice.first + slice.lane) * V;
    held += slice.lane * V * step;
#pragma unroll
    for (int k = 0; k < N + int(BEYOND); ++k) {
        const u32 at = k * slice.lanes;
        if (slice.lane + at < slice.units + BEYOND) copy_async<Pack<T, V>::BYTES>(held + at * V * step, from + at * V);
    }
}

// x where it lies for kernels after the first that touches it.
template <class T, class Where> __device__ inline const T* input_of(const Params& p, const Where& at) {
    return p.residual ? static_cast<const T*>(p.sum) + at.base : static_cast<const T*>(p.x) + at.x_base;
}

// Adds the residual to the held x, and writes the sum down.
template <class T, int V, int C, class Where>
__device__ inline void add_residual(const Params& p, const Slice<V, C>& slice, const Where& at, T* held) {
    using A = typename Accumulator<T>::type;
    const T* residual = static_cast<const T*>(p.residual) + at.base;
    T* sum = static_cast<T*>(p.sum) + at.base;
#pragma unroll 4
    for (u32 unit = slice.lane; unit < slice.units; unit += slice.lanes) {
        const u64 offset = at.offset(p, (slice.first + unit) * V);
        A values[V], more[V];
        fetch<T, V>(residual + offset, more);
        load<T, V>(held + unit * V, values);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] += more[v];
        Pack<T, V> pack;
        pack.set(values);
        pack.store(held + unit * V);
        pack.store(sum + offset);
    }
}

// dy on chip; dz in its place where something is fused, in the accumulation type: nothing is rounded on its
// way. Room for that is there from the start, a pack's own, so that a thread overwrites no other's.
template <class T, int V> struct HeldGradient {
    using A = typename Accumulator<T>::type;
    static constexpr u32 WIDE = sizeof(A) / sizeof(T);
    static constexpr int STEP = V * sizeof(A) <= 16 ? V : int(16 / sizeof(A));

    T* at;
    u32 step; // elements of room for each

    __device__ static u32 step_of(const Params& p) { return p.has(FUSED) ? WIDE : 1; }
    __device__ static u32 bytes(const Params& p, u32 len) { return held_bytes<T>(len * step_of(p)); }
    __device__ HeldGradient(const Params& p, void* memory) : at(static_cast<T*>(memory)), step(step_of(p)) {}

    template <int C, class Where> __device__ void ask(const Params& p, const Slice<V, C>& slice, const Where& where) const {
        hold_async(p, slice, where, static_cast<const T*>(p.dy) + where.base, at, step);
    }
    template <int N, int C> __device__ void ask_few(const Params& p, const Slice<V, C>& slice, u64 base) const {
        hold_few<N>(slice, static_cast<const T*>(p.dy) + base, at, step);
    }
    // dy of the pack at element e.
    __device__ void get_raw(u32 e, A (&d)[V]) const { ::load<T, V>(at + e * step, d); }
    __device__ void set(u32 e, const A (&d)[V]) const {
        A* to = reinterpret_cast<A*>(at) + e;
#pragma unroll
        for (int from = 0; from < V; from += STEP) {
            A part[STEP];
#pragma unroll
            for (int v = 0; v < STEP; ++v) part[v] = d[from + v];
            ::store<A, STEP>(to + from, part);
        }
    }
    // dz, which is dy where nothing is fused.
    __device__ void get(u32 e, A (&d)[V]) const {
        if (WIDE == 1 || step == 1) {
            ::load<T, V>(at + e, d);
            return;
        }
        const A* from = reinterpret_cast<const A*>(at) + e;
#pragma unroll
        for (int to = 0; to < V; to += STEP) {
            A part[STEP];
            ::load<A, STEP>(from + to, part);
#pragma unroll
            for (int v = 0; v < STEP; ++v) d[to + v] = part[v];
        }
    }
};
