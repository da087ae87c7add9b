#!/usr/bin/env bash
# The library's tests and the suite on AArch64, whose level is NEON, under qemu where this machine is another:
#
#     ci/arm.sh            # or words that cargo test takes: ci/arm.sh precision
#
# Needs on another machine qemu-user and a cross compiler (Debian: qemu-user g++-aarch64-linux-gnu), and the standard
# library for AArch64: rustup's, or else one that is built from the sources of this very Rust, in lib/rustlib/src/rust
# below `rustc --print sysroot`: rustup's rust-src, or usr/src/rustc-VERSION of Debian's package of that name.
# Right or wrong is what it says; nothing about time.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
std=()
if [ "$(uname -m)" != aarch64 ]; then
    if ! rustup target add $target; then
        export RUSTC_BOOTSTRAP=1
        std=(-Zbuild-std)
    fi
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # Of tests that start processes of their own, too.
    export CANDLE_NORM_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$CANDLE_NORM_RUNNER
    export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
fi
# A build folder of its own: dependencies are built for this machine and that one.
export CARGO_TARGET_DIR=$PWD/target/arm PROPTEST_CASES=${PROPTEST_CASES:-16}
# Time is not what is tested under an emulator.
cargo test "${std[@]}" --target $target --lib --test suite -- "$@"
