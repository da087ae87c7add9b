//! CUDA, for who wants to say when its kernels are loaded ([`warmup`]) and what memory is kept ([`keep_memory`]).

// The host side of the kernels: what runs for a call, and on which machine. `plan` decides, in pure
// arithmetic; a `Machine` runs it: a CUDA device, or the host for which a C++ compiler has compiled the
// same kernels. The ops here serve both.

mod entry;
#[cfg(feature = "cuda")]
mod launch;
mod machine;
mod params;
mod plan;

use crate::fusion::Gate;
use crate::geometry::WeightBy;
use crate::request::{accumulation_dtype, Arg, Backward, Forward, Gradients, Norm, Normed};
use candle_core::{bail, DType, Result, Storage};
use entry::Element;
use machine::{Machine, RunningAddresses};
use params::Arguments;
use plan::{BackwardNeeds, ForwardNeeds, Plan, Request};

/// The ops of a machine's storage.
macro_rules! kernels {
    ($storage:ty, $variant:ident, |$of:ident| $machine:expr) => {
        impl $crate::kernels::Kernels for $storage {
            fn fuses(norm: &Norm, x: DType) -> bool {
                $crate::cuda::fuses(norm, x)
            }

            fn wrap(self) -> Storage {
                Storage::$variant(self)
            }

            fn unwrap(storage: &Storage) -> Option<&Self> {
                match storage {
                    Storage::$variant(storage) => Some(storage),
                    _ => None,
                }
            }

            fn into_own(storage: Storage) -> Option<Self> {
                match storage {
                    Storage::$variant(storage) => Some(storage),
                    _ => None,
                }
            }

            fn forward(call: Forward<Self>) -> Result<Normed<Self>> {
                let $of = call.x.storage;
                $crate::cuda::run_forward(&$machine, call)
            }

            fn backward(call: Backward<Self>) -> Result<Gradients<Self>> {
                let $of = call.x.storage;
                $crate::cuda::run_backward(&$machine, call)
            }

            fn statistics(norm: Norm, x: Arg<Self>) -> Result<Self> {
                let $of = x.storage;
                $crate::cuda::run_statistics(&$machine, norm, x)
            }

            fn gradient_sums(call: Backward<Self>) -> Result<Self> {
                let $of = call.x.storage;
                $crate::cuda::run_gradient_sums(&$machine, call)
            }

            fn input_gradient(call: Backward<Self>, sums: Arg<Self>, count: f64) -> Result<Self> {
                let $of = call.x.storage;
                $crate::cuda::run_input_gradient(&$machine, call, sums, count)
            }
        }
    };
}

#[cfg(feature = "cuda-emulation")]
pub(crate) mod emulation;

#[cfg(feature = "cuda-emulation")]
kernels!(candle_core::CpuStorage, Cpu, |_x| emulation::machine()?);

#[cfg(feature = "cuda")]
kernels!(candle_core::CudaStorage, Cuda, |x| launch::machine(&x.device)?);

/// Loads every kernel onto `device`; does nothing for a device that is not a CUDA device.
///
/// Without it, the first call of a norm loads the modules that it needs, and no more. On a GPU of the
/// compute capability that the crate was built for (`CUDA_COMPUTE_CAP` at build time) that is machine code,
/// which the driver copies to the device. On a later one the driver compiles the modules from PTX, seconds
/// each and a minute or more for all of them, once: it keeps the result in its cache on disk. A CUDA graph
/// is captured after the kernels are loaded: call this before, or run the model once.
///
/// # Errors
/// A GPU older than the compute capability that the crate was built for (`CUDA_COMPUTE_CAP` at build
/// time), and the driver's.
#[cfg(feature = "cuda")]
pub fn warmup(device: &candle_core::Device) -> Result<()> {
    match device {
        candle_core::Device::Cuda(device) => launch::machine(device)?.load_all(),
        _ => Ok(()),
    }
}

/// Has `device` keep up to `bytes` of free memory for the next tensors; does nothing for a device that is not a
/// CUDA device.
///
/// candle allocates each tensor from the device's memory pool, which gives back all that is free whenever the
/// device is synchronized, as by a training loop that reads its loss every step. The next tensors then wait
/// for the driver to map memory anew. `u64::MAX` keeps everything, which other programs on the same GPU then
/// lack. It holds for all that this process allocates on that GPU.
///
/// ```no_run
/// # fn main() -> candle_core::Result<()> {
/// let device = candle_core::Device::new_cuda(0)?;
/// candle_norm::cuda::keep_memory(&device, u64::MAX)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// The driver's, as of a device without memory pools.
#[cfg(feature = "cuda")]
pub fn keep_memory(device: &candle_core::Device, bytes: u64) -> Result<()> {
    match device {
        candle_core::Device::Cuda(device) => launch::keep_memory(device, bytes),
        _ => Ok(()),
    }
}

