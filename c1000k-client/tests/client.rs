//! The real client against servers in this process.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its report")]

mod common;
#[path = "client/servers.rs"]
mod servers;
#[path = "client/stateless.rs"]
mod stateless;
#[path = "client/targets.rs"]
mod targets;
#[path = "client/unix.rs"]
mod unix;
#[path = "client/workload.rs"]
mod workload;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use c1000k_record::{ClientRecord, Limit, Verdict};
use common::{Client, Ended, Manner, Server, record, run};
use nix::sys::signal::Signal;
use proptest::prelude::*;
use reactor::FileTable;

fn error_line(ended: &Ended) -> &str {
    ended.stderr.last().map_or("", String::as_str)
}

fn failures<const N: usize>(counts: [(&str, u64); N]) -> BTreeMap<String, u64> {
    counts.map(|(name, count)| (name.to_owned(), count)).into()
}

#[test]
fn all_connections_are_held_and_verified_twice() {
    let server = Server::start(Manner::Echo, 3);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 3 -c 2k --hold 100ms", server.first_port));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!((record.target, record.attempted, record.established), (2_000, 2_000, 2_000));
    assert_eq!((record.verified, record.failed, record.lost), (Some(2_000), 0, 0));
    assert_eq!(record.verified_passes, [2_000, 2_000]);
    assert_eq!(record.verify_seconds.len(), 2);
    assert_eq!((record.verdict, record.limit), (Verdict::Reached, None));
    assert_eq!(record.failures, failures([]));
    assert!(record.hold_seconds >= 0.1, "{record:?}");
    assert!(record.connect_latency_us.p50 <= record.connect_latency_us.max);
    assert!(record.connect_latency_us.max > Some(0), "{record:?}");
    assert_eq!(record.ramp_series.last().unwrap().established, 2_000);
    assert!(ended.stderr.iter().any(|line| line == "holding 2,000 connections for 0.1 s"));
    assert!(ended.stderr.iter().any(|line| line == "proving 2,000 connections again"));
    assert!(ended.stderr.iter().any(|line| line.starts_with("REACHED: 2,000 of 2,000")));
    assert_eq!(time_waits(server.first_port), 0);
    assert_eq!(server.die(), 2_000);
}

/// The number of connections in TIME_WAIT with that local or remote port.
fn time_waits(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let is_waiting = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let end = format!(":{port:04X}");
        (fields[1].ends_with(&end) || fields[2].ends_with(&end)) && fields[3] == "06"
    };
    table.lines().skip(1).filter(is_waiting).count()
}

#[test]
fn the_record_has_the_fields_of_the_contract() {
    let server = Server::start(Manner::Echo, 1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("record.json");
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 10 --hold 0s --json {}",
        server.first_port,
        path.display()
    );
    // The record's times have milliseconds.
    let began = SystemTime::now() - Duration::from_millis(1);
    let ended = Client::start(&words).end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.starts_with("REACHED: 10 of 10"), "{ended:?}");
    let text = std::fs::read_to_string(path).unwrap();
    let record: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["schema"], "c1000k.client/1");
    assert_eq!(record["verdict"], "reached");
    assert!(record["limit"].is_null());
    let table = &record["file_table"];
    assert!(table == "process" || table == "registered", "{table}");
    for name in ["target", "attempted", "established", "verified", "failed", "lost"] {
        assert!(record[name].is_u64(), "{name}: {record}");
    }
    for name in ["ramp_seconds", "connects_per_second"] {
        assert!(record[name].is_f64(), "{name}: {record}");
    }
    for name in ["p50", "p90", "p99", "p999", "max"] {
        assert!(record["connect_latency_us"][name].is_u64(), "{name}: {record}");
    }
    assert!(record["failures"].is_object());
    let record: ClientRecord = serde_json::from_value(record).unwrap();
    let (from, until) = record.held_between().unwrap();
    assert!(record.held_from.is_some() && record.held_until.is_some());
    assert!(began <= from && from <= until && until <= SystemTime::now(), "{record:?}");
}

