//! Several reactors act as one server: for its clients, in its bounds, in its record, and at its end.

mod common;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{
    BINARY, DEADLINE, Server, connect_from, echo, echo_all, fill, free_ports, limited, run, until,
};
use nix::sys::signal::Signal;

/// With descriptors, which show the thread of a connection.
const THREADS: [&str; 4] = ["--threads", "2", "--file-table", "process"];
const PORTS: u16 = 4;
const CONNECTIONS: u16 = 300;

#[test]
fn two_threads_are_one_server_and_both_have_connections() {
    let mut server = Server::start(PORTS, &THREADS);
    assert_eq!(server.lines_with("by 2 threads").len(), 1);
    for offset in 0..PORTS {
        assert_eq!(listening_sockets(server.first_port + offset), 2, "one for each thread");
    }
    let mut held: Vec<TcpStream> =
        (0..CONNECTIONS).map(|index| server.connect(index % PORTS)).collect();
    echo_all(&held, b"Hello Server");
    assert!(server.sees_line(" 300 connections |"));
    let shares = connections_by_epoll(server.pid());
    assert_eq!(shares.len(), 2, "{shares:?}");
    // A hash distributes them: less than a tenth of 300 is very unlikely.
    assert!(shares.iter().all(|&share| share >= 30), "{shares:?}");
    assert_eq!(shares.iter().sum::<usize>(), 300, "{shares:?}");

    held.truncate(100);
    let have_left = || connections_by_epoll(server.pid()).iter().sum::<usize>() == 100;
    assert!(until(DEADLINE, have_left));
    held.extend((0..50).map(|_| server.connect(0)));
    echo_all(&held, b"again");
    drop(held);
    let record = server.stop();
    assert_eq!((record.threads, record.accepted, record.closed), (2, 350, 350));
    assert_eq!((record.peak, record.refused), (300, 0));
    assert_eq!((record.bytes_in, record.bytes_out), (12 * 300 + 5 * 150, 12 * 300 + 5 * 150));
    assert!(record.series.iter().any(|point| point.open == 300), "{:?}", record.series);
}

#[test]
fn the_bound_on_connections_holds_across_threads() {
    let mut server = Server::start(2, &["--threads", "3", "--max-connections", "20"]);
    let mut held = Vec::new();
    let mut refusals = 0;
    for index in 0..100 {
        let stream = common::try_connect(server.address(index % 2));
        match stream.filter(|stream| !common::is_refused(stream)) {
            Some(stream) => held.push(stream),
            None => refusals += 1,
        }
    }
    assert_eq!((held.len(), refusals), (20, 80));
    assert_eq!(server.lines_with("at capacity: ").len(), 1, "logged once, not by each thread");
    echo_all(&held, b"still held");

    held.pop();
    refusals += server.refusals_until_room(1);
    let record = server.stop();
    assert_eq!((record.peak, record.accepted), (20, 21));
    assert_eq!(record.refused_by.get("max_connections"), Some(&refusals));
}

#[test]
fn the_share_of_a_source_holds_across_threads() {
    let server = Server::start(2, &["--threads", "2", "--max-per-source", "10"]);
    let tried: Vec<TcpStream> =
        (0..60).filter_map(|index| common::try_connect(server.address(index % 2))).collect();
    let held: Vec<&TcpStream> = tried.iter().filter(|stream| !common::is_refused(stream)).collect();
    assert_eq!(held.len(), 10);
    echo(&connect_from(Ipv4Addr::new(127, 0, 0, 2).into(), server.address(1)), b"another source");
    let record = server.stop();
    assert_eq!((record.accepted, record.refused), (11, 50));
}

#[test]
fn without_memory_above_the_reserve_each_thread_refuses() {
    let mut server = Server::start(2, &["--threads", "2", "--memory-reserve", "99%"]);
    assert!(server.sees_line("memory: "));
    assert!((0..20).all(|index| server.refuses(index % 2)));
    assert_eq!(
        server.lines_with("further connections are refused").len(),
        1,
        "logged once, not by each thread"
    );
    let record = server.stop();
    assert_eq!((record.accepted, record.refused_by.get("memory")), (0, Some(&20)));
}

