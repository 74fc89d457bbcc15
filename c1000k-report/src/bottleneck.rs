//! What limited a run, with the evidence.
//!
//! A limit that a program reached and named comes first. Otherwise it is what limited the rate of the ramp: the accept
//! queues, a processor, or the maximum of connects in flight.

use std::fmt;

use c1000k_host::format;
use c1000k_record::{ClientRecord, Limit, ServerPoint, ServerRecord};
use serde::Serialize;

use crate::cost::float;
use crate::run::Run;

/// A thread that is busy for this share of the time is saturated.
const BUSY: f64 = 0.9;

/// The same for all processors of a machine.
const MACHINE_BUSY: f64 = 0.95;

/// If other processes took more than this share of a busy machine, they are the limit.
const OTHERS_SHARE: f64 = 0.5;

/// Over a shorter ramp, the resolution of the kernel's CPU times is too low.
const RAMP_SECONDS_MIN: f64 = 0.1;

/// A shorter ramp gives no basis for what limited its rate.
const RAMP_SECONDS_TO_JUDGE_MIN: f64 = 1.0;

/// Overflows of accept queues, as a share of the accepted connections, from which on they are significant.
const OVERFLOWS_SHARE: f64 = 0.001;

/// If this share of the maximum of connects in flight was in use, it explains the rate together with their latency.
const IN_FLIGHT_SHARE: f64 = 0.7;

/// The share of the peak at which the ramp counts as over for the server: the last connections may be late.
const PEAK_SHARE: f64 = 0.98;

/// What limited a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bottleneck {
    /// CPU time of the client's thread.
    ClientCpu,
    /// CPU time of the server's threads.
    ServerCpu,
    /// CPU time of other processes on a machine of the run.
    OtherCpu,
    /// The server's accept queues.
    Backlog,
    /// 5-tuples.
    Ports,
    /// Descriptors of a process or of the system.
    Descriptors,
    /// Memory of the kernel or of the server.
    Memory,
    /// The network between client and server.
    Network,
    /// A bound that was configured for the server.
    ServerBound,
    /// The requested rate.
    Asked,
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClientCpu => "the client's CPU",
            Self::ServerCpu => "the server's CPU",
            Self::OtherCpu => "other processes on the machine",
            Self::Backlog => "the server's accept queues",
            Self::Ports => "ports",
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::Network => "the network",
            Self::ServerBound => "a bound of the server",
            Self::Asked => "the requested rate",
        })
    }
}

/// What limited a run, with the evidence in one sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The limit.
    pub bottleneck: Bottleneck,
    /// The evidence.
    pub evidence: String,
}

/// What limited the run; `None` if no figure shows it.
#[must_use]
pub fn find(run: &Run) -> Option<Finding> {
    let server = run.server.as_ref();
    let clients = || run.clients.iter().map(|(_, client)| client);
    clients()
        .find_map(|client| met(client, server))
        .or_else(|| overflows(clients().any(|client| client.retried > 0), server?))
        .or_else(|| clients().find_map(|client| speed(client, server, run.is_one_kernel())))
}

fn finding(bottleneck: Bottleneck, evidence: impl Into<String>) -> Option<Finding> {
    Some(Finding { bottleneck, evidence: evidence.into() })
}

/// A limit that the client reached, or that the server reached if the client saw only its refusals.
fn met(client: &ClientRecord, server: Option<&ServerRecord>) -> Option<Finding> {
    let detail =
        || client.limit_detail.clone().unwrap_or_else(|| "by the client's record".to_owned());
    // For the client, a full queue looks like a network without answers, or like a server that refuses.
    let queues = || overflows(true, server?);
    match client.limit? {
        Limit::Descriptors => finding(Bottleneck::Descriptors, detail()),
        Limit::Ports => finding(Bottleneck::Ports, detail()),
        Limit::Memory | Limit::Watches => finding(Bottleneck::Memory, detail()),
        Limit::Network => queues().or_else(|| finding(Bottleneck::Network, detail())),
        Limit::Server => server
            .and_then(of_server)
            .or_else(queues)
            .or_else(|| finding(Bottleneck::ServerBound, detail())),
        _ => None,
    }
}

