//! The inner loops, compiled once for every level and every type that is walked.
//!
//! A loop is written once, generic over vectors (`sums`, `columns`, `maps`, `finish`, `fused`); the macro below makes of each a
//! function with a level's target features, and a table of pointers to them. Everything above calls through
//! the table and is compiled once a type, for the baseline. Apart, because here each instruction counts:
//! sums have several chains, so that the processor need not wait for one addition before the next; every
//! second addition is a multiplication by one and addition, which other units of the processor do; rests of
//! less than a vector are masked. And because entering a level's function is the unsafe step.
//!
//! None takes a closure: a closure may be compiled apart, for the baseline.
#![allow(unsafe_code)]

mod columns;
mod finish;
mod fused;
mod maps;
mod sums;

use super::element::{Element, Float, V};
use super::moments::Stat;
use super::simd_level::Level;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Simd, Vector};
use super::view::{Strided, To};
use crate::fusion::Activation;
use half::{bf16, f16};

pub(super) use finish::{Behind, Line};

/// A table of loops: their names, bodies and arguments, and the constructors of the levels' tables.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident<T: $bound:ident> {
        $($(#[$what:meta])* $name:ident = $file:ident::$body:ident, ($($arg:ident: $type:ty),*) $(-> $return:ty)?;)*
    }) => {
        $(#[$doc])*
        pub(super) struct $table<T: $bound> {
            /// Elements of a vector.
            #[allow(dead_code)] // by the tables over scratch
            pub width: usize,
            #[cfg(test)]
            pub level: &'static str,
            $($name: unsafe fn($($type),*) $(-> $return)?,)*
        }

        impl<T: $bound> $table<T> {
            $($(#[$what])*
            #[inline(always)]
            pub fn $name(&self, $($arg: $type),*) $(-> $return)? {
                #[cfg(test)]
                super::tests::ran::note::<T>(self.level, stringify!($name));
                // SAFETY: a table is had for a level alone, which exists only where its instructions do.
                unsafe { (self.$name)($($arg),*) }
            })*

            #[cfg(test)]
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];

            const BASELINE: Self = {
                $(fn $name<T: $bound>($($arg: $type),*) $(-> $return)? {
                    $file::$body::<_, T>(Portable, $($arg),*)
                })*
                table!(@of "scalar", Portable, $($name)*)
            };

            #[cfg(target_arch = "x86_64")]
            const AVX2: Self = {
                $(#[target_feature(enable = "avx2,fma,f16c")]
                fn $name<T: $bound>($($arg: $type),*) $(-> $return)? {
                    // SAFETY: this function has the features.
                    $file::$body::<_, T>(unsafe { Avx2::new() }, $($arg),*)
                })*
                table!(@of "avx2", Avx2, $($name)*)
            };

            #[cfg(target_arch = "x86_64")]
            const AVX512: Self = {
                $(#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn $name<T: $bound>($($arg: $type),*) $(-> $return)? {
                    // SAFETY: this function has the features.
                    $file::$body::<_, T>(unsafe { Avx512::new() }, $($arg),*)
                })*
                table!(@of "avx512", Avx512, $($name)*)
            };

            #[cfg(target_arch = "x86_64")]
            pub fn of(level: Level) -> &'static Self {
                // AVX2's at AVX-512, too: f64 is not worth more code.
                if const { size_of::<T::Acc>() > size_of::<f32>() } {
                    return level.choose([&Self::BASELINE, &Self::AVX2, &Self::AVX2]);
                }
                level.choose([&Self::BASELINE, &Self::AVX2, &Self::AVX512])
            }

            #[cfg(not(target_arch = "x86_64"))]
            pub fn of(_: Level) -> &'static Self {
                &Self::BASELINE
            }
        }
    };
    (@of $level:literal, $simd:ident, $($name:ident)*) => {
        Self {
            width: width::<$simd, T>(),
            #[cfg(test)]
            level: $level,
            $($name: $name::<T>),*
        }
    };
}

const fn width<S: Simd, T: Element>() -> usize {
    <V<S, T> as Vector<S, T::Acc>>::W
}

