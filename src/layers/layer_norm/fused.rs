//! Layer and RMS norm with what stands around them in a model.
//!
//! Apart from the layers, whose constructors and plain forward are candle-nn's and PyTorch's; this is neither's.

use super::{LayerNorm, RmsNorm};
use crate::functional::{self, fused::AddNorm, Tail};
use candle_core::{bail, Result, Tensor};
use candle_nn::{Activation, Module};

impl LayerNorm {
    /// The norm of `x + residual` and that sum, in one visit: the residual stream of a transformer.
    ///
    /// ```text
    /// sum    = x + residual              rounded to the residual's dtype
    /// normed = norm(sum)                 in x's dtype
    /// ```
    ///
    /// `residual` has x's shape and any of the four dtypes; both tensors are contiguous. The layer's activation,
    /// if it has one, is applied to `normed`.
    ///
    /// # Errors
    /// Those of the forward, and a residual of another shape.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{functional::fused::AddNorm, LayerNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = LayerNorm::no_affine(2, 0.0)?;
    /// let new = |a, b| Tensor::new(&[[a, b]], &Device::Cpu);
    /// let AddNorm { normed, sum } = norm.forward_add(&new(0f32, 1.)?, &new(1f32, 2.)?)?;
    /// assert_eq!(sum.to_vec2::<f32>()?, [[1., 3.]]);
    /// assert_eq!(normed.to_vec2::<f32>()?, [[-1., 1.]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<AddNorm> {
        let op = if self.remove_mean { "add-layer-norm" } else { "add-rms-norm" };
        let (params, eps, center) = ([self.used_weight(), self.bias()], self.eps_for(x), self.remove_mean);
        let both = match &self.normalized_shape {
            None => functional::add_last_dim(op, x, residual, params, eps, center),
            Some(shape) => {
                let (shape, offset) = (shape.dims(), self.weight_offset);
                functional::fused::contiguous_add(op, x, residual, shape, params, offset, eps, center)
            }
        }?;
        match self.activation {
            None => Ok(both),
            Some(activation) => Ok(AddNorm { normed: activation.forward(&both.normed)?, ..both }),
        }
    }

    /// `activation(norm(x) + skip)` in one visit; `activation` instead of the layer's own.
    ///
    /// `skip` has x's shape and dtype. Which activations are fused says
    /// [`functional::fused`](crate::functional::fused#activations).
    ///
    /// # Errors
    /// Those of the forward, and a skip of another shape or dtype.
    pub fn forward_act(&self, x: &Tensor, skip: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        self.run(x, Some(Tail { skip, activation }))
    }

    /// `(1 + scale) * norm(x) + shift` in one visit: the modulation of diffusion transformers.
    ///
    /// `scale` and `shift` are `[N, D]`, `[N, 1, D]` or of x's shape, as for
    /// [`modulated_layer_norm`](functional::fused::modulated_layer_norm). A weight and a bias of the layer are
    /// multiplied into scale and shift first.
    ///
    /// # Errors
    /// Those of the forward, a scale or shift of another shape, a layer with an activation, and one whose
    /// weight or bias is not a vector.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::LayerNorm;
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = LayerNorm::no_affine(2, 0.0)?;
    /// let x = Tensor::new(&[[[1f32, 3.]], [[5., 9.]]], &Device::Cpu)?;
    /// let scale = Tensor::new(&[[0f32, 0.], [1., 2.]], &Device::Cpu)?;
    /// let y = norm.forward_modulated(&x, &scale, None)?;
    /// assert_eq!(y.to_vec3::<f32>()?, [[[-1., 1.]], [[-2., 3.]]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_modulated(&self, x: &Tensor, scale: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        let op = if self.remove_mean { "modulated-layer-norm" } else { "modulated-rms-norm" };
        if self.activation.is_some() {
            bail!("{op}: expected a layer without an activation, got {self}")
        }
        let (params, eps, center) = ([self.used_weight(), self.bias()], self.eps_for(x), self.remove_mean);
        let (weight, bias) = match &self.normalized_shape {
            Some(_) => (params[0].cloned(), params[1].cloned()),
            None => match functional::vectors(op, x, params)? {
                Some([weight, bias]) => (weight, bias),
                None => bail!("{op}: weight or bias is no vector, expected {:?}", self.normalized_shape()),
            },
        };
        let (shape, params, offset) =
            (self.normalized_shape(), [weight.as_ref(), bias.as_ref()], self.weight_offset);
        functional::fused::modulated_affine(op, x, shape, params, offset, scale, shift, eps, center)
    }
}

impl RmsNorm {
    /// The norm of `x + residual` and that sum, in one visit: see [`LayerNorm::forward_add`].
    ///
    /// # Errors
    /// Those of the forward, and a residual of another shape.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_norm::{functional::fused::AddNorm, RmsNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// let norm = RmsNorm::new(Tensor::new(&[1f32, 1.], &Device::Cpu)?, 0.0);
    /// let new = |a, b| Tensor::new(&[[a, b]], &Device::Cpu);
    /// let AddNorm { normed, sum } = norm.forward_add(&new(0f32, 3.)?, &new(1f32, 4.)?)?;
    /// assert_eq!(sum.to_vec2::<f32>()?, [[1., 7.]]);
    /// assert_eq!(normed.to_vec2::<f32>()?, [[0.2, 1.4]]);
    /// # Ok(()) }
    /// ```
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<AddNorm> {
        self.0.forward_add(x, residual)
    }

    /// `(1 + scale) * norm(x) + shift` in one visit: see [`LayerNorm::forward_modulated`].
    ///
    /// # Errors
    /// Those of the forward, and a scale or shift of another shape.
    pub fn forward_modulated(&self, x: &Tensor, scale: &Tensor, shift: Option<&Tensor>) -> Result<Tensor> {
        self.0.forward_modulated(x, scale, shift)
    }
}
