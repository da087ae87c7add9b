//! What stands between a tensor and a walk: nothing, or a thread's scratch in which a tile lies in the accumulation
//! type, with all that is fused into the norm done to it.
//!
//! Apart from walks, which know of no fusion: a tile comes in staged, and goes out through what stands behind the norm.
//! f16 has no walks of its own and is staged, too.
#![allow(unsafe_code)]

use super::element::{Element, Float};
use super::loops::{Behind, Conversions, Finishes, Line, Stored, Walked, Wide};
use super::simd_level::Level;
use super::tile::Tile;
use super::view::{same, same_mut, InTile, OutTile, Strided};
use super::walk_args::{Finish, Out, Place};
use crate::geometry::Geometry;
use crate::request::Blocks;

/// Elements of a strip, on which all that is fused is done in turn: few enough for the first-level cache.
const STRIP: usize = 1024;
/// Elements of a piece of a tile, of several sets.
const PIECE: usize = 8192;

/// A thread's scratch for a tile.
pub(super) struct Room<T: Element> {
    wide: Vec<T::Acc>,
    /// Of a strip.
    other: Vec<T::Acc>,
    gathered: Vec<T>,
}

impl<T: Element> Room<T> {
    fn new() -> Self {
        Room { wide: vec![], other: vec![], gathered: vec![] }
    }
}

/// A thread's scratch.
pub(super) struct Scratch<T: Stored> {
    pub x: Room<T>,
    pub dy: Room<T>,
    pub z: Room<T>,
    pub out: Room<T>,
}

impl<T: Stored> Scratch<T> {
    pub fn new() -> Self {
        Scratch { x: Room::new(), dy: Room::new(), z: Room::new(), out: Room::new() }
    }
}

/// `n` elements of scratch.
fn room<A: Element>(scratch: &mut Vec<A>, n: usize) -> &mut [A] {
    if scratch.len() < n {
        scratch.resize(n, A::narrow(A::Acc::ZERO));
    }
    &mut scratch[..n]
}

/// Scratch as a tile of what is walked.
fn staged<'a, A: Float, W: Walked<Acc = A>>(wide: &'a [A], tile: &'a Tile) -> InTile<'a, W> {
    match same::<A, W>(wide) {
        Some(wide) => InTile::alone(wide, tile),
        None => unreachable!("staged in another type than is walked"),
    }
}

/// Sets of a tile that are staged at a time: whole rows of one sample where a row is a set, else all of it.
pub(super) fn pieces(
    g: &Geometry,
    tile: &Tile,
    tokens: Option<usize>,
    any: bool,
) -> impl Iterator<Item = Tile> {
    let Tile { rows, columns } = tile.clone();
    let most = if any && g.rows == 1 { (PIECE / columns.len()).max(1) } else { rows.len() };
    let (mut row, tokens) = (rows.start, tokens.unwrap_or(usize::MAX));
    std::iter::from_fn(move || {
        let start = row;
        row = rows.end.min(start + most).min((start / tokens + 1).saturating_mul(tokens));
        (start < rows.end).then(|| Tile { rows: start..row, columns: columns.clone() })
    })
}

/// Rows of a tile in strips, each with its place in scratch that holds the tile alone.
fn strips(tile: &Tile) -> impl Iterator<Item = (Tile, usize)> + '_ {
    let Tile { rows, columns } = tile;
    let (mut row, mut column, mut at) = (rows.start, columns.start, 0);
    std::iter::from_fn(move || {
        if column == columns.end {
            (row, column) = (row + 1, columns.start);
        }
        if row >= rows.end || column == columns.end {
            return None;
        }
        let strip = Tile { rows: row..row + 1, columns: column..columns.end.min(column + STRIP) };
        let place = at;
        (column, at) = (strip.columns.end, at + strip.columns.len());
        Some((strip, place))
    })
}

/// A tensor's elements.
#[derive(Clone, Copy)]
pub(super) struct Tensor<'a, T> {
    pub level: Level,
    pub x: &'a [T],
    pub width: usize,
}

