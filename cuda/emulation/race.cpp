// A watch over every access of the emulated kernels: races, strays, what is written twice or never.
//
// The kernels are compiled with -fsanitize=thread (CANDLE_NORM_RACE=1), which puts a call before each
// access; the calls are answered here rather than by the sanitizer's library, which knows threads of the
// host and no fibers. Each cell of memory remembers who wrote and who read it last and how many barriers
// they had passed. Two accesses by different threads, one of them a write, race unless a barrier lies
// between that both have passed: __syncwarp in a warp, __syncthreads in a block, the cluster's barrier
// in a cluster, the end of the launch for all else. That holds whatever order the fibers ran in.
//
// Without the instrumentation nothing calls, and the functions of the machine (norm_watch_*) do nothing.
#include "watch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace emulation {

__thread Watched watched;

namespace {

#ifdef NORM_RACE
constexpr bool WATCHING = true;
#else
constexpr bool WATCHING = false;
#endif

constexpr unsigned NOBODY = 0, SEVERAL = ~0u;

// Who made an access: fiber 1.. of its cluster, and the barriers it had passed.
struct Access {
    unsigned run = 0, fiber = NOBODY; // run: the cluster, counted over all launches
    unsigned warp_syncs = 0, block_syncs = 0, arrivals = 0, block = 0;

    static Access now() {
        const Thread& t = *current;
        return {watched.run, t.rank * watched.threads + t.thread.x + 1, t.warp_syncs, t.block_syncs, t.arrivals, t.rank};
    }
};

// Two bytes of shared memory, or an element or part of one of memory that is written.
struct Cell {
    Access writer, reader, remote_reader;
};

// Memory that a kernel may touch: cells only where it may write.
struct Region {
    const char *first, *last;
    const char* name;
    unsigned granule; // bytes a cell stands for, 0 where accesses are counted and no more
    bool writable;
    unsigned long long read = 0, written = 0;
    std::vector<Cell> cells;
    std::vector<unsigned> launches; // of a cell's accesses
    std::vector<unsigned char> writes;
};

// A barrier of the kernels that some thread has come to.
struct Barrier {
    const char* file;
    int line;
    std::string name;
    bool counts;
};

struct Watch {
    std::vector<std::unique_ptr<Region>> regions;
    Region* last = nullptr;
    bool stale = false; // the regions are of an op that is over
    std::vector<std::vector<Cell>> shared;
    // full[i]: among the first i cluster barriers, those whose arrival was not relaxed.
    std::vector<unsigned> full;
    std::vector<unsigned> remote_arrivals; // of whoever touched a block's memory from another one, + 1
    std::vector<Barrier> barriers;
    std::string left_out; // the barrier that does not count

