//! The actions of the simulated service: each method of [`Context`](crate::Context), at any time, on any connection.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::address::Address;
use crate::config::{ConnectOptions, Keepalive, ListenOptions};
use crate::error::{Error, Refused, WriteError, Written};
use crate::interest::Interest;
use crate::queue::{Chunk, SharedPart};
use crate::sys::{self, Adopted};
use crate::token::{ListenerId, Token};

use super::service::{Cx, Outside, Phase, Record, Service, Sweep};

const WRITE_BYTES_MAX: u32 = 150;
const INTERESTS: [Interest; 4] =
    [Interest::Nothing, Interest::Readable, Interest::Writable, Interest::Both];

fn one_of<T: Copy>(list: &[T]) -> Option<T> {
    if list.is_empty() { None } else { Some(list[sys::below(list.len() as u32) as usize]) }
}

/// Often zero, sometimes longer than the simulation.
fn some_time() -> Duration {
    match sys::below(6) {
        0 => Duration::ZERO,
        1 => Duration::from_secs(sys::below(200).into()),
        2 => Duration::from_micros(sys::below(3000).into()),
        _ => Duration::from_millis(sys::below(60).into()),
    }
}

fn some_listen_options() -> ListenOptions {
    ListenOptions {
        nodelay: sys::percent(50),
        connections_max: sys::percent(30).then(|| 1 + sys::below(4) as usize),
        ..ListenOptions::default()
    }
}

impl Service {
    /// Performs one random action.
    pub(super) fn act(&mut self, cx: &mut Cx, own: Option<Token>) {
        match sys::below(51) {
            0..=8 => self.write(cx, own),
            9 => self.pause(cx, own, true),
            10 | 11 => self.pause(cx, own, false),
            12 | 13 => self.finish(cx, own),
            14 | 15 => self.close(cx, own),
            16 => self.abort(cx, own),
            17 | 18 => self.set_timeout(cx, own),
            19 => self.clear_timeout(cx, own),
            20 => self.add_timer(cx),
            21 => self.cancel_timer(cx),
            22..=25 => self.connect(cx),
            26 | 27 => self.listen(cx),
            28 => self.unlisten(cx),
            29 => self.pause_accepts(cx, true),
            30 => self.pause_accepts(cx, false),
            31 => self.watch(cx),
            32 => self.unwatch(cx),
            33 => self.set_interest(cx),
            34 => self.sweep(cx),
            35 => {
                cx.waker().wake();
                self.wake_due = true;
            }
            36 if sys::percent(20) => {
                cx.stop();
                self.stop_due = true;
            }
            37 if sys::percent(5) => self.shutdown(cx, some_time()),
            38 => self.adopt(cx),
            39 => self.detach(cx, own),
            40 => self.adopt_listener(cx),
            41 => self.detach_listener(cx),
            42 => self.drain_listener(cx),
            47 => self.write_file(cx, own),
            45 => self.defer(cx, own),
            46 => self.sweep_of(cx),
            43 => self.set_tagged_timeout(cx, own),
            44 => self.clear_tagged_timeout(cx, own),
            _ => self.look(cx, own),
        }
    }

    /// Chooses the service's own connection, any other, or a removed one.
    fn some_record(&self, own: Option<Token>) -> Option<(usize, Token)> {
        if let Some(own) = own
            && sys::percent(60)
        {
            return Some((self.records.iter().position(|r| r.token == Some(own))?, own));
        }
        let held = sys::percent(85);
        let named: Vec<(usize, Token)> = self
            .records
            .iter()
            .enumerate()
            .filter(|(_, record)| !held || record.is_held())
            .filter_map(|(id, record)| Some((id, record.token?)))
            .collect();
        one_of(&named)
    }

