//! Gradients of gradients, with `CANDLE_GRAD_DO_NOT_DETACH=1`.
//!
//! candle reads that variable once a thread, and the other tests must not see it: the test starts itself
//! again as a child process that has it.

use crate::case::{Arguments, Case};
use crate::common::{process_for, tensor, values, DTYPES};
use crate::finite_differences::{cases, close, derivative};
use crate::oracle;
use candle_core::{DType, Result, Tensor, Var};

const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// Runs `checks` with the switch on: in a child process, which the parent starts and waits for.
fn switched_on(test: &str, checks: impl Fn() -> Result<()>) -> Result<()> {
    if std::env::var(SWITCH).is_ok() {
        return checks();
    }
    let name = format!("second_order::{test}");
    let output = process_for(&name).env(SWITCH, "1").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    Ok(())
}

#[test]
fn matches_finite_differences_of_the_first() -> Result<()> {
    switched_on("matches_finite_differences_of_the_first", || cases().iter().try_for_each(check))
}

/// With the switch on, the first gradients come from candle's own ops, and are the same.
#[test]
fn first_gradients_stay_right() -> Result<()> {
    switched_on("first_gradients_stay_right", || {
        for case in crate::autograd::each() {
            for dtype in DTYPES {
                for bias in [true, false] {
                    let case = Case { dtype, bias: case.bias && bias, weight: bias, ..case.clone() };
                    crate::compare::against_oracle(&case).unwrap_or_else(|e| panic!("{e}"));
                }
            }
        }
        Ok(())
    })
}

/// Directions in which the first gradient is looked at: their sum's gradient is the second order.
struct Directions {
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The first gradient along the directions, from the oracle.
fn first(case: &Case, args: &Arguments, along: &Directions) -> f64 {
    let expected = oracle::evaluate(case, args);
    let of = |v: Vec<oracle::Approx>| v.into_iter().map(|a| a.value).collect::<Vec<_>>();
    let mut sum = dot(&of(expected.dx), &along.x);
    if case.weight {
        sum += dot(&of(expected.dweight), &along.weight);
    }
    if case.bias {
        sum += dot(&of(expected.dbias), &along.bias);
    }
    sum
}

fn check(case: &Case) -> Result<()> {
    let args = case.random();
    let params = case.param_dims();
    let other = Case { seed: 7, weight: true, bias: true, ..case.clone() }.random();
    let along = Directions {
        x: other.x,
        weight: other.weight.unwrap_or_default(),
        bias: other.bias.unwrap_or_default(),
    };

    let built = case.build(&args)?;
    let dy = Var::from_tensor(&tensor(&args.dy, &case.dims, DType::F64)?)?;
    let y = case.forward(&built)?;
    let grads = (&y * dy.as_tensor())?.sum_all()?.backward()?;
    let mut sum =
        (view_of(&built.x, &grads, &case.dims)? * tensor(&along.x, &case.dims, DType::F64)?)?.sum_all()?;
    for (argument, direction) in [(&built.weight, &along.weight), (&built.bias, &along.bias)] {
        if let Some(argument) = argument {
            let gradient = view_of(argument, &grads, &params)?;
            sum = (sum + (gradient * tensor(direction, &params, DType::F64)?)?.sum_all()?)?;
        }
    }
    let second = sum.backward()?;
    let of_x = view_of(&built.x, &second, &case.dims)?;
    let of_weight = built.weight.as_ref().map(|w| view_of(w, &second, &params)).transpose()?;
    let of_dy = second.get(dy.as_tensor()).expect("dy moves the first gradient").clone();

    type Pick = fn(&mut Arguments) -> &mut Vec<f64>;
    let all: [(&str, Option<Tensor>, Pick); 3] = [
        ("x", Some(of_x), |args| &mut args.x),
        ("weight", of_weight, |args| args.weight.as_mut().expect("a weight")),
        ("dy", Some(of_dy), |args| &mut args.dy),
    ];
    for (name, got, pick) in all {
        for (i, got) in got.as_ref().map(values).unwrap_or_default().into_iter().enumerate() {
            let expected = derivative(|step| {
                let mut moved = args.clone();
                pick(&mut moved)[i] += step;
                Ok(first(case, &moved, &along))
            })?;
            assert!(close(got, expected), "by {name}[{i}]: {got}, expected {expected} in {case:?}");
        }
    }
    Ok(())
}

/// The gradient of an argument as it was viewed; zero where nothing reached it.
fn view_of(
    argument: &crate::case::Argument,
    grads: &candle_core::backprop::GradStore,
    dims: &[usize],
) -> Result<Tensor> {
    match argument.gradient(grads)? {
        Some(gradient) => Ok(gradient),
        None => tensor(&vec![0.0; dims.iter().product()], dims, DType::F64),
    }
}

/// What stands around a norm: the first gradients are PyTorch's with the switch on too.
#[test]
fn fused_first_gradients_stay_right() -> Result<()> {
    switched_on("fused_first_gradients_stay_right", crate::golden_fused::compare)
}

/// And their derivative along one direction is what differences say, for every function and argument.
#[test]
fn fused_matches_finite_differences() -> Result<()> {
    switched_on("fused_matches_finite_differences", || {
        for case in crate::golden_fused::each_in_f64()? {
            let op = case["op"].as_str().expect("op");
            // Elu's own gradient in candle is not differentiable again.
            if op.ends_with(" elu") {
                continue;
            }
            let (args, along, towards) = (
                crate::golden_fused::arguments(&case, 0)?,
                crate::golden_fused::arguments(&case, 20)?,
                crate::golden_fused::arguments(&case, 40)?,
            );
            let slope = |args: &[Var]| -> Result<Tensor> {
                let y = crate::golden_fused::run(op, args)?;
                let gradients = (y.sqr()? * 0.5)?.sum_all()?.backward()?;
                let dot = |(arg, v): (&Var, &Var)| {
                    (gradients.get(arg).expect("a gradient") * v.as_tensor())?.sum_all()
                };
                let parts: Vec<Tensor> = args.iter().zip(&along).map(dot).collect::<Result<_>>()?;
                Tensor::stack(&parts, 0)?.sum_all()
            };
            let second = slope(&args)?.backward()?;
            let got: f64 = args
                .iter()
                .zip(&towards)
                .map(|(arg, v)| (second.get(arg).expect("a second gradient") * v.as_tensor())?.sum_all())
                .try_fold(0.0, |sum, part| Ok::<_, candle_core::Error>(sum + part?.to_scalar::<f64>()?))?;
            let moved = |h: f64| -> Result<f64> {
                let args: Vec<Var> = args
                    .iter()
                    .zip(&towards)
                    .map(|(arg, v)| Var::from_tensor(&(arg.as_tensor() + (v.as_tensor() * h)?)?.detach()))
                    .collect::<Result<_>>()?;
                slope(&args)?.to_scalar()
            };
            // Of fourth order in h: an error of 1e-8 or so beside f64's.
            let h = 1e-4;
            let central = |h: f64| -> Result<f64> { Ok((moved(h)? - moved(-h)?) / (2.0 * h)) };
            let expected = (4.0 * central(h)? - central(2.0 * h)?) / 3.0;
            assert!(
                (got - expected).abs() <= 1e-6 * expected.abs().max(1.0),
                "{op}: {got} beside {expected}"
            );
        }
        Ok(())
    })
}
