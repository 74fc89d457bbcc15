//! Messages during the hold.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use c1000k_record::{ClientRecord, Limit, Verdict};

use crate::common::{Client, Ended, Manner, Server, record, run};

#[test]
fn each_connection_sends_once_in_a_heartbeat() {
    let server = Server::start(Manner::Echo, 2);
    let words = format!(
        "127.0.0.1 {} --ports 2 -c 500 --heartbeat 300ms --hold 900ms --fail-if lost>0 --fail-if echo.p50>1s",
        server.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.verdict), (Some(0), Verdict::Reached), "{ended:?}");
    let workload = record.workload.unwrap();
    assert_eq!((workload.connections, workload.period_seconds), (500, 0.3));
    assert_eq!((workload.sent + workload.late, workload.answered), (1_500, workload.sent));
    assert_eq!((workload.mismatched, workload.unanswered), (0, 0));
    assert!(
        workload.latency_us.p50 > Some(0) && workload.latency_us.p9999 <= workload.latency_us.max
    );
    assert!(workload.histogram.is_some() && record.connect_histogram.is_some());
    assert_eq!(record.verified_passes, [500, 500], "messages do not verify");
    let passed: Vec<bool> = record.thresholds.iter().map(|threshold| threshold.passed).collect();
    assert_eq!(passed, [true, true]);
    let summary = ended.stderr.join("\n");
    assert!(summary.contains("messages         1,500 sent"), "{summary}");
    assert!(summary.contains("fail if          lost>0: pass, 0"), "{summary}");
}

#[test]
fn a_rate_is_kept_by_the_active_part_alone() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 400 --message-rate 1000/s --active 5% --hold 1s --message-size 5000",
        server.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let workload = record.workload.unwrap();
    assert_eq!((workload.connections, workload.sent, workload.answered), (20, 1_000, 1_000));
}

/// A server that pauses for half a second of one and a half. A client that waited for each answer before it sends, and
/// measured from there, would see the pause in only one message of each connection.
#[test]
fn a_pause_of_the_server_is_in_the_latency_of_every_message_that_was_due_in_it() {
    let server =
        Server::start(Manner::PauseOnce { after: 200, pause: Duration::from_millis(500) }, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 40 --heartbeat 100ms --hold 1500ms --fail-if echo.p90>100ms",
        server.first_port
    );
    let (ended, record) = run(&words);
    let workload = record.workload.unwrap();
    assert_eq!((workload.sent, workload.answered), (600, 600), "{workload:?}");
    assert!(workload.late >= 100, "{workload:?}");
    assert!(workload.latency_us.p90 >= Some(200_000), "{workload:?}");
    assert!(workload.latency_us.max >= Some(450_000), "{workload:?}");
    assert_eq!((ended.code, record.verdict), (Some(1), Verdict::Reached), "{ended:?}");
    assert!(ended.stderr.iter().any(|line| line.contains("echo.p90>100ms: FAIL")), "{ended:?}");
}

#[test]
fn what_becomes_of_each_message_is_counted() {
    for (manner, mismatched, unanswered) in
        [(Manner::GarbleAfterEcho, 60, 0), (Manner::SilentAfterEcho, 0, 60)]
    {
        let server = Server::start(manner, 1);
        let words = format!(
            "127.0.0.1 {} --ports 1 -c 60 --heartbeat 200ms --connect-timeout 500ms",
            server.first_port
        );
        let (ended, record) = run(&words);
        assert_eq!((ended.code, record.lost), (Some(1), 60), "{ended:?}");
        let workload = record.workload.unwrap();
        assert_eq!((workload.sent, workload.answered), (60, 0), "{manner:?}: {workload:?}");
        assert_eq!((workload.mismatched, workload.unanswered), (mismatched, unanswered));
        assert!(workload.histogram.is_none());
    }
}

