//! AVX2 and AVX-512 vectors.
//!
//! Apart, because intrinsics take unsafe code. Every `unsafe` below relies on one of two facts: these
//! types are used within `Level::run` of their level alone, which has detected the instructions; and
//! a load or store touches only the elements of its slice, whose length is checked (full vectors) or
//! masked by (parts).
#![allow(unsafe_code)]

use super::{Convert, Simd, Vector};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::{Add, Mul, Sub};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2;

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512;

impl Simd for Avx2 {
    type F32 = F32x8;
    type F64 = F64x4;

    #[inline(always)]
    fn prefetch<T>(p: *const T) {
        // SAFETY: a hint, which is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

impl Simd for Avx512 {
    type F32 = F32x16;
    type F64 = F64x8;

    #[inline(always)]
    fn prefetch<T>(p: *const T) {
        // SAFETY: a hint, which is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// A vector type and the arithmetic that has one instruction an operation.
macro_rules! vector {
    ($name:ident, $raw:ty, $a:ty, $w:literal, $set:ident, $add:ident, $sub:ident, $mul:ident, $fma:ident,
     |$s:ident| $sum:expr, |$k:ident, $n:ident| $keep:expr) => {
        #[derive(Clone, Copy)]
        pub(in crate::cpu) struct $name($raw);

        vector!(@operator $name, Add, add, $add);
        vector!(@operator $name, Sub, sub, $sub);
        vector!(@operator $name, Mul, mul, $mul);

        impl Vector for $name {
            type Lane = $a;
            const W: usize = $w;

            #[inline(always)]
            fn splat(x: $a) -> Self {
                // SAFETY: within this type's level.
                $name(unsafe { $set(x) })
            }

            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                // SAFETY: within this type's level.
                $name(unsafe { $fma(self.0, b.0, c.0) })
            }

            #[inline(always)]
            fn sum(self) -> $a {
                let $s = self.0;
                // SAFETY: within this type's level.
                unsafe { $sum }
            }

            #[inline(always)]
            fn keep(self, $n: usize) -> Self {
                let $k = self.0;
                // SAFETY: within this type's level.
                $name(unsafe { $keep })
            }

            #[inline(always)]
            fn write(self, y: &mut [$a]) {
                // SAFETY: numbers that are overwritten by numbers stay initialized.
                let y = unsafe { &mut *(y as *mut [$a] as *mut [MaybeUninit<$a>]) };
                match y.len() == Self::W {
                    true => Convert::<$a, $a>::store(self, y),
                    false => Convert::<$a, $a>::store_part(self, y),
                }
            }
        }
    };
    (@operator $name:ident, $trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for $name {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: within this type's level.
                $name(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    };
}

vector! { F32x16, __m512, f32, 16, _mm512_set1_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_fmadd_ps,
|s| sum8(_mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps::<1>(s))),
|k, n| _mm512_maskz_mov_ps(first(n) as u16, k) }
vector! { F64x8, __m512d, f64, 8, _mm512_set1_pd, _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_fmadd_pd,
|s| sum4(_mm256_add_pd(_mm512_castpd512_pd256(s), _mm512_extractf64x4_pd::<1>(s))),
|k, n| _mm512_maskz_mov_pd(first(n) as u8, k) }
vector! { F32x8, __m256, f32, 8, _mm256_set1_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_fmadd_ps,
|s| sum8(s),
|k, n| _mm256_and_ps(k, _mm256_castsi256_ps(first8(n))) }
vector! { F64x4, __m256d, f64, 4, _mm256_set1_pd, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_fmadd_pd,
|s| sum4(s),
|k, n| _mm256_and_pd(k, _mm256_castsi256_pd(first4(n))) }

/// A mask of the first `n < 32` lanes.
#[inline(always)]
fn first(n: usize) -> u32 {
    (1 << n) - 1
}

/// All bits of the first `n` of 8 lanes.
#[inline(always)]
unsafe fn first8(n: usize) -> __m256i {
    // SAFETY: called within AVX2 or wider.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

/// All bits of the first `n` of 4 lanes.
#[inline(always)]
unsafe fn first4(n: usize) -> __m256i {
    // SAFETY: called within AVX2 or wider.
    unsafe { _mm256_cmpgt_epi64(_mm256_set1_epi64x(n as i64), _mm256_setr_epi64x(0, 1, 2, 3)) }
}

#[inline(always)]
unsafe fn sum8(s: __m256) -> f32 {
    // SAFETY: called within AVX2 or wider.
    unsafe {
        let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
        let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
    }
}

#[inline(always)]
unsafe fn sum4(s: __m256d) -> f64 {
    // SAFETY: called within AVX2 or wider.
    unsafe {
        let s = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd::<1>(s));
        _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)))
    }
}

/// Loads and stores of a type: `p` is the slice's pointer, `n` its length where it is a part, `v` what is
/// stored.
macro_rules! convert {
    ($name:ident, $t:ty, $a:ty,
     load |$lp:ident| $load:expr, part |$pp:ident, $pn:ident| $part:expr,
     store |$sp:ident, $sv:ident| $store:expr, stream |$np:ident, $nv:ident| $stream:expr,
     part |$tp:ident, $tv:ident, $tn:ident| $store_part:expr
     $(, pairs |$qp:ident| $load_pair:expr, |$rp:ident, $ra:ident, $rb:ident| $store_pair:expr,
     stream |$mp:ident, $ma:ident, $mb:ident| $stream_pair:expr)?) => {
        impl Convert<$t, $a> for $name {
            #[inline(always)]
            fn load(x: &[$t]) -> Self {
                assert!(x.len() == Self::W);
                let $lp = x.as_ptr();
                // SAFETY: `W` elements are read, and there are as many; within this type's level.
                $name(unsafe { $load })
            }

            #[inline(always)]
            fn load_part(x: &[$t]) -> Self {
                assert!(x.len() <= Self::W);
                let ($pp, $pn) = (x.as_ptr(), x.len());
                // SAFETY: no more than the slice's elements are read; within this type's level.
                $name(unsafe { $part })
            }

            #[inline(always)]
            fn store(self, y: &mut [MaybeUninit<$t>]) {
                assert!(y.len() == Self::W);
                let ($sp, $sv) = (y.as_mut_ptr().cast::<$t>(), self.0);
                // SAFETY: `W` elements are written, and there is room; within this type's level.
                unsafe { $store }
            }

            #[inline(always)]
            fn stream(self, y: &mut [MaybeUninit<$t>]) {
                assert!(y.len() == Self::W);
                if y.as_ptr().addr() % 16 != 0 {
                    return self.store(y);
                }
                let ($np, $nv) = (y.as_mut_ptr().cast::<$t>(), self.0);
                // SAFETY: `W` elements are written, there is room, aligned to 16 bytes; within this type's level.
                unsafe { $stream }
            }

            #[inline(always)]
            fn store_part(self, y: &mut [MaybeUninit<$t>]) {
                assert!(y.len() <= Self::W);
                let ($tp, $tv, $tn) = (y.as_mut_ptr().cast::<$t>(), self.0, y.len());
                // SAFETY: no more than the slice's elements are written; within this type's level.
                unsafe { $store_part }
            }

            $(
                #[inline(always)]
                fn load_pair(x: &[$t]) -> [Self; 2] {
                    assert!(x.len() == 2 * Self::W);
                    let $qp = x.as_ptr();
                    // SAFETY: `2 * W` elements are read, and there are as many; within this type's level.
                    let (a, b) = unsafe { $load_pair };
                    [$name(a), $name(b)]
                }

                #[inline(always)]
                fn store_pair([a, b]: [Self; 2], y: &mut [MaybeUninit<$t>]) {
                    assert!(y.len() == 2 * Self::W);
                    let ($rp, $ra, $rb) = (y.as_mut_ptr().cast::<$t>(), a.0, b.0);
                    // SAFETY: `2 * W` elements are written, and there is room; within this type's level.
                    unsafe { $store_pair }
                }

                #[inline(always)]
                fn stream_pair([a, b]: [Self; 2], y: &mut [MaybeUninit<$t>]) {
                    assert!(y.len() == 2 * Self::W);
                    if y.as_ptr().addr() % 16 != 0 {
                        return Self::store_pair([a, b], y);
                    }
                    let ($mp, $ma, $mb) = (y.as_mut_ptr().cast::<$t>(), a.0, b.0);
                    // SAFETY: as above, and it is aligned.
                    unsafe { $stream_pair }
                }
            )?
        }
    };
}

convert! { F32x16, f32, f32,
load |p| _mm512_loadu_ps(p), part |p, n| _mm512_maskz_loadu_ps(first(n) as u16, p),
store |p, v| _mm512_storeu_ps(p, v), stream |p, v| stream512(p.cast(), _mm512_castps_si512(v)),
    part |p, v, n| _mm512_mask_storeu_ps(p, first(n) as u16, v) }
convert! { F64x8, f64, f64,
load |p| _mm512_loadu_pd(p), part |p, n| _mm512_maskz_loadu_pd(first(n) as u8, p),
store |p, v| _mm512_storeu_pd(p, v), stream |p, v| stream512(p.cast(), _mm512_castpd_si512(v)),
    part |p, v, n| _mm512_mask_storeu_pd(p, first(n) as u8, v) }
convert! { F32x8, f32, f32,
load |p| _mm256_loadu_ps(p), part |p, n| _mm256_maskload_ps(p, first8(n)),
store |p, v| _mm256_storeu_ps(p, v), stream |p, v| stream256(p.cast(), _mm256_castps_si256(v)),
    part |p, v, n| _mm256_maskstore_ps(p, first8(n), v) }
convert! { F64x4, f64, f64,
load |p| _mm256_loadu_pd(p), part |p, n| _mm256_maskload_pd(p, first4(n)),
store |p, v| _mm256_storeu_pd(p, v), stream |p, v| stream256(p.cast(), _mm256_castpd_si256(v)),
    part |p, v, n| _mm256_maskstore_pd(p, first4(n), v) }

// Pairs of bf16 vectors are the elements at even places and those at odd ones: a shift and a mask part the
// 32-bit words that have one of each, where neighbours would have to be moved across the register.
convert! { F32x16, bf16, f32,
load |p| bf16_wide16(_mm256_loadu_si256(p.cast())),
part |p, n| bf16_wide16(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast())),
store |p, v| _mm256_storeu_si256(p.cast(), bf16_narrow16(v)),
    stream |p, v| stream256(p.cast(), bf16_narrow16(v)),
part |p, v, n| _mm256_mask_storeu_epi16(p.cast(), first(n) as u16, bf16_narrow16(v)),
pairs |p| bf16_parted16(_mm512_loadu_si512(p.cast())),
|p, a, b| _mm512_storeu_si512(p.cast(), bf16_joined16(a, b)),
    stream |p, a, b| stream512(p.cast(), bf16_joined16(a, b)) }