#[test]
fn a_record_that_cannot_be_written_is_printed_on_standard_error_after_the_summary() {
    let server = Server::start(Manner::Echo, 1);
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let path = gone.join("record.json");
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 10 --hold 2s --json {}",
        server.first_port,
        path.display()
    );
    let mut client = Client::start(&words);
    client.await_line("holding ");
    std::fs::remove_dir(&gone).unwrap();
    let ended = client.end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.starts_with("REACHED: 10 of 10"), "{ended:?}");
    let at = |text: &str| ended.stderr.iter().position(|line| line == text).unwrap();
    let printed = ended.stderr[at("{")..=at("}")].join("\n");
    let record: ClientRecord = serde_json::from_str(&printed).unwrap();
    assert_eq!((record.established, record.verified), (10, Some(10)));
    let line = ended.stderr.last().unwrap();
    let expected = format!("cannot write the record to {}", path.display());
    assert!(line.contains(&expected) && line.contains("printed"), "{line}");
}

#[test]
fn a_record_whose_reader_has_gone_is_printed_on_standard_error() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 10 --hold 10ms --json -", server.first_port);
    let ended = Client::start_after("exec 1> >(:); wait $!", &words).end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let line = ended.stderr.last().unwrap();
    let expected = "cannot write the record to standard output: ";
    assert!(line.contains(expected) && line.contains("printed"), "{line}");
    assert!(ended.stderr.iter().any(|line| line.contains("\"c1000k.client/1\"")), "{ended:?}");
}

#[test]
fn a_record_that_standard_output_would_lose_is_a_warning_and_one_that_it_refuses_an_error() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 10 --hold 10ms --json -", server.first_port);
    // A program that is started without a standard output, and the `/dev/null` that some languages open for a child.
    for nowhere in ["exec 1>&-", "exec 1<>/dev/null"] {
        let ended = Client::start_after(nowhere, &words).end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let first = "c1000k-client: standard output was closed at the start or is /dev/null: ";
        assert!(ended.stderr[0].starts_with(first), "{ended:?}");
    }
    let ended = Client::start_after("exec 1>/dev/null", &words).end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stderr.iter().any(|line| line.contains("/dev/null")), "{ended:?}");

    for (nothing, remedy) in
        [("exec 1</dev/null", "use a file with --json"), ("exec 1>/dev/full", "make room there")]
    {
        let ended = Client::start_after(nothing, &words).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(1), 1), "{ended:?}");
        let line = error_line(&ended);
        assert!(line.contains("cannot write the record to standard output: "), "{line}");
        assert!(line.contains(remedy), "{line}");
    }
}

#[test]
fn a_summary_for_a_full_standard_output_goes_to_standard_error_and_is_an_error() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 10 --hold 10ms", server.first_port);
    let ended = Client::start_after("exec 1>/dev/full", &words).end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.iter().any(|line| line.starts_with("REACHED: 10 of 10")), "{ended:?}");
    let line = error_line(&ended);
    assert!(line.starts_with("c1000k-client: cannot write to standard output: "), "{line}");
    assert!(line.contains("printed on standard error instead"), "{line}");
}

#[test]
fn a_file_that_is_standard_output_keeps_its_record_by_either_name() {
    let server = Server::start(Manner::Echo, 1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    for name in ["-", "/dev/stdout"] {
        let words =
            format!("127.0.0.1 {} --ports 1 -c 10 --hold 10ms --json {name}", server.first_port);
        let ended = Client::start_after(&format!("exec 1>'{}'", path.display()), &words).end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stderr.iter().any(|line| line.starts_with("REACHED: 10 of 10")), "{ended:?}");
        let record = ClientRecord::read(&path).unwrap();
        assert_eq!(record.established, 10);
    }
    let words = format!("127.0.0.1 {} --ports 1 -c 10 --json /dev/stdout", server.first_port);
    let ended = Client::start_after("exec 1</dev/null", &words).end();
    assert_eq!((ended.code, ended.stderr.len()), (Some(1), 1), "{ended:?}");
}

#[test]
fn an_echo_in_pieces_is_an_echo() {
    let server = Server::start(Manner::Dribble, 1);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 1 -c 50 --hold 10ms", server.first_port));
    assert_eq!((ended.code, record.verified), (Some(0), Some(50)), "{ended:?}");
}

#[test]
fn a_full_server_is_the_limit_and_the_accepted_connections_are_held_and_verified() {
    for manner in [Manner::RefusePast(300), Manner::HangUpPast(300)] {
        let server = Server::start(manner, 2);
        let words = format!("127.0.0.1 {} --ports 2 --hold 10ms", server.first_port);
        let (ended, record) = run(&words);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!((record.target, record.established), (300, 300), "{ended:?}");
        assert_eq!((record.verified, record.failed, record.lost), (Some(300), 0, 0), "{ended:?}");
        assert_eq!((record.verdict, record.limit), (Verdict::Reached, Some(Limit::Server)));
        assert!(record.limit_detail.unwrap().contains("the server was the limit"));
        assert!(record.refused_by_server >= 100);

        let (ended, record) = run(&format!("{words} -c 400"));
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert_eq!((record.target, record.established), (400, 300), "{ended:?}");
        assert_eq!((record.verified, record.lost), (Some(300), 0), "{ended:?}");
        assert!((1..=100).contains(&record.failed), "{ended:?}");
        assert_eq!((record.verdict, record.limit), (Verdict::Short, Some(Limit::Server)));
    }
}

