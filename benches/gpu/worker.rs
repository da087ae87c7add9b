//! candle's side of the measurement on a GPU: a process that times what it is told to.
//!
//! `measure.py` starts it, times PyTorch in its own process, and lets one of them run at a time. Each
//! line of standard input is a command, and each gets one line of JSON. Times are taken on the device,
//! by events around many calls; the calls walk over as many inputs and keep as many outputs as it
//! takes to leave nothing of one in the L2 cache when its turn comes again.

use anyhow::{bail, Context, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_nn::{Module, ModuleT};
use candle_norm::__bench::{Kind, RecordedOp};
use candle_norm::functional as norm;
use cudarc::driver::{sys, CudaEvent, CudaStream};
use serde_json::{json, Value};
use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

const EPS: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;
/// Calls in one captured graph.
const GRAPH_CALLS: usize = 20;

type Layer<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    candle_norm::cuda::keep_memory(&device, u64::MAX)?;
    let start = Instant::now();
    candle_norm::cuda::warmup(&device)?;
    let gpu = Gpu::new(device, start.elapsed())?;
    let mut open: Option<Open> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split('\t').collect();
        let answer = match words[..] {
            ["device"] => gpu.describe()?,
            ["open", row, file] => {
                // The row before gives its memory back first.
                drop(open.take());
                let opened = Open::new(&gpu, serde_json::from_str(row)?)?;
                if !file.is_empty() {
                    opened.save(file)?;
                }
                open = Some(opened);
                json!({})
            }
            ["time", contender, figure, calls] => {
                let open = open.as_ref().context("no row is open")?;
                match open.time(contender, figure, calls.parse()?) {
                    Ok(us) => json!({ "us": us }),
                    // Whoever asks starts another worker where this one can do no more.
                    Err(error) => json!({ "cannot": error.to_string(), "spoilt": !gpu.recovers() }),
                }
            }
            _ => bail!("unknown command {line:?}"),
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
    l2: usize,
    /// What loading every kernel took.
    warmup: Duration,
}

impl Gpu {
    fn new(device: Device, warmup: Duration) -> Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let l2 = stream.context().attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        Ok(Self { device, stream, l2: l2 as usize, warmup })
    }

    fn describe(&self) -> Result<Value> {
        let context = self.stream.context();
        let (major, minor) = context.compute_capability()?;
        Ok(json!({
            "name": context.name()?,
            "capability": format!("{major}.{minor}"),
            "multiprocessors":
                context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            "l2": self.l2,
            "warmup ms": self.warmup.as_secs_f64() * 1e3,
        }))
    }

    /// Tensors of `bytes` to walk over: four times the L2 cache, at most 64, at least 2.
    fn copies(&self, bytes: usize) -> usize {
        (4 * self.l2).div_ceil(bytes.max(1)).clamp(2, 64)
    }

    fn event(&self) -> Result<CudaEvent> {
        Ok(self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))?)
    }

    /// Ends what a failed call has left behind, a capture and an error that cudarc reports at the next call;
    /// whether the device still answers.
    fn recovers(&self) -> bool {
        let capturing = |status| status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let _ = self.stream.context().check_err();
        if self.stream.capture_status().is_ok_and(capturing) {
            let _ = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        }
        let _ = self.stream.context().check_err();
        self.stream.synchronize().is_ok()
    }

    /// Microseconds a call, of `calls` calls enqueued one behind the other.
    fn time(&self, calls: usize, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        call(0)?;
        self.stream.synchronize()?;
        let start = self.event()?;
        for i in 0..calls {
            call(i)?;
        }
        let end = self.event()?;
        end.synchronize()?;
        Ok(f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64)
    }
}

#[derive(Debug, Clone)]
struct Row {
    norm: String,
    shape: Vec<usize>,
    groups: usize,
    dtype: DType,
    /// `[N, C, H, W]` lies as `[N, H, W, C]`.
    channels_last: bool,
}