convert! { F32x16, f16, f32,
load |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
part |p, n| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast())),
store |p, v| _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v)),
    stream |p, v| stream256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v)),
part |p, v, n| _mm256_mask_storeu_epi16(p.cast(), first(n) as u16, _mm512_cvtps_ph::<NEAREST>(v)) }
convert! { F32x8, bf16, f32,
load |p| bf16_wide8(_mm_loadu_si128(p.cast())), part |p, n| bf16_wide8(load16(p.cast(), n)),
store |p, v| _mm_storeu_si128(p.cast(), bf16_narrow8(v)),
    stream |p, v| _mm_stream_si128(p.cast(), bf16_narrow8(v)),
part |p, v, n| store16(p.cast(), bf16_narrow8(v), n),
pairs |p| bf16_parted8(_mm256_loadu_si256(p.cast())),
|p, a, b| _mm256_storeu_si256(p.cast(), bf16_joined8(a, b)),
    stream |p, a, b| stream256(p.cast(), bf16_joined8(a, b)) }
convert! { F32x8, f16, f32,
load |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())), part |p, n| _mm256_cvtph_ps(load16(p.cast(), n)),
store |p, v| _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(v)),
    stream |p, v| _mm_stream_si128(p.cast(), _mm256_cvtps_ph::<NEAREST>(v)),
