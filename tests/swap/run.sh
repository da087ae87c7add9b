#!/usr/bin/env bash
# Compiles all of candle-transformers against candle-norm and compares models with candle-nn's.
#
# The published sources come, twice: once with candle-nn replaced by nn-ours (candle-norm's
# norms), once by nn-reference (candle-nn's, on the path that has gradients). Beside that, in both,
# a run in f64 must not round to f32 in the middle: `DType::F32` and constants in f32 become the dtype
# of the run (so does MMDiT's f16), which without such a run is f32 as before. And, in ours, the one
# call that an import cannot replace: Conv2d::absorb_bn in FastViT.
#
# Needs cargo and the network. Arguments: parts of models' names, for those alone; `--seed N` for other weights;
# `--variables` for the gradients of each variable, the dozen furthest apart. `--fused`, the first: the two models of
# docs/fusing.md with its changes.
set -eu
cd "$(dirname "$0")"
version=0.11.1
if [ ! -f zoo/made ] || [ run.sh -nt zoo/made ]; then
    rm -rf zoo
    mkdir -p zoo/fetch/src
    cat > zoo/fetch/Cargo.toml <<END
[package]
name = "fetch"
version = "0.0.0"
edition = "2021"
[workspace]
[dependencies]
candle-transformers = "=$version"
END
    touch zoo/fetch/src/lib.rs
    cp ../../Cargo.lock zoo/fetch/Cargo.lock 2>/dev/null || true
    # One manifest path to a line, of which one is the crate's.
    source=$(cargo metadata --format-version 1 --manifest-path zoo/fetch/Cargo.toml | tr ',' '\n' |
        sed -n "s|.*\"manifest_path\":\"\(.*/candle-transformers-$version\)/Cargo.toml\".*|\1|p" | head -1)
    [ -n "$source" ] || { echo "candle-transformers $version is not where cargo says" >&2; exit 1; }
    for zoo in ours reference; do
        cp -R "$source" "zoo/$zoo"
        chmod -R u+w "zoo/$zoo"
        rm -rf "zoo/$zoo/tests"
        sed -i.orig -e "s/^name = \"candle-transformers\"/name = \"zoo-$zoo\"/" \
            -e "/^\[\[test\]\]/,/^path = /d" \
            -e "/^\[dependencies.candle-nn\]/,/^version/c\\
[dependencies.candle-nn]\\
package = \"nn-$zoo\"\\
path = \"../../nn-$zoo\"" "zoo/$zoo/Cargo.toml"
        # Not in constants and in patterns; what Rust reads as f32 is made that first.
        find "zoo/$zoo/src" -name '*.rs' -exec sed -i -E \
            -e '/const .*DType::F32|DType::F32 *=>/!s/(candle::)?DType::F32/candle_nn::working_dtype()/g' \
            -e 's/\b(candle::)?Tensor::(new|from_vec|from_slice|arange|arange_step|full)\(/candle_nn::tensor::\2(/g' \
            -e 's/\.to_(vec[0-3]|scalar)::<f32>\(\)/.to_dtype(candle::DType::F32)?&/g' {} +
        # Configurations whose fields nobody outside can set, and so without small sizes.
        sed -i 's/^    pub(crate) /    pub /' "zoo/$zoo/src/models/"{mpt,yi}.rs
        sed -i -E '/^pub struct LlamaConfig/,/^}/s/^    ([a-z_]+:)/    pub \1/' "zoo/$zoo/src/models/csm.rs"
        sed -i 's/candle::DType::F16/candle_nn::working_dtype()/' "zoo/$zoo/src/models/mmdit/embedding.rs"
        sed -i '1i #![allow(unused_imports)]' "zoo/$zoo/src/lib.rs"
    done
    sed -i.orig 's/\.absorb_bn(/.fold_batch_norm(/; s/^use candle_nn::{/use candle_nn::{FoldBatchNorm, /' \
        zoo/ours/src/models/fastvit.rs
    printf '\n[dependencies.candle-norm]\npath = "../../../.."\n' >> zoo/ours/Cargo.toml
    [ -f Cargo.lock ] || cp zoo/fetch/Cargo.lock Cargo.lock
    touch zoo/made
fi
[ "${1:-}" = --prepare ] && exit
if [ "${1:-}" = --fused ]; then
    shift
    awk '/^```diff/ { on = 1; next } /^```/ { on = 0 } on' ../../docs/fusing.md > zoo/fused.diff
    patch --directory=zoo/ours --strip=1 --forward < zoo/fused.diff
    trap 'patch --directory=zoo/ours --strip=1 --reverse < zoo/fused.diff' EXIT
    set -- "$@" llama stable_diffusion
fi
cargo run --quiet -- "$@"
