#!/usr/bin/env bash
# Builds and measures this crate against a candle-core that keeps a node's first gradient instead of
# adding it to zeros:
#
#     benches/patched-candle.sh                      # only makes the patched candle-core, and says how to use it
#     benches/patched-candle.sh bench -- LayerNorm   # `cargo bench -- LayerNorm` with it
#
# candle 0.11's backward answers every gradient with a tensor of zeros and an addition, on one thread.
# candle's pull requests 3822 and 3578 remove both; until a release has them, this does the same to a copy
# of the published source, in target/patched-candle/candle-core. Cargo.lock stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=$PWD/target/patched-candle

published() {
    local manifest
    manifest=$(cargo metadata --format-version 1 --locked |
        grep -oE '"manifest_path":"[^"]*/candle-core-[0-9][^"/]*/Cargo.toml"' | cut -d'"' -f4 | head -n1)
    [ -n "$manifest" ] || { echo "no candle-core from a registry among this crate's dependencies" >&2; exit 1; }
    dirname "$manifest"
}

# Where a gradient is added to (or taken from) what `or_insert` made, it is handed to `accumulate` instead.
# Sites that do something else with the zeros, such as scatter_add, keep them.
patch_backprop() {
    perl -0777 -i -pe '
        my $sites = 0;
        while (s/let (\w+) = grads\.or_insert\((\w+)\)\?;\n((?:(?!or_insert|\*\1 = ).)*?)\*\1 = \1\.(add|sub)\(([^\n]*)\)\?;?\n/
                my ($sum, $to, $between, $op, $gradient) = ($1, $2, $3, $4, $5);
                $gradient =~ s{\b$sum\b}{$to}g;
                $between =~ s{\b$sum\b}{$to}g;
                $between =~ s{^\s+}{};
                $gradient .= ".neg()?" if $op eq "sub";
                $sites++;
                "${between}grads.accumulate($to, $gradient)?;\n"
            /se) {}
        s/(    fn or_insert\(&mut self)/    fn accumulate(&mut self, tensor: &Tensor, gradient: &Tensor) -> Result<()> {
        let sum = match self.0.get(&tensor.id()) {
            Some(sum) => sum.add(gradient)?,
            \/\/ Laid out as a sum would be.
            None if (gradient.shape(), gradient.dtype()) == (tensor.shape(), tensor.dtype()) => gradient.contiguous()?,
            \/\/ The error that a sum would give.
            None => tensor.zeros_like()?.add(gradient)?,
        };
        self.0.insert(tensor.id(), sum);
        Ok(())
    }

$1/ or die "no or_insert";
        $sites >= 60 or die "only $sites places look as they do in candle-core 0.11.1";
        print STDERR "candle-core patched: $sites gradients are handed on without zeros\n";
    ' "$1"
}

make_candle() {
    local from
    from=$(published)
    if [ "$(cat "$out/from" 2>/dev/null)" != "$from $(cksum <"$root/benches/patched-candle.sh")" ]; then
        rm -rf "$out/candle-core"
        mkdir -p "$out"
        cp -r "$from" "$out/candle-core"
        chmod -R u+w "$out/candle-core"
        patch_backprop "$out/candle-core/src/backprop.rs"
        echo "$from $(cksum <"$root/benches/patched-candle.sh")" >"$out/from"
    fi
}

# Cargo notes a patch in Cargo.lock: this crate's files, but a lock of their own.
make_crate() {
    mkdir -p "$out/crate"
    local file
    for file in "$root"/*; do
        case ${file##*/} in
        target | Cargo.lock) ;;
        *) ln -sfn "$file" "$out/crate/${file##*/}" ;;
        esac
    done
    cp "$root/Cargo.lock" "$out/crate/Cargo.lock"
}

make_candle
if [ $# = 0 ]; then
    printf 'In Cargo.toml of the program (not of a library):\n\n[patch.crates-io]\ncandle-core = { path = "%s" }\n' \
        "$out/candle-core"
    exit
fi
make_crate
cd "$out/crate"
# What both candles have in common is compiled once.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
export CANDLE_NORM_BENCH_OUT=${CANDLE_NORM_BENCH_OUT:-$out/norms}
exec cargo --config "patch.crates-io.candle-core.path='$out/candle-core'" "$@"
