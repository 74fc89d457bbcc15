//! Opening connections: over which routes and how fast, and what becomes of attempts that fail.
//!
//! The ramp opens the connections of the goal, one after the other; later phases open those again that they have
//! closed.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use c1000k_host::command_line::ZonedIp;
use c1000k_host::format;
use nix::errno::Errno;
use reactor::{CloseReason, ConnectOptions, Error, TimerId, Token};

use crate::failures::{self, Meaning, Retries, meaning};
use crate::pacing::Pace;
use crate::plan::{Plan, Route};
use crate::protocols::Protocol;
use crate::run::{Conn, Cx, Fault, Run, arm, cancel, errno, errno_of};
use crate::stats::Stop;

/// What is to be opened, and what is under way.
#[derive(Debug)]
pub(crate) struct Opening {
    plan: Plan,
    /// `None`: as fast as may be.
    pub(crate) pace: Option<Pace>,
    /// The next connection that was never tried.
    next_number: u32,
    /// The last one to be tried.
    last_number: u32,
    /// Connections that were held and closed, to be opened anew.
    reopen: Vec<u32>,
    /// Connections to be tried elsewhere at once.
    again: Vec<u32>,
    retries: Retries,
    /// Attempts under way: they end with an answer or, where no proof is asked for, with the connection.
    pub(crate) under_way: usize,
    /// Drops and final failures since there were last more connections held than ever before.
    consecutive_failures: u32,
    /// The most connections held since they were last counted anew.
    most_held: u64,
    retry: Option<TimerId>,
    wait: Option<TimerId>,
}

/// A connection that is to be tried.
struct Work {
    number: u32,
    retries: u8,
    /// It was tried before.
    is_known: bool,
}

impl Opening {
    /// This many connections over these routes.
    pub(crate) fn new(plan: Plan, goal: u32) -> Self {
        Self {
            plan,
            pace: None,
            next_number: 1,
            last_number: goal,
            reopen: Vec::new(),
            again: Vec::new(),
            retries: Retries::default(),
            under_way: 0,
            consecutive_failures: 0,
            most_held: 0,
            retry: None,
            wait: None,
        }
    }

    /// Opens one anew that was held and has been closed.
    pub(crate) fn reopen(&mut self, number: u32) {
        self.reopen.push(number);
    }

    /// From here on more connections than `held` are a success.
    pub(crate) fn count_from(&mut self, held: u64) {
        self.most_held = held;
        self.consecutive_failures = 0;
    }

    fn has_new_work(&self) -> bool {
        self.next_number <= self.last_number || !self.again.is_empty() || !self.reopen.is_empty()
    }

    fn has_work(&self) -> bool {
        self.has_new_work() || self.retries.len() > 0
    }

    fn has_due_work(&self, now: Instant) -> bool {
        self.has_new_work() || self.retries.next_due().is_some_and(|due| due <= now)
    }
}

