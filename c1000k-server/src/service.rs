//! What the server does with a connection: echo or sink, within its bounds.
//!
//! Who is refused, and who is dropped, is decided here; how, is the reactor's.

use std::collections::BTreeMap;
use std::time::Duration;

use c1000k_host::errno_name;
use c1000k_report::format;
use reactor::{
    CloseReason, Context, Error, Handler, Incoming, ListenerId, Signal, TimerId, Token, Written,
};

use crate::args::{Mode, Settings};
use crate::closings::Closings;
use crate::guard::{Change, Guard, LOOK_INTERVAL, Overload};
use crate::meter::Meter;
use crate::sources::{Source, Sources};

/// A connection that came and went at the bound is worth a line again once so many have left.
const ROOM_AGAIN_PERCENT: u64 = 5;

/// What may wait at each port while memory is short. Those who are refused wait for one wake at the most.
const BACKLOG_REFUSING: u32 = 16;
const BACKLOG_PAUSED: u32 = 1;

/// The server's side of all connections. One connection has no state of its own.
#[derive(Debug)]
pub(crate) struct Service {
    mode: Mode,
    idle_timeout: Option<Duration>,
    slow_reader_timeout: Duration,
    backlog: Option<u32>,
    overload: Overload,
    interval: Duration,
    grace: Duration,
    connections_max: u64,
    /// The bound was told of, and no room was seen since.
    told_full: bool,
    /// Errors of accepting that were told of.
    told_errors: BTreeMap<Option<i32>, u64>,
    is_signalled: bool,
    /// The second signal, at which it left at once.
    pub(crate) left_by: Option<Signal>,
    sources: Option<Sources>,
    look_timer: Option<TimerId>,
    closings: Closings,
    pub(crate) guard: Guard,
    pub(crate) meter: Meter,
    /// Those who were not let in, and those who were thrown out: reason to count.
    pub(crate) refused_by: BTreeMap<&'static str, u64>,
    pub(crate) closed_by: BTreeMap<&'static str, u64>,
}

impl Service {
    pub(crate) fn new(
        settings: &Settings,
        connections_max: u64,
        guard: Guard,
        meter: Meter,
    ) -> Self {
        Self {
            mode: settings.mode,
            idle_timeout: settings.idle_timeout,
            slow_reader_timeout: settings.slow_reader_timeout,
            backlog: settings.backlog,
            overload: settings.overload,
            interval: settings.interval,
            grace: settings.grace,
            connections_max,
            told_full: false,
            told_errors: BTreeMap::new(),
            is_signalled: false,
            left_by: None,
            sources: settings.max_per_source.map(Sources::new),
            look_timer: None,
            closings: Closings::new(),
            guard,
            meter,
            refused_by: BTreeMap::new(),
            closed_by: BTreeMap::new(),
        }
    }

    /// Starts what happens by the clock.
    pub(crate) fn start(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.look(cx);
        self.look_timer = Some(cx.add_timer(LOOK_INTERVAL)?);
        self.start_sampling(cx)
    }

    fn start_sampling(&self, cx: &mut Context<()>) -> Result<(), Error> {
        cx.add_timer(self.meter.sample_interval(self.interval)).map(drop)
    }

    /// Looks at memory, and shuts or opens the door when that has changed what may be done.
    fn look(&mut self, cx: &mut Context<()>) {
        let held = cx.connections() as u64;
        let change = self.guard.look(held, cx.now());
        let held = format::count(held);
        match (change, self.guard.shortage()) {
            (Some(Change::Closed), Some(shortage)) => {
                let what = match self.overload {
                    Overload::Refuse => "more are refused",
                    Overload::Pause => "more have to wait",
                };
                log::warn!("{shortage}: {held} connections are held, {what}");
                self.set_door(cx, false);
            }
            (Some(Change::Opened), _) => {
                log::info!("memory is back: {held} connections are held, more are admitted again");
                self.set_door(cx, true);
            }
            _ => {}
        }
    }

    /// While memory is short the backlogs are too: what completes in them is memory as well.
    fn set_door(&self, cx: &mut Context<()>, open: bool) {
        let listeners: Vec<ListenerId> = cx.listeners().collect();
        for listener in listeners {
            let done = match (open, self.overload) {
                (true, Overload::Refuse) => cx.set_backlog(listener, self.backlog),
                (true, Overload::Pause) => cx
                    .set_backlog(listener, self.backlog)
                    .and_then(|()| cx.resume_accepts(listener)),
                (false, Overload::Refuse) => cx.set_backlog(listener, Some(BACKLOG_REFUSING)),
                (false, Overload::Pause) => cx
                    .pause_accepts(listener)
                    .and_then(|()| cx.set_backlog(listener, Some(BACKLOG_PAUSED))),
            };
            if let Err(error) = done {
                log::warn!("a listener could not be told that memory has changed: {error}");
            }
        }
    }

    /// What the status line says beside the figures.
    fn state(&self) -> String {
        let doing = match self.overload {
            Overload::Refuse => "refusing",
            Overload::Pause => "pausing",
        };
        let shortage = self.guard.shortage();
        shortage.map_or_else(String::new, |shortage| format!(" | {doing}: {}", shortage.name()))
    }

