//! Batch normalization.
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! over every dimension but the channels of `[N, C, ..]`. In training `mean` and the biased `var` are
//! the batch's; in evaluation they are running averages of what training saw, with the unbiased
//! variance. Ioffe and Szegedy, [Batch Normalization](https://arxiv.org/abs/1502.03167); arguments and
//! meaning are those of [`torch.nn.BatchNorm2d`](https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html).
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_norm::{batch_norm::{batch_norm2d, BatchNormOptions}, ModuleT};
//! use candle_nn::{VarBuilder, VarMap};
//! # fn main() -> candle_core::Result<()> {
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let bn = batch_norm2d(3, BatchNormOptions::default().momentum(0.2), vb)?;
//! assert_eq!(
//!     bn.to_string(),
//!     "BatchNorm2d(3, eps=1e-05, momentum=0.2, affine=True, track_running_stats=True)"
//! );
//! let x = Tensor::randn(5f32, 2., (4, 3, 8, 8), &Device::Cpu)?;
//! let y = bn.forward_t(&x, true)?; // normalizes with the batch, moves the running statistics
//! assert!(y.mean_all()?.to_scalar::<f32>()?.abs() < 1e-5);
//! let y = bn.forward_t(&x, false)?; // normalizes with the running statistics
//! assert_eq!(y.dims(), x.dims());
//! # Ok(()) }
//! ```

use super::params;
use super::repr::{activation, no_bias, truth, Float, Maybe};
use super::running::RunningStatistics;
use crate::autograd::Synchronized;
use crate::functional::{self, Tail};
use candle_core::{bail, Result, Tensor, Var};
use candle_nn::{Activation, ModuleT};
use std::fmt;

mod build;
mod config;
mod frozen;

pub use build::{batch_norm, batch_norm1d, batch_norm2d, batch_norm3d};
pub use config::{BatchNormConfig, BatchNormOptions};
pub use frozen::FrozenBatchNorm;

const OP: &str = "batch-norm";

/// Batch normalization of `[N, C, ..]`: see the [module](self).
///
/// There is no `Module`, since training and evaluation differ: call [`ModuleT::forward_t`], or
/// `x.apply_t(&bn, train)`. The input is f16, bf16, f32 or f64, whatever of these the parameters are; the
/// output has the input's shape and dtype, and is contiguous. The running statistics are f32 (f64 in
/// an f64 model), receive no gradient, and are shared by clones of the layer.
///
/// # Errors
/// The forward fails on an input with other channels or rank than the layer's, and in training on a
/// single value per channel. It then leaves the running statistics as they were.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    num_features: usize,
    /// Spatial dimensions plus one as in PyTorch's names: 1, 2 or 3; any if none.
    dims: Option<usize>,
    affine: Option<Affine>,
    statistics: RunningStatistics,
    remove_mean: bool,
    options: BatchNormOptions,
    /// The ranks whose batches count as one in training.
    pub(in crate::layers) sync: Option<Synchronized>,
}

#[derive(Debug, Clone)]
struct Affine {
    weight: Tensor,
    /// Zeros, and not used, where the options say that there is no bias.
    bias: Tensor,
}

impl BatchNorm {
    /// Number of channels.
    pub fn num_features(&self) -> usize {
        self.num_features
    }

    /// Running mean `[C]`; zeros where the layer tracks none, since candle-nn's signature has no `Option`
    /// here.
    pub fn running_mean(&self) -> &Tensor {
        self.statistics.mean.as_tensor()
    }

    /// Running unbiased variance `[C]`; ones where the layer tracks none, since candle-nn's signature has no
    /// `Option` here.
    pub fn running_var(&self) -> &Tensor {
        self.statistics.var.as_tensor()
    }

    /// Batches that moved the running statistics: a scalar i64 on the CPU. None for a layer that does
    /// not count, which is one made by [`batch_norm`] or [`BatchNorm::new`] as candle-nn makes it.
    pub fn num_batches_tracked(&self) -> Option<&Tensor> {
        self.statistics.count.as_ref().map(Var::as_tensor)
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.options.eps
    }

