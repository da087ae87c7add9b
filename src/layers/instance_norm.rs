//! Instance normalization.
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! over the spatial dimensions of each channel of each sample of `[N, C, ..]`, with the biased `var`.
//! Ulyanov, Vedaldi and Lempitsky, [Instance Normalization](https://arxiv.org/abs/1607.08022);
//! arguments and meaning are those of
//! [`torch.nn.InstanceNorm2d`](https://docs.pytorch.org/docs/stable/generated/torch.nn.InstanceNorm2d.html).
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_norm::instance_norm::{instance_norm1d, InstanceNormOptions};
//! # fn main() -> candle_core::Result<()> {
//! let vars = candle_nn::VarMap::new();
//! let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let norm = instance_norm1d(2, InstanceNormOptions::default().eps(0.0), vb)?;
//! let unbatched = Tensor::new(&[[1f32, 3.], [10., 30.]], &Device::Cpu)?;
//! assert_eq!(norm.forward(&unbatched)?.to_vec2::<f32>()?, [[-1., 1.], [-1., 1.]]);
//! assert_eq!(
//!     norm.to_string(),
//!     "InstanceNorm1d(2, eps=0.0, momentum=0.1, affine=False, track_running_stats=False)"
//! );
//! # Ok(()) }
//! ```

use super::options::options;
use super::params;
use super::repr::{activation, no_bias, truth, Float};
use super::running::RunningStatistics;
use crate::functional::check_eps;
use crate::functional::{self, check_momentum, Tail};
use candle_core::{bail, Result, Tensor, Var};
use candle_nn::{Activation, ModuleT, VarBuilder};
use std::fmt;

const OP: &str = "instance-norm";

options! {
    /// PyTorch's arguments of instance normalization.
    ///
    /// ```
    /// use candle_norm::instance_norm::InstanceNormOptions;
    /// let options = InstanceNormOptions::default().affine(true);
    /// assert!(!options.track_running_stats);
    /// ```
    pub struct InstanceNormOptions {
        /// Added to the variance; default 1e-5.
        eps: f64 = 1e-5,
        /// Weight of a new batch in the running statistics; default 0.1.
        momentum: f64 = 0.1,
        /// Whether there are a weight and a bias; default false.
        affine: bool = false,
        /// Whether an affine layer has a bias besides its weight; default true.
        bias: bool = true,
        /// Whether to keep running statistics in training and to use them in evaluation; default
        /// false: each instance's own are used in both.
        track_running_stats: bool = false,
        /// What the forward applies to the norm's output, in the same visit; default none.
        activation: Option<Activation> = None,
    }
}

/// Instance normalization of `[N, C, ..]`, and of `[C, ..]` where the rank is fixed: see the
/// [module](self).
///
/// It is a [`ModuleT`], since a layer with running statistics does differently in training and in
/// evaluation, and a type can be only one of `Module` and `ModuleT`. [`InstanceNorm::forward`] spares
/// a layer without them the argument, and [`Eval`](crate::Eval) puts it into a `candle_nn::Sequential`.
///
/// The input is f16, bf16, f32 or f64, whatever of these the parameters are; the output has the
/// input's shape and dtype, and is contiguous. The running statistics are f32 (f64 in an f64 model),
/// receive no gradient, and are shared by clones of the layer.
///
/// # Errors
/// The forward fails on an input of another rank than the layer's, on other channels where the layer
/// has parameters or running statistics of theirs, and on a single spatial element where it would be
/// its own mean. It then leaves the running statistics as they were.
#[derive(Debug, Clone)]
pub struct InstanceNorm {
    num_features: usize,
    /// Spatial dimensions; any number of them, and a batch, if none.
    dims: Option<usize>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    statistics: Option<RunningStatistics>,
    options: InstanceNormOptions,
}

