//! Where candle-nn's fused forward stands in for one of ours: on Metal, which has no kernels of ours.
//!
//! Apart from the functions, because it is a choice of speed alone: elsewhere on Metal a norm is composed of
//! candle's ops.

use candle_core::{DType, DeviceLocation, Result, Tensor};

/// A layer or RMS norm over the last dimension, by candle-nn's kernel if that can do it.
pub(super) fn fused(
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
) -> Option<Result<Tensor>> {
    match kernel(input.device().location(), input, weight, bias, center)? {
        Kernel::Layer(weight, bias) => Some(candle_nn::ops::layer_norm(input, weight, bias, eps as f32)),
        Kernel::Rms(weight) => Some(candle_nn::ops::rms_norm(input, weight, eps as f32)),
    }
}

#[derive(Debug)]
enum Kernel<'a> {
    Layer(&'a Tensor, &'a Tensor),
    Rms(&'a Tensor),
}

/// candle-nn's kernel for these arguments, as if they were on `device`; it has no backward, and takes only
/// contiguous arguments of one dtype that is not f64.
fn kernel<'a>(
    device: DeviceLocation,
    input: &Tensor,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    center: bool,
) -> Option<Kernel<'a>> {
    if !matches!(device, DeviceLocation::Metal { .. }) {
        return None;
    }
    let dtype = input.dtype();
    let takes = |t: &Tensor| t.is_contiguous() && !t.track_op() && t.dtype() == dtype;
    let all = takes(input) && [weight, bias].into_iter().flatten().all(takes);
    if !all || dtype == DType::F64 || input.elem_count() == 0 {
        return None;
    }
    match (weight, bias, center) {
        (Some(weight), Some(bias), true) => Some(Kernel::Layer(weight, bias)),
        (Some(weight), None, false) => Some(Kernel::Rms(weight)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    const METAL: DeviceLocation = DeviceLocation::Metal { gpu_id: 0 };

    #[test]
    fn candle_nns_kernels_take_what_they_can() -> Result<()> {
        let new = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &Device::Cpu);
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let (x, w) = (new(&[2, 3, 4], dtype)?, new(&[4], dtype)?);
            let (w, b) = (Some(&w), Some(&w));
            assert!(matches!(kernel(METAL, &x, w, b, true), Some(Kernel::Layer(..))));
            assert!(matches!(kernel(METAL, &x, w, None, false), Some(Kernel::Rms(_))));
            for elsewhere in [DeviceLocation::Cpu, DeviceLocation::Cuda { gpu_id: 0 }] {
                assert!(kernel(elsewhere, &x, w, b, true).is_none());
            }
            // No such kernel: layer norm without a bias or a weight, RMS norm with a bias or without a weight.
            for (w, b, center) in [(w, None, true), (None, None, true), (w, b, false), (None, None, false)] {
                assert!(kernel(METAL, &x, w, b, center).is_none());
            }
        }
        Ok(())
    }

    #[test]
    fn whatever_else_stays_here() -> Result<()> {
        let new = |dims: &[usize], dtype| Tensor::ones(dims, dtype, &Device::Cpu);
        let (x, w) = (new(&[2, 3, 4], DType::F32)?, new(&[4], DType::F32)?);
        let none = |x: &Tensor, w: &Tensor| {
            kernel(METAL, x, Some(w), Some(w), true).is_none()
                && kernel(METAL, x, Some(w), None, false).is_none()
        };
        assert!(none(&x.transpose(0, 1)?, &w), "a permuted input");
        assert!(none(&x, &new(&[8], DType::F32)?.reshape((4, 2))?.narrow(1, 0, 1)?.squeeze(1)?), "strides");
        assert!(none(Var::from_tensor(&x)?.as_tensor(), &w), "a gradient of the input");
        assert!(none(&x, Var::from_tensor(&w)?.as_tensor()), "a gradient of the weight");
        assert!(none(&x, &w.to_dtype(DType::F16)?), "two dtypes");
        assert!(none(&x.to_dtype(DType::F64)?, &w.to_dtype(DType::F64)?), "f64");
        assert!(none(&new(&[0, 4], DType::F32)?, &w), "nothing");
        Ok(())
    }

    /// What stands in computes the same; here by candle-nn's CPU kernels.
    #[test]
    fn the_arguments_go_over_in_order() -> Result<()> {
        let new = |v: &[f32]| Tensor::new(v, &Device::Cpu);
        let x = new(&[1., 2., 4., 9.])?.reshape((2, 2))?;
        let (w, b) = (new(&[2., 3.])?, new(&[5., 7.])?);
        let Some(Kernel::Layer(weight, bias)) = kernel(METAL, &x, Some(&w), Some(&b), true) else {
            panic!("expected layer norm's kernel")
        };
        assert_eq!(weight.to_vec1::<f32>()?, [2., 3.]);
        assert_eq!(bias.to_vec1::<f32>()?, [5., 7.]);
        Ok(())
    }
}
