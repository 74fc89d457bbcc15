//! Opening connections: routes, rates, and the handling of failed attempts.
//!
//! The ramp opens the connections; later phases reopen those that they have closed. Each target has its own lane, and
//! the lanes take turns. The number of a connection determines its target, for the whole run.

mod lane;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use c1000k_host::command_line::ZonedIp;
use c1000k_host::format;
use nix::errno::Errno;
use reactor::{CloseReason, ConnectOptions, Error, TimerId, Token};

use self::lane::{Lane, Work};
use crate::destination::Destination;
use crate::failures::{self, Meaning, meaning};
use crate::pacing::Pace;
use crate::plan::{Plan, Route};
use crate::protocols::Protocol;
use crate::run::{Conn, ConnStage, Cx, Fault, Run, arm, cancel, errno, errno_of};
use crate::stats::{RunStats, Stop};

/// The connections to be opened, and those in flight.
#[derive(Debug)]
pub(crate) struct Opening {
    /// One for each target.
    lanes: Vec<Lane>,
    /// The lane that is next.
    turn: usize,
    /// `None`: as fast as possible.
    pub(crate) pace: Option<Pace>,
    /// Attempts in flight, of all lanes.
    pub(crate) in_flight: usize,
    /// The timer of the next attempt that is not yet due, and its time.
    retry: Option<(TimerId, Instant)>,
    /// The timer of the next connect that the rate allows.
    wait: Option<TimerId>,
    /// No more connections are opened, to any target.
    is_stopped: bool,
}

impl Opening {
    /// `goal` connections, shared evenly by the destinations.
    pub(crate) fn new(destinations: Vec<(Destination, Plan)>, goal: u32) -> Self {
        let step = destinations.len() as u64;
        let lane = |(index, (to, plan))| Lane::new(to, plan, index as u64 + 1, step, goal);
        Self {
            lanes: destinations.into_iter().enumerate().map(lane).collect(),
            turn: 0,
            pace: None,
            in_flight: 0,
            retry: None,
            wait: None,
            is_stopped: false,
        }
    }

    /// The target of a connection.
    pub(crate) fn target_of(&self, number: u32) -> usize {
        (number as usize).wrapping_sub(1) % self.lanes.len()
    }

    pub(crate) fn destinations(&self) -> impl Iterator<Item = &Destination> {
        self.lanes.iter().map(|lane| &lane.destination)
    }

    fn lane_of(&mut self, number: u32) -> &mut Lane {
        let index = self.target_of(number);
        &mut self.lanes[index]
    }

    /// Queues a connection that was held and has been closed.
    pub(crate) fn reopen(&mut self, number: u32) {
        self.lane_of(number).reopen(number);
    }

    /// From here on only connections that were held are reopened, including to stopped targets; each counts as a
    /// success.
    pub(crate) fn begin_reopening(&mut self) {
        self.is_stopped = false;
        self.lanes.iter_mut().for_each(Lane::begin_reopening);
    }

    pub(crate) fn stop(&mut self) {
        self.is_stopped = true;
    }

    /// An attempt has ended.
    fn end_attempt(&mut self, number: u32) {
        self.in_flight -= 1;
        self.lane_of(number).in_flight -= 1;
    }

    /// The next lane in turn with a connection that may be tried now. A target that does not answer uses at most its
    /// share of the attempts in flight.
    fn next_lane(&self, in_flight_max: usize, now: Instant) -> Option<usize> {
        if self.is_stopped || self.in_flight >= in_flight_max {
            return None;
        }
        let count = self.lanes.len();
        let share = in_flight_max.div_ceil(count);
        (self.turn..self.turn + count).map(|turn| turn % count).find(|&index| {
            let lane = &self.lanes[index];
            lane.in_flight < share && lane.has_due_work(now)
        })
    }

    /// When the next attempt that is not yet due becomes due.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        self.lanes.iter().filter_map(Lane::next_due).filter(|&due| due > now).min()
    }

    fn has_work(&self) -> bool {
        !self.is_stopped && self.lanes.iter().any(Lane::has_work)
    }
}