#[test]
fn where_both_ends_have_the_same_limit_both_are_named() {
    let server = Server::start(Manner::RefusePast(210), 2);
    let words = format!(
        "127.0.0.1 {} --ports 2 --file-table process --hold 10ms --json -",
        server.first_port
    );
    let ended = Client::start_after("ulimit -n 256", &words).end();
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(0), Some(Limit::Server)), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    let parts = [
        "the server was the limit",
        "; the client's own limit is next: 22",
        "RLIMIT_NOFILE is 256",
    ];
    assert!(parts.iter().all(|part| detail.contains(part)), "{detail}");
}

#[test]
fn a_full_server_is_the_limit_without_verification_too() {
    let server = Server::start(Manner::RefusePast(300), 2);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 2 --hold 10ms --no-verify", server.first_port));
    assert_eq!((ended.code, record.limit), (Some(0), Some(Limit::Server)), "{ended:?}");
    assert_eq!((record.established, record.verified), (300, None), "{ended:?}");
    assert_eq!(record.lost, 0);
}

#[test]
fn a_server_that_dies_during_the_hold_is_reported_within_seconds() {
    let server = Server::start(Manner::Echo, 2);
    let words = format!("127.0.0.1 {} --ports 2 -c 500 --hold 50s --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_line("holding ");
    let died = Instant::now();
    assert_eq!(server.die(), 500);
    let ended = client.end();
    assert!(died.elapsed() < Duration::from_secs(10), "{:?}", died.elapsed());
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!((record.established, record.lost), (500, 500));
    assert_eq!((record.verified, record.verdict), (Some(0), Verdict::Short));
    let detail = record.limit_detail.unwrap();
    assert!(detail.contains("most connections were lost: 500 of 500 connections lost"), "{detail}");
}

#[test]
fn a_server_that_dies_during_the_ramp_is_reported_within_seconds() {
    let server = Server::start(Manner::Echo, 2);
    let words =
        format!("127.0.0.1 {} --ports 2 -c 5000 --rate 100 --hold 50s --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_some_held();
    let died = Instant::now();
    server.die();
    let ended = client.end();
    assert!(died.elapsed() < Duration::from_secs(10), "{:?}", died.elapsed());
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert!(record.established > 0 && record.lost == record.established, "{ended:?}");
    assert!(record.limit_detail.unwrap().contains("most connections were lost"), "{ended:?}");
}

#[test]
fn where_nothing_listens_one_line_says_so() {
    let server = Server::start(Manner::Echo, 3);
    let port = server.first_port;
    server.die();
    let (ended, record) = run(&format!("127.0.0.1 {port} --ports 3"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let start = format!("c1000k-client: nothing listens on 127.0.0.1:{port}-{}: ", port + 2);
    assert!(error_line(&ended).starts_with(&start), "{ended:?}");
    assert_eq!((record.established, record.verified), (0, Some(0)));
    assert_eq!((record.verdict, record.limit), (Verdict::Short, Some(Limit::Server)));
    let refusals: Vec<_> = record.failures.into_iter().collect();
    assert!(matches!(&refusals[..], [(name, 9..=300)] if name == "ECONNREFUSED"), "{refusals:?}");
}

#[test]
fn ports_without_a_listener_are_not_used() {
    let server = Server::start(Manner::Echo, 1);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 20 -c 500 --hold 10ms", server.first_port));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!((record.established, record.verified, record.failed), (500, Some(500), 0));
    assert!(record.failures["ECONNREFUSED"] >= 19, "{ended:?}");
    assert!(ended.stderr.iter().any(|line| line.contains("nothing listens on ")), "{ended:?}");
}

/// Linux drops packets for a full backlog: some connections open and stay silent, others never open.
#[test]
fn a_black_hole_ends_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    shorten_backlog(&listener);
    let port = listener.local_addr().unwrap().port();
    let began = Instant::now();
    let (ended, record) =
        run(&format!("127.0.0.1 {port} --ports 1 -c 100 --connect-timeout 300ms --hold 50s"));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!((ended.code, record.verdict), (Some(1), Verdict::Short), "{ended:?}");
    assert_eq!((record.established, record.failed), (0, 100), "{ended:?}");
    assert!(record.failures["ETIMEDOUT"] >= 64, "{ended:?}");
    assert!(matches!(record.limit, Some(Limit::Server | Limit::Network)), "{ended:?}");
    assert!(error_line(&ended).starts_with("c1000k-client: "), "{ended:?}");
}

/// A second `listen` makes the backlog as short as possible.
fn shorten_backlog(listener: &TcpListener) {
    let backlog = nix::sys::socket::Backlog::new(1).unwrap();
    nix::sys::socket::listen(listener, backlog).unwrap();
}

#[test]
fn a_server_that_never_answers_is_reported() {
    let server = Server::start(Manner::SilentPast(0), 1);
    let (ended, record) = run(&format!(
        "127.0.0.1 {} --ports 1 -c 50 --connect-timeout 300ms --hold 50s",
        server.first_port
    ));
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert!(error_line(&ended).contains("does not answer"), "{ended:?}");
}

#[test]
fn a_part_of_an_echo_is_distinguished_from_none() {
    for (manner, seen) in [
        (Manner::Halve, "sends only a part of the echo"),
        (Manner::HalveAndClose, "ends every connection after a part of its echo"),
    ] {
        let server = Server::start(manner, 1);
        let (ended, record) = run(&format!(
            "127.0.0.1 {} --ports 1 -c 50 --connect-timeout 300ms --hold 50s",
            server.first_port
        ));
        assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
        assert_eq!((record.established, record.verified), (0, Some(0)), "{ended:?}");
        let line = error_line(&ended);
        assert!(line.contains(seen) && line.contains("--no-verify"), "{line}");
    }
}

/// Like a server without descriptors: connections that it can't accept wait in its backlog.
#[test]
fn a_server_that_answers_only_some_connections_is_the_limit() {
    let server = Server::start(Manner::SilentPast(100), 1);
    let words =
        format!("127.0.0.1 {} --ports 1 --connect-timeout 300ms --hold 10ms", server.first_port);
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.limit), (Some(0), Some(Limit::Server)), "{ended:?}");
    assert_eq!((record.target, record.verified, record.lost), (100, Some(100), 0), "{ended:?}");
    assert!(record.limit_detail.unwrap().contains("none of the others"), "{ended:?}");
}

#[test]
fn a_silent_server_is_enough_without_verification() {
    let server = Server::start(Manner::SilentPast(0), 1);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 1 -c 300 --hold 10ms --no-verify", server.first_port));
    assert_eq!((ended.code, record.established), (Some(0), 300), "{ended:?}");
    assert_eq!((record.verified, record.verdict), (None, Verdict::Held));
    assert!(ended.stderr.iter().any(|line| line.starts_with("HELD, NOT VERIFIED: 300 of 300")));
}

/// None of them opens: the backlog is full, and their packets are dropped.
#[test]
fn without_a_server_nothing_is_held_without_verification_either() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    shorten_backlog(&listener);
    let to = listener.local_addr().unwrap();
    let filling: Vec<_> =
        std::iter::from_fn(|| TcpStream::connect_timeout(&to, Duration::from_millis(200)).ok())
            .take(10)
            .collect();
    assert!(filling.len() < 10, "the backlog is never full");
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 20 --connect-timeout 300ms --hold 50s --no-verify",
        to.port()
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.verdict), (Some(1), Verdict::Short), "{ended:?}");
    assert_eq!((record.established, record.verified), (0, None), "{ended:?}");
    assert!(record.failures.keys().eq(["ETIMEDOUT"]), "{ended:?}");
    let line = error_line(&ended);
    assert!(line.contains(&format!("no connection to {to} could be opened (ETIMEDOUT)")), "{line}");
    assert!(!line.contains("echo") && !line.contains("--no-verify"), "{line}");
}

