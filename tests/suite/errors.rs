//! Bad input: an error that names the function, what came and what was expected; nothing moves.

use crate::common::{bits, device};
use candle_core::{DType, Result, Tensor, Var};
use candle_norm::{functional as f, ops, LayerNorm, Module};

fn x(dims: &[usize]) -> Tensor {
    Tensor::ones(dims, DType::F32, device()).expect("ones")
}

fn running(channels: usize) -> (Var, Var) {
    let var = |value: f64| {
        Var::from_tensor(&Tensor::full(value as f32, channels, device()).expect("full")).expect("a variable")
    };
    (var(0.25), var(2.0))
}

/// The call failed, and its message has every one of `parts`.
fn refused(result: Result<Tensor>, parts: &[&str]) {
    let message = match result {
        Ok(y) => panic!("{:?} came back, expected an error with {parts:?}", y.dims()),
        Err(e) => e.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

fn batch(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    f::batch_norm(x, None, None, weight, bias, true, 0.1, 1e-5)
}

fn instance(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    f::instance_norm(x, None, None, weight, bias, true, 0.1, 1e-5)
}

#[test]
fn ranks() {
    refused(batch(&x(&[4]), None, None), &["batch-norm", "[4]", "at least 2"]);
    refused(instance(&x(&[4]), None, None), &["instance-norm", "[4]", "at least 2"]);
    refused(f::group_norm(&x(&[4]), 2, None, None, 1e-5), &["group-norm", "[4]", "at least 2"]);
    refused(f::layer_norm(&x(&[4]), &[], None, None, 1e-5), &["layer-norm", "[4]", "[]"]);
    refused(f::layer_norm(&x(&[4]), &[2, 4], None, None, 1e-5), &["layer-norm", "[4]", "[2, 4]"]);
    refused(f::rms_norm(&x(&[]), &[1], None, 1e-5), &["rms-norm", "[]", "[1]"]);
}

#[test]
fn normalized_shapes() {
    refused(f::layer_norm(&x(&[2, 768]), &[512], None, None, 1e-5), &["layer-norm", "[2, 768]", "[512]"]);
    let channels_first = f::layer_norm(&x(&[2, 6, 7, 7]), &[6], None, None, 1e-5);
    refused(
        channels_first,
        &["[2, 6, 7, 7]", "channels in dimension 1 are normalized by functional::layer_norm_channels"],
    );
    refused(f::rms_norm(&x(&[2, 768]), &[2], None, 1e-5), &["rms-norm", "[2, 768]", "[2]"]);
}

#[test]
fn parameter_shapes() {
    let (input, wrong, matrix) = (x(&[2, 6, 4]), x(&[5]), x(&[6, 1]));
    type Call = fn(&Tensor, Option<&Tensor>, Option<&Tensor>) -> Result<Tensor>;
    let channels: [(&str, Call); 3] = [
        ("batch-norm", batch),
        ("instance-norm", instance),
        ("group-norm", |x, w, b| f::group_norm(x, 2, w, b, 1e-5)),
    ];
    for (op, call) in channels {
        refused(call(&input, Some(&wrong), None), &[op, "weight", "[5]", "[6]"]);
        refused(call(&input, Some(&matrix), None), &[op, "weight", "[6, 1]", "[6]"]);
        refused(call(&input, None, Some(&wrong)), &[op, "bias", "[5]", "[6]"]);
    }
    let layer = |w, b| f::layer_norm(&input, &[6, 4], w, b, 1e-5);
    refused(layer(Some(&wrong), None), &["layer-norm", "weight", "[5]", "[6, 4]"]);
    let flat = x(&[24]);
    refused(layer(Some(&flat), None), &["layer-norm", "weight", "[24]", "[6, 4]"]);
    refused(layer(None, Some(&wrong)), &["layer-norm", "bias", "[5]", "[6, 4]"]);
    refused(f::rms_norm(&input, &[4], Some(&wrong), 1e-5), &["rms-norm", "weight", "[5]", "[4]"]);
}

/// candle-nn's layers and `ops`, whose parameters broadcast.
#[test]
fn parameters_that_do_not_broadcast() -> Result<()> {
    let (input, wrong, image) = (x(&[2, 768]), x(&[512]), x(&[2, 6, 7, 7]));
    let norm = |w: &Tensor, b: &Tensor, x: &Tensor| LayerNorm::new(w.clone(), b.clone(), 1e-5).forward(x);
    refused(
        norm(&wrong, &wrong, &input),
        &["layer-norm: weight has shape [512], expected [768]", "[2, 768]"],
    );
    refused(norm(&x(&[768]), &wrong, &input), &["layer-norm: bias has shape [512], expected [768]"]);
    refused(ops::rms_norm(&input, &wrong, 1e-5), &["rms-norm: weight has shape [512], expected [768]"]);
    let hint = "channels in dimension 1 are normalized by functional::layer_norm_channels";
    refused(norm(&x(&[6]), &x(&[6]), &image), &["weight has shape [6], expected [7]", hint]);
    refused(ops::layer_norm(&x(&[]), &x(&[1]), &x(&[1]), 1e-5), &["layer-norm: input is a scalar"]);
    let whole = x(&[2, 1]).to_dtype(DType::U32)?;
    refused(ops::rms_norm(&input, &whole, 1e-5), &["rms-norm: weight has dtype U32"]);
    refused(
        ops::rms_norm(&input.to_dtype(DType::I64)?, &x(&[2, 1]), 1e-5),
        &["rms-norm: input has dtype I64"],
    );
    refused(
        norm(&x(&[2, 1]), &x(&[1]), &input.affine(1., 0.)?.to_dtype(DType::U8)?),
        &["input has dtype U8"],
    );
    refused(ops::rms_norm(&input, &x(&[2, 1]), -1.0), &["rms-norm: eps must not be negative"]);
    Ok(())
}

#[test]
fn groups() {
    let call = |groups| f::group_norm(&x(&[2, 6, 4]), groups, None, None, 1e-5);
    refused(call(4), &["group-norm", "num_groups must divide num_channels", "4", "6"]);
    refused(call(0), &["group-norm", "0 groups"]);
    refused(call(7), &["group-norm", "7 groups", "6 channels"]);
}

#[test]
fn dtypes() -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let name = format!("{dtype:?}");
        let (input, param) = (x(&[2, 6, 4]).to_dtype(dtype)?, x(&[6]).to_dtype(dtype)?);
        refused(batch(&input, None, None), &["batch-norm", &name, "input", "f32"]);
        refused(instance(&input, None, None), &["instance-norm", &name]);
        refused(f::group_norm(&input, 2, None, None, 1e-5), &["group-norm", &name]);
        refused(f::layer_norm(&input, &[4], None, None, 1e-5), &["layer-norm", &name]);
        refused(f::rms_norm(&input, &[4], None, 1e-5), &["rms-norm", &name]);
        refused(batch(&x(&[2, 6, 4]), Some(&param), None), &["batch-norm", "weight", &name]);
        refused(batch(&x(&[2, 6, 4]), None, Some(&param)), &["batch-norm", "bias", &name]);
    }
    Ok(())
}

