#!/usr/bin/env python3
"""Times variants of kernels against those that were compiled in, in turns, in one run.

A variant is a folder of variants/ with modules (rows_bf16.cubin, .fatbin or .ptx), which the worker loads
instead of its own (CANDLE_NORM_PTX_DIR) under the launch plan as it is, or a program of workers/: a worker
with another plan. Needs neither Rust nor PyTorch. Both sides start from the same
seed, so that their results can be compared bit for bit; where they differ, the largest difference is
told and the times count all the same.

    variants.py LayerNorm bf16 --figures forward     # rows whose names have these words
"""

import argparse
import json
import os
import pathlib
import statistics
import struct
import sys
import tempfile

import measure

HERE = pathlib.Path(__file__).resolve().parent


def read_safetensors(path):
    """Tensors as (dtype, bytes)."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    of = {k: v for k, v in header.items() if k != "__metadata__"}
    place = lambda v: slice(8 + length + v["data_offsets"][0], 8 + length + v["data_offsets"][1])
    return {name: (v["dtype"], data[place(v)]) for name, v in of.items()}


def values(dtype, data):
    if dtype == "F32":
        return struct.unpack(f"<{len(data) // 4}f", data)
    # bf16 is the upper half of an f32.
    return struct.unpack(f"<{len(data) // 2}f", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)))


def difference(ours, theirs):
    """The largest difference between two files' answers, or None where they are the same bits."""
    worst = None
    for name, (dtype, data) in ours.items():
        other = theirs[name][1]
        if not name.startswith("out_"):
            if data != other:
                raise SystemExit(f"variants: {name} is not the same on both sides")
        elif data != other:
            pairs = zip(values(dtype, data[: 1 << 20]), values(dtype, other[: 1 << 20]))
            worst = max(worst or (0.0, name), (max(abs(a - b) for a, b in pairs), name))
    return worst


def compare(row, workers, folder):
    answers = {}
    for name, worker in workers.items():
        file = os.path.join(folder, "row.safetensors")
        worker.open(row, file)
        answers[name] = read_safetensors(file)
    for name in list(workers)[1:]:
        worst = difference(answers["compiled"], answers[name])
        print(f"    {name}: " + ("the same bits" if worst is None else f"differs by {worst[0]:.1e} in {worst[1]}"))


def times(workers, figure, rounds, block_ms):
    first = {name: worker.time("candle-norm", figure, 2) for name, worker in workers.items()}
    if any(us is None for us in first.values()):
        return
    calls = {name: max(2, min(2000, int(block_ms * 1e3 / max(us, 0.1)))) for name, us in first.items()}
    taken = {name: [] for name in workers}
    for number in range(rounds):
        names = list(workers)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(workers[name].time("candle-norm", figure, calls[name]))
    for name, us in taken.items():
        ratio = statistics.median(a / b for a, b in zip(taken["compiled"], us))
        yield {"variant": name, "figure": figure, "us": statistics.median(us), "times as fast": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="words that a row's name must have")
    parser.add_argument("--worker", default=HERE / "bin" / "worker")
    parser.add_argument("--variants", type=pathlib.Path, default=HERE / "variants")
    parser.add_argument("--workers", type=pathlib.Path, default=HERE / "workers")
    parser.add_argument("--without", nargs="+", default=[], help="variants to leave out")
    parser.add_argument("--norms", nargs="+", help="norms to measure (default: all)")
    parser.add_argument("--no-compare", action="store_true", help="leave out the results, which takes most of the time")
    parser.add_argument("--figures", nargs="+", choices=measure.FIGURES, default=["forward", "backward"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-ms", type=float, default=10.0)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    folders = sorted(f for f in options.variants.glob("*") if f.is_dir() and f.name not in options.without)
    programs = sorted(f for f in options.workers.glob("*") if f.name not in options.without)
    rows = [r for r in measure.read_rows() if all(word in measure.name_of(r) for word in options.only)]
    rows = [r for r in rows if not options.norms or r["norm"] in options.norms]
    print(f"{len(rows)} rows, variants: {', '.join(f.name for f in folders + programs) or 'none'}")
    if options.dry_run or not folders + programs:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    workers = {"compiled": measure.Candle(options.worker)}
    workers |= {f.name: measure.Candle(options.worker, {"CANDLE_NORM_PTX_DIR": str(f)}) for f in folders}
    workers |= {f.name: measure.Candle(f) for f in programs}
    lines = []
    for row in rows:
        print(measure.name_of(row))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            if options.no_compare:
                for worker in workers.values():
                    worker.open(row)
            else:
                compare(row, workers, folder)
        for figure in options.figures:
            for line in times(workers, figure, options.rounds, options.block_ms):
                lines.append({"row": measure.name_of(row)} | line)
                print(f"    {figure:<9} {line['variant']:<20} {line['us']:9.1f} us  {line['times as fast']:.3f}x")
        measure.write_csv(options.out / "variants.csv", lines)


if __name__ == "__main__":
    sys.exit(main())
