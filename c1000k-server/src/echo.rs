//! What the server does with a connection: echo or sink, within its bounds.
//!
//! Who is refused, and who is dropped, is decided here; how, is the reactor's.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use c1000k_host::errno_name;
use c1000k_host::format;
use reactor::{
    CloseReason, Context, Error, Handler, Incoming, ListenerId, Signal, SweepId, TimerId, Token,
    Written,
};

use crate::admission::memory::{Change, Overload, REST, Shortage};
use crate::admission::per_source::{PerSourceLimit, Source};
use crate::args::{Mode, Settings};
use crate::closings::Closings;
use crate::metrics::sample_interval;
use crate::slow::{Look, SlowReaders};
use crate::workers::{Duty, Held, Moment, Shared, Totals};

/// Why a connection ended that its peer has reset.
pub(crate) const RESET: &str = "reset";
/// Why a connection ended whose peer had not taken what the server closed it with: at the end of the grace.
pub(crate) const SHUT_DOWN: &str = "shut_down";
const QUEUES_FULL: &str = "queues_full";

/// So many connections of a thread that come or go are a crowd, whose course is worth a closer look.
const CROWD_MIN: u64 = 64;
/// While buffers are short, a peer that has not taken within this time what waited for it is slow enough to be reset.
const SHORTAGE_PATIENCE: Duration = Duration::from_secs(1);

/// The most of them reset at one look: freeing the data of one takes the kernel a while.
const RESETS_MAX: usize = 64;

/// The most watched connections examined at one look, at two system calls each.
const LOOKED_AT_MAX: usize = 4_096;

/// The time between two searches for connections with data in the kernel only, while sockets hold much in all.
const SEARCH_INTERVAL: Duration = Duration::from_secs(2);

/// Less than this, a page, is neither searched for nor worth a reset.
const HELD_BYTES_MIN: usize = 4_096;

/// What may wait at each port while memory is short. Those who are refused wait for one wake at the most.
const BACKLOG_REFUSING: u32 = 16;
const BACKLOG_PAUSED: u32 = 1;

/// The server's side of one reactor's connections. One connection has no state of its own.
#[derive(Debug)]
pub(crate) struct Echo<D> {
    mode: Mode,
    idle_timeout: Option<Duration>,
    slow: SlowReaders,
    /// When slow readers were looked for last.
    searched_at: Option<Instant>,
    backlog: Option<u32>,
    overload: Overload,
    interval: Duration,
    grace: Duration,
    shared: Arc<Shared>,
    pub(crate) duty: D,
    /// Admissions drawn from the memory guard and not used.
    admissions: u64,
    /// Memory is not short, as far as the listeners know.
    accepting: bool,
    /// A place among all threads' connections is taken for one that is not open yet.
    has_claim: bool,
    /// Errors of accepting that were told of.
    told_errors: BTreeMap<Option<i32>, u64>,
    is_signalled: bool,
    /// The second signal, at which it left at once.
    pub(crate) left_by: Option<Signal>,
    sources: Option<PerSourceLimit>,
    look_timer: Option<TimerId>,
    sample_timer: Option<TimerId>,
    /// How long the last sample took.
    sample_takes: Duration,
    /// Connections that have come or gone since the last sample.
    changes: u64,
    /// They were a crowd at the last sample, and the next one is near.
    is_crowd: bool,
    /// Since when there were crowds, with no second of rest between them.
    crowd_since: Option<Instant>,
    /// Nobody is accepted, to be refused, before it fires.
    rest_timer: Option<TimerId>,
    closings: Closings,
    /// Those who were not let in, and those who were thrown out: reason to count.
    refused_by: BTreeMap<&'static str, u64>,
    closed_by: BTreeMap<&'static str, u64>,
}

/// What is short, by how much, and which connections are reset for it.
struct Shedding {
    shortage: &'static str,
    bytes: u64,
    /// What a peer holds of it.
    held_by: fn(&Context<()>, Token) -> usize,
    /// A peer that has taken within this time what waited for it is left alone.
    patience: Duration,
    resets_max: usize,
}