#[test]
fn eps() {
    for eps in [-1e-5, f64::NAN] {
        let (input, name) = (x(&[2, 6, 4]), format!("{eps}"));
        refused(f::batch_norm(&input, None, None, None, None, true, 0.1, eps), &["batch-norm", "eps", &name]);
        refused(
            f::instance_norm(&input, None, None, None, None, true, 0.1, eps),
            &["instance-norm", "eps", &name],
        );
        refused(f::group_norm(&input, 2, None, None, eps), &["group-norm", "eps", &name]);
        refused(f::layer_norm(&input, &[4], None, None, eps), &["layer-norm", "eps", &name]);
        refused(f::rms_norm(&input, &[4], None, eps), &["rms-norm", "eps", &name]);
    }
}

#[test]
fn one_value_per_channel() {
    refused(
        batch(&x(&[1, 6]), None, None),
        &["batch-norm", "more than 1 value per channel when normalizing with the input's own", "[1, 6]"],
    );
    refused(batch(&x(&[1, 6, 1, 1]), None, None), &["batch-norm", "more than 1 value per channel"]);
    refused(
        instance(&x(&[2, 6]), None, None),
        &["instance-norm", "more than 1 spatial element when normalizing with the input's own", "[2, 6]"],
    );
    refused(instance(&x(&[2, 6, 1, 1]), None, None), &["instance-norm", "more than 1 spatial element"]);
}

#[test]
fn one_value_per_channel_is_enough_for_given_statistics() -> Result<()> {
    let (mean, var) = running(6);
    for dims in [&[1usize, 6][..], &[1, 6, 1, 1]] {
        for y in [
            f::batch_norm(&x(dims), Some(&mean), Some(&var), None, None, false, 0.1, 0.0)?,
            f::instance_norm(&x(dims), Some(&mean), Some(&var), None, None, false, 0.1, 0.0)?,
        ] {
            let expected = 0.75f32 / 2f32.sqrt();
            let y = y.flatten_all()?.to_vec1::<f32>()?;
            assert!(y.iter().all(|y| (y - expected).abs() <= f32::EPSILON), "{y:?}");
        }
    }
    Ok(())
}

#[test]
fn running_statistics() {
    let ((mean, var), (short, _)) = (running(6), running(5));
    let input = x(&[2, 6, 4]);
    let batch = |mean, var, training| f::batch_norm(&input, mean, var, None, None, training, 0.1, 1e-5);
    refused(batch(Some(&mean), None, true), &["batch-norm", "running_mean", "running_var", "both"]);
    refused(batch(None, Some(&var), true), &["batch-norm", "both"]);
    refused(batch(None, None, false), &["batch-norm", "running_mean", "not training"]);
    refused(batch(Some(&short), Some(&var), true), &["batch-norm", "running_mean", "[5]", "[6]"]);
    refused(batch(Some(&mean), Some(&short), false), &["batch-norm", "running_var", "[5]", "[6]"]);
    let instance = |mean, var, own| f::instance_norm(&input, mean, var, None, None, own, 0.1, 1e-5);
    refused(instance(Some(&mean), None, true), &["instance-norm", "both"]);
    refused(instance(None, None, false), &["instance-norm", "running_mean", "use_input_stats"]);
    for own in [true, false] {
        refused(batch(Some(&mean), Some(&mean), own), &["batch-norm", "one variable for both"]);
        refused(instance(Some(&var), Some(&var), own), &["instance-norm", "one variable for both"]);
    }
    refused(instance(Some(&mean), Some(&short), true), &["instance-norm", "running_var", "[5]", "[6]"]);
}