impl<P: Protocol> Run<'_, P> {
    /// Opens as many as may be under way; says whether there is nothing left to open or to wait for.
    pub(crate) fn open_more(&mut self, cx: &mut Cx<P>) -> bool {
        while self.may_open(cx) {
            let Some(work) = self.next_work(cx.now()) else { break };
            self.open_one(cx, &work);
        }
        if !self.is_opening() {
            return true;
        }
        if self.opening.retry.is_none()
            && let Some(due) = self.opening.retries.next_due()
        {
            self.opening.retry = arm(cx, due.saturating_duration_since(cx.now()));
        }
        false
    }

    /// Whether something is still to be opened or waited for.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening.under_way > 0 || (self.stats.stop.is_none() && self.opening.has_work())
    }

    /// Whether it was a timer of the opening, after which more may be opened.
    pub(crate) fn is_opening_timer(&mut self, timer: TimerId) -> bool {
        let timers = [&mut self.opening.retry, &mut self.opening.wait];
        let own = timers.into_iter().find(|own| **own == Some(timer));
        own.is_some_and(|own| own.take().is_some())
    }

    /// Opens no more, and lets go of what was to be tried once more; says how many connections that leaves unopened.
    pub(crate) fn end_opening(&mut self, cx: &mut Cx<P>) -> u64 {
        cancel(cx, &mut self.opening.retry);
        cancel(cx, &mut self.opening.wait);
        let waiting = self.opening.again.len() + self.opening.reopen.len();
        let unopened = self.opening.under_way + waiting + self.opening.retries.give_up();
        self.opening.again.clear();
        self.opening.reopen.clear();
        unopened as u64
    }

    /// Whether the next connect may be started now. Where only the pace forbids it, a timer comes back for it.
    fn may_open(&mut self, cx: &mut Cx<P>) -> bool {
        if self.stats.stop.is_some()
            || self.opening.under_way >= self.settings.in_flight_max
            || !self.opening.has_due_work(cx.now())
        {
            return false;
        }
        let Some(pace) = &mut self.opening.pace else { return true };
        match pace.take(cx.now()) {
            Ok(()) => true,
            Err(wait) => {
                if self.opening.wait.is_none() {
                    self.opening.wait = arm(cx, wait);
                }
                false
            }
        }
    }

    fn next_work(&mut self, now: Instant) -> Option<Work> {
        if let Some((number, retries)) = self.opening.retries.pop_due(now) {
            self.stats.retried += 1;
            return Some(Work { number, retries, is_known: true });
        }
        if let Some(number) = self.opening.again.pop() {
            self.stats.retried += 1;
            return Some(Work { number, retries: 0, is_known: true });
        }
        if let Some(number) = self.opening.reopen.pop() {
            return Some(Work { number, retries: 0, is_known: true });
        }
        if self.opening.next_number > self.opening.last_number {
            return None;
        }
        self.opening.next_number += 1;
        Some(Work { number: self.opening.next_number - 1, retries: 0, is_known: false })
    }

    fn open_one(&mut self, cx: &mut Cx<P>, work: &Work) {
        let Some(route) = self.opening.plan.next_route() else {
            self.stop(if self.opening.plan.is_closed() { nobody_left(self) } else { Stop::Ports });
            return self.put_back(work);
        };
        let conn = self.new_conn(work.number, route.pair, work.retries);
        let destination = self.settings.server.socket_addr(route.port);
        match cx.connect(destination, &self.options(&route), conn) {
            Ok(_) => {
                self.stats.attempted += 1;
                self.opening.under_way += 1;
            }
            Err(error) => self.note_refused_call(&error.error, &route, work),
        }
    }

    /// Each option costs a system call, so none is set without need.
    fn options(&self, route: &Route) -> ConnectOptions {
        let is_crowded = self.opening.plan.is_crowded_by(u64::from(self.settings.goal));
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
        self.stats.failures.count_errno(errno);
        match meaning(errno) {
            Meaning::NoDescriptor => self.stop(Stop::Descriptors(errno)),
            Meaning::NoMemory => self.stop(Stop::Memory(errno)),
            Meaning::NoWatch => self.stop(Stop::Watches),
            Meaning::NoLocalPort if !has_address(route, self.settings.server) => {
                self.stop(Stop::NoAddress);
            }
            Meaning::NoLocalPort => self.opening.plan.spend(route.pair),
            _ => {
                self.stats.attempted += 1;
                return self.note_errno(errno, route.pair, work.number, work.retries);
            }
        }
        self.put_back(work);
    }

    /// The connection was not tried, this time.
    fn put_back(&mut self, work: &Work) {
        if work.is_known || self.stats.stop.is_none() {
            self.opening.again.push(work.number);
        }
    }

    /// An attempt that was under way has failed.
    pub(crate) fn note_failure(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        self.opening.under_way -= 1;
        self.stats.answered_in_part += u64::from(self.has_part(conn));
        match (conn.fault, errno_of(reason)) {
            (Some(Fault::Eof | Fault::Closed), _) | (None, None) => {
                self.stats.failures.count(failures::EOF);
                self.note_turned_away(conn.number);
            }
            (Some(Fault::Mismatch), _) => {
                self.stats.failures.count_errno(Errno::EBADMSG);
                self.stats.failed += 1;
                self.note_consecutive_failure(Stop::NotAnEcho);
            }
            (Some(Fault::SelfConnected), _) => {
                self.stats.failures.count(failures::SELF_CONNECT);
                self.note_nobody(conn.pair, conn.number);
            }
            (Some(Fault::TimedOut), _) => {
                self.stats.unanswered += 1;
                self.stats.failures.count_errno(Errno::ETIMEDOUT);
                self.note_transient(Errno::ETIMEDOUT, conn.number, conn.retries);
            }
            (None, Some(errno)) => {
                self.stats.failures.count_errno(errno);
                self.note_errno(errno, conn.pair, conn.number, conn.retries);
            }
        }
    }

    fn note_errno(&mut self, errno: Errno, pair: u32, number: u32, retries: u8) {
        match meaning(errno) {
            Meaning::NobodyListens => self.note_nobody(pair, number),
            Meaning::TurnedAway => self.note_turned_away(number),
            Meaning::Final => {
                self.stats.failed += 1;
                self.note_consecutive_failure(Stop::Network(errno));
            }
            _ => self.note_transient(errno, number, retries),
        }
    }

    /// Nothing listens on that port: the connection goes elsewhere, and so will all others soon.
    fn note_nobody(&mut self, pair: u32, number: u32) {
        self.opening.again.push(number);
        if self.opening.plan.note_refusal(pair) && self.opening.plan.is_closed() {
            self.stop(nobody_left(self));
        }
    }

    /// The server let it in and dropped it. It is tried again as long as others get through.
    fn note_turned_away(&mut self, number: u32) {
        self.stats.turned_away += 1;
        self.opening.again.push(number);
        self.note_consecutive_failure(Stop::ServerFull);
    }

    fn note_transient(&mut self, errno: Errno, number: u32, retries: u8) {
        if !self.opening.retries.push(Instant::now(), number, retries) {
            self.stats.failed += 1;
        }
        // Time-outs take their time by themselves, and come many at once after a pause of this process.
        if errno != Errno::ETIMEDOUT {
            self.note_consecutive_failure(Stop::Network(errno));
        }
    }

    fn note_consecutive_failure(&mut self, stop: Stop) {
        self.opening.consecutive_failures += 1;
        if self.opening.consecutive_failures >= self.settings.consecutive_failures_max {
            self.stop(stop);
        }
    }

    /// Without a proof, a connection that the server does not want looks open for a moment.
    pub(crate) fn note_drop(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        self.stats.held -= 1;
        self.stats.opened -= 1;
        match errno_of(reason) {
            Some(errno) => self.stats.failures.count_errno(errno),
            None => self.stats.failures.count(failures::EOF),
        }
        self.note_turned_away(conn.number);
    }

    /// A connection has opened; says after how long, or nothing where it has reached itself and is given up.
    pub(crate) fn note_open(
        &mut self,
        cx: &mut Cx<P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) -> Option<Duration> {
        if self.is_its_own_peer(cx, token, conn.pair) {
            self.tell_self_connect(conn.pair);
            self.give_up(cx, token, conn, Fault::SelfConnected);
            return None;
        }
        self.opening.plan.note_success(conn.pair);
        Some(self.age(conn))
    }

    /// A connection is up: proven, or in need of no proof.
    pub(crate) fn keep(&mut self, conn: &mut Conn<P::State>) {
        self.opening.under_way -= 1;
        self.note_up(conn);
        if self.stats.held > self.opening.most_held {
            self.opening.count_from(self.stats.held);
        }
    }

    /// Where nothing listens on a port that the kernel may also choose as the local one, a socket can connect to
    /// itself: TCP takes its own SYN for a simultaneous open.
    fn is_its_own_peer(&self, cx: &Cx<P>, token: Token, pair: u32) -> bool {
        let port = self.opening.plan.port(pair);
        let may_be_local =
            self.settings.local_ports.as_ref().is_none_or(|ports| ports.contains(&port));
        may_be_local
            && cx.local_addr(token).is_ok_and(|local| {
                local.port() == port
                    && cx.peer_addr(token).is_ok_and(|peer| peer.ip() == local.ip())
            })
    }

    fn tell_self_connect(&mut self, pair: u32) {
        if std::mem::replace(&mut self.stats.is_self_connected, true) {
            return;
        }
        let port = self.opening.plan.port(pair);
        self.progress.warn(&format!(
            "nothing listens on port {port}, and a connect to it reached itself: the kernel takes local ports from \
             the same range (net.ipv4.ip_local_port_range); such connections are not counted. To keep the server's \
             ports free: sysctl -w net.ipv4.ip_local_reserved_ports={}",
            self.opening.plan.port_span()
        ));
    }

    pub(crate) fn tell_closed_ports(&self) {
        let mut closed = self.opening.plan.closed_ports();
        if let (false, Some(first)) = (self.opening.plan.is_closed(), closed.next()) {
            let count = closed.count() + 1;
            self.progress.warn(&format!(
                "nothing listens on {} of the ports ({first} is the first of them): \
                 the others took their share",
                format::count(count as u64)
            ));
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
