//! Sums in lanes: many partial sums at once, so that the compiler can keep them in vectors and the
//! processor need not wait for one addition before the next.
//!
//! All of it is plain loops over arrays of `W`, which become vector instructions when inlined into a
//! level (`level.rs`).
#![allow(clippy::needless_range_loop)] // the plainer the loop, the surer the vector

use super::element::{fma, Float, Panel};
use super::level::Kernel;

/// Vectors of partial sums per sum. An addition takes 3 to 5 cycles and 2 can start in each.
const UNROLL: usize = 4;

/// Sum of `x - pivot` over a panel.
pub(super) struct Sum<'a, A> {
    pub x: Panel<'a, A>,
    pub pivot: A,
}

impl<A: Float> Kernel for Sum<'_, A> {
    type Output = A;

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) -> A {
        let Sum { x, pivot } = self;
        let mut lanes = Lanes::<A, 1, W>::new();
        for r in 0..x.rows {
            lanes.add([x.row(r)], |[x], [sum]| [sum + (x - pivot)]);
        }
        lanes.total()[0]
    }
}

/// Sum of `((x - pivot) - offset)^2` over a panel.
pub(super) struct Squares<'a, A> {
    pub x: Panel<'a, A>,
    pub pivot: A,
    pub offset: A,
}

impl<A: Float> Kernel for Squares<'_, A> {
    type Output = A;

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) -> A {
        let Squares { x, pivot, offset } = self;
        let mut lanes = Lanes::<A, 1, W>::new();
        for r in 0..x.rows {
            lanes.add([x.row(r)], |[x], [sum]| {
                let d = (x - pivot) - offset;
                [fma::<_, FMA>(d, d, sum)]
            });
        }
        lanes.total()[0]
    }
}

/// Sums of `g` and `g * (x - high)` over panels, `g = dy * weight`.
pub(super) struct Dots<'a, A> {
    pub x: Panel<'a, A>,
    pub dy: Panel<'a, A>,
    pub weight: Option<&'a [A]>,
    pub high: A,
}

impl<A: Float> Kernel for Dots<'_, A> {
    type Output = [A; 2];

    #[inline(always)]
    fn run<const W: usize, const FMA: bool>(self) -> [A; 2] {
        let Dots { x, dy, weight, high } = self;
        let mut lanes = Lanes::<A, 2, W>::new();
        match weight {
            None => {
                let (x, dy) = (x.flat(), dy.flat());
                for r in 0..x.rows {
                    lanes.add([x.row(r), dy.row(r)], |[x, dy], [g, gx]| {
                        [g + dy, fma::<_, FMA>(dy, x - high, gx)]
                    });
                }
            }
            Some(weight) => {
                for r in 0..x.rows {
                    lanes.add([x.row(r), dy.row(r), weight], |[x, dy, w], [g, gx]| {
                        let dy = dy * w;
                        [g + dy, fma::<_, FMA>(dy, x - high, gx)]
                    });
                }
            }
        }
        lanes.total()
    }
}

/// `M` sums over elements, in `UNROLL * W` lanes each.
pub(super) struct Lanes<A, const M: usize, const W: usize>([[[A; W]; M]; UNROLL]);

impl<A: Float, const M: usize, const W: usize> Lanes<A, M, W> {
    #[inline(always)]
    pub fn new() -> Self {
        Lanes([[[A::ZERO; W]; M]; UNROLL])
    }

    /// Adds the elements of `K` slices of one length: `step` maps values and sums to sums.
    #[inline(always)]
    pub fn add<const K: usize>(&mut self, slices: [&[A]; K], step: impl Fn([A; K], [A; M]) -> [A; M]) {
        let n = slices[0].len();
        let slices = slices.map(|s| &s[..n]);
        // Values and sums go in and out of `lanes` by value: behind references they stay scalars.
        let mut sums = self.0;
        let mut at = 0;
        while at + UNROLL * W <= n {
            let block = slices.map(|s| &s[at..at + UNROLL * W]);
            for (u, sums) in sums.iter_mut().enumerate() {
                *sums = lanes(*sums, load(block, u * W), &step);
            }
            at += UNROLL * W;
        }
        while at + W <= n {
            sums[0] = lanes(sums[0], load(slices, at), &step);
            at += W;
        }
        if at < n {
            let (skip, values) = last(slices, at);
            let new = lanes(sums[1], values, &step);
            for m in 0..M {
                for l in 0..W {
                    sums[1][m][l] = if l >= skip { new[m][l] } else { sums[1][m][l] };
                }
            }
        }
        self.0 = sums;
    }

    /// The sums over all lanes.
    #[inline(always)]
    pub fn total(&self) -> [A; M] {
        let mut total = [A::ZERO; M];
        for (m, total) in total.iter_mut().enumerate() {
            let mut sum = [A::ZERO; W];
            for (l, sum) in sum.iter_mut().enumerate() {
                *sum = (self.0[0][m][l] + self.0[1][m][l]) + (self.0[2][m][l] + self.0[3][m][l]);
            }
            *total = horizontal(&sum);
        }
        total
    }
}

#[inline(always)]
fn load<A: Float, const K: usize, const W: usize>(slices: [&[A]; K], at: usize) -> [[A; W]; K] {
    let mut values = [[A::ZERO; W]; K];
    for k in 0..K {
        values[k].copy_from_slice(&slices[k][at..at + W]);
    }
    values
}

/// What is left from `at` on, less than a vector, at the end of one; and how many lanes are before.
#[inline(always)]
fn last<A: Float, const K: usize, const W: usize>(slices: [&[A]; K], at: usize) -> (usize, [[A; W]; K]) {
    let n = slices[0].len();
    if n >= W {
        return (W - (n - at), load(slices, n - W));
    }
    let mut values = [[A::ZERO; W]; K];
    for k in 0..K {
        for l in 0..n {
            values[k][W - n + l] = slices[k][l];
        }
    }
    (W - n, values)
}

/// One vector of each slice.
#[inline(always)]
fn lanes<A: Float, const K: usize, const M: usize, const W: usize>(
    sums: [[A; W]; M],
    values: [[A; W]; K],
    step: &impl Fn([A; K], [A; M]) -> [A; M],
) -> [[A; W]; M] {
    let mut out = sums;
    for l in 0..W {
        let (mut value, mut sum) = ([A::ZERO; K], [A::ZERO; M]);
        for k in 0..K {
            value[k] = values[k][l];
        }
        for m in 0..M {
            sum[m] = sums[m][l];
        }
        let new = step(value, sum);
        for m in 0..M {
            out[m][l] = new[m];
        }
    }
    out
}

/// Not inlined: as part of a loop's end the compiler would take every lane out of its vector and add
/// them one by one, and so undo the vectors of the loop.
#[inline(never)]
fn horizontal<A: Float, const W: usize>(lanes: &[A; W]) -> A {
    let mut sum = *lanes;
    let mut half = W / 2;
    while half > 0 {
        for l in 0..half {
            sum[l] += sum[l + half];
        }
        half /= 2;
    }
    sum[0]
}
