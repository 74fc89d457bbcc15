//! Waking a reactor from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;
use crate::sys::{Poller, WakeFd};

/// Makes the reactor call [`Handler::on_wake`](crate::Handler::on_wake), from any thread.
///
/// However often it is used before the reactor gets there, it is one call, and one system call.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    fd: WakeFd,
    signaled: AtomicBool,
}

impl Waker {
    /// One that this poller reports with these data.
    pub(crate) fn watched(poller: &Poller, data: u64) -> Result<Self, Error> {
        let fd = WakeFd::watched(poller, data)?;
        Ok(Self(Arc::new(Shared { fd, signaled: AtomicBool::new(false) })))
    }

    /// Wakes the reactor, now or as soon as it waits again. Does nothing when the reactor is gone.
    pub fn wake(&self) {
        if !self.0.signaled.swap(true, Ordering::AcqRel) {
            self.0.fd.signal();
        }
    }

    /// Takes note of the wake-up, if there was one; what was done before any `wake` until now is visible afterwards.
    pub(crate) fn acknowledge(&self) -> bool {
        self.0.fd.clear();
        // A wake between these two lines signals nothing, but its cause is visible to the callback that follows.
        self.0.signaled.swap(false, Ordering::AcqRel)
    }
}
