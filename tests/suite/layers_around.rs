//! Layers with what stands around them in a model: they do what the functions do, in every dtype.
//!
//! The functions themselves are held against an oracle in `fused.rs`; here it is bits against a function, or,
//! where a layer composes what no function has, the same composition in f64.

use crate::common::{accumulation, added, bits, data, relative_l2, tensor, unit_roundoff, values, DTYPES};
use candle_core::{DType, Result, Tensor, Var, D};
use candle_nn::{Activation, Module, ModuleT};
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::functional as f;
use candle_norm::functional::fused::{self, AddNorm};
use candle_norm::{layer_norm2d, BatchNorm, BatchNormOptions, FoldBatchNorm, GroupNorm, GroupNormOptions};
use candle_norm::{InstanceNorm, InstanceNormOptions, LayerNorm, LayerNormOptions, RmsNorm, RmsNormOptions};
use std::sync::Arc;

/// One that is fused, one with a number, and one that is candle's operation behind the norm.
const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::LeakyRelu(0.1), Activation::Elu(1.0)];
const EPS: f64 = 1e-3;

fn new(seed: u64, dims: &[usize], dtype: DType) -> Result<Tensor> {
    tensor(&data(seed, dims.iter().product(), 0.5, 1.0), dims, dtype)
}

fn same(y: Result<Tensor>, expected: Result<Tensor>) -> Result<()> {
    let (y, expected) = (y?, expected?);
    assert!(y.is_contiguous());
    assert_eq!((y.dims(), y.dtype(), bits(&y)), (expected.dims(), expected.dtype(), bits(&expected)));
    Ok(())
}

/// One rounding to the dtype of the result, and some of the accumulation.
fn close(y: &Tensor, exact: &Tensor) {
    let dtype = y.dtype();
    let bound = 1.01 * unit_roundoff(dtype) + 40.0 * unit_roundoff(accumulation(dtype));
    let off = relative_l2(&values(y), &values(exact));
    assert!(off <= bound, "{dtype:?}: off by {off:e}, bound {bound:e}");
}

/// Every activation with and without a skip.
fn each(mut run: impl FnMut(Activation, Option<&Tensor>, &Tensor) -> Result<()>) -> Result<()> {
    for dtype in DTYPES {
        let (x, skip) = (new(1, &[2, 4, 6], dtype)?, new(2, &[2, 4, 6], dtype)?);
        for act in ACTIVATIONS {
            run(act, None, &x)?;
            run(act, Some(&skip), &x)?;
            let permuted = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
            run(act, Some(&skip), &permuted)?;
        }
    }
    Ok(())
}

#[test]
fn forward_act_is_the_function() -> Result<()> {
    let (w, b) = (new(3, &[4], DType::F32)?, new(4, &[4], DType::F32)?);
    let (lw, lb) = (new(3, &[6], DType::F32)?, new(4, &[6], DType::F32)?);
    let (mean, var) = (new(5, &[4], DType::F32)?, new(6, &[4], DType::F32)?.abs()?);
    each(|act, skip, x| {
        let (w, b, lw, lb) = (Some(&w), Some(&b), Some(&lw), Some(&lb));
        let options = LayerNormOptions::default().eps(EPS).activation(act);
        let layer = LayerNorm::from_tensors(6, lw.cloned(), lb.cloned(), options)?;
        let y = |skip| fused::layer_norm_act(x, &[6], lw, lb, EPS, skip, act);
        same(layer.forward_act(x, skip, act), y(skip))?;
        same(layer.forward(x), y(None))?;
        same(
            LayerNorm::new(new(3, &[6], DType::F32)?, new(4, &[6], DType::F32)?, EPS)
                .forward_act(x, skip, act),
            y(skip),
        )?;

        let options = GroupNormOptions::default().eps(EPS).activation(act);
        let layer = GroupNorm::from_tensors(2, 4, w.cloned(), b.cloned(), options)?;
        let y = |skip| fused::group_norm_act(x, 2, w, b, EPS, skip, act);
        same(layer.forward_act(x, skip, act), y(skip))?;
        same(layer.forward(x), y(None))?;

        for train in [true, false] {
            let running = || -> Result<_> { Ok((Var::from_tensor(&mean)?, Var::from_tensor(&var)?)) };
            let given = Some((mean.clone(), var.clone()));
            let options = BatchNormOptions::default().eps(EPS).activation(act);
            let layer = || BatchNorm::from_tensors(4, given.clone(), w.cloned(), b.cloned(), options);
            let y = |skip| {
                let (m, v) = running()?;
                fused::batch_norm_act(x, Some(&m), Some(&v), w, b, train, 0.1, EPS, skip, act)
            };
            same(layer()?.forward_act(x, skip, act, train), y(skip))?;
            same(layer()?.forward_t(x, train), y(None))?;

            let options = InstanceNormOptions::default().eps(EPS).activation(act);
            let layer = || InstanceNorm::from_tensors(4, given.clone(), w.cloned(), b.cloned(), options);
            let y = |skip| {
                let (m, v) = running()?;
                fused::instance_norm_act(x, Some(&m), Some(&v), w, b, train, 0.1, EPS, skip, act)
            };
            same(layer()?.forward_act_t(x, skip, act, train), y(skip))?;
            same(layer()?.forward_t(x, train), y(None))?;
        }
        Ok(())
    })
}

