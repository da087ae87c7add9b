//! Weight and bias in the accumulation type, in the form in which walks take them.

use super::element::{converted, Float};
use super::loops::{Loops, Walked};
use super::tile::by_columns;
use crate::geometry::{self, Geometry};
use crate::request::{Arg, Norm};
use candle_core::{CpuStorage, Result};
use std::borrow::Cow;
use std::ops::Range;

/// Which entry of weight and bias scales an element.
#[allow(clippy::enum_variant_names)] // a span, not spans
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The one of its span: a constant over `span` columns.
    PerSpan(usize),
    /// The one of its column, of a run of several.
    PerColumn,
    /// The one of its row.
    PerRow,
}

impl Form {
    /// `any`: the op has a weight, a bias, or somebody wants the gradient of one.
    pub fn of(g: &Geometry, any: bool) -> Form {
        match g.weight_by {
            geometry::WeightBy::Row => Form::PerRow,
            geometry::WeightBy::Column { span: 1 } if !by_columns(g) && g.run > 1 => match any {
                true => Form::PerColumn,
                // Nothing to stream: a constant over the whole run.
                false => Form::PerSpan(g.run),
            },
            geometry::WeightBy::Column { span } => Form::PerSpan(span),
        }
    }
}

/// Weight and bias of every span, column or row. There always is a weight.
pub(super) struct Affine<'a, A: Clone> {
    pub form: Form,
    pub weight: Cow<'a, [A]>,
    bias: Option<Cow<'a, [A]>>,
    /// The same in the order of pairs of vectors, if they are loaded so.
    parted: Option<Parted<'a, A>>,
    /// Blocks one behind the other that share them, where samples have their own.
    tokens: Option<usize>,
}

/// Weight and bias.
type Parted<'a, A> = (Cow<'a, [A]>, Option<Cow<'a, [A]>>);

/// Sets from which it is worth it to put weights in another order.
const MANY_SETS: usize = 16;

impl<'a, A: Float> Affine<'a, A> {
    pub fn new(
        norm: &Norm,
        weight: Option<Arg<'a, CpuStorage>>,
        bias: Option<Arg<'a, CpuStorage>>,
        any: bool,
    ) -> Result<Self> {
        let (g, tokens, offset) = (&norm.geometry, norm.fusion.tokens, A::from64(norm.fusion.weight_offset));
        let form = Form::of(g, any);
        let len = match form {
            Form::PerSpan(span) => g.width.checked_div(span).unwrap_or(0),
            _ => norm.params(),
        };
        let given = weight.is_some();
        let convert = |arg: Option<Arg<'a, CpuStorage>>| arg.map(|arg| converted(&arg, len)).transpose();
        let mut weight = convert(weight)?.unwrap_or_else(|| Cow::Owned(vec![A::ONE; len]));
        if norm.fusion.weight_offset != 0.0 && given {
            weight.to_mut().iter_mut().for_each(|w| *w += offset);
        }
        let mut bias = convert(bias)?;
        if form != Form::PerColumn && bias.is_none() {
            bias = Some(Cow::Owned(vec![A::ZERO; len]));
        }
        Ok(Self { form, weight, bias, parted: None, tokens })
    }

    /// In the order of pairs, too, for `loops` that write the elements of columns at once.
    pub fn part<T: Walked<Acc = A>>(&mut self, loops: &Loops<T>, g: &Geometry) {
        if self.form != Form::PerColumn || g.sets() < MANY_SETS {
            return;
        }
        let part = |x: &[A]| {
            let mut y = vec![];
            x.chunks(g.params().max(1)).for_each(|own| loops.part(own, &mut y));
            y
        };
        let weight = part(&self.weight);
        if !weight.is_empty() {
            let bias = self.bias.as_ref().map(|bias| Cow::Owned(part(bias)));
            self.parted = Some((Cow::Owned(weight), bias));
        }
    }

    /// Weight and bias of columns, and whether they are in the order of pairs.
    pub fn columns(&self) -> (&[A], Option<&[A]>, bool) {
        match &self.parted {
            Some((weight, bias)) => (weight, bias.as_deref(), true),
            None => (&self.weight, self.bias(), false),
        }
    }

    /// Those of the sample that row `row` belongs to.
    pub fn of_row<'s>(&'s self, row: usize, g: &Geometry) -> Affine<'s, A> {
        let own = match self.tokens {
            Some(tokens) => row / tokens * g.params()..(row / tokens + 1) * g.params(),
            None => 0..self.weight.len(),
        };
        let of = |all: &'s Cow<'a, [A]>| Cow::Borrowed(&all[own.clone()]);
        let parted = self.parted.as_ref().map(|(weight, bias)| (of(weight), bias.as_ref().map(of)));
        Affine {
            form: self.form,
            weight: of(&self.weight),
            bias: self.bias.as_ref().map(of),
            parted,
            tokens: None,
        }
    }

    /// `None` only where every column has its own.
    pub fn bias(&self) -> Option<&[A]> {
        self.bias.as_deref()
    }

    /// Weight and bias of spans.
    #[inline(always)]
    pub fn of_spans(&self, spans: Range<usize>) -> [&[A]; 2] {
        let bias = self.bias().unwrap_or(&[]);
        [&self.weight[spans.clone()], &bias[spans]]
    }

    /// Weight and bias of a span or row.
    #[inline(always)]
    pub fn at(&self, i: usize) -> [A; 2] {
        [self.weight[i], self.bias.as_ref().map_or(A::ZERO, |b| b[i])]
    }
}
