//! Sharing between threads: a lock, and a published value.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Locks counts, which are consistent even if a thread has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value that is replaced rarely and read often by all threads.
///
/// A thread keeps a [`Snapshot`] and compares its version, one atomic load. It takes the lock, to clone an `Arc`, only
/// for a new value.
#[derive(Debug)]
pub(crate) struct Published<T> {
    latest: RwLock<Arc<T>>,
    version: AtomicU64,
}

/// A thread's copy of a [`Published`] value.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot<T> {
    pub(crate) value: Arc<T>,
    version: u64,
}

impl<T> Published<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { latest: RwLock::new(Arc::new(value)), version: AtomicU64::new(0) }
    }

    pub(crate) fn publish(&self, value: T) {
        let mut latest = self.latest.write().unwrap_or_else(PoisonError::into_inner);
        *latest = Arc::new(value);
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn snapshot(&self) -> Snapshot<T> {
        let latest = self.latest.read().unwrap_or_else(PoisonError::into_inner);
        // The version changes only under this lock.
        Snapshot { value: Arc::clone(&latest), version: self.version.load(Ordering::Acquire) }
    }

    pub(crate) fn is_current(&self, snapshot: &Snapshot<T>) -> bool {
        self.version.load(Ordering::Acquire) == snapshot.version
    }

    /// Replaces the snapshot if there is a newer value; returns whether there was.
    pub(crate) fn refresh(&self, snapshot: &mut Snapshot<T>) -> bool {
        if self.is_current(snapshot) {
            return false;
        }
        *snapshot = self.snapshot();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_reader_sees_each_new_value_once_and_never_an_older_one() {
        const LAST: u64 = 10_000;
        let published = Published::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut snapshot = published.snapshot();
                    while *snapshot.value < LAST {
                        let before = *snapshot.value;
                        let is_new = published.refresh(&mut snapshot);
                        assert_eq!(is_new, *snapshot.value > before);
                    }
                    assert!(!published.refresh(&mut snapshot));
                });
            }
            for value in 1..=LAST {
                published.publish(value);
            }
        });
    }
}
