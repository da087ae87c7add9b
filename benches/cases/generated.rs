//! Rows that nobody has picked: norms over random shapes.
//!
//! Apart, because rows of real models are what is aimed at; these show what was not.

use super::{Case, Norm};
use std::sync::OnceLock;

/// Numbers of Knuth's linear congruential generator (MMIX): a run is made again by its seed.
struct Random(u64);

impl Random {
    /// From zero to one.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// From `from` to `to`, as likely of one magnitude as of another.
    fn size(&mut self, from: usize, to: usize) -> usize {
        (from as f64 * (to as f64 / from as f64).powf(self.unit())).round() as usize
    }
}

/// `COUNT` or `COUNT,SEED` in the environment.
pub fn asked_for() -> Option<&'static [Case]> {
    static CASES: OnceLock<Option<Vec<Case>>> = OnceLock::new();
    let made = || {
        let asked = std::env::var("CANDLE_NORM_BENCH_GENERATED").ok()?;
        let (count, seed) = asked.split_once(',').unwrap_or((&asked, "1"));
        let number = |n: &str| n.parse().expect("CANDLE_NORM_BENCH_GENERATED is COUNT or COUNT,SEED");
        Some(cases(number(count), number(seed)))
    };
    CASES.get_or_init(made).as_deref()
}

fn cases(count: u64, seed: u64) -> Vec<Case> {
    let mut random = Random(seed);
    let mut cases: Vec<Case> = vec![];
    while (cases.len() as u64) < count {
        let case = case(&mut random);
        // A row's name does not tell its groups.
        if cases.iter().all(|c| (c.norm.to_string(), c.shape) != (case.norm.to_string(), case.shape)) {
            cases.push(case);
        }
    }
    cases
}

fn norm(random: &mut Random, groups: usize) -> Norm {
    use Norm::*;
    let norms = [
        LayerNorm,
        RmsNorm,
        AddLayerNorm,
        AddRmsNorm,
        GatedRmsNorm,
        ModulatedLayerNorm,
        BatchNorm,
        BatchNormEval,
        InstanceNorm,
        LayerNorm2d,
        BatchNormSkipRelu,
        GroupNorm { groups },
        GroupNormSilu { groups },
        GroupNormGelu { groups },
    ];
    norms[random.below(norms.len())]
}

/// Of a thousand to four million elements.
fn case(random: &mut Random) -> Case {
    let elements = random.size(1 << 10, 1 << 22);
    let groups = 1 << random.below(6);
    let norm = norm(random, groups);
    let shape = if norm.over_rows() {
        // Every second size is of whole vectors, as models have them.
        let n = random.size(8, 16_384);
        let n = if random.below(2) == 0 { n } else { n.next_multiple_of(64) };
        let rows = (elements / n).max(1);
        match norm {
            Norm::ModulatedLayerNorm => {
                let samples = random.size(1, 8).min(rows);
                vec![samples, rows / samples, n]
            }
            _ => vec![rows, n],
        }
    } else {
        let (channels, side) = (groups * random.size(1, 32), random.size(2, 128));
        vec![(elements / channels / side / side).max(2), channels, side, side]
    };
    Case { norm, shape: shape.leak(), model: "random" }
}
