//! Whether the clients, the server and the kernel agree.
//!
//! Each of them counts independently, so a connection that only one of them has is a disagreement. What could not be
//! checked is unknown: it neither agrees nor disagrees. Many of the kernel's figures are for the whole system, and
//! speed depends on it. So a figure that other processes may have changed is shown and not judged, unless they can't be
//! the cause.

use std::fmt;

use c1000k_host::format;
use c1000k_record::{ClientRecord, Limit, Verdict};

use crate::cost::{self, float};
use crate::run::{Apart, Moment, Run, Topology};
use crate::snapshot::Snapshot;
use crate::trend;

/// A run makes two passes; if a record has more, only the first ones are checked.
pub(crate) const PASSES_MAX: usize = 16;
/// With fewer connections, a single page changes the bytes of each too much.
pub(crate) const CONNECTIONS_TO_WEIGH_MIN: u64 = 1_000;
/// Sockets that other processes may open or close during the run, and the 100 listeners.
const SOCKETS_TOLERANCE: u64 = 200;
/// Free slab objects that the caches keep for each processor.
const OBJECTS_TOLERANCE: u64 = 2_000;
/// The server reads the slabs at another moment than the snapshots.
const KERNEL_BYTES_TOLERANCE: f64 = 0.05;
/// The kernel keeps some pages in half-filled slabs.
const SLAB_RETURNED_MIN: f64 = 0.9;
/// Below this ratio, the last connections were opened more slowly than the first.
const TREND_MIN: f64 = 0.9;
/// A prediction that differs by more is wrong.
const PREDICTION_TOLERANCE: f64 = 0.1;
/// Snapshots are of another moment than the server's samples, and the server uses some pages temporarily.
const PROCESS_MEMORY_TOLERANCE_PART: u64 = 20;
const PROCESS_MEMORY_TOLERANCE_BYTES: u64 = 256 * 1024;
/// The bound of the server's process without connections.
const PROCESS_FIXED_BYTES_MAX: u64 = 24_000_000;
/// The bound of each connection in the server's process.
const PROCESS_BYTES_PER_CONNECTION_MAX: u64 = 48;

/// A check, with its expected and its actual result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What is checked.
    pub name: String,
    /// The expected result, with its tolerance.
    pub expected: String,
    /// The actual result.
    pub found: String,
    /// Whether the two agree.
    pub outcome: CheckOutcome,
    /// What the check means, or why its result is unknown.
    pub note: String,
    /// It is about speed, which is shown and never judged.
    pub is_speed: bool,
    /// It is unknown because a snapshot of the kernel is missing.
    pub lacks_snapshot: bool,
}

/// The outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckOutcome {
    /// As expected.
    Agrees,
    /// Not as expected.
    Disagrees,
    /// Not as expected, possibly for another reason than the run.
    NotJudged,
    /// A record or a snapshot is missing.
    Unknown,
}

impl fmt::Display for CheckOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Agrees => "yes",
            Self::Disagrees => "NO",
            Self::NotJudged => "not judged",
            Self::Unknown => "unknown",
        })
    }
}

/// All checks of a run, the counts of connections first.
#[must_use]
pub fn all(run: &Run) -> Vec<Check> {
    let mut checks = vec![held(run), accepted(run), closed(run), refused(run)];
    for (name, client) in &run.clients {
        checks.push(verdict(name, client));
        checks.extend(verified(name, client));
        checks.extend(messages(name, client));
    }
    checks.extend(run.hosts_expected().iter().map(|host| sockets(run, host)));
    checks.extend(kernel_hosts(run).iter().map(|host| tcp_objects(run, host)));
    checks.push(kernel_bytes(run));
    checks.push(process_memory(run));
    checks.push(process_bytes(run));
    checks.extend(kernel_hosts(run).iter().map(|host| slab_returned(run, host)));
    checks.extend(listen_counters(run));
    checks.extend(run.clients.iter().map(|(name, client)| rate_trend(name, client)));
    checks.extend(prediction(run));
    checks
}

