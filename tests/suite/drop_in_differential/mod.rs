//! Changing an import changes no result: every public norm of candle-nn, called alike in both crates.
//!
//! The calls are generated: function, shapes of input and parameters, memory order, dtypes. Wherever
//! candle-nn answers with finite numbers, candle-norm must answer the same, gradients included. "The same" is
//! judged in f64: both are within their own rounding of it, candle-nn within that of its one-pass variance
//! and of its operations in half precision, candle-norm within one rounding of careful arithmetic.
//!
//! Where the two differ on purpose is a list, [`EXCEPTIONS`]; docs/switching.md has the same.

mod reference;
mod sides;

use crate::common::{data, device, sized, tensor, unit_roundoff, values, DTYPES, EMULATED};
use candle_core::{DType, Result, Tensor, Var};
use reference::{Bounds, Exact, Repeats};
use sides::{Answer, Args, Entry, Family};
use std::collections::BTreeMap;

/// Where the elements of an argument lie.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Contiguous,
    /// A transposed view, of the last two dimensions.
    Transposed,
    /// Channels last in memory.
    Permuted,
    /// One slice repeated along dimension 0.
    Broadcast,
    /// Every other element of a longer last dimension: no dense memory.
    Narrowed,
    /// Cut out of the middle of a longer tensor; contiguous, at an offset.
    Offset,
}

#[derive(Clone, Debug)]
pub struct Call {
    entry: usize,
    family: Family,
    dims: Vec<usize>,
    weight: Vec<usize>,
    bias: Vec<usize>,
    layout: Layout,
    strided_params: bool,
    dtype: DType,
    params: DType,
    running: DType,
    one_running: bool,
    train: bool,
    eps: f64,
    momentum: f64,
}

impl Call {
    /// Whether the function has a weight, and a bias.
    fn parameters(&self) -> [bool; 2] {
        match self.family {
            Family::Last { bias, .. } => [true, bias],
            Family::Group => [true, true],
            Family::Batch { affine, .. } => [affine, affine],
        }
    }

    fn is_batch(&self) -> bool {
        matches!(self.family, Family::Batch { .. })
    }

    fn name(&self) -> &'static str {
        sides::ours::TABLE[self.entry].0
    }

    fn values_per_channel(&self) -> usize {
        let channels = self.dims.get(1).copied().unwrap_or(1);
        self.dims.iter().product::<usize>() / channels
    }
}

