//! Every norm and its gradients in f64, element by element from the definitions.
//!
//! It speaks of logical indices only (`[N, C, ..]`, leading and normalized dimensions), so that it
//! shares no idea of memory order with the crate. The gradients follow the chain rule through the mean and
//! the variance one at a time, not the closed form that the kernels compute.
//!
//! Beside each value stands a bound on the error of a careful evaluation in arithmetic of unit
//! roundoff `u`, where careful means: rounding errors of an n-term sum grow like
//! `lambda * sqrt(n) * u` times the sum of magnitudes (Higham and Mary 2019,
//! <https://doi.org/10.1137/18M1226312>; lambda = 2 here), the mean comes from differences to some
//! element of the set, and a dozen operations follow. Nothing in it was fitted to a result.

use crate::case::{Arguments, Case, Norm};
use crate::common::{accumulation, device, underflow, unit_roundoff};
use crate::fusion_oracle as around;
use candle_core::DType;

/// A value and the bound on its error before it is rounded to its dtype.
#[derive(Clone, Copy, Debug, Default)]
pub struct Approx {
    pub value: f64,
    pub bound: f64,
}

impl Approx {
    /// `got`, of dtype `dtype`, is this value but for `times` the bound and one rounding.
    pub fn allows(&self, got: f64, dtype: DType, times: f64) -> bool {
        (got - self.value).abs() <= times * (self.bound + self.rounding(dtype))
            || (got.is_nan() && self.value.is_nan())
            || got == self.value
    }

    /// A hair more than half a unit in the last place: the sum of value and error is what is rounded.
    fn rounding(&self, dtype: DType) -> f64 {
        1.001 * unit_roundoff(dtype) * self.value.abs() + underflow(dtype)
    }
}

/// Everything a call returns or changes.
#[derive(Debug)]
pub struct Expected {
    pub y: Vec<Approx>,
    pub dx: Vec<Approx>,
    pub dweight: Vec<Approx>,
    pub dbias: Vec<Approx>,
    pub running_mean: Vec<Approx>,
    pub running_var: Vec<Approx>,
    pub sum: Vec<Approx>,
    pub dresidual: Vec<Approx>,
    pub dskip: Vec<Approx>,
    pub dgate: Vec<Approx>,
}

impl Norm {
    /// Set and parameter of the element with logical index `i` (row-major).
    pub fn place(&self, dims: &[usize], i: usize) -> (usize, usize) {
        let below = |d: usize| dims[d + 1..].iter().product::<usize>();
        let at = |d: usize| i / below(d) % dims[d];
        match *self {
            Norm::Batch { .. } | Norm::Instance { use_input_stats: false } => (at(1), at(1)),
            Norm::Instance { .. } => (at(0) * dims[1] + at(1), at(1)),
            Norm::Group { groups } => (at(0) * groups + at(1) / (dims[1] / groups), at(1)),
            Norm::Layer { normalized } | Norm::Rms { normalized } => {
                let n: usize = dims[dims.len() - normalized..].iter().product();
                (i / n, i % n)
            }
            Norm::Channels { .. } => (at(0) * below(1) + i % below(1), at(1)),
        }
    }

    fn sets(&self, dims: &[usize]) -> usize {
        match *self {
            Norm::Batch { .. } | Norm::Instance { use_input_stats: false } => dims[1],
            Norm::Instance { .. } => dims[0] * dims[1],
            Norm::Group { groups } => dims[0] * groups,
            Norm::Layer { normalized } | Norm::Rms { normalized } => {
                dims[..dims.len() - normalized].iter().product()
            }
            Norm::Channels { .. } => dims[0] * dims[2..].iter().product::<usize>(),
        }
    }

    fn centers(&self) -> bool {
        !matches!(self, Norm::Rms { .. } | Norm::Channels { center: false })
    }

    /// Whether the statistics are given rather than the input's own.
    pub fn fixed(&self) -> bool {
        matches!(self, Norm::Batch { training: false } | Norm::Instance { use_input_stats: false })
    }
}

