//! Counters of a run.

use std::time::{Duration, Instant};

use c1000k_host::format;
use c1000k_host::usage::MachineTime;
use c1000k_record::series::{self, Series};
use c1000k_record::{Churn, RampPoint, Storm, Workload};
use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use crate::failures::{self, Failures};
use crate::hdr::Interval;
use crate::latency::Latencies;
use crate::protocols::ECHO;
use crate::run::some;
use crate::target_stats::{TargetStats, stop_of_all};
use crate::usage::Usage;

/// Why no more connections were opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Descriptors ran out.
    Descriptors(Errno),
    /// The kernel had no memory for more sockets.
    Memory(Errno),
    /// Epoll watches ran out.
    Watches,
    /// This machine has no address from which it can reach the server, or has lost it.
    NoAddress,
    /// No pair of source and destination port had a local port left.
    Ports,
    /// The server dropped consecutive connections before their echo.
    ServerFull,
    /// Connections opened, and the server did not answer.
    ServerSilent,
    /// The server returned bytes that differ from those sent.
    NotAnEcho,
    /// Nothing listened, on any port.
    NothingListens,
    /// Nothing listened any more, or most connections were lost.
    ServerGone,
    /// Connects were not answered, or failed permanently.
    Network(Errno),
    /// The backlog of a Unix-domain socket stayed full.
    BacklogFull,
    /// A signal ended the run early.
    Interrupted,
}

impl Stop {
    /// As a clause.
    pub(crate) fn reason(self) -> String {
        match self {
            Self::Descriptors(errno) | Self::Memory(errno) | Self::Network(errno) => {
                format!("{errno:?}")
            }
            Self::Watches => "epoll watches ran out".to_owned(),
            Self::NoAddress => "no address to reach it from".to_owned(),
            Self::Ports => "local ports ran out".to_owned(),
            Self::ServerFull => "it drops every connection".to_owned(),
            Self::ServerSilent => "it does not answer".to_owned(),
            Self::NotAnEcho => "it returns unexpected bytes".to_owned(),
            Self::NothingListens => "nothing listens".to_owned(),
            Self::ServerGone => "nothing listens any more".to_owned(),
            Self::BacklogFull => "its backlog stays full".to_owned(),
            Self::Interrupted => "a signal".to_owned(),
        }
    }

    /// Whether it is a limit, which lowers the number of connections if none was requested, and not a fault.
    pub(crate) fn is_limit(self) -> bool {
        match self {
            Self::Descriptors(_)
            | Self::Memory(_)
            | Self::Watches
            | Self::Ports
            | Self::ServerFull
            | Self::ServerSilent
            | Self::BacklogFull => true,
            Self::NotAnEcho
            | Self::NothingListens
            | Self::ServerGone
            | Self::Network(_)
            | Self::NoAddress
            | Self::Interrupted => false,
        }
    }
}

/// Counters and clocks of one run.
#[derive(Debug)]
pub struct RunStats {
    /// The counters of each target; empty for clients without sockets, which have one target.
    pub targets: Vec<TargetStats>,
    /// Connects started.
    pub attempted: u64,
    /// Connections held now.
    pub held: u64,
    /// The maximum number of connections held at once.
    pub peak: u64,
    /// Connections that were held at any time; reopened ones count once.
    pub opened: u64,
    /// Connections that failed permanently.
    pub failed: u64,
    /// Connections that were held and lost before the end.
    pub lost: u64,
    /// Lost connections by errno.
    pub losses: Failures,
    /// Lost connections that had received part of an echo.
    pub lost_in_part: u64,
    /// Failed attempts by errno.
    pub failures: Failures,
    /// `failures` when the hold began: later attempts are those of churn and a storm. `None` before.
    pub(crate) failures_of_ramp: Option<Failures>,
    /// Attempts after the first one.
    pub retried: u64,
    /// Connections that the server dropped before their echo.
    pub refused_by_server: u64,
    /// Connections that were open for the connect timeout without their echo.
    pub unanswered: u64,
    /// Connections of `refused_by_server` and `unanswered` that had received part of their echo.
    pub answered_in_part: u64,
    /// The expected answer, as a noun phrase.
    pub(crate) expected: &'static str,
    /// What was wrong with the first unexpected answer.
    pub(crate) complaint: Option<String>,
    /// Whether a connection reached itself.
    pub is_self_connected: bool,
    /// Verified connections by pass.
    pub verified_passes: Vec<u64>,
    /// The duration of each pass.
    pub verify_seconds: Vec<f64>,
    /// Why no more connections were opened.
    pub stop: Option<Stop>,
    /// When the first connect was started.
    pub started: Instant,
    /// From the first connect to the last connection held.
    pub ramp: Duration,
    /// The duration of the hold.
    pub hold: Duration,
    /// From a connect to its connection.
    pub(crate) connect_latency: Latencies,
    /// The messages during the hold.
    pub(crate) workload: WorkloadStats,
    /// Connections closed and reopened during the hold.
    pub(crate) churn: ChurnStats,
    /// Connections closed and reopened after it.
    pub(crate) storm: StormStats,
    /// CPU time of the ramp.
    pub(crate) ramp_cpu_seconds: Option<f64>,
    /// Retransmitted segments; `None` if the kernel sends the segments.
    pub(crate) retransmitted: Option<u64>,
    /// Memory of stateless clients.
    pub(crate) state_bytes: Option<u64>,
    /// The memory of the connections at this end.
    pub(crate) usage: Usage,
    /// Latencies of the connects since the last point of either series.
    recent_latency: Latencies,
    series: Series<RampPoint>,
    hold_series: Series<RampPoint>,
    is_ramp_over: bool,
    /// When the next point of the series is due, since `started`.
    sample_due: Duration,
}

