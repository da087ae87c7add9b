//! The same bits from run to run, for any number of threads, and whatever lies beside a set.

use crate::case::{Arguments, Case, Layout, Norm};
use crate::common::{bits, data, sized, tensor};
use candle_core::{DType, Result, Var};

/// Everything a call returns, as bits.
fn everything(case: &Case, args: &Arguments) -> Result<Vec<Vec<u64>>> {
    let got = case.run(args)?;
    let tensors = [Some(got.y), got.dx, got.dweight, got.dbias].into_iter().flatten();
    let mut all: Vec<Vec<u64>> = tensors.map(|t| bits(&t)).collect();
    if let Some((mean, var)) = got.running {
        all.extend([mean, var].map(|v| v.into_iter().map(f64::to_bits).collect::<Vec<_>>()));
    }
    Ok(all)
}

/// Shapes whose work is worth dividing: many sets, few large ones, one huge one, channels-last.
fn divisible() -> Vec<Case> {
    let s = |real| sized(real, real / 8 + 1);
    let mut cases = vec![
        Case::new(Norm::Layer { normalized: 1 }, &[s(500), 768]),
        Case::new(Norm::Layer { normalized: 1 }, &[2, s(150_000)]),
        Case::new(Norm::Rms { normalized: 1 }, &[s(300), 1030]),
        Case::new(Norm::Rms { normalized: 1 }, &[1, s(300_000)]),
        Case::new(Norm::Group { groups: 4 }, &[3, 32, s(31), 33]),
        Case::new(Norm::Group { groups: 1 }, &[1, 4, s(300), 301]),
        // On a GPU more chunks than it works on at once, of sets beyond the chip.
        Case::new(Norm::Group { groups: 8 }, &[2, 16, s(512), 512]),
        Case::new(Norm::Instance { use_input_stats: true }, &[4, 16, s(61), 67]),
        Case::new(Norm::Instance { use_input_stats: false }, &[4, 16, s(61), 67]),
        Case::new(Norm::Batch { training: true }, &[16, 24, s(28), 28]),
        Case::new(Norm::Batch { training: true }, &[s(20_000), 5]),
        Case::new(Norm::Batch { training: true }, &[3, 1, s(300), 301]),
        Case::new(Norm::Batch { training: false }, &[16, 24, s(28), 28]),
    ];
    let channels_last = Layout { order: vec![0, 2, 3, 1], ..Layout::default() };
    for case in cases.clone().into_iter().filter(|case| case.dims.len() == 4) {
        cases.push(Case { layout: channels_last.clone(), ..case });
    }
    for case in &mut cases {
        if matches!(case.norm, Norm::Batch { .. } | Norm::Instance { .. }) {
            case.running = Some(DType::F32);
        }
    }
    let half = cases.clone().into_iter().map(|case| Case { dtype: DType::BF16, ..case });
    cases.extend(half.collect::<Vec<_>>());
    cases
}

#[test]
fn same_bits_from_run_to_run_and_for_any_number_of_threads() -> Result<()> {
    let pools: Vec<_> = [1, 2, 5, 2]
        .into_iter()
        .map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a thread pool"))
        .collect();
    for case in divisible() {
        let args = case.random();
        let expected = pools[0].install(|| everything(&case, &args))?;
        for pool in &pools[1..] {
            let got = pool.install(|| everything(&case, &args))?;
            assert!(got == expected, "{} threads in {case:?}", pool.current_num_threads());
        }
    }
    Ok(())
}

