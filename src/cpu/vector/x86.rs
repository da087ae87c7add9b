//! AVX2 and AVX-512 vectors.
//!
//! Apart, because intrinsics take unsafe code. Every `unsafe` below relies on one of two facts: a vector is
//! made from a level's value, which exists only where the machine has the level's instructions; and loads and
//! stores touch no more than the elements that their caller answers for.
#![allow(unsafe_code)]

use super::{Convert, Functions, Simd, Vector};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::ops::{Add, Mul, Sub};

macro_rules! level {
    ($(#[$doc:meta])* $name:ident, $f32:ident, $f64:ident, $stream:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(in crate::cpu) struct $name(());

        impl $name {
            /// # Safety
            /// The machine has these instructions.
            #[inline(always)]
            pub unsafe fn new() -> Self {
                $name(())
            }
        }

        impl Simd for $name {
            type F32 = $f32;
            type F64 = $f64;

            const FINISHES_IN_REGISTERS: bool = true;
            const FMA: bool = true;
            const STREAMS: bool = true;

            #[inline(always)]
            fn prefetch<T>(self, p: *const T) {
                // SAFETY: a hint, which is no access.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
            }

            #[inline(always)]
            unsafe fn stream(self, from: *const u8, to: *mut u8, bytes: usize) {
                // SAFETY: the caller's; the level's value proves it.
                unsafe { $stream(from, to, bytes) }
            }
        }
    };
}

level! { /** AVX2, FMA and F16C. */ Avx2, F32x8, F64x4, stream256 }
level! { /** AVX-512 F, BW, DQ and VL; f64 is left to AVX2. */ Avx512, F32x16, F64x4, stream512 }

/// A copy past the caches, in whole lines as `$line` writes them; what is before the first and behind the last in pieces
/// of 16 bytes, as allocators align.
macro_rules! stream {
    ($name:ident, $features:literal, |$from:ident, $to:ident| $line:block) => {
        /// # Safety
        /// The machine has the instructions; there are as many bytes to be read, and to be written from an address on
        /// that is a multiple of 16.
        #[cold] // beside loops, which keep their registers for themselves
        #[target_feature(enable = $features)]
        unsafe fn $name(from: *const u8, to: *mut u8, bytes: usize) {
            let before = to.align_offset(64).min(bytes) / 16 * 16;
            let lines = (bytes - before) / 64 * 64;
            // SAFETY: the caller's, for as many bytes.
            unsafe {
                pieces(from, to, before);
                let (from, to) = (from.add(before), to.add(before));
                for at in (0..lines).step_by(64) {
                    let ($from, $to) = (from.add(at), to.add(at));
                    $line
                }
                pieces(from.add(lines), to.add(lines), bytes - before - lines);
            }
        }
    };
}

/// As above, of less than a line.
///
/// # Safety
/// As above.
unsafe fn pieces(from: *const u8, to: *mut u8, bytes: usize) {
    let whole = bytes / 16 * 16;
    // SAFETY: the caller's, for as many bytes; the stores are part of the baseline.
    unsafe {
        for at in (0..whole).step_by(16) {
            _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast()));
        }
        from.add(whole).copy_to_nonoverlapping(to.add(whole), bytes - whole);
    }
}

stream! { stream512, "avx512f", |from, to| { _mm512_stream_si512(to.cast(), _mm512_loadu_si512(from.cast())) } }
stream! { stream256, "avx2", |from, to| {
    _mm256_stream_si256(to.cast(), _mm256_loadu_si256(from.cast()));
    _mm256_stream_si256(to.add(32).cast(), _mm256_loadu_si256(from.add(32).cast()))
} }

