//! The functions in vectors against f64: exhaustively by hand, in strides always.

use crate::cpu::activations::{slope_f64, value_f64};
use crate::cpu::element::Element;
use crate::cpu::loops::{Behind, Conversions, Wide};
use crate::cpu::simd_level::Level;
use crate::cpu::tile::Tile;
use crate::cpu::view::{OutTile, Strided};
use crate::fusion::Activation;
use half::bf16;

/// Distance in units in the last place of f32 between a result and what it should be.
fn ulps(got: f32, exact: f64) -> f64 {
    let rounded = exact as f32;
    if got == rounded || got.is_nan() && rounded.is_nan() {
        return 0.0;
    }
    if !got.is_finite() || !rounded.is_finite() {
        return f64::INFINITY;
    }
    let exponent = (exact.abs().log2().floor() as i32).max(-126);
    (got as f64 - exact).abs() / 2f64.powi(exponent - 23)
}

/// The worst of `f`'s values over every `step`th f32, and where it is.
fn worst(step: usize, f: impl Fn(&mut [f32]), exact: impl Fn(f64) -> f64) -> (f64, f32) {
    let (mut worst, mut at) = (0.0, 0.0);
    let mut x = Vec::with_capacity(4096);
    let mut flush = |x: &mut Vec<f32>| {
        let mut y = x.clone();
        f(&mut y);
        for (x, y) in x.drain(..).zip(y) {
            let error = ulps(y, exact(x as f64));
            if error > worst {
                (worst, at) = (error, x);
            }
        }
    };
    for bits in (0..=u32::MAX).step_by(step) {
        x.push(f32::from_bits(bits));
        if x.len() == 4096 {
            flush(&mut x);
        }
    }
    // Of all of them there is no rest.
    if !x.is_empty() {
        flush(&mut x);
    }
    (worst, at)
}

/// What each may be off by.
const ULPS: f64 = 2.0;

fn activated<T: Element<Acc = f32>>(level: Level, activation: Activation, z: &[f32]) -> Vec<T> {
    let mut y = vec![T::zero(); z.len()];
    let mut out = OutTile::alone(&mut y, Tile { rows: 0..1, columns: 0..z.len() });
    let behind = Behind { skip: None, activation: Some(activation), gate: None };
    Conversions::<T>::of(level).finish(Strided::row_of(z), out.whole(), behind);
    drop(out);
    y
}

fn check(step: usize) {
    for level in Level::available() {
        for activation in Activation::ALL {
            let f = |z: &mut [f32]| z.copy_from_slice(&activated::<f32>(level, activation, z));
            let (error, at) = worst(step, f, |z| value_f64(activation, z));
            println!("{activation:?} at {}: {error:.2} ulp at {at:e}", level.name());
            assert!(error <= ULPS, "{activation:?} at {}: {error} ulp at {at:e}", level.name());
        }
    }
}

#[test]
fn activations_of_every_thousandth_f32() {
    check(997);
}

#[test]
#[ignore = "minutes: every f32 at every level"]
fn activations_of_every_f32() {
    check(1);
}

/// Of what is rounded to 16 bits: half a unit of bf16, and a thousandth.
#[test]
fn activations_of_every_bf16() {
    let finite = |x: &bf16| x.is_finite();
    let z: Vec<f32> = (0..=u16::MAX).map(bf16::from_bits).filter(finite).map(bf16::to_f32).collect();
    for level in Level::available() {
        for activation in Activation::ALL {
            let y = activated::<bf16>(level, activation, &z);
            for (y, z) in y.iter().zip(&z) {
                let exact = value_f64(activation, f64::from(*z));
                // Beyond the largest number it rounds to infinity.
                let unit = 2f64.powi((exact.abs().log2().floor() as i32).max(-126) - 7);
                let off = (y.to_f64() - exact).abs() / unit;
                let what = format!("{activation:?} of {z:e} at {}: {y}, {exact:e}", level.name());
                assert!(off <= 0.501 || exact.abs() > 3.38e38, "{what}");
            }
        }
    }
}

#[test]
fn slopes_are_those_of_the_values() {
    for activation in Activation::ALL {
        // Away from corners.
        for z in (-2000..2000).map(|i| i as f64 * 0.0049 + 0.0013) {
            let h = 1e-5;
            let expected = (value_f64(activation, z + h) - value_f64(activation, z - h)) / (2.0 * h);
            let slope = slope_f64(activation, z);
            assert!((slope - expected).abs() < 1e-7, "{activation:?} at {z}: {slope} {expected}");
            for level in Level::available() {
                let (mut dy, z32) = ([1.0f32; 19], [z as f32; 19]);
                f32::fused(level).slope(&z32, activation, &mut dy);
                let exact = slope_f64(activation, z as f32 as f64);
                let off = dy.iter().map(|dy| (*dy as f64 - exact).abs()).fold(0.0, f64::max);
                assert!(off < 1e-6, "{activation:?} at {z}, {}: off by {off:e}", level.name());
            }
        }
    }
}
