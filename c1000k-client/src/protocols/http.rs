//! HTTP/1.1 with keep-alive: a GET is sent, and a complete response with status 2xx or 3xx is expected.

use super::{Answer, Complaint, Protocol, start_of};

/// The longest head of a response, and the longest line of a chunked body.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// More header fields are an error.
const FIELDS_MAX: usize = 128;

/// Requests one path repeatedly.
#[derive(Clone, Debug)]
pub struct Http {
    request: Vec<u8>,
    complaint: Complaint,
}

/// The state of the expected response. The head is buffered until it is complete; a body is never buffered.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum HttpState {
    /// None is expected.
    #[default]
    Idle,
    /// The received part of the head.
    Head(Vec<u8>),
    /// This many bytes of the body are missing.
    Body(u64),
    /// In a chunked body.
    Chunked(Chunked),
}

/// The state of a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunked {
    /// In the line with a chunk's size: the size so far, whether it has a digit, and whether it is complete.
    Size {
        /// So far.
        size: u64,
        /// It has begun.
        has_digit: bool,
        /// An extension follows, which is ignored.
        in_extension: bool,
    },
    /// This many bytes of the chunk are missing, with the line break after it.
    Data(u64),
    /// In the fields after the last chunk: this many bytes of a line.
    Trailer(usize),
}

const FIRST_CHUNK: Chunked = Chunked::Size { size: 0, has_digit: false, in_extension: false };

