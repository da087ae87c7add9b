#!/usr/bin/env bash
# Compiles all of candle-transformers against candle-norm and compares models with candle-nn's.
#
# The sources come from crates.io, twice: once with candle-nn replaced by nn-ours (candle-norm's
# norms), once by nn-reference (candle-nn's, on the path that has gradients). Nothing else in them
# changes, but for the one call that an import cannot replace, Conv2d::absorb_bn in FastViT.
# Needs cargo and the network; takes minutes.
set -eu
cd "$(dirname "$0")"
version=0.11.1
rm -rf zoo
mkdir -p zoo/fetch/src
cat > zoo/fetch/Cargo.toml <<EOF
[package]
name = "fetch"
version = "0.0.0"
edition = "2021"
[workspace]
[dependencies]
candle-transformers = "=$version"
EOF
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
done
sed -i.orig 's/\.absorb_bn(/.fold_batch_norm(/; s/^use candle_nn::{/use candle_nn::{FoldBatchNorm, /' \
    zoo/ours/src/models/fastvit.rs
[ -f Cargo.lock ] || cp zoo/fetch/Cargo.lock Cargo.lock
cargo run --quiet "$@"
