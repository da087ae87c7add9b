//! The custom op that every norm is: `CustomOp1`, `2` or `3` by which of weight and bias it has.
//!
//! One struct serves all norms, since they differ in their `Geometry` alone. The statistics go from
//! forward to backward in a cell that is filled once and never emptied: a graph may be walked twice.

use super::composed;
use super::device::{self, BackwardTensors};
use super::sync::{self, Merged, Shared};
use crate::kernels::Kernels;
use crate::request::{accumulation_dtype, Arg, Forward, Given, Norm, Normed, Running, Want};
use candle_core::{bail, CpuStorage, Layout, Result, Shape, Storage, Tensor};
use candle_core::{CustomOp1, CustomOp2, CustomOp3};
use std::sync::{Arc, OnceLock};

/// Where the statistics come from.
pub(crate) enum Source {
    /// From the input, whose statistics may also move running ones.
    Input(Option<Running>),
    /// From running statistics, as they are at the time of the forward (evaluation).
    Running(Running),
    /// From the inputs of all ranks.
    Shared(Shared),
    /// From the inputs of all ranks, merged already.
    Merged(Merged),
}

/// Normalizes `x`, contiguous in the geometry's order, and attaches the gradients.
///
/// Weight and bias are contiguous with `params()` elements in any shape. All checks are done.
pub(crate) fn normalize(
    norm: Norm,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    source: Source,
) -> Result<Tensor> {
    let source = match source {
        Source::Shared(shared) => return sync::normalize_shared(norm, x, weight, bias, shared),
        source if !device::has_kernels(x.device()) => {
            return composed_forward(norm, x, weight, bias, source);
        }
        source => source,
    };
    attach(NormOp::new(norm, x, weight, bias, source), x, weight, bias)
}

/// Runs the op's forward and makes the op a node of candle's graph.
pub(super) fn attach(
    op: NormOp,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    match (weight, bias) {
        (None, None) => x.apply_op1(op),
        (Some(p), None) | (None, Some(p)) => x.apply_op2(p, op),
        (Some(w), Some(b)) => x.apply_op3(w, b, op),
    }
}

fn composed_forward(
    norm: Norm,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    source: Source,
) -> Result<Tensor> {
    match source {
        Source::Running(running) => {
            let stats = running_statistics(x, &running)?;
            composed::forward(x, &norm, weight, bias, Some(&stats))
        }
        Source::Input(running) => {
            let y = composed::forward(x, &norm, weight, bias, None)?;
            if let Some(running) = running {
                move_running(&norm, &composed::statistics(&x.detach(), &norm)?, &running)?;
            }
            Ok(y)
        }
        Source::Shared(_) | Source::Merged(_) => {
            bail!("{}: no kernels for device {:?}", norm.name, x.device().location())
        }
    }
}

