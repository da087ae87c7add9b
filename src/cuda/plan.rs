//! The launch plan: which kernels run, how wide, with how much memory.
//!
//! Pure arithmetic on a geometry, a dtype and the properties of a device, apart from all that runs
//! kernels, so that its tables can be tested without a GPU. Which kernels run depends on the set's
//! size, the dtype and the device, never on the number of sets; only how many parts the parameters'
//! gradients come in does, since they are sums over the batch.

mod columns;
mod rows;
#[cfg(test)]
mod tests;

use super::entry::{Element, Entry, Kernel};
use super::params::{flags, Divisor, Params};
use crate::geometry::{Affine, Geometry};
use candle_core::{bail, Result};

/// What the plan asks of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeviceProperties {
    /// Compute capability, major * 10 + minor: 70, 75, 80, 86, 89, 90.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory a block may have with opt-in
    /// (`CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`).
    pub shared: u32,
}

/// One kernel launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub entry: Entry,
    /// Blocks, in x only; a multiple of `cluster`.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// Blocks of a cluster, 1 for none. Compiled into the kernel.
    pub cluster: u32,
}

/// What the plan is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Request {
    /// The op's name in errors.
    pub name: &'static str,
    pub geometry: Geometry,
    pub element: Element,
    pub eps: f64,
    /// x, dy and the output start at multiples of 16 bytes.
    pub aligned: bool,
    /// Weight and bias do.
    pub params_aligned: bool,
    pub weight: bool,
    pub bias: bool,
}

/// What a forward has to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ForwardNeeds {
    /// Write the output (else the statistics alone).
    pub output: bool,
    /// Take given statistics.
    pub given: bool,
    /// Write the statistics to memory that the caller keeps.
    pub keep: bool,
    /// Move running statistics by this momentum.
    pub momentum: Option<f64>,
}

/// What a backward has to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BackwardNeeds {
    pub dx: bool,
    pub dweight: bool,
    pub dbias: bool,
    /// The statistics did not depend on x.
    pub fixed: bool,
}

impl BackwardNeeds {
    fn params(&self) -> bool {
        self.dweight || self.dbias
    }
}

/// Launches of one op in order, all with the same `Params`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub launches: Vec<Launch>,
    /// Numbers filled in, addresses not yet: see `bind`.
    pub params: Params,
    /// Bytes of scratch memory that lives until the last launch is done.
    pub workspace: usize,
    /// Bytes of x, dy and the output that the launches move to and from memory, if nothing is cached.
    pub traffic: usize,
    scratch: Scratch,
}

/// Places in the scratch memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Scratch {
    stats: Option<usize>,
    sums: Option<usize>,
    part_moments: Option<usize>,
    part_sums: Option<usize>,
    param_parts: Option<usize>,
}

impl Plan {
    /// The kernels' argument: `at` has the addresses of what the caller owns, `workspace` that of the
    /// scratch memory.
    pub fn bind(&self, at: &Params, workspace: u64) -> Params {
        let or =
            |owned: u64, scratch: Option<usize>| scratch.map_or(owned, |offset| workspace + offset as u64);
        Params {
            x: at.x,
            dy: at.dy,
            out: at.out,
            weight: at.weight,
            bias: at.bias,
            stats: or(at.stats, self.scratch.stats),
            sums: or(at.sums, self.scratch.sums),
            part_moments: or(0, self.scratch.part_moments),
            part_sums: or(0, self.scratch.part_sums),
            param_parts: or(0, self.scratch.param_parts),
            given_mean: at.given_mean,
            given_low: at.given_low,
            given_var: at.given_var,
            running_mean: at.running_mean,
            running_var: at.running_var,
            dweight: at.dweight,
            dbias: at.dbias,
            weight_dtype: at.weight_dtype,
            bias_dtype: at.bias_dtype,
            given_mean_dtype: at.given_mean_dtype,
            given_var_dtype: at.given_var_dtype,
            running_mean_dtype: at.running_mean_dtype,
            running_var_dtype: at.running_var_dtype,
            dweight_dtype: at.dweight_dtype,
            dbias_dtype: at.dbias_dtype,
            ..self.params
        }
    }
}