/// Error growth of a sum of `n` terms and a dozen operations on it, in unit roundoffs.
fn growth(n: usize) -> f64 {
    12.0 + 2.0 * (n as f64).sqrt()
}

/// Statistics of a set, and the quantities that bound errors in it.
#[derive(Clone, Copy, Default)]
struct Set {
    len: usize,
    mean: f64,
    /// What `mean` is short of the mean: f64 rounds too.
    low: f64,
    var: f64,
    rstd: f64,
    /// Error of `x - mean` beside that of the subtraction, over `u`.
    shift: f64,
    /// Relative error of rstd, over `u`.
    spread: f64,
    /// Error of x itself, over `u`.
    blur: f64,
}

/// Whether a mean is kept to the last bit, or rounded to the accumulation dtype as PyTorch's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mean {
    Exact,
    Rounded,
}

fn statistics(case: &Case, args: &Arguments, place: &[(usize, usize)], mean: Mean) -> Vec<Set> {
    let mut sets = vec![Set::default(); case.norm.sets(&case.dims)];
    place.iter().for_each(|&(s, _)| sets[s].len += 1);
    if let (true, Some((means, vars))) = (case.norm.fixed(), &args.running) {
        // Statistics wider than the accumulation dtype are rounded to it.
        let rounded = case.running == Some(DType::F64) && accumulation(case.dtype) != DType::F64;
        for (s, set) in sets.iter_mut().enumerate() {
            (set.mean, set.var) = (means[s], vars[s]);
            set.shift = if rounded { means[s].abs() } else { 0.0 };
            if mean == Mean::Rounded {
                // y = x * scale + shift, where the mean is in the shift.
                set.shift += 4.0 * set.mean.abs();
            }
            set.spread = 8.0;
        }
    } else {
        let each = |sets: &mut [Set], f: &dyn Fn(&mut Set, f64)| {
            place.iter().zip(&args.x).for_each(|(&(s, _), &x)| f(&mut sets[s], x))
        };
        if case.norm.centers() {
            each(&mut sets, &|set, x| set.mean += x / set.len as f64);
            each(&mut sets, &|set, x| set.low += (x - set.mean) / set.len as f64);
        }
        each(&mut sets, &|set, x| {
            let d = x - set.mean - set.low;
            set.var += d * d / set.len as f64;
            set.shift = set.shift.max(if case.norm.centers() { d.abs() } else { 0.0 });
        });
        for set in &mut sets {
            set.shift *= growth(set.len);
            // A mean kept as a sum of two numbers is off by the rounding of the second; the oracle's own by
            // the error of the sum that made it. A GPU multiplies by an inverse of n that is off by two roundings (PTX,
            // rcp.approx): the second number is then up to four roundings of the mean, and four of its own away.
            let second = if device().is_cuda() { 16.0 } else { 1.0 };
            set.shift += second * arithmetic(case.dtype) * set.mean.abs() + growth(set.len) * set.low.abs();
            if mean == Mean::Rounded {
                // Not only x - mean: sums of x * dy are corrected by the mean afterwards.
                set.shift += growth(set.len) * set.mean.abs();
            }
            set.spread = growth(set.len);
        }
    }
    sets.iter_mut().for_each(|set| set.rstd = 1.0 / (set.var + case.eps).sqrt());
    sets
}

/// Output, gradients and running statistics of `case` on `args`.
pub fn evaluate(case: &Case, args: &Arguments) -> Expected {
    evaluate_with(case, args, Mean::Exact)
}

/// The same values, with bounds for an evaluation that rounds the mean.
pub fn evaluate_with_rounded_mean(case: &Case, args: &Arguments) -> Expected {
    evaluate_with(case, args, Mean::Rounded)
}

