//! What limited a run, and how that is known: evidence in, a name and a sentence out.
//!
//! A bound that the client or the server met comes first. Without one, what took the time of the ramp is looked for:
//! full accept queues, lost packets, a processor without idle time. Where the target was reached and none of these is
//! seen, nothing was saturated; where a figure is missing that could show it, the answer is unknown.

use std::collections::BTreeMap;
use std::fmt;

use c1000k_host::format;
use c1000k_record::{ClientRecord, CpuPoint, Limit, ServerRecord, Verdict};

use crate::cost::float;
use crate::run::{Moment, Run, total};
use crate::snapshot::Snapshot;

/// A process that takes this share of its threads' processors has no time left.
const PROCESS_SATURATED: f64 = 0.9;
/// The same for all processors of a machine together.
const MACHINE_SATURATED: f64 = 0.95;
/// One dropped or repeated SYN in this many connects is noise.
const CONNECTS_PER_DROP: u64 = 1_000;
/// Processor time over a shorter ramp is too coarse.
const RAMP_SECONDS_MIN: f64 = 0.1;

/// What limited a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bottleneck {
    /// Its name.
    pub kind: Kind,
    /// The evidence, in a sentence or two.
    pub evidence: String,
}

/// The names of what may limit a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The processor time of the client.
    ClientCpu,
    /// The processor time of the server.
    ServerCpu,
    /// Processor time that others took on a machine of the run.
    OtherCpu,
    /// The server's accept queues.
    Backlog,
    /// 5-tuples.
    Ports,
    /// Descriptors of the client or of the server.
    Descriptors,
    /// Memory of the kernel or of the server.
    Memory,
    /// Epoll watches.
    Watches,
    /// Packets that were lost, or hosts that could not be reached.
    Network,
    /// The server, for a reason that the records do not hold.
    Server,
    /// A signal ended the run.
    Interrupted,
    /// The target was reached and nothing was saturated.
    None,
    /// The figures that could show it are missing, or none of them stands out.
    Unknown,
}

impl Kind {
    /// The name in `summary.json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ClientCpu => "client_cpu",
            Self::ServerCpu => "server_cpu",
            Self::OtherCpu => "other_cpu",
            Self::Backlog => "backlog",
            Self::Ports => "ports",
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::Watches => "watches",
            Self::Network => "network",
            Self::Server => "server",
            Self::Interrupted => "interrupted",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClientCpu => "Client CPU",
            Self::ServerCpu => "Server CPU",
            Self::OtherCpu => "CPU of other processes",
            Self::Backlog => "Backlog",
            Self::Ports => "Ports",
            Self::Descriptors => "Descriptors",
            Self::Memory => "Memory",
            Self::Watches => "Epoll watches",
            Self::Network => "Network",
            Self::Server => "Server",
            Self::Interrupted => "Interrupted",
            Self::None => "Nothing",
            Self::Unknown => "Unknown",
        })
    }
}

/// What the records and snapshots hold of the limits of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Evidence {
    /// Whether the target was reached.
    pub is_reached: bool,
    /// Connects that were started.
    pub connects: u64,
    /// What capped a client, and its own words on it.
    pub client_limit: Option<(Limit, String)>,
    /// What the server turned away; `None` without its record.
    pub server: Option<ServerEvidence>,
    /// Connections that met a full accept queue, and SYNs dropped for a full SYN queue.
    pub queue_drops: Option<u64>,
    /// SYNs that a client sent again.
    pub syn_retransmits: Option<u64>,
    /// Processor time of each client during its ramp.
    pub clients: Vec<CpuShare>,
    /// Processor time of the server while its connections came.
    pub server_cpu: Option<CpuShare>,
    /// Client and server share the processors of one machine.
    pub is_one_machine: bool,
}

/// What a server says of its own bounds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerEvidence {
    /// The connections that it was ready to hold.
    pub connections_max: u64,
    /// What bounds that number.
    pub limit: Option<Limit>,
    /// The connections turned away: reason to count.
    pub refused_by: BTreeMap<String, u64>,
    /// Failed accepts for want of descriptors.
    pub descriptor_errors: u64,
    /// The same for want of the kernel's memory.
    pub memory_errors: u64,
    /// The same for want of epoll watches.
    pub watch_errors: u64,
    /// How often the memory guard stopped admitting.
    pub guard_closings: u64,
}

