#!/usr/bin/env bash
# The Rust side under tools that see what tests do not: reads of what nobody wrote, reads and writes beyond
# a buffer, races between threads.
#
#     ci/memory.sh --short      # valgrind over small tests, scalar and AVX2: what .ci/run does
#     ci/memory.sh memcheck     # valgrind over the suite and all tests of the kernels
#     ci/memory.sh address      # AddressSanitizer over all tests
#     ci/memory.sh thread       # ThreadSanitizer over all tests, the standard library built with it
#     ci/memory.sh miri         # Miri over the kernels of the scalar level and small calls with gradients
#
# What follows the mode goes to the test programs: `ci/memory.sh address distributed::`. Valgrind takes those of
# stable Rust. The others want a nightly (with rust-src for ThreadSanitizer, and miri for Miri), and a build of all
# dependencies of their own, in target/memory. Where the sources are those of stable Rust (`ci/arm.sh` says what may bring
# them), ThreadSanitizer takes that.
set -euo pipefail
cd "$(dirname "$0")/.."
# A tenth of the random cases: valgrind is 30 times slower, and every case takes the same paths.
export PROPTEST_CASES=${PROPTEST_CASES:-4} RAYON_NUM_THREADS=2 RUST_BACKTRACE=0
target=x86_64-unknown-linux-gnu

# Builds the tests and prints the path of one program. Outputs start as NaN where debug assertions are on; without
# them memcheck sees that nobody wrote an element.
unfilled=()
program() {
    local name=$1
    shift
    cargo test --quiet "${unfilled[@]}" "$@" --no-run --message-format json |
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
    local tool=$1
    shift
    # Leaks: rayon's pool and statics live until the end.
    export RUSTFLAGS="-Zsanitizer=$tool" ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1
    CARGO_TARGET_DIR=target/memory/$tool cargo "+${toolchain:-nightly}" test --target $target --lib --test suite "$@"
}

# Isolation: rayon asks how many CPUs there are. Leaks: its threads live until the end. Provenance and aliasing:
# crossbeam, below rayon, makes pointers of integers.
interpreted() {
    export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-permissive-provenance"
    export CANDLE_NORM_SIMD=scalar
    export PROPTEST_CASES=1 CARGO_TARGET_DIR=target/memory/miri
    cargo +nightly miri test --lib -- cpu::tests::parts
    cargo +nightly miri test --lib -- cpu::tests::kernels
    cargo +nightly miri test --test suite -- worked_example:: empty::
}

mode=${1:-} && shift || true
case "$mode" in
    --short) short ;;
    memcheck)
        unfilled=(--config profile.dev.package.candle-norm.debug-assertions=false)
        # Not those that take seconds as they are, and an hour here: more elements on the same ways. Nor process
        # groups, whose tests are of time.
        long=(distributed:: candle_nn_and_candle_norm_answer_alike same_bits_from_run_to_run very_long_sets)
        long+=(a_large_sample every_function_with_all far_from_zero_as_promised a_sample_is_independent)
        memcheck "$(program suite --test suite)" "${long[@]/#/--skip=}" "$@"
        # Optimized, which leaves outputs unfilled, too; without what goes through thousands of millions of numbers, or is of time.
        long=(activations_of_every what_a_thread_costs)
        memcheck "$(program candle_norm --lib --release)" cpu:: "${long[@]/#/--skip=}" "$@"
        ;;
    address) sanitized address -- "$@" ;;
    thread)
        if [ -e "$(rustc +stable --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock" ]; then
            toolchain=stable
            export RUSTC_BOOTSTRAP=1
        fi
        sanitized thread -Zbuild-std -- "$@"
        ;;
    miri) interpreted ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2 ;;
esac
echo "memory: all right"
