//! Batch normalization over the batches of several ranks.
//!
//! ```text
//! y = (x - mean) / sqrt(var + eps) * weight + bias
//! ```
//!
//! as in [`batch_norm`](mod@super::batch_norm), with `mean` and `var` of the inputs `[N, C, ..]` of all
//! ranks together. Batch norm on few samples per device is noisy. Synchronized, it uses the statistics of
//! all samples of the step: N ranks of B samples train as one process with N·B. Peng et al. call it
//! [Cross-GPU Batch Normalization](https://arxiv.org/abs/1711.07240). Arguments and meaning are those of
//! [`torch.nn.SyncBatchNorm`](https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html),
//! and the ranks are those of any [`ProcessGroup`].
//!
//! A model is built of [`BatchNorm`] and converted: [`convert_sync_batchnorm`] gives every batch norm in it
//! a group, however deep it lies, and [`revert_sync_batchnorm`] takes it away. Parameters, running
//! statistics and settings stay what and where they are. The model says where its batch norms are with
//! one line per struct, [`batch_norms!`](crate::batch_norms):
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_norm::distributed::{LocalGroup, ProcessGroup};
//! use candle_norm::{batch_norm, batch_norms, convert_sync_batchnorm, BatchNorm, ModuleT};
//!
//! struct Block { conv: candle_nn::Conv2d, bn: BatchNorm }
//! batch_norms!(Block { bn });
//!
//! struct Model { blocks: Vec<Block>, head: Option<BatchNorm> }
//! batch_norms!(Model { blocks, head });
//!
//! # fn main() -> candle_core::Result<()> {
//! # fn build() -> candle_core::Result<Model> {
//! #     let vars = candle_nn::VarMap::new();
//! #     let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! #     let conv = candle_nn::conv2d(2, 2, 1, Default::default(), vb.pp("conv"))?;
//! #     let bn = batch_norm(2, 1e-5, vb.pp("bn"))?;
//! #     Ok(Model { blocks: vec![Block { conv, bn }], head: Some(batch_norm(2, 1e-5, vb.pp("head"))?) })
//! # }
//! let outputs = LocalGroup::run(2, |group| {
//!     let mut model = build()?;
//!     assert_eq!(convert_sync_batchnorm(&mut model, group.clone())?, 2);
//!     // Rank 0 holds 0 and rank 1 holds 2: alone, neither could be normalized.
//!     let x = Tensor::full(2. * group.rank() as f32, (1, 2, 1, 1), &Device::Cpu)?;
//!     model.blocks[0].bn.forward_t(&x, true)?.flatten_all()?.to_vec1::<f32>()
//! })?;
//! assert!((outputs[0][0] + 1.0).abs() < 1e-4 && (outputs[1][0] - 1.0).abs() < 1e-4);
//! # Ok(()) }
//! ```
//!
//! In training the forward makes one all-gather of `3 C + 2` numbers and the backward one sum of `2 C`.
//! Gradients of weight and bias stay each rank's own, as in PyTorch: average them with the others by
//! [`all_reduce_gradients`](crate::distributed::all_reduce_gradients). Ranks may have batches of
//! different sizes, and none. Evaluation communicates nothing, nor does a group of one rank. Gradients
//! of gradients return an error over several ranks.

use super::batch_norm::{BatchNorm, BatchNormOptions};
use crate::autograd::Synchronized;
use crate::distributed::ProcessGroup;
use candle_core::{bail, Result, Tensor};
use candle_nn::{ModuleT, VarBuilder};
use std::fmt;
use std::sync::Arc;

impl BatchNorm {
    /// Makes the batches of all ranks of `group` count as one in training.
    ///
    /// `name` is for the errors of ranks that are not at the same layer, and the same on all ranks.
    /// [`convert_sync_batchnorm`] does this for a whole model.
    ///
    /// # Errors
    /// A layer that does not remove the mean.
    pub fn synchronize(&mut self, name: &str, group: Arc<dyn ProcessGroup>) -> Result<()> {
        if !self.remove_mean() {
            bail!("sync-batch-norm: {name} has remove_mean false, expected a layer that removes the mean")
        }
        self.sync = Some(Synchronized { group, layer: name.into() });
        Ok(())
    }

    /// Undoes [`synchronize`](Self::synchronize); whether there was something to undo.
    pub fn desynchronize(&mut self) -> bool {
        self.sync.take().is_some()
    }

