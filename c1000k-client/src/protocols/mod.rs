//! What is said on a connection: one file for each protocol.

mod echo;
mod message;

use std::fmt::Debug;

pub use echo::Echo;
pub use message::Message;

/// What the client says on a connection, and what it makes of the answer.
///
/// It does no input or output of its own: what is to be sent is added to `out`, and goes out when the call returns.
pub trait Protocol: Debug {
    /// What it keeps for each connection.
    type State: Debug;

    /// For a connection that is to be opened.
    fn state(&self) -> Self::State;

    /// The connection has opened: sends what comes first. It counts as up with the first [`Answer::Complete`].
    fn open(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>);

    /// Sends what a connection that is up answers if it is alive.
    fn heartbeat(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>);

    /// Reads what came in, and sends what has to follow.
    fn receive(
        &self,
        state: &mut Self::State,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer;

    /// Whether a part of the answer that is waited for has come.
    fn has_part(&self, state: &Self::State) -> bool;
}

/// What has come of the answer that a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A part, and the rest is still to come.
    Partial,
    /// All of it.
    Complete,
    /// Something else, or something that was not asked for.
    Mismatch,
}
