//! Norms with what stands around them, in the same visit: residual, activation, skip, modulation, offset, gate.
//!
//! A norm is bound by memory: what is done to its input before and to its output after costs a pass each, and
//! one more in the backward, unless it is done while the element is there. Each also costs candle a node of
//! the graph, with a zero-filled tensor and an addition in `backward`.
//!
//! ```text
//! s    = input + residual                     rounded as the addition alone would round it
//! xhat = (s - mean) / sqrt(var + eps)
//! z    = xhat * (weight + offset) + bias + skip
//! y    = activation(z)                        z is not rounded before
//! ```
//!
//! Everything of the plain functions holds here too: dtypes, memory orders, errors. Tensors of the input's
//! shape (`residual`, `skip`, `gate`) may lie in any order. All of them get gradients, and nothing is kept
//! for these but the arguments and the statistics: `z` is computed again.
//!
//! # Activations
//! `candle_nn::Activation` is the type. Relu, Relu6, LeakyRelu, Silu and Swish, HardSwish, Gelu, NewGelu and
//! GeluPytorchTanh, and Sigmoid are fused; every other runs behind the norm as candle's own operation, with
//! the same result. At a corner the slope is PyTorch's: 0 at zero for Relu, where candle's own `relu` has 1.
//!
//! # Errors
//! Besides those of the plain function: a `residual`, `skip` or `gate` that has not the input's shape, a
//! `skip` or `gate` that has not its dtype.

use super::checks::{check_device, check_dtype};
use super::*;
use crate::autograd::add_normalize;
use crate::fusion::{Activation as FusedActivation, Gate};
use candle_core::DType;
use candle_nn::{Activation, Module};

/// What a norm of a sum returns.
#[derive(Debug, Clone)]
pub struct AddNorm {
    /// The norm of the sum, in the input's dtype.
    pub normed: Tensor,
    /// `input + residual`, in the residual's dtype: what the next block adds to.
    pub sum: Tensor,
}