/// A vector type and the arithmetic that has one instruction an operation.
macro_rules! vector {
    ($name:ident, $raw:ty, $a:ty, $w:literal, $level:ident, $set:ident, $add:ident, $sub:ident, $mul:ident,
     $fma:ident, |$s:ident| $sum:expr, |$k:ident, $n:ident| $keep:expr) => {
        #[derive(Clone, Copy)]
        pub(in crate::cpu) struct $name($raw);

        vector!(@operator $name, Add, add, $add);
        vector!(@operator $name, Sub, sub, $sub);
        vector!(@operator $name, Mul, mul, $mul);

        impl<S: $level> Vector<S, $a> for $name {
            const W: usize = $w;

            #[inline(always)]
            fn splat(_: S, x: $a) -> Self {
                // SAFETY: the level's value proves it.
                $name(unsafe { $set(x) })
            }

            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                // SAFETY: a vector proves its level.
                $name(unsafe { $fma(self.0, b.0, c.0) })
            }

            #[inline(always)]
            fn sum(self) -> $a {
                let $s = self.0;
                // SAFETY: a vector proves its level.
                unsafe { $sum }
            }

            #[inline(always)]
            fn keep(self, $n: usize) -> Self {
                let $k = self.0;
                // SAFETY: a vector proves its level.
                $name(unsafe { $keep })
            }
        }
    };
    (@operator $name:ident, $trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for $name {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: a vector proves its level.
                $name(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    };
}

/// Levels with 256-bit vectors.
pub(in crate::cpu) trait Has256: Simd {}
/// Levels with 512-bit vectors.
pub(in crate::cpu) trait Has512: Simd {}
impl Has256 for Avx2 {}
impl Has256 for Avx512 {}
impl Has512 for Avx512 {}

vector! { F32x16, __m512, f32, 16, Has512, _mm512_set1_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps,
_mm512_fmadd_ps,
|s| sum8(_mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps::<1>(s))),
|k, n| _mm512_maskz_mov_ps(first(n) as u16, k) }
vector! { F32x8, __m256, f32, 8, Has256, _mm256_set1_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps,
_mm256_fmadd_ps,
|s| sum8(s),
|k, n| _mm256_and_ps(k, _mm256_castsi256_ps(first8(n))) }
vector! { F64x4, __m256d, f64, 4, Has256, _mm256_set1_pd, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd,
_mm256_fmadd_pd,
|s| sum4(s),
|k, n| _mm256_and_pd(k, _mm256_castsi256_pd(first4(n))) }

macro_rules! functions {
    ($name:ident, $level:ident, $div:ident, $min:ident, |$a:ident, $b:ident, $yes:ident, $no:ident| $le:expr,
     |$c:ident, $d:ident| $above:expr, |$n:ident| $exponent:expr) => {
        impl<S: $level> Functions<S> for $name {
            #[inline(always)]
            fn div(self, b: Self) -> Self {
                // SAFETY: a vector proves its level, here and below.
                $name(unsafe { $div(self.0, b.0) })
            }

            #[inline(always)]
            fn le(self, b: Self, yes: Self, no: Self) -> Self {
                let ($a, $b, $yes, $no) = (self.0, b.0, yes.0, no.0);
                // SAFETY: as above.
                $name(unsafe { $le })
            }

            #[inline(always)]
            fn min(self, b: Self) -> Self {
                // SAFETY: as above.
                $name(unsafe { $min(self.0, b.0) })
            }

            #[inline(always)]
            fn above(self, b: Self) -> bool {
                let ($c, $d) = (self.0, b.0);
                // SAFETY: as above.
                unsafe { $above }
            }

            #[inline(always)]
            fn exponent(self) -> Self {
                let $n = self.0;
                // SAFETY: as above.
                $name(unsafe { $exponent })
            }
        }
    };
}

functions! { F32x16, Has512, _mm512_div_ps, _mm512_min_ps,
|a, b, yes, no| _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b), no, yes),
|a, b| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) == 0xffff,
|n| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(n))) }
functions! { F32x8, Has256, _mm256_div_ps, _mm256_min_ps,
|a, b, yes, no| _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LE_OQ>(a, b)),
|a, b| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) == 0xff,
|n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(n))) }

/// A mask of the first `n < 32` lanes.
#[inline(always)]
fn first(n: usize) -> u32 {
    (1 << n) - 1
}

/// Functions that a level's instructions make, and that are inlined where it has them.
macro_rules! helpers {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $return:ty)? $body:block)*) => {
        $($(#[$doc])*
        ///
        /// # Safety
        /// The machine has the instructions; there is room at pointers, aligned to 16 bytes.
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) $(-> $return)? {
            // SAFETY: the caller's.
            unsafe { $body }
        })*
    };
}

