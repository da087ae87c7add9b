//! The ways through a tile, each forward and backward.

mod columns;
mod rows;
mod runs;
mod sets;
mod spans;

use super::kernel::{Backward, Forward, Partial, PartialSums};
use super::loops::Walked;
use super::plan::Walk;

/// Tells the tests that a walk runs.
macro_rules! note {
    ($loops:expr, $pass:literal, $walk:expr) => {
        #[cfg(test)]
        super::tests::ran::note::<T>($loops.level, &format!(concat!($pass, " {:?}"), $walk));
    };
}

pub(super) fn forward<T: Walked>(walk: Walk, kernel: Forward<T>) {
    note!(kernel.loops, "forward", walk);
    match walk {
        Walk::Runs => runs::forward(kernel),
        Walk::Sets => sets::forward(kernel),
        Walk::Rows => rows::forward(kernel),
        Walk::Columns => columns::forward(kernel),
    }
}

pub(super) fn backward<T: Walked>(walk: Walk, kernel: Backward<T>) {
    note!(kernel.input.loops, "backward", walk);
    match walk {
        Walk::Runs => runs::backward(kernel),
        Walk::Sets => sets::backward(kernel),
        Walk::Rows => rows::backward(kernel),
        Walk::Columns => columns::backward(kernel),
    }
}

pub(super) fn moments<T: Walked>(walk: Walk, kernel: Partial<T>) {
    note!(kernel.loops, "moments", walk);
    match walk {
        Walk::Columns => columns::moments(kernel),
        _ => sets::moments(kernel),
    }
}

pub(super) fn sums<T: Walked>(walk: Walk, kernel: PartialSums<T>) {
    note!(kernel.input.loops, "sums", walk);
    match walk {
        Walk::Columns => columns::sums(kernel),
        _ => sets::sums(kernel),
    }
}
