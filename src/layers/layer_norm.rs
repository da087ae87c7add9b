//! Layer normalization.
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! over the last dimensions of each sample, `normalized_shape`, with the biased `var`; the same in
//! training and evaluation. Ba, Kiros and Hinton, [Layer Normalization](https://arxiv.org/abs/1607.06450);
//! arguments and meaning are those of
//! [`torch.nn.LayerNorm`](https://docs.pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_norm::{LayerNorm, Module};
//! # fn main() -> candle_core::Result<()> {
//! let weight = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
//! let bias = Tensor::new(&[0f32, 10.], &Device::Cpu)?;
//! let norm = LayerNorm::new(weight, bias, 0.0);
//! let x = Tensor::new(&[[[1f32, 3.], [-20., 20.]]], &Device::Cpu)?;
//! assert_eq!(norm.forward(&x)?.to_vec3::<f32>()?, [[[-1., 11.], [-1., 11.]]]);
//! # Ok(()) }
//! ```

use super::options::options;
use super::params;
use super::repr::{activation, truth, Maybe, Tuple};
use crate::functional::check_eps;
use crate::functional::{self, Tail};
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use candle_nn::{Activation, Module, VarBuilder};
use std::fmt;

mod channels;
mod fused;

pub use super::rms_norm::{rms_norm, RmsNorm};
pub use channels::{layer_norm2d, LayerNorm2d};

/// candle-nn's configuration of [`layer_norm`], field by field.
///
/// ```
/// use candle_norm::LayerNormConfig;
/// let config = LayerNormConfig { affine: false, ..Default::default() };
/// assert_eq!(LayerNormConfig::from(1e-5), LayerNormConfig { affine: true, ..config });
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNormConfig {
    /// Added to the variance; default 1e-5.
    pub eps: f64,
    /// Whether to subtract the mean; default true. Without, this is RMS norm.
    pub remove_mean: bool,
    /// Whether there is a bias; default true. There is a weight either way.
    pub affine: bool,
}

impl Default for LayerNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, remove_mean: true, affine: true }
    }
}

/// The defaults with another `eps`.
impl From<f64> for LayerNormConfig {
    fn from(eps: f64) -> Self {
        Self { eps, ..Self::default() }
    }
}

options! {
    /// PyTorch's arguments of layer normalization.
    ///
    /// ```
    /// use candle_norm::layer_norm::LayerNormOptions;
    /// let options = LayerNormOptions::default().eps(1e-6).bias(false);
    /// assert!(options.elementwise_affine);
    /// ```
    pub struct LayerNormOptions {
        /// Added to the variance; default 1e-5.
        eps: f64 = 1e-5,
        /// Whether there are a weight and a bias; default true.
        elementwise_affine: bool = true,
        /// Whether there is a bias besides the weight; default true.
        bias: bool = true,
        /// What the forward applies to the norm's output, in the same visit; default none.
        activation: Option<Activation> = None,
    }
}

/// Layer normalization over the last dimensions: see the [module](self).
///
/// [`with_options`](Self::with_options), [`from_tensors`](Self::from_tensors) and
/// [`no_affine`](Self::no_affine) name the `normalized_shape`, and weight and bias have that shape. The
/// constructors of candle-nn normalize the last dimension, and weight and bias broadcast against the input.
///
/// The input is f16, bf16, f32 or f64, whatever of these the parameters are, and of any memory order; the
/// output has the input's shape and dtype, and is contiguous.
///
/// # Errors
/// The forward fails on an input whose last dimensions are not `normalized_shape`, or against which weight
/// and bias do not broadcast.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// None for the last dimension of the input, whatever the shape of weight and bias.
    normalized_shape: Option<Shape>,
    /// Ones, and not used, where the layer has no weight.
    weight: Tensor,
    has_weight: bool,
    bias: Option<Tensor>,
    remove_mean: bool,
    /// None for the machine epsilon of the dtype that the input is accumulated in.
    eps: Option<f64>,
    /// RMS norm's: added to the weight.
    pub(super) weight_offset: f64,
    activation: Option<Activation>,
}

impl LayerNorm {
    /// A layer with PyTorch's arguments over the last dimensions `normalized_shape`; parameters
    /// `weight` (or `gamma`) and `bias` (or `beta`) come from `vb`.
    ///
    /// # Errors
    /// An empty `normalized_shape`, a tensor that `vb` lacks or has in another shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_norm::{layer_norm::LayerNormOptions, LayerNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = candle_nn::VarMap::new();
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let norm = LayerNorm::with_options((3, 4), LayerNormOptions::default().bias(false), vb)?;
    /// assert_eq!(norm.to_string(), "LayerNorm((3, 4), eps=1e-05, elementwise_affine=True)");
    /// assert_eq!(norm.normalized_shape(), [3, 4]);
    /// # Ok(()) }
    /// ```
    pub fn with_options(
        normalized_shape: impl Into<Shape>,
        options: impl Into<LayerNormOptions>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let options = options.into();
        check_eps("layer-norm", options.eps)?;
        let (shape, affine) = (normalized_shape.into(), options.elementwise_affine);
        let norm = Self::get(&shape, affine, affine && options.bias, true, Some(options.eps), 0.0, vb)?;
        Self { activation: options.activation, ..norm }.over(shape)
    }

