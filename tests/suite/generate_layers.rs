//! Layers made from bytes, beside the functions that they stand for.
//!
//! Apart from `generate.rs`, whose calls it takes: the functions are compared with the oracle there, so here
//! a layer has to give their bits, move its statistics as they do, and fail where they fail.

use crate::case::{Case, Norm};
use crate::common::{bits, device, left_out, tensor, values};
use crate::generate::{Bytes, Call};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::batch_norm::BatchNormOptions;
use candle_norm::group_norm::GroupNormOptions;
use candle_norm::instance_norm::InstanceNormOptions;
use candle_norm::layer_norm::LayerNormOptions;
use candle_norm::rms_norm::RmsNormOptions;
use candle_norm::{functional as f, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Module, ModuleT, RmsNorm};

enum Layer {
    Batch(BatchNorm),
    Instance(InstanceNorm),
    Last(LayerNorm),
    Group(GroupNorm),
    Rms(RmsNorm),
}

impl Layer {
    fn new(case: &Case, vb: VarBuilder) -> Result<Self> {
        let (eps, affine, shape) = (case.eps, case.weight, case.param_dims());
        let track = case.running.is_some();
        Ok(match case.norm {
            Norm::Batch { .. } => {
                let options = BatchNormOptions::default().eps(eps).affine(affine).bias(case.bias);
                let options = options.momentum(case.momentum).track_running_stats(track);
                Self::Batch(BatchNorm::with_options(shape[0], options, vb)?)
            }
            Norm::Instance { .. } => {
                let options = InstanceNormOptions::default().eps(eps).affine(affine);
                let options = options.momentum(case.momentum).track_running_stats(track);
                Self::Instance(InstanceNorm::with_options(shape[0], options, vb)?)
            }
            Norm::Group { groups } => {
                let options = GroupNormOptions::default().eps(eps).affine(affine);
                Self::Group(GroupNorm::with_options(groups, shape[0], options, vb)?)
            }
            // No layer of ours.
            Norm::Channels { .. } => candle_core::bail!("no layer"),
            Norm::Layer { .. } => {
                let options = LayerNormOptions::default().eps(eps).elementwise_affine(affine).bias(case.bias);
                Self::Last(LayerNorm::with_options(shape, options, vb)?)
            }
            Norm::Rms { .. } => {
                let options = RmsNormOptions::default().eps(eps).elementwise_affine(affine);
                Self::Rms(RmsNorm::with_options(shape, options, vb)?)
            }
        })
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Self::Batch(norm) => norm.forward_t(x, train),
            Self::Instance(norm) => norm.forward_t(x, train),
            Self::Last(norm) => norm.forward(x),
            Self::Group(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

/// A copy of a variable that the layer took from `vars`.
fn copy(vars: &VarMap, name: &str) -> Result<Option<Var>> {
    let found = vars.data().lock().unwrap().get(name).map(|var| var.as_tensor().clone());
    found.map(|t| Var::from_tensor(&t.force_contiguous()?)).transpose()
}

/// The function that the layer stands for, on copies of its variables.
struct Function<'a> {
    case: &'a Case,
    weight: Option<Var>,
    bias: Option<Var>,
    mean: Option<Var>,
    var: Option<Var>,
}

impl Function<'_> {
    fn call(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let (weight, bias) = (self.weight.as_deref(), self.bias.as_deref());
        let (mean, var) = (self.mean.as_ref(), self.var.as_ref());
        let (momentum, eps) = (self.case.momentum, self.case.eps);
        let own = train || mean.is_none();
        match self.case.norm {
            Norm::Batch { .. } => f::batch_norm(x, mean, var, weight, bias, own, momentum, eps),
            Norm::Instance { .. } if x.rank() < 3 => candle_core::bail!("the layer wants 3 dimensions"),
            Norm::Instance { .. } => f::instance_norm(x, mean, var, weight, bias, own, momentum, eps),
            Norm::Group { groups } => f::group_norm(x, groups, weight, bias, eps),
            Norm::Layer { .. } => f::layer_norm(x, &self.case.param_dims(), weight, bias, eps),
            Norm::Rms { .. } => f::rms_norm(x, &self.case.param_dims(), weight, eps),
            Norm::Channels { .. } => candle_core::bail!("no layer"),
        }
    }
}

/// A layer, trained and evaluated in the order that the bytes say, at times on an input that does not fit.
pub fn layers(bytes: &[u8]) -> std::result::Result<(), String> {
    let mut bytes = Bytes(bytes);
    let call = Call::new(&mut bytes);
    let case = Case { narrow_params: false, ..call.case.clone() };
    check(&case, &call, &mut bytes).map_err(|e| e.to_string())?.map_err(|e| format!("{e}\n{case:?}"))
}

fn check(case: &Case, call: &Call, bytes: &mut Bytes) -> Result<std::result::Result<(), String>> {
    if device().is_cuda() && case.param_dims().contains(&0) {
        left_out("a VarBuilder fails at ones without elements: candle launches a kernel of no blocks");
        return Ok(Ok(()));
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, case.params, device());
    // No group of no channels.
    let Ok(layer) = Layer::new(case, vb) else { return Ok(refused(case)) };
    let set = |name: &str, values: &Option<Vec<f64>>| -> Result<()> {
        let (Some(values), Some(var)) = (values, vars.data().lock().unwrap().get(name).cloned()) else {
            return Ok(());
        };
        var.set(&tensor(values, var.dims(), var.dtype())?)
    };
    set("weight", &call.args.weight)?;
    set("bias", &call.args.bias)?;
    let running = call.args.running.clone().unzip();
    set("running_mean", &running.0)?;
    set("running_var", &running.1)?;
    let get = |name: &str| copy(&vars, name);
    let (weight, bias) = (get("weight")?, get("bias")?);
    let function = Function { case, weight, bias, mean: get("running_mean")?, var: get("running_var")? };
    let x = crate::case::Argument::new(&call.args.x, &case.dims, case.dtype, &case.layout)?;
    let mut counted = 0.0;
    for step in 0..3 {
        let train = step == 0 && !case.norm.fixed() || bytes.rarely(2);
        let x = match bytes.rarely(6) {
            true => Tensor::zeros((2, 3, 5), DType::F32, device())?,
            false => x.view.clone(),
        };
        let (got, expected) = (layer.forward(&x, train), function.call(&x, train));
        match (&got, &expected) {
            (Ok(got), Ok(expected)) => {
                counted += f64::from(u8::from(train));
                if !got.is_contiguous() || got.dims() != expected.dims() || got.dtype() != expected.dtype() {
                    return Ok(Err(format!("step {step}: {got:?}, expected {expected:?}")));
                }
                if bits(got) != bits(expected) {
                    return Ok(Err(format!("step {step}: other bits than the function's")));
                }
            }
            (Err(_), Err(_)) => {}
            // The layer checks channels where no parameter would tell the function.
            (Err(e), Ok(_)) if e.to_string().contains("expected") && x.dims() != case.dims => {}
            _ => {
                return Ok(Err(format!(
                    "step {step}, train {train}: {got:?}, the function gave {expected:?}"
                )))
            }
        }
        for (name, var) in [("running_mean", &function.mean), ("running_var", &function.var)] {
            let same = get(name)?.map(|t| bits(&t)) == var.as_ref().map(|t| bits(t));
            // Set back: an input that fits the function alone has moved its copy alone.
            if got.is_ok() && !same {
                return Ok(Err(format!("step {step}: {name} is not the function's")));
            }
            if let (Err(_), Some(var), Some(layers)) = (&got, var, get(name)?) {
                var.set(&layers)?;
            }
        }
        let count = get("num_batches_tracked")?.map(|t| values(&t)[0]);
        if matches!(case.norm, Norm::Batch { .. }) && count.is_some_and(|count| count != counted) {
            return Ok(Err(format!("step {step}: {count:?} batches tracked, expected {counted}")));
        }
    }
    Ok(Ok(()))
}

/// What no layer is made of.
fn refused(case: &Case) -> std::result::Result<(), String> {
    match case.norm {
        Norm::Group { groups } if case.dims[1] == 0 || !case.dims[1].is_multiple_of(groups) => Ok(()),
        Norm::Channels { .. } => Ok(()),
        _ => Err("no layer".into()),
    }
}
