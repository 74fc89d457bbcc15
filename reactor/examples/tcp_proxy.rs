//! A TCP proxy: `cargo run --example tcp_proxy -- 127.0.0.1:7007 127.0.0.1:80`.
//!
//! Each connection stores the token of its other half. Back-pressure works in both directions, and half-closes and
//! resets are forwarded.

use std::net::SocketAddr;
use std::time::Duration;

use reactor::{
    CloseReason, Config, ConnectOptions, Context, Handler, Incoming, Keepalive, ListenOptions,
    Reactor, Signal, Token, Written,
};

use common::{Failure, address, usage_error};

mod common;

struct Proxy {
    upstream: SocketAddr,
    options: ConnectOptions,
}

/// One half of a pair.
struct Half {
    other: Option<Token>,
}

impl Proxy {
    fn dial(&self, cx: &mut Context<Half>, client: Token) -> Option<Token> {
        match cx.connect(self.upstream, &self.options, Half { other: Some(client) }) {
            Ok(upstream) => Some(upstream),
            Err(error) => {
                eprintln!("{} can't be reached: {error}", self.upstream);
                None
            }
        }
    }
}

impl Handler for Proxy {
    type Conn = Half;

    fn on_accept(&mut self, _cx: &mut Context<Half>, _incoming: &Incoming<'_>) -> Option<Half> {
        Some(Half { other: None })
    }

    fn on_open(&mut self, cx: &mut Context<Half>, token: Token, half: &mut Half) {
        if half.other.is_none() {
            half.other = self.dial(cx, token);
            if half.other.is_none() {
                cx.abort(token);
            }
        }
    }

    fn on_data(&mut self, cx: &mut Context<Half>, token: Token, half: &mut Half, bytes: &mut [u8]) {
        let Some(other) = half.other else { return };
        // During the connect of the other half, the bytes are queued there, and reads from the client are paused.
        match cx.write(other, bytes) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(_) => cx.abort(token),
        }
    }

    fn on_drain(&mut self, cx: &mut Context<Half>, _token: Token, half: &mut Half) {
        if let Some(other) = half.other {
            cx.resume_reads(other);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<Half>, _token: Token, half: &mut Half) {
        // A connection ends when both sides have finished.
        if let Some(other) = half.other {
            cx.finish(other);
        }
    }

    fn on_close(&mut self, cx: &mut Context<Half>, _token: Token, half: Half, reason: CloseReason) {
        if let CloseReason::ConnectFailed(_) | CloseReason::ConnectTimedOut = reason {
            eprintln!("{} can't be reached: {reason}", self.upstream);
        }
        let orderly =
            matches!(reason, CloseReason::Finished | CloseReason::Closed | CloseReason::PeerClosed);
        if let Some(other) = half.other
            && !orderly
        {
            cx.abort(other);
        }
    }
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let (Some(listen), Some(upstream)) = (args.next(), args.next()) else {
        usage_error(
            "expected the address to listen on and the upstream address: tcp_proxy LISTEN UPSTREAM",
        );
    };
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    // There is no idle timeout, because connections may be idle. Keepalive detects peers that are gone.
    let keepalive = Some(Keepalive::default());
    let options = ListenOptions { keepalive, ..ListenOptions::default() };
    let listener = cx.listen(address(&listen), &options)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    let options = ConnectOptions {
        timeout: Some(Duration::from_secs(10)),
        nodelay: true,
        keepalive,
        ..ConnectOptions::default()
    };
    reactor.run(&mut Proxy { upstream: address(&upstream), options })?;
    Ok(())
}
