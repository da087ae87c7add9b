//! The output: allocated without being filled, handed out in disjoint tiles, written once.
//!
//! Apart, because a buffer that many threads write before it counts as initialized takes unsafe code.
#![allow(unsafe_code)]

use super::element::Element;
use super::streams::To;
use super::tile::{Cut, Tile};
use crate::geometry::Geometry;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

/// A buffer of `g.elements()` elements, none of them written yet.
pub(super) struct Output<T> {
    buffer: Vec<T>,
    width: usize,
    len: usize,
    stream: bool,
}

/// Bytes of an output that is written past the caches: three quarters of the last-level cache, which will not
/// keep it for whoever reads it next. 24 MiB where the system does not tell.
fn streamed_from() -> usize {
    if cfg!(test) {
        return 256 << 10; // within reach of tests
    }
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let cache = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok();
        let kib = cache.and_then(|size| size.trim().strip_suffix('K')?.parse::<usize>().ok());
        kib.unwrap_or(32 << 10) * 1024 / 4 * 3
    })
}

/// Bytes from which a buffer is worth the call. Above 32 MiB glibc maps memory anew for every one, and below
/// it returns memory to the kernel when several are freed.
#[cfg(target_os = "linux")]
const ADVISED_FROM: usize = 4 << 20;
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Lets the kernel hand out a large fresh buffer in huge pages: a fault for each instead of 512.
#[cfg(target_os = "linux")]
fn advise_huge_pages<T>(buffer: &mut [MaybeUninit<T>]) {
    if size_of_val(buffer) < ADVISED_FROM {
        return;
    }
    let Range { start, end } = buffer.as_mut_ptr_range();
    let first = start.addr().next_multiple_of(HUGE_PAGE);
    let len = (end.addr() - first) / HUGE_PAGE * HUGE_PAGE;
    // SAFETY: whole pages within the buffer; the advice changes no contents. Refused, it changes nothing.
    unsafe { libc::madvise(start.with_addr(first).cast(), len, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages<T>(_: &mut [MaybeUninit<T>]) {}

/// Bytes of a run from which it is: short ones alternate too often with reads that miss the caches. A line that
/// two stores share, of which one goes through the caches, would cost more than is saved; hence the 16 bytes.
const STREAMED_ROW: usize = 2048;

impl<T: Element> Output<T> {
    pub fn new(g: &Geometry) -> Self {
        let len = g.elements();
        let row = g.run * size_of::<T>();
        let aligned = row.is_multiple_of(16) && row >= STREAMED_ROW;
        let stream = aligned && len * size_of::<T>() > streamed_from();
        let mut buffer = Vec::with_capacity(len);
        advise_huge_pages(buffer.spare_capacity_mut());
        Self { buffer, width: g.width, len, stream }
    }

    /// The tiles of `cut`, which cuts the output's own geometry.
    pub fn tiles(&mut self, cut: &Cut) -> Vec<OutTile<'_, T>> {
        let (buffer, width, stream) = (self.buffer.as_mut_ptr(), self.width, self.stream);
        let tiles = cut.tiles().into_iter();
        tiles.map(|tile| OutTile { buffer, width, tile, stream, lifetime: PhantomData }).collect()
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
    /// To be written past the caches.
    stream: bool,
    lifetime: PhantomData<&'a mut T>,
}

impl<T> Drop for OutTile<'_, T> {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.stream {
            // SAFETY: part of the baseline. What this thread has streamed is seen by others from here on.
            unsafe { std::arch::x86_64::_mm_sfence() }
        }
    }
}

// SAFETY: a tile is the only way to its elements, as a `&mut [T]` would be.
unsafe impl<T: Send> Send for OutTile<'_, T> {}

impl<T: Element> OutTile<'_, T> {
    /// Columns of a row of the matrix, to be filled.
    #[inline(always)]
    pub fn row(&mut self, row: usize, columns: Range<usize>) -> To<'_, T> {
        let Tile { rows, columns: own } = &self.tile;
        assert!(rows.contains(&row) && own.start <= columns.start);
        assert!(columns.start <= columns.end && columns.end <= own.end);
        // SAFETY: inside the tile by the line above, and so inside the buffer; tiles of a cut are
        // disjoint, and `self` is borrowed for as long as the slice.
        let y = unsafe { slice(self.buffer.add(row * self.width + columns.start), columns.len()) };
        To { y, stream: self.stream }
    }

    /// Elements in the order of memory, to be filled: several rows, where the tile has all columns.
    #[inline(always)]
    pub fn rows(&mut self, elements: Range<usize>) -> To<'_, T> {
        let Tile { rows, columns } = &self.tile;
        assert!(columns.len() == self.width || rows.len() == 1);
        assert!(rows.start * self.width + columns.start <= elements.start && elements.start <= elements.end);
        assert!(elements.end <= (rows.end - 1) * self.width + columns.end);
        // SAFETY: as above; without gaps between its rows the tile is one slice.
        let y = unsafe { slice(self.buffer.add(elements.start), elements.len()) };
        To { y, stream: self.stream }
    }
}

/// # Safety
/// As for `slice::from_raw_parts_mut`, but for the elements, which may be unwritten.
#[inline(always)]
unsafe fn slice<'a, T>(first: *mut T, len: usize) -> &'a mut [MaybeUninit<T>] {
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(first.cast(), len) }
}
