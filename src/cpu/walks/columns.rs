//! Row after row, with sums for every column that are merged into sets at the end: sets of short runs, and weights
//! by row.
//!
//! Rows shorter than a few vectors are folded: `k` rows are walked as one of `k` times the columns.

use crate::cpu::affine::Form;
use crate::cpu::backward_formula::{InputGradient, Means, MeansFrom, ParamSums, Sums};
use crate::cpu::element::{Element, Float, PANEL};
use crate::cpu::loops::{Line, Loops, Walked};
use crate::cpu::moments::{Moments, Stat, StatsFrom};
use crate::cpu::tile::Tile;
use crate::cpu::view::{InTile, OutTile, Strided, To};
use crate::cpu::walk_args::{BackwardArgs, ForwardArgs, Input, MomentsArgs, Place, SumsArgs};
use crate::geometry::{Geometry, WeightBy};
use std::ops::Range;

/// Rows are folded up to this many columns: four of the widest vectors of f32, which are summed abreast. More are more
/// columns to merge, and far apart in memory: group norm of 8x64x32x32 channels-last on a Zen 4, f32: 335 us with 512, 182
/// so; batch norm of 2x3x128x128 88 and 41.
const FOLDED: usize = 64;

/// The part of a block in a tile, folded: `rows` full rows of `columns`, one of `extra`. Column `j` holds elements
/// of the tile's column `j % unfolded`.
#[derive(Debug, Clone, Copy)]
struct Sheet {
    /// Rows of the tensor in one of the sheet.
    fold: usize,
    rows: usize,
    columns: usize,
    extra: usize,
    unfolded: usize,
    /// The tensor's row and column of the first element.
    place: [usize; 2],
    /// That row's number within its block.
    row: usize,
    /// The sheet's first set.
    set: usize,
}

/// The sheets of a tile, one per block it touches.
///
/// Rows share a sheet's row where all of a row's columns are in the tile. Not where a row has a parameter,
/// nor its columns sets of their own: a set's sums must not depend on the sets beside it.
fn sheets<'a>(g: &'a Geometry, tile: &'a Tile) -> impl Iterator<Item = Sheet> + 'a {
    let blocks = tile.rows.start / g.rows..tile.rows.end.div_ceil(g.rows);
    blocks.map(move |block| {
        let rows = tile.rows.start.max(block * g.rows)..tile.rows.end.min((block + 1) * g.rows);
        let unfolded = tile.columns.len();
        let fold = match g.weight_by != WeightBy::Row && unfolded == g.width {
            // Eight rows at least, else merging the columns would cost more than walking them.
            true => (FOLDED / unfolded).min(rows.len() / 8).max(1),
            false => 1,
        };
        Sheet {
            fold,
            rows: rows.len() / fold,
            columns: fold * unfolded,
            extra: rows.len() % fold * unfolded,
            unfolded,
            place: [rows.start, tile.columns.start],
            row: rows.start - block * g.rows,
            set: block * g.sets_per_outer() + tile.columns.start / g.run,
        }
    })
}

impl Sheet {
    /// Sets of the sheet, and of each its columns before folding, counted from the sheet's first.
    fn sets(&self, g: &Geometry) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (run, first) = (g.run, self.set);
        (0..self.unfolded / run).map(move |q| (first + q, q * run..(q + 1) * run))
    }

    /// The folded columns of `columns`.
    fn folded(&self, columns: Range<usize>) -> impl Iterator<Item = usize> {
        let unfolded = self.unfolded;
        (0..self.fold).flat_map(move |k| columns.clone().map(move |c| k * unfolded + c))
    }

    /// A value for every folded column, from one for every set.
    fn spread<A: Copy>(&self, g: &Geometry, mut value: impl FnMut(usize) -> A) -> Vec<A> {
        let mut row = Vec::with_capacity(self.columns);
        for (set, columns) in self.sets(g) {
            let value = value(set);
            row.extend(columns.map(|_| value));
        }
        self.repeated(row)
    }

    /// A row before folding, as often as there are rows in one of the sheet.
    fn repeated<A: Copy>(&self, mut row: Vec<A>) -> Vec<A> {
        row.reserve(self.columns - row.len());
        for _ in 1..self.fold {
            row.extend_from_within(..self.unfolded);
        }
        row
    }

    /// Elements in folded column `j`.
    fn count(&self, j: usize) -> f64 {
        (self.rows + (j < self.extra) as usize) as f64
    }

    fn full<'a, T: Copy>(&self, x: &InTile<'a, T>) -> Strided<'a, T> {
        x.block(self.place, self.fold * x.stride(), self.rows, self.columns)
    }

    fn extra_place(&self) -> Option<[usize; 2]> {
        (self.extra > 0).then_some([self.place[0] + self.rows * self.fold, self.place[1]])
    }

    fn extra<'a, T: Copy>(&self, x: &InTile<'a, T>) -> Option<Strided<'a, T>> {
        Some(x.block(self.extra_place()?, self.extra, 1, self.extra))
    }

    fn full_out<'a, T: Element>(&self, y: &'a mut OutTile<'_, T>) -> To<'a, T> {
        let stride = self.fold * y.stride();
        y.block(self.place, stride, self.rows, self.columns)
    }

    fn extra_out<'a, T: Element>(&self, y: &'a mut OutTile<'_, T>) -> Option<To<'a, T>> {
        Some(y.block(self.extra_place()?, self.extra, 1, self.extra))
    }

    /// The parameter of column `c` before folding.
    fn param(&self, c: usize, span: usize) -> usize {
        (self.place[1] + c) / span
    }
}

