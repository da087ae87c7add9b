//! The output: allocated without being filled, handed out in disjoint tiles, written once.
#![allow(unsafe_code)]

use super::element::Element;
use super::tile::Cut;
use super::view::OutTile;
use crate::geometry::Geometry;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A buffer of `g.elements()` elements, none of them written yet.
pub(super) struct Output<T> {
    buffer: Vec<T>,
    g: Geometry,
    past: bool,
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

/// An output's tiles, one after the other. A type of its own, and no chain of closures: such a chain is compiled anew
/// for every way in which it is gone through.
pub(super) struct Tiles<'a, T> {
    cut: &'a Cut,
    rest: Range<usize>,
    buffer: *mut T,
    width: usize,
    past: bool,
    output: PhantomData<&'a mut T>,
}

impl<'a, T: Element> Iterator for Tiles<'a, T> {
    type Item = OutTile<'a, T>;

    fn next(&mut self) -> Option<OutTile<'a, T>> {
        let tile = self.cut.tile(self.rest.next()?);
        // SAFETY: the tiles of a cut lie within its geometry, which is the buffer's, and are disjoint; the
        // buffer is borrowed for as long as they live.
        Some(unsafe { OutTile::new(self.buffer, self.width, tile, self.past) })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.rest.size_hint()
    }
}

impl<T: Element> ExactSizeIterator for Tiles<'_, T> {}

impl<T: Element> Output<T> {
    /// `past`: to be written past the caches.
    pub fn new(g: &Geometry, past: bool) -> Self {
        let mut buffer = Vec::<T>::with_capacity(g.elements());
        advise_huge_pages(buffer.spare_capacity_mut());
        // Miri, and memcheck of a build without these assertions, see the read itself.
        if cfg!(all(debug_assertions, not(miri))) {
            // NaN, which no test takes for a result.
            // SAFETY: within the capacity; any bits are a number.
            unsafe { buffer.as_mut_ptr().write_bytes(0xff, g.elements()) };
        }
        Self { buffer, g: *g, past }
    }

    /// The tiles of `cut`, which cuts a tensor of this shape.
    pub fn tiles<'a>(&'a mut self, cut: &'a Cut) -> Tiles<'a, T> {
        assert_eq!(cut.geometry(), &self.g);
        let (buffer, width, past) = (self.buffer.as_mut_ptr(), self.g.width, self.past);
        Tiles { cut, rest: 0..cut.count(), buffer, width, past, output: PhantomData }
    }

    /// # Safety
    /// Every element has been written: every tile of a cut went through a walk, and walks write every row of
    /// their tile in full.
    pub unsafe fn written(mut self) -> Vec<T> {
        // SAFETY: the capacity is as large, and the caller vouches for the elements.
        unsafe { self.buffer.set_len(self.g.elements()) };
        self.buffer
    }
}
