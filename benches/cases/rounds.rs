//! Contenders in turns: how every benchmark here takes its times.
//!
//! A shared machine stops a process for half a second now and then, or lends a core to somebody else. Of
//! two contenders measured one after the other, each then meets another machine, and Criterion measures
//! one after the other. Here every round gives each contender a block of calls, and a ratio is that of
//! two blocks of the same round. Rounds that disagree say so, and can be added to.

use anyhow::Result;
use std::time::{Duration, Instant};

/// The least that is timed at once: reading the clock takes a thousandth of it.
const BATCH: Duration = Duration::from_micros(20);
/// Above this a call refills the caches in a small part of its time, and needs no other before it.
const WARM: Duration = Duration::from_millis(20);
/// What the median may lie in may span this factor: rounds that leave it more in doubt disagree.
const AGREE: f64 = 1.25;

pub struct Contender<'a> {
    name: &'static str,
    call: Box<dyn FnMut() -> Result<()> + 'a>,
}

impl<'a> Contender<'a> {
    pub fn new(name: &'static str, call: impl FnMut() -> Result<()> + 'a) -> Self {
        Self { name, call: Box::new(call) }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub rounds: usize,
    /// What a contender's share of a round should take. A call may take longer.
    pub block: Duration,
}

/// Nanoseconds a call, by contender and round.
#[derive(Debug, Default)]
pub struct Rounds(Vec<(&'static str, Vec<f64>)>);

/// Runs the rounds. In each, the order is another.
pub fn measure(contenders: &mut [Contender], settings: Settings) -> Result<Rounds> {
    let once = contenders.iter_mut().map(|c| once(&mut c.call)).collect::<Result<Vec<_>>>()?;
    let calls: Vec<usize> = once.iter().map(|&once| fits(BATCH, once).max(1)).collect();
    // As many batches for each, or the one with more of them would more often meet a quiet moment.
    let longest = once.iter().zip(&calls).map(|(&once, &calls)| once * calls as u32).max();
    let batches = fits(settings.block, longest.unwrap_or(BATCH)).clamp(1, 50);
    let mut rounds = Rounds::of(contenders.iter().map(|c| c.name));
    for round in 0..settings.rounds {
        for i in order(contenders.len(), round) {
            let call = &mut contenders[i].call;
            if once[i] < WARM {
                call()?;
            }
            rounds.push(i, fastest(call, calls[i], batches)?);
        }
    }
    Ok(rounds)
}

/// Whoever goes later finds other caches: each goes first in turn, forwards and backwards.
pub fn order(contenders: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..contenders).map(move |i| {
        let i = if round.is_multiple_of(2) { i } else { contenders - 1 - i };
        (i + round / 2) % contenders
    })
}

/// The time of a call, taken twice if that is cheap.
fn once(call: &mut impl FnMut() -> Result<()>) -> Result<Duration> {
    call()?;
    let first = batch(call, 1)?;
    Ok(if first < WARM { first.min(batch(call, 1)?) } else { first })
}

fn fits(within: Duration, once: Duration) -> usize {
    (within.as_nanos() / once.as_nanos().max(1)) as usize
}

/// Nanoseconds a call of the fastest of some batches: what comes in between makes a batch slower, never
/// faster.
pub fn fastest(call: &mut impl FnMut() -> Result<()>, calls: usize, batches: usize) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..batches {
        best = best.min(batch(call, calls)?.as_nanos() as f64 / calls as f64);
    }
    Ok(best)
}

fn batch(call: &mut impl FnMut() -> Result<()>, calls: usize) -> Result<Duration> {
    let start = Instant::now();
    for _ in 0..calls {
        call()?;
    }
    Ok(start.elapsed())
}

impl Rounds {
    /// Without a round yet: for who must call in step with others, and so cannot leave it to `measure`.
    pub fn of(names: impl IntoIterator<Item = &'static str>) -> Self {
        Self(names.into_iter().map(|name| (name, vec![])).collect())
    }

    /// A round's time of a call of the contender with this number.
    pub fn push(&mut self, contender: usize, ns: f64) {
        self.0[contender].1.push(ns);
    }

    /// More rounds of the same contenders.
    pub fn extend(&mut self, more: Rounds) {
        for ((_, times), (_, more)) in self.0.iter_mut().zip(more.0) {
            times.extend(more);
        }
    }

    fn times(&self, name: &str) -> Option<&[f64]> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, times)| &times[..])
    }

    /// Nanoseconds a call; `None` where nobody has that name.
    pub fn time(&self, name: &str) -> Option<Spread> {
        self.times(name).map(|times| Spread::of(times.to_vec()))
    }

    /// One's time over another's, round by round.
    pub fn ratio(&self, over: &str, under: &str) -> Option<Spread> {
        self.ratio_to_sum(over, under, 0.0, under)
    }

    /// One's time over another's and `times` that of a third.
    pub fn ratio_to_sum(&self, over: &str, under: &str, times: f64, third: &str) -> Option<Spread> {
        let (over, under, third) = (self.times(over)?, self.times(under)?, self.times(third)?);
        let ratio = |((over, under), third): ((&f64, &f64), &f64)| over / (under + times * third);
        Some(Spread::of(over.iter().zip(under).zip(third).map(ratio).collect()))
    }
}

/// What the rounds say.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    /// What the median lies in, 95 times in 100 (a little less of five rounds, which are all in it): last over first.
    doubt: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        // As many rounds fall below the true median as heads in throws of a coin: n / 2, give or take sqrt(n) / 2.
        let n = values.len() as f64;
        let outside = ((n - 1.96 * n.sqrt()) / 2.0).max(0.0) as usize;
        Self {
            median: (values[last / 2] + values[last.div_ceil(2)]) / 2.0,
            low: values[0],
            high: values[last],
            doubt: values[last - outside] / values[outside],
        }
    }

    /// Whether the median is known well enough.
    pub fn agrees(&self) -> bool {
        self.doubt <= AGREE
    }

    /// Scaled, as bytes by time are.
    pub fn times(self, factor: f64) -> Self {
        Self { median: self.median * factor, low: self.low * factor, high: self.high * factor, ..self }
    }
}
