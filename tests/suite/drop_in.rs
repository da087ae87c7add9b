//! Source written for candle-nn's norms compiles against candle-norm's, and computes the same.
//!
//! One program is compiled twice, with nothing changed but the crate that its norms come from. Where
//! candle-nn loses gradients (its fused layer and RMS norm) its `_slow` functions are the reference.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

const CPU: &Device = &Device::Cpu;

macro_rules! program {
    ($name:ident, $norms:ident) => {
        mod $name {
            use candle_core::{Result, Tensor, D};
            use candle_nn::{func, func_t, seq, Conv2d, Func, FuncT, Sequential, VarBuilder};
            use $norms::layer_norm::{LayerNorm as Layer, RmsNorm as Rms};
            use $norms::{batch_norm, group_norm, layer_norm, layer_norm_no_bias, ops, rms_norm};
            use $norms::{BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, LayerNormConfig, RmsNorm};
            use $norms::{Module, ModuleT};

            /// Config structs as literals, by `Default`, and from an epsilon.
            pub fn configs() -> (BatchNormConfig, LayerNormConfig) {
                let batch = BatchNormConfig { eps: 1e-3, remove_mean: true, affine: true, momentum: 0.2 };
                let layer = LayerNormConfig { eps: 1e-6, remove_mean: false, affine: true };
                assert_ne!(batch, BatchNormConfig::default());
                assert_eq!(BatchNormConfig { momentum: 0.1, ..batch }, 1e-3.into());
                assert_eq!(LayerNormConfig { remove_mean: true, ..layer }, LayerNormConfig::from(1e-6));
                (batch, layer)
            }

            /// A residual block as candle-transformers' ResNet writes one: norms inside closures.
            pub fn block(c: usize, vb: VarBuilder) -> Result<FuncT<'static>> {
                let conv = candle_nn::conv2d_no_bias(c, c, 1, Default::default(), vb.pp("conv"))?;
                let bn1: BatchNorm = batch_norm(c, 1e-5, vb.pp("bn1"))?;
                let bn2 = $norms::batch_norm::batch_norm(c, configs().0, vb.pp("bn2"))?;
                Ok(func_t(move |xs, train| {
                    let ys = xs.apply(&conv)?.apply_t(&bn1, train)?.relu()?;
                    (bn2.forward_t(&ys, train)? + xs)?.relu()
                }))
            }

            /// Everything that has a forward of its own, one after another.
            pub fn head(n: usize, vb: VarBuilder) -> Result<Sequential> {
                let rms: RmsNorm = rms_norm(n, 1e-6, vb.pp("rms"))?;
                let inner: LayerNorm = rms_norm(n, 1e-6, vb.pp("inner"))?.into_inner();
                assert!(!inner.remove_mean() && inner.bias().is_none() && inner.eps() == 1e-6);
                let differentiable = Rms::new(vb.get(n, "scale")?, 1e-5);
                let group = $norms::group_norm::group_norm(2, 4, 1e-5, vb.pp("gn"))?;
                Ok(seq()
                    .add(layer_norm(n, 1e-5, vb.pp("ln"))?)
                    .add(layer_norm(n, configs().1, vb.pp("rms_with_bias"))?)
                    .add(layer_norm_no_bias(n, 1e-5, vb.pp("no_bias"))?)
                    .add(rms)
                    .add(inner)
                    .add_fn(move |xs| differentiable.forward_diff(xs))
                    .add(group))
            }

            pub fn from_tensors(w: &Tensor, b: &Tensor) -> Result<Func<'static>> {
                let n = w.dim(0)?;
                let layer = Layer::new(w.clone(), b.clone(), 1e-5);
                let no_bias = Layer::new_no_bias(w.clone(), 1e-5);
                let rms = Layer::rms_norm(w.clone(), 1e-5);
                let group = GroupNorm::new(w.clone(), b.clone(), n, 2, 1e-5)?;
                assert_eq!(rms.weight().dims(), Rms::new(w.clone(), rms.eps()).weight().dims());
                Ok(func(move |xs| {
                    let ys = rms.forward(&layer.forward(xs)?.apply(&no_bias)?)?;
                    ys.transpose(1, D::Minus1)?.contiguous()?.apply(&group)
                }))
            }

            pub fn fused(xs: &Tensor, w: &Tensor, b: &Tensor) -> Result<[Tensor; 4]> {
                Ok([
                    ops::layer_norm(xs, w, b, 1e-5)?,
                    ops::layer_norm_slow(xs, w, b, 1e-5)?,
                    ops::rms_norm(xs, w, 1e-5)?,
                    ops::rms_norm_slow(xs, w, 1e-5)?,
                ])
            }

            /// The rest of `ops` comes along with the norms.
            pub fn attention(xs: &Tensor, w: &Tensor) -> Result<Tensor> {
                ops::softmax_last_dim(&ops::rms_norm(xs, w, 1e-6)?)
            }

            /// Each constructor of a batch norm from tensors, in training and then in evaluation.
            pub fn batch_norms(x: &Tensor, [m, v, w, b]: [&Tensor; 4]) -> Result<Vec<Tensor>> {
                let c = m.dim(0)?;
                let [m, v, w, b] = [m, v, w, b].map(|t| t.copy().expect("a copy"));
                let norms = [
                    BatchNorm::new(c, m.copy()?, v.copy()?, w.clone(), b.clone(), 1e-3)?,
                    BatchNorm::new_no_bias(c, m.copy()?, v.copy()?, 1e-3)?,
                    BatchNorm::new_with_momentum(c, m.copy()?, v.copy()?, w, b, 1e-3, 0.5)?,
                    BatchNorm::new_no_bias_with_momentum(c, m, v, 1e-3, 0.5)?,
                ];
                let mut seen = vec![];
                for bn in norms {
                    assert!(bn.eps() == 1e-3 && (bn.momentum() == 0.1 || bn.momentum() == 0.5));
                    seen.push(bn.forward_train(x)?);
                    seen.push(bn.forward_t(x, false)?);
                    seen.extend([bn.running_mean().copy()?, bn.running_var().copy()?]);
                    seen.extend(bn.weight_and_bias().map(|(w, _)| w.clone()));
                }
                Ok(seen)
            }

            /// Without mean removal: the running mean stays, and evaluation subtracts it.
            pub fn uncentered(x: &Tensor, vb: VarBuilder) -> Result<Vec<Tensor>> {
                let config = BatchNormConfig { remove_mean: false, ..Default::default() };
                let bn = batch_norm(x.dim(1)?, config, vb)?;
                let (train, eval) = (bn.forward_t(x, true)?, bn.forward_t(x, false)?);
                Ok(vec![train, eval, bn.running_mean().copy()?, bn.running_var().copy()?])
            }

            pub fn norm_fields(vb: VarBuilder) -> Result<Fields> {
                Ok(Fields {
                    batch: batch_norm(4, 1e-5, vb.pp("batch"))?,
                    group: group_norm(2, 4, 1e-5, vb.pp("group"))?,
                    layer: layer_norm(4, 1e-5, vb.pp("layer"))?,
                    rms: rms_norm(4, 1e-5, vb.pp("rms"))?,
                    conv: None,
                })
            }

            /// Vision transformers normalize a transposed view and multiply it by a matrix. The output
            /// must be contiguous for that: candle's matmul of a permuted batch is wrong.
            pub fn tokens(image: &Tensor, w: &Tensor, b: &Tensor) -> Result<[Tensor; 4]> {
                let x = image.flatten_from(2)?.transpose(1, 2)?;
                let linear = candle_nn::Linear::new(Tensor::cat(&[w, b], 0)?.reshape((2, ()))?, None);
                let normed = [
                    x.apply(&LayerNorm::new(w.clone(), b.clone(), 1e-5))?,
                    x.apply(&LayerNorm::new_no_bias(w.clone(), 1e-5))?,
                    ops::layer_norm_slow(&x, w, b, 1e-5)?,
                    ops::rms_norm_slow(&x, w, 1e-5)?,
                ];
                let [y0, y1, y2, y3] = normed.map(|y| y.apply(&linear));
                Ok([y0?, y1?, y2?, y3?])
            }

            /// Types in the places a model has them, derives included.
            #[derive(Debug, Clone)]
            pub struct Fields {
                pub batch: BatchNorm,
                pub group: GroupNorm,
                pub layer: LayerNorm,
                pub rms: RmsNorm,
                pub conv: Option<Conv2d>,
            }
        }
    };
}

