// Gradients of rows with nothing around the norm, where `backward_rows` has too little of something.
//
// Apart from it because a fused gradient needs room and registers that plain rows put to better use: weights lie in
// shared memory, so that a thread has twice as many columns of wide rows (of 65536 bf16 on an H100: 1.45 times as
// fast), or single elements in registers of their own (1023 bf16: 3 times).
#pragma once
#include "held_backward.cuh"

// The weights of a thread's columns. Packs of them lie in shared memory, each thread's own, four to an access and
// neighbours beside each other; single ones in registers.
template <int N, int V> struct KeptWeights {
    static constexpr bool SHARED = V > 1;
    float values[SHARED ? 1 : N];
    float* shared;
    u32 step;

    template <class F> __device__ KeptWeights(float* memory, u32 lane, u32 lanes, F weight_of) : shared(memory + lane * 4), step(lanes * 4) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float w[V] = {};
            weight_of(k, w);
            if constexpr (SHARED) {
#pragma unroll
                for (int v = 0; v < V; v += 4) store<float, 4>(place(k * V + v), {w[v], w[v + 1], w[v + 2], w[v + 3]});
            } else {
                values[k] = w[0];
            }
        }
    }
    __device__ void get(int k, float (&w)[V]) const {
        if constexpr (SHARED) {
#pragma unroll
            for (int v = 0; v < V; v += 4) {
                float part[4];
                load<float, 4>(place(k * V + v), part);
#pragma unroll
                for (int i = 0; i < 4; ++i) w[v + i] = part[i];
            }
        } else {
            w[0] = values[k];
        }
    }

  private:
    __device__ float* place(int column) const { return shared + column / 4 * step; }
};

