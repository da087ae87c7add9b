#!/usr/bin/env bash
# Everything about CUDA that can be checked without a GPU, with the time each step takes:
#
#     ci/cuda.sh
#
# Installs the toolkit of ci/cuda-toolkit.sh on its first run. The Rust is checked with candle's own
# kernels left empty (CANDLE_KERNELS=none in ci/candle-nvcc.sh), in a target folder of its own; ours are compiled in earnest.
set -euo pipefail

cd "$(dirname "$0")/.."
env=$(ci/cuda-toolkit.sh) && eval "$env"
export CARGO_TARGET_DIR=$PWD/target/cuda-check NVCC=$PWD/ci/candle-nvcc.sh CANDLE_KERNELS=none

timed() {
    local start=$SECONDS
    "$@"
    echo "== $((SECONDS - start)) s: $*"
}

timed cargo clippy --quiet --features cuda --all-targets -- -D warnings
timed cargo clippy --quiet --features nccl --lib -- -D warnings
# The build script that has the cuda feature: the newest one, made by the lines above.
script=$(ls -t "$CARGO_TARGET_DIR"/debug/build/candle-norm-*/build-script-build | head -n 1)
timed ci/build-script-test.sh "$script"
timed ci/registers.sh
