// Kernels with a fault each, for the tests that the emulation sees it (src/cuda/emulation/planted.rs).
//
// Kept apart from the kernels, which have no faults. Each takes x, dy and the output of 64 floats, in
// blocks of 64 threads with 512 bytes of shared memory.
#include "../params.cuh"

namespace {

float* shared() { return reinterpret_cast<float*>(shared_memory()); }
const float* x(const Params& p) { return static_cast<const float*>(p.x); }
float* out(const Params& p) { return static_cast<float*>(p.out); }
unsigned me() { return threadIdx.x; }
float* theirs() { return static_cast<float*>(__cluster_map_shared_rank(shared(), 1 - __clusterRelativeBlockRank())); }
void whole_barrier() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}

// Sums over the block's neighbours as a right kernel does.
NORM_ENTRY(norm_planted_nothing, 64, 1) {
    shared()[me()] = x(p)[me()];
    __syncthreads();
    out(p)[me()] = shared()[63 - me()];
}

NORM_ENTRY(norm_planted_no_barrier, 64, 1) {
    shared()[me()] = x(p)[me()];
    out(p)[me()] = shared()[63 - me()];
}

// A warp's threads need __syncwarp between each other.
NORM_ENTRY(norm_planted_no_warp_barrier, 64, 1) {
    shared()[me()] = x(p)[me()];
    out(p)[me()] = shared()[me() ^ 1];
}

NORM_ENTRY(norm_planted_warp_barrier, 64, 1) {
    shared()[me()] = x(p)[me()];
    __syncwarp();
    out(p)[me()] = shared()[me() ^ 1];
}

// The slots are used again while others still read them.
NORM_ENTRY(norm_planted_reused, 64, 1) {
    shared()[me()] = x(p)[me()];
    __syncthreads();
    const float other = shared()[63 - me()];
    shared()[me()] = other;
    out(p)[me()] = other;
}

NORM_ENTRY(norm_planted_two_writers, 64, 1) {
    shared()[me() / 2] = x(p)[me()];
    __syncthreads();
    out(p)[me()] = shared()[me() / 2];
}

NORM_ENTRY(norm_planted_beyond_shared, 64, 1) {
    shared()[me() + 128] = x(p)[me()];
    out(p)[me()] = 0;
}

NORM_ENTRY(norm_planted_written_twice, 64, 1) {
    out(p)[me()] = x(p)[me()];
    if (me() == 5) *const_cast<volatile float*>(out(p) + 5) = 1;
}

NORM_ENTRY(norm_planted_unwritten, 64, 1) {
    const float v = x(p)[me()];
    if (me() != 7) out(p)[me()] = v;
}

NORM_ENTRY(norm_planted_read_twice, 64, 1) {
    out(p)[me()] = x(p)[me()] + *const_cast<const volatile float*>(x(p) + me());
}

NORM_ENTRY(norm_planted_input_written, 64, 1) {
    out(p)[me()] = 0;
    const_cast<float*>(x(p))[me()] = 1;
}

NORM_ENTRY(norm_planted_stray, 64, 1) { out(p)[me()] = x(p)[me() + 4096]; }

// Two blocks of one launch write, or exchange, the same elements.
NORM_ENTRY(norm_planted_two_blocks, 64, 1) { out(p)[me()] = x(p)[me()]; }

NORM_ENTRY(norm_planted_across_blocks, 64, 1) {
    const unsigned half = me() / 32;
    if (half == blockIdx.x) out(p)[me()] = x(p)[me()];
    else if (blockIdx.x == 1 && out(p)[me()] == 3) out(p)[0] = 1;
}

// Lanes meet at two shuffles, threads at two barriers, or some do not come.
NORM_ENTRY(norm_planted_two_shuffles, 64, 1) {
    float v = x(p)[me()];
    if (me() % 2) {
        v = __shfl_xor_sync(~0u, v, 1);
    } else {
        v = __shfl_xor_sync(~0u, v, 1);
    }
    out(p)[me()] = v;
}

NORM_ENTRY(norm_planted_two_barriers, 64, 1) {
    if (me() < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out(p)[me()] = x(p)[me()];
}

NORM_ENTRY(norm_planted_left, 64, 1) {
    out(p)[me()] = x(p)[me()];
    if (me() == 3) return;
    __syncthreads();
}

NORM_CLUSTER_ENTRY(norm_planted_cluster, 64, 1, 2) {
    shared()[me()] = x(p)[me()];
    whole_barrier();
    const float v = theirs()[me()];
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = v;
    whole_barrier();
}

// A relaxed arrival is enough to stay alive, and not enough to publish.
NORM_CLUSTER_ENTRY(norm_planted_relaxed_leave, 64, 1, 2) {
    shared()[me()] = x(p)[me()];
    whole_barrier();
    const float v = theirs()[me()];
    __cluster_barrier_arrive_relaxed();
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = v;
    __cluster_barrier_wait();
}

NORM_CLUSTER_ENTRY(norm_planted_relaxed_publish, 64, 1, 2) {
    shared()[me()] = x(p)[me()];
    __cluster_barrier_arrive_relaxed();
    __cluster_barrier_wait();
    const float v = theirs()[me()];
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = v;
    whole_barrier();
}

NORM_CLUSTER_ENTRY(norm_planted_block_barrier_only, 64, 1, 2) {
    whole_barrier();
    shared()[me()] = x(p)[me()];
    __syncthreads();
    const float v = theirs()[me()];
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = v;
    whole_barrier();
}

NORM_CLUSTER_ENTRY(norm_planted_early_leave, 64, 1, 2) {
    shared()[me()] = x(p)[me()];
    whole_barrier();
    const float v = theirs()[me()];
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = v;
}

NORM_CLUSTER_ENTRY(norm_planted_early_visit, 64, 1, 2) {
    theirs()[me()] = x(p)[me()];
    whole_barrier();
    if (__clusterRelativeBlockRank() == 0) out(p)[me()] = shared()[me()];
}

NORM_CLUSTER_ENTRY(norm_planted_no_arrival, 64, 1, 2) {
    out(p)[me()] = x(p)[me()];
    __cluster_barrier_wait();
}

NORM_CLUSTER_ENTRY(norm_planted_one_block_arrives, 64, 1, 2) {
    if (__clusterRelativeBlockRank() == 0) {
        out(p)[me()] = x(p)[me()];
        whole_barrier();
    }
}

} // namespace