fn held(run: &Run) -> Check {
    let check = Question::new("Connections held at once", "the server's peak is the clients' sum");
    let (Some(clients), Some(server)) = (run.sum(|client| client.established), &run.server) else {
        return check.unknown(RECORD_MISSING);
    };
    if let Some(why) = run.incomparable() {
        return check.unknown(why);
    }
    if let Some(apart) = run.apart() {
        return check.unknown(apart.to_string());
    }
    // The server may accept a new connection before it knows that the old one has ended.
    if run.clients.iter().any(|(_, client)| client.churn.is_some() || client.storm.is_some()) {
        let expected = format!("at least {}", format::count(clients));
        return check.judge(expected, format::count(server.peak), server.peak >= clients);
    }
    check.equal(clients, server.peak)
}

fn accepted(run: &Run) -> Check {
    let check = Question::new("Connections accepted", "at least the clients' sum");
    let (Some(clients), Some(server)) = (run.sum(|client| client.established), &run.server) else {
        return check.unknown(RECORD_MISSING);
    };
    if let Some(why) = run.incomparable() {
        return check.unknown(why);
    }
    if run.apart() == Some(Apart::Servers) {
        return check.unknown(Apart::Servers.to_string());
    }
    check.judge(
        format!("at least {}", format::count(clients)),
        format::count(server.accepted),
        server.accepted >= clients,
    )
}

fn closed(run: &Run) -> Check {
    let check = Question::new("Connections accounted for", "accepted is closed plus open");
    let Some(server) = &run.server else { return check.unknown(RECORD_MISSING) };
    check.equal(server.accepted, server.closed.saturating_add(server.open))
}

fn refused(run: &Run) -> Check {
    let check =
        Question::new("Connections refused", "each refusal of the server reached its client");
    let (Some(clients), Some(server)) = (run.sum(|client| client.refused_by_server), &run.server)
    else {
        return check.unknown(RECORD_MISSING);
    };
    check.judge(
        format!("at least {}", format::count(server.refused)),
        format::count(clients),
        clients >= server.refused,
    )
}

fn verdict(name: &str, client: &ClientRecord) -> Check {
    let is_verified = client.verified.is_none_or(|verified| verified >= client.established);
    let is_whole = client.established >= client.target && client.lost == 0 && is_verified;
    // A run that was interrupted may have been complete until then.
    let follows = match client.verified {
        _ if !is_whole || client.limit == Some(Limit::Interrupted) => Verdict::Short,
        Some(_) => Verdict::Reached,
        None => Verdict::Held,
    };
    Question::new(format!("Verdict of {name}"), "it follows from the client's own figures").judge(
        follows.to_string(),
        client.verdict.to_string(),
        client.verdict == follows,
    )
}

/// `None` if the run sent no messages.
fn messages(name: &str, client: &ClientRecord) -> Option<Check> {
    let workload = client.workload.as_ref()?;
    let question = Question::new(
        format!("Messages of {name}"),
        "each that was sent is answered, mismatched or unanswered",
    );
    let found = workload.answered.saturating_add(workload.mismatched);
    Some(question.equal(workload.sent, found.saturating_add(workload.unanswered)))
}

/// One check for each pass of echoes, or one that is unknown if there was none.
fn verified(name: &str, client: &ClientRecord) -> Vec<Check> {
    let passes = match client.verified_passes.as_slice() {
        [] => client.verified.into_iter().collect(),
        passes => passes.to_vec(),
    };
    if passes.is_empty() {
        let check = Question::new(format!("Echoes of {name}"), "");
        return vec![check.unknown("the run did not verify (--no-verify)")];
    }
    let count = passes.len();
    let check = |(pass, verified): (usize, u64)| {
        let expected = client.established.saturating_sub(client.lost);
        let name = format!("Echoes of {name}, pass {pass} of {count}");
        Question::new(name, "each connection that was not lost sent back what it got").judge(
            format!("at least {}", format::count(expected)),
            format::count(verified),
            verified >= expected,
        )
    };
    (1..).zip(passes).take(PASSES_MAX).map(check).collect()
}