/// Needs a second device: says so and returns where the tests run on the CPU.
#[test]
fn devices() -> Result<()> {
    if device().is_cpu() {
        println!("not run: arguments on two devices need CANDLE_NORM_TEST_DEVICE=cuda");
        return Ok(());
    }
    let elsewhere = Tensor::ones(6, DType::F32, &candle_core::Device::Cpu)?;
    let input = x(&[2, 6, 4]);
    refused(batch(&input, Some(&elsewhere), None), &["batch-norm", "weight", "Cpu", "Cuda"]);
    refused(batch(&input, None, Some(&elsewhere)), &["batch-norm", "bias", "Cpu", "Cuda"]);
    let running = Var::from_tensor(&elsewhere)?;
    let var = running.copy().and_then(|t| Var::from_tensor(&t))?;
    let call = f::batch_norm(&input, Some(&running), Some(&var), None, None, true, 0.1, 1e-5);
    refused(call, &["batch-norm", "running_mean", "Cpu", "Cuda"]);
    refused(f::rms_norm(&x(&[2, 6]), &[6], Some(&elsewhere), 1e-5), &["rms-norm", "weight", "Cpu", "Cuda"]);
    Ok(())
}

#[test]
fn momentum() {
    let (mean, var) = running(6);
    for momentum in [-0.1, 1.5, f64::NAN] {
        let call = f::batch_norm(&x(&[2, 6]), Some(&mean), Some(&var), None, None, true, momentum, 1e-5);
        refused(call, &["batch-norm", "momentum", &format!("{momentum}")]);
    }
}

/// Whatever is wrong, and however late it shows, running statistics are as they were.
#[test]
fn a_failed_call_moves_no_running_statistics() -> Result<()> {
    let (mean, var) = running(6);
    let before = (bits(&mean), bits(&var));
    let (good, wrong) = (x(&[2, 6, 4]), x(&[5]));
    let whole = x(&[6]).to_dtype(DType::U32)?;
    let integers = good.to_dtype(DType::I64)?;
    let single = x(&[1, 6, 1]);
    type Call = fn(&Tensor, &Var, &Var, Option<&Tensor>, Option<&Tensor>, f64) -> Result<Tensor>;
    let calls: [Call; 2] = [
        |x, mean, var, w, b, eps| f::batch_norm(x, Some(mean), Some(var), w, b, true, 0.1, eps),
        |x, mean, var, w, b, eps| f::instance_norm(x, Some(mean), Some(var), w, b, true, 0.1, eps),
    ];
    for call in calls {
        for result in [
            call(&good, &mean, &var, Some(&wrong), None, 1e-5),
            call(&good, &mean, &var, None, Some(&wrong), 1e-5),
            call(&good, &mean, &var, Some(&whole), None, 1e-5),
            call(&good, &mean, &var, None, None, -1.0),
            call(&integers, &mean, &var, None, None, 1e-5),
            call(&single, &mean, &var, None, None, 1e-5),
            call(&x(&[6]), &mean, &var, None, None, 1e-5),
            call(&x(&[2, 5, 4]), &mean, &var, None, None, 1e-5),
        ] {
            assert!(result.is_err());
            assert_eq!((bits(&mean), bits(&var)), before);
        }
        // The same call moves them once nothing is wrong.
        call(&good, &mean, &var, None, None, 1e-5)?;
        assert_ne!((bits(&mean), bits(&var)), before);
        let (old_mean, old_var) = running(6);
        mean.set(&old_mean)?;
        var.set(&old_var)?;
    }
    Ok(())
}

/// One element repeated costs no memory, so such a shape can be asked for.
#[test]
fn more_elements_than_memory_can_have() -> Result<()> {
    for dims in [[1 << 40, 2, 1 << 40], [1 << 30, 2, 1 << 30], [usize::MAX, 2, 2], [1 << 57, 1, 2]] {
        let x = x(&[1, 1, 1]).broadcast_as(&dims)?;
        let parts = ["input has shape", "expected at most 288230376151711743 elements"];
        let (mean, var) = running(2);
        refused(batch(&x, None, None), &parts);
        let evaluated = f::batch_norm(&x, Some(&mean), Some(&var), None, None, false, 0.1, 1e-5);
        refused(evaluated, &parts);
        refused(instance(&x, None, None), &parts);
        refused(f::group_norm(&x, 1, None, None, 1e-5), &parts);
        refused(f::layer_norm(&x, &dims[2..], None, None, 1e-5), &parts);
        refused(f::rms_norm(&x, &dims, None, 1e-5), &parts);
    }
    Ok(())
}