fn evaluate_with(case: &Case, args: &Arguments, mean: Mean) -> Expected {
    let place: Vec<_> = (0..args.x.len()).map(|i| case.place(i)).collect();
    let x = around::before(case, args);
    let weight = args.weight.as_ref().map(|w| w.iter().map(|w| w + case.offset()).collect());
    let inner = Arguments { x: x.iter().map(|x| x.value).collect(), weight, ..args.clone() };
    let mut sets = statistics(case, &inner, &place, mean);
    let u = arithmetic(case.dtype);
    for (x, &(s, _)) in x.iter().zip(&place) {
        // Errors of x beside those of the subtraction.
        sets[s].blur = sets[s].blur.max(x.bound / u);
    }
    for set in &mut sets {
        set.shift += 2.0 * set.blur;
        set.spread += 2.0 * set.blur * set.rstd;
    }
    let weight = |p: usize| inner.weight.as_ref().map_or(1.0, |w| w[p]);
    let bias = |p: usize| args.bias.as_ref().map_or(0.0, |b| b[p]);
    let z = place.iter().zip(&inner.x).map(|(&(s, p), &x)| {
        let (set, w) = (sets[s], weight(p));
        let d = x - set.mean - set.low;
        let value = d * set.rstd * w + bias(p);
        let bound = (set.spread + 4.0) * d.abs() + set.shift;
        Approx { value, bound: u * (w.abs() * set.rstd * bound + 2.0 * bias(p).abs()) }
    });
    let after = around::after(case, args, z.collect());
    let inner = Arguments { dy: after.dz.iter().map(|dz| dz.value).collect(), ..inner };
    let (mut dweight, mut dbias) = parameter_gradients(case, &inner, &place, &sets);
    let mut dx = input_gradient(case, &inner, &place, &sets);
    blur(case, &inner, &place, &sets, &after.dz, [&mut dx, &mut dweight, &mut dbias]);
    let (running_mean, running_var) = running(case, args, &sets);
    let back = around::back(case, args, dx);
    Expected {
        y: after.y,
        dx: back.dx,
        dweight,
        dbias,
        running_mean,
        running_var,
        sum: x,
        dresidual: back.dresidual,
        dskip: after.dz,
        dgate: if after.dgate.is_empty() { back.dgate } else { after.dgate },
    }
}

/// Adds to the bounds of gradients what comes of those of `dz`.
fn blur(
    case: &Case,
    args: &Arguments,
    place: &[(usize, usize)],
    sets: &[Set],
    dz: &[Approx],
    [dx, dweight, dbias]: [&mut [Approx]; 3],
) {
    let weight = |p: usize| args.weight.as_ref().map_or(1.0, |w| w[p].abs());
    // Means over a set of |w e| and |w e xhat|.
    let mut means = vec![[0.0; 2]; sets.len()];
    let xhat = |i: usize, set: &Set| ((args.x[i] - set.mean) * set.rstd).abs();
    for (i, &(s, p)) in place.iter().enumerate() {
        let (set, error) = (&sets[s], weight(p) * dz[i].bound);
        means[s][0] += error / set.len as f64;
        means[s][1] += error * xhat(i, set) / set.len as f64;
        dweight[p].bound += dz[i].bound * xhat(i, set);
        dbias[p].bound += dz[i].bound;
    }
    for (i, &(s, p)) in place.iter().enumerate() {
        let set = &sets[s];
        let through = if case.norm.fixed() { 0.0 } else { means[s][0] + xhat(i, set) * means[s][1] };
        dx[i].bound += set.rstd * (weight(p) * dz[i].bound + through);
    }
}

/// Unit roundoff of the arithmetic inside; the oracle's own counts where that is f64 as well.
pub fn arithmetic(dtype: DType) -> f64 {
    unit_roundoff(accumulation(dtype)) + unit_roundoff(DType::F64)
}

