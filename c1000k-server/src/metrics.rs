//! The server's counts and its use of resources: one snapshot per sample, for the status line, the record and the
//! summary.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use c1000k_host::format;
use c1000k_host::usage::{
    KernelCost, KernelMeter, MachineTime, NetCounters, ProcessUsage, SocketUsage,
};
use c1000k_record::ServerPoint;
use c1000k_record::endpoint::Endpoint;
use c1000k_record::series::{self, Series};
use reactor::Stats;

use crate::admission::Overload;
use crate::counts::{Counts, add_each, by_name};
use crate::exposition;

/// A sample is taken at least this often, to find the peak, even if status lines are rarer.
const SAMPLE_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// A sample reads files of the kernel, some of them long. It may take at most this fraction of the time: one part of
/// ten.
const SAMPLE_SHARE_MAX: u32 = 10;

/// This number of connections of a thread that open or close between two samples is a burst, which is sampled more
/// often.
const BURST_MIN: u64 = 64;

/// The counts of one thread, or of all threads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) stats: Stats,
    /// Peers that were not admitted.
    pub(crate) refused_by: Counts,
    /// Connections that ended before both sides had finished.
    pub(crate) closed_by: Counts,
}

impl Totals {
    /// Adds all but the peak.
    pub(crate) fn add(&mut self, more: &Totals) {
        self.stats += &more.stats;
        add_each(&mut self.refused_by, &more.refused_by);
        add_each(&mut self.closed_by, &more.closed_by);
    }
}

/// The server at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Time since the start.
    pub(crate) uptime: Duration,
    /// Connections that are open.
    pub(crate) connections: u64,
    /// The maximum of open connections.
    pub(crate) connections_max: u64,
    pub(crate) accepted: u64,
    pub(crate) closed: u64,
    pub(crate) closed_by: Counts,
    pub(crate) refused: u64,
    pub(crate) refused_by: Counts,
    /// Failed accepts by errno.
    pub(crate) accept_errors: BTreeMap<i32, u64>,
    pub(crate) accept_pauses: u64,
    pub(crate) stale_events: u64,
    pub(crate) wakeups: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    /// What is short, if no connection is admitted.
    pub(crate) shortage: Option<&'static str>,
    /// `None` where `/proc` can't be read.
    pub(crate) process: Option<ProcessUsage>,
    /// The kernel memory of the sockets added since the start; `None` if the slabs can't be read, or without a new
    /// socket.
    pub(crate) kernel: Option<KernelCost>,
    /// Data queued in all sockets of the system.
    pub(crate) socket_buffer_bytes: Option<u64>,
}

impl Metrics {
    pub(crate) fn rss_bytes(&self) -> Option<u64> {
        self.process.map(|usage| usage.rss_bytes)
    }

    /// The total kernel memory of the sockets added since the start, without queued data; if the slabs can't be read,
    /// the queued data of the system.
    fn kernel_bytes(&self) -> Option<u64> {
        self.kernel.as_ref().map_or(self.socket_buffer_bytes, |cost| Some(bytes_of(cost)))
    }

    /// The status line, with the rate of `accepts` in `since_last`.
    fn status_line(&self, accepts: u64, since_last: Duration, overload: Overload) -> String {
        let per_second = c1000k_record::per_second(accepts, since_last.as_secs_f64());
        let own = self.rss_bytes().map_or_else(|| "?".to_owned(), format::bytes);
        // The kernel counts the sockets of all programs, so the figure is meaningless while the server has none.
        let of_kernel = match (&self.kernel, self.socket_buffer_bytes) {
            _ if self.connections == 0 => String::new(),
            (Some(cost), _) => {
                let each = format::bytes(cost.slab_bytes().max(0.0) as u64);
                format!(" | kernel {} ({each} a socket)", format::bytes(bytes_of(cost)))
            }
            (None, Some(buffers)) => {
                format!(" | kernel {} in socket buffers", format::bytes(buffers))
            }
            (None, None) => " | kernel ?".to_owned(),
        };
        let doing = match overload {
            Overload::Refuse => "refusing",
            Overload::Pause => "pausing",
        };
        let state =
            self.shortage.map_or_else(String::new, |shortage| format!(" | {doing}: {shortage}"));
        format!(
            "{} | {} accepts | own {own}{of_kernel}{state}",
            format::counted(self.connections, "connection"),
            format::rate(per_second),
        )
    }
}

