//! Sums in lanes: many partial sums at once, so that the compiler can keep them in vectors and the
//! processor need not wait for one addition before the next.
//!
//! All of it is plain loops over arrays of `W`, which become vector instructions when inlined into a
//! level (`level.rs`).

use super::element::Float;

/// Vectors of partial sums per sum. An addition takes 3 to 5 cycles and 2 can start in each.
const UNROLL: usize = 4;

/// `M` sums over elements, in `UNROLL * W` lanes each.
pub(super) struct Lanes<A, const M: usize, const W: usize>([[[A; W]; UNROLL]; M]);

impl<A: Float, const M: usize, const W: usize> Lanes<A, M, W> {
    #[inline(always)]
    pub fn new() -> Self {
        Lanes([[[A::ZERO; W]; UNROLL]; M])
    }

    /// Adds the elements of `K` slices of one length: `step` maps values and sums to sums.
    #[inline(always)]
    pub fn add<const K: usize>(&mut self, slices: [&[A]; K], step: impl Fn([A; K], [A; M]) -> [A; M]) {
        let n = slices[0].len();
        assert!(slices.iter().all(|s| s.len() == n));
        let mut at = 0;
        while at + UNROLL * W <= n {
            // One loop over all lanes: two nested short ones are unrolled into scalars before the
            // compiler looks for vectors.
            let slices = slices.map(|s| &s[at..][..UNROLL * W]);
            for l in 0..UNROLL * W {
                let new = step(slices.map(|s| s[l]), std::array::from_fn(|m| self.0[m].as_flattened()[l]));
                for m in 0..M {
                    self.0[m].as_flattened_mut()[l] = new[m];
                }
            }
            at += UNROLL * W;
        }
        while at + W <= n {
            self.vector(0, slices.map(|s| &s[at..][..W]), 0, &step);
            at += W;
        }
        if at == n {
            return;
        }
        if n >= W {
            // The last vector again, without the elements that are in already.
            self.vector(1, slices.map(|s| &s[n - W..][..W]), W - (n - at), &step);
        } else {
            let mut padded = [[A::ZERO; W]; K];
            for (padded, slice) in padded.iter_mut().zip(slices) {
                padded[W - n..].copy_from_slice(slice);
            }
            let padded = padded.each_ref().map(|p| &p[..]);
            self.vector(1, padded, W - n, &step);
        }
    }

    /// The sums over all lanes.
    #[inline(always)]
    pub fn total(&self) -> [A; M] {
        let mut total = [A::ZERO; M];
        for (m, total) in total.iter_mut().enumerate() {
            let mut sum = [A::ZERO; W];
            for l in 0..W {
                let [a, b, c, d] = self.0[m].each_ref().map(|v| v[l]);
                sum[l] = (a + b) + (c + d);
            }
            let mut half = W / 2;
            while half > 0 {
                for l in 0..half {
                    sum[l] += sum[l + half];
                }
                half /= 2;
            }
            *total = sum[0];
        }
        total
    }

    /// One vector of each slice, its first `skip` lanes left out, into vector `u` of the sums.
    #[inline(always)]
    fn vector<const K: usize>(
        &mut self,
        u: usize,
        slices: [&[A]; K],
        skip: usize,
        step: &impl Fn([A; K], [A; M]) -> [A; M],
    ) {
        for l in 0..W {
            let new = step(slices.map(|s| s[l]), std::array::from_fn(|m| self.0[m][u][l]));
            for m in 0..M {
                let sum = &mut self.0[m][u][l];
                *sum = if l >= skip { new[m] } else { *sum };
            }
        }
    }
}
