//! Folding an evaluated batch norm into the layer before it.
//!
//! Apart from `batch_norm`, because it is about candle-nn's types: it does what their inherent
//! `absorb_bn` does for candle-nn's own `BatchNorm`.

use super::batch_norm::BatchNorm;
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::{Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, Linear};

/// A linear map that can take the batch norm behind it into its weight and bias.
///
/// In evaluation batch norm is `y = (x - mean) * scale + bias` per channel, with
/// `scale = weight / sqrt(var + eps)`, so a map `x = W z + b` followed by it is the map
/// `W scale`, `(b - mean) * scale + bias`. The result computes that and saves the batch norm's pass
/// over memory. candle-nn's `Conv2d::absorb_bn` takes its own `BatchNorm` only; this takes
/// candle-norm's, and works without weight and bias too.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_norm::{batch_norm, FoldBatchNorm, Module, ModuleT};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let conv = candle_nn::conv2d(3, 8, 3, Default::default(), vb.pp("conv"))?;
/// let bn = batch_norm(8, 1e-5, vb.pp("bn"))?;
/// let x = Tensor::randn(0f32, 1., (2, 3, 8, 8), &Device::Cpu)?;
/// bn.forward_t(&conv.forward(&x)?, true)?; // so that there are statistics to fold
///
/// let folded = conv.fold_batch_norm(&bn)?;
/// let apart = bn.forward_t(&conv.forward(&x)?, false)?;
/// let difference = (folded.forward(&x)? - apart)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(difference < 1e-5);
/// # Ok(()) }
/// ```
pub trait FoldBatchNorm: Sized {
    /// This map followed by `bn` in evaluation, as one map.
    ///
    /// The new weight and bias have the dtype of the old weight and are differentiable in the old
    /// weight and bias and in `bn`'s.
    ///
    /// # Errors
    /// A `bn` of other channels than the map's output, or without running statistics.
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self>;
}

impl FoldBatchNorm for Conv1d {
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self> {
        let (weight, bias) = fold(self.weight(), self.bias(), bn)?;
        Ok(Self::new(weight, Some(bias), *self.config()))
    }
}

impl FoldBatchNorm for Conv2d {
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self> {
        let (weight, bias) = fold(self.weight(), self.bias(), bn)?;
        Ok(Self::new(weight, Some(bias), *self.config()))
    }
}

impl FoldBatchNorm for Linear {
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self> {
        let (weight, bias) = fold(self.weight(), self.bias(), bn)?;
        Ok(Self::new(weight, Some(bias)))
    }
}

impl FoldBatchNorm for ConvTranspose1d {
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self> {
        let groups = self.config().groups;
        let (weight, bias) = fold_transposed(self.weight(), self.bias(), groups, bn)?;
        Ok(Self::new(weight, Some(bias), *self.config()))
    }
}

impl FoldBatchNorm for ConvTranspose2d {
    fn fold_batch_norm(&self, bn: &BatchNorm) -> Result<Self> {
        let (weight, bias) = fold_transposed(self.weight(), self.bias(), 1, bn)?;
        Ok(Self::new(weight, Some(bias), *self.config()))
    }
}

/// As [`fold`], of a weight `[in, out / groups, ..]`.
fn fold_transposed(
    weight: &Tensor,
    bias: Option<&Tensor>,
    groups: usize,
    bn: &BatchNorm,
) -> Result<(Tensor, Tensor)> {
    let (dims, rest) = (weight.dims(), &weight.dims()[2..]);
    let blocks = [&[groups, dims[0] / groups, dims[1]], rest].concat();
    let rows = weight.reshape(blocks)?.transpose(1, 2)?.flatten(0, 1)?;
    let (folded, bias) = fold(&rows, bias, bn)?;
    let blocks = [&[groups, dims[1], dims[0] / groups], rest].concat();
    let folded = folded.reshape(blocks)?.transpose(1, 2)?.contiguous()?.reshape(dims)?;
    Ok((folded, bias))
}

