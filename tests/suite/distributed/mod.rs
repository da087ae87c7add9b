//! Synchronized batch norm, process groups and data parallelism, on threads.
//!
//! `tests/mpi.rs` runs the same cases on processes.

mod cases;
mod conversion;
mod faults;
mod schedule;
mod support;
mod tcp;
mod training;

use crate::common::process_for;
use candle_core::{DType, Device, Result, Tensor};
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use cases::{Case, Group};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Alone; an even and an odd number; more ranks than cores.
const RANKS: [usize; 4] = [1, 2, 3, 5];

fn over_threads(name: &str) {
    let case: Case = cases::ALL.iter().find(|(n, _)| *n == name).unwrap().1;
    for ranks in RANKS {
        // Tests hang for a reason; nobody should wait five minutes to hear it.
        LocalGroup::run_with_timeout(ranks, Duration::from_secs(60), |group| case(&(group as Group)))
            .unwrap_or_else(|e| panic!("{name} on {ranks} ranks: {e}"));
    }
}

macro_rules! over_threads {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { over_threads(stringify!($name)) })*

        /// None is forgotten here.
        #[test]
        fn every_case_runs_over_threads() {
            let named: Vec<&str> = cases::ALL.iter().map(|(name, _)| *name).collect();
            assert_eq!(named, [$(stringify!($name)),*]);
        }
    };
}

over_threads!(
    collectives,
    large_collectives,
    equals_one_process_f64,
    equals_one_process_f32,
    equals_one_process_half,
    options_as_batch_norm,
    large_mean,
    pytorch_recorded,
    one_value_per_channel_is_global,
    one_collective_each_way,
    disagreement_fails_everywhere,
    wrong_input_on_one_rank_fails_everywhere,
    gradients_averaged,
    variables_broadcast,
    training_follows_one_process,
    parts_are_groups,
    batch_norm_over_parts,
);

fn one() -> Tensor {
    Tensor::ones(1, DType::F32, &Device::Cpu).unwrap()
}

/// Far less than the timeout: the peers are told.
const PROMPTLY: Duration = Duration::from_secs(20);

#[test]
fn rank_that_returns_early_fails_its_peers() {
    let start = Instant::now();
    let (errors, heard) = mpsc::channel();
    let outcome = LocalGroup::run(3, |group| {
        group.all_gather("together", &one())?;
        if group.rank() == 1 {
            return Ok(());
        }
        for _ in 0..2 {
            // The second call finds the group broken already.
            errors.send(group.all_gather("alone", &one()).unwrap_err().to_string()).unwrap();
        }
        group.all_gather("alone", &one()).map(|_| ())
    });
    let words = "rank 1 left the group while others wait in all-gather of F32 [1]: alone";
    assert!(outcome.unwrap_err().to_string().contains(words));
    drop(errors);
    let heard: Vec<String> = heard.iter().collect();
    assert_eq!(heard.len(), 4);
    assert!(heard.iter().all(|e| e.contains(words)), "{heard:?}");
    assert!(start.elapsed() < PROMPTLY);
}

#[test]
fn rank_that_fails_fails_its_peers_and_is_the_error_of_the_run() {
    let outcome = LocalGroup::run(3, |group| {
        if group.rank() == 2 {
            candle_core::bail!("the data ran out")
        }
        group.all_reduce_sum("gradients", &one()).map(|_| ())
    });
    assert_eq!(outcome.unwrap_err().to_string().lines().next(), Some("the data ran out"));
}

#[test]
fn rank_that_panics_fails_its_peers() {
    let start = Instant::now();
    let (errors, heard) = mpsc::channel();
    let outcome = std::panic::catch_unwind(|| {
        LocalGroup::run(3, |group| {
            if group.rank() == 0 {
                panic!("a bug of the user's")
            }
            errors.clone().send(group.all_gather("x", &one()).unwrap_err().to_string()).unwrap();
            Ok(())
        })
    });
    let panic = outcome.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"a bug of the user's"));
    let heard: Vec<String> = heard.try_iter().collect();
    assert_eq!(heard.len(), 2);
    assert!(heard.iter().all(|e| e.contains("rank 0 left the group")), "{heard:?}");
    assert!(start.elapsed() < PROMPTLY);
}

#[test]
fn rank_that_drops_its_handle_fails_its_peers() -> Result<()> {
    let mut groups = LocalGroup::new(2)?;
    drop(groups.pop());
    let error = groups[0].all_gather("x", &one()).unwrap_err().to_string();
    assert!(error.contains("rank 1 left the group"), "{error}");
    Ok(())
}

#[test]
fn rank_that_never_comes_is_waited_for_no_longer_than_said() -> Result<()> {
    let timeout = Duration::from_millis(200);
    let groups = LocalGroup::with_timeout(3, timeout)?;
    let start = Instant::now();
    let error = groups[1].all_gather("x", &one()).unwrap_err().to_string();
    assert!(error.contains("ranks [0, 2] did not join all-gather of F32 [1]: x within 200ms"), "{error}");
    assert!(start.elapsed() >= timeout && start.elapsed() < PROMPTLY);
    // Whoever comes later is told the same at once.
    assert_eq!(groups[0].all_gather("x", &one()).unwrap_err().to_string(), error);
    Ok(())
}

#[test]
fn group_of_no_ranks_is_an_error() {
    assert!(LocalGroup::new(0).is_err());
}

/// candle reads the variable once per thread, so this runs in a process of its own.
#[test]
fn gradients_of_gradients_are_refused() {
    const NAME: &str = "CANDLE_GRAD_DO_NOT_DETACH";
    if std::env::var(NAME).is_err() {
        let test = "distributed::gradients_of_gradients_are_refused";
        let status = process_for(test).env(NAME, "1").output().unwrap();
        let output = String::from_utf8_lossy(&status.stdout);
        assert!(status.status.success() && output.contains("1 passed"), "{output}");
        return;
    }
    let refused = LocalGroup::run(2, |group| {
        let bn = support::layer(&(group as Group), 2, Default::default(), DType::F64)?;
        let x = candle_core::Var::from_tensor(&support::uniform(1, &[3, 2])?)?;
        use candle_norm::ModuleT;
        Ok(bn.forward_t(&x, true)?.sqr()?.sum_all()?.backward().map(|_| ()).unwrap_err().to_string())
    });
    for error in refused.unwrap() {
        assert!(error.contains("gradients of gradients are not supported"), "{error}");
    }
}
