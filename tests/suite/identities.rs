//! Norms that are equal by definition, computed by different functions.

use crate::case::{Argument, Case, Layout, Norm, Outcome};
use crate::common::values;
use crate::compare;
use crate::oracle::{self, Approx};
use candle_core::{DType, Result};

/// Two evaluations of the same thing differ by twice the bound for one.
fn same(case: &Case, other: &Case) -> Result<()> {
    let args = case.random();
    let (got, reference) = (case.run(&args)?, other.run(&args)?);
    let mut expected = oracle::evaluate(case, &got.rounded);
    let put = |expected: &mut [Approx], t: &candle_core::Tensor| {
        expected.iter_mut().zip(values(t)).for_each(|(e, value)| e.value = value);
    };
    put(&mut expected.y, &reference.y);
    let Outcome { dx, dweight, dbias, .. } = reference;
    put(&mut expected.dx, &dx.expect("dx"));
    [(dweight, &mut expected.dweight), (dbias, &mut expected.dbias)].into_iter().for_each(|(t, of)| {
        if let Some(t) = t {
            put(of, &t);
        }
    });
    compare::all(case, &got, expected, 2.0).unwrap_or_else(|e| panic!("{e}\n{case:?}\n{other:?}"));
    Ok(())
}

fn shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    for dims in [vec![2, 6, 3, 5], vec![3, 4, 17], vec![5, 16, 2, 2, 3]] {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            for last in [false, true] {
                let order = [0].into_iter().chain(2..dims.len()).chain([1]).collect();
                let order = if last { order } else { vec![] };
                let layout = Layout { order, ..Layout::default() };
                let plain = Case::new(Norm::Group { groups: 1 }, &dims);
                cases.push(Case { dtype, layout, weight: false, bias: false, ..plain });
            }
        }
    }
    cases
}

#[test]
fn group_norm_of_one_group_is_layer_norm_of_the_sample() -> Result<()> {
    for case in shapes() {
        let layer = Case { norm: Norm::Layer { normalized: case.dims.len() - 1 }, ..case.clone() };
        same(&case, &layer)?;
    }
    Ok(())
}

#[test]
fn group_norm_of_a_group_per_channel_is_instance_norm() -> Result<()> {
    for case in shapes() {
        let group = Case { norm: Norm::Group { groups: case.dims[1] }, weight: true, bias: true, ..case };
        let instance = Case { norm: Norm::Instance { use_input_stats: true }, ..group.clone() };
        same(&group, &instance)?;
    }
    Ok(())
}

#[test]
fn batch_norm_of_one_sample_is_instance_norm() -> Result<()> {
    for mut case in shapes() {
        case.dims[0] = 1;
        let batch = Case { norm: Norm::Batch { training: true }, weight: true, bias: true, ..case };
        let batch = Case { running: Some(DType::F32), ..batch };
        let instance = Case { norm: Norm::Instance { use_input_stats: true }, ..batch.clone() };
        same(&batch, &instance)?;
    }
    Ok(())
}

/// A channels-last view, its contiguous copy and a cut-out one hold the same numbers.
#[test]
fn the_layout_of_the_input_changes_no_value() -> Result<()> {
    for case in crate::autograd::each() {
        let contiguous = Case { layout: Layout::default(), ..case.clone() };
        for order in [vec![0, 2, 3, 1], vec![3, 1, 0, 2]] {
            let layout = Layout { order, narrow: Some((2, 1, 1)), broadcast: None };
            same(&Case { layout, ..case.clone() }, &contiguous)?;
        }
    }
    Ok(())
}

/// A permuted dense input keeps its memory order; any other strided input gives a contiguous output.
#[test]
fn the_output_has_the_documented_layout() -> Result<()> {
    for case in crate::autograd::each() {
        let args = case.random();
        let output = |layout: Layout| -> Result<(Argument, candle_core::Tensor)> {
            let case = Case { layout, ..case.clone() };
            let built = case.build(&args)?;
            let y = case.forward(&built)?;
            Ok((built.x, y))
        };
        let channels_last = Layout { order: vec![0, 2, 3, 1], ..Layout::default() };
        let (x, y) = output(channels_last)?;
        let kept = match case.norm {
            Norm::Layer { normalized } | Norm::Rms { normalized } => normalized == 1,
            _ => true,
        };
        if kept {
            assert_eq!(y.stride(), x.view.stride(), "{case:?}");
        } else {
            assert!(y.is_contiguous() || y.stride() == x.view.stride(), "{case:?}");
        }
        let cut = Layout { narrow: Some((3, 1, 1)), ..Layout::default() };
        assert!(output(cut)?.1.is_contiguous(), "{case:?}");
    }
    Ok(())
}
