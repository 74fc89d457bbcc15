//! The descriptors of this process, counted around each test.
//!
//! They belong to the process and not to a test, so the tests of one binary take turns: who counts holds a lock until
//! its test is over. Each test begins with `let _descriptors = Descriptors::counted();`, so that everything it makes is
//! dropped before they are counted again; `tests/descriptors.rs` looks that none forgets it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads that a test has left behind may let go of theirs a moment later.
const DEADLINE: Duration = Duration::from_secs(10);

static TURN: Mutex<()> = Mutex::new(());

/// Asserts, when it is dropped, that no descriptor is open that was not when it was made.
pub(crate) struct Descriptors {
    before: BTreeMap<u32, PathBuf>,
    _turn: MutexGuard<'static, ()>,
}

impl Descriptors {
    pub(crate) fn counted() -> Self {
        // A test that has failed before is no reason for this one to fail.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { before: open(), _turn: turn }
    }

    /// # Panics
    /// If there are more of them.
    pub(crate) fn check(&self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.more().is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(self.more().is_empty(), "these descriptors have leaked: {:?}", self.more());
    }

    /// Those that were not open in the beginning, or not for the same.
    pub(crate) fn more(&self) -> BTreeMap<u32, PathBuf> {
        let mut now = open();
        now.retain(|number, target| self.before.get(number) != Some(target));
        now
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}

/// Each number with what it is open for, but for the listing itself, which is closed by the time its link is read.
fn open() -> BTreeMap<u32, PathBuf> {
    let listing = fs::read_dir("/proc/self/fd").unwrap();
    let paths: Vec<_> = listing.map(|entry| entry.unwrap().path()).collect();
    let numbers = paths.into_iter().filter_map(|path| {
        let target = fs::read_link(&path).ok()?;
        Some((path.file_name()?.to_str()?.parse().ok()?, target))
    });
    numbers.collect()
}
