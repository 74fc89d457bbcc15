//! The descriptors of this process, counted around each test.
//!
//! Descriptors belong to the process, so the tests of one binary run one after another: each holds a lock until it ends.
//! Each test begins with `let _descriptors = Descriptors::counted();`, so that everything else is dropped before the
//! descriptors are counted again; `tests/descriptors.rs` checks that no test omits it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads that a test has not joined may close their descriptors a moment later.
const DEADLINE: Duration = Duration::from_secs(10);

static TURN: Mutex<()> = Mutex::new(());

/// Checks, when it is dropped, that no descriptor is open that was not open when it was created.
pub(crate) struct Descriptors {
    before: BTreeMap<u32, PathBuf>,
    _turn: MutexGuard<'static, ()>,
}

impl Descriptors {
    pub(crate) fn counted() -> Self {
        // An earlier failed test must not let this one fail.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { before: open(), _turn: turn }
    }

    /// Checks for leaks.
    ///
    /// # Panics
    /// If more descriptors are open than at the beginning.
    pub(crate) fn check(&self) {
        let deadline = Instant::now() + DEADLINE;
        while !self.more().is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(self.more().is_empty(), "these descriptors have leaked: {:?}", self.more());
    }

    /// The descriptors that were not open at the beginning, or that refer to another file.
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

/// The open descriptors and their files, without that of the listing itself, which is closed before its link is read.
fn open() -> BTreeMap<u32, PathBuf> {
    let listing = fs::read_dir("/proc/self/fd").unwrap();
    let paths: Vec<_> = listing.map(|entry| entry.unwrap().path()).collect();
    let numbers = paths.into_iter().filter_map(|path| {
        let target = fs::read_link(&path).ok()?;
        Some((path.file_name()?.to_str()?.parse().ok()?, target))
    });
    numbers.collect()
}
