//! The one door for elements: what loops read (`Strided`) and write (`To`), and the tiles they are cut from.
//!
//! Apart, because memory that many threads write before it counts as initialized takes unsafe code, and
//! because all that a fusion changes is what stands behind a tile: the tensor itself, or a thread's scratch.
#![allow(unsafe_code)]

use super::element::Element;
use super::tile::Tile;
use super::vector::Simd;
use std::any::TypeId;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements that are asked for ahead of what a loop reads of a tensor that no other loop has asked for: a page and more, which
/// the processor's own prefetching does not cross. Addition and RMS norm of 4096x4096 f32 on two threads of a Zen 4: 10.7 ms
/// without, 8.1 so; with 256 elements 10.8, with 8192 9.6. As many of short rows that lie pages apart: LayerNorm2d of
/// 2x256x64x64 f32 on one thread of a Zen 3 2.4 ns an element without, 1.8 so.
pub(super) const AHEAD: usize = 1024;

/// Rows of `n` elements that are `AHEAD` of them, one at least.
#[inline(always)]
fn later(n: usize) -> usize {
    (AHEAD / n.max(1)).max(1)
}

/// The same elements, where `W` is `T`.
pub(super) fn same<T: 'static, W: 'static>(x: &[T]) -> Option<&[W]> {
    // SAFETY: of the same type.
    (TypeId::of::<T>() == TypeId::of::<W>()).then(|| unsafe { &*(x as *const [T] as *const [W]) })
}

/// As `same`.
pub(super) fn same_mut<T: 'static, W: 'static>(x: &mut [T]) -> Option<&mut [W]> {
    // SAFETY: of the same type.
    (TypeId::of::<T>() == TypeId::of::<W>()).then(|| unsafe { &mut *(x as *mut [T] as *mut [W]) })
}

/// `rows` rows of `n` elements to be read, `stride` apart; all of them lie in `x`.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a, T> {
    x: &'a [T],
    stride: usize,
    pub rows: usize,
    pub n: usize,
}

impl<'a, T: Copy> Strided<'a, T> {
    pub fn new(x: &'a [T], stride: usize, rows: usize, n: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + n <= x.len());
        Self { x, stride, rows, n }
    }

    /// A single row.
    pub fn row_of(x: &'a [T]) -> Self {
        Self { x, stride: x.len(), rows: 1, n: x.len() }
    }

    /// The same block, where `W` is `T`.
    pub fn same<W: 'static>(&self) -> Option<Strided<'a, W>>
    where
        T: 'static,
    {
        Some(Strided { x: same::<T, W>(self.x)?, stride: self.stride, rows: self.rows, n: self.n })
    }

    /// Where row `r` starts.
    #[inline(always)]
    pub fn row(&self, r: usize) -> *const T {
        debug_assert!(r < self.rows);
        self.x.as_ptr().wrapping_add(r * self.stride)
    }

    /// Where a row lies that is read later, `AHEAD` elements on: what follows a short row may lie pages away, where the
    /// processor's own prefetching does not go.
    #[inline(always)]
    pub fn ahead(&self, r: usize) -> *const T {
        self.row(r).wrapping_add(later(self.n) * self.stride)
    }

    /// The first element of row `r`.
    #[inline(always)]
    pub fn first(&self, r: usize) -> T {
        self.x[r * self.stride]
    }

    /// The elements of a single row.
    pub fn values(&self) -> &'a [T] {
        &self.x[..self.n]
    }

    /// Rows from `r` on, `rows` of them.
    #[inline(always)]
    pub fn part(&self, r: usize, rows: usize) -> Self {
        Self::new(&self.x[(r * self.stride).min(self.x.len())..], self.stride, rows, self.n)
    }
}

/// The same, to be written.
pub(super) struct To<'a, T> {
    first: *mut T,
    stride: usize,
    pub rows: usize,
    pub n: usize,
    /// Past the caches, where a row is aligned.
    past: bool,
    lifetime: PhantomData<&'a mut T>,
}

impl<'a, T> To<'a, T> {
    /// Where row `r` starts; its `n` elements may be written.
    #[inline(always)]
    pub fn row(&mut self, r: usize) -> *mut T {
        debug_assert!(r < self.rows);
        self.first.wrapping_add(r * self.stride)
    }

