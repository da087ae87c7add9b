//! A seeded program of collectives and training steps, what may go wrong in it, and what must hold then.
//!
//! Apart from the engines that it runs on: threads and sockets in `faults.rs`, MPI in `tests/mpi.rs`. Every
//! value that a rank brings depends on the rank and the step, so that a result of another call, or of fewer
//! ranks, is seen.

use super::cases::Group;
use super::support::{layer, numbers, uniform};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::batch_norm::BatchNormOptions;
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::{BatchNorm, ModuleT};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Gather(usize),
    Sum(usize),
    Broadcast(usize, usize),
    /// Forward and backward of a synchronized batch norm.
    Norm,
}

/// What the faulty rank does in its step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Goes, for good.
    Leave,
    /// Comes when the others have given up.
    Late,
    /// Makes another call, then goes on as if nothing was.
    Other,
    /// Makes two calls at once, and goes.
    Twice,
}

#[derive(Debug, Clone)]
pub struct Schedule {
    pub ranks: usize,
    pub steps: Vec<Step>,
    pub fault: Fault,
    pub faulty: usize,
    pub at: usize,
    pub timeout: Duration,
}

/// What a rank has seen.
#[derive(Debug, Default)]
pub struct Log {
    pub rank: usize,
    /// One entry for each step that it tried.
    pub outcomes: Vec<std::result::Result<(), String>>,
    pub longest: Duration,
    /// What must never be, in words.
    pub wrong: Vec<String>,
}

const STEPS: usize = 7;
/// Elements beyond what travels with a call on any engine.
const LARGE: usize = 20_011;
const CHANNELS: usize = 3;

impl Schedule {
    pub fn new(seed: u64, ranks: usize, fault: Fault, timeout: Duration) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let steps = (0..STEPS).map(|_| {
            let n = [1, 5, LARGE][random.random_range(0..3)];
            match random.random_range(0..5) {
                0 => Step::Gather(n),
                1 => Step::Sum(n),
                2 => Step::Broadcast(n, random.random_range(0..ranks)),
                _ => Step::Norm,
            }
        });
        let steps = steps.collect();
        let (faulty, at) = (random.random_range(0..ranks), random.random_range(0..STEPS));
        Self { ranks, steps, fault, faulty, at, timeout }
    }

    /// Runs this rank's part, to the end whatever happens, and checks all that one rank can check.
    pub fn run(&self, group: Group) -> Log {
        let mut log = Log { rank: group.rank(), ..Log::default() };
        let mut normed = 0;
        let bn = layer(&group, CHANNELS, BatchNormOptions::default(), DType::F64).unwrap();
        for (i, step) in self.steps.iter().enumerate() {
            let mine = self.fault != Fault::None && i == self.at && group.rank() == self.faulty;
            match self.fault {
                Fault::Leave if mine => return log,
                Fault::Late if mine => std::thread::sleep(self.timeout * 3),
                _ => {}
            }
            let start = Instant::now();
            let outcome = match self.fault {
                Fault::Other if mine => other(&group, i),
                Fault::Twice if mine => twice(&group, i),
                _ => self.step(&group, *step, i, &bn, &mut normed, &mut log.wrong),
            };
            log.longest = log.longest.max(start.elapsed());
            if mine && self.fault == Fault::Twice {
                if outcome.is_ok() {
                    log.wrong.push(format!("step {i}: two calls at once, and no error"));
                }
                return log;
            }
            log.outcomes.push(outcome.map_err(|e| e.to_string()));
            let state = state(&bn).unwrap();
            if state != expected_state(self.ranks, normed) {
                log.wrong.push(format!("step {i}: running statistics {state:?} after {normed} batches"));
            }
        }
        log
    }

    fn step(
        &self,
        group: &Group,
        step: Step,
        i: usize,
        bn: &BatchNorm,
        normed: &mut usize,
        wrong: &mut Vec<String>,
    ) -> Result<()> {
        let (rank, ranks) = (group.rank(), group.world_size());
        let value = |rank: usize| (1000 * i + rank + 1) as f64;
        let mine = |n: usize| Tensor::full(value(rank), n, &Device::Cpu);
        let what = format!("step {i}");
        let mut same = |got: Tensor, expected: Vec<f64>| -> Result<()> {
            if numbers(&got)? != expected {
                wrong.push(format!("{what}: {step:?} gave another result"));
            }
            Ok(())
        };
        match step {
            Step::Gather(n) => {
                let all = group.all_gather(&what, &mine(n)?)?;
                same(all, (0..ranks).flat_map(|rank| vec![value(rank); n]).collect())
            }
            Step::Sum(n) => {
                let total = (0..ranks).map(value).sum();
                same(group.all_reduce_sum(&what, &mine(n)?)?, vec![total; n])
            }
            Step::Broadcast(n, root) => same(group.broadcast(&what, &mine(n)?, root)?, vec![value(root); n]),
            Step::Norm => {
                let x = Var::from_tensor(&input(rank)?)?;
                let y = bn.forward_t(&x, true)?;
                *normed += 1;
                let gradients = (&y * &input(rank + 50)?)?.sum_all()?.backward()?;
                let dx = gradients.get(x.as_tensor()).map(numbers).transpose()?.unwrap_or_default();
                let (expected_y, expected_dx) = reference(self.ranks, rank);
                same(y, expected_y)?;
                same(Tensor::new(dx, &Device::Cpu)?, expected_dx)
            }
        }
    }

    /// What must hold for one rank's log, when the fault is the rank's own doing; what is broken otherwise.
    pub fn check(&self, log: &Log) -> std::result::Result<(), String> {
        let fail = |why: String| Err(format!("{why}\n{self:?}\n{log:?}"));
        if !log.wrong.is_empty() {
            return fail("a wrong result".into());
        }
        // Rank 0 of sockets waits, then tells; the rest is for a busy machine.
        if log.longest > self.timeout * 2 + Duration::from_secs(10) {
            return fail(format!("a call of {:?}", log.longest));
        }
        for (i, outcome) in log.outcomes.iter().enumerate() {
            let may = match self.fault {
                Fault::None => outcome.is_ok(),
                _ if i < self.at => outcome.is_ok(),
                Fault::Other if i == self.at => {
                    matches!(outcome, Err(e) if e.contains("different calls"))
                }
                Fault::Other => outcome.is_ok(),
                // A late rank may still find what the others sent before they gave up.
                Fault::Late if i == self.at && log.rank == self.faulty => true,
                _ => outcome.is_err(),
            };
            if !may {
                return fail(format!("step {i} ended in {outcome:?}"));
            }
        }
        Ok(())
    }
}