#[test]
fn a_server_that_refuses_every_connection_is_named_without_verification_too() {
    for manner in [Manner::RefusePast(0), Manner::HangUpPast(0)] {
        let server = Server::start(manner, 1);
        let (ended, record) = run(&format!(
            "127.0.0.1 {} --ports 1 -c 300 --hold 50s --no-verify",
            server.first_port
        ));
        assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
        assert_eq!((record.established, record.verified), (0, None), "{ended:?}");
        let line = error_line(&ended);
        assert!(
            line.contains("drops every connection at once") && !line.contains("echo"),
            "{line}"
        );
    }
}

#[test]
fn other_bytes_are_no_echo() {
    let server = Server::start(Manner::Garble, 1);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 1 -c 1000 --hold 50s", server.first_port));
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!((record.established, record.verified), (0, Some(0)));
    assert!(record.failures["EBADMSG"] >= 100, "{ended:?}");
    assert!(error_line(&ended).contains("not an echo server"), "{ended:?}");
}

#[test]
fn the_verdict_names_what_was_seen_of_connections_that_were_lost() {
    for (manner, options, seen, name) in [
        (Manner::CloseAfterEcho, "--in-flight 3", "closes connections soon after they open", "EOF"),
        (Manner::SilentAfterEcho, "", "stopped answering", "ETIMEDOUT"),
        (Manner::HalveAfterEcho, "", "sent only a part of the echo", "ETIMEDOUT"),
        (Manner::GarbleAfterEcho, "", "returned bytes that differ from those sent", "EBADMSG"),
    ] {
        let server = Server::start(manner, 1);
        let (ended, record) = run(&format!(
            "127.0.0.1 {} --ports 1 -c 50 --hold 10ms --connect-timeout 200ms {options}",
            server.first_port
        ));
        assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
        assert_eq!((record.lost, record.verdict), (50, Verdict::Short), "{ended:?}");
        let detail = record.limit_detail.unwrap();
        let lost = format!("50 of 50 connections lost ({name} 50)");
        assert!(detail.contains(seen) && detail.contains(&lost), "{detail}");
        assert!(!detail.contains("most connections were lost"), "{detail}");
    }
}

