//! A snapshot of a run in the exposition format of Prometheus.

use c1000k_record::LatencyUs;
use c1000k_record::endpoint::Figures;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use crate::stats::RunStats;

/// The prefix of all metric names.
pub(crate) const PREFIX: &str = "c1000k_client";

/// The exported figures of a run.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) target: u64,
    pub(crate) held: u64,
    pub(crate) attempted: u64,
    pub(crate) failed: u64,
    pub(crate) lost: u64,
    pub(crate) retried: u64,
    /// Failed attempts by errno.
    pub(crate) failures: Vec<(String, u64)>,
    pub(crate) verified: u64,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) reopened: u64,
    /// Of all connects.
    pub(crate) connect: LatencyUs,
    /// Of the messages of the last second.
    pub(crate) echo: LatencyUs,
}

impl Snapshot {
    /// The present figures.
    pub(crate) fn of(stats: &RunStats, goal: u32) -> Self {
        let failures = stats.failures.by_name().iter();
        Self {
            target: u64::from(goal),
            held: stats.held,
            attempted: stats.attempted,
            failed: stats.failed,
            lost: stats.lost,
            retried: stats.retried,
            failures: failures.map(|(name, &count)| (name.clone(), count)).collect(),
            verified: stats.verified().unwrap_or(0),
            sent: stats.workload.sent,
            answered: stats.workload.answered,
            reopened: stats.churn.reopened + stats.storm.back,
            connect: stats.connect_latency.percentiles(),
            echo: stats.workload.interval.percentiles(),
        }
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut figures = Figures(encoder);
        figures.gauge("target", "Requested connections", Some(self.target as f64))?;
        figures.gauge("connections", "Connections held", Some(self.held as f64))?;
        figures.counter("attempted", "Connects started", self.attempted)?;
        figures.counter("retried", "Connects tried again", self.retried)?;
        figures.counter("failed", "Connections that failed permanently", self.failed)?;
        figures.counter("lost", "Connections that were held and lost", self.lost)?;
        let failures = self.failures.iter().map(|(name, count)| (name.as_str(), *count));
        figures.counters("failed_attempts", "Failed attempts", "errno", failures)?;
        figures.gauge("verified", "Verified in the present pass", Some(self.verified as f64))?;
        figures.counter("messages_sent", "Messages sent during the hold", self.sent)?;
        figures.counter("messages_answered", "Messages answered", self.answered)?;
        figures.counter("reopened", "Connections closed and reopened", self.reopened)?;
        let quantiles = |latency: LatencyUs| {
            [
                ("0.5", latency.p50),
                ("0.9", latency.p90),
                ("0.99", latency.p99),
                ("0.999", latency.p999),
                ("1", latency.max),
            ]
            .into_iter()
            .filter_map(|(name, us)| Some((name, us? as f64 / 1e6)))
        };
        let help = "Time to connect, of all connects of the ramp";
        figures.gauges("connect_seconds", help, "quantile", quantiles(self.connect))?;
        let help = "Time to an answer, of the messages of the last second";
        figures.gauges("echo_seconds", help, "quantile", quantiles(self.echo))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use prometheus_client::encoding::text;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn the_dashboard_shows_metrics_that_exist() {
        let stats = RunStats::new(Instant::now(), true).unwrap();
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(Snapshot::of(&stats, 1)));
        let mut page = String::new();
        text::encode(&mut page, &registry).unwrap();
        let dashboard = include_str!("../../packaging/grafana.json");
        let mut shown = 0;
        for (at, _) in dashboard.match_indices(PREFIX) {
            let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let name = dashboard[at..].split(|c| !is_of_name(c)).next().unwrap_or_default();
            let name = name.trim_end_matches("_total");
            assert!(page.contains(&format!("# HELP {name} ")), "{name} is not in\n{page}");
            shown += 1;
        }
        assert!(shown > 5, "the dashboard shows {shown} metrics of the client");
    }
}
