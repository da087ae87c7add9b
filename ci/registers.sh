#!/usr/bin/env bash
# Compiles every kernel for three generations of GPUs and fails where one spills registers or uses
# local memory beyond what cuda/registers.txt allows, or where its machine code for sm_90 misses the
# goals of ci/sass.py:
#
#     ci/registers.sh             # check
#     ci/registers.sh --update    # write the tables anew
#
# Needs the toolkit of ci/cuda-toolkit.sh, which it calls, and no GPU. A kernel that is not in the
# table may use none of either. Register counts are there to be read; they are not compared, since
# they change with every version of the compiler.
set -euo pipefail

cd "$(dirname "$0")/.."
env=$(ci/cuda-toolkit.sh) && eval "$env"
table=cuda/registers.txt
work=target/registers
capabilities="75 80 90"

# One line per kernel and capability: name, capability, registers, stack bytes, spilled bytes.
measure() {
    local source=$1 capability=$2 stem key
    stem=$(basename "$source" .cu)
    key=$work/$stem.$capability
    # Kept from an earlier run while sources, headers and compiler are the same.
    if [ -e "$key.tsv" ] && { [ "$capability" != 90 ] || [ -e "$key.cubin" ]; } && [ "$(cat "$key.sum")" = "$(sums "$source")" ]; then
        return
    fi
    nvcc --ptx -std=c++17 -O3 -Icuda --gpu-architecture="sm_$capability" "$source" -o "$key.ptx"
    ptxas -v --gpu-name="sm_$capability" "$key.ptx" -o "$key.cubin" 2>"$key.log" || { cat "$key.log"; return 1; }
    # ci/sass.py reads one generation's.
    [ "$capability" = 90 ] || rm -f "$key.cubin"
    awk -v capability="$capability" '
        /Compiling entry function/ { split($0, part, "\047"); name = part[2] }
        /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
        /Used [0-9]+ registers/ {
            for (i = 1; i < NF; i++) if ($i == "Used") registers = $(i + 1)
            print name "\t" capability "\t" registers "\t" stack "\t" spilled
        }' "$key.log" >"$key.tsv"
    sums "$source" >"$key.sum"
}

sums() {
    cat "$1" cuda/*.cuh ci/registers.sh ci/cuda-toolkit.sh | sha256sum
}

export -f measure sums
export work
mkdir -p "$work"
for capability in $capabilities; do
    for source in cuda/*.cu; do
        echo "$source $capability"
    done
done | xargs -P "$(nproc)" -L 1 bash -c 'set -euo pipefail; measure "$0" "$1"'

for capability in $capabilities; do
    for source in cuda/*.cu; do
        cat "$work/$(basename "$source" .cu).$capability.tsv"
    done
done | sort -k 1,1 -k 2,2n >"$work/all.tsv"
[ -s "$work/all.tsv" ] || { echo "registers: no kernels found" >&2 && exit 1; }

if [ "${1:-}" = --update ]; then
    {
        echo "# Registers, bytes of stack and bytes spilled per thread of every kernel, by compute capability."
        echo "# Written by ci/registers.sh --update; ci/registers.sh fails where stack or spills exceed it."
        printf '%-44s %10s %9s %5s %7s\n' kernel capability registers stack spilled
        awk '{ printf "%-44s %10s %9s %5s %7s\n", $1, $2, $3, $4, $5 }' "$work/all.tsv"
    } >"$table"
fi

awk '
    FNR == NR { if ($1 !~ /^(#|kernel)/) { stack[$1, $2] = $4; spilled[$1, $2] = $5 } next }
    {
        kernels++
        if ($4 > stack[$1, $2] + 0 || $5 > spilled[$1, $2] + 0) {
            printf "registers: %s for sm_%s: %s bytes of stack, %s spilled; allowed %d and %d\n",
                $1, $2, $4, $5, stack[$1, $2], spilled[$1, $2]
            failed = 1
        }
        if ($5 > 0) spilling++
    }
    END {
        printf "registers: %d kernels and capabilities compiled, %d spill\n", kernels, spilling
        exit failed
    }' "$table" "$work/all.tsv"
python3 ci/sass.py "$work" "$@"
