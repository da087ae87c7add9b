#!/usr/bin/env python3
"""What the crate pulls in, and where it is unsafe, without a network:

    python3 ci/supply.py             # check
    python3 ci/supply.py --update    # write CONTRIBUTING.md's table of unsafe code anew

Checks of Cargo.lock what deny.toml says: every package is a published one with a checksum, every licence
is on the list. Names the packages that are there in several versions. Advisories and yanked versions need a
network: `cargo deny check`, in the workflow. Then counts `unsafe` in src/ and compares with CONTRIBUTING.md.
"""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGISTRY = "registry+"
BEGIN, END = "<!-- unsafe: ci/supply.py --update -->\n", "<!-- end of unsafe -->"


def packages():
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--all-features"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)["packages"]


def allows(expression, allowed):
    """Whether an SPDX expression can be met with the licences allowed."""
    # Older manifests write MIT/Apache-2.0.
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    words = []
    for token in tokens:
        if words and words[-1].endswith(" WITH"):
            words[-1] += " " + token
        elif token == "WITH":
            words[-1] += " WITH"
        else:
            words.append(token)
    operators = {"(": "(", ")": ")", "AND": "and", "OR": "or"}
    # Only parentheses, and, or, True and False are left to evaluate.
    return eval(" ".join(operators.get(word, str(word in allowed)) for word in words))


def check_packages():
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    problems = []
    for package in lock:
        if package["name"] == "candle-norm":
            continue
        if not package.get("source", "").startswith(REGISTRY) or "checksum" not in package:
            problems.append(f"{package['name']} comes from {package.get('source')}, expected a published one")
    found = packages()
    for package in found:
        licence = package["license"] or "none"
        if not allows(licence, rules["licenses"]["allow"]):
            problems.append(f"{package['name']} has licence {licence}, which deny.toml does not allow")
    versions = {}
    for package in lock:
        versions.setdefault(package["name"], []).append(package["version"])
    several = {name: all for name, all in versions.items() if len(all) > 1}
    print(f"supply: {len(lock)} packages locked, {len(found)} used here, all published, with checksums")
    print(f"supply: {len(several)} in several versions: {', '.join(sorted(several))}")
    return problems


def unsafe():
    """Files with unsafe code: blocks, functions and implementations in each."""
    counts = {}
    for path in sorted((ROOT / "src").rglob("*.rs")):
        code = re.sub(r"//[^\n]*", "", path.read_text())
        n = len(re.findall(r"\bunsafe\s*(?:\{|fn\b|impl\b|extern\b)", code))
        if n:
            counts[path.relative_to(ROOT).as_posix()] = n
    return counts


def table(counts):
    """By folder, so that moving code between files of one purpose changes nothing."""
    folders = {}
    for path, n in counts.items():
        folder = "/".join(path.split("/")[:2]) if path.count("/") > 1 else path
        files, total = folders.get(folder, (0, 0))
        folders[folder] = (files + 1, total + n)
    rows = [f"| `{folder}` | {files} | {total} |" for folder, (files, total) in sorted(folders.items())]
    total = sum(counts.values())
    return "\n".join(["| where | files | `unsafe` |", "|---|---|---|", *rows, f"| all | {len(counts)} | {total} |"]) + "\n"


def check_unsafe(update):
    path = ROOT / "CONTRIBUTING.md"
    text = path.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    now = table(unsafe())
    if update:
        path.write_text(text[:start] + now + text[end:])
    elif text[start:end] != now:
        print(f"supply: CONTRIBUTING.md's table of unsafe code is old: run ci/supply.py --update. It is now\n{now}")
    # Numbers change with the code; a place where none was before has to be meant.
    places = [line.split("|")[1] for line in now.splitlines()[2:]]
    new = [place.strip() for place in places if place not in text[start:end]]
    if new and not update:
        return [f"unsafe code where CONTRIBUTING.md names none: {', '.join(new)}"]
    print("supply: " + now.splitlines()[-1].strip("| ") + " (files, unsafe blocks, functions and implementations)")
    return []


problems = check_packages() + check_unsafe("--update" in sys.argv)
for problem in problems:
    print(f"supply: {problem}", file=sys.stderr)
sys.exit(bool(problems))
