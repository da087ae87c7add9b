//! Quantized weights without a file: a GGUF in memory, from the same seeds.

use crate::run::weights;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{bail, Device, Result, Shape, Tensor};
use candle_nn::Init;
use std::io::Cursor;

#[derive(Default)]
pub struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
}

impl Gguf {
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_string(), value));
        self
    }

    /// Where a block of 32 fits a row, 8 or 4 bits; f32 otherwise, and for vectors, as llama.cpp writes them.
    pub fn tensor(mut self, name: &str, shape: impl Into<Shape>) -> Result<Self> {
        self.add(name, &shape.into())?;
        Ok(self)
    }

    fn add(&mut self, name: &str, shape: &Shape) -> Result<()> {
        let value = Tensor::from_vec(weights(name, shape, Init::Const(0.0)), shape, &Device::Cpu)?;
        let dtype = match shape.dims() {
            [_, .., row] if row % 32 == 0 && name.len() % 2 == 0 => GgmlDType::Q4_0,
            [_, .., row] if row % 32 == 0 => GgmlDType::Q8_0,
            _ => GgmlDType::F32,
        };
        self.tensors.retain(|(known, _)| known != name);
        self.tensors.push((name.to_string(), QTensor::quantize(&value, dtype)?));
        Ok(())
    }

    pub fn bytes(&self) -> Result<Vec<u8>> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut bytes = Cursor::new(vec![]);
        gguf_file::write(&mut bytes, &metadata, &tensors)?;
        Ok(bytes.into_inner())
    }
}

/// Builds what reads a GGUF by names and shapes that it knows: whatever it misses in `file` is added.
pub fn discover<T>(mut file: Gguf, build: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
    let mut asked = String::new();
    for _ in 0..10_000 {
        let error = match build(&file.bytes()?) {
            Ok(built) => return Ok(built),
            Err(error) => error.to_string(),
        };
        let line = error.lines().next().unwrap_or_default();
        if let Some((_, name)) = line.split_once("cannot find tensor ") {
            asked = name.trim().to_string();
            file.add(&asked, &Shape::from(1))?;
        } else if let Some((_, shape)) = line.split_once("expected [") {
            let dims: Option<Vec<usize>> =
                shape.trim_end_matches(']').split(',').map(|d| d.trim().parse().ok()).collect();
            match dims {
                Some(dims) => file.add(&asked, &Shape::from(dims))?,
                None => bail!("{asked}: cannot read a shape in: {line}"),
            }
        } else {
            bail!("{line}")
        }
    }
    bail!("{asked} is asked for again and again")
}
