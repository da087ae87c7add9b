//! One model on both sides, in f32 and in f64: how far apart, and who is nearer to f64.

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Tensor};
use kit::{Model, Run};
use std::collections::BTreeMap;

/// In f64 the two are one formula: what remains is rounding, 1e-16 grown by what the model grows it.
const SAME_IN_F64: f64 = 1e-9;
/// f32 rounds at 6e-8; tens of layers let it grow. A wrong formula is off by parts in ten.
const SAME_IN_F32: f64 = 1e-4;
/// Of a product with quantized weights: its inputs are rounded to 8 bits, and a rounding that falls the other way
/// is a step of one 127th.
const SAME_QUANTIZED: f64 = 1.0 / 127.0;
/// Rounding is as good as random; of two right sides one may be this much further off than the other.
const LUCK: f64 = 4.0;
/// A gradient below this share of the largest one is rounding of what vanishes by symmetry, such as that of a
/// bias in front of a norm: its error is taken relative to this instead.
const VANISHING: f64 = 1e-4;
/// Below this nobody is further off: half a dozen roundings in f32.
const ROUNDING: f64 = 4e-7;

pub struct Figures {
    pub parameters: usize,
    /// Calls of candle-nn's norms in one forward.
    pub norms: usize,
    pub output: Distance,
    pub gradients: Option<Distance>,
}

/// Relative, in the L2 norm; the largest over all variables for gradients.
#[derive(Default)]
pub struct Distance {
    pub apart: f64,
    pub judged: Option<Judged>,
    /// Of gradients.
    pub variables: Vec<Variable>,
}

pub struct Variable {
    pub name: String,
    /// In parts of the largest gradient's length: ours, candle-nn's, in f64.
    pub lengths: [f64; 3],
    pub apart: f64,
    /// From f64.
    pub ours: f64,
    pub theirs: f64,
}

#[derive(Default, Clone, Copy)]
pub struct Judged {
    pub ours: f64,
    pub theirs: f64,
    /// Between the two sides in f64.
    pub apart: f64,
}

impl Judged {
    fn of(&self) -> bool {
        self.apart < SAME_IN_F64 && self.ours <= LUCK * self.theirs + ROUNDING.max(self.grown())
    }

    /// What a rounding in f32 becomes in this model with these weights, by what one in f64 became.
    fn grown(&self) -> f64 {
        self.apart / f64::EPSILON * f64::from(f32::EPSILON)
    }

    pub fn verdict(&self) -> &'static str {
        match self.ours / self.theirs {
            _ if self.ours.max(self.theirs) < ROUNDING => "equal",
            ratio if ratio < 0.9 => "ours nearer",
            ratio if ratio > 1.0 / 0.9 => "candle-nn's nearer",
            _ => "equal",
        }
    }
}

impl Figures {
    /// Written so that NaN fails.
    pub fn pass(&self, model: &Model) -> bool {
        let right = |distance: &Distance| match distance.judged {
            Some(judged) => judged.of(),
            None if model.is_quantized() => distance.apart < SAME_QUANTIZED,
            None => distance.apart < SAME_IN_F32,
        };
        right(&self.output) && self.gradients.as_ref().is_none_or(right)
    }
}

type Gradients = BTreeMap<String, Tensor>;

struct Ran {
    output: Tensor,
    gradients: Option<Gradients>,
    variables: BTreeMap<String, usize>,
}

pub fn compare(ours: &Model, theirs: &Model) -> Result<Figures> {
    let a = run(ours, DType::F32).context("ours")?;
    nn_common::take_norms();
    let b = run(theirs, DType::F32).context("candle-nn's")?;
    let norms = nn_common::take_norms();
    ensure!(a.variables == b.variables, "the two have other variables");
    ensure!(a.gradients.is_some() == b.gradients.is_some(), "only one of the two has gradients");
    let doubles = match ours.no_f64 {
        Some(why) => {
            stays_true(why, !ours.is_quantized() && run(theirs, DType::F64).is_ok())?;
            None
        }
        None => {
            let double = |model| run(model, DType::F64);
            Some((double(ours).context("ours, in f64")?, double(theirs).context("candle-nn's, in f64")?))
        }
    };
    let mut output = Distance { apart: apart(&a.output, &b.output, 0.0)?, ..Default::default() };
    if let Some((c, d)) = &doubles {
        output.judged = Some(Judged {
            ours: apart(&a.output, &d.output, 0.0)?,
            theirs: apart(&b.output, &d.output, 0.0)?,
            apart: apart(&c.output, &d.output, 0.0)?,
        });
    }
    let gradients = match (&a.gradients, &b.gradients) {
        (Some(a), Some(b)) => {
            let doubles = doubles.as_ref().and_then(|(c, d)| c.gradients.as_ref().zip(d.gradients.as_ref()));
            Some(gradients(a, b, doubles)?)
        }
        _ => None,
    };
    Ok(Figures { parameters: a.variables.values().sum(), norms, output, gradients })
}