impl InstanceNorm {
    /// A layer with PyTorch's arguments for batched inputs of any rank from 3 up; parameters `weight`
    /// and `bias`, buffers `running_mean` and `running_var` come from `vb`. A `VarMap` gets no
    /// `num_batches_tracked`, which PyTorch keeps at zero here.
    ///
    /// # Errors
    /// A tensor that `vb` lacks or has in another shape, a negative `eps`, a `momentum` outside
    /// `0..=1`, and running statistics in `vb` for a layer that tracks none.
    pub fn with_options(
        num_features: usize,
        options: impl Into<InstanceNormOptions>,
        vb: VarBuilder,
    ) -> Result<Self> {
        Self::with_dims(None, num_features, options.into(), vb)
    }

    fn with_dims(
        dims: Option<usize>,
        num_features: usize,
        options: InstanceNormOptions,
        vb: VarBuilder,
    ) -> Result<Self> {
        check_eps(OP, options.eps)?;
        check_momentum(OP, options.momentum)?;
        let statistics = if options.track_running_stats {
            Some(RunningStatistics::get(OP, num_features, false, &vb)?)
        } else {
            check_no_running_statistics(&vb)?;
            None
        };
        let weight = options.affine.then(|| params::weight(OP, &vb, num_features, "weight")).transpose()?;
        let with_bias = options.affine && options.bias;
        let bias = with_bias.then(|| params::bias(OP, &vb, num_features, "bias")).transpose()?;
        Ok(Self { num_features, dims, weight, bias, statistics, options })
    }

    /// A layer of tensors that come from elsewhere than a `VarBuilder`: a GGUF file, a shard. `running` is
    /// the running mean and the running unbiased variance.
    ///
    /// Weight, bias and running statistics are what is given, whatever the options say about them. Running
    /// statistics that are f32 or f64 variables are shared, those in half precision become f32.
    ///
    /// # Errors
    /// A tensor of another shape than `[num_features]`, a negative `eps`, a `momentum` outside `0..=1`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{InstanceNorm, InstanceNormOptions};
    /// # fn main() -> candle_core::Result<()> {
    /// let weight = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
    /// let options = InstanceNormOptions::default().eps(0.0);
    /// let norm = InstanceNorm::from_tensors(2, None, Some(weight), None, options)?;
    /// let y = norm.forward(&Tensor::new(&[[[1f32, 3.], [10., 30.]]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec3::<f32>()?, [[[-1., 1.], [-2., 2.]]]);
    /// # Ok(()) }
    /// ```
    pub fn from_tensors(
        num_features: usize,
        running: Option<(Tensor, Tensor)>,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        options: impl Into<InstanceNormOptions>,
    ) -> Result<Self> {
        let options = options.into();
        check_eps(OP, options.eps)?;
        check_momentum(OP, options.momentum)?;
        let (mean, var) = running.unzip();
        let tensors = [("weight", &weight), ("bias", &bias), ("running_mean", &mean), ("running_var", &var)];
        tensors
            .iter()
            .try_for_each(|(what, t)| params::check_shape(OP, what, t.as_ref(), &[num_features]))?;
        let statistics = mean.zip(var).map(|(m, v)| RunningStatistics::adopt(&m, &v)).transpose()?;
        let (affine, tracks) = (weight.is_some() || bias.is_some(), statistics.is_some());
        let options = options.affine(affine).bias(bias.is_some() || !affine).track_running_stats(tracks);
        Ok(Self { num_features, dims: None, weight, bias, statistics, options })
    }

    /// The forward in evaluation: `forward_t(x, false)`. For a layer without running statistics it is
    /// the forward in training too.
    ///
    /// # Errors
    /// As the layer's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    /// Number of channels. As in PyTorch, inputs may have others where the layer has neither
    /// parameters nor running statistics.
    pub fn num_features(&self) -> usize {
        self.num_features
    }

    /// Weight `[C]`.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// Bias `[C]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Running mean `[C]`.
    pub fn running_mean(&self) -> Option<&Tensor> {
        self.statistics.as_ref().map(|s| s.mean.as_tensor())
    }

