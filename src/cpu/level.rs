//! SIMD levels: which exist, which one runs, and the one door from generic code into each.
//!
//! Kernels are written once in safe Rust, generic over the vectors of `vector/`; `Level::run` compiles them
//! for every level by inlining them into a function with that level's target features. Apart, because entering
//! such a function is the only unsafe step.
#![allow(unsafe_code)]

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

/// A piece of work, generic over the vectors it is done with.
pub(super) trait Kernel {
    type Output;

    /// `#[inline(always)]`, like all it calls: else it would be compiled for the baseline alone.
    fn run<S: Simd>(self) -> Self::Output;
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

    /// Runs `kernel` compiled for this level.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Instructions::Baseline => kernel.run::<Portable>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` alone makes this value, after detecting the features below.
            Instructions::Avx2 => unsafe { avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` alone makes this value, after detecting the features below.
            Instructions::Avx512 => unsafe { avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}
