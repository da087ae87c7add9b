//! The launch plan: which kernels run, how wide, with how much memory.
//!
//! Pure arithmetic on a geometry, a dtype and the properties of a device, apart from all that runs
//! kernels, so that its tables can be tested without a GPU. Which kernels run depends on the set's
//! size, the dtype and the device, never on the number of sets; only how many parts the parameters'
//! gradients come in does, since they are sums over the batch.

mod columns;
pub(super) mod held;
mod residency;
pub(super) mod split;
#[cfg(test)]
mod tests;

use super::entry::{Access, Element, Entry, Kernel};
use super::params::{flags, Arguments, Divisor, Params, Schedule, Shape};
use crate::fusion::{Activation, Fusion, Gate};
use crate::geometry::{Geometry, WeightBy};
use crate::request::Blocks;
use candle_core::{bail, Result};
pub(super) use held::takes_gate_before;

/// Threads of a block that merges parts.
const COMBINE_BLOCK: usize = 256;

/// Threads of a kernel's block at most, and blocks of its cluster: what its entry points are bound to.
#[cfg(all(test, feature = "cuda-emulation"))]
pub(super) fn bounds(entry: Entry) -> (usize, usize) {
    use Kernel::*;
    match entry.kernel() {
        ForwardKept if entry.access() == Access::Vector => (held::KEPT_BLOCK_VECTOR, 1),
        ForwardHeld | BackwardRows | BackwardSets | GatedForward | GatedBackward => (held::MAX_BLOCK, 1),
        BackwardPlain | BackwardPlainWide => (held::MAX_BLOCK, 1),
        ForwardKept | ForwardSeveral => (held::KEPT_BLOCK, 1),
        ForwardCluster | ForwardKeptCluster | BackwardSetsCluster | BackwardPlainCluster => {
            (held::CLUSTER_BLOCK, held::CLUSTER)
        }
        BackwardRowsCluster => (held::MAX_BLOCK, held::CLUSTER),
        SplitColumnSums => (split::COLUMNS_BLOCK, 1),
        SplitMoments | SplitForward | SplitSums | SplitBackward => (split::BLOCK, 1),
        ColumnMoments | ColumnForward | ColumnSums | ColumnBackward => (columns::BLOCK, 1),
        CombineMoments | CombineSums | ReduceParams | MoveRunning => (COMBINE_BLOCK, 1),
    }
}

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
    /// All tensors of x's shape start at multiples of this many bytes, a power of two up to 16.
    pub align: usize,
    /// Weight and bias start at multiples of 16 bytes.
    pub params_aligned: bool,
    /// Those that there are have x's dtype or, where that has 16 bits, all f32.
    pub params_plain: bool,
    pub weight: bool,
    pub bias: bool,
    pub fusion: Fusion,
    /// Tensors besides x that stand around the norm.
    pub residual: bool,
    pub skip: bool,
    pub gate: bool,
    /// Where the blocks of x lie, if not one behind the other.
    pub x_blocks: Option<Blocks>,
}

impl Request {
    /// Whether something stands behind the affine map.
    fn is_fused(&self) -> bool {
        self.skip || self.gate || self.fusion.activation.is_some()
    }

    /// Whether `x * silu(gate)` is what is normalized.
    fn gated_before(&self) -> bool {
        self.fusion.gate == Some(Gate::Before)
    }

    /// Blocks that share parameters.
    fn tokens(&self) -> usize {
        self.fusion.tokens.unwrap_or(self.geometry.outer).max(1)
    }

    /// Samples with parameters of their own.
    fn samples(&self) -> usize {
        self.fusion.tokens.map_or(1, |tokens| self.geometry.outer / tokens.max(1))
    }
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
    /// The gradients of the parameters that are wanted have x's dtype.
    pub as_x: bool,
    /// The statistics did not depend on x.
    pub fixed: bool,
    /// The gradient of a skip or of a gate.
    pub around: bool,
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
    pub shape: Shape,
    pub schedule: Schedule,
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
    /// The kernels' argument: `owned` has the addresses of what the caller owns, `workspace` that of the
    /// scratch memory.
    pub fn bind(&self, owned: &Arguments, workspace: u64) -> Params {
        let or =
            |owned: u64, scratch: Option<usize>| scratch.map_or(owned, |offset| workspace + offset as u64);
        let arguments = Arguments {
            stats: or(owned.stats, self.scratch.stats),
            sums: or(owned.sums, self.scratch.sums),
            part_moments: or(0, self.scratch.part_moments),
            part_sums: or(0, self.scratch.part_sums),
            param_parts: or(0, self.scratch.param_parts),
            ..*owned
        };
        Params { arguments, shape: self.shape, schedule: self.schedule }
    }
}