    Region* find(const char* at) {
        if (last && at >= last->first && at < last->last) return last;
        for (auto& region : regions) {
            if (at >= region->first && at < region->last) return last = region.get();
        }
        return nullptr;
    }
};
thread_local Watch watch;

std::string place(const Access& access) {
    if (access.fiber == SEVERAL) return "several threads";
    return "thread " + std::to_string((access.fiber - 1) % watched.threads) + " of block " + std::to_string(access.block);
}

void report(const std::string& what) {
    if (fault.empty()) fault = what + ", by thread " + std::to_string(current->thread.x) + " of block " + std::to_string(current->block.x);
}

// Whether `then` lies before `now`, the running thread's access, by some barrier. Of several readers the
// barriers of the last one are kept, and no thread is the same as `SEVERAL`.
inline bool before(const Access& then, const Access& now, bool by_cluster, bool read_of_written) {
    if (then.run != now.run || then.fiber == NOBODY || then.fiber == now.fiber) return true;
    if (then.block == now.block && !by_cluster) {
        if (now.block_syncs > then.block_syncs) return true;
        if (then.fiber != SEVERAL && (then.fiber - 1) / 32 == (now.fiber - 1) / 32 && now.warp_syncs > then.warp_syncs) return true;
    }
    const unsigned waits = current->waits;
    return read_of_written ? watch.full[waits] > watch.full[then.arrivals] : waits > then.arrivals;
}

inline void remember(Access& reader, const Access& now) {
    const bool unordered = reader.run == now.run && reader.block_syncs == now.block_syncs && reader.arrivals == now.arrivals;
    const bool by_warp = reader.fiber != SEVERAL && (reader.fiber - 1) / 32 == (now.fiber - 1) / 32 && reader.warp_syncs != now.warp_syncs;
    const bool several = reader.fiber != NOBODY && reader.fiber != now.fiber && unordered && !by_warp;
    reader = now;
    if (several) reader.fiber = SEVERAL;
}

// One cell; what races, or null.
inline const char* touch(Cell& cell, const Access& now, bool write, bool remote) {
    if (!before(cell.writer, now, false, !write)) return write ? "written twice without a barrier between" : "read without a barrier after it was written";
    if (!write) {
        remember(remote ? cell.remote_reader : cell.reader, now);
        return nullptr;
    }
    if (!before(cell.reader, now, false, false) || !before(cell.remote_reader, now, true, false)) return "written without a barrier after it was read";
    cell.writer = now;
    return nullptr;
}

[[maybe_unused]] void touch_shared(unsigned block, size_t at, size_t bytes, bool write) {
    const bool remote = block != current->rank;
    if (at + bytes > watched.shared_bytes) return report("shared memory: an access beyond its " + std::to_string(watched.shared_bytes) + " bytes");
    if (remote) {
        if (current->waits == 0) report("shared memory of another block is touched before the cluster's first barrier");
        watch.remote_arrivals[block] = std::max(watch.remote_arrivals[block], current->arrivals + 1);
    }
    const Access now = Access::now();
    Cell* cells = watch.shared[block].data();
    for (size_t cell = at / 2; cell < (at + bytes + 1) / 2; ++cell) {
        if (const char* race = touch(cells[cell], now, write, remote)) {
            const Access writer = cells[cell].writer;
            return report("shared memory: byte " + std::to_string(2 * cell) + " of block " + std::to_string(block) + " is " + race +
                          (writer.run == now.run && writer.fiber ? " (written by " + place(writer) + ")" : ""));
        }
    }
}

[[maybe_unused]] void touch_region(Region& region, const char* at, size_t bytes, bool write) {
    if (at + bytes > region.last) return report(std::string("an access beyond the end of ") + region.name);
    (write ? region.written : region.read) += bytes;
    if (write && !region.writable) return report(std::string("a write to ") + region.name + ", which is only read");
    if (region.cells.empty()) return;
    const Access now = Access::now();
    const size_t first = (at - region.first) / region.granule, last = (at - region.first + bytes - 1) / region.granule;
    for (size_t i = first; i <= last; ++i) {
        Cell& cell = region.cells[i];
        if (region.launches[i] != watched.launch) cell = Cell{};
        region.launches[i] = watched.launch;
        const bool other = (cell.writer.fiber && cell.writer.run != watched.run) ||
                           (write && cell.reader.fiber && cell.reader.run != watched.run);
        const char* race = other ? "shared by two clusters of one launch" : touch(cell, now, write, false);
        if (race) return report(std::string(region.name) + ": element " + std::to_string(i) + " is " + race);
        if (write && region.writes[i] < 255) ++region.writes[i];
    }
}

#ifdef NORM_RACE
void access(const void* pointer, size_t bytes, bool write) {
    if (!current) return;
    const char* at = static_cast<const char*>(pointer);
    const auto within = [&](const void* first, size_t size) { return size_t(at - static_cast<const char*>(first)) < size; };
    if (within(watched.stacks, watched.stacks_end - watched.stacks)) return;
    if (within(current->shared, watched.shared_bytes)) return touch_shared(current->rank, at - current->shared, bytes, write);
    for (unsigned b = 0; b < watched.cluster; ++b) {
        const char* shared = (*watched.shared)[b];
        if (within(shared, watched.shared_bytes)) return touch_shared(b, at - shared, bytes, write);
    }
    if (Region* region = watch.find(at)) return touch_region(*region, at, bytes, write);
    // A fiber's own numbers and the kernel's argument.
    if (at >= watched.own && at < watched.own_end) return;
    if (within(watched.params, sizeof(uint64_t) * 256) || within(&current, sizeof(current)) || within(&block_dim, sizeof(dim3)) || within(&grid_dim, sizeof(dim3))) return;
    report(write ? "a write to memory of no tensor" : "a read of memory of no tensor");
}
#endif

} // namespace

bool watching() { return WATCHING; }

void watch_launch() {
    ++watched.launch;
    if (WATCHING) watch.shared.resize(std::max<size_t>(watch.shared.size(), watched.cluster));
}

