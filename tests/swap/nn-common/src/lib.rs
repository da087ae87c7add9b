//! What both stand-ins for candle-nn share: the dtype that models compute in, and attention that differentiates.
//!
//! candle-nn's fused softmax and rotary embeddings end the graph as its fused norms do, and then nothing before
//! them has a gradient to compare. Both sides take candle-nn's composed ones.

use candle_core::DType;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static DOUBLE: AtomicBool = AtomicBool::new(false);

static NORMS: AtomicUsize = AtomicUsize::new(0);

/// One call of a norm of candle-nn's.
pub fn count_norm() {
    NORMS.fetch_add(1, Ordering::Relaxed);
}

/// The calls since the last time.
pub fn take_norms() -> usize {
    NORMS.swap(0, Ordering::Relaxed)
}

/// What `DType::F32` reads in the models' sources: they round to it inside a computation in f64 otherwise.
pub fn working_dtype() -> DType {
    if DOUBLE.load(Ordering::Relaxed) {
        DType::F64
    } else {
        DType::F32
    }
}

/// For the whole process: `DType::F64` or `DType::F32`.
pub fn set_working_dtype(dtype: DType) {
    DOUBLE.store(dtype == DType::F64, Ordering::Relaxed);
}

/// `Tensor`'s constructors, for the models' tables, masks and constants: f32 becomes the dtype of the run.
pub mod tensor {
    use candle_core::shape::ShapeWithOneHole;
    use candle_core::{DType, Device, NdArray, Result, Shape, Tensor, WithDType};

    fn working(t: Result<Tensor>) -> Result<Tensor> {
        let t = t?;
        if t.dtype() == DType::F32 {
            t.to_dtype(super::working_dtype())
        } else {
            Ok(t)
        }
    }

    pub fn new<A: NdArray>(array: A, device: &Device) -> Result<Tensor> {
        working(Tensor::new(array, device))
    }

    pub fn from_vec<S: ShapeWithOneHole, D: WithDType>(
        data: Vec<D>,
        shape: S,
        device: &Device,
    ) -> Result<Tensor> {
        working(Tensor::from_vec(data, shape, device))
    }

    pub fn from_slice<S: ShapeWithOneHole, D: WithDType>(
        data: &[D],
        shape: S,
        device: &Device,
    ) -> Result<Tensor> {
        working(Tensor::from_slice(data, shape, device))
    }

    pub fn arange<D: WithDType>(start: D, end: D, device: &Device) -> Result<Tensor> {
        working(Tensor::arange(start, end, device))
    }

    pub fn arange_step<D: WithDType>(start: D, end: D, step: D, device: &Device) -> Result<Tensor> {
        working(Tensor::arange_step(start, end, step, device))
    }

    pub fn full<D: WithDType, S: Into<Shape>>(value: D, shape: S, device: &Device) -> Result<Tensor> {
        working(Tensor::full(value, shape, device))
    }
}

pub mod ops {
    use candle_core::{Result, Tensor, D};

    pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
        candle_nn::ops::softmax(xs, D::Minus1)
    }
}

pub mod rotary_emb {
    use candle_core::{Result, Tensor, D};
    pub use candle_nn::rotary_emb::*;

    /// `xs`: `[batch, heads, tokens, 2 n]`; `cos`, `sin`: `[tokens or more, n]` or `[batch, tokens, n]`.
    pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let n = xs.dim(D::Minus1)? / 2;
        let (cos, sin) = (per_token(xs, cos)?, per_token(xs, sin)?);
        let (a, b) = (xs.narrow(D::Minus1, 0, n)?, xs.narrow(D::Minus1, n, n)?);
        let [a, b] = rotate(&a, &b, &cos, &sin)?;
        Tensor::cat(&[a, b], D::Minus1)
    }

    /// As [`rope`], for `[batch, tokens, heads, 2 n]`.
    pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let heads_first = xs.transpose(1, 2)?.contiguous()?;
        rope(&heads_first, cos, sin)?.transpose(1, 2)?.contiguous()
    }

    /// As [`rope`], for pairs that lie side by side.
    pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (b, h, t, width) = xs.dims4()?;
        let pairs = xs.reshape((b, h, t, width / 2, 2))?;
        let part = |i| pairs.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
        let [even, odd] = rotate(&part(0)?, &part(1)?, &per_token(xs, cos)?, &per_token(xs, sin)?)?;
        Tensor::stack(&[even, odd], D::Minus1)?.reshape((b, h, t, width))
    }

    fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<[Tensor; 2]> {
        let x = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let y = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Ok([x, y])
    }

    /// The angles of `xs`'s tokens, which dimension 2 counts, in a shape that broadcasts over heads.
    fn per_token(xs: &Tensor, angles: &Tensor) -> Result<Tensor> {
        let tokens = xs.dim(2)?;
        match angles.rank() {
            2 => angles.narrow(0, 0, tokens),
            _ => angles.narrow(1, 0, tokens)?.unsqueeze(1),
        }
    }
}
