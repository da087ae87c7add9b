#!/usr/bin/env python3
"""The static roofline: what each row of the GPU benchmark can reach, estimated without a GPU.

    ci/roofline.py                      # check against cuda/roofline.txt
    ci/roofline.py --update             # write the table anew
    ci/roofline.py --gpu A100 LayerNorm # every launch of the rows with these words in their names

Needs target/plans.txt (CANDLE_NORM_PLANS=$PWD/target/plans.txt cargo test --features cuda-emulation --lib
plans_of_the_rows) and what ci/registers.sh leaves in target/registers. Launches, grids and arguments are the
plan's. ci/sass_run.py runs a thread of each kernel's machine code for sm_90 with the row's arguments: what
it issues, and what it has under way at once. The rest is a model of what may decide:

  memory   x, dy and the output at a copy's rate; what a pass reads again and the L2 cache still has, partial
           sums and parameters at the cache's
  issue    warp instructions, four a cycle and multiprocessor
  latency  the life of a block, a load's latency and its instructions one behind the other, times the blocks
           that a multiprocessor has in turn
  waves    a launch's last blocks, which have the device to themselves
  launches what starting kernels costs, where that is most of it

An estimate, made to see what a change does and to let nothing get worse. An H100 has measured 10 to 35 points less
(benches/gpu/README.md): these times do not all overlap, as the model has them, since blocks of a wave go in step.
A row fails that loses more than a point of its share, or launches more kernels, or moves more bytes.
"""

import collections
import csv
import pathlib
import re
import struct
import sys

import sass
import sass_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "cuda" / "roofline.txt"

# Multiprocessors, TB/s of memory, MB of L2 cache, GHz (boost), KB of shared memory and threads of a
# multiprocessor, the plan's device. Sources: NVIDIA's data sheets of the H100 SXM, the H200 SXM and the A100
# 80 GB SXM; "NVIDIA Ada GPU Architecture" for the RTX 4090; the CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability". The H200's and the H100's clock is their 67 TFLOPS of f32 over 132 * 128 * 2.
GPUS = {
    "H200": dict(sms=132, peak=4.8, l2=50, ghz=1.98, shared=228, threads=2048, plan="sm_90"),
    "H100": dict(sms=132, peak=3.35, l2=50, ghz=1.98, shared=228, threads=2048, plan="sm_90"),
    "A100": dict(sms=108, peak=2.039, l2=40, ghz=1.41, shared=164, threads=2048, plan="sm_80"),
    "4090": dict(sms=128, peak=1.008, l2=72, ghz=2.52, shared=100, threads=1536, plan="sm_89"),
}
COPY = 0.9  # of the peak that a copy reaches: 4.3 of 4.8 TB/s on an H200, 3.0 of 3.35 on an H100 (Quack's figures)
L2_RATE = 2.0  # times memory's rate: 5.5 to 7 TB/s read on Hopper (Chips and Cheese, "Nvidia's H100")
L2_KEEPS = 0.5  # of the L2 cache that a second read still finds: each half serves half of the chip
LATENCY = 0.8  # us from a load to its value under load; 0.3 to 0.5 idle (Luo et al. 2024, "Hopper dissected")
CYCLES = 3.0  # from one instruction of a warp to its next: 4 where it waits for it (the same), less where not
CLUSTER = 0.5  # us more until blocks of a cluster have each other's values, each time (the same: 180 ns one way)
RAMP, GAP = 2.0, 1.0  # us until the first bytes come; between dependent kernels of a stream
ISSUE = 0.85  # of the issue slots that a kernel can use

# Tensors of x's size that a kernel reads and writes.
MOVES = {
    "forward_held": (1, 1), "forward_cluster": (1, 1), "forward_kept": (1, 1), "forward_several": (1, 1), "backward_rows": (2, 1), "backward_plain": (2, 1), "backward_sets": (2, 1),
    "gated_forward": (2, 1), "gated_backward": (3, 2),
    "split_moments": (1, 0), "split_forward": (1, 1), "split_sums": (2, 0), "split_column_sums": (2, 0), "split_backward": (2, 1),
    "column_moments": (1, 0), "column_forward": (1, 1), "column_sums": (2, 0), "column_backward": (2, 1),
}  # fmt: skip


def layout():
    """Offset, size, count and type of the fields of `struct Params`, and its size."""
    text, at, fields = (ROOT / "cuda/params.cuh").read_text(), 0, {}
    for name in ("Arguments", "Shape", "Schedule"):
        body = re.search(r"struct %s \{(.*?)\n\};" % name, text, re.S)[1]
        for kind, names in re.findall(r"^\s+((?:const )?void|u64|double|u32|Divisor)[ *]*(.*?);", body, re.M):
            for field in names.split(","):
                found = re.match(r"[\s*]*(\w+)(?:\[(\d+)\])?", field)
                size, count = {"u32": 4, "Divisor": 12}.get(kind, 8), int(found[2] or 1)
                fields[found[1]] = (at, size, count, kind)
                at += size * count
    return fields, at


FIELDS, SIZE = layout()


