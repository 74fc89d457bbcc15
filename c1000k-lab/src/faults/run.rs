//! Plays rows one after the other, and writes down what comes of each.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use c1000k_host::format;
use procfs::Current;
use serde_json::{Map, Value};

use super::report::{Check, Report, State, write_table};
use super::rows::Row;
use crate::bystander::Seen;
use crate::patience::{self, Limit, wait_until};
use crate::record::ServerRecord;
use crate::server::{Ended, Lab, Server, Setup};
use crate::skipped::Skipped;

const ROW_WITHIN: Duration = Duration::from_secs(240);

/// What a bystander's echo may take, beside what the machine makes of it.
pub(crate) const STALL_MS_MAX: f64 = 100.0;

/// Lines of the log that a record keeps.
const LOG_LINES_MAX: usize = 20;

/// What is found out while a row is played.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) figures: Map<String, Value>,
    checks: Vec<Check>,
    arguments: Option<Vec<String>>,
    ended: Option<Ended>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(lab: &'a Lab) -> Self {
        Self { lab, figures: Map::new(), checks: Vec::new(), arguments: None, ended: None }
    }

    /// Notes a figure; one of the same name is replaced.
    pub(crate) fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// Notes a time, to a hundredth of a second.
    pub(crate) fn seconds(&mut self, name: &str, duration: Duration) {
        self.figure(name, (duration.as_secs_f64() * 100.0).round() / 100.0);
    }

    /// Notes counts by name.
    pub(crate) fn counts(&mut self, name: &str, counts: &BTreeMap<String, u64>) {
        let texts: Vec<String> =
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        self.figure(name, if texts.is_empty() { "none".to_owned() } else { texts.join(", ") });
    }

    pub(crate) fn check(&mut self, what: impl Into<String>, holds: bool) {
        self.checks.push(Check::new(what, holds));
    }

    /// A server with these arguments, on loopback.
    pub(crate) fn serve(&self, arguments: &[&str]) -> Result<Server> {
        self.serve_as(&Setup { arguments, ..Setup::default() })
    }

    pub(crate) fn serve_as(&self, setup: &Setup<'_>) -> Result<Server> {
        Server::start(self.lab, setup)
    }

    /// All descriptors but those from before are closed.
    pub(crate) fn gone_again(&mut self, server: &Server, before: usize) -> Result<()> {
        let all_closed = || Ok(server.descriptors()? <= before);
        let took = wait_until("no descriptor leaked", Duration::from_secs(20), all_closed)?;
        self.seconds("cleared_seconds", took);
        self.check("no descriptor leaked", true);
        Ok(())
    }

    /// Ends the server, which must leave nothing behind; the bystander must not have noticed anything.
    pub(crate) fn ends(&mut self, server: Server) -> Result<ServerRecord> {
        self.ends_with(server, Some(STALL_MS_MAX))
    }

    /// The same where the server was suspended, or traced, so that the bystander had to wait.
    pub(crate) fn ends_suspended(&mut self, server: Server) -> Result<ServerRecord> {
        self.ends_with(server, None)
    }

    fn ends_with(&mut self, server: Server, stall_ms_max: Option<f64>) -> Result<ServerRecord> {
        self.arguments = Some(server.arguments.clone());
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
        if let Some(seen) = &ended.bystander {
            self.check_bystander(seen, stall_ms_max);
        }
        let record = ended.record.clone();
        self.ended = Some(ended);
        record.context("the server left no record")
    }

    fn check_bystander(&mut self, seen: &Seen, stall_ms_max: Option<f64>) {
        self.check("the bystander was served to the end", seen.lost.is_none() && seen.echoes > 0);
        if let (Some(stall), Some(_)) = (stall_ms_max, seen.max_ms) {
            // The kernel's own work for an echo is late as well when the machine is: once on each way.
            let most = stall + 2.0 * seen.oversleep_max_ms;
            self.check(
                format!("the bystander never waited {stall} ms longer than the machine made it"),
                seen.max_ms_without_waits_for_a_processor <= most,
            );
        }
    }

    fn report(self, row: &Row, outcome: Result<()>, seconds: f64) -> Result<Report> {
        let mut figures = self.figures;
        let state = match outcome {
            Ok(()) if !self.checks.is_empty() && self.checks.iter().all(|check| check.holds) => {
                State::Holds
            }
            Ok(()) => State::Fails,
            Err(why) if why.is::<Skipped>() => {
                figures.insert("skipped".to_owned(), why.to_string().into());
                State::Skipped
            }
            Err(why) => {
                figures.insert("error".to_owned(), format!("{why:#}").into());
                State::Fails
            }
        };
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let (record, bystander) =
            self.ended.map_or((None, None), |ended| (ended.record, ended.bystander));
        Ok(Report {
            row: row.name.to_owned(),
            fault: row.fault.to_owned(),
            must_hold: row.must_hold.to_owned(),
            state,
            reproduce: format!("scripts/faults {}", row.name),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            machine: format!("{} cpus, Linux {}", thread::available_parallelism()?, release.trim()),
            load_average: procfs::LoadAverage::current()?.one,
            seconds,
            figures,
            checks: self.checks,
            bystander,
            server_arguments: self.arguments,
            server: record,
        })
    }
}

