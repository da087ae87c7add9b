#!/usr/bin/env bash
# An nvcc for candle's own kernels that leaves out what we never run:
#
#     NVCC=ci/candle-nvcc.sh cargo build --features cuda
#     CANDLE_KERNELS=none NVCC=ci/candle-nvcc.sh cargo clippy --features cuda
#
# candle's build script honours NVCC; ours takes nvcc from PATH and compiles in earnest. candle's
# kernels for quantized models take nvcc most of ten minutes. Here their functions abort when called,
# and the rest is compiled as usual. With CANDLE_KERNELS=none nothing of candle's is compiled, which
# checks of Rust code do not notice; programs linked so cannot run.
set -euo pipefail

output=
directory=
sources=()
previous=
for argument in "$@"; do
    case "$previous" in
        -o) output=$argument ;;
        --output-directory) directory=$argument ;;
    esac
    case "$argument" in
        --ptx | --version | --list-gpu-code | --list-gpu-arch)
            if [ "$argument" != --ptx ] || [ "${CANDLE_KERNELS:-}" != none ]; then
                exec nvcc "$@"
            fi
            ;;
        --lib)
            library=1
            ;;
        *.cu) sources+=("$argument") ;;
    esac
    previous=$argument
done

if [ -n "${library:-}" ]; then
    # The folder is candle-kernels'; its declarations name every function that Rust calls.
    sed -n 's/^ *pub fn \([a-z_A-Z0-9]*\)(.*/void \1(void) { __builtin_trap(); }/p' src/ffi.rs |
        ${CC:-cc} -fPIC -x c -c - -o "$output.o"
    rm -f "$output"
    ar crs "$output" "$output.o"
elif [ -n "$output" ]; then
    : >"$output"
fi
for source in "${sources[@]}"; do
    if [ -n "$directory" ]; then
        : >"$directory/$(basename "${source%.cu}").ptx"
    fi
done
