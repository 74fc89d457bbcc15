//! The protocol: handles a connection's data, and decides when a connection is closed or reset.
//!
//! [`Gate`] decides on admission. The reactor refuses, closes and resets connections.

mod shedding;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use c1000k_host::errno_name;
use c1000k_host::format;
use reactor::{
    CloseReason, Context, Error, Handler, Incoming, ListenerId, Signal, SweepId, TimerId, Token,
    Written,
};

use crate::admission::{Admission, Gate};
use crate::args::{Mode, Settings};
use crate::closings::Closings;
use crate::counts::Counts;
use crate::metrics::{SampleClock, Totals};
use crate::service_manager;
use crate::slow::{Check, SlowReaders};
use shedding::{HELD_BYTES_MIN, Search, waiting_bytes};

/// Reason: the peer reset the connection.
pub(crate) const RESET: &str = "reset";
/// Reason: at the end of the grace the peer had not taken all data.
pub(crate) const SHUT_DOWN: &str = "shut_down";
const QUEUES_FULL: &str = "queues_full";
const SLOW_READER: &str = "slow_reader";

/// What a thread does besides serving its connections.
pub(crate) trait ThreadRole {
    /// Whether this thread samples memory periodically; the others apply the decisions.
    const SAMPLES_MEMORY: bool;

    /// Reports the thread's counts.
    fn report(&mut self, counted: Totals, at: &Moment);

    /// Called after a wake-up by another thread: whether the server shuts down; at the second call, whether it shuts
    /// down at once.
    fn wants_shutdown(&mut self) -> bool;

    /// This thread shuts down; at the second call, at once.
    fn shut_down(&mut self);
}

/// When a report is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now: Instant,
    /// The time between two status lines.
    pub(crate) interval: Duration,
    /// What is short, if no connection is admitted.
    pub(crate) shortage: Option<&'static str>,
}

/// The handler of one reactor: echo or sink. Connections have no state.
#[derive(Debug)]
pub(crate) struct Echo<R> {
    mode: Mode,
    idle_timeout: Option<Duration>,
    grace: Duration,
    gate: Gate,
    slow: SlowReaders,
    search: Search,
    closings: Closings,
    closed_by: Counts,
    pub(crate) role: R,
    clock: SampleClock,
    memory_timer: Option<TimerId>,
    sample_timer: Option<TimerId>,
    /// Failed accepts by errno; not all are logged.
    accept_errors: BTreeMap<Option<i32>, u64>,
    is_signalled: bool,
    /// The second signal, which ends the server at once.
    pub(crate) left_by: Option<Signal>,
}

impl<R: ThreadRole> Echo<R> {
    pub(crate) fn new(settings: &Settings, admission: &Arc<Admission>, role: R) -> Self {
        Self {
            mode: settings.mode,
            idle_timeout: settings.idle_timeout,
            grace: settings.grace,
            gate: Gate::new(admission, settings),
            slow: SlowReaders::new(settings.slow_reader_timeout),
            search: Search::default(),
            closings: Closings::new(),
            closed_by: Counts::new(),
            role,
            clock: SampleClock::new(settings.interval),
            memory_timer: None,
            sample_timer: None,
            accept_errors: BTreeMap::new(),
            is_signalled: false,
            left_by: None,
        }
    }

    /// Starts the periodic timers.
    pub(crate) fn start(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.check_memory(cx)?;
        self.start_sample_timer(cx)
    }

    /// Samples memory if this thread does that, applies the decision, and sets the timer for the next sample.
    fn check_memory(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        if R::SAMPLES_MEMORY {
            self.gate.sample(cx);
        }
        self.follow_decision(cx);
        self.memory_timer = Some(cx.add_timer(self.gate.decision().sample_interval)?);
        Ok(())
    }

    /// Applies the latest decision, whichever thread took the sample.
    fn follow_decision(&mut self, cx: &mut Context<()>) {
        self.gate.follow(cx);
        self.search_slow_readers(cx);
        self.shed(cx);
    }

    fn start_sample_timer(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.sample_timer = Some(cx.add_timer(self.clock.next(cx.now()))?);
        Ok(())
    }

    fn sample(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.clock.note_sample(cx.now());
        let began = Instant::now();
        self.report(cx);
        self.clock.note_sample_takes(began.elapsed());
        self.start_sample_timer(cx)
    }

    /// A connection has opened or closed. In a burst, many do so before the timer fires.
    fn note_change(&mut self, cx: &mut Context<()>) {
        if !self.clock.note_change() {
            return;
        }
        if let Some(timer) = self.sample_timer.take() {
            cx.cancel_timer(timer);
        }
        if let Err(error) = self.sample(cx) {
            log_no_more_samples(&error);
        }
    }

    /// The additional free memory that an admission needs, if memory is short.
    pub(crate) fn lacking_bytes(&self) -> Option<u64> {
        self.gate.decision().lacking_bytes()
    }

    /// Reports the counts.
    pub(crate) fn report(&mut self, cx: &Context<()>) {
        self.report_within(cx, self.clock.interval());
    }

