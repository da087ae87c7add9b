//! Who is in which part of a group that is split.
//!
//! Apart from the engines, which make the parts each in its own way, because all of them first have to
//! agree who is in which.

use super::ProcessGroup;
use candle_core::{bail, Device, Result, Tensor};

/// This rank's part.
pub(super) struct Part {
    /// This rank in it.
    pub rank: usize,
    /// Its members by their ranks in the whole, in order.
    pub members: Vec<usize>,
}

/// One collective: every rank says its color and hears the others'.
pub(super) fn colors(group: &(impl ProcessGroup + ?Sized), color: usize) -> Result<Part> {
    let Ok(number) = i64::try_from(color) else {
        bail!("process-group: split by color {color}, expected one below 2^63")
    };
    let colors = group.all_gather("colors of a split", &Tensor::new(&[number], &Device::Cpu)?)?;
    let colors = colors.flatten_all()?.to_vec1::<i64>()?;
    let members: Vec<usize> = (0..colors.len()).filter(|rank| colors[*rank] == number).collect();
    match members.iter().position(|rank| *rank == group.rank()) {
        Some(rank) => Ok(Part { rank, members }),
        None => bail!("process-group: a split lost the color of rank {}", group.rank()),
    }
}
