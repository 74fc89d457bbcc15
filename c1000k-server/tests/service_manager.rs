//! The server under a service manager: a shell in its place passes sockets, and a datagram socket receives the
//! notifications.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use c1000k_record::ServerRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::{DEADLINE, by_shell, connect, echo, free_ports, run, wait};

/// The server with two sockets as its descriptors 3 and 4, as a service manager passes them.
fn with_sockets(one: TcpListener, other: TcpListener) -> Command {
    let mut command =
        by_shell("export LISTEN_PID=$$ LISTEN_FDS=2; exec 3<&0 4<&1 </dev/null >/dev/null;");
    command.stdin(OwnedFd::from(one)).stdout(OwnedFd::from(other)).stderr(Stdio::piped());
    command
}

/// A pair of listeners on ports in a row.
fn listeners() -> (u16, [TcpListener; 2]) {
    let first = free_ports(2);
    (first, [first, first + 1].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap()))
}

fn notification(from: &UnixDatagram) -> String {
    let mut buffer = [0; 256];
    let bytes = from.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..bytes]).into_owned()
}

fn end(mut child: Child, record: &Path) -> ServerRecord {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = wait(&mut child);
    let log: Vec<_> =
        BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok).collect();
    assert_eq!(status.code(), Some(0), "{log:#?}");
    ServerRecord::read(record).unwrap()
}

#[test]
fn passed_sockets_are_served_and_the_manager_is_notified() {
    let folder = tempfile::tempdir().unwrap();
    let (record, notify) = (folder.path().join("record"), folder.path().join("notify"));
    let notified = UnixDatagram::bind(&notify).unwrap();
    notified.set_read_timeout(Some(DEADLINE)).unwrap();
    let (first_port, [one, other]) = listeners();
    // Before the server starts: the backlog is passed too.
    let early = connect((Ipv4Addr::LOCALHOST, first_port));
    let mut command = with_sockets(other, one);
    command.args(["--ports", "9", "--json"]).arg(&record).env("NOTIFY_SOCKET", &notify);
    let child = command.spawn().unwrap();
    drop(command);
    assert_eq!(notification(&notified), "READY=1\n");
    echo(&early, b"from the backlog");
    echo(&connect((Ipv4Addr::LOCALHOST, first_port + 1)), b"by the other");
    let record = end(child, &record);
    assert_eq!(notification(&notified), "STOPPING=1\n");
    assert_eq!((record.first_port, record.ports, record.accepted), (first_port, 2, 2));
    assert_eq!(record.bind, "127.0.0.1");
}

#[test]
fn sockets_that_were_passed_to_another_process_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let notify = folder.path().join("notify");
    let notified = UnixDatagram::bind(&notify).unwrap();
    notified.set_read_timeout(Some(DEADLINE)).unwrap();
    let port = free_ports(1);
    let mut command = by_shell("export LISTEN_PID=1 LISTEN_FDS=1;");
    command.args(["--bind", "127.0.0.1", "--ports", "1", "--json"]);
    let record = folder.path().join("record");
    command.arg(&record).args(["--first-port", &port.to_string()]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).env("NOTIFY_SOCKET", &notify);
    let child = command.spawn().unwrap();
    assert_eq!(notification(&notified), "READY=1\n");
    echo(&connect((Ipv4Addr::LOCALHOST, port)), b"its own port");
    assert_eq!(end(child, &record).first_port, port);
}

#[test]
fn sockets_that_can_not_be_served_are_refused_in_one_line() {
    let refusal = |mut command: Command| {
        let mut child = command.spawn().unwrap();
        drop(command);
        assert!(!wait(&mut child).success());
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        log.map_while(Result::ok).last().unwrap()
    };
    let first = free_ports(3);
    let [one, other] =
        [first, first + 2].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
    let line = refusal(with_sockets(one, other));
    assert!(line.contains("ports in a row"), "{line}");

    let (_, [one, other]) = listeners();
    let mut command = with_sockets(one, other);
    command.args(["--threads", "2"]);
    let line = refusal(command);
    assert!(line.contains("leave out --threads"), "{line}");

    let mut command = by_shell("export LISTEN_PID=$$ LISTEN_FDS=1; exec 3</dev/null;");
    let output = run(&mut command);
    let line = String::from_utf8_lossy(&output.stderr);
    assert!(line.contains("LISTEN_FDS") && line.contains("not a socket"), "{line}");
}