    fn write(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let length = sys::below(WRITE_BYTES_MAX) as usize;
        let begin = self.records[id].written.len();
        let bytes: Vec<u8> = (begin..begin + length)
            .map(|place| (id * 7 + place) as u8 ^ (place >> 8) as u8)
            .collect();
        let serial = self.records[id].serial;
        let taken_by = |cx: &Cx| {
            sys::wire(serial).sent.len() + cx.queued_bytes(token) + cx.batched_bytes(token)
        };
        let taken_before = taken_by(cx);
        let total_before = cx.stats().queued_bytes + cx.all_batched_bytes();
        let room = cx.write_room(token);
        let own_room = cx.config().write_queue_bytes_max.saturating_sub(cx.queued_bytes(token));
        let waits = |cx: &Cx, record: &Record| record.is_open() && cx.queued_bytes(token) == 0;
        let record = &mut self.records[id];
        if room < own_room && cx.is_open(token) && !record.finished && waits(cx, record) {
            record.room_due = true;
        }
        let answer = match sys::below(5) {
            0 => {
                let (one, two) = bytes.split_at(length / 2);
                cx.write_vectored(token, &[IoSlice::new(one), IoSlice::new(two)])
            }
            1 => cx.try_write_chunk(token, Chunk::Owned(bytes.clone())).map_err(|refused| {
                assert_eq!(refused.chunk.as_bytes(), bytes, "other bytes are returned");
                refused.error
            }),
            2 => cx.write_chunk(token, Arc::<[u8]>::from(&bytes[..])),
            3 => {
                let whole = Arc::from([&[1, 2], &bytes[..], &[3]].concat());
                let part = SharedPart::new(whole, 2..2 + length).expect("the range is valid");
                cx.write_chunk(token, part)
            }
            _ => cx.write(token, &bytes),
        };
        sys::trace(|| format!("  write {length} to {token:?}: {answer:?}"));
        let taken = taken_by(cx);
        let fits_in_total = total_before + length <= cx.config().write_queues_bytes_max;
        let record = &mut self.records[id];
        let queued = cx.queued_bytes(token);
        match answer {
            Ok(written) => {
                let total = cx.stats().queued_bytes;
                assert!(total <= cx.config().write_queues_bytes_max, "the bound is exceeded");
                assert!(length <= cx.config().write_queue_bytes_max, "the bound is exceeded");
                assert!(record.is_held() && !record.finished && !record.closing, "{record:?}");
                assert!(!record.detached, "{record:?}");
                record.written.extend(bytes);
                match written {
                    Written::Sent if length > 0 => assert_eq!(queued, 0, "bytes are queued"),
                    Written::Queued => {
                        assert!(queued > 0, "no byte is queued");
                        record.drain_due = true;
                    }
                    Written::Sent => {}
                }
                let sent = sys::wire(record.serial).sent.len();
                let batched = cx.batched_bytes(token);
                record.drain_possible |= batched > 0;
                assert_eq!(
                    sent + queued + batched,
                    record.written.len(),
                    "bytes are lost or doubled"
                );
            }
            Err(refused) => {
                // If a batch fails, the connection fails, with bytes that were accepted before.
                let left = taken.saturating_sub(taken_before);
                let fits = queued + length <= cx.config().write_queue_bytes_max;
                let is_full = matches!(refused, WriteError::Full | WriteError::FullInTotal);
                assert!(!is_full || length > room, "there was room for {room}");
                match refused {
                    WriteError::Full => assert!(!fits && left == 0, "there was room"),
                    WriteError::FullInTotal => {
                        assert!(!fits_in_total && left == 0, "there was room");
                        record.room_due |= waits(cx, record);
                    }
                    // A part was sent and the rest does not fit: the connection fails.
                    WriteError::Closed if left > 0 => {
                        assert!(!fits_in_total && left < length, "there was room");
                        record.written.extend(&bytes[..left]);
                        record.cut_short = true;
                    }
                    WriteError::Closed => {}
                }
            }
        }
    }

