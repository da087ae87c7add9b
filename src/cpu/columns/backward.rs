//! Backward kernels for sets of short runs.

use super::{each_band, places, sheets, spilled, Sheet, ACROSS, PANEL_ROWS, WIDEST};
use crate::cpu::element::{Element, Float, PANEL, V};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Slots, Sums};
use crate::cpu::level::Kernel;
use crate::cpu::output::OutTile;
use crate::cpu::params::Form;
use crate::cpu::runs::backward::Input;
use crate::cpu::streams::{each_vector, get, To};
use crate::cpu::vector::{Simd, Vector};
use std::ops::Range;

/// Sums over a tile without dx: of its parameters, and of its sets.
pub(in crate::cpu) struct Partial<'a, T: Element> {
    pub input: Input<'a, T>,
    /// Not for weights by row, whose sums `Backward` makes.
    pub slots: Option<Slots<'a, T::Acc>>,
    pub sums: &'a mut [Sums],
}

impl<T: Element> Kernel for Partial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let (input, mut out) = (&self.input, self.sums.iter_mut());
        for sheet in sheets(input.g, input.tile) {
            let columns = ColumnSums::of::<S, T>(input, &sheet);
            for ((set, c), out) in sheet.sets(input.g).zip(&mut out) {
                *out = columns.merged(input, &sheet, set, c, &mut self.slots);
            }
        }
    }
}

/// dx of a tile, and the sums of its parameters.
pub(in crate::cpu) struct Backward<'a, T: Element> {
    pub input: Input<'a, T>,
    pub means: MeansFrom<'a, T::Acc>,
    pub slots: Option<Slots<'a, T::Acc>>,
    pub dx: Option<OutTile<'a, T>>,
}

impl<T: Element> Kernel for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let rows = self.input.params.form == Form::Rows;
        for sheet in sheets(self.input.g, self.input.tile) {
            let line = self.line::<S>(&sheet);
            if rows {
                self.row_sums::<S>(&sheet, &line);
            }
            self.input_gradient::<S>(&sheet, &line);
        }
    }
}

/// Sums of `g` and of `g * (x - high)` for every folded column; weights only where they are by row.
struct ColumnSums {
    g: Vec<f64>,
    gx: Vec<f64>,
}

impl ColumnSums {
    #[inline(always)]
    fn of<S: Simd, T: Element>(input: &Input<T>, sheet: &Sheet) -> Self {
        let n = sheet.columns;
        let mut sums = ColumnSums { g: vec![0.0; n], gx: vec![0.0; n] };
        let mut high = vec![T::Acc::ZERO; n];
        for (set, columns) in sheet.sets(input.g) {
            let stat = input.stats.of(set);
            sheet.folded(columns).for_each(|j| high[j] = stat.high);
        }
        let weights = match input.params.form {
            Form::Rows => input.params.weight.as_deref(),
            _ => None,
        };
        each_band!(V::<S, T>::W, n, |from, to, K| {
            for r in (0..sheet.rows).step_by(PANEL_ROWS) {
                let rows = PANEL_ROWS.min(sheet.rows - r);
                let at = sheet.first + r * sheet.stride + from;
                let weight = weights.map(|w| &w[sheet.row + r..sheet.row + r + rows]);
                let panel = [&input.x[at..], &input.dy[at..]];
                let high = &high[from..to];
                let [g, gx] = panel_sums::<S, T, K>(panel, sheet.stride, rows, weight, high);
                for l in 0..to - from {
                    sums.g[from + l] += g[l].to64();
                    sums.gx[from + l] += gx[l].to64();
                }
            }
        });
        for j in 0..sheet.extra {
            let at = sheet.first + sheet.rows * sheet.stride + j;
            let dy = input.dy[at].widen();
            sums.g[j] += dy.to64();
            sums.gx[j] += (dy * (input.x[at].widen() - high[j])).to64();
        }
        sums
    }

