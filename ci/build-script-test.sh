#!/usr/bin/env bash
# What build.rs says and does when CUDA is missing, incomplete or changed, with a pretended nvcc:
#
#     ci/build-script-test.sh path/to/build-script-build
#
# The program is the build script compiled with feature `cuda`
# (target/debug/build/candle-norm-*/build-script-build). Needs neither CUDA nor network; where CUDA_PATH
# names a toolkit, one kernel file is compiled in earnest as well.
set -euo pipefail

script=$(realpath "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# A crate folder with two kernels and a header, and a toolkit that writes its architecture into what it makes.
crate="$work/crate" toolkit="$work/toolkit"
mkdir -p "$crate/cuda" "$toolkit/bin" "$toolkit/include" "$work/out" "$work/bin"
touch "$crate/cuda/one.cu" "$crate/cuda/two.cu" "$crate/cuda/common.cuh"
touch "$toolkit/include/cuda.h" "$toolkit/include/cuda_fp16.h" "$toolkit/include/cuda_bf16.h"
cat >"$toolkit/bin/nvcc" <<'END'
#!/bin/sh
case "$1" in
    --version) echo "release 13.0"; exit ;;
    --list-gpu-code) printf 'sm_75\nsm_80\nsm_90\n'; exit ;;
esac
target=
for argument; do
    case "$argument" in
        --gpu-architecture=*) target=${argument#*=} ;;
        -gencode=*) target=${argument##*code=[} ;;
        *.cu | *.ptx) source=$argument ;;
    esac
    [ "$previous" = -o ] && output=$argument
    [ "$previous" = --output-directory ] && directory=$argument
    previous=$argument
done
stem=${source##*/}
case "$source" in
    *broken.ptx) echo "error: expected a ;" >&2 && exit 1 ;;
    *.ptx) echo "for $target" >"$output" ;;
    *) echo "$source" >>"$NVCC_LOG" && echo ".target $target" >"$directory/${stem%.cu}.ptx" ;;
esac
END
chmod +x "$toolkit/bin/nvcc"
for tool in sh cat printf env; do
    ln -s "$(command -v $tool)" "$work/bin/$tool"
done

# run VARIABLE=value..: the build script in an environment of these variables alone.
run() {
    : >"$work/nvcc.log"
    (cd "$crate" && env -i OUT_DIR="$work/out" NVCC_LOG="$work/nvcc.log" NUM_JOBS=2 RAYON_NUM_THREADS=1 \
        PATH="$work/bin" "$@" "$script") >"$work/said" 2>&1
}

# fails_with 'words' VARIABLE=value..: it fails, with these words, and not in a panic.
fails_with() {
    local words=$1
    shift
    if run "$@"; then
        echo "FAILED: no error where expected: $words" && failed=1
    elif ! grep -qF -- "$words" "$work/said" || grep -q panicked "$work/said"; then
        echo "FAILED: expected: $words" && cat "$work/said" && failed=1
    fi
}

# compiles 'files' VARIABLE=value..: it succeeds, and nvcc saw these files.
compiles() {
    local files=$1 seen
    shift
    run "$@" || { echo "FAILED: no success with $*" && cat "$work/said" && failed=1; }
    seen=$(sort "$work/nvcc.log" | tr '\n' ' ')
    [ "$seen" = "$files" ] || { echo "FAILED: compiled '$seen', expected '$files'" && failed=1; }
}

has() {
    grep -q -- "$1" "$2" || { echo "FAILED: no $1 in $2" && failed=1; }
}

fails_with "needs nvcc" CUDA_COMPUTE_CAP=90
fails_with "CUDA_PATH=$work/none" CUDA_COMPUTE_CAP=90 CUDA_PATH="$work/none"
fails_with "CUDA_COMPUTE_CAP is not set and nvidia-smi names no GPU" CUDA_PATH="$toolkit"
fails_with 'CUDA_COMPUTE_CAP names the compute capability "new"' CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=new
fails_with "does not compile for compute capability 70, only for sm_75, sm_80, sm_90" \
    CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=70
rm "$toolkit/include/cuda_bf16.h"
fails_with "needs the CUDA headers cuda.h, cuda_fp16.h, cuda_bf16.h" CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=90
touch "$toolkit/include/cuda_bf16.h"

both="cuda/one.cu cuda/two.cu "
compiles "$both" CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=90
has 'for sm_90,compute_90' "$work/out/two.fatbin"
has '"two", include_bytes!' "$work/out/kernels.rs"
has 'CANDLE_NORM_COMPUTE_CAP=90' "$work/said"
compiles "" CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=90
compiles "$both" CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=8.0
has 'for sm_80' "$work/out/one.fatbin"
echo "// changed" >>"$crate/cuda/common.cuh"
compiles "$both" CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=80
sleep 0.1 && touch "$crate/cuda/two.cu"
compiles "cuda/two.cu " CUDA_PATH="$toolkit" CUDA_COMPUTE_CAP=80
cat >"$work/bin/nvidia-smi" <<'END'
#!/bin/sh
echo 7.5
END
chmod +x "$work/bin/nvidia-smi"
compiles "$both" CUDA_HOME="$toolkit"
has 'for sm_75' "$work/out/one.fatbin"
touch "$crate/cuda/broken.cu"
fails_with "nvcc cannot assemble $work/out/broken.ptx" CUDA_HOME="$toolkit"
fails_with "expected a ;" CUDA_HOME="$toolkit"


earnest="nothing compiled in earnest: no CUDA_PATH"
if [ -x "${CUDA_PATH:-}/bin/nvcc" ]; then
    rm -rf "$crate/cuda" "$work/out" && mkdir "$crate/cuda" "$work/out"
    cp cuda/*.cuh cuda/combine_f32.cu "$crate/cuda/"
    (cd "$crate" && env -i OUT_DIR="$work/out" CUDA_PATH="$CUDA_PATH" CUDA_COMPUTE_CAP=90 \
        PATH="$CUDA_PATH/bin:/usr/bin:/bin" "$script") >"$work/said" 2>&1 || { cat "$work/said" && failed=1; }
    # A fat binary starts with this number and holds an ELF file.
    [ "$(head -c 4 "$work/out/combine_f32.fatbin" | od -An -tx4)" = " ba55ed50" ] &&
        grep -q ELF "$work/out/combine_f32.fatbin" ||
        { echo "FAILED: combine_f32.fatbin has no machine code" && failed=1; }
    has 'combine_f32.fatbin' "$work/out/kernels.rs"
    earnest="one compiled in earnest"
fi

[ "$failed" = 0 ] && echo "build.rs: 7 errors explained, 6 builds as expected, $earnest"
exit "$failed"
