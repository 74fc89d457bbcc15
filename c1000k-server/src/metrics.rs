//! What the server spends over time: status lines, the series of the record, the figures at the peak.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use c1000k_host::format;
use c1000k_host::usage::{KernelCost, KernelMeter, NetCounters, ProcessUsage, SocketUsage};
use c1000k_record::ServerPoint;
use c1000k_record::series::{self, Series};
use reactor::Stats;

/// So often the peak is looked for, though status lines may be rarer.
const SAMPLE_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// A sample reads files of the kernel, some of them long: it takes no more than one part of so many of the time.
const SAMPLE_SHARE_MAX: u32 = 10;

/// How long to wait for the next sample, which takes so long. The first ones of a crowd of connections come closer.
pub(crate) fn sample_interval(
    interval: Duration,
    crowd_age: Option<Duration>,
    sample_takes: Duration,
) -> Duration {
    let longest = interval.min(SAMPLE_INTERVAL_MAX);
    let step = crowd_age.map_or(longest, series::step);
    step.max(sample_takes * SAMPLE_SHARE_MAX).min(longest)
}

#[derive(Debug)]
pub(crate) struct Sampler {
    started: Instant,
    kernel: KernelMeter,
    counters_at_start: Option<NetCounters>,
    rss_at_start_bytes: Option<u64>,
    rss_max_bytes: Option<u64>,
    peak: Option<Peak>,
    series: Series<ServerPoint>,
    sampled: Instant,
    last_line: Line,
}

/// What the last status line said, and when.
#[derive(Debug)]
struct Line {
    at: Instant,
    accepted: u64,
}

/// What was measured when the most connections were open.
#[derive(Clone, Debug)]
pub(crate) struct Peak {
    pub(crate) open: u64,
    pub(crate) rss_bytes: Option<u64>,
    pub(crate) kernel: Option<KernelCost>,
}

/// What one sample has seen.
#[derive(Debug)]
struct Seen {
    rss_bytes: Option<u64>,
    kernel: Option<KernelCost>,
    buffers: Option<u64>,
}

