//! The kernels by name: `extern "C"` entry points of `cuda/*.cu`.
//!
//! Apart from the plan that picks them, so that an executor can load a table of all of them.

// The emulation asks for limits alone.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) mod module;

use candle_core::{bail, DType, Result};

/// dtype of x, in the order of the codes that kernels know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    F32,
    F16,
    BF16,
    F64,
}

impl Element {
    pub fn new(op: &str, dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Element::F32,
            DType::F16 => Element::F16,
            DType::BF16 => Element::BF16,
            DType::F64 => Element::F64,
            other => bail!("{op}: no kernels for dtype {other:?}"),
        })
    }

    /// The code by which kernels know a parameter's dtype.
    pub fn code(self) -> u32 {
        self as u32
    }

    pub fn bytes(self) -> usize {
        match self {
            Element::F16 | Element::BF16 => 2,
            Element::F32 => 4,
            Element::F64 => 8,
        }
    }

    /// Bytes of the accumulation dtype.
    pub fn accumulator_bytes(self) -> usize {
        if self == Element::F64 {
            8
        } else {
            4
        }
    }
}

/// What a kernel does; each exists for several elements and accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Statistics and output of sets held on chip, by 8 to 512 threads a set.
    ForwardHeld,
    /// The same over a cluster of 8 blocks.
    ForwardCluster,
    /// Both, of sets that the registers hold; and of several small ones in a block.
    ForwardKept,
    ForwardKeptCluster,
    ForwardSeveral,
    /// Gradients of sets held on chip whose columns all have their own parameter.
    BackwardRows,
    BackwardRowsCluster,
    /// The same with nothing around the norm, single elements; and with twice the columns a thread.
    BackwardPlain,
    BackwardPlainWide,
    BackwardPlainCluster,
    /// Gradients of other sets held on chip.
    BackwardSets,
    BackwardSetsCluster,
    /// Output and gradients of rows held in registers, with a gate before the norm.
    GatedForward,
    GatedBackward,
    /// Moments of chunks of sets.
    SplitMoments,
    /// Output from given statistics, chunk by chunk.
    SplitForward,
    /// Gradient sums of chunks, where a segment has one parameter.
    SplitSums,
    /// Gradient sums of column tiles, where every column has its own parameter.
    SplitColumnSums,
    /// Input gradient from given sums, chunk by chunk.
    SplitBackward,
    /// The four of them where lanes own columns and walk rows.
    ColumnMoments,
    ColumnForward,
    ColumnSums,
    ColumnBackward,
    /// Parts of moments to statistics, which may move the running ones.
    CombineMoments,
    /// Parts of gradient sums to gradient sums.
    CombineSums,
    /// Parts of parameter gradients to parameter gradients.
    ReduceParams,
    /// Statistics of several samples to running ones.
    MoveRunning,
}

/// Bytes that a kernel moves in one access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    /// 16 bytes.
    Vector,
    /// 8 bytes, of 16-bit elements.
    HalfVector,
    /// One element.
    Scalar,
}

/// An entry point: its place in `TABLE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry(u16);

struct Row {
    name: &'static str,
    kernel: Kernel,
    element: Element,
    access: Access,
    /// The `.cu` file.
    stem: &'static str,
}

impl Entry {
    pub const COUNT: usize = TABLE.len();

    /// The kernel for x of `element`; combine kernels exist once for every accumulation dtype.
    pub fn new(kernel: Kernel, element: Element, access: Access) -> Option<Self> {
        use Kernel::*;
        let element = match kernel {
            CombineMoments | CombineSums | ReduceParams | MoveRunning if element != Element::F64 => {
                Element::F32
            }
            _ => element,
        };
        let fits = |row: &Row| row.kernel == kernel && row.element == element && row.access == access;
        TABLE.iter().position(fits).map(|at| Entry(at as u16))
    }

    pub fn all() -> impl Iterator<Item = Entry> {
        (0..Self::COUNT as u16).map(Entry)
    }

    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The `extern "C"` name.
    pub fn name(self) -> &'static str {
        TABLE[self.index()].name
    }
}

