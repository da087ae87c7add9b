//! Compares all that a call returned with what was expected, each value within its own bound.

use crate::case::{Case, Outcome};
use crate::common::{accumulation, unit_roundoff, values};
use crate::oracle::{self, Approx, Expected};
use candle_core::{DType, Tensor};

/// Runs the case on its own arguments and compares with the oracle; says what differs.
pub fn against_oracle(case: &Case) -> Result<(), String> {
    let outcome = case.run(&case.random()).map_err(|e| format!("{e}\n{case:?}"))?;
    let expected = oracle::evaluate(case, &outcome.rounded);
    all(case, &outcome, expected, 1.0).map_err(|e| format!("{e}\n{case:?}"))
}

/// Every result of a call; `times` widens the bounds where `expected` is inexact as well.
pub fn all(case: &Case, got: &Outcome, expected: Expected, times: f64) -> Result<(), String> {
    let params = case.param_dims();
    one("y", Some(&got.y), &case.dims, case.dtype, &expected.y, times)?;
    let (dx_dims, dx) = before_broadcast(case, expected.dx);
    one("dx", got.dx.as_ref(), &dx_dims, case.dtype, &dx, times)?;
    if case.weight {
        one("dweight", got.dweight.as_ref(), &params, case.params, &expected.dweight, times)?;
    }
    if case.bias {
        one("dbias", got.dbias.as_ref(), &params, case.params, &expected.dbias, times)?;
    }
    if let Some(residual) = case.fusion.residual {
        one("sum", got.sum.as_ref(), &case.dims, residual, &expected.sum, 0.0)?;
        one("dresidual", got.dresidual.as_ref(), &case.dims, residual, &expected.dresidual, times)?;
    }
    if case.fusion.skip {
        one("dskip", got.dskip.as_ref(), &case.dims, case.dtype, &expected.dskip, times)?;
    }
    if case.fusion.gate.is_some() {
        one("dgate", got.dgate.as_ref(), &case.dims, case.dtype, &expected.dgate, times)?;
    }
    if let (Some((mean, var)), Some(dtype)) = (&got.running, case.running) {
        numbers("running_mean", mean, dtype, &expected.running_mean, times)?;
        numbers("running_var", var, dtype, &expected.running_var, times)?;
    }
    Ok(())
}

fn one(
    what: &str,
    got: Option<&Tensor>,
    dims: &[usize],
    dtype: DType,
    expected: &[Approx],
    times: f64,
) -> Result<(), String> {
    let Some(got) = got else { return Err(format!("{what}: none")) };
    if got.dims() != dims || got.dtype() != dtype {
        return Err(format!("{what}: {:?} {:?}, expected {dims:?} {dtype:?}", got.dims(), got.dtype()));
    }
    numbers(what, &values(got), dtype, expected, times)
}

/// Numbers of dtype `dtype`.
pub fn numbers(what: &str, got: &[f64], dtype: DType, expected: &[Approx], times: f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", got.len(), expected.len()));
    }
    let bad = |&i: &usize| !expected[i].allows(got[i], dtype, times);
    let wrong: Vec<usize> = (0..got.len()).filter(bad).collect();
    let Some(&i) = wrong.first() else { return Ok(()) };
    let (count, total) = (wrong.len(), got.len());
    let Approx { value, bound } = expected[i];
    let got = got[i];
    Err(format!("{what}[{i}]: {got:e}, expected {value:e} within {bound:e}; {count} of {total} wrong"))
}

/// The gradient of a slice repeated with stride 0 is the sum over its repetitions.
fn before_broadcast(case: &Case, dx: Vec<Approx>) -> (Vec<usize>, Vec<Approx>) {
    let mut dims = case.dims.clone();
    let Some(d) = case.layout.broadcast else { return (dims, dx) };
    let (below, times) = (dims[d + 1..].iter().product::<usize>(), dims[d]);
    dims[d] = 1;
    let mut sums = vec![Approx::default(); dx.len().checked_div(times).unwrap_or(0)];
    // candle sums in the dtype of the gradient: each term is rounded, and each partial sum.
    let u = unit_roundoff(case.dtype).max(unit_roundoff(accumulation(case.dtype)));
    for (i, term) in dx.iter().enumerate() {
        let sum = &mut sums[i / (below * times) * below + i % below];
        sum.value += term.value;
        sum.bound += term.bound + (times as f64 + 1.0) * u * term.value.abs();
    }
    (dims, sums)
}
