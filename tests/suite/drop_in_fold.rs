//! What a changed import cannot give: candle-nn's `absorb_bn`, and its `BatchNorm` as a type.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig, Module, ModuleT, VarBuilder, VarMap,
};
use candle_norm::{BatchNorm, BatchNormConfig, BatchNormOptions, FoldBatchNorm};

const CPU: &Device = &Device::Cpu;

fn builder() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, CPU)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// A batch norm of 6 channels with statistics and parameters that are not the initial ones.
fn used(options: BatchNormOptions) -> Result<BatchNorm> {
    let vars = VarMap::new();
    let bn = BatchNorm::with_options(6, options, VarBuilder::from_varmap(&vars, DType::F32, CPU))?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        if ["weight", "bias", "running_mean"].contains(&name.as_str()) {
            var.set(&Tensor::arange(1f32, 7., CPU)?.sin()?)?;
        }
        if name == "running_var" {
            var.set(&Tensor::arange(1f32, 7., CPU)?)?;
        }
    }
    Ok(bn)
}

fn variants() -> Result<[BatchNorm; 3]> {
    let options = BatchNormOptions::default().eps(1e-3);
    Ok([used(options)?, used(options.affine(false))?, used(options.bias(false))?])
}

#[test]
fn a_folded_map_is_the_map_and_the_norm() -> Result<()> {
    let config = Conv2dConfig { padding: 1, stride: 2, groups: 2, ..Default::default() };
    let conv2d = candle_nn::conv2d(4, 6, 3, config, builder())?;
    let conv2d_no_bias = candle_nn::conv2d_no_bias(4, 6, 3, config, builder())?;
    let conv1d = candle_nn::conv1d(4, 6, 3, Conv1dConfig { padding: 2, ..Default::default() }, builder())?;
    let transposed = ConvTranspose1dConfig { padding: 1, stride: 2, groups: 2, ..Default::default() };
    let kernel = builder().get_with_hints((4, 3, 3), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let transposed1d = ConvTranspose1d::new(kernel, None, transposed);
    let transposed2d = candle_nn::conv_transpose2d(4, 6, 3, Default::default(), builder())?;
    let linear = candle_nn::linear(4, 6, builder())?;
    let x = Tensor::randn(0f32, 1., (2, 4, 7, 7), CPU)?;
    let row = x.narrow(3, 0, 1)?.squeeze(3)?;
    let point = row.narrow(2, 0, 1)?.squeeze(2)?;
    for bn in variants()? {
        let check = |folded: Tensor, apart: Tensor, what: &str| -> Result<()> {
            // 36 products of values of order 1, rounded in another order.
            let difference = largest_difference(&folded, &bn.forward_t(&apart, false)?)?;
            assert!(difference < 36.0 * 4.0 * f32::EPSILON, "{what} with {bn}: {difference}");
            Ok(())
        };
        let folded = conv2d.fold_batch_norm(&bn)?;
        assert_eq!(folded.config(), conv2d.config());
        check(folded.forward(&x)?, conv2d.forward(&x)?, "conv2d")?;
        check(conv2d_no_bias.fold_batch_norm(&bn)?.forward(&x)?, conv2d_no_bias.forward(&x)?, "no bias")?;
        check(conv1d.fold_batch_norm(&bn)?.forward(&row)?, conv1d.forward(&row)?, "conv1d")?;
        check(
            transposed1d.fold_batch_norm(&bn)?.forward(&row)?,
            transposed1d.forward(&row)?,
            "transposed 1d",
        )?;
        check(transposed2d.fold_batch_norm(&bn)?.forward(&x)?, transposed2d.forward(&x)?, "transposed 2d")?;
        check(linear.fold_batch_norm(&bn)?.forward(&point)?, linear.forward(&point)?, "linear")?;
    }
    Ok(())
}

#[test]
fn folding_equals_absorb_bn() -> Result<()> {
    let conv = candle_nn::conv2d(4, 6, 3, Default::default(), builder())?;
    let bn = used(BatchNormOptions::default())?;
    let theirs: candle_nn::BatchNorm = (&bn).try_into()?;
    let (folded, absorbed) = (conv.fold_batch_norm(&bn)?, conv.absorb_bn(&theirs)?);
    assert!(largest_difference(folded.weight(), absorbed.weight())? < 4.0 * f32::EPSILON);
    let (a, b) = (folded.bias().expect("a bias"), absorbed.bias().expect("a bias"));
    assert!(largest_difference(a, b)? < 4.0 * f32::EPSILON);
    Ok(())
}

#[test]
fn a_half_precision_map_stays_one() -> Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::BF16, CPU);
    let folded = candle_nn::linear(4, 6, vb)?.fold_batch_norm(&used(BatchNormOptions::default())?)?;
    assert_eq!(folded.weight().dtype(), DType::BF16);
    assert_eq!(folded.bias().expect("a bias").dtype(), DType::BF16);
    Ok(())
}

#[test]
fn what_cannot_be_folded_is_an_error() -> Result<()> {
    let linear = candle_nn::linear(4, 5, builder())?;
    let error = |bn: &BatchNorm| linear.fold_batch_norm(bn).expect_err("an error").to_string();
    assert!(error(&used(BatchNormOptions::default())?).contains("6 channels, expected the 5"));
    let options = BatchNormOptions::default().track_running_stats(false);
    assert!(error(&BatchNorm::with_options(5, options, builder())?).contains("running statistics"));
    Ok(())
}

#[test]
fn candle_nns_type_shares_the_running_statistics() -> Result<()> {
    let bn = candle_norm::batch_norm(6, BatchNormConfig { momentum: 0.5, ..Default::default() }, builder())?;
    let theirs: candle_nn::BatchNorm = (&bn).try_into()?;
    let x = Tensor::randn(1f32, 1., (4, 6), CPU)?;
    theirs.forward_train(&x)?;
    assert_eq!(bn.running_mean().to_vec1::<f32>()?, theirs.running_mean().to_vec1::<f32>()?);
    assert_ne!(bn.running_mean().to_vec1::<f32>()?, [0.; 6]);
    assert!(largest_difference(&bn.forward_t(&x, false)?, &theirs.forward_t(&x, false)?)? < 1e-5);
    Ok(())
}

#[test]
fn what_candle_nns_type_cannot_say_is_an_error() -> Result<()> {
    let options = BatchNormOptions::default();
    for options in
        [options.track_running_stats(false), options.momentum(None), options.frozen_statistics(true)]
    {
        let bn = BatchNorm::with_options(6, options, builder())?;
        assert!(candle_nn::BatchNorm::try_from(&bn).is_err(), "{options:?}");
    }
    let config = BatchNormConfig { remove_mean: false, ..Default::default() };
    let bn = candle_norm::batch_norm(6, config, builder())?;
    assert!(candle_nn::BatchNorm::try_from(&bn).is_err());
    Ok(())
}
