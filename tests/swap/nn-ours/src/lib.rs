//! candle-nn with its norms replaced by candle-norm's: names that are spelled out win over the glob.

pub use real_nn::*;

pub use candle_norm::{batch_norm, group_norm, layer_norm, layer_norm_no_bias, rms_norm};
pub use candle_norm::{BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, LayerNormConfig, RmsNorm};
pub use nn_common::{rotary_emb, tensor, working_dtype};

pub mod ops {
    pub use candle_norm::ops::*;
    pub use nn_common::ops::softmax_last_dim;
}

/// In place of `Conv2d::absorb_bn`, which takes candle-nn's own batch norm.
pub use candle_norm::FoldBatchNorm;