impl<D: Duty> Echo<D> {
    pub(crate) fn new(settings: &Settings, shared: &Arc<Shared>, duty: D) -> Self {
        Self {
            mode: settings.mode,
            idle_timeout: settings.idle_timeout,
            slow: SlowReaders::new(settings.slow_reader_timeout),
            searched_at: None,
            backlog: settings.backlog,
            overload: settings.overload,
            interval: settings.interval,
            grace: settings.grace,
            shared: Arc::clone(shared),
            duty,
            admissions: 0,
            accepting: true,
            has_claim: false,
            told_errors: BTreeMap::new(),
            is_signalled: false,
            left_by: None,
            sources: shared.sources.as_ref().map(PerSourceLimit::share),
            look_timer: None,
            sample_timer: None,
            sample_takes: Duration::ZERO,
            changes: 0,
            is_crowd: false,
            crowd_since: None,
            rest_timer: None,
            closings: Closings::new(),
            refused_by: BTreeMap::new(),
            closed_by: BTreeMap::new(),
        }
    }

    /// Starts what happens by the clock.
    pub(crate) fn start(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        self.look_by_clock(cx);
        self.start_looking(cx)?;
        self.start_sampling(cx)
    }

    fn start_looking(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        let interval = self.shared.guard().look_interval();
        self.look_timer = Some(cx.add_timer(interval)?);
        Ok(())
    }

    fn start_sampling(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        let crowd_age = self.crowd_since.filter(|_| self.is_crowd);
        let crowd_age = crowd_age.map(|since| cx.now().saturating_duration_since(since));
        let interval = sample_interval(self.interval, crowd_age, self.sample_takes);
        self.sample_timer = Some(cx.add_timer(interval)?);
        Ok(())
    }

    fn sample(&mut self, cx: &mut Context<()>) -> Result<(), Error> {
        let was_crowd = std::mem::replace(&mut self.is_crowd, self.changes >= CROWD_MIN);
        if self.is_crowd {
            self.crowd_since.get_or_insert(cx.now());
        } else if !was_crowd {
            self.crowd_since = None;
        }
        self.changes = 0;
        let began = Instant::now();
        self.report(cx);
        self.sample_takes = began.elapsed();
        self.start_sampling(cx)
    }

    /// A connection has come or gone. A crowd may do so within the second that the next sample is away.
    fn note_change(&mut self, cx: &mut Context<()>) {
        self.changes += 1;
        if self.is_crowd || self.changes < CROWD_MIN {
            return;
        }
        if let Some(timer) = self.sample_timer.take() {
            cx.cancel_timer(timer);
        }
        if let Err(error) = self.sample(cx) {
            tell_no_more(&error);
        }
    }

    /// Passes on what was counted.
    pub(crate) fn report(&mut self, cx: &Context<()>) {
        self.report_within(cx, self.interval);
    }

    fn report_within(&mut self, cx: &Context<()>, interval: Duration) {
        let moment = Moment { now: cx.now(), interval, state: &self.state() };
        self.duty.report(self.totals(cx), &self.shared, &moment);
    }

    /// What this thread has counted.
    pub(crate) fn totals(&self, cx: &Context<()>) -> Totals {
        Totals {
            stats: cx.stats(),
            refused_by: self.refused_by.clone(),
            closed_by: self.closed_by.clone(),
        }
    }

    /// The connections of all threads, but for those that have left and only wait to be closed.
    fn held(&self, cx: &Context<()>) -> u64 {
        let here = || (cx.connections() - self.closings.left()) as u64;
        self.shared.held.as_ref().map_or_else(here, Held::count)
    }

    fn look_by_clock(&mut self, cx: &mut Context<()>) {
        if D::LOOKS {
            self.look(cx);
        }
        self.follow_guard(cx);
    }

    /// Does what the last look asks for, whoever made it.
    fn follow_guard(&mut self, cx: &mut Context<()>) {
        self.search(cx);
        self.shed(cx);
        let open = self.shared.guard().shortage().is_none();
        self.set_accepting(cx, open);
    }

    /// Searches for connections with data in the kernel only, where sockets hold much in all.
    fn search(&mut self, cx: &mut Context<()>) {
        let is_early = self.searched_at.is_some_and(|at| cx.now() < at + SEARCH_INTERVAL);
        if !is_early && self.shared.guard().has_full_buffers() && cx.sweep().is_ok() {
            self.searched_at = Some(cx.now());
        }
    }

