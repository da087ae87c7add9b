//! The one integration-test binary, a module per norm and concern.
//!
//! One binary, because each links all of candle (and of CUDA).

mod worked_example;
