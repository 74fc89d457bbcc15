//! A push gateway: WebSockets over TLS, heartbeats, and a broadcast of each text to all.
//!
//! ```sh
//! openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=localhost \
//!     -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE -keyout key.pem -out cert.pem
//! cargo run --release --example wss_push -- 127.0.0.1:7443 cert.pem key.pem
//! c1000k-client wss://localhost:7443 --ca cert.pem -c 10k      # 10,000 clients
//! ```
//!
//! A text that a client sends goes to every connection. A client that is silent for 30 seconds is pinged, and closed if
//! it does not answer. README.md in this directory gives the memory per connection.

use std::io::Cursor;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reactor::{Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, SweepId, Token};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::UnbufferedServerConnection;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tungstenite::protocol::frame::{Frame, FrameHeader};

use common::{Failure, address, usage_error};
use tls::{Session, SessionState};

mod common;
#[path = "common/tls.rs"]
mod tls;

const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Longer requests and messages are refused.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
const FIELDS_MAX: usize = 64;

struct Push {
    config: Arc<ServerConfig>,
    /// The frame of each sweep.
    texts: Vec<(SweepId, Arc<[u8]>)>,
    /// These two buffers are shared by all connections.
    plain: Vec<u8>,
    out: Vec<u8>,
}

struct Conn {
    tls: Session,
    /// An incomplete request or frame.
    input: Vec<u8>,
    is_websocket: bool,
    waits_for_pong: bool,
}

/// The peer has closed, or has violated the protocol.
struct Disconnect;

impl Push {
    /// Processes the decrypted input of a peer.
    fn serve(&mut self, cx: &mut Context<Conn>, conn: &mut Conn) -> Result<(), Disconnect> {
        if !conn.is_websocket && !self.upgrade(conn)? {
            return Ok(());
        }
        let mut frames = std::mem::take(&mut conn.input);
        let mut used = 0;
        while let Some((header, length)) = parse(&frames[used..])? {
            let begin = used + header.len(length as u64);
            let Some(payload) = frames.get_mut(begin..begin + length) else { break };
            for (byte, mask) in
                payload.iter_mut().zip(header.mask.ok_or(Disconnect)?.into_iter().cycle())
            {
                *byte ^= mask;
            }
            self.on_frame(cx, conn, header.opcode, payload)?;
            used = begin + length;
        }
        frames.drain(..used);
        if !frames.is_empty() {
            conn.input = frames;
        }
        Ok(())
    }

    /// Answers the request when it is complete; returns whether it is.
    fn upgrade(&mut self, conn: &mut Conn) -> Result<bool, Disconnect> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut fields);
        let parsed = request.parse(&conn.input).map_err(|_| Disconnect)?;
        let httparse::Status::Complete(length) = parsed else {
            return if conn.input.len() < REQUEST_BYTES_MAX { Ok(false) } else { Err(Disconnect) };
        };
        let named =
            |name: &str| request.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name));
        let key = named("Sec-WebSocket-Key").ok_or(Disconnect)?.value;
        let response = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key)
        );
        conn.input.drain(..length);
        conn.is_websocket = true;
        conn.tls.send(response.as_bytes(), &mut self.out);
        Ok(true)
    }

    fn on_frame(
        &mut self,
        cx: &mut Context<Conn>,
        conn: &mut Conn,
        opcode: OpCode,
        payload: &[u8],
    ) -> Result<(), Disconnect> {
        conn.waits_for_pong = false;
        match opcode {
            OpCode::Data(Data::Text | Data::Binary) => {
                let frame = frame(Frame::message(payload.to_vec(), opcode, true));
                if let Ok(sweep) = cx.sweep() {
                    self.texts.push((sweep, frame.into()));
                }
            }
            OpCode::Control(Control::Ping) => {
                conn.tls.send(&frame(Frame::pong(payload.to_vec())), &mut self.out);
            }
            OpCode::Control(Control::Pong) => {}
            OpCode::Control(Control::Close) => {
                conn.tls.send(&frame(Frame::close(None)), &mut self.out);
                return Err(Disconnect);
            }
            // Fragmented messages are not supported.
            _ => return Err(Disconnect),
        }
        Ok(())
    }

    /// Sends the collected records. If they can't be sent, the connection is aborted: the peer could not decrypt later
    /// records.
    fn flush(&mut self, cx: &mut Context<Conn>, token: Token) {
        if !self.out.is_empty() && cx.write(token, &self.out).is_err() {
            cx.abort(token);
        }
        self.out.clear();
    }

    fn close_session(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        conn.tls.close(&mut self.out);
        self.flush(cx, token);
        cx.close(token);
    }
}

