//! Data far from zero, in f32: the errors promised, and PyTorch's on the same inputs beside them.

use crate::case::{Arguments, Case, Norm};
use crate::common::{self, data, relative_l2, sized, values};
use crate::oracle::{self, Approx};
use candle_core::{DType, Result};
use serde_json::Value;

/// Relative L2 errors of one run against the oracle.
struct Errors {
    y: f64,
    dx: f64,
    dweight: f64,
    dbias: Option<f64>,
}

fn errors(case: &Case, args: &Arguments) -> Result<Errors> {
    let got = case.run(args)?;
    let expected = oracle::evaluate(case, &got.rounded);
    let exact = |of: &[Approx]| of.iter().map(|a| a.value).collect::<Vec<_>>();
    let error = |got: Option<&candle_core::Tensor>, of: &[Approx]| {
        relative_l2(&values(got.expect("a gradient")), &exact(of))
    };
    Ok(Errors {
        y: error(Some(&got.y), &expected.y),
        dx: error(got.dx.as_ref(), &expected.dx),
        dweight: error(got.dweight.as_ref(), &expected.dweight),
        dbias: case.bias.then(|| error(got.dbias.as_ref(), &expected.dbias)),
    })
}

fn recorded(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

/// The case and arguments of a row of `precision.json`, as the generator makes them.
fn of_row(row: &Value) -> (Case, Arguments) {
    let norm = match row["op"].as_str() {
        Some("batch_norm") => Norm::Batch { training: true },
        Some("instance_norm") => Norm::Instance { use_input_stats: true },
        Some("group_norm") => Norm::Group { groups: 32 },
        Some("layer_norm") => Norm::Layer { normalized: 1 },
        Some("rms_norm") => Norm::Rms { normalized: 1 },
        other => panic!("op {other:?}"),
    };
    let dims: Vec<usize> = serde_json::from_value(row["dims"].clone()).expect("dims");
    let case = Case::new(norm, &dims);
    let (elements, params) = (dims.iter().product(), case.param_dims().iter().product());
    let args = Arguments {
        x: data(10, elements, recorded(row, "mean"), recorded(row, "std")),
        dy: data(1, elements, 0.0, 1.0),
        weight: Some(data(2, params, 1.0, 0.5)),
        bias: case.bias.then(|| data(3, params, 0.0, 1.0)),
        running: None,
        ..Arguments::default()
    };
    (case, args)
}

#[test]
fn far_from_zero_as_promised_and_nowhere_worse_than_pytorch() -> Result<()> {
    let path = common::golden("precision.json");
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path)?).expect("JSON");
    let mut wrong = Vec::new();
    for row in json["rows"].as_array().expect("rows") {
        let (case, args) = of_row(row);
        let ours = errors(&case, &args)?;
        let (op, mean) = (&row["op"], recorded(row, "mean"));
        println!(
            "{op} mean {mean:e}: y {:.1e} ({:.1e}), dx {:.1e} ({:.1e}), dweight {:.1e} ({:.1e}); PyTorch's in brackets",
            ours.y,
            recorded(row, "y"),
            ours.dx,
            recorded(row, "dx"),
            ours.dweight,
            recorded(row, "dweight"),
        );
        if ours.y >= 1e-6 {
            wrong.push(format!("{op} mean {mean:e}: y is off by {:e}", ours.y));
        }
        let both = [("dx", ours.dx), ("dweight", ours.dweight)].into_iter();
        for (what, ours) in both.chain(ours.dbias.map(|dbias| ("dbias", dbias))) {
            // Where PyTorch is at the level of rounding, being a roundoff behind it is not worse.
            let allowed = recorded(row, what).max(f32::EPSILON as f64);
            if ours > allowed {
                wrong.push(format!("{op} mean {mean:e}: {what} is off by {ours:e}, more than {allowed:e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn far_from_zero_in_every_memory_order() -> Result<()> {
    let dims = [4, 16, 6, 7];
    for (norm, order) in [
        (Norm::Batch { training: true }, vec![0, 2, 3, 1]),
        (Norm::Instance { use_input_stats: true }, vec![0, 2, 3, 1]),
        (Norm::Group { groups: 4 }, vec![0, 2, 3, 1]),
        (Norm::Layer { normalized: 1 }, vec![3, 0, 1, 2]),
        (Norm::Layer { normalized: 3 }, vec![1, 2, 3, 0]),
        (Norm::Rms { normalized: 1 }, vec![3, 0, 1, 2]),
    ] {
        for (mean, std) in [(1e4, 1.0), (1e3, 0.1), (-1e4, 1.0)] {
            let mut case = Case { mean, std, ..Case::new(norm, &dims) };
            case.layout.order = order.clone();
            let ours = errors(&case, &case.random())?;
            assert!(ours.y < 1e-6, "y is off by {:e} in {case:?}", ours.y);
            assert!(ours.dx < 1e-6, "dx is off by {:e} in {case:?}", ours.dx);
            assert!(ours.dweight < 1e-6, "dweight is off by {:e} in {case:?}", ours.dweight);
        }
    }
    Ok(())
}

/// Weights near zero must not hide an error in xhat, nor a bias.
#[test]
fn far_from_zero_without_affine() -> Result<()> {
    for norm in [
        Norm::Batch { training: true },
        Norm::Instance { use_input_stats: true },
        Norm::Group { groups: 2 },
        Norm::Layer { normalized: 1 },
        Norm::Rms { normalized: 1 },
    ] {
        let dims = [8, 6, 130];
        for (mean, std) in [(1e4, 1.0), (1e3, 0.1)] {
            let case = Case { mean, std, weight: false, bias: false, ..Case::new(norm, &dims) };
            let got = case.run(&case.random())?;
            let expected = oracle::evaluate(&case, &got.rounded);
            let exact: Vec<f64> = expected.y.iter().map(|a| a.value).collect();
            let error = relative_l2(&values(&got.y), &exact);
            assert!(error < 1e-6, "y is off by {error:e} in {case:?}");
        }
    }
    Ok(())
}

/// A set of a million elements: the error of a sum must not grow with its length.
#[test]
fn very_long_sets() -> Result<()> {
    let long = sized(1 << 20, 1 << 14) + 3;
    for (norm, dims) in [
        (Norm::Layer { normalized: 1 }, vec![1, long]),
        (Norm::Rms { normalized: 1 }, vec![1, long]),
        (Norm::Group { groups: 1 }, vec![1, 3, long / 3]),
        (Norm::Instance { use_input_stats: true }, vec![1, 1, long]),
        (Norm::Batch { training: true }, vec![long, 1]),
        (Norm::Batch { training: true }, vec![2, 2, long / 4]),
        (Norm::Group { groups: 2 }, vec![2, 4, long / 16 * 8]),
    ] {
        for (mean, std) in [(0.0, 1.0), (100.0, 1.0)] {
            let case = Case { mean, std, ..Case::new(norm, &dims) };
            let ours = errors(&case, &case.random())?;
            assert!(ours.y < 1e-6, "y is off by {:e} in {case:?}", ours.y);
            assert!(ours.dx < 1e-6, "dx is off by {:e} in {case:?}", ours.dx);
        }
    }
    Ok(())
}

/// Half-precision results carry the error of one rounding and no more to speak of.
#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let unit = crate::common::unit_roundoff(dtype);
        for norm in [
            Norm::Batch { training: true },
            Norm::Group { groups: 2 },
            Norm::Layer { normalized: 1 },
            Norm::Rms { normalized: 1 },
        ] {
            let case = Case { dtype, ..Case::new(norm, &[16, 4, 129]) };
            let ours = errors(&case, &case.random())?;
            // Rounding errors spread evenly over +-u of the binade have a root mean square below u / sqrt(3).
            let once = unit / 3f64.sqrt();
            assert!(ours.y < once && ours.dx < once, "y {:e}, dx {:e} in {case:?}", ours.y, ours.dx);
        }
    }
    Ok(())
}

/// What README.md says of candle-nn's LayerNorm, whose variance is a difference of two large numbers.
#[test]
fn candle_nn_is_off_at_a_mean_of_a_hundred() -> Result<()> {
    let (rows, n) = (256, 1024);
    let x = common::tensor(&data(10, rows * n, 100.0, 1.0), &[rows, n], DType::F32)?;
    let (weight, bias) = (x.ones_like()?.get(0)?, x.zeros_like()?.get(0)?);
    let worst = |y: Result<candle_core::Tensor>| -> Result<f64> {
        let (x, y) = (values(&x), values(&y?));
        let off = x.chunks(n).zip(y.chunks(n)).flat_map(|(x, y)| {
            let mean = x.iter().sum::<f64>() / n as f64;
            let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let rstd = 1.0 / (var + 1e-5).sqrt();
            x.iter().zip(y).map(move |(x, y)| ((x - mean) * rstd - y).abs())
        });
        Ok(off.fold(0.0, f64::max))
    };
    let theirs = worst(candle_nn::ops::layer_norm(&x, &weight, &bias, 1e-5))?;
    let ours = worst(candle_norm::ops::layer_norm(&x, &weight, &bias, 1e-5))?;
    println!("largest error at a mean of 100: candle-nn {theirs:.1e}, candle-norm {ours:.1e}");
    // README.md speaks of the CPU. A GPU adds up in a tree, which loses less.
    let as_written = common::device().is_cuda() || theirs > 0.01;
    assert!(as_written && ours < 1e-5, "candle-nn {theirs:e}, candle-norm {ours:e}");
    Ok(())
}