impl Row {
    fn new(row: &Value) -> Result<Self> {
        let shape = row["shape"].as_array().context("shape")?;
        Ok(Self {
            norm: row["norm"].as_str().context("norm")?.into(),
            shape: shape.iter().map(|d| Ok(d.as_u64().context("shape")? as usize)).collect::<Result<_>>()?,
            groups: row["groups"].as_u64().unwrap_or(0) as usize,
            dtype: row["dtype"].as_str().context("dtype")?.parse()?,
            channels_last: row["layout"] == "last",
        })
    }

    /// The shape in which the elements lie.
    fn memory_shape(&self) -> Vec<usize> {
        match (self.channels_last, &self.shape[..]) {
            (true, &[n, c, h, w]) => vec![n, h, w, c],
            _ => self.shape.clone(),
        }
    }

    /// A tensor of `memory_shape` as one of `shape`.
    fn view(&self, t: &Tensor) -> candle_core::Result<Tensor> {
        match self.channels_last {
            true => t.permute((0, 3, 1, 2)),
            false => Ok(t.clone()),
        }
    }

    fn is_batch(&self) -> bool {
        self.norm.starts_with("BatchNorm")
    }

    fn params(&self) -> usize {
        match self.norm.as_str() {
            "LayerNorm" | "RmsNorm" => self.shape[self.shape.len() - 1],
            _ => self.shape[1],
        }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    fn kind(&self) -> Result<Kind> {
        Ok(match self.norm.as_str() {
            "LayerNorm" => Kind::Layer { center: true },
            "RmsNorm" => Kind::Layer { center: false },
            "GroupNorm" => Kind::Groups(self.groups),
            "InstanceNorm" => Kind::Groups(self.shape[1]),
            "BatchNorm" => Kind::Batch,
            other => bail!("{other} has no backward here"),
        })
    }
}

/// A row that is being measured, x as it lies in memory, dy as the ops see it. Parameters have x's dtype,
/// but batch norm's, which are f32.
struct Open<'a> {
    gpu: &'a Gpu,
    row: Row,
    x: Vec<Var>,
    dy: Vec<Tensor>,
    weight: Var,
    bias: Option<Var>,
    running_mean: Var,
    running_var: Var,
}

impl<'a> Open<'a> {
    fn new(gpu: &'a Gpu, row: Value) -> Result<Self> {
        let row = Row::new(&row)?;
        // Two workers that are compared have the same inputs.
        gpu.device.set_seed(0x5eed)?;
        let normal = |mean: f32, std: f32, shape: &[usize]| Tensor::randn(mean, std, shape, &gpu.device);
        let param_dtype = if row.is_batch() { DType::F32 } else { row.dtype };
        let params = [row.params()];
        let param = |mean, std, dtype| -> Result<Var> {
            Ok(Var::from_tensor(&normal(mean, std, &params)?.to_dtype(dtype)?)?)
        };
        let (mut x, mut dy) = (vec![], vec![]);
        for _ in 0..gpu.copies(row.bytes()) {
            let shape = row.memory_shape();
            x.push(Var::from_tensor(&normal(0.25, 1.5, &shape)?.to_dtype(row.dtype)?)?);
            dy.push(row.view(&normal(0.1, 0.8, &shape)?.to_dtype(row.dtype)?)?);
        }
        let bias = (row.norm != "RmsNorm").then(|| param(0.1, 0.3, param_dtype)).transpose()?;
        Ok(Self {
            weight: param(1.0, 0.2, param_dtype)?,
            bias,
            running_mean: param(0.2, 0.1, DType::F32)?,
            running_var: Var::from_tensor(&Tensor::rand(0.5f32, 2.0, &params, &gpu.device)?)?,
            gpu,
            row,
            x,
            dy,
        })
    }

