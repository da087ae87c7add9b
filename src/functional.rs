//! The norms as stateless functions, with `torch.nn.functional`'s names, order of arguments and
//! meaning.
//!
//! All functions take inputs of dtype f16, bf16, f32 or f64 and parameters of any of these. They
//! accumulate in f32 (f64 for f64 inputs), round once, and return the input's shape and dtype. An input
//! that is a permuted view of contiguous memory (channels-last) is normalized where it lies and the output
//! has the same memory order; any other strided input is copied first, and the output is contiguous. Layer
//! and RMS norm copy nothing where the normalized dimensions alone are contiguous (a part of a larger last
//! dimension, heads of attention): they read the rows where they lie.
//!
//! Rust has no default arguments; PyTorch's are `eps` 1e-5 (in `rms_norm` the machine epsilon), `momentum`
//! 0.1, `training` false and `use_input_stats` true.
//!
//! Input, weight and bias get gradients; running statistics get none.
//!
//! # Errors
//!
//! Every function refuses another dtype than these four, a shape that does not fit, tensors on different
//! devices, an input of 2^58 elements or more and a negative or NaN `eps`. With running statistics: one of
//! the two without the other, a `momentum` outside `0..=1`, statistics that are not contiguous, lie in
//! another argument's memory or are one variable.

// Apart from the layers, which hold parameters, and from `autograd`, which takes arguments as
// correct: here every argument is checked, once, and every tensor gets its geometry, once.

use crate::autograd::{normalize, normalize_shared, Parts, Statistics, Synchronized};
use crate::fusion::Fusion;
use crate::geometry::{self, Channels, Geometry, Placed};
use crate::request::Norm;
use candle_core::{bail, Result, Tensor, Var};

mod checks;
pub mod fused;
mod last_dim;
mod metal;

use checks::{
    apart, channels_hint, check_affine, check_channels, check_input, check_param, check_running,
    RunningStatistics,
};

use checks::OWN;
pub(crate) use checks::{check_eps, check_groups, check_momentum};
pub(crate) use fused::Tail;
pub(crate) use last_dim::{add_last_dim, last_dim, vectors};

/// Batch normalization of `[N, C, ..]` over every dimension but the channels.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// In training, `mean` and the biased `var` are the batch's own, and the running statistics, if
/// given, move: `running = (1 - momentum) * running + momentum * batch`, with the unbiased variance.
/// Otherwise the running statistics take their place. `running_mean`, `running_var`, `weight` and
/// `bias` have shape `[C]`. Source: Ioffe and Szegedy, <https://arxiv.org/abs/1502.03167>.
///
/// # Errors
/// Besides those of [every function](self#errors): training with a single value per channel, and
/// evaluation without running statistics. The running statistics are untouched by a call that fails.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 10.], [3., 30.]], &Device::Cpu)?;
/// let mean = Var::from_vec(vec![0f32, 0.], 2, &Device::Cpu)?;
/// let var = Var::from_vec(vec![1f32, 1.], 2, &Device::Cpu)?;
/// let y = candle_norm::functional::batch_norm(&x, Some(&mean), Some(&var), None, None, true, 0.1, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., -1.], [1., 1.]]);
/// assert_eq!(mean.to_vec1::<f32>()?, [0.2, 2.]);
/// # Ok(()) }
/// ```
#[allow(clippy::too_many_arguments)] // torch.nn.functional.batch_norm's
pub fn batch_norm(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    training: bool,
    momentum: f64,
    eps: f64,
) -> Result<Tensor> {
    let running = RunningStatistics { mean: running_mean, var: running_var, momentum };
    batch_norm_around("batch-norm", input, running, weight, bias, training, eps, Around::default())
}

/// `batch_norm` with what stands around it.
#[allow(clippy::too_many_arguments)] // torch.nn.functional.batch_norm's
fn batch_norm_around(
    op: &'static str,
    input: &Tensor,
    running: RunningStatistics,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    training: bool,
    eps: f64,
    around: Around,
) -> Result<Tensor> {
    let channels = check_channels(op, input, 2)?;
    let running = check_running(op, input, channels, running)?;
    if training {
        check_per_channel(op, input, channels)?;
    }
    let source = match (training, running) {
        (true, running) => Statistics::Input(apart(op, running, &[Some(input), weight, bias, around.skip])?),
        (false, Some(running)) => Statistics::Running(running),
        (false, None) => bail!("{op}: expected running_mean and running_var when not training, got none"),
    };
    apply_channels(op, input, Channels::Batch, weight, bias, eps, source, around)
}