    /// The weighted sums of a set's columns; adds to the slots what belongs to its parameters.
    #[inline(always)]
    fn merged<T: Element>(
        &self,
        input: &Input<T>,
        sheet: &Sheet,
        set: usize,
        columns: Range<usize>,
        slots: &mut Option<Slots<T::Acc>>,
    ) -> Sums {
        let mut sums = Sums::default();
        let Form::Spans(span) = input.params.form else {
            for j in sheet.folded(columns) {
                sums.g += self.g[j];
                sums.gx += self.gx[j];
            }
            return sums;
        };
        let stat = input.stats.of(set);
        let rstd = stat.rstd(input.eps);
        let first = sheet.column / span;
        let mut c = columns.start;
        while c < columns.end {
            let p = (sheet.column + c) / span;
            let end = ((p + 1) * span - sheet.column).min(columns.end);
            let mut own = Sums::default();
            for j in sheet.folded(c..end) {
                own.g += self.g[j];
                own.gx += self.gx[j];
            }
            let weight = input.params.weight(p).to64();
            sums.g += own.g * weight;
            sums.gx += own.gx * weight;
            if let Some(slots) = slots {
                slots.weight[p - first] += T::Acc::from64(own.dot(stat, rstd));
                slots.bias[p - first] += T::Acc::from64(own.g);
            }
            c = end;
        }
        sums
    }
}

/// Sums of `g` and `g * (x - high)` of the columns of a panel of x and dy: as many as `high` has, in `K`
/// vectors, with weights by row.
#[inline(always)]
fn panel_sums<S: Simd, T: Element, const K: usize>(
    [x, dy]: [&[T]; 2],
    stride: usize,
    rows: usize,
    weight: Option<&[T::Acc]>,
    high: &[T::Acc],
) -> [[T::Acc; WIDEST]; 2] {
    let zero = V::<S, T>::splat(T::Acc::ZERO);
    let n = high.len();
    let at = places::<K>(V::<S, T>::W, n);
    let (mut g, mut gx, mut highs) = ([zero; K], [zero; K], [zero; K]);
    for k in 0..K {
        highs[k] = get::<S, T::Acc>(high, at[k]);
    }
    for r in 0..rows {
        let w = V::<S, T>::splat(weight.map_or(T::Acc::ONE, |w| w[r]));
        let (x, dy) = (&x[r * stride..][..n], &dy[r * stride..][..n]);
        for k in 0..K {
            let dy = get::<S, T>(dy, at[k]) * w;
            g[k] = g[k] + dy;
            gx[k] = dy.fma(get::<S, T>(x, at[k]) - highs[k], gx[k]);
        }
    }
    [spilled::<S, T::Acc, K>(g, at), spilled::<S, T::Acc, K>(gx, at)]
}

/// `Slope` of every folded column, each field an array.
struct Line<A> {
    high: Vec<A>,
    /// `rstd * weight`, or `rstd` where weights are by row.
    scale: Vec<A>,
    slope: Vec<A>,
    shift: Vec<A>,
    low: Vec<A>,
}