    /// As `Strided::ahead`, where rows are written through the caches: a store waits for its line.
    #[inline(always)]
    pub fn ahead(&mut self, r: usize) -> Option<*const T> {
        let ahead = self.row(r).wrapping_add(later(self.n) * self.stride);
        (!self.past).then_some(ahead)
    }

    /// Row `r` as loops write it.
    #[inline(always)]
    pub fn strips<S: Simd>(&mut self, r: usize) -> Strips<T> {
        let (row, n) = (self.row(r), self.n);
        let past = S::STREAMS && self.past && row.addr().is_multiple_of(16);
        let end = if past { n.min(STRIP_BYTES / size_of::<T>()) } else { n };
        Strips { row, n, start: 0, end, past, buffer: Lines(MaybeUninit::uninit()) }
    }
}

/// Bytes that a loop writes before they go past the caches: the first-level one keeps them. LayerNorm of 2048x4096 on one
/// thread of a Zen 4 in bf16: 3.5 ms where every vector goes past the caches as it is made, in pieces of 16 bytes, 2.4 so; in
/// f32 no slower. Strips of 512 bytes to 2 KiB are alike, of 4 KiB slower in f32.
const STRIP_BYTES: usize = 1024;

/// A cache line's alignment.
#[repr(align(64))]
struct Lines(MaybeUninit<[u8; STRIP_BYTES]>);

/// A row that a loop writes: all of it where it lies; or, on its way past the caches, a strip at a time in a buffer.
pub(super) struct Strips<T> {
    row: *mut T,
    n: usize,
    /// What is being written.
    start: usize,
    end: usize,
    past: bool,
    buffer: Lines,
}

impl<T> Strips<T> {
    /// `to.add(at)` may be written for every `at` of the range, and all of them are before `done` is called.
    #[inline(always)]
    pub fn strip(&mut self) -> (*mut T, Range<usize>) {
        let buffer = self.buffer.0.as_mut_ptr().cast::<T>();
        let to = if self.past { buffer.wrapping_sub(self.start) } else { self.row };
        (to, self.start..self.end)
    }

    /// Ends a strip, and begins the next, if the row is not done.
    #[inline(always)]
    pub fn done<S: Simd>(&mut self, s: S) -> bool {
        if !self.past {
            return true;
        }
        let (to, bytes) = (self.row.wrapping_add(self.start), (self.end - self.start) * size_of::<T>());
        // SAFETY: `strips` has looked at the alignment, which strips keep; the strip lies within the row, and has been
        // written to the buffer.
        unsafe { s.stream(self.buffer.0.as_ptr().cast(), to.cast(), bytes) }
        self.start = self.end;
        self.end = self.n.min(self.end + STRIP_BYTES / size_of::<T>());
        self.start == self.n
    }
}

/// A tile to be read.
#[derive(Clone, Copy)]
pub(super) struct InTile<'a, T> {
    /// From the tile's first element on.
    x: &'a [T],
    stride: usize,
    tile: &'a Tile,
}

impl<'a, T: Copy> InTile<'a, T> {
    /// Of a tensor whose rows have `width` elements.
    pub fn new(x: &'a [T], width: usize, tile: &'a Tile) -> Self {
        Self { x: &x[tile.rows.start * width + tile.columns.start..], stride: width, tile }
    }

    /// Of memory that holds the tile alone.
    pub fn alone(x: &'a [T], tile: &'a Tile) -> Self {
        Self { x, stride: tile.columns.len(), tile }
    }

    /// The same tile, where `W` is `T`.
    pub fn same<W: 'static>(&self) -> Option<InTile<'a, W>>
    where
        T: 'static,
    {
        Some(InTile { x: same::<T, W>(self.x)?, stride: self.stride, tile: self.tile })
    }

    /// All of it.
    pub fn whole(&self) -> Strided<'a, T> {
        Strided::new(self.x, self.stride, self.tile.rows.len(), self.tile.columns.len())
    }

    /// Elements between two rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    #[inline(always)]
    fn place(&self, row: usize, column: usize) -> usize {
        (row - self.tile.rows.start) * self.stride + (column - self.tile.columns.start)
    }

    #[inline(always)]
    pub fn at(&self, row: usize, column: usize) -> T {
        self.x[self.place(row, column)]
    }

    /// `rows` times `n` elements from a place on, `stride` apart.
    #[inline(always)]
    pub fn block(&self, [row, column]: [usize; 2], stride: usize, rows: usize, n: usize) -> Strided<'a, T> {
        Strided::new(&self.x[self.place(row, column)..], stride, rows, n)
    }
}

