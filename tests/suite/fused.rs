//! `functional::fused` and the norms over channels: every function with everything that can stand around it,
//! against the oracle; the same bits as the unfused composition where that is promised.

use crate::case::{Case, Fusion, Gate, Layout, Norm};
use crate::common::{added, bits, cases, device, sized, tensor, values, DTYPES};
use crate::compare::against_oracle;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Activation, Module};
use candle_norm::functional::{self as f, fused};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{RngSeed, TestCaseError, TestRunner};

const ACTIVATIONS: [Activation; 10] = [
    Activation::Relu,
    Activation::Relu6,
    Activation::LeakyRelu(0.1),
    Activation::Silu,
    Activation::Swish,
    Activation::Sigmoid,
    Activation::HardSwish,
    Activation::Gelu,
    Activation::NewGelu,
    Activation::GeluPytorchTanh,
];

/// Every fusion that a function takes, over these norms.
fn fusions(norm: Norm) -> Vec<Fusion> {
    let none = Fusion::default();
    let mut all = vec![];
    let rms = matches!(norm, Norm::Rms { .. });
    if !matches!(norm, Norm::Rms { .. } | Norm::Channels { .. }) {
        for activation in ACTIVATIONS {
            all.extend([false, true].map(|skip| Fusion { activation: Some(activation), skip, ..none }));
        }
    }
    if matches!(norm, Norm::Layer { .. } | Norm::Rms { .. }) {
        for dtype in DTYPES {
            for offset in [0.0, 1.0] {
                if offset == 0.0 || rms {
                    all.push(Fusion { residual: Some(dtype), offset, ..none });
                }
            }
        }
        all.push(Fusion { modulated: true, ..none });
    }
    if rms {
        all.push(Fusion { offset: 1.0, ..none });
        all.extend([Gate::Before, Gate::After].map(|gate| Fusion { gate: Some(gate), ..none }));
    }
    all
}

/// A case of a fusion, with the parameters that its function asks for.
fn fused_case(norm: Norm, dims: &[usize], fusion: Fusion, weight: bool) -> Case {
    let plain = Case::new(norm, dims);
    let asks = fusion.modulated || fusion.offset != 0.0;
    let bias = if fusion.modulated { weight } else { plain.bias };
    Case { fusion, bias, weight: weight || asks, std: 2.0, ..plain }
}

fn norms() -> Vec<(Norm, Vec<usize>)> {
    let dims = vec![3, 6, 4, 5];
    let mut all: Vec<_> = [
        Norm::Batch { training: true },
        Norm::Batch { training: false },
        Norm::Instance { use_input_stats: true },
        Norm::Instance { use_input_stats: false },
        Norm::Layer { normalized: 1 },
        Norm::Layer { normalized: 2 },
        Norm::Group { groups: 3 },
        Norm::Rms { normalized: 1 },
        Norm::Rms { normalized: 3 },
    ]
    .map(|norm| (norm, dims.clone()))
    .into();
    // Rows longer than a panel of sums, and not a multiple of any vector.
    all.push((Norm::Layer { normalized: 1 }, vec![5, 3, sized(1037, 131)]));
    all.push((Norm::Rms { normalized: 1 }, vec![5, 3, sized(1037, 131)]));
    all.push((Norm::Batch { training: true }, vec![4, 3, 7, 7]));
    all.push((Norm::Group { groups: 2 }, vec![2, 4, sized(700, 70)]));
    all
}

#[test]
fn every_function_with_all_that_can_stand_around_it() {
    let mut wrong = vec![];
    let mut calls = 0;
    for (norm, dims) in norms() {
        for fusion in fusions(norm) {
            for dtype in DTYPES {
                for weight in [true, false] {
                    let case = Case { dtype, ..fused_case(norm, &dims, fusion, weight) };
                    calls += 1;
                    wrong.extend(against_oracle(&case).err());
                }
            }
        }
    }
    let count = wrong.len();
    assert!(wrong.is_empty(), "{count} of {calls} wrong:\n{}", wrong[..count.min(8)].join("\n"));
    println!("{calls} calls");
}