/// A reason given for leaving something out that no longer holds is an error.
fn stays_true(why: &str, works: bool) -> Result<()> {
    ensure!(!works, "works, although it is said not to: {why}");
    Ok(())
}

fn run(model: &Model, dtype: DType) -> Result<Ran> {
    nn_common::set_working_dtype(dtype);
    let run = Run::new(dtype);
    let output = (model.run)(&run);
    let finished = output.and_then(|output| {
        // Candle says why it has none, where it has not.
        let tried = model.no_gradients != Some(kit::SLOW) && !model.is_quantized();
        let gradients = if tried { backward(&run, &output) } else { Ok(BTreeMap::new()) };
        Ok((output.detach(), gradients))
    });
    nn_common::set_working_dtype(DType::F32);
    let (output, gradients) = finished?;
    let gradients = match model.no_gradients {
        None => {
            let gradients = gradients.context("backward")?;
            ensure!(!gradients.is_empty(), "no variable has a gradient");
            Some(gradients)
        }
        Some(why) => {
            stays_true(why, gradients.is_ok_and(|gradients| !gradients.is_empty()))?;
            None
        }
    };
    let variables = run.variables().iter().map(|(name, v)| (name.clone(), v.elem_count())).collect();
    Ok(Ran { output, gradients, variables })
}

fn backward(run: &Run, output: &Tensor) -> candle_core::Result<Gradients> {
    // Weights in the loss, so that no norm's gradient vanishes by symmetry.
    let n = output.elem_count();
    let dy = (Tensor::arange(0f32, n as f32, output.device())? * 0.73)?.cos()?.reshape(output.shape())?;
    let store = (output * dy.to_dtype(output.dtype())?)?.sum_all()?.backward()?;
    // Running statistics are no parameters. candle-nn's absorb_bn lets gradients through to them, ours does not.
    let parameters = run.variables().into_iter().filter(|(name, _)| !name.contains(".running_"));
    let gradients = parameters.filter_map(|(name, v)| Some((name, store.get(&v)?.clone())));
    Ok(gradients.collect())
}

fn gradients(
    ours: &Gradients,
    theirs: &Gradients,
    doubles: Option<(&Gradients, &Gradients)>,
) -> Result<Distance> {
    ensure!(ours.keys().eq(theirs.keys()), "other variables have a gradient: {}", difference(ours, theirs));
    let mut largest = 0f64;
    for g in theirs.values() {
        largest = largest.max(norm(g)?);
    }
    let mut distance = Distance { judged: doubles.map(|_| Judged::default()), ..Default::default() };
    for (name, b) in theirs {
        let a = &ours[name];
        let floor = VANISHING * largest;
        let between = apart(a, b, floor)?;
        worsen(&mut distance.apart, between);
        let mut variable = Variable {
            name: name.clone(),
            lengths: [norm(a)? / largest, norm(b)? / largest, f64::NAN],
            apart: between,
            ours: f64::NAN,
            theirs: f64::NAN,
        };
        if let (Some((c, d)), Some(judged)) = (doubles, &mut distance.judged) {
            let (Some(c), Some(d)) = (c.get(name), d.get(name)) else { bail!("{name}: no gradient in f64") };
            variable.lengths[2] = norm(d)? / largest;
            (variable.ours, variable.theirs) = (apart(a, d, floor)?, apart(b, d, floor)?);
            worsen(&mut judged.ours, variable.ours);
            worsen(&mut judged.theirs, variable.theirs);
            worsen(&mut judged.apart, apart(c, d, floor)?);
        }
        distance.variables.push(variable);
    }
    Ok(distance)
}

/// NaN is the worst.
fn worsen(worst: &mut f64, new: f64) {
    if !(new <= *worst) {
        *worst = new;
    }
}

fn difference(a: &Gradients, b: &Gradients) -> String {
    let only = |x: &Gradients, y: &Gradients| {
        x.keys().filter(|name| !y.contains_key(*name)).cloned().collect::<Vec<_>>().join(", ")
    };
    format!("only ours [{}], only candle-nn's [{}]", only(a, b), only(b, a))
}

/// |a - b| / (|b| + floor), in f64.
fn apart(a: &Tensor, b: &Tensor, floor: f64) -> Result<f64> {
    ensure!(a.shape() == b.shape(), "{:?} and {:?}", a.shape(), b.shape());
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let difference = norm(&(&a - &b)?)?;
    Ok(if difference == 0.0 { 0.0 } else { difference / (norm(&b)? + floor) })
}

fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()?.to_scalar()?)
}
