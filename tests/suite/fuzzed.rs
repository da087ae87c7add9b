//! What the fuzzer found, and the fuzzer's generator on a stable toolchain.
//!
//! `fuzz/corpus/*.hex` holds the inputs that `cargo fuzz` kept, one in a line, each of which reached code
//! that no other did; those that once failed are among them. `PROPTEST_CASES` sets how many random inputs
//! come on top, `PROPTEST_RNG_SEED` which.

use crate::common::{cases, sized};
use crate::{generate, generate_layers};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError, TestRunner};

type Check = fn(&[u8]) -> Result<(), String>;

fn corpus(text: &str, check: Check) {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.len() >= 10, "{} inputs", lines.len());
    for line in lines.iter().step_by(sized(1, 10)) {
        let digits = |i: usize| u8::from_str_radix(&line[2 * i..2 * i + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..line.len() / 2).map(digits).collect();
        check(&bytes).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

fn random(check: Check) {
    let mut config = ProptestConfig { cases: cases(1000), failure_persistence: None, ..Default::default() };
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(3);
    }
    let bytes = prop::collection::vec(any::<u8>(), 0..64);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let holds =
        |bytes: Vec<u8>| check(&bytes).map_err(|e| TestCaseError::fail(format!("{}: {e}", hex(&bytes))));
    TestRunner::new(config).run(&bytes, holds).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn corpus_of_functional() {
    corpus(include_str!("../../fuzz/corpus/functional.hex"), generate::functional);
}

#[test]
fn corpus_of_layers() {
    corpus(include_str!("../../fuzz/corpus/layers.hex"), generate_layers::layers);
}

#[test]
fn random_bytes_as_functional_calls() {
    random(generate::functional);
}

#[test]
fn random_bytes_as_layers() {
    random(generate_layers::layers);
}
