//! What the server does with a connection: echo or sink, within its bounds.

use std::collections::BTreeMap;
use std::time::Duration;

use c1000k_host::errno_name;
use c1000k_report::format;
use reactor::{
    CloseReason, Context, Error, Handler, Incoming, ListenerId, Signal, TimerId, Token, Written,
};

use crate::args::{Mode, Settings};
use crate::meter::Meter;

/// A connection that came and went at the bound is worth a line again once so many have left.
const ROOM_AGAIN_PERCENT: u64 = 5;

/// The server's side of all connections. One connection has no state of its own.
#[derive(Debug)]
pub(crate) struct Service {
    mode: Mode,
    idle_timeout: Option<Duration>,
    interval: Duration,
    grace: Duration,
    connections_max: u64,
    /// The bound was told of, and no room was seen since.
    told_full: bool,
    /// Errors of accepting that were told of.
    told_errors: BTreeMap<Option<i32>, u64>,
    signals: u32,
    /// Connections cut off because all write queues together were full.
    pub(crate) overflowed: u64,
    pub(crate) meter: Meter,
}

impl Service {
    pub(crate) fn new(settings: &Settings, connections_max: u64, meter: Meter) -> Self {
        Self {
            mode: settings.mode,
            idle_timeout: settings.idle_timeout,
            interval: settings.interval,
            grace: settings.grace,
            connections_max,
            told_full: false,
            told_errors: BTreeMap::new(),
            signals: 0,
            overflowed: 0,
            meter,
        }
    }

    /// Starts what happens by the clock.
    pub(crate) fn start(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        cx.add_timer(self.meter.sample_interval(self.interval)).map(drop)
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
            Ok(Written::Queued) => cx.pause_reads(token),
            Err(reactor::WriteError::Closed) => {}
            Err(_) => {
                self.overflowed += 1;
                cx.abort(token);
            }
        }
    }
}

impl Handler for Service {
    type Conn = ();

    fn on_accept(&mut self, cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        if self.is_full(cx) {
            self.tell_full();
            return None;
        }
        Some(())
    }

    fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.refresh_idle_timeout(cx, token);
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &[u8]) {
        self.refresh_idle_timeout(cx, token);
        if self.mode == Mode::Echo {
            self.echo(cx, token, bytes);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
    }

    fn on_close(&mut self, cx: &mut Context<()>, _token: Token, _conn: (), _reason: CloseReason) {
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

    fn on_timer(&mut self, cx: &mut Context<()>, _timer: TimerId) {
        self.meter.sample(&cx.stats(), cx.now(), self.interval);
        if let Err(error) = self.start(cx) {
            log::error!("there will be no more status lines: {error}");
        }
    }

    fn on_signal(&mut self, cx: &mut Context<()>, signal: Signal) {
        self.signals += 1;
        if self.signals > 1 {
            log::warn!("a second signal: leaving at once");
            return cx.stop();
        }
        let open = format::count(cx.connections() as u64);
        let grace = format::duration(self.grace.as_secs_f64());
        log::info!("{signal:?}: closing {open} connections, {grace} at the most");
        self.meter.sample(&cx.stats(), cx.now(), Duration::MAX);
        cx.shutdown(self.grace);
    }
}
