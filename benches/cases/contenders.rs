//! The same norm over the same tensors, in candle-norm and in candle-nn.
//!
//! candle-nn has no InstanceNorm: there its users take a GroupNorm with a group per channel. Its
//! fused LayerNorm and RMSNorm have no gradient: its training rows take the `_slow` compositions.

use super::inputs::Inputs;
use super::{fused, Norm, Row};
use candle_core::backprop::GradStore;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, Var};
use candle_nn::{Module, ModuleT};
use candle_norm::functional as norm;
use std::hint::black_box;

pub const EPS: f64 = 1e-5;
pub const MOMENTUM: f64 = 0.1;

/// A norm with its parameters, waiting for x.
pub type Layer = Box<dyn Fn(&Tensor) -> Result<Outputs>>;

/// What a row computes.
pub struct Outputs {
    pub y: Tensor,
    /// What was normalized, where the model goes on with it: a residual stream.
    pub sum: Option<Tensor>,
}

impl Outputs {
    pub fn one(y: Tensor) -> Self {
        Self { y, sum: None }
    }
}

/// A row's inputs but x, as the mode sees them.
pub struct Args {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub other: Option<Tensor>,
    pub mean: Var,
    pub var: Var,
}

impl Args {
    fn new(inputs: &Inputs, mode: Mode) -> Self {
        let param = |var: &Option<Var>| var.as_ref().map(|var| mode.param(var));
        Self {
            weight: mode.param(&inputs.weight),
            bias: param(&inputs.bias),
            other: param(&inputs.other),
            mean: inputs.running_mean.clone(),
            var: inputs.running_var.clone(),
        }
    }
}

/// What is measured of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is tracked: inference, or a part of the model that is not trained.
    Forward,
    /// x, weight and bias are trained.
    ForwardBackward,
}

impl Mode {
    pub fn param(self, var: &Var) -> Tensor {
        match self {
            Mode::Forward => var.as_detached_tensor(),
            Mode::ForwardBackward => var.as_tensor().clone(),
        }
    }

    /// What comes after a forward whose outputs have the gradient `dy`.
    pub fn finish(self, outputs: Outputs, dy: &Tensor) -> Result<()> {
        match self {
            Mode::Forward => drop(black_box(outputs)),
            Mode::ForwardBackward => drop(black_box(backward(&outputs, dy)?)),
        }
        Ok(())
    }
}

/// x as the mode sees it.
pub fn input(inputs: &Inputs, mode: Mode) -> Tensor {
    mode.param(&inputs.x)
}

pub fn candle_norm(row: &Row, inputs: &Inputs, mode: Mode) -> Layer {
    let args = Args::new(inputs, mode);
    if row.case.norm.is_fused() {
        return fused::candle_norm(row, args);
    }
    let (kind, shape) = (row.case.norm, row.params());
    Box::new(move |x| {
        let Args { weight, bias, mean, var, .. } = &args;
        let (weight, bias) = (Some(weight), bias.as_ref());
        let batch =
            |training| norm::batch_norm(x, Some(mean), Some(var), weight, bias, training, MOMENTUM, EPS);
        match kind {
            Norm::BatchNorm => batch(true),
            Norm::BatchNormEval => batch(false),
            Norm::GroupNorm { groups } => norm::group_norm(x, groups, weight, bias, EPS),
            Norm::InstanceNorm => norm::instance_norm(x, None, None, weight, bias, true, MOMENTUM, EPS),
            Norm::LayerNorm => norm::layer_norm(x, &shape, weight, bias, EPS),
            Norm::RmsNorm => norm::rms_norm(x, &shape, weight, EPS),
            _ => bail!("{kind} is more than a norm"),
        }
        .map(Outputs::one)
    })
}

/// Of a row with more than a norm, candle-norm's norm alone.
pub fn plain(row: &Row, inputs: &Inputs, mode: Mode) -> Option<Layer> {
    row.case.norm.is_fused().then(|| fused::plain(row, Args::new(inputs, mode)))
}

/// An error where candle-nn has no such layer or cannot run it in the row's dtype.
pub fn candle_nn(row: &Row, inputs: &Inputs, mode: Mode) -> Result<Layer> {
    let args = Args::new(inputs, mode);
    if row.case.norm.is_fused() {
        return fused::candle_nn(row, args, mode);
    }
    let norm = plain_candle_nn(row, args, mode)?;
    Ok(Box::new(move |x| norm(x).map(Outputs::one)))
}

