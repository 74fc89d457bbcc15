//! Sweeps: a visit to every connection, or to chosen ones, in slices that are small enough for the sockets to get their
//! turn in between. And calls that are deferred until other connections have been served.
//!
//! One sweep is under way at a time, the others wait for it: so of two broadcasts, each connection gets the first one
//! first, and a turn costs one slice however many sweeps there are.

use std::num::NonZeroU64;
use std::ops::Range;
use std::vec;

use crate::connection::Flags;
use crate::context::Context;
use crate::error::Error;
use crate::token::Token;

/// The name of a sweep, from [`Context::sweep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SweepId(NonZeroU64);

#[derive(Debug)]
pub(super) struct Sweep {
    id: SweepId,
    left: Left,
}

/// What is still to be visited.
#[derive(Debug)]
enum Left {
    Slots(Range<usize>),
    Tokens(vec::IntoIter<Token>),
}

impl<C> Context<C> {
    /// Visits every open connection: [`on_visit`](crate::Handler::on_visit) follows for each, and
    /// [`on_swept`](crate::Handler::on_swept) at the end.
    ///
    /// At most [`Config::visits_per_turn`](crate::Config::visits_per_turn) connections are visited between two looks
    /// at the sockets, so a visit to a million delays no other connection by more than one slice. A connection that is open at this
    /// call, and still is when its turn comes, is visited once; one that opens or begins to close after the call may be
    /// or not, also where the sweep has to wait for others before it begins. Sweeps are made one after the other.
    ///
    /// A [`shutdown`](Self::shutdown) ends `run` when the last connection has gone, without an `on_swept` for the
    /// sweeps that are left.
    ///
    /// A broadcast is a sweep that writes a shared [`Chunk`](crate::Chunk): nothing is allocated for a connection that
    /// takes the bytes at once, and those that don't have the same bytes in their queues.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::sweeps_max`](crate::Config::sweeps_max).
    pub fn sweep(&mut self) -> Result<SweepId, Error> {
        self.begin_sweep(Left::Slots(0..self.slots()))
    }

    /// The same for chosen connections, in this order: those of a group, or of a topic. Stale tokens, and connections that
    /// are not open when their turn comes, are passed over; a token that is there twice is visited twice.
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

    /// The sweep that is under way, and how many visits of it this turn makes at most.
    pub(crate) fn next_slice(&self) -> Option<(SweepId, usize)> {
        Some((self.sweeps.front()?.id, self.config.visits_per_turn.max(1)))
    }

    /// The next slot or token of the sweep that is under way, and its connection, if that is open and not on its way out;
    /// `None` when it is complete.
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

    /// Whether `on_open` has been called and the connection is not on its way out.
    pub(crate) fn is_open(&self, token: Token) -> bool {
        self.header(token).is_some_and(|header| {
            header.has_opened() && !header.flags.any(Flags::CLOSING | Flags::CLOSED)
        })
    }

    /// Forgets the sweep that is under way if it is complete; says whether it is.
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

    /// Calls [`on_deferred`](crate::Handler::on_deferred) for this connection once the events of this turn have been
    /// served, without waiting for anything: for work that is done in pieces, or that should not delay others. What is
    /// deferred there is called in the next turn. Each use is one call, and a connection that is not open by then is passed
    /// over.
    ///
    /// # Errors
    /// [`Error::Stale`], and [`Error::Full`] when as many calls wait as there may be connections.
    pub fn defer(&mut self, token: Token) -> Result<(), Error> {
        if !self.holds(token) {
            return Err(Error::Stale);
        }
        let limit = self.connections.capacity();
        if self.deferred.len() >= limit {
            return Err(Error::Full { what: "deferred calls", limit });
        }
        self.deferred.push_back(token);
        Ok(())
    }

    /// How many deferred calls this turn makes.
    pub(crate) fn deferred(&self) -> usize {
        self.deferred.len().min(self.config.visits_per_turn.max(1))
    }

    /// The next connection whose call was deferred, if it is open.
    pub(crate) fn next_deferred(&mut self) -> Option<Token> {
        self.deferred.pop_front().filter(|&token| self.is_open(token))
    }
}