impl RunStats {
    /// Starts the clock. Always `Some` with these bounds of the histograms.
    pub fn new(now: Instant, verify: bool) -> Option<Self> {
        Some(Self {
            targets: Vec::new(),
            attempted: 0,
            held: 0,
            peak: 0,
            opened: 0,
            failed: 0,
            lost: 0,
            losses: Failures::default(),
            failures: Failures::default(),
            failures_of_ramp: None,
            retried: 0,
            refused_by_server: 0,
            unanswered: 0,
            answered_in_part: 0,
            lost_in_part: 0,
            expected: ECHO,
            complaint: None,
            is_self_connected: false,
            verified_passes: if verify { vec![0] } else { vec![] },
            verify_seconds: vec![],
            stop: None,
            started: now,
            ramp: Duration::ZERO,
            hold: Duration::ZERO,
            connect_latency: Latencies::new()?,
            workload: WorkloadStats::new()?,
            churn: ChurnStats { closed: 0, reopened: 0, latency: Latencies::new()? },
            storm: StormStats::new()?,
            ramp_cpu_seconds: None,
            retransmitted: None,
            state_bytes: None,
            usage: Usage::start(),
            recent_latency: Latencies::new()?,
            series: Series::new(),
            hold_series: Series::new(),
            is_ramp_over: false,
            sample_due: Duration::ZERO,
        })
    }

