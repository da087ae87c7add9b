//! Models of candle-transformers with candle-norm's norms and with candle-nn's, side by side.
//!
//! Each runs from the same weights on both sides: outputs and the gradients of every variable are compared, and
//! a run in f64 says which of the two is nearer. See run.sh for where the two copies of candle-transformers come
//! from. Every module of candle-transformers is here, or in the list of those left out with the reason.

mod compare;

use anyhow::{bail, ensure, Context, Result};
use compare::{Distance, Figures, Variable};
use kit::Model;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

/// Fewer models than this are too few to speak for all.
const AT_LEAST: usize = 40;

fn main() -> Result<()> {
    let Arguments { parts, variables } = arguments()?;
    let (ours, theirs) = (models_ours::models(), models_reference::models());
    ensure!(ours.len() == theirs.len(), "the two sides have other models");
    let modules = covers(&ours)?;
    let start = Instant::now();
    let mut rows = vec![];
    let (mut failed, mut speaking) = (vec![], 0);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        if !parts.is_empty() && !parts.iter().any(|part| ours.name.contains(part) || ours.module == *part) {
            continue;
        }
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| compare::compare(ours, theirs)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("panics")));
        if let Err(error) = &result {
            eprintln!("{error:#}");
        }
        let pass = result.as_ref().is_ok_and(|figures| figures.pass(ours));
        eprintln!(
            "{:6.1} s  {}  {}",
            began.elapsed().as_secs_f64(),
            if pass { "pass" } else { "FAIL" },
            ours.name
        );
        if !pass {
            failed.push(ours.name);
        }
        rows.push(row(ours, &result, pass));
        if let Ok(figures) = &result {
            speaking += usize::from(figures.norms > 0);
            if variables {
                figures.gradients.iter().for_each(print_variables);
            }
        }
    }
    println!("{HEAD}");
    rows.iter().for_each(|row| println!("{row}"));
    println!("\nLeft out:");
    models_ours::LEFT.iter().for_each(|left| println!("- {}: {}", left.module, left.why));
    println!("\n{modules}");
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} models in {seconds:.0} s, {speaking} of them call candle-nn's norms, {} failed",
        rows.len(),
        failed.len()
    );
    ensure!(failed.is_empty(), "these differ: {}", failed.join(", "));
    ensure!(!parts.is_empty() || speaking >= AT_LEAST, "{speaking} models call norms; at least {AT_LEAST}");
    Ok(())
}

struct Arguments {
    parts: Vec<String>,
    variables: bool,
}

fn arguments() -> Result<Arguments> {
    let mut given = Arguments { parts: vec![], variables: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--variables" => given.variables = true,
            "--seed" => kit::set_seed(arguments.next().context("--seed needs a number")?.parse()?),
            option if option.starts_with('-') => bail!("unknown: {option}"),
            _ => given.parts.push(argument),
        }
    }
    Ok(given)
}

/// The dozen whose gradients are furthest apart.
fn print_variables(gradients: &Distance) {
    let mut sorted: Vec<_> = gradients.variables.iter().collect();
    sorted.sort_by(|a, b| b.apart.total_cmp(&a.apart));
    println!("| variable | length in parts of the largest, ours / candle-nn's / f64 | apart | error, ours / candle-nn's |\n|---|---|---|---|");
    for Variable { name, lengths: [a, b, exact], apart, ours, theirs } in sorted.into_iter().take(12) {
        println!("| {name} | {a:.1e} / {b:.1e} / {exact:.1e} | {apart:.1e} | {ours:.1e} / {theirs:.1e} |");
    }
    println!();
}

const HEAD: &str = "\
| model | parameters | norms | output, apart | gradients, apart | output's error, ours / candle-nn's | \
gradients' error, ours / candle-nn's | nearer to f64 | the two apart in f64 | |
|---|---|---|---|---|---|---|---|---|---|";

fn row(model: &Model, result: &Result<Figures>, pass: bool) -> String {
    let name = model.name;
    let figures = match result {
        Ok(figures) => figures,
        Err(error) => return format!("| {name} | {error:#} | | | | | | | | **fail** |"),
    };
    let Figures { parameters, norms, output, gradients } = figures;
    let apart = match gradients {
        Some(gradients) => format!("{:.1e}", gradients.apart),
        None => format!("none: {}", model.no_gradients.unwrap_or_default()),
    };
    let errors = |distance: &Distance| match distance.judged {
        Some(judged) => format!("{:.1e} / {:.1e}", judged.ours, judged.theirs),
        None => String::new(),
    };
    let deciding = gradients.as_ref().unwrap_or(output).judged;
    let verdict = match deciding {
        Some(judged) => judged.verdict().to_string(),
        None => format!("no f64: {}", model.no_f64.unwrap_or_default()),
    };
    let identity = output.judged.map_or(String::new(), |judged| {
        let gradients = gradients.as_ref().and_then(|g| g.judged).map_or(0.0, |judged| judged.apart);
        format!("{:.0e}", judged.apart.max(gradients))
    });
    let (errors_y, errors_g) = (errors(output), gradients.as_ref().map_or(String::new(), errors));
    let pass = if pass { "pass" } else { "**fail**" };
    format!(
        "| {name} | {parameters} | {norms} | {:.1e} | {apart} | {errors_y} | {errors_g} | {verdict} | {identity} | {pass} |",
        output.apart
    )
}

/// Nothing is left out in silence: the modules of candle-transformers are those of the models and of the list.
fn covers(models: &[Model]) -> Result<String> {
    let text = include_str!("../zoo/ours/src/models/mod.rs");
    let modules = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let (mut here, mut left, mut neither) = (0, 0, vec![]);
    for module in modules {
        let has_model = models.iter().any(|model| model.module == module);
        let is_left = models_ours::LEFT.iter().any(|left| left.module == module);
        ensure!(!(has_model && is_left), "{module} has a model and is in the list of those left out");
        match (has_model, is_left) {
            (true, _) => here += 1,
            (_, true) => left += 1,
            _ => neither.push(module),
        }
    }
    ensure!(neither.is_empty(), "neither has a model nor a reason: {}", neither.join(", "));
    Ok(format!(
        "{here} of candle-transformers' {} modules have a model here, {left} are left out",
        here + left
    ))
}
