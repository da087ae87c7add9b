//! Values at the edges: NaN and infinity, the largest f16, sets without spread, sets of one element.

use crate::autograd::each;
use crate::case::{Arguments, Case, Layout, Norm};
use crate::common::{bits, values, DTYPES};
use crate::compare;
use crate::oracle;
use candle_core::{DType, Result};

/// Runs `args` and compares everything with the oracle.
fn check(case: &Case, args: &Arguments) -> Result<()> {
    let got = case.run(args)?;
    let expected = oracle::evaluate(case, &got.rounded);
    compare::all(case, &got, expected, 1.0).unwrap_or_else(|e| panic!("{e}\n{case:?}"));
    Ok(())
}

#[test]
fn nan_and_infinity_stay_in_their_own_set() -> Result<()> {
    let layouts = [vec![], vec![0, 2, 3, 1]].map(|order| Layout { order, ..Layout::default() });
    for case in each() {
        for layout in &layouts {
            let case = Case { layout: layout.clone(), ..case.clone() };
            let clean = case.random();
            let place = |i| case.norm.place(&case.dims, i).0;
            let expected = case.run(&clean)?;
            for at in [0, 37, clean.x.len() - 1] {
                for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let mut args = clean.clone();
                    args.x[at] = poison;
                    let got = case.run(&args)?;
                    for (name, got, expected) in [
                        ("y", &got.y, &expected.y),
                        ("dx", got.dx.as_ref().expect("dx"), expected.dx.as_ref().expect("dx")),
                    ] {
                        let (got, expected) = (bits(got), bits(expected));
                        for i in (0..got.len()).filter(|&i| place(i) != place(at)) {
                            assert_eq!(got[i], expected[i], "{name}[{i}], {poison} at {at} in {case:?}");
                        }
                    }
                    own_set(&case, &values(&got.y), at, poison);
                }
            }
        }
    }
    Ok(())
}

/// A statistic that is not finite leaves no finite output in its set, but for zeros of RMS norm at infinity.
fn own_set(case: &Case, y: &[f64], at: usize, poison: f64) {
    if case.norm.fixed() {
        // Given statistics: the element alone.
        assert!(!y[at].is_finite(), "{poison} gave {} in {case:?}", y[at]);
        return;
    }
    assert!(y[at].is_nan(), "{poison} gave {} in {case:?}", y[at]);
    let set = case.norm.place(&case.dims, at).0;
    for i in (0..y.len()).filter(|&i| case.norm.place(&case.dims, i).0 == set && i != at) {
        let zero = matches!(case.norm, Norm::Rms { .. }) && poison.is_infinite();
        assert!(if zero { y[i] == 0.0 } else { y[i].is_nan() }, "{poison} gave {} in {case:?}", y[i]);
    }
}

#[test]
fn f16_near_its_largest_value() -> Result<()> {
    for case in each() {
        let case = Case { dtype: DType::F16, running: None, ..case };
        if case.norm.fixed() {
            continue; // Statistics of the same size are the next test's.
        }
        let random = case.random();
        let mut all_large = random.clone();
        let mut both_signs = random.clone();
        for (i, x) in random.x.iter().enumerate() {
            all_large.x[i] = 64000.0 + 400.0 * x;
            both_signs.x[i] = if x.to_bits() % 2 == 0 { 65504.0 } else { -65504.0 };
        }
        check(&case, &all_large)?;
        check(&case, &both_signs)?;
    }
    Ok(())
}

#[test]
fn f16_near_its_largest_value_with_given_statistics() -> Result<()> {
    for norm in [Norm::Batch { training: false }, Norm::Instance { use_input_stats: false }] {
        let case = Case { dtype: DType::F16, ..Case::new(norm, &[3, 4, 2, 5]) };
        let mut args = case.random();
        args.x.iter_mut().for_each(|x| *x = 64000.0 + 400.0 * *x);
        args.running = Some((vec![64000.0; 4], vec![160_000.0; 4]));
        check(&case, &args)?;
    }
    Ok(())
}

