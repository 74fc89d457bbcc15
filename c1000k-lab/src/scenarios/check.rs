//! Comparisons of counters with expected values.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Result;

/// The expected value of a counter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Must {
    Equal(u64),
    BeAtLeast(u64),
    BeAtMost(u64),
    Exceed(u64),
}

use crate::print_line;
use Must::{BeAtLeast, BeAtMost, Equal, Exceed};

impl Must {
    /// Returns whether it holds, and its description.
    fn holds(self, found: u64) -> (bool, String) {
        match self {
            Equal(expected) => (found == expected, format!("== {expected}")),
            BeAtLeast(expected) => (found >= expected, format!(">= {expected}")),
            BeAtMost(expected) => (found <= expected, format!("<= {expected}")),
            Exceed(expected) => (found > expected, format!("> {expected}")),
        }
    }
}

/// The comparisons of a scenario, which go to `checks.txt`.
#[derive(Debug)]
pub(super) struct Checks {
    file: File,
    pub(super) all_hold: bool,
}

impl Checks {
    pub(super) fn create(out: &Path) -> Result<Self> {
        Ok(Self { file: File::create(out.join("checks.txt"))?, all_hold: true })
    }

    pub(super) fn expect(&mut self, what: &str, found: u64, must: Must) -> Result<()> {
        let (holds, must) = must.holds(found);
        self.note(holds, &format!("{what}: {found} (must be {must})"))
    }

    /// Records that the scenario failed before its checks.
    pub(super) fn fail(&mut self, why: &str) -> Result<()> {
        self.note(false, why)
    }

    fn note(&mut self, holds: bool, what: &str) -> Result<()> {
        self.all_hold &= holds;
        let line = format!("{}  {what}", if holds { "holds" } else { "FAILS" });
        print_line(&line);
        Ok(writeln!(self.file, "{line}")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_comparison_is_recorded_and_a_failure_persists() {
        let folder = tempfile::tempdir().unwrap();
        let mut checks = Checks::create(folder.path()).unwrap();
        checks.expect("lost", 0, Equal(0)).unwrap();
        checks.expect("held", 5, BeAtLeast(5)).unwrap();
        checks.expect("held", 5, BeAtMost(5)).unwrap();
        assert!(checks.all_hold);
        checks.expect("held", 5, Exceed(5)).unwrap();
        checks.expect("lost", 0, Equal(0)).unwrap();
        assert!(!checks.all_hold);
        let text = std::fs::read_to_string(folder.path().join("checks.txt")).unwrap();
        assert!(text.starts_with("holds  lost: 0 (must be == 0)\n"), "{text}");
        assert!(text.contains("FAILS  held: 5 (must be > 5)\n"), "{text}");
        assert!(!Equal(1).holds(0).0 && !BeAtLeast(1).holds(0).0 && !BeAtMost(1).holds(2).0);
    }
}
