//! The ramp: opening connections, and what becomes of attempts that fail.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use c1000k_host::command_line::ZonedIp;
use c1000k_host::format::{self, rate};
use c1000k_record::per_second;
use nix::errno::Errno;
use reactor::{CloseReason, ConnectOptions, Error, TimerId, Token};

use super::Phase;
use crate::failures::{self, Meaning, Retries, meaning};
use crate::pacing::RateLimiter;
use crate::plan::{Plan, Route};
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Fault, Run, TICK, arm, cancel, errno, errno_of, some};
use crate::stats::Stop;

/// Without a proof to wait for, a connection that is dropped as young as this was never let in.
const PROBATION: Duration = Duration::from_secs(1);

/// Opens connections until the goal is reached, or something stops it.
#[derive(Debug)]
pub(crate) struct Ramp {
    plan: Plan,
    pace: Option<RateLimiter>,
    /// The next connection that was never tried.
    next_number: u32,
    /// Connections to be tried elsewhere at once.
    again: Vec<u32>,
    retries: Retries,
    /// Drops and final failures since there were last more connections held than ever.
    consecutive_failures: u32,
    held_at_tick: u64,
    timers: Timers,
    is_over: bool,
}

#[derive(Debug, Default)]
struct Timers {
    retry: Option<TimerId>,
    pace: Option<TimerId>,
    settle: Option<TimerId>,
}

impl Timers {
    fn all(&mut self) -> [&mut Option<TimerId>; 3] {
        [&mut self.retry, &mut self.pace, &mut self.settle]
    }
}

/// A connection that is to be tried.
struct Work {
    number: u32,
    retries: u8,
    /// It was tried before.
    is_known: bool,
}

impl Ramp {
    /// Over these routes, at most so many a second.
    pub(crate) fn new(plan: Plan, rate_per_second: Option<u64>, now: Instant) -> Self {
        Self {
            plan,
            pace: rate_per_second.map(|rate| RateLimiter::new(rate, now)),
            next_number: 1,
            again: Vec::new(),
            retries: Retries::default(),
            consecutive_failures: 0,
            held_at_tick: 0,
            timers: Timers::default(),
            is_over: false,
        }
    }