impl<T: Element> Backward<'_, T> {
    #[inline(always)]
    fn line<S: Simd>(&mut self, sheet: &Sheet) -> Line<T::Acc> {
        let input = &self.input;
        let spans = match input.params.form {
            Form::Spans(span) => Some(span),
            _ => None,
        };
        let sums = match self.means {
            MeansFrom::Given(_) => None,
            MeansFrom::Fixed if spans.is_none() || self.slots.is_none() => None,
            _ => Some(ColumnSums::of::<S, T>(input, sheet)),
        };
        let zeros = || vec![T::Acc::ZERO; sheet.columns];
        let mut line = Line { high: zeros(), scale: zeros(), slope: zeros(), shift: zeros(), low: zeros() };
        let mut unused = None;
        for (set, columns) in sheet.sets(input.g) {
            let stat = input.stats.of(set);
            let rstd = stat.rstd(input.eps);
            let slots = if spans.is_some() { &mut self.slots } else { &mut unused };
            let sums = sums.as_ref().map(|s| s.merged(input, sheet, set, columns.clone(), slots));
            let means = match (self.means, sums) {
                (MeansFrom::Given(means), _) => means[set],
                (MeansFrom::Tile, Some(sums)) => {
                    Means::of(sums, stat, rstd, input.g.center, input.g.set_len() as f64)
                }
                _ => Means::ZERO,
            };
            let s = Slope::of(stat, rstd, means);
            for j in sheet.folded(columns) {
                let weight = match spans {
                    Some(span) => input.params.weight((sheet.column + j % sheet.unfolded) / span),
                    None => T::Acc::ONE,
                };
                line.high[j] = s.high;
                line.scale[j] = s.rstd * weight;
                line.slope[j] = s.slope;
                line.shift[j] = s.shift;
                line.low[j] = s.low;
            }
        }
        line
    }

    /// Sums of parameters by row.
    #[inline(always)]
    fn row_sums<S: Simd>(&mut self, sheet: &Sheet, line: &Line<T::Acc>) {
        let Some(slots) = &mut self.slots else { return };
        let zero = V::<S, T>::splat(T::Acc::ZERO);
        for r in 0..sheet.rows {
            // The slots start at the tile's first row of a block.
            let slot = if self.input.tile.rows.len() >= self.input.g.rows { sheet.row + r } else { r };
            // One vector sums here, not four as elsewhere.
            let panel = PANEL / 4 * V::<S, T>::W;
            for c in (0..sheet.columns).step_by(panel) {
                let end = (c + panel).min(sheet.columns);
                let first = sheet.first + r * sheet.stride;
                let (x, dy) = (&self.input.x[first..], &self.input.dy[first..]);
                let (x, dy, high) = (&x[c..end], &dy[c..end], &line.high[c..end]);
                let (rstd, low) = (&line.scale[c..end], &line.low[c..end]);
                let (mut dw, mut db) = (zero, zero);
                each_vector!(V::<S, T>::W, end - c, |at| {
                    let dy = get::<S, T>(dy, at);
                    let d = (get::<S, T>(x, at) - get::<S, T::Acc>(high, at)) - get::<S, T::Acc>(low, at);
                    dw = (dy * get::<S, T::Acc>(rstd, at)).fma(d, dw);
                    db = db + dy;
                });
                slots.weight[slot] += dw.sum();
                slots.bias[slot] += db.sum();
            }
        }
    }

    #[inline(always)]
    fn input_gradient<S: Simd>(&mut self, sheet: &Sheet, line: &Line<T::Acc>) {
        let Some(dx) = &mut self.dx else { return };
        let Input { g, x, dy, params, .. } = self.input;
        for (r, at) in sheet.lines().enumerate().filter(|(_, at)| !at.is_empty()) {
            let dx = match sheet.stride == sheet.columns {
                true => dx.rows(at.clone()),
                false => {
                    let row = sheet.block * g.rows + sheet.row + r;
                    dx.row(row, sheet.column..sheet.column + sheet.columns)
                }
            };
            let weight = match params.form {
                Form::Rows => params.weight(sheet.row + r),
                _ => T::Acc::ONE,
            };
            by_columns::<S, T>(&x[at.clone()], &dy[at], line, weight, dx);
        }
    }
}

#[inline(always)]
fn by_columns<S: Simd, T: Element>(x: &[T], dy: &[T], line: &Line<T::Acc>, weight: T::Acc, mut dx: To<T>) {
    let n = x.len();
    let dy = &dy[..n];
    let (high, scale) = (&line.high[..n], &line.scale[..n]);
    let (slope, shift) = (&line.slope[..n], &line.shift[..n]);
    let weight = V::<S, T>::splat(weight);
    each_vector!(V::<S, T>::W, n, |at| {
        let d = get::<S, T>(x, at) - get::<S, T::Acc>(high, at);
        let line = d.fma(get::<S, T::Acc>(slope, at), get::<S, T::Acc>(shift, at));
        let g = get::<S, T>(dy, at) * weight;
        dx.put::<S>(at, g.fma(get::<S, T::Acc>(scale, at), line));
    })
}