helpers! {
    /// All bits of the first `n` of 8 lanes.
    fn first8(n: usize) -> __m256i { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }

    /// All bits of the first `n` of 4 lanes.
    fn first4(n: usize) -> __m256i { _mm256_cmpgt_epi64(_mm256_set1_epi64x(n as i64), _mm256_setr_epi64x(0, 1, 2, 3)) }

    fn sum8(s: __m256) -> f32 {
        let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
        let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
    }

    fn sum4(s: __m256d) -> f64 {
        let s = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd::<1>(s));
        _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)))
    }

    fn bf16_wide16(x: __m256i) -> __m512 { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))) }

    fn bf16_wide8(x: __m128i) -> __m256 { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))) }

    fn bf16_parted16(x: __m512i) -> (__m512, __m512) {
        let odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(odd))
    }

    fn bf16_parted8(x: __m256i) -> (__m256, __m256) {
        let odd = _mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)), _mm256_castsi256_ps(odd))
    }

    /// To nearest, ties to even, in the upper halves; NaN stays NaN (`scalar.rs` has the same in scalars). Not
    /// the processor's own conversion, which takes subnormals for zero.
    fn bf16_rounded16(x: __m512) -> __m512i {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000))
    }

    fn bf16_rounded8(x: __m256) -> __m256i {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }

    fn bf16_narrow16(x: __m512) -> __m256i { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bf16_rounded16(x))) }

    fn bf16_narrow8(x: __m256) -> __m128i {
        let high = _mm256_srli_epi32::<16>(bf16_rounded8(x));
        // Packing works within each half of the register.
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high))
    }

    fn bf16_joined16(even: __m512, odd: __m512) -> __m512i {
        let even = _mm512_srli_epi32::<16>(bf16_rounded16(even));
        _mm512_mask_blend_epi16(0xaaaa_aaaa, even, bf16_rounded16(odd))
    }

    fn bf16_joined8(even: __m256, odd: __m256) -> __m256i {
        let even = _mm256_srli_epi32::<16>(bf16_rounded8(even));
        _mm256_blend_epi16::<0xaa>(even, bf16_rounded8(odd))
    }
}

/// Loads and stores of a type: `p` is where, `n` the length of a part, `v` what is stored. A pair is
/// loaded and stored as one: of types whose pairs are halves of a wider register, or two vectors.
macro_rules! convert {
    ($name:ident, $t:ty, $a:ty, $level:ident,
     load |$lp:ident| $load:expr, part |$pp:ident, $pn:ident| $part:expr,
     store |$sp:ident, $sv:ident| $store:expr,
     part |$tp:ident, $tv:ident, $tn:ident| $store_part:expr,
     pairs |$qp:ident| $load_pair:expr, |$rp:ident, $ra:ident, $rb:ident| $store_pair:expr
     $(, parted $parted:literal)?) => {
        impl<S: $level> Convert<S, $t, $a> for $name {
            $(const PARTED: bool = $parted;)?

            #[inline(always)]
            unsafe fn load(_: S, $lp: *const $t) -> Self {
                // SAFETY: the caller's; the level's value proves it.
                $name(unsafe { $load })
            }

            #[inline(always)]
            unsafe fn load_pair(_: S, $qp: *const $t) -> [Self; 2] {
                // SAFETY: the caller's; the level's value proves it.
                let (a, b) = unsafe { $load_pair };
                [$name(a), $name(b)]
            }

            #[inline(always)]
            unsafe fn load_part(_: S, $pp: *const $t, $pn: usize) -> Self {
                // SAFETY: the caller's; the level's value proves it.
                $name(unsafe { $part })
            }

            #[inline(always)]
            unsafe fn store(self, $sp: *mut $t) {
                let $sv = self.0;
                // SAFETY: the caller's; a vector proves its level.
                unsafe { $store }
            }

            #[inline(always)]
            unsafe fn store_pair([a, b]: [Self; 2], $rp: *mut $t) {
                let ($ra, $rb) = (a.0, b.0);
                // SAFETY: the caller's; a vector proves its level.
                unsafe { $store_pair }
            }

            #[inline(always)]
            unsafe fn store_part(self, $tp: *mut $t, $tn: usize) {
                let $tv = self.0;
                // SAFETY: the caller's; a vector proves its level.
                unsafe { $store_part }
            }
        }
    };
}

convert! { F32x16, f32, f32, Has512,
load |p| _mm512_loadu_ps(p), part |p, n| _mm512_maskz_loadu_ps(first(n) as u16, p),
store |p, v| _mm512_storeu_ps(p, v),
part |p, v, n| _mm512_mask_storeu_ps(p, first(n) as u16, v),
pairs |p| (_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))),
|p, a, b| { _mm512_storeu_ps(p, a); _mm512_storeu_ps(p.add(16), b) } }
convert! { F32x8, f32, f32, Has256,
load |p| _mm256_loadu_ps(p), part |p, n| _mm256_maskload_ps(p, first8(n)),
store |p, v| _mm256_storeu_ps(p, v),
part |p, v, n| _mm256_maskstore_ps(p, first8(n), v),
pairs |p| (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))),
|p, a, b| { _mm256_storeu_ps(p, a); _mm256_storeu_ps(p.add(8), b) } }
convert! { F64x4, f64, f64, Has256,
load |p| _mm256_loadu_pd(p), part |p, n| _mm256_maskload_pd(p, first4(n)),
store |p, v| _mm256_storeu_pd(p, v),
part |p, v, n| _mm256_maskstore_pd(p, first4(n), v),
pairs |p| (_mm256_loadu_pd(p), _mm256_loadu_pd(p.add(4))),
|p, a, b| { _mm256_storeu_pd(p, a); _mm256_storeu_pd(p.add(4), b) } }