/// The kernel's count of sockets in use.
fn sockets(run: &Run, host: &str) -> Check {
    let ends = if run.topology() == Topology::OneHost && !run.is_stateless() { 2 } else { 1 };
    let check = Question::new(
        format!("Sockets of host {host}"),
        format!("sockstat rose by {ends} for each connection"),
    );
    if let Some(why) = sockets_unknown(run) {
        return check.unknown(why);
    }
    let Some(connections) = run.connections_of(host) else {
        return check.unknown(RECORD_MISSING);
    };
    let inuse = |moment| run.snapshot(host, moment).and_then(|snapshot| snapshot.tcp_inuse);
    let (Some(before), Some(peak)) = (inuse(Moment::Before), inuse(Moment::Peak)) else {
        return check.no_snapshot("sockstat before or at the peak is missing");
    };
    let expected = connections.saturating_mul(ends);
    let tolerance = SOCKETS_TOLERANCE + expected / 1_000;
    let is_alone = run.is_alone_in_its_network();
    check.unless_others(is_alone, expected, peak, tolerance).near(
        expected,
        peak.saturating_sub(before),
        tolerance,
    )
}

/// Why the number of TCP sockets that the kernel should have is not known.
fn sockets_unknown(run: &Run) -> Option<&'static str> {
    run.has_unix_sockets().then_some(UNIX_SOCKETS).or_else(|| run.incomparable())
}

/// Sockets by the kernel's allocator, which is independent of the other counters.
fn tcp_objects(run: &Run, host: &str) -> Check {
    let ends = run.ends_in_kernel();
    let check = Question::new(
        format!("Slab objects of host {host}"),
        format!("the TCP caches rose by {ends} for each connection"),
    );
    if let Some(why) = sockets_unknown(run) {
        return check.unknown(why);
    }
    let Some(connections) = run.connections_of(host) else {
        return check.unknown(RECORD_MISSING);
    };
    let objects = |moment| run.snapshot(host, moment).and_then(Snapshot::tcp_objects);
    let (Some(before), Some(peak)) = (objects(Moment::Before), objects(Moment::Peak)) else {
        return check.no_snapshot(SLABINFO_MISSING);
    };
    let expected = connections.saturating_mul(ends);
    let tolerance = OBJECTS_TOLERANCE + expected / 100;
    check.unless_others(run.is_alone(), expected, peak, tolerance).near(
        expected,
        peak.saturating_sub(before),
        tolerance,
    )
}

fn kernel_bytes(run: &Run) -> Check {
    let check = Question::new(
        "Kernel bytes for one end of a connection",
        "the server's figure equals that of the snapshots, by the slab caches of a connection",
    );
    let reported = run.server.as_ref().and_then(|server| server.kernel_bytes_per_connection);
    let Some(reported) = reported else { return check.unknown("the server's figure is missing") };
    let Some(seen) = cost::server_end_bytes(run) else {
        return check.no_snapshot(SLABINFO_MISSING);
    };
    check.unless(may_include_others(run)).judge(
        format!("{}, within {}", format::bytes_each(seen), format::percent(KERNEL_BYTES_TOLERANCE)),
        format::bytes_each(reported),
        is_within(seen, reported, KERNEL_BYTES_TOLERANCE),
    )
}

/// The memory of the process by the snapshots and by the server's record.
fn process_memory(run: &Run) -> Check {
    let check = Question::new(
        "Memory of the server's process at the peak",
        "the server's figure equals that of the snapshots",
    );
    let reported = run.server.as_ref().and_then(|server| server.rss_at_peak_bytes);
    let Some(reported) = reported else { return check.unknown("the server's figure is missing") };
    let Some(seen) = cost::process_seen(run).peak_bytes else {
        return check.no_snapshot("the server's process at the peak is missing");
    };
    let tolerance = seen / PROCESS_MEMORY_TOLERANCE_PART + PROCESS_MEMORY_TOLERANCE_BYTES;
    check.judge(
        format!("{} +- {}", format::bytes(seen), format::bytes(tolerance)),
        format::bytes(reported),
        seen.abs_diff(reported) <= tolerance,
    )
}

fn process_bytes(run: &Run) -> Check {
    let check = Question::new(
        "Memory that the server's process may take",
        "24 MB and 48 B for each connection at most",
    );
    let (Some(connections), Some(peak)) = (run.connections(), cost::process(run).peak_bytes) else {
        return check.no_snapshot("neither record nor snapshots have it");
    };
    let most = PROCESS_FIXED_BYTES_MAX
        .saturating_add(connections.saturating_mul(PROCESS_BYTES_PER_CONNECTION_MAX));
    check.judge(format!("at most {}", format::bytes(most)), format::bytes(peak), peak <= most)
}

