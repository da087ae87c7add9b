//! Where the rows run, and how calls on a GPU are timed: with feature `cuda` the first GPU, if there is one.
//!
//! Kept separate, because calls on a device are enqueued. A block of them is timed, between two
//! synchronizations. They walk over as many inputs, and keep as many outputs, as fill the L2 cache four times:
//! what a norm reads in a model was not written just now either. In small rows the host is slower than the
//! device, and the time is the host's. With feature `cuda-emulation` the same is done on the CPU, to try it.

use super::rounds::{self, Rounds, Settings};
use anyhow::{bail, Result};
use candle_core::{Device, Tensor};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// More than any L2 cache of a GPU has today, twice: 4 times the 50 MB of an H100.
const COLD: usize = 200 << 20;
/// Small rows stay in the cache: as many inputs as this fill no more of the memory than need be.
const MOST_SLOTS: usize = 64;

#[derive(Clone)]
pub struct Place {
    pub device: Device,
    pub name: &'static str,
}

impl Place {
    pub fn find(test: bool) -> Result<Self> {
        if cfg!(feature = "cuda-emulation") {
            if !test {
                bail!("the emulated kernels are there to be tested, not timed: only with --test")
            }
            return Ok(Self { device: Device::Cpu, name: "the emulated kernels" });
        }
        if cfg!(feature = "cuda") {
            match Device::new_cuda(0) {
                Ok(device) => {
                    // Blocks end with a synchronization, which would give the memory back.
                    #[cfg(feature = "cuda")]
                    candle_norm::cuda::keep_memory(&device, u64::MAX)?;
                    return Ok(Self { device, name: "a GPU" });
                }
                Err(error) => eprintln!("on the CPU, for want of a GPU: {error}"),
            }
        }
        Ok(Self { device: Device::Cpu, name: "the CPU" })
    }

    /// Whether calls are timed as a device's.
    pub fn is_device(&self) -> bool {
        self.device.is_cuda() || cfg!(feature = "cuda-emulation")
    }

    /// Inputs to walk over that take `bytes` each.
    pub fn slots(&self, bytes: usize) -> usize {
        match self.device.is_cuda() {
            true => COLD.div_ceil(bytes).clamp(2, MOST_SLOTS),
            false => 2,
        }
    }
}

/// Makes call number i, and returns what it wrote.
pub type Call<'a> = Box<dyn Fn(usize) -> Result<Vec<Tensor>> + 'a>;

pub struct Contender<'a> {
    name: &'static str,
    call: Call<'a>,
    /// What the last calls wrote: the next one writes elsewhere. Kept from block to block, so that memory goes
    /// round and none is given back when the device is synchronized.
    kept: VecDeque<Vec<Tensor>>,
}

impl<'a> Contender<'a> {
    pub fn new(name: &'static str, call: Call<'a>) -> Self {
        Self { name, call, kept: VecDeque::new() }
    }

    /// Nanoseconds a call, of `calls` one behind the other.
    fn block(&mut self, device: &Device, slots: usize, calls: usize) -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for i in 0..calls {
            if self.kept.len() == slots {
                self.kept.pop_front();
            }
            self.kept.push_back((self.call)(i)?);
        }
        device.synchronize()?;
        Ok(start.elapsed().as_nanos() as f64 / calls as f64)
    }
}

/// Runs the rounds. In each, the order is another.
pub fn measure(
    place: &Place,
    slots: usize,
    contenders: &mut [Contender],
    settings: Settings,
) -> Result<Rounds> {
    let mut rounds = Rounds::of(contenders.iter().map(|contender| contender.name));
    let mut calls = vec![];
    for contender in contenders.iter_mut() {
        // Kernels are loaded, and every slot is written once.
        contender.block(&place.device, slots, slots)?;
        let once = Duration::from_nanos(contender.block(&place.device, slots, 2)? as u64 + 1);
        calls.push((settings.block.as_nanos() / once.as_nanos()).clamp(2, 2000) as usize);
    }
    for round in 0..settings.rounds {
        for i in rounds::order(contenders.len(), round) {
            rounds.push(i, contenders[i].block(&place.device, slots, calls[i])?);
        }
    }
    Ok(rounds)
}
