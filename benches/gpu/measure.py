#!/usr/bin/env python3
"""Times candle-norm, candle-nn and PyTorch on a GPU, interleaved in one run.

Rows come from rows.tsv. For each row candle's side (worker.rs) makes random inputs and hands them,
with its answers, to this process, which compares them, and PyTorch's own, with PyTorch's in f64 before
anything is timed.
Then every contender is timed in turn, round after round, by CUDA events around a block of calls that
walk over as many inputs as fill the L2 cache four times. Figures are medians over the rounds.

Four figures: `forward`; `backward` (the op's own, the output's gradient given); `step` (forward and a
whole loss.backward(), the loss costing nothing); `graph` (a forward in a replayed CUDA graph, for
rows under 4 MB, where the host is slower than the device).

With --dry-run PyTorch runs tiny shapes on the CPU, candle does not run, and every figure in the files
is marked as not measured: it tries this script, no kernel.
"""

import argparse
import csv
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import chart

HERE = pathlib.Path(__file__).resolve().parent
FIGURES = ("forward", "backward", "step", "graph")
EPS, MOMENTUM = 1e-5, 0.1
# Bytes moved at least, in sizes of x: x read and y written; x and dy read and dx written; both.
MOVED = {"forward": 2, "backward": 3, "step": 5, "graph": 2}


def read_rows():
    for line in (HERE / "rows.tsv").read_text().splitlines():
        if line and not line.startswith("#"):
            norm, shape, groups, dtype, layout, model = line.split("\t")
            yield {
                "norm": norm,
                "shape": [int(d) for d in shape.split("x")],
                "groups": None if groups == "-" else int(groups),
                "dtype": dtype,
                "layout": layout,
                "model": model,
            }


def name_of(row):
    groups = f" g{row['groups']}" if row["groups"] else ""
    last = " channels-last" if row["layout"] == "last" else ""
    return f"{row['norm']} {'x'.join(map(str, row['shape']))}{groups} {row['dtype']}{last}"


def size_of(row):
    return math.prod(row["shape"]) * (2 if row["dtype"] == "bf16" else 4)