/// Why the server refused connections.
fn of_server(server: &ServerRecord) -> Option<Finding> {
    if let Some(guard) = server.memory_guard.filter(|guard| guard.closings > 0) {
        let times = format::counted(guard.closings, "time");
        let room = format::bytes(guard.room_min_bytes);
        let evidence =
            format!("the server's memory guard closed {times}; at least {room} were free");
        return finding(Bottleneck::Memory, evidence);
    }
    for name in ["EMFILE", "ENFILE"] {
        if let Some(&count) = server.accept_errors.get(name) {
            let times = format::counted(count, "time");
            let evidence = format!("the server failed to accept {times}: {name}");
            return finding(Bottleneck::Descriptors, evidence);
        }
    }
    for name in ["ENOMEM", "ENOBUFS"] {
        if let Some(&count) = server.accept_errors.get(name) {
            let times = format::counted(count, "time");
            let evidence = format!("the server failed to accept {times}: {name}");
            return finding(Bottleneck::Memory, evidence);
        }
    }
    let is_full = server.peak >= server.connections_max && server.refused > 0;
    let bound = format::count(server.connections_max);
    is_full.then(|| Finding {
        bottleneck: Bottleneck::ServerBound,
        evidence: format!("the server reached its maximum of connections: {bound}"),
    })
}

/// Full accept queues.
fn overflows(had_retries: bool, server: &ServerRecord) -> Option<Finding> {
    let overflows = *server.counters.get("ListenOverflows")?;
    let share = float(overflows) / float(server.accepted.max(1));
    let is_many = share >= OVERFLOWS_SHARE || (had_retries && overflows > 0);
    let times = format::counted(overflows, "time");
    is_many.then(|| Finding {
        bottleneck: Bottleneck::Backlog,
        evidence: format!(
            "an accept queue was full {times} (ListenOverflows); a longer --backlog (net.core.somaxconn), more ports or \
             fewer --in-flight help"
        ),
    })
}

/// What limited the rate of the ramp; `None` if it was interrupted or too short.
fn speed(
    client: &ClientRecord,
    server: Option<&ServerRecord>,
    is_one_machine: bool,
) -> Option<Finding> {
    let is_short = client.ramp_seconds < RAMP_SECONDS_TO_JUDGE_MIN;
    if is_short || client.limit == Some(Limit::Interrupted) {
        return None;
    }
    let client_busy = client.ramp_cpu_seconds.map(|cpu| cpu / client.ramp_seconds.max(1e-9));
    let server_busy = server.and_then(busy_share);
    let shares = busy_text(client_busy, server_busy);
    let [client_busy, server_busy] = [client_busy, server_busy].map(|busy| busy.unwrap_or(0.0));
    if client_busy >= BUSY && client_busy >= server_busy {
        return finding(Bottleneck::ClientCpu, shares);
    }
    if server_busy >= BUSY {
        return finding(Bottleneck::ServerCpu, shares);
    }
    if client.has_rate {
        return finding(Bottleneck::Asked, shares);
    }
    let threads = server.map_or(0.0, |server| float(server.threads.max(1)));
    let used = [client_busy, server_busy * threads];
    if let Some(found) = busy_machine(client, server, is_one_machine, used, &shares) {
        return Some(found);
    }
    let latency = float(client.connect_latency_us.p50?) / 1e6;
    let explained = latency * client.connects_per_second / float(client.in_flight_max?.max(1));
    (explained >= IN_FLIGHT_SHARE).then(|| Finding {
        bottleneck: Bottleneck::Network,
        evidence: format!(
            "{shares}; {} in flight with a median latency of {}, allow {} a second; a higher --in-flight is \
             faster",
            format::counted(client.in_flight_max.unwrap_or(0), "connect"),
            format::duration(latency),
            format::count(format::rounded(float(client.in_flight_max.unwrap_or(0)) / latency))
        ),
    })
}

/// How busy client and server were, as a clause.
fn busy_text(client: Option<f64>, server: Option<f64>) -> String {
    let [client, server] =
        [client, server].map(|busy| busy.map(|busy| format::percent(busy.min(1.0))));
    match (client, server) {
        (Some(client), Some(server)) => format!(
            "during the ramp the client was busy for {client} of the time, the server for {server}"
        ),
        (Some(client), None) => format!(
            "during the ramp the client was busy for {client} of the time; the server's share is unknown"
        ),
        (None, Some(server)) => format!(
            "during the ramp the server was busy for {server} of the time; the client's share is unknown"
        ),
        (None, None) => "how busy client and server were is unknown".to_owned(),
    }
}