    /// Resets the connections with the most data waiting, where that uses up the reserve or the kernel's room for data.
    fn shed(&mut self, cx: &mut Context<()>) {
        let guard = self.shared.guard();
        let of_memory = Shedding {
            shortage: "memory",
            bytes: guard.overdraft_bytes(),
            held_by: if guard.charges_socket_data() {
                waiting_bytes
            } else {
                Context::queued_bytes
            },
            patience: Duration::ZERO,
            resets_max: usize::MAX,
        };
        let of_buffers = Shedding {
            shortage: "tcp_mem",
            bytes: guard.excess_buffer_bytes(),
            held_by: Context::unacknowledged_bytes,
            patience: SHORTAGE_PATIENCE,
            resets_max: RESETS_MAX,
        };
        drop(guard);
        self.reset_largest(cx, &of_memory);
        self.reset_largest(cx, &of_buffers);
    }

    fn reset_largest(&mut self, cx: &mut Context<()>, shedding: &Shedding) {
        if shedding.bytes == 0 || self.slow.is_empty() {
            return;
        }
        let holders = self.holders(cx, shedding.patience).into_iter();
        let holders = holders.map(|token| ((shedding.held_by)(cx, token), token)).collect();
        let mut largest = largest(holders, shedding.bytes);
        largest.truncate(shedding.resets_max);
        let shortage = shedding.shortage;
        let before = self.closed_by.get(shortage).copied().unwrap_or(0);
        let times = before + largest.len() as u64;
        if times == before {
            return;
        }
        self.closed_by.insert(shortage, times);
        if times.checked_ilog2() != before.checked_ilog2() {
            log::warn!(
                "{shortage} is short, and {} connections with the most data waiting are reset ({times} by now)",
                largest.len()
            );
        }
        for token in largest {
            cx.abort(token);
        }
    }

    /// Connections whose peers have not taken within `patience` what waited for them.
    fn holders(&mut self, cx: &mut Context<()>, patience: Duration) -> Vec<Token> {
        let now = cx.now();
        let watched: Vec<Token> = self.slow.waiting_for(patience, LOOKED_AT_MAX, now).collect();
        let mut holders = Vec::new();
        for token in watched {
            match self.slow.look(token, waiting_bytes(cx, token), now) {
                Look::Done => self.rest_timeout(cx, token),
                Look::Within(_) if !self.slow.has_waited(token, patience, now) => {}
                Look::Within(_) | Look::TooSlow => holders.push(token),
            }
        }
        holders
    }

    /// Refusing takes memory for a moment as well: when enough were refused, the others wait for the next look.
    fn note_refusal(&mut self, cx: &mut Context<()>) {
        if self.accepting || self.overload == Overload::Pause || self.rest_timer.is_some() {
            return;
        }
        if !self.shared.guard().refuse()
            && let Ok(timer) = cx.add_timer(REST)
        {
            self.rest_timer = Some(timer);
            tell_listeners(cx, Context::pause_accepts);
        }
    }

    fn end_rest(&mut self, cx: &mut Context<()>) {
        self.rest_timer = None;
        if self.shared.guard().has_refused_enough() {
            self.look(cx);
        }
        self.follow_guard(cx);
        tell_listeners(cx, Context::resume_accepts);
    }

    /// Looks at memory, and tells when that has changed what may be done.
    fn look(&mut self, cx: &Context<()>) {
        self.admissions = 0;
        let mut guard = self.shared.guard();
        let held = self.held(cx);
        let change = guard.look(held, cx.now());
        self.shared.share.store(guard.share(), Ordering::Relaxed);
        let held = format::counted(held, "connection");
        match (change, guard.shortage()) {
            (Some(Change::Closed), Some(shortage)) => {
                let what = match self.overload {
                    Overload::Refuse => "more are refused",
                    Overload::Pause => "more have to wait",
                };
                log::warn!("{shortage}: {held} held, {what}");
            }
            (Some(Change::Opened), _) => {
                log::info!("memory is back: {held} held, more are admitted again");
            }
            _ => {}
        }
    }

    /// Tells the listeners, where they do not know, whether memory is short. While it is the backlogs are too: what
    /// completes in them is memory as well.
    fn set_accepting(&mut self, cx: &mut Context<()>, open: bool) {
        if std::mem::replace(&mut self.accepting, open) == open {
            return;
        }
        self.admissions = 0;
        let (overload, backlog) = (self.overload, self.backlog);
        tell_listeners(cx, |cx, listener| match (open, overload) {
            (true, Overload::Refuse) => cx.set_backlog(listener, backlog),
            (true, Overload::Pause) => {
                cx.set_backlog(listener, backlog).and_then(|()| cx.resume_accepts(listener))
            }
            (false, Overload::Refuse) => cx.set_backlog(listener, Some(BACKLOG_REFUSING)),
            (false, Overload::Pause) => cx
                .pause_accepts(listener)
                .and_then(|()| cx.set_backlog(listener, Some(BACKLOG_PAUSED))),
        });
    }