impl Sampler {
    /// Takes the baseline: everything that is there before the first connection.
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        let mut sampler = Self {
            started: now,
            kernel: KernelMeter::start(),
            counters_at_start: NetCounters::read(),
            rss_at_start_bytes: None,
            rss_max_bytes: None,
            peak: None,
            series: Series::new(),
            sampled: now,
            last_line: Line { at: now, accepted: 0 },
        };
        sampler.rss_at_start_bytes = sampler.look(0, now).rss_bytes;
        sampler
    }

    /// Measures, and prints a status line when one is due.
    pub(crate) fn sample(&mut self, stats: &Stats, now: Instant, interval: Duration, state: &str) {
        let Seen { rss_bytes, kernel, buffers } = self.look(stats.open(), now);
        // By the clock of the samples a line comes half of their distance early or late.
        let half = now.duration_since(std::mem::replace(&mut self.sampled, now)) / 2;
        if now.duration_since(self.last_line.at) + half >= interval {
            self.tell(stats, now, rss_bytes, kernel.as_ref(), buffers, state);
        }
        if stats.open() > 0 && self.peak.as_ref().is_none_or(|peak| stats.open() >= peak.open) {
            self.peak = Some(Peak { open: stats.open(), rss_bytes, kernel });
        }
    }

    /// Measures, for the series.
    fn look(&mut self, open: u64, now: Instant) -> Seen {
        let rss_bytes = ProcessUsage::read().map(|usage| usage.rss_bytes);
        self.rss_max_bytes = self.rss_max_bytes.max(rss_bytes);
        let kernel = self.kernel.cost();
        let buffers = SocketUsage::read().map(|usage| usage.buffer_bytes);
        self.series.push(ServerPoint {
            seconds: now.duration_since(self.started).as_secs_f64(),
            open,
            rss_bytes,
            kernel_socket_bytes: kernel.as_ref().map_or(buffers, |cost| Some(bytes_of(cost))),
        });
        Seen { rss_bytes, kernel, buffers }
    }

    fn tell(
        &mut self,
        stats: &Stats,
        now: Instant,
        rss_bytes: Option<u64>,
        kernel: Option<&KernelCost>,
        buffers: Option<u64>,
        state: &str,
    ) {
        let seconds = now.duration_since(self.last_line.at).as_secs_f64();
        let accepts = stats.accepted - self.last_line.accepted;
        let per_second = c1000k_record::per_second(accepts, seconds);
        self.last_line = Line { at: now, accepted: stats.accepted };
        let own = rss_bytes.map_or_else(|| "?".to_owned(), format::bytes);
        // The kernel counts the sockets of all programs: without one of its own, the server has nothing to report.
        let of_kernel = match (kernel, buffers) {
            _ if stats.open() == 0 => String::new(),
            (Some(cost), _) => {
                let each = format::bytes(cost.slab_bytes().max(0.0) as u64);
                format!(" | kernel {} ({each} a socket)", format::bytes(bytes_of(cost)))
            }
            (None, Some(buffers)) => {
                format!(" | kernel {} in socket buffers", format::bytes(buffers))
            }
            (None, None) => " | kernel ?".to_owned(),
        };
        log::info!(
            "{} | {} accepts | own {own}{of_kernel}{state}",
            format::counted(stats.open(), "connection"),
            format::rate(per_second),
        );
    }

    pub(crate) fn uptime_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    pub(crate) fn rss_at_start_bytes(&self) -> Option<u64> {
        self.rss_at_start_bytes
    }

    /// The most that was resident at any sample, which the kernel's own record of it may miss.
    pub(crate) fn rss_max_bytes(&self) -> Option<u64> {
        self.rss_max_bytes
    }

    pub(crate) fn peak(&self) -> Option<&Peak> {
        self.peak.as_ref()
    }

    pub(crate) fn slabs_shown_as(&self) -> BTreeMap<String, String> {
        self.kernel.shown_as()
    }

    /// What the kernel's own counters have grown by.
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
    /// What the process has grown by since `rss_at_start_bytes`, per connection.
    pub(crate) fn user_bytes_per_connection(&self, rss_at_start_bytes: Option<u64>) -> Option<f64> {
        let grown = self.rss_bytes?.saturating_sub(rss_at_start_bytes?);
        Some(grown as f64 / self.open as f64)
    }

    /// What each slab cache has grown by in all.
    pub(crate) fn bytes_by_slab(&self) -> Option<BTreeMap<String, u64>> {
        let cost = self.kernel.as_ref()?;
        let in_all = |per_socket: f64| (per_socket * cost.sockets as f64).max(0.0) as u64;
        let slabs = cost.slabs.iter().map(|&(name, bytes)| (name.to_owned(), in_all(bytes)));
        let rest = [("other".to_owned(), in_all(cost.other_slabs))];
        Some(slabs.chain(rest).filter(|&(_, bytes)| bytes > 0).collect())
    }
}

/// What the sockets added since the start cost the kernel in all, queued data aside.
fn bytes_of(cost: &KernelCost) -> u64 {
    (cost.slab_bytes() * cost.sockets as f64).max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_crowd_is_looked_at_closely_at_first_and_never_for_most_of_the_time() {
        let ms = Duration::from_millis;
        assert_eq!(sample_interval(10 * SECOND, None, ms(1)), SECOND);
        assert_eq!(sample_interval(ms(200), None, ms(1)), ms(200));
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), ms(1)), ms(20));
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), ms(5)), ms(50));
        assert_eq!(sample_interval(10 * SECOND, Some(100 * SECOND), ms(1)), SECOND);
        assert_eq!(sample_interval(10 * SECOND, Some(ms(100)), SECOND), SECOND);
    }

    #[test]
    fn status_lines_keep_their_distance_however_close_the_samples_are() {
        for step_ms in [20, 130, 999, 1_001] {
            let mut sampler = Sampler::start();
            let (mut lines, mut told_at) = (0, sampler.last_line.at);
            for sample in 1..=10_000 / step_ms {
                let now = sampler.started + Duration::from_millis(sample * step_ms);
                sampler.sample(&Stats::default(), now, SECOND, "");
                lines += u64::from(sampler.last_line.at != told_at);
                told_at = sampler.last_line.at;
            }
            assert!((9..=10).contains(&lines), "{step_ms}: {lines}");
        }
    }
}
