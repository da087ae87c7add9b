//! The distributed cases on the processes of an MPI job: `mpirun -n 4 target/debug/deps/mpi-...`.
//!
//! Apart from the suite, because every rank is a process and runs all cases in the same order. Run it with
//! `ci/mpi.sh 2 4`. Rank 0 prints the result of each case and a closing line; every rank exits with failure if
//! any failed.

#[path = "suite/distributed/cases.rs"]
mod cases;
#[allow(dead_code)] // the suite's; only the recorded files are read here
#[path = "suite/common.rs"]
mod common;
#[allow(dead_code)] // the faults of threads and sockets
#[path = "suite/distributed/schedule.rs"]
mod schedule;
#[path = "suite/distributed/support.rs"]
mod support;
#[path = "suite/distributed/training.rs"]
mod training;

use candle_core::{Device, Result, Tensor};
use candle_norm::distributed::{MpiGroup, ProcessGroup};
use cases::{Case, Group};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

/// Cases that only MPI has.
const MPI: &[(&str, Case)] = &[
    ("ranks_that_differ_in_size_only_fail", ranks_that_differ_in_size_only_fail),
    ("any_thread_may_call", any_thread_may_call),
    ("a_second_group_is_independent", a_second_group_is_independent),
];

/// MPI's own collectives would truncate or overrun here.
fn ranks_that_differ_in_size_only_fail(group: &Group) -> Result<()> {
    if group.world_size() > 1 {
        let n = if group.rank() == 0 { 50_000 } else { 3 };
        let mine = Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu)?;
        let error = group.all_gather("x", &mine).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("[50000]") && error.contains("[3]"), "{error}");
    }
    Ok(())
}

fn any_thread_may_call(group: &Group) -> Result<()> {
    let one = Tensor::ones(1, candle_core::DType::F32, &Device::Cpu)?;
    let sum = std::thread::scope(|scope| scope.spawn(|| group.all_reduce_sum("x", &one)).join().unwrap())?;
    assert_eq!(support::numbers(&sum)?, [group.world_size() as f64]);
    Ok(())
}

fn a_second_group_is_independent(group: &Group) -> Result<()> {
    let second: Group = Arc::new(MpiGroup::world()?);
    assert_eq!((second.rank(), second.world_size()), (group.rank(), group.world_size()));
    cases::ALL[0].1(&second)
}

/// A rank that is not there: an error after the timeout, not a hang. A job of its own, run with the
/// argument `absent`, because MPI cannot end in order afterwards and `mpirun` says so.
fn a_rank_that_never_comes() -> Result<()> {
    let group = MpiGroup::world()?;
    let impatient = MpiGroup::world_with_timeout(Duration::from_millis(300))?;
    let one = Tensor::ones(1, candle_core::DType::F32, &Device::Cpu)?;
    if group.rank() + 1 < group.world_size() {
        for _ in 0..2 {
            let error = impatient.all_reduce_sum("x", &one).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("waited 300ms for its peers in MPI_Iallgather"), "{error}");
        }
        println!("rank {}: the absent rank was noticed", group.rank());
    } else {
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}

/// A random schedule with a fault, run as a job of its own with the arguments `fault SEED`: a rank that comes
/// too late, or makes another call.
fn a_random_fault(seed: u64) {
    use schedule::{Fault, Schedule};
    let timeout = Duration::from_millis(1500);
    let group = MpiGroup::world_with_timeout(timeout).unwrap();
    let fault = if seed.is_multiple_of(2) { Fault::Late } else { Fault::Other };
    let (rank, ranks) = (group.rank(), group.world_size());
    let schedule = Schedule::new(seed, ranks, fault, timeout);
    // Kept until all are done: MPI cannot end in order once ranks have lost each other.
    let group: Group = Arc::new(group);
    let log = schedule.run(group.clone());
    match schedule.check(&log) {
        Ok(()) => println!("rank {rank}: as promised"),
        Err(why) => println!("rank {rank}: BROKEN PROMISE: {why}"),
    }
    std::thread::sleep(timeout * 4);
    std::process::exit(0)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, mode, seed] = args.as_slice() {
        assert_eq!(mode, "fault");
        return a_random_fault(seed.parse().unwrap());
    }
    if std::env::args().any(|arg| arg == "absent") {
        return a_rank_that_never_comes().unwrap();
    }
    let group: Group = match MpiGroup::world_with_timeout(Duration::from_secs(60)) {
        Ok(group) => Arc::new(group),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2)
        }
    };
    let (rank, ranks) = (group.rank(), group.world_size());
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in cases::ALL.iter().chain(MPI) {
        let outcome = catch_unwind(AssertUnwindSafe(|| case(&group)));
        let bad = match &outcome {
            Ok(Ok(())) => 0f32,
            Ok(Err(error)) => {
                eprintln!("rank {rank}: {name}: {error}");
                1.0
            }
            // The panic has printed itself.
            Err(_) => 1.0,
        };
        let count = Tensor::new(&[bad], &Device::Cpu).and_then(|bad| group.all_reduce_sum("failures", &bad));
        match count.and_then(|count| count.get(0)?.to_scalar::<f32>()) {
            Ok(0.0) => passed += 1,
            Ok(_) => failed += 1,
            Err(error) => {
                eprintln!("rank {rank}: {name}: ranks lost each other: {error}");
                std::process::exit(1)
            }
        }
        if rank == 0 {
            println!("{name} on {ranks} ranks ... {}", if bad == 0.0 { "ok" } else { "FAILED" });
        }
    }
    if rank == 0 {
        println!("mpi, {ranks} ranks: {passed} passed, {failed} failed");
    }
    drop(group);
    if failed > 0 {
        std::process::exit(1)
    }
}
