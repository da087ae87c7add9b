#!/usr/bin/env bash
# The round on a machine with a GPU, from the folder that gpu/pack.sh made:
#
#     gpu/round.sh                     all of it, in the order below
#     gpu/round.sh suite sanitizer     some of it
#     gpu/round.sh measure -- LayerNorm --rounds 3     with arguments of measure.py behind --
#     gpu/round.sh --dry-run           what can be done without a GPU: libraries, programs, scripts
#
#   suite      every test on the device
#   graphs     every op captured in a CUDA graph and replayed
#   sanitizer  compute-sanitizer over a short suite: memcheck, racecheck, initcheck, where installed
#   measure    candle-norm, candle-nn and PyTorch; results as CSV and chart
#
# Needs CUDA 13's libcudart, libcublas and libcurand (PyTorch's wheels have them) and, to measure,
# python3 with PyTorch. Results go to results/ beside this folder, or to the folder ROUND_OUT names.
set -uo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
out=${ROUND_OUT:-$here/results}
steps=() arguments=() dry=
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --) shift && arguments=("$@") && break ;;
        *) steps+=("$1") ;;
    esac
    shift
done
[ ${#steps[@]} -gt 0 ] || steps=(suite graphs sanitizer measure)
mkdir -p "$out"
failed=()

# Folders with CUDA's libraries: PyTorch's wheels, then the usual ones.
libraries() {
    python3 - <<'END' 2>/dev/null
import glob, os, sysconfig
for root in {sysconfig.get_paths()["purelib"], *(p for p in os.sys.path if p.endswith("-packages"))}:
    print("\n".join(glob.glob(os.path.join(root, "nvidia", "*", "lib"))))
END
    ls -d /usr/local/cuda/lib64 /usr/local/nvidia/lib64 2>/dev/null
}
LD_LIBRARY_PATH=$(libraries | paste -sd: -)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
# The suite reads tests/golden from here.
export CANDLE_NORM_TEST_DEVICE=cuda CARGO_MANIFEST_DIR=$here

# Reports what the programs would not find. A machine without a GPU lacks libcuda, which comes with
# the driver; nothing else may be missing.
check_programs() {
    local program missing
    for program in suite worker; do
        missing=$(ldd "$here/bin/$program" | awk '/not found/ { print $1 }')
        [ -n "$dry" ] && missing=$(echo "$missing" | grep -v '^libcuda\.so')
        if [ -n "$missing" ]; then
            echo "bin/$program lacks: $missing" && return 1
        fi
    done
    echo "bin/suite and bin/worker find their libraries"
}

suite() {
    # One thread: candle's stream is the thread's, and the tests share a device.
    (cd "$here" && bin/suite --test-threads=1 "$@")
}

# Counts of the short suite: it must not be empty because names have changed.
SHORT=(golden special)

sanitizer() {
    local tool status=0
    command -v compute-sanitizer >/dev/null || { echo "not measured: no compute-sanitizer here" && return 0; }
    for tool in memcheck racecheck initcheck; do
        echo "== compute-sanitizer $tool"
        (cd "$here" && PROPTEST_CASES=4 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            bin/suite --test-threads=1 "${SHORT[@]}") || status=1
    done
    return $status
}

run_step() {
    case "$1" in
        suite) suite ;;
        graphs) suite cuda_graph ;;
        sanitizer) sanitizer ;;
        measure) python3 "$here/gpu/measure.py" --worker "$here/bin/worker" --out "$out" "${arguments[@]}" ;;
        *) echo "round: no step $1" && return 2 ;;
    esac
}

dry_run() {
    case "$1" in
        suite) (cd "$here" && bin/suite --list >/dev/null 2>&1) && echo "lists tests" ||
            echo "bin/suite starts only where there is a driver" ;;
        graphs | sanitizer) echo "needs a GPU" ;;
        measure) python3 "$here/gpu/measure.py" --dry-run --out "$out" "${arguments[@]}" ;;
    esac
}

cat "$here/BUILD" 2>/dev/null
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory --format=csv 2>/dev/null ||
    echo "no GPU here"
check_programs || failed+=(programs)
for step in "${steps[@]}"; do
    echo "=== $step"
    start=$SECONDS
    if [ -n "$dry" ]; then dry_run "$step"; else run_step "$step"; fi 2>&1 | tee "$out/$step.log"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$step")
    echo "=== $step: $((SECONDS - start)) s"
done
[ ${#failed[@]} = 0 ] && echo "round: all of it passed: ${steps[*]}" || { echo "round: FAILED: ${failed[*]}" && exit 1; }
