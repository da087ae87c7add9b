//! Element types: how each widens into the type it is accumulated in, and how it rounds back.
//!
//! f16 and bf16 are converted by integer arithmetic, which vectorizes at every level and is the same
//! on every machine; `half`'s scalar conversions would be calls.

use candle_core::{bail, CpuStorage, Result, WithDType};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Neg;

/// Elements of a panel: small enough that one and its widened copy stay in the first-level cache.
pub(super) const PANEL: usize = 4096;

/// A type that sums are made in: f32, or f64 for f64 elements.
pub(super) trait Float: Element<Acc = Self> + Neg<Output = Self> {
    const ZERO: Self;
    const ONE: Self;
    fn fused(self, b: Self, c: Self) -> Self;
    fn root(self) -> Self;
    fn to64(self) -> f64;
    fn from64(x: f64) -> Self;
}

macro_rules! float {
    ($t:ty) => {
        impl Float for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn fused(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn to64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn from64(x: f64) -> Self {
                x as $t
            }
        }

        impl Element for $t {
            type Acc = $t;
            type Buffer = ();
            fn buffer() {}
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(x: $t) -> $t {
                x
            }
            #[inline(always)]
            fn panel<'a>(
                x: &'a [$t],
                stride: usize,
                rows: usize,
                len: usize,
                _: &'a mut (),
            ) -> Panel<'a, $t> {
                Panel { data: x, stride, rows, len }
            }
        }
    };
}

float!(f32);
float!(f64);

/// `a * b + c`, rounded once where the level can.
#[inline(always)]
pub(super) fn fma<A: Float, const FMA: bool>(a: A, b: A, c: A) -> A {
    if FMA {
        a.fused(b, c)
    } else {
        a * b + c
    }
}

/// `rows` rows of `len` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a, A> {
    pub data: &'a [A],
    pub stride: usize,
    pub rows: usize,
    pub len: usize,
}

impl<'a, A> Panel<'a, A> {
    #[inline(always)]
    pub fn row(&self, r: usize) -> &'a [A] {
        &self.data[r * self.stride..][..self.len]
    }

    /// The same elements in fewer rows: one, where nothing lies between the rows.
    #[inline(always)]
    pub fn flat(self) -> Self {
        if self.stride == self.len {
            Panel { rows: 1.min(self.rows), len: self.rows * self.len, ..self }
        } else {
            self
        }
    }
}

/// A type of tensor elements.
pub(super) trait Element: WithDType {
    type Acc: Float;
    /// Room for a widened panel; nothing for types that are accumulated as they are.
    type Buffer;
    fn buffer() -> Self::Buffer;
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn narrow(x: Self::Acc) -> Self;
    /// At most `PANEL` elements, widened: those of `x`, or dense copies in `buffer`.
    fn panel<'a>(
        x: &'a [Self],
        stride: usize,
        rows: usize,
        len: usize,
        buffer: &'a mut Self::Buffer,
    ) -> Panel<'a, Self::Acc>;
}

macro_rules! half {
    ($t:ty, $widen:ident, $narrow:ident) => {
        impl Element for $t {
            type Acc = f32;
            type Buffer = [f32; PANEL];
            fn buffer() -> [f32; PANEL] {
                [0.0; PANEL]
            }
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self.to_bits())
            }
            #[inline(always)]
            fn narrow(x: f32) -> $t {
                <$t>::from_bits($narrow(x))
            }
            #[inline(always)]
            fn panel<'a>(
                x: &'a [$t],
                stride: usize,
                rows: usize,
                len: usize,
                buffer: &'a mut [f32; PANEL],
            ) -> Panel<'a, f32> {
                for r in 0..rows {
                    let to = &mut buffer[r * len..][..len];
                    for (to, from) in to.iter_mut().zip(&x[r * stride..][..len]) {
                        *to = from.widen();
                    }
                }
                Panel { data: buffer, stride: len, rows, len }
            }
        }
    };
}

half!(bf16, widen_bf16, narrow_bf16);
half!(f16, widen_f16, narrow_f16);

#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[inline(always)]
fn narrow_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The exponents' biases differ by 112: shift the bits into place and multiply, which is exact and
/// normalizes subnormals; infinity and NaN get f32's exponent.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let magnitude = (bits as u32 & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | (bits as u32 & 0x8000) << 16)
}

/// Normal results: rebias and round the bits; a carry walks into the exponent and up to infinity.
/// Subnormal results: adding 0.5 leaves exactly the result's bits, rounded, at the end of the fraction.
#[inline(always)]
fn narrow_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    // 2^16 and above; what lies between 65520 and it has been rounded to infinity by the carry.
    let result = if magnitude >= 143 << 23 { special } else { finite };
    (result | (bits >> 16 & 0x8000)) as u16
}

/// `len` values of a parameter or statistics argument in the accumulation type; borrowed if they are
/// of it already.
pub(super) fn converted<'a, A: Float>(
    arg: &crate::call::Arg<'a, CpuStorage>,
    len: usize,
) -> Result<Cow<'a, [A]>> {
    fn wide<T: Element, A: Float>(x: &[T]) -> Vec<A> {
        x.iter().map(|x| A::from64(x.widen().to64())).collect()
    }
    let at = arg.offset..arg.offset + len;
    if arg.storage.dtype_is::<A>() {
        return Ok(Cow::Borrowed(&A::cpu_storage_as_slice(arg.storage)?[at]));
    }
    Ok(Cow::Owned(match arg.storage {
        CpuStorage::F64(x) => wide(&x[at]),
        CpuStorage::F32(x) => wide(&x[at]),
        CpuStorage::F16(x) => wide(&x[at]),
        CpuStorage::BF16(x) => wide(&x[at]),
        _ => bail!("expected one of f16, bf16, f32, f64"),
    }))
}

trait DTypeIs {
    fn dtype_is<A: Float>(&self) -> bool;
}

impl DTypeIs for CpuStorage {
    fn dtype_is<A: Float>(&self) -> bool {
        use candle_core::backend::BackendStorage;
        self.dtype() == A::DTYPE
    }
}
