// Runs kernels on the host: the threads of a block are fibers of the calling thread.
//
// Fibers rather than threads, because a test launches thousands of blocks of hundreds of threads, and a
// switch between fibers takes nanoseconds. Kernels that part ways where CUDA wants them together (a
// shuffle or a barrier that some thread has left or not come to) fail their launch with a message.
//
// CANDLE_NORM_EMULATION_SEED permutes the order in which blocks of a cluster, warps and lanes run: what
// holds in one order only is a race. Unset or 0, they run in order.
#include "stack.h"
#include "watch.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define NORM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NORM_ASAN 1
#endif
#endif
#ifdef NORM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

__thread Thread* current = nullptr;
__thread dim3 block_dim, grid_dim;

thread_local std::string fault;

namespace {

[[noreturn]] void give_up(const char* what) {
    std::fprintf(stderr, "cuda emulation: %s\n", what);
    std::abort();
}

// A fiber runs until it waits for the others of its warp, its block or its cluster.
enum class State { Ready, Warp, Block, Cluster, Done };

#ifdef NORM_ASAN
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

struct Fiber {
    Thread thread;
    State state;
    unsigned turn;  // exchanges so far, to use the two buffers of a warp in turn
    unsigned phase; // of the cluster's barrier at which it has arrived
    bool arrived;
    Site site; // where it waits
    void* stack_pointer;
};

struct Warp {
    uint64_t values[2][32];
};

// The order in which things run that may run in any.
struct Order {
    uint64_t state = 0;
    std::vector<unsigned> order;

    // A permutation of 0..n, valid until the next call.
    const std::vector<unsigned>& of(unsigned n) {
        order.resize(n);
        for (unsigned i = 0; i < n; ++i) order[i] = i;
        for (unsigned i = n; state && i > 1; --i) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            std::swap(order[i - 1], order[(state >> 11) % i]);
        }
        return order;
    }
};

uint64_t seed_of_environment() {
    const char* seed = std::getenv("CANDLE_NORM_EMULATION_SEED");
    return seed ? std::strtoull(seed, nullptr, 10) * 0x9e3779b97f4a7c15 : 0;
}

// What a thread of the host needs to run a cluster of blocks; kept for the next launch.
struct Runner {
    char* stacks = nullptr;
    size_t room = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char*> shared;
    Order block_order, warp_order, lane_order;
    void* own_stack = nullptr;
    Fiber* running = nullptr;
    Kernel kernel = nullptr;
    const void* params = nullptr;
    // The cluster's barrier: phases so far, threads that have arrived at this one, and where.
    unsigned phase = 0, arrived = 0;
    Site arrived_at{};
    // Clusters of a grid to run, 0 for all, and after how many of them a grid repeats itself.
    unsigned sample = 0, period = 1;
    // Nothing more can run.
    bool stuck = false;
#ifdef NORM_ASAN
    const void* own_bottom = nullptr;
    size_t own_size = 0;
#endif

    Runner() { seed(seed_of_environment()); }
    ~Runner() {
        if (stacks) munmap(stacks, room * STACK);
    }
    void reserve(size_t count);
    void resume(Fiber& fiber);
    void leave(State state);
    void seed(uint64_t seed) { block_order.state = warp_order.state = lane_order.state = seed; }
    void prepare(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes);
    void run_warp(Fiber* warp);
    void run_block(Fiber* block, unsigned threads);
    void cluster(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes);
    void fail(const std::string& what) {
        if (fault.empty()) fault = what;
        stuck = true;
    }
    bool settle(Fiber* first, unsigned count, State within);
};

thread_local Runner runner;

void enter() {
#ifdef NORM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &runner.own_bottom, &runner.own_size);
#endif
    runner.kernel(runner.params);
    runner.leave(State::Done);
    give_up("a fiber ran on after its end");
}

void Runner::reserve(size_t count) {
    if (count <= room) return;
    if (stacks) munmap(stacks, room * STACK);
    void* memory = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) give_up("no memory for stacks");
    stacks = static_cast<char*>(memory);
    room = count;
#ifdef NORM_ASAN
    // Whoever had these addresses before may have left marks.
    __asan_unpoison_memory_region(stacks, room * STACK);
#endif
}

// Runs a fiber until it waits or ends.
void Runner::resume(Fiber& fiber) {
    running = &fiber;
    current = &fiber.thread;
#ifdef NORM_ASAN
    char* bottom = stacks + (&fiber - fibers.data()) * STACK;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, bottom, STACK);
#endif
    norm_switch_stack(&own_stack, fiber.stack_pointer);