table! {
    /// Loops over elements of a type that kernels walk.
    Loops<T: Element> {
        /// Mean of a block, as an offset from `pivot` where it is centred, and the squared distances from it.
        moments = sums::moments, (x: Strided<T>, pivot: Option<T::Acc>) -> (Stat<T::Acc>, T::Acc);
        /// Statistics of every row, which is short.
        short_moments = sums::short_moments, (x: Strided<T>, center: bool, stats: &mut [Stat<T::Acc>]);
        /// Adds to the lanes of every run of the rows `x - base`, or its square.
        run_sums = sums::run_sums,
            (x: Strided<T>, run: usize, base: &[T::Acc], squares: bool, lanes: &mut [T::Acc]);
        /// The sums of lanes.
        fold = sums::fold, (lanes: &[T::Acc], sums: &mut [T::Acc]);
        /// Sums of `g = dy * weight` and `g * (x - high)` of a block, with weights by column.
        dots = sums::dots,
            (x: Strided<T>, dy: Strided<T>, weight: Option<&[T::Acc]>, high: T::Acc) -> [T::Acc; 2];
        /// The same of every row, which is short.
        short_dots = sums::short_dots,
            (x: Strided<T>, dy: Strided<T>, weight: &[T::Acc], high: &[T::Acc], sums: &mut [[T::Acc; 2]]);
        /// Adds `dy` and `dy * (x - high)` to the lanes of every span of the rows.
        span_dots = sums::span_dots,
            (x: Strided<T>, dy: Strided<T>, span: usize, high: &[T::Acc], g: &mut [T::Acc], gx: &mut [T::Acc]);
        /// Adds `dy * xhat` and `dy` of every row to the sums of its columns; `[high, low, rstd]` of each row.
        add_columns = sums::add_columns,
            (x: Strided<T>, dy: Strided<T>, stats: &[[T::Acc; 3]], dw: &mut [T::Acc], db: &mut [T::Acc]);
        /// Adds them to the row's own sums; `[high, low, rstd]` of each column.
        add_rows = sums::add_rows,
            (x: Strided<T>, dy: Strided<T>, stats: [&[T::Acc]; 3], dw: &mut [T::Acc], db: &mut [T::Acc]);
        /// Moments of every column about its pivot: offsets of the means, and squared distances from them.
        column_moments = columns::moments,
            (x: Strided<T>, pivot: Option<&[T::Acc]>, offset: &mut [f64], m2: &mut [f64]);
        /// Adds `g = dy * weight` and `g * (x - high)` to every column's sums, with weights by row.
        column_dots = columns::dots,
            (x: Strided<T>, dy: Strided<T>, weight: Option<&[T::Acc]>, high: &[T::Acc], g: &mut [f64], gx: &mut [f64]);
        /// `y = (x - high) * scale + bias` by spans of `span` columns: `[high, scale, bias]` of every span of a row,
        /// or of every span of every row.
        scale_spans = maps::scale_spans,
            (x: Strided<T>, y: To<T>, span: usize, constants: &[[T::Acc; 3]], ahead: usize);
        /// `y = ((x - high) * rstd + shift) * weight + bias` by columns: `[high, rstd, shift]` of all rows, or of
        /// every row. `parted`: weight and bias lie as `part` leaves them.
        scale_columns = maps::scale_columns,
            (x: Strided<T>, y: To<T>, weight: &[T::Acc], bias: Option<&[T::Acc]>, parted: bool,
             constants: &[[T::Acc; 3]], ahead: usize);
        /// Adds to `y` what belongs to columns, in the order of the elements of pairs; nothing where that is their own.
        part = maps::part, (x: &[T::Acc], y: &mut Vec<T::Acc>);
        /// `y = (x - high) * scale + bias`, `[high, scale, bias]` of every column; then that times the row's
        /// weight, plus its bias.
        scale_each = maps::scale_each,
            (x: Strided<T>, y: To<T>, constants: [&[T::Acc]; 3], rows: Option<[&[T::Acc]; 2]>);
        /// `dx = dy * weight + ((x - high) * x_scale + shift)` by spans: `[high, x_scale, shift, weight]` as above.
        gradient_spans = maps::gradient_spans,
            (x: Strided<T>, dy: Strided<T>, dx: To<T>, span: usize, constants: &[[T::Acc; 4]], ahead: usize);
        /// `dx = dy * rstd * weight + ((x - high) * x_scale + shift)` by columns:
        /// `[high, x_scale, shift, rstd]` of all rows, or of every row. `parted`: as above.
        gradient_columns = maps::gradient_columns,
            (x: Strided<T>, dy: Strided<T>, dx: To<T>, weight: &[T::Acc], parted: bool,
             constants: &[[T::Acc; 4]], ahead: usize);
        /// `dx = dy * weight * scale + ((x - high) * x_scale + shift)`: `[high, x_scale, shift, scale]` of every
        /// column, weights by row.
        gradient_each = maps::gradient_each,
            (x: Strided<T>, dy: Strided<T>, dx: To<T>, constants: [&[T::Acc]; 4], weight: Option<&[T::Acc]>);
    }
}

table! {
    /// Loops from the accumulation type to a tensor's, or back.
    Conversions<T: Element> {
        /// Rows widened, one behind the other.
        widen = maps::widen, (x: Strided<T>, y: &mut [T::Acc]);
        /// `x * silu(gate)`, rows one behind the other.
        gated = maps::gated, (x: Strided<T>, gate: Strided<T>, y: &mut [T::Acc]);
        /// Rows rounded.
        narrow = maps::narrow, (x: Strided<T::Acc>, y: To<T>);
        /// What stands behind a norm, done to z, and rounded to y.
        finish = finish::finish, (z: Strided<T::Acc>, y: To<T>, behind: Behind<Strided<T>>);
        /// `x + b`, rounded.
        add = maps::add, (x: Strided<T>, b: Strided<T>, y: To<T>);
    }
}