    /// What the status line says beside the figures.
    fn state(&self) -> String {
        let doing = match self.overload {
            Overload::Refuse => "refusing",
            Overload::Pause => "pausing",
        };
        let guard = self.shared.guard();
        let shortage = guard.shortage();
        shortage.map_or_else(String::new, |shortage| format!(" | {doing}: {}", shortage.name()))
    }

    /// Why this peer may not come in.
    fn refusal(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<&'static str> {
        if !self.claim(cx) {
            self.tell_full(cx);
            return Some("max_connections");
        }
        // Where accepting is paused, this one had come before.
        if let Err(shortage) = self.admit(cx)
            && self.overload == Overload::Refuse
        {
            return Some(shortage);
        }
        let sources = self.sources.as_mut()?;
        let Ok(address) = incoming.peer_addr() else { return Some("gone") };
        let source = Source::from(address.ip());
        if sources.claim(source) {
            return None;
        }
        self.tell_source(source);
        Some("max_per_source")
    }

    /// Takes a place among all threads' connections, unless they are as many as there may be.
    fn claim(&mut self, cx: &Context<()>) -> bool {
        let max = self.shared.connections_max;
        match &self.shared.held {
            None => self.held(cx) < max,
            Some(held) => {
                self.has_claim = held.claim(max);
                self.has_claim
            }
        }
    }

    /// The place of an open connection is free again.
    fn free_place(&mut self, token: Token) {
        if let Some(held) = &self.shared.held {
            held.note_close();
        }
        if let Some(sources) = &mut self.sources {
            sources.note_close(token);
        }
    }

    /// Gives back what was taken for a connection that did not open.
    fn release_claims(&mut self) {
        if std::mem::take(&mut self.has_claim)
            && let Some(held) = &self.shared.held
        {
            held.release();
        }
        if let Some(sources) = &mut self.sources {
            sources.release_unopened();
        }
    }

    /// Uses one admission of the memory guard.
    fn admit(&mut self, cx: &mut Context<()>) -> Result<(), &'static str> {
        self.admissions = self.admissions.min(self.shared.share.load(Ordering::Relaxed));
        if self.admissions == 0 {
            self.admissions = self.draw_admissions(cx)?;
        }
        self.admissions -= 1;
        Ok(())
    }

    fn draw_admissions(&mut self, cx: &mut Context<()>) -> Result<u64, &'static str> {
        if self.shared.guard().wants_look() {
            self.look(cx);
        }
        let drawn = self.shared.guard().admit().map_err(Shortage::name);
        if drawn.is_err() {
            self.set_accepting(cx, false);
        }
        drawn
    }

    fn tell_source(&self, source: Source) {
        let times = self.shared.refused_by_source.fetch_add(1, Ordering::Relaxed) + 1;
        if times.is_power_of_two() {
            log::warn!(
                "{source} holds its share: more of it are refused ({}, all sources together)",
                format::counted(times, "time")
            );
        }
    }

    fn tell_full(&self, cx: &Context<()>) {
        if self.shared.full.wants_full(cx.now()) {
            let most = format::counted(self.shared.connections_max, "connection");
            log::warn!("{most} held, which is the limit: more are refused");
        }
    }

    fn note_room(&self, cx: &Context<()>) {
        let held = self.held(cx);
        if !cx.is_shutting_down()
            && self.shared.full.wants_room(held, self.shared.connections_max, cx.now())
        {
            log::info!("there is room again: {} held", format::counted(held, "connection"));
        }
    }

    /// The peer has said something. A slow reader's own time goes on meanwhile.
    fn refresh_idle_timeout(&self, cx: &mut Context<()>, token: Token) {
        if let Some(idle_timeout) = self.idle_timeout
            && !self.slow.watches(token)
        {
            cx.set_timeout(token, idle_timeout);
        }
    }

    /// Nothing waits for the peer any more.
    fn rest_timeout(&self, cx: &mut Context<()>, token: Token) {
        match self.idle_timeout {
            Some(idle_timeout) => cx.set_timeout(token, idle_timeout),
            None => cx.clear_timeout(token),
        }
    }

    /// Data waits for the peer: from now on the time that it takes is watched.
    fn watch(&mut self, cx: &mut Context<()>, token: Token) {
        if !self.slow.watches(token) {
            let timeout = self.slow.watch(token, waiting_bytes(cx, token), cx.now());
            cx.set_timeout(token, timeout);
        }
    }

    /// Whether data waits for the peer, or waited until now; a peer that is too slow is reset.
    fn look_at_reader(&mut self, cx: &mut Context<()>, token: Token) -> bool {
        if !self.slow.watches(token) {
            return false;
        }
        match self.slow.look(token, waiting_bytes(cx, token), cx.now()) {
            Look::Done => self.rest_timeout(cx, token),
            Look::Within(left) => cx.set_timeout(token, left),
            Look::TooSlow => self.drop_connection(cx, token, "slow_reader"),
        }
        true
    }

    /// Sends back what arrived. While a part of it waits, nothing more is read from this peer.
    fn echo(&mut self, cx: &mut Context<()>, token: Token, bytes: &[u8]) {
        match cx.write(token, bytes) {
            Ok(Written::Sent) => self.slow.note_written(token, bytes.len()),
            Ok(Written::Queued) => {
                cx.pause_reads(token);
                self.slow.note_written(token, bytes.len());
                self.watch(cx, token);
            }
            Err(reactor::WriteError::Closed) => {}
            Err(_) => self.drop_connection(cx, token, QUEUES_FULL),
        }
    }

    /// Resets a connection by a rule of the server's own.
    fn drop_connection(&mut self, cx: &mut Context<()>, token: Token, reason: &'static str) {
        let times = self.closed_by.entry(reason).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let why = match reason {
                "slow_reader" => "reads too slowly",
                _ => "finds all output queues full",
            };
            log::warn!("a peer {why} and is reset ({})", format::counted(*times, "time"));
        }
        cx.abort(token);
    }

    /// The server ends, as far as this thread goes; asked again, at once.
    fn end(&mut self, cx: &mut Context<()>) {
        self.duty.end();
        let grace = if cx.is_shutting_down() { Duration::ZERO } else { self.grace };
        cx.shutdown(grace);
    }
}