#[test]
fn losses_are_logged_while_the_others_are_held() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 100 --hold 50s --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_line("holding ");
    server.drop_some(7);
    client.await_words("7 of 100 connections lost so far (EOF 7)");
    server.drop_some(2);
    client.await_words("9 of 100 connections lost so far (EOF 9)");
    client.signal(Signal::SIGINT);
    let record = record(&client.end());
    assert_eq!((record.established, record.lost), (100, 9));
}

/// It is stopped until the hold is over, and then receives the signal at the end of the hold.
#[test]
fn a_signal_at_the_end_of_the_hold_loses_nothing() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 3000 --hold 200ms --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_line("holding ");
    client.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(300));
    client.signal(Signal::SIGINT);
    client.signal(Signal::SIGCONT);
    let ended = client.end();
    let record = record(&ended);
    assert_eq!((record.lost, record.limit), (0, Some(Limit::Interrupted)), "{ended:?}");
    assert!(record.hold_seconds >= 0.2, "{ended:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn a_signal_at_any_moment_loses_nothing_of_a_faithful_server(
        moment_ms in 0_u64..500,
        verify: bool,
        is_interrupt: bool,
    ) {
        let server = Server::start(Manner::Echo, 2);
        let option = if verify { "" } else { "--no-verify" };
        let words = format!(
            "127.0.0.1 {} --ports 2 -c 1500 --hold 100ms --json - {option}",
            server.first_port
        );
        let mut client = Client::start(&words);
        // From now on it handles signals.
        client.await_words("target: ");
        std::thread::sleep(Duration::from_millis(moment_ms));
        client.signal(if is_interrupt { Signal::SIGINT } else { Signal::SIGTERM });
        let ended = client.end();
        // Before the run and after it, the system handles a signal.
        if let Ok(record) = serde_json::from_str::<ClientRecord>(&ended.stdout) {
            prop_assert_eq!(record.lost, 0, "{:?}", ended);
        }
    }
}

#[test]
fn a_signal_ends_the_run_with_what_it_has() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let server = Server::start(Manner::Echo, 1);
        let words = format!("127.0.0.1 {} --ports 1 -c 200 --hold 50s --json -", server.first_port);
        let mut client = Client::start(&words);
        client.await_line("holding ");
        client.signal(signal);
        let ended = client.end();
        let record = record(&ended);
        assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Interrupted)), "{ended:?}");
        assert_eq!((record.established, record.verified), (200, Some(200)));
        assert_eq!((record.lost, record.verdict), (0, Verdict::Short));
        assert!(record.hold_seconds < 50.0);
    }
}