fn code(op: &str, dtype: DType) -> Result<u32> {
    Ok(Element::new(op, dtype)?.code())
}

/// What stands around a norm and is done by its kernels.
///
/// Parameters of each sample: where the normalized elements lie together. Blocks apart: the same, of a
/// row each. A residual of another dtype than x is left to candle's operations, and a gate before the norm where
/// `plan::takes_gate_before` says so.
fn fuses(norm: &Norm, x: DType) -> bool {
    let g = &norm.geometry;
    let residual = norm.fusion.residual.is_none_or(|residual| residual == x);
    let rows = g.rows == 1 && g.weight_by == WeightBy::Column { span: 1 } && g.run > 1 && g.run == g.width;
    let tokens = norm.fusion.tokens.is_none_or(|tokens| rows && tokens > 0 && g.outer.is_multiple_of(tokens));
    let blocks = norm.x_blocks.is_none() || g.rows == 1 && g.weight_by != WeightBy::Row;
    let gate = norm.fusion.gate != Some(Gate::Before)
        || Element::new(norm.name, x).is_ok_and(|element| plan::takes_gate_before(norm, element));
    // The kernels would do the gate first, candle's operations the activation.
    let one = norm.fusion.activation.is_none() || norm.fusion.gate != Some(Gate::After);
    residual && tokens && blocks && gate && one
}

/// Addresses of a call's arguments, as far as they are known before anything is allocated.
struct Bound {
    at: Arguments,
    element: Element,
}

impl Bound {
    fn new<M: Machine>(machine: &M, norm: &Norm, x: &Arg<M::Storage>) -> Result<Self> {
        let element = Element::new(norm.name, machine.dtype(x.storage))?;
        if !fuses(norm, machine.dtype(x.storage)) {
            bail!("{}: no kernels for {:?} over {:?}", norm.name, norm.fusion, norm.geometry)
        }
        Ok(Self { at: Arguments { x: machine.address(x)?, ..Arguments::default() }, element })
    }

    fn weight<M: Machine>(&mut self, machine: &M, op: &str, arg: Option<&Arg<M::Storage>>) -> Result<()> {
        if let Some(arg) = arg {
            self.at.weight = machine.address(arg)?;
            self.at.weight_dtype = code(op, machine.dtype(arg.storage))?;
        }
        Ok(())
    }

    fn bias<M: Machine>(&mut self, machine: &M, op: &str, arg: Option<&Arg<M::Storage>>) -> Result<()> {
        if let Some(arg) = arg {
            self.at.bias = machine.address(arg)?;
            self.at.bias_dtype = code(op, machine.dtype(arg.storage))?;
        }
        Ok(())
    }

    /// Address of a tensor that stands around the norm, which has x's dtype.
    fn around<M: Machine>(&self, machine: &M, op: &str, arg: Option<&Arg<M::Storage>>) -> Result<u64> {
        let Some(arg) = arg else { return Ok(0) };
        let element = Element::new(op, machine.dtype(arg.storage))?;
        if element != self.element {
            bail!("{op}: a tensor around the norm has dtype {element:?}, expected x's, {:?}", self.element)
        }
        machine.address(arg)
    }

    /// Whether weight and bias have this dtype, those that there are.
    fn params_are(&self, element: Element) -> bool {
        let is = |address, dtype| address == 0 || dtype == element.code();
        is(self.at.weight, self.at.weight_dtype) && is(self.at.bias, self.at.bias_dtype)
    }

    fn request(&self, norm: &Norm) -> Request {
        let at = &self.at;
        let tensors = [at.x, at.dy, at.out, at.residual, at.skip, at.gate, at.sum, at.dskip, at.dgate];
        let bits = tensors.into_iter().fold(16, |bits, address| bits | address);
        Request {
            name: norm.name,
            geometry: norm.geometry,
            element: self.element,
            eps: norm.eps,
            align: 1 << bits.trailing_zeros(),
            params_aligned: (at.weight | at.bias).is_multiple_of(16),
            params_plain: self.params_are(self.element)
                || (self.element.bytes() == 2 && self.params_are(Element::F32)),
            weight: at.weight != 0,
            bias: at.bias != 0,
            fusion: norm.fusion,
            skip: at.skip != 0,
            gate: at.gate != 0,
            residual: at.residual != 0,
            x_blocks: norm.x_blocks,
        }
    }
}

