//! The constructors of a batch norm: candle-nn's, and PyTorch's.
//!
//! Apart from the layer, because there are many and each is a few lines of getting and checking.

use super::{Affine, BatchNorm, BatchNormConfig, BatchNormOptions, OP};
use crate::functional::check_eps;
use crate::functional::check_momentum;
use crate::layers::params;
use crate::layers::running::RunningStatistics;
use candle_core::{bail, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

impl BatchNorm {
    /// A layer with PyTorch's arguments for inputs of any rank from 2 up; parameters `weight` and
    /// `bias`, buffers `running_mean`, `running_var` and `num_batches_tracked` come from `vb`.
    ///
    /// A `VarMap` gets a `num_batches_tracked` of this layer only where `momentum` is `None`, because only
    /// then results depend on it; so the map loads checkpoints that lack it, as candle-nn's do. Any layer
    /// starts to count at what `vb` has, or at 0.
    ///
    /// # Errors
    /// A tensor that `vb` lacks or has in another shape, a negative `eps`, a `momentum` outside
    /// `0..=1`, frozen statistics without running statistics.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_norm::{batch_norm::BatchNormOptions, BatchNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let bn = BatchNorm::with_options(8, BatchNormOptions::default().bias(false), vb)?;
    /// assert!(bn.weight().is_some() && bn.bias().is_none());
    /// assert_eq!(vars.all_vars().len(), 3);
    /// # Ok(()) }
    /// ```
    pub fn with_options(
        num_features: usize,
        options: impl Into<BatchNormOptions>,
        vb: VarBuilder,
    ) -> Result<Self> {
        Self::with_dims(None, num_features, options.into(), vb)
    }

    fn with_dims(
        dims: Option<usize>,
        num_features: usize,
        options: BatchNormOptions,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_options(&options)?;
        let statistics = match options.track_running_stats {
            true => RunningStatistics::get(OP, num_features, options.momentum.is_none(), &vb)?,
            false => RunningStatistics::constant(num_features, vb.dtype(), vb.device())?,
        };
        let affine = if options.affine {
            let weight = params::weight(OP, &vb, num_features, "weight")?;
            let bias = match options.bias {
                true => params::bias(OP, &vb, num_features, "bias")?,
                false => weight.zeros_like()?,
            };
            Some(Affine { weight, bias })
        } else {
            None
        };
        Ok(Self { num_features, dims, affine, statistics, remove_mean: true, options, sync: None })
    }

    /// A layer of tensors that come from elsewhere than a `VarBuilder`: a GGUF file, a shard. `running` is
    /// the running mean and the running unbiased variance.
    ///
    /// Weight, bias and running statistics are what is given, whatever the options say about them. Running
    /// statistics that are f32 or f64 variables are shared, those in half precision become f32.
    ///
    /// # Errors
    /// A tensor of another shape than `[num_features]`, a negative `eps`, a `momentum` outside `0..=1`,
    /// frozen statistics without running statistics.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{BatchNorm, ModuleT};
    /// # fn main() -> candle_core::Result<()> {
    /// let mean = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
    /// let var = Tensor::new(&[4f32, 9.], &Device::Cpu)?;
    /// let bn = BatchNorm::from_tensors(2, Some((mean, var)), None, None, 0.0)?;
    /// let y = bn.forward_t(&Tensor::new(&[[3f32, 8.]], &Device::Cpu)?, false)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[1., 2.]]);
    /// # Ok(()) }
    /// ```
    pub fn from_tensors(
        num_features: usize,
        running: Option<(Tensor, Tensor)>,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        options: impl Into<BatchNormOptions>,
    ) -> Result<Self> {
        let (affine, has_bias, tracks) =
            (weight.is_some() || bias.is_some(), bias.is_some(), running.is_some());
        let options = options.into().affine(affine).bias(has_bias || !affine).track_running_stats(tracks);
        check_options(&options)?;
        let (mean, var) = running.unzip();
        let tensors = [("weight", &weight), ("bias", &bias), ("running_mean", &mean), ("running_var", &var)];
        tensors
            .iter()
            .try_for_each(|(what, t)| params::check_shape(OP, what, t.as_ref(), &[num_features]))?;
        let statistics = match (&mean, &var) {
            (Some(mean), Some(var)) => RunningStatistics::adopt(mean, var)?,
            _ => RunningStatistics::constant(num_features, DType::F32, &Device::Cpu)?,
        };
        let affine = match (weight, bias) {
            (None, None) => None,
            (Some(weight), Some(bias)) => Some(Affine { weight, bias }),
            (Some(weight), None) => Some(Affine { bias: weight.zeros_like()?, weight }),
            (None, Some(bias)) => Some(Affine { weight: bias.ones_like()?, bias }),
        };
        Ok(Self { num_features, dims: None, affine, statistics, remove_mean: true, options, sync: None })
    }

    /// A layer of these tensors, with momentum 0.1. Running statistics that are variables are shared.
    ///
    /// # Errors
    /// A tensor of another shape than `[num_features]`, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_norm::{BatchNorm, ModuleT};
    /// # fn main() -> candle_core::Result<()> {
    /// let (zeros, ones) = (Tensor::zeros(2, DType::F32, &Device::Cpu)?, Tensor::ones(2, DType::F32, &Device::Cpu)?);
    /// let bn = BatchNorm::new(2, zeros.clone(), ones.clone(), ones, zeros, 0.0)?;
    /// let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
    /// assert_eq!(bn.forward_t(&x, false)?.to_vec2::<f32>()?, [[1., 2.], [3., 4.]]);
    /// assert_eq!(bn.forward_t(&x, true)?.to_vec2::<f32>()?, [[-1., -1.], [1., 1.]]);
    /// # Ok(()) }
    /// ```
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::new_with_momentum(num_features, running_mean, running_var, weight, bias, eps, 0.1)
    }

    /// As [`BatchNorm::new`], without weight and bias.
    ///
    /// # Errors
    /// As [`BatchNorm::new`].
    pub fn new_no_bias(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::new_no_bias_with_momentum(num_features, running_mean, running_var, eps, 0.1)
    }

    /// As [`BatchNorm::new`], with another momentum.
    ///
    /// # Errors
    /// As [`BatchNorm::new`], and a `momentum` outside `0..=1`.
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        params::check_shape(OP, "weight", Some(&weight), &[num_features])?;
        params::check_shape(OP, "bias", Some(&bias), &[num_features])?;
        let affine = Some(Affine { weight, bias });
        Self::from_parts(num_features, running_mean, running_var, affine, eps, momentum)
    }

    /// As [`BatchNorm::new_no_bias`], with another momentum.
    ///
    /// # Errors
    /// As [`BatchNorm::new_with_momentum`].
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        Self::from_parts(num_features, running_mean, running_var, None, eps, momentum)
    }

    fn from_parts(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        affine: Option<Affine>,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        params::check_shape(OP, "running_mean", Some(&running_mean), &[num_features])?;
        params::check_shape(OP, "running_var", Some(&running_var), &[num_features])?;
        let options = BatchNormOptions::default().eps(eps).momentum(momentum).affine(affine.is_some());
        check_options(&options)?;
        let statistics = RunningStatistics::share(&running_mean, &running_var)?;
        Ok(Self { num_features, dims: None, affine, statistics, remove_mean: true, options, sync: None })
    }
}