/// Takes the samples, and keeps the time series.
#[derive(Debug)]
pub(crate) struct Sampler {
    started: Instant,
    overload: Overload,
    kernel: KernelMeter,
    counters_at_start: Option<NetCounters>,
    rss_at_start_bytes: Option<u64>,
    rss_max_bytes: Option<u64>,
    peak: Option<Peak>,
    series: Series<ServerPoint>,
    sampled_at: Instant,
    last_line: Line,
    /// Where samples are published, if at all.
    pub(crate) endpoint: Option<Endpoint>,
}

/// The last status line.
#[derive(Debug)]
struct Line {
    at: Instant,
    accepted: u64,
}

/// The sample with the most open connections.
#[derive(Clone, Debug)]
pub(crate) struct Peak {
    pub(crate) connections: u64,
    pub(crate) rss_bytes: Option<u64>,
    pub(crate) kernel: Option<KernelCost>,
}

impl Sampler {
    /// Takes the baseline before the first connection.
    pub(crate) fn start(overload: Overload) -> Self {
        let now = Instant::now();
        let mut sampler = Self {
            started: now,
            overload,
            kernel: KernelMeter::start(),
            counters_at_start: NetCounters::read(),
            rss_at_start_bytes: None,
            rss_max_bytes: None,
            peak: None,
            series: Series::new(),
            sampled_at: now,
            last_line: Line { at: now, accepted: 0 },
            endpoint: None,
        };
        let metrics = sampler.measure(Totals::default(), None, now);
        sampler.note(&metrics);
        sampler.rss_at_start_bytes = metrics.rss_bytes();
        sampler
    }

    /// Takes a sample, and logs a status line if `interval` has passed since the last one.
    pub(crate) fn sample(
        &mut self,
        totals: Totals,
        shortage: Option<&'static str>,
        now: Instant,
        interval: Duration,
    ) {
        let metrics = self.measure(totals, shortage, now);
        self.note(&metrics);
        // Samples are not taken exactly when a line is due: a line may be early by at most half of their interval.
        let half = now.duration_since(std::mem::replace(&mut self.sampled_at, now)) / 2;
        let since_last = now.duration_since(self.last_line.at);
        if since_last + half >= interval {
            let accepts = metrics.accepted - self.last_line.accepted;
            self.last_line = Line { at: now, accepted: metrics.accepted };
            log::info!("{}", metrics.status_line(accepts, since_last, self.overload));
        }
        if let Some(endpoint) = &self.endpoint {
            endpoint.publish(exposition::PREFIX, Box::new(metrics));
        }
    }

    /// The metrics now.
    pub(crate) fn measure(
        &self,
        totals: Totals,
        shortage: Option<&'static str>,
        now: Instant,
    ) -> Metrics {
        let Totals { stats, mut refused_by, closed_by } = totals;
        if stats.dropped > 0 {
            refused_by.insert("exhausted", stats.dropped);
        }
        Metrics {
            uptime: now.duration_since(self.started),
            connections: stats.open(),
            connections_max: stats.open_max,
            accepted: stats.accepted,
            closed: stats.closed,
            closed_by,
            refused: stats.refused + stats.dropped,
            refused_by,
            accept_errors: stats.accept_errors,
            accept_pauses: stats.accept_pauses,
            stale_events: stats.stale_events,
            wakeups: stats.wakeups,
            bytes_in: stats.bytes_in,
            bytes_out: stats.bytes_out,
            shortage,
            process: ProcessUsage::read(),
            kernel: self.kernel.cost(),
            socket_buffer_bytes: SocketUsage::read().map(|usage| usage.buffer_bytes),
        }
    }

