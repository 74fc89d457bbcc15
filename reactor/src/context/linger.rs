//! Connections that are closed and wait for their peers to acknowledge what was sent.

use std::collections::VecDeque;
use std::time::Duration;

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::token::{EventSource, Inner, Token};
use crate::wheel::NodeId;

/// epoll does not report an acknowledgement.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// System calls of one check.
const ASKED_PER_CHECK: usize = 1024;
const LOOKED_AT_PER_CHECK: usize = 16 * ASKED_PER_CHECK;

/// The connections in the order in which they are checked. Some may have ended meanwhile.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    tokens: VecDeque<Token>,
    /// The timer of the next check, if any connection lingers.
    check: Option<NodeId>,
}

impl Lingering {
    pub(super) fn has_check(&self) -> bool {
        self.check.is_some()
    }
}

impl<C> Context<C> {
    /// The queue has been sent: the connection ends when the peer has acknowledged it or has finished too.
    pub(super) fn linger(&mut self, token: Token) {
        if self.header(token).is_some_and(|header| header.flags.any(Flags::EOF)) {
            return self.mark_flushed(token);
        }
        self.finish_now(token);
        if !self.header(token).is_some_and(still_lingers) {
            return; // The peer has reset the connection.
        }
        self.list_unread(token);
        self.lingering.tokens.push_back(token);
        if self.lingering.check.is_none() {
            self.arm_linger_check();
        }
    }

    fn arm_linger_check(&mut self) {
        let deadline = self.tick_after(CHECK_INTERVAL);
        let check = EventSource::Inner(Inner::Linger).to_bits();
        self.lingering.check = Some(self.wheel.insert(deadline, check));
    }

    /// Ends the connections whose peers have acknowledged everything.
    pub(crate) fn check_lingering(&mut self) {
        self.lingering.check = None;
        let mut asked = 0;
        for _ in 0..self.lingering.tokens.len().min(LOOKED_AT_PER_CHECK) {
            if asked == ASKED_PER_CHECK {
                break;
            }
            let Some(token) = self.lingering.tokens.pop_front() else { break };
            if !self.header(token).is_some_and(still_lingers) {
                continue;
            }
            asked += 1;
            if self.unacknowledged_bytes(token) == 0 {
                self.mark_flushed(token);
            } else {
                self.lingering.tokens.push_back(token);
            }
        }
        if self.lingering.tokens.is_empty() {
            self.lingering.tokens = VecDeque::new();
        } else {
            self.arm_linger_check();
        }
    }
}

fn still_lingers(header: &ConnHeader) -> bool {
    header.lingers() && !header.flags.any(Flags::CLOSED)
}