    /// Opens as many as may be under way, and ends the ramp when there is nothing left to wait for.
    fn open_more<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        while self.may_open(cx, run) {
            let Some(work) = self.next_work(cx.now(), run) else { break };
            self.open(cx, run, &work);
        }
        if run.in_flight == 0 && (run.stats.stop.is_some() || !self.has_work(run)) {
            return self.settle(cx, run);
        }
        if self.timers.retry.is_none()
            && let Some(due) = self.retries.next_due()
        {
            self.timers.retry = arm(cx, due.saturating_duration_since(cx.now()));
        }
    }

    /// Ends the ramp. Without proofs it first waits until the youngest connection is past its probation.
    fn settle<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &Run<'_, P>) {
        let youngest = run.stats.started.elapsed().saturating_sub(run.stats.ramp);
        if run.settings.verify || run.stats.held == 0 || youngest >= PROBATION {
            self.is_over = true;
        } else if self.timers.settle.is_none() {
            self.timers.settle = arm(cx, PROBATION - youngest);
        }
    }

    /// Whether the next connect may be started now. Where only the pace forbids it, a timer comes back for it.
    fn may_open<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &Run<'_, P>) -> bool {
        if run.stats.stop.is_some()
            || run.in_flight >= run.settings.in_flight_max
            || !self.has_due_work(cx.now(), run)
        {
            return false;
        }
        let Some(pace) = &mut self.pace else { return true };
        match pace.take(cx.now()) {
            Ok(()) => true,
            Err(wait) => {
                if self.timers.pace.is_none() {
                    self.timers.pace = arm(cx, wait);
                }
                false
            }
        }
    }

    fn has_new_work<P: Protocol>(&self, run: &Run<'_, P>) -> bool {
        self.next_number <= run.settings.goal || !self.again.is_empty()
    }

    fn has_work<P: Protocol>(&self, run: &Run<'_, P>) -> bool {
        self.has_new_work(run) || self.retries.len() > 0
    }

    fn has_due_work<P: Protocol>(&self, now: Instant, run: &Run<'_, P>) -> bool {
        self.has_new_work(run) || self.retries.next_due().is_some_and(|due| due <= now)
    }

    fn next_work<P: Protocol>(&mut self, now: Instant, run: &mut Run<'_, P>) -> Option<Work> {
        if let Some((number, retries)) = self.retries.pop_due(now) {
            run.stats.retried += 1;
            return Some(Work { number, retries, is_known: true });
        }
        if let Some(number) = self.again.pop() {
            run.stats.retried += 1;
            return Some(Work { number, retries: 0, is_known: true });
        }
        if self.next_number > run.settings.goal {
            return None;
        }
        self.next_number += 1;
        Some(Work { number: self.next_number - 1, retries: 0, is_known: false })
    }

    fn open<P: Protocol>(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, work: &Work) {
        let Some(route) = self.plan.next_route() else {
            run.stop(if self.plan.is_closed() { nobody_left(run) } else { Stop::Ports });
            return self.put_back(run, work);
        };
        let conn = run.new_conn(work.number, route.pair, work.retries);
        let destination = run.settings.server.socket_addr(route.port);
        match cx.connect(destination, &self.options(&route, run), conn) {
            Ok(_) => {
                run.stats.attempted += 1;
                run.in_flight += 1;
            }
            Err(error) => self.note_refused_call(run, &error, &route, work),
        }
    }

    /// Each option costs a system call, so none is set without need.
    fn options<P: Protocol>(&self, route: &Route, run: &Run<'_, P>) -> ConnectOptions {
        let is_crowded = self.plan.is_crowded_by(u64::from(run.settings.goal));
        ConnectOptions {
            source: route.source.map(|source| source.socket_addr(0)),
            port_range: run.settings.local_ports.clone().filter(|_| is_crowded),
            timeout: Some(run.settings.timeout),
            ..ConnectOptions::default()
        }
    }

    /// The system refused to start the connect. Where something has run out, the connection has not failed: it was
    /// not tried.
    fn note_refused_call<P: Protocol>(
        &mut self,
        run: &mut Run<'_, P>,
        error: &Error,
        route: &Route,
        work: &Work,
    ) {
        let Some(errno) = errno(error) else {
            // A bound of the reactor's own: it was made for the goal, so this is the end of it.
            log::error!("no connection can be added: {error}");
            run.stop(Stop::Descriptors(Errno::EMFILE));
            return self.put_back(run, work);
        };
        run.stats.failures.count_errno(errno);
        match meaning(errno) {
            Meaning::NoDescriptor => run.stop(Stop::Descriptors(errno)),
            Meaning::NoMemory => run.stop(Stop::Memory(errno)),
            Meaning::NoWatch => run.stop(Stop::Watches),
            Meaning::NoLocalPort if !has_address(route, run.settings.server) => {
                run.stop(Stop::NoAddress);
            }
            Meaning::NoLocalPort => self.plan.spend(route.pair),
            _ => {
                run.stats.attempted += 1;
                return self.note_errno(run, errno, route.pair, work.number, work.retries);
            }
        }
        self.put_back(run, work);
    }

    /// The connection was not tried, this time.
    fn put_back<P: Protocol>(&mut self, run: &Run<'_, P>, work: &Work) {
        if work.is_known || run.stats.stop.is_none() {
            self.again.push(work.number);
        }
    }

    /// An attempt that was under way has failed.
    fn note_failure<P: Protocol>(
        &mut self,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        run.in_flight -= 1;
        run.stats.answered_in_part += u64::from(run.has_part(conn));
        match (conn.fault, errno_of(reason)) {
            (Some(Fault::Eof), _) | (None, None) => {
                run.stats.failures.count(failures::EOF);
                self.note_turned_away(run, conn.number);
            }
            (Some(Fault::Mismatch), _) => {
                run.stats.failures.count_errno(Errno::EBADMSG);
                run.stats.failed += 1;
                self.note_consecutive_failure(run, Stop::NotAnEcho);
            }
            (Some(Fault::SelfConnected), _) => {
                run.stats.failures.count(failures::SELF_CONNECT);
                self.note_nobody(run, conn.pair, conn.number);
            }
            (Some(Fault::TimedOut), _) => {
                run.stats.unanswered += 1;
                run.stats.failures.count_errno(Errno::ETIMEDOUT);
                self.note_transient(run, Errno::ETIMEDOUT, conn.number, conn.retries);
            }
            (None, Some(errno)) => {
                run.stats.failures.count_errno(errno);
                self.note_errno(run, errno, conn.pair, conn.number, conn.retries);
            }
        }
    }

    fn note_errno<P: Protocol>(
        &mut self,
        run: &mut Run<'_, P>,
        errno: Errno,
        pair: u32,
        number: u32,
        retries: u8,
    ) {
        match meaning(errno) {
            Meaning::NobodyListens => self.note_nobody(run, pair, number),
            Meaning::TurnedAway => self.note_turned_away(run, number),
            Meaning::Final => {
                run.stats.failed += 1;
                self.note_consecutive_failure(run, Stop::Network(errno));
            }
            _ => self.note_transient(run, errno, number, retries),
        }
    }

    /// Nothing listens on that port: the connection goes elsewhere, and so will all others soon.
    fn note_nobody<P: Protocol>(&mut self, run: &mut Run<'_, P>, pair: u32, number: u32) {
        self.again.push(number);
        if self.plan.note_refusal(pair) && self.plan.is_closed() {
            run.stop(nobody_left(run));
        }
    }

    /// The server let it in and dropped it. It is tried again as long as others get through.
    fn note_turned_away<P: Protocol>(&mut self, run: &mut Run<'_, P>, number: u32) {
        run.stats.turned_away += 1;
        self.again.push(number);
        self.note_consecutive_failure(run, Stop::ServerFull);
    }

    fn note_transient<P: Protocol>(
        &mut self,
        run: &mut Run<'_, P>,
        errno: Errno,
        number: u32,
        retries: u8,
    ) {
        if !self.retries.push(Instant::now(), number, retries) {
            run.stats.failed += 1;
        }
        // Time-outs take their time by themselves, and come many at once after a pause of this process.
        if errno != Errno::ETIMEDOUT {
            self.note_consecutive_failure(run, Stop::Network(errno));
        }
    }

    fn note_consecutive_failure<P: Protocol>(&mut self, run: &mut Run<'_, P>, stop: Stop) {
        self.consecutive_failures += 1;
        if self.consecutive_failures >= run.settings.consecutive_failures_max {
            run.stop(stop);
        }
    }

    /// Without a proof, a connection that the server does not want looks open for a moment.
    fn note_drop<P: Protocol>(
        &mut self,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        run.stats.held -= 1;
        run.stats.opened -= 1;
        match errno_of(reason) {
            Some(errno) => run.stats.failures.count_errno(errno),
            None => run.stats.failures.count(failures::EOF),
        }
        self.note_turned_away(run, conn.number);
    }

    /// The connection is proven, or needs no proof.
    fn keep<P: Protocol>(&mut self, run: &mut Run<'_, P>, conn: &mut Conn<P::State>) {
        if run.keep(conn) {
            self.consecutive_failures = 0;
        }
    }

    /// Where nothing listens on a port that the kernel may also choose as the local one, a socket can connect to
    /// itself: TCP takes its own SYN for a simultaneous open.
    fn is_its_own_peer<P: Protocol>(
        &self,
        cx: &Cx<P>,
        run: &Run<'_, P>,
        token: Token,
        pair: u32,
    ) -> bool {
        let port = self.plan.port(pair);
        let may_be_local =
            run.settings.local_ports.as_ref().is_none_or(|ports| ports.contains(&port));
        may_be_local
            && cx.local_addr(token).is_ok_and(|local| {
                local.port() == port
                    && cx.peer_addr(token).is_ok_and(|peer| peer.ip() == local.ip())
            })
    }

    fn tell_self_connect<P: Protocol>(&self, run: &mut Run<'_, P>, pair: u32) {
        if std::mem::replace(&mut run.stats.is_self_connected, true) {
            return;
        }
        let port = self.plan.port(pair);
        run.progress.warn(&format!(
            "nothing listens on port {port}, and a connect to it reached itself: the kernel takes local ports from \
             the same range (net.ipv4.ip_local_port_range); such connections are not counted. To keep the server's \
             ports free: sysctl -w net.ipv4.ip_local_reserved_ports={}",
            self.plan.port_span()
        ));
    }

    fn tell_closed_ports<P: Protocol>(&self, run: &Run<'_, P>) {
        let mut closed = self.plan.closed_ports();
        if let (false, Some(first)) = (self.plan.is_closed(), closed.next()) {
            let count = closed.count() + 1;
            run.progress.warn(&format!(
                "nothing listens on {} of the ports ({first} is the first of them): \
                 the others took their share",
                format::count(count as u64)
            ));
        }
    }

    /// Nothing more will be opened, and what is still under way never will be.
    fn complete<P: Protocol>(&mut self, run: &mut Run<'_, P>) {
        run.stats.failures.count_unfinished(run.in_flight as u64);
        let unfinished = run.in_flight + self.again.len() + self.retries.give_up();
        run.stats.failed += unfinished as u64;
        self.again.clear();
        run.stats.sample(Instant::now());
        run.stats.verify_seconds =
            run.stats.verified_passes.iter().map(|_| run.stats.ramp.as_secs_f64()).collect();
        if !run.settings.verify && run.stats.turned_away > 0 {
            // Those that the server dropped were open for a moment, so the peak counted some of them.
            run.stats.peak = run.stats.held;
        }
        self.tell_closed_ports(run);
        if run.stats.held == 0 {
            run.end_early();
        }
    }

    fn line<P: Protocol>(&self, run: &Run<'_, P>) -> String {
        let opened = run.stats.held.saturating_sub(self.held_at_tick);
        format!(
            "opening: {} of {}, {}{}{}",
            format::count(run.stats.held),
            format::count(u64::from(run.settings.goal)),
            rate(per_second(opened, TICK.as_secs_f64())),
            some(run.stats.failures.by_name().values().sum(), "failed attempts"),
            some(run.stats.lost, "lost"),
        )
    }
}

