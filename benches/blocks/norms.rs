//! Norms with what stands around them in the blocks, written three ways.
//!
//! Apart from the blocks, which are written once and ask for a norm where a model has one.

use crate::cases::contenders::{Mode, Outputs, EPS, MOMENTUM};
use candle_core::{bail, DType, Result, Tensor, Var};
use candle_nn::{Activation, Module, ModuleT};
use candle_norm::functional::{self as norm, fused};
use std::cell::RefCell;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// candle-nn's norms and candle's operations. Where a graph is wanted, the norms that have one.
    CandleNn,
    /// candle-norm's norms and candle's operations.
    Plain,
    /// All in one call of candle-norm.
    Fused,
}

impl Way {
    pub const ALL: [Way; 3] = [Way::CandleNn, Way::Plain, Way::Fused];

    pub fn name(self) -> &'static str {
        ["candle-nn", "plain norms", "fused"][self as usize]
    }

    /// As the norms of a block alone are called in a run.
    pub fn alone(self) -> &'static str {
        ["candle-nn, norms", "plain norms, norms", "fused, norms"][self as usize]
    }
}

/// A norm and its neighbours; what its tensors are.
#[derive(Debug, Clone)]
pub enum Site {
    /// x, residual, weight: RMSNorm of the sum, and the sum.
    AddRms,
    /// x, weight, bias.
    Layer,
    /// x, residual, weight, bias: layer norm of the sum, and the sum.
    AddLayer,
    /// x, weight, bias: a norm of so many groups.
    Group(usize),
    /// The same before a SiLU.
    GroupSilu(usize),
    /// x, weight, bias, with running mean and variance.
    Batch(Var, Var),
    /// x, weight, bias and perhaps a skip: `relu(batch_norm(x) + skip)`, with running mean and variance.
    BatchRelu(Var, Var),
    /// x, scale, shift: `layer_norm(x) * (1 + scale) + shift`.
    Modulate,
}

type Sites = Vec<(Site, Vec<Tensor>)>;

/// What a block calls at its norms.
pub struct Norms {
    way: Way,
    pub mode: Mode,
    /// What was asked for, where somebody wants to know.
    asked: Option<RefCell<Sites>>,
}

impl Norms {
    pub fn new(way: Way, mode: Mode) -> Self {
        Self { way, mode, asked: None }
    }

    /// The norms that a block asks for, with their arguments; and what it computes.
    pub fn of(block: impl FnOnce(&Norms) -> Result<Outputs>, mode: Mode) -> Result<(Sites, Outputs)> {
        let norms = Self { way: Way::Plain, mode, asked: Some(RefCell::default()) };
        let outputs = block(&norms)?;
        Ok((norms.asked.map(RefCell::into_inner).unwrap_or_default(), outputs))
    }

    /// A weight or an input as the mode sees it.
    pub fn var(&self, var: &Var) -> Tensor {
        self.mode.param(var)
    }

    pub fn at(&self, site: Site, args: &[Tensor]) -> Result<Outputs> {
        if let Some(asked) = &self.asked {
            asked.borrow_mut().push((site.clone(), args.iter().map(Tensor::detach).collect()));
        }
        self.run(&site, args)
    }

    pub fn run(&self, site: &Site, args: &[Tensor]) -> Result<Outputs> {
        match self.way {
            Way::CandleNn => candle_nn(site, args, self.mode == Mode::ForwardBackward),
            Way::Plain => plain(site, args, self.mode == Mode::ForwardBackward),
            Way::Fused => fused(site, args, self.mode == Mode::ForwardBackward),
        }
    }
}

fn candle_nn(site: &Site, args: &[Tensor], train: bool) -> Result<Outputs> {
    match (site, args) {
        (Site::AddRms, [x, residual, w]) => {
            let sum = (x + residual)?;
            // The fused one has no f64 either.
            let y = match train || x.dtype() == DType::F64 {
                true => candle_nn::ops::rms_norm_slow(&sum, w, EPS as f32),
                false => candle_nn::ops::rms_norm(&sum, w, EPS as f32),
            }?;
            Ok(Outputs { y, sum: Some(sum) })
        }
        (Site::Layer, [x, w, b]) => candle_nn_layer_norm(x, w, b, train).map(Outputs::one),
        (Site::AddLayer, [x, residual, w, b]) => {
            let sum = (x + residual)?;
            Ok(Outputs { y: candle_nn_layer_norm(&sum, w, b, train)?, sum: Some(sum) })
        }
        (Site::Group(groups), [x, w, b]) => {
            candle_nn::GroupNorm::new(w.clone(), b.clone(), x.dim(1)?, *groups, EPS)?
                .forward(x)
                .map(Outputs::one)
        }
        (Site::GroupSilu(groups), _) => {
            candle_nn(&Site::Group(*groups), args, train)?.y.silu().map(Outputs::one)
        }
        (Site::Batch(mean, var), [x, w, b]) => {
            let (mean, var) = (mean.as_detached_tensor(), var.as_detached_tensor());
            candle_nn::BatchNorm::new(x.dim(1)?, mean, var, w.clone(), b.clone(), EPS)?
                .forward_t(x, train)
                .map(Outputs::one)
        }
        (Site::BatchRelu(mean, var), [_, _, _, skip @ ..]) => {
            relu(candle_nn(&Site::Batch(mean.clone(), var.clone()), &args[..3], train)?.y, skip)
        }
        // As `mmdit/blocks.rs` of candle-transformers has it.
        (Site::Modulate, [x, scale, shift]) => {
            let ones = Tensor::ones_like(x)?;
            modulate(candle_nn::LayerNorm::new_no_bias(ones, EPS).forward(x)?, scale, shift)
        }
        _ => bail!("{site:?} does not have {} tensors", args.len()),
    }
}