    /// Adds a sample to the time series and the peak.
    fn note(&mut self, metrics: &Metrics) {
        let connections = metrics.connections;
        self.rss_max_bytes = self.rss_max_bytes.max(metrics.rss_bytes());
        let machine = MachineTime::read();
        self.series.push(ServerPoint {
            seconds: metrics.uptime.as_secs_f64(),
            open: connections,
            rss_bytes: metrics.rss_bytes(),
            kernel_socket_bytes: metrics.kernel_bytes(),
            cpu_seconds: metrics
                .process
                .map(|process| process.cpu_user_seconds + process.cpu_system_seconds),
            machine_busy_seconds: machine.map(|machine| machine.busy_seconds),
            machine_softirq_seconds: machine.map(|machine| machine.softirq_seconds),
            refused_by: Some(by_name(&metrics.refused_by)),
        });
        let is_peak = self.peak.as_ref().is_none_or(|peak| connections >= peak.connections);
        if connections > 0 && is_peak {
            let kernel = metrics.kernel.clone();
            self.peak = Some(Peak { connections, rss_bytes: metrics.rss_bytes(), kernel });
        }
    }

    pub(crate) fn rss_at_start_bytes(&self) -> Option<u64> {
        self.rss_at_start_bytes
    }

    /// The maximum resident memory of any sample, which the kernel's own peak may miss.
    pub(crate) fn rss_max_bytes(&self) -> Option<u64> {
        self.rss_max_bytes
    }

    pub(crate) fn peak(&self) -> Option<&Peak> {
        self.peak.as_ref()
    }

    pub(crate) fn slabs_shown_as(&self) -> BTreeMap<String, String> {
        self.kernel.shown_as()
    }

    /// The growth of the kernel's counters.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let grown = self.counters_at_start.as_ref().zip(NetCounters::read());
        let grown = grown.map(|(before, now)| now.since(before));
        let counters = grown.iter().flat_map(NetCounters::iter);
        counters.map(|(name, count)| (name.to_owned(), count)).collect()
    }

    pub(crate) fn take_series(&mut self) -> Vec<ServerPoint> {
        std::mem::take(&mut self.series).into_points()
    }
}

impl Peak {
    /// The growth of the process since `rss_at_start_bytes`, per connection.
    pub(crate) fn user_bytes_per_connection(&self, rss_at_start_bytes: Option<u64>) -> Option<f64> {
        let grown = self.rss_bytes?.saturating_sub(rss_at_start_bytes?);
        Some(grown as f64 / self.connections as f64)
    }

    /// The total growth of each slab cache.
    pub(crate) fn bytes_by_slab(&self) -> Option<BTreeMap<String, u64>> {
        let cost = self.kernel.as_ref()?;
        let in_all = |per_socket: f64| (per_socket * cost.sockets as f64).max(0.0) as u64;
        let slabs = cost.slabs.iter().map(|&(name, bytes)| (name.to_owned(), in_all(bytes)));
        let rest = [("other".to_owned(), in_all(cost.other_slabs))];
        Some(slabs.chain(rest).filter(|&(_, bytes)| bytes > 0).collect())
    }
}

/// The total kernel memory of the sockets added since the start, without queued data.
fn bytes_of(cost: &KernelCost) -> u64 {
    (cost.slab_bytes() * cost.sockets as f64).max(0.0) as u64
}

/// When the next sample is due: periodically, and more often during a burst of connections that open or close.
#[derive(Debug)]
pub(crate) struct SampleClock {
    /// Time between two status lines.
    interval: Duration,
    /// The duration of the last sample.
    sample_takes: Duration,
    /// Connections that have opened or closed since the last sample.
    changes: u64,
    is_burst: bool,
    /// The start of the present series of bursts, which ends after two samples without a burst.
    bursts_since: Option<Instant>,
}

impl SampleClock {
    pub(crate) fn new(interval: Duration) -> Self {
        Self {
            interval,
            sample_takes: Duration::ZERO,
            changes: 0,
            is_burst: false,
            bursts_since: None,
        }
    }

    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// Notes that a connection has opened or closed; returns whether a burst begins, so that a sample is due at once.
    pub(crate) fn note_change(&mut self) -> bool {
        self.changes += 1;
        !self.is_burst && self.changes >= BURST_MIN
    }

    /// Notes that a sample is taken.
    pub(crate) fn note_sample(&mut self, now: Instant) {
        let was_burst = std::mem::replace(&mut self.is_burst, self.changes >= BURST_MIN);
        if self.is_burst {
            self.bursts_since.get_or_insert(now);
        } else if !was_burst {
            self.bursts_since = None;
        }
        self.changes = 0;
    }

