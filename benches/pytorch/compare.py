#!/usr/bin/env python3
"""candle-norm beside PyTorch, ONNX Runtime and candle-nn on the CPU, in turns in one run.

    pip install -r benches/pytorch/requirements.txt
    python benches/pytorch/compare.py

Every contender lives in a process of its own that is stopped (SIGSTOP) while another is timed. A row
is measured in rounds: in each, every contender runs a block of calls, in an order that turns from
round to round, and a ratio is that of two blocks of the same round. Reported are the median of the
rounds' ratios and their range; rows whose rounds disagree are measured longer and, if they still do,
marked '?'. Results are compared before they are timed.

Three figures: `forward` (nothing tracked); `op`, the norm's own forward and backward with a given
gradient (candle-norm without candle's graph, torch by its kernels without its autograd engine);
`step`, `loss.backward()` behind a loss whose gradient is given, graph and all. With `--patched` the
step is also taken with the candle-core that benches/patched-candle.sh makes.

Settings of malloc, the same for every contender: `default`, glibc's, where freed memory of 32 MiB and
more goes back to the system, and the next tensor of that size is mapped anew, page by page (such a row is
measured in processes of its own: what rows before have left on the heap would be taken instead); `neutral`,
glibc's with two settings (NEUTRAL below) that make it keep what is freed; `mimalloc`, as Rust's crate of
that name has it; `jemalloc`, Debian's libjemalloc2, told to keep what is freed. The floor is a copy of as many bytes as x has.

A row with more than a norm has goals: at most 1.15 times the time (a step: 1.3) of candle-norm's norm alone and a copy for
each further tensor (`of plain`), at least torch.compile's speed and three times that of candle's composition. Where it
misses one its line says which, and the end has them all.

`--generated 50` measures fifty norms over random shapes in both dtypes instead, which nobody has picked, into `--out` of their
own; `--generated 50,2` others.

Rows that `--out` has from an earlier run stay there unless they are measured again.
"""

import argparse
import atexit
import csv
import ctypes.util
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
#: Without it jemalloc, too, gives large tensors back to the system.
JEMALLOC = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
MALLOCS = ("default", "neutral", "mimalloc", "jemalloc")
FIGURES = ("forward", "op", "step")
#: Who is timed for a figure; the first is the one whose ratios to the others are reported.
CONTENDERS = {
    "forward": ("candle-norm", "torch", "compiled", "onnxruntime", "candle-nn", "plain", "copy"),
    "op": ("candle-norm", "torch", "copy"),
    "step": ("candle-norm", "torch", "compiled", "patched", "candle-nn", "plain", "loss", "copy"),
}
#: The least that is timed at once, in nanoseconds.
BATCH = 50_000
#: The middle half of the rounds' ratios may span this factor: rounds that are further apart disagree.
AGREE = 1.25
#: Of x, and so of an output: glibc's malloc as it comes maps more in any case, unless freed memory of the heap has room for it.
MAPPED = 32 << 20
#: What tells one line of the table from another.
KEY = ("norm", "shape", "dtype", "figure", "threads", "malloc")


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


