//! What has run in this process: walks and loops, by level and element type.

use crate::cpu::element::Element;
use std::collections::BTreeSet;
use std::sync::Mutex;

static RAN: Mutex<BTreeSet<(&str, &str, String)>> = Mutex::new(BTreeSet::new());

pub(in crate::cpu) fn note<T: Element>(level: &'static str, what: &str) {
    let mut ran = RAN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    ran.insert((level, T::DTYPE.as_str(), what.to_string()));
}

pub(super) fn has<T: Element>(level: &'static str, what: &str) -> bool {
    let ran = RAN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    ran.contains(&(level, T::DTYPE.as_str(), what.to_string()))
}
