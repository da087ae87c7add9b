//! Backward kernels for sets of short runs.

use super::{sheets, Sheet};
use crate::cpu::element::{fma, Element, Float, Panel};
use crate::cpu::gradient::{Means, MeansFrom, Slope, Slots, Sums};
use crate::cpu::lanes::Lanes;
use crate::cpu::level::Kernel;
use crate::cpu::output::OutTile;
use crate::cpu::params::Form;
use crate::cpu::runs::backward::Input;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows whose sums are made in the accumulation type before they go on in f64.
const PANEL_ROWS: usize = 64;

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
    fn run<const W: usize, const FMA: bool>(mut self) {
        let mut buffers = (T::buffer(), T::buffer());
        let (input, mut out) = (&self.input, self.sums.iter_mut());
        for sheet in sheets(input.g, input.tile) {
            let columns = ColumnSums::of(input, &sheet, &mut buffers);
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
    fn run<const W: usize, const FMA: bool>(mut self) {
        let mut buffers = (T::buffer(), T::buffer());
        let rows = self.input.params.form == Form::Rows;
        for sheet in sheets(self.input.g, self.input.tile) {
            let line = self.line(&sheet, &mut buffers);
            if rows {
                self.row_sums::<W, FMA>(&sheet, &line, &mut buffers);
            }
            self.input_gradient::<FMA>(&sheet, &line);
        }
    }
}

type Buffers<T> = (<T as Element>::Buffer, <T as Element>::Buffer);

/// Sums of `g` and of `g * (x - high)` for every folded column; weights only where they are by row.
struct ColumnSums {
    g: Vec<f64>,
    gx: Vec<f64>,
}

impl ColumnSums {
    #[inline(always)]
    fn of<T: Element>(input: &Input<T>, sheet: &Sheet, buffers: &mut Buffers<T>) -> Self {
        let n = sheet.columns;
        let mut sums = ColumnSums { g: vec![0.0; n], gx: vec![0.0; n] };
        let mut high = vec![T::Acc::ZERO; n];
        for (set, columns) in sheet.sets(input.g) {
            let stat = input.stats.of(set);
            sheet.folded(columns).for_each(|j| high[j] = stat.high);
        }
        let mut at = 0;
        while at < n {
            at = match n - at {
                32.. => sums.panels::<T, 32>(input, sheet, &high, at, at, buffers),
                // The last vector again; what it did already is not added twice.
                1.. if n >= 16 => sums.panels::<T, 16>(input, sheet, &high, at.min(n - 16), at, buffers),
                _ => sums.panels::<T, 1>(input, sheet, &high, at, at, buffers),
            };
        }
        for j in 0..sheet.extra {
            let at = sheet.first + sheet.rows * sheet.stride + j;
            let dy = input.dy[at].widen();
            sums.g[j] += dy.to64();
            sums.gx[j] += (dy * (input.x[at].widen() - high[j])).to64();
        }
        sums
    }

    /// Sums of `C` columns from `from` on; keeps those from `keep` on. Returns the end.
    #[inline(always)]
    fn panels<T: Element, const C: usize>(
        &mut self,
        input: &Input<T>,
        sheet: &Sheet,
        high: &[T::Acc],
        from: usize,
        keep: usize,
        buffers: &mut Buffers<T>,
    ) -> usize {
        let high: [T::Acc; C] = std::array::from_fn(|l| high[from + l]);
        let by_row = input.params.form == Form::Rows;
        for r in (0..sheet.rows).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(sheet.rows - r);
            let at = sheet.first + r * sheet.stride + from;
            let x = T::panel(&input.x[at..], sheet.stride, rows, C, &mut buffers.0);
            let dy = T::panel(&input.dy[at..], sheet.stride, rows, C, &mut buffers.1);
            let first = sheet.row + r;
            let weight = match &input.params.weight {
                Some(weight) if by_row => Some(&weight[first..first + rows]),
                _ => None,
            };
            let (g, gx) = input.level.run(PanelSums { x, dy, weight, high });
            for l in keep - from..C {
                self.g[from + l] += g[l].to64();
                self.gx[from + l] += gx[l].to64();
            }
        }
        from + C
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

/// Sums of `g` and `g * (x - high)` of the `C` columns of a panel, with weights by row.
struct PanelSums<'a, A, const C: usize> {
    x: Panel<'a, A>,
    dy: Panel<'a, A>,
    weight: Option<&'a [A]>,
    high: [A; C],
}

impl<A: Float, const C: usize> Kernel for PanelSums<'_, A, C> {
    type Output = ([A; C], [A; C]);

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) -> Self::Output {
        let PanelSums { x, dy, weight, high } = self;
        let (mut g, mut gx) = ([A::ZERO; C], [A::ZERO; C]);
        for r in 0..x.rows {
            let w = weight.map_or(A::ONE, |w| w[r]);
            let (x, dy) = (&x.row(r)[..C], &dy.row(r)[..C]);
            for l in 0..C {
                let dy = dy[l] * w;
                g[l] += dy;
                gx[l] = fma::<_, FMA>(dy, x[l] - high[l], gx[l]);
            }
        }
        (g, gx)
    }
}

