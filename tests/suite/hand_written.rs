//! Norms that models write out in tensor operations, and the call of this crate in their place: the same numbers
//! and gradients. docs/hand-written-norms.md names the models.
//!
//! The formulas are written here as the models mean them, in candle's own operations. That the models themselves
//! agree, with their norms switched by an import, is tests/swap's to show.

use crate::common::{data, device, unit_roundoff};
use candle_core::{DType, Result, Tensor, Var, D};
use candle_norm::functional::{fused::offset_rms_norm, layer_norm, layer_norm_channels, rms_norm};

const EPS: f64 = 1e-6;

type Formula = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

struct Norm {
    models: &'static str,
    /// The normalized dimension: the last, or the channels of `[N, C, H, W]`.
    channels_first: bool,
    written: Formula,
    called: Formula,
}

const NORMS: [Norm; 6] = [
    Norm {
        models: "gemma, gemma2, gemma3, recurrent_gemma, gemma4 text and vision",
        channels_first: false,
        written: |x, w, _| mean_square(x)?.broadcast_mul(&(w + 1.0)?),
        called: |x, w, _| offset_rms_norm(x, &[x.dim(D::Minus1)?], w, 1.0, EPS),
    },
    Norm {
        models: "gemma4 audio, t5, quantized_t5, quantized_smollm3, mimi",
        channels_first: false,
        written: |x, w, _| mean_square(x)?.broadcast_mul(w),
        called: |x, w, _| rms_norm(x, &[x.dim(D::Minus1)?], Some(w), EPS),
    },
    Norm {
        models: "gemma4 multimodal embedding and the norm of its values",
        channels_first: false,
        written: |x, _, _| mean_square(x),
        called: |x, _, _| rms_norm(x, &[x.dim(D::Minus1)?], None, EPS),
    },
    Norm {
        models: "gemma4 audio, mmdit, z_image, wuerstchen",
        channels_first: false,
        written: |x, _, _| standardized(x, D::Minus1),
        called: |x, _, _| layer_norm(x, &[x.dim(D::Minus1)?], None, None, EPS),
    },
    Norm {
        models: "segment_anything",
        channels_first: true,
        written: |x, w, b| {
            let shape = (1, x.dim(1)?, 1, 1);
            standardized(x, 1)?.broadcast_mul(&w.reshape(shape)?)?.broadcast_add(&b.reshape(shape)?)
        },
        called: |x, w, b| layer_norm_channels(x, Some(w), Some(b), EPS),
    },
    Norm {
        models: "wuerstchen",
        channels_first: true,
        written: |x, _, _| standardized(x, 1),
        called: |x, _, _| layer_norm_channels(x, None, None, EPS),
    },
];

/// x / sqrt(mean(x²) + eps), in f32 for less.
fn mean_square(x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(wide(x.dtype()))?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    wide.broadcast_div(&scale)?.to_dtype(x.dtype())
}

/// (x - mean) / sqrt(var + eps), in f32 for less.
fn standardized(x: &Tensor, dim: impl candle_core::shape::Dim + Copy) -> Result<Tensor> {
    let wide = x.to_dtype(wide(x.dtype()))?;
    let centered = wide.broadcast_sub(&wide.mean_keepdim(dim)?)?;
    let scale = (centered.sqr()?.mean_keepdim(dim)? + EPS)?.sqrt()?;
    centered.broadcast_div(&scale)?.to_dtype(x.dtype())
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 {
        dtype
    } else {
        DType::F32
    }
}

fn var(seed: u64, shape: &[usize], mean: f64, dtype: DType) -> Result<Var> {
    let values = data(seed, shape.iter().product(), mean, 1.0);
    Var::from_tensor(&Tensor::from_vec(values, shape, device())?.to_dtype(dtype)?)
}

fn length(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar()
}

/// |a - b| <= bound * |b|.
fn near(what: &str, a: &Tensor, b: &Tensor, bound: f64) -> Result<()> {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let (apart, size) = (length(&(a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?)?, length(b)?);
    assert!(apart <= bound * size, "{what}: {apart:e} apart, of {size:e}, bound {:e}", bound * size);
    Ok(())
}

#[test]
fn a_call_in_the_place_of_each() -> Result<()> {
    for (norm, dtype) in NORMS.iter().flat_map(|n| [DType::F64, DType::F32, DType::BF16].map(|d| (n, d))) {
        for n in [8, 48, 256] {
            let shape: Vec<usize> = if norm.channels_first { vec![2, n, 3, 5] } else { vec![2, 7, n] };
            let x = var(1, &shape, 0.5, dtype)?;
            let (w, b) = (var(2, &[n], 0.0, dtype)?, var(3, &[n], 0.0, dtype)?);
            let dy = var(4, &shape, 0.0, dtype)?.as_detached_tensor();
            let written = (norm.written)(&x, &w, &b)?;
            let called = (norm.called)(&x, &w, &b)?;
            // Sums of n terms and a dozen roundings in the wide dtype; half a dozen in the tensor's own, each of
            // at most a unit roundoff, which a product with 1 + w near 0 and a difference in dx may grow.
            let bound = 4.0 * ((n + 12) as f64 * unit_roundoff(wide(dtype)) + 6.0 * unit_roundoff(dtype));
            let what = format!("{}, {dtype:?}, {n}", norm.models);
            near(&what, &called, &written, bound)?;
            if dtype == DType::BF16 {
                // candle adds up the written one's gradients in bf16.
                continue;
            }
            let [written, called] = [written, called].map(|y| (y * &dy)?.sum_all()?.backward());
            let (written, called) = (written?, called?);
            for (of, variable) in [("dx", &x), ("dweight", &w), ("dbias", &b)] {
                match (called.get(variable), written.get(variable)) {
                    (Some(a), Some(b)) => near(&format!("{what}: {of}"), a, b, bound)?,
                    (None, None) => assert_ne!(of, "dx", "{what}"),
                    (a, _) => {
                        panic!("{what}: only one has {of}: {}", if a.is_some() { "ours" } else { "theirs" })
                    }
                }
            }
        }
    }
    Ok(())
}
