//! Sweeps: a visit to every connection, in slices that are small enough for the sockets to get their turn in between.
//!
//! One sweep is under way at a time, the others wait for it: so of two broadcasts, each connection gets the first one
//! first, and a turn costs one slice however many sweeps there are.

use std::num::NonZeroU64;
use std::ops::Range;

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
    /// The slots that are still to be visited.
    left: Range<usize>,
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
        let limit = self.config.sweeps_max;
        if self.sweeps.len() >= limit {
            return Err(Error::Full { what: "sweeps", limit });
        }
        let id = SweepId(self.sweep_next);
        self.sweep_next = self.sweep_next.saturating_add(1);
        self.sweeps.push_back(Sweep { id, left: 0..self.slots() });
        Ok(id)
    }

    pub(crate) fn has_sweeps(&self) -> bool {
        !self.sweeps.is_empty()
    }

    /// The slots of this turn, of the sweep that is under way.
    pub(crate) fn next_slice(&mut self) -> Option<(SweepId, Range<usize>)> {
        let sweep = self.sweeps.front_mut()?;
        let most = self.config.visits_per_turn.max(1);
        let end = sweep.left.end.min(sweep.left.start.saturating_add(most));
        let slice = sweep.left.start..end;
        sweep.left.start = end;
        Some((sweep.id, slice))
    }

    /// The open connection in a slot, unless it is on its way out.
    pub(crate) fn visitable(&self, slot: usize) -> Option<Token> {
        let token = Token::from(self.connections.keys(slot, slot + 1).next()?);
        self.is_open(token).then_some(token)
    }

    /// Whether `on_open` has been called and the connection is not on its way out.
    pub(crate) fn is_open(&self, token: Token) -> bool {
        self.header(token).is_some_and(|header| {
            header.flags.any(Flags::OPENED) && !header.flags.any(Flags::CLOSING | Flags::CLOSED)
        })
    }

    /// Forgets the sweep that is under way if it is complete; says whether it is.
    pub(crate) fn end_sweep(&mut self) -> bool {
        let complete = self.sweeps.front().is_some_and(|sweep| sweep.left.is_empty());
        if complete {
            self.sweeps.pop_front();
        }
        complete
    }
}