impl<P: Protocol> Phase<P> for Ramp {
    fn enter(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        run.stats.sample(run.stats.started);
        self.open_more(cx, run);
    }

    fn is_done(&self, _cx: &Cx<P>, _run: &Run<'_, P>) -> bool {
        self.is_over
    }

    fn end(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>) {
        for timer in self.timers.all() {
            cancel(cx, timer);
        }
        if self.is_over {
            self.complete(run);
        } else if run.settings.verify {
            run.stats.verify_seconds.push(run.phase_began.elapsed().as_secs_f64());
        }
    }

    fn on_open(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) {
        if self.is_its_own_peer(cx, run, token, conn.pair) {
            self.tell_self_connect(run, conn.pair);
            return run.give_up(cx, token, conn, Fault::SelfConnected);
        }
        run.stats.connect_latency.record(run.age(conn));
        self.plan.note_success(conn.pair);
        if run.settings.verify {
            run.open(cx, token, conn);
        } else {
            self.keep(run, conn);
            self.open_more(cx, run);
        }
    }

    fn on_answer(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        _token: Token,
        conn: &mut Conn<P::State>,
    ) {
        run.count_answer();
        self.keep(run, conn);
        self.open_more(cx, run);
    }

    fn on_close(
        &mut self,
        cx: &mut Cx<P>,
        run: &mut Run<'_, P>,
        conn: &Conn<P::State>,
        reason: &CloseReason,
    ) {
        match conn.stage {
            ConnStage::Connecting | ConnStage::Opening => self.note_failure(run, conn, reason),
            ConnStage::Up | ConnStage::Asked
                if !run.settings.verify && run.age(conn) < PROBATION =>
            {
                self.note_drop(run, conn, reason);
            }
            ConnStage::Up | ConnStage::Asked => run.note_loss(conn, reason),
        }
        self.open_more(cx, run);
    }

