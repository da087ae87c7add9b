//! The kernels by name: `extern "C"` entry points of `cuda/*.cu`.
//!
//! Apart from the plan that picks them, so that an executor can load a table of all of them.

#[cfg(any(feature = "cuda", test))]
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

/// What a kernel does; each exists for several elements, with 16-byte and with scalar accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Statistics and output of sets held in registers, by 8 to 512 threads a set.
    ForwardRegisters,
    /// The same, the set in shared memory.
    ForwardShared,
    /// The same over a cluster of 2, 4, 8 blocks.
    ForwardCluster2,
    ForwardCluster4,
    ForwardCluster8,
    /// A cluster of 8, the set in the shared memory of its blocks.
    ForwardClusterShared,
    BackwardRegisters,
    BackwardShared,
    BackwardCluster2,
    BackwardCluster4,
    BackwardCluster8,
    BackwardClusterShared,
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

/// An entry point: its place in `TABLE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry(u16);

struct Row {
    name: &'static str,
    kernel: Kernel,
    element: Element,
    /// 16-byte accesses.
    vector: bool,
    /// The `.cu` file.
    #[cfg(any(feature = "cuda", test))]
    stem: &'static str,
}

impl Entry {
    pub const COUNT: usize = TABLE.len();

    /// The kernel for x of `element`; combine kernels exist once for every accumulation dtype.
    pub fn new(kernel: Kernel, element: Element, vector: bool) -> Option<Self> {
        use Kernel::*;
        let element = match kernel {
            CombineMoments | CombineSums | ReduceParams | MoveRunning if element != Element::F64 => {
                Element::F32
            }
            _ => element,
        };
        let fits = |row: &Row| row.kernel == kernel && row.element == element && row.vector == vector;
        TABLE.iter().position(fits).map(|at| Entry(at as u16))
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
        Row { name: concat!("norm_", $name, "_", $suffix), kernel: Kernel::$kernel,
            element: Element::$element, vector: true,
            #[cfg(any(feature = "cuda", test))] stem: concat!($file, "_", $suffix) }
    };
    (row $file:literal $suffix:literal $element:ident $kernel:ident $name:literal scalar) => {
        Row { name: concat!("norm_", $name, "_", $suffix, "_scalar"), kernel: Kernel::$kernel,
            element: Element::$element, vector: false,
            #[cfg(any(feature = "cuda", test))] stem: concat!($file, "_", $suffix) }
    };
}

table! {
    "rows" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        ForwardRegisters "forward_registers" vector
        ForwardRegisters "forward_registers" scalar
        ForwardShared "forward_shared" vector
        ForwardShared "forward_shared" scalar
        BackwardRegisters "backward_registers" vector
        BackwardRegisters "backward_registers" scalar
        BackwardShared "backward_shared" vector
        BackwardShared "backward_shared" scalar
    }
    "cluster" ["f32" F32 "f16" F16 "bf16" BF16] {
        ForwardCluster2 "forward_cluster2" vector
        ForwardCluster4 "forward_cluster4" vector
        ForwardCluster8 "forward_cluster8" vector
        ForwardClusterShared "forward_cluster_shared" vector
        ForwardClusterShared "forward_cluster_shared" scalar
        BackwardCluster2 "backward_cluster2" vector
        BackwardCluster4 "backward_cluster4" vector
        BackwardCluster8 "backward_cluster8" vector
        BackwardClusterShared "backward_cluster_shared" vector
        BackwardClusterShared "backward_cluster_shared" scalar
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
    "columns" ["f32" F32 "f16" F16 "bf16" BF16 "f64" F64] {
        ColumnMoments "column_moments" vector
        ColumnMoments "column_moments" scalar
        ColumnForward "column_forward" vector
        ColumnForward "column_forward" scalar
        ColumnSums "column_sums" vector
        ColumnSums "column_sums" scalar
        ColumnBackward "column_backward" vector
        ColumnBackward "column_backward" scalar
    }
    "combine" ["f32" F32 "f64" F64] {
        CombineMoments "combine_moments" vector
        CombineSums "combine_sums" vector
        ReduceParams "reduce_params" vector
        MoveRunning "move_running" vector
    }
}
