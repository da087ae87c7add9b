#!/usr/bin/env bash
# The distributed tests over MPI, with as many ranks as each argument says: ci/mpi.sh 2 4
# CANDLE_NORM_FAULTS says how many random schedules with a fault follow, a job of 3 ranks each (4 if unset).
# Needs Open MPI or MPICH with its headers, and libclang (Debian: libopenmpi-dev openmpi-bin libclang-dev).
set -euo pipefail
cd "$(dirname "$0")/.."

# More ranks than cores, and root, which containers run as: Open MPI 4, then 5. MPICH ignores them.
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Every rank its own process on shared cores: one thread each.
export RAYON_NUM_THREADS=1

# The feature builds the dependencies once more; for these small tensors they need no optimizing.
light=(--config 'profile.dev.package.candle-core.opt-level=1')
for crate in gemm gemm-common gemm-f16 gemm-f32 gemm-f64; do
    light+=(--config "profile.dev.package.$crate.opt-level=1")
done
test=$(cargo test "${light[@]}" --features mpi --test mpi --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
for ranks in ${*:-2 4}; do
    mpirun -n "$ranks" "$test"
done

# This job cannot end in order, so what it prints decides.
absent=$(mpirun -n 2 "$test" absent 2>&1 || true)
grep -q 'rank 0: the absent rank was noticed' <<<"$absent" || { echo "$absent"; exit 1; }
echo "mpi: an absent rank is noticed"

# Neither can these. Several at a time: their ranks mostly wait.
faults=${CANDLE_NORM_FAULTS:-4}
fault() {
    local said
    said=$(mpirun -n 3 "$1" fault "$2" 2>&1 || true)
    [ "$(grep -c 'as promised' <<<"$said")" = 3 ] || { echo "seed $2: $said"; return 1; }
}
export -f fault
seq 0 $((faults - 1)) | xargs -P 4 -I SEED bash -c 'fault "$@"' fault "$test" SEED
echo "mpi: $faults random faults, none lost"
