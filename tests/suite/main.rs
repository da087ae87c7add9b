//! The one integration-test binary, a module per norm and concern.
//!
//! One binary, because each links all of candle (and of CUDA). The same tests serve every kind of kernel:
//!
//! * `cargo test`: the CPU's;
//! * `cargo test --features cuda-emulation`: the CUDA kernels, compiled for the host;
//! * `CANDLE_NORM_TEST_DEVICE=cuda cargo test --features cuda`: the same on a GPU.
//!
//! `PROPTEST_CASES` sets how many random calls each function gets, `PROPTEST_RNG_SEED` which.

mod autograd;
mod case;
mod common;
mod compare;
#[cfg(feature = "cuda")]
mod cuda_graph;
mod determinism;
mod distributed;
mod drop_in;
mod drop_in_differential;
mod drop_in_fold;
mod empty;
mod errors;
mod finite_differences;
mod fused;
mod fusion_oracle;
mod fuzzed;
mod generate;
mod generate_layers;
mod golden;
mod golden_fused;
mod hand_written;
mod identities;
mod layers;
mod layers_around;
mod layers_from_tensors;
mod layers_training;
mod oracle;
mod precision;
mod random;
mod second_order;
mod soak;
mod special;
mod training;
mod worked_example;
