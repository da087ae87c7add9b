//! Every gradient of every function against finite differences of its forward, in f64.
//!
//! Unlike the oracle's, these gradients owe nothing to a formula.

use crate::case::{Arguments, Case, Layout, Norm};
use crate::common::{tensor, values};
use candle_core::{DType, Result, Var};

/// Each function, mode and affine rule, small enough to differentiate by every element.
pub fn cases() -> Vec<Case> {
    let channels_last = Layout { order: vec![0, 2, 1], ..Layout::default() };
    let mut cases = Vec::new();
    let mut add = |norm: Norm, dims: &[usize]| {
        for (weight, bias) in [(true, true), (true, false), (false, true), (false, false)] {
            let plain = Case { dtype: DType::F64, params: DType::F64, weight, ..Case::new(norm, dims) };
            // Large enough an eps to show where it stands.
            let plain = Case { bias: plain.bias && bias, eps: 0.1, ..plain };
            let running = norm.fixed().then_some(DType::F64);
            cases.push(Case { running, ..plain.clone() });
            if weight && bias && dims.len() == 3 {
                cases.push(Case { running, layout: channels_last.clone(), ..plain });
            }
        }
    };
    for training in [true, false] {
        add(Norm::Batch { training }, &[3, 2, 4]);
        add(Norm::Batch { training }, &[5, 3]);
        add(Norm::Instance { use_input_stats: training }, &[2, 3, 4]);
    }
    for normalized in 1..=3 {
        add(Norm::Layer { normalized }, &[2, 3, 4]);
        add(Norm::Rms { normalized }, &[2, 3, 4]);
    }
    for groups in [1, 2, 4] {
        add(Norm::Group { groups }, &[2, 4, 3]);
    }
    cases
}

/// `sum(dy * y)` without a graph.
fn loss(case: &Case, args: &Arguments) -> Result<f64> {
    let x = tensor(&args.x, &case.dims, case.dtype)?;
    let dims = case.param_dims();
    let param = |p: &Option<Vec<f64>>| p.as_ref().map(|p| tensor(p, &dims, case.params)).transpose();
    let running = match &args.running {
        Some((mean, var)) => {
            let var_of = |v: &[f64]| Var::from_tensor(&tensor(v, &[v.len()], DType::F64)?);
            Some((var_of(mean)?, var_of(var)?))
        }
        None => None,
    };
    let (weight, bias) = (param(&args.weight)?, param(&args.bias)?);
    let y = case.call(&x, weight.as_ref(), bias.as_ref(), running.as_ref())?;
    Ok(values(&y).iter().zip(&args.dy).map(|(y, dy)| y * dy).sum())
}

/// Derivative of `f` by `step`, from four points.
///
/// Truncation is h^4 / 30 times the fifth derivative, 3e-14 times a few hundred here; the rounding of f,
/// some 1e-15, is divided by h.
pub fn derivative(f: impl Fn(f64) -> Result<f64>) -> Result<f64> {
    let h = 1e-3;
    Ok((8.0 * (f(h)? - f(-h)?) - (f(2.0 * h)? - f(-2.0 * h)?)) / (12.0 * h))
}

/// Room for the two errors above, and none for a missing term.
pub fn close(got: f64, expected: f64) -> bool {
    (got - expected).abs() <= 1e-8 * (1.0 + expected.abs())
}

fn check(case: &Case) -> Result<()> {
    let args = case.random();
    let got = case.run(&args)?;
    type Pick = fn(&mut Arguments) -> Option<&mut Vec<f64>>;
    let all: [(&str, Option<_>, Pick); 3] = [
        ("dx", got.dx, |args| Some(&mut args.x)),
        ("dweight", got.dweight, |args| args.weight.as_mut()),
        ("dbias", got.dbias, |args| args.bias.as_mut()),
    ];
    for (name, gradient, pick) in all {
        let len = pick(&mut args.clone()).map_or(0, |v| v.len());
        let gradient = gradient.as_ref().map(values).unwrap_or_default();
        assert_eq!(gradient.len(), len, "{name} of {case:?}");
        for (i, got) in gradient.iter().enumerate() {
            let expected = derivative(|step| {
                let mut moved = args.clone();
                pick(&mut moved).expect("just there")[i] += step;
                loss(case, &moved)
            })?;
            assert!(close(*got, expected), "{name}[{i}]: {got}, expected {expected} in {case:?}");
        }
    }
    Ok(())
}

#[test]
fn of_every_function_and_argument() -> Result<()> {
    cases().iter().try_for_each(check)
}