/// Random shapes, memory orders, views and dtypes.
fn random() -> impl Strategy<Value = Case> {
    let sizes = [1usize, 2, 3, 5, 8, 13, 16, 17, 33, 64];
    let dims = prop::collection::vec(select(sizes.to_vec()), 2..=4).prop_map(|mut dims| {
        while dims.iter().product::<usize>() > sized(10_000, 2_000) {
            let most = (0..dims.len()).max_by_key(|&d| dims[d]).unwrap_or(0);
            dims[most] = dims[most].div_ceil(2);
        }
        dims
    });
    (dims, any::<[u32; 4]>(), select(DTYPES.to_vec()), select(DTYPES.to_vec()), any::<bool>()).prop_map(
        |(mut dims, [which, fusion, seed, layout], dtype, params, weight)| {
            let rank = dims.len();
            let norm = match which % 9 {
                0 => Norm::Batch { training: true },
                1 => Norm::Batch { training: false },
                2 if rank > 2 => Norm::Instance { use_input_stats: true },
                3 => Norm::Instance { use_input_stats: false },
                4 | 2 => Norm::Layer { normalized: 1 },
                5 => Norm::Layer { normalized: (rank - 1).min(2) },
                6 => Norm::Group { groups: dims[1] },
                7 => Norm::Rms { normalized: 1 },
                _ => Norm::Channels { center: fusion % 2 == 0 },
            };
            match norm {
                Norm::Batch { training: true } => dims[0] = dims[0].max(2),
                Norm::Instance { use_input_stats: true } => dims[2] = dims[2].max(2),
                _ => {}
            }
            let fusions = fusions(norm);
            let fusion = fusions.get(fusion as usize % fusions.len().max(1)).copied().unwrap_or_default();
            let order = match layout % 3 {
                0 => vec![],
                1 => [0].into_iter().chain(2..rank).chain([1]).collect(),
                _ => [1, 0].into_iter().chain(2..rank).collect(),
            };
            let narrow = (layout / 3 % 3 == 0).then_some((layout as usize / 9 % rank, 1, 2));
            let layout = Layout { order, narrow, broadcast: None };
            let eps = if dtype == DType::F16 { 1e-3 } else { 1e-5 };
            Case { dtype, params, layout, eps, seed: seed.into(), ..fused_case(norm, &dims, fusion, weight) }
        },
    )
}

#[test]
fn random_calls() {
    let mut config = ProptestConfig { cases: cases(600), failure_persistence: None, ..Default::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(3);
    }
    let run =
        TestRunner::new(config).run(&random(), |case| against_oracle(&case).map_err(TestCaseError::fail));
    if let Err(e) = run {
        panic!("{e}")
    }
}

/// `sum` and `normed` have the bits of an addition and a norm behind it.
#[test]
fn adding_within_the_norm_gives_the_bits_of_adding_before_it() -> Result<()> {
    for dtype in DTYPES {
        for tracked in [false, true] {
            for dims in [vec![7, 33], vec![2, 3, sized(1024, 64)]] {
                let case = Case { dtype, ..Case::new(Norm::Layer { normalized: 1 }, &dims) };
                let other = Case { seed: 9, ..case.clone() };
                let (x, r) = (case.build(&case.random())?, other.build(&other.random())?);
                let of = |a: &crate::case::Argument| match tracked {
                    true => a.view.clone(),
                    false => a.view.detach(),
                };
                let (input, residual) = (of(&x.x), of(&r.x));
                let weight = x.weight.as_ref().map(of);
                let bias = x.bias.as_ref().map(of);
                let (w, b) = (weight.as_ref(), bias.as_ref());
                let shape = &dims[dims.len() - 1..];
                let sum = added(&input, &residual, dtype)?;
                let got = fused::add_layer_norm(&input, &residual, shape, w, b, 1e-5)?;
                assert_eq!(bits(&got.sum), bits(&sum), "{dtype:?}");
                assert_eq!(bits(&got.normed), bits(&f::layer_norm(&sum, shape, w, b, 1e-5)?), "{dtype:?}");
                let got = fused::add_rms_norm(&input, &residual, shape, w, 0.0, 1e-6)?;
                assert_eq!(bits(&got.sum), bits(&sum), "{dtype:?}");
                assert_eq!(bits(&got.normed), bits(&f::rms_norm(&sum, shape, w, 1e-6)?), "{dtype:?}");
                assert_eq!(got.normed.track_op(), tracked);
            }
        }
    }
    Ok(())
}

/// Activations that no kernel has run behind the norm.
#[test]
fn other_activations_are_candle_s_own() -> Result<()> {
    let x = tensor(&crate::common::data(1, 48, 0.0, 2.0), &[2, 4, 6], DType::F32)?;
    let others = [
        Activation::Relu2,
        Activation::Elu(0.5),
        Activation::Mish,
        Activation::HardSigmoid,
        Activation::Swiglu,
    ];
    for activation in others {
        let got = fused::group_norm_act(&x, 2, None, None, 1e-5, None, activation)?;
        let expected = activation.forward(&f::group_norm(&x, 2, None, None, 1e-5)?)?;
        assert_eq!(bits(&got), bits(&expected), "{activation:?}");
    }
    Ok(())
}

