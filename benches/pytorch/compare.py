#!/usr/bin/env python3
"""candle-norm beside PyTorch, ONNX Runtime and candle-nn on the CPU, interleaved in one run.

    pip install -r benches/pytorch/requirements.txt
    python benches/pytorch/compare.py

Every contender lives in a process of its own that is stopped (SIGSTOP) while another is timed. A row
is measured in rounds: in each, every contender runs a block of calls, in an order that turns from
round to round, and a ratio is that of two blocks of the same round. Reported are the median of the
rounds' ratios and their range. Results are compared before they are timed.

Three figures: `forward` (nothing tracked); `op`, the norm's own forward and backward with a given
gradient (candle-norm without candle's graph, torch by its kernels without its autograd engine);
`step`, `loss.backward()` behind a loss whose gradient is given, graph and all. candle hands a loss's
gradient over with a zero-filled tensor and an addition; `net` is the step without those.

Two settings of glibc's malloc: `default`, where a large output is mapped anew at every call, and
`neutral`, where both sides keep their memory. The floor is a copy of as many bytes as x has.
"""

import argparse
import atexit
import csv
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import chart

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NEUTRAL = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
FIGURES = ("forward", "op", "step")
#: Who is timed for a figure; the first is the one whose ratios to the others are reported.
CONTENDERS = {
    "forward": ("candle-norm", "torch", "onnxruntime", "candle-nn", "copy"),
    "op": ("candle-norm", "torch", "copy"),
    "step": ("candle-norm", "torch", "candle-nn", "loss", "copy"),
}