    /// Weight of the next batch in the running statistics. For a cumulative average
    /// ([`BatchNormOptions::momentum`] of `None`) that is one over the number of batches then seen, and NaN
    /// where the layer has no running statistics and so counts none.
    pub fn momentum(&self) -> f64 {
        self.statistics.factor(self.options.momentum).unwrap_or(f64::NAN)
    }

    /// The options that the layer follows.
    pub fn options(&self) -> BatchNormOptions {
        self.options
    }

    /// Weight `[C]`.
    pub fn weight(&self) -> Option<&Tensor> {
        self.affine.as_ref().map(|affine| &affine.weight)
    }

    /// Bias `[C]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.affine.as_ref().filter(|_| self.options.bias).map(|affine| &affine.bias)
    }

    /// Weight and bias, the bias as zeros where the layer has a weight only.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.affine.as_ref().map(|affine| (&affine.weight, &affine.bias))
    }

    /// Whether training subtracts the mean ([`BatchNormConfig::remove_mean`]).
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }

    /// Freezes or thaws the running statistics ([`BatchNormOptions::frozen_statistics`]).
    ///
    /// # Errors
    /// Freezing a layer that tracks none.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_norm::{batch_norm::batch_norm1d, ModuleT};
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let mut bn = batch_norm1d(2, 1e-5, vb)?;
    /// bn.set_frozen_statistics(true)?;
    /// bn.forward_t(&Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?, true)?;
    /// assert_eq!(bn.running_mean().to_vec1::<f32>()?, [0., 0.]);
    /// # Ok(()) }
    /// ```
    pub fn set_frozen_statistics(&mut self, frozen: bool) -> Result<()> {
        build::check_frozen(frozen, self.options.track_running_stats)?;
        self.options.frozen_statistics = frozen;
        Ok(())
    }

    /// Sets the running statistics back to mean 0, variance 1 and no batches seen.
    ///
    /// # Errors
    /// Those of writing to a variable.
    pub fn reset_running_stats(&self) -> Result<()> {
        self.statistics.reset()
    }

    /// Sets the weight to 1, the bias to 0, and resets the running statistics.
    ///
    /// # Errors
    /// A weight or bias that is not a variable; then nothing is reset.
    pub fn reset_parameters(&self) -> Result<()> {
        params::reset(OP, &[("weight", self.weight(), 1.0), ("bias", self.bias(), 0.0)])?;
        self.reset_running_stats()
    }

    /// The forward in training: `forward_t(x, true)`.
    ///
    /// # Errors
    /// As the layer's.
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, true)
    }

    /// Whether a forward normalizes with the batch's own statistics.
    pub(crate) fn uses_batch(&self, train: bool) -> bool {
        !self.options.track_running_stats || (train && !self.options.frozen_statistics)
    }

    /// Running statistics, if the layer tracks any.
    pub(crate) fn tracked(&self) -> Option<&RunningStatistics> {
        self.options.track_running_stats.then_some(&self.statistics)
    }

    pub(crate) fn check_input(&self, x: &Tensor) -> Result<()> {
        let (rank, shape) = (x.rank(), x.dims());
        match self.dims {
            None if rank < 2 => bail!("{OP}: input has shape {shape:?}, expected at least 2 dimensions"),
            Some(1) if !(2..=3).contains(&rank) => {
                bail!("{OP}: input has shape {shape:?}, expected 2 or 3 dimensions")
            }
            Some(dims) if dims > 1 && rank != dims + 2 => {
                bail!("{OP}: input has shape {shape:?}, expected {} dimensions", dims + 2)
            }
            _ if shape[1] != self.num_features => {
                bail!(
                    "{OP}: input has shape {shape:?}, expected {} channels in dimension 1",
                    self.num_features
                )
            }
            _ => Ok(()),
        }
    }

    /// PyTorch's name of the layer.
    fn name(&self) -> String {
        self.dims.map_or("BatchNorm".into(), |dims| format!("BatchNorm{dims}d"))
    }

    fn forward_batch(&self, x: &Tensor, train: bool, tail: Option<Tail>) -> Result<Tensor> {
        let (weight, bias, eps) = (self.weight(), self.bias(), self.options.eps);
        // Without running statistics evaluation uses the batch's too, and communicates nothing.
        let sync = self.sync.as_ref().filter(|_| train);
        let by_batch = |mean, var, factor| match (sync, tail) {
            (Some(sync), None) => functional::sync_batch_norm(x, mean, var, weight, bias, factor, eps, sync),
            (Some(sync), Some(tail)) => {
                functional::fused::sync_batch_norm_act(x, mean, var, weight, bias, factor, eps, sync, tail)
            }
            (None, tail) => normalize(x, (mean, var), (weight, bias), true, factor, eps, tail),
        };
        let Some(running) = self.tracked() else {
            return by_batch(None, None, 0.0);
        };
        let factor = running.factor(self.options.momentum)?;
        let y = if self.remove_mean {
            by_batch(Some(&running.mean), Some(&running.var), factor)?
        } else {
            functional::uncentered_batch_norm(x, &running.var, weight, bias, factor, eps, tail)?
        };
        running.count_batch()?;
        Ok(y)
    }
}