/// A tile that no other touches, to be written.
pub(super) struct OutTile<'a, T> {
    /// The tile's first element.
    first: *mut T,
    stride: usize,
    tile: Tile,
    past: bool,
    lifetime: PhantomData<&'a mut T>,
}

// SAFETY: a tile is the only way to its elements, as a `&mut [T]` would be.
unsafe impl<T: Send> Send for OutTile<'_, T> {}

impl<T> Drop for OutTile<'_, T> {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.past {
            // SAFETY: part of the baseline. What this thread has streamed is seen by others from here on.
            unsafe { std::arch::x86_64::_mm_sfence() }
        }
    }
}

impl<'a, T: Element> OutTile<'a, T> {
    /// # Safety
    /// `y` points at a tensor whose rows have `width` elements, and that lives for `'a`; nobody else touches
    /// the tile. `past`: to be written past the caches.
    pub unsafe fn new(y: *mut T, width: usize, tile: Tile, past: bool) -> Self {
        let first = y.wrapping_add(tile.rows.start * width + tile.columns.start);
        Self { first, stride: width, tile, past, lifetime: PhantomData }
    }

    /// Of memory that holds the tile alone.
    pub fn alone(y: &'a mut [T], tile: Tile) -> Self {
        assert!(tile.rows.len() * tile.columns.len() <= y.len());
        Self { first: y.as_mut_ptr(), stride: tile.columns.len(), tile, past: false, lifetime: PhantomData }
    }

    /// A part of it, and nothing else for as long as that lives.
    pub fn part(&mut self, tile: &Tile) -> OutTile<'_, T> {
        let (rows, columns) = (&self.tile.rows, &self.tile.columns);
        assert!(rows.start <= tile.rows.start && tile.rows.end <= rows.end);
        assert!(columns.start <= tile.columns.start && tile.columns.end <= columns.end);
        let first = self
            .first
            .wrapping_add((tile.rows.start - rows.start) * self.stride + tile.columns.start - columns.start);
        OutTile { first, stride: self.stride, tile: tile.clone(), past: self.past, lifetime: PhantomData }
    }

    /// The same tile, where `W` is `T`.
    pub fn same<W: Element>(&mut self) -> Option<OutTile<'_, W>> {
        let (first, stride, past) = (self.first.cast(), self.stride, self.past);
        let tile = || OutTile { first, stride, tile: self.tile.clone(), past, lifetime: PhantomData };
        (TypeId::of::<T>() == TypeId::of::<W>()).then(tile)
    }

    /// A part of it without gaps between its rows, to be read.
    ///
    /// # Safety
    /// All of the part has been written.
    pub unsafe fn read<'s>(&'s mut self, tile: &'s Tile) -> InTile<'s, T> {
        let part = self.part(tile);
        let (rows, n) = (tile.rows.len(), tile.columns.len());
        assert!(rows == 1 || n == part.stride);
        // SAFETY: the part lies within the tile, which no other touches; the caller vouches for the elements.
        InTile::alone(unsafe { std::slice::from_raw_parts(part.first, rows * n) }, tile)
    }

    pub fn tile(&self) -> &Tile {
        &self.tile
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    /// All of it.
    pub fn whole(&mut self) -> To<'_, T> {
        let (rows, n, stride) = (self.tile.rows.len(), self.tile.columns.len(), self.stride);
        self.block([self.tile.rows.start, self.tile.columns.start], stride, rows, n)
    }

    /// `rows` times `n` elements from a place on, `stride` apart.
    #[inline(always)]
    pub fn block(&mut self, [row, column]: [usize; 2], stride: usize, rows: usize, n: usize) -> To<'_, T> {
        let Tile { rows: own, columns } = &self.tile;
        assert!(own.contains(&row) && columns.contains(&column) && rows > 0);
        let (down, across) = (row - own.start, column - columns.start);
        let at = down * self.stride + across;
        match columns.len() == self.stride || own.len() == 1 {
            // Without gaps between its rows the tile is one slice.
            true => {
                assert!(at + (rows - 1) * stride + n <= (own.len() - 1) * self.stride + columns.len())
            }
            false => {
                assert!(stride == self.stride || rows == 1);
                assert!(down + rows <= own.len() && across + n <= columns.len());
            }
        }
        let first = self.first.wrapping_add(at);
        To { first, stride, rows, n, past: self.past, lifetime: PhantomData }
    }
}
