//! Closing many connections at once without delaying the others.
//!
//! The kernel reports sockets in the order in which they became ready: a peer that sends comes after thousands of peers
//! that left just before it. Reading the end of a stream is cheap; closing the socket takes the kernel many
//! times as long. So one turn closes a few, and the rest wait until other connections have been served.
//!
//! Connections that wait to be closed do not count against any limit, and for each new connection one of them is closed
//! first.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use reactor::{Context, Error, TimerId, Token};

/// The maximum number of closes in one turn.
const CLOSES_PER_TURN: usize = 64;

#[derive(Debug)]
pub(crate) struct Closings {
    /// In the order in which their peers finished; some may have ended for another reason since.
    waiting: VecDeque<Token>,
    /// Those of them with nothing left to send.
    left: HashSet<Token>,
    timer: Option<TimerId>,
    turn: Instant,
    in_turn: usize,
}

impl Closings {
    pub(crate) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            left: HashSet::new(),
            timer: None,
            turn: Instant::now(),
            in_turn: 0,
        }
    }

    /// Closes a connection whose peer has finished, now or soon; returns whether it waits and no longer counts.
    pub(crate) fn close(&mut self, cx: &mut Context<()>, token: Token) -> bool {
        if cx.now() != self.turn {
            self.turn = cx.now();
            self.in_turn = 0;
        }
        self.in_turn += 1;
        if self.waiting.is_empty() && self.in_turn <= CLOSES_PER_TURN {
            cx.close(token);
            return false;
        }
        let has_left = cx.queued_bytes(token) == 0 && self.left.insert(token);
        self.waiting.push_back(token);
        if self.timer.is_none() && self.arm(cx).is_err() {
            self.close_some(cx, self.waiting.len());
        }
        has_left
    }

    /// Called before a new connection: closes one of those that wait.
    pub(crate) fn make_room(&mut self, cx: &mut Context<()>) {
        self.close_some(cx, 1);
    }

    /// The connection has ended; returns whether it had stopped counting before.
    pub(crate) fn forget(&mut self, token: Token) -> bool {
        self.left.remove(&token)
    }

    /// Returns whether this is the timer of the waiting connections; if so, closes some of them.
    pub(crate) fn proceed(&mut self, cx: &mut Context<()>, timer: TimerId) -> bool {
        if self.timer != Some(timer) {
            return false;
        }
        self.timer = None;
        self.close_some(cx, CLOSES_PER_TURN);
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        } else if self.arm(cx).is_err() {
            self.close_some(cx, self.waiting.len());
        }
        true
    }

    fn close_some(&mut self, cx: &mut Context<()>, most: usize) {
        for token in self.waiting.drain(..most.min(self.waiting.len())) {
            cx.close(token);
        }
    }

    fn arm(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.timer = Some(cx.add_timer(Duration::ZERO)?);
        Ok(())
    }
}
