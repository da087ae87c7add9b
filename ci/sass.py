#!/usr/bin/env python3
"""What the machine code of the kernels says about their speed, and whether it got worse.

    ci/sass.py target/registers            # check against cuda/sass.txt
    ci/sass.py target/registers --update   # write the table anew

The folder is the one that ci/registers.sh fills: <file>.90.cubin, .ptx and .tsv (registers). For every
kernel for sm_90, from nvdisasm:

  resident  blocks that a multiprocessor holds, by registers and threads (shared memory is the plan's)
  code      bytes of code
  loads     accesses asked for before the first store of the innermost loop that stores most; - without one,
           and where all of it is asked for at once (LDGSTS)
  fence     fences of the whole GPU's memory (MEMBAR, CCTL.IVALL) within loops
  division  divisions within innermost loops over elements, by their reciprocals
  local     accesses of local memory within innermost loops

Each has a goal. A kernel that misses one is in the table with what it has, and may only get better;
--update drops what is no longer needed. Needs Python 3 and nvdisasm, which ci/cuda-toolkit.sh brings.
"""

import pathlib
import re
import subprocess
import sys

import sass_run

TABLE = pathlib.Path(__file__).resolve().parent.parent / "cuda" / "sass.txt"
CAPABILITY = "90"
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor of sm_90
# name: (goal, whether more is better)
GOALS = {
    "resident": (2, True),
    "code": (48 << 10, False),
    "loads": (2, True),
    "fence": (0, False),
    "division": (0, False),
    "local": (0, False),
}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")


