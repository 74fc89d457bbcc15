//! A chat with rooms: `cargo run --example chat -- 127.0.0.1:7007`, then `nc 127.0.0.1 7007`.
//!
//! `/nick NAME` and `/join ROOM` change the name and the room, `/all TEXT` sends to everyone, any other line goes to the
//! room. A message is allocated once for all recipients. A peer whose queue is full is dropped, so that it delays
//! no other.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;

use reactor::{
    CloseReason, Config, Context, Handler, Incoming, ListenOptions, Reactor, Signal, SweepId, Token,
};

use common::{Failure, address};

mod common;

const LOBBY: &str = "lobby";
const LINE_BYTES_MAX: usize = 1024;
/// With `MEMBERS_MAX`, this bounds the work of one callback.
const LINES_PER_READ_MAX: usize = 64;
const MEMBERS_MAX: usize = 1000;
/// A peer with more queued bytes is dropped.
const BEHIND_BYTES_MAX: usize = 64 * 1024;

#[derive(Default)]
struct Chat {
    rooms: HashMap<String, HashSet<Token>>,
    /// The text of each sweep.
    announcements: HashMap<SweepId, Arc<[u8]>>,
}

struct Guest {
    name: String,
    room: String,
    /// An incomplete line.
    line: Vec<u8>,
}

impl Chat {
    fn execute(&mut self, cx: &mut Context<Guest>, token: Token, guest: &mut Guest, line: &str) {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("/nick", name) if !name.is_empty() => {
                let old = mem::replace(&mut guest.name, name.to_owned());
                self.send_to_room(cx, &guest.room, &format!("* {old} is {name} now"));
            }
            ("/join", room) if !room.is_empty() => self.join(cx, token, guest, room),
            ("/all", text) => self.announce(cx, token, &format!("{} to all: {text}", guest.name)),
            _ if line.starts_with('/') => {
                send_text(cx, token, "* /nick NAME, /join ROOM, /all TEXT")
            }
            _ => self.send_to_room(cx, &guest.room, &format!("{}: {line}", guest.name)),
        }
    }

    fn join(&mut self, cx: &mut Context<Guest>, token: Token, guest: &mut Guest, room: &str) {
        if self.rooms.get(room).is_some_and(|members| members.len() >= MEMBERS_MAX) {
            return send_text(cx, token, "* that room is full");
        }
        self.leave(cx, token, guest);
        guest.room = room.to_owned();
        self.rooms.entry(guest.room.clone()).or_default().insert(token);
        self.send_to_room(cx, room, &format!("* {} joined {room}", guest.name));
    }

    fn leave(&mut self, cx: &mut Context<Guest>, token: Token, guest: &Guest) {
        if let Some(members) = self.rooms.get_mut(&guest.room)
            && members.remove(&token)
        {
            if members.is_empty() {
                self.rooms.remove(&guest.room);
            }
            self.send_to_room(cx, &guest.room, &format!("* {} left", guest.name));
        }
    }

    /// Sends to the members of a room, of which there are few enough for one callback.
    fn send_to_room(&self, cx: &mut Context<Guest>, room: &str, text: &str) {
        let message = message(text);
        for &member in self.rooms.get(room).into_iter().flatten() {
            send(cx, member, &message);
        }
    }

    /// Sends to everyone: a sweep, because a loop over a million connections would block the reactor.
    fn announce(&mut self, cx: &mut Context<Guest>, token: Token, text: &str) {
        match cx.sweep() {
            Ok(sweep) => {
                self.announcements.insert(sweep, message(text));
            }
            Err(_) => send_text(cx, token, "* too many announcements, try again later"),
        }
    }
}

fn message(text: &str) -> Arc<[u8]> {
    format!("{text}\n").into_bytes().into()
}

fn send(cx: &mut Context<Guest>, token: Token, message: &Arc<[u8]>) {
    if cx.write_chunk(token, Arc::clone(message)).is_err() {
        cx.abort(token);
    }
}

fn send_text(cx: &mut Context<Guest>, token: Token, text: &str) {
    send(cx, token, &message(text));
}

impl Handler for Chat {
    type Conn = Guest;

    fn on_accept(&mut self, _cx: &mut Context<Guest>, _incoming: &Incoming<'_>) -> Option<Guest> {
        Some(Guest { name: String::new(), room: String::new(), line: Vec::new() })
    }

    fn on_open(&mut self, cx: &mut Context<Guest>, token: Token, guest: &mut Guest) {
        guest.name = format!("guest-{}", token.index());
        self.join(cx, token, guest, LOBBY);
    }

    fn on_data(
        &mut self,
        cx: &mut Context<Guest>,
        token: Token,
        guest: &mut Guest,
        bytes: &mut [u8],
    ) {
        let mut input = mem::take(&mut guest.line);
        input.extend_from_slice(bytes);
        for (number, line) in input.split_inclusive(|&byte| byte == b'\n').enumerate() {
            if number >= LINES_PER_READ_MAX || line.len() > LINE_BYTES_MAX {
                return cx.abort(token);
            }
            match line.strip_suffix(b"\n") {
                Some(line) => {
                    let line = String::from_utf8_lossy(line);
                    self.execute(cx, token, guest, line.trim());
                }
                None => guest.line = line.to_vec(),
            }
        }
    }

    fn on_visit(
        &mut self,
        cx: &mut Context<Guest>,
        sweep: SweepId,
        token: Token,
        _guest: &mut Guest,
    ) {
        if let Some(message) = self.announcements.get(&sweep) {
            send(cx, token, message);
        }
    }

    fn on_swept(&mut self, _cx: &mut Context<Guest>, sweep: SweepId) {
        self.announcements.remove(&sweep);
    }

    fn on_close(
        &mut self,
        cx: &mut Context<Guest>,
        token: Token,
        guest: Guest,
        _reason: CloseReason,
    ) {
        self.leave(cx, token, &guest);
    }
}

fn main() -> Result<(), Failure> {
    let argument = std::env::args().nth(1).unwrap_or("127.0.0.1:7007".to_owned());
    let config = Config { write_queue_bytes_max: BEHIND_BYTES_MAX, ..Config::default() };
    let mut reactor = Reactor::new(&config)?;
    let cx = reactor.context();
    let listener = cx.listen(address(&argument), &ListenOptions::default())?;
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    println!("listening on {}", cx.listener_addr(listener)?);
    reactor.run(&mut Chat::default())?;
    Ok(())
}