/// How the elements of a set find their parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Affinity {
    /// One for the whole set, or none at all.
    Set,
    /// One for every element of a contiguous set.
    Column,
    /// One for every row.
    Row,
    /// One for `span` neighbouring columns.
    Span,
}

fn affinity(g: &Geometry, any: bool) -> Affinity {
    match g.affine {
        _ if !any || g.one_param_per_set() => Affinity::Set,
        Affine::Row => Affinity::Row,
        Affine::Column { span: 1 } if g.rows == 1 => Affinity::Column,
        Affine::Column { .. } => Affinity::Span,
    }
}

/// Whether lanes walk rows: runs shorter than two sectors, or parameters that repeat in every row.
fn by_columns(r: &Request, affinity: Affinity) -> bool {
    let g = &r.geometry;
    affinity == Affinity::Row || (g.rows > 1 && (affinity != Affinity::Set || g.run * r.element.bytes() < 64))
}

/// Forward, or statistics alone.
pub(crate) fn forward(r: &Request, device: &DeviceProperties, needs: &ForwardNeeds) -> Result<Plan> {
    let affinity = affinity(&r.geometry, r.weight || r.bias);
    let mut plan = Builder::new(r, device, affinity);
    plan.params.momentum = needs.momentum.unwrap_or(0.0);
    if r.geometry.elements() == 0 {
        // Statistics of nothing are zeros: ranks without data merge them with others'.
        if needs.keep {
            plan.combine(Kernel::CombineMoments, Part { chunks: 0, width: 0, run: 1, span: 1 })?;
        }
        return Ok(plan.done());
    }
    // The average over several samples needs them all.
    let averaged = needs.momentum.is_some() && r.geometry.outer > 1;
    let by_columns = by_columns(r, affinity);
    let in_parts = match by_columns {
        true => columns::forward(&mut plan, needs)?,
        false => rows::forward(&mut plan, needs)?,
    };
    if !needs.given && !needs.keep && (averaged || in_parts) {
        plan.scratch.stats = Some(plan.reserve(3 * r.geometry.sets()));
    }
    if averaged {
        let channels = r.geometry.sets_per_outer();
        plan.launch(Kernel::MoveRunning, true, channels.div_ceil(128), 128, 0)?;
    }
    Ok(plan.done())
}

/// All gradients.
pub(crate) fn backward(r: &Request, device: &DeviceProperties, needs: &BackwardNeeds) -> Result<Plan> {
    // Whether or not parameters are wanted: dx has the same bits either way.
    let affinity = affinity(&r.geometry, true);
    let mut plan = Builder::new(r, device, affinity);
    if needs.fixed {
        plan.params.flags |= flags::FIXED;
    }
    if needs.params() {
        plan.params.flags |= flags::WANT_PARAMS;
    }
    if affinity == Affinity::Set {
        plan.params.flags |= flags::UNWEIGHTED;
    }
    if r.geometry.elements() == 0 {
        if needs.params() {
            plan.reduce(0, 0, 1)?;
        }
        return Ok(plan.done());
    }
    match by_columns(r, affinity) {
        true => columns::backward(&mut plan, needs)?,
        false => rows::backward(&mut plan, needs)?,
    }
    Ok(plan.done())
}

/// Sums over each set of dy and of dy * xhat, for norms with one parameter a set.
pub(crate) fn gradient_sums(r: &Request, device: &DeviceProperties) -> Result<Plan> {
    let mut plan = Builder::new(r, device, Affinity::Set);
    plan.params.flags |= flags::UNWEIGHTED;
    if r.geometry.elements() == 0 {
        plan.combine(Kernel::CombineSums, Part { chunks: 0, width: 0, run: 1, span: 1 })?;
        return Ok(plan.done());
    }
    let part = match by_columns(r, Affinity::Set) {
        true => columns::sums(&mut plan, false)?,
        false => rows::sums(&mut plan, false)?,
    };
    plan.combine(Kernel::CombineSums, part)?;
    Ok(plan.done())
}