/// Moments of every folded column about its pivot.
struct ColumnMoments {
    offset: Vec<f64>,
    m2: Vec<f64>,
}

impl ColumnMoments {
    /// `pivot` of every folded column, if they are centred.
    fn of<T: Walked>(loops: &Loops<T>, x: &InTile<T>, sheet: &Sheet, pivot: Option<&[T::Acc]>) -> Self {
        let n = sheet.columns;
        let mut m = ColumnMoments { offset: vec![0.0; n], m2: vec![0.0; n] };
        loops.column_moments(sheet.full(x), pivot, &mut m.offset, &mut m.m2);
        let Some(extra) = sheet.extra(x) else { return m };
        for (j, x) in extra.values().iter().enumerate() {
            let x = x.widen().to64();
            let mut moments = Moments { n: sheet.rows as f64, offset: m.offset[j], m2: m.m2[j] };
            moments.merge(match pivot {
                Some(pivot) => Moments { n: 1.0, offset: x - pivot[j].to64(), m2: 0.0 },
                None => Moments { n: 1.0, offset: 0.0, m2: x * x },
            });
            (m.offset[j], m.m2[j]) = (moments.offset, moments.m2);
        }
        m
    }

    /// The columns of a set merged, two-pass.
    fn merged(&self, sheet: &Sheet, columns: Range<usize>) -> Moments {
        let (mut n, mut sum) = (0.0, 0.0);
        for j in sheet.folded(columns.clone()) {
            n += sheet.count(j);
            sum += sheet.count(j) * self.offset[j];
        }
        let offset = sum / n;
        let mut m2 = 0.0;
        for j in sheet.folded(columns) {
            let d = self.offset[j] - offset;
            m2 += self.m2[j] + sheet.count(j) * d * d;
        }
        Moments { n, offset, m2 }
    }
}

pub(super) fn moments<T: Walked>(k: MomentsArgs<T>) {
    let mut out = k.out.iter_mut();
    for sheet in sheets(k.g, k.tile) {
        let pivots = k.g.center.then(|| sheet.spread(k.g, |set| k.pivots[set]));
        let moments = ColumnMoments::of(k.loops, &k.x, &sheet, pivots.as_deref());
        for ((_, columns), out) in sheet.sets(k.g).zip(&mut out) {
            *out = moments.merged(&sheet, columns);
        }
    }
}

pub(super) fn forward<T: Walked>(mut k: ForwardArgs<T>) {
    let (g, mut done) = (k.g, 0);
    for sheet in sheets(g, k.tile) {
        let [row, column] = sheet.place;
        let mut stats = Vec::with_capacity(sheet.unfolded / g.run);
        match &k.stats {
            StatsFrom::Given(given) => stats.extend(sheet.sets(g).map(|(set, _)| given.of(set))),
            StatsFrom::Tile(_) => {
                let pivot = |set: usize| k.x.at(row, column + (set - sheet.set) * g.run).widen();
                let pivots = g.center.then(|| sheet.spread(g, pivot));
                let moments = ColumnMoments::of(k.loops, &k.x, &sheet, pivots.as_deref());
                stats.extend(sheet.sets(g).map(|(_, columns)| {
                    let pivot = pivots.as_ref().map(|p| p[columns.start]);
                    Stat::of(pivot, moments.merged(&sheet, columns))
                }));
            }
        }
        for stat in &stats {
            k.stats.keep(done, *stat);
            done += 1;
        }
        normalize(&mut k, &sheet, &stats);
    }
}