type Plain = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

fn plain_candle_nn(row: &Row, args: Args, mode: Mode) -> Result<Plain> {
    let Args { weight, bias, mean, var, .. } = args;
    let channels = row.params()[0];
    let with_bias = |bias: Option<Tensor>| match bias {
        Some(bias) => Ok(bias),
        None => bail!("{} has a bias", row.case.norm),
    };
    let group_norm =
        |groups| candle_nn::GroupNorm::new(weight.clone(), with_bias(bias.clone())?, channels, groups, EPS);
    Ok(match row.case.norm {
        Norm::BatchNorm | Norm::BatchNormEval => {
            let (mean, var) = (mean.as_detached_tensor().copy()?, var.as_detached_tensor().copy()?);
            let layer = candle_nn::BatchNorm::new(channels, mean, var, weight, with_bias(bias)?, EPS)?;
            let train = row.case.norm == Norm::BatchNorm;
            Box::new(move |x| layer.forward_t(x, train))
        }
        Norm::GroupNorm { groups } => {
            let layer = group_norm(groups)?;
            Box::new(move |x| layer.forward(x))
        }
        Norm::InstanceNorm => {
            let layer = group_norm(channels)?;
            Box::new(move |x| layer.forward(x))
        }
        Norm::LayerNorm => {
            let bias = with_bias(bias)?;
            match mode {
                Mode::Forward => {
                    let layer = candle_nn::LayerNorm::new(weight, bias, EPS);
                    Box::new(move |x| layer.forward(x))
                }
                Mode::ForwardBackward => {
                    Box::new(move |x| candle_nn::ops::layer_norm_slow(x, &weight, &bias, EPS as f32))
                }
            }
        }
        Norm::RmsNorm => match mode {
            Mode::Forward => {
                let layer = candle_nn::RmsNorm::new(weight, EPS);
                Box::new(move |x| layer.forward(x))
            }
            Mode::ForwardBackward => Box::new(move |x| candle_nn::ops::rms_norm_slow(x, &weight, EPS as f32)),
        },
        norm => bail!("{norm} is more than a norm"),
    })
}

/// A loss that costs nothing: its gradient with respect to y is `dy` as it stands.
///
/// Left of a training step is then what the norm costs: its forward, its backward, and what candle
/// does around a backward (a zero-filled tensor and an addition for every gradient, dy's too).
struct GivenGradient(Tensor);

impl CustomOp1 for GivenGradient {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, y: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        nothing(y)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

impl CustomOp2 for GivenGradient {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        nothing(y)
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.0.clone()), Some(self.0.clone())))
    }
}

/// A loss of 0 where y is.
#[cfg(feature = "cuda")]
fn nothing(y: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let loss = y.device.alloc_zeros::<f32>(1)?;
    Ok((CudaStorage::wrap_cuda_slice(loss, y.device.clone()), Shape::from(())))
}

/// `loss.backward()` of a loss whose gradient with respect to y, and to the sum, is `dy`.
pub fn backward(outputs: &Outputs, dy: &Tensor) -> Result<GradStore> {
    let loss = GivenGradient(dy.clone());
    match &outputs.sum {
        Some(sum) => outputs.y.apply_op2(sum, loss)?.backward(),
        None => outputs.y.apply_op1(loss)?.backward(),
    }
}

/// Everything a layer computes, in f32: y, and in training the gradients by name.
pub fn outputs(layer: &Layer, inputs: &Inputs, mode: Mode) -> Result<Vec<(&'static str, Tensor)>> {
    let outputs = layer(&input(inputs, mode))?;
    let mut all = vec![("y", outputs.y.detach().to_dtype(DType::F32)?)];
    if let Some(sum) = &outputs.sum {
        all.push(("sum", sum.detach().to_dtype(DType::F32)?));
    }
    if mode == Mode::ForwardBackward {
        let gradients = backward(&outputs, &inputs.dy)?;
        for (name, var) in inputs.tracked() {
            match gradients.get(var) {
                Some(gradient) => all.push((name, gradient.to_dtype(DType::F32)?)),
                None => bail!("no gradient for {name}"),
            }
        }
    }
    Ok(all)
}
