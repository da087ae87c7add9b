//! A time by which something has to be done.
//!
//! Apart, because every engine waits: a timeout that is counted anew at each step of a call would bound
//! none of them.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

/// Never, where it lies beyond what the clock can tell.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Option<Instant>);

/// Longer than any program runs, and short enough for every operating system's timers.
const AGES: Duration = Duration::from_secs(1 << 30);

impl Deadline {
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now().checked_add(timeout))
    }

    /// The time that is left, none when there is none.
    pub fn left(&self) -> Option<Duration> {
        let Some(end) = self.0 else { return Some(AGES) };
        let left = end.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left.min(AGES))
    }

    pub fn is_over(&self) -> bool {
        self.left().is_none()
    }

    /// As the timeout of a socket, which knows no zero.
    pub fn for_socket(&self) -> std::io::Result<Option<Duration>> {
        self.left().map(Some).ok_or_else(|| ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_timeout_is_none() {
        let never = Deadline::after(Duration::MAX);
        assert_eq!((never.left(), never.is_over()), (Some(AGES), false));
        let now = Deadline::after(Duration::ZERO);
        assert!(now.is_over() && now.for_socket().unwrap_err().kind() == ErrorKind::TimedOut);
    }
}
