//! Every norm in its plainest form: serial, scalar, f64 inside.

use crate::geometry::Geometry;

/// `(index, set, param)` of every element.
fn elements(g: &Geometry) -> impl Iterator<Item = (usize, usize, usize)> {
    let g = *g;
    (0..g.elements()).map(move |i| {
        let (o, row, column) = (i / g.block_len(), i / g.width % g.rows, i % g.width);
        (i, o * g.sets_per_outer() + column / g.run, g.param(row, column))
    })
}

/// Mean and biased variance of every set; zeros where it is empty.
pub fn statistics(g: &Geometry, x: &[f64]) -> [Vec<f64>; 2] {
    let (mut mean, mut var) = (vec![0.0; g.sets()], vec![0.0; g.sets()]);
    let n = g.set_len() as f64;
    if g.center {
        elements(g).for_each(|(i, s, _)| mean[s] += x[i] / n);
        // Once more, for what the additions rounded off.
        let rounded = mean.clone();
        elements(g).for_each(|(i, s, _)| mean[s] += (x[i] - rounded[s]) / n);
    }
    elements(g).for_each(|(i, s, _)| var[s] += (x[i] - mean[s]).powi(2) / n);
    [mean, var]
}

/// The output, with given statistics.
pub fn forward(g: &Geometry, eps: f64, x: &[f64], stats: &[Vec<f64>; 2], w: &[f64], b: &[f64]) -> Vec<f64> {
    let [mean, var] = stats;
    elements(g).map(|(i, s, p)| (x[i] - mean[s]) / (var[s] + eps).sqrt() * w[p] + b[p]).collect()
}

/// Gradients of x, weight and bias; `fixed`: the statistics do not depend on x.
pub fn backward(
    g: &Geometry,
    eps: f64,
    x: &[f64],
    dy: &[f64],
    stats: &[Vec<f64>; 2],
    w: &[f64],
    fixed: bool,
) -> [Vec<f64>; 3] {
    let [mean, var] = stats;
    let n = g.set_len() as f64;
    let (mut dw, mut db) = (vec![0.0; g.params()], vec![0.0; g.params()]);
    let (mut sum, mut dot) = (vec![0.0; g.sets()], vec![0.0; g.sets()]);
    let rstd = |s: usize| 1.0 / (var[s] + eps).sqrt();
    let xhat = |i: usize, s: usize| (x[i] - mean[s]) * rstd(s);
    for (i, s, p) in elements(g) {
        dw[p] += dy[i] * xhat(i, s);
        db[p] += dy[i];
        sum[s] += dy[i] * w[p] / n;
        dot[s] += dy[i] * w[p] * xhat(i, s) / n;
    }
    let dx = elements(g).map(|(i, s, p)| {
        let mean = if g.center { sum[s] } else { 0.0 };
        let correction = if fixed { 0.0 } else { mean + xhat(i, s) * dot[s] };
        rstd(s) * (dy[i] * w[p] - correction)
    });
    [dx.collect(), dw, db]
}