/// It is stopped, and receives both signals when it continues.
#[test]
fn a_second_signal_leaves_at_once() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 200 --hold 50s", server.first_port);
    let mut client = Client::start(&words);
    client.await_line("holding ");
    for signal in [Signal::SIGSTOP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGCONT] {
        client.signal(signal);
    }
    let ended = client.end();
    assert_eq!(ended.code, Some(143), "{ended:?}");
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_low_descriptor_limit_is_a_limit_that_is_named() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 --file-table process --hold 10ms --json -",
        server.first_port
    );
    let ended = Client::start_after("ulimit -n 256", &words).end();
    let record_ = record(&ended);
    assert_eq!((ended.code, record_.limit), (Some(0), Some(Limit::Descriptors)), "{ended:?}");
    assert_eq!((record_.target, record_.established), (223, 223));
    let said = "target: 223 of 1,000,000: RLIMIT_NOFILE is 256 hard; to open more: ";
    assert!(ended.stderr[0].contains(said), "{ended:?}");

    let ended = Client::start_after("ulimit -n 256", &format!("{words} -c 300")).end();
    let record_ = record(&ended);
    assert_eq!((ended.code, record_.limit), (Some(1), Some(Limit::Descriptors)), "{ended:?}");
    assert_eq!((record_.target, record_.established, record_.lost), (300, 224, 0));
    let predicted = "predicted to fit here: 223 of 300: RLIMIT_NOFILE is 256 hard; to open more: ";
    assert!(record_.limit_detail.unwrap().starts_with(predicted), "{ended:?}");
    assert!(ended.stderr[0].contains(&format!("target: 300; {predicted}")), "{ended:?}");
    assert!(ended.stderr.iter().any(|line| line.starts_with("SHORT: 224 of 300")), "{ended:?}");
    assert_eq!(record_.failures, failures([]));
}

#[test]
fn where_address_space_is_short_the_remedy_says_so() {
    if let Err(error) = FileTable::check_registered() {
        // Written to the real standard error, which the test harness does not capture.
        return writeln!(std::io::stderr(), "the test of address space is skipped: {error}")
            .unwrap();
    }
    let words = "127.0.0.1 9900 -c 1M --file-table registered";
    let ended = Client::start_after("ulimit -v 60000", words).end();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
    let line = error_line(&ended);
    assert!(line.contains("no address space"), "{line}");
    assert!(line.ends_with("; see ulimit -v and ulimit -d, or use a lower -c"), "{line}");
}

#[test]
fn a_low_soft_limit_is_raised() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 300 --hold 10ms --json -", server.first_port);
    let ended = Client::start_after("ulimit -Sn 128", &words).end();
    assert_eq!((ended.code, record(&ended).established), (Some(0), 300), "{ended:?}");
}

#[test]
fn inherited_descriptors_are_counted() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 --file-table process --hold 10ms --json -",
        server.first_port
    );
    let before = "for n in {10..99}; do eval \"exec $n</dev/null\"; done; ulimit -n 256";
    let ended = Client::start_after(before, &words).end();
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(0), Some(Limit::Descriptors)), "{ended:?}");
    assert!((120..=149).contains(&record.target), "{ended:?}");
    assert_eq!((record.established, record.verified), (record.target, Some(record.target)));
    assert_eq!(record.failures, failures([]));
}

#[test]
fn it_starts_and_verifies_without_a_null_device() {
    const BARE_DEV: &str = "mount -t tmpfs none /dev && ! test -e /dev/null";
    let mut tried = Command::new("unshare");
    tried.args(["--mount", "bash", "-c", BARE_DEV]).stderr(Stdio::null());
    if !tried.status().is_ok_and(|status| status.success()) {
        // Written to the real standard error, which the test harness does not capture.
        let why = "no mounts can be made here";
        return writeln!(std::io::stderr(), "the test without /dev/null is skipped: {why}")
            .unwrap();
    }
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 20 --hold 10ms --json -", server.first_port);
    let ended = Client::start_in_new_mounts(BARE_DEV, &words).end();
    assert_eq!((ended.code, record(&ended).verified), (Some(0), Some(20)), "{ended:?}");
}

/// The limit is lowered while it runs, so it can't be included in the calculation before.
#[test]
fn descriptors_that_run_out_unexpectedly_do_not_flood_the_log() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 --file-table process --rate 100 --hold 10ms --json -",
        server.first_port
    );
    let mut client = Client::start_after("ulimit -n 256", &words);
    client.await_some_held();
    client.limit_descriptors(150);
    let ended = client.end();
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(0), Some(Limit::Descriptors)), "{ended:?}");
    assert!((100..150).contains(&record.established), "{ended:?}");
    assert_eq!((record.target, record.verified), (record.established, Some(record.established)));
    assert_eq!(record.failures, failures([("EMFILE", 1)]));
}