/// A machine whose processors were all busy, by the processors that client and server used.
fn busy_machine(
    client: &ClientRecord,
    server: Option<&ServerRecord>,
    is_one_machine: bool,
    [client_used, server_used]: [f64; 2],
    shares: &str,
) -> Option<Finding> {
    let of_client = machine_shares(client).zip(client.processors);
    let of_server = server.and_then(|server| server_machine_shares(server).zip(server.processors));
    let used = client_used + server_used;
    let (machine, ([busy, softirq], processors), used) = if is_one_machine {
        ("the machine", of_client.or(of_server)?, used)
    } else {
        let client = of_client.map(|shares| ("the client's machine", shares, client_used));
        let server = of_server.map(|shares| ("the server's machine", shares, server_used));
        [client, server].into_iter().flatten().max_by(|a, b| a.1.0[0].total_cmp(&b.1.0[0]))?
    };
    if busy < MACHINE_BUSY {
        return None;
    }
    // Soft interrupts handle the packets of the run.
    let others = (1.0 - (used / float(processors) + softirq) / busy).clamp(0.0, 1.0);
    let bottleneck = if others > OTHERS_SHARE {
        Bottleneck::OtherCpu
    } else if server_used > client_used && (is_one_machine || machine == "the server's machine") {
        Bottleneck::ServerCpu
    } else {
        Bottleneck::ClientCpu
    };
    finding(
        bottleneck,
        format!(
            "{shares}; all processors of {machine} were busy for {}, with {} of that for other processes",
            format::percent(busy.min(1.0)),
            format::percent(others)
        ),
    )
}

/// The share of the time of all processors of the client's machine that they were busy during the ramp, and in soft
/// interrupts.
pub(crate) fn machine_shares(client: &ClientRecord) -> Option<[f64; 2]> {
    let (first, last) = (client.ramp_series.first()?, client.ramp_series.last()?);
    let seconds = last.seconds - first.seconds;
    let busy = last.machine_busy_seconds? - first.machine_busy_seconds?;
    let softirq = last.machine_softirq_seconds? - first.machine_softirq_seconds?;
    shares_of(client.processors?, seconds, [busy, softirq])
}

/// The same for the server's machine.
fn server_machine_shares(server: &ServerRecord) -> Option<[f64; 2]> {
    let (first, last) = ramp_points(server)?;
    let busy = last.machine_busy_seconds? - first.machine_busy_seconds?;
    let softirq = last.machine_softirq_seconds? - first.machine_softirq_seconds?;
    shares_of(server.processors?, last.seconds - first.seconds, [busy, softirq])
}

fn shares_of(processors: u64, seconds: f64, times: [f64; 2]) -> Option<[f64; 2]> {
    let shares = times.map(|time| time / (seconds * float(processors)));
    let is_known = seconds >= RAMP_SECONDS_MIN && shares.iter().all(|share| share.is_finite());
    is_known.then_some(shares)
}

/// The share of the time that each of the server's threads was busy during the ramp.
pub(crate) fn busy_share(server: &ServerRecord) -> Option<f64> {
    let (first, last) = ramp_points(server)?;
    let cpu = last.cpu_seconds? - first.cpu_seconds?;
    let seconds = (last.seconds - first.seconds).max(1e-9);
    Some(cpu / seconds / float(server.threads.max(1)))
}