/// Rows of the table: `file: kernel name accesses..`, for each element of the file.
macro_rules! table {
    ($($file:literal [$($suffix:literal $element:ident)*] { $($kernel:ident $name:literal $access:tt)* })*) => {
        const TABLE: &[Row] = table!(@ [] $($file [$($suffix $element)*] { $($kernel $name $access)* })*);
    };
    (@ [$($done:tt)*]) => { &[$($done)*] };
    (@ [$($done:tt)*] $file:literal [] { $($kernels:tt)* } $($rest:tt)*) => {
        table!(@ [$($done)*] $($rest)*)
    };
    (@ [$($done:tt)*] $file:literal [$suffix:literal $element:ident $($more:tt)*]
        { $($kernel:ident $name:literal $access:tt)* } $($rest:tt)*) => {
        table!(@ [$($done)* $(table!(row $file $suffix $element $kernel $name $access),)*]
            $file [$($more)*] { $($kernel $name $access)* } $($rest)*)
    };
    (row $file:literal $suffix:literal $element:ident $kernel:ident $name:literal vector) => {
        table!(row $file $suffix $element $kernel $name "" Vector)
    };
    (row $file:literal $suffix:literal $element:ident $kernel:ident $name:literal half) => {
        table!(row $file $suffix $element $kernel $name "_half" HalfVector)
    };
    (row $file:literal $suffix:literal $element:ident $kernel:ident $name:literal scalar) => {
        table!(row $file $suffix $element $kernel $name "_scalar" Scalar)
    };
    (row $file:literal $suffix:literal $element:ident $kernel:ident $name:literal $tail:literal $access:ident) => {
        Row { name: concat!("norm_", $name, "_", $suffix, $tail), kernel: Kernel::$kernel,
            element: Element::$element, access: Access::$access,
            stem: concat!($file, "_", $suffix) }
    };
}

table! {
    "rows" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        ForwardHeld "forward_held" vector
        ForwardHeld "forward_held" scalar
        BackwardRows "backward_rows" vector
        BackwardRows "backward_rows" scalar
        BackwardSets "backward_sets" vector
        BackwardSets "backward_sets" scalar
    }
    "rows" ["f16" F16 "bf16" BF16] {
        ForwardHeld "forward_held" half
        ForwardKept "forward_kept" half
        ForwardSeveral "forward_several" half
        BackwardRows "backward_rows" half
        BackwardSets "backward_sets" half
    }
    "rows" ["f32" F32 "f16" F16 "bf16" BF16] {
        ForwardKept "forward_kept" vector
        ForwardKept "forward_kept" scalar
        ForwardSeveral "forward_several" vector
        BackwardPlain "backward_plain" scalar
    }
    "rows" ["f16" F16 "bf16" BF16] {
        BackwardPlainWide "backward_plain_wide" vector
    }
    "cluster" ["f32" F32 "f16" F16 "bf16" BF16] {
        ForwardKeptCluster "forward_kept_cluster" vector
        ForwardCluster "forward_cluster" vector
        ForwardCluster "forward_cluster" scalar
        BackwardRowsCluster "backward_rows_cluster" vector
        BackwardSetsCluster "backward_sets_cluster" vector
        BackwardSetsCluster "backward_sets_cluster" scalar
    }
    "cluster" ["f16" F16 "bf16" BF16] {
        ForwardCluster "forward_cluster" half
        ForwardKeptCluster "forward_kept_cluster" half
        BackwardSetsCluster "backward_sets_cluster" half
        BackwardPlainCluster "backward_plain_cluster" vector
    }
    "gated" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        GatedForward "gated_forward" vector
        GatedForward "gated_forward" scalar
        GatedBackward "gated_backward" vector
        GatedBackward "gated_backward" scalar
    }
    "split" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        SplitMoments "split_moments" vector
        SplitMoments "split_moments" scalar
        SplitForward "split_forward" vector
        SplitForward "split_forward" scalar
        SplitSums "split_sums" vector
        SplitSums "split_sums" scalar
        SplitColumnSums "split_column_sums" vector
        SplitColumnSums "split_column_sums" scalar
        SplitBackward "split_backward" vector
        SplitBackward "split_backward" scalar
    }
    "split" ["f16" F16 "bf16" BF16] {
        SplitMoments "split_moments" half
        SplitForward "split_forward" half
        SplitSums "split_sums" half
        SplitBackward "split_backward" half
    }
    "columns" ["f32" F32 "f64" F64] {
        ColumnMoments "column_moments" vector
        ColumnForward "column_forward" vector
        ColumnSums "column_sums" vector
        ColumnBackward "column_backward" vector
    }
    "columns" ["f16" F16 "bf16" BF16] {
        ColumnMoments "column_moments" half
        ColumnForward "column_forward" half
        ColumnSums "column_sums" half
        ColumnBackward "column_backward" half
    }
    "columns" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        ColumnMoments "column_moments" scalar
        ColumnForward "column_forward" scalar
        ColumnSums "column_sums" scalar
        ColumnBackward "column_backward" scalar
    }
    "combine" ["f32" F32 "f64" F64] {
        CombineMoments "combine_moments" vector
        CombineSums "combine_sums" vector
        ReduceParams "reduce_params" vector
        MoveRunning "move_running" vector
    }
}
