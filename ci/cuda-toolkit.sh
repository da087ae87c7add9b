#!/usr/bin/env bash
# Puts a CUDA 13.0 toolkit from PyPI into target/cuda-toolkit and prints its environment:
#
#     env=$(ci/cuda-toolkit.sh) && eval "$env"
#
# Apart from build.rs, which takes whatever toolkit it is shown. A machine without CUDA (and without
# a GPU) can so compile the kernels, check the crate and link its tests. Needs python3 with venv and
# network, 3 GB of disk. A second run finds everything in place and only prints.
#
# CUDA_COMPUTE_CAP of the caller is kept; the default is 90.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${CANDLE_NORM_CUDA_TOOLKIT:-$root/target/cuda-toolkit}

# 13.0 throughout: a driver of 13.0 does not load the PTX of a later nvcc. cuBLAS, cuRAND and NCCL
# are the ones PyTorch 2.11 brings, so that a machine with PyTorch has what our programs load.
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-nccl-cu13==2.28.9
)
stamp="$cache/$(printf '%s\n' "${wheels[@]}" | sha256sum | cut -c1-16).done"

install() {
    rm -rf "$cache"
    mkdir -p "$cache"
    python3 -m venv "$cache/python"
    # --no-deps: the list is complete, and pip would otherwise move to later versions.
    "$cache/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --no-deps "${wheels[@]}"
    local site
    site=$(echo "$cache"/python/lib/python3*/site-packages/nvidia)
    ln -sfn "$site/cu13" "$cache/cuda"
    ln -sfn "$site/nccl" "$cache/nccl"
    complete "$cache/cuda" "$cache/nccl"
    touch "$stamp"
}

# Adds what the wheels lack to be a toolkit one can link with.
complete() {
    local cuda=$1 nccl=$2 lib versioned
    for lib in cudart cublas cublasLt curand nvrtc; do
        versioned=$(cd "$cuda/lib" && ls | grep -E "^lib$lib\.so\.[0-9]+$" | head -n 1)
        ln -sfn "$versioned" "$cuda/lib/lib$lib.so"
    done
    ln -sfn libnccl.so.2 "$nccl/lib/libnccl.so"
    ln -sfn lib "$cuda/lib64"
    # The driver's library comes with a driver. This one has its soname and the name of every function
    # of cuda.h, and so does for linking; only for that.
    mkdir -p "$cuda/lib/stubs"
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$cuda/include/cuda.h" | sort -u |
        sed 's/.*/void &(void) {}/' |
        ${CC:-cc} -shared -nostdlib -Wl,-soname,libcuda.so.1 -x c - -o "$cuda/lib/stubs/libcuda.so"
}

if [ ! -e "$stamp" ]; then
    install >&2
fi

# The disassembler: any of 13 reads what the compiler of 13.0 writes, and 13.0 has none on PyPI.
if [ ! -e "$cache/cuda/bin/nvdisasm" ]; then
    "$cache/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --no-deps nvidia-cuda-nvdisasm==13.2.78 >&2
fi

cuda="$cache/cuda"
libs="$cuda/lib:$cuda/lib/stubs:$cache/nccl/lib"
cat <<END
export CUDA_HOME='$cuda' CUDA_PATH='$cuda' CUDA_ROOT='$cuda'
export PATH='$cuda/bin':"\$PATH"
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export LIBRARY_PATH='$libs'\${LIBRARY_PATH:+:\$LIBRARY_PATH}
END