fn normalize<T: Walked>(k: &mut ForwardArgs<T>, sheet: &Sheet, stats: &[Stat<T::Acc>]) {
    let (g, affine) = (k.g, k.affine);
    let [mut high, mut scale, mut bias] = [(); 3].map(|()| Vec::with_capacity(sheet.columns));
    for (stat, (_, columns)) in stats.iter().zip(sheet.sets(g)) {
        let rstd = stat.rstd(k.eps);
        for c in columns {
            let [w, b] = match affine.form {
                Form::PerSpan(span) => affine.at(sheet.param(c, span)),
                // Applied row by row.
                _ => [T::Acc::ONE, T::Acc::ZERO],
            };
            high.push(stat.high);
            scale.push(rstd * w);
            bias.push(b - stat.low * (rstd * w));
        }
    }
    let [high, scale, bias] = [high, scale, bias].map(|row| sheet.repeated(row));
    let constants = [&high[..], &scale, &bias];
    let by_row = match (affine.form, affine.bias()) {
        (Form::PerRow, Some(bias)) => Some([&affine.weight[sheet.row..], &bias[sheet.row..]]),
        _ => None,
    };
    let to = Place { at: sheet.place, stride: sheet.fold * k.y.stride() };
    k.y.write(k.loops, to, sheet.full(&k.x), Line::Each { constants, rows: by_row });
    if let (Some(x), Some(at)) = (sheet.extra(&k.x), sheet.extra_place()) {
        let to = Place { at, stride: sheet.extra };
        k.y.write(k.loops, to, x, Line::Each { constants, rows: None });
    }
}

pub(super) fn sums<T: Walked>(mut k: SumsArgs<T>) {
    let mut out = k.sums.iter_mut();
    for sheet in sheets(k.input.g, k.input.tile) {
        let columns = ColumnSums::of(&k.input, &sheet);
        for ((set, c), out) in sheet.sets(k.input.g).zip(&mut out) {
            *out = columns.merged(&k.input, &sheet, set, c, &mut k.params);
        }
    }
}

/// Sums of `g` and of `g * (x - high)` for every folded column; weights only where they are by row.
struct ColumnSums {
    g: Vec<f64>,
    gx: Vec<f64>,
}

impl ColumnSums {
    fn of<T: Walked>(input: &Input<T>, sheet: &Sheet) -> Self {
        let n = sheet.columns;
        let mut sums = ColumnSums { g: vec![0.0; n], gx: vec![0.0; n] };
        let high = sheet.spread(input.g, |set| input.stats.of(set).high);
        let weight = match input.affine.form {
            Form::PerRow => Some(&input.affine.weight[sheet.row..]),
            _ => None,
        };
        let (x, dy) = (sheet.full(&input.x), sheet.full(&input.dy));
        input.loops.column_dots(x, dy, weight, &high, &mut sums.g, &mut sums.gx);
        if let (Some(x), Some(dy)) = (sheet.extra(&input.x), sheet.extra(&input.dy)) {
            for (j, (x, dy)) in x.values().iter().zip(dy.values()).enumerate() {
                let dy = dy.widen();
                sums.g[j] += dy.to64();
                sums.gx[j] += (dy * (x.widen() - high[j])).to64();
            }
        }
        sums
    }

    fn over(&self, columns: impl Iterator<Item = usize>) -> Sums {
        columns.fold(Sums::default(), |sums, j| Sums { g: sums.g + self.g[j], gx: sums.gx + self.gx[j] })
    }

    /// The weighted sums of a set's columns; adds to the parameters' what belongs to them.
    fn merged<T: Walked>(
        &self,
        input: &Input<T>,
        sheet: &Sheet,
        set: usize,
        columns: Range<usize>,
        params: &mut Option<ParamSums<T::Acc>>,
    ) -> Sums {
        let Form::PerSpan(span) = input.affine.form else { return self.over(sheet.folded(columns)) };
        let (stat, rstd) = input.stat(set);
        let first = sheet.param(0, span);
        let mut sums = Sums::default();
        let mut c = columns.start;
        while c < columns.end {
            let p = sheet.param(c, span);
            let end = ((p + 1) * span - sheet.place[1]).min(columns.end);
            let own = self.over(sheet.folded(c..end));
            let weight = input.affine.weight[p].to64();
            sums.g += own.g * weight;
            sums.gx += own.gx * weight;
            if let Some(params) = params {
                super::spans::add(params, p - first, &[own], stat, rstd);
            }
            c = end;
        }
        sums
    }
}

