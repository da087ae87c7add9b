#!/usr/bin/env python3
"""What the launches of the GPU benchmark's rows move, against cuda/traffic.txt.

    ci/traffic.py plans.json            # check
    ci/traffic.py plans.json --update   # write the table anew

plans.json is what src/cuda/emulation/ledger.rs counts, access by access (ci/race.sh makes it). The ideal
is every tensor of x's size once: x and y, or x, dy and dx. Parameters and partial sums count once a
launch, however many blocks read them; a second read of a tensor counts, though a GPU may find it in its
L2 cache. A row fails that moves more bytes or launches more kernels than the table says.
"""

import json
import pathlib
import sys

TABLE = pathlib.Path(__file__).resolve().parent.parent / "cuda" / "traffic.txt"
HEAD = """\
# Launches of the rows of benches/gpu/rows.tsv, and bytes they move over the ideal, on devices of
# capability 9.0 and 8.0. Counted by the emulation; ci/traffic.py says how, and fails where a row gets worse.
# Written by ci/race.sh --update.
"""


def moved(plan):
    """Bytes over the ideal."""
    whole = plan["elements"] * plan["element_bytes"]
    total = 0
    for launch in plan["launches"]:
        for size, (read, written) in zip(plan["buffers"], launch["moved"]):
            total += (read if size == whole else min(read, size)) + written
    return total / whole / (2 if plan["side"] == "forward" else 3)


def table(plans):
    rows = {}
    for plan in plans:
        name = plan["row"].replace("\t", " ") + " " + plan["side"]
        rows.setdefault(name, {})[plan["capability"]] = (len(plan["launches"]), moved(plan))
    return rows


def write(rows):
    lines = [f"{'row':<58} {'launches':>8} {'bytes':>7} {'launches':>9} {'bytes':>7}"]
    for name, of in rows.items():
        (launches, share), (before, share_before) = of[90], of[80]
        lines.append(f"{name:<58} {launches:>8} {share:>7.3f} {before:>9} {share_before:>7.3f}")
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")


def read():
    rows = {}
    for line in TABLE.read_text().splitlines():
        if not line.startswith(("#", "row ")):
            numbers = line[58:].split()
            rows[line[:58].strip()] = {c: (int(numbers[i]), float(numbers[i + 1])) for c, i in ((90, 0), (80, 2))}
    return rows


def main():
    now = table(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    if "--update" in sys.argv:
        write(now)
    known, failed = read(), 0
    for name, of in now.items():
        for capability, (launches, share) in of.items():
            had = known.get(name, {}).get(capability)
            # The table has three digits, and of each grid a sample runs.
            if had is None or launches > had[0] or share > had[1] + 0.005:
                failed += 1
                print(f"traffic: {name}, sm_{capability}: {launches} launches, {share:.3f} of the ideal; the table has {had}")
    print(f"traffic: {len(now)} rows, {failed} worse than cuda/traffic.txt")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