/// Layer norm of `input + residual`, and that sum: the residual stream of a transformer.
///
/// ```text
/// sum    = input + residual              rounded to the residual's dtype
/// normed = layer_norm(sum)               the same bits as an addition followed by a norm
/// ```
///
/// `residual` has the input's shape and any of the four dtypes (an f32 stream under bf16 inputs). `weight` and
/// `bias` have shape `normalized_shape`.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::functional::fused;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let fused::AddNorm { normed, sum } = fused::add_layer_norm(&x, &residual, &[2], None, None, 0.0)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[1., 3.]]);
/// assert_eq!(normed.to_vec2::<f32>()?, [[-1., 1.]]);
/// # Ok(()) }
/// ```
pub fn add_layer_norm(
    input: &Tensor,
    residual: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<AddNorm> {
    let fusion = Fusion::default();
    add_norm("add-layer-norm", input, residual, normalized_shape, [weight, bias], fusion, eps, true)
}

/// RMS norm of `input + residual`, and that sum: the residual stream of a Llama.
///
/// ```text
/// sum    = input + residual              rounded to the residual's dtype
/// normed = sum / sqrt(mean(sum^2) + eps) * (weight + weight_offset)
/// ```
///
/// As [`add_layer_norm`]; `weight_offset` is 0, or 1 for Gemma's checkpoints, and is added in f32.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::functional::fused;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[0f32, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[1f32, 4.]], &Device::Cpu)?;
/// let fused::AddNorm { normed, sum } = fused::add_rms_norm(&x, &residual, &[2], None, 0.0, 0.0)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[1., 7.]]);
/// assert_eq!(normed.to_vec2::<f32>()?, [[0.2, 1.4]]);
/// # Ok(()) }
/// ```
pub fn add_rms_norm(
    input: &Tensor,
    residual: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    weight_offset: f64,
    eps: f64,
) -> Result<AddNorm> {
    let op = "add-rms-norm";
    let fusion = offset(op, weight, weight_offset)?;
    add_norm(op, input, residual, normalized_shape, [weight, None], fusion, eps, false)
}

#[allow(clippy::too_many_arguments)] // those of the functions that call it
fn add_norm(
    op: &'static str,
    input: &Tensor,
    residual: &Tensor,
    shape: &[usize],
    [weight, bias]: [Option<&Tensor>; 2],
    fusion: Fusion,
    eps: f64,
    center: bool,
) -> Result<AddNorm> {
    check_layer(op, input, shape, eps)?;
    check_param(op, "weight", input, weight, shape)?;
    check_param(op, "bias", input, bias, shape)?;
    check_param(op, "residual", input, Some(residual), input.dims())?;
    let place = |x: &Tensor| place_rows(x, shape, center, false);
    let mut sum = None;
    let normed = in_memory_order(op, input, place, eps, |norm, order, x| {
        let parts = parts(order, weight, bias, &Around::default())?;
        let residual = order.there(residual)?.contiguous()?;
        let (normed, added) = add_normalize(Norm { fusion, ..norm }, x, &residual, parts)?;
        sum = Some(order.back(added)?);
        Ok(normed)
    })?;
    match sum {
        Some(sum) => Ok(AddNorm { normed, sum }),
        None => bail!("{op}: no sum"),
    }
}

/// An offset is that of a weight; without one it says nothing.
fn offset(op: &str, weight: Option<&Tensor>, weight_offset: f64) -> Result<Fusion> {
    if !weight_offset.is_finite() {
        bail!("{op}: weight_offset must be finite, got {weight_offset}")
    }
    let weight_offset = weight.map_or(0.0, |_| weight_offset);
    Ok(Fusion { weight_offset, ..Fusion::default() })
}

/// RMS norm whose weight is kept as a difference from a number: Gemma's and Qwen3-Next's `1 + weight`.
///
/// ```text
/// y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
/// ```
///
/// The offset is added in f32 (f64 for f64 inputs): `1 + weight` rounded to bf16 would be off by 0.4 %.
/// Checkpoints in GGUF have the offset applied already.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::offset_rms_norm(&x, &[2], &weight, 1.0, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 2.8]]);
/// # Ok(()) }
/// ```
pub fn offset_rms_norm(
    input: &Tensor,
    normalized_shape: &[usize],
    weight: &Tensor,
    weight_offset: f64,
    eps: f64,
) -> Result<Tensor> {
    let op = "offset-rms-norm";
    let around = Around { fusion: offset(op, Some(weight), weight_offset)?, ..Around::default() };
    layer_around(op, input, normalized_shape, Some(weight), None, eps, false, around)
}

/// Layer norm scaled and shifted by each sample's own numbers: AdaLN of diffusion transformers, FiLM.
///
/// ```text
/// y = (1 + scale) * (x - mean) / sqrt(var + eps) + shift
/// ```
///
/// For an input `[N, .., D]` normalized over `[D]`, `scale` and `shift` are `[N, D]`, `[N, 1, D]`, or of the
/// input's shape: leading dimensions of the input, as many as there are, then ones, then `normalized_shape`.
/// `1 + scale` is added in f32 (f64 for f64 inputs). Source: Peebles and Xie, <https://arxiv.org/abs/2212.09748>.
///
/// # Errors
/// Those of [the module](self#errors), and a scale or shift of another shape.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 3.]], [[5., 9.]]], &Device::Cpu)?;
/// let scale = Tensor::new(&[[0f32, 0.], [1., 2.]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::modulated_layer_norm(&x, &[2], &scale, None, 0.0)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[-1., 1.]], [[-2., 3.]]]);
/// # Ok(()) }
/// ```
pub fn modulated_layer_norm(
    input: &Tensor,
    normalized_shape: &[usize],
    scale: &Tensor,
    shift: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    modulated("modulated-layer-norm", input, normalized_shape, scale, shift, 1.0, eps, true)
}

/// RMS norm scaled and shifted by each sample's own numbers.
///
/// ```text
/// y = (1 + scale) * x / sqrt(mean(x^2) + eps) + shift
/// ```
///
/// Shapes as for [`modulated_layer_norm`].
///
/// # Errors
/// Those of [the module](self#errors), and a scale or shift of another shape.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 7.]]], &Device::Cpu)?;
/// let scale = Tensor::new(&[[[1f32, 0.]]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::modulated_rms_norm(&x, &[2], &scale, None, 0.0)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[0.4, 1.4]]]);
/// # Ok(()) }
/// ```
pub fn modulated_rms_norm(
    input: &Tensor,
    normalized_shape: &[usize],
    scale: &Tensor,
    shift: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    modulated("modulated-rms-norm", input, normalized_shape, scale, shift, 1.0, eps, false)
}

/// `(weight_offset + scale) * xhat + shift`.
#[allow(clippy::too_many_arguments)] // those of the functions that call it
fn modulated(
    op: &'static str,
    input: &Tensor,
    shape: &[usize],
    scale: &Tensor,
    shift: Option<&Tensor>,
    weight_offset: f64,
    eps: f64,
    center: bool,
) -> Result<Tensor> {
    check_layer(op, input, shape, eps)?;
    let of_scale = samples(op, "scale", input, shape, scale)?;
    let of_shift = shift.map_or(Ok(1), |shift| samples(op, "shift", input, shape, shift))?;
    let (samples, like) = match shift {
        Some(shift) if of_shift > of_scale => (of_shift, shift),
        _ => (of_scale, scale),
    };
    let full = |param: &Tensor, own| match own == samples {
        true => Ok(param.clone()),
        false => repeated(input, shape, param, like),
    };
    let scale = full(scale, of_scale)?;
    let shift = shift.map(|shift| full(shift, of_shift)).transpose()?;
    // A sample's parameters are found by counting blocks, which wants them in the order of the input: read in
    // rows where they lie, copied where the rows themselves are not in order.
    let place = |x: &Tensor| match geometry::layer(x.dims(), x.stride(), shape.len(), center) {
        Some(placed) if placed.order.is_none() => Some(placed),
        _ => geometry::rows(x.dims(), x.stride(), shape.len(), center),
    };
    let blocks = input.elem_count() / shape.iter().product::<usize>().max(1);
    let tokens = (samples > 1).then_some(blocks / samples.max(1));
    let fusion = Fusion { weight_offset, tokens, ..Fusion::default() };
    let around = Around { fusion, ..Around::default() };
    apply(op, input, place, Some(&scale), shift.as_ref(), eps, Statistics::Input(None), around)
}

/// `(1 + scale) * (xhat * (weight + weight_offset) + bias) + shift`, contiguous: a layer's own parameters are
/// multiplied into scale and shift.
#[allow(clippy::too_many_arguments)] // those of a layer
pub(crate) fn modulated_affine(
    op: &'static str,
    input: &Tensor,
    shape: &[usize],
    [weight, bias]: [Option<&Tensor>; 2],
    weight_offset: f64,
    scale: &Tensor,
    shift: Option<&Tensor>,
    eps: f64,
    center: bool,
) -> Result<Tensor> {
    if weight.is_none() && bias.is_none() {
        return modulated(op, input, shape, scale, shift, 1.0, eps, center)?.contiguous();
    }
    check_layer(op, input, shape, eps)?;
    samples(op, "scale", input, shape, scale)?;
    shift.map_or(Ok(1), |shift| samples(op, "shift", input, shape, shift))?;
    let wide = |t: &Tensor| t.to_dtype(crate::request::accumulation_dtype(input.dtype()));
    let factor = (wide(&aligned(input, shape, scale)?)? + 1.0)?;
    let shift = shift.map(|shift| wide(&aligned(input, shape, shift)?)).transpose()?;
    let shift = match (bias, shift) {
        (None, shift) => shift,
        (Some(bias), None) => Some(factor.broadcast_mul(&wide(bias)?)?),
        (Some(bias), Some(shift)) => Some(factor.broadcast_mul(&wide(bias)?)?.broadcast_add(&shift)?),
    };
    let scale = match weight {
        Some(weight) => factor.broadcast_mul(&(wide(weight)? + weight_offset)?)?,
        None => factor,
    };
    modulated(op, input, shape, &scale, shift.as_ref(), 0.0, eps, center)?.contiguous()
}

/// How many samples have parameters of their own in `param`.
fn samples(op: &str, what: &str, input: &Tensor, shape: &[usize], param: &Tensor) -> Result<usize> {
    check_dtype(op, what, param)?;
    check_device(op, what, input, param)?;
    let leading = &input.dims()[..input.rank() - shape.len()];
    let own = param.dims().strip_suffix(shape).filter(|lead| lead.len() <= leading.len()).map(|lead| {
        let ones = lead.iter().rev().take_while(|&&dim| dim == 1).count();
        &lead[..lead.len() - ones]
    });
    match own {
        Some(own) if leading.starts_with(own) => Ok(own.iter().product()),
        _ => bail!(
            "{op}: {what} has shape {:?}, expected leading dimensions of the input's {:?}, then ones, then {shape:?}",
            param.dims(),
            input.dims()
        ),
    }
}

/// `param` in the shape of `like`, which has parameters for more samples.
fn repeated(input: &Tensor, shape: &[usize], param: &Tensor, like: &Tensor) -> Result<Tensor> {
    let full = aligned(input, shape, like)?;
    aligned(input, shape, param)?.broadcast_as(full.shape())?.contiguous()?.reshape(like.shape())
}

/// A parameter with as many dimensions as the input: ones before `shape`.
fn aligned(input: &Tensor, shape: &[usize], param: &Tensor) -> Result<Tensor> {
    let lead = &param.dims()[..param.rank() - shape.len()];
    let ones = vec![1; input.rank() - param.rank()];
    param.reshape([lead, &ones, shape].concat())
}

/// RMS norm with a gate through SiLU, before or behind the norm.
///
/// ```text
/// norm_before_gate: y = rms_norm(x) * weight * silu(gate)         Qwen3-Next
/// else:             y = rms_norm(x * silu(gate)) * weight         Mamba 2
/// ```
///
/// `gate` has the input's shape and dtype; the product is not rounded before the norm. Source: Dao and Gu,
/// <https://arxiv.org/abs/2405.21060>.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// let gate = Tensor::new(&[[40f32, 0.]], &Device::Cpu)?; // silu: 40, 0
/// let y = candle_norm::functional::fused::gated_rms_norm(&x, &gate, &[2], None, 0.0, true)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[8., 0.]]);
/// # Ok(()) }
/// ```
pub fn gated_rms_norm(
    input: &Tensor,
    gate: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    eps: f64,
    norm_before_gate: bool,
) -> Result<Tensor> {
    let op = "gated-rms-norm";
    check_like(op, "gate", input, Some(gate))?;
    let place = if norm_before_gate { Gate::After } else { Gate::Before };
    let fusion = Fusion { gate: Some(place), ..Fusion::default() };
    let around = Around { gate: Some(gate), fusion, ..Around::default() };
    layer_around(op, input, normalized_shape, weight, None, eps, false, around)
}

/// `activation(batch_norm(input) + skip)`: the end of every block of a ResNet.
///
/// Arguments as for [`batch_norm`], `skip` of the input's shape and dtype.
///
/// # Errors
/// Those of [the module](self#errors). The running statistics are untouched by a call that fails.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 10.], [3., 30.]], &Device::Cpu)?;
/// let skip = Tensor::new(&[[0f32, 0.5], [0., 0.]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::batch_norm_act(
///     &x, None, None, None, None, true, 0.1, 0.0, Some(&skip), Activation::Relu,
/// )?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 0.], [1., 1.]]);
/// # Ok(()) }
/// ```
#[allow(clippy::too_many_arguments)] // torch.nn.functional.batch_norm's, and two
pub fn batch_norm_act(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    training: bool,
    momentum: f64,
    eps: f64,
    skip: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let op = "batch-norm-act";
    let running = RunningStatistics { mean: running_mean, var: running_var, momentum };
    Tail { skip, activation }.behind(op, input, |around| {
        batch_norm_around(op, input, running, weight, bias, training, eps, around)
    })
}

/// `activation(group_norm(input) + skip)`: the beginning of every block of a diffusion model's UNet.
///
/// Arguments as for [`group_norm`], `skip` of the input's shape and dtype.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 3., 10., 30.]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::group_norm_act(&x, 2, None, None, 0.0, None, Activation::Relu)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 1., 0., 1.]]);
/// # Ok(()) }
/// ```
pub fn group_norm_act(
    input: &Tensor,
    num_groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    skip: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let op = "group-norm-act";
    Tail { skip, activation }
        .behind(op, input, |around| group_norm_around(op, input, num_groups, weight, bias, eps, around))
}

/// `activation(instance_norm(input) + skip)`.
///
/// Arguments as for [`instance_norm`], `skip` of the input's shape and dtype.
///
/// # Errors
/// Those of [the module](self#errors). The running statistics are untouched by a call that fails.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 3.], [10., 30.]]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::instance_norm_act(
///     &x, None, None, None, None, true, 0.1, 0.0, None, Activation::Relu,
/// )?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[0., 1.], [0., 1.]]]);
/// # Ok(()) }
/// ```
#[allow(clippy::too_many_arguments)] // torch.nn.functional.instance_norm's, and two
pub fn instance_norm_act(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    use_input_stats: bool,
    momentum: f64,
    eps: f64,
    skip: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let op = "instance-norm-act";
    let running = RunningStatistics { mean: running_mean, var: running_var, momentum };
    Tail { skip, activation }.behind(op, input, |around| {
        instance_norm_around(op, input, running, weight, bias, use_input_stats, eps, around)
    })
}

/// `activation(layer_norm(input) + skip)`.
///
/// Arguments as for [`layer_norm`], `skip` of the input's shape and dtype.
///
/// # Errors
/// Those of [the module](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Activation;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 3.], [-10., 10.]], &Device::Cpu)?;
/// let y = candle_norm::functional::fused::layer_norm_act(&x, &[2], None, None, 0.0, None, Activation::Relu)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 1.], [0., 1.]]);
/// # Ok(()) }
/// ```
pub fn layer_norm_act(
    input: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    skip: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let op = "layer-norm-act";
    Tail { skip, activation }.behind(op, input, |around| {
        layer_around(op, input, normalized_shape, weight, bias, eps, true, around)
    })
}

/// What a block does with a norm's output: `activation(y + skip)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tail<'a> {
    pub skip: Option<&'a Tensor>,
    pub activation: Activation,
}