/// The fused one has neither a gradient nor f64.
fn candle_nn_layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, train: bool) -> Result<Tensor> {
    match train || x.dtype() == DType::F64 {
        true => candle_nn::ops::layer_norm_slow(x, weight, bias, EPS as f32),
        false => candle_nn::ops::layer_norm(x, weight, bias, EPS as f32),
    }
}

fn plain(site: &Site, args: &[Tensor], train: bool) -> Result<Outputs> {
    match (site, args) {
        (Site::AddRms, [x, residual, w]) => {
            let sum = (x + residual)?;
            Ok(Outputs { y: norm::rms_norm(&sum, w.dims(), Some(w), EPS)?, sum: Some(sum) })
        }
        (Site::Layer, [x, w, b]) => norm::layer_norm(x, w.dims(), Some(w), Some(b), EPS).map(Outputs::one),
        (Site::AddLayer, [x, residual, w, b]) => {
            let sum = (x + residual)?;
            Ok(Outputs { y: norm::layer_norm(&sum, w.dims(), Some(w), Some(b), EPS)?, sum: Some(sum) })
        }
        (Site::Group(groups), [x, w, b]) => {
            norm::group_norm(x, *groups, Some(w), Some(b), EPS).map(Outputs::one)
        }
        (Site::GroupSilu(groups), _) => plain(&Site::Group(*groups), args, train)?.y.silu().map(Outputs::one),
        (Site::Batch(mean, var), [x, w, b]) => {
            norm::batch_norm(x, Some(mean), Some(var), Some(w), Some(b), train, MOMENTUM, EPS)
                .map(Outputs::one)
        }
        (Site::BatchRelu(mean, var), [_, _, _, skip @ ..]) => {
            relu(plain(&Site::Batch(mean.clone(), var.clone()), &args[..3], train)?.y, skip)
        }
        (Site::Modulate, [x, scale, shift]) => {
            modulate(norm::layer_norm(x, &x.dims()[2..], None, None, EPS)?, scale, shift)
        }
        _ => bail!("{site:?} does not have {} tensors", args.len()),
    }
}

fn fused(site: &Site, args: &[Tensor], train: bool) -> Result<Outputs> {
    match (site, args) {
        (Site::AddRms, [x, residual, w]) => {
            let both = fused::add_rms_norm(x, residual, w.dims(), Some(w), 0.0, EPS)?;
            Ok(Outputs { y: both.normed, sum: Some(both.sum) })
        }
        (Site::AddLayer, [x, residual, w, b]) => {
            let both = fused::add_layer_norm(x, residual, w.dims(), Some(w), Some(b), EPS)?;
            Ok(Outputs { y: both.normed, sum: Some(both.sum) })
        }
        // Nothing stands around these.
        (Site::Layer | Site::Group(_) | Site::Batch(..), _) => plain(site, args, train),
        (Site::GroupSilu(groups), [x, w, b]) => {
            fused::group_norm_act(x, *groups, Some(w), Some(b), EPS, None, Activation::Silu).map(Outputs::one)
        }
        (Site::BatchRelu(mean, var), [x, w, b, skip @ ..]) => {
            let (mean, var, w, b, act) = (Some(mean), Some(var), Some(w), Some(b), Activation::Relu);
            fused::batch_norm_act(x, mean, var, w, b, train, MOMENTUM, EPS, skip.first(), act)
                .map(Outputs::one)
        }
        (Site::Modulate, [x, scale, shift]) => {
            fused::modulated_layer_norm(x, &x.dims()[2..], scale, Some(shift), EPS).map(Outputs::one)
        }
        _ => bail!("{site:?} does not have {} tensors", args.len()),
    }
}

fn relu(y: Tensor, skip: &[Tensor]) -> Result<Outputs> {
    skip.iter().try_fold(y, |y, skip| y + skip)?.relu().map(Outputs::one)
}

fn modulate(y: Tensor, scale: &Tensor, shift: &Tensor) -> Result<Outputs> {
    y.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift).map(Outputs::one)
}

/// The norms of a block by themselves, each with tensors and a gradient of its own.
pub struct Alone(Vec<(Site, Vec<Var>, Tensor)>);

impl Alone {
    pub fn new(sites: Sites, mut gradient: impl FnMut(&[usize], DType) -> Result<Tensor>) -> Result<Self> {
        let own = |(site, args): (Site, Vec<Tensor>)| {
            let dy = gradient(args[0].dims(), args[0].dtype())?;
            let vars = args.iter().map(|t| Var::from_tensor(&t.copy()?)).collect::<Result<_>>()?;
            Ok((site, vars, dy))
        };
        sites.into_iter().map(own).collect::<Result<_>>().map(Self)
    }

    pub fn run(&self, norms: &Norms) -> Result<()> {
        for (site, vars, dy) in &self.0 {
            let args: Vec<Tensor> = vars.iter().map(|var| norms.var(var)).collect();
            let outputs = norms.run(site, &args)?;
            norms.mode.finish(outputs, dy)?;
        }
        Ok(())
    }
}