    /// A part of this program's file, which always exists.
    fn write_file(&mut self, cx: &mut Cx, own: Option<Token>) {
        static PROGRAM: LazyLock<(Arc<File>, Vec<u8>)> = LazyLock::new(|| {
            let file = File::open("/proc/self/exe").expect("the program's file can be opened");
            let mut bytes = vec![0; 500];
            file.read_exact_at(&mut bytes, 0).expect("the program's file is longer");
            (Arc::new(file), bytes)
        });
        let Some((id, token)) = self.some_record(own) else { return };
        let start = sys::below(400) as usize;
        let end = start + sys::below(100) as usize;
        let part = start as u64..end as u64;
        let answer = cx.write_file(token, Arc::clone(&PROGRAM.0), part);
        sys::trace(|| format!("  write file {start}..{end} to {token:?}: {answer:?}"));
        // Bytes that were batched before were submitted, and the kernel may have accepted a part.
        let queued = cx.queued_bytes(token);
        let record = &mut self.records[id];
        match answer {
            Ok(written) => {
                assert!(record.is_held() && !record.finished && !record.closing, "{record:?}");
                assert!(!record.detached, "{record:?}");
                assert_eq!(written == Written::Queued, queued > 0, "{written:?}");
                record.written.extend(&PROGRAM.1[start..end]);
                record.drain_due |= queued > 0;
            }
            Err(WriteError::Closed) => {}
            Err(refused) => panic!("{refused}"),
        }
    }

    fn pause(&mut self, cx: &mut Cx, own: Option<Token>, on: bool) {
        let Some((id, token)) = self.some_record(own) else { return };
        if on {
            cx.pause_reads(token);
        } else {
            cx.resume_reads(token);
        }
        self.records[id].paused = on;
        sys::trace(|| format!("  pause {token:?}: {on}"));
    }

    fn finish(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        cx.finish(token);
        let record = &mut self.records[id];
        record.finished |= !record.closing;
        sys::trace(|| format!("  finish {token:?}"));
    }

    fn close(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        cx.close(token);
        let record = &mut self.records[id];
        record.closing = true;
        // on_drain is called when a queue runs empty, but not after a close.
        record.drain_due = false;
        record.deadlines.clear();
        sys::trace(|| format!("  close {token:?}"));
    }

    fn abort(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        cx.abort(token);
        self.records[id].aborted = true;
        self.records[id].deadlines.clear();
        sys::trace(|| format!("  abort {token:?}"));
    }

    fn set_timeout(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let after = some_time();
        cx.set_timeout(token, after);
        let record = &mut self.records[id];
        if record.is_held() && !record.closing {
            record.deadline = Some(cx.now() + after);
        }
    }

    fn clear_timeout(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        cx.clear_timeout(token);
        self.records[id].deadline = None;
    }

    fn set_tagged_timeout(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let (tag, after) = (sys::below(3).into(), some_time());
        let full = cx.has_all_timers() && !self.records[id].deadlines.contains_key(&tag);
        let answer = cx.set_tagged_timeout(token, tag, after);
        let record = &mut self.records[id];
        match answer {
            Ok(()) => {
                assert!(record.is_held() && !record.closing && !full, "{record:?}");
                record.deadlines.insert(tag, cx.now() + after);
            }
            Err(Error::Full { .. }) => assert!(full, "there was room"),
            // The record does not contain the failure of an earlier write.
            Err(error) => assert!(matches!(error, Error::Stale), "{error}"),
        }
    }

    fn clear_tagged_timeout(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let tag = sys::below(3).into();
        let cleared = cx.clear_tagged_timeout(token, tag);
        let known = self.records[id].deadlines.remove(&tag).is_some();
        assert!(known || !cleared, "a timer that was not armed was cleared");
    }

    fn add_timer(&mut self, cx: &mut Cx) {
        let after = some_time();
        let full = cx.has_all_timers();
        match cx.add_timer(after) {
            Ok(timer) => {
                let earlier = self.timers.insert(timer, cx.now() + after);
                assert!(
                    !full && earlier.is_none(),
                    "a timer was added in spite of the bound, or its id is in use"
                );
                assert!(!self.timers_gone.contains(&timer), "the id of an earlier timer");
            }
            Err(error) => assert!(full, "{error}"),
        }
    }

