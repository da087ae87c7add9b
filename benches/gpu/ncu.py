#!/usr/bin/env python3
"""What Nsight Compute counts in the kernels of some rows: time, memory, issue slots, what warps wait for.

    ncu.py --worker bin/worker --out results     # the rows below; writes ncu.csv

One process for all rows of a figure: the worker is asked for two calls of each, whose launches the plan knows
(cuda/roofline.txt), and the second call's are printed. Apart from measure.py: counting slows a kernel down, and
empties the caches before each.
"""

import argparse
import csv
import io
import json
import pathlib
import re
import subprocess
import sys

import measure

HERE = pathlib.Path(__file__).resolve().parent
# Rows by the words of their names, and how many kernels a call launches.
FORWARD = (
    ("LayerNorm 4096x768 f32", 1),
    ("LayerNorm 16384x1024 f32", 1),
    ("LayerNorm 8192x4096 bf16", 1),
    ("LayerNorm 65536x128 bf16", 1),
    ("RmsNorm 1x4096 bf16", 1),
    ("LayerNorm 4096x1023 bf16", 1),
    ("GroupNorm 16x512x64x64 g32 bf16", 1),
    ("GroupNorm 16x512x64x64 g32 bf16 channels-last", 3),
    ("BatchNorm 32x2048x7x7 bf16", 1),
    ("BatchNorm 256x64x112x112 bf16", 3),
)
BACKWARD = (
    ("LayerNorm 8192x4096 bf16", 2),
    ("LayerNorm 16384x1024 f32", 2),
    ("LayerNorm 2048x65536 bf16", 2),
    ("LayerNorm 65536x128 bf16", 2),
    ("LayerNorm 4096x1023 bf16", 2),
    ("GroupNorm 16x512x64x64 g32 bf16", 2),
    ("GroupNorm 16x512x64x64 g32 bf16 channels-last", 4),
    ("BatchNorm 32x256x56x56 bf16", 1),
)
# candle-nn's kernels beside ours, where they are one launch.
BESIDE = (("LayerNorm 4096x768 f32", 1), ("RmsNorm 1x4096 bf16", 1))
KERNELS = {
    "forward": "regex:^norm_|layernorm|rmsnorm",
    "backward": "regex:^norm_(backward|column_backward|column_sums|combine_sums|reduce_params|split_backward|split_column_sums|split_sums)",
}
STALLS = (
    "barrier branch_resolving dispatch_stall drain lg_throttle long_scoreboard math_pipe_throttle membar mio_throttle "
    "no_instruction not_selected short_scoreboard sleeping wait"
).split()
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "us": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
} | {name: STALL.format(name) for name in STALLS}


def commands(rows, contender, figure):
    known = {measure.name_of(row): row for row in measure.read_rows()}
    for name, _ in rows:
        yield f"open\t{json.dumps(known[name])}\t\n"
        yield f"time\t{contender}\t{figure}\t1\n"


def count(worker, text, figure, seconds):
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--kernel-name", KERNELS[figure], "--metrics", ",".join(METRICS.values()), str(worker)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        sys.exit(f"ncu: no table: {done.stdout[-2000:]}{done.stderr[-1000:]}")
    # The second line has the units; the worker's own answers are no table.
    table = [line for line in lines[start:] if line.startswith('"')]
    return [row for row in csv.DictReader(io.StringIO("\n".join(table))) if row["ID"].isdigit()]


def number(row, metric):
    try:
        return float(row.get(metric, "nan").replace(",", ""))
    except ValueError:
        return float("nan")


def show(name, contender, figure, row):
    v = {key: number(row, metric) for key, metric in METRICS.items()}
    stalls = sorted(STALLS, key=lambda s: -v[s] if v[s] == v[s] else 0)[:5]
    kernel = re.sub(r"\(.*", "", row["Kernel Name"])
    line = {"row": name, "contender": contender, "figure": figure, "kernel": kernel, "grid": row.get("Grid Size"), "block": row.get("Block Size")}
    line |= {"us": v["us"] / 1e3, "MB read": v["read"] / 1e6, "MB written": v["written"] / 1e6}
    line |= {key: v[key] for key in ("dram", "issue", "warps", "instructions", "registers", *STALLS)}
    waits = " ".join(f"{s} {v[s]:.1f}" for s in stalls)
    print(f"{name[:44]:<44} {figure[:4]} {kernel[:34]:<34} {line['grid']} {line['block']} {line['us']:7.1f} us "
          f"{line['MB read']:.0f}+{line['MB written']:.0f} MB dram {v['dram']:.0f}% issue {v['issue']:.0f}% warps {v['warps']:.0f}% "
          f"inst {v['instructions'] / 1e6:.2f}M reg {v['registers']:.0f} | {waits}", flush=True)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", default=HERE / "bin" / "worker")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    runs = (("candle-norm", "forward", FORWARD), ("candle-nn", "forward", BESIDE), ("candle-norm", "backward", BACKWARD))
    for contender, figure, rows in runs:
        counted = count(options.worker, "".join(commands(rows, contender, figure)), figure, options.seconds)
        at = 0
        for name, launches in rows:
            of = counted[at + launches : at + 2 * launches]
            at += 2 * launches
            lines += [show(name, contender, figure, row) for row in of]
        if at != len(counted):
            print(f"ncu: {len(counted)} launches, expected {at}: {[row['Kernel Name'] for row in counted]}")
        measure.write_csv(options.out / "ncu.csv", lines)


if __name__ == "__main__":
    main()
