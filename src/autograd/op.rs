//! The custom op that every norm is: its forward, its backward, and what it keeps between them.
//!
//! One struct serves all norms, since they differ in their `Geometry` alone. The statistics go from
//! forward to backward in a cell that is filled once and never emptied: a graph may be walked twice.

use super::composed;
use super::device::{self, BackwardTensors};
use super::parts::{Input, Parts};
use super::sync::Merged;
use crate::kernels::Kernels;
use crate::request::{accumulation_dtype, Arg, Forward, Given, Gradients, Norm, Normed, Running, Want};
use candle_core::{bail, DType, Layout, Result, Shape, Storage, Tensor};
use std::sync::{Arc, Mutex, OnceLock};

/// Where the statistics come from.
pub(crate) enum Statistics {
    /// From the input, whose statistics may also move running ones.
    Input(Option<Running>),
    /// From running statistics, as they are at the time of the forward (evaluation).
    Running(Running),
    /// From the inputs of all ranks, merged.
    Merged(Merged),
}

/// Normalizes `x`, contiguous in the geometry's order, and attaches the gradients.
///
/// Weight and bias are contiguous with `params()` elements in any shape. All checks are done.
pub(crate) fn normalize(norm: Norm, x: &Tensor, parts: Parts<Tensor>, source: Statistics) -> Result<Tensor> {
    if !device::has_kernels(x.device()) {
        return composed::unfused(norm, x, parts, |plain, x, parts| {
            composed_forward(plain, x, parts, source)
        });
    }
    if second_order() || !device::fuses(x.device(), &norm, x.dtype())? {
        return composed::unfused(norm, x, parts, |plain, x, parts| attach(plain, x, parts, source));
    }
    attach(norm, x, parts, source)
}

/// Runs the op's forward and makes the op a node of candle's graph.
fn attach(norm: Norm, x: &Tensor, parts: Parts<Tensor>, source: Statistics) -> Result<Tensor> {
    let (op, inputs) = NormOp::new(norm, x, parts, source)?;
    op.apply(x, &inputs)
}

fn composed_forward(norm: Norm, x: &Tensor, parts: Parts<Tensor>, source: Statistics) -> Result<Tensor> {
    let (weight, bias) = (parts.weight.as_ref(), parts.bias.as_ref());
    match source {
        Statistics::Running(running) => {
            let stats = running_statistics(x, &running)?;
            composed::forward(x, &norm, weight, bias, Some(&stats))
        }
        Statistics::Input(running) => {
            let y = composed::forward(x, &norm, weight, bias, None)?;
            if let Some(running) = running {
                move_running(&norm, &composed::statistics(&x.detach(), &norm)?, &running)?;
            }
            Ok(y)
        }
        Statistics::Merged(_) => bail!("{}: no kernels for device {:?}", norm.name, x.device().location()),
    }
}

/// Running statistics as a tensor `[3, sets]`.
fn running_statistics(x: &Tensor, running: &Running) -> Result<Tensor> {
    let dtype = accumulation_dtype(x.dtype());
    let mean = running.mean.as_detached_tensor().to_dtype(dtype)?;
    let var = running.var.as_detached_tensor().to_dtype(dtype)?;
    Tensor::stack(&[mean.clone(), mean.zeros_like()?, var], 0)
}

/// The composed counterpart of what the kernels do with `Forward::running`.
fn move_running(norm: &Norm, stats: &Tensor, running: &Running) -> Result<()> {
    let g = &norm.geometry;
    let n = g.set_len() as f64;
    let average = |t: Tensor| t.reshape((g.outer, g.sets_per_outer()))?.mean(0);
    let mean = average((stats.get(0)? + stats.get(1)?)?)?;
    let var = average((stats.get(2)? * (n / (n - 1.0)))?)?;
    running.move_towards(&mean, &var)
}

/// What a forward leaves behind for whoever is next.
#[derive(Default)]
pub(super) struct Saved {
    /// `[3, sets]`, for the backward.
    pub stats: OnceLock<Tensor>,
    /// `x + residual`.
    pub sum: OnceLock<Tensor>,
    /// The output, where the op before has made it along with the sum; taken out by the one that returns it.
    pub output: Mutex<Option<Storage>>,
}

impl Saved {
    pub fn leave(&self, output: Storage) {
        *self.output.lock().unwrap_or_else(|e| e.into_inner()) = Some(output);
    }

    fn take<S: Kernels>(&self) -> Option<S> {
        self.output.lock().unwrap_or_else(|e| e.into_inner()).take().and_then(S::into_own)
    }
}

pub(super) struct NormOp {
    pub norm: Norm,
    /// What candle passes behind x.
    inputs: Vec<Input>,
    held: Parts<Tensor>,
    source: Statistics,
    /// Somebody tracks an argument: the backward will want the statistics.
    pub keep: bool,
    pub saved: Arc<Saved>,
}