fn slab_returned(run: &Run, host: &str) -> Check {
    let check = Question::new(
        format!("Slab memory given back on host {host}"),
        "share of the growth of the caches that only connections use, after the teardown",
    );
    let Some(share) = cost::slab_share_returned(run, host) else {
        return check
            .no_snapshot("slabinfo before, at the peak or after is missing, or did not grow");
    };
    check.unless((!run.is_alone()).then_some(OTHERS)).judge(
        format!("at least {}", format::percent(SLAB_RETURNED_MIN)),
        format!("{}%", apart(share * 100.0, SLAB_RETURNED_MIN * 100.0, 1)),
        share >= SLAB_RETURNED_MIN,
    )
}

fn listen_counters(run: &Run) -> [Check; 2] {
    let delta = |name: &str, figure: fn(&Snapshot) -> Option<u64>| {
        let check = Question::new(
            format!("{name} on the server's host"),
            "no connection was dropped because an accept queue was full",
        );
        let at = |moment| run.snapshot(run.server_host(), moment).and_then(figure);
        let last = at(Moment::After).or_else(|| at(Moment::Peak));
        let seen = at(Moment::Before).zip(last).map(|(old, new)| new.saturating_sub(old));
        let reported = run.server.as_ref().and_then(|server| server.counters.get(name).copied());
        match seen.max(reported) {
            Some(found) => {
                check.unless((!run.is_alone_in_its_network()).then_some(OTHERS)).equal(0, found)
            }
            None => check.no_snapshot("neither record nor snapshots have it"),
        }
    };
    [
        delta("ListenOverflows", |snapshot| snapshot.listen_overflows),
        delta("ListenDrops", |snapshot| snapshot.listen_drops),
    ]
}

fn rate_trend(name: &str, client: &ClientRecord) -> Check {
    let check = Question::new(
        format!("Rate of {name}"),
        "median of the last three tenths over that of the first three",
    )
    .about_speed();
    let Some(tenths) = trend::tenths(&client.ramp_series) else {
        return check.unknown("the ramp has too few points for ten rates");
    };
    let ratio = trend::ratio(&tenths);
    check.judge(format!("at least {TREND_MIN:.2}"), apart(ratio, TREND_MIN, 2), ratio >= TREND_MIN)
}

/// The server's prediction and the memory that it and the kernel used; `None` without a prediction.
fn prediction(run: &Run) -> Option<Check> {
    let server = run.server.as_ref()?;
    let predicted = server.prediction.filter(|predicted| predicted.connections > 0)?;
    let check = |note: String| Question::new("Prediction of the server's memory", note);
    let Some((process, kernel)) = server_costs(run) else {
        let why = "the process's growth or slabinfo is missing";
        return Some(check(String::new()).no_snapshot(why));
    };
    let each = |bytes: u64| float(bytes) / float(predicted.connections);
    let note = format!(
        "a connection: process {} predicted, {} found; kernel, the server's end, {} and {}",
        format::bytes_each(each(predicted.process_bytes)),
        format::bytes_each(process),
        format::bytes_each(each(predicted.kernel_bytes)),
        format::bytes_each(kernel)
    );
    let expected = each(predicted.process_bytes) + each(predicted.kernel_bytes);
    Some(check(note).unless(may_include_others(run)).judge(
        format!(
            "{}, within {}",
            format::bytes_each(expected),
            format::percent(PREDICTION_TOLERANCE)
        ),
        format::bytes_each(process + kernel),
        is_within(expected, process + kernel, PREDICTION_TOLERANCE),
    ))
}

/// Why the measured memory of a connection may include other memory.
fn may_include_others(run: &Run) -> Option<&'static str> {
    let are_few = run.connections().is_none_or(|count| count < CONNECTIONS_TO_WEIGH_MIN);
    (!run.is_alone()).then_some(OTHERS).or(are_few.then_some(FEW))
}

