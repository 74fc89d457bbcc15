//! The ramp: opening connections, and what becomes of attempts that fail.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use c1000k_host::command_line::ZonedIp;
use c1000k_host::format;
use nix::errno::Errno;
use reactor::{CloseReason, ConnectOptions, Context, Error, Token};

use super::{Conn, ConnStage, Fault, Flood, PROBATION, Stage, arm, errno, errno_of};
use crate::failures::{self, Meaning, meaning};
use crate::greeting::Greeting;
use crate::plan::Route;
use crate::tally::Stop;

/// A connection that is to be tried.
struct Work {
    number: u32,
    retries: u8,
    /// It was tried before.
    is_known: bool,
}

impl Flood<'_> {
    /// Opens as many as may be under way, and ends the ramp when there is nothing left to wait for.
    pub(super) fn open_more(&mut self, cx: &mut Context<Conn>) {
        while self.may_open(cx) {
            let Some(work) = self.next_work(cx.now()) else { break };
            self.open(cx, &work);
        }
        if self.in_flight == 0 && (self.tally.stop.is_some() || !self.has_work()) {
            return self.settle(cx);
        }
        if self.timers.retry.is_none()
            && let Some(due) = self.retries.next_due()
        {
            self.timers.retry = arm(cx, due.saturating_duration_since(cx.now()));
        }
    }

    /// Ends the ramp. Without proofs it first waits until the youngest connection is past its probation.
    fn settle(&mut self, cx: &mut Context<Conn>) {
        let youngest = self.tally.started.elapsed().saturating_sub(self.tally.ramp);
        if self.settings.verify || self.tally.held == 0 || youngest >= PROBATION {
            return self.end_ramp(cx);
        }
        if self.timers.settle.is_none() {
            self.timers.settle = arm(cx, PROBATION - youngest);
        }
    }

    /// Whether the next connect may be started now. Where only the pace forbids it, a timer comes back for it.
    fn may_open(&mut self, cx: &mut Context<Conn>) -> bool {
        if self.tally.stop.is_some()
            || self.in_flight >= self.settings.in_flight_max
            || !self.has_due_work(cx.now())
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

    fn has_work(&self) -> bool {
        self.next_number <= self.settings.goal || !self.again.is_empty() || self.retries.len() > 0
    }

    fn has_due_work(&self, now: Instant) -> bool {
        self.next_number <= self.settings.goal
            || !self.again.is_empty()
            || self.retries.next_due().is_some_and(|due| due <= now)
    }

    fn next_work(&mut self, now: Instant) -> Option<Work> {
        if let Some((number, retries)) = self.retries.pop_due(now) {
            self.tally.retried += 1;
            return Some(Work { number, retries, is_known: true });
        }
        if let Some(number) = self.again.pop() {
            self.tally.retried += 1;
            return Some(Work { number, retries: 0, is_known: true });
        }
        if self.next_number > self.settings.goal {
            return None;
        }
        self.next_number += 1;
        Some(Work { number: self.next_number - 1, retries: 0, is_known: false })
    }

    fn open(&mut self, cx: &mut Context<Conn>, work: &Work) {
        let Some(route) = self.plan.next_route() else {
            self.stop(if self.plan.is_closed() { self.nobody_left() } else { Stop::Ports });
            return self.put_back(work);
        };
        let conn = Conn {
            number: work.number,
            pair: route.pair,
            started_us: self.run_us(),
            stage: ConnStage::Connecting,
            fault: None,
            matched: 0,
            retries: work.retries,
        };
        let destination = self.settings.server.socket_addr(route.port);
        match cx.connect(destination, &self.options(&route), conn) {
            Ok(_) => {
                self.tally.attempted += 1;
                self.in_flight += 1;
            }
            Err(error) => self.note_refused_call(&error, &route, work),
        }
    }

    /// Each option costs a system call, so none is set without need.
    fn options(&self, route: &Route) -> ConnectOptions {
        let is_crowded = self.plan.is_crowded_by(u64::from(self.settings.goal));
        ConnectOptions {
            source: route.source.map(|source| source.socket_addr(0)),
            port_range: self.settings.local_ports.clone().filter(|_| is_crowded),
            timeout: Some(self.settings.timeout),
            ..ConnectOptions::default()
        }
    }

    /// The system refused to start the connect. Where something has run out, the connection has not failed: it was
    /// not tried.
    fn note_refused_call(&mut self, error: &Error, route: &Route, work: &Work) {
        let Some(errno) = errno(error) else {
            // A bound of the reactor's own: it was made for the goal, so this is the end of it.
            log::error!("no connection can be added: {error}");
            self.stop(Stop::Descriptors(Errno::EMFILE));
            return self.put_back(work);
        };
        self.tally.failures.count_errno(errno);
        match meaning(errno) {
            Meaning::NoDescriptor => self.stop(Stop::Descriptors(errno)),
            Meaning::NoMemory => self.stop(Stop::Memory(errno)),
            Meaning::NoWatch => self.stop(Stop::Watches),
            Meaning::NoLocalPort if !has_address(route, self.settings.server) => {
                self.stop(Stop::NoAddress);
            }
            Meaning::NoLocalPort => self.plan.spend(route.pair),
            _ => {
                self.tally.attempted += 1;
                return self.note_errno(errno, route.pair, work.number, work.retries);
            }
        }
        self.put_back(work);
    }

    /// The connection was not tried, this time.
    fn put_back(&mut self, work: &Work) {
        if work.is_known || self.tally.stop.is_none() {
            self.again.push(work.number);
        }
    }

    /// An attempt that was under way has failed.
    pub(super) fn note_failure(&mut self, conn: &Conn, reason: &CloseReason) {
        self.in_flight -= 1;
        match (conn.fault, errno_of(reason)) {
            (Some(Fault::Eof), _) | (None, None) => {
                self.tally.failures.count(failures::EOF);
                self.note_turned_away(conn.number);
            }
            (Some(Fault::Garbled), _) => {
                self.tally.failures.count_errno(Errno::EBADMSG);
                self.tally.failed += 1;
                self.note_setback(Stop::NotAnEcho);
            }
            (Some(Fault::SelfConnected), _) => {
                self.tally.failures.count(failures::SELF_CONNECT);
                self.note_nobody(conn.pair, conn.number);
            }
            (Some(Fault::Late), _) => {
                self.tally.unanswered += 1;
                self.tally.failures.count_errno(Errno::ETIMEDOUT);
                self.note_transient(Errno::ETIMEDOUT, conn.number, conn.retries);
            }
            (None, Some(errno)) => {
                self.tally.failures.count_errno(errno);
                self.note_errno(errno, conn.pair, conn.number, conn.retries);
            }
        }
    }

    fn note_errno(&mut self, errno: Errno, pair: u32, number: u32, retries: u8) {
        match meaning(errno) {
            Meaning::NobodyListens => self.note_nobody(pair, number),
            Meaning::TurnedAway => self.note_turned_away(number),
            Meaning::Final => {
                self.tally.failed += 1;
                self.note_setback(Stop::Network(errno));
            }
            _ => self.note_transient(errno, number, retries),
        }
    }

    /// Nothing listens on that port: the connection goes elsewhere, and so will all others soon.
    fn note_nobody(&mut self, pair: u32, number: u32) {
        self.again.push(number);
        if self.plan.note_refusal(pair) && self.plan.is_closed() {
            let stop = self.nobody_left();
            self.stop(stop);
        }
    }

    fn nobody_left(&self) -> Stop {
        if self.tally.peak == 0 && self.tally.turned_away == 0 {
            Stop::NothingListens
        } else {
            Stop::ServerGone
        }
    }

    /// The server let it in and dropped it. It is tried again as long as others get through.
    fn note_turned_away(&mut self, number: u32) {
        self.tally.turned_away += 1;
        self.again.push(number);
        self.note_setback(Stop::ServerFull);
    }

    fn note_transient(&mut self, errno: Errno, number: u32, retries: u8) {
        if !self.retries.push(Instant::now(), number, retries) {
            self.tally.failed += 1;
        }
        // Time-outs take their time by themselves, and come many at once after a pause of this process.
        if errno != Errno::ETIMEDOUT {
            self.note_setback(Stop::Network(errno));
        }
    }

    fn note_setback(&mut self, stop: Stop) {
        self.setbacks += 1;
        if self.setbacks >= self.settings.setbacks_max {
            self.stop(stop);
        }
    }

    /// Nothing has succeeded for a long time.
    pub(super) fn note_stall(&mut self) {
        self.stop(match self.tally.unanswered {
            0 => Stop::Network(Errno::ETIMEDOUT),
            _ => Stop::ServerSilent,
        });
    }

    pub(super) fn note_open(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        if self.is_its_own_peer(cx, token, conn.pair) {
            self.tell_self_connect(conn.pair);
            return self.give_up(cx, token, conn, Fault::SelfConnected);
        }
        self.tally.record_latency(self.age(conn));
        self.plan.note_success(conn.pair);
        if self.settings.verify {
            conn.stage = ConnStage::FirstProof;
            // Where it does not take the bytes, `on_close` follows and tells why.
            let _ = cx.write(token, Greeting::of(conn.number).as_bytes());
            cx.set_timeout(token, self.settings.timeout);
        } else {
            self.keep(cx, conn);
        }
    }

    /// Where nothing listens on a port that the kernel may also choose as the local one, a socket can connect to
    /// itself: TCP takes its own SYN for a simultaneous open.
    fn is_its_own_peer(&self, cx: &Context<Conn>, token: Token, pair: u32) -> bool {
        let port = self.plan.port(pair);
        let may_be_local =
            self.settings.local_ports.as_ref().is_none_or(|ports| ports.contains(&port));
        may_be_local
            && cx.local_addr(token).is_ok_and(|local| {
                local.port() == port
                    && cx.peer_addr(token).is_ok_and(|peer| peer.ip() == local.ip())
            })
    }

    fn tell_self_connect(&mut self, pair: u32) {
        if std::mem::replace(&mut self.tally.is_self_connected, true) {
            return;
        }
        let port = self.plan.port(pair);
        self.progress.warn(&format!(
            "nothing listens on port {port}, and a connect to it reached itself: the kernel takes local ports from \
             the same range (net.ipv4.ip_local_port_range); such connections are not counted. To keep the server's \
             ports free: sysctl -w net.ipv4.ip_local_reserved_ports={}",
            self.plan.port_span()
        ));
    }

    /// The connection is proven, or needs no proof.
    pub(super) fn keep(&mut self, cx: &mut Context<Conn>, conn: &mut Conn) {
        conn.stage = ConnStage::Held;
        self.in_flight -= 1;
        self.stall.note_success();
        if self.tally.hold_one(Instant::now()) {
            self.setbacks = 0;
        }
        self.progress.advance(self.tally.held);
        self.go_on(cx);
    }

    /// Without a proof, a connection that the server does not want looks open for a moment.
    pub(super) fn was_never_let_in(&self, conn: &Conn) -> bool {
        !self.settings.verify && self.stage == Stage::Ramp && self.age(conn) < PROBATION
    }

    pub(super) fn note_drop(&mut self, conn: &Conn, reason: &CloseReason) {
        self.tally.held -= 1;
        self.tally.opened -= 1;
        match errno_of(reason) {
            Some(errno) => self.tally.failures.count_errno(errno),
            None => self.tally.failures.count(failures::EOF),
        }
        self.note_turned_away(conn.number);
    }

    pub(super) fn tell_closed_ports(&self) {
        let mut closed = self.plan.closed_ports();
        if let (false, Some(first)) = (self.plan.is_closed(), closed.next()) {
            let count = closed.count() + 1;
            self.progress.warn(&format!(
                "nothing listens on {} of the ports ({first} is the first of them): \
                 the others took their share",
                format::count(count as u64)
            ));
        }
    }

    /// Microseconds of the run; they wrap around after 71 minutes.
    fn run_us(&self) -> u32 {
        self.tally.started.elapsed().as_micros() as u32
    }

    /// Since its connect was started, at most 71 minutes.
    fn age(&self, conn: &Conn) -> Duration {
        let age_us = self.run_us().wrapping_sub(conn.started_us);
        Duration::from_micros(u64::from(age_us))
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