/// The server's samples before its first connection and at the end of the ramp.
fn ramp_points(server: &ServerRecord) -> Option<(&ServerPoint, &ServerPoint)> {
    let enough = float(server.peak) * PEAK_SHARE;
    let before = server.series.iter().rposition(|point| point.open == 0 && point.seconds >= 0.0);
    let end = server.series.iter().position(|point| float(point.open) >= enough)?;
    let before = before
        .filter(|&before| before < end)
        .or_else(|| server.series[..end].iter().rposition(|point| point.open == 0))?;
    Some((&server.series[before], &server.series[end]))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn client(more: Value) -> ClientRecord {
        let mut record = json!({
            "schema": "c1000k.client/1", "target": 1000, "attempted": 1000, "established": 1000,
            "verified": 1000, "failed": 0, "failures": {}, "lost": 0, "limit": null,
            "ramp_seconds": 10.0, "connects_per_second": 100.0,
            "connect_latency_us": { "p50": 1000 }, "verdict": "reached"
        });
        merge(&mut record, more);
        serde_json::from_value(record).expect("a record")
    }

    fn server(more: Value) -> ServerRecord {
        let mut record = json!({
            "schema": "c1000k.server/1", "accepted": 1000, "peak": 1000, "open": 0, "refused": 0,
            "closed": 1000, "stale_events": 0, "accept_errors": {}, "bytes_in": 0, "bytes_out": 0,
            "user_bytes_per_connection": null, "kernel_bytes_per_connection": null,
            "rss_peak_bytes": null, "cpu_user_seconds": 1.0, "cpu_system_seconds": 1.0,
            "threads": 1, "connections_max": 5000
        });
        merge(&mut record, more);
        serde_json::from_value(record).expect("a record")
    }

    fn merge(record: &mut Value, more: Value) {
        let (Value::Object(record), Value::Object(more)) = (record, more) else { return };
        record.extend(more);
    }

    /// A ramp of ten seconds that begins after five.
    fn series(cpu: f64) -> Value {
        let point = |seconds: f64, open: u64, cpu: f64| {
            json!({ "seconds": seconds, "open": open, "rss_bytes": null,
                    "kernel_socket_bytes": null, "cpu_seconds": cpu })
        };
        json!({ "series": [point(0.0, 0, 0.1), point(5.0, 0, 0.2), point(10.0, 600, 0.2 + cpu / 2.0),
                           point(15.0, 1000, 0.2 + cpu), point(25.0, 0, 0.3 + cpu)] })
    }

    fn found(client: ClientRecord, server: ServerRecord) -> Option<(Bottleneck, String)> {
        let mut run = Run::default();
        run.clients = vec![("client".to_owned(), client)];
        run.server = Some(server);
        find(&run).map(|finding| (finding.bottleneck, finding.evidence))
    }

    #[test]
    fn each_limit_is_named_with_its_evidence() {
        let plain = || server(json!({}));
        let limited = |limit: &str| client(json!({ "limit": limit, "limit_detail": "so it is" }));
        for (limit, bottleneck) in [
            ("descriptors", Bottleneck::Descriptors),
            ("ports", Bottleneck::Ports),
            ("memory", Bottleneck::Memory),
            ("network", Bottleneck::Network),
            ("server", Bottleneck::ServerBound),
        ] {
            let (named, evidence) = found(limited(limit), plain()).expect(limit);
            assert_eq!((named, evidence.as_str()), (bottleneck, "so it is"), "{limit}");
        }
        assert_eq!(found(limited("interrupted"), plain()), None);
    }

    #[test]
    fn why_a_server_refused_is_known_from_its_record() {
        let refused = || client(json!({ "limit": "server" }));
        let guard = json!({ "closed": true, "closings": 2, "closed_seconds": 1.0, "looks": 9,
            "reserve_bytes": 1, "room_bytes": 1, "room_min_bytes": 70_000_000, "bytes_per_connection": 1 });
        for (more, bottleneck, part) in [
            (
                json!({ "memory_guard": guard }),
                Bottleneck::Memory,
                "closed 2 times; at least 70.0 MB",
            ),
            (
                json!({ "accept_errors": { "EMFILE": 7 } }),
                Bottleneck::Descriptors,
                "accept 7 times",
            ),
            (json!({ "accept_errors": { "ENOBUFS": 1 } }), Bottleneck::Memory, "ENOBUFS"),
            (json!({ "connections_max": 1000, "refused": 5 }), Bottleneck::ServerBound, "1,000"),
        ] {
            let (named, evidence) = found(refused(), server(more)).expect(part);
            assert!(named == bottleneck && evidence.contains(part), "{part}: {named:?} {evidence}");
        }
    }

    #[test]
    fn full_accept_queues_are_known_from_the_kernels_counter() {
        let overflowed = |count: u64| server(json!({ "counters": { "ListenOverflows": count } }));
        let (named, evidence) = found(client(json!({})), overflowed(50)).expect("it overflowed");
        assert!(named == Bottleneck::Backlog && evidence.contains("50 times"), "{evidence}");
        assert_eq!(found(client(json!({})), overflowed(0)), None);
    }

    #[test]
    fn the_busier_thread_limited_the_rate() {
        let busy = |client_cpu: f64, server_cpu: f64| {
            found(client(json!({ "ramp_cpu_seconds": client_cpu })), server(series(server_cpu)))
        };
        let (named, evidence) = busy(9.7, 6.0).expect("the client is busy");
        assert!(named == Bottleneck::ClientCpu && evidence.contains("97"), "{evidence}");
        assert!(evidence.contains("60"), "{evidence}");
        assert_eq!(busy(6.0, 9.7).map(|found| found.0), Some(Bottleneck::ServerCpu));
        assert_eq!(busy(5.0, 5.0), None, "nothing was saturated");
        let threads = json!({ "threads": 2 });
        let mut two = series(9.7);
        merge(&mut two, threads);
        assert_eq!(found(client(json!({ "ramp_cpu_seconds": 1.0 })), server(two)), None);
    }

    #[test]
    fn a_busy_machine_is_a_limit_by_what_used_most_of_it() {
        // Of two processors over ten seconds.
        let on_machine = |busy: f64, softirq: f64, cpu: f64| {
            let point = |seconds: f64, established: u64| {
                let share = seconds / 10.0;
                json!({ "seconds": seconds, "established": established,
                    "machine_busy_seconds": 7.0 + busy * share,
                    "machine_softirq_seconds": 3.0 + softirq * share })
            };
            client(json!({ "ramp_cpu_seconds": cpu, "processors": 2,
                "ramp_series": [point(0.0, 0), point(10.0, 1000)] }))
        };
        let (named, evidence) = found(on_machine(20.0, 2.0, 2.0), server(series(1.0))).unwrap();
        assert_eq!(named, Bottleneck::OtherCpu, "{evidence}");
        assert!(
            evidence.contains("the machine were busy for 100.0%")
                && evidence.contains("75.0% of that for other"),
            "{evidence}"
        );
        for (busy, softirq, client, server_cpu, named) in [
            (20.0, 2.0, 8.0, 5.0, Some(Bottleneck::ClientCpu)),
            (20.0, 2.0, 5.0, 8.0, Some(Bottleneck::ServerCpu)),
            (20.0, 12.0, 2.0, 1.0, Some(Bottleneck::ClientCpu)),
            (18.9, 2.0, 2.0, 1.0, None),
            (20.0, 2.0, 9.5, 1.0, Some(Bottleneck::ClientCpu)),
        ] {
            let outcome = found(on_machine(busy, softirq, client), server(series(server_cpu)));
            assert_eq!(outcome.map(|found| found.0), named, "{busy} {softirq} {client}");
        }
        let unknown = client(json!({ "ramp_cpu_seconds": 1.0, "processors": 2,
            "ramp_series": [{ "seconds": 0.0, "established": 0 }] }));
        assert_eq!(found(unknown, server(series(1.0))), None);
    }

    #[test]
    fn an_interrupted_or_short_ramp_is_no_basis() {
        for (more, is_found) in [
            (json!({}), true),
            (json!({ "limit": "interrupted", "verdict": "short" }), false),
            (json!({ "ramp_seconds": 0.9 }), false),
        ] {
            let mut busy = json!({ "ramp_cpu_seconds": 9.9 });
            merge(&mut busy, more.clone());
            assert_eq!(found(client(busy), server(json!({}))).is_some(), is_found, "{more}");
        }
    }

    #[test]
    fn a_share_that_is_not_known_is_not_zero() {
        let rate = json!({ "has_rate": true });
        let (_, evidence) = found(client(rate.clone()), server(json!({}))).unwrap();
        assert!(evidence.ends_with("is unknown") && !evidence.contains('%'), "{evidence}");
        let (_, evidence) = found(client(rate), server(series(2.0))).unwrap();
        assert!(
            evidence.contains("server was busy for 20.0% of the time; the client's"),
            "{evidence}"
        );
        let alone = client(json!({ "ramp_cpu_seconds": 9.5 }));
        let evidence = speed(&alone, None, true).unwrap().evidence;
        assert!(evidence.contains("busy for 95.0% of the time; the server's"), "{evidence}");
    }

    #[test]
    fn a_busy_machine_of_the_server_is_named_as_such() {
        let mut run = Run::default();
        run.machine.0 = vec![("topology".to_owned(), "three-hosts".to_owned())];
        run.clients = vec![("client-1".to_owned(), client(json!({ "ramp_cpu_seconds": 1.0 })))];
        let mut record = server(series(8.0));
        record.processors = Some(1);
        for point in &mut record.series {
            point.machine_busy_seconds = Some(point.seconds);
            point.machine_softirq_seconds = Some(0.0);
        }
        run.server = Some(record);
        let found = find(&run).expect("its machine is busy");
        assert_eq!(found.bottleneck, Bottleneck::ServerCpu);
        assert!(found.evidence.contains("processors of the server's machine"), "{found:?}");
    }

    #[test]
    fn latency_or_the_requested_rate_explains_the_rate() {
        let waiting = json!({ "in_flight_max": 8, "connect_latency_us": { "p50": 76_000 } });
        let (named, evidence) = found(client(waiting), server(series(1.0))).expect("it waited");
        assert!(named == Bottleneck::Network && evidence.contains("8 connects"), "{evidence}");
        let asked = client(json!({ "has_rate": true }));
        let (named, _) = found(asked, server(series(1.0))).expect("a rate was asked for");
        assert_eq!(named, Bottleneck::Asked);
    }
}
