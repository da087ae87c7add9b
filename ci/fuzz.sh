#!/usr/bin/env bash
# Fuzzes one target for a time, from the inputs in fuzz/corpus/TARGET.hex, and writes back what it kept:
#
#     ci/fuzz.sh functional 600
#     ci/fuzz.sh layers 60
#
# Needs a nightly Rust, cargo-fuzz and a C++ compiler. An input that fails is in fuzz/artifacts; its line for
# the corpus, which tests/suite/fuzzed.rs runs on any toolchain, is printed.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
target=$1 seconds=${2:-600}
lines=corpus/$target.hex folder=corpus/$target minimal=corpus/$target.minimal

mkdir -p "$folder"
grep -v '^#' "$lines" | while read -r line; do
    xxd -r -p <<<"$line" >"$folder/$(sha1sum <<<"$line" | cut -c1-16)"
done
status=0
cargo +nightly fuzz run "$target" "$folder" -- -max_total_time="$seconds" -max_len=96 -timeout=60 \
    -rss_limit_mb=4096 -print_final_stats=1 || status=$?
for artifact in artifacts/"$target"/*; do
    [ -e "$artifact" ] && echo "failing input: $(xxd -p -c 1000 "$artifact")"
done
[ "$status" = 0 ] || exit "$status"

# The fewest inputs that reach the edges that all reach; not how often, which would keep twice as many.
rm -rf "$minimal" && mkdir "$minimal"
cargo +nightly fuzz run "$target" "$minimal" "$folder" -- -merge=1 -use_counters=0 >/dev/null 2>&1
{
    grep '^#' "$lines"
    for input in "$minimal"/*; do xxd -p -c 1000 "$input"; done | grep . | sort -u
} >"$lines.new"
mv "$lines.new" "$lines"
rm -rf "$minimal"
echo "fuzz: $target, $(grep -vc '^#' "$lines") inputs kept"