def build_worker(cargo):
    command = [*cargo, "bench", "--no-run", "--bench", "pytorch-worker", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable"))


def environment(threads, malloc):
    chosen = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    # What compiles for torch.compile is the process that is stopped with it, not others beside it.
    chosen["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for name in NEUTRAL:
        chosen.pop(name, None)
    if malloc == "mimalloc":
        made = subprocess.run([HERE / "mimalloc.sh"], check=True, stdout=subprocess.PIPE, text=True)
        return chosen | {"LD_PRELOAD": made.stdout.strip()}
    if malloc == "jemalloc":
        library = ctypes.util.find_library("jemalloc")
        if not library:
            sys.exit("no libjemalloc: Debian's libjemalloc2 has it")
        return chosen | {"LD_PRELOAD": library, "MALLOC_CONF": JEMALLOC}
    return chosen | (NEUTRAL if malloc == "neutral" else {})


def same_numbers(one, other):
    """Of any sign where they are zero: what candle adds to its zeros never is -0, which a masked gradient may be."""
    if one.read_bytes() == other.read_bytes():
        return True
    from safetensors.torch import load_file
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


class Run:
    """One setting of threads and malloc."""

    def __init__(self, workers, threads, malloc, options):
        self.threads, self.malloc, self.options = threads, malloc, options
        env = environment(threads, malloc)
        self.candle = Side([workers["candle-norm"]], env)
        self.torch = Side([sys.executable, HERE / "torch_side.py"], env)
        self.onnx = Side([sys.executable, HERE / "onnx_side.py"], env)
        self.patched = Side([workers["patched"]], env) if "patched" in workers else None
        self.file = pathlib.Path(tempfile.mkdtemp()) / "row.safetensors"

    def side(self, contender):
        sides = {"torch": self.torch, "compiled": self.torch, "onnxruntime": self.onnx, "patched": self.patched}
        return sides.get(contender, self.candle)

    def time(self, contender, figure, calls, batches):
        """The worker with the patched candle is asked as the other is."""
        name = "candle-norm" if contender == "patched" else contender
        return self.side(contender).ask("time", name, figure, calls, batches)

    def rows(self):
        rows = self.candle.ask("rows")
        return [r for r in rows if all(word in r["id"] for word in self.options.only)]

    def measure(self, row):
        """Yields a line of the table for each figure."""
        self.candle.ask("open", row["id"], self.file)
        answer = self.torch.ask("open", json.dumps(row), self.file)
        self.onnx.ask("open", json.dumps(row), self.file)
        if self.patched:
            other = self.file.with_suffix(".patched")
            self.patched.ask("open", row["id"], other)
            if not same_numbers(other, self.file):
                sys.exit(f"{row['id']}: the patched candle gives other numbers")
            other.unlink()
        self.file.unlink()
        self.errors = answer["errors"]
        for who, (what, error) in self.errors.items():
            # torch's gradients of bf16 weights sum in bf16: their error is reported, no more.
            if not error <= row["tolerance"] and (who, row["dtype"]) != ("torch", "bf16"):
                sys.exit(f"{row['id']}: {who}'s {what} is off by {error}")
        for figure in self.options.figures:
            plan = self.plan(figure)
            if "torch" not in plan:
                continue
            times = {name: [] for name in plan}
            # Rounds that disagree are given company, twice at most.
            for _ in range(3):
                self.rounds(figure, plan, times)
                ours = times["candle-norm"]
                if all(agree(times[name], ours) for name in ("torch", "patched") if name in times):
                    break
            yield self.line(row, figure, times)

    def plan(self, figure):
        """For each contender that has this figure, the calls of a batch and the batches of a block."""
        once = {}
        for name in CONTENDERS[figure]:
            if self.side(name):
                answers = [self.time(name, figure, 1, 3)]
                once |= {name: answer["ns"] for answer in answers if "ns" in answer}
        calls = {name: max(1, int(BATCH / max(ns, 1))) for name, ns in once.items()}
        # As many batches for each, or the one with more would more often meet a quiet moment. candle-nn
        # is tens of times slower: it takes what time allows.
        longest = max((calls[name] * ns for name, ns in once.items() if name != "candle-nn"), default=BATCH)
        batches = max(1, int(self.options.block_ms * 1e6 / longest))
        return {name: (n, 1 if name == "candle-nn" else batches) for name, n in calls.items()}

    def rounds(self, figure, plan, times):
        """Adds a round's nanoseconds a call to each contender's; `None` where it sat a round out."""
        for number in range(self.options.rounds):
            names = list(plan)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                # A few rounds of candle-nn say so as well as many.
                if name == "candle-nn" and len(times[name]) >= 3:
                    times[name].append(None)
                    continue
                times[name].append(self.time(name, figure, *plan[name])["ns"])

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
        for name in ("candle-norm", "torch", "compiled", "patched", "onnxruntime", "candle-nn", "plain", "loss", "copy"):
            known = [t for t in times.get(name, []) if t is not None]
            line[f"{name} ns"] = statistics.median(known) if known else None
        for name in ("torch", "compiled", "onnxruntime", "candle-nn"):
            line |= spread(name, [t / o for t, o in zip(times.get(name, []), ours) if t is not None])
        # Tensors that must be read or written; the copy reads one and writes one.
        moved = (row["tensors"][0] if figure == "forward" else sum(row["tensors"])) / 2
        line |= spread("floor", [o / (moved * c) for o, c in zip(ours, times["copy"])])
        if "plain" in times:
            step = figure != "forward"
            copies = row["further"][step]
            pairs = zip(ours, times["plain"], times["copy"])
            line |= spread("of plain", [o / (p + copies * c) for o, p, c in pairs])
            line["misses"] = misses(line, row["limits"][step], row["beside candle"])
        for who, (what, error) in self.errors.items():
            line |= {f"{who} error": error, f"{who} error in": what}
        if "loss" in times:
            rest = [(t, o - l) for t, o, l in zip(times["torch"], ours, times["loss"]) if o > l]
            line |= spread("net torch", [t / o for t, o in rest])
        if "patched" in times:
            for name in ("torch", "compiled"):
                over = zip(times.get(name, []), times["patched"])
                line |= spread(f"patched {name}", [t / p for t, p in over])
        line["rounds agree"] = "yes" if agree(times["torch"], ours) else "no"
        return line

    def close(self):
        for side in filter(None, (self.candle, self.torch, self.onnx, self.patched)):
            side.close()


def misses(line, limit, beside_candle):
    """The goals that a row with more than a norm misses, in words."""
    missed = [f"{line['of plain ratio']:.2f} of plain, limit {limit}"] if line["of plain ratio"] > limit else []
    for name, least in (("compiled", 1), ("candle-nn", beside_candle)):
        ratio = line[f"{name} ratio"]
        if ratio is not None and ratio < least:
            missed.append(f"{ratio:.2f} x {name}, goal {least:g}")
    return "; ".join(missed)


def agree(over, under):
    """Whether the middle half of the rounds' ratios lies close together."""
    ratios = sorted(o / u for o, u in zip(over, under))
    last = len(ratios) - 1
    return ratios[-(-3 * last // 4)] <= AGREE * ratios[last // 4]


def spread(name, ratios):
    """Median, least and largest."""
    if not ratios:
        return {f"{name} ratio": None, f"{name} min": None, f"{name} max": None}
    return {
        f"{name} ratio": statistics.median(ratios),
        f"{name} min": min(ratios),
        f"{name} max": max(ratios),
    }


def memory(workers, rows):
    """What a training step through each norm keeps and its peak, each in a fresh process, in sizes of x.

    malloc maps each block of 64 KiB and more anew, and returns it when it is freed: what is resident is
    what is in use. (With malloc as it comes, a block may lie in memory that was resident already.)
    """
    lines = []
    env = environment(2, "default") | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    largest = {}
    for row in rows:
        key = (row["norm"], row["dtype"])
        trained = row["norm"] != "BatchNorm eval"
        if trained and row["bytes"] > largest.get(key, {"bytes": 0})["bytes"]:
            largest[key] = row
    for row in largest.values():
        commands = {name: [worker, "memory", "candle-norm", row["id"]] for name, worker in workers.items()}
        commands["candle-nn"] = [workers["candle-norm"], "memory", "candle-nn", row["id"]]
        commands["torch"] = [sys.executable, HERE / "torch_side.py", "memory", json.dumps(row)]
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
    f"{'norm':<20} {'shape':<13} {'dtype':<5} {'figure':<8} {'threads':>7} {'malloc':<8} {'candle-norm':>11} {'torch':>10}"
    f"   {'torch / candle-norm':<20} {'compiled':>8} {'net':>5} {'patched':>7} {'onnx':>5} {'candle-nn':>9} {'of plain':>8} {'/ floor':>7}"
)


def show(line):
    def time_of(ns):
        return "" if ns is None else f"{ns / 1e3:.2f} us" if ns < 1e6 else f"{ns / 1e6:.2f} ms"

    def number(key):
        return "" if line.get(key) is None else f"{line[key]:.2f}"

    spread_of_torch = f"{number('torch ratio')} ({number('torch min')}-{number('torch max')})"
    print(
        f"{line['norm']:<20} {line['shape']:<13} {line['dtype']:<5} {line['figure']:<8} {line['threads']:>7} {line['malloc']:<8}"
        f" {time_of(line['candle-norm ns']):>11} {time_of(line['torch ns']):>10}   {spread_of_torch:<20}"
        f" {number('compiled ratio'):>8} {number('net torch ratio'):>5} {number('patched torch ratio'):>7} {number('onnxruntime ratio'):>5}"
        f" {number('candle-nn ratio'):>9} {number('of plain ratio'):>8} {number('floor ratio'):>7}"
        f" {'' if line['rounds agree'] == 'yes' else '?'} {line.get('misses', '')}",
        flush=True,
    )


def write_csv(path, lines):
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})


def merged(path, measured, rows):
    """The lines of an earlier run with the measured ones in their places, in the order of the rows."""
    key = lambda line: tuple(str(line[name]) for name in KEY)
    lines = {}
    if path.exists():
        with open(path, newline="") as file:
            lines = {key(line): line for line in csv.DictReader(file)}
    lines |= {key(line): line for line in measured}
    order = [(row["norm"], "x".join(map(str, row["shape"])), row["dtype"]) for row in rows]
    place = lambda line: (
        int(line["threads"]),
        MALLOCS.index(line["malloc"]),
        order.index((line["norm"], line["shape"], line["dtype"])),
        FIGURES.index(line["figure"]),
    )
    known = [line for line in lines.values() if (line["norm"], line["shape"], line["dtype"]) in order]
    return sorted(known, key=place)


def summary(lines):
    """Of all rows in the file, PyTorch's time over candle-norm's, as the README has it."""
    columns = {"forward": ("forward", "torch"), "op": ("op", "torch"), "step": ("step", "torch")}
    columns["step, candle patched"] = ("step", "patched torch")
    out = "\n| threads, malloc, dtype | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns)
    for group in dict.fromkeys((str(x["threads"]), x["malloc"], x["dtype"]) for x in lines):
        cells = []
        for figure, who in columns.values():
            of = [x for x in lines if (str(x["threads"]), x["malloc"], x["dtype"], x["figure"]) == (*group, figure)]
            ratios = [float(x[f"{who} ratio"]) for x in of if x.get(f"{who} ratio")]
            ahead = sum(ratio >= 1 for ratio in ratios)
            cells.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.1f}), {ahead} of {len(ratios)} ahead" if ratios else ""
            )
        out += f"\n| {', '.join(group)} | " + " | ".join(cells) + " |"
    return out


