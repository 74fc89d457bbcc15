//! WebSocket: the connection is upgraded, and its heartbeat is a ping, or a message with an expected answer.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

use super::{Answer, Complaint, Protocol, start_of};

/// The longest head of the server's answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// The longest message of the server, and the longest of its frames.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// More header fields are an error.
const FIELDS_MAX: usize = 128;

/// Upgrades connections, and sends pings or one message.
#[derive(Clone, Debug)]
pub struct WebSocket {
    host: String,
    path: String,
    /// `None`: heartbeats are pings.
    text: Option<Text>,
    complaint: Complaint,
}

/// A message, and its expected answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Sent as a text message if it is UTF-8, otherwise as a binary one.
    pub message: Vec<u8>,
    /// A message with these bytes, text or binary.
    pub answer: Vec<u8>,
}

/// The expected answer. A frame is buffered until it is complete.
#[derive(Debug, Default)]
pub struct WebSocketState {
    awaited: Awaited,
    input: Option<Box<Input>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Awaited {
    #[default]
    Nothing,
    Upgrade,
    Pong,
    Message,
}

/// Bytes of a head or a frame, and the message that frames were a part of.
#[derive(Debug, Default)]
struct Input {
    bytes: Vec<u8>,
    message: Vec<u8>,
}

impl WebSocket {
    /// For this host, as it was given, and path.
    pub fn new(host: &str, path: &str, text: Option<Text>) -> Self {
        Self { host: host.to_owned(), path: path.to_owned(), text, complaint: Complaint::default() }
    }

    /// It must differ between connections, and is not secret.
    fn key(number: u32) -> String {
        STANDARD.encode(
            (u128::from(number) + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
                .to_be_bytes(),
        )
    }

    /// The length of the head of the answer, or `Some(None)` if it is incomplete; `None` if it does not upgrade this
    /// connection.
    #[expect(clippy::option_option, reason = "wrong, incomplete, complete")]
    fn upgrade(number: u32, head: &[u8]) -> Option<Option<usize>> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut response = httparse::Response::new(&mut fields);
        let httparse::Status::Complete(length) = response.parse(head).ok()? else {
            return (head.len() <= HEAD_BYTES_MAX).then_some(None);
        };
        let accept = derive_accept_key(Self::key(number).as_bytes());
        let is_accept = |field: &httparse::Header<'_>| {
            field.name.eq_ignore_ascii_case("sec-websocket-accept")
                && field.value == accept.as_bytes()
        };
        let is_upgraded = response.code == Some(101) && response.headers.iter().any(is_accept);
        is_upgraded.then_some(Some(length))
    }

    /// Whether a frame of the server is the expected answer.
    fn take_frame(
        &self,
        state: &mut WebSocketState,
        number: u32,
        (header, payload): (&FrameHeader, &[u8]),
        out: &mut Vec<u8>,
    ) -> Answer {
        match header.opcode {
            OpCode::Control(Control::Ping) => {
                write_frame(OpCode::Control(Control::Pong), number, payload, out);
                Answer::Partial
            }
            OpCode::Control(Control::Pong) if state.awaited == Awaited::Pong => {
                state.end(payload == number.to_be_bytes())
            }
            OpCode::Data(_) => {
                let message = match &mut state.input {
                    Some(input) if !(header.is_final && input.message.is_empty()) => {
                        input.message.extend_from_slice(payload);
                        if input.message.len() > MESSAGE_BYTES_MAX {
                            return Answer::Mismatch;
                        }
                        if !header.is_final {
                            return Answer::Partial;
                        }
                        std::mem::take(&mut input.message)
                    }
                    _ => payload.to_vec(),
                };
                match &self.text {
                    Some(text) if state.awaited == Awaited::Message => {
                        state.end(message == text.answer)
                    }
                    // A server may send messages of its own.
                    _ => Answer::Partial,
                }
            }
            // The end of the stream follows a close, and an unsolicited pong is ignored.
            OpCode::Control(_) => Answer::Partial,
        }
    }
}

impl WebSocketState {
    fn end(&mut self, is_right: bool) -> Answer {
        self.awaited = Awaited::Nothing;
        if is_right { Answer::Complete } else { Answer::Mismatch }
    }
}

/// A complete frame with a mask, which clients must use.
fn write_frame(opcode: OpCode, number: u32, payload: &[u8], out: &mut Vec<u8>) {
    let mask = (number | 1).wrapping_mul(0x9e37_79b9).to_be_bytes();
    let header = FrameHeader { opcode, mask: Some(mask), ..FrameHeader::default() };
    // Writing to memory can't fail.
    let _ = header.format(payload.len() as u64, out);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
}

impl Protocol for WebSocket {
    type State = WebSocketState;

    fn state(&self) -> WebSocketState {
        WebSocketState::default()
    }