impl Tail<'_> {
    /// What a layer with an activation of its own does.
    pub fn own(activation: Option<Activation>) -> Option<Self> {
        activation.map(|activation| Self { skip: None, activation })
    }

    /// `norm`, and a tail behind it if there is one.
    pub(super) fn after(
        tail: Option<Self>,
        op: &str,
        input: &Tensor,
        norm: impl FnOnce(Around) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match tail {
            None => norm(Around::default()),
            Some(tail) => tail.behind(op, input, norm),
        }
    }

    /// Runs `norm` with the activation fused where kernels have it, and behind it elsewhere.
    pub(super) fn behind(
        self,
        op: &str,
        input: &Tensor,
        norm: impl FnOnce(Around) -> Result<Tensor>,
    ) -> Result<Tensor> {
        check_like(op, "skip", input, self.skip)?;
        let fused = FusedActivation::of(self.activation);
        let fusion = Fusion { activation: fused, skip: self.skip.is_some(), ..Fusion::default() };
        let y = norm(Around { skip: self.skip, fusion, ..Around::default() })?;
        match fused {
            Some(_) => Ok(y),
            None => self.activation.forward(&y),
        }
    }

    /// In candle's operations, on a `y` in the dtype of accumulation that is rounded afterwards.
    pub fn compose(self, op: &str, input: &Tensor, y: &Tensor) -> Result<Tensor> {
        check_like(op, "skip", input, self.skip)?;
        let z = match self.skip {
            Some(skip) => (y + skip.to_dtype(y.dtype())?)?,
            None => y.clone(),
        };
        match FusedActivation::of(self.activation) {
            Some(activation) => activation.apply(&z),
            None => self.activation.forward(&z.to_dtype(input.dtype())?),
        }?
        .to_dtype(input.dtype())
    }
}

