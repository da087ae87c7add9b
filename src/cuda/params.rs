//! The one argument every kernel takes: `struct Params` of `cuda/params.cuh`, field for field.
//!
//! Kept separate from the plan that fills it because its layout is a contract with C++. It has three
//! parts: what the caller owns, what is to be computed, and how the plan shares it out. All launches of
//! one op take the same value, so an executor copies it and adds nothing.

/// Exact division of numbers below 2^31 by a constant: one multiplication and a shift.
///
/// `n / d = (mulhi(n, magic) + n) >> shift` with `shift = ceil(log2 d)` and
/// `magic = 2^32 * (2^shift - d) / d + 1`. Source: Granlund and Montgomery, "Division by invariant
/// integers using multiplication".
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Divisor {
    pub divisor: u32,
    pub magic: u32,
    pub shift: u32,
}

impl Divisor {
    /// Divisors of 2^31 and more become 2^31: they exceed every dividend, so the quotient is 0.
    pub fn new(divisor: usize) -> Self {
        let d = divisor.clamp(1, 1 << 31) as u64;
        let shift = d.next_power_of_two().trailing_zeros();
        let magic = (((1u64 << 32) * ((1u64 << shift) - d)) / d + 1) as u32;
        Self { divisor: d as u32, magic, shift }
    }
}

/// Bits of `Shape::flags`.
pub(crate) mod flags {
    /// Subtract the mean (not for RMS norm).
    pub const CENTER: u32 = 1;
    /// The statistics did not depend on x: the input gradient has no set sums in it.
    pub const FIXED: u32 = 1 << 1;
    /// Every element of a set has the same parameter.
    pub const PER_SET: u32 = 1 << 2;
    /// A set's elements have consecutive parameters.
    pub const PER_COLUMN: u32 = 1 << 3;
    /// The parameter of an element is its row.
    pub const PER_ROW: u32 = 1 << 4;
    /// `sums` are without the weight in them: the input gradient multiplies by it afterwards.
    pub const UNWEIGHTED: u32 = 1 << 5;
    /// `part_sums` already have the weight in them.
    pub const PART_WEIGHTED: u32 = 1 << 6;
    /// Somebody wants the gradient of weight or bias.
    pub const WANT_PARAMS: u32 = 1 << 7;
    /// A skip, an activation or a gate stands behind the norm.
    pub const FUSED: u32 = 1 << 8;
    /// The blocks of x do not lie one behind the other.
    pub const BLOCKS: u32 = 1 << 9;
    /// The kernel that sums writes the gradients of skip and gate, else the one that writes dx does.
    pub const SUMS_WRITE: u32 = 1 << 10;
    /// Of a forward: nothing stands behind the norm, and its parameters are loaded without a call.
    pub const PLAIN_NORM: u32 = 1 << 11;
}

/// What the caller owns: device addresses, 0 where there is nothing, and dtype codes (0 f32, 1 f16,
/// 2 bf16, 3 f64).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Arguments {
    /// Input, and the gradient of the output, of x's dtype.
    pub x: u64,
    pub dy: u64,
    /// Output, or the input's gradient.
    pub out: u64,
    pub weight: u64,
    pub bias: u64,
    /// Of x's dtype and shape: added to x, added to z, multiplied in behind z.
    pub residual: u64,
    pub skip: u64,
    pub gate: u64,
    /// x + residual, rounded; gradients of skip and gate.
    pub sum: u64,
    pub dskip: u64,
    pub dgate: u64,
    /// `[3, sets]`: mean, mean_low, var.
    pub stats: u64,
    /// `[2, sets]`: sums over each set of the gradient, and of the gradient times xhat.
    pub sums: u64,
    /// Moments of parts, `[3, outer, part_chunks, part_width]`.
    pub part_moments: u64,
    /// Sums of parts for `sums`, `[2, outer, part_chunks, part_width]`.
    pub part_sums: u64,
    /// Parts of the parameters' gradients, `[2, copies, param_width]`.
    pub param_parts: u64,
    /// Statistics to take instead of `stats`, `[sets]` each; then `stats` is a copy to be written.
    pub given_mean: u64,
    pub given_low: u64,
    pub given_var: u64,
    pub running_mean: u64,
    pub running_var: u64,
    pub dweight: u64,
    pub dbias: u64,
    pub weight_dtype: u32,
    pub bias_dtype: u32,
    /// `given_low` has the same.
    pub given_mean_dtype: u32,
    pub given_var_dtype: u32,
    pub running_mean_dtype: u32,
    pub running_var_dtype: u32,
    pub dweight_dtype: u32,
    pub dbias_dtype: u32,
}