impl Handler for Push {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Context<Conn>, _incoming: &Incoming<'_>) -> Option<Conn> {
        let tls = UnbufferedServerConnection::new(Arc::clone(&self.config)).ok()?;
        let tls = Session::new(tls);
        Some(Conn { tls, input: Vec::new(), is_websocket: false, waits_for_pong: false })
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, _conn: &mut Conn) {
        cx.set_timeout(token, SILENCE_MAX);
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        cx.set_timeout(token, SILENCE_MAX);
        self.plain.clear();
        let session = conn.tls.receive(bytes, &mut self.plain, &mut self.out);
        conn.input.extend_from_slice(&self.plain);
        let served = self.serve(cx, conn);
        if session == Ok(SessionState::Open) && served.is_ok() {
            self.flush(cx, token);
        } else {
            self.close_session(cx, token, conn);
        }
    }

    /// Sends a ping to a silent peer, or closes if the last ping was not answered.
    fn on_timeout(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        if conn.waits_for_pong || !conn.is_websocket {
            return self.close_session(cx, token, conn);
        }
        conn.waits_for_pong = true;
        conn.tls.send(&frame(Frame::ping(Vec::new())), &mut self.out);
        self.flush(cx, token);
        cx.set_timeout(token, SILENCE_MAX);
    }

    fn on_visit(&mut self, cx: &mut Context<Conn>, sweep: SweepId, token: Token, conn: &mut Conn) {
        let text = self.texts.iter().find(|(id, _)| *id == sweep);
        if let Some((_, text)) = text.filter(|_| conn.is_websocket) {
            conn.tls.send(text, &mut self.out);
            self.flush(cx, token);
        }
    }

    fn on_swept(&mut self, _cx: &mut Context<Conn>, sweep: SweepId) {
        self.texts.retain(|(id, _)| *id != sweep);
    }

    fn on_eof(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        self.close_session(cx, token, conn);
    }

    fn on_shutdown(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        conn.tls.send(&frame(Frame::close(None)), &mut self.out);
        self.close_session(cx, token, conn);
    }
}

/// Parses the header of the next frame; returns it with the length of the payload, or `None` if it is incomplete.
fn parse(bytes: &[u8]) -> Result<Option<(FrameHeader, usize)>, Disconnect> {
    match FrameHeader::parse(&mut Cursor::new(bytes)) {
        Ok(Some((header, length))) if length <= MESSAGE_BYTES_MAX as u64 && header.is_final => {
            Ok(Some((header, length as usize)))
        }
        Ok(None) => Ok(None),
        _ => Err(Disconnect),
    }
}

fn frame(frame: Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing into memory can't fail.
    let _ = frame.format(&mut bytes);
    bytes
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let listen: SocketAddr = address(&args.next().unwrap_or_else(|| "127.0.0.1:7443".to_owned()));
    let (Some(certificates), Some(key)) = (args.next(), args.next()) else {
        usage_error(
            "expected an address, a certificate and its key: wss_push LISTEN CERT.pem KEY.pem",
        );
    };
    let certificates = CertificateDer::pem_file_iter(certificates)?.collect::<Result<_, _>>()?;
    let config =
        ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(certificates, PrivateKeyDer::from_pem_file(key)?)?;
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let listener = cx.listen(listen, &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    let config = Arc::new(config);
    reactor.run(&mut Push { config, texts: Vec::new(), plain: Vec::new(), out: Vec::new() })?;
    Ok(())
}
