//! Counts by reason.

use std::collections::BTreeMap;

pub(crate) type Counts = BTreeMap<&'static str, u64>;

pub(crate) fn add_each(counts: &mut Counts, more: &Counts) {
    for (&reason, &count) in more {
        *counts.entry(reason).or_default() += count;
    }
}