/// What is to be computed: the geometry, its constants, what is fused.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Shape {
    pub outer: u64,
    pub rows: u64,
    pub width: u64,
    pub run: u64,
    /// Neighbouring columns that share a parameter.
    pub span: u64,
    pub sets: u64,
    pub sets_per_outer: u64,
    pub set_len: u64,
    /// Parameters of one sample.
    pub params: u64,
    /// Parameters that a set uses: 1 if all its elements share one.
    pub set_params: u64,
    /// Blocks that share parameters, 0 where all do.
    pub tokens: u64,
    /// Where the blocks of x lie: `request::Blocks`.
    pub block_dims: [u64; 4],
    pub block_strides: [u64; 4],
    pub eps: f64,
    pub momentum: f64,
    /// Elements that the means of the sums run over; more than `set_len` where ranks share a set.
    pub count: f64,
    pub weight_offset: f64,
    /// Of a leaky ReLU below zero.
    pub slope: f64,
    pub by_span: Divisor,
    /// By `sets_per_outer`.
    pub by_sets: Divisor,
    pub flags: u32,
    /// `enum Activation` of params.cuh.
    pub activation: u32,
}

/// How the plan shares the work out.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Schedule {
    /// A set as segments of contiguous elements, `seg_stride` apart.
    pub segs: u64,
    pub seg_len: u64,
    pub seg_stride: u64,
    /// A chunk is a piece of `chunk_len` elements of one segment where `pieces > 1`, else
    /// `segs_per_chunk` whole segments. In column kernels it is `chunk_rows` rows.
    pub chunk_len: u64,
    pub pieces: u64,
    pub segs_per_chunk: u64,
    pub chunks: u64,
    pub chunk_rows: u64,
    /// Parts of a set `s`: `part_run` neighbouring columns of the part block `s / sets_per_outer`.
    pub part_chunks: u64,
    pub part_width: u64,
    pub part_run: u64,
    /// Neighbouring part columns that share a parameter.
    pub part_span: u64,
    /// Parts of parameter `p`: `param_span` neighbouring columns of every copy.
    pub copies: u64,
    pub param_width: u64,
    pub param_span: u64,
    pub by_seg: Divisor,
    pub by_chunks: Divisor,
    pub by_pieces: Divisor,
    /// Threads of a block that share a set, or lanes along the columns.
    pub lanes: u32,
    /// Threads that share a segment.
    pub segment_lanes: u32,
    /// Threads that combine the parts of a set, and parameters that a block reduces side by side.
    pub combine_lanes: u32,
    pub reduce_columns: u32,
    /// Sets whose elements are on chip or on their way there, one behind the other: 1 or 2.
    pub stages: u32,
}

/// What a kernel needs to know.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Params {
    pub arguments: Arguments,
    pub shape: Shape,
    pub schedule: Schedule,
}

const _: () = assert!(size_of::<Arguments>() == 23 * 8 + 8 * 4);
const _: () = assert!(size_of::<Shape>() == 24 * 8 + 8 * 4);
const _: () = assert!(size_of::<Schedule>() == 15 * 8 + 14 * 4);
const _: () =
    assert!(size_of::<Params>() == size_of::<Arguments>() + size_of::<Shape>() + size_of::<Schedule>());