    /// Why this peer may not come in.
    fn refusal(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<&'static str> {
        if self.is_full(cx) {
            self.tell_full();
            return Some("max_connections");
        }
        if self.guard.wants_look() {
            self.look(cx);
        }
        // Where accepting is paused, this one had come before.
        if let Err(shortage) = self.guard.admit()
            && self.overload == Overload::Refuse
        {
            return Some(shortage.name());
        }
        let sources = self.sources.as_mut()?;
        let Ok(address) = incoming.peer_addr() else { return Some("gone") };
        let source = Source::from(address.ip());
        if sources.has_room(source) {
            return None;
        }
        self.tell_source(source);
        Some("max_per_source")
    }

    fn tell_source(&self, source: Source) {
        let times = self.refused_by.get("max_per_source").copied().unwrap_or(0) + 1;
        if times.is_power_of_two() {
            log::warn!(
                "{source} holds its share: more of it are refused ({times} times by source)"
            );
        }
    }

    fn is_full(&self, cx: &Context<()>) -> bool {
        cx.connections() as u64 >= self.connections_max
    }

    fn tell_full(&mut self) {
        if !self.told_full {
            self.told_full = true;
            let most = format::count(self.connections_max);
            log::warn!("{most} connections are held, which is the limit: more are refused");
        }
    }

    fn note_room(&mut self, cx: &Context<()>) {
        let enough = self.connections_max - self.connections_max * ROOM_AGAIN_PERCENT / 100;
        if self.told_full && (cx.connections() as u64) < enough {
            self.told_full = false;
            log::info!(
                "there is room again: {} connections",
                format::count(cx.connections() as u64)
            );
        }
    }

    fn refresh_idle_timeout(&self, cx: &mut Context<()>, token: Token) {
        if let Some(idle_timeout) = self.idle_timeout {
            cx.set_timeout(token, idle_timeout);
        }
    }

    /// Sends back what arrived. While a part of it waits, nothing more is read from this peer.
    fn echo(&mut self, cx: &mut Context<()>, token: Token, bytes: &[u8]) {
        match cx.write(token, bytes) {
            Ok(Written::Sent) => {}
            Ok(Written::Queued) => {
                cx.pause_reads(token);
                cx.set_timeout(token, self.slow_reader_timeout);
            }
            Err(reactor::WriteError::Closed) => {}
            Err(_) => self.drop_connection(cx, token, "queues_full"),
        }
    }
}

impl Service {
    /// Resets a connection by a rule of the server's own.
    fn drop_connection(&mut self, cx: &mut Context<()>, token: Token, reason: &'static str) {
        let times = self.closed_by.entry(reason).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let why = match reason {
                "slow_reader" => "reads too slowly",
                _ => "finds all output queues full",
            };
            log::warn!("a peer {why} and is reset ({times} times)");
        }
        cx.abort(token);
    }
}

impl Handler for Service {
    type Conn = ();

    fn on_accept(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<()> {
        let Some(reason) = self.refusal(cx, incoming) else { return Some(()) };
        *self.refused_by.entry(reason).or_default() += 1;
        None
    }

    fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.refresh_idle_timeout(cx, token);
        if let Some(sources) = &mut self.sources {
            sources.note_open(token);
        }
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &[u8]) {
        self.refresh_idle_timeout(cx, token);
        if self.mode == Mode::Echo {
            self.echo(cx, token, bytes);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.closings.close(cx, token);
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
        match self.idle_timeout {
            Some(idle_timeout) => cx.set_timeout(token, idle_timeout),
            None => cx.clear_timeout(token),
        }
    }

    fn on_timeout(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        if cx.queued_bytes(token) > 0 {
            return self.drop_connection(cx, token, "slow_reader");
        }
        *self.closed_by.entry("idle").or_default() += 1;
        cx.close(token);
    }

    fn on_close(&mut self, cx: &mut Context<()>, token: Token, _conn: (), _reason: CloseReason) {
        if let Some(sources) = &mut self.sources {
            sources.note_close(token);
        }
        self.note_room(cx);
    }

    fn on_accept_error(&mut self, cx: &mut Context<()>, _listener: ListenerId, error: &Error) {
        let times = self.told_errors.entry(error.errno()).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let open = format::count(cx.connections() as u64);
            let name = error.errno().map_or_else(|| "bound".to_owned(), errno_name);
            log::warn!(
                "accepting failed with {open} connections held ({name}, {times} times): {error}"
            );
        }
    }

    fn on_timer(&mut self, cx: &mut Context<()>, timer: TimerId) {
        if self.closings.proceed(cx, timer) {
            return;
        }
        let again = if self.look_timer == Some(timer) {
            self.look(cx);
            cx.add_timer(LOOK_INTERVAL).map(|timer| self.look_timer = Some(timer))
        } else {
            self.meter.sample(&cx.stats(), cx.now(), self.interval, &self.state());
            self.start_sampling(cx)
        };
        if let Err(error) = again {
            log::error!("memory or status is not looked at any more: {error}");
        }
    }

    fn on_signal(&mut self, cx: &mut Context<()>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.left_by = Some(signal);
            log::warn!("a second signal: leaving at once");
            return cx.stop();
        }
        let open = format::count(cx.connections() as u64);
        let grace = format::duration(self.grace.as_secs_f64());
        log::info!("{signal:?}: closing {open} connections, {grace} at the most");
        self.meter.sample(&cx.stats(), cx.now(), Duration::MAX, "");
        cx.shutdown(self.grace);
    }
}