/// dx from sums over `count` elements a set.
pub(crate) fn input_gradient(r: &Request, device: &DeviceProperties, count: f64) -> Result<Plan> {
    let mut plan = Builder::new(r, device, Affinity::Set);
    plan.params.flags |= flags::UNWEIGHTED;
    plan.params.count = count;
    if r.geometry.elements() > 0 {
        match by_columns(r, Affinity::Set) {
            true => columns::input_gradient(&mut plan)?,
            false => rows::input_gradient(&mut plan)?,
        }
    }
    Ok(plan.done())
}

/// A block of parts `[outer, chunks, width]`: a set has `run` neighbouring columns of all chunks, a
/// parameter `span` neighbouring columns.
#[derive(Debug, Clone, Copy)]
struct Part {
    chunks: usize,
    width: usize,
    run: usize,
    span: usize,
}

/// A plan in the making.
struct Builder<'a> {
    r: &'a Request,
    g: Geometry,
    device: &'a DeviceProperties,
    affinity: Affinity,
    /// Elements in 16 bytes.
    lanes: usize,
    launches: Vec<Launch>,
    params: Params,
    scratch: Scratch,
    reserved: usize,
    traffic: usize,
}

impl<'a> Builder<'a> {
    fn new(r: &'a Request, device: &'a DeviceProperties, affinity: Affinity) -> Self {
        let g = r.geometry;
        let (span, set_params) = match (affinity, g.affine) {
            (Affinity::Set, _) => (g.run.max(1), 1),
            (_, Affine::Row) => (1, 1),
            (_, Affine::Column { span }) => (span, g.run / span),
        };
        let mut bits = match affinity {
            Affinity::Set => flags::PER_SET,
            Affinity::Column => flags::PER_COLUMN,
            Affinity::Row => flags::PER_ROW,
            Affinity::Span => 0,
        };
        bits |= if g.center { flags::CENTER } else { 0 };
        bits |= if r.params_aligned { flags::PARAMS_ALIGNED } else { 0 };
        let params = Params {
            outer: g.outer as u64,
            rows: g.rows as u64,
            width: g.width as u64,
            run: g.run as u64,
            span: span as u64,
            sets: g.sets() as u64,
            sets_per_outer: g.sets_per_outer() as u64,
            set_len: g.set_len() as u64,
            params: g.params() as u64,
            set_params: set_params as u64,
            eps: r.eps,
            count: g.set_len() as f64,
            by_span: Divisor::new(span),
            flags: bits,
            pieces: 1,
            chunks: 1,
            lanes: 32,
            ..Params::default()
        };
        let lanes = 16 / r.element.bytes();
        let (launches, scratch) = (Vec::with_capacity(4), Scratch::default());
        Self { r, g, device, affinity, lanes, launches, params, scratch, reserved: 0, traffic: 0 }
    }

    fn done(self) -> Plan {
        let Self { launches, params, scratch, reserved: workspace, traffic, .. } = self;
        Plan { launches, params, workspace, traffic, scratch }
    }

    /// Bytes of the accumulation dtype.
    fn accumulator(&self) -> usize {
        self.r.element.accumulator_bytes()
    }

    /// Scratch memory for `len` accumulators; its offset.
    fn reserve(&mut self, len: usize) -> usize {
        let at = self.reserved;
        self.reserved += (len * self.accumulator()).next_multiple_of(256);
        at
    }

    /// Counts `passes` over a tensor.
    fn passes(&mut self, passes: usize) {
        self.traffic += passes * self.g.elements() * self.r.element.bytes();
    }