fn other(group: &Group, i: usize) -> Result<()> {
    let dtype = if i.is_multiple_of(2) { DType::F64 } else { DType::F32 };
    let n = if i.is_multiple_of(3) { LARGE } else { 3 };
    group.all_gather("something else", &Tensor::zeros(n, dtype, &Device::Cpu)?).map(|_| ())
}

/// Two threads of one rank in one call: at least one of them gets an error.
fn twice(group: &Group, i: usize) -> Result<()> {
    let one = || group.all_gather(&format!("twice in {i}"), &Tensor::zeros(1, DType::F64, &Device::Cpu)?);
    std::thread::scope(|scope| {
        let (a, b) = (scope.spawn(one), scope.spawn(one));
        a.join().unwrap().and(b.join().unwrap()).map(|_| ())
    })
}

fn input(seed: usize) -> Result<Tensor> {
    uniform(seed as u64 + 1, &[2, CHANNELS, 4])
}

/// Running mean, running variance and the number of batches.
fn state(bn: &BatchNorm) -> Result<Vec<f64>> {
    let mut all = numbers(bn.running_mean())?;
    all.extend(numbers(bn.running_var())?);
    all.extend(bn.num_batches_tracked().map(numbers).transpose()?.unwrap_or_default());
    Ok(all)
}

type Reference = (Vec<f64>, Vec<f64>, Vec<Vec<f64>>);

/// Output, input gradient and the running statistics after each number of steps, by rank: of threads without
/// a fault, whose results are compared with one process's in `cases.rs`.
fn references(ranks: usize) -> Vec<Reference> {
    static KNOWN: std::sync::Mutex<Vec<(usize, Vec<Reference>)>> = std::sync::Mutex::new(vec![]);
    let mut known = KNOWN.lock().unwrap();
    if let Some((_, found)) = known.iter().find(|(n, _)| *n == ranks) {
        return found.clone();
    }
    let made = LocalGroup::run(ranks, |group| {
        let (rank, group) = (group.rank(), group as Group);
        let bn = layer(&group, CHANNELS, BatchNormOptions::default(), DType::F64)?;
        let (mut states, mut seen) = (vec![state(&bn)?], (vec![], vec![]));
        for _ in 0..STEPS {
            let x = Var::from_tensor(&input(rank)?)?;
            let y = bn.forward_t(&x, true)?;
            let gradients = (&y * &input(rank + 50)?)?.sum_all()?.backward()?;
            seen = (numbers(&y)?, numbers(gradients.get(x.as_tensor()).unwrap())?);
            states.push(state(&bn)?);
        }
        Ok((seen.0, seen.1, states))
    });
    known.push((ranks, made.unwrap()));
    known.last().unwrap().1.clone()
}

fn reference(ranks: usize, rank: usize) -> (Vec<f64>, Vec<f64>) {
    let (y, dx, _) = references(ranks).swap_remove(rank);
    (y, dx)
}

fn expected_state(ranks: usize, normed: usize) -> Vec<f64> {
    // The same on every rank.
    references(ranks)[0].2[normed].clone()
}
