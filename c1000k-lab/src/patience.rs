//! Waits with a time-out: their own, that of the row, or an interrupt.

use std::process;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{SigSet, Signal};

const POLL: Duration = Duration::from_millis(10);
const SLICE: Duration = Duration::from_millis(100);

static INTERRUPTS: AtomicU32 = AtomicU32::new(0);
/// How many interrupts only ask for an early end.
static GENTLE: AtomicU32 = AtomicU32::new(0);
static LIMIT: Mutex<Option<(Instant, Duration)>> = Mutex::new(None);

/// Makes every wait fail on the first SIGINT or SIGTERM, so that what was made is removed; the second one ends the
/// process at once. Call it before any thread is started.
pub(crate) fn take_interrupts() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block()?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTS.fetch_add(1, Ordering::Relaxed) > GENTLE.load(Ordering::Relaxed) {
                process::exit(1);
            }
        }
    });
    Ok(())
}

/// Lets the first interrupt [ask for an early end](is_asked_to_end_early) instead; the second one makes waits fail.
pub(crate) fn be_gentle_once() {
    GENTLE.store(1, Ordering::Relaxed);
}

/// Whether there was an interrupt.
pub(crate) fn is_asked_to_end_early() -> bool {
    INTERRUPTS.load(Ordering::Relaxed) > 0
}

/// Bounds all waits together, until it is dropped.
#[derive(Debug)]
pub(crate) struct Limit(());

impl Limit {
    pub(crate) fn new(within: Duration) -> Self {
        set_limit(Some((Instant::now() + within, within)));
        Self(())
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        set_limit(None);
    }
}

fn set_limit(limit: Option<(Instant, Duration)>) {
    if let Ok(mut current) = LIMIT.lock() {
        *current = limit;
    }
}

/// Whether there was an interrupt that ends everything.
pub(crate) fn is_interrupted() -> bool {
    INTERRUPTS.load(Ordering::Relaxed) > GENTLE.load(Ordering::Relaxed)
}

/// Fails when there is no more time; every loop that waits calls this.
pub(crate) fn go_on() -> Result<()> {
    if is_interrupted() {
        bail!("interrupted");
    }
    match LIMIT.lock().ok().and_then(|limit| *limit) {
        Some((ends, within)) if Instant::now() > ends => {
            bail!("not done within {} s", within.as_secs())
        }
        _ => Ok(()),
    }
}

pub(crate) fn sleep(duration: Duration) -> Result<()> {
    let ends = Instant::now() + duration;
    loop {
        go_on()?;
        let left = ends.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(SLICE));
    }
}

/// Waits until the condition holds, and returns how long that took; `what` is for the error.
pub(crate) fn wait_until(
    what: &str,
    within: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let started = Instant::now();
    while !holds()? {
        if started.elapsed() > within {
            bail!("not within {} s: {what}", within.as_secs());
        }
        sleep(POLL)?;
    }
    Ok(started.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_it_holds_and_fails_when_it_does_not() {
        let mut looks = 0;
        let holds = || {
            looks += 1;
            Ok(looks == 3)
        };
        assert!(wait_until("three looks", Duration::from_secs(5), holds).is_ok());
        let never = wait_until("never", Duration::from_millis(30), || Ok(false));
        assert!(never.unwrap_err().to_string().contains("never"));
    }
}
