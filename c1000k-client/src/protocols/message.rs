//! A given message, and the expected answer.

use super::{Answer, ECHO, Protocol};

/// Digits of the number that a numbered message begins with.
const DIGITS: usize = 10;

/// The padding of a numbered message.
const FILLER: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

/// Sends the same message on all connections, as the first one and as a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    message: Vec<u8>,
    answer: Vec<u8>,
    /// Both begin with the connection's number instead.
    is_numbered: bool,
}

/// One more than the number of received bytes of the answer; 0 if none is expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageState(u32);

impl Message {
    /// This message, answered by `answer`.
    pub fn new(message: Vec<u8>, answer: Vec<u8>) -> Self {
        Self { message, answer, is_numbered: false }
    }

    /// A message of this many bytes, which an echo server sends back. It contains the connection's number, if it is long
    /// enough, so that an echo on a wrong connection is detected.
    pub fn of_size(bytes: usize) -> Self {
        let message: Vec<u8> = FILLER.iter().copied().cycle().take(bytes).collect();
        Self { answer: message.clone(), message, is_numbered: true }
    }

    /// The message, without a number.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.message
    }

    fn head(&self, number: u32) -> Head {
        let mut digits = [b'0'; DIGITS];
        let mut rest = number;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        Head { digits, len: if self.is_numbered { DIGITS.min(self.message.len()) } else { 0 } }
    }
}

/// The bytes that differ from connection to connection: the last digits of its number.
struct Head {
    digits: [u8; DIGITS],
    len: usize,
}

impl Head {
    fn as_bytes(&self) -> &[u8] {
        &self.digits[DIGITS - self.len..]
    }
}

impl Protocol for Message {
    type State = MessageState;

    fn expected(&self) -> &'static str {
        if self.message == self.answer { ECHO } else { "the answer of --expect" }
    }

    fn state(&self) -> MessageState {
        MessageState::default()
    }

    fn open(&self, state: &mut MessageState, number: u32, out: &mut Vec<u8>) {
        *state = MessageState(1);
        let head = self.head(number);
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(&self.message[head.len..]);
    }

    fn heartbeat(&self, state: &mut MessageState, number: u32, out: &mut Vec<u8>) {
        self.open(state, number, out);
    }

    fn receive(
        &self,
        state: &mut MessageState,
        number: u32,
        bytes: &[u8],
        _out: &mut Vec<u8>,
    ) -> Answer {
        let Some(matched) = (state.0 as usize).checked_sub(1) else { return Answer::Mismatch };
        let end = matched + bytes.len();
        if end > self.answer.len() {
            return Answer::Mismatch;
        }
        let head = self.head(number);
        let head_rest = &head.as_bytes()[matched.min(head.len)..end.min(head.len)];
        let (in_head, in_body) = bytes.split_at(head_rest.len());
        if in_head != head_rest || in_body != &self.answer[end - in_body.len()..end] {
            return Answer::Mismatch;
        }
        if end == self.answer.len() {
            *state = MessageState::default();
            Answer::Complete
        } else {
            *state = MessageState(end as u32 + 1);
            Answer::Partial
        }
    }

    fn has_part(&self, state: &MessageState) -> bool {
        state.0 > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(protocol: &Message, number: u32) -> (MessageState, Vec<u8>) {
        let (mut state, mut out) = (protocol.state(), vec![]);
        protocol.open(&mut state, number, &mut out);
        (state, out)
    }

    #[test]
    fn a_numbered_message_has_its_size_and_its_number() {
        assert_eq!(sent(&Message::of_size(13), 42).1, b"0000000042klm");
        assert_eq!(sent(&Message::of_size(3), 1_042).1, b"042");
        assert_eq!(sent(&Message::of_size(100_000), 1).1.len(), 100_000);
    }

    #[test]
    fn the_echo_may_come_in_any_pieces() {
        let protocol = Message::of_size(40);
        for size in 1..=40 {
            let (mut state, message) = sent(&protocol, 7);
            let answers: Vec<Answer> = message
                .chunks(size)
                .map(|part| protocol.receive(&mut state, 7, part, &mut vec![]))
                .collect();
            let (last, before) = answers.split_last().unwrap();
            assert_eq!(*last, Answer::Complete, "{size}");
            assert!(before.iter().all(|answer| *answer == Answer::Partial), "{size}");
        }
    }

    #[test]
    fn each_wrong_byte_and_each_byte_too_much_is_a_mismatch() {
        let protocol = Message::of_size(24);
        for index in 0..24 {
            let (mut state, mut message) = sent(&protocol, 7);
            message[index] ^= 1;
            assert_eq!(protocol.receive(&mut state, 7, &message, &mut vec![]), Answer::Mismatch);
        }
        let (mut state, mut message) = sent(&protocol, 7);
        message.push(b'x');
        assert_eq!(protocol.receive(&mut state, 7, &message, &mut vec![]), Answer::Mismatch);
        let (mut state, _) = sent(&protocol, 7);
        let (_, others) = sent(&protocol, 8);
        assert_eq!(protocol.receive(&mut state, 7, &others, &mut vec![]), Answer::Mismatch);
    }

    #[test]
    fn the_answer_may_be_another_text_than_the_message() {
        let protocol = Message::new(b"PING\r\n".to_vec(), b"+PONG\r\n".to_vec());
        let (mut state, message) = sent(&protocol, 1);
        assert_eq!(message, b"PING\r\n");
        assert_eq!(protocol.receive(&mut state, 1, b"+PO", &mut vec![]), Answer::Partial);
        assert!(protocol.has_part(&state));
        assert_eq!(protocol.receive(&mut state, 1, b"NG\r\n", &mut vec![]), Answer::Complete);
        assert_eq!(protocol.receive(&mut state, 1, b"+PONG\r\n", &mut vec![]), Answer::Mismatch);
    }
}
