//! A batch norm worked by hand, to its four decimals, and two identities between norms.

use candle_core::{Device, Result, Tensor, Var};
use candle_norm::functional as f;

fn input() -> Result<Tensor> {
    let x = [0.3367f32, 0.1288, 0.2345, 0.2303, -1.1229, -0.1863, 2.2082, -0.6380];
    Tensor::from_slice(&x, (1, 2, 2, 2), &Device::Cpu)
}

fn assert_rounds_to(t: &Tensor, expected: &[f32]) -> Result<()> {
    let got = t.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        // Half a unit of the fourth decimal, and the input's own rounding to four decimals.
        assert!((got - expected).abs() < 2e-4, "{got} against {expected}");
    }
    Ok(())
}

#[test]
fn batch_norm_in_training() -> Result<()> {
    let mean = Var::from_vec(vec![2f32; 2], 2, &Device::Cpu)?;
    let var = Var::from_vec(vec![1f32; 2], 2, &Device::Cpu)?;
    let y = f::batch_norm(&input()?, Some(&mean), Some(&var), None, None, true, 0.1, 1e-5)?;
    assert_rounds_to(&y, &[1.4150, -1.4102, 0.0257, -0.0305, -0.9276, -0.1964, 1.6731, -0.5491])?;
    assert_rounds_to(&mean, &[1.8233, 1.8065])?;
    assert_rounds_to(&var, &[0.9007, 1.1187])
}
