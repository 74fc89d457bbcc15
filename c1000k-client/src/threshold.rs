//! Conditions under which a run fails: `echo.p99>50ms`, `lost>0`.

use std::time::Duration;

use c1000k_host::quantity::{parse_count, parse_duration};
use c1000k_record::{ClientRecord, Threshold, Workload};

type Operator = fn(f64, f64) -> bool;
type OfRun = fn(&ClientRecord) -> Option<u64>;
type OfWorkload = fn(&Workload) -> Option<u64>;

/// Longest first, so that `>=` is not taken for `>`.
const OPERATORS: &[(&str, Operator)] = &[
    (">=", |value, bound| value >= bound),
    ("<=", |value, bound| value <= bound),
    (">", |value, bound| value > bound),
    ("<", |value, bound| value < bound),
];

/// Figures with a dot in their names are latencies, in microseconds; the others are counts.
const RUN_FIGURES: &[(&str, OfRun)] = &[
    ("established", |run| Some(run.established)),
    ("verified", |run| run.verified),
    ("failed", |run| Some(run.failed)),
    ("lost", |run| Some(run.lost)),
    ("retried", |run| Some(run.retried)),
    ("connect.p50", |run| run.connect_latency_us.p50),
    ("connect.p90", |run| run.connect_latency_us.p90),
    ("connect.p99", |run| run.connect_latency_us.p99),
    ("connect.p999", |run| run.connect_latency_us.p999),
    ("connect.p9999", |run| run.connect_latency_us.p9999),
    ("connect.max", |run| run.connect_latency_us.max),
];

const WORKLOAD_FIGURES: &[(&str, OfWorkload)] = &[
    ("sent", |workload| Some(workload.sent)),
    ("answered", |workload| Some(workload.answered)),
    ("mismatched", |workload| Some(workload.mismatched)),
    ("unanswered", |workload| Some(workload.unanswered)),
    ("late", |workload| Some(workload.late)),
    ("echo.p50", |workload| workload.latency_us.p50),
    ("echo.p90", |workload| workload.latency_us.p90),
    ("echo.p99", |workload| workload.latency_us.p99),
    ("echo.p999", |workload| workload.latency_us.p999),
    ("echo.p9999", |workload| workload.latency_us.p9999),
    ("echo.max", |workload| workload.latency_us.max),
];

/// One condition on the figures of a completed run.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    pub(crate) expression: String,
    figure: Figure,
    holds: Operator,
    bound: f64,
}

/// Conditions with the same text are equal.
impl PartialEq for Condition {
    fn eq(&self, other: &Self) -> bool {
        self.expression == other.expression
    }
}

#[derive(Clone, Copy, Debug)]
enum Figure {
    OfRun(OfRun),
    OfWorkload(OfWorkload),
}

impl Condition {
    /// Reads a figure's name, an operator, and a bound.
    ///
    /// # Errors
    /// A sentence with the mistake and the accepted form.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let split = |&(sign, holds): &(&str, Operator)| {
            text.split_once(sign).map(|(name, bound)| (name.trim(), holds, bound.trim()))
        };
        let (name, holds, bound) = OPERATORS.iter().find_map(split).ok_or_else(|| {
            format!("{text:?} has no operator; write it as 'echo.p99>50ms' or 'lost>0'")
        })?;
        let figure = Figure::named(name)
            .ok_or_else(|| format!("{name:?} is not a figure of a run; figures are {}", names()))?;
        let bound = if name.contains('.') {
            microseconds(parse_duration(bound)?)
        } else {
            parse_count(bound)? as f64
        };
        Ok(Self { expression: text.to_owned(), figure, holds, bound })
    }

    /// Whether it is about the messages during the hold.
    pub(crate) fn needs_workload(&self) -> bool {
        matches!(self.figure, Figure::OfWorkload(_))
    }

    /// Evaluates the condition. A figure that was not measured does not pass.
    pub(crate) fn judge(&self, record: &ClientRecord) -> Threshold {
        let value = match self.figure {
            Figure::OfRun(figure) => figure(record),
            Figure::OfWorkload(figure) => record.workload.as_ref().and_then(figure),
        };
        let value = value.map(|value| value as f64);
        let passed = value.is_some_and(|value| !(self.holds)(value, self.bound));
        Threshold { expression: self.expression.clone(), value, passed }
    }
}

impl Figure {
    fn named(name: &str) -> Option<Self> {
        let of_run = RUN_FIGURES.iter().find(|(known, _)| *known == name);
        let of_workload = WORKLOAD_FIGURES.iter().find(|(known, _)| *known == name);
        of_run
            .map(|&(_, figure)| Self::OfRun(figure))
            .or(of_workload.map(|&(_, figure)| Self::OfWorkload(figure)))
    }
}

fn names() -> String {
    let of_run = RUN_FIGURES.iter().map(|&(name, _)| name);
    of_run.chain(WORKLOAD_FIGURES.iter().map(|&(name, _)| name)).collect::<Vec<_>>().join(", ")
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use c1000k_record::LatencyUs;

    use super::*;

    fn record() -> ClientRecord {
        let text = r#"{"schema": "c1000k.client/1", "target": 9, "attempted": 9, "established": 9,
            "verified": null, "failed": 0, "failures": {}, "lost": 3, "limit": null,
            "ramp_seconds": 1, "connects_per_second": 9, "connect_latency_us": {},
            "verdict": "reached"}"#;
        serde_json::from_str(text).unwrap()
    }

    fn passes(text: &str, record: &ClientRecord) -> bool {
        Condition::parse(text).unwrap().judge(record).passed
    }

    #[test]
    fn a_count_is_compared_as_it_says() {
        for (text, passed) in [
            ("lost>2", false),
            ("lost>3", true),
            ("lost>=3", false),
            ("lost < 3", true),
            ("lost<=3", false),
            ("established<1M", false),
        ] {
            assert_eq!(passes(text, &record()), passed, "{text}");
        }
    }

    #[test]
    fn a_latency_is_compared_in_any_unit() {
        let latency_us = LatencyUs { p99: Some(50_001), ..LatencyUs::default() };
        let record = ClientRecord { connect_latency_us: latency_us, ..record() };
        assert!(!passes("connect.p99>50ms", &record));
        assert!(passes("connect.p99>0.051s", &record) && passes("connect.p99>51000us", &record));
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        for text in ["verified<1", "echo.p99>1s", "late>0", "connect.max>1s"] {
            let threshold = Condition::parse(text).unwrap().judge(&record());
            assert_eq!((threshold.value, threshold.passed), (None, false), "{text}");
        }
        assert!(Condition::parse("late>0").unwrap().needs_workload());
        assert!(!Condition::parse("lost>0").unwrap().needs_workload());
    }

    #[test]
    fn a_wrong_condition_is_explained() {
        for (text, part) in [
            ("lost", "no operator"),
            ("lots>0", "figures are established, verified"),
            ("echo.p98>1s", "is not a figure"),
            ("echo.p99>50", "500ms, 10s"),
            ("lost>1s", "a count is written"),
            (">", "is not a figure"),
        ] {
            let wrong = Condition::parse(text).unwrap_err();
            assert!(wrong.contains(part), "{text}: {wrong}");
        }
    }
}
