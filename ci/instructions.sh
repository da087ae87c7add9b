#!/usr/bin/env bash
# Counts the instructions of the norms on the CPU, plain and fused, and compares them to benches/instructions/table.txt:
# ci/instructions.sh, or ci/instructions.sh --update to write the table. Needs valgrind. One thread, AVX2.
set -euo pipefail
cd "$(dirname "$0")/.."
table=benches/instructions/table.txt
binary=${INSTRUCTIONS_BINARY:-}
if [ -z "$binary" ]; then
    binary=$(cargo build --release --bench instructions --message-format json \
        | sed -n 's/.*"executable":"\([^"]*instructions[^"]*\)".*/\1/p' | tail -1)
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
CANDLE_NORM_SIMD=avx2 RAYON_NUM_THREADS=1 valgrind -q --tool=callgrind --callgrind-out-file="$out/callgrind" \
    --toggle-collect=instructions::counted --dump-before=instructions::counted "$binary" > "$out/rows"
# A dump before every row, the first of nothing; the last row's at the end.
dumps=$(find "$out" -name 'callgrind.*' | sort -V | tail -n +2)
for dump in $dumps "$out/callgrind"; do
    sed -n 's/^totals: *//p' "$dump"
done > "$out/counts"
paste -d' ' "$out/rows" "$out/counts" > "$out/table"
if [ "${1:-}" = --update ]; then
    cp "$out/table" "$table"
fi
# More than 3% above the table is a failure; less is a reason to write the table anew.
awk 'NR == FNR { before[$1 $2 $3 $4] = $5; next }
    { was = before[$1 $2 $3 $4]; printf "%-22s %-14s %-5s %-9s %12d %12d %6.3f\n", $1, $2, $3, $4, was, $5, $5 / was }
    $5 > 1.03 * was { worse = 1 }
    END { exit worse }' "$table" "$out/table"