/// A norm whose weight begins at zero is all corners: a ReLU behind it has PyTorch's slope there.
#[test]
fn the_slope_of_a_corner_is_that_of_the_flat_side() -> Result<()> {
    let x = Var::from_tensor(&tensor(&crate::common::data(1, 24, 0.0, 1.0), &[4, 3, 2], DType::F32)?)?;
    let skip = Var::from_tensor(&tensor(&[0.0; 24], &[4, 3, 2], DType::F32)?)?;
    let zero = tensor(&[0.0; 3], &[3], DType::F32)?;
    let y = fused::batch_norm_act(
        &x,
        None,
        None,
        Some(&zero),
        Some(&zero),
        true,
        0.1,
        1e-5,
        Some(&skip),
        Activation::Relu,
    )?;
    let grads = y.sum_all()?.backward()?;
    assert!(values(grads.get(&skip).expect("a gradient")).iter().all(|&d| d == 0.0));
    Ok(())
}

/// Scale and shift in each of the shapes that mean the same.
#[test]
fn modulation_takes_every_shape_that_says_which_sample() -> Result<()> {
    let dims = [2, 3, 4];
    let x = tensor(&crate::common::data(1, 24, 0.0, 1.0), &dims, DType::F32)?;
    let scale = tensor(&crate::common::data(2, 8, 0.0, 1.0), &[2, 4], DType::F32)?;
    let shift = tensor(&crate::common::data(3, 8, 0.0, 1.0), &[2, 4], DType::F32)?;
    let run = |scale: &Tensor, shift: &Tensor| {
        fused::modulated_layer_norm(&x, &[4], scale, Some(shift), 1e-5).map(|y| values(&y))
    };
    let expected = run(&scale, &shift)?;
    let wide = |t: &Tensor| t.unsqueeze(1)?.broadcast_as(&dims)?.contiguous();
    let shapes = |t: &Tensor| -> Result<[Tensor; 3]> { Ok([t.clone(), t.unsqueeze(1)?, wide(t)?]) };
    for scale in &shapes(&scale)? {
        for shift in &shapes(&shift)? {
            assert_eq!(run(scale, shift)?, expected, "{:?} {:?}", scale.dims(), shift.dims());
        }
    }
    let all = scale.get(0)?;
    let (shared, own) =
        (run(&all, &all)?, run(&all.unsqueeze(0)?, &all.broadcast_as((2, 4))?.contiguous()?)?);
    // One way may round the product, the other not: numbers of size 4 in f32.
    shared
        .iter()
        .zip(&own)
        .for_each(|(a, b)| assert!((a - b).abs() <= 4.0 * f64::from(f32::EPSILON), "{a} {b}"));
    for wrong in [vec![3, 4], vec![2, 2, 4], vec![2, 3], vec![1, 3, 4], vec![2, 3, 1, 4]] {
        let wrong = Tensor::zeros(wrong, DType::F32, device())?;
        let error =
            fused::modulated_layer_norm(&x, &[4], &wrong, None, 1e-5).expect_err("a shape").to_string();
        assert!(error.starts_with("modulated-layer-norm: scale has shape"), "{error}");
    }
    Ok(())
}

/// A call that fails says which op, what was expected and what came, and leaves running statistics alone.
#[test]
fn errors_name_the_op_and_the_argument() -> Result<()> {
    let of = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, device());
    let x = of(&[4, 2, 3], DType::F32)?;
    let (other, half) = (of(&[4, 2], DType::F32)?, of(&[4, 2, 3], DType::F16)?);
    let relu = Activation::Relu;
    let var = |v: f64| Var::from_tensor(&tensor(&[v; 2], &[2], DType::F32)?);
    let (mean, one) = (var(0.5)?, var(1.5)?);
    let said = |r: Result<Tensor>| -> String {
        let error = r.expect_err("a bad argument").to_string();
        error.lines().next().unwrap_or_default().to_string()
    };
    let with_skip = |skip| {
        fused::batch_norm_act(&x, Some(&mean), Some(&one), None, None, true, 0.1, 1e-5, Some(skip), relu)
    };
    assert_eq!(said(with_skip(&other)), "batch-norm-act: skip has shape [4, 2], expected [4, 2, 3]");
    assert_eq!(said(with_skip(&half)), "batch-norm-act: skip has dtype F16, expected the input's F32");
    assert!(said(with_skip(&mean.broadcast_as((4, 3, 2))?.transpose(1, 2)?)).contains("memory of their own"));
    assert_eq!((values(&mean), values(&one)), (vec![0.5; 2], vec![1.5; 2]));
    let gated = |gate| fused::gated_rms_norm(&x, gate, &[3], None, 1e-5, true);
    assert_eq!(said(gated(&half)), "gated-rms-norm: gate has dtype F16, expected the input's F32");
    assert_eq!(said(gated(&other)), "gated-rms-norm: gate has shape [4, 2], expected [4, 2, 3]");
    let added = fused::add_layer_norm(&x, &other, &[3], None, None, 1e-5).map(|both| both.normed);
    assert_eq!(said(added), "add-layer-norm: residual has shape [4, 2], expected [4, 2, 3]");
    let nan = fused::offset_rms_norm(&x, &[3], &of(&[3], DType::F32)?, f64::NAN, 1e-5);
    assert_eq!(said(nan), "offset-rms-norm: weight_offset must be finite, got NaN");
    assert!(said(f::layer_norm_channels(&other.flatten_all()?, None, None, 1e-5)).contains("at least 2 dim"));
    Ok(())
}

