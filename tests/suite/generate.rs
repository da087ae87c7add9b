//! Calls of a norm made from bytes, right ones and wrong ones, and what must come of each.
//!
//! Apart from `random.rs`, which knows right calls only: here any bytes are a call, so that a fuzzer can
//! steer (`fuzz/`) and proptest can draw (`fuzzed.rs`), both with this one generator. Whether a call is right
//! is decided here from what the documentation says, not by asking the crate. A right call must give what
//! the oracle gives; a wrong one must return an error and leave the running statistics as they were.

use crate::case::{Arguments, Built, Case, Layout, Norm};
use crate::common::{data, device, left_out, ones, values, DTYPES};
use crate::{compare, oracle};
use candle_core::{DType, Tensor, Var};
use candle_norm::functional as f;

/// Bytes as choices; zeros once they have run out.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Below `n`, which is at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        self.byte() as usize % n.max(1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// True once in `n` times.
    pub fn rarely(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }
}

const SIZES: [usize; 24] =
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 257, 0];
/// Elements of a call at most: the oracle is slow, and more is the other tests' matter.
const MOST: usize = 6000;

/// What may be wrong with a call, one thing at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    Rank,
    InputDtype,
    WeightShape,
    BiasShape,
    WeightDtype,
    NegativeEps,
    NanEps,
    NormalizedShape,
    Groups,
    OneOfTwoStatistics,
    NoStatistics,
    StatisticsShape,
    StatisticsDtype,
    Momentum,
    SharedMemory,
    OneValue,
    TooLarge,
}

const FAULTS: [Fault; 17] = [
    Fault::Rank,
    Fault::InputDtype,
    Fault::WeightShape,
    Fault::BiasShape,
    Fault::WeightDtype,
    Fault::NegativeEps,
    Fault::NanEps,
    Fault::NormalizedShape,
    Fault::Groups,
    Fault::OneOfTwoStatistics,
    Fault::NoStatistics,
    Fault::StatisticsShape,
    Fault::StatisticsDtype,
    Fault::Momentum,
    Fault::SharedMemory,
    Fault::OneValue,
    Fault::TooLarge,
];

/// A call, the values of its arguments, and what is wrong with it.
#[derive(Debug)]
pub struct Call {
    pub case: Case,
    pub args: Arguments,
    pub fault: Fault,
    /// Places in x that hold NaN, infinity, the largest or the smallest numbers.
    pub wild: Vec<(usize, f64)>,
}

fn dims(bytes: &mut Bytes, least: usize, most: usize) -> Vec<usize> {
    let rank = least + bytes.below(most + 1 - least);
    // Zero is the last size, and rare.
    let mut dims: Vec<usize> = (0..rank).map(|_| SIZES[bytes.byte() as usize * SIZES.len() / 256]).collect();
    if bytes.rarely(8) {
        // One long dimension, as rows of a vocabulary or of audio are.
        let d = bytes.below(rank);
        dims.iter_mut().for_each(|size| *size = (*size).min(2));
        dims[d] = 1000 + 17 * bytes.byte() as usize;
    }
    // Sizes of zero count as one: the parameters may have the other dimensions.
    let count = |dims: &[usize]| dims.iter().fold(1usize, |n, size| n.saturating_mul(*size.max(&1)));
    for d in 0..rank {
        while count(&dims) > MOST && dims[d] > 2 {
            dims[d] = dims[d].div_ceil(2);
        }
    }
    while count(&dims) > MOST {
        let d = dims.iter().position(|size| *size > 1).unwrap_or(0);
        dims[d] = 1;
    }
    dims
}

fn layout(bytes: &mut Bytes, dims: &[usize]) -> Layout {
    let rank = dims.len();
    let mut layout = Layout::default();
    match bytes.below(6) {
        0..=2 => {}
        3 if rank >= 2 => layout.order = [0].into_iter().chain(2..rank).chain([1]).collect(),
        _ => {
            layout.order = (0..rank).collect();
            (1..rank).rev().for_each(|i| layout.order.swap(i, bytes.below(i + 1)));
        }
    }
    if rank > 0 && bytes.rarely(3) {
        layout.narrow = Some((bytes.below(rank), bytes.below(3), bytes.below(2)));
    }
    if rank > 0 && bytes.rarely(6) {
        let d = bytes.below(rank);
        layout.broadcast = (dims[d] > 0).then_some(d);
    }
    layout
}

