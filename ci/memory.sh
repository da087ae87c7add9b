#!/usr/bin/env bash
# The Rust side under tools that see what tests do not: reads of what nobody wrote, reads and writes beyond
# a buffer, races between threads.
#
#     ci/memory.sh --short      # valgrind over small tests, scalar and AVX2: what .ci/run does
#     ci/memory.sh memcheck     # valgrind over all tests of the kernels, and the suite
#     ci/memory.sh address      # AddressSanitizer over all tests
#     ci/memory.sh thread       # ThreadSanitizer over all tests
#
# Valgrind takes the test programs as they are. The sanitizers want a nightly compiler, or a stable one told
# that it is (RUSTC_BOOTSTRAP), and a build of all dependencies of their own, in target/memory.
set -euo pipefail
cd "$(dirname "$0")/.."
# A tenth of the random cases: valgrind is 30 times slower, and every case takes the same paths.
export PROPTEST_CASES=${PROPTEST_CASES:-4} RAYON_NUM_THREADS=2 RUST_BACKTRACE=0
target=x86_64-unknown-linux-gnu

# Builds the tests and prints the path of one program.
program() {
    local name=$1
    shift
    cargo test --quiet "$@" --no-run --message-format json |
        grep -o "\"executable\":\"[^\"]*/deps/$name-[^\"]*\"" | tail -1 | cut -d'"' -f4
}

# A level that this machine lacks is named, not run.
levels() {
    echo scalar
    if grep -q avx2 /proc/cpuinfo; then echo avx2; else echo "memory: no AVX2 here" >&2; fi
}

# Undefined values that reach a branch, an address or a system call, and accesses beyond a block, are errors.
memcheck() {
    local program=$1 level
    shift
    for level in $(levels); do
        echo "== memcheck, $level: $(basename "$program") $*"
        CANDLE_NORM_SIMD=$level valgrind --quiet --error-exitcode=9 --leak-check=no --fair-sched=yes \
            "$program" --quiet --test-threads 1 "$@"
    done
}

# Tests that take a second as they are: every kernel on small shapes, and small calls through the whole crate.
short() {
    memcheck "$(program candle_norm --lib)" cpu::tests::kernels::f32_small cpu::tests::kernels::f16_small
    memcheck "$(program suite --test suite)" empty:: worked_example:: random::
}

sanitized() {
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=$1 ${2:-}" CARGO_TARGET_DIR=target/memory/$1
    # Leaks: rayon's pool and statics live until the end.
    export ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS="suppressions=$PWD/ci/tsan.txt halt_on_error=1"
    cargo test --target $target --lib --test suite
}

case "${1:-}" in
    --short) short ;;
    memcheck)
        memcheck "$(program candle_norm --lib)" cpu::
        # Time is not what is tested here: tests that measure it are left out.
        memcheck "$(program suite --test suite)" --skip distributed:: --skip fuzzed::corpus
        ;;
    address) sanitized address ;;
    # The standard library is not instrumented, and the two may be linked all the same: what it
    # synchronizes by itself is in ci/tsan.txt.
    thread) sanitized thread -Cunsafe-allow-abi-mismatch=sanitizer ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2 ;;
esac
echo "memory: all right"