/// How the elements of a set find their parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WeightsPer {
    /// One for the whole set, or none at all.
    Set,
    /// One for every element of a contiguous set.
    Column,
    /// One for every row.
    Row,
    /// One for `span` neighbouring columns.
    Span,
}

fn weights_per(g: &Geometry, any: bool) -> WeightsPer {
    match g.weight_by {
        _ if !any || g.one_param_per_set() => WeightsPer::Set,
        WeightBy::Row => WeightsPer::Row,
        WeightBy::Column { span: 1 } if g.rows == 1 => WeightsPer::Column,
        WeightBy::Column { .. } => WeightsPer::Span,
    }
}

/// Whether lanes walk rows: runs shorter than two sectors, or parameters that repeat in every row.
fn by_columns(r: &Request, weights_per: WeightsPer) -> bool {
    let g = &r.geometry;
    weights_per == WeightsPer::Row
        || (g.rows > 1 && (weights_per != WeightsPer::Set || g.run * r.element.bytes() < 64))
}

/// Forward, or statistics alone.
pub(crate) fn forward(r: &Request, device: &DeviceProperties, needs: &ForwardNeeds) -> Result<Plan> {
    let weights_per = weights_per(&r.geometry, r.weight || r.bias);
    let mut plan = Builder::new(r, device, weights_per);
    plan.shape.momentum = needs.momentum.unwrap_or(0.0);
    if plan.is_plain() {
        plan.shape.flags |= flags::PLAIN_NORM;
    }
    if r.geometry.elements() == 0 {
        // Statistics of nothing are zeros: ranks without data merge them with others'.
        if needs.keep {
            plan.combine(Kernel::CombineMoments, Part { chunks: 0, width: 0, run: 1, span: 1 })?;
        }
        return Ok(plan.done());
    }
    if r.gated_before() {
        held::gated_forward(&mut plan, needs)?;
        return Ok(plan.done());
    }
    // The average over several samples needs them all.
    let averaged = needs.momentum.is_some() && r.geometry.outer > 1;
    let by_columns = by_columns(r, weights_per);
    let in_parts = match by_columns {
        true => columns::forward(&mut plan, needs)?,
        false => held::forward(&mut plan, needs)?,
    };
    if !needs.given && !needs.keep && (averaged || in_parts) {
        plan.scratch.stats = Some(plan.reserve(3 * r.geometry.sets()));
    }
    if averaged {
        let channels = r.geometry.sets_per_outer();
        plan.launch(Kernel::MoveRunning, Access::Vector, channels.div_ceil(128), 128, 0)?;
    }
    Ok(plan.done())
}

/// All gradients.
pub(crate) fn backward(r: &Request, device: &DeviceProperties, needs: &BackwardNeeds) -> Result<Plan> {
    // Whether or not parameters are wanted: dx has the same bits either way.
    let weights_per = weights_per(&r.geometry, true);
    let mut plan = Builder::new(r, device, weights_per);
    if needs.fixed {
        plan.shape.flags |= flags::FIXED;
    }
    if needs.params() {
        plan.shape.flags |= flags::WANT_PARAMS;
    }
    if weights_per == WeightsPer::Set {
        plan.shape.flags |= flags::UNWEIGHTED;
    }
    if r.geometry.elements() == 0 {
        if needs.params() {
            plan.reduce(0, 0, 1)?;
        }
        return Ok(plan.done());
    }
    match by_columns(r, weights_per) {
        _ if r.gated_before() => held::gated_backward(&mut plan, needs)?,
        true => columns::backward(&mut plan, needs)?,
        false => held::backward(&mut plan, needs)?,
    }
    Ok(plan.done())
}

/// Sums over each set of dy and of dy * xhat, for norms with one parameter a set.
pub(crate) fn gradient_sums(r: &Request, device: &DeviceProperties) -> Result<Plan> {
    let mut plan = Builder::new(r, device, WeightsPer::Set);
    plan.shape.flags |= flags::UNWEIGHTED;
    if r.geometry.elements() == 0 {
        plan.combine(Kernel::CombineSums, Part { chunks: 0, width: 0, run: 1, span: 1 })?;
        return Ok(plan.done());
    }
    let part = match by_columns(r, WeightsPer::Set) {
        true => columns::sums(&mut plan, false)?,
        false => split::sums(&mut plan, false)?,
    };
    plan.combine(Kernel::CombineSums, part)?;
    Ok(plan.done())
}