// Of E columns a thread. Single elements have no way of their own to shared memory, and go to registers straight away:
// blocks of other rows load meanwhile.
template <class T, int V, int C, int E> __device__ void backward_plain(const Params& p) {
    constexpr int N = E / V;
    constexpr bool STRAIGHT = V == 1;
    Group<float, C> group(p.lanes, shared_memory());
    const Slice<V, C> slice(u32(p.set_len), p.lanes, group.lane);
    const u32 shift = log2_of(p.lanes), per_block = blockDim.x >> shift, mine = threadIdx.x >> shift;
    const u32 room = slice.each * V, pack_step = p.lanes * V;
    char* const memory = shared_memory() + Group<float, C>::BYTES;
    T* const held = reinterpret_cast<T*>(memory) + mine * p.stages * 2 * room + slice.lane * V;
    const u32 stage_bytes = 2 * room * u32(sizeof(T));
    const SharedAddress held_address = shared_address(held);
    const auto has = [&](int k) { return slice.lane + k * slice.lanes < slice.units; };

    // Where the row starts in which this thread is, from its first column on, and which set it is; others lie a number of
    // steps ahead.
    u64 here, set, step;
    u32 turn = 0, turns, own_turns, stage = 0;
    {
        const Work<V, C> work(p, per_block);
        const u64 item = work.item(mine, 0);
        step = work.step, turns = work.turns(0), own_turns = work.turns(mine);
        here = item * p.width + work.in_block(p) + (slice.first + slice.lane) * V;
        set = item * p.sets_per_outer + work.line;
    }
    const auto x_of = [&](u32 steps) {
        const T* x = static_cast<const T*>(p.x) + here + steps * step * p.width;
        if (!p.has(BLOCKS)) return x;
        const u64 item = quotient(set, p.sets_per_outer, p.by_sets) + steps * step;
        return x + block_start(p, item) - item * p.width;
    };
    const auto dy_of = [&](u32 steps) { return static_cast<const T*>(p.dy) + here + steps * step * p.width; };
    const auto ask = [&](u32 steps, u32 stage) {
        if constexpr (STRAIGHT) return;
        if (turn + steps < own_turns) {
            const T *x = x_of(steps), *dy = dy_of(steps);
            const SharedAddress to = held_address + stage * stage_bytes;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (slice.lane + k * slice.lanes >= slice.units + BEYOND) continue;
                copy_async<Pack<T, V>::BYTES>(to + k * pack_step * u32(sizeof(T)), x + k * pack_step);
                copy_async<Pack<T, V>::BYTES>(to + (room + k * pack_step) * u32(sizeof(T)), dy + k * pack_step);
            }
        }
        copies_batch();
    };
    // Statistics come a row ahead: two trips to memory, one behind the other, would be most of a row's time.
    Summary<float> ahead = {};
    const auto ask_stats = [&](u32 steps) {
        if (turn + steps < own_turns) ahead = Summary<float>(p, set + steps * step * p.sets_per_outer);
    };
    ask(0, 0);
    if (p.stages > 1) ask(1, 1);
    ask_stats(0);
    const Affine<float, T> affine(p, Work<V, C>(p, per_block).first_param(p));
    float* const weight_memory = reinterpret_cast<float*>(memory + per_block * p.stages * stage_bytes) + mine * p.lanes * E;
    const KeptWeights<N, V> weights(weight_memory, slice.lane, slice.lanes, [&](int k, float(&w)[V]) {
        if (has(k)) affine.weight((slice.first + slice.lane) * V + k * pack_step, w);
    });
    const float eps = float(p.eps), inverse = 1.0f / float(p.count);
    float dweight[E] = {}, dbias[E] = {};
    for (; turn < turns; ++turn) {
        const bool active = turn < own_turns;
        const Stats<float> stats = {ahead.mean, ahead.low, inverse_sqrt(ahead.var + eps)};
        ask_stats(1);
        if (p.stages > 1) {
            copies_done<1>();
        } else {
            copies_done();
        }
        const T *x = held + stage * 2 * room, *dy = x + room;
        Pack<T, V> xs[STRAIGHT ? N : 1], ds[STRAIGHT ? N : 1];
        if constexpr (STRAIGHT) {
            x = x_of(0), dy = dy_of(0);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                xs[k] = {}, ds[k] = {};
                if (!active || slice.lane + k * slice.lanes >= slice.units + BEYOND) continue;
                xs[k].fetch(x + k * pack_step), ds[k].fetch(dy + k * pack_step);
            }
        }
        // Calls f(k, x, dy, weight) for this thread's packs of the row.
        const auto each = [&](auto f) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if (!active || !has(k)) continue;
                float values[V], d[V], w[V];
                if constexpr (STRAIGHT) {
                    xs[k].forget(), ds[k].forget();
                    xs[k].get(values), ds[k].get(d);
                } else {
                    load<T, V>(x + k * pack_step, values);
                    load<T, V>(dy + k * pack_step, d);
                }
                weights.get(k, w);
                f(k, values, d, w);
            }
        };
        float sums[2] = {};
        each([&](int k, const float(&values)[V], const float(&d)[V], const float(&w)[V]) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float xhat = stats(values[v]), g = d[v] * w[v];
                sums[0] += g;
                sums[1] += g * xhat;
                dweight[k * V + v] += d[v] * xhat;
                dbias[k * V + v] += d[v];
            }
        });
        if (p.out) {
            group.sum(sums);
            const float mean = p.has(CENTER) ? sums[0] * inverse * stats.rstd : 0.0f, slope = sums[1] * inverse * stats.rstd;
            T* out = static_cast<T*>(p.out) + here;
            each([&](int k, float(&values)[V], const float(&d)[V], const float(&w)[V]) {
#pragma unroll
                for (int v = 0; v < V; ++v) values[v] = (d[v] * w[v] * stats.rstd - mean) - stats(values[v]) * slope;
                store_global<T, V>(out + k * pack_step, values);
            });
        }
        ask(p.stages, stage);
        stage ^= p.stages > 1;
        here += step * p.width, set += step * p.sets_per_outer;
    }
    put_columns<T, V, N>(p, Work<V, C>(p, per_block), slice, reinterpret_cast<float*>(memory), per_block, mine, dweight, dbias);
    group.leave();
}