    pub(crate) fn note_sample_takes(&mut self, sample_takes: Duration) {
        self.sample_takes = sample_takes;
    }

    /// Time from `now` to the next sample.
    pub(crate) fn next(&self, now: Instant) -> Duration {
        let bursts_since = self.bursts_since.filter(|_| self.is_burst);
        let burst_age = bursts_since.map(|since| now.saturating_duration_since(since));
        sample_interval(self.interval, burst_age, self.sample_takes)
    }
}

/// The time to the next sample; in a burst the first samples follow each other quickly.
fn sample_interval(
    interval: Duration,
    burst_age: Option<Duration>,
    sample_takes: Duration,
) -> Duration {
    let longest = interval.min(SAMPLE_INTERVAL_MAX);
    let step = burst_age.map_or(longest, series::step);
    step.max(sample_takes * SAMPLE_SHARE_MAX).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_is_sampled_closely_at_first_and_never_for_most_of_the_time() {
        let ms = Duration::from_millis;
        assert_eq!(sample_interval(10 * SECOND, None, ms(1)), SECOND);
        assert_eq!(sample_interval(ms(200), None, ms(1)), ms(200));
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), ms(1)), ms(20));
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), ms(5)), ms(50));
        assert_eq!(sample_interval(10 * SECOND, Some(100 * SECOND), ms(1)), SECOND);
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), SECOND), SECOND);
    }

    #[test]
    fn a_burst_makes_a_sample_due_at_once_and_only_once() {
        let mut clock = SampleClock::new(SECOND);
        let now = Instant::now();
        let due = |clock: &mut SampleClock| (1..=1_000).filter(|_| clock.note_change()).count();
        assert_eq!((1..BURST_MIN).filter(|_| clock.note_change()).count(), 0);
        assert!(clock.note_change());
        clock.note_sample(now);
        assert_eq!((due(&mut clock), clock.next(now)), (0, Duration::from_millis(20)));
        clock.note_sample(now + SECOND);
        clock.note_sample(now + 2 * SECOND);
        assert_eq!(clock.next(now + 2 * SECOND), SECOND, "no burst since the last sample");
    }

    #[test]
    fn status_lines_keep_their_distance_however_close_the_samples_are() {
        for step_ms in [20, 130, 999, 1_001] {
            let mut sampler = Sampler::start(Overload::Refuse);
            let (mut lines, mut line_at) = (0, sampler.last_line.at);
            for sample in 1..=10_000 / step_ms {
                let now = sampler.started + Duration::from_millis(sample * step_ms);
                sampler.sample(Totals::default(), None, now, SECOND);
                lines += u64::from(sampler.last_line.at != line_at);
                line_at = sampler.last_line.at;
            }
            assert!((9..=10).contains(&lines), "{step_ms}: {lines}");
        }
    }

    #[test]
    fn the_status_line_says_what_is_short() {
        let sampler = Sampler::start(Overload::Pause);
        let mut totals = Totals::default();
        (totals.stats.accepted, totals.stats.opened) = (2, 2);
        let mut metrics = sampler.measure(totals, Some("memory"), Instant::now());
        (metrics.kernel, metrics.socket_buffer_bytes) = (None, Some(4_000));
        metrics.process = None;
        assert_eq!(
            metrics.status_line(2, SECOND, Overload::Pause),
            "2 connections | 2.0/s accepts | own ? | kernel 4,000 B in socket buffers | pausing: memory"
        );
    }

    #[test]
    fn totals_add_up() {
        let mut stats = Stats::default();
        (stats.accepted, stats.opened, stats.closed) = (3, 3, 1);
        stats.accept_errors.insert(24, 2);
        let refused_by = Counts::from([("memory", 1)]);
        let one = Totals { stats, refused_by, closed_by: Counts::new() };
        let mut all = one.clone();
        all.closed_by.insert("idle", 1);
        all.add(&one);
        assert_eq!((all.stats.accepted, all.stats.open(), all.stats.accept_errors[&24]), (6, 4, 4));
        assert_eq!((all.refused_by["memory"], all.closed_by["idle"]), (2, 1));
    }
}
