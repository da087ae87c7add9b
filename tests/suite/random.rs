//! Random calls of every function against the f64 oracle.
//!
//! Seeded: the same cases every run. `PROPTEST_CASES` sets how many, `PROPTEST_RNG_SEED` which.

use crate::case::{Case, Layout, Norm};
use crate::common::{cases, sized, DTYPES};
use crate::compare::against_oracle;
use candle_core::DType;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{RngSeed, TestCaseError, TestRunner};

/// Sizes with a reason: one, small, primes, and a SIMD lane or a warp more or less one.
const SIZES: [usize; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 33, 64];

fn dims(least: usize) -> impl Strategy<Value = Vec<usize>> {
    let last = prop_oneof![3 => select(&SIZES[..]), 1 => select(&[63usize, 65, 127, 257, 1000][..])];
    let most = sized(20_000, 3_000);
    (prop::collection::vec(select(&SIZES[..]), least - 1..=4), last).prop_map(move |(mut dims, last)| {
        dims.push(last);
        // From the front, where a smaller size loses least.
        for d in 0..dims.len() {
            while dims.iter().product::<usize>() > most && dims[d] > 2 {
                dims[d] = dims[d].div_ceil(2);
            }
        }
        dims
    })
}

/// Row-major, channels-last or any other order; cut out or not; repeated along a dimension or not.
fn layout(rank: usize) -> impl Strategy<Value = Layout> {
    let any_order = Just((0..rank).collect::<Vec<_>>()).prop_shuffle();
    let channels_last = Just([0].into_iter().chain(2..rank).chain([1]).collect::<Vec<_>>());
    let order = prop_oneof![3 => Just(vec![]), 2 => channels_last, 1 => any_order];
    let narrow = prop::option::weighted(0.3, (0..rank, 0..3usize, 0..2usize));
    let broadcast = prop::option::weighted(0.1, 0..rank);
    (order, narrow, broadcast).prop_map(|(order, narrow, broadcast)| Layout { order, narrow, broadcast })
}

/// A case of rank `least` to 5, of a norm that `norm` makes from the dimensions and a number.
fn case(least: usize, norm: impl Fn(&mut [usize], usize) -> Norm) -> impl Strategy<Value = Case> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), prop::option::of(select(&DTYPES[..2])));
    let numbers = (select(&[0.0, 0.1, 0.5, 1.0][..]), select(&[1e-5, 1e-12, 1e-3, 0.5][..]));
    let scale = select(&[(0.0, 1.0), (3.0, 1.0), (-20.0, 0.5), (0.0, 0.01), (1e4, 1.0)][..]);
    let shape = dims(least).prop_flat_map(|dims| {
        let rank = dims.len();
        (Just(dims), layout(rank), any::<usize>())
    });
    (shape, select(&DTYPES[..]), select(&DTYPES[..]), flags, numbers, scale, any::<u32>()).prop_map(
        move |((mut dims, layout, pick), dtype, params, flags, (momentum, eps), scale, seed)| {
            let norm = norm(&mut dims, pick);
            let (weight, bias, narrow_params, running) = flags;
            let mut case =
                Case { dtype, params, weight, narrow_params, momentum, eps, ..Case::new(norm, &dims) };
            case.bias &= bias;
            if dtype == DType::F16 {
                // Gradients of sets without spread are as large as 1 / sqrt(eps), and f16 ends at 65504.
                case.eps = case.eps.max(1e-5);
            }
            (case.layout, case.seed, (case.mean, case.std)) = (layout, seed.into(), scale);
            if matches!(norm, Norm::Batch { .. } | Norm::Instance { .. }) {
                case.running = running.or(norm.fixed().then_some(DType::F32));
            }
            case
        },
    )
}

fn holds(strategy: impl Strategy<Value = Case>) {
    let mut config = ProptestConfig { cases: cases(200), failure_persistence: None, ..Default::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(2);
    }
    let run =
        TestRunner::new(config).run(&strategy, |case| against_oracle(&case).map_err(TestCaseError::fail));
    if let Err(e) = run {
        panic!("{e}")
    }
}

/// More than one value in a set of batch or instance norm, which they ask for.
fn at_least_two(dims: &mut [usize], from: &[usize]) {
    if from.iter().map(|&d| dims[d]).product::<usize>() == 1 {
        dims[from[0]] = 2;
    }
}

fn batch(dims: &mut [usize], _: usize) -> Norm {
    let others: Vec<usize> = (0..dims.len()).filter(|&d| d != 1).collect();
    at_least_two(dims, &others);
    Norm::Batch { training: true }
}

fn instance(dims: &mut [usize], _: usize) -> Norm {
    let spatial: Vec<usize> = (2..dims.len()).collect();
    at_least_two(dims, &spatial);
    Norm::Instance { use_input_stats: true }
}

fn group(dims: &mut [usize], pick: usize) -> Norm {
    let divisors: Vec<usize> = (1..=dims[1]).filter(|g| dims[1].is_multiple_of(*g)).collect();
    Norm::Group { groups: divisors[pick % divisors.len()] }
}

#[test]
fn batch_norm_in_training() {
    holds(case(2, batch));
}

#[test]
fn batch_norm_in_evaluation() {
    holds(case(2, |_, _| Norm::Batch { training: false }));
}

#[test]
fn instance_norm_with_own_statistics() {
    holds(case(3, instance));
}

#[test]
fn instance_norm_with_running_statistics() {
    holds(case(2, |_, _| Norm::Instance { use_input_stats: false }));
}

#[test]
fn layer_norm() {
    holds(case(2, |dims, pick| Norm::Layer { normalized: 1 + pick % dims.len() }));
}

#[test]
fn group_norm() {
    holds(case(2, group));
}

#[test]
fn rms_norm() {
    holds(case(2, |dims, pick| Norm::Rms { normalized: 1 + pick % dims.len() }));
}