    /// Running unbiased variance `[C]`.
    pub fn running_var(&self) -> Option<&Tensor> {
        self.statistics.as_ref().map(|s| s.var.as_tensor())
    }

    /// PyTorch's third buffer, a scalar i64 that instance norm never counts up.
    pub fn num_batches_tracked(&self) -> Option<&Tensor> {
        self.statistics.as_ref()?.count.as_ref().map(Var::as_tensor)
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// The options that the layer follows.
    pub fn options(&self) -> InstanceNormOptions {
        self.options
    }

    /// Sets the running statistics back to mean 0 and variance 1.
    ///
    /// # Errors
    /// Those of writing to a variable.
    pub fn reset_running_stats(&self) -> Result<()> {
        self.statistics.as_ref().map_or(Ok(()), RunningStatistics::reset)
    }

    /// Sets the weight to 1, the bias to 0, and resets the running statistics.
    ///
    /// # Errors
    /// A weight or bias that is not a variable; then nothing is reset.
    pub fn reset_parameters(&self) -> Result<()> {
        params::reset(OP, &[("weight", self.weight(), 1.0), ("bias", self.bias(), 0.0)])?;
        self.reset_running_stats()
    }

    /// Whether the input lacks the batch dimension.
    fn unbatched(&self, x: &Tensor) -> Result<bool> {
        let shape = x.dims();
        let unbatched = match self.dims {
            None if x.rank() >= 3 => false,
            None => bail!("{OP}: input has shape {shape:?}, expected at least 3 dimensions"),
            Some(dims) if x.rank() == dims + 2 => false,
            Some(dims) if x.rank() == dims + 1 => true,
            Some(d) => bail!("{OP}: input has shape {shape:?}, expected {} or {} dimensions", d + 1, d + 2),
        };
        let dimension = usize::from(!unbatched);
        let used = self.weight.is_some() || self.statistics.is_some();
        if used && shape[dimension] != self.num_features {
            let channels = self.num_features;
            bail!("{OP}: input has shape {shape:?}, expected {channels} channels in dimension {dimension}")
        }
        Ok(unbatched)
    }
}

impl ModuleT for InstanceNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.run(x, train, Tail::own(self.options.activation))
    }
}

impl InstanceNorm {
    /// `activation(forward(x) + skip)` in one visit; `activation` instead of the layer's own.
    ///
    /// `skip` has x's shape and dtype. Which activations are fused says
    /// [`functional::fused`](crate::functional::fused#activations).
    ///
    /// # Errors
    /// Those of the forward, and a skip of another shape or dtype.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_nn::Activation;
    /// use candle_norm::InstanceNorm;
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = InstanceNorm::from_tensors(1, None, None, None, 0.0)?;
    /// let x = Tensor::new(&[[[1f32, 3.]]], &Device::Cpu)?;
    /// assert_eq!(norm.forward_act(&x, None, Activation::Relu)?.to_vec3::<f32>()?, [[[0., 1.]]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_act(&self, x: &Tensor, skip: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        self.forward_act_t(x, skip, activation, false)
    }

    /// The same as `activation(forward_t(x, train) + skip)`.
    ///
    /// # Errors
    /// Those of [`forward_act`](Self::forward_act).
    pub fn forward_act_t(
        &self,
        x: &Tensor,
        skip: Option<&Tensor>,
        activation: Activation,
        train: bool,
    ) -> Result<Tensor> {
        self.run(x, train, Some(Tail { skip, activation }))
    }

    fn run(&self, x: &Tensor, train: bool, tail: Option<Tail>) -> Result<Tensor> {
        if !self.unbatched(x)? {
            return self.forward_batched(x, train, tail);
        }
        let skip = tail.and_then(|tail| tail.skip).map(|skip| skip.unsqueeze(0)).transpose()?;
        let tail = tail.map(|tail| Tail { skip: skip.as_ref(), ..tail });
        self.forward_batched(&x.unsqueeze(0)?, train, tail)?.squeeze(0)
    }

    fn forward_batched(&self, x: &Tensor, train: bool, tail: Option<Tail>) -> Result<Tensor> {
        let (mean, var) = match &self.statistics {
            Some(statistics) => (Some(&statistics.mean), Some(&statistics.var)),
            None => (None, None),
        };
        let use_input_stats = train || self.statistics.is_none();
        let InstanceNormOptions { eps, momentum, .. } = self.options;
        let (w, b) = (self.weight(), self.bias());
        params::contiguous(match tail {
            None => functional::instance_norm(x, mean, var, w, b, use_input_stats, momentum, eps),
            Some(Tail { skip, activation: act }) => {
                let own = use_input_stats;
                functional::fused::instance_norm_act(x, mean, var, w, b, own, momentum, eps, skip, act)
            }
        }?)
    }
}

