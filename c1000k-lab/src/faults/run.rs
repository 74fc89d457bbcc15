//! Runs rows, and records the outcome of each.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use c1000k_host::format;
use procfs::Current;
use serde_json::Value;

use super::report::{Check, Report, State, write_table};
use super::rows::Row;
use crate::bystander::Latencies;
use crate::faults::Skipped;
use crate::load::Load;
use crate::record::ServerRecord;
use crate::server::{Lab, Server, Setup};
use crate::wait::{self, Deadline, wait_until};

const ROW_TIMEOUT: Duration = Duration::from_secs(240);

/// The bystander's latency, without the time that the machine adds.
const LATENCY_MS_MAX: f64 = 100.0;

/// Lines of the server's log in a record.
const LOG_LINES_MAX: usize = 20;

/// A running row, and its record so far.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) lab: &'a Lab,
    report: Report,
}

impl Run<'_> {
    /// Records a figure; it replaces one of the same name.
    pub(crate) fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.report.figures.insert(name.to_owned(), value.into());
    }

    /// Records each field of an object.
    pub(crate) fn figures(&mut self, figures: Value) {
        if let Value::Object(figures) = figures {
            self.report.figures.extend(figures);
        }
    }

    /// Records a time in seconds, to hundredths.
    pub(crate) fn seconds(&mut self, name: &str, duration: Duration) {
        self.figure(name, (duration.as_secs_f64() * 100.0).round() / 100.0);
    }

    /// Records counts by name.
    pub(crate) fn counts(&mut self, name: &str, counts: &BTreeMap<String, u64>) {
        let texts = counts.iter().map(|(name, count)| format!("{name} {count}"));
        let text = texts.collect::<Vec<_>>().join(", ");
        self.figure(name, if text.is_empty() { "none".to_owned() } else { text });
    }

    pub(crate) fn check(&mut self, what: impl Into<String>, holds: bool) {
        self.report.checks.push(Check::new(what, holds));
    }

    /// Starts a server with these arguments, on loopback.
    pub(crate) fn serve(&self, arguments: &[&str]) -> Result<Server> {
        self.serve_as(&Setup { arguments, ..Setup::default() })
    }

    pub(crate) fn serve_as(&self, setup: &Setup<'_>) -> Result<Server> {
        Server::start(self.lab, setup)
    }

    /// Opens `count` connections, all of which the server must hold.
    pub(crate) fn load(&mut self, server: &Server, count: usize) -> Result<Load> {
        let mut load = Load::new(server.ports())?;
        load.add(require_descriptors(count)?)?;
        self.figure("held", load.open());
        self.check("all are held", load.open() == count);
        Ok(load)
    }

    /// Waits until no more descriptors are open than before.
    pub(crate) fn check_all_closed(&mut self, server: &Server, before: usize) -> Result<()> {
        let are_closed = || Ok(server.descriptors()? <= before);
        let took = wait_until("no descriptor leaked", Duration::from_secs(20), are_closed)?;
        self.seconds("cleared_seconds", took);
        self.check("no descriptor leaked", true);
        Ok(())
    }

    /// Ends the server, which must not leak anything, nor have delayed the bystander.
    pub(crate) fn end(&mut self, server: Server) -> Result<ServerRecord> {
        self.end_with(server, true)
    }

    /// The same without a bound on the bystander's latency, for rows that stop or trace the server.
    pub(crate) fn end_delayed(&mut self, server: Server) -> Result<ServerRecord> {
        self.end_with(server, false)
    }

    fn end_with(&mut self, server: Server, has_latency_max: bool) -> Result<ServerRecord> {
        self.report.server_arguments = Some(server.arguments.clone());
        let log = server.process.log()?;
        let warnings = log.lines().filter(|line| line.contains(" WARN "));
        let texts = warnings.map(|line| line.split_once("] ").map_or(line, |(_, text)| text));
        self.figure("log", texts.take(LOG_LINES_MAX).collect::<Vec<_>>());
        let ended = server.end()?;
        self.check("exit code 0 and a record", ended.code == 0 && ended.record.is_some());
        if let Some(record) = &ended.record {
            let is_closed = record.accepted == record.closed && record.open == 0;
            self.check("no slot leaked: accepted = closed", is_closed);
            let by_reason: u64 = record.refused_by.values().sum();
            self.check("each refusal has a reason", record.refused == by_reason);
        }
        if let Some(latencies) = &ended.bystander {
            self.check_bystander(latencies, has_latency_max);
        }
        self.report.bystander = ended.bystander;
        self.report.server = ended.record.clone();
        ended.record.context("the server wrote no record")
    }

    fn check_bystander(&mut self, latencies: &Latencies, has_latency_max: bool) {
        let was_served = latencies.lost.is_none() && latencies.echoes > 0;
        self.check("the bystander was served to the end", was_served);
        if has_latency_max && latencies.max_ms.is_some() {
            // A slow machine also delays the kernel's work, once in each direction.
            let max = LATENCY_MS_MAX + 2.0 * latencies.oversleep_max_ms;
            self.check(
                format!("the bystander's wait, without scheduling delay, is at most {max:.1} ms"),
                latencies.max_ms_without_waits_for_a_processor <= max,
            );
        }
    }

    fn finish(mut self, outcome: Result<()>, took: Duration) -> Result<Report> {
        let checks = &self.report.checks;
        let all_hold = !checks.is_empty() && checks.iter().all(|check| check.holds);
        self.report.load_average = procfs::LoadAverage::current()?.one;
        self.report.seconds = (took.as_secs_f64() * 10.0).round() / 10.0;
        self.report.state = match outcome {
            Ok(()) if all_hold => State::Holds,
            Ok(()) => State::Fails,
            Err(why) if why.is::<Skipped>() => {
                self.figure("skipped", why.to_string());
                State::Skipped
            }
            Err(why) => {
                self.figure("error", format!("{why:#}"));
                State::Fails
            }
        };
        Ok(self.report)
    }
}