#ifdef NORM_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    // A fiber ends by not coming back: its last frames never clear the marks around their variables, and
    // the next fiber on this stack would trip over them.
    char* left = static_cast<char*>(fiber.stack_pointer);
    if (fiber.state == State::Done) __asan_unpoison_memory_region(left, bottom + STACK - left);
#endif
}

// Back from the running fiber to the loop that resumed it.
void Runner::leave(State state) {
    Fiber& fiber = *running;
    fiber.state = state;
#ifdef NORM_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(state == State::Done ? nullptr : &fake, own_bottom, own_size);
#endif
    norm_switch_stack(&fiber.stack_pointer, own_stack);
#ifdef NORM_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

std::string name_of(const Site& site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
    return a.line == b.line && a.bytes == b.bytes && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Lets a group of fibers go on that all wait for each other; false if none of them waits so.
bool Runner::settle(Fiber* first, unsigned count, State within) {
    const Fiber* one = nullptr;
    unsigned waiting = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (first[i].state != within) continue;
        ++waiting;
        if (!one) one = &first[i];
        if (!same(one->site, first[i].site)) {
            fail("threads meet at " + name_of(one->site) + " and " + name_of(first[i].site));
            return false;
        }
    }
    if (waiting == 0) return false;
    if (waiting != count) {
        fail("threads part ways at " + name_of(one->site) + ": " + std::to_string(waiting) + " of " + std::to_string(count) + " come");
        return false;
    }
    for (unsigned i = 0; i < count; ++i) first[i].state = State::Ready;
    return true;
}

void Runner::run_warp(Fiber* warp) {
    do {
        for (unsigned lane : lane_order.of(32)) {
            if (warp[lane].state == State::Ready) resume(warp[lane]);
        }
    } while (settle(warp, 32, State::Warp));
}

void Runner::run_block(Fiber* block, unsigned threads) {
    do {
        for (unsigned warp : warp_order.of(threads / 32)) {
            run_warp(block + 32 * warp);
            if (stuck) return;
        }
    } while (settle(block, threads, State::Block));
}

void Runner::prepare(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes) {
    const unsigned warps_per_block = threads / 32;
    phase = arrived = 0;
    for (unsigned b = 0; b < blocks; ++b) {
        // Bytes of ones are NaNs: what nobody has written shows.
        std::memset(shared[b], 0xff, shared_bytes);
        for (unsigned t = 0; t < threads; ++t) {
            const unsigned i = b * threads + t, warp = b * warps_per_block + t / 32;
            Fiber& fiber = fibers[i];
            fiber = Fiber{};
            fiber.thread = {{t, 0, 0}, {first + b, 0, 0}, b, t % 32, warp, shared[b], 0, 0, 0, 0};
            fiber.stack_pointer = fresh_stack(stacks + (i + 1) * STACK, &enter);
        }
    }
}

// Runs all blocks of a cluster to their end.
void Runner::cluster(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes) {
    prepare(threads, blocks, first, shared_bytes);
    watch_cluster_start();
    unsigned done = 0;
    while (done != threads * blocks) {
        for (unsigned b : block_order.of(blocks)) {
            run_block(&fibers[b * threads], threads);
            if (stuck) return;
        }
        unsigned freed = done = 0;
        for (Fiber& fiber : fibers) {
            done += fiber.state == State::Done;
            if (fiber.state != State::Cluster || fiber.phase == phase) continue;
            fiber.state = State::Ready;
            ++freed;
        }
        if (freed == 0 && done != threads * blocks) return fail("threads wait at a cluster barrier to which others do not come");
    }
    if (!watching()) return;
    std::vector<const Thread*> threads_of;
    for (const Fiber& fiber : fibers) threads_of.push_back(&fiber.thread);
    watch_cluster_end(threads_of);
}

std::vector<Entry>& entries() {
    static std::vector<Entry> all;
    return all;
}

} // namespace

Registered::Registered(Entry entry) { entries().push_back(entry); }

uint64_t exchange(uint64_t value, unsigned from, Site site) {
    Fiber& fiber = *runner.running;
    // No lane is more than one exchange ahead of another, so two buffers are enough.
    uint64_t* values = runner.warps[fiber.thread.warp].values[fiber.turn++ % 2];
    values[fiber.thread.lane] = value;
    fiber.site = site;
    runner.leave(State::Warp);
    return values[from];
}

void warp_barrier(Site site) {
    Fiber& fiber = *runner.running;
    fiber.site = site;
    runner.leave(State::Warp);
    fiber.thread.warp_syncs += watch_barrier(site);
}

