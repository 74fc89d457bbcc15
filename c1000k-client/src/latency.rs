//! Latencies, kept in a histogram of bounded size.

use std::time::Duration;

use c1000k_record::{LatencyUs, histogram};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};

/// A day in microseconds.
const MAX_US: u64 = 24 * 3_600 * 1_000_000;

/// Three digits of each latency, from a microsecond to a day.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    /// Always `Some` with these bounds.
    pub(crate) fn new() -> Option<Self> {
        Histogram::new_with_bounds(1, MAX_US, 3).ok().map(Self)
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        self.0.saturating_record(latency.as_micros() as u64);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        // Both have the same bounds, so each value fits.
        let _ = self.0.add(&other.0);
    }

    pub(crate) fn clear(&mut self) {
        self.0.reset();
    }

    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.0
    }

    pub(crate) fn percentiles(&self) -> LatencyUs {
        if self.0.is_empty() {
            return LatencyUs::default();
        }
        let at = |quantile| Some(self.0.value_at_quantile(quantile));
        LatencyUs {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: Some(self.0.max()),
        }
    }

    /// HdrHistogram V2: a few hundred bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Writing to memory can't fail with these bounds.
        let _ = V2Serializer::new().serialize(&self.0, &mut bytes);
        bytes
    }

    /// The encoded histogram for a record; `None` if it is empty.
    pub(crate) fn encoded(&self) -> Option<String> {
        histogram::encode(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::Deserializer;

    use super::*;

    #[test]
    fn what_was_recorded_is_read_back_from_the_text() {
        let mut latencies = Latencies::new().unwrap();
        assert_eq!((latencies.percentiles(), latencies.encoded()), (LatencyUs::default(), None));
        for us in 1..=10_000 {
            latencies.record(Duration::from_micros(us));
        }
        assert_eq!(histogram::decode(&latencies.encoded().unwrap()).as_ref(), Some(&latencies.0));
        let bytes = latencies.to_bytes();
        let read: Histogram<u64> = Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
        assert_eq!(read, latencies.0);
        let LatencyUs { p50, p9999, max, .. } = latencies.percentiles();
        assert!(p50.unwrap().abs_diff(5_000) <= 5, "{p50:?}");
        assert!(p9999 > p50 && p9999 <= max && max.unwrap().abs_diff(10_000) <= 10);
    }

    #[test]
    fn two_histograms_make_one() {
        let [mut all, mut part] = [(); 2].map(|()| Latencies::new().unwrap());
        part.record(Duration::from_millis(1));
        part.record(Duration::from_secs(100 * 3_600));
        all.add(&part);
        all.add(&part);
        assert_eq!(all.histogram().len(), 4);
        part.clear();
        assert!(part.encoded().is_none());
    }
}