part |p, v, n| store16(p.cast(), _mm256_cvtps_ph::<NEAREST>(v), n) }

/// In pieces of 16 bytes, as allocators align: the processor puts lines together again.
#[inline(always)]
unsafe fn stream256(p: *mut __m128i, v: __m256i) {
    // SAFETY: the caller's: room for 32 bytes, aligned to 16; called within AVX2 or wider.
    unsafe {
        _mm_stream_si128(p, _mm256_castsi256_si128(v));
        _mm_stream_si128(p.add(1), _mm256_extracti128_si256::<1>(v));
    }
}

#[inline(always)]
unsafe fn stream512(p: *mut __m128i, v: __m512i) {
    // SAFETY: the caller's: room for 64 bytes, aligned to 16; called within AVX-512.
    unsafe {
        _mm_stream_si128(p, _mm512_castsi512_si128(v));
        _mm_stream_si128(p.add(1), _mm512_extracti32x4_epi32::<1>(v));
        _mm_stream_si128(p.add(2), _mm512_extracti32x4_epi32::<2>(v));
        _mm_stream_si128(p.add(3), _mm512_extracti32x4_epi32::<3>(v));
    }
}

/// Ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

#[inline(always)]
unsafe fn bf16_wide16(x: __m256i) -> __m512 {
    // SAFETY: called within AVX-512.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))) }
}