fn tell_no_more(error: &Error) {
    log::error!("memory or status is not looked at any more: {error}");
}

fn tell_listeners(
    cx: &mut Context<()>,
    mut tell: impl FnMut(&mut Context<()>, ListenerId) -> Result<(), Error>,
) {
    let listeners: Vec<ListenerId> = cx.listeners().collect();
    for listener in listeners {
        if let Err(error) = tell(cx, listener) {
            log::warn!("a listener could not be told that memory has changed: {error}");
        }
    }
}

/// What the peer has not taken of what was written to it: what is queued here, and what the kernel holds.
fn waiting_bytes(cx: &Context<()>, token: Token) -> usize {
    cx.queued_bytes(token) + cx.unacknowledged_bytes(token)
}

/// The largest holders that hold `bytes` together, leaving out those with less than a page.
fn largest(mut holders: Vec<(usize, Token)>, bytes: u64) -> Vec<Token> {
    holders.retain(|&(held_bytes, _)| held_bytes >= HELD_BYTES_MIN);
    holders.sort_unstable_by_key(|&(held_bytes, _)| std::cmp::Reverse(held_bytes));
    let mut taken_bytes = 0;
    let most = |&(held_bytes, _): &(usize, Token)| {
        let is_wanted = taken_bytes < bytes;
        taken_bytes += held_bytes as u64;
        is_wanted
    };
    holders.into_iter().take_while(most).map(|(_, token)| token).collect()
}

impl<D: Duty> Handler for Echo<D> {
    type Conn = ();