def goals(lines):
    """The rows with more than a norm that miss a goal."""
    of = [line for line in lines if "misses" in line]
    if not of:
        return ""
    missed = [line for line in of if line["misses"]]
    out = f"\nof {len(of)} rows with more than a norm {len(missed)} miss a goal:\n"
    name = lambda line: " ".join(str(line[key]) for key in KEY)
    return out + "".join(f"{name(line)}: {line['misses']}\n" for line in missed)


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="words that a row's name must have, such as LayerNorm bf16")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="1, 2 or both (default 2)")
    parser.add_argument("--malloc", nargs="+", choices=MALLOCS, default=["default", "neutral"])
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-ms", type=float, default=25.0, help="how long a block of calls should take")
    parser.add_argument("--out", type=pathlib.Path, help="default target/pytorch, of generated rows target/pytorch-generated")
    parser.add_argument("--generated", metavar="COUNT[,SEED]", help="rows made at random, instead of models' own")
    parser.add_argument("--patched", action="store_true", help="take the step with a patched candle-core too")
    parser.add_argument("--memory", action="store_true", help="take the memory of a step, and no times")
    return parser.parse_args()


def main():
    # Ends through atexit, as everything else that ends this program does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    chosen = options()
    if chosen.generated:
        # What it compiles takes longer than all measuring.
        for figure, contenders in CONTENDERS.items():
            CONTENDERS[figure] = tuple(name for name in contenders if name != "compiled")
        os.environ["CANDLE_NORM_BENCH_GENERATED"] = chosen.generated
    chosen.out = chosen.out or ROOT / "target" / ("pytorch-generated" if chosen.generated else "pytorch")
    workers = {"candle-norm": build_worker(["cargo"])}
    if chosen.patched:
        workers["patched"] = build_worker([HERE.parent / "patched-candle.sh"])
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if chosen.memory:
        print("memory of a training step, above x, its gradient and the parameters:")
        rows = Run(workers, 2, "default", chosen).rows()
        write_csv(chosen.out / "memory.csv", memory(workers, rows))
    else:
        measure(workers, chosen)
    print(f"\n{time.time() - start:.0f} s; written to {chosen.out}")