    /// The ramp begins now; its duration excludes earlier connections.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.started = now;
        self.series = Series::new();
        self.sample_due = Duration::ZERO;
        self.sample(now);
    }

    /// The ramp is over: notes its CPU time.
    pub(crate) fn note_ramp_cpu(&mut self, before: Option<f64>) {
        self.ramp_cpu_seconds = cpu_seconds().zip(before).map(|(now, before)| now - before);
        self.is_ramp_over = true;
    }

    /// A connect of the ramp is complete.
    pub(crate) fn note_connect(&mut self, latency: Duration) {
        self.connect_latency.record(latency);
        self.recent_latency.record(latency);
    }

    /// One more connection is held.
    pub(crate) fn hold_one(&mut self) {
        self.opened += 1;
        self.hold_again();
    }

    /// A connection that was held before is held again.
    pub(crate) fn hold_again(&mut self) {
        self.held += 1;
        self.peak = self.peak.max(self.held);
    }

    /// Notes that the ramp has lasted until now.
    pub(crate) fn note_ramp(&mut self, now: Instant) {
        self.ramp = now.duration_since(self.started);
        if self.ramp >= self.sample_due {
            self.sample(now);
        }
    }

    /// A held connection was lost; without an errno, its stream ended.
    pub(crate) fn lose_one(&mut self, errno: Option<Errno>) {
        self.held -= 1;
        self.lost += 1;
        match errno {
            Some(errno) => self.losses.count_errno(errno),
            None => self.losses.count(failures::EOF),
        }
    }

    /// `count` connections were closed by churn or a storm, and could not be reopened.
    pub(crate) fn lose_not_back(&mut self, count: u64) {
        self.lost += count;
        self.losses.count_many(failures::NOT_BACK, count);
    }

    /// The same, of a target.
    pub(crate) fn lose_away(&mut self, index: usize, count: u64) {
        let target = &mut self.targets[index];
        target.away -= count;
        target.lost += count;
        self.lose_not_back(count);
    }

    /// The same of all that are not yet reopened.
    pub(crate) fn lose_all_away(&mut self) {
        for index in 0..self.targets.len() {
            self.lose_away(index, self.targets[index].away);
        }
    }

    /// Connections closed by churn or a storm, and not yet reopened.
    pub(crate) fn away(&self) -> u64 {
        self.targets.iter().map(|target| target.away).sum()
    }

    /// Failed attempts of churn and of a storm.
    pub(crate) fn failures_of_reopening(&self) -> Failures {
        let of_ramp = self.failures_of_ramp.as_ref();
        of_ramp.map_or_else(Failures::default, |of_ramp| self.failures.since(of_ramp))
    }

    /// Whether most of the attempts without a complete echo received a part of it.
    pub(crate) fn has_answers_in_part(&self) -> bool {
        self.answered_in_part * 2 > self.unanswered + self.refused_by_server
    }

    /// Whether most connections were lost, of each target that held any.
    pub(crate) fn has_lost_most(&self) -> bool {
        let mut had_any = self.targets.iter().filter(|target| target.opened > 0);
        self.lost > 0 && self.lost * 2 >= self.opened && had_any.all(TargetStats::has_lost_most)
    }

    /// Opens no more connections; the first reason is kept.
    pub(crate) fn stop(&mut self, stop: Stop) {
        self.stop.get_or_insert(stop);
    }

    /// Opens no more connections to this target, and none at all once all targets are stopped.
    pub(crate) fn stop_target(&mut self, index: usize, stop: Stop) {
        self.targets[index].stop.get_or_insert(stop);
        if let Some(stop) = stop_of_all(&self.targets) {
            self.stop(stop);
        }
    }

    /// `count` connections to a target have failed permanently.
    pub(crate) fn fail(&mut self, index: usize, count: u64) {
        self.failed += count;
        self.targets[index].failed += count;
    }

    /// The lost connections so far, by errno.
    pub(crate) fn loss_line(&self) -> String {
        format!(
            "{} of {} lost so far ({})",
            format::count(self.lost),
            format::counted(self.opened, "connection"),
            self.losses
        )
    }

    /// Messages so far, and the latencies of the last second.
    pub(crate) fn workload_line(&self) -> String {
        let stats = &self.workload;
        let latency = stats.interval.percentiles();
        let text = |value: Option<u64>| format::duration(value.unwrap_or(0) as f64 / 1e6);
        format!(
            "messages: {} sent, {} answered{}; median {}, p99 {}, longest {}",
            format::count(stats.sent),
            format::count(stats.answered),
            some(self.lost, "lost"),
            text(latency.p50),
            text(latency.p99),
            text(latency.max),
        )
    }

    /// Adds a point to the ramp's series.
    pub(crate) fn sample(&mut self, now: Instant) {
        let elapsed = now.duration_since(self.started);
        let point = self.point(elapsed);
        self.series.push(point);
        self.sample_due = elapsed + series::step(elapsed);
    }

    /// Adds a point to the series of the time after the ramp; nothing before that.
    pub(crate) fn sample_hold(&mut self, now: Instant) {
        if self.is_ramp_over {
            let point = self.point(now.duration_since(self.started));
            self.hold_series.push(point);
        }
    }

    fn point(&mut self, elapsed: Duration) -> RampPoint {
        let latency = self.recent_latency.percentiles();
        self.recent_latency.clear();
        let machine = MachineTime::read();
        RampPoint {
            seconds: elapsed.as_secs_f64(),
            established: self.held,
            failures: Some(self.failures.by_name().clone()),
            lost: Some(self.lost),
            connect_p50_us: latency.p50,
            connect_p99_us: latency.p99,
            cpu_seconds: cpu_seconds(),
            machine_busy_seconds: machine.map(|machine| machine.busy_seconds),
            machine_softirq_seconds: machine.map(|machine| machine.softirq_seconds),
        }
    }

    pub(crate) fn ramp_series(&self) -> Vec<RampPoint> {
        self.series.clone().into_points()
    }

    pub(crate) fn hold_series(&self) -> Vec<RampPoint> {
        self.hold_series.clone().into_points()
    }

    /// Verified connections of the last pass; `None` without verification.
    pub fn verified(&self) -> Option<u64> {
        self.verified_passes.last().copied()
    }
}