/// The function of `functional` that `tail` asks for.
fn normalize(
    x: &Tensor,
    (mean, var): (Option<&Var>, Option<&Var>),
    (weight, bias): (Option<&Tensor>, Option<&Tensor>),
    training: bool,
    momentum: f64,
    eps: f64,
    tail: Option<Tail>,
) -> Result<Tensor> {
    match tail {
        None => functional::batch_norm(x, mean, var, weight, bias, training, momentum, eps),
        Some(Tail { skip, activation: act }) => {
            functional::fused::batch_norm_act(x, mean, var, weight, bias, training, momentum, eps, skip, act)
        }
    }
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.run(x, train, Tail::own(self.options.activation))
    }
}

impl BatchNorm {
    /// `activation(forward_t(x, train) + skip)` in one visit, as every block of a ResNet ends; `activation`
    /// instead of the layer's own.
    ///
    /// `skip` has x's shape and dtype. Which activations are fused says
    /// [`functional::fused`](crate::functional::fused#activations). With the statistics of several ranks the
    /// activation is candle's own operation behind the norm.
    ///
    /// # Errors
    /// Those of the forward, and a skip of another shape or dtype; then no running statistics have moved.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::Activation;
    /// use candle_norm::batch_norm;
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = batch_norm(1, 0.0, vb)?;
    /// let (x, skip) = (Tensor::new(&[[1f32], [3.]], &Device::Cpu)?, Tensor::new(&[[0f32], [1.]], &Device::Cpu)?);
    /// let y = norm.forward_act(&x, Some(&skip), Activation::Relu, true)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.], [2.]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_act(
        &self,
        x: &Tensor,
        skip: Option<&Tensor>,
        activation: Activation,
        train: bool,
    ) -> Result<Tensor> {
        self.run(x, train, Some(Tail { skip, activation }))
    }

    fn run(&self, x: &Tensor, train: bool, tail: Option<Tail>) -> Result<Tensor> {
        let checked = self.check_input(x);
        if self.uses_batch(train) {
            match self.sync.as_ref().filter(|_| train) {
                Some(sync) => sync.or_tell(checked)?,
                None => checked?,
            }
            return params::contiguous(self.forward_batch(x, train, tail)?);
        }
        checked?;
        let (mean, var) = (Some(&self.statistics.mean), Some(&self.statistics.var));
        let (weight, bias) = (self.weight(), self.bias());
        let eps = self.options.eps;
        params::contiguous(normalize(x, (mean, var), (weight, bias), false, 0.0, eps, tail)?)
    }
}

/// PyTorch's notation; a weight without a bias, which PyTorch lacks, is added to it.
impl fmt::Display for BatchNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.dims {
            _ if self.sync.is_some() => "SyncBatchNorm".to_string(),
            _ => self.name(),
        };
        let o = &self.options;
        let (eps, momentum) = (Float(o.eps), Maybe(o.momentum));
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
