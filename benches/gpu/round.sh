#!/usr/bin/env bash
# The round on a machine with a GPU, from the folder that benches/gpu/pack.sh made:
#
#     round/round.sh                     all steps in order
#     round/round.sh suite graphs        some of them
#     round/round.sh layer -- --rounds 3     with arguments of measure.py behind --
#     round/round.sh --dry-run           what can be done without a GPU; needs Python alone
#
#   suite      every test on the device, in processes side by side
#   graphs     every op captured in a CUDA graph and replayed
#   layer      candle-norm, candle-nn, PyTorch and others: layer and RMS norm
#   channels   the same: group, instance and batch norm
#   bench      cargo bench --bench norms: beside candle-nn alone
#   blocks     cargo bench --bench blocks: blocks of models and whole models
#   ncu        what Nsight Compute counts in the kernels of some rows (ncu.py), where it is installed
#   variants   kernels in variants/*/ and workers/* against the compiled ones (variants.py)
#   sanitizer  compute-sanitizer over a short suite: memcheck, racecheck, initcheck, where installed
#
# Each step has a time limit of its own, below nine minutes, so that it fits a call of ten, and leaves
# files of its own in $OUT (or results/): a step that is cut short or fails spoils no other. A row whose
# results are wrong is recorded as such, and the others are measured.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$here/results}
declare -A limit=([suite]=420 [graphs]=90 [layer]=520 [channels]=520 [bench]=300 [blocks]=300 [ncu]=400 [variants]=400 [sanitizer]=520)
all=(suite graphs layer channels bench blocks ncu variants sanitizer)
steps=() arguments=() dry=
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=1 ;;
        --) shift && arguments=("$@") && break ;;
        *) [ -n "${limit[$1]:-}" ] || { echo "round: no step $1, but ${all[*]}" >&2 && exit 2; }; steps+=("$1") ;;
    esac
    shift
