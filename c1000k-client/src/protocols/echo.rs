//! Echo: a message is sent, and the server must return the same bytes.

use std::io::Write;
use std::num::NonZeroU8;

use super::{Answer, ECHO, Protocol};

/// Prefix and the longest number.
const BYTES_MAX: usize = 40;

/// The protocol of an echo server: opening a connection and a heartbeat are the same.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo;

/// One more than the number of echoed bytes; `None` if no echo is expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EchoState(Option<NonZeroU8>);

impl EchoState {
    fn waiting(matched: usize) -> Self {
        Self(NonZeroU8::new(matched as u8 + 1))
    }

    fn matched(self) -> Option<usize> {
        self.0.map(|next| usize::from(next.get()) - 1)
    }
}

impl Protocol for Echo {
    type State = EchoState;

    fn expected(&self) -> &'static str {
        ECHO
    }

    fn state(&self) -> EchoState {
        EchoState::default()
    }

    fn open(&self, state: &mut EchoState, number: u32, out: &mut Vec<u8>) {
        *state = EchoState::waiting(0);
        out.extend_from_slice(Message::of(number).as_bytes());
    }

    fn heartbeat(&self, state: &mut EchoState, number: u32, out: &mut Vec<u8>) {
        self.open(state, number, out);
    }

    fn receive(
        &self,
        state: &mut EchoState,
        number: u32,
        bytes: &[u8],
        _out: &mut Vec<u8>,
    ) -> Answer {
        let Some(matched) = state.matched() else { return Answer::Mismatch };
        let message = Message::of(number);
        let expected = &message.as_bytes()[matched..];
        if expected == bytes {
            *state = EchoState::default();
            Answer::Complete
        } else if expected.starts_with(bytes) {
            *state = EchoState::waiting(matched + bytes.len());
            Answer::Partial
        } else {
            Answer::Mismatch
        }
    }

    fn has_part(&self, state: &EchoState) -> bool {
        state.matched().is_some_and(|matched| matched > 0)
    }
}

/// The message of one connection.
#[derive(Debug)]
struct Message {
    bytes: [u8; BYTES_MAX],
    len: usize,
}

impl Message {
    fn of(number: u32) -> Self {
        let mut bytes = [0; BYTES_MAX];
        let mut rest = &mut bytes[..];
        let fits = write!(rest, "Hello Server, connections num:{number}");
        debug_assert!(fits.is_ok());
        let len = BYTES_MAX - rest.len();
        Self { bytes, len }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that waits for its echo.
    fn asked(number: u32) -> (EchoState, Vec<u8>) {
        let (mut state, mut out) = (Echo.state(), vec![]);
        Echo.open(&mut state, number, &mut out);
        (state, out)
    }

    fn receive(state: &mut EchoState, bytes: &[u8]) -> Answer {
        let mut out = vec![];
        let answer = Echo.receive(state, 77, bytes, &mut out);
        assert!(out.is_empty(), "an echo is the end of it");
        answer
    }

    #[test]
    fn the_message_is_that_of_the_original() {
        assert_eq!(asked(1).1, b"Hello Server, connections num:1");
        assert_eq!(asked(u32::MAX).1.len(), BYTES_MAX);
    }

    #[test]
    fn an_echo_may_come_in_pieces() {
        let (mut state, message) = asked(77);
        let (head, tail) = message.split_at(10);
        assert_eq!(receive(&mut state, head), Answer::Partial);
        assert_eq!(receive(&mut state, tail), Answer::Complete);
        let (mut state, message) = asked(77);
        assert_eq!(receive(&mut state, &message), Answer::Complete);
    }

    #[test]
    fn other_bytes_and_more_bytes_are_a_mismatch() {
        let (mut state, message) = asked(77);
        assert_eq!(receive(&mut state, b"Hello!"), Answer::Mismatch);
        assert_eq!(receive(&mut state, &message[..10]), Answer::Partial);
        assert_eq!(receive(&mut state, &message), Answer::Mismatch);
        let (mut state, _) = asked(77);
        let more = b"Hello Server, connections num:770";
        assert_eq!(receive(&mut state, more), Answer::Mismatch);
    }

    #[test]
    fn unsolicited_bytes_are_a_mismatch() {
        let mut state = Echo.state();
        assert_eq!(receive(&mut state, b"Hello"), Answer::Mismatch);
        let (mut state, message) = asked(77);
        receive(&mut state, &message);
        assert_eq!(receive(&mut state, &message), Answer::Mismatch);
    }
}
