//! A batch norm worked through to four decimals, and identities between norms.
//!
//! The input is PyTorch's `torch.manual_seed(42); torch.randn(1, 2, 2, 2)`, 0.3367 and so on when rounded.
#![allow(clippy::excessive_precision)] // nine digits, as PyTorch's f32 print

use crate::common::device;
use candle_core::{Result, Tensor, Var};
use candle_norm::functional as f;

fn input() -> Result<Tensor> {
    let x = [
        0.336690366f32,
        0.128809407,
        0.234462366,
        0.23033303,
        -1.12285638,
        -0.186328292,
        2.20820141,
        -0.637997031,
    ];
    Tensor::from_slice(&x, (1, 2, 2, 2), device())
}

fn assert_rounds_to(t: &Tensor, expected: &[f32]) -> Result<()> {
    let got = t.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        // Half a unit of the fourth decimal, and f32's own rounding.
        assert!((got - expected).abs() < 0.5e-4 + 1e-6, "{got} against {expected}");
    }
    Ok(())
}

#[test]
fn batch_norm_in_training() -> Result<()> {
    let mean = Var::from_vec(vec![2f32; 2], 2, device())?;
    let var = Var::from_vec(vec![1f32; 2], 2, device())?;
    let y = f::batch_norm(&input()?, Some(&mean), Some(&var), None, None, true, 0.1, 1e-5)?;
    assert_rounds_to(&y, &[1.4150, -1.4102, 0.0257, -0.0305, -0.9276, -0.1964, 1.6731, -0.5491])?;
    assert_rounds_to(&mean, &[1.8233, 1.8065])?;
    assert_rounds_to(&var, &[0.9007, 1.1187])
}