/// `batch_norm` in training where the mean stays: candle-nn's `remove_mean: false`. The running mean stays
/// too, and the running variance moves towards `n / (n - 1)` times the mean square.
#[allow(clippy::too_many_arguments)] // batch_norm's
pub(crate) fn uncentered_batch_norm(
    input: &Tensor,
    running_var: &Var,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    momentum: f64,
    eps: f64,
    tail: Option<Tail>,
) -> Result<Tensor> {
    let op = "batch-norm";
    let channels = check_channels(op, input, 2)?;
    check_per_channel(op, input, channels)?;
    // The kernels move a mean as well: one of zeros, that nobody else has.
    let mean = Var::zeros(channels, running_var.dtype(), running_var.device())?;
    let running = RunningStatistics { mean: Some(&mean), var: Some(running_var), momentum };
    let running = check_running(op, input, channels, running)?;
    let place = |x: &Tensor| {
        let placed = geometry::channels(x.dims(), x.stride(), Channels::Batch)?;
        Some(Placed { geometry: Geometry { center: false, ..placed.geometry }, ..placed })
    };
    let norm = |around: Around| {
        check_affine(op, input, weight, bias, eps)?;
        let running = apart(op, running, &[Some(input), weight, bias, around.skip])?;
        apply(op, input, place, weight, bias, eps, Statistics::Input(running), around)
    };
    Tail::after(tail, op, input, norm)
}

/// The batch's own statistics need more than one value of each channel.
fn check_per_channel(op: &str, input: &Tensor, channels: usize) -> Result<()> {
    match input.elem_count().checked_div(channels) {
        Some(1) => {
            bail!("{op}: expected more than 1 value per channel {OWN}, got input size {:?}", input.dims())
        }
        _ => Ok(()),
    }
}

/// `batch_norm` in training, with the statistics of the inputs of all ranks.
///
/// An argument that is wrong on this rank fails the call on all of them.
#[allow(clippy::too_many_arguments)] // batch_norm's
pub(crate) fn sync_batch_norm(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    momentum: f64,
    eps: f64,
    sync: &Synchronized,
) -> Result<Tensor> {
    if sync.group.world_size() == 1 {
        return batch_norm(input, running_mean, running_var, weight, bias, true, momentum, eps);
    }
    let op = "sync-batch-norm";
    let check = || {
        let channels = check_channels(op, input, 2)?;
        check_affine(op, input, weight, bias, eps)?;
        let running = RunningStatistics { mean: running_mean, var: running_var, momentum };
        let running = check_running(op, input, channels, running)?;
        apart(op, running, &[Some(input), weight, bias])
    };
    let running = sync.or_tell(check())?;
    let place = |x: &Tensor| geometry::channels(x.dims(), x.stride(), Channels::Batch);
    let run = |norm, order: &Order, x: &Tensor| {
        let parts = parts(order, weight, bias, &Around::default())?;
        normalize_shared(norm, x, parts, sync.clone(), running)
    };
    in_memory_order(op, input, place, eps, run)
}

/// Instance normalization of `[N, C, ..]` over the spatial dimensions of each sample and channel.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// With `use_input_stats` the statistics are each instance's own, and the running statistics, if
/// given, move towards their average over the batch; otherwise the running statistics take their
/// place. `running_mean`, `running_var`, `weight` and `bias` have shape `[C]`. Source: Ulyanov et al.,
/// <https://arxiv.org/abs/1607.08022>.
///
/// # Errors
/// Besides those of [every function](self#errors): a single spatial element with `use_input_stats`,
/// and no running statistics without.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 3.], [10., 30.]]], &Device::Cpu)?;
/// let y = candle_norm::functional::instance_norm(&x, None, None, None, None, true, 0.1, 0.0)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[-1., 1.], [-1., 1.]]]);
/// # Ok(()) }
/// ```
#[allow(clippy::too_many_arguments)] // torch.nn.functional.instance_norm's
pub fn instance_norm(
    input: &Tensor,
    running_mean: Option<&Var>,
    running_var: Option<&Var>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    use_input_stats: bool,
    momentum: f64,
    eps: f64,
) -> Result<Tensor> {
    let running = RunningStatistics { mean: running_mean, var: running_var, momentum };
    instance_norm_around(
        "instance-norm",
        input,
        running,
        weight,
        bias,
        use_input_stats,
        eps,
        Around::default(),
    )
}

