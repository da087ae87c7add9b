//! PyTorch's recorded answers for norms with something around them (`tests/golden/generate_fused.py`).
//!
//! Apart from `golden`, whose cases are single functions of PyTorch: these are compositions, recorded in f64 on
//! the numbers as each dtype has them. Ours may be off by its own roundings and no more.

use crate::common::{self, accumulation, data, device, relative_l2, tensor, unit_roundoff, values};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::Activation;
use candle_norm::functional::fused as f;
use serde_json::Value;
use std::collections::HashMap;

const EPS: f64 = 1e-3;

fn dtype(name: &Value) -> DType {
    match name.as_str() {
        Some("f64") => DType::F64,
        Some("f32") => DType::F32,
        Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        other => panic!("dtype {other:?}"),
    }
}

fn activation(name: &str) -> Activation {
    match name {
        "relu" => Activation::Relu,
        "relu6" => Activation::Relu6,
        "leaky_relu" => Activation::LeakyRelu(0.1),
        "silu" => Activation::Silu,
        "sigmoid" => Activation::Sigmoid,
        "hardswish" => Activation::HardSwish,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluPytorchTanh,
        "elu" => Activation::Elu(1.0),
        other => panic!("activation {other}"),
    }
}

/// `a` in the order of the generator's compositions.
pub fn run(op: &str, a: &[Var]) -> Result<Tensor> {
    let a: Vec<&Tensor> = a.iter().map(|v| v.as_tensor()).collect();
    let (op, what) = op.split_once(' ').unwrap_or((op, ""));
    match op {
        "add_layer_norm" => Ok(f::add_layer_norm(a[0], a[1], &[6], Some(a[2]), Some(a[3]), EPS)?.normed),
        "add_rms_norm" => Ok(f::add_rms_norm(a[0], a[1], &[6], Some(a[2]), 1.0, EPS)?.normed),
        "offset_rms_norm" => f::offset_rms_norm(a[0], &[6], a[1], 1.0, EPS),
        "modulated_layer_norm" => f::modulated_layer_norm(a[0], &[6], a[1], Some(a[2]), EPS),
        "modulated_rms_norm" => f::modulated_rms_norm(a[0], &[6], a[1], Some(a[2]), EPS),
        "gated_rms_norm" => f::gated_rms_norm(a[0], a[1], &[6], Some(a[2]), EPS, what == "before"),
        _ => {
            let (x, skip, w, b, act) = (a[0], Some(a[1]), Some(a[2]), Some(a[3]), activation(what));
            match op {
                "batch_norm_act" => f::batch_norm_act(x, None, None, w, b, true, 0.1, EPS, skip, act),
                "group_norm_act" => f::group_norm_act(x, 2, w, b, EPS, skip, act),
                "instance_norm_act" => f::instance_norm_act(x, None, None, w, b, true, 0.1, EPS, skip, act),
                "layer_norm_act" => f::layer_norm_act(x, &[6], w, b, EPS, skip, act),
                other => panic!("op {other}"),
            }
        }
    }
}

#[test]
fn compositions_as_pytorch_has_them() -> Result<()> {
    compare()
}

fn open() -> Result<(Vec<Value>, HashMap<String, Tensor>)> {
    let path = common::golden("fused.safetensors");
    let bytes = std::fs::read(&path)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let metadata = header.metadata().as_ref().expect("metadata");
    let cases: Vec<Value> = serde_json::from_str(&metadata["cases"]).expect("cases");
    assert_eq!(cases.len(), 4 * (7 + 4 * 9));
    Ok((cases, candle_core::safetensors::load(path, device())?))
}

/// A recorded case's arguments; `seed` 0 has the recorded numbers.
pub fn arguments(case: &Value, seed: u64) -> Result<Vec<Var>> {
    let shapes: Vec<Vec<usize>> = serde_json::from_value(case["shapes"].clone()).expect("shapes");
    let new = |(i, dims): (u64, &Vec<usize>)| Var::from_tensor(&leaf(seed + i, dims, dtype(&case["dtype"]))?);
    (1..).zip(&shapes).map(new).collect()
}

fn leaf(seed: u64, dims: &[usize], dtype: DType) -> Result<Tensor> {
    tensor(&data(seed, dims.iter().product(), 0.5, 2.0), dims, dtype)
}

/// The operations recorded in f64.
pub fn each_in_f64() -> Result<Vec<Value>> {
    Ok(open()?.0.into_iter().filter(|case| case["dtype"] == "f64").collect())
}

pub fn compare() -> Result<()> {
    let (cases, recorded) = open()?;
    for case in &cases {
        let (op, dtype) = (case["op"].as_str().expect("op"), dtype(&case["dtype"]));
        let args = arguments(case, 0)?;
        let y = run(op, &args)?;
        let gradients = (&y * leaf(9, y.dims(), dtype)?)?.sum_all()?.backward()?;
        let key = format!("{} {op}", case["dtype"].as_str().expect("dtype"));
        // Elu is candle's own operation, on an output that was rounded before and on a gradient that was.
        let own = if op.ends_with(" elu") { 2.0 } else { 0.0 };
        let (u, ua) = (unit_roundoff(dtype), unit_roundoff(accumulation(dtype)));
        let check = |what: String, got: &Tensor, bound: f64| {
            let off = relative_l2(&values(got), &values(&recorded[&format!("{key} {what}")]));
            assert!(off <= bound, "{key} {what}: off by {off:e}, bound {bound:e}");
        };
        check("y".into(), &y, (1.01 + own) * u + 40.0 * ua);
        for (i, arg) in args.iter().enumerate() {
            check(format!("d{i}"), gradients.get(arg).expect("a gradient"), (1.01 + own) * u + 100.0 * ua);
        }
    }
    Ok(())
}
