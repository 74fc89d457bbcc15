//! The protocols: one file for each.

mod echo;
mod http;
mod message;
mod mqtt;
mod redis;
mod tls;
mod websocket;

use std::cell::OnceCell;
use std::fmt::Debug;

use c1000k_record::ConnectionBytes;

pub use echo::Echo;
pub use http::Http;
pub use message::Message;
pub use mqtt::Mqtt;
pub use redis::Redis;
pub use tls::{Tls, Trust};
pub use websocket::{Text, WebSocket};

/// [`Protocol::expected`] of an echo.
pub(crate) const ECHO: &str = "an echo of what was sent";

/// A protocol: what the client sends on a connection, and how it reads the answer.
///
/// It does no I/O: bytes to be sent are appended to `out`, and sent after the call.
pub trait Protocol: Debug {
    /// The state of a connection.
    type State: Debug;

    /// The expected answer in words: `an echo of what was sent`.
    fn expected(&self) -> &'static str;

    /// The mistake in the first wrong answer, if it is known.
    fn complaint(&self) -> Option<String> {
        None
    }

    /// The memory of a connection in the layers of the protocol, by the sizes of their types.
    #[must_use]
    fn connection_bytes() -> ConnectionBytes {
        ConnectionBytes { protocol: size_of::<Self::State>() as u64, ..ConnectionBytes::default() }
    }

    /// The state of a connection that is about to be opened.
    fn state(&self) -> Self::State;

    /// The connection has opened: sends the first message. It is up after the first [`Answer::Complete`].
    fn open(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>);

    /// Sends a heartbeat, which the server answers.
    fn heartbeat(&self, state: &mut Self::State, number: u32, out: &mut Vec<u8>);

    /// Reads received bytes, and sends what the protocol requires next.
    fn receive(
        &self,
        state: &mut Self::State,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer;

    /// Whether a part of the expected answer has arrived.
    fn has_part(&self, state: &Self::State) -> bool;
}

/// Keeps the first complaint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Complaint(OnceCell<String>);

impl Complaint {
    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        self.0.get_or_init(text);
    }

    pub(crate) fn text(&self) -> Option<String> {
        self.0.get().cloned()
    }
}

/// The first line of the received bytes, in quotes.
pub(crate) fn start_of(bytes: &[u8]) -> String {
    const MAX: usize = 60;
    let line = bytes.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
    format!("\"{}\"", line[..line.len().min(MAX)].escape_ascii())
}

/// The state of the expected answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Incomplete.
    Partial,
    /// Complete.
    Complete,
    /// Wrong, or unexpected.
    Mismatch,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that a malicious server may send at any time.
    fn survives<P: Protocol>(protocol: &P, pieces: &[Vec<u8>]) {
        let mut out = vec![];
        for is_up in [false, true] {
            let mut state = protocol.state();
            if is_up {
                protocol.heartbeat(&mut state, 7, &mut out);
            } else {
                protocol.open(&mut state, 7, &mut out);
            }
            for piece in pieces {
                let _ = protocol.receive(&mut state, 7, piece, &mut out);
                let _ = protocol.has_part(&state);
            }
        }
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            Just(b"HTTP/1.1 200 OK\r\n".to_vec()),
            Just(b"HTTP/1.1 101 Switching Protocols\r\n".to_vec()),
            Just(b"Transfer-Encoding: chunked\r\n\r\n".to_vec()),
            Just(b"fffffffffffffff0\r\n".to_vec()),
            Just(b"Content-Length: 18446744073709551615\r\n\r\n".to_vec()),
            Just(b"\x81\x05hello".to_vec()),
            Just(b"\x01\x00".to_vec()),
            Just(b"\x80\x7e\xff\xff".to_vec()),
            Just(b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()),
            Just(b"\x20\x02\x00\x00".to_vec()),
            Just(b"\x16\x03\x03\x40\x00".to_vec()),
        ]
    }

    proptest! {
        #[test]
        fn no_bytes_break_a_protocol(pieces in proptest::collection::vec(piece(), 0..12)) {
            survives(&Echo, &pieces);
            survives(&Message::of_size(20), &pieces);
            survives(&Http::new("localhost", "/"), &pieces);
            survives(&Mqtt::new(1, Some(vec![1; 200])), &pieces);
            survives(&Redis::new(), &pieces);
            let text = Text { message: b"hello".into(), answer: b"hello".into() };
            survives(&WebSocket::new("localhost", "/", Some(text)), &pieces);
            survives(&Tls::new(Echo, "localhost", &Trust::Anyone).unwrap(), &pieces);
        }
    }
}