/// `instance_norm` with what stands around it.
#[allow(clippy::too_many_arguments)] // torch.nn.functional.instance_norm's
fn instance_norm_around(
    op: &'static str,
    input: &Tensor,
    running: RunningStatistics,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    use_input_stats: bool,
    eps: f64,
    around: Around,
) -> Result<Tensor> {
    let channels = check_channels(op, input, 2)?;
    let running = check_running(op, input, channels, running)?;
    if !use_input_stats {
        let Some(running) = running else {
            bail!("{op}: expected running_mean and running_var when use_input_stats is false, got none")
        };
        let given = Statistics::Running(running);
        return apply_channels(op, input, Channels::Batch, weight, bias, eps, given, around);
    }
    if input.dims()[2..].iter().product::<usize>() == 1 {
        bail!("{op}: expected more than 1 spatial element {OWN}, got input size {:?}", input.dims())
    }
    let source = Statistics::Input(apart(op, running, &[Some(input), weight, bias, around.skip])?);
    apply_channels(op, input, Channels::Groups(channels), weight, bias, eps, source, around)
}

/// Layer normalization over the last dimensions, which must equal `normalized_shape`.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// `weight` and `bias` have shape `normalized_shape`. Source: Ba et al.,
/// <https://arxiv.org/abs/1607.06450>.
///
/// # Errors
/// Those of [every function](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 3.], [-10., 10.]], &Device::Cpu)?;
/// let y = candle_norm::functional::layer_norm(&x, &[2], None, None, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., 1.], [-1., 1.]]);
/// # Ok(()) }
/// ```
pub fn layer_norm(
    input: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    apply_layer("layer-norm", input, normalized_shape, weight, bias, eps, true)
}

/// Group normalization of `[N, C, ..]` over groups of `C / num_groups` channels of each sample.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// `weight` and `bias` have shape `[C]`. Source: Wu and He, <https://arxiv.org/abs/1803.08494>.
///
/// # Errors
/// Besides those of [every function](self#errors): `num_groups` that does not divide the channels.
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 3., 10., 30.]], &Device::Cpu)?;
/// let y = candle_norm::functional::group_norm(&x, 2, None, None, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., 1., -1., 1.]]);
/// # Ok(()) }
/// ```
pub fn group_norm(
    input: &Tensor,
    num_groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    group_norm_around("group-norm", input, num_groups, weight, bias, eps, Around::default())
}

/// `group_norm` with what stands around it.
fn group_norm_around(
    op: &'static str,
    input: &Tensor,
    num_groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    around: Around,
) -> Result<Tensor> {
    check_groups(op, num_groups, check_channels(op, input, 2)?)?;
    apply_channels(
        op,
        input,
        Channels::Groups(num_groups),
        weight,
        bias,
        eps,
        Statistics::Input(None),
        around,
    )
}

/// Root-mean-square normalization over the last dimensions, which must equal `normalized_shape`.
///
/// ```text
/// y = x / sqrt(mean(x^2) + eps) * weight
/// ```
///
/// `weight` has shape `normalized_shape`. Source: Zhang and Sennrich,
/// <https://arxiv.org/abs/1910.07467>.
///
/// # Errors
/// Those of [every function](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 7.]], &Device::Cpu)?;
/// let y = candle_norm::functional::rms_norm(&x, &[2], None, 0.0)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.2, 1.4]]);
/// # Ok(()) }
/// ```
pub fn rms_norm(
    input: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    apply_layer("rms-norm", input, normalized_shape, weight, None, eps, false)
}

/// Layer normalization of `[N, C, ..]` over the channels of each sample and place: ConvNeXt's and SAM's.
///
/// ```text
/// y = (x - mean) / sqrt(var + eps) * weight + bias
/// ```
///
/// `weight` and `bias` have shape `[C]`. The same numbers as [`layer_norm`] on the input permuted to
/// `[N, .., C]` and back, without a copy: the channels are normalized where they lie.
///
/// # Errors
/// Those of [every function](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 30.], [3., 10.]]], &Device::Cpu)?; // N, C, S
/// let y = candle_norm::functional::layer_norm_channels(&x, None, None, 0.0)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[-1., 1.], [1., -1.]]]);
/// # Ok(()) }
/// ```
pub fn layer_norm_channels(
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    over_channels("layer-norm-channels", input, weight, bias, eps, true)
}