/// Processor time over a span, in processors: 1 is one of them without idle time.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuShare {
    /// Whose.
    pub name: String,
    /// The length of the span.
    pub seconds: f64,
    /// Taken by the process.
    pub process: f64,
    /// The threads that the process can take processors with.
    pub threads: u64,
    /// Taken on the whole machine.
    pub machine: Option<f64>,
    /// The part of that in soft interrupts.
    pub softirq: Option<f64>,
    /// The machine's processors.
    pub processors: Option<u64>,
}

impl CpuShare {
    fn between(
        name: &str,
        (from, first): (f64, CpuPoint),
        (until, last): (f64, CpuPoint),
        threads: u64,
        processors: Option<u64>,
    ) -> Option<Self> {
        let seconds = until - from;
        let rate = |first: f64, last: f64| ((last - first) / seconds).max(0.0);
        let machine_rate = |figure: fn(&CpuPoint) -> Option<f64>| {
            figure(&first).zip(figure(&last)).map(|(first, last)| rate(first, last))
        };
        // Neither NaN nor infinity passes.
        let is_long = seconds >= RAMP_SECONDS_MIN && seconds.is_finite();
        is_long.then(|| Self {
            name: name.to_owned(),
            seconds,
            process: rate(first.process_seconds, last.process_seconds),
            threads: threads.max(1),
            machine: machine_rate(|point| point.machine_busy_seconds),
            softirq: machine_rate(|point| point.machine_softirq_seconds),
            processors: processors.filter(|count| *count > 0),
        })
    }

    /// Over its ramp.
    fn of_client(name: &str, client: &ClientRecord) -> Option<Self> {
        let points = &client.ramp_series;
        let at =
            |index: usize| points.get(index).and_then(|point| Some((point.seconds, point.cpu?)));
        let last = points.iter().position(|point| point.established >= client.established)?;
        Self::between(name, at(0)?, at(last)?, 1, client.processors)
    }

    /// From the last sample without connections to the first with the most of them.
    fn of_server(server: &ServerRecord) -> Option<Self> {
        let points = &server.series;
        let most = points.iter().map(|point| point.open).max().filter(|most| *most > 0)?;
        let first_open = points.iter().position(|point| point.open > 0)?;
        let full = points.iter().position(|point| point.open == most)?;
        let at =
            |index: usize| points.get(index).and_then(|point| Some((point.seconds, point.cpu?)));
        Self::between(
            "server",
            at(first_open.saturating_sub(1))?,
            at(full)?,
            server.threads,
            server.processors,
        )
    }

    /// Of the time of all processors of the machine, the share that was taken, and that of soft interrupts.
    #[must_use]
    pub fn machine_shares(&self) -> Option<(f64, Option<f64>)> {
        let count = float(self.processors?);
        // The kernel counts in ticks, which may come to more than the span.
        Some(((self.machine? / count).min(1.0), self.softirq.map(|softirq| softirq / count)))
    }

    fn is_process_saturated(&self) -> bool {
        self.process >= PROCESS_SATURATED * float(self.threads)
    }

    fn is_machine_saturated(&self) -> bool {
        self.machine_shares().is_some_and(|(busy, _)| busy >= MACHINE_SATURATED)
    }

    /// `the client took 98.1% of a processor over 671.5 ms`.
    fn text(&self) -> String {
        let Self { name, process, threads, seconds, .. } = self;
        let article = if matches!(name.as_str(), "client" | "server") { "the " } else { "" };
        format!(
            "{article}{name} took {} over {}",
            of_processors(*process, *threads),
            format::duration(*seconds)
        )
    }
}

/// A share of one processor, or of several together.
#[must_use]
pub fn of_processors(busy: f64, count: u64) -> String {
    let share = format::percent(busy / float(count.max(1)));
    match count {
        0 | 1 => format!("{share} of a processor"),
        count => format!("{share} of {} processors", format::count(count)),
    }
}

impl Evidence {
    /// What a run holds of it.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        let counters = counters(run);
        let counter = |name: &str| counters.get(name).copied();
        let overflows = counter("ListenOverflows").max(overflows_seen(run));
        Self {
            is_reached: run.verdict().is_some_and(|verdict| verdict != Verdict::Short),
            connects: total(run.clients.iter().map(|(_, client)| client.attempted)),
            client_limit: run
                .limits()
                .next()
                .map(|(_, limit, detail)| (limit, detail.unwrap_or_default().to_owned())),
            server: run.server.as_ref().map(ServerEvidence::of),
            queue_drops: overflows
                .map(|overflows| overflows.saturating_add(counter("TCPReqQFullDrop").unwrap_or(0))),
            syn_retransmits: counter("TCPSynRetrans"),
            clients: run
                .clients
                .iter()
                .filter_map(|(name, client)| CpuShare::of_client(name, client))
                .collect(),
            server_cpu: run.server.as_ref().and_then(CpuShare::of_server),
            is_one_machine: run.is_one_kernel() && run.topology_known().is_some(),
        }
    }
}