impl Http {
    /// Requests a path of `host`, as it was given.
    pub fn new(host: &str, path: &str) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: c1000k-client/{version}\r\nAccept: */*\r\n\r\n"
        );
        Self { request: request.into_bytes(), complaint: Complaint::default() }
    }
}

impl Protocol for Http {
    type State = HttpState;

    fn state(&self) -> HttpState {
        HttpState::Idle
    }

    fn expected(&self) -> &'static str {
        "an HTTP response with status 2xx or 3xx and a length, on a connection that stays open"
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.text()
    }

    fn open(&self, state: &mut HttpState, _number: u32, out: &mut Vec<u8>) {
        *state = HttpState::Head(Vec::new());
        out.extend_from_slice(&self.request);
    }

    fn heartbeat(&self, state: &mut HttpState, number: u32, out: &mut Vec<u8>) {
        self.open(state, number, out);
    }

    fn receive(
        &self,
        state: &mut HttpState,
        _number: u32,
        bytes: &[u8],
        _out: &mut Vec<u8>,
    ) -> Answer {
        match read(state, bytes) {
            Some(true) => {
                *state = HttpState::Idle;
                Answer::Complete
            }
            Some(false) => Answer::Partial,
            None => {
                self.complaint.note(|| first_line(state, bytes));
                Answer::Mismatch
            }
        }
    }

    fn has_part(&self, state: &HttpState) -> bool {
        match state {
            HttpState::Idle => false,
            HttpState::Head(head) => !head.is_empty(),
            HttpState::Body(_) | HttpState::Chunked(_) => true,
        }
    }
}

/// Whether the response is complete with these bytes; `None` if they are wrong.
fn read(state: &mut HttpState, bytes: &[u8]) -> Option<bool> {
    match state {
        HttpState::Idle => None,
        HttpState::Head(head) => {
            head.extend_from_slice(bytes);
            let Some(rest) = body_after(head)? else {
                return (head.len() <= HEAD_BYTES_MAX).then_some(false);
            };
            let body = head.split_off(rest.begins);
            *state = rest.state;
            read_body(state, &body)
        }
        HttpState::Body(_) | HttpState::Chunked(_) => read_body(state, bytes),
    }
}

/// The beginning of the wrong answer.
fn first_line(state: &HttpState, bytes: &[u8]) -> String {
    let text = match state {
        HttpState::Head(head) => head,
        _ => bytes,
    };
    format!("it sent {}", start_of(text))
}

/// The body that follows a head.
struct Rest {
    begins: usize,
    state: HttpState,
}

/// `None` if the head is not a valid answer; `Some(None)` if it is incomplete.
#[expect(clippy::option_option, reason = "wrong, incomplete, complete")]
fn body_after(head: &[u8]) -> Option<Option<Rest>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let begins = match response.parse(head).ok()? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Some(None),
    };
    let status = response.code.filter(|status| (200..400).contains(status))?;
    let field = |name: &str| {
        let found = response.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name));
        found.and_then(|field| std::str::from_utf8(field.value).ok()).map(str::trim)
    };
    if field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
        return None;
    }
    let is_chunked = field("transfer-encoding").is_some_and(|coding| coding.ends_with("chunked"));
    let state = match field("content-length").map(str::parse) {
        _ if matches!(status, 204 | 304) => HttpState::Body(0),
        _ if is_chunked => HttpState::Chunked(FIRST_CHUNK),
        Some(length) => HttpState::Body(length.ok()?),
        None => return None,
    };
    Some(Some(Rest { begins, state }))
}

fn read_body(state: &mut HttpState, bytes: &[u8]) -> Option<bool> {
    match state {
        HttpState::Body(left) => {
            *left = left.checked_sub(bytes.len() as u64)?;
            Some(*left == 0)
        }
        HttpState::Chunked(chunked) => read_chunks(chunked, bytes),
        HttpState::Idle | HttpState::Head(_) => None,
    }
}

fn read_chunks(chunked: &mut Chunked, mut bytes: &[u8]) -> Option<bool> {
    while let Some((&byte, rest)) = bytes.split_first() {
        *chunked = match *chunked {
            Chunked::Data(left) => {
                let taken = left.min(bytes.len() as u64);
                bytes = &bytes[taken as usize..];
                let left = left - taken;
                *chunked = if left == 0 { FIRST_CHUNK } else { Chunked::Data(left) };
                continue;
            }
            Chunked::Size { size, has_digit: true, .. } if byte == b'\n' => match size {
                0 => Chunked::Trailer(0),
                size => Chunked::Data(size.checked_add(2)?),
            },
            Chunked::Size { size, has_digit: true, .. } if byte == b'\r' || byte == b';' => {
                Chunked::Size { size, has_digit: true, in_extension: true }
            }
            Chunked::Size { in_extension: true, .. } => *chunked,
            Chunked::Size { size, .. } => {
                let digit = char::from(byte).to_digit(16)?;
                let size = size.checked_mul(16)?.checked_add(u64::from(digit))?;
                Chunked::Size { size, has_digit: true, in_extension: false }
            }
            Chunked::Trailer(0) if byte == b'\n' => return rest.is_empty().then_some(true),
            Chunked::Trailer(_) if byte == b'\n' => Chunked::Trailer(0),
            Chunked::Trailer(length) if byte == b'\r' => Chunked::Trailer(length),
            Chunked::Trailer(length) => {
                Chunked::Trailer(Some(length + 1).filter(|&length| length <= HEAD_BYTES_MAX)?)
            }
        };
        bytes = rest;
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: [&str; 5] = [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1A;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n0\r\nTrailer: 1\r\nOther: 2\r\n\r\n",
    ];

    fn answers(pieces: impl Iterator<Item = Vec<u8>>) -> Vec<Answer> {
        let http = Http::new("example.com", "/");
        let (mut state, mut out) = (http.state(), vec![]);
        http.open(&mut state, 1, &mut out);
        pieces.map(|piece| http.receive(&mut state, 1, &piece, &mut out)).collect()
    }

    #[test]
    fn a_response_may_come_in_any_pieces() {
        for text in WHOLE {
            for size in 1..=text.len() {
                let found = answers(text.as_bytes().chunks(size).map(<[u8]>::to_vec));
                let (last, before) = found.split_last().unwrap();
                assert_eq!(*last, Answer::Complete, "{text}, {size}");
                assert!(before.iter().all(|answer| *answer == Answer::Partial), "{text}, {size}");
            }
        }
    }

    #[test]
    fn an_invalid_answer_is_a_mismatch() {
        for text in [
            "SSH-2.0-OpenSSH_9\r\n",
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nuntil the end",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nfour",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nmore",
        ] {
            let found = answers(std::iter::once(text.as_bytes().to_vec()));
            assert_eq!(found, [Answer::Mismatch], "{text}");
        }
        let endless = "x".repeat(2 * HEAD_BYTES_MAX);
        let head = format!("HTTP/1.1 200 OK\r\nA: {endless}");
        let found = answers(head.as_bytes().chunks(4_096).map(<[u8]>::to_vec));
        assert_eq!(found.last(), Some(&Answer::Mismatch));
    }

    #[test]
    fn an_unsolicited_response_is_a_mismatch_and_a_second_request_equals_the_first() {
        let http = Http::new("example.com:8080", "/health?x=1");
        let (mut state, mut first, mut second) = (http.state(), vec![], vec![]);
        assert_eq!(http.receive(&mut state, 1, WHOLE[0].as_bytes(), &mut first), Answer::Mismatch);
        http.open(&mut state, 1, &mut first);
        assert!(first.starts_with(b"GET /health?x=1 HTTP/1.1\r\nHost: example.com:8080\r\n"));
        assert_eq!(http.receive(&mut state, 1, WHOLE[0].as_bytes(), &mut vec![]), Answer::Complete);
        assert_eq!(state, HttpState::Idle);
        http.heartbeat(&mut state, 1, &mut second);
        assert_eq!(first, second);
    }
}