/// Root-mean-square normalization of `[N, C, ..]` over the channels of each sample and place.
///
/// ```text
/// y = x / sqrt(mean(x^2) + eps) * weight
/// ```
///
/// `weight` has shape `[C]`. As [`layer_norm_channels`].
///
/// # Errors
/// Those of [every function](self#errors).
///
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f32, 14.], [7., 2.]]], &Device::Cpu)?; // N, C, S
/// let y = candle_norm::functional::rms_norm_channels(&x, None, 0.0)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[0.2, 1.4], [1.4, 0.2]]]);
/// # Ok(()) }
/// ```
pub fn rms_norm_channels(input: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    over_channels("rms-norm-channels", input, weight, None, eps, false)
}

/// Layer and RMS norm over dimension 1: that of the view which has it last, in the order in which the input lies. The
/// graph has no view where that is the input's own: candle adds up a permuted gradient element by element.
fn over_channels(
    op: &'static str,
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
) -> Result<Tensor> {
    let channels = check_channels(op, input, 2)?;
    check_affine(op, input, weight, bias, eps)?;
    let last: Vec<usize> = [0].into_iter().chain(2..input.rank()).chain([1]).collect();
    let place = |x: &Tensor| {
        let placed = place_rows(&x.detach().permute(last.as_slice()).ok()?, &[channels], center, false)?;
        let order = placed.order.map_or(last.clone(), |order| order.into_iter().map(|i| last[i]).collect());
        let own = order.iter().copied().eq(0..x.rank());
        Some(Placed { order: (!own).then_some(order), ..placed })
    };
    apply(op, input, place, weight, bias, eps, Statistics::Input(None), Around::default())
}

pub(crate) fn apply_layer(
    op: &'static str,
    input: &Tensor,
    shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
) -> Result<Tensor> {
    if let ([_], Some(y)) = (shape, metal::fused(input, weight, bias, eps, center)) {
        check_layer(op, input, shape, eps)?;
        return y;
    }
    layer_around(op, input, shape, weight, bias, eps, center, Around::default())
}

/// The same for the layers: with a contiguous output, as candle-nn's return it, and what they have behind it.
#[allow(clippy::too_many_arguments)] // those of the layers
pub(crate) fn contiguous_layer(
    op: &'static str,
    input: &Tensor,
    shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    weight_offset: f64,
    eps: f64,
    center: bool,
    tail: Option<Tail>,
) -> Result<Tensor> {
    let norm = |around: Around| {
        let fusion = Fusion { weight_offset, ..around.fusion };
        layer_around(
            op,
            input,
            shape,
            weight,
            bias,
            eps,
            center,
            Around { contiguous: true, fusion, ..around },
        )
    };
    Tail::after(tail, op, input, norm)?.contiguous()
}

/// Layer and RMS norm with what stands around them.
#[allow(clippy::too_many_arguments)] // those of the functions that call it
fn layer_around(
    op: &'static str,
    input: &Tensor,
    shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    center: bool,
    around: Around,
) -> Result<Tensor> {
    check_layer(op, input, shape, eps)?;
    check_param(op, "weight", input, weight, shape)?;
    check_param(op, "bias", input, bias, shape)?;
    check_param(op, "skip", input, around.skip, input.dims())?;
    let place = |x: &Tensor| place_rows(x, shape, center, around.contiguous);
    apply(op, input, place, weight, bias, eps, Statistics::Input(None), around)
}

/// Where an input of layer or RMS norm lies: in the memory order of a dense permutation, which the output has
/// too; or in rows of something larger, where it is read and from which the output is contiguous.
fn place_rows(x: &Tensor, shape: &[usize], center: bool, contiguous: bool) -> Option<Placed> {
    let rows = || geometry::rows(x.dims(), x.stride(), shape.len(), center);
    match geometry::layer(x.dims(), x.stride(), shape.len(), center) {
        Some(placed) if placed.order.is_none() => Some(placed),
        Some(placed) if !contiguous => Some(placed),
        placed => rows().or(placed),
    }
}