/// Nothing in, nothing out, and no gradient lost.
#[test]
fn empty_tensors_pass() -> Result<()> {
    let x = Var::from_tensor(&Tensor::zeros((0, 4, 3), DType::F32, device())?)?;
    let weight = Var::from_tensor(&Tensor::ones(3, DType::F32, device())?)?;
    let both = fused::add_rms_norm(&x, &x, &[3], Some(&weight), 1.0, 1e-5)?;
    let y = fused::modulated_layer_norm(&both.sum, &[3], &weight, None, 1e-5)?;
    let y = fused::group_norm_act(&y, 2, None, None, 1e-5, Some(&both.normed), Activation::Silu)?;
    let grads = y.sum_all()?.backward()?;
    assert_eq!(grads.get(&x).map(|d| d.dims().to_vec()), Some(vec![0, 4, 3]));
    assert_eq!(grads.get(&weight).map(values), Some(vec![0.0; 3]));
    Ok(())
}

/// The views that heads of attention come in are read where they lie: the bits are a copy's, gradients reach
/// the larger tensor, and where rows have gaps between them the output is contiguous.
#[test]
fn rows_of_a_larger_tensor() -> Result<()> {
    let weight = tensor(&crate::common::data(2, 8, 1.0, 0.5), &[8], DType::F32)?;
    for dtype in DTYPES {
        let qkv =
            Var::from_tensor(&tensor(&crate::common::data(1, 2 * 5 * 96, 0.0, 1.0), &[2, 5, 96], dtype)?)?;
        // [batch, token, 3, head, 8] and what attention makes of it.
        let heads = qkv.reshape((2, 5, 3, 4, 8))?;
        for which in 0..3 {
            let view = heads.narrow(2, which, 1)?.squeeze(2)?;
            for view in [view.clone(), view.transpose(1, 2)?, view.narrow(1, 1, 3)?.narrow(2, 1, 2)?] {
                for bias in [None, Some(&weight)] {
                    let run = |x: &Tensor| -> Result<(Tensor, Tensor)> {
                        let y = match bias {
                            None => f::rms_norm(x, &[8], Some(&weight), 1e-6)?,
                            bias => f::layer_norm(x, &[8], Some(&weight), bias, 1e-6)?,
                        };
                        let grads = (&y * &y)?.sum_all()?.backward()?;
                        Ok((y, grads.get(&qkv).expect("a gradient").clone()))
                    };
                    let (got, expected) = (run(&view)?, run(&view.contiguous()?)?);
                    assert!(got.0.is_contiguous());
                    assert_eq!(
                        (bits(&got.0), bits(&got.1)),
                        (bits(&expected.0), bits(&expected.1)),
                        "{dtype:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Dimension 1 is normalized where it lies, for an input in any order and for a part of a larger one.
#[test]
fn channels_are_normalized_in_place() -> Result<()> {
    for center in [true, false] {
        for dims in [vec![2, 5], vec![2, 5, 7], vec![2, 5, 3, 4], vec![1, 16, sized(40, 9), 3]] {
            let rank = dims.len();
            for order in [vec![], [0].into_iter().chain(2..rank).chain([1]).collect()] {
                for narrow in [None, Some((1, 1, 2)), Some((rank - 1, 1, 2))] {
                    for dtype in DTYPES {
                        let layout = Layout { order: order.clone(), narrow, broadcast: None };
                        let case = Case { dtype, layout, ..Case::new(Norm::Channels { center }, &dims) };
                        against_oracle(&case).unwrap_or_else(|e| panic!("{e}"));
                    }
                }
            }
        }
    }
    Ok(())
}
