//! Calls of the functions, right and wrong, against the oracle of the test suite.
#![no_main]
#![allow(dead_code)] // the suite's modules, of which this needs a part

#[path = "../../tests/suite/case.rs"]
mod case;
#[path = "../../tests/suite/common.rs"]
mod common;
#[path = "../../tests/suite/compare.rs"]
mod compare;
#[path = "../../tests/suite/fusion_oracle.rs"]
mod fusion_oracle;
#[path = "../../tests/suite/generate.rs"]
mod generate;
#[path = "../../tests/suite/oracle.rs"]
mod oracle;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(e) = generate::functional(bytes) {
        panic!("{e}")
    }
});