/// dx from sums over `count` elements a set.
pub(crate) fn input_gradient(r: &Request, device: &DeviceProperties, count: f64) -> Result<Plan> {
    let mut plan = Builder::new(r, device, WeightsPer::Set);
    plan.shape.flags |= flags::UNWEIGHTED;
    plan.shape.count = count;
    if r.geometry.elements() > 0 {
        match by_columns(r, WeightsPer::Set) {
            true => columns::input_gradient(&mut plan)?,
            false => split::input_gradient(&mut plan)?,
        }
    }
    Ok(plan.done())
}

/// The code by which kernels know an activation (`enum Activation` of params.cuh), and its slope.
pub(super) fn activation_code(activation: Option<Activation>) -> (u32, f64) {
    match activation {
        None => (0, 0.0),
        Some(Activation::Relu) => (1, 0.0),
        Some(Activation::Relu6) => (2, 0.0),
        Some(Activation::LeakyRelu(slope)) => (3, slope),
        Some(Activation::Silu) => (4, 0.0),
        Some(Activation::Sigmoid) => (5, 0.0),
        Some(Activation::HardSwish) => (6, 0.0),
        Some(Activation::Gelu) => (7, 0.0),
        Some(Activation::GeluTanh) => (8, 0.0),
    }
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
    weights_per: WeightsPer,
    launches: Vec<Launch>,
    shape: Shape,
    schedule: Schedule,
    scratch: Scratch,
    reserved: usize,
    traffic: usize,
}

impl<'a> Builder<'a> {
    fn new(r: &'a Request, device: &'a DeviceProperties, weights_per: WeightsPer) -> Self {
        let g = r.geometry;
        let (span, set_params) = match (weights_per, g.weight_by) {
            (WeightsPer::Set, _) => (g.run.max(1), 1),
            (_, WeightBy::Row) => (1, 1),
            (_, WeightBy::Column { span }) => (span, g.run / span),
        };
        let mut bits = match weights_per {
            WeightsPer::Set => flags::PER_SET,
            WeightsPer::Column => flags::PER_COLUMN,
            WeightsPer::Row => flags::PER_ROW,
            WeightsPer::Span => 0,
        };
        let set = |flag: u32, on: bool| if on { flag } else { 0 };
        bits |= set(flags::CENTER, g.center) | set(flags::FUSED, r.is_fused());
        bits |= set(flags::BLOCKS, r.x_blocks.is_some());
        let blocks = r.x_blocks.unwrap_or(Blocks { dims: [1; 4], strides: [0; 4] });
        let (activation, slope) = activation_code(r.fusion.activation);
        let shape = Shape {
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
            tokens: r.fusion.tokens.unwrap_or(0) as u64,
            block_dims: blocks.dims.map(|dim| dim as u64),
            block_strides: blocks.strides.map(|stride| stride as u64),
            eps: r.eps,
            count: g.set_len() as f64,
            weight_offset: r.fusion.weight_offset,
            slope,
            by_span: Divisor::new(span),
            by_sets: Divisor::new(g.sets_per_outer()),
            flags: bits,
            activation,
            ..Shape::default()
        };
        let schedule = Schedule {
            pieces: 1,
            chunks: 1,
            copies: 1,
            lanes: 32,
            segs: 1,
            stages: 1,
            ..Schedule::default()
        };
        let (launches, scratch) = (Vec::with_capacity(4), Scratch::default());
        Self { r, g, device, weights_per, launches, shape, schedule, scratch, reserved: 0, traffic: 0 }
    }

    /// Whether nothing stands behind the norm and kernels load its parameters without a call: `plain_param` or
    /// `with_plain_params` finds them.
    fn is_plain(&self) -> bool {
        let r = self.r;
        let all = match self.weights_per {
            WeightsPer::Set => true,
            WeightsPer::Column => r.weight,
            WeightsPer::Row | WeightsPer::Span => r.weight && r.bias,
        };
        all && r.params_plain && !r.is_fused() && r.fusion.weight_offset == 0.0
    }

