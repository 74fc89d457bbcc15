//! What a person reads while a run goes on.

use std::fmt::Display;
use std::io::{self, Write};

/// A line on standard output; that no one reads it any more does not end a run.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}