impl ServerEvidence {
    fn of(server: &ServerRecord) -> Self {
        let errors = |names: &[&str]| {
            total(names.iter().filter_map(|name| server.accept_errors.get(*name).copied()))
        };
        Self {
            connections_max: server.connections_max,
            limit: server.limit,
            refused_by: server.refused_by.clone(),
            descriptor_errors: errors(&["EMFILE", "ENFILE"]),
            memory_errors: errors(&["ENOMEM", "ENOBUFS"]),
            watch_errors: errors(&["ENOSPC"]),
            guard_closings: server.memory_guard.map_or(0, |guard| guard.closings),
        }
    }

    fn refused_for(&self, reason: &str) -> u64 {
        self.refused_by.get(reason).copied().unwrap_or(0)
    }
}

/// The kernel's counters over the run: of the hosts of all records, the highest of each, as hosts may share a network.
fn counters(run: &Run) -> BTreeMap<&str, u64> {
    let clients = run.clients.iter().map(|(_, client)| &client.counters);
    let server = run.server.iter().map(|server| &server.counters);
    let mut highest = BTreeMap::new();
    for (name, &count) in clients.chain(server).flatten() {
        let known: &mut u64 = highest.entry(name.as_str()).or_default();
        *known = count.max(*known);
    }
    highest
}

/// By the snapshots of the server's host.
fn overflows_seen(run: &Run) -> Option<u64> {
    let at = |moment| {
        run.snapshot(run.server_host(), moment).and_then(|seen: &Snapshot| seen.listen_overflows)
    };
    let last = at(Moment::After).or_else(|| at(Moment::Peak))?;
    Some(last.saturating_sub(at(Moment::Before)?))
}

/// Names what limited the run.
#[must_use]
pub fn find(evidence: &Evidence) -> Bottleneck {
    bound(evidence)
        .or_else(|| queues(evidence))
        .or_else(|| packets(evidence))
        .or_else(|| processors(evidence))
        .unwrap_or_else(|| nothing_found(evidence))
}

fn named(kind: Kind, evidence: impl Into<String>) -> Option<Bottleneck> {
    Some(Bottleneck { kind, evidence: evidence.into() })
}

/// What the client met, and for that of the server what the server says of it.
fn bound(evidence: &Evidence) -> Option<Bottleneck> {
    let (limit, detail) = evidence.client_limit.as_ref()?;
    let client_says = format!("The client reports: {}", detail.trim_end_matches('.'));
    match limit {
        Limit::Descriptors => named(Kind::Descriptors, client_says + "."),
        Limit::Ports => named(Kind::Ports, client_says + "."),
        Limit::Memory => named(Kind::Memory, client_says + "."),
        Limit::Watches => named(Kind::Watches, client_says + "."),
        Limit::Interrupted => named(Kind::Interrupted, client_says + "."),
        Limit::Server => server_bound(evidence)
            .or_else(|| named(Kind::Server, turned_away(evidence).unwrap_or(client_says + "."))),
        Limit::Network => server_bound(evidence)
            .or_else(|| queues(evidence))
            .or_else(|| named(Kind::Network, client_says + &retransmitted(evidence) + ".")),
        _ => named(Kind::Unknown, client_says + "."),
    }
}