fn check_layer(op: &str, input: &Tensor, shape: &[usize], eps: f64) -> Result<()> {
    check_input(op, input, eps)?;
    if shape.is_empty() || !input.dims().ends_with(shape) {
        let (dims, hint) = (input.dims(), channels_hint(op, input, shape));
        bail!("{op}: input has shape {dims:?}, expected its last dimensions to be {shape:?}{hint}")
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)] // those of the functions that call it
fn apply_channels(
    op: &'static str,
    input: &Tensor,
    sets: Channels,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    source: Statistics,
    around: Around,
) -> Result<Tensor> {
    check_affine(op, input, weight, bias, eps)?;
    check_param(op, "skip", input, around.skip, input.dims())?;
    let place = |x: &Tensor| geometry::channels(x.dims(), x.stride(), sets);
    apply(op, input, place, weight, bias, eps, source, around)
}

/// What stands around a norm: tensors of the input's shape, and the fusion that says what they do.
#[derive(Clone, Copy, Default)]
struct Around<'a> {
    skip: Option<&'a Tensor>,
    gate: Option<&'a Tensor>,
    fusion: Fusion,
    /// Whether the output is to be contiguous rather than in the memory order of the input.
    contiguous: bool,
}

/// The one way in: from checked arguments to the op, in the memory order of the input.
#[allow(clippy::too_many_arguments)] // those of the functions that call it
fn apply(
    name: &'static str,
    input: &Tensor,
    place: impl Fn(&Tensor) -> Option<Placed>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    source: Statistics,
    around: Around,
) -> Result<Tensor> {
    let run = |norm: Norm, order: &Order, x: &Tensor| {
        let norm = Norm { fusion: around.fusion, ..norm };
        normalize(norm, x, parts(order, weight, bias, &around)?, source)
    };
    in_memory_order(name, input, place, eps, run)
}

/// The parts of a call, in the memory order of its input.
fn parts(
    order: &Order,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    around: &Around,
) -> Result<Parts<Tensor>> {
    let elements = |t: Option<&Tensor>| t.map(|t| order.there(t)?.contiguous()).transpose();
    Ok(Parts {
        weight: weight.map(Tensor::contiguous).transpose()?,
        bias: bias.map(Tensor::contiguous).transpose()?,
        skip: elements(around.skip)?,
        gate: elements(around.gate)?,
        residual: None,
    })
}

/// The order of dimensions in which an input is contiguous; `None` for its own.
struct Order(Option<Vec<usize>>);

impl Order {
    /// A tensor of the input's shape in this order.
    fn there(&self, t: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some(order) => t.permute(order.as_slice()),
            None => Ok(t.clone()),
        }
    }

    /// A tensor in this order in the input's.
    fn back(&self, t: Tensor) -> Result<Tensor> {
        let Some(order) = &self.0 else { return Ok(t) };
        let mut back = vec![0; order.len()];
        order.iter().enumerate().for_each(|(to, &from)| back[from] = to);
        t.permute(back)
    }
}

/// Hands the input to `run` in its memory order, and what `run` makes of it back in the input's.
fn in_memory_order(
    name: &'static str,
    input: &Tensor,
    place: impl Fn(&Tensor) -> Option<Placed>,
    eps: f64,
    run: impl FnOnce(Norm, &Order, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let copied;
    let (input, placed) = match place(input) {
        // Nothing lies in no order: the kernels still want candle's strides for contiguous.
        Some(placed) if input.elem_count() > 0 => (input, placed),
        _ => {
            let (copy, placed) = dense(name, input, place)?;
            copied = copy;
            (&copied, placed)
        }
    };
    let order = Order(placed.order);
    let norm = Norm { x_blocks: placed.blocks, ..Norm::new(name, placed.geometry, eps) };
    match order.0 {
        None => run(norm, &order, input),
        Some(_) => order.back(run(norm, &order, &order.there(input)?)?),
    }
}

/// The one copy: of an input whose strides no geometry describes.
fn dense(name: &str, input: &Tensor, place: impl Fn(&Tensor) -> Option<Placed>) -> Result<(Tensor, Placed)> {
    let input = input.contiguous()?;
    match place(&input) {
        Some(placed) => Ok((input, placed)),
        None => bail!("{name}: no geometry for a contiguous input of shape {:?}", input.dims()),
    }
}
