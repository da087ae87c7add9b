//! candle-nn with its layer and RMS norms always on the composed path, whose gradients are right.
//!
//! The fused path, which candle-nn takes for contiguous inputs, ends the graph. And with its norms counted: a
//! model that calls none says nothing about ours.

pub use layer_norm::{layer_norm, layer_norm_no_bias, rms_norm, LayerNorm, RmsNorm};
pub use nn_common::{rotary_emb, tensor, working_dtype};
pub use batch_norm::{batch_norm, BatchNorm};
pub use group_norm::{group_norm, GroupNorm};
pub use real_nn::*;

pub mod ops {
    use candle_core::{Result, Tensor};
    pub use nn_common::ops::softmax_last_dim;
    pub use real_nn::ops::*;

    pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        nn_common::count_norm();
        real_nn::ops::layer_norm_slow(x, weight, bias, eps)
    }

    pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        nn_common::count_norm();
        real_nn::ops::rms_norm_slow(x, weight, eps)
    }
}

pub mod batch_norm {
    use candle_core::{ModuleT, Result, Tensor};
    pub use real_nn::BatchNormConfig;
    use real_nn::VarBuilder;

    #[derive(Clone, Debug)]
    pub struct BatchNorm(real_nn::BatchNorm);

    impl std::ops::Deref for BatchNorm {
        type Target = real_nn::BatchNorm;

        fn deref(&self) -> &real_nn::BatchNorm {
            &self.0
        }
    }

    impl ModuleT for BatchNorm {
        fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
            nn_common::count_norm();
            self.0.forward_t(x, train)
        }
    }

    pub fn batch_norm<C: Into<BatchNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<BatchNorm> {
        real_nn::batch_norm(size, config, vb).map(BatchNorm)
    }
}

pub mod group_norm {
    use candle_core::{Module, Result, Tensor};
    use real_nn::VarBuilder;

    #[derive(Clone, Debug)]
    pub struct GroupNorm(real_nn::GroupNorm);

    impl GroupNorm {
        pub fn new(weight: Tensor, bias: Tensor, channels: usize, groups: usize, eps: f64) -> Result<Self> {
            real_nn::GroupNorm::new(weight, bias, channels, groups, eps).map(Self)
        }
    }

    impl Module for GroupNorm {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            nn_common::count_norm();
            self.0.forward(x)
        }
    }

    pub fn group_norm(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
        real_nn::group_norm(groups, channels, eps, vb).map(GroupNorm)
    }
}

pub mod layer_norm {
    use candle_core::{Module, Result, Tensor};
    pub use real_nn::LayerNormConfig;
    use real_nn::VarBuilder;

    #[derive(Clone, Debug)]
    pub struct LayerNorm(real_nn::LayerNorm);

    impl LayerNorm {
        pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
            Self(real_nn::LayerNorm::new(weight, bias, eps))
        }

        pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
            Self(real_nn::LayerNorm::new_no_bias(weight, eps))
        }

        pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
            Self(real_nn::LayerNorm::rms_norm(weight, eps))
        }

        pub fn weight(&self) -> &Tensor {
            self.0.weight()
        }

        pub fn bias(&self) -> Option<&Tensor> {
            self.0.bias()
        }

        pub fn eps(&self) -> f64 {
            self.0.eps()
        }

        pub fn remove_mean(&self) -> bool {
            self.0.remove_mean()
        }
    }

    impl Module for LayerNorm {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            nn_common::count_norm();
            match self.0.bias() {
                // As without a bias: `layer_norm_slow` takes its eps in f32, too coarse for a run in f64.
                Some(bias) if self.0.remove_mean() => {
                    let no_bias = real_nn::LayerNorm::new_no_bias(self.0.weight().clone(), self.0.eps());
                    no_bias.forward(x)?.broadcast_add(bias)
                }
                // candle-nn composes these itself.
                _ => self.0.forward(x),
            }
        }
    }

    #[derive(Clone, Debug)]
    pub struct RmsNorm(LayerNorm);

    impl RmsNorm {
        pub fn new(weight: Tensor, eps: f64) -> Self {
            Self(LayerNorm::rms_norm(weight, eps))
        }

        pub fn into_inner(self) -> LayerNorm {
            self.0
        }

        pub fn weight(&self) -> &Tensor {
            self.0.weight()
        }

        pub fn eps(&self) -> f64 {
            self.0.eps()
        }

        pub fn forward_diff(&self, x: &Tensor) -> Result<Tensor> {
            self.0.forward(x)
        }
    }

    impl Module for RmsNorm {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            self.0.forward(x)
        }
    }

    pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
        real_nn::layer_norm(size, config, vb).map(LayerNorm)
    }

    pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
        real_nn::layer_norm_no_bias(size, eps, vb).map(LayerNorm)
    }

    pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
        Ok(RmsNorm(LayerNorm(real_nn::rms_norm(size, eps, vb)?.into_inner())))
    }
}