/// `activation(sync_batch_norm(input) + skip)`, composed: the ranks meet between the statistics and the output.
#[allow(clippy::too_many_arguments)] // sync_batch_norm's, and one
pub(crate) fn sync_batch_norm_act(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    momentum: f64,
    eps: f64,
    sync: &Synchronized,
    tail: Tail,
) -> Result<Tensor> {
    let op = "sync-batch-norm-act";
    if sync.group.world_size() == 1 {
        let Tail { skip, activation } = tail;
        let running = (running_mean, running_var);
        return batch_norm_act(
            input, running.0, running.1, weight, bias, true, momentum, eps, skip, activation,
        );
    }
    // A dtype that the norm refuses goes on to be refused on all ranks alike.
    let wide = match input.dtype() {
        DType::F16 | DType::BF16 => input.to_dtype(DType::F32),
        _ => Ok(input.clone()),
    };
    let checked = check_like(op, "skip", input, tail.skip).and(wide);
    let wide = sync.or_tell(checked)?;
    let y = sync_batch_norm(&wide, running_mean, running_var, weight, bias, momentum, eps, sync)?;
    tail.compose(op, input, &y)
}

/// Layer and RMS norm of a sum, for the layers: both tensors contiguous, `weight_offset` added to the weight.
#[allow(clippy::too_many_arguments)] // those of a layer
pub(crate) fn contiguous_add(
    op: &'static str,
    input: &Tensor,
    residual: &Tensor,
    shape: &[usize],
    params: [Option<&Tensor>; 2],
    weight_offset: f64,
    eps: f64,
    center: bool,
) -> Result<AddNorm> {
    let fusion = offset(op, params[0], weight_offset)?;
    let AddNorm { normed, sum } = add_norm(op, input, residual, shape, params, fusion, eps, center)?;
    Ok(AddNorm { normed: normed.contiguous()?, sum: sum.contiguous()? })
}

/// A tensor of the input's shape and dtype.
fn check_like(op: &str, what: &str, input: &Tensor, other: Option<&Tensor>) -> Result<()> {
    let Some(other) = other else { return Ok(()) };
    check_param(op, what, input, Some(other), input.dims())?;
    if other.dtype() != input.dtype() {
        bail!("{op}: {what} has dtype {:?}, expected the input's {:?}", other.dtype(), input.dtype())
    }
    Ok(())
}