#[test]
fn sources_share_the_connections_evenly() {
    let server = Server::start(Manner::Echo, 2);
    let (ended, record) = run(&format!(
        "127.0.0.1 {} --ports 2 -c 400 --hold 10ms --source 127.0.3.1,127.0.3.4-127.0.3.6",
        server.first_port
    ));
    assert_eq!((ended.code, record.established), (Some(0), 400), "{ended:?}");
    assert_eq!(record.sources, ["127.0.3.1", "127.0.3.4", "127.0.3.5", "127.0.3.6"]);
}

#[test]
fn a_rate_is_kept() {
    let server = Server::start(Manner::Echo, 1);
    let (ended, record) =
        run(&format!("127.0.0.1 {} --ports 1 -c 300 --hold 10ms --rate 1000", server.first_port));
    assert_eq!((ended.code, record.established), (Some(0), 300), "{ended:?}");
    // The connections of the first ten milliseconds may be a burst.
    assert!(record.ramp_seconds > 0.27, "{record:?}");
    // The series starts with the first connect, although the ramp is short.
    let series = &record.ramp_series;
    assert!(
        series.len() >= 10 && (series[0].seconds, series[0].established) == (0.0, 0),
        "{series:?}"
    );
}

#[test]
fn what_cannot_start_is_one_line() {
    for (words, code, part) in [
        ("127.0.0.1 9900 --source 192.0.2.1", 1, "--source 192.0.2.1 can't be used"),
        ("127.0.0.1 9900 --json /nonexistent/record.json", 1, "/nonexistent/record.json"),
        ("127.0.0.1 9900 --json new/", 1, "cannot write the record to new/"),
        ("127.0.0.1 9900 --json /dev/full", 1, "cannot write the record to /dev/full"),
        ("127.0.0.1 9900 --ports 0", 2, "--ports is 0"),
        ("nowhere.invalid", 1, "nowhere.invalid can't be resolved"),
    ] {
        let ended = Client::start(words).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(code), 1), "{words}: {ended:?}");
        assert!(error_line(&ended).contains(part), "{words}: {ended:?}");
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn wrong_usage_comes_with_claps_tips() {
    for (words, part) in [
        ("127.0.0.1 --connection 5", "a similar argument exists: '--connections'"),
        ("127.0.0.1 -c -5", "'--connections <N>': \"-5\" must be positive"),
        ("", "<TARGET>"),
    ] {
        let ended = Client::start(words).end();
        let errors = ended.stderr.join("\n");
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{words}: {errors}");
        assert!(errors.starts_with("error: ") && errors.contains(part), "{words}: {errors}");
        assert!(errors.contains("--help"), "{words}: {errors}");
    }
}

#[test]
fn a_server_may_be_given_by_name_by_port_and_by_url() {
    let server = Server::start(Manner::Echo, 1);
    let port = server.first_port;
    for target in [
        format!("localhost {port}"),
        format!("localhost:{port}"),
        format!("127.0.0.1:{port}"),
        format!("tcp://127.0.0.1:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
    ] {
        let (ended, record) = run(&format!("{target} --ports 1 -c 1e1 --rate 1000/s --hold 10ms"));
        assert_eq!((ended.code, record.verified), (Some(0), Some(10)), "{target}: {ended:?}");
        assert!(record.destination.ends_with(&format!(":{port}")), "{}", record.destination);
    }
}

#[test]
fn a_check_prints_what_is_needed_and_what_is_there() {
    let ended = Client::start("--check -c 10").end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.ends_with("It fits.\n"), "{ended:?}");
    let ended = Client::start_after("ulimit -n 64", "--check -c 10k").end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("FAIL"), "{ended:?}");
}

#[test]
fn a_check_prints_what_to_set() {
    let set = |words: &str| {
        let ended = Client::start(&format!("--check --print sysctl {words}")).end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.stdout
    };
    // The address is for documentation, and a check does not connect.
    let text = set("192.0.2.1 -c 1G --file-table process");
    assert!(text.contains("\nfs.nr_open = 1000000032\n"), "{text}");
    assert!(text.contains("#limits.d: root hard nofile 1000000032\n"), "{text}");
    assert!(!text.contains("somaxconn"), "{text}");
    assert!(text.contains("#note: the 5-tuples of 1 source x 100 destination ports"), "{text}");
    let text = set("192.0.2.1 -c 1G --sources 65536");
    assert!(!text.contains("#note"), "{text}");
    assert!(set("127.0.0.1 -c 1M").contains("somaxconn"), "the server is here too");
}