impl<'a, T: Element> Tensor<'a, T> {
    /// A tile as a walk over `W` reads it.
    pub fn read<'s, W: Walked<Acc = T::Acc>>(
        &self,
        tile: &'s Tile,
        Room { wide, .. }: &'s mut Room<T>,
    ) -> InTile<'s, W>
    where
        'a: 's,
    {
        if let Some(x) = same::<T, W>(self.x) {
            return InTile::new(x, self.width, tile);
        }
        let wide = room(wide, tile.rows.len() * tile.columns.len());
        self.widen(tile, wide);
        staged(wide, tile)
    }

    fn tile<'s>(&self, tile: &'s Tile) -> InTile<'s, T>
    where
        'a: 's,
    {
        InTile::new(self.x, self.width, tile)
    }

    /// A strip in the accumulation type: where it lies, if it is of that.
    fn strip<'s>(&self, strip: &Tile, wide: &'s mut Vec<T::Acc>) -> &'s [T::Acc]
    where
        'a: 's,
    {
        let (at, n) = (strip.rows.start * self.width + strip.columns.start, strip.columns.len());
        if let Some(x) = same::<T, T::Acc>(self.x) {
            return &x[at..at + n];
        }
        let wide = room(wide, n);
        self.widen(strip, wide);
        wide
    }

    fn widen(&self, tile: &Tile, wide: &mut [T::Acc]) {
        Conversions::<T>::of(self.level).widen(InTile::new(self.x, self.width, tile).whole(), wide)
    }
}

/// x or dy, as walks read it.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub tensor: Tensor<'a, T>,
    /// Where its rows lie, if not one behind the other.
    pub blocks: Option<Blocks>,
    /// `x * silu(gate)` is what is read.
    pub gate: Option<Tensor<'a, T>>,
}

impl<'a, T: Stored> Source<'a, T> {
    /// As it lies.
    pub fn plain(level: Level, x: &'a [T], g: &Geometry) -> Self {
        Source { tensor: Tensor { level, x, width: g.width }, blocks: None, gate: None }
    }

    /// Of what is read.
    pub fn bytes(&self) -> usize {
        size_of_val(self.tensor.x)
    }

    /// Whether walks over `W` read scratch.
    pub fn staged<W: 'static>(&self) -> bool {
        self.blocks.is_some() || self.gate.is_some() || same::<T, W>(&[]).is_none()
    }

    /// A tile as a walk over `W` reads it.
    pub fn read<'s, W: Walked<Acc = T::Acc>>(
        &'s self,
        tile: &'s Tile,
        Room { wide, gathered, .. }: &'s mut Room<T>,
    ) -> InTile<'s, W>
    where
        'a: 's,
    {
        let (level, x) = (self.tensor.level, self.raw(tile, gathered));
        if let (Some(x), None) = (x.same::<W>(), &self.gate) {
            return x;
        }
        let wide = room(wide, tile.rows.len() * tile.columns.len());
        match &self.gate {
            Some(gate) => Conversions::<T>::of(level).gated(x.whole(), gate.tile(tile).whole(), wide),
            None => Conversions::<T>::of(level).widen(x.whole(), wide),
        }
        staged(wide, tile)
    }

    /// Writes a tile of `x + residual`, rounded to the residual's type.
    pub fn add<R: Element<Acc = T::Acc>>(
        &self,
        residual: &Tensor<R>,
        tile: &Tile,
        Room { wide, other, gathered }: &mut Room<T>,
        sum: &mut OutTile<R>,
    ) {
        let level = self.tensor.level;
        for (strip, _) in strips(tile) {
            let (x, mut sum) = (self.raw(&strip, gathered), sum.part(&strip));
            if let Some(x) = x.same::<R>() {
                let residual = residual.tile(&strip).whole();
                Conversions::<R>::of(level).add(x.whole(), residual, sum.whole());
                continue;
            }
            // Of two types: in a third, and rounded.
            let wide = room(wide, strip.columns.len());
            Conversions::<T>::of(level).widen(x.whole(), wide);
            R::Acc::fused(level).add(wide, residual.strip(&strip, other));
            Conversions::<R>::of(level).narrow(Strided::row_of(wide), sum.whole());
        }
    }

    /// Writes a tile of `x + residual`, and reads that as a walk over `W` does.
    pub fn read_sum<'s, R: Element<Acc = T::Acc>, W: Walked<Acc = T::Acc>>(
        &self,
        residual: &Tensor<R>,
        tile: &'s Tile,
        scratch: &'s mut Room<T>,
        sum: &'s mut OutTile<R>,
    ) -> InTile<'s, W> {
        self.add(residual, tile, scratch, sum);
        // SAFETY: all of the tile has just been written.
        let sum = unsafe { sum.read(tile) };
        if let Some(sum) = sum.same::<W>() {
            return sum;
        }
        let wide = room(&mut scratch.wide, tile.rows.len() * tile.columns.len());
        Conversions::<R>::of(self.tensor.level).widen(sum.whole(), wide);
        staged(wide, tile)
    }

    /// A tile of the tensor itself.
    fn raw<'s>(&self, tile: &'s Tile, gathered: &'s mut Vec<T>) -> InTile<'s, T>
    where
        'a: 's,
    {
        let Some(blocks) = &self.blocks else { return self.tensor.tile(tile) };
        gathered.clear();
        for row in tile.rows.clone() {
            let at = blocks.start(row);
            gathered.extend_from_slice(&self.tensor.x[at + tile.columns.start..at + tile.columns.end]);
        }
        InTile::alone(gathered, tile)
    }

    /// The first element of a set.
    pub fn first(&self, g: &Geometry, set: usize) -> T::Acc {
        let (row, column) = (g.first(set) / g.width, g.first(set) % g.width);
        let tile = Tile { rows: row..row + 1, columns: column..column + 1 };
        self.read::<T::Acc>(&tile, &mut Room::new()).at(row, column)
    }
}

