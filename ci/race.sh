#!/usr/bin/env bash
# The emulated CUDA kernels with every access watched (cuda/emulation/race.cpp): races of shared memory
# in a block and a cluster and of global memory between blocks, accesses beyond the tensors, inputs read
# more often than the plan says, outputs not written exactly once; fibers in several orders; faults
# planted to see that they are caught; products and sums contracted, as nvcc does. And the bytes that the
# rows of the GPU benchmark move, against cuda/traffic.txt.
#
#     ci/race.sh             # every kernel of the ladder in three orders, the whole suite in two
#     ci/race.sh --short     # every kernel in one order, without the suite
#     ci/race.sh --update    # the bytes that the rows move, into cuda/traffic.txt
#
# Needs a C++ compiler; g++ and clang++ both put the calls in.
set -euo pipefail

cd "$(dirname "$0")/.."
mode=${1:-}
export CANDLE_NORM_RACE=1 RUST_BACKTRACE=0

program() {
    cargo test --quiet --features cuda-emulation "${@:2}" --no-run --message-format json |
        grep -o "\"executable\":\"[^\"]*/deps/$1-[^\"]*\"" | tail -1 | cut -d'"' -f4
}

lib=$(program candle_norm --lib)
plans=$PWD/target/plans.json
tests=cuda::emulation
[ "$mode" != --update ] || tests=ledger
echo "== every kernel, order 1"
CANDLE_NORM_EMULATION_SEED=1 CANDLE_NORM_LEDGER=$plans "$lib" --quiet "$tests"
python3 ci/traffic.py "$plans" "$@"
[ "$mode" = "" ] || exit 0
for seed in 0 2; do
    echo "== every kernel, order $seed"
    CANDLE_NORM_EMULATION_SEED=$seed "$lib" --quiet cuda::emulation
done
suite=$(program suite --test suite)
for seed in 0 3; do
    echo "== the suite, order $seed"
    CANDLE_NORM_EMULATION_SEED=$seed "$suite" --quiet
done
echo "race: none"