program!(theirs, candle_nn);
program!(ours, candle_norm);

fn noise(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, CPU)
}

/// Two f32 computations of the same formula differ by a few roundings of the largest value.
fn assert_same(ours: &Tensor, theirs: &Tensor, what: &str) -> Result<()> {
    assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), theirs.dtype()), "{what}");
    let largest = theirs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let difference = (ours - theirs)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(difference <= 32.0 * f32::EPSILON * largest.max(1.0), "{what}: {difference} of {largest}");
    Ok(())
}

/// Two maps with the same values, for the two programs.
fn twins(fill: impl Fn(VarBuilder) -> Result<()>) -> Result<[(VarMap, VarBuilder<'static>); 2]> {
    let made = [(); 2].map(|_| {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, CPU);
        (vars, vb)
    });
    for (vars, vb) in &made {
        fill(vb.clone())?;
        let data = vars.data().lock().unwrap();
        let mut names: Vec<_> = data.keys().collect();
        names.sort();
        for (seed, name) in names.into_iter().enumerate() {
            let value = noise(data[name].dims(), seed as u64)?;
            // Positive, since one of them is a variance.
            data[name].set(&(value.abs()? + 0.5)?)?;
        }
    }
    Ok(made)
}

fn assert_same_vars(ours: &VarMap, theirs: &VarMap) -> Result<()> {
    let (ours, theirs) = (ours.data().lock().unwrap(), theirs.data().lock().unwrap());
    assert_eq!(ours.len(), theirs.len());
    theirs.iter().try_for_each(|(name, var)| assert_same(&ours[name], var, name))
}