/// CPU time of this process so far, in user mode and in the kernel.
pub(crate) fn cpu_seconds() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Counters of the messages during the hold; each that was sent is answered, mismatched or unanswered in the end.
#[derive(Debug)]
pub(crate) struct WorkloadStats {
    /// Connections that send.
    pub(crate) connections: u64,
    /// The time between two messages of one connection.
    pub(crate) period: Duration,
    /// When the first message was due, since the first connect.
    pub(crate) began: Duration,
    /// From the first message to the last answer.
    pub(crate) seconds: Duration,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) mismatched: u64,
    pub(crate) unanswered: u64,
    /// Messages sent late, because the previous answer was missing.
    pub(crate) late: u64,
    /// Turns of connections that waited for an answer until the hold was over.
    pub(crate) skipped: u64,
    /// Since the last interval ended.
    pub(crate) interval: Latencies,
    /// Up to the end of the last interval.
    pub(crate) latency: Latencies,
    pub(crate) intervals: Vec<Interval>,
    /// Whether the intervals will be written.
    pub(crate) keeps_intervals: bool,
    /// When the last one ended, since the first message.
    interval_ended: Duration,
}

impl WorkloadStats {
    fn new() -> Option<Self> {
        Some(Self {
            connections: 0,
            period: Duration::ZERO,
            began: Duration::ZERO,
            seconds: Duration::ZERO,
            sent: 0,
            answered: 0,
            mismatched: 0,
            unanswered: 0,
            late: 0,
            skipped: 0,
            interval: Latencies::new()?,
            latency: Latencies::new()?,
            intervals: Vec::new(),
            keeps_intervals: false,
            interval_ended: Duration::ZERO,
        })
    }

    /// `None` without messages, or if the run ended before them.
    pub(crate) fn record(&self) -> Option<Workload> {
        (self.connections > 0).then(|| Workload {
            connections: self.connections,
            period_seconds: self.period.as_secs_f64(),
            seconds: self.seconds.as_secs_f64(),
            sent: self.sent,
            answered: self.answered,
            mismatched: self.mismatched,
            unanswered: self.unanswered,
            late: self.late,
            skipped: self.skipped,
            latency_us: self.latency.percentiles(),
            histogram: self.latency.encoded(),
        })
    }

    /// Ends an interval, this long after the first message was due.
    pub(crate) fn end_interval(&mut self, now: Duration) {
        self.latency.add(&self.interval);
        if self.keeps_intervals {
            self.intervals.push(Interval {
                start: self.interval_ended,
                length: now.saturating_sub(self.interval_ended),
                bytes: self.interval.to_bytes(),
            });
        }
        self.interval_ended = now;
        self.interval.clear();
    }
}

/// Counters of the connections that were closed and reopened during the hold.
#[derive(Debug)]
pub(crate) struct ChurnStats {
    pub(crate) closed: u64,
    pub(crate) reopened: u64,
    /// From a connect to its connection.
    pub(crate) latency: Latencies,
}

impl ChurnStats {
    pub(crate) fn record(&self) -> Churn {
        Churn {
            closed: self.closed,
            reopened: self.reopened,
            connect_latency_us: self.latency.percentiles(),
            histogram: self.latency.encoded(),
        }
    }
}

/// Counters of a storm.
#[derive(Debug)]
pub(crate) struct StormStats {
    pub(crate) dropped: u64,
    pub(crate) back: u64,
    /// Time until the last one was closed.
    pub(crate) drop: Duration,
    /// Time from then until the last one was reopened.
    pub(crate) reopen: Duration,
    /// From a connect to its connection.
    pub(crate) latency: Latencies,
}

impl StormStats {
    fn new() -> Option<Self> {
        let latency = Latencies::new()?;
        Some(Self { dropped: 0, back: 0, drop: Duration::ZERO, reopen: Duration::ZERO, latency })
    }

    pub(crate) fn record(&self) -> Storm {
        Storm {
            dropped: self.dropped,
            back: self.back,
            drop_seconds: self.drop.as_secs_f64(),
            reopen_seconds: self.reopen.as_secs_f64(),
            connect_latency_us: self.latency.percentiles(),
            histogram: self.latency.encoded(),
        }
    }
}