    /// A layer of tensors that come from elsewhere than a `VarBuilder`: a GGUF file, a shard.
    ///
    /// Weight and bias are what is given, whatever the options say about them.
    ///
    /// # Errors
    /// An empty `normalized_shape`, a tensor of another shape, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{LayerNorm, Module};
    /// # fn main() -> candle_core::Result<()> {
    /// let weight = Tensor::new(&[2f32, 3.], &Device::Cpu)?;
    /// let norm = LayerNorm::from_tensors(2, Some(weight), None, 0.0)?;
    /// let y = norm.forward(&Tensor::new(&[[1f32, 3.]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[-2., 3.]]);
    /// # Ok(()) }
    /// ```
    pub fn from_tensors(
        normalized_shape: impl Into<Shape>,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        options: impl Into<LayerNormOptions>,
    ) -> Result<Self> {
        let LayerNormOptions { eps, activation, .. } = options.into();
        let norm = Self::of_tensors(normalized_shape.into(), weight, bias, true, Some(eps))?;
        Ok(Self { activation, ..norm })
    }

    /// A layer without weight and bias.
    ///
    /// # Errors
    /// An empty `normalized_shape`, a negative `eps`.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{LayerNorm, Module};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = LayerNorm::no_affine(2, 0.0)?;
    /// let y = norm.forward(&Tensor::new(&[[1f32, 3.]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[-1., 1.]]);
    /// # Ok(()) }
    /// ```
    pub fn no_affine(normalized_shape: impl Into<Shape>, eps: f64) -> Result<Self> {
        Self::from_tensors(normalized_shape, None, None, eps)
    }

    /// The one way from tensors with a named shape to a layer, RMS norm included.
    pub(super) fn of_tensors(
        shape: Shape,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        remove_mean: bool,
        eps: Option<f64>,
    ) -> Result<Self> {
        let op = op(remove_mean);
        check_eps(op, eps.unwrap_or(0.0))?;
        params::check_shape(op, "weight", weight.as_ref(), shape.dims())?;
        params::check_shape(op, "bias", bias.as_ref(), shape.dims())?;
        let has_weight = weight.is_some();
        let weight = match weight {
            Some(weight) => weight,
            None => Tensor::ones(&shape, DType::F32, &Device::Cpu)?,
        };
        Self { has_weight, eps, ..Self::last_dim(weight, bias, remove_mean, 0.0) }.over(shape)
    }

    /// The layer with a named shape.
    pub(super) fn over(self, shape: Shape) -> Result<Self> {
        if shape.rank() == 0 {
            bail!("{}: expected normalized_shape to have at least one dimension, got none", self.op())
        }
        Ok(Self { normalized_shape: Some(shape), ..self })
    }

    /// The one way from a builder to a layer, RMS norm included; no shape is named yet.
    pub(super) fn get(
        shape: &Shape,
        has_weight: bool,
        has_bias: bool,
        remove_mean: bool,
        eps: Option<f64>,
        weight_offset: f64,
        vb: VarBuilder,
    ) -> Result<Self> {
        // Checkpoints that began in TensorFlow say gamma and beta.
        let name =
            |name, alias| if !vb.contains_tensor(name) && vb.contains_tensor(alias) { alias } else { name };
        let op = op(remove_mean);
        let weight = match has_weight {
            true => params::param(op, &vb, shape, name("weight", "gamma"), 1.0 - weight_offset)?,
            false => Tensor::ones(shape, vb.dtype(), vb.device())?,
        };
        let bias = match has_bias {
            true => Some(params::bias(op, &vb, shape, name("bias", "beta"))?),
            false => None,
        };
        Ok(Self { has_weight, eps, weight_offset, ..Self::last_dim(weight, bias, remove_mean, 0.0) })
    }