fn input_gradient(case: &Case, args: &Arguments, place: &[(usize, usize)], sets: &[Set]) -> Vec<Approx> {
    let u = arithmetic(case.dtype);
    // Sums over a set of g, g * (x - mean), |g| and |g| * (bound of |x - mean|).
    let mut sums = vec![[0.0; 4]; sets.len()];
    let terms = |i: usize| {
        let (s, p) = place[i];
        let set = &sets[s];
        let g = args.dy[i] * args.weight.as_ref().map_or(1.0, |w| w[p]);
        let d = args.x[i] - set.mean - set.low;
        (s, g, d, d.abs() + set.shift / growth(set.len))
    };
    for i in 0..args.x.len() {
        let (s, g, d, reach) = terms(i);
        [g, g * d, g.abs(), g.abs() * reach].iter().zip(&mut sums[s]).for_each(|(t, sum)| *sum += t);
    }
    let gradient = |i: usize| {
        let (s, g, d, reach) = terms(i);
        let (set, n) = (&sets[s], sets[s].len as f64);
        let direct = g * set.rstd;
        if case.norm.fixed() {
            return Approx { value: direct, bound: (set.spread + 4.0) * u * direct.abs() };
        }
        // The loss's derivatives by the variance and by the mean, of which x moves both.
        let dvar = -0.5 * set.rstd.powi(3) * sums[s][1];
        let dmean = if case.norm.centers() { -set.rstd * sums[s][0] } else { 0.0 };
        let value = direct + dvar * 2.0 * d / n + dmean / n;
        let centered = if case.norm.centers() { sums[s][2] / n } else { 0.0 };
        let projected = reach * set.rstd.powi(2) * sums[s][3] / n;
        // Both factors of the projection and rstd carry the set's error: three times its growth.
        Approx { value, bound: 3.0 * set.spread * u * set.rstd * (g.abs() + centered + projected) }
    };
    (0..args.x.len()).map(gradient).collect()
}

fn parameter_gradients(
    case: &Case,
    args: &Arguments,
    place: &[(usize, usize)],
    sets: &[Set],
) -> (Vec<Approx>, Vec<Approx>) {
    let params: usize = case.param_dims().iter().product();
    let u = arithmetic(case.dtype);
    let mut dweight = vec![Approx::default(); params];
    let mut dbias = vec![Approx::default(); params];
    // Terms of a parameter: the elements it scales, from however many sets.
    let growth_here = growth(args.x.len().checked_div(params).unwrap_or(0));
    for (i, &(s, p)) in place.iter().enumerate() {
        let (set, dy) = (&sets[s], args.dy[i]);
        let d = args.x[i] - set.mean - set.low;
        dweight[p].value += dy * d * set.rstd;
        let error = (set.spread + growth_here) * d.abs() + set.shift;
        dweight[p].bound += u * dy.abs() * set.rstd * error;
        dbias[p].value += dy;
        dbias[p].bound += u * growth_here * dy.abs();
    }
    (dweight, dbias)
}

/// Running statistics after the call: those before where nothing moves them.
fn running(case: &Case, args: &Arguments, sets: &[Set]) -> (Vec<Approx>, Vec<Approx>) {
    let Some((mean, var)) = &args.running else { return Default::default() };
    if case.norm.fixed() || args.x.is_empty() {
        let same = |v: &[f64]| v.iter().map(|&value| Approx { value, bound: 0.0 }).collect();
        return (same(mean), same(var));
    }
    let u = arithmetic(case.dtype);
    let channels = case.dims[1];
    let instances = sets.len() / channels;
    let moved = |before: &[f64], of: &dyn Fn(&Set) -> (f64, f64)| -> Vec<Approx> {
        let one = |c: usize| {
            let mut batch = (0.0, 0.0);
            for n in 0..instances {
                let (value, error) = of(&sets[n * channels + c]);
                batch = (batch.0 + value / instances as f64, batch.1 + error / instances as f64);
            }
            let value = (1.0 - case.momentum) * before[c] + case.momentum * batch.0;
            // Four roundings of the moving average in the accumulation dtype.
            let kept = (1.0 - case.momentum) * before[c].abs() + case.momentum * batch.0.abs();
            let growth = growth(instances);
            Approx { value, bound: u * (case.momentum * batch.1 + (4.0 + growth) * kept) }
        };
        (0..channels).map(one).collect()
    };
    let unbiased = |set: &Set| set.var * set.len as f64 / (set.len as f64 - 1.0);
    (
        moved(mean, &|set| (set.mean + set.low, set.shift + set.mean.abs())),
        // A mean off by e adds e^2 to the variance.
        moved(var, &|set| (unbiased(set), unbiased(set) * set.spread + u * set.shift * set.shift)),
    )
}