#[inline(always)]
unsafe fn bf16_wide8(x: __m128i) -> __m256 {
    // SAFETY: called within AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))) }
}

#[inline(always)]
unsafe fn bf16_parted16(x: __m512i) -> (__m512, __m512) {
    // SAFETY: called within AVX-512.
    unsafe {
        let odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff_0000u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(odd))
    }
}

#[inline(always)]
unsafe fn bf16_parted8(x: __m256i) -> (__m256, __m256) {
    // SAFETY: called within AVX2.
    unsafe {
        let odd = _mm256_and_si256(x, _mm256_set1_epi32(0xffff_0000u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)), _mm256_castsi256_ps(odd))
    }
}

/// To nearest, ties to even, in the upper halves; NaN stays NaN (`element.rs` has the same in scalars). Not
/// the processor's own conversion, which takes subnormals for zero.
#[inline(always)]
unsafe fn bf16_rounded16(x: __m512) -> __m512i {
    // SAFETY: called within AVX-512.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000))
    }
}

#[inline(always)]
unsafe fn bf16_rounded8(x: __m256) -> __m256i {
    // SAFETY: called within AVX2.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

#[inline(always)]
unsafe fn bf16_narrow16(x: __m512) -> __m256i {
    // SAFETY: called within AVX-512.
    unsafe { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bf16_rounded16(x))) }
}

#[inline(always)]
unsafe fn bf16_narrow8(x: __m256) -> __m128i {
    // SAFETY: called within AVX2.
    unsafe {
        let high = _mm256_srli_epi32::<16>(bf16_rounded8(x));
        // Packing works within each half of the register.
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high))
    }
}

#[inline(always)]
unsafe fn bf16_joined16(even: __m512, odd: __m512) -> __m512i {
    // SAFETY: called within AVX-512.
    unsafe {
        let even = _mm512_srli_epi32::<16>(bf16_rounded16(even));
        _mm512_mask_blend_epi16(0xaaaa_aaaa, even, bf16_rounded16(odd))
    }
}

#[inline(always)]
unsafe fn bf16_joined8(even: __m256, odd: __m256) -> __m256i {
    // SAFETY: called within AVX2.
    unsafe {
        let even = _mm256_srli_epi32::<16>(bf16_rounded8(even));
        _mm256_blend_epi16::<0xaa>(even, bf16_rounded8(odd))
    }
}

/// The first `n <= 8` of 16-bit elements: AVX2 has no masks for them.
#[inline(always)]
unsafe fn load16(p: *const u16, n: usize) -> __m128i {
    let mut x = [0u16; 8];
    for (l, x) in x.iter_mut().enumerate().take(n) {
        // SAFETY: `l < n`, and the caller has `n` elements.
        *x = unsafe { *p.add(l) };
    }
    // SAFETY: as large, without invalid values.
    unsafe { std::mem::transmute(x) }
}

#[inline(always)]
unsafe fn store16(p: *mut u16, x: __m128i, n: usize) {
    // SAFETY: as large, without invalid values.
    let x: [u16; 8] = unsafe { std::mem::transmute(x) };
    for (l, x) in x.into_iter().enumerate().take(n) {
        // SAFETY: `l < n`, and the caller has room for `n` elements.
        unsafe { *p.add(l) = x };
    }
}
