//! Latencies in the two formats of HdrHistogram's tools, in milliseconds.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use hdrhistogram::serialization::{Deserializer, V2DeflateSerializer};

use crate::stats::RunStats;

const US_PER_MS: f64 = 1000.0;

/// Lines of a percentile distribution for each halving of the distance to 100%.
const LINES_PER_HALVING: u32 = 5;

/// The file of `--hdr`, open since the start of the run.
#[derive(Debug)]
pub(crate) struct HdrFile {
    path: PathBuf,
    file: File,
}

/// The latencies of one second of the hold.
#[derive(Debug)]
pub(crate) struct Interval {
    /// Since the first message.
    pub(crate) start: Duration,
    pub(crate) length: Duration,
    /// HdrHistogram V2.
    pub(crate) bytes: Vec<u8>,
}

impl HdrFile {
    /// # Errors
    /// One line with the reason why the file can't be created.
    pub(crate) fn create(path: &Path) -> Result<Self, String> {
        // An earlier run's latencies stay until this one has some.
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|error| refusal(path, &error))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes the latencies of the messages of the hold or, without messages, of the connects.
    ///
    /// # Errors
    /// One line with the reason why the file could not be written.
    pub(crate) fn write(self, stats: &RunStats, started_at: SystemTime) -> Result<(), String> {
        if self.file.metadata().is_ok_and(|found| found.is_file()) {
            self.file.set_len(0).map_err(|error| refusal(&self.path, &error))?;
        }
        let mut out = BufWriter::new(self.file);
        let is_distribution = self.path.extension().is_some_and(|ending| ending == "hgrm");
        let written = if is_distribution {
            let messages = stats.workload.latency.histogram();
            let connects = stats.connect_latency.histogram();
            write_distribution(&mut out, if messages.is_empty() { connects } else { messages })
        } else {
            write_log(&mut out, stats, started_at)
        };
        written.and_then(|()| out.flush()).map_err(|error| refusal(&self.path, &error))
    }
}

fn refusal(path: &Path, error: &io::Error) -> String {
    format!("--hdr {} can't be written: {error}; use another file", path.display())
}

/// Connects as one interval, then the messages second by second.
fn write_log(out: &mut impl Write, stats: &RunStats, started_at: SystemTime) -> io::Result<()> {
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("latencies in microseconds; Interval_Max in milliseconds")
        .with_start_time(started_at)
        .with_base_time(started_at)
        .with_max_value_divisor(US_PER_MS)
        .begin_log_with(out, &mut serializer)?;
    let ramp = stats.ramp;
    log.write_histogram(
        stats.connect_latency.histogram(),
        Duration::ZERO,
        ramp,
        Tag::new("connect"),
    )
    .map_err(io::Error::other)?;
    let hold_began = stats.workload.began;
    for interval in &stats.workload.intervals {
        let histogram: Histogram<u64> =
            Deserializer::new().deserialize(&mut &interval.bytes[..]).map_err(io::Error::other)?;
        let start = hold_began + interval.start;
        log.write_histogram(&histogram, start, interval.length, Tag::new("echo"))
            .map_err(io::Error::other)?;
    }
    Ok(())
}

/// The text that HdrHistogram's plotters read: value, percentile, count, and 1/(1 - percentile).
fn write_distribution(out: &mut impl Write, latencies: &Histogram<u64>) -> io::Result<()> {
    writeln!(
        out,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    let mut count = 0;
    for value in latencies.iter_quantiles(LINES_PER_HALVING) {
        count += value.count_since_last_iteration();
        let share = value.quantile_iterated_to();
        write!(
            out,
            "{:12.3} {share:14.12} {count:10}",
            value.value_iterated_to() as f64 / US_PER_MS
        )?;
        if share < 1.0 {
            write!(out, " {:14.2}", 1.0 / (1.0 - share))?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n\
         #[Max     = {:12.3}, Total count    = {:12}]\n\
         #[Buckets = {:12}, SubBuckets     = {:12}]",
        latencies.mean() / US_PER_MS,
        latencies.stdev() / US_PER_MS,
        latencies.max() as f64 / US_PER_MS,
        latencies.len(),
        latencies.buckets(),
        latencies.distinct_values() / usize::from(latencies.buckets()).max(1),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;

    fn stats() -> RunStats {
        let mut stats = RunStats::new(Instant::now(), true).unwrap();
        stats.connect_latency.record(Duration::from_millis(7));
        stats.workload.began = Duration::from_secs(30);
        stats.workload.keeps_intervals = true;
        for second in 1..=3 {
            for ms in 1..=100 {
                stats.workload.interval.record(Duration::from_millis(ms));
            }
            stats.workload.end_interval(Duration::from_secs(second));
        }
        stats
    }

    fn written(name: &str, stats: &RunStats) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        HdrFile::create(&path).unwrap().write(stats, SystemTime::now()).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_log_has_the_connects_and_each_second_of_messages() {
        let stats = stats();
        let text = written("run.hlog", &stats);
        let intervals: Vec<_> = IntervalLogIterator::new(text.as_bytes())
            .filter_map(|entry| match entry.unwrap() {
                LogEntry::Interval(interval) => Some(interval),
                _ => None,
            })
            .collect();
        let tags: Vec<&str> =
            intervals.iter().map(|interval| interval.tag().unwrap().as_str()).collect();
        assert_eq!(tags, ["connect", "echo", "echo", "echo"]);
        assert_eq!(intervals[1].start_timestamp(), Duration::from_secs(30));
        assert_eq!(intervals[3].start_timestamp(), Duration::from_secs(32));
        assert!((intervals[3].max() - 100.0).abs() < 0.1, "{}", intervals[3].max());
    }

    #[test]
    fn a_distribution_ends_with_all_of_them_and_the_longest() {
        let text = written("run.hgrm", &stats());
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]);
        let last = lines.iter().rfind(|line| line.len() == 3 && !line[0].starts_with('#')).unwrap();
        assert_eq!((last[1], last[2]), ("1.000000000000", "300"));
        assert!(last[0].parse::<f64>().unwrap() >= 100.0, "{last:?}");
    }

    #[test]
    fn a_file_that_cannot_be_created_is_one_line() {
        let line = HdrFile::create(Path::new("/nowhere/run.hgrm")).unwrap_err();
        assert!(line.contains("/nowhere/run.hgrm") && line.contains("another file"), "{line}");
    }
}