/// Running statistics as a tensor `[3, sets]`.
fn running_statistics(x: &Tensor, running: &Running) -> Result<Tensor> {
    let dtype = accumulation_dtype(x.dtype());
    let mean = running.mean.as_detached_tensor().to_dtype(dtype)?;
    let var = running.var.as_detached_tensor().to_dtype(dtype)?;
    Tensor::stack(&[&mean, &mean.zeros_like()?, &var], 0)
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

pub(super) struct NormOp {
    norm: Norm,
    has_weight: bool,
    source: Source,
    /// Somebody tracks an argument: the backward will want the statistics.
    keep: bool,
    pub(super) saved: Arc<OnceLock<Tensor>>,
}

impl NormOp {
    pub(super) fn new(
        norm: Norm,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        source: Source,
    ) -> Self {
        let keep = [Some(x), weight, bias].into_iter().flatten().any(Tensor::track_op);
        Self { norm, has_weight: weight.is_some(), source, keep, saved: Arc::new(OnceLock::new()) }
    }

    /// Splits the arguments behind x into weight and bias.
    fn affine<T: Copy>(&self, args: &[T]) -> (Option<T>, Option<T>) {
        match (self.has_weight, args) {
            (true, [weight, rest @ ..]) => (Some(*weight), rest.first().copied()),
            (_, rest) => (None, rest.first().copied()),
        }
    }

    /// Running statistics that this forward moves.
    fn moves(&self) -> Option<&Running> {
        match &self.source {
            Source::Input(running) => running.as_ref(),
            _ => None,
        }
    }

    /// Running statistics that this forward normalizes with.
    fn reads(&self) -> Option<&Running> {
        match &self.source {
            Source::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Statistics of all ranks that this forward normalizes with.
    fn merged(&self) -> Option<&Merged> {
        match &self.source {
            Source::Merged(merged) => Some(merged),
            _ => None,
        }
    }

    fn forward<S: Kernels>(&self, x: Laid<S>, affine: &[Laid<S>]) -> Result<(S, Shape)> {
        let (weight, bias) = self.affine(affine);
        let arg = |(storage, layout)| Arg::new(storage, layout);
        let guards = self.reads().map(|r| (r.mean.storage_and_layout(), r.var.storage_and_layout()));
        let merged = self.merged().map(|merged| merged.stats.storage_and_layout());
        let given = match (&guards, &merged) {
            (Some((mean, var)), _) => {
                Some(Given { mean: device::arg(mean)?, mean_low: None, var: device::arg(var)? })
            }
            (None, Some(stats)) => Some(rows(device::arg(stats)?, stats.1)?),
            (None, None) => None,
        };
        let Normed { y, stats, .. } = S::forward(Forward {
            weight: weight.map(arg),
            bias: bias.map(arg),
            given,
            keep: self.keep && merged.is_none(),
            running: self.moves(),
            ..Forward::new(self.norm, arg(x))
        })?;
        self.save(stats.map(S::wrap));
        Ok((y, x.1.shape().clone()))
    }

    fn save(&self, stats: Option<Storage>) {
        if let Some(stats) = stats {
            let stats = device::tensor(stats, &[3, self.norm.geometry.sets()]);
            // An op runs forward once; a second fill would carry the same values.
            let _ = self.saved.set(stats);
        }
    }

    fn statistics(&self) -> Result<&Tensor> {
        match self.saved.get() {
            Some(stats) => Ok(stats),
            None => bail!("{}: backward without a forward that kept statistics", self.norm.name),
        }
    }

    /// Statistics that did not depend on x.
    fn fixed(&self) -> Result<Option<&Tensor>> {
        self.reads().map(|_| self.statistics()).transpose()
    }

    /// Gradients of x and of each affine argument, `None` where nobody tracks it.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        affine: &[&Tensor],
        dy: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let (weight, bias) = self.affine(affine);
        fn wanted(t: Option<&Tensor>) -> Option<&Tensor> {
            t.filter(|t| t.track_op())
        }
        let again = dy.track_op() || second_order();
        if x.elem_count() == 0 && self.merged().is_none() {
            // An empty block has no width to count parameters by, and nothing to sum.
            let zeros = |arg: &&Tensor| wanted(Some(*arg)).map(Tensor::zeros_like).transpose();
            return std::iter::once(&x).chain(affine).map(zeros).collect();
        }
        let (dx, dweight, dbias) = if let Some(merged) = self.merged() {
            if again {
                merged.refuse_second_order(&self.norm)?;
            }
            merged.backward(self.norm, x, weight, dy)?.into()
        } else if again {
            let [dx, dw, db] = composed::backward(x, dy, &self.norm, weight, self.fixed()?)?;
            (Some(dx), Some(dw), Some(db))
        } else {
            let want = Want {
                dx: x.track_op(),
                dweight: wanted(weight).map(|t| t.dtype()),
                dbias: wanted(bias).map(|t| t.dtype()),
                ..Want::default()
            };
            let gradients = self.kernel_backward(x, weight, dy, want)?;
            (gradients.dx, gradients.dweight, gradients.dbias)
        };
        let fit = |gradient: Option<Tensor>, arg: Option<&Tensor>| match (gradient, wanted(arg)) {
            (Some(gradient), Some(arg)) => gradient.reshape(arg.shape())?.to_dtype(arg.dtype()).map(Some),
            _ => Ok(None),
        };
        let mut all = vec![fit(dx, Some(x))?];
        all.extend(weight.map(|w| fit(dweight, Some(w))).transpose()?);
        all.extend(bias.map(|b| fit(dbias, Some(b))).transpose()?);
        Ok(all)
    }

    fn kernel_backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        dy: &Tensor,
        want: Want,
    ) -> Result<crate::request::Gradients<Tensor>> {
        device::backward(BackwardTensors {
            norm: self.norm,
            x: &x.detach(),
            dy: &dy.contiguous()?,
            weight,
            stats: self.statistics()?,
            fixed: self.reads().is_some(),
            want,
        })
    }
}

/// A storage with its layout, as candle hands out arguments.
type Laid<'a, S> = (&'a S, &'a Layout);

/// The rows of a statistics tensor `[3, sets]`.
fn rows<'a, S>(stats: Arg<'a, S>, layout: &Layout) -> Result<Given<'a, S>> {
    let (_, sets) = layout.shape().dims2()?;
    let row = |i| Arg { offset: stats.offset + i * sets, ..stats };
    Ok(Given { mean: row(0), mean_low: Some(row(1)), var: row(2) })
}

/// candle keeps the graph of the backward when this is set, and then asks for gradients of gradients.
fn second_order() -> bool {
    thread_local! {
        static SET: bool =
            std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|s| !s.is_empty() && s != "0");
    }
    SET.with(|set| *set)
}

fn two(gradients: Vec<Option<Tensor>>) -> (Option<Tensor>, Option<Tensor>) {
    let mut gradients = gradients.into_iter();
    (gradients.next().flatten(), gradients.next().flatten())
}

impl CustomOp1 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((s, l), &[])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s: &candle_core::CudaStorage,
        l: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward((s, l), &[])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(x, &[], dy)?.pop().flatten())
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        p: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(two(self.backward(x, &[p], dy)?))
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2), (s3, l3)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
        s3: &candle_core::CudaStorage,
        l3: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward((s1, l1), &[(s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.backward(x, &[w, b], dy)?;
        let dbias = gradients.pop().flatten();
        let (dx, dweight) = two(gradients);
        Ok((dx, dweight, dbias))
    }
}
