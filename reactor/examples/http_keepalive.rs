//! Answers HTTP/1.1 with keep-alive and pipelining: `cargo run --example http_keepalive -- 127.0.0.1:8080`.
//!
//! `httparse` parses; what is here is what a server adds to it: requests that arrive in pieces or many at a time,
//! bodies that are skipped, one write for all answers of one read, and bounds on all of it.

use std::io::Write;
use std::time::Duration;

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, Token, WriteError, Written,
};

use common::{Failure, address};

mod common;

const HEAD_BYTES_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
/// For one whole request head, and for the silence between requests.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Http {
    /// The answers to one read, written at once; it is used again and again.
    answers: Vec<u8>,
}

#[derive(Default)]
struct Conn {
    /// The beginning of a request whose end has not arrived yet.
    head: Vec<u8>,
    /// Bytes of a request's body that are still to come, to be skipped.
    body_left: u64,
}

/// Whether the connection lives on.
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

/// A request that can't be served; the connection ends with it.
struct Refusal(&'static str);

const BAD_REQUEST: Refusal = Refusal("400 Bad Request");
const HEAD_TOO_LARGE: Refusal = Refusal("431 Request Header Fields Too Large");
const NOT_IMPLEMENTED: Refusal = Refusal("501 Not Implemented");

impl Http {
    /// Answers every whole request among the bytes, and keeps what is left of them.
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

/// The request at the beginning of the bytes; `None` where its end has not arrived.
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

/// What the header fields say of the message and of its connection.
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
        // Two hosts are how one server is made to answer for another.
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

/// Digits and nothing else: a sign or a comma is how requests are smuggled.
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
            // Only an answer buys more time: a head that comes in drops does not.
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
    // One read of 64 KiB, behind a head of 8 KiB that has waited for its end, holds at most 3,686 requests of 20
    // bytes, whose answers are 104 bytes each. While answers wait nothing is read, so the queue never has to hold more.
    let config = Config { write_queue_bytes_max: 1024 * 1024, ..Config::default() };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    let listener = cx.listen(address(&argument), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Http::default())?;
    Ok(())
}