fn norm(bytes: &mut Bytes) -> (Norm, Vec<usize>) {
    match bytes.below(8) {
        kind @ (0 | 1) => {
            let dims = dims(bytes, 1, 8);
            let normalized = 1 + bytes.below(dims.len());
            (if kind == 0 { Norm::Layer { normalized } } else { Norm::Rms { normalized } }, dims)
        }
        2 => {
            let dims = dims(bytes, 2, 8);
            let divisors: Vec<usize> = (1..=dims[1].max(1)).filter(|g| dims[1].is_multiple_of(*g)).collect();
            (Norm::Group { groups: bytes.pick(&divisors) }, dims)
        }
        3 => (Norm::Batch { training: true }, dims(bytes, 2, 8)),
        4 => (Norm::Batch { training: false }, dims(bytes, 2, 8)),
        5 => (Norm::Instance { use_input_stats: true }, dims(bytes, 2, 8)),
        6 => (Norm::Instance { use_input_stats: false }, dims(bytes, 2, 8)),
        _ => {
            let dims = dims(bytes, 2, 8);
            (Norm::Channels { center: bytes.below(2) == 0 }, dims)
        }
    }
}

impl Call {
    pub fn new(bytes: &mut Bytes) -> Self {
        let (norm, dims) = norm(bytes);
        let mut case =
            Case { dtype: bytes.pick(&DTYPES), params: bytes.pick(&DTYPES), ..Case::new(norm, &dims) };
        let flags = bytes.byte();
        case.weight = flags & 1 == 0;
        case.bias &= flags & 2 == 0;
        case.narrow_params = flags & 4 != 0 && case.param_dims().iter().all(|d| *d > 0);
        if matches!(norm, Norm::Batch { .. } | Norm::Instance { .. }) && (flags & 8 == 0 || norm.fixed()) {
            case.running = Some(bytes.pick(&DTYPES[..2]));
        }
        case.layout = layout(bytes, &dims);
        case.momentum = bytes.pick(&[0.1, 0.0, 0.5, 1.0]);
        case.eps = bytes.pick(&[1e-5, 1e-12, 1e-3, 0.5]);
        if case.dtype == DType::F16 {
            // Gradients of sets without spread are as large as 1 / sqrt(eps), and f16 ends at 65504.
            case.eps = case.eps.max(1e-5);
        }
        (case.mean, case.std) = bytes.pick(&[(0.0, 1.0), (3.0, 1.0), (-20.0, 0.5), (0.0, 0.01), (1e4, 1.0)]);
        case.seed = bytes.byte().into();
        let mut call = Self { args: arguments(&case), case, fault: Fault::None, wild: vec![] };
        match bytes.below(8) {
            0 => call.make_wrong(bytes.pick(&FAULTS)),
            1 | 2 => call.make_wild(bytes),
            3 => call.args.x.iter_mut().for_each(|x| *x = call.case.mean),
            _ => {}
        }
        if call.fault == Fault::None && call.has_one_value() {
            call.fault = Fault::OneValue;
        }
        call
    }

    /// Whether the input's own statistics would be those of a single value.
    fn has_one_value(&self) -> bool {
        let dims = &self.case.dims;
        match self.case.norm {
            Norm::Batch { training: true } => dims[1] > 0 && dims.iter().product::<usize>() / dims[1] == 1,
            Norm::Instance { use_input_stats: true } => dims[2..].iter().product::<usize>() == 1,
            _ => false,
        }
    }

    /// Takes the fault, if the call can have it.
    fn make_wrong(&mut self, fault: Fault) {
        let norm = self.case.norm;
        let channels = !matches!(norm, Norm::Layer { .. } | Norm::Rms { .. });
        let can = match fault {
            Fault::WeightShape | Fault::WeightDtype => self.case.weight,
            Fault::BiasShape => self.case.bias,
            Fault::NormalizedShape => !channels,
            Fault::Groups => matches!(norm, Norm::Group { .. }),
            Fault::OneOfTwoStatistics | Fault::StatisticsShape | Fault::StatisticsDtype | Fault::Momentum => {
                self.case.running.is_some()
            }
            Fault::NoStatistics => norm.fixed(),
            // Only what is moved must be apart.
            Fault::SharedMemory => self.case.running.is_some() && !norm.fixed(),
            Fault::OneValue => false,
            _ => true,
        };
        if can {
            self.fault = fault;
        }
    }