/// What makes dx in every folded column, each field an array.
struct ColumnGradients<A> {
    high: Vec<A>,
    x_scale: Vec<A>,
    shift: Vec<A>,
    /// `rstd * weight`, or `rstd` where weights are by row.
    scale: Vec<A>,
    low: Vec<A>,
}

pub(super) fn backward<T: Walked>(mut k: BackwardArgs<T>) {
    let by_row = k.input.affine.form == Form::PerRow;
    for sheet in sheets(k.input.g, k.input.tile) {
        let gradients = gradients(&mut k, &sheet);
        if by_row {
            row_sums(&mut k, &sheet, &gradients);
        }
        let (Some(dx), input) = (&mut k.dx, &k.input) else { continue };
        let ColumnGradients { high, x_scale, shift, scale, .. } = &gradients;
        let constants = [&high[..], x_scale, shift, scale];
        let weight = by_row.then(|| &input.affine.weight[sheet.row..]);
        let (x, dy) = (sheet.full(&input.x), sheet.full(&input.dy));
        input.loops.gradient_each(x, dy, sheet.full_out(dx), constants, weight);
        if let (Some(x), Some(dy), Some(dx)) =
            (sheet.extra(&input.x), sheet.extra(&input.dy), sheet.extra_out(dx))
        {
            input.loops.gradient_each(x, dy, dx, constants, None);
        }
    }
}

fn gradients<T: Walked>(k: &mut BackwardArgs<T>, sheet: &Sheet) -> ColumnGradients<T::Acc> {
    let input = &k.input;
    let spans = match input.affine.form {
        Form::PerSpan(span) => Some(span),
        _ => None,
    };
    let sums = match k.means {
        MeansFrom::Given(_) => None,
        MeansFrom::Fixed if spans.is_none() || k.params.is_none() => None,
        _ => Some(ColumnSums::of(input, sheet)),
    };
    let empty = || Vec::with_capacity(sheet.columns);
    let mut all =
        ColumnGradients { high: empty(), x_scale: empty(), shift: empty(), scale: empty(), low: empty() };
    let mut unused = None;
    for (set, columns) in sheet.sets(input.g) {
        let (stat, rstd) = input.stat(set);
        let params = if spans.is_some() { &mut k.params } else { &mut unused };
        let sums = sums.as_ref().map(|s| s.merged(input, sheet, set, columns.clone(), params));
        let means = match (k.means, sums) {
            (MeansFrom::Given(means), _) => means[set],
            (MeansFrom::Tile, Some(sums)) => input.means(sums, stat, rstd),
            _ => Means::ZERO,
        };
        let gradient = InputGradient::of(stat, rstd, means);
        for c in columns {
            let weight = spans.map_or(T::Acc::ONE, |span| input.affine.weight[sheet.param(c, span)]);
            all.high.push(gradient.high);
            all.x_scale.push(gradient.x_scale);
            all.shift.push(gradient.shift);
            all.scale.push(rstd * weight);
            all.low.push(gradient.low);
        }
    }
    let ColumnGradients { high, x_scale, shift, scale, low } = all;
    let [high, x_scale, shift, scale, low] =
        [high, x_scale, shift, scale, low].map(|row| sheet.repeated(row));
    ColumnGradients { high, x_scale, shift, scale, low }
}

/// Sums of parameters by row.
fn row_sums<T: Walked>(k: &mut BackwardArgs<T>, sheet: &Sheet, gradients: &ColumnGradients<T::Acc>) {
    let (input, Some(params)) = (&k.input, &mut k.params) else { return };
    // The sums start at the tile's first row of a block.
    let first = if input.tile.rows.len() >= input.g.rows { sheet.row } else { 0 };
    let own = first..first + sheet.rows;
    // One vector sums here, not four as elsewhere.
    let panel = PANEL / 4 * input.loops.width;
    for c in (0..sheet.columns).step_by(panel) {
        let columns = c..(c + panel).min(sheet.columns);
        let place = [sheet.place[0], sheet.place[1] + c];
        let [x, dy] = [input.x, input.dy].map(|x| x.block(place, x.stride(), sheet.rows, columns.len()));
        let stats =
            [&gradients.high, &gradients.low, &gradients.scale].map(|values| &values[columns.clone()]);
        let (dw, db) = (&mut params.weight[own.clone()], &mut params.bias[own.clone()]);
        input.loops.add_rows(x, dy, stats, dw, db);
    }
}