/// What no function has: parameters that broadcast, RMS norm with an activation, a batch norm that keeps its mean.
#[test]
fn forward_act_composed() -> Result<()> {
    each(|act, skip, x| {
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let exact = wide(x)?;
        let act64 = |z: Tensor| match skip {
            Some(skip) => act.forward(&(z + wide(skip)?)?),
            None => act.forward(&z),
        };
        // Elu runs on the output rounded to its dtype, whose rounding goes through it with a slope of up to 1.
        let check = |y: Tensor, exact: Tensor| match act {
            Activation::Elu(_) => {
                let off = relative_l2(&values(&y), &values(&exact));
                assert!(
                    off <= 3.0 * unit_roundoff(y.dtype()) + 40.0 * unit_roundoff(accumulation(y.dtype())),
                    "{off:e}"
                );
            }
            _ => close(&y, &exact),
        };
        let w = new(3, &[4, 1], DType::F32)?;
        let mean_square = exact.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = exact.broadcast_div(&(mean_square + EPS)?.sqrt()?)?;
        check(
            LayerNorm::rms_norm(w.clone(), EPS).forward_act(x, skip, act)?,
            act64(rms.broadcast_mul(&wide(&w)?)?)?,
        );
        let config =
            candle_norm::BatchNormConfig { eps: EPS, remove_mean: false, affine: false, momentum: 0.1 };
        let vars = candle_nn::VarMap::new();
        let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, x.device());
        let bn = candle_norm::batch_norm(4, config, vb)?;
        let mean_square = exact.sqr()?.mean_keepdim((0, 2))?;
        check(
            bn.forward_act(x, skip, act, true)?,
            act64(exact.broadcast_div(&(mean_square + EPS)?.sqrt()?)?)?,
        );
        Ok(())
    })
}

#[test]
fn forward_add_is_an_addition_and_the_forward() -> Result<()> {
    for dtype in DTYPES {
        for stream in DTYPES {
            let (x, residual) = (new(1, &[2, 4, 6], dtype)?, new(2, &[2, 4, 6], stream)?);
            let added = added(&x, &residual, stream)?;
            for weight in [vec![6], vec![1, 6], vec![4, 1], vec![2, 4, 6]] {
                let w = new(3, &weight, DType::F32)?;
                for norm in [
                    LayerNorm::new_no_bias(w.clone(), EPS),
                    LayerNorm::new(w.clone(), new(4, &[6], DType::F32)?, EPS),
                    LayerNorm::rms_norm(w.clone(), EPS),
                ] {
                    let AddNorm { normed, sum } = norm.forward_add(&x, &residual)?;
                    assert_eq!((normed.dtype(), sum.dtype()), (dtype, stream));
                    assert_eq!(bits(&sum), bits(&added), "{dtype:?} {stream:?}");
                    close(&normed, &norm.forward(&sum.to_dtype(DType::F64)?)?);
                    if dtype == stream {
                        same(Ok(normed), norm.forward(&added))?;
                    }
                }
            }
            let options = RmsNormOptions::default().eps(EPS).weight_offset(1.0);
            let norm = RmsNorm::from_tensors(6, Some(new(3, &[6], dtype)?), options)?;
            let AddNorm { normed, sum } = norm.forward_add(&x, &residual)?;
            close(&normed, &norm.forward(&sum.to_dtype(DType::F64)?)?);
        }
    }
    Ok(())
}