/// Calls that share arguments and run at once neither wait for each other for ever nor mix.
#[test]
fn same_bits_from_many_threads_at_once() -> Result<()> {
    for case in crate::autograd::each() {
        let built = case.build(&case.random())?;
        let call = || -> Result<[Vec<u64>; 2]> {
            let y = case.forward(&built)?;
            let dx = built.x.gradient(&y.sqr()?.sum_all()?.backward()?)?.expect("dx");
            Ok([bits(&y), bits(&dx)])
        };
        let expected = call()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(call)).collect();
            for thread in threads {
                assert_eq!(thread.join().expect("no panic")?, expected, "{case:?}");
            }
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

/// y and dx of `len` samples of the case's input, from sample `start` on.
fn part(case: &Case, start: usize, len: usize) -> Result<[Vec<u64>; 2]> {
    let (args, all) = (case.random(), case.dims[0]);
    let below = args.x.len() / all;
    let mut part = case.clone();
    part.dims[0] = len;
    let cut = |v: &[f64]| v[start * below..(start + len) * below].to_vec();
    let args = Arguments { x: cut(&args.x), dy: cut(&args.dy), ..args };
    let got = part.run(&args)?;
    Ok([bits(&got.y), bits(&got.dx.expect("dx"))])
}

/// Norms whose sets lie within a sample, at widths around those of lanes and of loops over them.
fn by_sample(samples: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for width in [1, 5, 16, 33, 100, 768, 1031] {
        cases.push(Case::new(Norm::Layer { normalized: 1 }, &[samples, width]));
        cases.push(Case::new(Norm::Rms { normalized: 1 }, &[samples, width]));
    }
    for dims in [vec![samples, 6, 7], vec![samples, 4, 3, 5], vec![samples, 32, 9]] {
        cases.push(Case::new(Norm::Group { groups: 2 }, &dims));
        cases.push(Case::new(Norm::Instance { use_input_stats: true }, &dims));
        cases.push(Case::new(Norm::Batch { training: false }, &dims));
        cases.push(Case::new(Norm::Layer { normalized: 2 }, &dims));
    }
    let half = cases.clone().into_iter().map(|case| Case { dtype: DType::BF16, ..case });
    cases.extend(half.collect::<Vec<_>>());
    cases
}

/// `(start, len)` of parts have the bits of the whole.
fn parts_equal_the_whole(case: &Case, parts: &[(usize, usize)]) -> Result<()> {
    let samples = case.dims[0];
    let [y, dx] = part(case, 0, samples)?;
    let below = y.len() / samples;
    for &(start, len) in parts {
        let got = part(case, start, len)?;
        let here = start * below..(start + len) * below;
        assert!(got[0] == y[here.clone()], "y of {len} samples from {start} in {case:?}");
        assert!(got[1] == dx[here], "dx of {len} samples from {start} in {case:?}");
    }
    Ok(())
}

/// Sets of sample i depend on nothing in the other samples, to the bit.
#[test]
fn a_sample_is_independent_of_the_batch() -> Result<()> {
    for case in by_sample(67) {
        let channels_last = [0].into_iter().chain(2..case.dims.len()).chain([1]).collect();
        for order in [vec![], channels_last] {
            let layout = Layout { order, ..Layout::default() };
            let case = Case { layout, ..case.clone() };
            parts_equal_the_whole(&case, &[(0, 1), (66, 1), (13, 2), (1, 3), (5, 17), (3, 64)])?;
        }
    }
    Ok(())
}

/// The same for sets large enough to be divided among threads, where one sample is alone in the batch.
#[test]
fn a_large_sample_is_independent_of_the_batch() -> Result<()> {
    let n = 18;
    for case in [
        Case::new(Norm::Layer { normalized: 1 }, &[n, sized(40_000, 5_000)]),
        Case::new(Norm::Rms { normalized: 1 }, &[n, sized(40_000, 5_000)]),
        Case::new(Norm::Group { groups: 2 }, &[n, 32, sized(1_200, 120)]),
        Case::new(Norm::Instance { use_input_stats: true }, &[n, 3, sized(13_000, 1_000)]),
        Case::new(Norm::Batch { training: false }, &[n, 3, sized(13_000, 1_000)]),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            for last in [false, true] {
                let mut case = Case { dtype, ..case.clone() };
                if last && case.dims.len() == 3 {
                    case.layout.order = vec![0, 2, 1];
                }
                parts_equal_the_whole(&case, &[(0, 1), (3, 2), (1, 9)])?;
            }
        }
    }
    Ok(())
}

/// The same where the samples are neighbours in memory, as in the transpose of a matrix.
#[test]
fn a_sample_is_independent_of_the_batch_innermost_in_memory() -> Result<()> {
    for case in by_sample(67) {
        let order = (1..case.dims.len()).chain([0]).collect();
        let case = Case { layout: Layout { order, ..Layout::default() }, ..case };
        // Not of one sample, which has no stride and therefore another memory order.
        parts_equal_the_whole(&case, &[(13, 2), (1, 3), (5, 17), (3, 64)])?;
    }
    Ok(())
}

/// What lies beside a row in memory, huge or not a number, does not reach it.
#[test]
fn a_row_is_independent_of_its_neighbours() -> Result<()> {
    let (rows, width) = (9, 37);
    for norm in [Norm::Layer { normalized: 1 }, Norm::Rms { normalized: 1 }] {
        let case = Case { bias: false, ..Case::new(norm, &[rows, width]) };
        let clean = case.random();
        let expected = bits(&case.run(&clean)?.y);
        for row in 0..rows {
            let mut args = clean.clone();
            let own = row * width..(row + 1) * width;
            for (i, x) in args.x.iter_mut().enumerate().filter(|(i, _)| !own.contains(i)) {
                *x = if i % 2 == 0 { f64::NAN } else { 1e30 };
            }
            assert_eq!(bits(&case.run(&args)?.y)[own.clone()], expected[own], "row {row} in {case:?}");
        }
    }
    Ok(())
}

/// The start of the data in memory changes alignment, and no result.
#[test]
fn any_alignment_gives_the_same_bits() -> Result<()> {
    let (rows, width) = (5, 77);
    let case = Case::new(Norm::Layer { normalized: 1 }, &[rows, width]);
    let values = data(3, rows * width, 0.0, 1.0);
    let x = tensor(&values, &[rows, width], DType::F32)?;
    let expected = bits(&case.call(&x, None, None, None)?);
    for offset in 1..9 {
        let mut padded = vec![f64::NAN; offset];
        padded.extend(&values);
        let base = Var::from_tensor(&tensor(&padded, &[padded.len()], DType::F32)?)?;
        let x = base.narrow(0, offset, values.len())?.reshape((rows, width))?;
        assert_eq!(bits(&case.call(&x, None, None, None)?), expected, "offset {offset}");
    }
    Ok(())
}