    fn on_timer(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, timer: TimerId) {
        let own = self.timers.all().into_iter().find(|own| **own == Some(timer));
        let Some(own) = own else { return };
        *own = None;
        self.open_more(cx, run);
    }

    fn tick(&mut self, cx: &mut Cx<P>, run: &mut Run<'_, P>, is_stalled: bool) {
        run.stats.sample(Instant::now());
        run.progress.tick(|| self.line(run));
        self.held_at_tick = run.stats.held;
        if is_stalled {
            run.stop(match run.stats.unanswered {
                0 => Stop::Network(Errno::ETIMEDOUT),
                _ => Stop::ServerSilent,
            });
        }
        if is_stalled && run.stats.held == 0 {
            self.is_over = true;
        } else {
            self.open_more(cx, run);
        }
    }
}

fn nobody_left<P: Protocol>(run: &Run<'_, P>) -> Stop {
    if run.stats.peak == 0 && run.stats.turned_away == 0 {
        Stop::NothingListens
    } else {
        Stop::ServerGone
    }
}

/// Whether this machine has an address to reach that one from. EADDRNOTAVAIL means a want of either that or a port, and
/// a UDP socket has ports of its own.
fn has_address(route: &Route, server: ZonedIp) -> bool {
    let any = match server.ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let probe = UdpSocket::bind(route.source.unwrap_or(any).socket_addr(0));
    let reached = probe.and_then(|socket| socket.connect(server.socket_addr(route.port)));
    !reached.is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}
