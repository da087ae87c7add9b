#!/usr/bin/env bash
# Everything about CUDA that can be checked without a GPU, with the time each step takes:
#
#     ci/cuda.sh
#
# Installs the toolkit of ci/cuda-toolkit.sh on its first run. The Rust is checked with candle's kernels and
# ours left empty (CANDLE_KERNELS=none in ci/candle-nvcc.sh), in a target folder of its own: lints read no
# machine code. ci/registers.sh compiles ours in earnest.
set -euo pipefail

cd "$(dirname "$0")/.."
env=$(ci/cuda-toolkit.sh) && eval "$env"
export CARGO_TARGET_DIR=$PWD/target/cuda-check NVCC=$PWD/ci/candle-nvcc.sh CANDLE_KERNELS=none

# Our build script takes nvcc from PATH.
empty=$CARGO_TARGET_DIR/empty
mkdir -p "$empty"
printf '#!/usr/bin/env bash\nPATH=%q exec %q "$@"\n' "$PATH" "$NVCC" >"$empty/nvcc"
chmod +x "$empty/nvcc"

timed() {
    local start=$SECONDS
    "$@"
    echo "== $((SECONDS - start)) s: $*"
}

lint() {
    PATH="$empty:$PATH" cargo clippy --quiet "$@" -- -D warnings
}
timed lint --features cuda --all-targets
timed lint --features nccl --lib
# The build script that has the cuda feature: the newest one, made by the lines above.
script=$(ls -t "$CARGO_TARGET_DIR"/debug/build/candle-norm-*/build-script-build | head -n 1)
timed ci/build-script-test.sh "$script"
timed ci/registers.sh
# The plans of the benchmark's rows, from the build that the emulation's tests made.
plans() {
    env -u CARGO_TARGET_DIR CANDLE_NORM_PLANS="$PWD/target/plans.txt" \
        cargo test --quiet --features cuda-emulation --lib plans_of_the_rows
}
timed plans
timed python3 ci/roofline.py