/// `Slope` of every folded column, each field an array.
struct Line<A> {
    high: Vec<A>,
    /// `rstd * weight`, or `rstd` where weights are by row.
    scale: Vec<A>,
    slope: Vec<A>,
    shift: Vec<A>,
    centre: Vec<A>,
}

impl<T: Element> Backward<'_, T> {
    #[inline(always)]
    fn line(&mut self, sheet: &Sheet, buffers: &mut Buffers<T>) -> Line<T::Acc> {
        let input = &self.input;
        let spans = match input.params.form {
            Form::Spans(span) => Some(span),
            _ => None,
        };
        let sums = match self.means {
            MeansFrom::Given(_) => None,
            MeansFrom::Fixed if spans.is_none() || self.slots.is_none() => None,
            _ => Some(ColumnSums::of(input, sheet, buffers)),
        };
        let zeros = || vec![T::Acc::ZERO; sheet.columns];
        let mut line =
            Line { high: zeros(), scale: zeros(), slope: zeros(), shift: zeros(), centre: zeros() };
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
                line.centre[j] = s.centre;
            }
        }
        line
    }

    /// Sums of parameters by row.
    #[inline(always)]
    fn row_sums<const W: usize, const FMA: bool>(
        &mut self,
        sheet: &Sheet,
        line: &Line<T::Acc>,
        buffers: &mut Buffers<T>,
    ) {
        let Some(slots) = &mut self.slots else { return };
        for r in 0..sheet.rows {
            let mut lanes = Lanes::<T::Acc, 2, W>::new();
            for c in (0..sheet.columns).step_by(crate::cpu::element::PANEL) {
                let end = (c + crate::cpu::element::PANEL).min(sheet.columns);
                let at = sheet.first + r * sheet.stride + c;
                let x: Panel<T::Acc> = T::panel(&self.input.x[at..], 0, 1, end - c, &mut buffers.0);
                let dy: Panel<T::Acc> = T::panel(&self.input.dy[at..], 0, 1, end - c, &mut buffers.1);
                let arrays =
                    [x.row(0), dy.row(0), &line.high[c..end], &line.scale[c..end], &line.centre[c..end]];
                lanes.add(arrays, |[x, dy, high, rstd, centre], [dw, db]| {
                    let xhat = fma::<_, FMA>(x - high, rstd, centre);
                    [fma::<_, FMA>(dy, xhat, dw), db + dy]
                });
            }
            let [dw, db] = lanes.total();
            // The slots start at the tile's first row of a block.
            let slot = if self.input.tile.rows.len() >= self.input.g.rows { sheet.row + r } else { r };
            slots.weight[slot] += dw;
            slots.bias[slot] += db;
        }
    }

    #[inline(always)]
    fn input_gradient<const FMA: bool>(&mut self, sheet: &Sheet, line: &Line<T::Acc>) {
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
            by_columns::<T, FMA>(&x[at.clone()], &dy[at], line, weight, dx);
        }
    }
}

#[inline(always)]
fn by_columns<T: Element, const FMA: bool>(
    x: &[T],
    dy: &[T],
    line: &Line<T::Acc>,
    weight: T::Acc,
    dx: &mut [MaybeUninit<T>],
) {
    let n = x.len();
    let (dy, dx) = (&dy[..n], &mut dx[..n]);
    let (high, scale) = (&line.high[..n], &line.scale[..n]);
    let (slope, shift) = (&line.slope[..n], &line.shift[..n]);
    for i in 0..n {
        let line = fma::<_, FMA>(x[i].widen() - high[i], slope[i], shift[i]);
        dx[i].write(T::narrow(fma::<_, FMA>(dy[i].widen() * weight, scale[i], line)));
    }
}