#[test]
fn each_thread_sends_queued_data_before_the_record_is_written() {
    let mut server = Server::start(1, &["--threads", "2", "--grace", "15s"]);
    let slow: Vec<TcpStream> = (0..3).map(|_| server.connect(0)).collect();
    for stream in &slow {
        fill(stream, Duration::from_millis(200), 64 << 20);
    }
    server.signal(Signal::SIGTERM);
    assert!(server.sees_line("Terminate: closing 3 connections"));
    let received: usize = slow.iter().map(|stream| common::read_to_end(stream).0.len()).sum();
    assert_eq!(server.wait().code(), Some(0));
    let record = server.record();
    assert_eq!((record.open, record.closed), (0, 3));
    assert_eq!((record.bytes_in, record.bytes_out), (received as u64, received as u64));
}

#[test]
fn a_second_signal_ends_it_at_once_though_a_thread_still_flushes() {
    let mut server = Server::start(1, &["--threads", "2", "--grace", "1h"]);
    let slow = server.connect(0);
    fill(&slow, Duration::from_millis(300), 64 << 20);
    server.signal(Signal::SIGTERM);
    assert!(server.sees_line("Terminate: closing"));
    let asked = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(143));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[test]
fn a_port_in_use_is_one_line_also_when_it_could_be_shared() {
    let server = Server::start(1, &THREADS);
    for threads in ["1", "2"] {
        let output = run(Command::new(BINARY)
            .args(["--bind", "127.0.0.1", "--ports", "1", "--threads", threads])
            .arg(format!("--first-port={}", server.first_port)));
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.contains("in use") && !stderr.contains("ready: "), "{stderr}");
    }
    echo(&server.connect(0), b"undisturbed");
    server.stop();

    let first_port = free_ports(2);
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, first_port + 1)).unwrap();
    let output = run(Command::new(BINARY)
        .args(["--bind", "127.0.0.1", "--ports", "2", "--threads", "2"])
        .arg(format!("--first-port={first_port}")));
    drop(taken);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_listeners_of_all_threads_count_against_the_descriptor_limit() {
    let mut server = Server::start_limited(256, 20, &["--threads", "4", "--file-table", "process"]);
    let connections = 256 - 4 * 20 - 3 * 3 - 32;
    assert_eq!(server.lines_with(&format!("for {connections} connections, by 4")).len(), 1);
    let held: Vec<TcpStream> = (0..connections).map(|index| server.connect(index % 20)).collect();
    echo_all(&held, b"all of them fit");
    assert!(server.refuses(0));
    server.stop();

    let output = run(limited(256).args(["--bind", "127.0.0.1", "--ports", "60", "--threads", "4"]));
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("--ports or --threads"), "{stderr}");
}

/// Sockets of this machine that listen on a port of the loopback.
fn listening_sockets(port: u16) -> usize {
    let local = format!("0100007F:{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").expect("is there on Linux");
    let listens = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some(&local) && fields.nth(1) == Some("0A")
    };
    table.lines().filter(listens).count()
}

/// The number of sockets that each reactor of the process watches, without its listeners.
fn connections_by_epoll(pid: u32) -> Vec<usize> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let entries = std::fs::read_dir(folder.join("fd")).expect("the server runs");
    let of_epoll = entries.flatten().filter_map(|entry| {
        std::fs::read_link(entry.path())
            .ok()
            .filter(|to| to.ends_with("anon_inode:[eventpoll]"))?;
        std::fs::read_to_string(folder.join("fdinfo").join(entry.file_name())).ok()
    });
    // One may have been closed since the folder was listed.
    let is_socket = |descriptor: &str| {
        let to = std::fs::read_link(folder.join("fd").join(descriptor));
        to.is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    let watched = |info: String| {
        let targets = info.lines().filter_map(|line| line.strip_prefix("tfd:"));
        let targets = targets.filter_map(|rest| rest.split_whitespace().next());
        targets.filter(|target| is_socket(target)).count() - usize::from(PORTS)
    };
    of_epoll.map(watched).collect()
}
