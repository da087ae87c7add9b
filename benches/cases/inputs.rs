//! Seeded random inputs of a row, the same in every process that asks for them.

use super::Row;
use candle_core::{Device, Result, Tensor, Var};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Arguments of a norm. None is constant, and none has mean 0 or standard deviation 1: an op that
/// skipped part of its work would be seen.
pub struct Inputs {
    pub x: Var,
    pub weight: Var,
    pub bias: Option<Var>,
    /// Residual, skip or gate.
    pub other: Option<Var>,
    /// Gradient of the output.
    pub dy: Tensor,
    pub running_mean: Var,
    pub running_var: Var,
}

impl Inputs {
    pub fn new(row: &Row) -> Result<Self> {
        let mut random = Random::new(0x5eed ^ row.elements() as u64);
        let params = row.params();
        let x = random.tensor(row.case.shape, 0.25, 1.5)?.to_dtype(row.dtype)?;
        let dy = random.tensor(row.case.shape, 0.1, 0.8)?.to_dtype(row.dtype)?;
        let weight = random.tensor(&params, 1.0, 0.2)?.to_dtype(row.param_dtype())?;
        let bias = random.tensor(&params, 0.1, 0.3)?.to_dtype(row.param_dtype())?;
        let other = random.tensor(row.case.shape, -0.2, 1.2)?.to_dtype(row.dtype)?;
        let running_mean = random.tensor(&params, 0.2, 0.1)?;
        let running_var = random.tensor(&params, 2.0, 0.2)?;
        Ok(Self {
            x: Var::from_tensor(&x)?,
            weight: Var::from_tensor(&weight)?,
            bias: row.case.norm.has_bias().then(|| Var::from_tensor(&bias)).transpose()?,
            other: row.case.norm.has_other().then(|| Var::from_tensor(&other)).transpose()?,
            dy,
            running_mean: Var::from_tensor(&running_mean)?,
            running_var: Var::from_tensor(&running_var)?,
        })
    }

    /// The same values in memory of their own, on a device.
    pub fn copied(&self, device: &Device) -> Result<Self> {
        // `to_device` to where a tensor is gives it back as it is.
        let tensor = |t: &Tensor| t.detach().copy()?.to_device(device);
        let var = |t: &Var| Var::from_tensor(&tensor(t)?);
        Ok(Self {
            x: var(&self.x)?,
            weight: var(&self.weight)?,
            bias: self.bias.as_ref().map(var).transpose()?,
            other: self.other.as_ref().map(var).transpose()?,
            dy: tensor(&self.dy)?,
            running_mean: var(&self.running_mean)?,
            running_var: var(&self.running_var)?,
        })
    }

    /// The arguments that have a gradient, by name.
    pub fn tracked(&self) -> Vec<(&'static str, &Var)> {
        let mut tracked = vec![("x", &self.x), ("weight", &self.weight)];
        tracked.extend(self.bias.as_ref().map(|bias| ("bias", bias)));
        tracked.extend(self.other.as_ref().map(|other| ("other", other)));
        tracked
    }
}

pub struct Random(SmallRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// Roughly normal values: the sum of three uniform ones has their mean and standard deviation.
    pub fn tensor(&mut self, shape: &[usize], mean: f32, std: f32) -> Result<Tensor> {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n)
            .map(|_| {
                let sum: f32 = (0..3).map(|_| self.0.random::<f32>()).sum();
                mean + std * 2.0 * (sum - 1.5)
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}