impl<P: Protocol> Run<'_, P> {
    /// Starts as many connects as may be in flight; returns whether nothing is left to open or to wait for.
    pub(crate) fn open_more(&mut self, cx: &mut Cx<P>) -> bool {
        while let Some(lane) = self.lane_to_open(cx) {
            let Some(work) = self.next_work(lane, cx.now()) else { break };
            self.open_one(cx, lane, &work);
        }
        if !self.is_opening() {
            return true;
        }
        self.arm_retry(cx);
        false
    }

    /// Sets the timer for the next attempt that is not yet due.
    fn arm_retry(&mut self, cx: &mut Cx<P>) {
        let Some(due) = self.opening.next_due(cx.now()) else { return };
        match self.opening.retry {
            Some((_, armed)) if armed <= due => return,
            Some((timer, _)) => _ = cx.cancel_timer(timer),
            None => {}
        }
        let timer = arm(cx, due.saturating_duration_since(cx.now()));
        self.opening.retry = timer.map(|timer| (timer, due));
    }

    /// Whether something is still to be opened or waited for.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening.in_flight > 0 || self.opening.has_work()
    }

    /// Nothing has succeeded for too long: stops the targets that still have connections to open.
    pub(crate) fn stop_stalled(&mut self) {
        for index in 0..self.opening.lanes.len() {
            let lane = &self.opening.lanes[index];
            if lane.in_flight > 0 || lane.has_work() {
                self.stop_target(index, self.stats.targets[index].stall());
            }
        }
    }

    /// Opens no more connections, and closes those that are not up yet: their answers have not come in time.
    pub(crate) fn cut_opening(&mut self, cx: &mut Cx<P>) {
        self.stop_stalled();
        let tokens: Vec<Token> = cx.tokens(0..cx.slots()).collect();
        for token in tokens {
            let Some(conn) = cx.conn_mut(token) else { continue };
            if matches!(conn.stage, ConnStage::Connecting | ConnStage::Opening) && conn.is_usable()
            {
                conn.fault = Some(Fault::TimedOut);
                cx.abort(token);
            }
        }
    }

    /// Whether the timer is one of these, so that more may be opened now.
    pub(crate) fn is_opening_timer(&mut self, timer: TimerId) -> bool {
        if self.opening.retry.is_some_and(|(own, _)| own == timer) {
            self.opening.retry = None;
            return true;
        }
        let is_own = self.opening.wait == Some(timer);
        if is_own {
            self.opening.wait = None;
        }
        is_own
    }

    /// Opens no more connections, and discards the retries.
    pub(crate) fn end_opening(&mut self, cx: &mut Cx<P>) {
        self.give_up_opening(cx, |_, _, _| {});
    }

    /// The same, and counts the unopened connections that were tried as failed.
    pub(crate) fn fail_opening(&mut self, cx: &mut Cx<P>) {
        self.give_up_opening(cx, RunStats::fail);
    }

    fn give_up_opening(&mut self, cx: &mut Cx<P>, count: impl Fn(&mut RunStats, usize, u64)) {
        cancel(cx, &mut self.opening.retry.take().map(|(timer, _)| timer));
        cancel(cx, &mut self.opening.wait);
        for (index, lane) in self.opening.lanes.iter_mut().enumerate() {
            count(&mut self.stats, index, lane.give_up());
        }
    }

    /// The lane of the next connect, if it may be started now. If only the rate prevents it, a timer is set.
    fn lane_to_open(&mut self, cx: &mut Cx<P>) -> Option<usize> {
        let lane = self.opening.next_lane(self.settings.in_flight_max, cx.now())?;
        let Some(pace) = &mut self.opening.pace else { return Some(lane) };
        match pace.take(cx.now()) {
            Ok(()) => Some(lane),
            Err(wait) => {
                if self.opening.wait.is_none() {
                    self.opening.wait = arm(cx, wait);
                }
                None
            }
        }
    }

    fn next_work(&mut self, lane: usize, now: Instant) -> Option<Work> {
        self.opening.turn = (lane + 1) % self.opening.lanes.len();
        let work = self.opening.lanes[lane].next_work(now)?;
        self.stats.retried += u64::from(work.is_retry);
        Some(work)
    }

    fn open_one(&mut self, cx: &mut Cx<P>, lane: usize, work: &Work) {
        let plan = &mut self.opening.lanes[lane].plan;
        let Some(route) = plan.next_route() else {
            let stop = if plan.is_closed() { self.nothing_listens(lane) } else { Stop::Ports };
            self.stop_target(lane, stop);
            return self.put_back(lane, work);
        };
        let since = self.opening.lanes[lane].waited_since(work.number).unwrap_or_else(Instant::now);
        let conn = self.new_conn(work.number, route.pair, work.retries, since);
        let to = self.opening.lanes[lane].destination.at(route.port);
        match cx.connect(to, &self.options(lane, &route), conn) {
            Ok(_) => {
                self.count_attempt(lane);
                self.opening.in_flight += 1;
                let lane = &mut self.opening.lanes[lane];
                lane.in_flight += 1;
                lane.end_pause();
            }
            Err(error) => self.note_refused_call(&error.error, lane, &route, work),
        }
    }

    fn count_attempt(&mut self, lane: usize) {
        self.stats.attempted += 1;
        self.stats.targets[lane].attempted += 1;
    }

    /// Each option costs a system call, so only needed ones are set.
    fn options(&self, lane: usize, route: &Route) -> ConnectOptions {
        let share = u64::from(self.settings.goal).div_ceil(self.opening.lanes.len() as u64);
        let is_crowded = self.opening.lanes[lane].plan.is_crowded_by(share);
        ConnectOptions {
            source: route.source.map(|source| source.socket_addr(0)),
            port_range: self.settings.local_ports.clone().filter(|_| is_crowded),
            timeout: Some(self.settings.timeout),
            ..ConnectOptions::default()
        }
    }

    /// The system refused to start the connect. If a resource has run out, the connection has not failed: it was not
    /// tried.
    fn note_refused_call(&mut self, error: &Error, lane: usize, route: &Route, work: &Work) {
        let Some(errno) = errno(error) else {
            // The reactor's bound, which was chosen for the requested connections.
            log::error!("no connection can be added: {error}");
            self.stop(Stop::Descriptors(Errno::EMFILE));
            return self.put_back(lane, work);
        };
        self.stats.failures.count_errno(errno);
        let to = &self.opening.lanes[lane].destination;
        match meaning(errno) {
            Meaning::NoDescriptor => self.stop(Stop::Descriptors(errno)),
            Meaning::NoMemory => self.stop(Stop::Memory(errno)),
            Meaning::NoWatch => self.stop(Stop::Watches),
            Meaning::NoLocalPort if !has_address(route, to) => {
                self.stop_target(lane, Stop::NoAddress);
            }
            Meaning::NoLocalPort => self.opening.lanes[lane].plan.spend(route.pair),
            _ if to.is_unix() && errno == Errno::EAGAIN => {
                self.count_attempt(lane);
                self.note_full_backlog(lane, work.number);
                return self.opening.lanes[lane].try_again(work.number);
            }
            // The next connect to the same path would fail likewise.
            Meaning::Final if to.is_unix() => {
                self.count_attempt(lane);
                self.stop_target(lane, Stop::Network(errno));
                return self.opening.lanes[lane].try_again(work.number);
            }
            _ => {
                self.count_attempt(lane);
                return self.note_errno(errno, route.pair, work.number, work.retries);
            }
        }
        self.put_back(lane, work);
    }

    /// A Unix-domain connect completes or fails immediately; EAGAIN means that the server's backlog is full.
    fn note_full_backlog(&mut self, lane: usize, number: u32) {
        let target = &mut self.stats.targets[lane];
        target.backlog_full += 1;
        if target.backlog_full == 1 {
            self.progress.warn(&format!(
                "the backlog of {} is full (EAGAIN): the server accepts more slowly than the client connects, and \
                 connects wait; a larger backlog of the server (net.core.somaxconn) helps",
                target.destination
            ));
        }
        self.opening.lanes[lane].pause(Instant::now(), number);
    }

    /// Returns the connection to the queue without counting an attempt.
    fn put_back(&mut self, lane: usize, work: &Work) {
        let is_stopped = self.opening.is_stopped || self.opening.lanes[lane].is_stopped;
        if work.is_known || !is_stopped {
            self.opening.lanes[lane].try_again(work.number);
        }
    }

    /// Opens no more connections to this target; the others continue.
    fn stop_target(&mut self, lane: usize, stop: Stop) {
        let is_first = !std::mem::replace(&mut self.opening.lanes[lane].is_stopped, true);
        self.stats.stop_target(lane, stop);
        if is_first && self.opening.lanes.iter().any(|lane| !lane.is_stopped) {
            self.progress.warn(&format!(
                "no more connections to {} are opened: {}; the other targets continue",
                self.opening.lanes[lane].destination,
                stop.reason()
            ));
        }
    }

    /// An attempt in flight has failed.
    pub(crate) fn note_failure(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        self.opening.end_attempt(conn.number);
        self.stats.answered_in_part += u64::from(self.has_part(conn));
        match (conn.fault, errno_of(reason)) {
            (Some(Fault::Eof | Fault::Closed), _) | (None, None) => {
                self.stats.failures.count(failures::EOF);
                self.note_refused_by_server(conn.number);
            }
            (Some(Fault::Mismatch), _) => {
                self.stats.failures.count_errno(Errno::EBADMSG);
                self.fail(conn.number);
                self.note_consecutive_failure(conn.number, Stop::NotAnEcho);
            }
            (Some(Fault::SelfConnected), _) => {
                self.stats.failures.count(failures::SELF_CONNECT);
                self.note_refusal(conn.pair, conn.number);
            }
            (Some(Fault::TimedOut), _) => {
                self.stats.unanswered += 1;
                self.target_of(conn).unanswered += 1;
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
            Meaning::NothingListens => self.note_refusal(pair, number),
            Meaning::RefusedByServer => self.note_refused_by_server(number),
            Meaning::Final => {
                self.fail(number);
                self.note_consecutive_failure(number, Stop::Network(errno));
            }
            _ => self.note_transient(errno, number, retries),
        }
    }

    /// The connection has failed permanently; one that was held before is lost.
    fn fail(&mut self, number: u32) {
        let target = self.opening.target_of(number);
        if self.opening.lane_of(number).is_reopening {
            self.stats.lose_away(target, 1);
        } else {
            self.stats.fail(target, 1);
        }
    }

    /// Nothing listens on that port: the connection is tried on another one. After a few refusals the port is not used.
    fn note_refusal(&mut self, pair: u32, number: u32) {
        let lane = self.opening.lane_of(number);
        lane.try_again(number);
        if lane.plan.note_refusal(pair) && lane.plan.is_closed() {
            let index = self.opening.target_of(number);
            self.stop_target(index, self.nothing_listens(index));
        }
    }

    /// The server accepted the connection and dropped it. It is retried as long as others succeed.
    fn note_refused_by_server(&mut self, number: u32) {
        self.stats.refused_by_server += 1;
        self.stats.targets[self.opening.target_of(number)].refused_by_server += 1;
        self.opening.lane_of(number).try_again(number);
        self.note_consecutive_failure(number, Stop::ServerFull);
    }

    fn note_transient(&mut self, errno: Errno, number: u32, retries: u8) {
        if !self.opening.lane_of(number).retries.push(Instant::now(), number, retries) {
            self.fail(number);
        }
        // Timeouts are slow in themselves, and after a pause of this process many occur at once.
        if errno != Errno::ETIMEDOUT {
            self.note_consecutive_failure(number, Stop::Network(errno));
        }
    }

    fn note_consecutive_failure(&mut self, number: u32, stop: Stop) {
        let lane = self.opening.lane_of(number);
        lane.consecutive_failures += 1;
        if lane.consecutive_failures >= self.settings.consecutive_failures_max {
            self.stop_target(self.opening.target_of(number), stop);
        }
    }

    /// Without verification, a connection that the server refuses appears open for a moment.
    pub(crate) fn note_drop(&mut self, conn: &Conn<P::State>, reason: &CloseReason) {
        let target = &mut self.stats.targets[self.opening.target_of(conn.number)];
        target.held -= 1;
        target.opened -= 1;
        self.stats.held -= 1;
        self.stats.opened -= 1;
        match errno_of(reason) {
            Some(errno) => self.stats.failures.count_errno(errno),
            None => self.stats.failures.count(failures::EOF),
        }
        self.note_refused_by_server(conn.number);
    }

    /// A connection has opened; returns its latency, or `None` if it is connected to itself and closed.
    pub(crate) fn note_open(
        &mut self,
        cx: &mut Cx<P>,
        token: Token,
        conn: &mut Conn<P::State>,
    ) -> Option<Duration> {
        if self.is_its_own_peer(cx, token, conn) {
            self.warn_of_self_connect(conn);
            self.give_up(cx, token, conn, Fault::SelfConnected);
            return None;
        }
        let lane = self.opening.lane_of(conn.number);
        lane.plan.note_success(conn.pair);
        let is_unix = lane.destination.is_unix();
        let latency = self.age(conn);
        if is_unix && !self.settings.verify {
            // A wait for a full backlog is over, and the server may still drop the connection.
            self.restart_age(conn);
        }
        Some(latency)
    }

    /// A connection is up: verified or, without verification, open.
    pub(crate) fn keep(&mut self, conn: &mut Conn<P::State>) {
        self.opening.end_attempt(conn.number);
        let is_again = self.opening.lane_of(conn.number).is_reopening;
        self.note_up(conn, is_again);
        let held = self.stats.targets[self.opening.target_of(conn.number)].held;
        self.opening.lane_of(conn.number).note_up(held);
    }

    /// The destination port of a connection.
    fn port_of(&self, conn: &Conn<P::State>) -> u16 {
        self.opening.lanes[self.opening.target_of(conn.number)].plan.port(conn.pair)
    }

    /// If nothing listens on a port that the kernel may also choose as the local one, a socket can connect to itself:
    /// its SYN arrives as in a simultaneous open.
    fn is_its_own_peer(&self, cx: &Cx<P>, token: Token, conn: &Conn<P::State>) -> bool {
        if self.opening.lanes[self.opening.target_of(conn.number)].destination.is_unix() {
            return false;
        }
        let port = self.port_of(conn);
        let may_be_local =
            self.settings.local_ports.as_ref().is_none_or(|ports| ports.contains(&port));
        may_be_local
            && cx.local_addr(token).is_ok_and(|local| {
                local.port() == port
                    && cx.peer_addr(token).is_ok_and(|peer| peer.ip() == local.ip())
            })
    }

    fn warn_of_self_connect(&mut self, conn: &Conn<P::State>) {
        if std::mem::replace(&mut self.stats.is_self_connected, true) {
            return;
        }
        let port = self.port_of(conn);
        self.progress.warn(&format!(
            "nothing listens on port {port}, and a connect to it reached itself: the kernel chooses local ports from \
             the same range (net.ipv4.ip_local_port_range); such connections are reset and counted as SELF_CONNECT, not \
             as held. To keep the server's ports free: sysctl -w net.ipv4.ip_local_reserved_ports={}",
            self.opening.lane_of(conn.number).plan.port_span()
        ));
    }

    pub(crate) fn warn_of_closed_ports(&self) {
        for lane in &self.opening.lanes {
            let mut closed = lane.plan.closed_ports();
            if let (false, Some(first)) = (lane.plan.is_closed(), closed.next()) {
                let count = closed.count() + 1;
                let of = match self.opening.lanes.len() {
                    1 => "the ports".to_owned(),
                    _ => format!("the ports of {}", lane.destination),
                };
                self.progress.warn(&format!(
                    "nothing listens on {} of {of} ({first} is the first of them): \
                     the other ports were used instead",
                    format::count(count as u64)
                ));
            }
        }
    }

    fn nothing_listens(&self, lane: usize) -> Stop {
        if self.stats.targets[lane].was_never_there() {
            Stop::NothingListens
        } else {
            Stop::ServerGone
        }
    }
}

/// Whether this machine has an address from which it can reach the server. EADDRNOTAVAIL means that either an address or
/// a port is missing; UDP ports are separate, so a UDP socket fails only without an address.
fn has_address(route: &Route, to: &Destination) -> bool {
    let Some(server) = to.ip() else { return true };
    let any: ZonedIp = match server.ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let probe = UdpSocket::bind(route.source.unwrap_or(any).socket_addr(0));
    let reached = probe.and_then(|socket| socket.connect(server.socket_addr(route.port)));
    !reached.is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}
