#!/usr/bin/env bash
# An nvcc that makes empty outputs, for checks that only compile Rust:
#
#     NVCC=ci/nvcc-empty.sh cargo clippy --features cuda
#
# candle's own kernels take nvcc more than ten minutes and are included as text; a check of our Rust
# needs none of them. candle's build script honours NVCC; ours takes nvcc from PATH and compiles in
# earnest. Nothing linked against these outputs can run.
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
        --version | --list-gpu-code | --list-gpu-arch) exec nvcc "$@" ;;
        *.cu) sources+=("$argument") ;;
    esac
    previous=$argument
done

if [ -n "$output" ]; then
    : >"$output"
fi
for source in "${sources[@]}"; do
    if [ -n "$directory" ]; then
        : >"$directory/$(basename "${source%.cu}").ptx"
    fi
done
