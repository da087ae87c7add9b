//! The backward: one visit per tile where tiles hold whole sets, else a sweep for the sums and one for dx.
//! Parameter gradients are summed per tile, and over the tiles in their order.

use super::affine::{Affine, Form};
use super::backward_formula::{Means, MeansFrom, ParamSums, Sums};
use super::element::{converted, Element, Float};
use super::forward::{after, elements, source, written};
use super::loops::{Stored, Walked};
use super::moments::{Stats, StatsFrom};
use super::output::{Output, Tiles};
use super::parallel::{for_each, split};
use super::plan::{self, Asked, Origin, Visit, Walk};
use super::simd_level::Level;
use super::staging::{gated_gradient, pieces, write, After, Room, Scratch, Source, Tensor};
use super::tile::{Cut, Tile};
use super::view::OutTile;
use super::walk_args::{BackwardArgs, ForwardArgs, Input, Out, SumsArgs};
use super::walks;
use crate::geometry::Geometry;
use crate::request::{Arg, Backward, Gradients, Norm};
use candle_core::{bail, CpuStorage, DType, Result};
use std::borrow::Cow;
use std::ops::Range;

/// A backward's arguments, read.
struct Call<'a, T: Stored> {
    level: Level,
    norm: &'a Norm,
    g: &'a Geometry,
    eps: T::Acc,
    x: Source<'a, T>,
    dy: Tensor<'a, T>,
    affine: Affine<'a, T::Acc>,
    stats: Cow<'a, [T::Acc]>,
    /// What stands behind the norm, through which dy comes.
    after: After<'a, T>,
}

/// Bytes of an element of x and of dy, as they are walked.
const fn bytes<W>() -> usize {
    2 * size_of::<W>()
}

pub(super) fn backward<T: Stored>(
    level: Level,
    call: &Backward<CpuStorage>,
) -> Result<Gradients<CpuStorage>> {
    let params = call.want.dweight.is_some() || call.want.dbias.is_some();
    let mut read = Call::<T>::new(level, call, params)?;
    match read.after.any() || read.x.gate.is_some() {
        true => run::<T, T::Acc>(&read, call),
        false => {
            if call.want.dx {
                read.affine.part(T::WalkedAs::loops(level), read.g);
            }
            run::<T, T::WalkedAs>(&read, call)
        }
    }
}

fn run<T: Stored, W: Walked<Acc = T::Acc>>(
    read: &Call<T>,
    call: &Backward<CpuStorage>,
) -> Result<Gradients<CpuStorage>> {
    let (want, g) = (&call.want, read.g);
    let tensors = want.dx || want.dskip || want.dgate;
    let params = want.dweight.is_some() || want.dbias.is_some();
    // Gradients of skip and gate are made along with dx.
    let asked = Asked { dx: tensors, params, fixed: call.fixed };
    let plan = plan::BackwardPlan::new(g, read.affine.form, bytes::<W>(), asked);
    let new = |wanted: bool| wanted.then(|| Output::new(g, false));
    let mut out = Outputs {
        dx: tensors.then(|| Output::new(g, plan.dx_past_caches(size_of::<T>()))),
        dskip: new(want.dskip && read.after.any()),
        dgate: new(tensors && read.x.gate.is_some() || want.dgate && read.after.behind.gate.is_some()),
    };
    let [weight, bias] = read.run::<W>(&plan, asked, &mut out);
    let storage = |output: Option<Output<T>>, wanted: bool| {
        output.filter(|_| plan.dx.is_some()).map(written).filter(|_| wanted).map(T::to_cpu_storage_owned)
    };
    Ok(Gradients {
        dweight: want.dweight.map(|dtype| stored(weight, dtype)).transpose()?,
        dbias: want.dbias.map(|dtype| stored(bias, dtype)).transpose()?,
        dx: storage(out.dx, want.dx),
        dskip: storage(out.dskip, want.dskip),
        dgate: storage(out.dgate, want.dgate),
    })
}

