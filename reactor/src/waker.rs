//! Waking a reactor from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;
use crate::sys::{Poller, WakeFd};

/// A handle that makes the reactor call [`Handler::on_wake`](crate::Handler::on_wake), from any thread.
///
/// Several uses before the reactor wakes up result in one call of `on_wake` and cost one system call.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    fd: WakeFd,
    signaled: AtomicBool,
}

impl Waker {
    /// Creates a waker that this poller reports with this user data.
    pub(crate) fn watched(poller: &Poller, data: u64) -> Result<Self, Error> {
        let fd = WakeFd::watched(poller, data)?;
        Ok(Self(Arc::new(Shared { fd, signaled: AtomicBool::new(false) })))
    }

    /// Wakes the reactor: its current or next wait returns at once. Does nothing if the reactor was dropped.
    pub fn wake(&self) {
        if !self.0.signaled.swap(true, Ordering::AcqRel) {
            self.0.fd.signal();
        }
    }

    /// Clears the wake-up; returns whether there was one. Writes made before any `wake` until now are visible
    /// afterwards.
    pub(crate) fn acknowledge(&self) -> bool {
        self.0.fd.clear();
        // A wake between these two lines signals nothing, but the callback that follows sees what was done before it.
        self.0.signaled.swap(false, Ordering::AcqRel)
    }
}