/// Plays them all, and says of each how it went.
pub(crate) fn play_all(lab: &Lab, rows: &[&Row], out: &Path) -> Result<Vec<State>> {
    let mut states = Vec::new();
    for row in rows {
        states.push(play(lab, row, out)?);
        if patience::is_interrupted() {
            bail!("interrupted");
        }
    }
    write_table(out)?;
    let count = |wanted| states.iter().filter(|&&state| state == wanted).count();
    println!(
        "{} hold, {} fail, {} skipped: records in {}",
        count(State::Holds),
        count(State::Fails),
        count(State::Skipped),
        out.display()
    );
    Ok(states)
}

fn play(lab: &Lab, row: &Row, out: &Path) -> Result<State> {
    let (mut run, started) = (Run::new(lab), Instant::now());
    let limit = Limit::new(ROW_WITHIN);
    let outcome = catch_unwind(AssertUnwindSafe(|| (row.play)(&mut run)));
    drop(limit);
    let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("the row panicked")));
    let seconds = (started.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    let report = run.report(row, outcome, seconds)?;
    report.write(out)?;
    println!("{:8} {:18} {seconds:6} s  {}", report.state.name(), row.name, report.line());
    for check in report.checks.iter().filter(|check| !check.holds) {
        println!("         does not hold: {}", check.what);
    }
    Ok(report.state)
}

/// The size of a crowd.
///
/// # Errors
/// [`Skipped`] where this process may not have as many descriptors.
pub(crate) fn many(count: usize) -> Result<usize> {
    let allowed = c1000k_host::limits::descriptor_limit()?.soft;
    if allowed < count as u64 + 200 {
        let (wanted, allowed) = (format::count(count as u64), format::count(allowed));
        let why = format!(
            "{wanted} clients want as many descriptors, and RLIMIT_NOFILE allows {allowed}"
        );
        return Err(Skipped(why).into());
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::Programs;

    fn state_of(play: fn(&mut Run<'_>) -> Result<()>) -> (State, Report) {
        let out = tempfile::tempdir().unwrap();
        let lab = Lab { programs: Programs("nowhere".into()), file_table: "auto" };
        let row = Row { name: "row", fault: "a fault", must_hold: "all", play, is_long: false };
        let state = super::play(&lab, &row, out.path()).unwrap();
        write_table(out.path()).unwrap();
        let table = fs::read_to_string(out.path().join("README.md")).unwrap();
        assert!(table.contains(&format!("| a fault | all | **{}**:", state.name())), "{table}");
        let text = fs::read(out.path().join("row.json")).unwrap();
        (state, serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn a_row_holds_only_where_it_checks_something_and_all_of_it_holds() {
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
    fn a_row_that_fails_before_its_end_says_why_and_one_that_is_skipped_too() {
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