    fn report_within(&mut self, cx: &Context<()>, interval: Duration) {
        let shortage = self.gate.decision().shortage.as_ref().map(|shortage| shortage.name());
        let at = Moment { now: cx.now(), interval, shortage };
        self.role.report(self.totals(cx), &at);
    }

    /// The counts of this thread.
    pub(crate) fn totals(&self, cx: &Context<()>) -> Totals {
        Totals {
            stats: cx.stats(),
            refused_by: self.gate.refused_by().clone(),
            closed_by: self.closed_by.clone(),
        }
    }

    /// The peer has sent data, which does not extend the time of a slow reader.
    fn refresh_idle_timeout(&self, cx: &mut Context<()>, token: Token) {
        if let Some(idle_timeout) = self.idle_timeout
            && !self.slow.watches(token)
        {
            cx.set_timeout(token, idle_timeout);
        }
    }

    /// No data is queued for the peer any more.
    fn reset_timeout(&self, cx: &mut Context<()>, token: Token) {
        match self.idle_timeout {
            Some(idle_timeout) => cx.set_timeout(token, idle_timeout),
            None => cx.clear_timeout(token),
        }
    }

    /// Data is queued for the peer: from now on its rate of reading is checked.
    fn watch(&mut self, cx: &mut Context<()>, token: Token) {
        if !self.slow.watches(token) {
            let timeout = self.slow.watch(token, waiting_bytes(cx, token), cx.now());
            cx.set_timeout(token, timeout);
        }
    }

    /// Returns whether data is queued for the peer, or was until now; resets a peer that is too slow.
    fn check_reader(&mut self, cx: &mut Context<()>, token: Token) -> bool {
        if !self.slow.watches(token) {
            return false;
        }
        match self.slow.check(token, waiting_bytes(cx, token), cx.now()) {
            Check::Done => self.reset_timeout(cx, token),
            Check::Within(left) => cx.set_timeout(token, left),
            Check::TooSlow => self.reset(cx, token, SLOW_READER),
        }
        true
    }

    /// Sends received data back. While a part of it is queued, the peer is not read.
    fn echo(&mut self, cx: &mut Context<()>, token: Token, bytes: &[u8]) {
        match cx.write(token, bytes) {
            Ok(Written::Sent) => self.slow.note_written(token, bytes.len()),
            Ok(Written::Queued) => {
                cx.pause_reads(token);
                self.slow.note_written(token, bytes.len());
                self.watch(cx, token);
            }
            Err(reactor::WriteError::Closed) => {}
            Err(_) => self.reset(cx, token, QUEUES_FULL),
        }
    }

    /// Resets a connection by one of the server's rules.
    fn reset(&mut self, cx: &mut Context<()>, token: Token, reason: &'static str) {
        let times = self.closed_by.entry(reason).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let why = match reason {
                SLOW_READER => "reads too slowly",
                _ => "finds all output queues full",
            };
            log::warn!("a peer {why} and is reset ({})", format::counted(*times, "time"));
        }
        cx.abort(token);
    }

    /// Shuts this thread down; at the second call, at once.
    fn shut_down(&mut self, cx: &mut Context<()>) {
        self.role.shut_down();
        let grace = if cx.is_shutting_down() { Duration::ZERO } else { self.grace };
        cx.shutdown(grace);
    }
}

fn log_no_more_samples(error: &Error) {
    log::error!("memory and status are no longer sampled: {error}");
}

impl<R: ThreadRole> Handler for Echo<R> {
    type Conn = ();

    fn on_accept(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<()> {
        self.closings.make_room(cx);
        self.gate.admit(cx, incoming).then_some(())
    }

    fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.refresh_idle_timeout(cx, token);
        self.gate.note_open(token);
        self.note_change(cx);
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        self.refresh_idle_timeout(cx, token);
        if self.mode == Mode::Echo {
            self.echo(cx, token, bytes);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        if self.closings.close(cx, token) {
            self.gate.note_close(token);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
        self.check_reader(cx, token);
    }

    fn on_visit(&mut self, cx: &mut Context<()>, _sweep: SweepId, token: Token, _conn: &mut ()) {
        if cx.unacknowledged_bytes(token) >= HELD_BYTES_MIN {
            self.watch(cx, token);
        }
    }

    fn on_timeout(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        if self.check_reader(cx, token) {
            return;
        }
        *self.closed_by.entry("idle").or_default() += 1;
        cx.close(token);
    }

    fn on_close(&mut self, cx: &mut Context<()>, token: Token, _conn: (), reason: CloseReason) {
        if let Some(reason) = ended_by(&reason) {
            *self.closed_by.entry(reason).or_default() += 1;
        }
        self.slow.forget(token);
        if !self.closings.forget(token) {
            self.gate.note_close(token);
        }
        self.gate.log_room(cx);
        self.note_change(cx);
    }

    fn on_accept_error(&mut self, _cx: &mut Context<()>, _listener: ListenerId, error: &Error) {
        self.gate.release();
        let times = self.accept_errors.entry(error.errno()).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let open = format::counted(self.gate.open(), "connection");
            let name = error.errno().map_or_else(|| "bound".to_owned(), errno_name);
            log::warn!("accepting failed with {open} held ({name}, {times} so far): {error}");
        }
    }

    fn on_timer(&mut self, cx: &mut Context<()>, timer: TimerId) {
        if self.closings.proceed(cx, timer) {
            return;
        }
        if self.gate.end_pause(cx, timer) {
            return self.follow_decision(cx);
        }
        let again = if self.memory_timer == Some(timer) {
            self.check_memory(cx)
        } else {
            self.gate.log_room(cx);
            self.sample(cx)
        };
        if let Err(error) = again {
            log_no_more_samples(&error);
        }
    }

    fn on_wake(&mut self, cx: &mut Context<()>) {
        while self.role.wants_shutdown() {
            self.shut_down(cx);
        }
    }

    fn on_signal(&mut self, cx: &mut Context<()>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.left_by = Some(signal);
            log::warn!("a second signal: ending at once");
            return self.shut_down(cx);
        }
        service_manager::notify_stopping();
        let open = format::counted(self.gate.open(), "connection");
        let grace = format::duration(self.grace.as_secs_f64());
        log::info!("{signal:?}: closing {open}, at most {grace}");
        self.report_within(cx, Duration::MAX);
        self.shut_down(cx);
    }
}

