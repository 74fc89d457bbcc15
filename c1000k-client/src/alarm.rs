//! A timer that wakes a reactor with microsecond resolution.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use reactor::{Context, Error, Interest, WatchId};

/// Wakes the reactor with microsecond resolution; its own timers have milliseconds, and many answers are faster.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: TimerFd,
    /// The descriptor to be watched.
    unwatched: Option<OwnedFd>,
    watch: Option<WatchId>,
}

impl Alarm {
    /// # Errors
    /// No descriptor is left for it.
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let twin = timer.as_fd().try_clone_to_owned();
        let unwatched = twin.map_err(|_| Errno::EMFILE)?;
        Ok(Self { timer, unwatched: Some(unwatched), watch: None })
    }

    pub(crate) fn watch<C>(&mut self, cx: &mut Context<C>) -> Result<(), Error> {
        if let Some(descriptor) = self.unwatched.take() {
            self.watch = Some(cx.watch(descriptor, Interest::Readable)?);
        }
        Ok(())
    }

    pub(crate) fn unwatch<C>(&mut self, cx: &mut Context<C>) {
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
    }

    /// Whether this is the descriptor that is ready.
    pub(crate) fn is(&self, watch: WatchId) -> bool {
        self.watch == Some(watch)
    }

    /// Expires once after this time.
    pub(crate) fn set(&self, wait: Duration) -> Result<(), Errno> {
        // Zero would disarm it.
        let wait = TimeSpec::from(wait.max(Duration::from_nanos(1)));
        self.timer.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())
    }
}
