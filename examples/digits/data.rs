//! The handwritten digits of this folder.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};

/// Images `[N, 1, 8, 8]` between 0 and 1, and labels `[N]`.
pub struct Digits {
    pub images: Tensor,
    pub labels: Tensor,
}

impl Digits {
    /// All images, shuffled and split: four fifths to train, one to test.
    pub fn load(seed: u64) -> Result<(Self, Self)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits/digits.safetensors");
        let file = candle_core::safetensors::load(path, &Device::Cpu)?;
        let images = (file["images"].to_dtype(DType::F32)? / 16.)?.unsqueeze(1)?;
        let all = Self { images, labels: file["labels"].to_dtype(DType::U32)? };
        let mut order: Vec<u32> = (0..all.len()? as u32).collect();
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let (test, train) = order.split_at(order.len() / 5);
        Ok((all.select(train)?, all.select(test)?))
    }

    pub fn len(&self) -> Result<usize> {
        Ok(self.labels.dim(0)?)
    }

    pub fn select(&self, which: &[u32]) -> Result<Self> {
        let which = Tensor::new(which, &Device::Cpu)?;
        let (images, labels) = (self.images.index_select(&which, 0)?, self.labels.index_select(&which, 0)?);
        Ok(Self { images, labels })
    }
}
