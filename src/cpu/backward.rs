//! The backward: one visit per tile where tiles hold whole sets, else a sweep for the sums and one
//! for dx. Parameter gradients are summed per tile, and over the tiles in their order.

use super::element::{converted, Element, Float};
use super::forward::elements;
use super::gradient::{Means, MeansFrom, Slots, Sums};
use super::level::Level;
use super::moments::Stats;
use super::output::Output;
use super::params::{Form, Params};
use super::runs::backward::Input;
use super::tile::{Cut, Tile, Walk};
use super::work::{each, split};
use super::{columns, runs};
use crate::geometry::Geometry;
use crate::request::{Arg, Backward, Gradients};
use candle_core::{bail, CpuStorage, DType, Result};
use std::borrow::Cow;

/// A backward's arguments, read.
struct Call<'a, T: Element> {
    level: Level,
    g: &'a Geometry,
    eps: T::Acc,
    x: &'a [T],
    dy: &'a [T],
    params: Params<'a, T::Acc>,
    stats: Cow<'a, [T::Acc]>,
}

/// Sums for parameters, tile after tile.
struct AllSlots<A> {
    weight: Vec<A>,
    bias: Vec<A>,
}

pub(super) fn backward<T: Element>(
    level: Level,
    call: &Backward<CpuStorage>,
) -> Result<Gradients<CpuStorage>> {
    let params = call.want.dweight.is_some() || call.want.dbias.is_some();
    let read = Call::<T>::new(level, call, params)?;
    let (dx, slots) = match (call.fixed, call.want.dx, read.params.form) {
        (_, false, _) if !params => (None, None),
        (_, false, Form::Spans(_)) => {
            let cut = read.cut(false);
            (None, Some((read.sums(&cut, true).1, cut)))
        }
        (true, _, _) | (_, false, _) => {
            read.visit(Cut::sweep(read.g, 2 * size_of::<T>()), MeansFrom::Fixed, params, call.want.dx)
        }
        _ => read.trained(params),
    };
    let (weight, bias) = match slots {
        Some((slots, cut)) => {
            let tiles = cut.tiles();
            (read.over_tiles(&tiles, slots.weight), read.over_tiles(&tiles, slots.bias))
        }
        None => (vec![T::Acc::ZERO; read.g.params()], vec![T::Acc::ZERO; read.g.params()]),
    };
    Ok(Gradients {
        dweight: call.want.dweight.map(|dtype| stored(weight, dtype)).transpose()?,
        dbias: call.want.dbias.map(|dtype| stored(bias, dtype)).transpose()?,
        dx: dx.map(T::to_cpu_storage_owned),
        dskip: None,
        dgate: None,
    })
}

/// Sums over each set of `dy` and of `dy * xhat`: `[2, sets]`.
pub(super) fn gradient_sums<T: Element>(level: Level, call: &Backward<CpuStorage>) -> Result<Vec<T::Acc>> {
    let read = Call::<T>::new(level, call, true)?;
    if !read.g.one_param_per_set() || read.g.outer > 1 {
        bail!("{}: gradient sums are for norms with a parameter per set", call.norm.name)
    }
    let cut = read.cut(false);
    let slots = read.sums(&cut, true).1;
    let tiles = cut.tiles();
    let both = [read.over_tiles(&tiles, slots.bias), read.over_tiles(&tiles, slots.weight)].concat();
    // Without elements there are no parameters to be seen, but there may be sets.
    Ok(if both.is_empty() { vec![T::Acc::ZERO; 2 * read.g.sets()] } else { both })
}

/// dx from sums over `count` elements a set, some of them elsewhere.
pub(super) fn input_gradient<T: Element>(
    level: Level,
    call: &Backward<CpuStorage>,
    sums: &Arg<CpuStorage>,
    count: f64,
) -> Result<Vec<T>> {
    let read = Call::<T>::new(level, call, true)?;
    let sets = read.g.sets();
    let sums = converted::<T::Acc>(sums, 2 * sets)?;
    let means: Vec<_> = (0..sets)
        .map(|s| {
            let weight = read.params.weight(s % read.g.sets_per_outer()).to64();
            let mean = |sum: T::Acc| T::Acc::from64(sum.to64() * weight / count);
            Means { g: mean(sums[s]), dot: mean(sums[sets + s]) }
        })
        .collect();
    let cut = Cut::sweep(read.g, 2 * size_of::<T>());
    match read.visit(cut, MeansFrom::Given(&means), false, true) {
        (Some(dx), _) => Ok(dx),
        _ => bail!("{}: no gradient", call.norm.name),
    }
}

impl<'a, T: Element> Call<'a, T> {
    fn new(level: Level, call: &'a Backward<'a, CpuStorage>, params: bool) -> Result<Self> {
        let g = &call.norm.geometry;
        Ok(Self {
            level,
            g,
            eps: T::Acc::from64(call.norm.eps),
            x: elements(&call.norm, &call.x)?,
            dy: elements(&call.norm, &call.dy)?,
            params: Params::new(g, &call.weight, &None, params || call.weight.is_some())?,
            stats: converted(&call.stats, 3 * g.sets())?,
        })
    }

    /// The cut for sums of sets: x and dy are read.
    fn cut(&self, by_column: bool) -> Cut {
        Cut::new(self.g, 2 * size_of::<T>()).with_tall_tiles(by_column)
    }

    fn input<'b>(&'b self, tile: &'b Tile) -> Input<'b, T> {
        let Call { g, eps, x, dy, params, stats, .. } = self;
        Input { g, eps: *eps, x, dy, params, stats: Stats(stats), tile }
    }