    fn cancel_timer(&mut self, cx: &mut Cx) {
        if let Some(timer) = one_of(&self.timers_gone) {
            assert!(!cx.cancel_timer(timer), "a stale id cancels another timer");
        }
        let armed: Vec<_> = self.timers.keys().copied().collect();
        if let Some(timer) = one_of(&armed) {
            assert!(cx.cancel_timer(timer), "an armed timer was not cancelled");
            self.timers.remove(&timer);
            self.timers_gone.push(timer);
        }
    }

    fn connect(&mut self, cx: &mut Cx) {
        let options = ConnectOptions {
            source: sys::percent(20).then(|| ([127, 0, 0, 2], 0).into()),
            port_range: sys::percent(20).then_some(1..=9),
            timeout: sys::percent(50).then(some_time),
            nodelay: sys::percent(20),
            keepalive: sys::percent(20).then(Keepalive::default),
            user_timeout: sys::percent(20).then_some(Duration::from_secs(1)),
            send_buffer_bytes: sys::percent(20).then_some(1),
            receive_buffer_bytes: sys::percent(20).then_some(1),
            notsent_lowat_bytes: sys::percent(20).then_some(1),
        };
        let address = match sys::below(4) {
            0 if options.source.is_none() => Address::from(Path::new("/socket")),
            _ => Address::from(([127, 0, 0, 1], 7)),
        };
        let full = cx.connections() == cx.config().connections_max;
        let conn = self.new_conn(Phase::Connecting);
        let id = conn.record;
        match cx.connect(address, &options, conn) {
            Ok(token) => {
                assert!(
                    !full && self.shutting_down.is_none(),
                    "it was accepted in spite of the bound"
                );
                self.note_name(cx, id, token);
                self.records[id].deadline = options.timeout.map(|timeout| cx.now() + timeout);
                sys::trace(|| format!("  connect {token:?}"));
            }
            Err(refused) => {
                assert_eq!(refused.given.record, id, "another connection's state is returned");
                self.refuse(id, full, &refused.error);
            }
        }
    }

    /// Checks that there was a reason to refuse a connect.
    fn refuse(&mut self, id: usize, full: bool, error: &Error) {
        self.records[id].phase = Phase::Closed;
        match error {
            Error::Full { .. } => assert!(full),
            Error::Invalid(_) => assert!(self.shutting_down.is_some()),
            _ => assert!(error.errno().is_some(), "{error}"),
        }
    }

    /// A socket that was detached before, or a new one.
    fn adopt(&mut self, cx: &mut Cx) {
        let before = if sys::percent(60) { self.outside.pop() } else { None };
        let outside = before.unwrap_or_else(|| Outside {
            descriptor: sys::outside_socket(Adopted::Connection),
            received: 0,
            written: Vec::new(),
        });
        let serial = sys::serial_outside(&outside.descriptor);
        let full = cx.connections() == cx.config().connections_max;
        let conn = self.new_conn(Phase::Connecting);
        let id = conn.record;
        match cx.adopt(outside.descriptor, conn) {
            Ok(token) => {
                assert!(
                    !full && self.shutting_down.is_none(),
                    "it was accepted in spite of the bound"
                );
                self.note_name(cx, id, token);
                let record = &mut self.records[id];
                assert_eq!(record.serial, serial, "another socket");
                record.received = outside.received;
                record.written = outside.written;
                sys::trace(|| format!("  adopt {token:?}"));
            }
            Err(Refused { error, given: (descriptor, conn) }) => {
                assert_eq!(conn.record, id, "another connection's state is returned");
                assert_eq!(sys::serial_outside(&descriptor), serial, "another socket");
                self.outside.push(Outside { descriptor, ..outside });
                self.refuse(id, full, &error);
            }
        }
    }

