//! Pushes texts through TLS and WebSocket, with a heartbeat:
//!
//! ```sh
//! openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=localhost \
//!     -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem
//! cargo run --release --example wss_push -- 127.0.0.1:7443 cert.pem key.pem 30
//! c1000k-client wss://localhost:7443 --ca cert.pem -c 10k
//! ```
//!
//! A text that any client sends goes to all of them. The last argument is the heartbeat in seconds: a client that has said
//! nothing for that long is sent a ping, and is dropped when nothing has come for as long again.
//!
//! It shows how protocols are put upon each other with few copies: bytes are decrypted in the buffer that all reads share
//! (`tls.rs`), unmasked where they lie (`websocket.rs`), and answers are made in buffers that all connections share. A
//! connection has heap memory for its TLS session and for what is not whole yet. README.md beside this folder says what
//! that is in bytes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, SweepId, Token, Written,
};
use rustls::ServerConfig;
use tungstenite::protocol::frame::coding::CloseCode;

use common::{Failure, address, misused, seconds};
use tls::Tls;
use websocket::{Ended, WebSocket};

#[path = "../common/mod.rs"]
mod common;
mod tls;
mod websocket;

/// A reader that is so far behind is dropped.
const BEHIND_BYTES_MAX: usize = 256 * 1024;

type Cx = Context<Box<Peer>>;

struct Push {
    config: Arc<ServerConfig>,
    heartbeat: Duration,
    /// What is being sent to all.
    under_way: HashMap<SweepId, Arc<[u8]>>,
    // These serve all connections, and are empty between two callbacks.
    heard: Vec<u8>,
    texts: Vec<Arc<[u8]>>,
    said: Vec<u8>,
    records: Vec<u8>,
}

struct Peer {
    tls: Tls,
    websocket: WebSocket,
    /// A ping has been sent, and nothing has come since.
    is_asked: bool,
}

impl Push {
    /// What has arrived goes up through the layers, and the answers down again.
    fn serve(&mut self, cx: &mut Cx, peer: &mut Peer, bytes: &mut [u8]) -> Result<(), Ended> {
        peer.tls.receive(bytes, &mut self.heard, &mut self.records);
        let result = peer.websocket.receive(&mut self.heard, &mut self.texts, &mut self.said);
        self.heard.clear();
        for text in self.texts.drain(..) {
            match cx.sweep() {
                Ok(sweep) => drop(self.under_way.insert(sweep, text)),
                Err(_) => return Err(websocket::close(CloseCode::Again, &mut self.said)),
            }
        }
        if peer.tls.is_ended() { Err(Ended) } else { result }
    }

    fn encrypt(&mut self, peer: &mut Peer) {
        if !self.said.is_empty() {
            peer.tls.send(&self.said, &mut self.records);
            self.said.clear();
        }
    }

    /// Encrypts what has been said, and sends it with what the session has to send itself.
    fn send(&mut self, cx: &mut Cx, token: Token, peer: &mut Peer) {
        self.encrypt(peer);
        match cx.write(token, &self.records) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            // A record that is left out can't be made up for.
            Err(_) => cx.abort(token),
        }
        self.records.clear();
    }

    /// Says goodbye at both layers, and lets all that was said go out.
    fn end(&mut self, cx: &mut Cx, token: Token, peer: &mut Peer) {
        self.encrypt(peer);
        peer.tls.finish(&mut self.records);
        self.send(cx, token, peer);
        cx.close(token);
    }
}

impl Handler for Push {
    type Conn = Box<Peer>;

    fn on_accept(&mut self, _cx: &mut Cx, _incoming: &Incoming<'_>) -> Option<Box<Peer>> {
        let tls = Tls::new(&self.config).ok()?;
        Some(Box::new(Peer { tls, websocket: WebSocket::default(), is_asked: false }))
    }

    fn on_open(&mut self, cx: &mut Cx, token: Token, _peer: &mut Box<Peer>) {
        cx.set_timeout(token, self.heartbeat);
    }

    fn on_data(&mut self, cx: &mut Cx, token: Token, peer: &mut Box<Peer>, bytes: &mut [u8]) {
        match self.serve(cx, peer, bytes) {
            Ok(()) => self.send(cx, token, peer),
            Err(Ended) => return self.end(cx, token, peer),
        }
        // Only an open one can be asked, so the handshakes have this time once, in however many pieces they come.
        if peer.websocket.is_open() {
            peer.is_asked = false;
            cx.set_timeout(token, self.heartbeat);
        }
    }

    fn on_drain(&mut self, cx: &mut Cx, token: Token, _peer: &mut Box<Peer>) {
        cx.resume_reads(token);
    }

    fn on_timeout(&mut self, cx: &mut Cx, token: Token, peer: &mut Box<Peer>) {
        if !peer.websocket.is_open() {
            return self.end(cx, token, peer);
        }
        if peer.is_asked {
            return cx.abort(token);
        }
        peer.is_asked = true;
        cx.set_timeout(token, self.heartbeat);
        websocket::ping(&mut self.said);
        self.send(cx, token, peer);
    }

    fn on_visit(&mut self, cx: &mut Cx, sweep: SweepId, token: Token, peer: &mut Box<Peer>) {
        if let Some(text) = self.under_way.get(&sweep)
            && peer.websocket.is_open()
        {
            self.said.extend_from_slice(text);
            self.send(cx, token, peer);
        }
    }

    fn on_swept(&mut self, _cx: &mut Cx, sweep: SweepId) {
        self.under_way.remove(&sweep);
    }

    fn on_shutdown(&mut self, cx: &mut Cx, token: Token, peer: &mut Box<Peer>) {
        if peer.websocket.is_open() {
            websocket::close(CloseCode::Away, &mut self.said);
        }
        self.end(cx, token, peer);
    }
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let listen = address(&args.next().unwrap_or("127.0.0.1:7443".to_owned()));
    let (Some(chain), Some(key)) = (args.next(), args.next()) else {
        misused("give an address and two PEM files: wss_push LISTEN CERTIFICATES KEY [HEARTBEAT]");
    };
    let heartbeat = seconds(&args.next().unwrap_or("30".to_owned()));

    let config = Config { write_queue_bytes_max: BEHIND_BYTES_MAX, ..Config::default() };
    let mut push = Push {
        config: tls::config(Path::new(&chain), Path::new(&key))?,
        heartbeat,
        under_way: HashMap::new(),
        heard: Vec::new(),
        texts: Vec::new(),
        said: Vec::new(),
        records: Vec::new(),
    };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    let listener = cx.listen(listen, &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut push)?;
    Ok(())
}