void block_barrier(Site site) {
    Fiber& fiber = *runner.running;
    fiber.site = site;
    runner.leave(State::Block);
    fiber.thread.block_syncs += watch_barrier(site);
}

void cluster_arrive(Site site, bool relaxed) {
    Runner& r = runner;
    Fiber& fiber = *r.running;
    if (fiber.arrived) r.fail("a thread arrives twice at the cluster barrier of " + name_of(site));
    if (r.arrived == 0) r.arrived_at = site;
    if (!same(r.arrived_at, site)) r.fail("threads arrive at the cluster barriers of " + name_of(r.arrived_at) + " and " + name_of(site));
    fiber.arrived = true;
    fiber.phase = r.phase;
    const bool orders = watch_barrier(site);
    fiber.thread.arrivals += orders;
    if (++r.arrived != r.fibers.size()) return;
    r.arrived = 0;
    ++r.phase;
    if (orders) watch_phase(!relaxed);
}

void cluster_wait(Site site) {
    Fiber& fiber = *runner.running;
    if (!fiber.arrived) return runner.fail("a thread waits at " + name_of(site) + " for a cluster barrier at which it has not arrived");
    fiber.site = site;
    // Even where all have arrived: the others of the warp have yet to come here.
    runner.leave(State::Cluster);
    fiber.arrived = false;
    fiber.thread.waits = fiber.thread.arrivals;
}

void* in_block(void* shared, unsigned rank) {
    return runner.shared[rank] + (static_cast<char*>(shared) - current->shared);
}

} // namespace emulation

// The kernel of this name, or null.
extern "C" const emulation::Entry* norm_emulation_find(const char* name) {
    for (const auto& entry : emulation::entries()) {
        if (std::strcmp(entry.name, name) == 0) return &entry;
    }
    return nullptr;
}

// Fibers of this thread's launches run in an order of this seed, 0 for in order.
extern "C" void norm_emulation_seed(uint64_t seed) { emulation::runner.seed(seed * 0x9e3779b97f4a7c15); }

// Of the clusters of a grid run so many, evenly spread; 0 for all. Of `period` neighbours, which may have
// more and less to do, as many of each kind. For counting, not for results.
extern "C" void norm_emulation_sample(unsigned clusters, unsigned period) {
    emulation::runner.sample = clusters;
    emulation::runner.period = period;
}

// Runs a kernel over a grid. What went wrong, until the next launch, or null. The caller has checked the
// launch against the entry's bounds.
extern "C" const char* norm_emulation_launch(const emulation::Entry* entry, unsigned grid, unsigned block, size_t shared,
                                             const void* params) {
    using namespace emulation;
    Runner& r = runner;
    const unsigned cluster = entry->cluster, clusters = grid / cluster;
    const size_t fibers = size_t(block) * cluster;
    r.reserve(fibers);
    r.fibers.assign(fibers, Fiber{});
    r.warps.resize(fibers / 32);
    r.shared.assign(cluster, nullptr);
    for (char*& memory : r.shared) {
        // Where accesses beyond it are seen, they must not do harm before.
        memory = static_cast<char*>(std::malloc(shared + (watching() ? 4096 : 1)));
        if (!memory) give_up("no shared memory");
    }
    r.kernel = entry->kernel;
    r.params = params;
    r.stuck = false;
    fault.clear();
    block_dim = {block, 1, 1};
    grid_dim = {grid, 1, 1};
    watched.threads = block;
    watched.cluster = cluster;
    watched.shared_bytes = shared;
    watched.shared = &r.shared;
    watched.stacks = r.stacks, watched.stacks_end = r.stacks + r.room * STACK;
    watched.own = reinterpret_cast<const char*>(r.fibers.data());
    watched.own_end = reinterpret_cast<const char*>(r.fibers.data() + fibers);
    watched.params = static_cast<const char*>(params);
    watch_launch();
    const bool all = r.sample == 0 || r.sample >= clusters;
    const unsigned count = all ? clusters : r.sample, period = all ? 1 : r.period;
    for (unsigned i = 0; i < count && !r.stuck; ++i) {
        const unsigned at = unsigned(uint64_t(i) * (clusters / period) / count) * period + i % period;
        r.cluster(block, cluster, at * cluster, shared);
    }
    for (char* memory : r.shared) std::free(memory);
    current = nullptr;
#ifdef NORM_ASAN
    // Fibers that were given up left their marks.
    if (r.stuck) __asan_unpoison_memory_region(r.stacks, r.room * STACK);
#endif
    return fault.empty() ? nullptr : fault.c_str();
}