/// A storage with its layout, as candle hands out arguments.
pub(super) type Laid<'a, S> = (&'a S, &'a Layout);

impl NormOp {
    /// The op, and its inputs behind x.
    pub fn new(
        norm: Norm,
        x: &Tensor,
        parts: Parts<Tensor>,
        source: Statistics,
    ) -> Result<(Self, Vec<Tensor>)> {
        let (inputs, held) = parts.split()?;
        let keep = x.track_op() || !inputs.is_empty();
        let (inputs, tensors) = inputs.into_iter().unzip();
        Ok((Self { norm, inputs, held, source, keep, saved: Arc::default() }, tensors))
    }

    pub fn apply(self, x: &Tensor, inputs: &[Tensor]) -> Result<Tensor> {
        match inputs {
            // Nothing for a graph to hold.
            [] if !self.keep => x.apply_op1_no_bwd(&self),
            [] => x.apply_op1(self),
            [a] => x.apply_op2(a, self),
            [a, b] => x.apply_op3(a, b, self),
            more => bail!("{}: {} tracked arguments, candle's ops take 3", self.norm.name, 1 + more.len()),
        }
    }

    /// Running statistics that this forward moves.
    fn moves(&self) -> Option<&Running> {
        match &self.source {
            Statistics::Input(running) => running.as_ref(),
            _ => None,
        }
    }