/// Why a connection ended before both sides had finished, unless one of the server's rules has counted it.
fn ended_by(reason: &CloseReason) -> Option<&'static str> {
    match reason {
        CloseReason::FlushTimedOut => Some("flush_timeout"),
        CloseReason::ShutDown => Some(SHUT_DOWN),
        // The kernel accepted a part, and the queues had no room for the rest.
        CloseReason::Failed(Error::Full { .. }) => Some(QUEUES_FULL),
        CloseReason::Failed(error) => Some(match error.kind() {
            ErrorKind::TimedOut => "tcp_timeout",
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => RESET,
            _ => "failed",
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    use clap::Parser;
    use reactor::{Config, ListenOptions, Reactor};

    use super::*;
    use crate::admission::MemoryGuard;
    use crate::args::{Args, Command};

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A thread that never samples memory.
    struct Idle;

    impl ThreadRole for Idle {
        const SAMPLES_MEMORY: bool = false;

        fn report(&mut self, _counted: Totals, _at: &Moment) {}

        fn wants_shutdown(&mut self) -> bool {
            false
        }

        fn shut_down(&mut self) {}
    }

    fn turn_until(
        reactor: &mut Reactor<()>,
        service: &mut Echo<Idle>,
        mut holds: impl FnMut(&Echo<Idle>, &Context<()>) -> bool,
    ) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(service, reactor.context()) {
            assert!(
                Instant::now() < deadline,
                "the condition was not met: {:?}",
                service.closed_by
            );
            let _ = reactor.turn(service, Some(Duration::from_millis(20))).unwrap();
        }
    }

    #[test]
    fn when_buffers_are_short_the_connections_with_the_most_kernel_data_are_reset() {
        // Less than the kernel queues for one peer, so that the server's queue is empty.
        const SENT: usize = 512 * 1024;
        let args = Args::parse_from(["c1000k-server", "--ports", "1"]);
        let Ok(Command::Serve(settings)) = args.check() else { panic!("the arguments are valid") };
        let guard = MemoryGuard::new(settings.memory_reserve, 1);
        let admission = Arc::new(Admission::new(&settings, 10, guard));
        let config = Config { file_table: reactor::FileTable::Process, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = reactor.context().listen(any, &ListenOptions::default()).unwrap();
        let address = reactor.context().listener_addr(listener).unwrap();
        let mut service = Echo::new(&settings, &admission, Idle);
        admission.sample(Instant::now());
        service.start(reactor.context()).unwrap();

        let mut honest = TcpStream::connect(address).unwrap();
        let mut slow = TcpStream::connect(address).unwrap();
        honest.write_all(b"hello").unwrap();
        slow.set_nonblocking(true).unwrap();
        let mut sent = 0;
        turn_until(&mut reactor, &mut service, |_, cx| {
            sent += slow.write(&vec![0; SENT]).unwrap_or(0);
            let held = cx.tokens(0..cx.slots()).map(|token| cx.unacknowledged_bytes(token));
            held.max() >= Some(SENT / 4)
        });
        assert_eq!(service.slow.is_empty(), reactor.context().stats().queued_bytes == 0);

        admission.close_for_buffers();
        turn_until(&mut reactor, &mut service, |service, _| {
            service.closed_by.contains_key("tcp_mem")
        });
        turn_until(&mut reactor, &mut service, |_, cx| cx.connections() == 1);
        assert_eq!(service.closed_by, BTreeMap::from([("tcp_mem", 1)]), "{sent} were sent");
        let mut answer = [0; 5];
        honest.set_read_timeout(Some(DEADLINE)).unwrap();
        honest.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
    }
}