#[test]
fn the_answer_may_be_another_text_than_the_message() {
    let server = Server::start(Manner::Pong, 1);
    let port = server.first_port;
    let talk = r"--message PING\r\n --expect +PONG\x0d\n --message-rate 200";
    let (ended, record) = run(&format!("127.0.0.1 {port} --ports 1 -c 50 --hold 500ms {talk}"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(record.workload.unwrap().answered, 100);
    let talk = r"--message PING\r\n --message-rate 200";
    let (ended, record) = run(&format!("127.0.0.1 {port} --ports 1 -c 50 --hold 500ms {talk}"));
    assert_eq!((ended.code, record.established), (Some(1), 0), "{ended:?}");
}

#[test]
fn latencies_are_written_in_both_formats() {
    let server = Server::start(Manner::Echo, 1);
    let folder = tempfile::tempdir().unwrap();
    for (name, part) in [("run.hgrm", "#[Max     ="), ("run.hlog", "Tag=echo,")] {
        let path = folder.path().join(name);
        let words = format!(
            "127.0.0.1 {} --ports 1 -c 20 --heartbeat 100ms --hold 300ms --hdr {}",
            server.first_port,
            path.display()
        );
        let ended = Client::start(&words).end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(part), "{name}: {text}");
    }
}

#[test]
fn a_signal_ends_the_messages_and_loses_nothing() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 100 --heartbeat 50ms --hold 1h --json -",
        server.first_port
    );
    let mut client = Client::start(&words);
    client.await_line("messages: ");
    client.signal(nix::sys::signal::Signal::SIGINT);
    let ended = client.end();
    let record = record(&ended);
    let workload = record.workload.unwrap();
    assert_eq!((ended.code, record.lost), (Some(1), 0), "{ended:?}");
    assert!(workload.answered > 0 && workload.unanswered <= 100, "{workload:?}");
    assert_eq!(workload.sent, workload.answered + workload.unanswered);
}

#[test]
fn what_does_not_go_together_is_one_line() {
    for (words, part) in [
        ("--heartbeat 10s --message-rate 5", "cannot be used with"),
        ("--heartbeat 10s --no-verify", "cannot be used with"),
        ("--heartbeat 0s", "at least 1ms"),
        ("--heartbeat 2h", "at most 1h"),
        ("--message-rate 0", "is 0"),
        ("--active 5%", "--heartbeat or --message-rate"),
        ("--active 0% --heartbeat 1s", "not a percentage of the connections"),
        ("--message-size 0", "at least 1 byte"),
        ("--message-size 300K", "at most 256KiB"),
        ("--message @/nowhere/text", "can't be read"),
        (r"--message \q", "followed by r, n, t"),
        ("--expect x", "--message"),
        ("--fail-if echo.p99>1s", "--heartbeat or --message-rate"),
        ("--fail-if lost", "no operator"),
    ] {
        let ended = Client::start(&format!("127.0.0.1 9900 {words}")).end();
        let text = ended.stderr.join("\n");
        assert!(ended.code == Some(2) && text.contains(part), "{words}: {ended:?}");
    }
    let ended = Client::start("127.0.0.1 9900 --hdr /nowhere/run.hgrm").end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.last().unwrap().contains("/nowhere/run.hgrm"), "{ended:?}");
}

#[test]
fn churn_closes_and_reopens_while_messages_go_on() {
    let server = Server::start(Manner::Echo, 2);
    let words = format!(
        "127.0.0.1 {} --ports 2 -c 300 --churn 500/s --heartbeat 100ms --hold 1s",
        server.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.lost, record.failed), (Some(0), 0, 0), "{ended:?}");
    assert_eq!(record.verified_passes, [300, 300]);
    let churn = record.churn.unwrap();
    assert_eq!(churn.closed, churn.reopened);
    assert!((400..=505).contains(&churn.closed), "{churn:?}");
    assert!(churn.connect_latency_us.max > Some(0) && churn.histogram.is_some(), "{churn:?}");
    assert_eq!(record.attempted, 300 + churn.closed);
    let workload = record.workload.unwrap();
    assert_eq!((workload.sent, workload.unanswered), (workload.answered, 0), "{workload:?}");
    assert!((2_000..=3_000).contains(&workload.sent), "but for those being reopened: {workload:?}");
    assert!(record.held_until > record.held_from && record.established == 300);
}

#[test]
fn after_a_storm_all_are_back_and_verified() {
    let server = Server::start(Manner::Echo, 3);
    for (options, code) in [("", 0), ("--no-verify", 0)] {
        let words = format!(
            "127.0.0.1 {} --ports 3 -c 2k --hold 100ms --storm {options}",
            server.first_port
        );
        let (ended, record) = run(&words);
        assert_eq!((ended.code, record.lost), (Some(code), 0), "{ended:?}");
        let storm = record.storm.unwrap();
        assert_eq!((storm.dropped, storm.back), (2_000, 2_000));
        assert!(storm.reopen_seconds > 0.0 && storm.connect_latency_us.p99 > Some(0), "{storm:?}");
        assert_eq!(record.attempted, 4_000);
        assert!(record.verified.is_none_or(|verified| verified == 2_000));
        let summary = ended.stderr.join("\n");
        assert!(summary.contains("storm            2,000 of 2,000 back in"), "{summary}");
    }
    assert_eq!(server.die(), 2_000);
}