/// What a pass writes, of x's shape.
struct Outputs<T> {
    dx: Option<Output<T>>,
    dskip: Option<Output<T>>,
    dgate: Option<Output<T>>,
}

/// Sums over each set of `dy` and of `dy * xhat`: `[2, sets]`.
pub(super) fn gradient_sums<T: Stored>(level: Level, call: &Backward<CpuStorage>) -> Result<Vec<T::Acc>> {
    let read = Call::<T>::new(level, call, true)?;
    if !read.g.one_param_per_set() || read.g.outer > 1 {
        bail!("{}: gradient sums are for norms with a parameter per set", call.norm.name)
    }
    let visit = plan::BackwardPlan::param_sums(read.g, bytes::<T::WalkedAs>());
    let [weight, bias] = read.sums::<T::WalkedAs>(&visit, true).1;
    let both = [bias, weight].concat();
    // Without elements there are no parameters to be seen, but there may be sets.
    Ok(if both.is_empty() { vec![T::Acc::ZERO; 2 * read.g.sets()] } else { both })
}

/// dx from sums over `count` elements a set, some of them elsewhere.
pub(super) fn input_gradient<T: Stored>(
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
            let weight = read.affine.weight[s % read.g.sets_per_outer()].to64();
            let mean = |sum: T::Acc| T::Acc::from64(sum.to64() * weight / count);
            Means { g: mean(sums[s]), dot: mean(sums[sets + s]) }
        })
        .collect();
    let plan = plan::BackwardPlan::from_means(read.g, read.affine.form, bytes::<T::WalkedAs>());
    let mut dx = Some(Output::new(read.g, plan.dx_past_caches(size_of::<T>())));
    if let Some(visit) = &plan.dx {
        let out = [dx.as_mut(), None, None];
        read.visit::<T::WalkedAs>(visit, MeansFrom::Given(&means), false, out);
    }
    match dx {
        Some(dx) => Ok(written(dx)),
        None => bail!("{}: no gradient", call.norm.name),
    }
}

/// Gradients of weight and bias.
type Params<A> = [Vec<A>; 2];

impl<'a, T: Stored> Call<'a, T> {
    fn new(level: Level, call: &'a Backward<'a, CpuStorage>, params: bool) -> Result<Self> {
        let g = &call.norm.geometry;
        Ok(Self {
            level,
            norm: &call.norm,
            g,
            eps: T::Acc::from64(call.norm.eps),
            x: source(level, &call.norm, &call.x, &call.gate)?,
            dy: Tensor { level, x: elements(&call.norm, &call.dy)?, width: g.width },
            affine: Affine::new(&call.norm, call.weight, call.bias, params || call.weight.is_some())?,
            stats: converted(&call.stats, 3 * g.sets())?,
            after: after(level, &call.norm, [&call.skip, &call.gate])?,
        })
    }