void watch_cluster_start() {
    ++watched.run;
    if (!WATCHING) return;
    watch.full.assign(1, 0);
    watch.remote_arrivals.assign(watched.cluster, 0);
    for (unsigned b = 0; b < watched.cluster; ++b) {
        // What is left of other runs shows by its `run`.
        if (watch.shared[b].size() < watched.shared_bytes / 2 + 1) watch.shared[b].resize(watched.shared_bytes / 2 + 1);
    }
}

void watch_phase(bool full) {
    if (WATCHING) watch.full.push_back(watch.full.back() + full);
}

void watch_cluster_end(const std::vector<const Thread*>& threads) {
    for (const Thread* thread : threads) {
        // Gone before another block was past its last access: the memory may be somebody else's by then.
        if (watch.remote_arrivals[thread->rank] > thread->waits && fault.empty()) {
            fault = "shared memory of block " + std::to_string(thread->rank) + " is touched by another one, and thread " +
                    std::to_string(thread->thread.x) + " ends without a cluster barrier after that";
        }
    }
}

bool watch_barrier(Site site) {
    if (!WATCHING) return true;
    for (const Barrier& known : watch.barriers) {
        if (known.line == site.line && known.file == site.file) return known.counts;
    }
    const char* slash = std::strrchr(site.file, '/');
    const std::string name = std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
    watch.barriers.push_back({site.file, site.line, name, name != watch.left_out});
    return watch.barriers.back().counts;
}

} // namespace emulation

using namespace emulation;

extern "C" {

// Whether accesses are watched in this build.
bool norm_watch() { return WATCHING; }

// A tensor that kernels may touch from now on, in elements of `granule` bytes (0: count, no more); `name`
// is a literal.
void norm_watch_memory(const void* at, size_t bytes, unsigned granule, bool writable, const char* name) {
    if (!WATCHING || bytes == 0) return;
    if (watch.stale) watch.regions.clear(), watch.last = nullptr, watch.stale = false;
    const char *first = static_cast<const char*>(at), *last = first + bytes;
    // Tensors may be views of one memory, and what was written before is read now.
    for (auto& region : watch.regions) {
        if (region->first == first && region->last == last && region->writable == writable) return;
    }
    auto region = std::make_unique<Region>();
    region->first = first, region->last = last, region->name = name, region->granule = granule, region->writable = writable;
    const size_t cells = writable && granule ? (bytes + granule - 1) / granule : 0;
    region->cells.resize(cells), region->launches.resize(cells), region->writes.resize(cells);
    watch.regions.push_back(std::move(region));
}

// The op is over: the next tensor belongs to another.
void norm_watch_done() { watch.stale = true; }

// Bytes read from the tensor that starts here, and written to it.
void norm_watch_traffic(const void* at, unsigned long long* read, unsigned long long* written) {
    *read = *written = 0;
    for (auto& region : watch.regions) {
        if (region->first == at) *read += region->read, *written += region->written;
    }
}

// The first element of the tensor that starts here that was not written exactly once: its place and how
// often; false if there is none.
bool norm_watch_written(const void* at, size_t* element, unsigned* times) {
    for (auto& region : watch.regions) {
        if (region->first != at || region->cells.empty()) continue;
        for (size_t i = 0; i < region->writes.size(); ++i) {
            if (region->writes[i] == 1) continue;
            *element = i, *times = region->writes[i];
            return true;
        }
    }
    return false;
}

// Barriers that this thread's launches came to, "file:line" each, some more than once; the n-th, or null.
const char* norm_watch_site(size_t n) {
    return n < watch.barriers.size() ? watch.barriers[n].name.c_str() : nullptr;
}

// The barrier at this place still stops threads, but orders nothing: as if it were forgotten.
void norm_watch_leave_out(const char* site) {
    watch.left_out = site;
    for (Barrier& barrier : watch.barriers) barrier.counts = barrier.name != watch.left_out;
}

#ifdef NORM_RACE
#define NORM_HOOKS(bytes) \
    void __tsan_read##bytes(void* at) { access(at, bytes, false); } \
    void __tsan_write##bytes(void* at) { access(at, bytes, true); } \
    void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, true); } \
    void __tsan_volatile_read##bytes(void* at) { access(at, bytes, false); } \
    void __tsan_volatile_write##bytes(void* at) { access(at, bytes, true); }
NORM_HOOKS(1)
NORM_HOOKS(2)
NORM_HOOKS(4)
NORM_HOOKS(8)
NORM_HOOKS(16)
void __tsan_read_range(void* at, unsigned long bytes) { access(at, bytes, false); }
void __tsan_write_range(void* at, unsigned long bytes) { access(at, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
#endif
}