/// Runs the launches of a plan, with scratch memory if it needs some.
fn run<M: Machine>(machine: &M, plan: &Plan, at: &Arguments) -> Result<()> {
    let mut scratch = match plan.workspace {
        0 => None,
        bytes => Some(machine.allocate(DType::U8, bytes)?),
    };
    let workspace = scratch.as_mut().map_or(Ok(0), |scratch| machine.address_mut(scratch))?;
    let params = plan.bind(at, workspace);
    for (i, launch) in plan.launches.iter().enumerate() {
        machine.launch(launch, &params, i > 0)?;
    }
    machine.ran(plan, &params)
}

fn run_forward<M: Machine>(machine: &M, call: Forward<M::Storage>) -> Result<Normed<M::Storage>> {
    let norm = &call.norm;
    let mut bound = Bound::new(machine, norm, &call.x)?;
    bound.weight(machine, norm.name, call.weight.as_ref())?;
    bound.bias(machine, norm.name, call.bias.as_ref())?;
    bound.at.residual = bound.around(machine, norm.name, call.residual.as_ref())?;
    bound.at.skip = bound.around(machine, norm.name, call.skip.as_ref())?;
    bound.at.gate = bound.around(machine, norm.name, call.gate.as_ref())?;
    if call.residual.is_some() && call.given.is_some() {
        bail!("{}: a residual is added to what has statistics of its own, got given ones", norm.name)
    }
    let dtype = machine.dtype(call.x.storage);
    let mut sum = match call.residual {
        Some(_) => Some(machine.allocate(dtype, norm.geometry.elements())?),
        None => None,
    };
    bound.at.sum = sum.as_mut().map_or(Ok(0), |sum| machine.address_mut(sum))?;
    let mut out = machine.allocate(dtype, norm.geometry.elements())?;
    bound.at.out = machine.address_mut(&mut out)?;
    let mut stats = match call.keep {
        true => Some(machine.allocate(accumulation_dtype(dtype), 3 * norm.geometry.sets())?),
        false => None,
    };
    bound.at.stats = stats.as_mut().map_or(Ok(0), |stats| machine.address_mut(stats))?;
    if let Some(given) = &call.given {
        bound.at.given_mean = machine.address(&given.mean)?;
        bound.at.given_low = given.mean_low.as_ref().map_or(Ok(0), |low| machine.address(low))?;
        bound.at.given_var = machine.address(&given.var)?;
        bound.at.given_mean_dtype = code(norm.name, machine.dtype(given.mean.storage))?;
        bound.at.given_var_dtype = code(norm.name, machine.dtype(given.var.storage))?;
    }
    let running = call.running.filter(|_| norm.geometry.elements() > 0 && call.given.is_none());
    let needs = ForwardNeeds {
        output: true,
        given: call.given.is_some(),
        keep: call.keep,
        momentum: running.map(|running| running.momentum),
    };
    let plan = plan::forward(&bound.request(norm), machine.properties(), &needs)?;
    machine.with_running(running, &mut |running| {
        let mut at = bound.at;
        if let Some(RunningAddresses { mean, mean_dtype, var, var_dtype }) = running {
            (at.running_mean, at.running_var) = (mean, var);
            at.running_mean_dtype = code(norm.name, mean_dtype)?;
            at.running_var_dtype = code(norm.name, var_dtype)?;
        }
        run(machine, &plan, &at)
    })?;
    machine.written(&mut out)?;
    stats.iter_mut().chain(&mut sum).try_for_each(|written| machine.written(written))?;
    Ok(Normed { y: out, stats, sum })
}

fn run_statistics<M: Machine>(machine: &M, norm: Norm, x: Arg<M::Storage>) -> Result<M::Storage> {
    let mut bound = Bound::new(machine, &norm, &x)?;
    let dtype = accumulation_dtype(machine.dtype(x.storage));
    let mut stats = machine.allocate(dtype, 3 * norm.geometry.sets())?;
    bound.at.stats = machine.address_mut(&mut stats)?;
    let needs = ForwardNeeds { output: false, given: false, keep: true, momentum: None };
    let plan = plan::forward(&bound.request(&norm), machine.properties(), &needs)?;
    run(machine, &plan, &bound.at)?;
    machine.written(&mut stats)?;
    Ok(stats)
}