/// Weight `[out, ..]` and bias `[out]` with `bn` folded in; computed in f32, or f64 for f64.
fn fold(weight: &Tensor, bias: Option<&Tensor>, bn: &BatchNorm) -> Result<(Tensor, Tensor)> {
    let out = weight.dim(0)?;
    if bn.num_features() != out {
        bail!(
            "fold-batch-norm: batch norm has {} channels, expected the {out} of the output",
            bn.num_features()
        )
    }
    if let Some(activation) = bn.options().activation {
        bail!("fold-batch-norm: expected a batch norm without an activation, got one with {activation:?}")
    }
    let Some(running) = bn.tracked() else {
        bail!("fold-batch-norm: expected a batch norm with running statistics, got one that tracks none")
    };
    let dtype = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let wide = |t: &Tensor| t.to_dtype(dtype);
    let mean = wide(&running.mean.as_detached_tensor())?;
    let mut scale = (wide(&running.var.as_detached_tensor())? + bn.eps())?.sqrt()?.recip()?;
    if let Some(weight) = bn.weight() {
        scale = (wide(weight)? * scale)?;
    }
    let centered = match bias {
        Some(bias) => (wide(bias)? - mean)?,
        None => mean.neg()?,
    };
    let mut folded_bias = (centered * &scale)?;
    if let Some(bias) = bn.bias() {
        folded_bias = (folded_bias + wide(bias)?)?;
    }
    let mut per_output = vec![1; weight.rank()];
    per_output[0] = out;
    let folded = wide(weight)?.broadcast_mul(&scale.reshape(per_output)?)?;
    Ok((folded.to_dtype(weight.dtype())?, folded_bias.to_dtype(weight.dtype())?))
}

/// candle-nn's batch norm of the same tensors, for code that asks for that type.
///
/// The running statistics are shared, unless their dtype is not the weight's: candle-nn wants one
/// dtype in all, so they are converted then.
///
/// # Errors
/// What candle-nn's type cannot express: no running statistics, a cumulative average, frozen
/// statistics, `remove_mean` of false.
///
/// ```
/// use candle_core::{DType, Device};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = candle_norm::batch_norm(8, 1e-5, vb)?;
/// let theirs: candle_nn::BatchNorm = (&bn).try_into()?;
/// assert_eq!(theirs.eps(), 1e-5);
/// # Ok(()) }
/// ```
impl TryFrom<&BatchNorm> for candle_nn::BatchNorm {
    type Error = candle_core::Error;

    fn try_from(bn: &BatchNorm) -> Result<Self> {
        let options = bn.options();
        let (running, momentum) = match (bn.tracked(), options.momentum) {
            (None, _) => bail!("batch-norm: candle-nn's needs running statistics, got a layer without"),
            (_, None) => bail!("batch-norm: candle-nn's needs a momentum, got a cumulative average"),
            _ if options.frozen_statistics => {
                bail!("batch-norm: candle-nn's cannot be frozen, got one that is")
            }
            _ if options.activation.is_some() => {
                bail!("batch-norm: candle-nn's has no activation, got one that has")
            }
            _ if !bn.remove_mean() => {
                bail!("batch-norm: candle-nn's removes the mean, got one that does not")
            }
            (Some(running), Some(momentum)) => (running, momentum),
        };
        let dtype = bn.weight().map_or(running.mean.dtype(), Tensor::dtype);
        let (mean, var) = (running.mean.to_dtype(dtype)?, running.var.to_dtype(dtype)?);
        let (n, eps) = (bn.num_features(), options.eps);
        match bn.weight_and_bias() {
            Some((w, b)) => Self::new_with_momentum(n, mean, var, w.clone(), b.clone(), eps, momentum),
            None => Self::new_no_bias_with_momentum(n, mean, var, eps, momentum),
        }
    }
}