type Exception = (&'static str, fn(&Call) -> bool);

/// What candle-norm does otherwise, in the words of docs/switching.md, and which calls that is about.
const EXCEPTIONS: [Exception; 6] = [
    (
        "BatchNorm in training on one value per channel is refused, as PyTorch refuses it: candle-nn returns the \
         bias and puts NaN into the running variance.",
        |call| call.is_batch() && call.train && call.values_per_channel() == 1,
    ),
    (
        "BatchNorm in evaluation on an input of one dimension is refused: candle-nn takes it for one channel.",
        |call| call.is_batch() && !call.train && call.dims.len() == 1,
    ),
    (
        "One variable as both running mean and running variance is refused in training and in evaluation: each \
         would overwrite the other.",
        |call| call.one_running,
    ),
    (
        "A negative `eps` is refused by all norms: candle-nn refuses it in BatchNorm alone, and elsewhere returns \
         NaN for the inputs whose variance it exceeds.",
        |call| call.eps < 0.0,
    ),
    (
        "A `momentum` outside 0 to 1 in a `BatchNormConfig` is refused, as candle-nn's `new_with_momentum` refuses \
         it: the running variance could become negative.",
        |call| !(0.0..=1.0).contains(&call.momentum),
    ),
    (
        "Running statistics that a `VarBuilder` of half precision creates or loads are f32: an average in half \
         precision stops moving before it arrives, and candle-nn's cannot train.",
        |call| call.name().starts_with("batch_norm") && unit_roundoff(call.params) > unit_roundoff(DType::F32),
    ),
];

/// Exact in f32, which `ops` takes it in.
const EPS: f64 = 1.0 / 65536.0;

fn layouts(dims: &[usize]) -> Vec<Layout> {
    let mut all = vec![Layout::Contiguous, Layout::Broadcast, Layout::Narrowed, Layout::Offset];
    if dims.len() > 1 {
        all.push(Layout::Transposed);
    }
    if dims.len() > 2 {
        all.push(Layout::Permuted);
    }
    all
}

/// Shapes of a weight for the last of `dims`: each that broadcasts, and two that do not.
fn last_dim_shapes(dims: &[usize]) -> Vec<Vec<usize>> {
    let (rank, n) = (dims.len(), dims[dims.len() - 1]);
    let mut shapes: Vec<Vec<usize>> =
        (1..=rank + 1).map(|ones| [vec![1; ones - 1], vec![n]].concat()).collect();
    shapes.extend((0..rank).map(|from| dims[from..].to_vec()));
    shapes.extend([
        vec![],
        vec![1],
        vec![1; rank],
        vec![n + 1],
        vec![2, n],
        [vec![2], dims.to_vec()].concat(),
    ]);
    if rank > 1 {
        // A parameter per row, per sample, and several for a last dimension of one.
        shapes.extend([
            [&dims[..rank - 1], &[1]].concat(),
            [vec![dims[0]], vec![1; rank - 1]].concat(),
            vec![5],
        ]);
    }
    shapes.sort();
    shapes.dedup();
    shapes
}

fn channel_shapes(family: Family, c: usize) -> Vec<Vec<usize>> {
    match family {
        Family::Batch { .. } => vec![vec![c]],
        _ => vec![vec![c], vec![c, 1, 1], vec![1, c], vec![1, c, 1, 1], vec![2, c / 2], vec![c + 1]],
    }
}

/// Inputs of every rank; one value per channel, one element per set, and more sets than a kernel's tile.
const LAST_DIMS: [&[usize]; 8] =
    [&[6], &[1], &[4, 6], &[7, 1], &[2, 4, 6], &[33, 17], &[2, 3, 2, 5], &[2, 2, 3, 1]];
const CHANNEL_DIMS: [&[usize]; 9] =
    [&[6], &[1], &[1, 4], &[5, 4], &[3, 4, 1], &[2, 4, 6], &[1, 4, 1, 1], &[2, 4, 3, 2], &[3, 4, 5, 3]];

fn generate() -> Vec<Call> {
    let mut calls = vec![];
    for (entry, &(_, family, _)) in sides::theirs::TABLE.iter().enumerate() {
        let all_dims = if matches!(family, Family::Last { .. }) { &LAST_DIMS[..] } else { &CHANNEL_DIMS };
        for &dims in all_dims {
            let shapes = match family {
                Family::Last { .. } => last_dim_shapes(dims),
                _ => channel_shapes(family, dims.get(1).copied().unwrap_or(1)),
            };
            for shape in &shapes {
                of_shape(&mut calls, entry, family, dims, shape);
            }
        }
    }
    calls
}

/// Every layout, dtype and bias for one function and weight; the odd ones for the plainest call of each.
fn of_shape(calls: &mut Vec<Call>, entry: usize, family: Family, dims: &[usize], weight: &[usize]) {
    let plain = Call {
        entry,
        family,
        dims: dims.to_vec(),
        weight: weight.to_vec(),
        bias: weight.to_vec(),
        layout: Layout::Contiguous,
        strided_params: false,
        dtype: DType::F32,
        params: DType::F32,
        running: DType::F32,
        one_running: false,
        train: true,
        eps: EPS,
        momentum: 0.25,
    };
    let n = dims[dims.len() - 1];
    let others = [vec![n], dims.to_vec(), vec![1], weight.to_vec()];
    let biases = if let Family::Last { bias: true, .. } = family { &others[..] } else { &others[3..] };
    let trains: &[bool] = if plain.is_batch() { &[true, false] } else { &[true] };
    for &train in trains {
        let plain = Call { train, ..plain.clone() };
        for layout in layouts(dims) {
            for (dtype, params) in DTYPES.into_iter().flat_map(|d| DTYPES.map(|p| (d, p))) {
                for bias in biases {
                    calls.push(Call {
                        layout,
                        dtype,
                        params,
                        running: params,
                        bias: bias.clone(),
                        ..plain.clone()
                    });
                }
                if plain.is_batch() && params != DType::F32 {
                    calls.push(Call { layout, dtype, params, ..plain.clone() });
                }
            }
        }
        calls.push(Call { strided_params: true, ..plain.clone() });
        calls.push(Call { eps: -1.0 / 256.0, ..plain.clone() });
        if plain.is_batch() {
            calls.push(Call { momentum: 1.5, ..plain.clone() });
            calls.push(Call { one_running: true, ..plain.clone() });
        }
    }
}

/// A variable, and the view of it that is the argument.
struct Argument {
    base: Var,
    view: Tensor,
}

impl Argument {
    fn new(seed: u64, dims: &[usize], dtype: DType, layout: Layout, mean: f64, std: f64) -> Result<Self> {
        let (rank, mut stored) = (dims.len(), dims.to_vec());
        match layout {
            Layout::Contiguous => {}
            Layout::Transposed => stored.swap(rank - 2, rank - 1),
            Layout::Permuted => stored[1..].rotate_left(1),
            Layout::Broadcast => stored[0] = 1,
            Layout::Narrowed => stored.push(2),
            Layout::Offset => stored[0] += 2,
        }
        let numbers = data(seed, stored.iter().product(), mean, std);
        let base = Var::from_tensor(&tensor(&numbers, &stored, dtype)?)?;
        let view = Self::view(&base, dims, layout)?;
        Ok(Self { base, view })
    }

    fn view(base: &Tensor, dims: &[usize], layout: Layout) -> Result<Tensor> {
        let rank = dims.len();
        match layout {
            Layout::Contiguous => Ok(base.clone()),
            Layout::Transposed => base.transpose(rank - 2, rank - 1),
            Layout::Permuted => {
                let order: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
                base.permute(order)
            }
            Layout::Broadcast => base.broadcast_as(dims),
            Layout::Narrowed => base.narrow(rank, 1, 1)?.squeeze(rank),
            Layout::Offset => base.narrow(0, 1, dims[0]),
        }
    }

    /// The same argument in f64.
    fn exact(&self, dims: &[usize], layout: Layout) -> Result<Self> {
        let base = Var::from_tensor(&self.base.as_detached_tensor().to_dtype(DType::F64)?)?;
        let view = Self::view(&base, dims, layout)?;
        Ok(Self { base, view })
    }
}

/// The arguments of one call.
struct Arguments {
    x: Argument,
    weight: Argument,
    bias: Argument,
    running: (Tensor, Tensor),
}

impl Arguments {
    fn new(call: &Call) -> Result<Self> {
        let layout = if call.strided_params { Layout::Narrowed } else { Layout::Contiguous };
        let channels = call.dims.get(1).copied().unwrap_or(1);
        let running = |seed, mean| tensor(&data(seed, channels, mean, 0.2), &[channels], call.running);
        Ok(Self {
            x: Argument::new(1, &call.dims, call.dtype, call.layout, 0.5, 1.0)?,
            weight: Argument::new(2, &call.weight, call.params, layout, 1.0, 0.5)?,
            bias: Argument::new(3, &call.bias, call.params, layout, 0.0, 1.0)?,
            running: (running(4, 0.5)?, running(5, 1.0)?),
        })
    }

    fn exact(&self, call: &Call) -> Result<Self> {
        let layout = if call.strided_params { Layout::Narrowed } else { Layout::Contiguous };
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        Ok(Self {
            x: self.x.exact(&call.dims, call.layout)?,
            weight: self.weight.exact(&call.weight, layout)?,
            bias: self.bias.exact(&call.bias, layout)?,
            running: (wide(&self.running.0)?, wide(&self.running.1)?),
        })
    }

    /// Running statistics are copied, since the call may move them.
    fn for_one_side(&self, call: &Call) -> Result<Args> {
        let (mean, var) = (self.running.0.copy()?, self.running.1.copy()?);
        let running = match call.one_running {
            true => Var::from_tensor(&var).map(|var| (var.as_tensor().clone(), var.as_tensor().clone()))?,
            false => (mean, var),
        };
        let (x, weight, bias) = (self.x.view.clone(), self.weight.view.clone(), self.bias.view.clone());
        let (train, eps, momentum) = (call.train, call.eps, call.momentum);
        Ok(Args { x, weight, bias, running, train, eps, momentum })
    }

    fn gradients(&self, y: &Tensor) -> Result<[Option<Vec<f64>>; 3]> {
        let dy = tensor(&data(6, y.elem_count(), 0.0, 1.0), y.dims(), y.dtype())?;
        let all = (y * dy)?.sum_all()?.backward()?;
        Ok([&self.x, &self.weight, &self.bias].map(|arg| all.get(&arg.base).map(values)))
    }
}

/// How a call came out.
enum Verdict {
    /// candle-nn refuses it, or answers with numbers that are not finite.
    NoAnswer,
    Same {
        gradients: usize,
    },
    /// In what they differ.
    Differs(String),
}

fn compare(call: &Call) -> Result<Verdict> {
    let arguments = Arguments::new(call)?;
    let run = |table: &[Entry]| (table[call.entry].2)(&arguments.for_one_side(call)?);
    let Ok(theirs) = run(sides::theirs::TABLE) else { return Ok(Verdict::NoAnswer) };
    let numbers = values(&theirs.y);
    if !numbers.iter().all(|v| v.is_finite()) {
        return Ok(Verdict::NoAnswer);
    }
    match run(sides::ours::TABLE) {
        Ok(ours) => Ok(match judge(call, &arguments, &ours, &theirs)? {
            Ok(gradients) => Verdict::Same { gradients },
            Err(what) => Verdict::Differs(what),
        }),
        Err(error) => Ok(Verdict::Differs(format!("an error: {error}"))),
    }
}

/// The number of gradients compared, or in what they differ.
fn judge(
    call: &Call,
    arguments: &Arguments,
    ours: &Answer,
    theirs: &Answer,
) -> Result<std::result::Result<usize, String>> {
    let dtypes = |a: &Answer| (a.y.dtype(), a.running.as_ref().map(|r| (r.0.dtype(), r.1.dtype())));
    if ours.y.dims() != theirs.y.dims() || dtypes(ours) != dtypes(theirs) || ours.says != theirs.says {
        let tell = |a: &Answer| format!("{:?} {:?} {}", a.y.dims(), dtypes(a), a.says);
        return Ok(Err(format!("{} beside candle-nn's {}", tell(ours), tell(theirs))));
    }
    let exact = arguments.exact(call)?;
    let (x, weight, bias) = (exact.x.view.clone(), exact.weight.view.clone(), exact.bias.view.clone());
    let meaning = reference::evaluate(call, &Exact { x, weight, bias, running: exact.running.clone() })?;
    let view = call.dims.iter().product::<usize>() as f64 / exact.x.base.elem_count() as f64;
    let view = if call.layout == Layout::Broadcast { view } else { 1.0 };
    let per = |t: &Tensor| meaning.y.elem_count() as f64 / t.elem_count() as f64;
    let (w, b) = (&exact.weight.view, &exact.bias.view);
    let repeats = Repeats { view, x: per(&exact.x.view), weight: per(w), bias: per(b) };
    let bounds = Both {
        ours: reference::ours(&meaning.sizes, repeats, call.dtype, call.running),
        theirs: reference::theirs(&meaning.sizes, repeats, theirs_computes_in(call), call.running),
        exact: reference::theirs(&meaning.sizes, repeats, DType::F64, DType::F64),
    };
    let y = bounds.check("y", |b| b.y, &values(&ours.y), &values(&theirs.y), &values(&meaning.y));
    if let Err(what) = y {
        return Ok(Err(what));
    }
    if let (Some(a), Some(b), Some(c)) = (&ours.running, &theirs.running, &meaning.running) {
        for (what, a, b, c) in [("running_mean", &a.0, &b.0, &c.0), ("running_var", &a.1, &b.1, &c.1)] {
            if let Err(what) = bounds.check(what, |b| b.running, &values(a), &values(b), &values(c)) {
                return Ok(Err(what));
            }
        }
    }
    let sides =
        [arguments.gradients(&ours.y)?, arguments.gradients(&theirs.y)?, exact.gradients(&meaning.y)?];
    Ok(compare_gradients(&bounds, sides))
}

/// candle-nn's fused layer and RMS norm compute an f64 in f32 on a GPU.
fn theirs_computes_in(call: &Call) -> DType {
    match call.family {
        Family::Last { .. } if device().is_cuda() && call.dtype == DType::F64 => DType::F32,
        _ => call.dtype,
    }
}

type Gradients = [Option<Vec<f64>>; 3];

fn compare_gradients(
    bounds: &Both,
    [ours, theirs, exact]: [Gradients; 3],
) -> std::result::Result<usize, String> {
    let of: [(&str, Bound); 3] = [("dx", |b| b.x), ("dweight", |b| b.weight), ("dbias", |b| b.bias)];
    let mut compared = 0;
    for (i, (what, bound)) in of.into_iter().enumerate() {
        let Some(theirs) = &theirs[i] else { continue };
        if !theirs.iter().all(|v| v.is_finite()) {
            continue;
        }
        let Some(ours) = &ours[i] else { return Err(format!("{what}: none")) };
        let exact = exact[i].as_ref().ok_or("a gradient that the meaning lacks")?;
        bounds.check(what, bound, ours, theirs, exact)?;
        compared += 1;
    }
    Ok(compared)
}

type Bound = fn(&Bounds) -> f64;

/// How far each side may be from the meaning, and the meaning's own evaluation from the truth.
#[derive(Debug)]
struct Both {
    ours: Bounds,
    theirs: Bounds,
    exact: Bounds,
}

impl Both {
    fn check(
        &self,
        what: &str,
        bound: Bound,
        ours: &[f64],
        theirs: &[f64],
        exact: &[f64],
    ) -> std::result::Result<(), String> {
        for (side, got, limit) in [("ours", ours, &self.ours), ("candle-nn's", theirs, &self.theirs)] {
            let limit = bound(limit) + bound(&self.exact);
            let off = |(g, e): (&f64, &f64)| (g - e).abs();
            if let Some(i) = got.iter().zip(exact).position(|p| off(p) > limit || off(p).is_nan()) {
                let (g, e, t) = (got[i], exact[i], theirs[i]);
                return Err(format!(
                    "{what}[{i}]: {side} {g:e}, expected {e:e} within {limit:e}, candle-nn {t:e}"
                ));
            }
        }
        Ok(())
    }
}

/// The whole comparison.
#[test]
fn candle_nn_and_candle_norm_answer_alike() -> Result<()> {
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let (mut same, mut gradients, mut unanswered, mut excepted) = (0, 0, 0, [0; EXCEPTIONS.len()]);
    for (i, call) in generate().iter().enumerate() {
        if i % sized(1, 101) != 0 {
            continue;
        }
        match compare(call)? {
            Verdict::NoAnswer => unanswered += 1,
            Verdict::Same { gradients: more } => (same, gradients) = (same + 1, gradients + more),
            Verdict::Differs(how) => match EXCEPTIONS.iter().position(|(_, is)| is(call)) {
                Some(exception) => excepted[exception] += 1,
                None => wrong.entry(call.name()).or_default().push(format!("{how}\n  {call:?}")),
            },
        }
    }
    println!("{same} calls that candle-nn answers have the same numbers, and {gradients} gradients of them");
    println!("{excepted:?} calls differ as listed; {unanswered} have no finite answer of candle-nn");
    let count: usize = wrong.values().map(Vec::len).sum();
    let first: Vec<String> =
        wrong.iter().map(|(name, all)| format!("{name}, {} calls: {}", all.len(), all[0])).collect();
    assert!(wrong.is_empty(), "{count} calls differ:\n{}", first.join("\n"));
    assert!(EMULATED || excepted.iter().all(|&n| n > 0), "an exception that no call needs: {excepted:?}");
    Ok(())
}

/// docs/switching.md lists the exceptions, all of them and no others.
#[test]
fn the_page_lists_the_exceptions() {
    let page = include_str!("../../../docs/switching.md");
    let section =
        page.split("\n## ").find(|s| s.starts_with("Where the answers differ")).expect("the section");
    let listed: Vec<String> = section.split("\n- ").skip(1).map(words).collect();
    let expected: Vec<String> = EXCEPTIONS.iter().map(|(text, _)| words(text)).collect();
    assert_eq!(listed, expected);
}

/// Text without its line breaks, up to the end of its paragraph.
fn words(text: &str) -> String {
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}