/// PyTorch's notation; a weight without a bias, which PyTorch lacks, is added to it.
impl fmt::Display for InstanceNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.dims {
            Some(dims) => format!("InstanceNorm{dims}d"),
            None => "InstanceNorm".to_string(),
        };
        let o = &self.options;
        let (eps, momentum) = (Float(o.eps), Float(o.momentum));
        let (affine, track) = (truth(o.affine), truth(o.track_running_stats));
        let bias = no_bias(o.affine, o.bias);
        write!(
            f,
            "{name}({}, eps={eps}, momentum={momentum}, affine={affine}, track_running_stats={track}{bias}{})",
            self.num_features,
            activation(o.activation)
        )
    }
}

/// A checkpoint with statistics for a layer that would ignore them was made by another layer.
fn check_no_running_statistics(vb: &VarBuilder) -> Result<()> {
    let found: Vec<_> =
        ["running_mean", "running_var"].into_iter().filter(|name| params::holds(vb, name)).collect();
    if found.is_empty() {
        return Ok(());
    }
    bail!(
        "{OP}: the checkpoint has {} under {:?}, expected none for a layer with \
         track_running_stats=false. Before version 0.4.0 PyTorch's instance norm kept running statistics by \
         default, so an older checkpoint holds them without meaning to: leave them out of the checkpoint if \
         the model never used them, or set track_running_stats to use them in evaluation",
        found.join(" and "),
        vb.prefix()
    )
}

/// [`InstanceNorm::with_options`] as a function.
///
/// # Errors
/// As [`InstanceNorm::with_options`].
pub fn instance_norm(
    num_features: usize,
    options: impl Into<InstanceNormOptions>,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    InstanceNorm::with_options(num_features, options, vb)
}

/// PyTorch's `InstanceNorm1d`: [`InstanceNorm::with_options`] for inputs `[N, C, L]` and `[C, L]`.
///
/// # Errors
/// As [`InstanceNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "InstanceNorm1d")]
pub fn instance_norm1d(
    num_features: usize,
    options: impl Into<InstanceNormOptions>,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    InstanceNorm::with_dims(Some(1), num_features, options.into(), vb)
}

/// PyTorch's `InstanceNorm2d`: [`InstanceNorm::with_options`] for inputs `[N, C, H, W]` and
/// `[C, H, W]`.
///
/// # Errors
/// As [`InstanceNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "InstanceNorm2d")]
pub fn instance_norm2d(
    num_features: usize,
    options: impl Into<InstanceNormOptions>,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    InstanceNorm::with_dims(Some(2), num_features, options.into(), vb)
}

/// PyTorch's `InstanceNorm3d`: [`InstanceNorm::with_options`] for inputs `[N, C, D, H, W]` and
/// `[C, D, H, W]`.
///
/// # Errors
/// As [`InstanceNorm::with_options`]; the forward fails on other ranks.
#[doc(alias = "InstanceNorm3d")]
pub fn instance_norm3d(
    num_features: usize,
    options: impl Into<InstanceNormOptions>,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    InstanceNorm::with_dims(Some(3), num_features, options.into(), vb)
}
