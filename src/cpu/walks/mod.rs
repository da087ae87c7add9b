//! The ways through a tile, each forward and backward.

mod columns;
mod rows;
mod runs;
mod sets;
mod spans;

use super::loops::Walked;
use super::plan::Walk;
use super::walk_args::{BackwardArgs, ForwardArgs, MomentsArgs, SumsArgs};

/// Tells the tests that a walk runs.
macro_rules! note {
    ($loops:expr, $pass:literal, $walk:expr) => {
        #[cfg(test)]
        super::tests::ran::note::<T>($loops.level, &format!(concat!($pass, " {:?}"), $walk));
    };
}

pub(super) fn forward<T: Walked>(walk: Walk, args: ForwardArgs<T>) {
    note!(args.loops, "forward", walk);
    match walk {
        Walk::Runs => runs::forward(args),
        Walk::Sets => sets::forward(args),
        Walk::Rows => rows::forward(args),
        Walk::Columns => columns::forward(args),
    }
}

pub(super) fn backward<T: Walked>(walk: Walk, args: BackwardArgs<T>) {
    note!(args.input.loops, "backward", walk);
    match walk {
        Walk::Runs => runs::backward(args),
        Walk::Sets => sets::backward(args),
        Walk::Rows => rows::backward(args),
        Walk::Columns => columns::backward(args),
    }
}

pub(super) fn moments<T: Walked>(walk: Walk, args: MomentsArgs<T>) {
    note!(args.loops, "moments", walk);
    match walk {
        Walk::Columns => columns::moments(args),
        Walk::Runs | Walk::Sets | Walk::Rows => sets::moments(args),
    }
}

pub(super) fn sums<T: Walked>(walk: Walk, args: SumsArgs<T>) {
    note!(args.input.loops, "sums", walk);
    match walk {
        Walk::Columns => columns::sums(args),
        Walk::Runs | Walk::Sets | Walk::Rows => sets::sums(args),
    }
}