fn check_options(options: &BatchNormOptions) -> Result<()> {
    check_eps(OP, options.eps)?;
    options.momentum.map_or(Ok(()), |m| check_momentum(OP, m))?;
    check_frozen(options.frozen_statistics, options.track_running_stats)
}

pub(super) fn check_frozen(frozen: bool, tracks: bool) -> Result<()> {
    if frozen && !tracks {
        bail!("{OP}: frozen_statistics expects track_running_stats, got a layer that tracks none")
    }
    Ok(())
}

/// candle-nn's constructor: `weight`, `bias`, `running_mean` and `running_var` from `vb`, for inputs
/// of any rank from 2 up.
///
/// For the arguments of PyTorch, [`BatchNormOptions`], there is [`BatchNorm::with_options`].
///
/// # Errors
/// A tensor that `vb` lacks or has in another shape, a negative `eps`, a `momentum` outside `0..=1`.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_norm::{batch_norm, BatchNormConfig};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = batch_norm(16, BatchNormConfig { affine: false, ..Default::default() }, vb.pp("a"))?;
/// let bn = batch_norm(16, 1e-5, vb.pp("b"))?;
/// assert_eq!(bn.eps(), 1e-5);
/// # Ok(()) }
/// ```
pub fn batch_norm<C: Into<BatchNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    let BatchNormConfig { eps, remove_mean, affine, momentum } = config.into();
    let options = BatchNormOptions::default().eps(eps).momentum(momentum).affine(affine);
    check_options(&options)?;
    let statistics = RunningStatistics::get_like_candle_nn(OP, num_features, &vb)?;
    let affine = if affine {
        let weight = params::weight(OP, &vb, num_features, "weight")?;
        Some(Affine { weight, bias: params::bias(OP, &vb, num_features, "bias")? })
    } else {
        None
    };
    Ok(BatchNorm { num_features, dims: None, affine, statistics, remove_mean, options, sync: None })
}

/// PyTorch's `BatchNorm1d`: [`BatchNorm::with_options`] for inputs `[N, C]` and `[N, C, L]`.
///
/// # Errors
/// As [`BatchNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "BatchNorm1d")]
pub fn batch_norm1d(
    num_features: usize,
    options: impl Into<BatchNormOptions>,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    BatchNorm::with_dims(Some(1), num_features, options.into(), vb)
}

/// PyTorch's `BatchNorm2d`: [`BatchNorm::with_options`] for inputs `[N, C, H, W]`.
///
/// # Errors
/// As [`BatchNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "BatchNorm2d")]
pub fn batch_norm2d(
    num_features: usize,
    options: impl Into<BatchNormOptions>,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    BatchNorm::with_dims(Some(2), num_features, options.into(), vb)
}

/// PyTorch's `BatchNorm3d`: [`BatchNorm::with_options`] for inputs `[N, C, D, H, W]`.
///
/// # Errors
/// As [`BatchNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "BatchNorm3d")]
pub fn batch_norm3d(
    num_features: usize,
    options: impl Into<BatchNormOptions>,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    BatchNorm::with_dims(Some(3), num_features, options.into(), vb)
}