    /// A piece of a tile as walks over `W` take it, and whether there is a walk back to z.
    fn input<'b, W: Walked<Acc = T::Acc>>(
        &'b self,
        tile: &'b Tile,
        affine: &'b Affine<'b, T::Acc>,
        z: Walk,
        [scratch_x, scratch_dy, scratch_z]: [&'b mut Room<T>; 3],
        out: [Option<OutTile<T>>; 2],
    ) -> Input<'b, W> {
        let (loops, g, eps, stats) = (W::loops(self.level), self.g, self.eps, Stats(&self.stats));
        let x = self.x.read::<W>(tile, scratch_x);
        let dy = match self.after.any() {
            false => self.dy.read::<W>(tile, scratch_dy),
            true => self.after.dz(self.dy, tile, [scratch_dy, scratch_z], out, |y| {
                let stats = StatsFrom::Given(stats);
                walks::forward(z, ForwardArgs { loops, g, eps, affine, x, tile, stats, y: Out::Tile(y) })
            }),
        };
        Input { loops, g, eps, x, dy, affine, stats, tile }
    }

    /// The tensors' gradients into `out`, and the parameters', each as far as asked for.
    fn run<W: Walked<Acc = T::Acc>>(
        &self,
        plan: &plan::BackwardPlan,
        asked: Asked,
        out: &mut Outputs<T>,
    ) -> Params<T::Acc> {
        let spans = matches!(self.affine.form, Form::PerSpan(_));
        let (mut means, mut params) = (vec![], None);
        if let Some(visit) = &plan.sums {
            let (all, sums) = self.sums::<W>(visit, asked.params && spans);
            means = all;
            params = (asked.params && spans).then_some(sums);
        }
        let from = match plan.means {
            None => MeansFrom::Fixed,
            Some(Origin::Tile) => MeansFrom::Tile,
            Some(Origin::Given) => MeansFrom::Given(&means),
        };
        if let Some(visit) = &plan.dx {
            let out = [out.dx.as_mut(), out.dskip.as_mut(), out.dgate.as_mut()];
            let sums = self.visit::<W>(visit, from, asked.params && params.is_none(), out);
            params = params.or(asked.params.then_some(sums));
        }
        params.unwrap_or_else(|| [(); 2].map(|()| vec![T::Acc::ZERO; self.norm.params()]))
    }

    /// The means of every set, and the sums of parameters by span if `params`.
    fn sums<W: Walked<Acc = T::Acc>>(
        &self,
        visit: &Visit,
        params: bool,
    ) -> (Vec<Means<T::Acc>>, Params<T::Acc>) {
        let g = self.g;
        let tiles = visit.cut.tiles();
        let mut all = TileSums::new(self.norm, &tiles, params);
        let counts = || tiles.iter().map(|t| t.sets(g).len());
        let mut partial = vec![Sums::default(); counts().sum()];
        let work = tiles.iter().zip(all.split()).zip(split(&mut partial, counts()));
        let back_to_z = visit.back_to_z(g, self.affine.form);
        for_each(work, self.x.bytes(), Scratch::new, |Scratch { x, dy, z, .. }, ((tile, params), sums)| {
            // Parameters of samples: no set of theirs that is cut shares a tile with another's.
            let affine = &self.affine.of_row(tile.rows.start, g);
            let input = self.input::<W>(tile, affine, back_to_z, [x, dy, z], [None, None]);
            walks::sums(visit.walk, SumsArgs { input, params, sums });
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
        (means.collect(), all.over_tiles())
    }

    /// One visit of every tile: gradients of x, skip and gate, and the sums of parameters if `params`.
    fn visit<W: Walked<Acc = T::Acc>>(
        &self,
        visit: &Visit,
        means: MeansFrom<T::Acc>,
        params: bool,
        [dx, dskip, dgate]: [Option<&mut Output<T>>; 3],
    ) -> Params<T::Acc> {
        let (g, tokens) = (self.g, self.norm.fusion.tokens);
        let tiles = visit.cut.tiles();
        let mut all = TileSums::new(self.norm, &tiles, params);
        let cut = &visit.cut;
        let mut out = [tiles_of(dx, cut), tiles_of(dskip, cut), tiles_of(dgate, cut)];
        let work = tiles.iter().zip(all.split()).map(|(tile, params)| {
            let [dx, dskip, dgate] = &mut out;
            (tile, params, [next_of(dx), next_of(dskip), next_of(dgate)])
        });
        let staged = self.x.staged::<W>() || self.after.any();
        let back_to_z = visit.back_to_z(g, self.affine.form);
        let bytes = self.x.bytes();
        for_each(work, bytes, Scratch::new, |scratch: &mut Scratch<T>, (tile, mut params, mut out)| {
            for piece in pieces(g, tile, tokens, staged) {
                let piece = &piece;
                let affine = &self.affine.of_row(piece.rows.start, g);
                let own = params.as_mut().map(|p| p.of_sample(tokens, tile, piece));
                let [dx, dskip, dgate] = &mut out;
                let [dx, dskip, dgate] = [part_of(dx, piece), part_of(dskip, piece), part_of(dgate, piece)];
                let Scratch { x, dy, z, out } = scratch;
                let (before, gradients_behind) = match &self.x.gate {
                    Some(gate) => (dgate.map(|dgate| (gate, dgate)), [dskip, None]),
                    None => (None, [dskip, dgate]),
                };
                let input = self.input::<W>(piece, affine, back_to_z, [x, dy, z], gradients_behind);
                let args = BackwardArgs { input, means, params: own, dx: None };
                match (dx, before) {
                    (None, _) => walks::backward(visit.walk, args),
                    (Some(dx), None) => {
                        write::<T, W>(self.level, dx, out, |dx| walks::backward(visit.walk, args.with_dx(dx)))
                    }
                    (Some(dx), Some((gate, dgate))) => {
                        gated_gradient::<T, W>(&self.x, gate, [dx, dgate], out, |dx| {
                            walks::backward(visit.walk, args.with_dx(dx))
                        })
                    }
                }
            }
        });
        all.over_tiles()
    }
}

// Of outputs that may not be wanted.

fn tiles_of<'a, T: Element>(output: Option<&'a mut Output<T>>, cut: &'a Cut) -> Option<Tiles<'a, T>> {
    Some(output?.tiles(cut))
}

fn next_of<'a, T: Element>(tiles: &mut Option<Tiles<'a, T>>) -> Option<OutTile<'a, T>> {
    tiles.as_mut()?.next()
}