def measure(workers, chosen):
    lines = []
    for threads in chosen.threads:
        for malloc in chosen.malloc:
            print(f"\n{platform.machine()}, {threads} threads, {malloc} malloc; ratios: median (min-max)\n{HEADER}")
            run = Run(workers, threads, malloc, chosen)
            every_row = run.candle.ask("rows")
            for row in run.rows():
                # Whether the heap has room is by the rows before: in processes of its own a row has what a program has.
                alone = malloc == "default" and row["bytes"] >= MAPPED
                one = Run(workers, threads, malloc, chosen) if alone else run
                for line in one.measure(row):
                    lines.append(line)
                    show(line)
                if alone:
                    one.close()
            run.close()
    print(goals(lines), end="")
    lines = merged(chosen.out / "pytorch.csv", lines, every_row)
    write_csv(chosen.out / "pytorch.csv", lines)
    print(summary(lines))
    fused = {row["norm"] for row in every_row if row["fused"]}
    for setting in dict.fromkeys((int(line["threads"]), line["malloc"]) for line in lines):
        here = [line for line in lines if (int(line["threads"]), line["malloc"]) == setting]
        threads, malloc = setting
        for name, marks in (("pytorch", chart.FIGURES), ("pytorch-fused", chart.FUSED)):
            those = [line for line in here if (line["norm"] in fused) == (marks is chart.FUSED)]
            if those:
                path = chosen.out / f"{name}-{threads}-threads-{malloc}.svg"
                path.write_text(chart.svg(those, threads, malloc, marks))


if __name__ == "__main__":
    main()
