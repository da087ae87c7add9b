//! Group normalization.
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! over groups of `num_channels / num_groups` channels of each sample of `[N, C, ..]`, with the biased
//! `var`; the same in training and evaluation. Wu and He,
//! [Group Normalization](https://arxiv.org/abs/1803.08494); arguments and meaning are those of
//! [`torch.nn.GroupNorm`](https://docs.pytorch.org/docs/stable/generated/torch.nn.GroupNorm.html).
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_norm::{group_norm, Module};
//! # fn main() -> candle_core::Result<()> {
//! let vars = candle_nn::VarMap::new();
//! let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let norm = group_norm(2, 4, 0.0, vb)?;
//! let x = Tensor::new(&[[[1f32], [3.], [10.], [30.]]], &Device::Cpu)?;
//! assert_eq!(norm.forward(&x)?.to_vec3::<f32>()?, [[[-1.], [1.], [-1.], [1.]]]);
//! assert_eq!(norm.to_string(), "GroupNorm(2, 4, eps=0.0, affine=True)");
//! # Ok(()) }
//! ```

use super::options::options;
use super::params;
use super::repr::{activation, no_bias, truth, Float};
use crate::functional::{self, Tail};
use crate::functional::{check_eps, check_groups};
use candle_core::{bail, Result, Tensor};
use candle_nn::{Activation, Module, VarBuilder};
use std::fmt;

options! {
    /// PyTorch's arguments of group normalization.
    ///
    /// ```
    /// use candle_norm::group_norm::GroupNormOptions;
    /// assert!(!GroupNormOptions::default().eps(1e-6).affine(false).affine);
    /// ```
    pub struct GroupNormOptions {
        /// Added to the variance; default 1e-5.
        eps: f64 = 1e-5,
        /// Whether there are a weight and a bias; default true.
        affine: bool = true,
        /// Whether an affine layer has a bias besides its weight; default true.
        bias: bool = true,
        /// What the forward applies to the norm's output, in the same visit; default none.
        activation: Option<Activation> = None,
    }
}

/// Group normalization of `[N, C, ..]`, of any rank from 2 up: see the [module](self).
///
/// The input is f16, bf16, f32 or f64, whatever of these the parameters are; the output has the input's
/// shape and dtype, and is contiguous.
///
/// # Errors
/// The forward fails on an input with other channels than the layer's.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    num_groups: usize,
    num_channels: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    eps: f64,
    activation: Option<Activation>,
}

impl GroupNorm {
    /// A layer with PyTorch's arguments; parameters `weight` and `bias` come from `vb`.
    ///
    /// # Errors
    /// `num_groups` that does not divide `num_channels`, a tensor that `vb` lacks or has in another
    /// shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_norm::{group_norm::GroupNormOptions, GroupNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = GroupNorm::with_options(8, 32, GroupNormOptions::default().affine(false), vb.clone())?;
    /// assert!(norm.weight().is_none());
    /// assert!(GroupNorm::with_options(5, 32, 1e-5, vb).is_err());
    /// # Ok(()) }
    /// ```
    pub fn with_options(
        num_groups: usize,
        num_channels: usize,
        options: impl Into<GroupNormOptions>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let GroupNormOptions { eps, affine, bias, activation } = options.into();
        check(num_groups, num_channels, eps)?;
        let weight = affine.then(|| params::weight(OP, &vb, num_channels, "weight")).transpose()?;
        let bias = (affine && bias).then(|| params::bias(OP, &vb, num_channels, "bias")).transpose()?;
        Ok(Self { num_groups, num_channels, weight, bias, eps, activation })
    }

    /// A layer of tensors that come from elsewhere than a `VarBuilder`: a GGUF file, a shard.
    ///
    /// Weight and bias are what is given, whatever the options say about them.
    ///
    /// # Errors
    /// `num_groups` that does not divide `num_channels`, a tensor of another shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{GroupNorm, Module};
    /// # fn main() -> candle_core::Result<()> {
    /// let weight = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
    /// let norm = GroupNorm::from_tensors(1, 2, Some(weight), None, 0.0)?;
    /// let y = norm.forward(&Tensor::new(&[[[1f32], [3.]]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec3::<f32>()?, [[[-1.], [2.]]]);
    /// # Ok(()) }
    /// ```
    pub fn from_tensors(
        num_groups: usize,
        num_channels: usize,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        options: impl Into<GroupNormOptions>,
    ) -> Result<Self> {
        let GroupNormOptions { eps, activation, .. } = options.into();
        check(num_groups, num_channels, eps)?;
        params::check_shape(OP, "weight", weight.as_ref(), &[num_channels])?;
        params::check_shape(OP, "bias", bias.as_ref(), &[num_channels])?;
        Ok(Self { num_groups, num_channels, weight, bias, eps, activation })
    }

