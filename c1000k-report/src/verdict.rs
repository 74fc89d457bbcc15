//! The verdict on a run, in a few lines of text.

use std::fmt::Write;

use c1000k_host::format;
use c1000k_record::Verdict;

use crate::bottleneck::{self, Finding};
use crate::checks::{Check, CheckOutcome};
use crate::escape::visible;
use crate::run::{Apart, Run};

/// The prefix of the line with the counts of checks.
const CHECKS: &str = "Checks: ";

/// The verdict in a few lines.
#[must_use]
pub fn text(run: &Run, checks: &[Check]) -> String {
    let mut text = headline(run);
    for name in run.missing() {
        let _ = write!(text, "\nMissing: {name}.json");
    }
    if let Some(line) = missing_snapshots(run, checks) {
        let _ = write!(text, "\nMissing: {line}");
    }
    for (name, limit, detail) in run.limits() {
        let _ = write!(text, "\nCapped by {limit} ({})", visible(name));
        if let Some(detail) = detail {
            let _ = write!(text, ": {}", visible(detail));
        }
    }
    let is_said = |evidence: &str| run.limits().any(|(_, _, detail)| detail == Some(evidence));
    if let Some(Finding { bottleneck, evidence }) = bottleneck::find(run)
        && !is_said(&evidence)
    {
        let _ = write!(text, "\nLimited by {bottleneck}: {}", visible(&evidence));
    }
    let count = |outcome| checks.iter().filter(|check| check.outcome == outcome).count();
    let _ = write!(
        text,
        "\n{CHECKS}{} agree, {} disagree, {} unknown, {} not judged",
        count(CheckOutcome::Agrees),
        count(CheckOutcome::Disagrees),
        count(CheckOutcome::Unknown),
        count(CheckOutcome::NotJudged)
    );
    for check in checks {
        let name = visible(&check.name);
        let Check { expected, found, note, .. } = check;
        let _ = match check.outcome {
            CheckOutcome::Disagrees => {
                write!(text, "\nDisagrees: {name}: expected {expected}, found {found}")
            }
            CheckOutcome::NotJudged => {
                write!(text, "\nNot judged: {name}: expected {expected}, found {found}; {note}")
            }
            CheckOutcome::Agrees | CheckOutcome::Unknown => Ok(()),
        };
    }
    text
}

/// The missing snapshots, and the checks that were not made because of them; `None` if none is missing.
#[must_use]
pub fn missing_snapshots(run: &Run, checks: &[Check]) -> Option<String> {
    let missing = run.missing_snapshots();
    let unmade = checks.iter().filter(|check| check.lacks_snapshot);
    let unmade: Vec<&str> = unmade.map(|check| check.name.as_str()).collect();
    (!missing.is_empty()).then(|| match unmade.as_slice() {
        [] => missing.join(", "),
        _ => {
            format!("{}, so these checks were not made: {}", missing.join(", "), unmade.join(", "))
        }
    })
}

/// The number of checks that were made: those whose outcome is known.
#[must_use]
pub fn checks_made(checks: &[Check]) -> usize {
    checks.iter().filter(|check| check.outcome != CheckOutcome::Unknown).count()
}

/// The same number in a page that this program wrote earlier; `None` if there were no snapshots then either.
#[must_use]
pub fn checks_made_with_snapshots(page: &str) -> Option<usize> {
    if page.lines().any(|line| line.starts_with("Missing: snapshots,")) {
        return None;
    }
    let counts = page.lines().find_map(|line| line.strip_prefix(CHECKS))?;
    // Pages of earlier versions have "not seen".
    let is_made = |count: &&str| !count.ends_with("unknown") && !count.ends_with("not seen");
    let made = counts.split(", ").filter(is_made);
    made.map(|count| count.split(' ').next()?.parse::<usize>().ok())
        .try_fold(0_usize, |sum, count| sum.checked_add(count?))
}

pub(crate) fn headline(run: &Run) -> String {
    let word = match run.verdict() {
        Some(Verdict::Held) => "Held, not verified".to_owned(),
        Some(verdict) => capitalized(&verdict.to_string()),
        None => match run.apart() {
            _ if run.is_contradicted() => "Contradicted: the records do not agree",
            _ if !run.has_all_clients() => "Unknown, a record is missing",
            Some(Apart::Times) => "Not held at once",
            _ => "Not known to be held at once",
        }
        .to_owned(),
    };
    if let Some(apart) = run.apart() {
        let each = run.clients.iter().map(|(name, client)| {
            let (held, target) = (format::count(client.established), format::count(client.target));
            format!("{} held {held} of {target}", visible(name))
        });
        return format!("{word}: {apart}: {}.", each.collect::<Vec<_>>().join(", "));
    }
    let (Some(target), Some(held)) = (run.sum(|client| client.target), run.connections()) else {
        let held = run.connections().map_or_else(|| "none".to_owned(), format::count);
        return format!("{word}: at most {held} connections were held at once.");
    };
    let lost = run.sum(|client| client.lost).unwrap_or(0);
    let failed = run.sum(|client| client.failed).unwrap_or(0);
    format!(
        "{word}: {} of {} connections held at once, {}, {} failed, {} lost.",
        format::count(held),
        format::count(target),
        proven(run),
        format::count(failed),
        format::count(lost)
    )
}

fn capitalized(word: &str) -> String {
    let mut rest = word.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}

fn proven(run: &Run) -> String {
    let skipped = format::count(run.unverified());
    match (run.verified().map(format::count), run.unverified()) {
        (None, _) => "none verified, as asked".to_owned(),
        (Some(count), 0) => format!("{count} verified"),
        (Some(count), _) => format!("{count} verified, {skipped} not, as asked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_checks_of_known_outcome_count_in_pages_of_all_versions() {
        for unknown in ["unknown", "not seen"] {
            let page = format!(
                "# 1 connection\n\nChecks: 13 agree, 1 disagree, 4 {unknown}, 2 not judged"
            );
            assert_eq!(checks_made_with_snapshots(&page), Some(16));
        }
    }
}