def argument(debug):
    """The bytes of a `Params` of which this is Rust's debug output."""
    out = bytearray(SIZE)
    for name, (at, size, count, kind) in FIELDS.items():
        if kind == "Divisor":
            found = re.search(name + r": Divisor \{ divisor: (\d+), magic: (\d+), shift: (\d+) \}", debug)
            struct.pack_into("<III", out, at, *map(int, found.groups()))
            continue
        text = re.search(rf"\b{name}: (\[.*?\]|[^,\s]+)", debug)[1]
        for i, value in enumerate(re.findall(r"[-\d.einf]+", text)):
            code = "d" if kind == "double" else "I" if size == 4 else "Q"
            struct.pack_into("<" + code, out, at + size * i, float(value) if code == "d" else int(value))
    return bytes(out)


class Plan:
    def __init__(self, line):
        row, self.side, self.device, *numbers, launches, debug = line.split("\t")
        self.elements, self.bytes, self.traffic, self.workspace = map(int, numbers)
        self.name = f"{row} {self.side}"
        self.argument = argument(debug)
        self.launches = [launch.split() for launch in launches.strip(",").split(",")]

    def ideal(self):
        return (2 if self.side == "forward" else 3) * self.elements * self.bytes


Run = collections.namedtuple("Run", "steps read written most")
RUN = {}


