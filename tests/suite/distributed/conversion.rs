//! Models converted to synchronized batch norms and back.

use super::training::Net;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::batch_norm::BatchNormOptions;
use candle_norm::distributed::{LocalGroup, ProcessGroup};
use candle_norm::sync_batch_norm::{join, Visit};
use candle_norm::{batch_norms, convert_sync_batchnorm, revert_sync_batchnorm};
use candle_norm::{BatchNorm, BatchNormConfig, BatchNorms, ModuleT, SyncBatchNorm};
use std::sync::Arc;

type Pair = (candle_nn::Linear, BatchNorm);

struct Deep {
    boxed: Box<Inner>,
    array: [BatchNorm; 2],
    maybe: Option<Vec<Option<Pair>>>,
    objects: Vec<Box<dyn BatchNorms>>,
    generic: Residual<BatchNorm>,
}
batch_norms!(Deep { boxed, array, maybe, objects, generic });

struct Inner(BatchNorm, Vec<BatchNorm>);
batch_norms!(Inner { 0, 1 });

struct Residual<T> {
    inner: T,
}

impl<T: BatchNorms> BatchNorms for Residual<T> {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        self.inner.each_batch_norm(&join(path, "inner"), visit)
    }
}

fn bn(vb: VarBuilder) -> Result<BatchNorm> {
    BatchNorm::with_options(2, BatchNormOptions::default().momentum(None).eps(0.5), vb)
}

fn deep(vb: &VarBuilder) -> Result<Deep> {
    let linear = candle_nn::linear(2, 2, vb.pp("linear"))?;
    Ok(Deep {
        boxed: Box::new(Inner(bn(vb.pp("a"))?, vec![bn(vb.pp("b"))?, bn(vb.pp("c"))?])),
        array: [bn(vb.pp("d"))?, bn(vb.pp("e"))?],
        maybe: Some(vec![None, Some((linear, bn(vb.pp("f"))?))]),
        objects: vec![Box::new(bn(vb.pp("g"))?)],
        generic: Residual { inner: bn(vb.pp("h"))? },
    })
}

fn paths(model: &mut Deep) -> Result<Vec<String>> {
    let mut paths = vec![];
    model.each_batch_norm("", &mut |path, _| {
        paths.push(path.to_string());
        Ok(())
    })?;
    Ok(paths)
}

#[test]
fn conversion_finds_every_layer_and_says_where() -> Result<()> {
    let vars = VarMap::new();
    let mut model = deep(&VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let expected = [
        "boxed.0",
        "boxed.1.0",
        "boxed.1.1",
        "array.0",
        "array.1",
        "maybe.1.1",
        "objects.0",
        "generic.inner",
    ];
    assert_eq!(paths(&mut model)?, expected);
    let group: Arc<dyn ProcessGroup> = Arc::new(LocalGroup::new(1)?.remove(0));
    assert_eq!(convert_sync_batchnorm(&mut model, group)?, 8);
    assert!(model.array[1].group().is_some());
    assert!(model.array[1].to_string().starts_with("SyncBatchNorm(2, eps=0.5, momentum=None"));
    assert_eq!(revert_sync_batchnorm(&mut model), 8);
    assert_eq!(revert_sync_batchnorm(&mut model), 0);
    assert!(model.array[1].group().is_none());
    assert!(model.array[1].to_string().starts_with("BatchNorm(2, eps=0.5, momentum=None"));
    Ok(())
}

/// There and back, trained on both ways: the variables of the `VarMap` are the layer's all along.
#[test]
fn conversion_keeps_variables_and_settings() -> Result<()> {
    LocalGroup::run(2, |group| {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let mut net = Net::new(vb)?;
        let ids = |net: &Net| {
            let bn = &net.blocks[1].bn;
            [
                bn.weight(),
                bn.bias(),
                Some(bn.running_mean()),
                Some(bn.running_var()),
                bn.num_batches_tracked(),
            ]
            .map(|t| t.map(Tensor::id))
        };
        let (before, options) = (ids(&net), net.blocks[1].bn.options());
        let x = Tensor::randn(0f32, 1f32, (2, 2, 4, 4), &Device::Cpu)?;
        let tracked = net.blocks[1].bn.num_batches_tracked().cloned();
        let count = || tracked.as_ref().map(|t| t.to_scalar::<i64>()).transpose();
        net.forward(&x, true)?;
        assert_eq!(count()?, Some(1));
        assert_eq!(convert_sync_batchnorm(&mut net, group.clone())?, 3);
        assert_eq!((ids(&net), net.blocks[1].bn.options()), (before, options));
        net.forward(&x, true)?;
        assert_eq!(count()?, Some(2));
        let (mean, evaluated) = (net.stem.bn.running_mean().to_vec1::<f32>()?, net.forward(&x, false)?);
        assert_eq!(revert_sync_batchnorm(&mut net), 3);
        assert_eq!((ids(&net), net.blocks[1].bn.options()), (before, options));
        assert_eq!(net.stem.bn.running_mean().to_vec1::<f32>()?, mean);
        assert_eq!(net.forward(&x, false)?.to_vec2::<f32>()?, evaluated.to_vec2::<f32>()?);
        // Alone again: the other rank is not asked.
        if group.rank() == 0 {
            net.forward(&x, true)?;
            assert_eq!(count()?, Some(3));
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn conversion_that_fails_changes_nothing() -> Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let config = BatchNormConfig { remove_mean: false, ..Default::default() };
    let mut model = [bn(vb.pp("a"))?, candle_norm::batch_norm(2, config, vb.pp("b"))?];
    let group: Arc<dyn ProcessGroup> = Arc::new(LocalGroup::new(1)?.remove(0));
    let error = convert_sync_batchnorm(&mut model, group).unwrap_err().to_string();
    assert!(error.contains("1 has remove_mean false"), "{error}");
    assert!(model.iter().all(|bn| bn.group().is_none()));
    Ok(())
}

#[test]
fn sync_batch_norm_is_a_batch_norm() -> Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let group = Arc::new(LocalGroup::new(1)?.remove(0));
    let bn = SyncBatchNorm::new(2, 1e-3, group, vb.pp("bn"))?;
    assert_eq!(
        bn.to_string(),
        "SyncBatchNorm(2, eps=0.001, momentum=0.1, affine=True, track_running_stats=True)"
    );
    let x = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
    let y = bn.forward_t(&x, true)?.to_vec2::<f32>()?;
    let mean = bn.running_mean().to_vec1::<f32>()?;
    let bn = bn.into_batch_norm();
    assert!(bn.group().is_none());
    assert_eq!(bn.running_mean().to_vec1::<f32>()?, mean);
    assert_eq!(bn.forward_t(&x, true)?.to_vec2::<f32>()?, y);
    Ok(())
}
