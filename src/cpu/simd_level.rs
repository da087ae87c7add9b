//! SIMD levels: which exist, and which one runs.
//!
//! Loops are written once, generic over the vectors of `vector/`; `loops/` compiles them for every level, and
//! a `Level` chooses between them.

#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Simd};
use candle_core::{bail, Result};
use std::sync::OnceLock;

/// A set of vector instructions this machine has: the field is private, so that a value proves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level(Instructions);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instructions {
    /// What the target guarantees: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The widest level here, or the one that `CANDLE_NORM_SIMD` names. Read once.
    ///
    /// # Errors
    /// The variable names a level that does not exist or that this machine lacks.
    pub fn current() -> Result<Level> {
        static CURRENT: OnceLock<std::result::Result<Level, String>> = OnceLock::new();
        let current = CURRENT.get_or_init(|| match std::env::var("CANDLE_NORM_SIMD") {
            Ok(name) if !name.is_empty() => Level::named(&name),
            _ => Ok(Level::available()[0]),
        });
        match current {
            Ok(level) => Ok(*level),
            Err(message) => bail!("{message}"),
        }
    }

    pub fn named(name: &str) -> std::result::Result<Level, String> {
        if !["scalar", "avx2", "avx512"].contains(&name) {
            return Err(format!("CANDLE_NORM_SIMD is {name:?}, expected scalar, avx2 or avx512"));
        }
        match Level::available().into_iter().find(|l| l.name() == name) {
            Some(level) => Ok(level),
            None => Err(format!("CANDLE_NORM_SIMD is {name:?}, which this machine does not have")),
        }
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            Instructions::Baseline => "scalar",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => "avx512",
        }
    }

    /// Every level of this machine, widest first.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                levels.push(Level(Instructions::Avx512));
            }
            if avx2 {
                levels.push(Level(Instructions::Avx2));
            }
        }
        levels.push(Level(Instructions::Baseline));
        levels
    }

    /// Whether it finishes in registers.
    pub fn finishes_in_registers(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.choose([
            Portable::FINISHES_IN_REGISTERS,
            Avx2::FINISHES_IN_REGISTERS,
            Avx512::FINISHES_IN_REGISTERS,
        ]);
        #[cfg(not(target_arch = "x86_64"))]
        Portable::FINISHES_IN_REGISTERS
    }

    /// This level's of three.
    #[cfg(target_arch = "x86_64")]
    pub fn choose<T>(self, [baseline, avx2, avx512]: [T; 3]) -> T {
        match self.0 {
            Instructions::Baseline => baseline,
            Instructions::Avx2 => avx2,
            Instructions::Avx512 => avx512,
        }
    }
}
