//! The modules that have the kernels: what a CUDA device loads before it launches one.
//!
//! Apart, because the emulation has all kernels linked in and loads nothing.

use super::{Entry, TABLE};

macro_rules! stems {
    ($($stem:literal)*) => {
        /// Every `.cu` file.
        const STEMS: &[&str] = &[$($stem),*];
    };
}

stems! {
    "rows_f32" "rows_f16" "rows_bf16" "rows_f64"
    "cluster_f32" "cluster_f16" "cluster_bf16"
    "gated_f32" "gated_f16" "gated_bf16" "gated_f64"
    "split_f32" "split_f16" "split_bf16" "split_f64"
    "columns_f32" "columns_f16" "columns_bf16" "columns_f64"
    "combine_f32" "combine_f64"
}

/// Where a stem stands.
const fn place(stem: &str) -> u8 {
    let mut place = 0;
    while place < STEMS.len() {
        let (listed, stem) = (STEMS[place].as_bytes(), stem.as_bytes());
        let mut same = 0;
        while same < stem.len() && same < listed.len() && stem[same] == listed[same] {
            same += 1;
        }
        if same == stem.len() && same == listed.len() {
            return place as u8;
        }
        place += 1;
    }
    panic!("a kernel of a file that is not listed")
}

// At compile time: no call can meet a file that is not listed.
const _: () = {
    let mut row = 0;
    while row < TABLE.len() {
        place(TABLE[row].stem);
        row += 1;
    }
};

/// A `.cu` file, and so a PTX module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Module(u8);

impl Module {
    pub const COUNT: usize = STEMS.len();

    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// Name of the file in `cuda/` without `.cu`.
    pub fn stem(self) -> &'static str {
        STEMS[self.index()]
    }

    /// Compute capability (major * 10 + minor) that the module's kernels need to do anything.
    /// Modules above the base compile to nothing below it, and must not be loaded there.
    pub fn needs_capability(self) -> u32 {
        if self.stem().starts_with("cluster") {
            90
        } else {
            0
        }
    }
}

impl Entry {
    #[cfg(any(feature = "cuda-emulation", test))]
    pub fn kernel(self) -> super::Kernel {
        TABLE[self.index()].kernel
    }

    #[cfg(all(test, feature = "cuda-emulation"))]
    pub fn access(self) -> super::Access {
        TABLE[self.index()].access
    }

    #[cfg(feature = "cuda-emulation")]
    pub fn element(self) -> super::Element {
        TABLE[self.index()].element
    }

    pub fn module(self) -> Module {
        Module(place(TABLE[self.index()].stem))
    }

    /// Whether the module has to raise the kernel's limit of dynamic shared memory: for kernels that hold
    /// whole sets there.
    pub fn needs_shared_opt_in(self) -> bool {
        self.module().stem().starts_with("rows") || self.module().stem().starts_with("cluster")
    }
}