    fn detach(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let answer = cx.detach(token);
        sys::trace(|| format!("  detach {token:?}: {answer:?}"));
        let record = &mut self.records[id];
        match answer {
            Ok(()) => {
                let is_open = record.is_open() && !record.closing && !record.aborted;
                assert!(
                    is_open && !record.detached,
                    "a connection that was not open was detached: {record:?}"
                );
                record.detached = true;
                record.drain_due = false;
                record.deadlines.clear();
            }
            Err(Error::Stale) => assert!(!record.is_held(), "{record:?}"),
            Err(Error::Invalid(_)) => {}
            Err(error) => assert!(error.errno().is_some(), "{error}"),
        }
    }

    fn drain_listener(&mut self, cx: &mut Cx) {
        let Some(listener) = self.some_listener() else { return };
        cx.drain_listener(listener);
        if self.listeners.remove(&listener).is_some() {
            self.draining.push(listener);
        }
    }

    fn adopt_listener(&mut self, cx: &mut Cx) {
        let socket = self.outside_listeners.pop();
        let socket = socket.unwrap_or_else(|| sys::outside_socket(Adopted::Listener));
        let full = cx.listeners().count() == cx.config().listeners_max;
        match cx.adopt_listener(socket, &some_listen_options()) {
            Ok(listener) => {
                assert!(
                    !full && self.shutting_down.is_none(),
                    "it was accepted in spite of the bound"
                );
                assert!(self.listeners.insert(listener, false).is_none());
            }
            Err(Refused { error, given }) => {
                self.outside_listeners.push(given);
                assert!(full || self.shutting_down.is_some() || error.errno().is_some());
            }
        }
    }

    fn detach_listener(&mut self, cx: &mut Cx) {
        let Some(listener) = self.some_listener() else { return };
        let socket = cx.detach_listener(listener);
        assert_eq!(socket.is_some(), self.listeners.remove(&listener).is_some());
        if let Some(socket) = socket {
            self.listeners_gone.push(listener);
            self.outside_listeners.push(socket);
        }
    }

    fn listen(&mut self, cx: &mut Cx) {
        let options = some_listen_options();
        let full = cx.listeners().count() == cx.config().listeners_max;
        match cx.listen(([127, 0, 0, 1], 9), &options) {
            Ok(listener) => {
                assert!(
                    !full && self.shutting_down.is_none(),
                    "it was accepted in spite of the bound"
                );
                assert!(self.listeners.insert(listener, false).is_none());
                assert!(!self.listeners_gone.contains(&listener), "the id of an earlier listener");
            }
            Err(error) => assert!(full || self.shutting_down.is_some() || error.errno().is_some()),
        }
    }

    fn some_listener(&self) -> Option<ListenerId> {
        let keys: Vec<_> = self.listeners.keys().copied().collect();
        if sys::percent(85) { one_of(&keys) } else { one_of(&self.listeners_gone) }
    }

    fn unlisten(&mut self, cx: &mut Cx) {
        let Some(listener) = self.some_listener() else { return };
        cx.unlisten(listener);
        if self.listeners.remove(&listener).is_some() {
            self.listeners_gone.push(listener);
        }
    }

    fn pause_accepts(&mut self, cx: &mut Cx, on: bool) {
        let Some(listener) = self.some_listener() else { return };
        let answer = if on { cx.pause_accepts(listener) } else { cx.resume_accepts(listener) };
        match self.listeners.get_mut(&listener) {
            Some(paused) => *paused = on,
            None => assert!(matches!(answer, Err(Error::Stale)), "{answer:?}"),
        }
        let _ = cx.set_backlog(listener, Some(7));
    }

    fn watch(&mut self, cx: &mut Cx) {
        let descriptor = null();
        let interest = INTERESTS[sys::below(4) as usize];
        let full = self.watches.len() == cx.config().watches_max;
        match cx.watch(descriptor, interest) {
            Ok(watch) => {
                assert!(!full && self.watches.insert(watch, interest).is_none());
                assert!(!self.watches_gone.contains(&watch), "the id of an earlier watch");
            }
            Err(refused) => assert!(full || refused.error.errno().is_some(), "{refused}"),
        }
    }

