//! Results before times: both crates against f32 arithmetic on the same values.

use crate::cases::contenders::{self, Layer, Mode};
use crate::cases::inputs::Inputs;
use crate::cases::Row;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor, Var};

/// The largest relative L2 error among y and the gradients.
#[derive(Debug, Clone, Copy)]
pub struct Errors {
    pub ours: f64,
    /// `None` where candle-nn cannot run the row.
    pub theirs: Option<f64>,
}

/// candle-norm must be within one rounding of each result; so must candle-nn in f32. In bf16
/// candle-nn's compositions round at every step and sum in bf16: their error is reported, no more.
pub fn both(row: &Row, inputs: &Inputs, mode: Mode, ours: &Layer, theirs: &Layer) -> Result<Errors> {
    let wide = widened(inputs)?;
    let wide_row = Row { dtype: DType::F32, ..*row };
    let expected = contenders::outputs(&contenders::candle_nn(&wide_row, &wide, mode)?, &wide, mode)?;
    let ours = worst(&contenders::outputs(ours, inputs, mode)?, &expected)?;
    ensure!(ours.1 <= row.tolerance(), "candle-norm's {} is off by {:e}", ours.0, ours.1);
    let Ok(theirs) = contenders::outputs(theirs, inputs, mode) else {
        return Ok(Errors { ours: ours.1, theirs: None });
    };
    let theirs = worst(&theirs, &expected)?;
    if row.dtype == DType::F32 {
        ensure!(theirs.1 <= row.tolerance(), "candle-nn's {} is off by {:e}", theirs.0, theirs.1);
    }
    Ok(Errors { ours: ours.1, theirs: Some(theirs.1) })
}

/// The same values in f32.
fn widened(inputs: &Inputs) -> candle_core::Result<Inputs> {
    // Copied: a Var of a tensor that is f32 already would share its storage, and one contender's
    // running statistics would move the other's.
    let widen = |t: &Tensor| Var::from_tensor(&t.detach().to_dtype(DType::F32)?.copy()?);
    Ok(Inputs {
        x: widen(&inputs.x)?,
        weight: widen(&inputs.weight)?,
        bias: inputs.bias.as_ref().map(|b| widen(b)).transpose()?,
        other: inputs.other.as_ref().map(|o| widen(o)).transpose()?,
        dy: inputs.dy.to_dtype(DType::F32)?,
        running_mean: widen(&inputs.running_mean)?,
        running_var: widen(&inputs.running_var)?,
    })
}

fn worst(got: &[(&'static str, Tensor)], expected: &[(&'static str, Tensor)]) -> Result<(&'static str, f64)> {
    let mut worst = ("y", 0.0);
    for ((name, got), (_, expected)) in got.iter().zip(expected) {
        let error = relative_error(got, expected)?;
        ensure!(error.is_finite(), "{name} is not finite");
        if error > worst.1 {
            worst = (name, error);
        }
    }
    (got.len() == expected.len()).then_some(worst).context("a gradient is missing")
}

/// `|a - b| / |b|` over all elements.
fn relative_error(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?);
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
    let size: f64 = b.iter().map(|b| square(*b)).sum();
    Ok((difference / size).sqrt())
}
