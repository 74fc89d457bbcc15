//! Counts by reason.

use std::collections::BTreeMap;

pub(crate) type Counts = BTreeMap<&'static str, u64>;

pub(crate) fn add_each(counts: &mut Counts, more: &Counts) {
    for (&reason, &count) in more {
        *counts.entry(reason).or_default() += count;
    }
}

/// As a record has them.
pub(crate) fn by_name(counts: &Counts) -> BTreeMap<String, u64> {
    counts.iter().map(|(&reason, &count)| (reason.to_owned(), count)).collect()
}