#[test]
fn requested_output_that_cannot_be_written_is_an_error() {
    for words in ["--check -c 10", "--help", "--version"] {
        for nothing in ["exec 1>/dev/full", "exec 1</dev/null"] {
            let ended = Client::start_after(nothing, words).end();
            assert_eq!((ended.code, ended.stderr.len()), (Some(1), 1), "{words}: {ended:?}");
            let line = error_line(&ended);
            assert!(line.starts_with("c1000k-client: cannot write to standard output: "), "{line}");
        }
        for nowhere in ["exec 1>&-", "exec 1<>/dev/null"] {
            let ended = Client::start_after(nowhere, words).end();
            assert_eq!((ended.code, ended.stderr.len()), (Some(0), 1), "{words}: {ended:?}");
            assert!(
                error_line(&ended).contains("closed at the start or is /dev/null"),
                "{ended:?}"
            );
        }
        let ended = Client::start_after("exec 1>/dev/null", words).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(0), 0), "{words}: {ended:?}");
    }
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    for words in ["--check -c 10", "--help"] {
        // The reader has ended before the client starts.
        let gone = "exec 1> >(true); wait $!";
        let ended = Client::start_after(gone, words).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(0), 0), "{words}: {ended:?}");
    }
}

#[test]
fn quiet_leaves_out_progress_and_verbose_says_more() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 20 --hold 0s", server.first_port);
    let ended = Client::start(&format!("{words} -q")).end();
    assert_eq!((ended.code, ended.stderr.len()), (Some(0), 0), "{ended:?}");
    assert!(ended.stdout.starts_with("REACHED: 20 of 20"), "{ended:?}");
    let ended = Client::start(&format!("{words} --verbose")).end();
    assert!(ended.stderr.iter().any(|line| line.contains("DEBUG")), "{ended:?}");
    let ended = Client::start(&format!("{words} -q -v")).end();
    assert_eq!(ended.code, Some(2), "{ended:?}");
    for (when, is_colored) in [("always", true), ("never", false), ("auto", false)] {
        let ended = Client::start(&format!("{words} --color {when}")).end();
        let has_color = ended.stderr.iter().any(|line| line.contains('\u{1b}'));
        assert_eq!(has_color, is_colored, "{when}: {ended:?}");
    }
}

#[test]
fn a_flag_may_be_set_by_the_environment_and_the_command_line_wins() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!("127.0.0.1 {} --ports 1 --json -", server.first_port);
    let before = "export C1000K_CONNECTIONS=30 C1000K_HOLD=0s C1000K_FAIL_IF='lost>0'";
    let ended = Client::start_after(before, &words).end();
    let thirty = record(&ended);
    assert_eq!((ended.code, thirty.established), (Some(0), 30), "{ended:?}");
    assert_eq!(thirty.thresholds.len(), 1);
    let ended = Client::start_after(before, &format!("{words} -c 40")).end();
    assert_eq!(record(&ended).established, 40, "{ended:?}");
    let ended = Client::start_after("export C1000K_HOLD=soon", &words).end();
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.join(" ").contains("--hold"), "{ended:?}");
    assert!(ended.stderr[0].contains("'soon' for 'C1000K_HOLD (--hold <DURATION>)'"), "{ended:?}");
    let ended = Client::start_after("export C1000K_HOLD=soon", "127.0.0.1 --hold later").end();
    assert!(ended.stderr[0].contains("'later' for '--hold <DURATION>'"), "{ended:?}");
    for (value, is_storm) in [("1", true), ("yes", true), ("true", true), ("off", false)] {
        let before = format!("export C1000K_STORM={value}");
        let ended = Client::start_after(&before, &format!("{words} -c 5 --hold 0s")).end();
        assert_eq!(ended.code, Some(0), "{value}: {ended:?}");
        assert_eq!(record(&ended).storm.is_some(), is_storm, "{value}: {ended:?}");
    }
}

#[test]
fn it_prints_its_man_page_and_completions() {
    for (what, part) in [
        ("man", ".TH c1000k-client 1"),
        ("bash", "_c1000k__client()"),
        ("zsh", "#compdef c1000k-client"),
        ("fish", "complete -c c1000k-client"),
    ] {
        let ended = Client::start(&format!("--generate {what}")).end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stdout.contains(part), "{what}: {}", ended.stdout);
        assert!(ended.stdout.contains("heartbeat"), "{what}");
    }
}
