// What run.cpp tells race.cpp: which fibers run, in which order barriers put them, where memory lies.
//
// Kept apart because a build without CANDLE_NORM_RACE has the calls and no watch: they then cost a test.
#pragma once
#include "device.h"

#include <cstddef>
#include <string>
#include <vector>

namespace emulation {

// A launch, and the cluster of it that runs.
struct Watched {
    unsigned threads = 0, cluster = 0; // threads of a block, blocks of the cluster
    unsigned launch = 0;               // counts launches
    unsigned run = 0;                  // counts clusters that ran
    size_t shared_bytes = 0;
    const std::vector<char*>* shared = nullptr;
    const char *stacks = nullptr, *stacks_end = nullptr;
    const char *own = nullptr, *own_end = nullptr; // the fibers
    const char* params = nullptr;
};
extern __thread Watched watched;

// The first fault of this launch; empty for none. Faults do not stop the kernels.
extern thread_local std::string fault;

bool watching();
void watch_launch();
void watch_cluster_start();
// All threads of the cluster have arrived at a barrier. One that is not full orders no memory.
void watch_phase(bool full);
// `threads`: the fibers' clocks at the end.
void watch_cluster_end(const std::vector<const Thread*>& threads);
// Whether the barrier orders memory: false for the one that a test leaves out.
bool watch_barrier(Site site);

} // namespace emulation