    fn launch(
        &mut self,
        kernel: Kernel,
        vector: bool,
        grid: usize,
        block: usize,
        shared: usize,
    ) -> Result<()> {
        self.launch_cluster(kernel, vector, grid, block, shared, 1)
    }

    fn launch_cluster(
        &mut self,
        kernel: Kernel,
        vector: bool,
        grid: usize,
        block: usize,
        shared: usize,
        cluster: usize,
    ) -> Result<()> {
        let name = self.r.name;
        if grid > i32::MAX as usize {
            bail!("{name}: {:?} needs {grid} blocks, expected at most {}", self.g, i32::MAX)
        }
        let Some(entry) = Entry::new(kernel, self.r.element, vector) else {
            bail!("{name}: no kernel {kernel:?} for {:?}", self.r.element)
        };
        let (grid, block, shared, cluster) = (grid as u32, block as u32, shared as u32, cluster as u32);
        self.launches.push(Launch { entry, grid, block, shared, cluster });
        Ok(())
    }

    /// Says how parts lie, and merges them.
    fn combine(&mut self, kernel: Kernel, part: Part) -> Result<()> {
        self.set_part(part);
        let items = part.chunks * part.run;
        let lanes = items.div_ceil(4).next_power_of_two().min(32);
        self.params.combine_lanes = lanes as u32;
        match self.g.sets() {
            0 => Ok(()),
            sets => self.launch(kernel, true, (sets * lanes).div_ceil(128), 128, 0),
        }
    }

    fn set_part(&mut self, part: Part) {
        self.params.part_chunks = part.chunks as u64;
        self.params.part_width = part.width as u64;
        self.params.part_run = part.run as u64;
        self.params.part_span = part.span as u64;
    }

    /// Adds up `copies` of the parameters' gradients, `width` long, `span` of which are a parameter's.
    fn reduce(&mut self, copies: usize, width: usize, span: usize) -> Result<()> {
        const BLOCK: usize = 256;
        let params = self.g.params();
        let columns = if span == 1 { params.next_power_of_two().min(32) } else { 1 };
        self.params.copies = copies as u64;
        self.params.param_width = width as u64;
        self.params.param_span = span as u64;
        self.params.reduce_columns = columns as u32;
        let shared = BLOCK * self.accumulator();
        match params {
            0 => Ok(()),
            _ => self.launch(Kernel::ReduceParams, true, params.div_ceil(columns), BLOCK, shared),
        }
    }

    /// Makes room for gradients in parts, unless there is one part alone, and adds them up.
    fn reduce_parts(&mut self, copies: usize, width: usize) -> Result<()> {
        self.params.copies = copies as u64;
        self.params.param_width = width as u64;
        if copies == 1 {
            return Ok(());
        }
        self.scratch.param_parts = Some(self.reserve(2 * copies * width));
        self.reduce(copies, width, 1)
    }

    /// Adds up gradients that lie in the parts of the set sums.
    fn reduce_sums(&mut self, part: Part) -> Result<()> {
        self.scratch.param_parts = self.scratch.part_sums;
        self.reduce(self.g.outer * part.chunks, part.width, part.span)
    }

    /// Whether the set sums are the parameters' gradients: batch norm.
    fn sums_are_gradients(&self) -> bool {
        self.affinity == Affinity::Set && self.g.outer == 1
    }

    /// What follows sums in parts: the parameters' gradients, and the sums of sets if dx needs them.
    fn after_sums(&mut self, part: Part, needs: &BackwardNeeds) -> Result<()> {
        let sums = needs.dx && !needs.fixed;
        if sums {
            self.scratch.sums = Some(self.reserve(2 * self.g.sets()));
        }
        if sums || (needs.params() && self.sums_are_gradients()) {
            self.combine(Kernel::CombineSums, part)?;
        }
        if needs.params() && !self.sums_are_gradients() {
            self.reduce_sums(part)?;
        }
        Ok(())
    }
}
