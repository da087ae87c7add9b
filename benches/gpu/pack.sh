#!/usr/bin/env bash
# Builds the suite and the worker of the measurement for a machine with a GPU and no Rust, and packs
# them with all that the round needs into target/gpu/round.tar.gz:
#
#     benches/gpu/pack.sh
#
# CUDA_COMPUTE_CAP says for which GPU (default 90: H100, H200). The first build compiles candle's
# kernels, all but the quantized models' (ci/candle-nvcc.sh); target/cuda keeps them. On the other
# machine:
#
#     tar xzf round.tar.gz && OUT=/where/results/go round/round.sh
#
# Folders of VARIANTS (each with .cu files that replace those of cuda/) are compiled and go along:
#
#     VARIANTS="/path/one /path/two" benches/gpu/pack.sh
set -euo pipefail

cd "$(dirname "$0")/../.."
env=$(ci/cuda-toolkit.sh) && eval "$env"
export CARGO_TARGET_DIR=$PWD/target/cuda NVCC=$PWD/ci/candle-nvcc.sh

# The path of the executable that cargo reports for one target.
executable() {
    cargo build --release --features cuda --message-format=json-render-diagnostics "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

suite=$(executable --test suite)
worker=$(executable --bench gpu-worker)
norms=$(executable --bench norms)
blocks=$(executable --bench blocks)
for program in "$suite" "$worker" "$norms" "$blocks"; do
    [ -x "$program" ] || { echo "pack: cargo did not build all four programs" >&2 && exit 1; }
done

round=target/gpu/round
rm -rf "$round"
mkdir -p "$round/bin" "$round/tests" "$round/variants"
strip -o "$round/bin/suite" "$suite"
strip -o "$round/bin/worker" "$worker"
strip -o "$round/bin/norms" "$norms"
strip -o "$round/bin/blocks" "$blocks"
cp benches/gpu/*.py benches/gpu/*.sh benches/gpu/rows.tsv benches/gpu/README.md "$round/"
cp -r tests/golden "$round/tests/"
# Liger is pure Python (Triton comes with PyTorch). Unpacked: a part of it has no __init__.py, which Python finds in a
# folder and not in a wheel.
python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --target "$round/python" liger-kernel ||
    echo "pack: no wheel of Liger: it will take part only where it is installed"
for variant in ${VARIANTS:-}; do
    mkdir -p "$round/variants/$(basename "$variant")"
    for source in "$variant"/*.cu; do
        nvcc --cubin -std=c++17 -O3 -I"$variant" -Icuda --gpu-architecture="sm_$CUDA_COMPUTE_CAP" "$source" \
            -o "$round/variants/$(basename "$variant")/$(basename "$source" .cu).cubin"
    done
done
{
    git log -1 --format='commit %H'
    git status --porcelain --untracked-files=no | sed 's/^/changed: /'
    echo "capability $CUDA_COMPUTE_CAP"
    rustc --version
    nvcc --version | tail -n 1
} >"$round/BUILD"
tar -C target/gpu -czf target/gpu/round.tar.gz round
ls -l target/gpu/round.tar.gz
