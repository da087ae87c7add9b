//! What is measured: shapes that real models have, and the norms over them in both crates.
//!
//! Apart, because `cargo bench` and the comparison with PyTorch measure the same rows, in the same way.

pub mod contenders;
pub mod copy;
pub mod device;
pub mod fused;
pub mod generated;
pub mod inputs;
pub mod memory;
pub mod rounds;

use candle_core::DType;
use std::fmt;

/// A norm as a row names it. `BatchNormEval` normalizes with its running statistics.
#[allow(clippy::enum_variant_names)] // the norms' names
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    BatchNorm,
    BatchNormEval,
    GroupNorm { groups: usize },
    InstanceNorm,
    LayerNorm,
    RmsNorm,
    // With what stands around it.
    AddLayerNorm,
    AddRmsNorm,
    GroupNormSilu { groups: usize },
    GroupNormGelu { groups: usize },
    BatchNormSkipRelu,
    ModulatedLayerNorm,
    LayerNorm2d,
    GatedRmsNorm,
}

impl Norm {
    /// Whether more than a norm is in the row: those are called by `fused.rs`.
    pub fn is_fused(self) -> bool {
        use Norm::*;
        !matches!(self, BatchNorm | BatchNormEval | GroupNorm { .. } | InstanceNorm | LayerNorm | RmsNorm)
    }

    fn over_rows(self) -> bool {
        use Norm::*;
        matches!(self, LayerNorm | RmsNorm | AddLayerNorm | AddRmsNorm | ModulatedLayerNorm | GatedRmsNorm)
    }

    /// Shape of weight and bias for an input of this shape; a modulation has them for each sample.
    pub fn params(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Norm::ModulatedLayerNorm => vec![shape[0], 1, shape[2]],
            _ if self.over_rows() => vec![shape[shape.len() - 1]],
            _ => vec![shape[1]],
        }
    }

    pub fn groups(self) -> Option<usize> {
        match self {
            Norm::GroupNorm { groups } | Norm::GroupNormSilu { groups } | Norm::GroupNormGelu { groups } => {
                Some(groups)
            }
            _ => None,
        }
    }

    /// Elements that share a mean and a variance; for evaluation, none do.
    pub fn set_len(self, shape: &[usize]) -> usize {
        let elements: usize = shape.iter().product();
        if let Some(groups) = self.groups() {
            return elements / shape[0] / groups;
        }
        match self {
            Norm::BatchNorm | Norm::BatchNormSkipRelu => elements / shape[1],
            Norm::BatchNormEval => 1,
            Norm::InstanceNorm => elements / shape[0] / shape[1],
            Norm::LayerNorm2d => shape[1],
            _ => shape[shape.len() - 1],
        }
    }

    pub fn has_bias(self) -> bool {
        !matches!(self, Norm::RmsNorm | Norm::AddRmsNorm | Norm::GatedRmsNorm)
    }

    /// Whether a tensor of x's shape stands beside it: residual, skip or gate.
    pub fn has_other(self) -> bool {
        self.outputs() == 2 || matches!(self, Norm::BatchNormSkipRelu | Norm::GatedRmsNorm)
    }

    /// The sum is an output of its own.
    pub fn outputs(self) -> usize {
        if matches!(self, Norm::AddLayerNorm | Norm::AddRmsNorm) {
            2
        } else {
            1
        }
    }

    /// Tensors of x's size that must be read or written, by the forward and by the backward.
    pub fn tensors(self) -> [usize; 2] {
        match self {
            // x, residual; y, sum. The sum, two gradients; one for both arguments.
            Norm::AddLayerNorm | Norm::AddRmsNorm => [4, 4],
            // x, the other; y. Both, dy; a gradient for each.
            Norm::BatchNormSkipRelu | Norm::GatedRmsNorm => [3, 5],
            // x; y. x, dy; dx.
            _ => PLAIN,
        }
    }

    /// What is read and written besides the norm's own, by a forward or by a forward and its backward.
    pub fn further_tensors(self, backward: bool) -> usize {
        let of = |[forward, back]: [usize; 2]| if backward { forward + back } else { forward };
        of(self.tensors()) - of(PLAIN)
    }
}