fn server_bound(evidence: &Evidence) -> Option<Bottleneck> {
    let server = evidence.server.as_ref()?;
    let for_memory = server.refused_for("memory").saturating_add(server.refused_for("tcp_mem"));
    if for_memory > 0 || server.guard_closings > 0 {
        return named(
            Kind::Memory,
            format!(
                "The server's memory guard stopped admitting {}, and turned away {}.",
                times(server.guard_closings),
                format::counted(for_memory, "connection")
            ),
        );
    }
    let failed = [
        (Kind::Descriptors, server.descriptor_errors),
        (Kind::Memory, server.memory_errors),
        (Kind::Watches, server.watch_errors),
    ];
    if let Some((kind, count)) = failed.into_iter().find(|(_, count)| *count > 0) {
        let what = kind.to_string().to_lowercase();
        let accepts = format::counted(count, "accept");
        return named(kind, format!("The server ran out of {what} in {accepts}."));
    }
    let past_its_bound = server.refused_for("max_connections");
    let kind = match server.limit? {
        Limit::Descriptors => Kind::Descriptors,
        Limit::Memory => Kind::Memory,
        Limit::Watches => Kind::Watches,
        _ => return None,
    };
    (past_its_bound > 0).then(|| Bottleneck {
        kind,
        evidence: format!(
            "The server was ready for {}, bounded by its {}, and turned away {} more.",
            format::counted(server.connections_max, "connection"),
            kind.to_string().to_lowercase(),
            format::count(past_its_bound)
        ),
    })
}

/// Past a bound that the server was given.
fn turned_away(evidence: &Evidence) -> Option<String> {
    let server = evidence.server.as_ref()?;
    let refused = server.refused_for("max_connections");
    (refused > 0).then(|| {
        format!(
            "The server turned away {} past the {} that it was ready to hold.",
            format::counted(refused, "connection"),
            format::count(server.connections_max)
        )
    })
}

fn is_often(events: Option<u64>, connects: u64) -> bool {
    events.is_some_and(|events| events > 0 && events.saturating_mul(CONNECTS_PER_DROP) >= connects)
}

/// Full accept queues: each connect that meets one waits a second or more for its SYN to be sent again.
fn queues(evidence: &Evidence) -> Option<Bottleneck> {
    let drops =
        evidence.queue_drops.filter(|_| is_often(evidence.queue_drops, evidence.connects))?;
    named(
        Kind::Backlog,
        format!(
            "The server's accept queues were full {} (ListenOverflows, TCPReqQFullDrop) for {}{}.",
            times(drops),
            format::counted(evidence.connects, "connect"),
            retransmitted(evidence)
        ),
    )
}

/// SYNs that were sent again, and no full accept queue that explains it.
fn packets(evidence: &Evidence) -> Option<Bottleneck> {
    if !is_often(evidence.syn_retransmits, evidence.connects) {
        return None;
    }
    let unseen = match evidence.queue_drops.zip(evidence.server.as_ref()) {
        Some(_) => "no accept queue was full",
        None => {
            "whether accept queues of the server were full is not known, as its record is missing"
        }
    };
    let syns = evidence.syn_retransmits.unwrap_or(0);
    named(
        Kind::Network,
        format!(
            "{} retransmitted for {}; {unseen}.",
            were(syns, "SYN"),
            format::counted(evidence.connects, "connect")
        ),
    )
}

/// `; 83 SYNs were retransmitted`, where there were any.
fn retransmitted(evidence: &Evidence) -> String {
    match evidence.syn_retransmits {
        Some(syns) if syns > 0 => format!("; {} retransmitted", were(syns, "SYN")),
        _ => String::new(),
    }
}

/// A process, or the machine of one, without idle time.
fn processors(evidence: &Evidence) -> Option<Bottleneck> {
    let busiest = evidence.clients.iter().max_by(|a, b| a.process.total_cmp(&b.process));
    let server = evidence.server_cpu.as_ref();
    let each = || busiest.into_iter().chain(server);
    let is_server = |share: &CpuShare| server.is_some_and(|server| std::ptr::eq(server, share));
    let kind = |share: &CpuShare| if is_server(share) { Kind::ServerCpu } else { Kind::ClientCpu };
    let relative = |share: &CpuShare| share.process / float(share.threads);
    let saturated = each().filter(|share| share.is_process_saturated());
    if let Some(share) = saturated.max_by(|a, b| relative(a).total_cmp(&relative(b))) {
        let other = each().find(|other| !std::ptr::eq(*other, share));
        let other = other.map_or_else(String::new, |other| format!("; {}", other.text()));
        return named(kind(share), capitalized(&format!("{}{other}.", share.text())));
    }
    let share = each().filter(|share| share.is_machine_saturated()).max_by(|a, b| {
        let taken = |share: &CpuShare| {
            if is_server(share) { share.process } else { clients_taken(evidence) }
        };
        taken(a).total_cmp(&taken(b))
    })?;
    let (busy, count) = share.machine.zip(share.processors)?;
    let ours = if evidence.is_one_machine {
        clients_taken(evidence) + server.map_or(0.0, |server| server.process)
    } else {
        share.process
    };
    let others = (1.0 - ours / busy).max(0.0);
    let kind = if others > 0.5 { Kind::OtherCpu } else { kind(share) };
    let each_text: Vec<String> = each().map(CpuShare::text).collect();
    named(
        kind,
        capitalized(&format!(
            "{}. Their machine had no idle time: {} busy, {others} of that for other processes and interrupts.",
            each_text.join("; "),
            of_processors(busy.min(float(count)), count),
            others = format::percent(others),
        )),
    )
}