class Side:
    """A process that answers each line with a line of JSON, stopped while it has nothing to do."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        # Whatever ends this program, no stopped process must stay behind.
        atexit.register(self.process.kill)
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, *words):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\t".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.process.send_signal(signal.SIGSTOP)
        if not line:
            sys.exit(f"{self.process.args} ended; its message is above")
        return json.loads(line)

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def build_worker():
    command = ["cargo", "bench", "--no-run", "--bench", "pytorch-worker", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable"))


def environment(threads, malloc):
    chosen = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    for name in NEUTRAL:
        chosen.pop(name, None)
    return chosen | (NEUTRAL if malloc == "neutral" else {})


class Run:
    """One setting of threads and malloc."""

    def __init__(self, worker, threads, malloc, options):
        self.threads, self.malloc, self.options = threads, malloc, options
        env = environment(threads, malloc)
        self.candle = Side([worker], env)
        self.torch = Side([sys.executable, HERE / "torch_side.py"], env)
        self.onnx = Side([sys.executable, HERE / "onnx_side.py"], env)
        self.file = pathlib.Path(tempfile.mkdtemp()) / "row.safetensors"

    def side(self, contender):
        return {"torch": self.torch, "onnxruntime": self.onnx}.get(contender, self.candle)

    def rows(self):
        rows = self.candle.ask("rows")
        return [r for r in rows if all(word in r["id"] for word in self.options.only)]

    def measure(self, row):
        """Yields a line of the table for each figure."""
        self.candle.ask("open", row["id"], self.file)
        answer = self.torch.ask("open", json.dumps(row), self.file)
        self.onnx.ask("open", json.dumps(row), self.file)
        self.file.unlink()
        self.errors = answer["errors"]
        for who, (what, error) in self.errors.items():
            # torch's gradients of bf16 weights sum in bf16: their error is reported, no more.
            if not error <= row["tolerance"] and (who, row["dtype"]) != ("torch", "bf16"):
                sys.exit(f"{row['id']}: {who}'s {what} is off by {error}")
        for figure in self.options.figures:
            times = self.rounds(figure)
            if "torch" in times:
                yield self.line(row, figure, times)

    def rounds(self, figure):
        """Nanoseconds a call of each contender, by round; `None` where it sat a round out."""
        calls = {}
        for name in CONTENDERS[figure]:
            once = self.side(name).ask("time", name, figure, 1)
            if "cannot" in once:
                continue
            # The first call warms up; a second one tells how many fit a block.
            calls[name] = max(1, min(20_000, int(self.options.block_ms * 1e6 / max(once["ns"], 1))))
        times = {name: [] for name in calls}
        for number in range(self.options.rounds):
            names = list(calls)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                # candle-nn is tens of times slower: a few rounds say so as well as many.
                if name == "candle-nn" and number >= 3:
                    times[name].append(None)
                    continue
                ns = self.side(name).ask("time", name, figure, calls[name])["ns"]
                times[name].append(ns / calls[name])
        return times

    def line(self, row, figure, times):
        ours = times["candle-norm"]
        line = {
            "norm": row["norm"],
            "shape": "x".join(map(str, row["shape"])),
            "model": row["model"],
            "dtype": row["dtype"],
            "figure": figure,
            "threads": self.threads,
            "malloc": self.malloc,
        }
        for name in ("candle-norm", "torch", "onnxruntime", "candle-nn", "loss", "copy"):
            known = [t for t in times.get(name, []) if t is not None]
            line[f"{name} ns"] = statistics.median(known) if known else None
        for name in ("torch", "onnxruntime", "candle-nn"):
            line |= spread(name, [t / o for t, o in zip(times.get(name, []), ours) if t is not None])
        # One read of x and one write of y, or with the backward also x and dy read and dx written.
        moved = 1.0 if figure == "forward" else 2.5
        line |= spread("floor", [o / (moved * c) for o, c in zip(ours, times["copy"])])
        for who, (what, error) in self.errors.items():
            line |= {f"{who} error": error, f"{who} error in": what}
        if "loss" in times:
            rest = [(t, o - l) for t, o, l in zip(times["torch"], ours, times["loss"]) if o > l]
            line |= spread("net torch", [t / o for t, o in rest])
        return line

    def close(self):
        for side in (self.candle, self.torch, self.onnx):
            side.close()


def spread(name, ratios):
    """Median, least and largest."""
    if not ratios:
        return {f"{name} ratio": None, f"{name} min": None, f"{name} max": None}
    return {
        f"{name} ratio": statistics.median(ratios),
        f"{name} min": min(ratios),
        f"{name} max": max(ratios),
    }


def memory(worker, rows, threads):
    """Peak memory of a training step through batch norm, each in a fresh process, in sizes of x."""
    lines = []
    env = environment(threads, "default")
    for row in rows:
        if row["norm"] != "BatchNorm" or row["bytes"] < 4_000_000:
            continue
        commands = {
            "candle-norm": [worker, "memory", "candle-norm", row["id"]],
            "candle-nn": [worker, "memory", "candle-nn", row["id"]],
            "torch": [sys.executable, HERE / "torch_side.py", "memory", json.dumps(row)],
        }
        for name, command in commands.items():
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                # candle-nn cannot train batch norm on bf16 input.
                print(f"{row['id']}: {name} cannot: {done.stderr.strip().splitlines()[-1]}")
                continue
            answer = json.loads(done.stdout)
            line = {"row": row["id"], "contender": name, "x bytes": answer["x"]}
            for what in ("kept", "peak"):
                line[f"{what} bytes"] = answer[what]
                line[f"{what} sizes of x"] = round(answer[what] / answer["x"], 2)
            lines.append(line)
            print(f"{row['id']:<36} {name:<12} kept {line['kept sizes of x']:5.2f}  peak {line['peak sizes of x']:5.2f} sizes of x")
    return lines


HEADER = (
    f"{'norm':<14} {'shape':<13} {'dtype':<5} {'figure':<8} {'threads':>7} {'malloc':<8} {'candle-norm':>11} {'torch':>10}"
    f"   {'torch / candle-norm':<20} {'net':>5} {'onnx':>5} {'candle-nn':>9} {'/ floor':>7}"
)


def show(line):
    def time_of(ns):
        return "" if ns is None else f"{ns / 1e3:.2f} us" if ns < 1e6 else f"{ns / 1e6:.2f} ms"

    def number(key):
        return "" if line.get(key) is None else f"{line[key]:.2f}"

    spread_of_torch = f"{number('torch ratio')} ({number('torch min')}-{number('torch max')})"
    print(
        f"{line['norm']:<14} {line['shape']:<13} {line['dtype']:<5} {line['figure']:<8} {line['threads']:>7} {line['malloc']:<8}"
        f" {time_of(line['candle-norm ns']):>11} {time_of(line['torch ns']):>10}   {spread_of_torch:<20}"
        f" {number('net torch ratio'):>5} {number('onnxruntime ratio'):>5} {number('candle-nn ratio'):>9} {number('floor ratio'):>7}",
        flush=True,
    )


def write_csv(path, lines):
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="words that a row's name must have, such as LayerNorm bf16")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="1, 2 or both (default 2)")
    parser.add_argument("--malloc", nargs="+", choices=["default", "neutral"], default=["default", "neutral"])
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-ms", type=float, default=25.0, help="how long a block of calls should take")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "pytorch")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of batch norm")
    return parser.parse_args()


def main():
    # Ends through atexit, as everything else that ends this program does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    chosen = options()
    worker = build_worker()
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    lines, rows = [], []
    for threads in chosen.threads:
        for malloc in chosen.malloc:
            print(f"\n{platform.machine()}, {threads} threads, {malloc} malloc; ratios: median (min-max)\n{HEADER}")
            run = Run(worker, threads, malloc, chosen)
            rows = run.rows()
            for row in rows:
                for line in run.measure(row):
                    lines.append(line)
                    show(line)
            run.close()
    write_csv(chosen.out / "pytorch.csv", lines)
    for threads in chosen.threads:
        for malloc in chosen.malloc:
            here = [x for x in lines if (x["threads"], x["malloc"]) == (threads, malloc)]
            name = f"pytorch-{threads}-threads-{malloc}.svg"
            (chosen.out / name).write_text(chart.svg(here, f"{threads} threads, {malloc} malloc"))
    if not chosen.no_memory:
        print("\nmemory of a training step through batch norm, above x, its gradient and the parameters:")
        write_csv(chosen.out / "memory.csv", memory(worker, rows, chosen.threads[-1]))
    print(f"\n{time.time() - start:.0f} s; written to {chosen.out}")


if __name__ == "__main__":
    main()