    /// A layer of these tensors, each of `num_channels` elements in any shape. Channels come before groups
    /// here, as in candle-nn.
    ///
    /// # Errors
    /// `num_groups` that does not divide `num_channels`, a negative `eps`. Tensors of other sizes make the
    /// forward fail.
    pub fn new(
        weight: Tensor,
        bias: Tensor,
        num_channels: usize,
        num_groups: usize,
        eps: f64,
    ) -> Result<Self> {
        check(num_groups, num_channels, eps)?;
        let (weight, bias) = (Some(weight), Some(bias));
        Ok(Self { num_groups, num_channels, weight, bias, eps, activation: None })
    }

    /// Number of groups.
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// Number of channels.
    pub fn num_channels(&self) -> usize {
        self.num_channels
    }

    /// Weight, of `C` elements.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// Bias, of `C` elements.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// `activation(norm(x) + skip)` in one visit, as every block of a diffusion model's UNet begins;
    /// `activation` instead of the layer's own.
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
    /// use candle_norm::{GroupNorm, GroupNormOptions};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = GroupNorm::from_tensors(2, 4, None, None, 0.0)?;
    /// let x = Tensor::new(&[[1f32, 3., 10., 30.]], &Device::Cpu)?;
    /// assert_eq!(norm.forward_act(&x, None, Activation::Relu)?.to_vec2::<f32>()?, [[0., 1., 0., 1.]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_act(&self, x: &Tensor, skip: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        self.run(x, Some(Tail { skip, activation }))
    }

    fn run(&self, x: &Tensor, tail: Option<Tail>) -> Result<Tensor> {
        if x.rank() < 2 || x.dim(1)? != self.num_channels {
            let (shape, channels) = (x.dims(), self.num_channels);
            bail!("{OP}: input has shape {shape:?}, expected {channels} channels in dimension 1")
        }
        let per_channel = |param: Option<&Tensor>| match param {
            Some(param) if param.rank() != 1 => param.flatten_all().map(Some),
            param => Ok(param.cloned()),
        };
        let (weight, bias) = (per_channel(self.weight())?, per_channel(self.bias())?);
        let (groups, weight, bias, eps) = (self.num_groups, weight.as_ref(), bias.as_ref(), self.eps);
        params::contiguous(match tail {
            None => functional::group_norm(x, groups, weight, bias, eps),
            Some(Tail { skip, activation }) => {
                functional::fused::group_norm_act(x, groups, weight, bias, eps, skip, activation)
            }
        }?)
    }

    /// Sets the weight to 1 and the bias to 0.
    ///
    /// # Errors
    /// A weight or bias that is not a variable; then none is set.
    pub fn reset_parameters(&self) -> Result<()> {
        params::reset(OP, &[("weight", self.weight(), 1.0), ("bias", self.bias(), 0.0)])
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Tail::own(self.activation))
    }
}

/// PyTorch's notation; a weight without a bias, which PyTorch lacks, is added to it.
impl fmt::Display for GroupNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (eps, affine) = (Float(self.eps), truth(self.weight.is_some()));
        let bias = no_bias(self.weight.is_some(), self.bias.is_some());
        let act = activation(self.activation);
        write!(
            f,
            "GroupNorm({}, {}, eps={eps}, affine={affine}{bias}{act})",
            self.num_groups, self.num_channels
        )
    }
}

const OP: &str = "group-norm";

fn check(num_groups: usize, num_channels: usize, eps: f64) -> Result<()> {
    check_eps(OP, eps)?;
    check_groups(OP, num_groups, num_channels)
}

/// candle-nn's constructor: `weight` and `bias` from `vb`. Groups come before channels here, as in
/// PyTorch.
///
/// # Errors
/// As [`GroupNorm::with_options`].
pub fn group_norm(num_groups: usize, num_channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
    GroupNorm::with_options(num_groups, num_channels, eps, vb)
}