    fn make_wild(&mut self, bytes: &mut Bytes) {
        if self.args.x.is_empty() || self.case.layout.broadcast.is_some() {
            return;
        }
        for _ in 0..1 + bytes.below(3) {
            let at = (bytes.byte() as usize * 256 + bytes.byte() as usize) % self.args.x.len();
            let value =
                bytes.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 3e38, -6e4, 1e-40, -0.0, 1e300]);
            self.args.x[at] = value;
            self.wild.push((at, value));
        }
    }

    /// Makes the call and checks what came of it.
    pub fn check(&self) -> Result<(), String> {
        if device().is_cuda() && self.case.layout.broadcast.is_some() && self.args.x.is_empty() {
            left_out("candle's gradient of a broadcast divides by the 0 elements of what it sums to");
            return Ok(());
        }
        let outcome = match self.fault {
            Fault::None if self.wild.is_empty() => self.against_oracle(),
            Fault::None => self.wild_stays_in_its_set(),
            _ => self.is_refused(),
        };
        outcome.map_err(|e| format!("{e}\n{:?} {:?} {:?}", self.fault, self.wild, self.case))
    }

    fn against_oracle(&self) -> Result<(), String> {
        let got = self.case.run(&self.args).map_err(|e| e.to_string())?;
        compare::all(&self.case, &got, oracle::evaluate(&self.case, &got.rounded), 1.0)
    }

    /// Sets without a wild value come out as if there were none anywhere.
    fn wild_stays_in_its_set(&self) -> Result<(), String> {
        let got = self.case.run(&self.args).map_err(|e| e.to_string())?;
        let expected = oracle::evaluate(&self.case, &got.rounded);
        let place = |i: usize| self.case.norm.place(&self.case.dims, i).0;
        let wild: Vec<usize> = self.wild.iter().map(|(at, _)| place(*at)).collect();
        let dx = got.dx.as_ref().ok_or("dx: none")?;
        for (what, got, expected) in [("y", &got.y, &expected.y), ("dx", dx, &expected.dx)] {
            let got = values(got);
            for i in (0..got.len()).filter(|i| !wild.contains(&place(*i))) {
                if !expected[i].allows(got[i], self.case.dtype, 1.0) {
                    return Err(format!("{what}[{i}]: {:e}, expected {:?}", got[i], expected[i]));
                }
            }
        }
        Ok(())
    }

    fn is_refused(&self) -> Result<(), String> {
        let built = self.case.build(&self.args).map_err(|e| e.to_string())?;
        let both = |(mean, var): &(Var, Var)| (values(mean), values(var));
        let before = built.running.as_ref().map(both);
        let Err(error) = self.wrong_call(&built) else { return Err("no error".into()) };
        if built.running.as_ref().map(both) != before {
            return Err(format!("running statistics moved by a call that failed: {error}"));
        }
        // The op, what was expected, what came: said by our checks, not by something further down.
        let error = error.to_string();
        match error.split_once(": ") {
            Some((op, _)) if op.ends_with("-norm") || op.ends_with("-norm-channels") => Ok(()),
            _ => Err(format!("an error that does not name the op: {error}")),
        }
    }

    fn wrong_call(&self, built: &Built) -> candle_core::Result<Tensor> {
        let device = device();
        let case = &self.case;
        let view = |a: &'_ Option<crate::case::Argument>| a.as_ref().map(|a| a.view.clone());
        let (mut x, mut weight, mut bias) = (built.x.view.clone(), view(&built.weight), view(&built.bias));
        let mut shape = case.param_dims();
        let wrong = |t: &Option<Tensor>| {
            let mut dims = t.as_ref().map(|t| t.dims().to_vec()).unwrap_or_default();
            *dims.last_mut().unwrap() += 1;
            ones(&dims, case.params)
        };
        let mut running = built.running.clone();
        let (mut momentum, mut eps) = (case.momentum, case.eps);
        let mut groups = if let Norm::Group { groups } = case.norm { groups } else { 1 };
        let mut one_of_two = false;
        match self.fault {
            Fault::None | Fault::OneValue => {}
            // None, and for norms with channels one dimension, too.
            Fault::Rank => {
                let channels = !matches!(case.norm, Norm::Layer { .. } | Norm::Rms { .. });
                let dims = vec![case.dims[0].max(1); (channels && case.seed.is_multiple_of(2)).into()];
                x = Tensor::zeros(dims, case.dtype, device)?
            }
            Fault::InputDtype => x = Tensor::zeros(case.dims.clone(), DType::U8, device)?,
            Fault::WeightShape => weight = Some(wrong(&weight)?),
            Fault::BiasShape => bias = Some(wrong(&bias)?),
            Fault::WeightDtype => weight = Some(ones(&shape, DType::I64)?),
            Fault::NegativeEps => eps = -1e-5,
            Fault::NanEps => eps = f64::NAN,
            Fault::NormalizedShape if case.seed.is_multiple_of(3) => shape = vec![],
            Fault::NormalizedShape if case.seed % 3 == 1 => *shape.last_mut().unwrap() += 1,
            Fault::NormalizedShape => {
                shape.splice(0..0, std::iter::once(1).chain(case.dims.clone())).for_each(drop)
            }
            Fault::Groups if case.seed.is_multiple_of(2) || case.dims[1] == 0 => groups = 0,
            Fault::Groups => groups = case.dims[1] + 1,
            Fault::OneOfTwoStatistics => one_of_two = true,
            Fault::NoStatistics => running = None,
            Fault::StatisticsShape => {
                running = running
                    .map(|(mean, _)| {
                        Ok::<_, candle_core::Error>((mean, Var::zeros(case.dims[1] + 1, DType::F32, device)?))
                    })
                    .transpose()?
            }
            Fault::StatisticsDtype => {
                running = running
                    .map(|(mean, _)| {
                        Ok::<_, candle_core::Error>((mean, Var::zeros(case.dims[1], DType::U32, device)?))
                    })
                    .transpose()?
            }
            Fault::Momentum => momentum = [1.5, -0.1, f64::NAN][case.seed as usize % 3],
            Fault::SharedMemory => {
                let (mean, _) = built.running.as_ref().unwrap();
                weight = Some(mean.as_tensor().clone());
            }
            Fault::TooLarge => {
                let rank = case.dims.len().max(3);
                let mut dims = vec![1 << 40; rank];
                dims[1] = 1;
                // Without memory: one element, repeated.
                let one = Tensor::zeros(vec![1; rank], case.dtype, device)?;
                x = one.broadcast_as(dims)?;
                (weight, bias, running) = (None, None, None);
                if case.norm.fixed() {
                    let of = || Var::zeros(1, DType::F32, device);
                    running = Some((of()?, of()?));
                }
                shape = x.dims()[rank - 1..].to_vec();
                groups = 1;
            }
        }
        let (weight, bias) = (weight.as_ref(), bias.as_ref());
        let mean = running.as_ref().map(|r| &r.0);
        let var = running.as_ref().map(|r| &r.1).filter(|_| !one_of_two);
        match case.norm {
            Norm::Batch { training } => f::batch_norm(&x, mean, var, weight, bias, training, momentum, eps),
            Norm::Instance { use_input_stats } => {
                f::instance_norm(&x, mean, var, weight, bias, use_input_stats, momentum, eps)
            }
            Norm::Layer { .. } => f::layer_norm(&x, &shape, weight, bias, eps),
            Norm::Group { .. } => f::group_norm(&x, groups, weight, bias, eps),
            Norm::Rms { .. } => f::rms_norm(&x, &shape, weight, eps),
            Norm::Channels { center: true } => f::layer_norm_channels(&x, weight, bias, eps),
            Norm::Channels { center: false } => f::rms_norm_channels(&x, weight, eps),
        }
    }
}

/// As `Case::random`, for shapes of any rank.
fn arguments(case: &Case) -> Arguments {
    let n: usize = case.dims.iter().product();
    let seed = 8 * case.seed;
    let params: usize = case.param_dims().iter().product();
    let of = |i: u64, mean, std| data(seed + i, params, mean, std);
    Arguments {
        x: data(seed, n, case.mean, case.std),
        dy: data(seed + 1, n, 0.0, 1.0),
        weight: case.weight.then(|| of(2, 1.0, 0.5)),
        bias: case.bias.then(|| of(3, 0.0, 1.0)),
        running: case.running.map(|_| {
            let channels = case.dims[1];
            let var = data(seed + 5, channels, case.std * case.std, 0.25 * case.std * case.std);
            (data(seed + 4, channels, case.mean, case.std), var)
        }),
        ..Arguments::default()
    }
}

/// The functional calls that `bytes` describe.
pub fn functional(bytes: &[u8]) -> Result<(), String> {
    Call::new(&mut Bytes(bytes)).check()
}
