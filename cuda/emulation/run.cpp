// Runs kernels on the host: the threads of a block are fibers of the calling thread.
//
// Fibers rather than threads, because a test launches thousands of blocks of hundreds of threads, and a
// switch between fibers takes nanoseconds. Kernels that part ways where CUDA wants them together (a
// shuffle or a barrier that some thread has left or not come to) end the process with a message.
#include "device.h"

#include <cstdio>
#include <cstdlib>
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

// switch_stack(from, to): saves the callee's registers on this stack and its pointer in *from, and goes
// on where `to` was left.
extern "C" void norm_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl norm_switch_stack
.type norm_switch_stack,@function
norm_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size norm_switch_stack,.-norm_switch_stack
)");
constexpr int SAVED = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl norm_switch_stack
.type norm_switch_stack,%function
norm_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size norm_switch_stack,.-norm_switch_stack
)");
#else
#error "the emulation switches fibers on x86-64 and aarch64 only"
#endif

namespace emulation {

thread_local Thread* current = nullptr;
thread_local dim3 block_dim, grid_dim;

namespace {

[[noreturn]] void fail(const char* what) {
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
    unsigned turn; // exchanges so far, to use the two buffers of a warp in turn
    void* stack_pointer;
};

struct Warp {
    uint64_t values[2][32];
};

// What a thread of the host needs to run a cluster of blocks; kept for the next launch.
struct Runner {
    char* stacks = nullptr;
    size_t room = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char*> shared;
    void* own_stack = nullptr;
    Fiber* running = nullptr;
    Kernel kernel = nullptr;
    const void* params = nullptr;
#ifdef NORM_ASAN
    const void* own_bottom = nullptr;
    size_t own_size = 0;
#endif

    ~Runner() {
        if (stacks) munmap(stacks, room * STACK);
    }
    void reserve(size_t count);
    void resume(Fiber& fiber);
    void leave(State state);
    void cluster(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes);
};

thread_local Runner runner;

void enter() {
#ifdef NORM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &runner.own_bottom, &runner.own_size);
#endif
    runner.kernel(runner.params);
    runner.leave(State::Done);
    fail("a fiber ran on after its end");
}

void Runner::reserve(size_t count) {
    if (count <= room) return;
    if (stacks) munmap(stacks, room * STACK);
    void* memory = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
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

// A stack on which switch_stack returns into `enter`.
void* fresh_stack(char* bottom) {
    void** top = reinterpret_cast<void**>(bottom + STACK);
#if defined(__x86_64__)
    // `enter` finds the stack as after a call: 8 beyond a multiple of 16.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < SAVED; ++i) *--top = nullptr;
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(&enter); // x30
#endif
    return top;
}

// Runs a group of fibers until all wait for something beyond the group, or have ended.
bool settle(Fiber* first, unsigned count, State within) {
    while (true) {
        unsigned waiting = 0;
        for (unsigned i = 0; i < count; ++i) waiting += first[i].state == within;
        if (waiting == 0) return false;
        if (waiting != count) fail("threads part ways at a shuffle or a barrier");
        for (unsigned i = 0; i < count; ++i) first[i].state = State::Ready;
        return true;
    }
}

// Runs all blocks of a cluster to their end.
void Runner::cluster(unsigned threads, unsigned blocks, unsigned first, size_t shared_bytes) {
    const unsigned warps_per_block = threads / 32;
    for (unsigned b = 0; b < blocks; ++b) {
        // Bytes of ones are NaNs: what nobody has written shows.
        std::memset(shared[b], 0xff, shared_bytes);
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[b * threads + t];
            const unsigned warp = b * warps_per_block + t / 32;
            fiber.thread = {{t, 0, 0}, {first + b, 0, 0}, b, t % 32, warp, shared[b]};
            fiber.state = State::Ready;
            fiber.turn = 0;
            fiber.stack_pointer = fresh_stack(stacks + (b * threads + t) * STACK);
        }
    }
    bool again = true;
    while (again) {
        again = false;
        for (unsigned b = 0; b < blocks; ++b) {
            Fiber* block = &fibers[b * threads];
            do {
                for (unsigned w = 0; w < threads; w += 32) {
                    do {
                        for (unsigned t = w; t < w + 32; ++t) {
                            if (block[t].state == State::Ready) resume(block[t]);
                        }
                    } while (settle(block + w, 32, State::Warp));
                }
            } while (settle(block, threads, State::Block));
        }
        again = settle(fibers.data(), threads * blocks, State::Cluster);
    }
    for (unsigned i = 0; i < threads * blocks; ++i) {
        if (fibers[i].state != State::Done) fail("a thread waits for one that has ended");
    }
}

struct Entry {
    const char* name;
    Kernel kernel;
};

std::vector<Entry>& entries() {
    static std::vector<Entry> all;
    return all;
}

} // namespace

Registered::Registered(const char* name, Kernel kernel) { entries().push_back({name, kernel}); }

uint64_t exchange(uint64_t value, unsigned from) {
    Fiber& fiber = *runner.running;
    // No lane is more than one exchange ahead of another, so two buffers are enough.
    uint64_t* values = runner.warps[fiber.thread.warp].values[fiber.turn++ % 2];
    values[fiber.thread.lane] = value;
    runner.leave(State::Warp);
    return values[from];
}

void block_barrier() { runner.leave(State::Block); }

// Arrival and wait are one here: the kernels do nothing in between.
void cluster_arrive() {}
void cluster_wait() { runner.leave(State::Cluster); }

void* in_block(void* shared, unsigned rank) {
    return runner.shared[rank] + (static_cast<char*>(shared) - current->shared);
}

} // namespace emulation

// The kernel of this name, or null.
extern "C" emulation::Kernel norm_emulation_find(const char* name) {
    for (const auto& entry : emulation::entries()) {
        if (std::strcmp(entry.name, name) == 0) return entry.kernel;
    }
    return nullptr;
}

// Runs a kernel over a grid.
extern "C" void norm_emulation_launch(emulation::Kernel kernel, unsigned grid, unsigned block, size_t shared, unsigned cluster,
                                      const void* params) {
    using namespace emulation;
    if (grid == 0 || block == 0 || block % 32 != 0 || block > 1024 || grid % cluster != 0) fail("a launch out of bounds");
    Runner& r = runner;
    r.reserve(size_t(block) * cluster);
    r.fibers.resize(size_t(block) * cluster);
    r.warps.resize(size_t(block) / 32 * cluster);
    r.shared.assign(cluster, nullptr);
    for (char*& memory : r.shared) {
        memory = static_cast<char*>(std::malloc(shared ? shared : 1));
        if (!memory) fail("no shared memory");
    }
    r.kernel = kernel;
    r.params = params;
    block_dim = {block, 1, 1};
    grid_dim = {grid, 1, 1};
    for (unsigned first = 0; first < grid; first += cluster) r.cluster(block, cluster, first, shared);
    for (char* memory : r.shared) std::free(memory);
    current = nullptr;
}