    fn expected(&self) -> &'static str {
        match self.text {
            None => "a WebSocket upgrade, and pongs",
            Some(_) => "a WebSocket upgrade, and the expected message",
        }
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.text()
    }

    fn open(&self, state: &mut WebSocketState, number: u32, out: &mut Vec<u8>) {
        state.awaited = Awaited::Upgrade;
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n\r\n",
            self.path,
            self.host,
            Self::key(number)
        );
        out.extend_from_slice(request.as_bytes());
    }

    fn heartbeat(&self, state: &mut WebSocketState, number: u32, out: &mut Vec<u8>) {
        match &self.text {
            None => {
                state.awaited = Awaited::Pong;
                write_frame(OpCode::Control(Control::Ping), number, &number.to_be_bytes(), out);
            }
            Some(text) => {
                state.awaited = Awaited::Message;
                let is_text = std::str::from_utf8(&text.message).is_ok();
                let kind = if is_text { Data::Text } else { Data::Binary };
                write_frame(OpCode::Data(kind), number, &text.message, out);
            }
        }
    }

    fn receive(
        &self,
        state: &mut WebSocketState,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer {
        let mut kept =
            state.input.as_mut().map(|input| std::mem::take(&mut input.bytes)).unwrap_or_default();
        let all = if kept.is_empty() {
            bytes
        } else {
            kept.extend_from_slice(bytes);
            &kept[..]
        };
        let (answer, used) = self.take_all(state, number, all, out);
        let rest = &all[used..];
        if !rest.is_empty() {
            let rest = rest.to_vec();
            state.input.get_or_insert_default().bytes = rest;
        } else if state.input.as_ref().is_some_and(|input| input.message.is_empty()) {
            state.input = None;
        }
        answer
    }

    fn has_part(&self, state: &WebSocketState) -> bool {
        state.input.is_some()
    }
}

impl WebSocket {
    /// Reads the head or the complete frames; returns the answer and the number of bytes read.
    fn take_all(
        &self,
        state: &mut WebSocketState,
        number: u32,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> (Answer, usize) {
        let (mut used, mut answer) = (0, Answer::Partial);
        if state.awaited == Awaited::Upgrade {
            match Self::upgrade(number, bytes) {
                None => {
                    self.complaint.note(|| format!("it sent {}", start_of(bytes)));
                    return (Answer::Mismatch, bytes.len());
                }
                Some(None) => return (Answer::Partial, 0),
                Some(Some(length)) => (used, answer) = (length, state.end(true)),
            }
        }
        while let Some(frame) = next_frame(&bytes[used..]) {
            let Ok(Frame { header, payload, length }) = frame else {
                return (Answer::Mismatch, bytes.len());
            };
            used += length;
            if header.opcode == OpCode::Data(Data::Continue) || !header.is_final {
                state.input.get_or_insert_default();
            }
            match self.take_frame(state, number, (&header, payload), out) {
                Answer::Partial => {}
                Answer::Complete if answer == Answer::Partial => answer = Answer::Complete,
                _ => return (Answer::Mismatch, bytes.len()),
            }
        }
        (answer, used)
    }
}

/// A frame is too long, masked, or violates the protocol.
#[derive(Debug)]
struct WrongFrame;

/// A complete frame.
struct Frame<'a> {
    header: FrameHeader,
    payload: &'a [u8],
    /// The length of header and payload.
    length: usize,
}

