//! Waits that end at their own timeout, at the deadline of the row, or after an interrupt.

use std::process;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{SigSet, Signal};

const POLL_INTERVAL: Duration = Duration::from_millis(10);
const SLEEP_MAX: Duration = Duration::from_millis(100);

static INTERRUPTS: AtomicU32 = AtomicU32::new(0);
/// How many interrupts only request an early end.
static DEFERRED: AtomicU32 = AtomicU32::new(0);
static DEADLINE: Mutex<Option<(Instant, Duration)>> = Mutex::new(None);

/// Makes every wait fail after the first SIGINT or SIGTERM, so that what was created is removed; the second one ends
/// the process at once. Call it before any thread is started.
pub(crate) fn handle_interrupts() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block()?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTS.fetch_add(1, Ordering::Relaxed) > DEFERRED.load(Ordering::Relaxed) {
                process::exit(1);
            }
        }
    });
    Ok(())
}

/// Makes the first interrupt only [request an early end](is_early_end_requested); waits fail after the second one.
pub(crate) fn defer_first_interrupt() {
    DEFERRED.store(1, Ordering::Relaxed);
}

pub(crate) fn is_early_end_requested() -> bool {
    INTERRUPTS.load(Ordering::Relaxed) > 0
}

/// Whether waits fail because of an interrupt.
pub(crate) fn is_interrupted() -> bool {
    INTERRUPTS.load(Ordering::Relaxed) > DEFERRED.load(Ordering::Relaxed)
}

/// A deadline for all waits of the process, until it is dropped.
#[derive(Debug)]
pub(crate) struct Deadline(());

impl Deadline {
    pub(crate) fn new(timeout: Duration) -> Self {
        set_deadline(Some((Instant::now() + timeout, timeout)));
        Self(())
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        set_deadline(None);
    }
}

fn set_deadline(deadline: Option<(Instant, Duration)>) {
    if let Ok(mut current) = DEADLINE.lock() {
        *current = deadline;
    }
}

/// Fails past the deadline and after an interrupt; every loop that waits calls this.
pub(crate) fn check_deadline() -> Result<()> {
    if is_interrupted() {
        bail!("interrupted");
    }
    match DEADLINE.lock().ok().and_then(|deadline| *deadline) {
        Some((deadline, timeout)) if Instant::now() > deadline => {
            bail!("not done within {} s", timeout.as_secs())
        }
        _ => Ok(()),
    }
}

pub(crate) fn sleep(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    loop {
        check_deadline()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(SLEEP_MAX));
    }
}

/// Waits until the condition holds, and returns how long that took; `what` names the condition in the error.
pub(crate) fn wait_until(
    what: &str,
    timeout: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let started = Instant::now();
    while !holds()? {
        if started.elapsed() > timeout {
            bail!("not within {} s: {what}", timeout.as_secs());
        }
        sleep(POLL_INTERVAL)?;
    }
    Ok(started.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_its_condition_holds_and_fails_if_it_never_does() {
        let mut polls = 0;
        let holds = || {
            polls += 1;
            Ok(polls == 3)
        };
        assert!(wait_until("three polls", Duration::from_secs(5), holds).is_ok());
        let never = wait_until("never", Duration::from_millis(30), || Ok(false));
        assert!(never.unwrap_err().to_string().contains("never"));
    }
}