/// Runs rows, and prints the outcome of each.
pub(crate) fn run_all(lab: &Lab, rows: &[&Row], out: &Path) -> Result<Vec<State>> {
    let mut states = Vec::new();
    for row in rows {
        states.push(run_row(lab, row, out)?);
        if wait::is_interrupted() {
            bail!("interrupted");
        }
    }
    write_table(out)?;
    let count = |state| states.iter().filter(|&&outcome| outcome == state).count();
    println!(
        "{} hold, {} fail, {} skipped: records in {}",
        count(State::Holds),
        count(State::Fails),
        count(State::Skipped),
        out.display()
    );
    Ok(states)
}

fn run_row(lab: &Lab, row: &Row, out: &Path) -> Result<State> {
    let (mut run, started) = (Run { lab, report: Report::new(row)? }, Instant::now());
    let deadline = Deadline::new(ROW_TIMEOUT);
    let outcome = catch_unwind(AssertUnwindSafe(|| (row.run)(&mut run)));
    drop(deadline);
    let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("the row panicked")));
    let report = run.finish(outcome, started.elapsed())?;
    report.write(out)?;
    let (state, seconds, line) = (report.state.name(), report.seconds, report.line());
    println!("{state:8} {:18} {seconds:6} s  {line}", row.name);
    for check in report.checks.iter().filter(|check| !check.holds) {
        println!("         does not hold: {}", check.what);
    }
    Ok(report.state)
}

/// Returns `count`.
///
/// # Errors
/// [`Skipped`] if this process can't have that many descriptors.
pub(crate) fn require_descriptors(count: usize) -> Result<usize> {
    let allowed = c1000k_host::limits::descriptor_limit()?.soft;
    if allowed < count as u64 + 200 {
        let (needed, allowed) = (format::count(count as u64), format::count(allowed));
        let reason = format!(
            "{needed} connections need as many descriptors, and RLIMIT_NOFILE allows {allowed}"
        );
        return Err(Skipped(reason).into());
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::programs::Programs;

    fn state_of(run: fn(&mut Run<'_>) -> Result<()>) -> (State, Report) {
        let out = tempfile::tempdir().unwrap();
        let lab = Lab { programs: Programs("nowhere".into()), file_table: "auto" };
        let row = Row { name: "row", fault: "a fault", must_hold: "all", run, is_long: false };
        let state = super::run_row(&lab, &row, out.path()).unwrap();
        write_table(out.path()).unwrap();
        let table = fs::read_to_string(out.path().join("README.md")).unwrap();
        assert!(table.contains(&format!("| a fault | all | **{}**:", state.name())), "{table}");
        let text = fs::read(out.path().join("row.json")).unwrap();
        (state, serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn a_row_holds_only_if_it_has_checks_and_all_of_them_hold() {
        let holds = |run: &mut Run<'_>| {
            run.check("one", true);
            run.figure("zeal", 2);
            run.figure("alms", 1);
            Ok(())
        };
        let (state, report) = state_of(holds);
        assert_eq!(state, State::Holds);
        assert_eq!(report.line(), "zeal 2, alms 1", "figures stay in their order");
        let one_fails = |run: &mut Run<'_>| {
            run.check("one", true);
            run.check("two", false);
            Ok(())
        };
        assert_eq!(state_of(one_fails).0, State::Fails);
        assert_eq!(state_of(|_| Ok(())).0, State::Fails);
    }

    #[test]
    fn a_row_that_fails_or_is_skipped_records_the_reason() {
        let (state, report) = state_of(|run| {
            run.check("one", true);
            Err(anyhow!("no luck").context("it broke"))
        });
        assert_eq!((state, report.line().as_str()), (State::Fails, "error it broke: no luck"));
        let (state, report) = state_of(|_| Err(Skipped("no such kernel".to_owned()).into()));
        assert_eq!((state, report.line().as_str()), (State::Skipped, "skipped no such kernel"));
        assert_eq!(state_of(|_| panic!("on purpose")).0, State::Fails);
    }
}
