//! candle's side of the comparison with PyTorch: a process that times what it is told to.
//!
//! `compare.py` starts it beside a process that does the same with PyTorch, and lets one run at a
//! time. Each line of standard input is a command; each gets one line of JSON. `memory CONTENDER ROW`
//! as arguments instead measures one training step in this process and prints what it kept and its peak.

#[path = "../cases/mod.rs"]
#[allow(dead_code)] // the other benchmarks use the rest
mod cases;

use anyhow::{bail, Context, Result};
use candle_core::Tensor;
use candle_norm::__bench::{Kind, RecordedOp};
use cases::contenders::{self, Layer, Mode, Outputs};
use cases::copy::Copy;
use cases::inputs::Inputs;
use cases::rounds::fastest;
use cases::{Norm, Row};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::hint::black_box;
use std::io::{BufRead, Write};

fn main() -> Result<()> {
    // Cargo appends its own option.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [command, contender, id] = &args[..] {
        if command == "memory" {
            println!("{}", memory(contender, &row(id)?)?);
            return Ok(());
        }
    }
    cases::memory::settle();
    let mut open: Option<Open> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split('\t').collect();
        let answer = match words[..] {
            ["rows"] => Row::all().map(|row| describe(&row)).collect(),
            ["open", id, file] => {
                // The row before makes room first.
                drop(open.take());
                let opened = Open::new(row(id)?)?;
                opened.save(file)?;
                open = Some(opened);
                json!({})
            }
            ["time", contender, figure, calls, batches] => {
                let open = open.as_mut().context("no row is open")?;
                match open.time(contender, figure, (calls.parse()?, batches.parse()?)) {
                    Ok(ns) => json!({ "ns": ns }),
                    Err(error) => json!({ "cannot": error.to_string() }),
                }
            }
            _ => bail!("unknown command {line:?}"),
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn row(id: &str) -> Result<Row> {
    Row::all().find(|row| row.to_string() == id).with_context(|| format!("no row {id:?}"))
}

fn describe(row: &Row) -> Value {
    json!({
        "id": row.to_string(),
        "norm": row.case.norm.to_string(),
        "groups": row.case.norm.groups(),
        "shape": row.case.shape,
        "model": row.case.model,
        "dtype": row.dtype.as_str(),
        "params": row.params(),
        "bias": row.case.norm.has_bias(),
        "other": row.case.norm.has_other(),
        "fused": row.case.norm.is_fused(),
        "tensors": row.case.norm.tensors(),
        "further": [row.case.norm.further_tensors(false), row.case.norm.further_tensors(true)],
        "limits": cases::LIMITS,
        "beside candle": cases::BESIDE_CANDLE,
        "param_dtype": row.param_dtype().as_str(),
        "bytes": row.bytes(),
        "eps": contenders::EPS,
        "momentum": contenders::MOMENTUM,
        // candle-norm rounds once.
        "tolerance": row.tolerance(),
    })
}

/// A row that is being measured.
struct Open {
    row: Row,
    inputs: Inputs,
    copy: Copy,
}

impl Open {
    fn new(row: Row) -> Result<Self> {
        Ok(Self { row, inputs: Inputs::new(&row)?, copy: Copy::of(row.bytes()) })
    }

    /// Inputs, and candle-norm's answers, for the other side to take and to compare with.
    fn save(&self, file: &str) -> Result<()> {
        let inputs = &self.inputs;
        let mut all: HashMap<String, Tensor> = HashMap::new();
        let mut put = |name: &str, t: &Tensor| all.insert(name.into(), t.clone());
        put("running_mean", &inputs.running_mean.as_detached_tensor().copy()?);
        put("running_var", &inputs.running_var.as_detached_tensor().copy()?);
        put("dy", &inputs.dy);
        for (name, var) in inputs.tracked() {
            put(name, &var.as_detached_tensor());
        }
        let mode = self.training();
        let layer = contenders::candle_norm(&self.row, inputs, mode);
        for (name, t) in contenders::outputs(&layer, inputs, mode)? {
            put(&format!("out_{name}"), &t);
        }
        // An empty file system entry would pass for an answer: write, then rename.
        let part = format!("{file}.part");
        candle_core::safetensors::save(&all, &part)?;
        Ok(std::fs::rename(part, file)?)
    }

    fn training(&self) -> Mode {
        match self.row.case.norm {
            Norm::BatchNormEval => Mode::Forward,
            _ => Mode::ForwardBackward,
        }
    }

    /// Nanoseconds a call of the fastest of some batches of calls, after one that is not counted.
    fn time(&mut self, contender: &str, figure: &str, calls: (usize, usize)) -> Result<f64> {
        let (row, inputs) = (&self.row, &self.inputs);
        let mode = if figure == "forward" { Mode::Forward } else { Mode::ForwardBackward };
        let x = contenders::input(inputs, mode);
        let dy = &inputs.dy;
        let forward = |layer: &Layer| -> Result<()> {
            black_box(layer(&x)?);
            Ok(())
        };
        let step = |layer: &Layer| -> Result<()> {
            let y = layer(&x)?;
            black_box(contenders::backward(&y, dy)?);
            Ok(())
        };
        match (contender, figure) {
            ("candle-norm", "forward") => {
                let layer = contenders::candle_norm(row, inputs, mode);
                time(calls, || forward(&layer))
            }
            ("plain", "forward" | "step") => {
                let layer = contenders::plain(row, inputs, mode).context("a norm alone")?;
                match mode {
                    Mode::Forward => time(calls, || forward(&layer)),
                    Mode::ForwardBackward => time(calls, || step(&layer)),
                }
            }
            ("candle-nn", "forward") => {
                let layer = contenders::candle_nn(row, inputs, mode)?;
                time(calls, || forward(&layer))
            }
            ("candle-norm", "op") => {
                let (layer, alone) = (contenders::candle_norm(row, inputs, mode), alone(row, inputs)?);
                time(calls, || {
                    // Alive until the backward is done, as in a graph.
                    let y = layer(&x)?;
                    black_box((alone.backward(dy)?, y));
                    Ok(())
                })
            }
            ("candle-norm", "step") => {
                let layer = contenders::candle_norm(row, inputs, mode);
                time(calls, || step(&layer))
            }
            ("candle-nn", "step") => {
                let layer = contenders::candle_nn(row, inputs, mode)?;
                time(calls, || step(&layer))
            }
            // The loss without the norm: what candle does to hand dy to y.
            ("loss", "step") => time(calls, || {
                black_box(contenders::backward(&Outputs::one(x.clone()), dy)?);
                Ok(())
            }),
            ("copy", _) => time(calls, || {
                self.copy.run();
                Ok(())
            }),
            _ => bail!("{contender} has no {figure}"),
        }
    }
}

/// The op of a row, whose backward can be called by itself.
fn alone(row: &Row, inputs: &Inputs) -> Result<RecordedOp> {
    let kind = match row.case.norm {
        Norm::BatchNorm => Kind::Batch,
        Norm::BatchNormEval => bail!("evaluation is not trained through here"),
        norm if norm.is_fused() => bail!("the backward of {norm} is not called by itself"),
        Norm::GroupNorm { groups } => Kind::Groups(groups),
        Norm::InstanceNorm => Kind::Groups(row.case.shape[1]),
        Norm::LayerNorm => Kind::Layer { center: true },
        _ => Kind::Layer { center: false },
    };
    let bias = inputs.bias.as_ref().map(|b| b.as_tensor());
    Ok(RecordedOp::new(kind, &inputs.x, Some(&inputs.weight), bias, contenders::EPS)?)
}

fn time((calls, batches): (usize, usize), mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    fastest(&mut call, calls, batches)
}

/// Bytes that a training step adds to the process: kept between forward and backward, and at most.
///
/// Resident memory is what is in use only where malloc returns all that is freed: `compare.py` sees to it.
fn memory(contender: &str, row: &Row) -> Result<Value> {
    let inputs = Inputs::new(row)?;
    let mode = Mode::ForwardBackward;
    let layer = match contender {
        "candle-norm" => contenders::candle_norm(row, &inputs, mode),
        "candle-nn" => contenders::candle_nn(row, &inputs, mode)?,
        _ => bail!("unknown contender {contender}"),
    };
    // Thread pools and the like exist before the measured step. A norm alone: residual, skip and gate have x's shape.
    let mut one = row.case.shape.to_vec();
    one[0] = 1;
    let one = Tensor::rand(0f32, 1., one, inputs.x.device())?.to_dtype(row.dtype)?;
    match contenders::plain(row, &inputs, Mode::Forward) {
        Some(plain) => drop(plain(&one)?),
        None => drop(layer(&one)?),
    }
    // Resets the peak to what is resident now.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let before = status("VmRSS")?;
    let y = layer(&contenders::input(&inputs, mode))?;
    let kept = status("VmRSS")?.saturating_sub(before);
    let gradients = contenders::backward(&y, &inputs.dy)?;
    let peak = status("VmHWM")?.saturating_sub(before);
    black_box((gradients, y));
    Ok(json!({ "x": row.bytes(), "kept": kept, "peak": peak }))
}

/// A field of this process's status, in bytes.
fn status(field: &str) -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
    let kib: usize = line.split_whitespace().nth(1).context("no value")?.parse()?;
    Ok(kib * 1024)
}