class Kernel:
    """The instructions of one entry point, and its loops."""

    def __init__(self, name):
        self.name, self.code, self.labels = name, [], {}
        self.registers = self.threads = 0
        self.taken_apart = None

    def add(self, line):
        label = re.match(r"^(\.L_x_\d+|\$[\w$]+):", line)
        if label:
            self.labels[label[1]] = len(self.code)
        instruction = INSTRUCTION.match(line)
        if instruction:
            self.code.append(instruction[2])

    def decoded(self):
        """For ci/sass_run.py: every instruction taken apart, once."""
        if self.taken_apart is None:
            self.taken_apart = [sass_run.decode(text) for text in self.code]
        return self.taken_apart

    def target(self, text):
        """The instruction that a jump goes to."""
        return self.labels[re.search(r"`\((.*?)\)", text)[1]]

    def finish(self):
        """Successors of each instruction, and loops as (first, last), innermost ones marked."""
        self.ops = []
        for text in self.code:
            words = text.split()
            guarded = words[0].startswith("@")
            self.ops.append((words[1] if guarded else words[0], guarded and words[0] != "@!PT", text))
        # A kernel ends with a jump to itself and padding.
        while self.ops and self.ops[-1][0] in ("NOP", "BRA"):
            self.ops.pop()
        self.next = []
        for i, (op, guarded, text) in enumerate(self.ops):
            following = []
            name = op.split(".")[0]
            target = re.search(r"`\((\.L_x_\d+)\)", text)
            if name in ("BRA", "BRX") and target and target[1] in self.labels:
                following.append(self.labels[target[1]])
            if name not in ("EXIT", "RET", "BRX", "JMP") and (name != "BRA" or guarded or ", " in text):
                following.append(i + 1)
            if name in ("EXIT", "RET") and guarded:
                following.append(i + 1)
            self.next.append([n for n in following if n < len(self.ops)])
        spans = {}
        for i, following in enumerate(self.next):
            for target in following:
                if target <= i:
                    spans[target] = max(spans.get(target, 0), i)
        self.loops = sorted(spans.items())
        self.innermost = [
            (a, b) for a, b in self.loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in self.loops)
        ]

    def names(self, span):
        return [self.ops[i][0] for i in range(span[0], span[1] + 1)]

    def count(self, span, *starts):
        return sum(name.startswith(starts) for name in self.names(span))

    def has_elements(self, span):
        """Whether it is over elements in memory: not over lanes, nor over what they have left."""
        return self.count(span, "LDG", "STG", "LDS") > 0 and self.count(span, "SHFL", "BAR") == 0

    def loads(self):
        """Loads before the first store of the innermost loop with the most stores, as wide as that."""
        if any(name.startswith("LDGSTS") for name, *_ in self.ops):
            return None
        best = None
        for span in self.innermost:
            names = self.names(span)
            stores = [i for i, name in enumerate(names) if name.startswith("STG")]
            if not stores:
                continue
            width = width_of(names[stores[0]])
            loads = [i for i, n in enumerate(names) if n.startswith(("LDG", "LDGSTS")) and width_of(n) == width]
            if loads and (best is None or len(stores) > best[0]):
                best = (len(stores), sum(i < stores[0] for i in loads))
        return best and best[1]

    def resident(self):
        if not self.threads:
            return 0
        warps = self.threads // 32
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        return min(by_registers, THREADS // self.threads, BLOCKS)

    def metrics(self):
        return {
            "resident": self.resident(),
            "code": 16 * len(self.code),
            "loads": self.loads(),
            "fence": sum(self.count(span, "MEMBAR.SC.GPU", "MEMBAR.ALL.GPU", "CCTL.IVALL") for span in self.loops),
            "division": sum(self.count(span, "MUFU.RCP", "FCHK") for span in self.innermost if self.has_elements(span)),
            "local": sum(self.count(span, "LDL", "STL") for span in self.innermost),
        }


def width_of(name):
    """Bits of an access."""
    width = re.search(r"\.(U8|S8|U16|S16|64|128)(\.|$)", name)
    return {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}[width[1]] if width else 32


def read(folder, only=None):
    """Kernels by name."""
    kernels = {}
    for cubin in sorted(pathlib.Path(folder).glob(f"*.{CAPABILITY}.cubin")):
        listing = cubin.with_suffix(".sass")
        if not listing.exists() or listing.stat().st_mtime < cubin.stat().st_mtime:
            listing.write_bytes(subprocess.run(["nvdisasm", "-c", str(cubin)], check=True, capture_output=True).stdout)
        text, kernel = listing.read_text(), None
        for line in text.splitlines():
            section = re.match(r"^\.text\.(\w+):", line)
            if section:
                kernel = kernels[section[1]] = Kernel(section[1])
            elif kernel:
                kernel.add(line)
        stem = cubin.name[: -len(".cubin")]
        for line in (cubin.parent / f"{stem}.tsv").read_text().splitlines():
            name, _, registers, *_ = line.split("\t")
            kernels[name].registers = int(registers)
        ptx = (cubin.parent / f"{stem}.ptx").read_text()
        for name, threads in re.findall(r"\.entry (\w+)\((?:.|\n)*?\.maxntid (\d+)", ptx):
            kernels[name].threads = int(threads)
    # Functions that are called, not launched, have no bounds.
    kernels = {name: kernel for name, kernel in kernels.items() if kernel.threads}
    for kernel in kernels.values():
        kernel.finish()
    if not kernels:
        raise SystemExit(f"sass: no kernels for sm_{CAPABILITY} in {folder}")
    return kernels


def misses(name, value):
    goal, more = GOALS[name]
    return value is not None and (value < goal if more else value > goal)


def table():
    if not TABLE.exists():
        return {}
    rows = (line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#"))
    names = next(rows)[1:]
    return {row[0]: {n: None if v == "-" else int(v) for n, v in zip(names, row[1:])} for row in rows}


def write(measured):
    lines = [
        "# Kernels whose machine code for sm_90 misses a goal of ci/sass.py: they may get better, not worse.",
        "# Goals: " + ", ".join(f"{n} {'>=' if more else '<='} {goal}" for n, (goal, more) in GOALS.items()),
        "# Written by ci/registers.sh --update.",
        f"{'kernel':<44}" + "".join(f"{n:>10}" for n in GOALS),
    ]
    for name, metrics in sorted(measured.items()):
        if any(misses(n, v) for n, v in metrics.items()):
            lines.append(f"{name:<44}" + "".join(f"{'-' if metrics[n] is None else metrics[n]:>10}" for n in GOALS))
    TABLE.write_text("\n".join(lines) + "\n")


def main():
    folder = sys.argv[1]
    measured = {name: kernel.metrics() for name, kernel in read(folder).items()}
    if "--update" in sys.argv:
        write(measured)
    allowed, failed, short = table(), 0, 0
    for name, metrics in sorted(measured.items()):
        for what, value in metrics.items():
            if not misses(what, value):
                continue
            short += 1
            had = allowed.get(name, {}).get(what)
            more = GOALS[what][1]
            # A tenth more code is the compiler's.
            limit = None if had is None else had * 1.1 if what == "code" else had
            if limit is None or (value < limit if more else value > limit):
                failed += 1
                print(f"sass: {name}: {what} {value}, goal {GOALS[what][0]}, had {'nothing' if had is None else had}")
    print(f"sass: {len(measured)} kernels for sm_{CAPABILITY}, {short} goals missed as before, {failed} worse")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
