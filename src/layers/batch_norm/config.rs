//! What a batch norm can be asked for: candle-nn's configuration, and PyTorch's arguments.
//!
//! Apart from the layer, because it is all documentation and defaults.

use crate::layers::options::options;
use candle_nn::Activation;

/// candle-nn's configuration of [`batch_norm`](fn@super::batch_norm), field by field.
///
/// ```
/// use candle_norm::BatchNormConfig;
/// let config = BatchNormConfig { momentum: 0.01, ..Default::default() };
/// assert_eq!(BatchNormConfig::from(1e-5), BatchNormConfig::default());
/// # assert_eq!(config.eps, 1e-5);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormConfig {
    /// Added to the variance; default 1e-5.
    pub eps: f64,
    /// Default true. When false, training divides by the root of the mean square, subtracts nothing
    /// and leaves the running mean alone; evaluation subtracts the running mean all the same.
    pub remove_mean: bool,
    /// Whether there are a weight and a bias; default true.
    pub affine: bool,
    /// Weight of a new batch in the running statistics; default 0.1.
    pub momentum: f64,
}

impl Default for BatchNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, remove_mean: true, affine: true, momentum: 0.1 }
    }
}

/// The defaults with another `eps`.
impl From<f64> for BatchNormConfig {
    fn from(eps: f64) -> Self {
        Self { eps, ..Self::default() }
    }
}

options! {
    /// PyTorch's arguments of batch normalization, and two that PyTorch lacks.
    ///
    /// For [`BatchNorm::with_options`](super::BatchNorm::with_options) and
    /// [`batch_norm2d`](super::batch_norm2d) and its like; candle-nn's
    /// [`batch_norm`](fn@super::batch_norm) takes a [`BatchNormConfig`].
    ///
    /// ```
    /// use candle_norm::batch_norm::BatchNormOptions;
    /// let options = BatchNormOptions::default().eps(1e-3).momentum(None).affine(false);
    /// assert!(options.track_running_stats);
    /// ```
    pub struct BatchNormOptions {
        /// Added to the variance; default 1e-5.
        eps: f64 = 1e-5,
        /// Weight of a new batch in the running statistics; default 0.1. `None` gives the plain
        /// average over all batches.
        momentum: Option<f64> = Some(0.1),
        /// Whether there are a weight and a bias; default true.
        affine: bool = true,
        /// Whether an affine layer has a bias besides its weight; default true.
        bias: bool = true,
        /// Whether to keep running statistics; default true. Without, the batch's are used in
        /// evaluation too.
        track_running_stats: bool = true,
        /// Use the running statistics in training too and leave them as they are; default false.
        /// For fine-tuning on small batches: weight and bias still train.
        frozen_statistics: bool = false,
        /// What the forward applies to the norm's output, in the same visit; default none.
        activation: Option<Activation> = None,
    }
}