/// A norm's own tensors of x's size.
const PLAIN: [usize; 2] = [2, 3];

/// A row with more than a norm may take so many times what the norm takes, and a copy for each further tensor: the
/// forward, and the forward with its backward.
pub const LIMITS: [f64; 2] = [1.15, 1.3];
/// And must be so many times as fast as candle's composition.
pub const BESIDE_CANDLE: f64 = 3.0;

impl fmt::Display for Norm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Norm::BatchNorm => "BatchNorm",
            Norm::BatchNormEval => "BatchNorm eval",
            Norm::GroupNorm { .. } => "GroupNorm",
            Norm::InstanceNorm => "InstanceNorm",
            Norm::LayerNorm => "LayerNorm",
            Norm::RmsNorm => "RMSNorm",
            Norm::AddLayerNorm => "add+LayerNorm",
            Norm::AddRmsNorm => "add+RMSNorm",
            Norm::GroupNormSilu { .. } => "GroupNorm+SiLU",
            Norm::GroupNormGelu { .. } => "GroupNorm+GELU",
            Norm::BatchNormSkipRelu => "BatchNorm+skip+ReLU",
            Norm::ModulatedLayerNorm => "LayerNorm+modulation",
            Norm::LayerNorm2d => "LayerNorm2d",
            Norm::GatedRmsNorm => "gated RMSNorm",
        })
    }
}

/// A norm over one shape, and the model that has it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub norm: Norm,
    pub shape: &'static [usize],
    pub model: &'static str,
}

const fn case(norm: Norm, shape: &'static [usize], model: &'static str) -> Case {
    Case { norm, shape, model }
}

const GROUPS: Norm = Norm::GroupNorm { groups: 32 };
const GROUPS_SILU: Norm = Norm::GroupNormSilu { groups: 32 };

/// The small rows, of 512 elements, take microseconds: there allocation and dispatch rule.
pub const CASES: &[Case] = &[
    case(Norm::BatchNorm, &[32, 64, 56, 56], "ResNet-50, stage 1"),
    case(Norm::BatchNorm, &[8, 256, 28, 28], "ResNet-50, stage 3"),
    case(Norm::BatchNorm, &[32, 2048, 7, 7], "ResNet-50, last stage"),
    case(Norm::BatchNorm, &[64, 3, 32, 32], "CIFAR images"),
    case(Norm::BatchNorm, &[4, 8, 4, 4], "small"),
    case(Norm::BatchNormEval, &[32, 64, 56, 56], "ResNet-50, stage 1"),
    case(Norm::BatchNormEval, &[8, 256, 28, 28], "ResNet-50, stage 3"),
    case(Norm::BatchNormEval, &[64, 3, 32, 32], "CIFAR images"),
    case(GROUPS, &[8, 320, 32, 32], "Stable Diffusion UNet"),
    case(GROUPS, &[2, 512, 64, 64], "Stable Diffusion VAE"),
    case(GROUPS, &[2, 1280, 8, 8], "Stable Diffusion UNet, middle"),
    case(GROUPS, &[1, 32, 4, 4], "small"),
    case(Norm::InstanceNorm, &[8, 64, 128, 128], "style transfer"),
    case(Norm::InstanceNorm, &[32, 64, 56, 56], "style transfer"),
    case(Norm::InstanceNorm, &[2, 4, 8, 8], "small"),
    case(Norm::LayerNorm, &[4096, 768], "BERT base, 8 x 512 tokens"),
    case(Norm::LayerNorm, &[8, 197, 768], "ViT-B/16, 8 images"),
    case(Norm::LayerNorm, &[2048, 4096], "width of a 7B model"),
    case(Norm::LayerNorm, &[65536, 128], "Swin, stage 1"),
    case(Norm::LayerNorm, &[4, 128], "small"),
    case(Norm::RmsNorm, &[2048, 4096], "Llama 7B, 2048 tokens"),
    case(Norm::RmsNorm, &[512, 2048], "Llama 3.2 1B, 512 tokens"),
    case(Norm::RmsNorm, &[1, 4096], "Llama 7B, one token"),
    case(Norm::RmsNorm, &[4, 128], "small"),
    case(Norm::AddLayerNorm, &[4096, 4096], "width of a 7B model, 4096 tokens"),
    case(Norm::AddLayerNorm, &[512, 4096], "width of a 7B model, 512 tokens"),
    case(Norm::AddRmsNorm, &[4096, 4096], "Llama 7B, 4096 tokens"),
    case(Norm::AddRmsNorm, &[512, 4096], "Llama 7B, 512 tokens"),
    case(GROUPS_SILU, &[2, 320, 64, 64], "Stable Diffusion UNet"),
    case(GROUPS_SILU, &[2, 512, 64, 64], "Stable Diffusion VAE"),
    case(Norm::GroupNormGelu { groups: 512 }, &[1, 512, 12_799], "wav2vec 2.0, 4 seconds of speech"),
    case(Norm::BatchNormSkipRelu, &[32, 256, 28, 28], "ResNet-50, stage 3"),
    case(Norm::ModulatedLayerNorm, &[2, 1024, 1152], "DiT-XL, 1024 tokens"),
    case(Norm::LayerNorm2d, &[2, 256, 64, 64], "SAM, neck"),
    case(Norm::GatedRmsNorm, &[512, 4096], "Mamba 2"),
];

