//! Layers made of tensors, without a `VarBuilder`, and layers that go where a plain `Module` is asked for.

use crate::common::{data, tensor, values};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Module, ModuleT};
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::functional as f;
use candle_norm::{batch_norms, convert_sync_batchnorm, revert_sync_batchnorm, SyncBatchNorm};
use candle_norm::{BatchNorm, BatchNormOptions, Eval, GroupNorm, InstanceNorm, InstanceNormOptions};
use candle_norm::{LayerNorm, RmsNorm};

fn new(seed: u64, dims: &[usize]) -> Result<Tensor> {
    tensor(&data(seed, dims.iter().product(), 1.0, 0.25), dims, DType::F32)
}

fn same(y: Result<Tensor>, expected: Result<Tensor>) -> Result<()> {
    assert_eq!(values(&y?), values(&expected?));
    Ok(())
}

/// The four ways to have a weight and a bias or not.
fn affine(dims: &[usize]) -> Result<[(Option<Tensor>, Option<Tensor>); 4]> {
    let (w, b) = (new(2, dims)?, new(3, dims)?);
    Ok([(None, None), (Some(w.clone()), None), (None, Some(b.clone())), (Some(w), Some(b))])
}

#[test]
fn each_layer_is_its_function() -> Result<()> {
    let x = new(1, &[2, 4, 6])?;
    for (w, b) in affine(&[4, 6])? {
        let norm = LayerNorm::from_tensors((4, 6), w.clone(), b.clone(), 1e-3)?;
        assert_eq!((norm.normalized_shape(), norm.elementwise_affine()), (&[4, 6][..], w.is_some()));
        same(norm.forward(&x), f::layer_norm(&x, &[4, 6], w.as_ref(), b.as_ref(), 1e-3))?;
        let norm = RmsNorm::from_tensors((4, 6), w.clone(), 1e-3)?;
        same(norm.forward(&x), f::rms_norm(&x, &[4, 6], w.as_ref(), 1e-3))?;
    }
    for (w, b) in affine(&[4])? {
        let norm = GroupNorm::from_tensors(2, 4, w.clone(), b.clone(), 1e-3)?;
        same(norm.forward(&x), f::group_norm(&x, 2, w.as_ref(), b.as_ref(), 1e-3))?;
        let (m, v) = (new(4, &[4])?, new(5, &[4])?);
        for running in [None, Some((m.clone(), v.clone()))] {
            let options = BatchNormOptions::default().eps(1e-3);
            let bn = BatchNorm::from_tensors(4, running.clone(), w.clone(), b.clone(), options)?;
            let instance = InstanceNormOptions::default().eps(1e-3);
            let norm = InstanceNorm::from_tensors(4, running.clone(), w.clone(), b.clone(), instance)?;
            let vars = || -> Result<_> { Ok((Var::from_tensor(&m)?, Var::from_tensor(&v)?)) };
            for train in [true, false] {
                let ((m, v), own) = (vars()?, train || running.is_none());
                let (m, v) = (running.as_ref().map(|_| &m), running.as_ref().map(|_| &v));
                let (w, b) = (w.as_ref(), b.as_ref());
                // Each train starts from the running statistics that were given.
                let bn = BatchNorm::from_tensors(4, running.clone(), w.cloned(), b.cloned(), options)?;
                same(bn.forward_t(&x, train), f::batch_norm(&x, m, v, w, b, own, 0.1, 1e-3))?;
                let norm = InstanceNorm::from_tensors(4, running.clone(), w.cloned(), b.cloned(), instance)?;
                same(norm.forward_t(&x, train), f::instance_norm(&x, m, v, w, b, own, 0.1, 1e-3))?;
            }
            let (affine, tracks) = (w.is_some() || b.is_some(), running.is_some());
            assert_eq!((bn.options().affine, bn.options().track_running_stats), (affine, tracks));
            assert_eq!((norm.options().affine, norm.running_mean().is_some()), (affine, tracks));
            assert_eq!((bn.bias().is_some(), norm.bias().is_some()), (b.is_some(), b.is_some()));
            assert_eq!(bn.num_batches_tracked().is_some(), tracks);
        }
    }
    Ok(())
}

#[test]
fn shapes_that_do_not_fit() -> Result<()> {
    let (short, four) = (Some(new(1, &[3])?), new(2, &[4])?);
    let errors = [
        LayerNorm::from_tensors(4, short.clone(), None, 1e-5).map(drop),
        LayerNorm::from_tensors((), None, None, 1e-5).map(drop),
        LayerNorm::no_affine((), 1e-5).map(drop),
        RmsNorm::from_tensors(4, short.clone(), 1e-5).map(drop),
        GroupNorm::from_tensors(2, 4, None, short.clone(), 1e-5).map(drop),
        GroupNorm::from_tensors(3, 4, None, None, 1e-5).map(drop),
        BatchNorm::from_tensors(4, None, short.clone(), None, 1e-5).map(drop),
        BatchNorm::from_tensors(4, Some((four.clone(), new(1, &[3])?)), None, None, 1e-5).map(drop),
        BatchNorm::from_tensors(4, None, None, None, BatchNormOptions::default().frozen_statistics(true))
            .map(drop),
        InstanceNorm::from_tensors(4, Some((four, new(1, &[3])?)), None, None, 1e-5).map(drop),
        InstanceNorm::from_tensors(4, None, short, None, 1e-5).map(drop),
    ];
    for (i, error) in errors.into_iter().enumerate() {
        let message = error.expect_err(&format!("{i}")).to_string();
        assert!(message.contains("expect") || message.contains("must divide"), "{i}: {message}");
    }
    Ok(())
}