def run(kernel, grid, block, argument):
    """What a thread issues, reads, writes and has under way at most: of blocks in the middle, since the last chunk of
    a set is shorter, and of a warp that is not the first one, where there is one."""
    key = (kernel.name, grid, block, argument)
    if key not in RUN:
        tid, some = (32 if block >= 64 else 0), 7 if "_split_" in kernel.name else 1
        blocks = range(grid // 2, min(grid // 2 + some, grid))
        if "_several_" in kernel.name:
            # The first blocks have a set more than the last ones.
            blocks = range(0, grid, max(1, grid // 16))
        threads = [sass_run.Thread(kernel, block, grid, argument, tid, at).run() for at in blocks]
        mean = lambda of: sum(map(of, threads)) / len(threads)
        steps, read, written = mean(lambda t: t.steps), mean(lambda t: t.read), mean(lambda t: t.written)
        RUN[key] = Run(steps, read, written, max(t.most for t in threads))
    return RUN[key]


def resident(kernel, block, shared, gpu):
    registers = sass.REGISTERS // (-(-kernel.registers // 8) * 8 * 32) // -(-block // 32)
    return max(1, min(registers, gpu["threads"] // block, sass.BLOCKS, gpu["shared"] * 1024 // (shared + 1024)))


class Launch:
    """A launch on a GPU: its time, what decides it, and what the table shows."""

    def __init__(self, plan, launch, again, kernels, gpu):
        name, (grid, block, shared, cluster) = launch[0], map(int, launch[1:])
        kernel = kernels[name]
        self.name, self.grid, self.block = name, grid, block
        thread = run(kernel, grid, block, plan.argument)
        warps = -(-block // 32)
        whole, rate = plan.elements * plan.bytes, COPY * gpu["peak"] * 1e6  # bytes a us
        family = next((f for f in sorted(MOVES, key=len, reverse=True) if name.startswith("norm_" + f)), None)
        reads, writes = MOVES.get(family, (0, 0))
        self.tensors = reads + writes
        # The path that was run must have moved the tensors.
        least = 0.85 * whole / (block * grid)
        if thread.read < reads * least or thread.written < writes * least:
            raise SystemExit(f"roofline: {plan.name}: a thread of {name} reads {thread.read} and writes {thread.written} bytes")
        hits = min(reads * whole, L2_KEEPS * gpu["l2"] * 1e6) if again else 0
        self.memory = (reads + writes) * whole - hits
        # What a block reads besides, and writes, is small enough for the cache.
        others = max(0, thread.read * block * grid - reads * whole) + max(0, thread.written * block * grid - writes * whole)
        self.cached = hits + min(others, 2 * plan.workspace + (1 << 20))
        fits = resident(kernel, block, shared, gpu)
        self.blocks = min(fits, grid / gpu["sms"])
        self.warps = self.blocks * warps
        self.kb = self.blocks * block * thread.most / 1024
        self.issued = thread.steps * warps * grid
        life = LATENCY + thread.steps * CYCLES / gpu["ghz"] / 1e3 + (2 * CLUSTER if cluster > 1 else 0)
        self.waves = grid / gpu["sms"] / fits
        self.times = {
            "memory": (self.memory + self.cached / L2_RATE) / rate,
            "issue": self.issued / (gpu["sms"] * 4 * gpu["ghz"] * 1e3 * ISSUE),
            "latency": max(1, self.waves) * life - RAMP,
            "waves": life / 2 if self.waves > 1 else 0.0,
        }
        bounds = {k: v for k, v in self.times.items() if k != "waves"}
        self.bound = max(bounds, key=bounds.get)
        self.us = bounds[self.bound] + self.times["waves"]
        self.us = max(self.us, 0.0)
        if self.times["waves"] > 0.2 * self.us:
            self.bound = "waves"


class Roofline:
    def __init__(self, plan, kernels, gpu):
        self.launches = []
        for i, launch in enumerate(plan.launches):
            again = i > 0 and launch[0].split("_")[1] in ("split", "column")
            self.launches.append(Launch(plan, launch, again, kernels, gpu))
        tensors = sum(l.tensors for l in self.launches)
        if tensors * plan.elements * plan.bytes != plan.traffic:
            raise SystemExit(f"roofline: {plan.name}: {tensors} tensors, the plan has {plan.traffic} bytes")
        starts = RAMP + GAP * (len(self.launches) - 1)
        self.us = sum(l.us for l in self.launches) + starts
        self.share = 100 * (plan.ideal() / (COPY * gpu["peak"] * 1e6) + RAMP) / self.us
        self.worst = max(self.launches, key=lambda l: l.us)
        self.bound = "launches" if starts > self.us / 2 else self.worst.bound
        self.moved = sum(l.memory for l in self.launches) / plan.ideal()
        self.slots = 32 * sum(l.issued for l in self.launches) / plan.elements


def table(plans, kernels):
    lines = [
        "# The static roofline (ci/roofline.py): estimated shares of a copy's speed of the rows of",
        "# benches/gpu/rows.tsv, and what decides. Launches; bytes from and to memory over ideal ones; of the",
        "# longest launch warps and KB under way in a multiprocessor of the H200; issue slots an element; shares",
        "# of the copy in %, estimated, and what an H100 measured last (benches/results/gpu/h100.csv; misses of more",
        "# than 15 points: benches/gpu/README.md); the H200's bound. Written by ci/roofline.py --update.",
        f"{'row':<54} launches bytes warps    KB slots" + "".join(f"{n:>6}" for n in GPUS) + " measured  bound",
    ]
    known = measured()
    by = {}
    for plan in plans:
        by.setdefault(plan.name, {})[plan.device] = plan
    for name, of in by.items():
        all_ = {gpu_name: Roofline(of[gpu["plan"]], kernels, gpu) for gpu_name, gpu in GPUS.items()}
        r = all_["H200"]
        lines.append(
            f"{name:<54} {len(r.launches):>8} {r.moved:>5.2f} {r.worst.warps:>5.1f} {r.worst.kb:>5.0f} {r.slots:>5.1f}"
            + "".join(f"{one.share:>6.0f}" for one in all_.values())
            + f"{known.get(name, '-'):>9}  {r.bound}"
        )
    return lines


def measured():
    """Shares of a copy on an H100, by the names of the table's rows: the newest run of each."""
    rows = {}
    with open(ROOT / "benches/results/gpu/h100.csv") as file:
        for line in csv.DictReader(file):
            if line["share of copy bandwidth"]:
                name = f"{line['norm']} {line['shape']} {line['groups'] or '-'} {line['dtype']} {line['layout']} {line['figure']}"
                rows[name] = round(100 * float(line["share of copy bandwidth"]))
    return rows


def read_table(lines):
    rows = {}
    for line in lines:
        if not line.startswith(("#", "row ")):
            numbers = line[54:].split()
            rows[line[:54].strip()] = (int(numbers[0]), float(numbers[1]), *map(float, numbers[5:9]))
    return rows


def explain(plans, kernels, gpu_name, words):
    gpu = GPUS[gpu_name]
    for plan in plans:
        if plan.device != gpu["plan"] or not all(word in plan.name for word in words):
            continue
        r = Roofline(plan, kernels, gpu)
        print(f"{plan.name}: {r.share:.0f}% of the copy on an {gpu_name}, {r.us:.1f} us, {r.slots:.1f} slots an element")
        for l in r.launches:
            times = ", ".join(f"{k} {v:.1f}" for k, v in l.times.items())
            print(
                f"    {l.name:<38} {l.grid:>7} x {l.block:<4} {l.us:7.1f} us {l.bound:<8} ({times} us) {l.memory / 1e6:.1f} MB, "
                f"{l.cached / 1e6:.1f} cached, {l.warps:.0f} warps, {l.kb:.0f} KB, {l.waves:.2f} waves"
            )


def main():
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    plans = [Plan(line) for line in (ROOT / "target/plans.txt").read_text().splitlines()]
    kernels = sass.read(ROOT / "target/registers")
    if "--gpu" in sys.argv:
        return explain(plans, kernels, words[0], words[1:])
    lines = table(plans, kernels)
    if "--update" in sys.argv:
        TABLE.write_text("\n".join(lines) + "\n")
    known, now, failed = read_table(TABLE.read_text().splitlines()), read_table(lines), 0
    for name, row in now.items():
        had = known.get(name)
        if had is None or row[0] > had[0] or row[1] > had[1] + 0.01 or any(n < h - 1 for n, h in zip(row[2:], had[2:])):
            failed += 1
            print(f"roofline: {name}: launches, bytes, shares {row}, the table has {had}")
    print(f"roofline: {len(now)} rows, {failed} worse than cuda/roofline.txt")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