    fn unwatch(&mut self, cx: &mut Cx) {
        if let Some(watch) = one_of(&self.watches_gone) {
            assert!(cx.unwatch(watch).is_none(), "a stale id ends another watch");
        }
        let watched: Vec<_> = self.watches.keys().copied().collect();
        if let Some(watch) = one_of(&watched) {
            assert!(cx.unwatch(watch).is_some(), "an active watch was not ended");
            self.watches.remove(&watch);
            self.watches_gone.push(watch);
        }
    }

    fn set_interest(&mut self, cx: &mut Cx) {
        let watched: Vec<_> = self.watches.keys().copied().collect();
        let Some(watch) = one_of(&watched) else { return };
        let interest = INTERESTS[sys::below(4) as usize];
        match cx.set_interest(watch, interest) {
            Ok(()) => drop(self.watches.insert(watch, interest)),
            Err(error) => assert!(error.errno().is_some(), "{error}"),
        }
    }

    fn sweep(&mut self, cx: &mut Cx) {
        let full = self.sweeps.len() == cx.config().sweeps_max;
        match cx.sweep() {
            Ok(id) => {
                assert!(!full, "it was accepted in spite of the bound");
                let open =
                    |(id, record): (usize, &super::service::Record)| record.is_open().then_some(id);
                let due = self.records.iter().enumerate().filter_map(open).collect();
                self.sweeps.insert(id, Sweep { due, ..Sweep::default() });
            }
            Err(error) => assert!(full, "{error}"),
        }
    }

    fn sweep_of(&mut self, cx: &mut Cx) {
        let named: Vec<(usize, Token)> = self
            .records
            .iter()
            .enumerate()
            .filter_map(|(id, record)| Some((id, record.token?)))
            .filter(|_| sys::percent(50))
            .collect();
        let full = self.sweeps.len() == cx.config().sweeps_max;
        let tokens: Vec<_> = named.iter().map(|&(_, token)| token).collect();
        match cx.sweep_of(tokens) {
            Ok(sweep) => {
                assert!(!full, "it was accepted in spite of the bound");
                let due = named.iter().map(|&(id, _)| id);
                let due = due.filter(|&id| self.records[id].is_open()).collect();
                self.sweeps.insert(sweep, Sweep { due, ..Sweep::default() });
            }
            Err(error) => assert!(full, "{error}"),
        }
    }

    fn defer(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let record = &mut self.records[id];
        match cx.defer(token) {
            Ok(()) => {
                assert!(record.is_held(), "{record:?}");
                // A connection that is not open by then is skipped.
                let count = usize::from(record.is_open());
                record.deferred += count;
                record.deferred_perhaps += 1 - count;
            }
            Err(Error::Stale) => assert!(!cx.is_open(token), "{record:?}"),
            Err(error) => assert!(matches!(error, Error::Full { .. }), "{error}"),
        }
    }

    pub(super) fn shutdown(&mut self, cx: &mut Cx, grace: Duration) {
        cx.shutdown(grace);
        self.shutting_down.get_or_insert(cx.now() + grace);
        self.listeners_gone.extend(std::mem::take(&mut self.listeners).into_keys());
        self.draining.clear();
        sys::trace(|| format!("  shutdown {grace:?}"));
    }

    /// Calls the queries, which must not change anything.
    fn look(&mut self, cx: &mut Cx, own: Option<Token>) {
        let Some((id, token)) = self.some_record(own) else { return };
        let record = &self.records[id];
        assert_eq!(cx.holds(token), record.is_held(), "{token:?}: {record:?}");
        let _ = (cx.peer_addr(token), cx.local_addr(token), cx.conn_mut(token).is_some());
        let _ = cx.connection_fd(token);
        assert!(cx.tokens(0..cx.slots()).count() == cx.connections());
        for &listener in self.listeners.keys() {
            assert!(!matches!(cx.listener_addr(listener), Err(Error::Stale)));
            assert!(cx.listener_fd(listener).is_some());
        }
    }
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null can be opened").into()
}