// Pairs of bf16 vectors are the elements at even places and those at odd ones: a shift and a mask part the
// 32-bit words that have one of each, where neighbours would have to be moved across the register.
convert! { F32x16, bf16, f32, Has512,
load |p| bf16_wide16(_mm256_loadu_si256(p.cast())),
part |p, n| bf16_wide16(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast())),
store |p, v| _mm256_storeu_si256(p.cast(), bf16_narrow16(v)),
part |p, v, n| _mm256_mask_storeu_epi16(p.cast(), first(n) as u16, bf16_narrow16(v)),
pairs |p| bf16_parted16(_mm512_loadu_si512(p.cast())),
|p, a, b| _mm512_storeu_si512(p.cast(), bf16_joined16(a, b)), parted true }
convert! { F32x8, bf16, f32, Has256,
load |p| bf16_wide8(_mm_loadu_si128(p.cast())), part |p, n| bf16_wide8(load16(p.cast(), n)),
store |p, v| _mm_storeu_si128(p.cast(), bf16_narrow8(v)),
part |p, v, n| store16(p.cast(), bf16_narrow8(v), n),
pairs |p| bf16_parted8(_mm256_loadu_si256(p.cast())),
|p, a, b| _mm256_storeu_si256(p.cast(), bf16_joined8(a, b)), parted true }

convert! { F32x16, f16, f32, Has512,
load |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
part |p, n| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast())),
store |p, v| _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v)),
part |p, v, n| _mm256_mask_storeu_epi16(p.cast(), first(n) as u16, _mm512_cvtps_ph::<NEAREST>(v)),
pairs |p| {
    let both = _mm512_loadu_si512(p.cast());
    (_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(both)))
},
|p, a, b| {
    _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(a));
    _mm256_storeu_si256(p.add(16).cast(), _mm512_cvtps_ph::<NEAREST>(b))
} }
convert! { F32x8, f16, f32, Has256,
load |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())), part |p, n| _mm256_cvtph_ps(load16(p.cast(), n)),
store |p, v| _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(v)),
part |p, v, n| store16(p.cast(), _mm256_cvtps_ph::<NEAREST>(v), n),
pairs |p| {
    (_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())))
},
|p, a, b| {
    _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(a));
    _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<NEAREST>(b))
} }

/// Ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

/// The first `n <= 8` of 16-bit elements: AVX2 has no masks for them. In whole words, since a register that is
/// loaded from memory just written in smaller pieces has to wait for them.
///
/// # Safety
/// The machine has the instructions; there are `n` elements.
#[inline(always)]
unsafe fn load16(p: *const u16, n: usize) -> __m128i {
    let (mut low, mut high) = (0, 0);
    // SAFETY: the caller's.
    unsafe {
        if n >= 4 {
            low = p.cast::<u64>().read_unaligned();
            if n > 4 {
                // The last four, without those that `low` has.
                high = p.add(n - 4).cast::<u64>().read_unaligned() >> (16 * (8 - n));
            }
        } else {
            if n >= 2 {
                low = u64::from(p.cast::<u32>().read_unaligned());
            }
            if n % 2 == 1 {
                low |= u64::from(*p.add(n - 1)) << (16 * (n - 1));
            }
        }
        _mm_set_epi64x(high as i64, low as i64)
    }
}

/// # Safety
/// There is room for `n <= 8` elements.
#[inline(always)]
unsafe fn store16(p: *mut u16, x: __m128i, n: usize) {
    // SAFETY: the caller's; an integer is as large as the register, without invalid values.
    unsafe {
        let x: u128 = std::mem::transmute(x);
        if n >= 4 {
            p.cast::<u64>().write_unaligned(x as u64);
            p.add(n - 4).cast::<u64>().write_unaligned((x >> (16 * (n - 4))) as u64);
            return;
        }
        if n >= 2 {
            p.cast::<u32>().write_unaligned(x as u32);
        }
        if n % 2 == 1 {
            *p.add(n - 1) = (x >> (16 * (n - 1))) as u16;
        }
    }
}