/// The square of a value is infinite, that of its difference from the mean is not.
#[test]
fn values_whose_squares_are_infinite() -> Result<()> {
    let layouts = [vec![], vec![0, 2, 3, 1]].map(|order| Layout { order, ..Layout::default() });
    for case in each().into_iter().filter(|case| !case.norm.fixed() && !matches!(case.norm, Norm::Rms { .. }))
    {
        for layout in &layouts {
            let case = Case { dtype: DType::F32, running: None, layout: layout.clone(), ..case.clone() };
            let mut args = case.random();
            args.x.iter_mut().for_each(|x| *x = 3e19 + 1e15 * *x);
            check(&case, &args)?;
        }
    }
    Ok(())
}

/// `xhat` is zero and rstd is 1 / sqrt(eps): y is the bias, dx the centered gradient.
#[test]
fn sets_without_spread() -> Result<()> {
    for case in each().into_iter().filter(|case| !case.norm.fixed()) {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            for constant in [0.0, 3.7, -1e4, 12345.678] {
                let case = Case { dtype, eps: 1e-3, ..case.clone() };
                let mut args = case.random();
                args.x.fill(constant);
                check(&case, &args)?;
                if matches!(case.norm, Norm::Rms { .. }) {
                    continue;
                }
                let got = case.run(&args)?;
                let bias = got.rounded.bias.expect("a bias");
                let dtype = |b: f64| crate::common::tensor(&[b], &[1], case.dtype).map(|t| values(&t)[0]);
                for (i, y) in values(&got.y).into_iter().enumerate() {
                    let bias = dtype(bias[case.norm.place(&case.dims, i).1])?;
                    assert_eq!(y, bias, "y[{i}] of constant {constant} in {case:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn one_row_of_zeros_among_others() -> Result<()> {
    for norm in [Norm::Layer { normalized: 1 }, Norm::Rms { normalized: 1 }] {
        for eps in [1e-5, 1e-12] {
            let case = Case { eps, ..Case::new(norm, &[4, 33]) };
            let mut args = case.random();
            args.x[33..66].fill(0.0);
            check(&case, &args)?;
        }
    }
    Ok(())
}

#[test]
fn sets_of_one_element() -> Result<()> {
    for (norm, dims) in [
        (Norm::Layer { normalized: 1 }, vec![7, 1]),
        (Norm::Layer { normalized: 2 }, vec![7, 1, 1]),
        (Norm::Rms { normalized: 1 }, vec![7, 1]),
        (Norm::Group { groups: 6 }, vec![7, 6]),
        (Norm::Group { groups: 6 }, vec![7, 6, 1, 1]),
    ] {
        for dtype in DTYPES {
            let case = Case { dtype, ..Case::new(norm, &dims) };
            check(&case, &case.random())?;
        }
    }
    Ok(())
}

#[test]
fn sets_of_two_elements() -> Result<()> {
    for (norm, dims) in [
        (Norm::Batch { training: true }, vec![2, 5]),
        (Norm::Batch { training: true }, vec![1, 5, 2]),
        (Norm::Instance { use_input_stats: true }, vec![3, 5, 2]),
    ] {
        let case = Case { running: Some(DType::F32), ..Case::new(norm, &dims) };
        check(&case, &case.random())?;
    }
    Ok(())
}

/// With eps 0 a set without spread has no answer, and the others keep theirs.
#[test]
fn eps_zero() -> Result<()> {
    for case in each() {
        let case = Case { eps: 0.0, ..case };
        check(&case, &case.random())?;
    }
    let case = Case { eps: 0.0, ..Case::new(Norm::Layer { normalized: 1 }, &[3, 5]) };
    let clean = case.random();
    let expected = bits(&case.run(&clean)?.y);
    let mut args = clean;
    args.x[5..10].fill(2.0);
    let y = case.run(&args)?.y;
    assert!(values(&y)[5..10].iter().all(|y| y.is_nan()));
    assert_eq!([&bits(&y)[..5], &bits(&y)[10..]], [&expected[..5], &expected[10..]]);
    Ok(())
}