def tolerance(row):
    """Relative L2 error allowed between two answers that are each rounded once.

    A rounding moves an element by half an ulp. An f32 sum of n terms drifts like a random walk of n
    roundings; n is the longer of a set and of what shares a weight.
    """
    ulp = 2**-7 if row["dtype"] == "bf16" else 2**-23
    shape, elements = row["shape"], math.prod(row["shape"])
    params = shape[-1] if row["norm"] in ("LayerNorm", "RmsNorm") else shape[1]
    sets = {
        "LayerNorm": elements // shape[-1],
        "RmsNorm": elements // shape[-1],
        "GroupNorm": shape[0] * (row["groups"] or 1),
        "InstanceNorm": shape[0] * shape[1],
    }.get(row["norm"], shape[1])
    n = max(elements // params, elements // sets)
    return ulp + 4 * math.sqrt(n) * 2**-24


class Candle:
    """worker.rs in a process of its own."""

    def __init__(self, program, environment=None):
        self.program, self.environment = program, os.environ | (environment or {})
        self.row = None
        self.start()

    def start(self):
        """A worker; after one has died, another."""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [self.program], stdin=pipe, stdout=pipe, text=True, bufsize=1, env=self.environment
        )

    def open(self, row, file=""):
        self.row = json.dumps(row)
        self.ask("open", self.row, file)

    def ask(self, *words):
        self.process.stdin.write("\t".join(map(str, words)) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended at {words[0]} with {self.process.wait()}")
        return json.loads(answer)

    def time(self, contender, figure, calls):
        """Microseconds a call; `None` where the contender has no such figure."""
        answer = self.ask("time", contender, figure, calls)
        if "cannot" in answer:
            print(f"    {contender} cannot {figure}: {answer['cannot'].splitlines()[0][:100]}")
        if answer.get("spoilt"):
            print("    another worker goes on")
            self.process.kill()
            self.process.wait()
            self.start()
            if self.row:
                self.ask("open", self.row, "")
        return answer.get("us")


class Torch:
    """PyTorch's contenders over one row."""

    def __init__(self, row, tensors, device, l2, without=()):
        import torch

        self.torch, self.row, self.device = torch, row, device
        # torch's way to hold channels last: a view whose strides say so.
        if row["layout"] == "last":
            tensors |= {k: tensors[k].contiguous(memory_format=torch.channels_last) for k in ("x", "dy")}
        self.t = tensors
        copies = min(64, max(2, -(-4 * l2 // max(size_of(row), 1))))
        self.xs = [tensors["x"]] + [torch.randn_like(tensors["x"]) * 1.5 for _ in range(copies - 1)]
        self.dys = [tensors["dy"]] + [torch.randn_like(tensors["dy"]) for _ in range(copies - 1)]
        self.functions = {"torch": self.eager}
        if row["norm"].startswith("BatchNorm") and device == "cuda":
            self.functions["torch without cuDNN"] = self.without_cudnn
        self.functions |= self.others()
        for name in without:
            self.functions.pop(name, None)

    def others(self):
        """torch.compile, and what else is installed: what compiles at its first call."""
        others = {}
        if self.device == "cuda":
            # Each row compiles anew. Otherwise dynamo sees one function in many shapes, and after a few
            # (its recompile limit) runs the rest of the rows eagerly without a word.
            self.torch._dynamo.reset()
            others["torch.compile"] = self.torch.compile(self.eager, dynamic=False)
        norm, eps = self.row["norm"], EPS
        try:
            from liger_kernel.ops.group_norm import LigerGroupNormFunction
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            if norm == "LayerNorm":
                others["Liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, eps)
            if norm == "RmsNorm":
                # In place would destroy dy, which the others reuse.
                others["Liger"] = lambda x, w, b: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)
            if norm == "GroupNorm" and self.row["layout"] != "last":
                n, c = self.row["shape"][:2]
                groups = self.row["groups"]
                others["Liger"] = lambda x, w, b: LigerGroupNormFunction.apply(
                    x.view(n, c, -1), w, b, c, groups, eps
                ).view(x.shape)
        except ImportError as why:
            absent("Liger", str(why))
        try:
            from quack import rmsnorm

            if norm == "RmsNorm":
                others["Quack"] = lambda x, w, b: rmsnorm(x, w, eps=eps)
        except ImportError as why:
            absent("Quack", str(why))
        return others

    def eager(self, x, weight, bias):
        functional, row, t = self.torch.nn.functional, self.row, self.t
        norm = row["norm"]
        if norm.startswith("BatchNorm"):
            training = norm == "BatchNorm"
            mean, var = t["running_mean"], t["running_var"]
            return functional.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)
        if norm == "GroupNorm":
            return functional.group_norm(x, row["groups"], weight, bias, EPS)
        if norm == "InstanceNorm":
            return functional.instance_norm(x, weight=weight, bias=bias, eps=EPS)
        if norm == "LayerNorm":
            return functional.layer_norm(x, weight.shape, weight, bias, EPS)
        return functional.rms_norm(x, weight.shape, weight, EPS)

    def without_cudnn(self, x, weight, bias):
        with self.torch.backends.cudnn.flags(enabled=False):
            return self.eager(x, weight, bias)

    def tracked(self, x):
        """x, weight, bias as leaves."""
        leaf = lambda a: None if a is None else a.detach().requires_grad_()
        return leaf(x), leaf(self.t["weight"]), leaf(self.t.get("bias"))

    def answers(self, dtype=None):
        """torch's output and gradients; of the same inputs in `dtype` where one is given."""
        given = self.t
        to = lambda a: None if a is None else a.to(dtype or a.dtype)
        # Copies of the running statistics: candle moved its own after it saved them.
        moved = {k: to(given[k]).clone() for k in ("running_mean", "running_var")}
        self.t = {k: to(given.get(k)) for k in ("weight", "bias")} | moved
        x, weight, bias = self.tracked(to(self.xs[0]))
        y = self.eager(x, weight, bias)
        self.t = given
        answers = {"y": y.detach()}
        if self.row["norm"] != "BatchNormEval":
            leaves = {k: v for k, v in (("x", x), ("weight", weight), ("bias", bias)) if v is not None}
            gradients = self.torch.autograd.grad(y, list(leaves.values()), to(self.dys[0]))
            answers |= dict(zip(leaves, gradients))
        return answers

    def compare(self):
        """The largest relative L2 error of candle-norm's answers and of torch's, against torch in f64."""
        theirs = self.answers()
        exact = self.answers(self.torch.float64)
        worst = {"candle-norm": ("y", 0.0), "torch": ("y", 0.0)}
        for name, expected in exact.items():
            ours = self.t.pop(f"out_{name}").reshape(expected.shape)
            for side, got in (("candle-norm", ours), ("torch", theirs[name])):
                error = ((got.double() - expected).norm() / expected.norm()).item()
                # Not `>`: a NaN must win.
                if not error <= worst[side][1]:
                    worst[side] = (name, error)
        return worst

    def calls(self, contender, figure):
        """A function of i that enqueues call i."""
        torch, function, n = self.torch, self.functions[contender], len(self.xs)
        weight, bias = self.t["weight"], self.t.get("bias")
        if figure == "forward":

            def call(i):
                with torch.no_grad():
                    return function(self.xs[i % n], weight, bias)

        elif figure == "graph":
            if self.device != "cuda" or contender not in ("torch", "torch.compile"):
                return None
            return self.graph(function, weight, bias)
        elif self.row["norm"] == "BatchNormEval":
            return None
        elif figure == "backward":
            taped = []
            for x in self.xs:
                leaves = self.tracked(x)
                taped.append((function(*leaves), [a for a in leaves if a is not None]))

            def call(i):
                y, wanted = taped[i % n]
                return torch.autograd.grad(y, wanted, self.dys[i % n], retain_graph=True)[0]

        else:
            leaves = [self.tracked(x) for x in self.xs]

            def call(i):
                arguments = leaves[i % n]
                for a in arguments:
                    if a is not None:
                        a.grad = None
                y = function(*arguments)
                y.backward(self.dys[i % n])
                return y.detach()

        return call

    def graph(self, function, weight, bias):
        """Replays a graph of 20 forwards every 20th call."""
        torch, n = self.torch, len(self.xs)
        with torch.no_grad():
            function(self.xs[0], weight, bias)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(20):
                    function(self.xs[i % n], weight, bias)
        return lambda i: graph.replay() if i % 20 == 0 else None

    def time(self, contender, figure, calls):
        """Microseconds a call; `None` where the contender has no such figure."""
        torch = self.torch
        if contender == "copy":
            call = lambda i: self.xs[i % len(self.xs)].clone()
        elif contender == "read":
            call = lambda i: self.xs[i % len(self.xs)].sum()
        elif contender == "add":
            call = lambda i: torch.add(self.xs[i % len(self.xs)], self.dys[i % len(self.xs)])
        else:
            try:
                call = self.calls(contender, figure)
                if call is not None:
                    call(0)
            except Exception as error:  # a contender that cannot run a row sits it out
                print(f"    {contender} cannot: {str(error).splitlines()[0][:100]}")
                del self.functions[contender]
                return None
        if call is None:
            return None
        if figure == "graph":
            calls = -(-calls // 20) * 20
        ring = [None] * len(self.xs)
        if self.device != "cuda":
            start = time.perf_counter()
            for i in range(calls):
                ring[i % len(ring)] = call(i)
            return (time.perf_counter() - start) * 1e6 / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for i in range(calls):
            ring[i % len(ring)] = call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls


class Wrong(Exception):
    """candle-norm's answer is not that of f64: nothing of the row is timed."""


class Run:
    def __init__(self, options):
        import torch

        self.torch, self.options = torch, options
        # How far the open row's answers are from those of f64.
        self.off = {}
        self.device = "cpu" if options.dry_run else "cuda"
        if options.dry_run:
            torch.set_num_threads(1)
            options.rounds, options.block_ms = 1, 0.0
        self.candle = None
        self.about = {"name": "no GPU: dry run", "l2": 2**16}
        if not options.dry_run:
            self.candle = Candle(options.worker)
            self.about = self.candle.ask("device")

    def tensors(self, row):
        """Inputs, and candle's answers where candle runs."""
        torch = self.torch
        if self.candle:
            from safetensors.torch import load_file

            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                file = os.path.join(folder, "row.safetensors")
                self.candle.open(row, file)
                tensors = load_file(file, device="cuda")
            return tensors
        dtype = torch.bfloat16 if row["dtype"] == "bf16" else torch.float32
        params = row["shape"][-1] if row["norm"] in ("LayerNorm", "RmsNorm") else row["shape"][1]
        batch = row["norm"].startswith("BatchNorm")
        t = {name: torch.randn(row["shape"]).to(dtype) for name in ("x", "dy")}
        t |= {name: torch.randn(params).to(torch.float32 if batch else dtype) for name in ("weight", "bias")}
        if row["norm"] == "RmsNorm":
            del t["bias"]
        return t | {"running_mean": torch.zeros(params), "running_var": torch.ones(params)}

    def measure(self, row):
        self.off = {}
        without = list(self.options.without)
        if not any(word in name_of(row) for word in self.options.compile):
            without += ["torch.compile", "Liger", "Quack"]
        side = Torch(row, self.tensors(row), self.device, self.about["l2"], without)
        if self.candle:
            worst = side.compare()
            (what, error), (their_what, their_error), bound = worst["candle-norm"], worst["torch"], tolerance(row)
            self.off = {"candle-norm off by": error, "torch off by": their_error, "allowed": bound}
            print(f"    off f64 by {error:.1e} in {what}, torch by {their_error:.1e} in {their_what}, allowed {bound:.1e}")
            if not error <= bound:
                raise Wrong(f"{what} is off by {error:.1e}, allowed {bound:.1e}")
        for figure in self.options.figures:
            if figure == "graph" and size_of(row) > 4_000_000:
                continue
            if figure in ("backward", "step") and row["norm"] == "BatchNormEval":
                continue
            times = self.rounds(side, figure)
            if times:
                yield self.line(row, figure, times) | self.off

    def rounds(self, side, figure):
        """Microseconds a call of each contender, by round."""
        ask = {"copy": side.time, "read": side.time}
        if figure == "backward":
            # It moves what a backward moves: two tensors read, one written.
            ask["add"] = side.time
        if self.candle:
            ask |= {"candle-norm": self.candle.time, "candle-nn": self.candle.time}
        ask |= {name: side.time for name in side.functions}
        blocks = {}
        for name in list(ask):
            us = ask[name](name, figure, 2)
            if us is not None:
                # The first block warmed up and told how many calls fit the next.
                blocks[name] = max(2, min(2000, int(self.options.block_ms * 1e3 / max(us, 0.1))))
        times = {name: [] for name in blocks}
        for number in range(self.options.rounds):
            names = list(blocks)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                us = ask[name](name, figure, blocks[name])
                if us is not None:
                    times[name].append(us)
        return {name: known for name, known in times.items() if known}

    def line(self, row, figure, times):
        line = {
            "norm": row["norm"],
            "shape": "x".join(map(str, row["shape"])),
            "groups": row["groups"],
            "dtype": row["dtype"],
            "layout": row["layout"],
            "model": row["model"],
            "figure": figure,
            "MB": size_of(row) / 1e6,
        }
        for name in CONTENDERS:
            known = times.get(name) if self.candle else None
            line[f"{name} us"] = statistics.median(known) if known else "not measured"
        ours = line["candle-norm us"]
        if ours != "not measured":
            # A copy reads and writes x: it moves 2 sizes in its time.
            floor = MOVED[figure] / 2 * line["copy us"]
            line["share of copy bandwidth"] = floor / ours
            line["TB/s"] = MOVED[figure] * size_of(row) / ours / 1e6
            for name in CONTENDERS:
                if name != "candle-norm" and line[f"{name} us"] != "not measured":
                    ratios = [t / o for t, o in zip(times[name], times["candle-norm"])]
                    line[f"{name} ratio"] = statistics.median(ratios)
        return line


CONTENDERS = (
    "candle-norm",
    "candle-nn",
    "torch",
    "torch without cuDNN",
    "torch.compile",
    "Liger",
    "Quack",
    "copy",
    "read",
    "add",
)


@functools.cache
def absent(contender, why):
    print(f"{contender} takes no part: {why}", flush=True)


def show(line):
    parts = [f"    {line['figure']:<9}"]
    for name in CONTENDERS:
        us = line[f"{name} us"]
        if us != "not measured":
            ratio = line.get(f"{name} ratio")
            parts.append(f"{name} {us:.1f} us" + (f" ({ratio:.2f}x)" if ratio else ""))
    if "TB/s" in line:
        parts.append(f"{line['TB/s']:.2f} TB/s, {line['share of copy bandwidth']:.0%} of copy")
    print("  ".join(parts) if len(parts) > 1 else parts[0] + "not measured", flush=True)


def failure(row, error):
    """What the files say of a row that could not be measured."""
    words = str(error).splitlines() or [type(error).__name__]
    return {
        "norm": row["norm"],
        "shape": "x".join(map(str, row["shape"])),
        "groups": row["groups"],
        "dtype": row["dtype"],
        "layout": row["layout"],
        "model": row["model"],
        "figure": "wrong" if isinstance(error, Wrong) else "failed",
        "error": words[0][:200],
    }


def write_csv(path, lines):
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})


def smaller(row):
    """The row with each dimension at most 8, for the dry run. Groups divide the channels still."""
    shape = [min(d, 8) for d in row["shape"]]
    return row | {"shape": shape, "groups": row["groups"] and 4}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="words that a row's name must have, such as LayerNorm bf16")
    parser.add_argument("--worker", default=HERE / "bin" / "worker")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-ms", type=float, default=10.0, help="how long a block of calls should take")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--norms", nargs="+", help="norms to measure (default: all)")
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    parser.add_argument(
        "--compile",
        nargs="*",
        default=[""],
        metavar="WORD",
        help="contenders that compile at their first call, which takes most of the time, measure only the rows "
        "whose names have one of these words (default: every row)",
    )
    parser.add_argument("--name", help="of the files in --out: gpu, or dry-run")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after this long")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def main():
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        import torch  # noqa: F401
    except ImportError:
        rows = [name_of(row) for row in read_rows() if not options.norms or row["norm"] in options.norms]
        print(f"not measured: no PyTorch here; {len(rows)} rows are listed, the first is {rows[0]}")
        return 0 if options.dry_run else 1
    run = Run(options)
    about = {
        **run.about,
        "torch": run.torch.__version__,
        "command": " ".join(["measure.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(about))
    name = options.name or ("dry-run" if options.dry_run else "gpu")
    lines, left, start = [], [], time.monotonic()
    for row in read_rows():
        if not all(word in name_of(row) for word in options.only):
            continue
        if options.norms and row["norm"] not in options.norms:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            left.append(name_of(row))
            continue
        print(name_of(row))
        try:
            for line in run.measure(smaller(row) if options.dry_run else row):
                lines.append(line | {"shape": "x".join(map(str, row["shape"])), "MB": size_of(row) / 1e6})
                show(lines[-1])
        except Exception as error:  # recorded, and the next row is measured
            lines.append(failure(row, error) | run.off)
            print(f"    {lines[-1]['figure']}: {lines[-1]['error']}")
            if run.candle and run.candle.process.poll() is not None:
                run.candle.start()
        # Kept up to date, so that a run cut short leaves what it has.
        write_csv(options.out / f"{name}.csv", lines)
        measured = [line for line in lines if "error" not in line]
        (options.out / f"{name}.svg").write_text(chart.svg(measured, about) if measured else "")
        (options.out / f"{name}.json").write_text(json.dumps(about | {"left": left}, indent=1) + "\n")
    bad = [line for line in lines if "error" in line]
    print(f"{len(lines) - len(bad)} lines, {len(bad)} rows wrong or failed, written to {options.out}/{name}.csv")
    if left:
        print(f"not measured for want of time: {', '.join(left)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
