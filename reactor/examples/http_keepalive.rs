//! An HTTP/1.1 server with keep-alive and pipelining: `cargo run --example http_keepalive -- 127.0.0.1:8080`.
//!
//! `httparse` parses the request heads. The example adds the rest of a server: requests that arrive in pieces or many
//! at a time, request bodies, which it skips, one write for all answers of one read, and bounds for all of it.

use std::io::Write;
use std::time::Duration;

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, Token, WriteError, Written,
};

use common::{Failure, address};

mod common;

const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// The time limit for a complete request head, and for the time between requests.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Http {
    /// The answers to one read, which are written together; the buffer is reused.
    answers: Vec<u8>,
}

#[derive(Default)]
struct Conn {
    /// An incomplete request head.
    head: Vec<u8>,
    /// The bytes of a request's body that are still to be skipped.
    body_left: u64,
}

/// Whether the connection is kept open.
#[derive(PartialEq)]
enum Then {
    Keep,
    Close,
}

struct Request {
    head_bytes: usize,
    body_bytes: u64,
    is_found: bool,
    wants_body: bool,
    then: Then,
}

/// The status of a request that can't be served; the connection is closed after it.
struct Refusal(&'static str);

const BAD_REQUEST: Refusal = Refusal("400 Bad Request");
const HEAD_TOO_LARGE: Refusal = Refusal("431 Request Header Fields Too Large");
const NOT_IMPLEMENTED: Refusal = Refusal("501 Not Implemented");

impl Http {
    /// Answers every complete request in the input, and keeps the rest.
    fn answer_all(&mut self, conn: &mut Conn, bytes: &[u8]) -> Then {
        let mut rest = bytes;
        loop {
            let skipped = conn.body_left.min(rest.len() as u64);
            conn.body_left -= skipped;
            rest = &rest[skipped as usize..];
            if rest.is_empty() {
                return Then::Keep;
            }
            match parse(rest) {
                Ok(Some(request)) => {
                    conn.body_left = request.body_bytes;
                    rest = &rest[request.head_bytes..];
                    self.answer(&request);
                    if request.then == Then::Close {
                        return Then::Close;
                    }
                }
                Ok(None) => {
                    conn.head = rest.to_vec();
                    return Then::Keep;
                }
                Err(Refusal(status)) => {
                    self.push(status, "", true, &Then::Close);
                    return Then::Close;
                }
            }
        }
    }

    fn answer(&mut self, request: &Request) {
        let (status, body) =
            if request.is_found { ("200 OK", "hello\n") } else { ("404 Not Found", "not here\n") };
        self.push(status, body, request.wants_body, &request.then);
    }

    fn push(&mut self, status: &str, body: &str, wants_body: bool, then: &Then) {
        let connection = if *then == Then::Close { "close" } else { "keep-alive" };
        let length = body.len();
        let body = if wants_body { body } else { "" };
        // Writing into a Vec can't fail.
        let _ = write!(
            self.answers,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
             Connection: {connection}\r\n\r\n{body}"
        );
    }
}

/// Parses the request at the beginning of the bytes; `None` if it is incomplete.
fn parse(bytes: &[u8]) -> Result<Option<Request>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let head_bytes = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_BYTES_MAX => return Ok(None),
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(HEAD_TOO_LARGE);
        }
        Err(_) => return Err(BAD_REQUEST),
    };
    let fields = Fields::of(request.headers, request.version == Some(1))?;
    Ok(Some(Request {
        head_bytes,
        body_bytes: fields.body_bytes.unwrap_or(0),
        is_found: request.path == Some("/"),
        wants_body: request.method != Some("HEAD"),
        then: if fields.keeps { Then::Keep } else { Then::Close },
    }))
}

/// The header fields that concern the body and the connection.
struct Fields {
    hosts: usize,
    body_bytes: Option<u64>,
    keeps: bool,
    closes: bool,
}

impl Fields {
    fn of(headers: &[httparse::Header<'_>], is_1_1: bool) -> Result<Self, Refusal> {
        let mut fields = Self { hosts: 0, body_bytes: None, keeps: is_1_1, closes: false };
        for header in headers {
            fields.add(header)?;
        }
        // HTTP/1.1 requires exactly one Host field; with two, a proxy could route the request by the other one.
        if fields.hosts > 1 || (is_1_1 && fields.hosts == 0) {
            return Err(BAD_REQUEST);
        }
        fields.keeps &= !fields.closes;
        Ok(fields)
    }

    fn add(&mut self, header: &httparse::Header<'_>) -> Result<(), Refusal> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("host") {
            self.hosts += 1;
        } else if is("content-length") {
            let length = whole_number(header.value).ok_or(BAD_REQUEST)?;
            if self.body_bytes.replace(length).is_some_and(|other| other != length) {
                return Err(BAD_REQUEST);
            }
        } else if is("transfer-encoding") {
            return Err(NOT_IMPLEMENTED);
        } else if is("connection") {
            for option in header.value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                self.closes |= option.eq_ignore_ascii_case(b"close");
                self.keeps |= option.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(())
    }
}

/// Accepts digits only: a sign or a comma allows request smuggling.
fn whole_number(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

impl Handler for Http {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Context<Conn>, _incoming: &Incoming<'_>) -> Option<Conn> {
        Some(Conn::default())
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, _conn: &mut Conn) {
        cx.set_timeout(token, REQUEST_TIMEOUT);
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        self.answers.clear();
        let then = if conn.head.is_empty() {
            self.answer_all(conn, bytes)
        } else {
            let mut head = std::mem::take(&mut conn.head);
            head.extend_from_slice(bytes);
            self.answer_all(conn, &head)
        };
        if !self.answers.is_empty() {
            // Only an answer extends the timeout, so a slowly sent request head is limited.
            cx.set_timeout(token, REQUEST_TIMEOUT);
        }
        match cx.write(token, &self.answers) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(WriteError::Closed) => {}
            Err(_) => return cx.abort(token),
        }
        if then == Then::Close {
            cx.close(token);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Conn>, token: Token, _conn: &mut Conn) {
        cx.resume_reads(token);
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:8080".to_owned());
    // One read of 64 KiB, after an incomplete head of 8 KiB, contains at most 3,686 requests of 20 bytes, with answers
    // of 104 bytes each. While answers are queued nothing is read, so the queue never needs to hold more.
    let config = Config { write_queue_bytes_max: 1024 * 1024, ..Config::default() };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    let listener = cx.listen(address(&argument), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Http::default())?;
    Ok(())
}
