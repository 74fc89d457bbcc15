//! Connections over Unix-domain sockets.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::time::{Duration, Instant};

use c1000k_record::{ClientRecord, Limit, Verdict};
use tempfile::TempDir;

use crate::common::{Client, Ended, Manner, Server, record, run};
use crate::error_line;

/// A folder, and a socket in it.
fn socket() -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s").display().to_string();
    (folder, path)
}

/// A listener that never accepts, with the shortest backlog.
fn deaf_listener(path: &str) -> UnixListener {
    let listener = UnixListener::bind(path).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    listener
}

#[test]
fn connections_over_a_unix_domain_socket_are_held_and_verified_twice() {
    let (_folder, path) = socket();
    let server = Server::start_unix(Path::new(&path), Manner::Echo, None);
    let (ended, record) = run(&format!("unix:{path} -c 2k --hold 100ms"));
    assert_eq!((ended.code, record.verdict), (Some(0), Verdict::Reached), "{ended:?}");
    assert_eq!((record.established, record.verified, record.lost), (2_000, Some(2_000), 0));
    assert_eq!((record.protocol.as_str(), record.ports), ("unix", 0));
    assert_eq!(record.destination, format!("unix:{path}"));
    assert_eq!(record.targets[0].target, format!("unix:{path}"));
    assert!(record.connect_latency_us.max > Some(0), "{record:?}");
    let closing = "closing 2,000 connections";
    assert!(ended.stderr.iter().any(|line| line == closing), "no reset, no TIME_WAIT: {ended:?}");
    assert_eq!(server.die(), 2_000);
}

#[test]
fn messages_churn_and_a_storm_are_as_over_tcp() {
    let (_folder, path) = socket();
    let _server = Server::start_unix(Path::new(&path), Manner::Echo, None);
    let (ended, record) =
        run(&format!("unix:{path} -c 300 --heartbeat 300ms --hold 600ms --churn 100/s --storm"));
    assert_eq!((ended.code, record.lost, record.failed), (Some(0), 0, 0), "{ended:?}");
    let workload = record.workload.unwrap();
    assert_eq!((workload.mismatched, workload.unanswered), (0, 0));
    assert!(workload.answered > 300, "{workload:?}");
    let (churn, storm) = (record.churn.unwrap(), record.storm.unwrap());
    assert!(churn.closed >= 30 && churn.reopened == churn.closed, "{churn:?}");
    assert_eq!((storm.dropped, storm.back), (300, 300));
}

#[test]
fn a_backlog_that_is_full_for_a_while_delays_the_connections() {
    let (_folder, path) = socket();
    let _server = Server::start_unix(Path::new(&path), Manner::Echo, Some(1));
    let (ended, record) = run(&format!("unix:{path} -c 500 --hold 10ms"));
    assert_eq!((ended.code, record.established, record.failed), (Some(0), 500, 0), "{ended:?}");
    assert_eq!((record.verified, record.limit), (Some(500), None), "{ended:?}");
    let refused = record.failures["EAGAIN"];
    assert_eq!(record.attempted, 500 + refused, "each connect is counted");
    // The shortest wait for a full backlog is 1 ms, and it is part of the connect latency.
    assert!(record.connect_latency_us.max >= Some(1_000), "{record:?}");
    let is_warning =
        |line: &&String| line.contains("the backlog of unix:") && line.contains("is full (EAGAIN)");
    assert_eq!(ended.stderr.iter().filter(is_warning).count(), 1, "{ended:?}");
}

/// Without verification, connections are open before the server accepts them.
#[test]
fn a_backlog_that_stays_full_ends_the_run_without_a_busy_loop() {
    for (options, detail) in [
        ("--no-verify", "stayed full at 2 connections (EAGAIN)"),
        ("", "accepts connections and does not answer"),
    ] {
        let (_folder, path) = socket();
        let _listener = deaf_listener(&path);
        let began = Instant::now();
        let (ended, record) =
            run(&format!("unix:{path} -c 100 --connect-timeout 400ms --hold 10ms {options}"));
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
        assert!(record.limit_detail.unwrap().contains(detail), "{ended:?}");
        assert!((2..300).contains(&record.failures["EAGAIN"]), "{ended:?}");
        assert!(record.attempted < 300, "{ended:?}");
    }
}

#[test]
fn a_server_that_dies_is_named_whether_its_connections_were_held_or_are_being_opened() {
    let (_folder, path) = socket();
    let server = Server::start_unix(Path::new(&path), Manner::Echo, None);
    let mut client = Client::start(&format!("unix:{path} -c 500 --hold 50s --json -"));
    client.await_line("holding ");
    assert_eq!(server.die(), 500);
    let ended = client.end();
    let held = record(&ended);
    assert_eq!((ended.code, held.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!((held.established, held.lost), (500, 500));

    std::fs::remove_file(&path).unwrap();
    let server = Server::start_unix(Path::new(&path), Manner::Echo, None);
    let words = format!("unix:{path} -c 5k --rate 500/s --hold 50s --json -");
    let mut client = Client::start(&words);
    client.await_some_held();
    server.die();
    let ended = client.end();
    let opening = record(&ended);
    assert_eq!((ended.code, opening.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert!(opening.established < 5_000 && opening.lost > 0, "{ended:?}");
}

#[test]
fn what_is_no_listening_socket_is_one_line_and_a_few_attempts() {
    let (folder, path) = socket();
    let refused = |target: &str, words: &str, limit: Limit| {
        let (ended, record): (Ended, ClientRecord) =
            run(&format!("unix:{target} -c 1k --in-flight 64"));
        assert_eq!((ended.code, record.limit), (Some(1), Some(limit)), "{ended:?}");
        assert!(error_line(&ended).contains(words), "{ended:?}");
        assert!(record.attempted < 10, "{ended:?}");
        assert_eq!((record.established, record.target), (0, 1_000), "{ended:?}");
    };
    refused(&path, "there is no socket at unix:/", Limit::Network);
    refused(&format!("@{path}"), "nothing listens on unix:@/", Limit::Server);
    std::fs::write(folder.path().join("file"), "").unwrap();
    refused(&format!("{}/file", folder.path().display()), "is not a socket", Limit::Server);
    refused(&format!("{}/file/s", folder.path().display()), "there is no socket", Limit::Network);
    drop(UnixListener::bind(&path).unwrap());
    refused(&path, "is left over from a server that has ended", Limit::Server);
    let datagram = folder.path().join("datagram");
    let _socket = UnixDatagram::bind(&datagram).unwrap();
    refused(&datagram.display().to_string(), "SOCK_STREAM", Limit::Network);
}

#[test]
fn what_is_for_tcp_alone_is_wrong_usage() {
    for options in ["9900", "--ports 2", "--source 127.0.0.2", "--stateless"] {
        let ended = Client::start(&format!("unix:/run/a {options}")).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(2), 1), "{ended:?}");
        assert!(error_line(&ended).contains("is for TCP"), "{ended:?}");
    }
}

#[test]
fn a_check_asks_nothing_of_tcp() {
    let ended = Client::start("unix:/run/a --check -c 10").end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let rows = ended.stdout.lines().filter(|line| line.contains("net.ipv4"));
    let rows: Vec<&str> = rows.collect();
    assert!(rows.len() > 3 && rows.iter().all(|row| row.starts_with('-')), "{rows:?}");
}