/// By all clients together.
fn clients_taken(evidence: &Evidence) -> f64 {
    evidence.clients.iter().map(|share| share.process).sum()
}

fn nothing_found(evidence: &Evidence) -> Bottleneck {
    let busy: Vec<String> =
        evidence.clients.iter().chain(&evidence.server_cpu).map(CpuShare::text).collect();
    let busy = capitalized(&busy.join("; "));
    let has_clients = !evidence.clients.is_empty();
    let queues = match evidence.queue_drops {
        None => "whether accept queues were full is not known".to_owned(),
        Some(0) => "no accept queue was full".to_owned(),
        Some(drops) => format!("accept queues were full {}", times(drops)),
    };
    let (kind, text) = match (evidence.is_reached, has_clients, evidence.server_cpu.is_some()) {
        (true, true, true) => (
            Kind::None,
            format!("The target was reached, and nothing was saturated. {busy}; {queues}."),
        ),
        (true, true, false) => {
            (Kind::Unknown, format!("{busy}. The processor time of the server is not known."))
        }
        (true, false, _) => (
            Kind::Unknown,
            "The records hold no processor time of the ramp, or it was too short to measure any."
                .to_owned(),
        ),
        (false, ..) => (
            Kind::Unknown,
            "The target was not reached, and the records name no bound that was met.".to_owned(),
        ),
    };
    Bottleneck { kind, evidence: text }
}

fn times(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{} times", format::count(count)) }
}

/// `1 SYN was`, `83 SYNs were`.
fn were(count: u64, noun: &str) -> String {
    format!("{} {}", format::counted(count, noun), if count == 1 { "was" } else { "were" })
}

