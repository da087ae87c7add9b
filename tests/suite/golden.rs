//! PyTorch's recorded outputs, gradients and running statistics (`tests/golden/generate.py`).
//!
//! Both sides round, so each value may differ by twice the oracle's bound for one careful evaluation
//! (`oracle.rs`), where the bound also allows for PyTorch's mean, which is rounded to f32.
//!
//! For half-precision inputs the generator records PyTorch's answer in f64 on the same numbers, and how far
//! its answer in half precision was from that: ours may be no further.

use crate::case::{Arguments, Case, Layout, Norm, Outcome};
use crate::common::{self, device, relative_l2, values};
use crate::compare;
use crate::oracle::{self, Approx, Expected};
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::collections::HashMap;

struct Golden {
    tensors: HashMap<String, Tensor>,
    cases: Vec<Value>,
}

fn open(op: &str) -> Golden {
    let path = common::golden(&format!("{op}.safetensors"));
    let bytes = std::fs::read(&path).expect("a recorded file");
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let metadata = header.metadata().as_ref().expect("metadata");
    let versions: Value = serde_json::from_str(&metadata["versions"]).expect("versions");
    assert!(versions["torch"].as_str().is_some_and(|v| v.starts_with("2.11.")), "{versions}");
    let cases = serde_json::from_str(&metadata["cases"]).expect("cases");
    Golden { tensors: candle_core::safetensors::load(path, device()).expect("tensors"), cases }
}

fn dtype(name: &Value) -> DType {
    match name.as_str() {
        Some("f64") => DType::F64,
        Some("f32") => DType::F32,
        Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        other => panic!("dtype {other:?}"),
    }
}

fn number(spec: &Value, key: &str) -> usize {
    spec[key].as_u64().unwrap_or_else(|| panic!("{key} in {spec}")) as usize
}

/// `laid_out` of the generator.
fn layout(name: &Value, rank: usize) -> Layout {
    let order = match name.as_str() {
        Some("channels-last") => [0].into_iter().chain(2..rank).chain([1]).collect(),
        Some("transposed") => [1, 0].into_iter().chain(2..rank).collect(),
        Some("contiguous" | "narrowed") => vec![],
        other => panic!("layout {other:?}"),
    };
    let narrow = (name == "narrowed").then_some((rank - 1, 2, 2));
    Layout { order, narrow, broadcast: None }
}

fn case(op: &str, spec: &Value) -> Case {
    let training = spec["training"].as_bool().expect("training");
    let normalized = number(spec, "normalized");
    let norm = match op {
        "batch_norm" => Norm::Batch { training },
        "instance_norm" => Norm::Instance { use_input_stats: training },
        "layer_norm" => Norm::Layer { normalized },
        "group_norm" => Norm::Group { groups: number(spec, "groups") },
        "rms_norm" => Norm::Rms { normalized },
        other => panic!("op {other}"),
    };
    let dims: Vec<usize> = serde_json::from_value(spec["dims"].clone()).expect("dims");
    Case {
        dtype: dtype(&spec["dtype"]),
        params: dtype(&spec["params"]),
        weight: !spec["weight"].is_null(),
        bias: !spec["bias"].is_null(),
        running: (!spec["running"].is_null()).then(|| dtype(&spec["running"])),
        eps: spec["eps"].as_f64().expect("eps"),
        layout: layout(&spec["layout"], dims.len()),
        ..Case::new(norm, &dims)
    }
}

impl Golden {
    fn get(&self, key: &Value) -> Option<Vec<f64>> {
        key.as_str().map(|key| values(&self.tensors[key]))
    }

    /// Runs the steps of a case; compares running statistics after each, the rest after the last.
    fn check(&self, op: &str, spec: &Value) -> Result<(), String> {
        let mut case = case(op, spec);
        let mut running = self.get(&spec["mean_before"]).zip(self.get(&spec["var_before"]));
        let steps = spec["x"].as_array().expect("x");
        for (step, x) in steps.iter().enumerate() {
            case.momentum = spec["momentum"].as_f64().unwrap_or(1.0 / (step as f64 + 1.0));
            let args = Arguments {
                x: self.get(x).expect("x"),
                dy: self.get(&spec["dy"]).expect("dy"),
                weight: self.get(&spec["weight"]),
                bias: self.get(&spec["bias"]),
                running: running.clone(),
                ..Arguments::default()
            };
            let got = case.run(&args).map_err(|e| e.to_string())?;
            let mut expected = oracle::evaluate_with_rounded_mean(&case, &args);
            let last = step + 1 == steps.len();
            let record = |of: &mut Vec<Approx>, key: &str| match self.get(&spec[key]) {
                Some(recorded) if last => put(of, &recorded),
                _ => {}
            };
            record(&mut expected.y, "y");
            record(&mut expected.dx, "dx");
            record(&mut expected.dweight, "dweight");
            record(&mut expected.dbias, "dbias");
            if let Some((mean, var)) = &mut running {
                let c = mean.len();
                let row = |key: &str| self.get(&spec[key]).expect("a row a step")[step * c..][..c].to_vec();
                put(&mut expected.running_mean, &row("mean_after"));
                put(&mut expected.running_var, &row("var_after"));
                (*mean, *var) = (row("mean_after"), row("var_after"));
            }
            let errors = if last { self.no_further(spec, &got, &expected) } else { Ok(()) };
            compare::all(&case, &got, expected, 2.0).and(errors).map_err(|e| format!("step {step}: {e}"))?;
        }
        Ok(())
    }
}

impl Golden {
    /// Errors in half precision, in the 2-norm, against those of PyTorch.
    fn no_further(&self, spec: &Value, got: &Outcome, expected: &Expected) -> Result<(), String> {
        let results = [
            ("y", Some(&got.y), &expected.y),
            ("dx", got.dx.as_ref(), &expected.dx),
            ("weight", got.dweight.as_ref(), &expected.dweight),
            ("bias", got.dbias.as_ref(), &expected.dbias),
        ];
        for (what, got, exact) in results {
            let (Some(torch), Some(got)) = (spec["errors"][what].as_f64(), got) else { continue };
            let of = |f: fn(&Approx) -> f64| exact.iter().map(f).collect::<Vec<_>>();
            let (values_of, bounds) = (of(|a| a.value), of(|a| a.value + a.bound));
            let error = relative_l2(&values(got), &values_of);
            // Both may have rounded every element once: then only ties and f32's own errors differ.
            if error > 1.01 * torch + relative_l2(&bounds, &values_of) {
                return Err(format!("{what}: off by {error:e}, PyTorch by {torch:e}"));
            }
        }
        Ok(())
    }
}

fn put(expected: &mut [Approx], recorded: &[f64]) {
    assert_eq!(expected.len(), recorded.len());
    expected.iter_mut().zip(recorded).for_each(|(e, &r)| e.value = r);
}

fn all(op: &str, at_least: usize) {
    let golden = open(op);
    assert!(golden.cases.len() >= at_least, "{} cases", golden.cases.len());
    let wrong = |spec: &Value| golden.check(op, spec).err().map(|e| format!("{e}\n  {spec}"));
    let wrong: Vec<String> = golden.cases.iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{} of {} wrong\n{}", wrong.len(), golden.cases.len(), wrong.join("\n"));
}

#[test]
fn batch_norm() {
    all("batch_norm", 60);
}

#[test]
fn instance_norm() {
    all("instance_norm", 40);
}

#[test]
fn layer_norm() {
    all("layer_norm", 58);
}

#[test]
fn group_norm() {
    all("group_norm", 40);
}

#[test]
fn rms_norm() {
    all("rms_norm", 44);
}
