#!/usr/bin/env bash
# Prints a shared library of the mimalloc that Rust's crate `mimalloc` links, for LD_PRELOAD: so PyTorch's
# process has the allocator that one line of `main` gives a Rust program. Needs a C compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$PWD/target/mimalloc
if [ ! -f "$out/libmimalloc.so" ]; then
    mkdir -p "$out/src"
    printf '[package]\nname = "fetched"\nversion = "0.0.0"\n[dependencies]\nmimalloc = "=0.1.52"\n[workspace]\n' >"$out/Cargo.toml"
    : >"$out/src/lib.rs"
    manifest=$(cargo metadata --format-version 1 --manifest-path "$out/Cargo.toml" |
        grep -oE '"manifest_path":"[^"]*/libmimalloc-sys-[^"/]*/Cargo.toml"' | cut -d'"' -f4)
    source=$(dirname "$manifest")/c_src/mimalloc/v3
    cc -shared -fPIC -O2 -DNDEBUG -DMI_MALLOC_OVERRIDE -I"$source/include" "$source/src/static.c" \
        -o "$out/libmimalloc.so" -lpthread
fi
echo "$out/libmimalloc.so"
