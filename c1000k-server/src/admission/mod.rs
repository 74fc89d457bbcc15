//! Who is admitted.

mod cost;
pub(crate) mod memory;
pub(crate) mod per_source;
