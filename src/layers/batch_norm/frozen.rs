//! A batch norm with nothing left to train.
//!
//! Apart from the layer, since it is a plain `Module`: it does the same in training and in evaluation.

use super::BatchNorm;
use crate::layers::repr::Float;
use candle_core::{bail, Result, Tensor};
use candle_nn::{Module, ModuleT};
use std::fmt;

/// A [`BatchNorm`] in evaluation whose weight and bias get no gradients: torchvision's `FrozenBatchNorm2d`.
///
/// ```text
/// y = (x - running_mean) / sqrt(running_var + eps) * weight + bias
/// ```
///
/// [`BatchNorm::frozen`] makes it. The input gets its gradient. The tensors are the layer's own: what is
/// loaded into its variables later counts here too.
///
/// # Errors
/// The forward fails on an input with other channels or rank than the layer's.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_norm::{batch_norm2d, BatchNormOptions, Module};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let frozen = batch_norm2d(3, BatchNormOptions::default(), vb)?.frozen()?;
/// assert_eq!(frozen.to_string(), "FrozenBatchNorm2d(3, eps=1e-05)");
/// let model = candle_nn::seq().add(frozen);
/// let y = model.forward(&Tensor::zeros((1, 3, 2, 2), DType::F32, &Device::Cpu)?)?;
/// let gradients = y.sum_all()?.backward()?;
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_none()));
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct FrozenBatchNorm(BatchNorm);

impl BatchNorm {
    /// This layer in evaluation, with nothing to train.
    ///
    /// # Errors
    /// A layer without running statistics.
    pub fn frozen(mut self) -> Result<FrozenBatchNorm> {
        if self.tracked().is_none() {
            bail!("{}: expected running statistics to freeze, got a layer that tracks none", super::OP)
        }
        if let Some(affine) = &mut self.affine {
            (affine.weight, affine.bias) = (affine.weight.detach(), affine.bias.detach());
        }
        self.desynchronize();
        Ok(FrozenBatchNorm(self))
    }
}

/// The layer with its tensors detached.
impl AsRef<BatchNorm> for FrozenBatchNorm {
    fn as_ref(&self) -> &BatchNorm {
        &self.0
    }
}

impl Module for FrozenBatchNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward_t(x, false)
    }
}

/// torchvision's notation.
impl fmt::Display for FrozenBatchNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frozen{}({}, eps={})", self.0.name(), self.0.num_features, Float(self.0.eps()))
    }
}
