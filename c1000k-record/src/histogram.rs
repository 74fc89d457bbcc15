//! Histograms in a record: HdrHistogram V2, compressed, in base64, as in HdrHistogram logs.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};

/// Those in a record have a few kilobytes.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// The histogram as text; `None` if it is empty.
#[must_use]
pub fn encode(histogram: &Histogram<u64>) -> Option<String> {
    let mut bytes = Vec::new();
    let written = V2DeflateSerializer::new().serialize(histogram, &mut bytes);
    (!histogram.is_empty() && written.is_ok()).then(|| STANDARD.encode(bytes))
}

/// The histogram from its text; `None` if the text is invalid.
#[must_use]
pub fn decode(text: &str) -> Option<Histogram<u64>> {
    if text.len() > TEXT_BYTES_MAX {
        return None;
    }
    let bytes = STANDARD.decode(text).ok()?;
    Deserializer::new().deserialize(&mut &bytes[..]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_read_back() {
        let mut histogram = Histogram::new_with_bounds(1, 3_600_000_000, 3).unwrap();
        assert_eq!(encode(&histogram), None);
        (1..=10_000).for_each(|value| histogram.record(value * 7).unwrap());
        assert_eq!(decode(&encode(&histogram).unwrap()), Some(histogram));
    }

    #[test]
    fn what_is_no_histogram_is_none() {
        let mut histogram = Histogram::new_with_bounds(1, 1_000, 3).unwrap();
        histogram.record(7).unwrap();
        let text = encode(&histogram).unwrap();
        for length in 0..text.len() {
            let _ = decode(&text[..length]);
        }
        for wrong in ["", "x", "AAAA", &"A".repeat(2_000_000)] {
            assert!(decode(wrong).is_none());
        }
    }
}