fn part_of<'a, T: Element>(tile: &'a mut Option<OutTile<'_, T>>, piece: &Tile) -> Option<OutTile<'a, T>> {
    Some(tile.as_mut()?.part(piece))
}

/// Sums for parameters, tile after tile.
struct TileSums<'a, A> {
    norm: &'a Norm,
    tiles: &'a [Tile],
    weight: Vec<A>,
    bias: Vec<A>,
}

impl<'a, A: Float> TileSums<'a, A> {
    fn new(norm: &'a Norm, tiles: &'a [Tile], any: bool) -> Self {
        let len = if any { tiles.iter().map(|t| count(norm, t)).sum() } else { 0 };
        Self { norm, tiles, weight: vec![A::ZERO; len], bias: vec![A::ZERO; len] }
    }

    /// Each tile's own.
    fn split(&mut self) -> Vec<Option<ParamSums<'_, A>>> {
        if self.weight.is_empty() {
            return self.tiles.iter().map(|_| None).collect();
        }
        let lens = || self.tiles.iter().map(|t| count(self.norm, t));
        let both = split(&mut self.weight, lens()).into_iter().zip(split(&mut self.bias, lens()));
        both.map(|(weight, bias)| Some(ParamSums { weight, bias })).collect()
    }

    /// Sums over all tiles; zeros without any.
    fn over_tiles(self) -> Params<A> {
        [self.weight, self.bias].map(|sums| {
            if self.tiles.len() == 1 && sums.len() == self.norm.params() {
                return sums;
            }
            let mut total = vec![0.0; self.norm.params()];
            let mut rest = &sums[..];
            for tile in self.tiles.iter().take_while(|_| !sums.is_empty()) {
                for params in params(self.norm, tile) {
                    let (own, others) = rest.split_at(params.len());
                    total[params].iter_mut().zip(own).for_each(|(sum, own)| *sum += own.to64());
                    rest = others;
                }
            }
            total.into_iter().map(A::from64).collect()
        })
    }
}

/// The parameters that a tile touches, of each sample where those have their own.
fn params(norm: &Norm, tile: &Tile) -> impl Iterator<Item = Range<usize>> {
    let (g, tokens) = (&norm.geometry, norm.fusion.tokens.unwrap_or(usize::MAX));
    let (Range { start, end }, each) = (tile.params(g), g.params());
    let samples = tile.rows.start / tokens..tile.rows.end.div_ceil(tokens);
    samples.map(move |sample| sample * each + start..sample * each + end)
}

fn count(norm: &Norm, tile: &Tile) -> usize {
    params(norm, tile).map(|p| p.len()).sum()
}

fn stored<A: Float>(x: Vec<A>, dtype: DType) -> Result<CpuStorage> {
    fn rounded<A: Float, T: Stored>(x: Vec<A>) -> Vec<T> {
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
