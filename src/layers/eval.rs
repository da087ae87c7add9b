//! What tells training from evaluation, where a plain `Module` is asked for.
//!
//! Apart from the layers, because it serves all of them, and candle-nn's too.

use candle_core::{Result, Tensor};
use candle_nn::{Module, ModuleT};

/// A layer in evaluation as a [`Module`], for `candle_nn::Sequential` and the like.
///
/// It is `forward_t(x, false)`: a [`BatchNorm`](crate::BatchNorm) normalizes with its running statistics, and
/// an [`InstanceNorm`](crate::InstanceNorm) without any does what it does in training. Weight and bias get
/// their gradients; [`BatchNorm::frozen`](crate::BatchNorm::frozen) is the module that trains nothing.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_norm::{batch_norm, instance_norm, Eval, InstanceNormOptions, Module};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let model = candle_nn::seq()
///     .add(candle_nn::conv2d(3, 8, 3, Default::default(), vb.pp("conv"))?)
///     .add(Eval(batch_norm(8, 1e-5, vb.pp("bn"))?))
///     .add(Eval(instance_norm(8, InstanceNormOptions::default(), vb.pp("in"))?));
/// let y = model.forward(&Tensor::randn(0f32, 1., (2, 3, 8, 8), &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 8, 6, 6]);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Eval<T>(pub T);

impl<T: ModuleT> Module for Eval<T> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward_t(x, false)
    }
}
