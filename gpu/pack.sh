#!/usr/bin/env bash
# Builds the suite and the worker of the measurement for a machine with a GPU and no Rust, and packs
# them with all that the round needs into target/gpu/round.tar.xz:
#
#     gpu/pack.sh
#
# CUDA_COMPUTE_CAP says for which GPU (default 90: H100, H200). The first build compiles candle's
# kernels, all but the quantized models' (ci/candle-nvcc.sh); target/cuda keeps them. On the other
# machine:
#
#     tar xf round.tar.xz && round/gpu/round.sh
set -euo pipefail

cd "$(dirname "$0")/.."
env=$(ci/cuda-toolkit.sh) && eval "$env"
export CARGO_TARGET_DIR=$PWD/target/cuda NVCC=$PWD/ci/candle-nvcc.sh

# The path of the executable that cargo reports for one target.
executable() {
    cargo build --release --features cuda --message-format=json-render-diagnostics "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

suite=$(executable --test suite)
worker=$(executable --bench gpu-worker)
[ -x "$suite" ] && [ -x "$worker" ] || { echo "pack: cargo built no suite or no worker" >&2 && exit 1; }

round=target/gpu/round
rm -rf "$round"
mkdir -p "$round/bin" "$round/tests"
strip -o "$round/bin/suite" "$suite"
strip -o "$round/bin/worker" "$worker"
cp -r gpu "$round/"
cp -r tests/golden "$round/tests/" 2>/dev/null || true
{
    git log -1 --format='commit %H'
    git status --porcelain --untracked-files=no | sed 's/^/changed: /'
    echo "capability $CUDA_COMPUTE_CAP"
    rustc --version
    nvcc --version | tail -n 1
} >"$round/BUILD"
tar -C target/gpu -cJf target/gpu/round.tar.xz round
ls -l target/gpu/round.tar.xz