/// The first frame, if it is complete.
fn next_frame(bytes: &[u8]) -> Option<Result<Frame<'_>, WrongFrame>> {
    let mut cursor = Cursor::new(bytes);
    let (header, length) = match FrameHeader::parse(&mut cursor) {
        Ok(Some(both)) => both,
        Ok(None) => return None,
        Err(_) => return Some(Err(WrongFrame)),
    };
    let Some(length) = usize::try_from(length).ok().filter(|&length| length <= MESSAGE_BYTES_MAX)
    else {
        return Some(Err(WrongFrame));
    };
    if header.mask.is_some() {
        return Some(Err(WrongFrame));
    }
    let begins = cursor.position() as usize;
    let payload = bytes.get(begins..begins + length)?;
    Some(Ok(Frame { header, payload, length: begins + length }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a server sends: no mask.
    fn frame(opcode: OpCode, is_final: bool, payload: &[u8]) -> Vec<u8> {
        let header = FrameHeader { opcode, is_final, ..FrameHeader::default() };
        let mut bytes = vec![];
        header.format(payload.len() as u64, &mut bytes).unwrap();
        bytes.extend_from_slice(payload);
        bytes
    }

    fn upgrade(number: u32) -> Vec<u8> {
        let accept = derive_accept_key(WebSocket::key(number).as_bytes());
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             sec-websocket-accept: {accept}\r\n\r\n"
        )
        .into_bytes()
    }

    fn echo(text: &str) -> Option<Text> {
        Some(Text { message: text.into(), answer: text.into() })
    }

    fn opened(websocket: &WebSocket, number: u32) -> WebSocketState {
        let (mut state, mut out) = (websocket.state(), vec![]);
        websocket.open(&mut state, number, &mut out);
        assert!(out.starts_with(b"GET /chat HTTP/1.1\r\nHost: example.com\r\n"));
        let answer = websocket.receive(&mut state, number, &upgrade(number), &mut out);
        assert_eq!(answer, Answer::Complete);
        state
    }

    /// All but the last piece are parts of the answer.
    fn assert_answered_in_pieces(
        websocket: &WebSocket,
        state: &mut WebSocketState,
        bytes: &[u8],
        size: usize,
    ) {
        let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
        let (last, before) = pieces.split_last().unwrap();
        for piece in before {
            assert_eq!(websocket.receive(state, 7, piece, &mut vec![]), Answer::Partial);
        }
        assert_eq!(websocket.receive(state, 7, last, &mut vec![]), Answer::Complete);
        assert!(state.input.is_none(), "an idle connection keeps nothing");
    }

    #[test]
    fn it_is_upgraded_in_any_pieces() {
        let websocket = WebSocket::new("example.com", "/chat", None);
        let head = upgrade(7);
        for size in 1..=head.len() {
            let mut state = websocket.state();
            websocket.open(&mut state, 7, &mut vec![]);
            assert_answered_in_pieces(&websocket, &mut state, &head, size);
        }
        for head in [upgrade(8), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), b"\x81\x00".to_vec()]
        {
            let mut state = websocket.state();
            websocket.open(&mut state, 7, &mut vec![]);
            assert_eq!(websocket.receive(&mut state, 7, &head, &mut vec![]), Answer::Mismatch);
        }
    }

    #[test]
    fn a_ping_has_its_own_pong() {
        let websocket = WebSocket::new("example.com", "/chat", None);
        let mut state = opened(&websocket, 7);
        let pong = |payload: &[u8]| frame(OpCode::Control(Control::Pong), true, payload);
        let mut out = vec![];
        websocket.heartbeat(&mut state, 7, &mut out);
        let (header, length) = FrameHeader::parse(&mut Cursor::new(&out)).unwrap().unwrap();
        assert_eq!((header.opcode, length), (OpCode::Control(Control::Ping), 4));
        let unmasked: Vec<u8> =
            out[6..].iter().zip(header.mask.unwrap()).map(|(byte, key)| byte ^ key).collect();
        assert_eq!(unmasked, 7_u32.to_be_bytes());
        assert_answered_in_pieces(&websocket, &mut state, &pong(&7_u32.to_be_bytes()), 1);
        websocket.heartbeat(&mut state, 7, &mut out);
        assert_eq!(websocket.receive(&mut state, 7, &pong(b"seven"), &mut out), Answer::Mismatch);
    }

    #[test]
    fn a_message_is_answered_whole_or_in_fragments() {
        let text = "x".repeat(70_000);
        let websocket = WebSocket::new("example.com", "/chat", echo(&text));
        let mut state = opened(&websocket, 7);
        let whole = frame(OpCode::Data(Data::Text), true, text.as_bytes());
        let (head, tail) = text.as_bytes().split_at(30_000);
        let mut fragments = frame(OpCode::Data(Data::Binary), false, head);
        fragments.extend(frame(OpCode::Control(Control::Ping), true, b"between"));
        fragments.extend(frame(OpCode::Data(Data::Continue), true, tail));
        for bytes in [&whole, &fragments] {
            for size in [1_000, 4_096, 200_000] {
                websocket.heartbeat(&mut state, 7, &mut vec![]);
                assert_answered_in_pieces(&websocket, &mut state, bytes, size);
            }
        }
    }

    #[test]
    fn unsolicited_messages_are_not_answers() {
        let websocket = WebSocket::new("example.com", "/chat", echo("hello"));
        let mut state = opened(&websocket, 7);
        let mut out = vec![];
        let push = frame(OpCode::Data(Data::Text), true, b"news");
        assert_eq!(websocket.receive(&mut state, 7, &push, &mut out), Answer::Partial);
        let ping = frame(OpCode::Control(Control::Ping), true, b"alive?");
        assert_eq!(websocket.receive(&mut state, 7, &ping, &mut out), Answer::Partial);
        let (header, length) = FrameHeader::parse(&mut Cursor::new(&out)).unwrap().unwrap();
        assert_eq!((header.opcode, length), (OpCode::Control(Control::Pong), 6));
        assert!(!websocket.has_part(&state));
        websocket.heartbeat(&mut state, 7, &mut out);
        assert_eq!(websocket.receive(&mut state, 7, &push, &mut out), Answer::Mismatch);
    }

    #[test]
    fn frames_that_violate_the_protocol_are_a_mismatch() {
        let websocket = WebSocket::new("example.com", "/chat", None);
        let too_long = [0x82, 127, 0, 0, 0, 0, 0x10, 0, 0, 0];
        for bytes in [&too_long[..], &[0x81, 0x80, 1, 2, 3, 4], &[0x83, 0]] {
            let mut state = opened(&websocket, 7);
            assert_eq!(websocket.receive(&mut state, 7, bytes, &mut vec![]), Answer::Mismatch);
        }
    }
}
