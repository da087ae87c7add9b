//! The output: allocated without being filled, handed out in disjoint tiles, written once.
//!
//! Apart, because a buffer that many threads write before it counts as initialized takes unsafe code.
#![allow(unsafe_code)]

use super::element::Element;
use super::tile::{Cut, Tile};
use crate::geometry::Geometry;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A buffer of `g.elements()` elements, none of them written yet.
pub(super) struct Output<T> {
    buffer: Vec<T>,
    width: usize,
    len: usize,
}

impl<T: Element> Output<T> {
    pub fn new(g: &Geometry) -> Self {
        let len = g.elements();
        Self { buffer: Vec::with_capacity(len), width: g.width, len }
    }

    /// The tiles of `cut`, which cuts the output's own geometry.
    pub fn tiles(&mut self, cut: &Cut) -> Vec<OutTile<'_, T>> {
        let (buffer, width) = (self.buffer.as_mut_ptr(), self.width);
        let tiles = cut.tiles().into_iter();
        tiles.map(|tile| OutTile { buffer, width, tile, lifetime: PhantomData }).collect()
    }

    /// # Safety
    /// Every element has been written: every tile of a cut went through a kernel, and kernels write
    /// every row of their tile in full.
    pub unsafe fn written(mut self) -> Vec<T> {
        // SAFETY: the capacity is `len` or more, and the caller vouches for the elements.
        unsafe { self.buffer.set_len(self.len) };
        self.buffer
    }
}

/// A rectangle of the output that no other tile touches.
pub(super) struct OutTile<'a, T> {
    buffer: *mut T,
    width: usize,
    tile: Tile,
    lifetime: PhantomData<&'a mut T>,
}

// SAFETY: a tile is the only way to its elements, as a `&mut [T]` would be.
unsafe impl<T: Send> Send for OutTile<'_, T> {}

impl<T: Element> OutTile<'_, T> {
    /// Columns of a row of the matrix, to be filled.
    #[inline(always)]
    pub fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [MaybeUninit<T>] {
        let Tile { rows, columns: own } = &self.tile;
        assert!(rows.contains(&row) && own.start <= columns.start);
        assert!(columns.start <= columns.end && columns.end <= own.end);
        // SAFETY: inside the tile by the line above, and so inside the buffer; tiles of a cut are
        // disjoint, and `self` is borrowed for as long as the slice.
        unsafe { slice(self.buffer.add(row * self.width + columns.start), columns.len()) }
    }

    /// Elements in the order of memory, to be filled: several rows, where the tile has all columns.
    #[inline(always)]
    pub fn rows(&mut self, elements: Range<usize>) -> &mut [MaybeUninit<T>] {
        let Tile { rows, columns } = &self.tile;
        assert!(columns.len() == self.width || rows.len() == 1);
        assert!(rows.start * self.width + columns.start <= elements.start && elements.start <= elements.end);
        assert!(elements.end <= (rows.end - 1) * self.width + columns.end);
        // SAFETY: as above; without gaps between its rows the tile is one slice.
        unsafe { slice(self.buffer.add(elements.start), elements.len()) }
    }
}

/// # Safety
/// As for `slice::from_raw_parts_mut`, but for the elements, which may be unwritten.
#[inline(always)]
unsafe fn slice<'a, T>(first: *mut T, len: usize) -> &'a mut [MaybeUninit<T>] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(first.cast(), len) }
}