    /// The group whose batches count as one in training, if any.
    pub fn group(&self) -> Option<&Arc<dyn ProcessGroup>> {
        self.sync.as_ref().map(|sync| &sync.group)
    }
}

/// A [`BatchNorm`] that is made with a group: see the [module](self).
///
/// For models that are never trained alone. It has all of a batch norm's methods, and
/// [`batch_norms!`](crate::batch_norms) finds it; as a field of a model that is trained both ways take
/// [`BatchNorm`] and [`convert_sync_batchnorm`].
#[derive(Debug, Clone)]
pub struct SyncBatchNorm(BatchNorm);

impl SyncBatchNorm {
    /// A layer with PyTorch's arguments over the ranks of `group`.
    ///
    /// # Errors
    /// As [`BatchNorm::with_options`].
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_norm::{distributed::LocalGroup, batch_norm::BatchNormOptions, SyncBatchNorm};
    /// # fn main() -> candle_core::Result<()> {
    /// LocalGroup::run(2, |group| {
    ///     let vars = candle_nn::VarMap::new();
    ///     let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    ///     let bn = SyncBatchNorm::new(8, BatchNormOptions::default().momentum(None), group, vb.pp("bn"))?;
    ///     assert_eq!(bn.num_features(), 8);
    ///     Ok(())
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn new(
        num_features: usize,
        options: impl Into<BatchNormOptions>,
        group: Arc<dyn ProcessGroup>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let name = vb.prefix();
        let inner = BatchNorm::with_options(num_features, options, vb)?;
        Self::from_batch_norm(inner, if name.is_empty() { "batch norm" } else { &name }, group)
    }

    /// This layer over the ranks of `group`: [`BatchNorm::synchronize`] says what `name` is for.
    ///
    /// # Errors
    /// As [`BatchNorm::synchronize`].
    pub fn from_batch_norm(mut bn: BatchNorm, name: &str, group: Arc<dyn ProcessGroup>) -> Result<Self> {
        bn.synchronize(name, group)?;
        Ok(Self(bn))
    }

    /// The layer without its group.
    pub fn into_batch_norm(mut self) -> BatchNorm {
        self.0.desynchronize();
        self.0
    }
}

impl std::ops::Deref for SyncBatchNorm {
    type Target = BatchNorm;

    fn deref(&self) -> &BatchNorm {
        &self.0
    }
}

impl std::ops::DerefMut for SyncBatchNorm {
    fn deref_mut(&mut self) -> &mut BatchNorm {
        &mut self.0
    }
}

impl ModuleT for SyncBatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.0.forward_t(x, train)
    }
}

impl fmt::Display for SyncBatchNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Gives every batch norm of `model` the group, in place, and returns how many there are.
///
/// Worth comparing with the number you expect: a batch norm that the model's
/// [`batch_norms!`](crate::batch_norms) line does not mention is not found. On an error no layer is changed.
///
/// # Errors
/// A layer that cannot be synchronized ([`BatchNorm::synchronize`]).
pub fn convert_sync_batchnorm(
    model: &mut (impl BatchNorms + ?Sized),
    group: Arc<dyn ProcessGroup>,
) -> Result<usize> {
    model.each_batch_norm("", &mut |path, bn| {
        let mut trial = bn.clone();
        trial.synchronize(path, group.clone())
    })?;
    let mut converted = 0;
    model.each_batch_norm("", &mut |path, bn| {
        converted += 1;
        bn.synchronize(path, group.clone())
    })?;
    Ok(converted)
}

/// Undoes [`convert_sync_batchnorm`], and returns how many layers had a group.
pub fn revert_sync_batchnorm(model: &mut (impl BatchNorms + ?Sized)) -> usize {
    let mut reverted = 0;
    let visited = model.each_batch_norm("", &mut |_, bn| {
        reverted += usize::from(bn.desynchronize());
        Ok(())
    });
    // The visitor cannot fail, and a model's own implementation has no other reason to.
    debug_assert!(visited.is_ok());
    reverted
}

/// What a visitor of batch norms does with one, given its path in the model.
pub type Visit<'a> = dyn FnMut(&str, &mut BatchNorm) -> Result<()> + 'a;

