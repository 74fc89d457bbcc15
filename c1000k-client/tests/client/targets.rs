//! Runs with several targets.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use c1000k_record::{ClientRecord, Limit, Verdict};

use crate::common::{Client, Manner, Server, record as record_of, run};
use crate::error_line;

fn established(record: &ClientRecord) -> Vec<u64> {
    record.targets.iter().map(|target| target.established).collect()
}

fn lost(record: &ClientRecord) -> Vec<u64> {
    record.targets.iter().map(|target| target.lost).collect()
}

#[test]
fn targets_share_the_connections_evenly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let servers = [
        Server::start(Manner::Echo, 2),
        Server::start_at(Ipv4Addr::new(127, 0, 0, 2), Manner::Echo, 2),
        Server::start_unix(Path::new(&path), Manner::Echo, None),
    ];
    let [one, two] = [&servers[0], &servers[1]].map(|server| server.first_port);
    let words = format!(
        "127.0.0.1:{one} 127.0.0.2:{two} unix:{} --ports 2 -c 1000 --churn 100/s --hold 500ms --storm",
        path.display()
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.verdict), (Some(0), Verdict::Reached), "{ended:?}");
    assert_eq!((record.established, record.verified, record.lost), (1_000, Some(1_000), 0));
    assert_eq!((established(&record), record.ports), (vec![334, 333, 333], 4));
    let destination = format!("127.0.0.1:{one}, 127.0.0.2:{two}, unix:{}", path.display());
    assert_eq!(record.destination, destination);
    assert_eq!(record.attempted, record.targets.iter().map(|target| target.attempted).sum::<u64>());
    let summary = ended.stderr.join("\n");
    let line = format!("target           127.0.0.2:{two}: 333 established");
    assert!(summary.contains(&line), "{summary}");
    for (server, count) in servers.into_iter().zip([334, 333, 333]) {
        // The server may accept a new connection before it knows that the old one has ended.
        assert!((count..count + 50).contains(&server.die()), "{ended:?}");
    }
}

#[test]
fn a_target_that_is_down_is_named_and_the_others_are_held() {
    let server = Server::start(Manner::Echo, 1);
    let closed = server.first_port + 1;
    let words =
        format!("127.0.0.1:{} 127.0.0.1:{closed} --ports 1 -c 600 --hold 10ms", server.first_port);
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.verdict), (Some(1), Verdict::Short), "{ended:?}");
    assert_eq!((record.limit, established(&record)), (Some(Limit::Server), vec![300, 0]));
    assert_eq!((record.verified, record.lost), (Some(300), 0), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    assert!(detail.starts_with(&format!("nothing listens on 127.0.0.1:{closed}: ")), "{detail}");
    let warning = format!("no more connections to 127.0.0.1:{closed} are opened: nothing listens");
    assert!(ended.stderr.iter().any(|line| line.contains(&warning)), "{ended:?}");
}

#[test]
fn a_target_that_never_answers_uses_at_most_its_share_of_connects_in_flight() {
    let server = Server::start(Manner::Echo, 1);
    let silent = TcpListener::bind("127.0.0.2:0").unwrap();
    let began = Instant::now();
    let (ended, record) = run(&format!(
        "127.0.0.1:{} {} --ports 1 -c 2k --in-flight 64 --connect-timeout 500ms --hold 10ms",
        server.first_port,
        silent.local_addr().unwrap()
    ));
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!(established(&record), [1_000, 0], "{ended:?}");
    assert!(error_line(&ended).contains("127.0.0.2:"), "{ended:?}");
}

#[test]
fn a_full_target_lowers_the_goal_that_was_not_given_and_fails_one_that_was() {
    let (full, roomy) = (Server::start(Manner::RefusePast(100), 1), Server::start(Manner::Echo, 1));
    let words = format!(
        "127.0.0.1:{} 127.0.0.1:{} --ports 1 -c 600 --hold 10ms",
        full.first_port, roomy.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!(established(&record), [100, 300], "{ended:?}");
    let detail = record.limit_detail.unwrap();
    let start = format!("127.0.0.1:{}: the server was the limit: it dropped", full.first_port);
    assert!(detail.starts_with(&start) && detail.contains("beyond 100 connections"), "{detail}");

    let words = format!(
        "127.0.0.1:{} 127.0.0.1:{} --ports 1 --file-table process --hold 10ms --json -",
        full.first_port, roomy.first_port
    );
    let ended = Client::start_after("ulimit -n 512", &words).end();
    let record = record_of(&ended);
    assert_eq!((ended.code, record.verdict), (Some(0), Verdict::Reached), "{ended:?}");
    assert_eq!((record.limit, record.failed), (Some(Limit::Server), 0), "{ended:?}");
    assert_eq!((established(&record)[0], record.target), (100, record.established));
    assert!(established(&record)[1] > 200, "{ended:?}");
    assert!(record.targets.iter().all(|target| target.failed == 0), "{ended:?}");
}

#[test]
fn losses_are_counted_by_target() {
    let (lasting, dying) = (Server::start(Manner::Echo, 1), Server::start(Manner::Echo, 1));
    let words = format!(
        "127.0.0.1:{} 127.0.0.1:{} --ports 1 -c 400 --hold 3s --json -",
        lasting.first_port, dying.first_port
    );
    let mut client = Client::start(&words);
    client.await_line("holding ");
    assert_eq!(dying.die(), 200);
    let ended = client.end();
    let record = record_of(&ended);
    assert_eq!((ended.code, record.lost), (Some(1), 200), "{ended:?}");
    assert_eq!((lost(&record), record.verified), (vec![0, 200], Some(200)), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    assert!(detail.contains("200 of 400 connections lost"), "{detail}");
}

#[test]
fn control_characters_of_a_path_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a\u{1b}[2J", "b"].map(|name| folder.path().join(name));
    let _servers = paths.each_ref().map(|path| Server::start_unix(path, Manner::Echo, None));
    let targets = paths.each_ref().map(|path| format!("unix:{}", path.display()));
    let (ended, record) = run(&format!("{} {} -c 10 --hold 10ms", targets[0], targets[1]));
    assert_eq!((ended.code, &record.targets[0].target), (Some(0), &targets[0]), "{ended:?}");
    assert!(ended.stderr.iter().all(|line| !line.contains('\u{1b}')), "{ended:?}");
    assert!(ended.stderr.iter().any(|line| line.contains(r"a\u{1b}[2J: 5 established")));
    let ended = Client::start(&format!("{} redis+{}", targets[0], targets[0])).end();
    assert!(!error_line(&ended).contains('\u{1b}') && ended.code == Some(2), "{ended:?}");
}

#[test]
fn targets_that_cannot_be_one_run_are_wrong_usage() {
    for (words, part) in [
        ("127.0.0.1 127.0.0.1:9950", "are the same server"),
        ("redis://127.0.0.1 127.0.0.2", "different protocols (redis and tcp)"),
        ("127.0.0.1 127.0.0.2 --stateless", "--stateless takes one target"),
        ("127.0.0.1 9900 127.0.0.2", "9900 is not a target"),
    ] {
        let ended = Client::start(words).end();
        assert_eq!((ended.code, ended.stderr.len()), (Some(2), 1), "{ended:?}");
        assert!(error_line(&ended).contains(part), "{ended:?}");
    }
}