    /// Inputs, and candle-norm's answers, for the other side to take and to compare with.
    fn save(&self, file: &str) -> Result<()> {
        let mut all: HashMap<String, Tensor> = HashMap::new();
        all.insert("running_mean".into(), self.running_mean.as_detached_tensor().copy()?);
        all.insert("running_var".into(), self.running_var.as_detached_tensor().copy()?);
        all.insert("dy".into(), self.dy[0].clone());
        let seen = |name: &str, t: &Tensor| match name {
            "x" => self.row.view(t),
            _ => Ok(t.clone()),
        };
        for (name, var) in self.tracked() {
            all.insert(name.into(), seen(name, &var.as_detached_tensor())?);
        }
        let y = self.candle_norm(true)(&self.row.view(&self.x[0])?)?;
        all.insert("out_y".into(), y.detach());
        if self.row.norm != "BatchNormEval" {
            let gradients = step(&y, &self.dy[0])?;
            for (name, var) in self.tracked() {
                let gradient = gradients.get(var).with_context(|| format!("no gradient of {name}"))?;
                all.insert(format!("out_{name}"), seen(name, gradient)?);
            }
        }
        Ok(candle_core::safetensors::save(&all, file)?)
    }

    fn tracked(&self) -> Vec<(&'static str, &Var)> {
        let mut tracked = vec![("x", &self.x[0]), ("weight", &self.weight)];
        tracked.extend(self.bias.as_ref().map(|bias| ("bias", bias)));
        tracked
    }

    /// Weight and bias as they are, or detached.
    fn params(&self, train: bool) -> (Tensor, Option<Tensor>) {
        let pick = |var: &Var| if train { var.as_tensor().clone() } else { var.as_detached_tensor() };
        (pick(&self.weight), self.bias.as_ref().map(pick))
    }

