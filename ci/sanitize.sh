#!/usr/bin/env bash
# The emulated CUDA kernels under the address and undefined-behaviour sanitizers, and proof that those,
# and the tests, see faults: a read beyond a tensor and an output left unwritten, planted in a kernel.
#
#     ci/sanitize.sh             # every kernel of the ladder, the suite, the planted faults
#     ci/sanitize.sh --short     # without the suite and the ladder: every kernel with what stands around it
#
# Needs g++ with libasan and libubsan.
set -euo pipefail

cd "$(dirname "$0")/.."
short=${1:-}
export RUST_BACKTRACE=0
# Fibers and Rust's statics hold memory until the end.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0

# Builds the test programs and prints the path of one.
program() {
    local name=$1
    shift
    cargo test --quiet --features cuda-emulation "$@" --no-run --message-format json |
        grep -o "\"executable\":\"[^\"]*/deps/$name-[^\"]*\"" | tail -1 | cut -d'"' -f4
}

under() {
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$@"
}

echo "== all kernels, address and undefined behaviour"
export CANDLE_NORM_SANITIZE=address,undefined
lib=$(program candle_norm --lib)
# The ladder takes ten minutes of a sanitized build; the fused tests pass through the same kernels.
skipped=()
[ "$short" != --short ] || skipped=(--skip every_kernel_runs_and_is_right)
under "$lib" cuda:: "${skipped[@]}"
if [ "$short" != --short ]; then
    suite=$(program suite --test suite)
    under "$suite"
fi

echo "== planted: a read beyond a tensor"
export CANDLE_NORM_FAULT=read
lib=$(program candle_norm --lib)
log=$(under "$lib" cuda::emulation 2>&1) && { echo "the fault was not seen" >&2; exit 1; }
grep -m 1 "AddressSanitizer: heap-buffer-overflow" <<<"$log" ||
    { echo "the read beyond a tensor was not seen" >&2; tail -20 <<<"$log" >&2; exit 1; }

echo "== planted: an output left unwritten"
unset CANDLE_NORM_SANITIZE
export CANDLE_NORM_FAULT=unwritten
lib=$(program candle_norm --lib)
log=$("$lib" cuda::emulation 2>&1) && { echo "the fault was not seen" >&2; exit 1; }
grep -m 1 "element 0 is NaN" <<<"$log" ||
    { echo "the unwritten output was not seen" >&2; tail -20 <<<"$log" >&2; exit 1; }
echo "sanitize: all right"