/// What is done behind a norm, to a tile at a time.
#[derive(Clone, Copy)]
pub(super) struct After<'a, T> {
    pub level: Level,
    pub behind: Behind<Tensor<'a, T>>,
}

impl<'a, T: Stored> After<'a, T> {
    pub fn any(&self) -> bool {
        let Behind { skip, activation, gate } = &self.behind;
        skip.is_some() || activation.is_some() || gate.is_some()
    }

    /// Whether walks over `W` leave z in registers, not in scratch.
    pub fn in_registers<W: 'static>(&self) -> bool {
        !self.any() || same::<T::WalkedAs, W>(&[]).is_some() && self.behind.in_registers::<T::Acc>(self.level)
    }

    /// Whether walks over `W` write scratch.
    pub fn staged<W: 'static>(&self) -> bool {
        !self.any() && same::<T, W>(&[]).is_none()
    }

    /// Has `walk` write a tile, as a walk over `W` does, finished.
    pub fn write<W: Walked<Acc = T::Acc>>(
        &self,
        mut y: OutTile<T>,
        scratch: &mut Room<T>,
        walk: impl FnOnce(Out<W>),
    ) {
        let tile = y.tile().clone();
        let (level, behind) = (self.level, self.behind.map(|tensor| tensor.tile(&tile)));
        if !self.any() {
            return write(level, y, scratch, |y| walk(Out::Tile(y)));
        }
        if self.in_registers::<W>() {
            return walk(Out::Finished(&mut Finished { level, behind, y }));
        }
        let z = room(&mut scratch.wide, tile.rows.len() * tile.columns.len());
        walk_into(z, &tile, |z| walk(Out::Tile(z)));
        let behind = behind.map(|tile| tile.whole());
        Conversions::<T>::of(level).finish(InTile::alone(z, &tile).whole(), y.whole(), behind)
    }

    fn add_skip(&self, strip: &Tile, z: &mut [T::Acc], other: &mut Vec<T::Acc>) {
        if let Some(skip) = &self.behind.skip {
            T::Acc::fused(self.level).add(z, skip.strip(strip, other));
        }
    }

    /// The gradient of z, as a walk over `W` reads it, from that of y; `walk` writes z before its skip. Writes the
    /// gradients of skip and gate.
    pub fn dz<'s, W: Walked<Acc = T::Acc>>(
        &self,
        dy: Tensor<'_, T>,
        tile: &'s Tile,
        [Room { wide, .. }, Room { wide: z, other, .. }]: [&'s mut Room<T>; 2],
        [mut dskip, mut dgate]: [Option<OutTile<T>>; 2],
        walk: impl FnOnce(OutTile<W>),
    ) -> InTile<'s, W> {
        let len = tile.rows.len() * tile.columns.len();
        let (wide, z) = (room(wide, len), room(z, len));
        dy.widen(tile, wide);
        if self.behind.activation.is_some() || self.behind.gate.is_some() {
            walk_into(z, tile, walk);
        }
        let (fused, conversions) = (T::Acc::fused(self.level), Conversions::<T>::of(self.level));
        for (strip, at) in strips(tile) {
            let (z, dy) = (&mut z[at..at + strip.columns.len()], &mut wide[at..at + strip.columns.len()]);
            self.add_skip(&strip, z, other);
            if let Some(gate) = &self.behind.gate {
                fused.gate_gradient(z, gate.strip(&strip, other), dy);
                if let Some(dgate) = &mut dgate {
                    conversions.narrow(Strided::row_of(z), dgate.part(&strip).whole());
                }
            }
            if let Some(activation) = self.behind.activation {
                fused.slope(z, activation, dy);
            }
            if let Some(dskip) = &mut dskip {
                conversions.narrow(Strided::row_of(dy), dskip.part(&strip).whole());
            }
        }
        staged(wide, tile)
    }
}