    fn candle_norm(&self, train: bool) -> Layer<'_> {
        let (weight, bias) = self.params(train);
        let row = &self.row;
        let (mean, var) = (Some(&self.running_mean), Some(&self.running_var));
        Box::new(move |x| {
            let (weight, bias) = (Some(&weight), bias.as_ref());
            match row.norm.as_str() {
                "LayerNorm" => norm::layer_norm(x, &[row.params()], weight, bias, EPS),
                "RmsNorm" => norm::rms_norm(x, &[row.params()], weight, EPS),
                "GroupNorm" => norm::group_norm(x, row.groups, weight, bias, EPS),
                "InstanceNorm" => norm::instance_norm(x, None, None, weight, bias, true, MOMENTUM, EPS),
                name => norm::batch_norm(x, mean, var, weight, bias, name == "BatchNorm", MOMENTUM, EPS),
            }
        })
    }

    /// candle-nn's layer; for training its compositions, since its fused ones have no gradient.
    fn candle_nn(&self, train: bool) -> Result<Layer<'_>> {
        let (weight, bias) = self.params(train);
        let row = &self.row;
        let group_norm = |groups| -> Result<Layer<'_>> {
            let bias = bias.clone().context("a bias")?;
            let layer = candle_nn::GroupNorm::new(weight.clone(), bias, row.params(), groups, EPS)?;
            Ok(Box::new(move |x| layer.forward(x)))
        };
        match (row.norm.as_str(), train) {
            ("GroupNorm", _) => group_norm(row.groups),
            ("InstanceNorm", _) => group_norm(row.shape[1]),
            ("RmsNorm", false) => {
                let layer = candle_nn::RmsNorm::new(weight, EPS);
                Ok(Box::new(move |x| layer.forward(x)))
            }
            ("RmsNorm", true) => Ok(Box::new(move |x| candle_nn::ops::rms_norm_slow(x, &weight, EPS as f32))),
            ("LayerNorm", false) => {
                let layer = candle_nn::LayerNorm::new(weight, bias.context("a bias")?, EPS);
                Ok(Box::new(move |x| layer.forward(x)))
            }
            ("LayerNorm", true) => {
                let bias = bias.context("a bias")?;
                Ok(Box::new(move |x| candle_nn::ops::layer_norm_slow(x, &weight, &bias, EPS as f32)))
            }
            (name, _) => {
                let (mean, var) = (self.running_mean.copy()?, self.running_var.copy()?);
                let bias = bias.context("a bias")?;
                let layer = candle_nn::BatchNorm::new(row.params(), mean, var, weight, bias, EPS)?;
                let train = name == "BatchNorm";
                Ok(Box::new(move |x| layer.forward_t(x, train)))
            }
        }
    }

    /// The inputs as the ops see them, untracked.
    fn detached(&self) -> candle_core::Result<Vec<Tensor>> {
        self.x.iter().map(|x| self.row.view(&x.as_detached_tensor())).collect()
    }

    fn layer(&self, contender: &str, train: bool) -> Result<Layer<'_>> {
        match contender {
            "candle-norm" => Ok(self.candle_norm(train)),
            "candle-nn" => self.candle_nn(train),
            other => bail!("unknown contender {other}"),
        }
    }

    fn time(&self, contender: &str, figure: &str, calls: usize) -> Result<f64> {
        let n = self.x.len();
        let mut ring = Ring::new(n);
        match (contender, figure) {
            ("copy", _) => self.gpu.time(calls, |i| ring.keep(self.x[i % n].as_detached_tensor().copy()?)),
            (_, "forward") => {
                let layer = self.layer(contender, false)?;
                let x = self.detached()?;
                self.gpu.time(calls, |i| ring.keep(layer(&x[i % n])?))
            }
            ("candle-norm", "backward") => {
                let kind = self.row.kind()?;
                let bias = self.bias.as_ref().map(|bias| bias.as_tensor());
                let alone =
                    |x: &Var| RecordedOp::new(kind, &self.row.view(x)?, Some(&self.weight), bias, EPS);
                let ops = self.x.iter().map(alone).collect::<candle_core::Result<Vec<_>>>()?;
                self.gpu.time(calls, |i| {
                    let gradients = ops[i % n].backward(&self.dy[i % n])?;
                    gradients.into_iter().flatten().take(1).try_for_each(|dx| ring.keep(dx))
                })
            }
            (_, "step") if self.row.norm != "BatchNormEval" => {
                let layer = self.layer(contender, true)?;
                self.gpu.time(calls, |i| {
                    let y = layer(&self.row.view(&self.x[i % n])?)?;
                    step(&y, &self.dy[i % n])?;
                    ring.keep(y.detach())
                })
            }
            (_, "graph") => self.graph(contender, calls),
            _ => bail!("{contender} has no {figure}"),
        }
    }

    /// Microseconds a forward in a replayed CUDA graph of several.
    fn graph(&self, contender: &str, calls: usize) -> Result<f64> {
        let layer = self.layer(contender, false)?;
        let x = self.detached()?;
        // candle hands shapes and strides to its kernels in device memory. Without this, each call copies them
        // from host memory that is gone when the graph is replayed.
        let _kept = self.gpu.device.as_cuda_device()?.enable_cuda_graph_htod_cache();
        layer(&x[0])?;
        let stream = &self.gpu.stream;
        stream.synchronize()?;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let recorded = (0..GRAPH_CALLS).try_for_each(|i| layer(&x[i % x.len()]).map(drop));
        // An error that a freed tensor left would keep the capture from being ended.
        let freed = stream.context().check_err();
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        recorded?;
        freed?;
        let graph = graph?.context("nothing was captured")?;
        let replays = calls.div_ceil(GRAPH_CALLS);
        Ok(self.gpu.time(replays, |_| Ok(graph.launch()?))? / GRAPH_CALLS as f64)
    }
}

/// Keeps the last outputs alive, so that each call writes memory that the one before did not.
struct Ring {
    kept: VecDeque<Tensor>,
    len: usize,
}

impl Ring {
    fn new(len: usize) -> Self {
        Self { kept: VecDeque::with_capacity(len), len }
    }

    fn keep(&mut self, t: Tensor) -> Result<()> {
        if self.kept.len() == self.len {
            self.kept.pop_front();
        }
        self.kept.push_back(t);
        Ok(())
    }
}

/// A loss that costs one element: its gradient with respect to y is `dy` as it stands.
struct GivenGradient(Tensor);

impl CustomOp1 for GivenGradient {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("given-gradient: for a GPU")
    }

    fn cuda_fwd(&self, y: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let loss = y.device().alloc_zeros::<f32>(1)?;
        Ok((CudaStorage::wrap_cuda_slice(loss, y.device().clone()), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// `loss.backward()` of a loss whose gradient with respect to `y` is `dy`.
fn step(y: &Tensor, dy: &Tensor) -> Result<candle_core::backprop::GradStore> {
    Ok(y.apply_op1(GivenGradient(dy.clone()))?.backward()?)
}
