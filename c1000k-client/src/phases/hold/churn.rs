//! Churn during the hold: connections are closed and reopened at a fixed rate.

use std::time::{Duration, Instant};

use reactor::{Context, TimerId};

use crate::pacing::RateLimiter;
use crate::run::{Conn, ConnStage, Fault, arm, cancel};

/// The pause if no connection can be closed, because all wait for answers.
const PAUSE: Duration = Duration::from_millis(10);

/// Closes connections by reset, in the order of their slots.
#[derive(Debug)]
pub(super) struct Churn {
    per_second: u64,
    /// Since the hold began.
    limiter: Option<RateLimiter>,
    /// The next slot.
    cursor: usize,
    wait: Option<TimerId>,
}

impl Churn {
    pub(super) fn new(per_second: u64) -> Self {
        Self { per_second, limiter: None, cursor: 0, wait: None }
    }

    pub(super) fn start<C>(&mut self, cx: &mut Context<Conn<C>>) {
        self.limiter = Some(RateLimiter::new(self.per_second, Instant::now()));
        self.close_due(cx);
    }

    /// Closes those that are due, and arms a timer for the next one.
    fn close_due<C>(&mut self, cx: &mut Context<Conn<C>>) {
        let Some(mut limiter) = self.limiter.take() else { return };
        let wait = loop {
            match limiter.take(Instant::now()) {
                Ok(()) if self.close_one(cx) => {}
                Ok(()) => break PAUSE,
                Err(wait) => break wait,
            }
        };
        self.limiter = Some(limiter);
        self.wait = arm(cx, wait);
    }

    /// Closes the next connection without an unanswered message; returns whether there was one.
    fn close_one<C>(&mut self, cx: &mut Context<Conn<C>>) -> bool {
        let slots = cx.slots();
        for _ in 0..slots {
            let slot = self.cursor % slots;
            self.cursor = slot + 1;
            let Some(token) = cx.tokens(slot..slot + 1).next() else { continue };
            let Some(conn) = cx.conn_mut(token) else { continue };
            if conn.stage == ConnStage::Up && conn.is_usable() {
                conn.fault = Some(Fault::Closed);
                cx.abort(token);
                return true;
            }
        }
        false
    }

    pub(super) fn on_timer<C>(&mut self, cx: &mut Context<Conn<C>>, timer: TimerId) {
        if self.wait == Some(timer) {
            self.close_due(cx);
        }
    }

    pub(super) fn stop<C>(&mut self, cx: &mut Context<C>) {
        cancel(cx, &mut self.wait);
    }
}