/// The memory of a connection in the server's process, and of one end in the kernel.
fn server_costs(run: &Run) -> Option<(f64, f64)> {
    let process = cost::process(run).bytes_each?;
    let kernel =
        cost::server_end_bytes(run).or_else(|| run.server.as_ref()?.kernel_bytes_per_connection)?;
    Some((process, kernel))
}

/// The hosts with different kernels; of those that share one, the server's.
fn kernel_hosts(run: &Run) -> &'static [&'static str] {
    let hosts = run.hosts_expected();
    if run.is_one_kernel() { &hosts[..1] } else { hosts }
}

/// A figure with this number of decimal places, or with more if it would otherwise look like the bound that it misses.
fn apart(value: f64, bound: f64, places: usize) -> String {
    let text = |value: f64, places| format!("{value:.places$}");
    let is_distinct =
        |places: &usize| value >= bound || text(value, *places) != text(bound, *places);
    text(value, (places..places + 6).find(is_distinct).unwrap_or(places + 6))
}

fn is_within(expected: f64, found: f64, share: f64) -> bool {
    (found - expected).abs() <= expected * share
}

const OTHERS: &str = "includes other processes";
const FEW: &str = "too few connections to measure one";
const SPEED: &str = "speed depends on the machine's other load";
const UNIX_SOCKETS: &str = "the kernel's figures of TCP do not include Unix-domain sockets";
const RECORD_MISSING: &str = "a record is missing";
const SLABINFO_MISSING: &str = "slabinfo before or at the peak is missing; it needs root";

/// A check without its result.
struct Question {
    name: String,
    note: String,
    is_speed: bool,
    /// Why an unexpected result may have another cause than the run.
    reason: Option<&'static str>,
}

impl Question {
    fn new(name: impl Into<String>, note: impl Into<String>) -> Self {
        Self { name: name.into(), note: note.into(), is_speed: false, reason: None }
    }

    fn about_speed(self) -> Self {
        Self { is_speed: true, ..self }.unless(Some(SPEED))
    }

    /// With a reason, an unexpected result is shown and not judged.
    fn unless(self, reason: Option<&'static str>) -> Self {
        Self { reason: self.reason.or(reason), ..self }
    }

    /// Other processes may open and close more of what is counted; but the run's own must be included in any case.
    fn unless_others(self, is_alone: bool, ours: u64, there: u64, tolerance: u64) -> Self {
        let are_there = there.saturating_add(tolerance) >= ours;
        self.unless((!is_alone && are_there).then_some(OTHERS))
    }

    fn judge(self, expected: String, found: String, agrees: bool) -> Check {
        let (outcome, note) = match self.reason {
            _ if agrees => (CheckOutcome::Agrees, self.note),
            Some(reason) => (CheckOutcome::NotJudged, format!("{}; {reason}", self.note)),
            None => (CheckOutcome::Disagrees, self.note),
        };
        let Self { name, is_speed, .. } = self;
        Check { name, expected, found, outcome, note, is_speed, lacks_snapshot: false }
    }

    fn equal(self, expected: u64, found: u64) -> Check {
        self.judge(format::count(expected), format::count(found), expected == found)
    }

    fn near(self, expected: u64, found: u64, tolerance: u64) -> Check {
        let text = format!("{} +- {}", format::count(expected), format::count(tolerance));
        self.judge(text, format::count(found), expected.abs_diff(found) <= tolerance)
    }

    fn unknown(self, why: impl Into<String>) -> Check {
        Check {
            name: self.name,
            expected: "-".to_owned(),
            found: "-".to_owned(),
            outcome: CheckOutcome::Unknown,
            note: why.into(),
            is_speed: self.is_speed,
            lacks_snapshot: false,
        }
    }

    fn no_snapshot(self, why: &str) -> Check {
        Check { lacks_snapshot: true, ..self.unknown(why) }
    }
}

#[cfg(test)]
mod tests {
    use super::apart;

    #[test]
    fn a_figure_below_its_bound_does_not_look_like_it() {
        let reported = [0.899_6, 0.9, 0.756, 0.85].map(|ratio| apart(ratio, 0.9, 2));
        assert_eq!(reported, ["0.8996", "0.90", "0.76", "0.85"]);
        assert_eq!([89.96, 99.98].map(|share| apart(share, 90.0, 1)), ["89.96", "100.0"]);
    }
}