/// The ramp has ended early, and what a full server took is closed and opened again all the same.
#[test]
fn churn_and_a_storm_go_on_where_the_server_is_full() {
    let server = Server::start(Manner::RefusePast(600), 2);
    let words =
        format!("127.0.0.1 {} --ports 2 -c 1k --hold 2s --churn 2k/s --storm", server.first_port);
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    assert_eq!((record.established, record.lost), (600, 0), "{ended:?}");
    let churn = record.churn.unwrap();
    assert!(churn.closed > 100 && churn.closed == churn.reopened, "{churn:?}");
    let storm = record.storm.unwrap();
    assert_eq!((storm.dropped, storm.back), (600, 600), "{ended:?}");
    assert_eq!(record.verified, Some(600));
}

/// The server accepts 1,500 connections in all: half of them again after the storm.
#[test]
fn what_does_not_come_back_after_a_storm_is_lost() {
    let server = Server::start(Manner::RefuseAfter(1_500), 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 1k --hold 100ms --storm", server.first_port);
    let (ended, record) = run(&words);
    let storm = record.storm.unwrap();
    assert_eq!((ended.code, record.verdict), (Some(1), Verdict::Short), "{ended:?}");
    assert_eq!((storm.dropped, storm.back, record.lost), (1_000, 500, 500), "{ended:?}");
    assert_eq!(record.verified, Some(500));
}

/// Runs the client with these options, and changes the server once the line is written.
fn run_while(
    server: &Server,
    options: &str,
    line: &str,
    change: fn(&Server),
) -> (Ended, ClientRecord) {
    let words = format!("127.0.0.1 {} --ports 1 {options} --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_line(line);
    change(server);
    let ended = client.end();
    let record = record(&ended);
    (ended, record)
}

#[test]
fn a_storm_gives_up_on_a_silent_server() {
    let server = Server::start(Manner::Echo, 1);
    let options = "-c 600 --hold 1s --storm --in-flight 50 --connect-timeout 500ms";
    let began = Instant::now();
    let (ended, record) = run_while(&server, options, "holding ", Server::fall_silent);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let storm = record.storm.unwrap();
    assert_eq!((storm.back, record.lost, record.failed), (0, storm.dropped, 0), "{ended:?}");
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    assert!(detail.contains("stopped answering") && detail.contains("ETIMEDOUT"), "{detail}");
}

#[test]
fn a_storm_to_closed_ports_names_the_server() {
    let server = Server::start(Manner::Echo, 1);
    let options = "-c 500 --hold 1s --storm";
    let (ended, record) = run_while(&server, options, "holding ", Server::stop_listening);
    assert_eq!((ended.code, record.lost), (Some(1), 500), "{ended:?}");
    assert_eq!(record.limit, Some(Limit::Server), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    assert!(detail.contains("nothing listens any more"), "{detail}");
    assert!(detail.contains("NOT_BACK 500") && detail.contains("ECONNREFUSED"), "{detail}");
}

#[test]
fn what_churn_cannot_reopen_is_lost() {
    let server = Server::start(Manner::Echo, 1);
    let options = "-c 500 --hold 2s --churn 50 --heartbeat 1s --fail-if lost>0";
    let (ended, record) = run_while(&server, options, "holding ", Server::stop_listening);
    let churn = record.churn.unwrap();
    let missing = churn.closed - churn.reopened;
    assert!(missing > 50, "{churn:?}");
    assert_eq!((record.lost, record.failed), (missing, 0), "{ended:?}");
    assert_eq!(record.verified.unwrap() + record.lost, record.established, "{ended:?}");
    assert_eq!(record.limit, Some(Limit::Server), "{ended:?}");
    assert!(record.limit_detail.unwrap().contains("nothing listens any more"), "{ended:?}");
    assert!(!record.thresholds[0].passed, "{ended:?}");
}

#[test]
fn messages_that_are_due_while_churn_reopens_are_skipped() {
    let server = Server::start(Manner::DelayFirst(Duration::from_millis(4)), 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 20 --hold 2100ms --heartbeat 70ms --churn 200",
        server.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.lost), (Some(0), 0), "{ended:?}");
    let workload = record.workload.unwrap();
    assert!(workload.skipped > 0, "{workload:?}");
    assert_eq!(workload.sent + workload.skipped, 600, "{workload:?}");
}

#[test]
fn the_wait_after_the_hold_is_bounded_and_no_part_of_it() {
    let server = Server::start(Manner::Echo, 1);
    let options = "-c 300 --hold 2s --churn 50 --connect-timeout 1s";
    let began = Instant::now();
    let (ended, record) = run_while(&server, options, "holding ", Server::fall_silent);
    assert!((2.0..2.5).contains(&record.hold_seconds), "{}", record.hold_seconds);
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    let churn = record.churn.unwrap();
    assert!(record.lost >= churn.closed - churn.reopened, "{ended:?}");
    assert_eq!(record.limit, Some(Limit::Server), "{ended:?}");
}

#[test]
fn a_server_that_ends_under_churn_is_named() {
    let server = Server::start(Manner::Echo, 1);
    let words =
        format!("127.0.0.1 {} --ports 1 -c 300 --hold 30s --churn 500 --json -", server.first_port);
    let mut client = Client::start(&words);
    client.await_line("holding ");
    std::thread::sleep(Duration::from_millis(1_500));
    server.die();
    let ended = client.end();
    let record = record(&ended);
    assert_eq!((ended.code, record.limit), (Some(1), Some(Limit::Server)), "{ended:?}");
    let detail = record.limit_detail.unwrap();
    let lines = ["the server went away", "most connections were lost"];
    assert!(lines.iter().any(|line| detail.starts_with(line)), "{detail}");
    assert!(detail.contains("300 of 300 connections lost"), "reopened ones count once: {detail}");
}

#[test]
fn a_part_that_is_lost_has_a_limit_and_is_no_failed_attempt() {
    let server = Server::start(Manner::GarbleOnce(120), 1);
    let words = format!("127.0.0.1 {} --ports 1 -c 100 --hold 10ms", server.first_port);
    let (ended, record) = run(&words);
    assert_eq!((record.lost, record.limit), (1, Some(Limit::Server)), "{ended:?}");
    assert!(record.limit_detail.unwrap().contains("EBADMSG 1"), "{ended:?}");
    assert!(record.failures.is_empty(), "{ended:?}");
}

#[test]
fn stages_shape_the_ramp_and_set_the_target() {
    let server = Server::start(Manner::Echo, 1);
    let words = format!(
        "127.0.0.1 {} --ports 1 --hold 0s --stages 1000/s:300ms,0:500ms,2000/s:200ms",
        server.first_port
    );
    let (ended, record) = run(&words);
    assert_eq!((ended.code, record.target, record.established), (Some(0), 700, 700), "{ended:?}");
    assert!((0.9..1.5).contains(&record.ramp_seconds), "{}", record.ramp_seconds);
    let in_pause = record.ramp_series.iter().filter(|point| (0.35..0.75).contains(&point.seconds));
    assert!(in_pause.clone().all(|point| (280..=310).contains(&point.established)), "{record:?}");
    for (words, part) in [
        ("--stages 5", "write it as 10k/s:1m"),
        ("--stages 0:5s", "opens no connections"),
        ("--stages 5:1s --rate 5", "cannot be used with"),
        ("--churn 0", "is 0"),
    ] {
        let ended = Client::start(&format!("127.0.0.1 9900 {words}")).end();
        let text = ended.stderr.join("\n");
        assert!(ended.code == Some(2) && text.contains(part), "{words}: {ended:?}");
    }
}

#[test]
fn a_signal_in_a_storm_or_in_churn_loses_nothing() {
    let server = Server::start(Manner::Echo, 1);
    for (options, line) in
        [("--hold 0s --storm", "dropping "), ("--churn 2k --hold 1h", "holding ")]
    {
        for after_ms in [0, 1, 3, 10, 30] {
            let words =
                format!("127.0.0.1 {} --ports 1 -c 3k {options} --json -", server.first_port);
            let mut client = Client::start(&words);
            client.await_line(line);
            std::thread::sleep(Duration::from_millis(after_ms));
            client.signal(nix::sys::signal::Signal::SIGINT);
            let ended = client.end();
            let record = record(&ended);
            assert_eq!(record.lost, 0, "{options}, {after_ms} ms: {ended:?}");
        }
    }
}

#[test]
fn its_figures_are_served_while_it_runs() {
    let server = Server::start(Manner::Echo, 1);
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let words = format!(
        "127.0.0.1 {} --ports 1 -c 70 --heartbeat 100ms --hold 1h --metrics 127.0.0.1:{port}",
        server.first_port
    );
    let mut client = Client::start(&words);
    client.await_line("messages: ");
    client.await_line("messages: ");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    client.signal(nix::sys::signal::Signal::SIGINT);
    client.end();
    for line in ["connections 70.0", "attempted_total 70", "lost_total 0"] {
        assert!(text.contains(&format!("\nc1000k_client_{line}\n")), "{line}: {text}");
    }
    assert!(text.contains("\nc1000k_client_echo_seconds{quantile=\"0.99\"} 0."), "{text}");
}