/// Scale and shift of every shape, with a weight and a bias of the layer or without, gradients included.
#[test]
fn forward_modulated_multiplies_parameters_in() -> Result<()> {
    let leads: [&[usize]; 4] = [&[2], &[2, 1], &[2, 3], &[1]];
    for dtype in DTYPES {
        for (scale_lead, shift_lead) in leads.into_iter().flat_map(|a| leads.map(|b| (a, b))) {
            for (weight, bias) in [(false, false), (true, false), (false, true), (true, true)] {
                let var = |seed, dims: &[usize]| new(seed, dims, dtype).and_then(|t| Var::from_tensor(&t));
                let x = var(1, &[2, 3, 6])?;
                let of = |lead: &[usize]| [lead, &[6]].concat();
                let (scale, shift) = (var(2, &of(scale_lead))?, var(3, &of(shift_lead))?);
                let (w, b) = (var(4, &[6])?, var(5, &[6])?);
                let some = |used: bool, t: &Var| used.then(|| t.as_tensor().clone());
                let norm = LayerNorm::from_tensors(6, some(weight, &w), some(bias, &b), EPS)?;
                let y = norm.forward_modulated(&x, &scale, Some(&shift))?;
                let all = [&x, &scale, &shift, &w, &b];
                let exact: Vec<Var> = all
                    .iter()
                    .map(|v| Var::from_tensor(&v.as_detached_tensor().to_dtype(DType::F64)?))
                    .collect::<Result<_>>()?;
                let norm = LayerNorm::from_tensors(6, some(weight, &exact[3]), some(bias, &exact[4]), EPS)?;
                let full = |t: &Var| {
                    let lead = &t.dims()[..t.rank() - 1];
                    t.reshape([lead, &vec![1; 3 - t.rank()], &[6]].concat())
                };
                let factor = (full(&exact[1])? + 1.0)?;
                let y64 =
                    norm.forward(&exact[0])?.broadcast_mul(&factor)?.broadcast_add(&full(&exact[2])?)?;
                close(&y, &y64);
                let dy = new(7, &[2, 3, 6], dtype)?;
                let got = (&y * &dy)?.sum_all()?.backward()?;
                let expected = (&y64 * &dy.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
                for (i, (v, e)) in all.iter().zip(&exact).enumerate() {
                    let (Some(got), Some(expected)) = (got.get(v), expected.get(e)) else {
                        assert!(i >= 3 && expected.get(e).is_none() && got.get(v).is_none(), "{i}");
                        continue;
                    };
                    // A gradient is rounded at each node: the kernel's, and those of the multiplications before.
                    let off = relative_l2(&values(got), &values(expected));
                    let u = 3.0 * unit_roundoff(dtype) + 60.0 * unit_roundoff(accumulation(dtype));
                    assert!(off <= u, "{i}: {off:e} beside {u:e}, {dtype:?} {weight} {bias}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn channels_without_a_copy() -> Result<()> {
    let vars = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, crate::common::device());
    let norm = layer_norm2d(4, EPS, vb)?;
    assert_eq!(norm.to_string(), "LayerNorm2d(4, eps=0.001)");
    for dtype in DTYPES {
        let x = new(1, &[2, 4, 3, 5], dtype)?;
        let expected =
            f::layer_norm(&x.permute((0, 2, 3, 1))?, &[4], Some(norm.weight()), Some(norm.bias()), EPS)?;
        same(norm.forward(&x), expected.permute((0, 3, 1, 2)))?;
    }
    assert!(norm.forward(&new(1, &[2, 3, 4, 4], DType::F32)?).is_err());
    Ok(())
}

/// A weight that is created begins where the norm multiplies by 1.
#[test]
fn an_offset_moves_the_weight() -> Result<()> {
    let vars = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, crate::common::device());
    let norm = RmsNorm::with_options(6, RmsNormOptions::default().eps(EPS).weight_offset(1.0), vb)?;
    assert_eq!(values(norm.weight()), [0.0; 6]);
    let x = new(1, &[3, 6], DType::BF16)?;
    same(norm.forward(&x), fused::offset_rms_norm(&x, &[6], norm.weight(), 1.0, EPS))?;
    same(norm.forward(&x), f::rms_norm(&x, &[6], None, EPS))?;
    norm.reset_parameters()?;
    assert_eq!(values(norm.weight()), [0.0; 6]);
    assert!(RmsNorm::from_tensors(6, None, RmsNormOptions::default().weight_offset(f64::NAN)).is_err());
    Ok(())
}

/// The statistics of two ranks with an activation behind; a skip that is wrong on one rank fails on both.
#[test]
fn synchronized() -> Result<()> {
    let options = BatchNormOptions::default().eps(EPS);
    let (w, b) = (new(3, &[4], DType::F32)?, new(4, &[4], DType::F32)?);
    let bn =
        || BatchNorm::from_tensors(4, Some((b.clone(), b.abs()?)), Some(w.clone()), Some(b.clone()), options);
    for dtype in [DType::F32, DType::BF16] {
        let (x, skip) = (new(1, &[4, 4, 3], dtype)?, new(2, &[4, 4, 3], dtype)?);
        let alone = bn()?.forward_act(&x, Some(&skip), Activation::Silu, true)?;
        let run = |group: Arc<LocalGroup>, wrong: bool| -> Result<Tensor> {
            let mut norm = bn()?;
            let rank = group.rank();
            // On a GPU every thread has its own stream: what goes from one to another must be there.
            let there = |t: Tensor| t.device().synchronize().map(|()| t);
            norm.synchronize("bn", group)?;
            let part = |t: &Tensor| t.narrow(0, 2 * rank, 2);
            let skip = if wrong && rank == 1 { part(&skip)?.narrow(2, 0, 1)? } else { part(&skip)? };
            let y = norm.forward_act(&part(&x)?, Some(&skip), Activation::Silu, true);
            if wrong {
                assert!(y.is_err(), "rank {rank}");
                assert_eq!(values(norm.running_mean()), values(&b));
                return there(part(&x)?);
            }
            there(y?)
        };
        x.device().synchronize()?;
        for wrong in [false, true] {
            let parts = LocalGroup::run(2, |group| run(group, wrong))?;
            if !wrong {
                let y = Tensor::cat(&parts, 0)?;
                let off = relative_l2(&values(&y), &values(&alone));
                assert!(off <= 2.0 * unit_roundoff(dtype) + 1e-6, "{off:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_would_lose_an_activation_is_an_error() -> Result<()> {
    let options = BatchNormOptions::default().activation(Activation::Relu);
    let running = Some((new(1, &[4], DType::F32)?, new(2, &[4], DType::F32)?.abs()?));
    let bn = BatchNorm::from_tensors(4, running, None, None, options)?;
    assert!(bn.to_string().ends_with(", activation=Relu)"), "{bn}");
    let linear = candle_nn::Linear::new(new(3, &[4, 2], DType::F32)?, None);
    let message = linear.fold_batch_norm(&bn).expect_err("an activation").to_string();
    assert!(message.contains("expected a batch norm without an activation"), "{message}");
    assert!(candle_nn::BatchNorm::try_from(&bn).is_err());
    let norm =
        LayerNorm::from_tensors(6, None, None, LayerNormOptions::default().activation(Activation::Relu))?;
    let x = new(1, &[2, 6], DType::F32)?;
    assert!(norm.forward_modulated(&x, &x, None).is_err());
    same(Ok(norm.forward_add(&x, &x)?.normed), norm.forward(&(&x + &x)?))
}
