//! A small push gateway: `cargo run --example idle_push -- 127.0.0.1:7007 127.0.0.1:7008 60`.
//!
//! Devices connect to the first address, send their number and a newline, and then any byte as a heartbeat. A device
//! that is idle for longer than the third argument, in seconds, is closed. Operators connect to the second address and
//! send `push NUMBER TEXT`, `all TEXT` or `count`.
//!
//! The gateway is made for a million idle devices: the state of a device is 16 bytes, inline in its slot, without a
//! buffer or a heap block, and a heartbeat extends its timeout by storing one integer.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use reactor::{
    CloseReason, Config, Context, Handler, Incoming, ListenOptions, ListenerId, Reactor, Signal,
    SweepId, Token, WriteError,
};

use common::{Failure, address, usage_error};

mod common;

const COMMAND_BYTES_MAX: usize = 4096;

struct Gateway {
    operators: ListenerId,
    heartbeat_max: Duration,
    devices: HashMap<u64, Token>,
    announcements: HashMap<SweepId, Arc<[u8]>>,
}

enum Conn {
    /// A device that has not sent its complete number: the digits so far.
    Unnamed(u64),
    Device(u64),
    /// Boxed, because there are few operators and many devices.
    Operator(Box<Operator>),
}

#[derive(Default)]
struct Operator {
    /// An incomplete command.
    partial: Vec<u8>,
}

const _: () = assert!(size_of::<Conn>() <= 16, "a million devices have this state");

impl Gateway {
    /// Parses a device's number digit by digit, without a buffer.
    fn on_device_data(
        &mut self,
        cx: &mut Context<Conn>,
        token: Token,
        conn: &mut Conn,
        bytes: &[u8],
    ) {
        cx.set_timeout(token, self.heartbeat_max);
        for byte in bytes {
            let Conn::Unnamed(number) = conn else { return };
            match byte {
                b'0'..=b'9' => {
                    let digit = u64::from(byte - b'0');
                    match number.checked_mul(10).and_then(|tens| tens.checked_add(digit)) {
                        Some(longer) => *number = longer,
                        None => return cx.abort(token),
                    }
                }
                b'\n' => {
                    let number = *number;
                    *conn = Conn::Device(number);
                    // A device that reconnects replaces its old connection, which may not have timed out yet.
                    if let Some(old) = self.devices.insert(number, token) {
                        cx.abort(old);
                    }
                }
                b'\r' => {}
                _ => return cx.abort(token),
            }
        }
    }

    fn execute(&mut self, cx: &mut Context<Conn>, command: &str) -> String {
        match command.split_once(' ').unwrap_or((command, "")) {
            ("push", rest) => self.push(cx, rest).to_owned(),
            ("all", text) => self.announce(cx, text).to_owned(),
            ("count", _) => self.devices.len().to_string(),
            _ => "push NUMBER TEXT, all TEXT, or count".to_owned(),
        }
    }

    fn push(&mut self, cx: &mut Context<Conn>, rest: &str) -> &'static str {
        let Some((number, text)) = rest.split_once(' ') else { return "push NUMBER TEXT" };
        let Some(&token) = number.parse().ok().and_then(|number: u64| self.devices.get(&number))
        else {
            return "not here";
        };
        match cx.write_chunk(token, format!("{text}\n").into_bytes()) {
            Ok(_) => "sent",
            Err(WriteError::Closed) => "not here",
            Err(_) => "too slow",
        }
    }

    fn announce(&mut self, cx: &mut Context<Conn>, text: &str) -> &'static str {
        let Ok(sweep) = cx.sweep() else { return "later" };
        self.announcements.insert(sweep, format!("{text}\n").into_bytes().into());
        "on its way"
    }
}

impl Handler for Gateway {
    type Conn = Conn;

    fn on_accept(&mut self, _cx: &mut Context<Conn>, incoming: &Incoming<'_>) -> Option<Conn> {
        Some(if incoming.listener() == self.operators {
            Conn::Operator(Box::default())
        } else {
            Conn::Unnamed(0)
        })
    }

    fn on_open(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        if let Conn::Unnamed(_) = conn {
            cx.set_timeout(token, self.heartbeat_max);
        }
    }

    fn on_data(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn, bytes: &mut [u8]) {
        let Conn::Operator(operator) = conn else {
            return self.on_device_data(cx, token, conn, bytes);
        };
        let mut input = mem::take(&mut operator.partial);
        input.extend_from_slice(bytes);
        for line in input.split_inclusive(|&byte| byte == b'\n') {
            let Some(command) = line.strip_suffix(b"\n") else {
                operator.partial = line.to_vec();
                break;
            };
            let answer = self.execute(cx, String::from_utf8_lossy(command).trim());
            if cx.write_chunk(token, format!("{answer}\n").into_bytes()).is_err() {
                return cx.abort(token);
            }
        }
        if operator.partial.len() > COMMAND_BYTES_MAX {
            cx.abort(token);
        }
    }

    fn on_visit(&mut self, cx: &mut Context<Conn>, sweep: SweepId, token: Token, conn: &mut Conn) {
        if let (Conn::Device(_), Some(text)) = (conn, self.announcements.get(&sweep)) {
            // A device whose queue is full misses the announcement; if it is dead, its timeout closes it.
            let _ = cx.write_chunk(token, Arc::clone(text));
        }
    }

    fn on_swept(&mut self, _cx: &mut Context<Conn>, sweep: SweepId) {
        self.announcements.remove(&sweep);
    }

    fn on_timeout(&mut self, cx: &mut Context<Conn>, token: Token, _conn: &mut Conn) {
        cx.abort(token);
    }

    fn on_close(&mut self, _cx: &mut Context<Conn>, token: Token, conn: Conn, _: CloseReason) {
        if let Conn::Device(number) = conn
            && self.devices.get(&number) == Some(&token)
        {
            self.devices.remove(&number);
        }
    }
}

fn seconds(argument: &str) -> Duration {
    let seconds =
        argument.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.unwrap_or_else(|| usage_error(&format!("{argument:?} is not a number of seconds")))
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let devices = args.next().unwrap_or("127.0.0.1:7007".to_owned());
    let operators = args.next().unwrap_or("127.0.0.1:7008".to_owned());
    let heartbeat_max = seconds(&args.next().unwrap_or("60".to_owned()));

    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    let options = ListenOptions::default();
    let devices = cx.listen(address(&devices), &options)?;
    let operators = cx.listen(address(&operators), &options)?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(devices)?);
    println!("operators: {}", cx.listener_addr(operators)?);
    let mut gateway = Gateway {
        operators,
        heartbeat_max,
        devices: HashMap::new(),
        announcements: HashMap::new(),
    };
    reactor.run(&mut gateway)?;
    Ok(())
}
