//! Redis: an inline PING, as a first message and as a heartbeat.

use super::message::MessageState;
use super::{Answer, Complaint, Message, Protocol, start_of};

/// Pings on all connections.
#[derive(Clone, Debug)]
pub struct Redis {
    ping: Message,
    complaint: Complaint,
}

impl Redis {
    /// Without a password.
    #[expect(clippy::new_without_default, reason = "as the other protocols")]
    pub fn new() -> Self {
        let ping = Message::new(b"PING\r\n".to_vec(), b"+PONG\r\n".to_vec());
        Self { ping, complaint: Complaint::default() }
    }
}

impl Protocol for Redis {
    type State = MessageState;

    fn expected(&self) -> &'static str {
        "a Redis server that answers PING without a password"
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.text()
    }

    fn state(&self) -> MessageState {
        self.ping.state()
    }

    fn open(&self, state: &mut MessageState, number: u32, out: &mut Vec<u8>) {
        self.ping.open(state, number, out);
    }

    fn heartbeat(&self, state: &mut MessageState, number: u32, out: &mut Vec<u8>) {
        self.ping.heartbeat(state, number, out);
    }

    fn receive(
        &self,
        state: &mut MessageState,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer {
        let answer = self.ping.receive(state, number, bytes, out);
        if answer == Answer::Mismatch {
            self.complaint.note(|| format!("it sent {}", start_of(bytes)));
        }
        answer
    }

    fn has_part(&self, state: &MessageState) -> bool {
        self.ping.has_part(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_server_is_quoted() {
        for line in ["-NOAUTH Authentication required.", "-ERR max number of clients reached"] {
            let redis = Redis::new();
            let (mut state, mut out) = (redis.state(), vec![]);
            redis.open(&mut state, 1, &mut out);
            assert_eq!(out, b"PING\r\n");
            let sent = format!("{line}\r\n");
            let answer = redis.receive(&mut state, 1, sent.as_bytes(), &mut out);
            assert_eq!(answer, Answer::Mismatch);
            assert_eq!(redis.complaint(), Some(format!("it sent \"{line}\"")));
        }
    }

    #[test]
    fn a_pong_may_come_in_pieces() {
        let redis = Redis::new();
        let (mut state, mut out) = (redis.state(), vec![]);
        redis.open(&mut state, 1, &mut out);
        assert_eq!(redis.receive(&mut state, 1, b"+PO", &mut out), Answer::Partial);
        assert_eq!(redis.receive(&mut state, 1, b"NG\r\n", &mut out), Answer::Complete);
        assert_eq!(redis.complaint(), None);
    }
}
