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
    /// The connections to visit; `None`: all.
    tokens: Option<Vec<Token>>,
    /// Those that are still to be visited: places in `tokens`, or slots.
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
        let slots = 0..self.slots();
        self.add_sweep(None, slots)
    }

    /// The same over these connections only, in this order, as over the members of a room. What is not open when its turn
    /// comes is left out.
    ///
    /// # Errors
    /// [`Error::Full`] at [`Config::sweeps_max`](crate::Config::sweeps_max).
    pub fn sweep_over(&mut self, tokens: Vec<Token>) -> Result<SweepId, Error> {
        let places = 0..tokens.len();
        self.add_sweep(Some(tokens), places)
    }

    fn add_sweep(
        &mut self,
        tokens: Option<Vec<Token>>,
        left: Range<usize>,
    ) -> Result<SweepId, Error> {
        let limit = self.config.sweeps_max;
        if self.sweeps.len() >= limit {
            return Err(Error::Full { what: "sweeps", limit });
        }
        let id = SweepId(self.sweep_next);
        self.sweep_next = self.sweep_next.saturating_add(1);
        self.sweeps.push_back(Sweep { id, tokens, left });
        Ok(id)
    }

    pub(crate) fn has_sweeps(&self) -> bool {
        !self.sweeps.is_empty()
    }

    /// What the sweep that is under way visits in this turn, for [`visitable`](Self::visitable).
    pub(crate) fn next_slice(&mut self) -> Option<(SweepId, Range<usize>)> {
        let sweep = self.sweeps.front_mut()?;
        let most = self.config.visits_per_turn.max(1);
        let end = sweep.left.end.min(sweep.left.start.saturating_add(most));
        let slice = sweep.left.start..end;
        sweep.left.start = end;
        Some((sweep.id, slice))
    }

    /// The connection at a place of the sweep that is under way, if it is open.
    pub(crate) fn visitable(&self, place: usize) -> Option<Token> {
        let token = match &self.sweeps.front()?.tokens {
            Some(tokens) => *tokens.get(place)?,
            None => Token::from(self.connections.keys(place, place + 1).next()?),
        };
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