done
[ ${#steps[@]} -gt 0 ] || steps=("${all[@]}")
mkdir -p "$out"
failed=()

# Folders with CUDA's libraries: PyTorch's wheels, then the usual ones.
libraries() {
    python3 - <<'END' 2>/dev/null
import glob, os, sys, sysconfig
for root in {sysconfig.get_paths()["purelib"], *(p for p in sys.path if p.endswith("-packages"))}:
    print("\n".join(glob.glob(os.path.join(root, "nvidia", "*", "lib"))))
END
    ls -d /usr/local/cuda/lib64 /usr/local/nvidia/lib64 2>/dev/null
}
LD_LIBRARY_PATH=$(libraries | paste -sd: -)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
# Packages carried along.
export PYTHONPATH=$here/python${PYTHONPATH:+:$PYTHONPATH}
# The suite reads tests/golden from here.
export CANDLE_NORM_TEST_DEVICE=cuda CARGO_MANIFEST_DIR=$here
# candle captures a backtrace with every error, and printing one resolves it through CUDA's libraries: seconds
# for each of the hundreds of errors that the suite asks for.
export RUST_BACKTRACE=0 RUST_LIB_BACKTRACE=0

# Reports what the programs would not find. A machine without a GPU lacks libcuda, which comes with
# the driver, and one without PyTorch the rest of CUDA.
check_programs() {
    local program missing status=0
    for program in suite worker norms blocks; do
        [ -x "$here/bin/$program" ] || { echo "no bin/$program" && status=1 && continue; }
        missing=$(ldd "$here/bin/$program" | awk '/not found/ { print $1 }' | paste -sd' ' -)
        [ -z "$missing" ] || { echo "bin/$program lacks: $missing" && status=1; }
    done
    [ $status = 0 ] && echo "the programs find their libraries"
    [ -n "$dry" ] || return $status
}

# Tests in one process. One that does not come back is named, and those behind it run in another process.
shard() {
    local log=$1 hung
    shift
    while [ $# -gt 0 ]; do
        timeout --kill-after=5 150 bin/suite --test-threads=1 --show-output --exact "$@" >>"$log" 2>&1 && return 0
        # A process that ends by itself has run all of its tests.
        hung=$(tail -n 1 "$log" | sed -n 's/^test \([^ ]*\) \.\.\. *$/\1/p')
        [ -n "$hung" ] || return 1
        printf '\nsuite: %s did not come back\n' "$hung" | tee -a "$log"
        # The tests run in this order.
        while [ $# -gt 0 ] && [ "$1" != "$hung" ]; do shift; done
        [ $# -eq 0 ] || shift
    done
    return 1
}

# In a process the tests share candle's stream and run one after the other; most of their time is the
# host's, which computes what is expected, so that every core has a process and a share of the tests.
suite() {
    local tests shards number log status=0 jobs=()
    cd "$here" || return 1
    bin/suite --list --format terse "$@" | sed -n 's/: test$//p' >"$out/suite-tests"
    tests=$(wc -l <"$out/suite-tests")
    shards=$(nproc)
    for ((number = 0; number < shards && number < tests; number++)); do
        # shellcheck disable=SC2046
        shard "$out/suite-$number.log" $(awk "NR % $shards == $number" "$out/suite-tests") &
        jobs+=($!)
    done
    for number in "${jobs[@]}"; do wait "$number" || status=1; done
    for log in "$out"/suite-*.log; do
        sed -n '/^failures:$/,$p' "$log" | grep -A 30 '^---- '
    done
    echo "suite: what candle cannot do on this device, so that tests leave it out:"
    grep -h '^not run' "$out"/suite-*.log | sed 's/; [0-9]* calls.*//' | sort | uniq -c
    grep -h '^test result' "$out"/suite-*.log | awk '{ ok += $4; bad += $6; ignored += $8 }
        END { printf "suite: %d of %d tests passed, %d failed, %d ignored\n", ok, ok + bad, bad, ignored }'
    echo "suite: $tests tests listed, $(cat "$out"/suite-*.log | grep -c '^test .* ok$') ok"
    cat "$out"/suite-*.log | gzip >"$out/suite.txt.gz" && rm -f "$out"/suite-*.log
    return $status
}

measure() {
    python3 "$here/measure.py" --worker "$here/bin/worker" --out "$out" "$@"
}

ncu_kernels() {
    command -v ncu >/dev/null || { echo "not measured: no ncu here" && return 0; }
    python3 "$here/ncu.py" --worker "$here/bin/worker" --out "$out" "$@"
}

# Parts of the suite that reach most kernels in little time, under the tools side by side.
SHORT=(golden special very_long half_precision)
sanitizer() {
    local tool status=0 jobs=()
    command -v compute-sanitizer >/dev/null || { echo "not measured: no compute-sanitizer here" && return 0; }
    for tool in memcheck racecheck initcheck synccheck; do
        (cd "$here" && PROPTEST_CASES=4 timeout 160 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            bin/suite --test-threads=1 "${SHORT[@]}") >"$out/sanitizer-$tool.log" 2>&1 &
        jobs+=("$tool:$!")
    done
    for tool in "${jobs[@]}"; do
        wait "${tool#*:}" || status=1
        echo "== compute-sanitizer ${tool%:*}"
        grep -E '^========= (ERROR|RACECHECK|LEAK|Error|Warning|Uninit|Invalid|Target)|^test result' "$out/sanitizer-${tool%:*}.log" | sort | uniq -c | head -30
        grep -c '^test .* ok$' "$out/sanitizer-${tool%:*}.log"
    done
    return $status
}

run_step() {
    case "$1" in
        suite) suite ;;
        graphs) suite cuda_graph ;;
        layer) measure --name layer "${arguments[@]}" --norms LayerNorm RmsNorm ;;
        channels) measure --name channels "${arguments[@]}" --norms GroupNorm InstanceNorm BatchNorm BatchNormEval ;;
        bench) CANDLE_NORM_BENCH_OUT=$out "$here/bin/norms" --bench --once "${arguments[@]}" ;;
        blocks) CANDLE_NORM_BENCH_OUT=$out "$here/bin/blocks" --bench "${arguments[@]}" &&
            CANDLE_NORM_BENCH_OUT=$out "$here/bin/blocks" --bench --models "${arguments[@]}" ;;
        ncu) ncu_kernels "${arguments[@]}" ;;
        variants) python3 "$here/variants.py" --worker "$here/bin/worker" --out "$out" "${arguments[@]}" ;;
        sanitizer) sanitizer ;;
    esac
}

dry_run() {
    case "$1" in
        suite) (cd "$here" && bin/suite --list >/dev/null 2>&1) && echo "lists tests" ||
            echo "bin/suite starts only where there is a driver" ;;
        layer) measure --dry-run --name dry-layer --norms LayerNorm RmsNorm ;;
        channels) measure --dry-run --name dry-channels --norms GroupNorm InstanceNorm BatchNorm BatchNormEval ;;
        variants) python3 "$here/variants.py" --dry-run ;;
        *) echo "needs a GPU" ;;
    esac
}

# A step, in a shell of its own, so that its limit ends all that it started.
if [ -n "${ROUND_STEP:-}" ]; then
    if [ -n "$dry" ]; then dry_run "$ROUND_STEP"; else run_step "$ROUND_STEP"; fi
    exit
fi
cat "$here/BUILD" 2>/dev/null
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory --format=csv 2>/dev/null ||
    echo "no GPU here"
check_programs || failed+=(programs)
for step in "${steps[@]}"; do
    echo "=== $step, at most ${limit[$step]} s"
    start=$SECONDS
    ROUND_STEP=$step timeout --kill-after=10 "${limit[$step]}" bash "$0" ${dry:+--dry-run} -- "${arguments[@]}" 2>&1 |
        tee "$out/$step.log"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$step")
    [ "$status" != 124 ] || echo "cut short"
    echo "=== $step: $((SECONDS - start)) s"
done
[ ${#failed[@]} = 0 ] || { echo "round: FAILED: ${failed[*]}" && exit 1; }
[ -n "$dry" ] && echo "round: dry run of ${steps[*]}: the scripts work, nothing was measured" ||
    echo "round: all of it passed: ${steps[*]}"