    /// dx and parameter sums where the statistics depend on x.
    fn trained(&self, params: bool) -> (Option<Vec<T>>, Option<(AllSlots<T::Acc>, Cut)>) {
        let form = self.params.form;
        let cut = self.cut(params && form == Form::Columns);
        if cut.whole_sets() {
            return self.visit(cut, MeansFrom::Tile, params, true);
        }
        let spans = matches!(form, Form::Spans(_));
        let (means, slots) = self.sums(&cut, params && spans);
        let sweep = match form {
            Form::Columns => cut.columns_first(),
            _ => Cut::sweep(self.g, 2 * size_of::<T>()),
        };
        let (dx, by_sweep) = self.visit(sweep, MeansFrom::Given(&means), params && !spans, true);
        (dx, if spans { params.then_some((slots, cut)) } else { by_sweep })
    }

    /// The means of every set, and the sums of parameters by span.
    fn sums(&self, cut: &Cut, params: bool) -> (Vec<Means<T::Acc>>, AllSlots<T::Acc>) {
        let g = self.g;
        let tiles = cut.tiles();
        let mut all = AllSlots::new(g, &tiles, params);
        let mut partial = vec![Sums::default(); tiles.iter().map(|t| t.sets(g).len()).sum()];
        let parts = split(&mut partial, tiles.iter().map(|t| t.sets(g).len()));
        let work: Vec<_> = tiles.iter().zip(all.split(g, &tiles)).zip(parts).collect();
        each(work, |((tile, slots), sums)| {
            let input = self.input(tile);
            match Walk::of(g) {
                Walk::Runs => self.level.run(runs::backward::Partial { input, slots, sums }),
                Walk::Columns => self.level.run(columns::backward::Partial { input, slots, sums }),
            }
        });
        let mut sums = vec![Sums::default(); g.sets()];
        for (set, part) in tiles.iter().flat_map(|t| t.sets(g)).zip(&partial) {
            sums[set].g += part.g;
            sums[set].gx += part.gx;
        }
        let means = sums.iter().enumerate().map(|(s, sums)| {
            let stat = Stats(&self.stats).of(s);
            Means::of(*sums, stat, stat.rstd(self.eps), g.center, g.set_len() as f64)
        });
        (means.collect(), all)
    }

    /// One visit of every tile.
    #[allow(unsafe_code)]
    fn visit(
        &self,
        cut: Cut,
        means: MeansFrom<T::Acc>,
        params: bool,
        dx: bool,
    ) -> (Option<Vec<T>>, Option<(AllSlots<T::Acc>, Cut)>) {
        let g = self.g;
        let tiles = cut.tiles();
        let mut all = AllSlots::new(g, &tiles, params);
        let mut output = dx.then(|| Output::new(g));
        let out: Vec<_> = match &mut output {
            Some(output) => output.tiles(&cut).into_iter().map(Some).collect(),
            None => tiles.iter().map(|_| None).collect(),
        };
        let work: Vec<_> = tiles.iter().zip(all.split(g, &tiles)).zip(out).collect();
        each(work, |((tile, slots), dx)| {
            let input = self.input(tile);
            match Walk::of(g) {
                Walk::Runs => self.level.run(runs::backward::Backward { input, means, slots, dx }),
                Walk::Columns => self.level.run(columns::backward::Backward { input, means, slots, dx }),
            }
        });
        // SAFETY: every tile of the cut has just been through a kernel.
        let dx = output.map(|output| unsafe { output.written() });
        (dx, params.then_some((all, cut)))
    }

    /// Parameter sums over all tiles.
    fn over_tiles(&self, tiles: &[Tile], slots: Vec<T::Acc>) -> Vec<T::Acc> {
        let all = 0..self.g.params();
        if let [tile] = tiles {
            if tile.params(self.g) == all {
                return slots;
            }
        }
        let mut sum = vec![0.0; all.len()];
        let mut rest = &slots[..];
        for tile in tiles {
            let params = tile.params(self.g);
            let (own, others) = rest.split_at(params.len());
            sum[params].iter_mut().zip(own).for_each(|(sum, own)| *sum += own.to64());
            rest = others;
        }
        sum.into_iter().map(T::Acc::from64).collect()
    }
}

impl<A: Float> AllSlots<A> {
    fn new(g: &Geometry, tiles: &[Tile], any: bool) -> Self {
        let len = if any { tiles.iter().map(|t| t.params(g).len()).sum() } else { 0 };
        Self { weight: vec![A::ZERO; len], bias: vec![A::ZERO; len] }
    }

    /// Each tile's own.
    fn split(&mut self, g: &Geometry, tiles: &[Tile]) -> Vec<Option<Slots<'_, A>>> {
        if self.weight.is_empty() {
            return tiles.iter().map(|_| None).collect();
        }
        let lens = || tiles.iter().map(|t| t.params(g).len());
        let both = split(&mut self.weight, lens()).into_iter().zip(split(&mut self.bias, lens()));
        both.map(|(weight, bias)| Some(Slots { weight, bias })).collect()
    }
}

fn stored<A: Float>(x: Vec<A>, dtype: DType) -> Result<CpuStorage> {
    fn rounded<A: Float, T: Element>(x: Vec<A>) -> Vec<T> {
        x.into_iter().map(|x| T::narrow(T::Acc::from64(x.to64()))).collect()
    }
    Ok(match dtype {
        dtype if dtype == A::DTYPE => A::to_cpu_storage_owned(x),
        DType::F64 => CpuStorage::F64(rounded(x)),
        DType::F32 => CpuStorage::F32(rounded(x)),
        DType::F16 => CpuStorage::F16(rounded(x)),
        DType::BF16 => CpuStorage::BF16(rounded(x)),
        other => bail!("no gradient of dtype {other:?}"),
    })
}