#[test]
fn a_block_of_batch_norms() -> Result<()> {
    let x = noise(&[4, 6, 5, 5], 1)?;
    let [(our_vars, our_vb), (their_vars, their_vb)] = twins(|vb| theirs::block(6, vb).map(drop))?;
    let (ours, theirs) = (ours::block(6, our_vb)?, theirs::block(6, their_vb)?);
    for (step, train) in [true, true, false].into_iter().enumerate() {
        let (y, expected) = (x.apply_t(&ours, train)?, x.apply_t(&theirs, train)?);
        assert_same(&y, &expected, "output")?;
        assert_same_vars(&our_vars, &their_vars)?;
        let (g, h) = (y.sqr()?.mean_all()?.backward()?, expected.sqr()?.mean_all()?.backward()?);
        let (a, b) = (our_vars.data().lock().unwrap(), their_vars.data().lock().unwrap());
        for (name, var) in b.iter().filter(|(name, _)| !name.contains("running")) {
            let (got, expected) = (g.get(&a[name]), h.get(var));
            assert_same(got.expect("ours"), expected.expect("theirs"), &format!("{name}, step {step}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_sequence_of_all_norms() -> Result<()> {
    let x = noise(&[3, 4, 8], 2)?;
    let [(_, our_vb), (_, their_vb)] = twins(|vb| theirs::head(8, vb).map(drop))?;
    assert_same(&x.apply(&ours::head(8, our_vb)?)?, &x.apply(&theirs::head(8, their_vb)?)?, "head")
}

#[test]
fn layers_made_of_tensors() -> Result<()> {
    let (x, w, b) = (noise(&[3, 4, 8], 3)?, noise(&[8], 4)?, noise(&[8], 5)?);
    let (y, expected) = (ours::from_tensors(&w, &b)?, theirs::from_tensors(&w, &b)?);
    assert_same(&x.apply(&y)?, &x.apply(&expected)?, "from tensors")
}

#[test]
fn a_transposed_view_before_a_linear() -> Result<()> {
    let (image, w, b) = (noise(&[2, 8, 3, 5], 3)?, noise(&[8], 4)?, noise(&[8], 5)?);
    let (ours, theirs) = (ours::tokens(&image, &w, &b)?, theirs::tokens(&image, &w, &b)?);
    ours.iter().zip(&theirs).try_for_each(|(y, expected)| assert_same(y, expected, "tokens"))
}

#[test]
fn the_ops() -> Result<()> {
    let (x, w, b) = (noise(&[3, 4, 8], 6)?, noise(&[8], 7)?, noise(&[8], 8)?);
    for (y, expected) in ours::fused(&x, &w, &b)?.iter().zip(&theirs::fused(&x, &w, &b)?) {
        assert_same(y, expected, "ops")?;
    }
    assert_same(&ours::attention(&x, &w)?, &theirs::attention(&x, &w)?, "attention")?;
    assert!(ours::fused(&x, &w.narrow(0, 0, 4)?, &b).is_err(), "a weight of another length");
    Ok(())
}

#[test]
fn the_ops_have_the_gradients_of_the_slow_ones() -> Result<()> {
    let [x, w, b] =
        [&[3, 4, 8][..], &[8], &[8]].map(|shape| noise(shape, 9).and_then(|t| Var::from_tensor(&t)));
    let (x, w, b) = (x?, w?, b?);
    let dy = noise(&[3, 4, 8], 10)?;
    let gradients = |y: Tensor| (y * &dy)?.sum_all()?.backward();
    let layer = [
        gradients(candle_norm::ops::layer_norm(&x, &w, &b, 1e-5)?)?,
        gradients(candle_nn::ops::layer_norm_slow(&x, &w, &b, 1e-5)?)?,
    ];
    let rms = [
        gradients(candle_norm::ops::rms_norm(&x, &w, 1e-5)?)?,
        gradients(candle_nn::ops::rms_norm_slow(&x, &w, 1e-5)?)?,
    ];
    for (what, [ours, theirs], of) in [("layer", layer, vec![&x, &w, &b]), ("rms", rms, vec![&x, &w])] {
        for var in of {
            assert_same(ours.get(var).expect("ours"), theirs.get(var).expect("theirs"), what)?;
        }
    }
    // What the drop-in is for: the reference loses these.
    let lost = gradients(candle_nn::ops::layer_norm(&x, &w, &b, 1e-5)?)?;
    assert!(lost.get(&w).is_none());
    Ok(())
}

#[test]
fn batch_norms_made_of_tensors() -> Result<()> {
    let x = noise(&[4, 3, 5], 11)?;
    let (m, v) = (noise(&[3], 12)?, (noise(&[3], 13)?.abs()? + 0.5)?);
    let (w, b) = (noise(&[3], 14)?, noise(&[3], 15)?);
    let all = [&m, &v, &w, &b];
    let (ours, theirs) = (ours::batch_norms(&x, all)?, theirs::batch_norms(&x, all)?);
    assert_eq!(ours.len(), theirs.len());
    for (i, (y, expected)) in ours.iter().zip(&theirs).enumerate() {
        assert_same(y, expected, &format!("batch norm, result {i}"))?;
    }
    Ok(())
}

#[test]
fn batch_norm_that_keeps_the_mean() -> Result<()> {
    let x = (noise(&[4, 3, 5, 2], 16)? + 3.0)?;
    let [(_, our_vb), (_, their_vb)] = twins(|vb| theirs::uncentered(&x, vb).map(drop))?;
    let (ours, theirs) = (ours::uncentered(&x, our_vb)?, theirs::uncentered(&x, their_vb)?);
    for (y, expected) in ours.iter().zip(&theirs) {
        assert_same(y, expected, "uncentered")?;
    }
    Ok(())
}

#[test]
fn norms_as_fields() -> Result<()> {
    let [(our_vars, our_vb), (their_vars, their_vb)] = twins(|vb| theirs::norm_fields(vb).map(drop))?;
    let (fields, expected) = (ours::norm_fields(our_vb)?, theirs::norm_fields(their_vb)?);
    assert!(fields.conv.is_none() && expected.conv.is_none());
    assert_same(fields.layer.weight(), expected.layer.weight(), "weight")?;
    assert_eq!(fields.rms.eps(), expected.rms.eps());
    assert_same(fields.batch.clone().running_var(), expected.batch.running_var(), "running_var")?;
    let x = noise(&[2, 4, 3], 17)?;
    assert_same(&x.apply(&fields.group)?, &x.apply(&expected.group)?, "group")?;
    assert_same_vars(&our_vars, &their_vars)
}