/// What the arguments of all the backward's ops have in common.
fn bind_backward<M: Machine>(machine: &M, call: &Backward<M::Storage>) -> Result<Bound> {
    let mut bound = Bound::new(machine, &call.norm, &call.x)?;
    bound.weight(machine, call.norm.name, call.weight.as_ref())?;
    bound.bias(machine, call.norm.name, call.bias.as_ref())?;
    bound.at.skip = bound.around(machine, call.norm.name, call.skip.as_ref())?;
    bound.at.gate = bound.around(machine, call.norm.name, call.gate.as_ref())?;
    bound.at.dy = machine.address(&call.dy)?;
    bound.at.stats = machine.address(&call.stats)?;
    Ok(bound)
}

fn run_backward<M: Machine>(machine: &M, call: Backward<M::Storage>) -> Result<Gradients<M::Storage>> {
    let (norm, want) = (&call.norm, &call.want);
    let mut bound = bind_backward(machine, &call)?;
    let allocate = |dtype: Option<DType>, len, address: &mut u64, code_at: &mut u32| -> Result<_> {
        let Some(dtype) = dtype else { return Ok(None) };
        let mut storage = machine.allocate(dtype, len)?;
        *address = machine.address_mut(&mut storage)?;
        *code_at = code(norm.name, dtype)?;
        Ok(Some(storage))
    };
    let (g, params, at) = (&norm.geometry, norm.params(), &mut bound.at);
    if want.dgate && call.gate.is_none() {
        bail!("{}: the gradient of a gate is wanted, got no gate", norm.name)
    }
    let x_dtype = want.dx.then(|| machine.dtype(call.x.storage));
    let mut dx = allocate(x_dtype, g.elements(), &mut at.out, &mut 0)?;
    let around = |wanted: bool| wanted.then(|| machine.dtype(call.x.storage));
    let mut dskip = allocate(around(want.dskip), g.elements(), &mut at.dskip, &mut 0)?;
    let mut dgate = allocate(around(want.dgate), g.elements(), &mut at.dgate, &mut 0)?;
    let mut dweight = allocate(want.dweight, params, &mut at.dweight, &mut at.dweight_dtype)?;
    let mut dbias = allocate(want.dbias, params, &mut at.dbias, &mut at.dbias_dtype)?;
    let needs = BackwardNeeds {
        dx: want.dx,
        dweight: want.dweight.is_some(),
        dbias: want.dbias.is_some(),
        as_x: [want.dweight, want.dbias].into_iter().flatten().all(|d| d == machine.dtype(call.x.storage)),
        fixed: call.fixed,
        around: want.dskip || want.dgate,
    };
    let plan = plan::backward(&bound.request(norm), machine.properties(), &needs)?;
    run(machine, &plan, &bound.at)?;
    let all = [&mut dx, &mut dweight, &mut dbias, &mut dskip, &mut dgate];
    all.into_iter().flatten().try_for_each(|gradient| machine.written(gradient))?;
    Ok(Gradients { dx, dweight, dbias, dskip, dgate })
}

fn run_gradient_sums<M: Machine>(machine: &M, call: Backward<M::Storage>) -> Result<M::Storage> {
    let mut bound = bind_backward(machine, &call)?;
    let dtype = accumulation_dtype(machine.dtype(call.x.storage));
    let mut sums = machine.allocate(dtype, 2 * call.norm.geometry.sets())?;
    bound.at.sums = machine.address_mut(&mut sums)?;
    let plan = plan::gradient_sums(&bound.request(&call.norm), machine.properties())?;
    run(machine, &plan, &bound.at)?;
    machine.written(&mut sums)?;
    Ok(sums)
}

fn run_input_gradient<M: Machine>(
    machine: &M,
    call: Backward<M::Storage>,
    sums: Arg<M::Storage>,
    count: f64,
) -> Result<M::Storage> {
    let mut bound = bind_backward(machine, &call)?;
    bound.at.sums = machine.address(&sums)?;
    let mut dx = machine.allocate(machine.dtype(call.x.storage), call.norm.geometry.elements())?;
    bound.at.out = machine.address_mut(&mut dx)?;
    let plan = plan::input_gradient(&bound.request(&call.norm), machine.properties(), count)?;
    run(machine, &plan, &bound.at)?;
    machine.written(&mut dx)?;
    Ok(dx)
}
