//! Sweeps: a visit to every connection, or to chosen ones, in slices between which the reactor serves events. And
//! deferred calls, which are made after other connections have been served.
//!
//! One sweep is in progress at a time, the others are pending. So each connection gets two broadcasts in order, and a
//! turn runs one slice, whatever the number of sweeps.

use std::num::NonZeroU64;
use std::ops::Range;
use std::vec;

use crate::connection::{ConnHeader, Flags};
use crate::context::Context;
use crate::error::Error;
use crate::token::Token;

/// The id of a sweep, returned by [`Context::sweep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SweepId(NonZeroU64);

#[derive(Debug)]
pub(super) struct Sweep {
    id: SweepId,
    left: Left,
}

/// The remaining visits.
#[derive(Debug)]
enum Left {
    Slots(Range<usize>),
    Tokens(vec::IntoIter<Token>),
}

impl<C> Context<C> {
    /// Visits every open connection: calls [`on_visit`](crate::Handler::on_visit) for each, and
    /// [`on_swept`](crate::Handler::on_swept) at the end.
    ///
    /// At most [`Config::visits_per_turn`](crate::Config::visits_per_turn) connections are visited per turn, so a sweep
    /// over a million connections delays events by at most one slice. A connection that is open at this call, and still
    /// is when the sweep reaches it, is visited once. A connection that opens or begins to close after this call may or
    /// may not be visited, also if the sweep is still pending. Sweeps run one after the other.
    ///
    /// A [`shutdown`](Self::shutdown) ends `run` when no connection is left, without calling `on_swept` for the
    /// remaining sweeps.
    ///
    /// To broadcast, write a shared [`Chunk`](crate::Chunk) in each visit: nothing is allocated for a connection that
    /// accepts the bytes at once, and the queues of the others share the same bytes.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::sweeps_max`](crate::Config::sweeps_max).
    pub fn sweep(&mut self) -> Result<SweepId, Error> {
        self.begin_sweep(Left::Slots(0..self.slots()))
    }

    /// Like [`sweep`](Self::sweep), for the given connections in this order, for example those of a group or of a
    /// topic. Stale tokens, and connections that are not open when the sweep reaches them, are skipped; a token that
    /// occurs twice is visited twice.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::sweeps_max`](crate::Config::sweeps_max).
    pub fn sweep_of(&mut self, tokens: impl Into<Vec<Token>>) -> Result<SweepId, Error> {
        self.begin_sweep(Left::Tokens(tokens.into().into_iter()))
    }

    fn begin_sweep(&mut self, left: Left) -> Result<SweepId, Error> {
        let limit = self.config.sweeps_max;
        if self.sweeps.len() >= limit {
            return Err(Error::Full { what: "sweeps", limit });
        }
        let id = SweepId(self.sweep_next);
        self.sweep_next = self.sweep_next.saturating_add(1);
        self.sweeps.push_back(Sweep { id, left });
        Ok(id)
    }

    pub(crate) fn has_sweeps(&self) -> bool {
        !self.sweeps.is_empty()
    }

    /// The sweep in progress, and the maximum number of its visits in this turn.
    pub(crate) fn next_slice(&self) -> Option<(SweepId, usize)> {
        Some((self.sweeps.front()?.id, self.config.visits_per_turn.max(1)))
    }

    /// Advances the sweep in progress by one slot or token, and returns its connection if that is open and not being
    /// closed; `None` if the sweep is complete.
    pub(crate) fn next_visit(&mut self) -> Option<Option<Token>> {
        let token = match &mut self.sweeps.front_mut()?.left {
            Left::Tokens(left) => Some(left.next()?),
            Left::Slots(left) => {
                let slot = left.next()?;
                self.connections.keys(slot, slot + 1).next().map(Token::from)
            }
        };
        Some(token.filter(|&token| self.is_open(token)))
    }

    /// Whether `on_open` has been called and the connection is not being closed.
    pub(crate) fn is_open(&self, token: Token) -> bool {
        self.header(token).is_some_and(|header| {
            header.has_opened() && !header.flags.any(Flags::CLOSING | Flags::CLOSED)
        })
    }

    /// Removes the sweep in progress if it is complete; returns whether it was.
    pub(crate) fn end_sweep(&mut self) -> bool {
        let complete = self.sweeps.front().is_some_and(|sweep| match &sweep.left {
            Left::Slots(left) => left.is_empty(),
            Left::Tokens(left) => left.as_slice().is_empty(),
        });
        if complete {
            self.sweeps.pop_front();
        }
        complete
    }

    /// Calls [`on_deferred`](crate::Handler::on_deferred) for this connection after the events of this turn have been
    /// served, for work that is done in pieces or should not delay other connections. The loop does not block while
    /// calls are pending. A call deferred in `on_deferred` is made in the next turn. Each use results in one call; a
    /// connection that is not open by then is skipped. A turn makes at most
    /// [`Config::visits_per_turn`](crate::Config::visits_per_turn) of these calls.
    ///
    /// # Errors
    /// [`Error::Stale`], also if the connection is closing, or [`Error::Full`] if
    /// [`Config::connections_max`](crate::Config::connections_max) calls are pending.
    pub fn defer(&mut self, token: Token) -> Result<(), Error> {
        let is_ending = |header: &ConnHeader| header.flags.any(Flags::CLOSING | Flags::CLOSED);
        if self.header(token).is_none_or(is_ending) {
            return Err(Error::Stale);
        }
        let limit = self.connections.capacity();
        if self.deferred.len() >= limit {
            return Err(Error::Full { what: "deferred calls", limit });
        }
        self.deferred.push_back(token);
        Ok(())
    }

    /// The number of deferred calls to make in this turn.
    pub(crate) fn deferred(&self) -> usize {
        self.deferred.len().min(self.config.visits_per_turn.max(1))
    }

    /// Takes the next deferred call, and returns its connection if that is open.
    pub(crate) fn next_deferred(&mut self) -> Option<Token> {
        self.deferred.pop_front().filter(|&token| self.is_open(token))
    }
}