#[test]
fn running_statistics_of_a_file_in_half_precision_become_f32() -> Result<()> {
    let half = |seed| new(seed, &[4]).and_then(|t| t.to_dtype(DType::F16));
    let bn = BatchNorm::from_tensors(4, Some((half(1)?, half(2)?)), None, None, 1e-5)?;
    assert_eq!(bn.running_mean().dtype(), DType::F32);
    let mean = Var::from_tensor(&new(3, &[4])?)?;
    let bn = BatchNorm::from_tensors(4, Some((mean.as_tensor().clone(), new(4, &[4])?)), None, None, 1e-5)?;
    assert_eq!(bn.running_mean().id(), mean.id());
    Ok(())
}

#[test]
fn a_frozen_batch_norm_trains_nothing() -> Result<()> {
    let [m, v, w, b] = [1, 2, 3, 4].map(|seed| new(seed, &[4]).and_then(|t| Var::from_tensor(&t)));
    let [m, v, w, b] = [m?, v?, w?, b?];
    let t = |var: &Var| var.as_tensor().clone();
    let bn = BatchNorm::from_tensors(4, Some((t(&m), t(&v))), Some(t(&w)), Some(t(&b)), 1e-5)?;
    let x = Var::from_tensor(&new(5, &[3, 4, 2])?)?;
    let expected = bn.forward_t(&x, false)?;
    let before = [&m, &v].map(|var| values(var));
    let frozen = bn.frozen()?;
    assert_eq!(frozen.to_string(), "FrozenBatchNorm(4, eps=1e-05)");
    let model = candle_nn::seq().add(frozen.clone());
    // Training or not, it is the same; and what is not trained gets no gradient.
    for y in [model.forward(&x)?, frozen.forward_t(&x, true)?] {
        assert_eq!(values(&y), values(&expected));
        let gradients = y.sqr()?.sum_all()?.backward()?;
        assert!(gradients.get(&x).is_some());
        assert!([&m, &v, &w, &b].iter().all(|var| gradients.get(var).is_none()));
    }
    assert_eq!([&m, &v].map(|var| values(var)), before);
    // What is loaded later counts.
    w.set(&w.affine(2.0, 0.0)?)?;
    assert_ne!(values(&frozen.forward(&x)?), values(&expected));
    assert!(BatchNorm::from_tensors(4, None, None, None, 1e-5)?.frozen().is_err());
    Ok(())
}

#[test]
fn layers_of_two_modes_in_a_sequence() -> Result<()> {
    let (m, v, w) = (new(1, &[4])?, new(2, &[4])?, Var::from_tensor(&new(3, &[4])?)?);
    let bn = BatchNorm::from_tensors(4, Some((m, v)), Some(w.as_tensor().clone()), None, 1e-5)?;
    let norm = InstanceNorm::from_tensors(4, None, None, None, 1e-5)?;
    let x = new(4, &[3, 4, 5])?;
    let expected = norm.forward(&bn.forward_t(&x, false)?)?;
    let y = candle_nn::seq().add(Eval(bn)).add(Eval(norm)).forward(&x)?;
    assert_eq!(values(&y), values(&expected));
    assert!(y.sqr()?.sum_all()?.backward()?.get(&w).is_some(), "the weight trains");
    Ok(())
}

struct Model {
    sync: SyncBatchNorm,
    more: Vec<SyncBatchNorm>,
}
batch_norms!(Model { sync, more });

#[test]
fn a_sync_batch_norm_has_all_of_a_batch_norms_methods() -> Result<()> {
    LocalGroup::run(2, |group| {
        let bn = || BatchNorm::from_tensors(4, Some((new(1, &[4])?, new(2, &[4])?)), None, None, 1e-5);
        let sync = |name| SyncBatchNorm::from_batch_norm(bn()?, name, group.clone());
        let mut model = Model { sync: sync("a")?, more: vec![sync("b")?] };
        model.sync.set_frozen_statistics(true)?;
        let x = new(3 + group.rank() as u64, &[3, 4])?;
        assert_eq!(values(&model.sync.forward_t(&x, true)?), values(&bn()?.forward_t(&x, false)?));
        model.sync.set_frozen_statistics(false)?;
        assert_eq!(convert_sync_batchnorm(&mut model, group.clone())?, 2);
        assert_eq!(revert_sync_batchnorm(&mut model), 2);
        assert!(model.sync.group().is_none());
        Ok(())
    })?;
    Ok(())
}
