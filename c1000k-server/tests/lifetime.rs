//! How the server starts, refuses to start, and ends.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use c1000k_record::ServerRecord;
use common::{
    BINARY, DEADLINE, Server, can_mount, echo, echo_all, fill, free_ports, in_new_mounts, pattern,
    read_to_end, run, until, wait,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use reactor::FileTable;

const NOBODY: u32 = 65_534;

/// The capacity of an unread pipe.
const PIPE_BYTES: usize = 65_536;

#[test]
fn sigterm_sends_queued_data_and_writes_the_record() {
    let mut server = Server::start(1, &["--grace", "15s"]);
    let idle = server.connect(0);
    echo(&idle, b"idle from now on");
    let slow = server.connect(0);
    let written = fill(&slow, Duration::from_millis(300), 64 << 20);
    server.signal(Signal::SIGTERM);
    assert!(server.sees_line("Terminate: closing 2 connections"));
    assert!(read_to_end(&idle).1.is_ok(), "an idle connection ends with a FIN");

    let (received, _) = read_to_end(&slow);
    assert_eq!(server.wait().code(), Some(0));
    let record = server.record();
    assert_eq!((record.open, record.closed), (0, 2));
    assert_eq!(record.bytes_in, record.bytes_out, "what was read was sent back");
    let idle_bytes = "idle from now on".len() as u64;
    assert_eq!(received.len() as u64, record.bytes_out - idle_bytes, "and has arrived");
    assert!(received.len() <= written);
    assert!(received.iter().enumerate().all(|(position, &byte)| byte == pattern(position)));
}

#[test]
fn sigint_ends_it_too() {
    let mut server = Server::start(1, &[]);
    let stream = server.connect(0);
    echo(&stream, b"hello");
    server.signal(Signal::SIGINT);
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(server.record().accepted, 1);
}

#[test]
fn a_second_signal_ends_it_at_once_with_a_record() {
    let seconds = [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)];
    for ((second, code), threads) in seconds.into_iter().zip(["1", "3"]) {
        let mut server = Server::start(1, &["--grace", "1h", "--threads", threads]);
        let slow = server.connect(0);
        fill(&slow, Duration::from_millis(300), 64 << 20);
        server.signal(Signal::SIGTERM);
        assert!(server.sees_line("Terminate: closing"));
        let asked = Instant::now();
        server.signal(second);
        assert_eq!(server.wait().code(), Some(code));
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        let record = server.record();
        assert_eq!((record.accepted, record.open + record.closed), (1, 1));
        assert!(server.sees_line("1 connection reset at shutdown;"));
    }
}

#[test]
fn an_unread_pipe_blocks_neither_the_server_nor_its_end() {
    let (_unread, mut full) = std::io::pipe().unwrap();
    full.write_all(&[b'.'; PIPE_BYTES]).unwrap();
    let first_port = free_ports(1);
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record");
    let mut child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--interval", "100ms", "--json"])
        .arg(&record)
        .arg(format!("--first-port={first_port}"))
        .stdout(full.try_clone().unwrap())
        .stderr(full)
        .spawn()
        .unwrap();
    let mut stream = None;
    common::until(common::DEADLINE, || {
        stream = TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).ok();
        stream.is_some()
    });
    let stream = stream.expect("it listens, although its log is blocked");
    stream.set_read_timeout(Some(common::DEADLINE)).unwrap();
    for _ in 0..5 {
        echo(&stream, b"served all the same");
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(wait(&mut child).code(), Some(0));
    assert_eq!(ServerRecord::read(&record).unwrap().accepted, 1);
}

#[test]
fn data_that_is_not_sent_within_the_grace_is_cut_off() {
    let mut server = Server::start(1, &["--grace", "300ms"]);
    let slow = server.connect(0);
    fill(&slow, Duration::from_millis(300), 64 << 20);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(read_to_end(&slow).1.is_err(), "a cut-off connection ends with a reset");
    assert_eq!((server.record().open, server.record().closed), (0, 1));
    assert_eq!(server.record().closed_by.get("shut_down"), Some(&1));
    assert!(server.sees_line("1 connection reset at shutdown;"));
}