    /// Running statistics that this forward normalizes with.
    fn reads(&self) -> Option<&Running> {
        match &self.source {
            Statistics::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Statistics of all ranks that this forward normalizes with.
    fn merged(&self) -> Option<&Merged> {
        match &self.source {
            Statistics::Merged(merged) => Some(merged),
            _ => None,
        }
    }

    pub fn forward<S: Kernels>(&self, x: Laid<S>, inputs: &[Laid<S>]) -> Result<(S, Shape)> {
        if let Some(y) = self.saved.take() {
            return Ok((y, x.1.shape().clone()));
        }
        let Normed { y, stats, sum } = self.run(x, inputs)?;
        self.save(stats, sum, x.1);
        Ok((y, x.1.shape().clone()))
    }

    /// An op runs forward once; a second fill would carry the same values.
    pub fn save<S: Kernels>(&self, stats: Option<S>, sum: Option<S>, x: &Layout) {
        let sets = self.norm.geometry.sets();
        let _ = stats.map(|s| self.saved.stats.set(device::tensor(s.wrap(), (3, sets))));
        let _ = sum.map(|s| self.saved.sum.set(device::tensor(s.wrap(), x.shape())));
    }

    pub fn run<S: Kernels>(&self, x: Laid<S>, inputs: &[Laid<S>]) -> Result<Normed<S>> {
        let guards = self.held.map(|t| Ok(t.storage_and_layout()))?;
        let mut parts = guards.map(device::arg)?;
        for (input, &(storage, layout)) in self.inputs.iter().zip(inputs) {
            let arg = Arg { storage, offset: device::start(layout) };
            place(&mut parts, *input, arg, layout.shape().elem_count() / 2);
        }
        let running = self.reads().map(|r| (r.mean.storage_and_layout(), r.var.storage_and_layout()));
        let merged = self.merged().map(|merged| merged.stats.storage_and_layout());
        let given = match (&running, &merged) {
            (Some((mean, var)), _) => {
                Some(Given { mean: device::arg(mean)?, mean_low: None, var: device::arg(var)? })
            }
            (None, Some(stats)) => Some(rows(device::arg(stats)?, stats.1)?),
            (None, None) => None,
        };
        S::forward(Forward {
            weight: parts.weight,
            bias: parts.bias,
            residual: parts.residual,
            skip: parts.skip,
            gate: parts.gate,
            given,
            keep: self.keep && merged.is_none(),
            running: self.moves(),
            ..Forward::new(self.norm, Arg { storage: x.0, offset: device::start(x.1) })
        })
    }

    fn statistics(&self) -> Result<&Tensor> {
        match self.saved.stats.get() {
            Some(stats) => Ok(stats),
            None => bail!("{}: backward without a forward that kept statistics", self.norm.name),
        }
    }

    /// Gradients of x and of each input, `None` where nobody tracks it.
    pub fn backward(&self, x: &Tensor, inputs: &[&Tensor], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        if x.elem_count() == 0 && self.merged().is_none() {
            // An empty block has no width to count parameters by, and nothing to sum.
            let zeros = |arg: &&Tensor| arg.track_op().then(|| arg.zeros_like()).transpose();
            return std::iter::once(&x).chain(inputs).map(zeros).collect();
        }
        let mut parts = self.held.clone();
        for (input, tensor) in self.inputs.iter().zip(inputs) {
            match input {
                Input::Both => (parts.weight, parts.bias) = (Some(tensor.get(0)?), Some(tensor.get(1)?)),
                Input::Weight => parts.weight = Some((*tensor).clone()),
                Input::Bias => parts.bias = Some((*tensor).clone()),
                Input::Skip => parts.skip = Some((*tensor).clone()),
                Input::Gate => parts.gate = Some((*tensor).clone()),
            }
        }
        let gradients = self.gradients(x, parts, dy)?;
        let fit = |gradient: Option<Tensor>, arg: &Tensor| match gradient {
            Some(gradient) => gradient.reshape(arg.shape())?.to_dtype(arg.dtype()).map(Some),
            None => Ok(None),
        };
        let Gradients { dx, mut dweight, mut dbias, mut dskip, mut dgate } = gradients;
        let mut all = vec![fit(dx.filter(|_| x.track_op()), x)?];
        for (input, arg) in self.inputs.iter().zip(inputs) {
            let gradient = match input {
                Input::Weight => dweight.take(),
                Input::Bias => dbias.take(),
                Input::Skip => dskip.take(),
                Input::Gate => dgate.take(),
                Input::Both => match (dweight.take(), dbias.take()) {
                    (Some(weight), Some(bias)) => Some(Tensor::stack(&[weight, bias], 0)?),
                    _ => None,
                },
            };
            all.push(fit(gradient, arg)?);
        }
        Ok(all)
    }

    /// Gradients of everything that is tracked, in any shape.
    fn gradients(&self, x: &Tensor, parts: Parts<Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let again = dy.track_op() || second_order();
        if let Some(merged) = self.merged() {
            if again {
                merged.refuse_second_order(&self.norm)?;
            }
            return merged.backward(self.norm, x, parts.weight.as_ref(), dy);
        }
        if again {
            if self.norm.fusion != Default::default() {
                // `normalize` takes another road under the switch, which must be set before the forward.
                bail!(
                    "{}: gradients of gradients need CANDLE_GRAD_DO_NOT_DETACH at the forward",
                    self.norm.name
                )
            }
            let fixed = self.reads().map(|_| self.statistics()).transpose()?;
            return composed::backward(x, dy, &self.norm, parts.weight.as_ref(), fixed);
        }
        let dtype_of = |input, t: &Option<Tensor>| {
            let wanted = self.inputs.iter().any(|i| *i == input || *i == Input::Both);
            t.as_ref().filter(|_| wanted).map(Tensor::dtype)
        };
        let want = Want {
            dx: x.track_op() && !self.is_constant(),
            dweight: dtype_of(Input::Weight, &parts.weight),
            dbias: dtype_of(Input::Bias, &parts.bias),
            dskip: self.inputs.contains(&Input::Skip),
            dgate: self.inputs.contains(&Input::Gate),
        };
        // They differ where a residual in another dtype was added to x.
        let dtype = wider(x.dtype(), dy.dtype());
        let (x, dy) = (x.detach().to_dtype(dtype)?, dy.contiguous()?.to_dtype(dtype)?);
        let gradients = device::backward(BackwardTensors {
            norm: self.norm,
            x: &x,
            dy: &dy,
            parts: &parts,
            stats: self.statistics()?,
            fixed: self.reads().is_some(),
            want,
        })?;
        if self.is_constant() {
            // Zero, and NaN where x or dy is no number.
            return Ok(Gradients { dx: Some((x.affine(0.0, 0.0)? * dy)?), ..gradients });
        }
        Ok(gradients)
    }

    /// Whether y does not depend on x: the mean of a set of one element is that element.
    fn is_constant(&self) -> bool {
        let g = &self.norm.geometry;
        g.center && g.set_len() == 1 && matches!(self.source, Statistics::Input(_))
    }
}

/// Puts an argument where it belongs; `both` is followed by its bias after `half` elements.
fn place<'a, S>(parts: &mut Parts<Arg<'a, S>>, input: Input, arg: Arg<'a, S>, half: usize) {
    match input {
        Input::Weight => parts.weight = Some(arg),
        Input::Bias => parts.bias = Some(arg),
        Input::Skip => parts.skip = Some(arg),
        Input::Gate => parts.gate = Some(arg),
        Input::Both => {
            parts.weight = Some(arg);
            parts.bias = Some(Arg { offset: arg.offset + half, ..arg });
        }
    }
}

/// The rows of a statistics tensor `[3, sets]`.
fn rows<'a, S>(stats: Arg<'a, S>, layout: &Layout) -> Result<Given<'a, S>> {
    let (_, sets) = layout.shape().dims2()?;
    let row = |i| Arg { offset: stats.offset + i * sets, ..stats };
    Ok(Given { mean: row(0), mean_low: Some(row(1)), var: row(2) })
}

/// The narrowest dtype that holds both exactly.
pub(super) fn wider(a: DType, b: DType) -> DType {
    match (a, b) {
        _ if a == b => a,
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    }
}

/// candle keeps the graph of the backward when this is set, and then asks for gradients of gradients.
pub(super) fn second_order() -> bool {
    thread_local! {
        static SET: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    SET.with(|set| *set)
}