/// A case in one dtype of x. Parameters have x's dtype, but batch norm's, which are f32 as its
/// running statistics are.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub case: Case,
    pub dtype: DType,
}

impl Row {
    /// Every case in f32, then in bf16; or as many as `CANDLE_NORM_BENCH_GENERATED` says, made at random.
    pub fn all() -> impl Iterator<Item = Row> {
        let cases = generated::asked_for().unwrap_or(CASES);
        cases.iter().flat_map(|&case| [DType::F32, DType::BF16].map(|dtype| Row { case, dtype }))
    }

    pub fn param_dtype(&self) -> DType {
        match self.case.norm {
            Norm::BatchNorm | Norm::BatchNormEval | Norm::BatchNormSkipRelu => DType::F32,
            _ => self.dtype,
        }
    }

    pub fn elements(&self) -> usize {
        self.case.shape.iter().product()
    }

    pub fn params(&self) -> Vec<usize> {
        self.case.norm.params(self.case.shape)
    }

    /// Bytes that candle-norm may hold after the forward: its outputs, and three f32 values of each set.
    pub fn kept(&self) -> usize {
        let sets = self.elements() / self.case.norm.set_len(self.case.shape);
        self.case.norm.outputs() * self.bytes() + 3 * 4 * sets
    }

    /// Bytes of x.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size_in_bytes()
    }

    /// `32x64x56x56`.
    pub fn shape(&self) -> String {
        self.case.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    }

    /// Bound of the relative L2 error of any output or gradient against f32 arithmetic on the same
    /// inputs.
    ///
    /// A rounding moves an element by half an ulp, `epsilon / 2`. There is one; where the sum is an output,
    /// it is rounded before it is normalized, and its two gradients are added. An f32 sum of n terms drifts
    /// like a random walk of n roundings, by `sqrt(n)` of them; n is the longer of the two sums behind a
    /// gradient, over a set and over everything that shares a weight. At ReLU's corner a gradient is all or
    /// nothing: of normal values, a part of 2^-20 lies so close to it that either is right.
    pub fn tolerance(&self) -> f64 {
        let epsilon = if self.dtype == DType::BF16 { 2f64.powi(-7) } else { 2f64.powi(-23) };
        let roundings = if self.case.norm.outputs() == 2 { 3.0 } else { 1.0 };
        let shared = self.elements() / self.params().iter().product::<usize>();
        let n = shared.max(self.case.norm.set_len(self.case.shape)) as f64;
        let corner = if self.case.norm == Norm::BatchNormSkipRelu { 2f64.powi(-10) } else { 0.0 };
        roundings * epsilon / 2.0 + n.sqrt() * 2f64.powi(-24) * 4.0 + corner
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.case.norm, self.shape(), self.dtype.as_str())
    }
}