    fn on_accept(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<()> {
        self.closings.make_room(cx);
        let Some(reason) = self.refusal(cx, incoming) else { return Some(()) };
        self.release_claims();
        *self.refused_by.entry(reason).or_default() += 1;
        self.note_refusal(cx);
        None
    }

    fn on_open(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        self.refresh_idle_timeout(cx, token);
        self.has_claim = false;
        if let Some(held) = &self.shared.held {
            held.note_open();
        }
        if let Some(sources) = &mut self.sources {
            sources.note_open(token);
        }
        self.note_change(cx);
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &[u8]) {
        self.refresh_idle_timeout(cx, token);
        if self.mode == Mode::Echo {
            self.echo(cx, token, bytes);
        }
    }

    fn on_eof(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        if self.closings.close(cx, token) {
            self.free_place(token);
        }
    }

    fn on_drain(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        cx.resume_reads(token);
        self.look_at_reader(cx, token);
    }

    fn on_visit(&mut self, cx: &mut Context<()>, _sweep: SweepId, token: Token, _conn: &mut ()) {
        if cx.unacknowledged_bytes(token) >= HELD_BYTES_MIN {
            self.watch(cx, token);
        }
    }

    fn on_timeout(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut ()) {
        if self.look_at_reader(cx, token) {
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
            self.free_place(token);
        }
        self.note_room(cx);
        self.note_change(cx);
    }

    fn on_accept_error(&mut self, cx: &mut Context<()>, _listener: ListenerId, error: &Error) {
        self.release_claims();
        let open = self.held(cx);
        let times = self.told_errors.entry(error.errno()).or_default();
        *times += 1;
        if times.is_power_of_two() {
            let open = format::counted(open, "connection");
            let name = error.errno().map_or_else(|| "bound".to_owned(), errno_name);
            log::warn!("accepting failed with {open} held ({name}, {times} so far): {error}");
        }
    }

    fn on_timer(&mut self, cx: &mut Context<()>, timer: TimerId) {
        if self.closings.proceed(cx, timer) {
            return;
        }
        if self.rest_timer == Some(timer) {
            return self.end_rest(cx);
        }
        let again = if self.look_timer == Some(timer) {
            self.look_by_clock(cx);
            self.start_looking(cx)
        } else {
            self.note_room(cx);
            self.sample(cx)
        };
        if let Err(error) = again {
            tell_no_more(&error);
        }
    }

    fn on_wake(&mut self, cx: &mut Context<()>) {
        while self.duty.wants_end() {
            self.end(cx);
        }
    }

    fn on_signal(&mut self, cx: &mut Context<()>, signal: Signal) {
        if std::mem::replace(&mut self.is_signalled, true) {
            self.left_by = Some(signal);
            log::warn!("a second signal: leaving at once");
            return self.end(cx);
        }
        let open = format::counted(self.held(cx), "connection");
        let grace = format::duration(self.grace.as_secs_f64());
        log::info!("{signal:?}: closing {open}, {grace} at the most");
        self.report_within(cx, Duration::MAX);
        self.end(cx);
    }
}

/// Why a connection ended before both sides had finished, where no rule of the service has counted it.
fn ended_by(reason: &CloseReason) -> Option<&'static str> {
    match reason {
        CloseReason::FlushTimedOut => Some("flush_timeout"),
        CloseReason::ShutDown => Some(SHUT_DOWN),
        // The kernel took a part, and the queues had no room for the rest.
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
    use crate::admission::memory::Guard;
    use crate::args::{Args, Command};

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A thread that never looks at memory itself.
    struct Idle;

    impl Duty for Idle {
        const LOOKS: bool = false;

        fn report(&mut self, _mine: Totals, _shared: &Shared, _moment: &Moment<'_>) {}

        fn wants_end(&mut self) -> bool {
            false
        }

        fn end(&mut self) {}
    }

    fn turn_until(
        reactor: &mut Reactor<()>,
        service: &mut Echo<Idle>,
        mut holds: impl FnMut(&Echo<Idle>, &Context<()>) -> bool,
    ) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(service, reactor.context()) {
            assert!(Instant::now() < deadline, "it does not come to it: {:?}", service.closed_by);
            let _ = reactor.turn(service, Some(Duration::from_millis(20))).unwrap();
        }
    }

    #[test]
    fn short_of_buffers_those_go_for_whom_the_kernel_holds_the_most() {
        // Less than the kernel queues for one peer, so that nothing waits in the server itself.
        const SENT: usize = 512 * 1024;
        let args = Args::parse_from(["c1000k-server", "--ports", "1"]);
        let Ok(Command::Serve(settings)) = args.check() else { panic!("they are right") };
        let guard = Guard::new(settings.memory_reserve, 1);
        let shared = Arc::new(Shared::new(&settings, 10, guard));
        let config = Config { file_table: reactor::FileTable::Process, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = reactor.context().listen(any, &ListenOptions::default()).unwrap();
        let address = reactor.context().listener_addr(listener).unwrap();
        let mut service = Echo::new(&settings, &shared, Idle);
        shared.guard().look(0, Instant::now());
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

        shared.guard().close_for_buffers();
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