/// A model, or a part of one, that knows where its batch norms are.
///
/// [`batch_norms!`](crate::batch_norms) implements it for a struct. A generic struct or an enum does by hand:
///
/// ```
/// use candle_norm::sync_batch_norm::{join, BatchNorms, Visit};
///
/// struct Residual<T> { inner: T }
///
/// impl<T: BatchNorms> BatchNorms for Residual<T> {
///     fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> candle_core::Result<()> {
///         self.inner.each_batch_norm(&join(path, "inner"), visit)
///     }
/// }
/// ```
pub trait BatchNorms {
    /// Calls `visit` with every batch norm below `path`, in the same order every time.
    ///
    /// # Errors
    /// The first error of `visit`.
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()>;
}

/// The path of a part: `layer1.0` and `bn1` make `layer1.0.bn1`.
pub fn join(path: &str, part: impl fmt::Display) -> String {
    if path.is_empty() {
        part.to_string()
    } else {
        format!("{path}.{part}")
    }
}

/// Names the fields of a struct that are or hold batch norms: implements [`BatchNorms`] for it.
///
/// The fields may be batch norms, structs with a line of their own, and `Vec`, `Option`, `Box`, arrays,
/// slices and tuples of these.
///
/// ```
/// use candle_norm::{batch_norms, BatchNorm};
///
/// struct BasicBlock { conv1: candle_nn::Conv2d, bn1: BatchNorm, downsample: Option<(candle_nn::Conv2d, BatchNorm)> }
/// batch_norms!(BasicBlock { bn1, downsample });
///
/// struct Stages { layers: [Vec<BasicBlock>; 4], neck: Box<BasicBlock> }
/// batch_norms!(Stages { layers, neck });
/// ```
#[macro_export]
macro_rules! batch_norms {
    ($name:ty { $($field:tt),* $(,)? }) => {
        impl $crate::BatchNorms for $name {
            fn each_batch_norm(
                &mut self,
                path: &str,
                visit: &mut $crate::sync_batch_norm::Visit,
            ) -> $crate::sync_batch_norm::Outcome {
                $(
                    let part = $crate::sync_batch_norm::join(path, stringify!($field));
                    $crate::BatchNorms::each_batch_norm(&mut self.$field, &part, visit)?;
                )*
                Ok(())
            }
        }
    };
}

/// What [`BatchNorms::each_batch_norm`] returns, for crates that do not name candle-core themselves.
pub type Outcome = Result<()>;

impl BatchNorms for BatchNorm {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        visit(path, self)
    }
}

impl BatchNorms for SyncBatchNorm {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        visit(path, self)
    }
}

impl<T: BatchNorms + ?Sized> BatchNorms for Box<T> {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        (**self).each_batch_norm(path, visit)
    }
}

impl<T: BatchNorms + ?Sized> BatchNorms for &mut T {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        (**self).each_batch_norm(path, visit)
    }
}

impl<T: BatchNorms> BatchNorms for Option<T> {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        self.iter_mut().try_for_each(|part| part.each_batch_norm(path, visit))
    }
}

impl<T: BatchNorms> BatchNorms for [T] {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        self.iter_mut().enumerate().try_for_each(|(i, part)| part.each_batch_norm(&join(path, i), visit))
    }
}

impl<T: BatchNorms, const N: usize> BatchNorms for [T; N] {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        self.as_mut_slice().each_batch_norm(path, visit)
    }
}

impl<T: BatchNorms> BatchNorms for Vec<T> {
    fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
        self.as_mut_slice().each_batch_norm(path, visit)
    }
}

/// Layers without batch norms, so that tuples and generic containers of them can be visited.
macro_rules! none {
    ($($layer:ty),* $(,)?) => {
        $(impl BatchNorms for $layer {
            fn each_batch_norm(&mut self, _: &str, _: &mut Visit) -> Result<()> {
                Ok(())
            }
        })*
    };
}

none!(
    candle_nn::Linear,
    candle_nn::Conv1d,
    candle_nn::Conv2d,
    candle_nn::ConvTranspose1d,
    candle_nn::ConvTranspose2d,
    candle_nn::Embedding,
    candle_nn::Dropout,
    candle_nn::Activation,
    Tensor,
);

macro_rules! tuples {
    ($($($part:ident $i:tt),+;)*) => {
        $(impl<$($part: BatchNorms),+> BatchNorms for ($($part,)+) {
            fn each_batch_norm(&mut self, path: &str, visit: &mut Visit) -> Result<()> {
                $(self.$i.each_batch_norm(&join(path, $i), visit)?;)+
                Ok(())
            }
        })*
    };
}

tuples! {
    A 0;
    A 0, B 1;
    A 0, B 1, C 2;
    A 0, B 1, C 2, D 3;
}
