//! The metrics of a sample in the format of Prometheus.

use c1000k_host::errno_name;
use c1000k_record::endpoint::Figures;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use crate::metrics::Metrics;

/// The prefix of all names.
pub(crate) const PREFIX: &str = "c1000k_server";

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut figures = Figures(encoder);
        let size = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
        figures.gauge("connections", "Open connections", size(Some(self.connections)))?;
        figures.gauge(
            "connections_peak",
            "Maximum of open connections",
            size(Some(self.connections_max)),
        )?;
        figures.counter("accepted", "Connections admitted", self.accepted)?;
        figures.counter("closed", "Connections that have ended", self.closed)?;
        let each = |counts: &crate::counts::Counts| counts.clone().into_iter();
        figures.counters(
            "cut_off",
            "Connections that ended before both sides had finished",
            "reason",
            each(&self.closed_by),
        )?;
        figures.counters("refused", "Connections refused", "reason", each(&self.refused_by))?;
        let errors: Vec<(String, u64)> =
            self.accept_errors.iter().map(|(&errno, &count)| (errno_name(errno), count)).collect();
        let errors = errors.iter().map(|(name, count)| (name.as_str(), *count));
        figures.counters("accept_errors", "Failed accepts", "errno", errors)?;
        figures.counter("accept_pauses", "Pauses of accepting", self.accept_pauses)?;
        figures.counter(
            "stale_events",
            "Events for connections that had ended",
            self.stale_events,
        )?;
        figures.counter("wakeups", "Returns from waiting for events", self.wakeups)?;
        figures.counter("received_bytes", "Payload received", self.bytes_in)?;
        figures.counter("sent_bytes", "Payload sent", self.bytes_out)?;
        let is_short = if self.shortage.is_some() { 1.0 } else { 0.0 };
        figures.gauge("overloaded", "1 while no connection is admitted", Some(is_short))?;
        figures.gauge("resident_bytes", "Memory of the process", size(self.rss_bytes()))?;
        let each = self.kernel.as_ref().map(|cost| cost.slab_bytes());
        figures.gauge("kernel_bytes_per_socket", "Slab memory of a socket", each)?;
        let buffers = size(self.socket_buffer_bytes);
        figures.gauge(
            "socket_buffer_bytes",
            "Data queued in all sockets of the system",
            buffers,
        )?;
        figures.gauge("uptime_seconds", "Time since the start", Some(self.uptime.as_secs_f64()))
    }
}