    /// candle-nn's layer of these tensors, over the last dimension, of length `n`: weight and bias have shape
    /// `[n]`, or any other that broadcasts against the input.
    ///
    /// `[n]` is the fast one, with any number of ones before. Several dimensions are normalized by a layer
    /// [`from_tensors`](Self::from_tensors). Cannot fail; what does not fit makes the forward fail.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self::last_dim(weight, Some(bias), true, eps)
    }

    /// As [`LayerNorm::new`], without a bias.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{LayerNorm, Module};
    /// # fn main() -> candle_core::Result<()> {
    /// let x = Tensor::new(&[[0f32, 2.], [8., 16.]], &Device::Cpu)?;
    /// let norm = LayerNorm::new_no_bias(x.ones_like()?, 0.0);
    /// assert_eq!(norm.forward(&x)?.to_vec2::<f32>()?, [[-1., 1.], [-1., 1.]]);
    /// # Ok(()) }
    /// ```
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self::last_dim(weight, None, true, eps)
    }

    /// RMS norm: no bias, and the mean stays.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{LayerNorm, Module};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = LayerNorm::rms_norm(Tensor::new(&[1f32, 1.], &Device::Cpu)?, 0.0);
    /// let y = norm.forward(&Tensor::new(&[[1f32, 7.]], &Device::Cpu)?)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 1.4]]);
    /// # Ok(()) }
    /// ```
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self::last_dim(weight, None, false, eps)
    }

    fn last_dim(weight: Tensor, bias: Option<Tensor>, remove_mean: bool, eps: f64) -> Self {
        Self {
            normalized_shape: None,
            weight,
            has_weight: true,
            bias,
            remove_mean,
            eps: Some(eps),
            weight_offset: 0.0,
            activation: None,
        }
    }

    /// The dimensions normalized over; the weight's last one where a constructor of candle-nn named none.
    pub fn normalized_shape(&self) -> &[usize] {
        match &self.normalized_shape {
            Some(shape) => shape.dims(),
            None => &self.weight.dims()[self.weight.rank().saturating_sub(1)..],
        }
    }

    /// Whether there is a weight.
    pub fn elementwise_affine(&self) -> bool {
        self.has_weight
    }

    /// The weight; ones of `normalized_shape` where the layer has none, since candle-nn's signature has no
    /// `Option` here.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps.unwrap_or(f32::EPSILON.into())
    }

    /// Whether the mean is subtracted.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }

    /// Sets the weight to 1 and the bias to 0.
    ///
    /// # Errors
    /// A weight or bias that is not a variable; then none is set.
    pub fn reset_parameters(&self) -> Result<()> {
        let weight = self.has_weight.then_some(&self.weight);
        params::reset(self.op(), &[("weight", weight, 1.0 - self.weight_offset), ("bias", self.bias(), 0.0)])
    }

    fn used_weight(&self) -> Option<&Tensor> {
        self.has_weight.then_some(&self.weight)
    }

    fn eps_for(&self, x: &Tensor) -> f64 {
        match (self.eps, x.dtype()) {
            (Some(eps), _) => eps,
            (None, DType::F64) => f64::EPSILON,
            (None, _) => f32::EPSILON.into(),
        }
    }

    fn run(&self, x: &Tensor, tail: Option<Tail>) -> Result<Tensor> {
        let (op, center, eps) = (self.op(), self.remove_mean, self.eps_for(x));
        let (weight, bias) = (self.used_weight(), self.bias());
        match &self.normalized_shape {
            None => functional::last_dim(op, x, weight, bias, eps, center, tail),
            Some(shape) => {
                let (shape, offset) = (shape.dims(), self.weight_offset);
                functional::contiguous_layer(op, x, shape, weight, bias, offset, eps, center, tail)
            }
        }
    }

    fn op(&self) -> &'static str {
        op(self.remove_mean)
    }

    pub(super) fn fmt_as(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shape, eps, affine) = (Tuple(self.normalized_shape()), Maybe(self.eps), truth(self.has_weight));
        write!(f, "{name}({shape}, eps={eps}, elementwise_affine={affine}{})", activation(self.activation))
    }
}

fn op(remove_mean: bool) -> &'static str {
    if remove_mean {
        "layer-norm"
    } else {
        "rms-norm"
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Tail::own(self.activation))
    }
}

/// PyTorch's notation.
impl fmt::Display for LayerNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_as(if self.remove_mean { "LayerNorm" } else { "RMSNorm" }, f)
    }
}

/// candle-nn's constructor over the last dimension, of length `size`: `weight` (or `gamma`) and,
/// with [`LayerNormConfig::affine`], `bias` (or `beta`) from `vb`.
///
/// # Errors
/// A tensor that `vb` lacks or has in another shape, a negative `eps`.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_norm::{layer_norm, LayerNormConfig};
/// # fn main() -> candle_core::Result<()> {
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = layer_norm(16, 1e-5, vb.pp("a"))?;
/// let norm = layer_norm(16, LayerNormConfig { affine: false, ..Default::default() }, vb.pp("b"))?;
/// assert!(norm.bias().is_none());
/// # Ok(()) }
/// ```
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
    let LayerNormConfig { eps, remove_mean, affine } = config.into();
    check_eps(op(remove_mean), eps)?;
    LayerNorm::get(&size.into(), true, affine, remove_mean, Some(eps), 0.0, vb)
}

/// As [`layer_norm`], without a bias.
///
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}