#[test]
fn after_sigkill_it_listens_again_at_once() {
    let mut server = Server::start(3, &[]);
    let held: Vec<_> = (0..60).map(|index| server.connect(index % 3)).collect();
    echo_all(&held, b"held");
    server.signal(Signal::SIGKILL);
    server.wait();
    let mut again = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "3"])
        .arg(format!("--first-port={}", server.first_port))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let serves =
        common::until(common::DEADLINE, || std::net::TcpStream::connect(server.address(2)).is_ok());
    assert!(serves && again.try_wait().unwrap().is_none());
    echo(&server.connect(2), b"served again");
    kill(Pid::from_raw(again.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(wait(&mut again).code(), Some(0));
}

#[test]
fn a_record_whose_reader_has_gone_is_printed_on_standard_error() {
    let first_port = free_ports(1);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--json", "-"])
        .arg(format!("--first-port={first_port}"))
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let serves = common::until(common::DEADLINE, || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).is_ok()
    });
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = wait(&mut child);
    let stderr = text(&child.wait_with_output().unwrap().stderr);
    assert!(serves && status.code() == Some(1), "{stderr}");
    assert!(stderr.contains("\"c1000k.server/1\""), "{stderr}");
    let line = stderr.lines().last().unwrap();
    assert!(line.contains("cannot write the record to standard output: "), "{line}");
}

#[test]
fn only_the_record_goes_to_standard_output() {
    let first_port = free_ports(1);
    let mut child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--json", "-"])
        .arg(format!("--first-port={first_port}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let serves = common::until(common::DEADLINE, || {
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).is_ok()
    });
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    wait(&mut child);
    let output = child.wait_with_output().unwrap();
    assert!(serves, "{}", text(&output.stderr));
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(record["schema"], "c1000k.server/1");
    let table = &record["file_table"];
    assert!(table == "process" || table == "registered", "{table}");
    assert!(text(&output.stderr).contains("c1000k-server held"), "{}", text(&output.stderr));
}

/// Like c1000k-client, which resets its connections after a successful run.
#[test]
fn the_summary_explains_resets_by_peers() {
    let first_port = free_ports(1);
    let child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--interval", "100ms"])
        .arg(format!("--first-port={first_port}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut peers = Vec::new();
    common::until(common::DEADLINE, || {
        peers.extend(TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).ok());
        peers.len() == 3
    });
    for peer in &peers {
        peer.set_read_timeout(Some(common::DEADLINE)).unwrap();
        echo(peer, b"held");
        let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(peer, sockopt::Linger, &at_once).unwrap();
    }
    drop(peers);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let summary = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let row = summary.lines().find(|line| line.contains("closed, ")).unwrap_or_default();
    assert!(row.contains("reset"), "{summary}");
    let words =
        "  3 by the peers; c1000k-client ends its own connections so, to leave no TIME_WAIT";
    assert!(row.ends_with(words), "{summary}");
}

#[test]
fn a_port_in_use_is_one_line_and_no_half_started_server() {
    let first_port = free_ports(4);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, first_port + 3)).unwrap();
    let output = serve(&["--bind", "127.0.0.1", "--ports", "4"], first_port);
    drop(taken);
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(line.contains(&format!("127.0.0.1:{}", first_port + 3)), "{line}");
    assert!(line.contains("in use") && line.contains("--first-port"), "{line}");
}

#[test]
fn a_port_of_a_connection_is_distinguished_from_one_with_a_listener() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listening_on = listener.local_addr().unwrap().port();
    let line = one_line(&serve(&["--bind", "127.0.0.1", "--ports", "1"], listening_on));
    assert!(
        line.contains("in use") && line.contains("end the program that listens there"),
        "{line}"
    );

    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let connected_from = connection.local_addr().unwrap().port();
    let line = one_line(&serve(&["--bind", "127.0.0.1", "--ports", "1"], connected_from));
    assert!(line.contains("in use") && !line.contains("listens"), "{line}");
    assert!(line.contains("the local port of a connection of this machine"), "{line}");
    assert!(line.contains(&format!("ip_local_reserved_ports={connected_from}")), "{line}");
}

