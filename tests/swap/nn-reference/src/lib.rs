//! candle-nn with its layer and RMS norms always on the composed path, whose gradients are right.
//!
//! The fused path, which candle-nn takes for contiguous inputs, ends the graph.

pub use layer_norm::{layer_norm, layer_norm_no_bias, rms_norm, LayerNorm, RmsNorm};
pub use real_nn::*;

pub mod ops {
    pub use real_nn::ops::{layer_norm_slow as layer_norm, rms_norm_slow as rms_norm, *};
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
            match self.0.bias() {
                Some(bias) if self.0.remove_mean() => {
                    real_nn::ops::layer_norm_slow(x, self.0.weight(), bias, self.0.eps() as f32)
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