fn capitalized(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| first.to_uppercase().chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The evidence of a run of both programs, whose records are kept in `tests/records`.
    fn saved(name: &str) -> Evidence {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records").join(name);
        Evidence::of(&Run::read(&folder).unwrap())
    }

    fn assert_finds(evidence: &Evidence, kind: Kind, parts: &[&str]) {
        let found = find(evidence);
        assert_eq!(found.kind, kind, "{}", found.evidence);
        for part in parts {
            assert!(found.evidence.contains(part), "{part}: {}", found.evidence);
        }
        assert!(
            found.evidence.ends_with('.') && !found.evidence.ends_with(".."),
            "{}",
            found.evidence
        );
    }

    #[test]
    fn a_client_without_idle_time_is_the_bottleneck() {
        assert_finds(
            &saved("client-cpu"),
            Kind::ClientCpu,
            &["The client took 9", "; the server took "],
        );
    }

    #[test]
    fn a_server_without_idle_time_is_the_bottleneck() {
        // The saved run with the shares of the two processes exchanged.
        let mut evidence = saved("client-cpu");
        let server = evidence.server_cpu.as_mut().unwrap();
        std::mem::swap(&mut server.process, &mut evidence.clients[0].process);
        assert_finds(&evidence, Kind::ServerCpu, &["The server took 9", "; the client took "]);
        // With two threads the same time is half of what it could take.
        server_of(&mut evidence).threads = 2;
        for share in evidence.clients.iter_mut().chain(&mut evidence.server_cpu) {
            share.machine = None;
        }
        assert_finds(&evidence, Kind::None, &["of 2 processors"]);
    }

    fn server_of(evidence: &mut Evidence) -> &mut CpuShare {
        evidence.server_cpu.as_mut().unwrap()
    }

    #[test]
    fn a_machine_without_idle_time_limits_the_process_that_took_most_of_it() {
        let mut evidence = saved("shared-machine");
        let parts =
            ["Their machine had no idle time", "of 2 processors busy", "for other processes"];
        assert_finds(&evidence, Kind::OtherCpu, &parts);
        evidence.clients[0].process = 0.8;
        assert_finds(&evidence, Kind::ClientCpu, &parts);
        evidence.clients[0].process = 0.3;
        server_of(&mut evidence).process = 0.8;
        assert_finds(&evidence, Kind::ServerCpu, &parts);
    }

    #[test]
    fn full_accept_queues_are_the_bottleneck_and_a_few_overflows_are_not() {
        let mut evidence = saved("backlog");
        assert_finds(&evidence, Kind::Backlog, &["ListenOverflows", "retransmitted"]);
        evidence.connects = evidence.queue_drops.unwrap() * CONNECTS_PER_DROP + 1;
        assert_finds(&evidence, Kind::None, &[]);
    }

    #[test]
    fn a_client_without_a_free_port_names_its_ports() {
        assert_finds(&saved("ports"), Kind::Ports, &["5-tuples"]);
    }

    #[test]
    fn descriptors_are_named_on_either_side() {
        assert_finds(&saved("descriptors"), Kind::Descriptors, &["RLIMIT_NOFILE"]);
        let parts = ["The server was ready for 267 connections, bounded by its descriptors"];
        assert_finds(&saved("server-descriptors"), Kind::Descriptors, &parts);
    }

    #[test]
    fn a_failed_accept_says_what_the_server_lacks() {
        for (errno, kind) in
            [("EMFILE", Kind::Descriptors), ("ENOBUFS", Kind::Memory), ("ENOSPC", Kind::Watches)]
        {
            let folder =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records/server-descriptors");
            let mut run = Run::read(&folder).unwrap();
            let server = run.server.as_mut().unwrap();
            server.accept_errors = BTreeMap::from([(errno.to_owned(), 3)]);
            assert_finds(&Evidence::of(&run), kind, &["in 3 accepts"]);
        }
    }

    #[test]
    fn memory_is_named_though_queues_fill_up_for_want_of_it() {
        let evidence = saved("memory");
        assert!(evidence.queue_drops > Some(0), "{evidence:?}");
        assert_finds(&evidence, Kind::Memory, &["memory guard stopped admitting once"]);
    }

    #[test]
    fn a_host_that_does_not_answer_is_a_limit_of_the_network() {
        let mut evidence = saved("network");
        assert_finds(&evidence, Kind::Network, &["ETIMEDOUT", "SYNs were retransmitted"]);
        // The same loss where the target was reached in spite of it.
        (evidence.client_limit, evidence.is_reached) = (None, true);
        assert_finds(&evidence, Kind::Network, &["no accept queue was full"]);
        evidence.server = None;
        assert_finds(&evidence, Kind::Network, &["is not known"]);
    }

    #[test]
    fn a_run_at_a_given_rate_that_reaches_its_target_has_no_bottleneck() {
        let parts = [
            "nothing was saturated",
            "The client took ",
            "the server took ",
            "no accept queue was full",
        ];
        assert_finds(&saved("none"), Kind::None, &parts);
    }

    #[test]
    fn what_is_not_recorded_is_unknown_and_never_nothing() {
        let mut evidence = saved("none");
        evidence.server_cpu = None;
        assert_finds(&evidence, Kind::Unknown, &["of the server is not known"]);
        evidence.clients.clear();
        assert_finds(&evidence, Kind::Unknown, &["no processor time"]);
        evidence.is_reached = false;
        assert_finds(&evidence, Kind::Unknown, &["not reached"]);
        assert_finds(&Evidence::default(), Kind::Unknown, &[]);
    }

    #[test]
    fn a_bound_that_the_server_was_given_is_not_taken_for_one_of_the_machine() {
        let mut evidence = saved("server-descriptors");
        evidence.server.as_mut().unwrap().limit = None;
        assert_finds(&evidence, Kind::Server, &["past the 267"]);
        evidence.server = None;
        assert_finds(&evidence, Kind::Server, &["The client reports: "]);
    }

    #[test]
    fn invalid_times_give_no_share() {
        let point = |process_seconds| CpuPoint { process_seconds, ..CpuPoint::default() };
        for until in [0.0, -1.0, 0.05, f64::NAN, f64::INFINITY] {
            let share = CpuShare::between("x", (0.0, point(0.0)), (until, point(1.0)), 1, None);
            assert_eq!(share, None, "{until}");
        }
        let share =
            CpuShare::between("x", (0.0, point(9.0)), (1.0, point(1.0)), 0, Some(0)).unwrap();
        assert_eq!((share.process, share.threads, share.processors), (0.0, 1, None));
    }
}
