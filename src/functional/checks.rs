//! What the functions refuse, and in which words: each error names the function, what came and what was
//! expected.
//!
//! Apart from the functions, which say what they compute.

use crate::request::Running;
use candle_core::{bail, Result, Tensor, Var};

/// When a set needs more than one element.
pub(crate) const OWN: &str = "when normalizing with the input's own statistics";

pub(super) fn check_affine(
    op: &str,
    input: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<()> {
    check_input(op, input, eps)?;
    let shape = [input.dim(1)?];
    check_param(op, "weight", input, weight, &shape)?;
    check_param(op, "bias", input, bias, &shape)
}

pub(super) fn check_input(op: &str, input: &Tensor, eps: f64) -> Result<()> {
    check_dtype(op, "input", input)?;
    check_size(op, input)?;
    check_eps(op, eps)
}

/// Of a call, and of a layer when it is built.
pub(crate) fn check_eps(op: &str, eps: f64) -> Result<()> {
    if eps.is_nan() || eps < 0.0 {
        bail!("{op}: eps must not be negative, got {eps}")
    }
    Ok(())
}

/// As [`check_eps`].
pub(crate) fn check_groups(op: &str, num_groups: usize, num_channels: usize) -> Result<()> {
    if num_groups == 0 || !num_channels.is_multiple_of(num_groups) {
        bail!(
            "{op}: num_groups must divide num_channels, got {num_groups} groups and {num_channels} channels"
        )
    }
    Ok(())
}

/// Every product of sizes, and of the statistics' three numbers a set, is then a number of bytes that memory
/// can have. Sizes of 0 count as 1, since the products of the others are taken too.
fn check_size(op: &str, input: &Tensor) -> Result<()> {
    const MOST: usize = isize::MAX as usize / (4 * size_of::<f64>());
    let count = input.dims().iter().try_fold(1usize, |n, dim| n.checked_mul(*dim.max(&1)));
    match count {
        Some(count) if count <= MOST => Ok(()),
        _ => bail!("{op}: input has shape {:?}, expected at most {MOST} elements", input.dims()),
    }
}

pub(super) fn check_dtype(op: &str, what: &str, tensor: &Tensor) -> Result<()> {
    if !crate::autograd::DTYPES.contains(&tensor.dtype()) {
        bail!("{op}: {what} has dtype {:?}, expected one of f16, bf16, f32, f64", tensor.dtype())
    }
    Ok(())
}

/// Number of channels of an input `[N, C, ..]`.
pub(super) fn check_channels(op: &str, input: &Tensor, rank: usize) -> Result<usize> {
    if input.rank() < rank {
        bail!("{op}: input has shape {:?}, expected at least {rank} dimensions", input.dims())
    }
    check_size(op, input)?;
    input.dim(1)
}

pub(super) fn check_param(
    op: &str,
    what: &str,
    input: &Tensor,
    param: Option<&Tensor>,
    shape: &[usize],
) -> Result<()> {
    let Some(param) = param else { return Ok(()) };
    check_dtype(op, what, param)?;
    if param.dims() != shape {
        bail!("{op}: {what} has shape {:?}, expected {shape:?}", param.dims())
    }
    check_device(op, what, input, param)
}

pub(super) fn check_device(op: &str, what: &str, input: &Tensor, other: &Tensor) -> Result<()> {
    let (expected, got) = (input.device().location(), other.device().location());
    if expected != got {
        bail!("{op}: {what} is on {got:?}, expected the input's device {expected:?}")
    }
    Ok(())
}

/// Running statistics as they are passed in.
#[derive(Clone, Copy)]
pub(super) struct RunningStatistics<'a> {
    pub mean: Option<&'a Var>,
    pub var: Option<&'a Var>,
    pub momentum: f64,
}

pub(super) fn check_running(
    op: &str,
    input: &Tensor,
    channels: usize,
    RunningStatistics { mean, var, momentum }: RunningStatistics,
) -> Result<Option<Running>> {
    let (mean, var) = match (mean, var) {
        (Some(mean), Some(var)) => (mean, var),
        (None, None) => return Ok(None),
        _ => bail!("{op}: expected both of running_mean and running_var or neither, got one"),
    };
    check_param(op, "running_mean", input, Some(mean), &[channels])?;
    check_param(op, "running_var", input, Some(var), &[channels])?;
    check_momentum(op, momentum)?;
    for (what, var) in [("running_mean", mean), ("running_var", var)] {
        if !var.is_contiguous() {
            bail!("{op}: {what} has strides {:?}, expected a contiguous variable", var.stride())
        }
    }
    if same_storage(mean, var) {
        bail!("{op}: expected running_mean and running_var in memory of their own, got one variable for both")
    }
    Ok(Some(Running { mean: mean.clone(), var: var.clone(), momentum }))
}

pub(crate) fn check_momentum(op: &str, momentum: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&momentum) {
        bail!("{op}: momentum must be between 0 and 1, got {momentum}")
    }
    Ok(())
}

/// Refuses running statistics that lie in an argument's memory: candle holds a read lock on it while
/// the op runs, and writing them would wait for that lock for ever.
pub(super) fn apart(op: &str, running: Option<Running>, args: &[Option<&Tensor>]) -> Result<Option<Running>> {
    let Some(running) = running else { return Ok(None) };
    for arg in args.iter().flatten() {
        if same_storage(arg, &running.mean) || same_storage(arg, &running.var) {
            bail!("{op}: expected running statistics in memory of their own, got an argument's")
        }
    }
    Ok(Some(running))
}

fn same_storage(a: &Tensor, b: &Tensor) -> bool {
    let address = |t: &Tensor| std::ptr::from_ref(&*t.storage_and_layout().0).addr();
    address(a) == address(b)
}

/// What to do about an input whose channels, as many as the layer has, are dimension 1.
pub(super) fn channels_hint(op: &str, input: &Tensor, shape: &[usize]) -> String {
    match shape {
        &[channels] if input.rank() > 2 && input.dims()[1] == channels => {
            format!(
                "; channels in dimension 1 are normalized by functional::{}_channels",
                op.replace('-', "_")
            )
        }
        _ => String::new(),
    }
}