table! {
    /// Loops from what is walked to a tensor's type.
    Finishes<T: Stored> {
        /// What stands behind a norm, done to the z that `line` makes of x, and rounded to y.
        finish_line = finish::finish_line,
            (x: Strided<T::WalkedAs>, y: To<T>, line: &Line<T::Acc>, behind: Behind<Strided<T>>);
    }
}

table! {
    /// Loops over scratch, for what stands around a norm; all slices have the same length.
    Fused<T: Float> {
        /// Adds b to z.
        add = fused::add, (z: &mut [T], b: &[T]);
        /// `dy = dy * activation'(z)`.
        slope = fused::slope, (z: &[T], activation: Activation, dy: &mut [T]);
        /// The gradients of `z * silu(gate)`: the gate's in z, that of z in dy.
        gate_gradient = fused::gate_gradient, (z: &mut [T], gate: &[T], dy: &mut [T]);
    }
}

/// A type that kernels walk as it is. f16 is not: it is widened into f32 tile by tile.
pub(super) trait Walked: Element {
    fn loops(level: Level) -> &'static Loops<Self>;
}

/// A type of tensors.
pub(super) trait Stored: Element<Acc: Wide> {
    /// What it is walked as.
    type WalkedAs: Walked<Acc = Self::Acc>;
}

/// A type that sums are made in, and scratch is of.
pub(super) trait Wide: Float + Walked {
    fn fused(level: Level) -> &'static Fused<Self>;
}

macro_rules! loops_of {
    ($t:ty) => {
        impl Walked for $t {
            fn loops(level: Level) -> &'static Loops<$t> {
                Loops::of(level)
            }
        }
        impl Stored for $t {
            type WalkedAs = $t;
        }
    };
    ($t:ty, wide) => {
        loops_of!($t);
        impl Wide for $t {
            fn fused(level: Level) -> &'static Fused<$t> {
                Fused::of(level)
            }
        }
    };
}

loops_of!(f32, wide);
loops_of!(f64, wide);
loops_of!(bf16);

impl Stored for f16 {
    type WalkedAs = f32;
}

/// `$body` for every vector of `$range`: `$at`, and `$k` elements of it that exist, at most `$w`.
macro_rules! each_vector {
    ($w:expr, $range:expr, |$at:ident, $k:ident| $body:block) => {{
        let (w, range) = ($w, $range);
        let (mut $at, n) = (range.start, range.end);
        while $at + w <= n {
            {
                let $k = w;
                $body
            }
            $at += w;
        }
        if $at < n {
            let $k = n - $at;
            $body
        }
    }};
}
use each_vector;

/// `$body` for every strip of a row: `$to`, and its columns there (`Strips::strip`).
macro_rules! each_strip {
    ($s:expr, $strips:expr, |$to:ident, $strip:ident| $body:block) => {
        loop {
            let ($to, $strip) = $strips.strip();
            $body
            if $strips.done($s) {
                break;
            }
        }
    };
}
use each_strip;

/// `$body` for every span of `$n` columns, or part of one, in `$range`: `$i`, and its columns there.
macro_rules! each_span {
    ($range:expr, $n:expr, |$i:ident, $part:ident| $body:block) => {{
        let (range, n) = ($range, $n);
        let (mut at, mut $i) = (range.start, range.start / n);
        while at < range.end {
            let $part = at..range.end.min(($i + 1) * n);
            at = $part.end;
            $body
            $i += 1;
        }
    }};
}
use each_span;

/// `$two` for pairs of vectors of `$range`, from `$pair` on; `$one` for what is left, a vector and the rest of
/// one.
macro_rules! pairwise {
    ($w:expr, $range:expr, |$pair:ident| $two:block, |$at:ident, $k:ident| $one:block) => {{
        let (w, range) = ($w, $range);
        let (mut $pair, n) = (range.start, range.end);
        while $pair + 2 * w <= n {
            $two
            $pair += 2 * w;
        }
        let mut $at = $pair;
        while $at < n {
            let $k = w.min(n - $at);
            $one
            $at += $k;
        }
    }};
}
use pairwise;

/// `k <= W` elements of a vector; zero in the other lanes.
///
/// # Safety
/// They may be read.
#[inline(always)]
unsafe fn get<S: Simd, T: Element>(s: S, p: *const T, k: usize) -> V<S, T> {
    // SAFETY: the caller's.
    unsafe {
        match k == <V<S, T> as Vector<S, T::Acc>>::W {
            true => T::load(s, p),
            false => T::load_part(s, p, k),
        }
    }
}

/// The first `k <= W` lanes.
///
/// # Safety
/// They may be written.
#[inline(always)]
unsafe fn put<S: Simd, T: Element>(v: V<S, T>, p: *mut T, k: usize) {
    // SAFETY: the caller's.
    unsafe {
        match k == <V<S, T> as Vector<S, T::Acc>>::W {
            true => T::store(v, p),
            false => T::store_part(v, p, k),
        }
    }
}
