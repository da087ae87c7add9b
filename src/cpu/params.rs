//! Weight and bias in the accumulation type, in the form in which the kernels walk them.

use super::element::{converted, Float};
use super::tile::Walk;
use crate::geometry::{Affine, Geometry};
use crate::request::Arg;
use candle_core::{CpuStorage, Result};
use std::borrow::Cow;

/// Which entry of weight and bias scales an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The one of its span: a constant over `span` columns.
    Spans(usize),
    /// The one of its column, of a run of several; there always is a weight.
    Columns,
    /// The one of its row.
    Rows,
}

impl Form {
    pub fn of(g: &Geometry) -> Form {
        match g.affine {
            Affine::Row => Form::Rows,
            Affine::Column { span: 1 } if Walk::of(g) == Walk::Runs && g.run > 1 => Form::Columns,
            Affine::Column { span } => Form::Spans(span),
        }
    }
}

/// Weight and bias; 1 and 0 where there is none.
pub(super) struct Params<'a, A: Clone> {
    pub form: Form,
    pub weight: Option<Cow<'a, [A]>>,
    pub bias: Option<Cow<'a, [A]>>,
}

impl<'a, A: Float> Params<'a, A> {
    /// `any`: the op has a weight, a bias, or somebody wants the gradient of one.
    pub fn new(
        g: &Geometry,
        weight: &Option<Arg<'a, CpuStorage>>,
        bias: &Option<Arg<'a, CpuStorage>>,
        any: bool,
    ) -> Result<Self> {
        let form = match Form::of(g) {
            // Nothing to stream: a constant over the whole run.
            Form::Columns if !any => Form::Spans(g.run),
            form => form,
        };
        let convert = |arg: &Option<Arg<'a, CpuStorage>>| {
            arg.as_ref().map(|arg| converted(arg, g.params())).transpose()
        };
        let (mut weight, bias) = (convert(weight)?, convert(bias)?);
        if form == Form::Columns && weight.is_none() {
            weight = Some(Cow::Owned(vec![A::ONE; g.width]));
        }
        Ok(Self { form, weight, bias })
    }

    #[inline(always)]
    pub fn weight(&self, i: usize) -> A {
        self.weight.as_ref().map_or(A::ONE, |w| w[i])
    }

    #[inline(always)]
    pub fn bias(&self, i: usize) -> A {
        self.bias.as_ref().map_or(A::ZERO, |b| b[i])
    }
}