    fn done(self) -> Plan {
        let Self { launches, shape, mut schedule, scratch, reserved: workspace, traffic, .. } = self;
        schedule.by_chunks = Divisor::new(schedule.chunks as usize);
        schedule.by_pieces = Divisor::new(schedule.pieces as usize);
        Plan { launches, shape, schedule, workspace, traffic, scratch }
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

    /// Counts those of the last pass of a backward. dx needs x for its sums, a fused z in any case.
    fn gradient_passes(&mut self, needs_x: bool, dx: bool) {
        self.passes(1 + (needs_x || self.r.is_fused()) as usize + dx as usize);
    }

    /// Elements of one access.
    fn unit(&self, access: Access) -> usize {
        match access {
            Access::Vector => 16 / self.r.element.bytes(),
            Access::HalfVector => 8 / self.r.element.bytes(),
            Access::Scalar => 1,
        }
    }

    /// The widest access for segments of `run` elements.
    fn access(&self, run: usize) -> Access {
        match self.weights_per {
            WeightsPer::Column if !self.r.params_aligned => Access::Scalar,
            // An access has one parameter.
            WeightsPer::Span => self.widest([run, self.shape.span as usize]),
            _ => self.widest([run, self.g.run]),
        }
    }

    /// The same for whole rows.
    fn width_access(&self) -> Access {
        self.widest([self.g.width; 2])
    }

    /// All that starts behind these numbers of elements is aligned to it.
    fn widest(&self, lengths: [usize; 2]) -> Access {
        let bytes = self.r.element.bytes();
        let strides = self.r.x_blocks.map_or([0; 4], |blocks| blocks.strides);
        let lengths = lengths.into_iter().chain(strides).fold(16, |all, length| all | (length * bytes));
        let fits = |width: usize| self.r.align >= width && lengths.is_multiple_of(width);
        match bytes {
            _ if fits(16) => Access::Vector,
            2 if fits(8) => Access::HalfVector,
            _ => Access::Scalar,
        }
    }

    fn launch(
        &mut self,
        kernel: Kernel,
        access: Access,
        grid: usize,
        block: usize,
        shared: usize,
    ) -> Result<()> {
        self.launch_cluster(kernel, access, grid, block, shared, 1)
    }

    fn launch_cluster(
        &mut self,
        kernel: Kernel,
        access: Access,
        grid: usize,
        block: usize,
        shared: usize,
        cluster: usize,
    ) -> Result<()> {
        let name = self.r.name;
        if grid > i32::MAX as usize {
            bail!("{name}: {:?} needs {grid} blocks, expected at most {}", self.g, i32::MAX)
        }
        let entry = self.entry(kernel, access)?;
        let (grid, block, shared, cluster) = (grid as u32, block as u32, shared as u32, cluster as u32);
        self.launches.push(Launch { entry, grid, block, shared, cluster });
        Ok(())
    }

    fn entry(&self, kernel: Kernel, access: Access) -> Result<Entry> {
        match Entry::new(kernel, self.r.element, access) {
            Some(entry) => Ok(entry),
            None => bail!("{}: no kernel {kernel:?} with {access:?} for {:?}", self.r.name, self.r.element),
        }
    }

    /// Says how parts lie, and merges them: a set by a few lanes of a warp, or by a whole block.
    fn combine(&mut self, kernel: Kernel, part: Part) -> Result<()> {
        const BLOCK: usize = COMBINE_BLOCK;
        self.set_part(part);
        let items = part.chunks * part.run;
        let lanes = match items.div_ceil(4).next_power_of_two() {
            few @ ..=32 => few,
            _ => BLOCK,
        };
        self.schedule.combine_lanes = lanes as u32;
        let shared = if lanes > 32 { 32 * (3 * self.accumulator() + 8) } else { 0 };
        match self.g.sets() {
            0 => Ok(()),
            sets => self.launch(kernel, Access::Vector, (sets * lanes).div_ceil(BLOCK), BLOCK, shared),
        }
    }

    fn set_part(&mut self, part: Part) {
        self.schedule.part_chunks = part.chunks as u64;
        self.schedule.part_width = part.width as u64;
        self.schedule.part_run = part.run as u64;
        self.schedule.part_span = part.span as u64;
    }

    /// Adds up `copies` of the parameters' gradients, `width` long, `span` of which are a parameter's.
    fn reduce(&mut self, copies: usize, width: usize, span: usize) -> Result<()> {
        const BLOCK: usize = COMBINE_BLOCK;
        let params = self.g.params() * self.r.samples();
        // As many parts a thread as it has in flight at once, as far as threads go: of neighbouring
        // parameters eight side by side fill a sector.
        let most = if span == 1 { BLOCK / 8 } else { BLOCK };
        let lanes = (copies * span).div_ceil(8).next_power_of_two().min(most);
        let columns = (BLOCK / lanes).min(params.next_power_of_two());
        self.schedule.copies = copies as u64;
        self.schedule.param_width = width as u64;
        self.schedule.param_span = span as u64;
        self.schedule.reduce_columns = columns as u32;
        let shared = 2 * BLOCK * self.accumulator();
        match params {
            0 => Ok(()),
            _ => self.launch(Kernel::ReduceParams, Access::Vector, params.div_ceil(columns), BLOCK, shared),
        }
    }

    /// Makes room for gradients in parts, and adds them up.
    fn reduce_parts(&mut self, copies: usize, width: usize) -> Result<()> {
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
        self.weights_per == WeightsPer::Set && self.g.outer == 1
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