#[test]
fn the_limit_that_is_too_low_is_named() {
    for (before, ports, parts) in [
        ("ulimit -n 10 &&", "2", ["RLIMIT_NOFILE is 10", "2 listening ports: raise"]),
        (
            "exec 3</dev/null && ulimit -n 30 &&",
            "1",
            ["1 listening port and ", " open at the start: raise"],
        ),
    ] {
        let mut command = common::by_shell(before);
        let output = run(command.args(["--bind", "127.0.0.1", "--ports", ports]));
        assert_eq!(output.status.code(), Some(1));
        let line = one_line(&output);
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    if FileTable::check_registered().is_err() {
        return common::skip("the test of address space", "no registered files are available");
    }
    let mut command = common::by_shell("ulimit -v 200000 &&");
    let output = run(command.args([
        "--bind=127.0.0.1",
        "--ports=1",
        "--max-connections=100M",
        "--file-table=registered",
    ]));
    let line = one_line(&output);
    assert!(line.contains("no address space") && line.contains("see ulimit -v"), "{line}");
}

#[test]
fn an_address_of_another_machine_is_one_line() {
    let output = serve(&["--bind", "192.0.2.1", "--ports", "1"], free_ports(1));
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(line.contains("192.0.2.1") && line.contains("--bind"), "{line}");
}

#[test]
fn a_privileged_port_is_one_line_for_an_ordinary_user() {
    let from = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if from.trim() == "0" {
        return; // No port is privileged here.
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = as_ordinary_user("", folder.path());
    let output = run(command.args(["--bind", "127.0.0.1", "--first-port", "7", "--ports", "1"]));
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(line.contains("127.0.0.1:7") && line.contains("1024"), "{line}");
}

#[test]
fn wrong_usage_is_one_line_or_claps_own_error_and_exit_code_2() {
    for arguments in [
        &["--bind", "nowhere"][..],
        &["--bind", "999.1.1.1"],
        &["--first-port", "65500", "--ports", "100"],
        &["--first-port", "70000"],
        &["--port", "7000"],
        &["-c", "100"],
        &["--ports", "0"],
        &["--threads", "0"],
        &["--threads", "many"],
        &["--max-connections", "0"],
        &["--max-per-source", "0"],
        &["--memory-reserve", "100%"],
        &["--memory-reserve", "1000T"],
        &["--memory-reserve", "much"],
        &["--overload", "panic"],
        &["--slow-reader-timeout", "0s"],
        &["--idle-timeout", "soon"],
        &["--no-such-flag"],
        &["extra"],
    ] {
        let output = run(Command::new(BINARY).args(arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let stderr = text(&output.stderr);
        let is_line = stderr.starts_with("c1000k-server: ") && stderr.lines().count() == 1;
        let is_claps = stderr.starts_with("error: ") && stderr.ends_with("try '--help'.\n");
        assert!(output.stdout.is_empty() && (is_line || is_claps), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_port_without_its_flag_is_answered_with_the_flag() {
    for (word, has_tip) in [("9900", true), ("99000", false), ("extra", false)] {
        let output = run(Command::new(BINARY).arg(word));
        assert_eq!(output.status.code(), Some(2));
        let stderr = text(&output.stderr);
        let tip = "tip: the first port is a flag: --first-port 9900\n";
        assert_eq!(stderr.contains(tip), has_tip, "{stderr}");
    }
}

#[test]
fn a_name_that_is_no_utf_8_is_borne() {
    use std::os::unix::{ffi::OsStrExt, process::CommandExt};

    let mut command = Command::new(BINARY);
    command.arg0(std::ffi::OsStr::from_bytes(b"/bin/\xffserver")).args(["--ports", "0"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("server: --ports is 0") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn a_record_that_could_not_be_written_stops_it_before_it_listens() {
    let folder = tempfile::tempdir().unwrap();
    let astray = folder.path().join("astray");
    std::os::unix::fs::symlink("none/record", &astray).unwrap();
    for path in ["/no/such/folder/record", "new/", "/dev/full", "/", astray.to_str().unwrap()] {
        let output = serve(&["--ports", "1", "--json", path], free_ports(1));
        assert_eq!(output.status.code(), Some(1));
        let line = one_line(&output);
        assert!(line.contains(&format!("cannot write the record to {path}")), "{line}");
    }
    // For standard output, and with a file size limit.
    for setting in ["exec 1</dev/null; set -- -", "exec 1>/dev/full; set -- -", "ulimit -f 0"] {
        let script = format!(
            "{setting}; exec \"{BINARY}\" --bind 127.0.0.1 --ports 1 --first-port {} --json ${{1-record}}",
            free_ports(1)
        );
        let output = run(Command::new("bash").args(["-c", &script]).current_dir(folder.path()));
        assert_eq!(output.status.code(), Some(1), "{setting}");
        assert!(one_line(&output).contains("cannot write the record to"), "{setting}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn requested_output_that_cannot_be_written_is_an_error() {
    let ended = |to: &str, words: &str| {
        let mut command = Command::new("bash");
        let script = format!("exec {to}; exec \"$0\" {words}");
        run(command.args(["-c", &script, BINARY]))
    };
    for words in ["--check -c 10", "--help", "--version"] {
        for nothing in ["1>/dev/full", "1</dev/null"] {
            let output = ended(nothing, words);
            assert_eq!(output.status.code(), Some(1), "{nothing} {words}");
            let line = one_line(&output);
            assert!(line.contains("cannot write to standard output: "), "{line}");
        }
        for nowhere in ["1>&-", "1<>/dev/null"] {
            let output = ended(nowhere, words);
            assert_eq!(output.status.code(), Some(0), "{nowhere} {words}");
            let line = one_line(&output);
            assert!(line.contains("closed at the start or is /dev/null"), "{line}");
        }
        let output = ended("1>/dev/null", words);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{words}");
    }
}

#[test]
fn a_summary_for_a_full_standard_output_goes_to_standard_error_and_is_an_error() {
    let mut server = Server::start_by("exec 1>/dev/full &&", 1, &[]);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(1));
    assert!(server.sees_line("c1000k-server held"));
    assert!(server.sees_line("cannot write to standard output: "));
    assert_eq!(server.record().accepted, 0, "the record is still written");
}

#[test]
fn a_record_that_cannot_be_written_at_the_end_is_printed_on_standard_error() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let first_port = free_ports(1);
    let mut child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--json"])
        .arg(gone.join("record"))
        .arg(format!("--first-port={first_port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let serves = common::until(common::DEADLINE, || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).is_ok()
    });
    std::fs::remove_dir(&gone).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = wait(&mut child);
    let stderr = text(&child.wait_with_output().unwrap().stderr);
    assert!(serves && status.code() == Some(1), "{stderr}");
    let (start, end) = (stderr.find("\n{\n").unwrap(), stderr.find("\n}\n").unwrap());
    let record: ServerRecord = serde_json::from_str(&stderr[start..end + 2]).unwrap();
    assert_eq!(record.accepted, record.closed);
    let line = stderr.lines().last().unwrap();
    assert!(line.contains("cannot write the record") && line.contains("printed"), "{line}");
}

#[test]
fn without_another_thread_check_and_summary_are_still_printed() {
    let folder = tempfile::tempdir().unwrap();
    // Shells use different options for it.
    let alone = "{ ulimit -u 1 2>/dev/null || ulimit -p 1; } &&";
    let check = run(as_ordinary_user(alone, folder.path()).args(["--check", "-c", "10"]));
    let table = text(&check.stdout);
    assert!(table.contains("RLIMIT_NOFILE") && table.contains("It fits."), "{table}");
    assert_eq!(check.status.code(), Some(0));

    let first_port = free_ports(1);
    let mut child = as_ordinary_user(alone, folder.path())
        .args(["--bind", "127.0.0.1", "--ports", "1"])
        .arg(format!("--first-port={first_port}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let serves = common::until(common::DEADLINE, || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).is_ok()
    });
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = wait(&mut child);
    let output = child.wait_with_output().unwrap();
    assert!(serves && status.code() == Some(0), "{status}: {}", text(&output.stderr));
    assert!(text(&output.stdout).contains("c1000k-server held"), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("ready: "), "{}", text(&output.stderr));
}

#[test]
fn a_file_size_limit_is_a_write_error() {
    let first_port = free_ports(1);
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "1", "--json"])
        .arg(folder.path().join("record"))
        .arg(format!("--first-port={first_port}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let serves = common::until(common::DEADLINE, || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, first_port)).is_ok()
    });
    // A limit set before the start would be found at the start.
    let pid = child.id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &pid, "--fsize=0"]).status().unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = wait(&mut child);
    let output = child.wait_with_output().unwrap();
    assert!(serves && limited.success());
    assert_eq!(status.code(), Some(1), "{status}: {}", text(&output.stderr));
    assert!(text(&output.stdout).contains("c1000k-server held"), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("cannot write the record"), "{}", text(&output.stderr));
}

/// `SERVER_FUZZ_ROUNDS` sets the number of rounds, `SERVER_FUZZ_SEED` the seed.
#[test]
fn whatever_its_arguments_and_whenever_it_is_ended_it_does_not_panic() {
    let values = [
        "0",
        "1",
        "2",
        "7",
        "1M",
        "18446744073709551615",
        "-1",
        "",
        "50%",
        "99%",
        "100%",
        "1ms",
        "1s",
        "10000h",
        "::1",
        "127.0.0.1",
        "224.0.0.1",
        "echo",
        "sink",
        "pause",
        "-",
        "/",
        "run.json",
        "x",
        "\u{fffd}",
    ];
    let flags = [
        "--bind",
        "--first-port",
        "--ports",
        "--threads",
        "--max-connections",
        "--mode",
        "--idle-timeout",
        "--backlog",
        "--interval",
        "--grace",
        "--max-per-source",
        "--memory-reserve",
        "--overload",
        "--slow-reader-timeout",
        "--keepalive",
        "--tcp-user-timeout",
        "-c",
        "--check",
        "--json",
    ];
    let asked = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let mut random = asked("SERVER_FUZZ_SEED").unwrap_or(0x2545_f491_4f6c_dd1d_u64).max(1);
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    for _ in 0..asked("SERVER_FUZZ_ROUNDS").unwrap_or(60) {
        let first_port = free_ports(8);
        let mut command = Command::new(BINARY);
        let mut arguments = vec!["--json", "run.json"];
        arguments.truncate(next(2) * 2);
        for _ in 0..next(4) {
            arguments.extend([flags[next(flags.len())], values[next(values.len())]]);
        }
        if !arguments.contains(&"--first-port") {
            command.arg(format!("--first-port={first_port}"));
        }
        let folder = tempfile::tempdir().unwrap();
        command.args(&arguments).current_dir(folder.path());
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(next(60) as u64));
        // One or two peers, so that there are connections to end.
        let peers: Vec<_> = (0..next(3))
            .filter_map(|port| {
                TcpStream::connect((Ipv4Addr::LOCALHOST, first_port + port as u16)).ok()
            })
            .collect();
        let mut sent = Vec::new();
        for _ in 0..=next(3) {
            let signal = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP][next(3)];
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
            sent.push(signal as i32);
            std::thread::sleep(Duration::from_millis(next(4) as u64));
        }
        // The last one is a signal that it handles.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        sent.push(Signal::SIGTERM as i32);
        let status = wait(&mut child);
        drop(peers);
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        // Before it watches signals, a signal ends it by its default action.
        let ended = match (status.code(), status.signal()) {
            (Some(code), _) => [0, 1, 2, 130, 143].contains(&code),
            (None, signal) => signal.is_some_and(|signal| sent.contains(&signal)),
        };
        assert!(ended && !stderr.contains("panicked"), "{arguments:?}: {status}: {stderr}");
        // The record is complete, or does not exist.
        let record = folder.path().join("run.json");
        if record.exists() {
            let record = ServerRecord::read(&record).unwrap();
            assert_eq!(record.accepted, record.closed + record.open, "{arguments:?}");
        }
    }
}

/// The server as a user without privileges, by a shell that runs `prelude` first. Other users may not have access to
/// the build folder, so the server is copied into this folder.
fn as_ordinary_user(prelude: &str, folder: &Path) -> Command {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.join("c1000k-server");
    if !binary.exists() {
        std::fs::copy(BINARY, &binary).unwrap();
    }
    let mut command = common::by_shell_as(&binary, prelude);
    if nix::unistd::getuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

fn serve(arguments: &[&str], first_port: u16) -> Output {
    run(Command::new(BINARY).args(arguments).arg(format!("--first-port={first_port}")))
}

/// The one line of the error. Earlier log lines are not errors, and none says that the server is ready.
fn one_line(output: &Output) -> String {
    let stderr = text(&output.stderr);
    assert!(!stderr.contains("ready: "), "{stderr}");
    let errors: Vec<&str> =
        stderr.lines().filter(|line| line.starts_with("c1000k-server: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert_eq!(stderr.lines().last(), errors.last().copied(), "{stderr}");
    errors[0].to_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn it_starts_and_serves_without_a_null_device() {
    const BARE_DEV: &str = "mount -t tmpfs none /dev && ! test -e /dev/null";
    if !can_mount("the test without /dev/null", BARE_DEV) {
        return;
    }
    let registered = FileTable::check_registered().is_ok().then_some("registered");
    for table in ["process"].into_iter().chain(registered) {
        let arguments = ["--threads", "2", "--file-table", table];
        let server = Server::start_by(&in_new_mounts(BARE_DEV), 1, &arguments);
        echo(&server.connect(0), b"without files");
        assert_eq!(server.stop().accepted, 1);
    }
}

/// The metrics that Prometheus would read.
fn figures(port: u16) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let (text, outcome) = read_to_end(&stream);
    outcome.unwrap();
    String::from_utf8(text).unwrap()
}

/// The metrics with this prefix that the dashboard shows, without their suffix `_total`.
fn dashboard_names(prefix: &str) -> Vec<&'static str> {
    let dashboard = include_str!("../../packaging/grafana.json");
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let name = |(at, _)| dashboard[at..].split(|c| !is_of_name(c)).next().unwrap_or_default();
    let names: Vec<_> = dashboard.match_indices(prefix).map(name).collect();
    assert!(names.len() > 3, "the dashboard shows {names:?}");
    names.into_iter().map(|name| name.trim_end_matches("_total")).collect()
}

#[test]
fn its_metrics_are_served_while_it_runs() {
    let port = free_ports(1);
    let server = Server::start(1, &["--metrics", &port.to_string()]);
    let streams = [(); 3].map(|()| server.connect(0));
    streams.iter().for_each(|stream| _ = echo(stream, b"hello"));
    let shows = |line: &str| until(DEADLINE, || figures(port).contains(line));
    assert!(shows("\nc1000k_server_connections 3.0\n"), "{}", figures(port));
    let text = figures(port);
    for line in ["accepted_total 3", "received_bytes_total 15", "overloaded 0.0"] {
        assert!(text.contains(&format!("\nc1000k_server_{line}\n")), "{line}: {text}");
    }
    for name in dashboard_names("c1000k_server_") {
        assert!(text.contains(&format!("# HELP {name} ")), "the dashboard shows {name}: {text}");
    }
    drop(streams);
    assert!(shows("\nc1000k_server_closed_total 3\n"), "{}", figures(port));

    let refused = ["--ports", "1", "--metrics", &port.to_string()];
    let output = run(Command::new(BINARY).args(refused));
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert!(line.contains(&format!("--metrics 127.0.0.1:{port} can't be served")), "{line}");
    let wrong = run(Command::new(BINARY).args(["--metrics", "nowhere"]));
    assert_eq!(wrong.status.code(), Some(2));
}