/// A tile that is written with all that stands behind the norm.
struct Finished<'a, T: Element> {
    level: Level,
    behind: Behind<InTile<'a, T>>,
    y: OutTile<'a, T>,
}

impl<T: Stored, W: Walked<Acc = T::Acc>> Finish<W> for Finished<'_, T> {
    fn stride(&self) -> usize {
        self.y.stride()
    }

    fn write(&mut self, Place { at, stride }: Place, x: Strided<W>, line: &Line<T::Acc>) {
        let Some(x) = x.same::<T::WalkedAs>() else {
            unreachable!("finished in another type than is walked")
        };
        let behind = self.behind.map(|tile| tile.block(at, stride, x.rows, x.n));
        let y = self.y.block(at, stride, x.rows, x.n);
        Finishes::<T>::of(self.level).finish_line(x, y, line, behind)
    }
}

/// Has `walk` write a tile, as a walk over `W` does.
pub(super) fn write<T: Stored, W: Walked<Acc = T::Acc>>(
    level: Level,
    mut y: OutTile<T>,
    Room { wide, .. }: &mut Room<T>,
    walk: impl FnOnce(OutTile<W>),
) {
    if let Some(y) = y.same::<W>() {
        return walk(y);
    }
    let tile = y.tile().clone();
    let wide = room(wide, tile.rows.len() * tile.columns.len());
    walk_into(wide, &tile, walk);
    let block = Strided::new(wide, tile.columns.len(), tile.rows.len(), tile.columns.len());
    Conversions::<T>::of(level).narrow(block, y.whole());
}

/// Has `walk` write a tile into scratch.
fn walk_into<A: Float, W: Walked<Acc = A>>(wide: &mut [A], tile: &Tile, walk: impl FnOnce(OutTile<W>)) {
    match same_mut::<A, W>(wide) {
        Some(out) => walk(OutTile::alone(out, tile.clone())),
        None => unreachable!("staged in another type than is walked"),
    }
}

/// Has `walk` write the gradient of `x * silu(gate)`, and makes of it those of x and of the gate.
pub(super) fn gated_gradient<T: Stored, W: Walked<Acc = T::Acc>>(
    x: &Source<T>,
    gate: &Tensor<T>,
    [mut dx, dgate]: [OutTile<T>; 2],
    Room { wide, other, gathered }: &mut Room<T>,
    walk: impl FnOnce(OutTile<W>),
) {
    let (level, tile, mut dgate) = (gate.level, dx.tile().clone(), dgate);
    let wide = room(wide, tile.rows.len() * tile.columns.len());
    walk_into(wide, &tile, walk);
    let conversions = Conversions::<T>::of(level);
    for (strip, at) in strips(&tile) {
        let n = strip.columns.len();
        let (x_strip, gate_strip) = room(other, 2 * n).split_at_mut(n);
        conversions.widen(x.raw(&strip, gathered).whole(), x_strip);
        gate.widen(&strip, gate_strip);
        T::Acc::fused(level).gate_gradient(x_strip, gate_strip, &mut wide[at..at + n]);
        conversions.narrow(Strided::row_of(x_strip), dgate.part(&strip).whole());
        conversions.narrow(Strided::row_of(&wide[at..at + n]), dx.part(&strip).whole());
    }
}
