//! Each example, run as a program.

#![expect(clippy::unwrap_used, reason = "a test reports errors by panicking")]

mod common;
#[path = "examples/rolling_restart.rs"]
mod rolling_restart;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::descriptors::Descriptors;

const DEADLINE: Duration = Duration::from_secs(30);
const ANY_PORT: &str = "127.0.0.1:0";

/// A running example, which is killed when dropped.
struct Example {
    process: Child,
    lines: Receiver<String>,
}

impl Example {
    fn start(name: &str, args: &[&str]) -> Self {
        Self::start_with(name, args, Stdio::null())
    }

    fn start_with(name: &str, args: &[&str], errors: Stdio) -> Self {
        Self::spawn(Command::new(binary(name)).args(args).stderr(errors))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { process, lines }
    }

    /// Starts an example that listens on a single address; returns it with the address.
    fn listening(name: &str) -> (Self, SocketAddr) {
        let example = Self::start(name, &[ANY_PORT]);
        let address = example.address();
        (example, address)
    }

    /// Returns the address at the end of the next line that it prints.
    fn address(&self) -> SocketAddr {
        let line = self.lines.recv_timeout(DEADLINE).expect("the example prints its address");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Sends SIGTERM, and checks that it exits successfully.
    fn terminate(self) {
        self.ask_to_end();
        self.expect_end();
    }

    fn ask_to_end(&self) {
        kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM).unwrap();
    }

    fn expect_end(mut self) {
        let status = self.end();
        assert!(status.success(), "{status}");
    }

    /// Waits until it has exited by itself.
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the example does not exit");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Cargo builds the examples before it runs the tests, into a neighbouring folder.
fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let folder = own.parent().unwrap().parent().unwrap().join("examples");
    let binary = folder.join(name);
    assert!(
        binary.exists(),
        "{name} is not built: run `cargo build --examples`, or `cargo test` without `--test`"
    );
    binary
}

fn peer(address: SocketAddr) -> TcpStream {
    let peer = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    peer.set_read_timeout(Some(DEADLINE)).unwrap();
    peer.set_write_timeout(Some(DEADLINE)).unwrap();
    peer.set_nodelay(true).unwrap();
    peer
}

fn expect(peer: &mut TcpStream, expected: &[u8]) {
    let mut received = vec![0; expected.len()];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(String::from_utf8_lossy(&received), String::from_utf8_lossy(expected));
}

fn read_all(peer: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    peer.read_to_end(&mut received).unwrap();
    received
}

/// Waits until the peer's connection has ended; discards input before that.
fn expect_gone(peer: &mut TcpStream) {
    let mut buffer = [0; 64 * 1024];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the connection has not ended: {error}"),
        }
    }
}

/// Writes until nothing is accepted for half a second; returns the number of written bytes.
fn write_until_stuck(peer: &mut TcpStream, bytes: &[u8]) -> usize {
    peer.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut written = 0;
    while written < bytes.len() {
        match peer.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("the peer could not write: {error}"),
        }
    }
    peer.set_write_timeout(Some(DEADLINE)).unwrap();
    written
}

/// Bytes with which missing or reordered parts are detected.
fn pattern(length: usize) -> Vec<u8> {
    const PERIOD: usize = 65_537;
    let period: Vec<u8> =
        (0..PERIOD).map(|index| (index % 251) as u8 ^ (index / 251) as u8).collect();
    let mut bytes = period.repeat(length.div_ceil(PERIOD));
    bytes.truncate(length);
    bytes
}

/// More than all buffers on the path hold together.
const TOO_MUCH_BYTES: usize = 64 * 1024 * 1024;

/// Runs an example that must fail; returns its standard error and its exit code.
fn refusal(name: &str, args: &[&str]) -> (String, Option<i32>) {
    let mut example = Example::start_with(name, args, Stdio::piped());
    let status = example.end();
    let mut said = String::new();
    example.process.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (said, status.code())
}

#[test]
fn each_example_reports_invalid_arguments_in_one_line() {
    let _descriptors = Descriptors::counted();
    let taken = TcpListener::bind(ANY_PORT).unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let no_address =
        "\"localhost:7007\" is not an address; expected IP:PORT, for example 127.0.0.1:7007";
    for name in [
        "chat",
        "connect_proxy",
        "echo",
        "http_keepalive",
        "idle_push",
        "in_mio",
        "in_tokio",
        "mqtt_broker",
        "rolling_restart",
        "tcp_proxy",
        "udp_echo",
        "wss_push",
    ] {
        let (said, code) = refusal(name, &["localhost:7007", ANY_PORT]);
        assert_eq!((said, code), (format!("Error: {no_address}\n"), Some(2)), "{name}");
    }
    for (name, args) in [("echo", &[taken.as_str()][..]), ("tcp_proxy", &[&taken, ANY_PORT])] {
        let (said, code) = refusal(name, args);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("Address already in use"), "{said}");
        assert_eq!(code, Some(1), "{name}");
    }
    let (said, code) = refusal("idle_push", &[ANY_PORT, ANY_PORT, "-1"]);
    assert_eq!((said.as_str(), code), ("Error: \"-1\" is not a number of seconds\n", Some(2)));
    let (said, code) = refusal("tcp_proxy", &[ANY_PORT]);
    assert!(said.contains("tcp_proxy LISTEN UPSTREAM"), "{said}");
    assert_eq!((said.lines().count(), code), (1, Some(2)));
}

#[test]
fn echo_sends_everything_back_and_ends_on_sigterm() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("echo");
    let mut peer = peer(address);
    for message in ["one", "two", "three"] {
        peer.write_all(message.as_bytes()).unwrap();
        expect(&mut peer, message.as_bytes());
    }

    // The example closes only after it has echoed everything.
    let bytes = pattern(8 * 1024 * 1024);
    let mut writer = peer.try_clone().unwrap();
    let sent = bytes.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    assert!(read_all(&mut peer) == bytes, "the echo differs");
    writing.join().unwrap();
    example.terminate();
}

#[test]
fn echo_slows_only_a_peer_that_does_not_read() {
    let _descriptors = Descriptors::counted();
    let (_example, address) = Example::listening("echo");
    let mut slow = peer(address);
    let bytes = pattern(TOO_MUCH_BYTES);
    let written = write_until_stuck(&mut slow, &bytes);
    assert!(written < TOO_MUCH_BYTES, "everything was accepted, so some buffer is unbounded");

    let mut bystander = peer(address);
    bystander.write_all(b"still there?").unwrap();
    expect(&mut bystander, b"still there?");

    slow.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut slow) == bytes[..written], "the echo differs");
}

#[test]
fn udp_echo_returns_each_datagram_to_its_sender() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("udp_echo");
    let sockets = [ANY_PORT, ANY_PORT].map(|any| UdpSocket::bind(any).unwrap());
    for (number, socket) in sockets.iter().enumerate() {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        for length in [0, 1, 1400, 60_000] {
            let datagram = vec![number as u8; length];
            socket.send_to(&datagram, address).unwrap();
            let mut answer = vec![0; 64 * 1024];
            let (received, from) = socket.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..received], from), (&datagram[..], address));
        }
    }
    example.terminate();
}

/// More peers than the events of one turn.
const CROWD: usize = 1100;

/// Many peers send a line each at the same time; the example answers each.
fn echo_lines_of_many_peers(address: SocketAddr, answer: impl Fn(&str) -> String) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let mut peers: Vec<_> = (0..CROWD).map(|_| peer(address)).collect();
    for round in 0..2 {
        let line = |number: usize| format!("line {number} of round {round}\n");
        for (number, peer) in peers.iter_mut().enumerate() {
            peer.write_all(line(number).as_bytes()).unwrap();
        }
        for (number, peer) in peers.iter_mut().enumerate() {
            expect(peer, answer(&line(number)).as_bytes());
        }
    }
}

#[test]
fn in_tokio_tasks_answer_what_the_reactor_reads() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("in_tokio");
    echo_lines_of_many_peers(address, str::to_ascii_uppercase);
    let mut last = peer(address);
    last.write_all(b"the last").unwrap();
    expect(&mut last, b"THE LAST");
    example.terminate();
    assert!(read_all(&mut last).is_empty());
}

#[test]
fn in_mio_the_reactor_and_the_programs_own_socket_are_served() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("in_mio");
    let datagrams = UdpSocket::bind(ANY_PORT).unwrap();
    datagrams.set_read_timeout(Some(DEADLINE)).unwrap();
    datagrams.send_to(b"a datagram", address).unwrap();
    echo_lines_of_many_peers(address, str::to_owned);
    let mut answer = [0; 64];
    let received = datagrams.recv(&mut answer).unwrap();
    assert_eq!(&answer[..received], b"a datagram");
    example.terminate();
}

/// A proxy whose upstream is a listener of the test.
fn proxied() -> (Example, SocketAddr, TcpListener) {
    let upstream = TcpListener::bind(ANY_PORT).unwrap();
    let upstream_address = upstream.local_addr().unwrap().to_string();
    let example = Example::start("tcp_proxy", &[ANY_PORT, &upstream_address]);
    let address = example.address();
    (example, address, upstream)
}

fn accept(upstream: &TcpListener) -> TcpStream {
    let (stream, _) = upstream.accept().unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

#[test]
fn tcp_proxy_forwards_bytes_and_half_closes_in_both_directions() {
    let _descriptors = Descriptors::counted();
    let (example, address, upstream) = proxied();
    let mut client = peer(address);
    client.write_all(b"question").unwrap();
    let mut server = accept(&upstream);
    expect(&mut server, b"question");
    server.write_all(b"answer").unwrap();
    expect(&mut client, b"answer");

    client.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(&mut server).is_empty(), "the server has not received the client's end");
    server.write_all(b"last words").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut client), b"last words");
    example.terminate();
}

#[test]
fn tcp_proxy_slows_each_side_down_to_the_other() {
    let _descriptors = Descriptors::counted();
    let (_example, address, upstream) = proxied();
    let bytes = pattern(TOO_MUCH_BYTES);
    let mut client = peer(address);
    let mut server = accept(&upstream);
    push_through(&mut client, &mut server, &bytes);
    push_through(&mut server, &mut client, &bytes);
}

fn push_through(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    let written = write_until_stuck(from, bytes);
    assert!(written < TOO_MUCH_BYTES, "everything was accepted, so some buffer is unbounded");
    let mut received = vec![0; written];
    to.read_exact(&mut received).unwrap();
    assert!(received == bytes[..written], "what arrived differs");
}

#[test]
fn tcp_proxy_forwards_a_reset_and_survives_a_dead_upstream() {
    let _descriptors = Descriptors::counted();
    let (example, address, upstream) = proxied();
    let mut client = peer(address);
    client.write_all(b"x").unwrap();
    let server = accept(&upstream);
    // Closing with unread input is a reset.
    drop(server);
    expect_gone(&mut client);

    let mut client = peer(address);
    let mut server = accept(&upstream);
    server.write_all(b"x").unwrap();
    expect(&mut client, b"x");
    server.write_all(b"unread").unwrap();
    drop(client);
    expect_gone(&mut server);

    drop(upstream);
    match TcpStream::connect_timeout(&address, DEADLINE) {
        Ok(mut client) => {
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            expect_gone(&mut client);
        }
        // The connection may end before its peer has read.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    example.terminate();
}

const HELLO: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\
                     Connection: keep-alive\r\n\r\nhello\n";

#[test]
fn http_keepalive_answers_pipelined_requests_in_order() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("http_keepalive");
    let mut peer = peer(address);
    peer.write_all(
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\n\r\n\
          GET /nothing HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    )
    .unwrap();
    let head = HELLO.strip_suffix("hello\n").unwrap();
    let not_found =
        HELLO.replace("200 OK", "404 Not Found").replace("hello", "not here").replace(": 6", ": 9");
    expect(&mut peer, format!("{HELLO}{head}{not_found}{HELLO}").as_bytes());
    example.terminate();
}

#[test]
fn http_keepalive_answers_thousands_of_pipelined_requests_to_a_late_reader() {
    let _descriptors = Descriptors::counted();
    const REQUESTS: usize = 100_000;
    let (_example, address) = Example::listening("http_keepalive");
    let mut peer = peer(address);
    let requests = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(REQUESTS);
    let written = write_until_stuck(&mut peer, &requests);
    let mut writer = peer.try_clone().unwrap();
    let writing = thread::spawn(move || {
        writer.write_all(&requests[written..]).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let answers = read_all(&mut peer);
    writing.join().unwrap();
    assert_eq!(answers.len(), HELLO.len() * REQUESTS);
    assert!(answers.chunks(HELLO.len()).all(|answer| answer == HELLO.as_bytes()));
}

#[test]
fn http_keepalive_takes_requests_in_pieces_and_skips_their_bodies() {
    let _descriptors = Descriptors::counted();
    let (_example, address) = Example::listening("http_keepalive");
    let mut peer = peer(address);
    let request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n0123456789\
                    GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    for byte in request {
        peer.write_all(&[*byte]).unwrap();
    }
    expect(&mut peer, format!("{HELLO}{HELLO}").as_bytes());
}

#[test]
fn http_keepalive_closes_where_it_must() {
    let _descriptors = Descriptors::counted();
    let (_example, address) = Example::listening("http_keepalive");
    let closing = HELLO.replace("keep-alive", "close");
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(8 * 1024));
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 "),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, close\r\n\r\n", "HTTP/1.1 200 "),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Close ,x\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 ",
        ),
        ("GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200 "),
        ("GET / HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n", "HTTP/1.1 200 "),
        ("nonsense\r\n\r\n", "HTTP/1.1 400 "),
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "HTTP/1.1 400 "),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", "HTTP/1.1 400 "),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "HTTP/1.1 400 ",
        ),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 501 "),
        (&long, "HTTP/1.1 431 "),
    ] {
        let mut peer = peer(address);
        peer.write_all(request.as_bytes()).unwrap();
        let answer = String::from_utf8(read_all(&mut peer)).unwrap();
        assert!(answer.starts_with(status), "{request}: {answer}");
        assert!(answer.contains("Connection: close\r\n"), "{answer}");
        assert!(!status.contains("200") || answer == closing, "{answer}");
    }
}

#[test]
fn http_keepalive_stays_open_where_it_may() {
    let _descriptors = Descriptors::counted();
    let (_example, address) = Example::listening("http_keepalive");
    let mut peer = peer(address);
    for request in [
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade, x-close\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: x,Keep-Alive\r\n\r\n",
    ] {
        peer.write_all(request.as_bytes()).unwrap();
        expect(&mut peer, HELLO.as_bytes());
    }
}

/// The number of requests that `wrk` pipelines.
const PIPELINED: &str = "16";

/// Runs wrk, an independent load generator, against http_keepalive, if it is installed; returns its output.
fn wrk(address: SocketAddr, script: Option<&Path>) -> Option<String> {
    let mut wrk = Command::new("wrk");
    wrk.args(["--threads", "1", "--connections", "100", "--duration", "2s", "--timeout", "10s"]);
    wrk.args(script.map(|script| ["--script".as_ref(), script.as_os_str()]).into_iter().flatten());
    wrk.arg(format!("http://{address}/"));
    wrk.args(script.map(|_| ["--", PIPELINED]).into_iter().flatten());
    match wrk.output() {
        Ok(output) => Some(String::from_utf8(output.stdout).unwrap()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("skipped: wrk is missing (on Debian: apt-get install wrk)");
            None
        }
        Err(error) => panic!("wrk: {error}"),
    }
}

#[test]
fn http_keepalive_answers_all_requests_of_a_load_generator() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("http_keepalive");
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("pipeline.lua");
    let lines = "init = function(args)
            local all = {}
            for index = 1, tonumber(args[1]) do all[index] = wrk.format('GET', '/') end
            requests = table.concat(all)
        end
        request = function() return requests end";
    std::fs::write(&script, lines).unwrap();
    for script in [None, Some(script.as_path())] {
        let Some(printed) = wrk(address, script) else { break };
        // wrk prints lines on errors only if there were errors.
        assert!(!printed.contains("Socket errors") && !printed.contains("Non-2xx"), "{printed}");
        let answered = printed.lines().find_map(|line| line.trim().split_once(" requests in "));
        assert!(answered.is_some_and(|(count, _)| count.parse::<u64>().unwrap() > 0), "{printed}");
    }
    example.terminate();
}

/// A client of the chat, which reads line by line.
struct Guest {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Guest {
    fn enter(address: SocketAddr, name: &str) -> Self {
        let stream = peer(address);
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut guest = Self { stream, lines };
        assert!(guest.next_line().ends_with("joined lobby"));
        guest.says(&format!("/nick {name}"));
        assert!(guest.next_line().ends_with(&format!("is {name} now")));
        guest
    }

    fn says(&mut self, line: &str) {
        writeln!(self.stream, "{line}").unwrap();
    }

    fn next_line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Reads lines until this one.
    fn read_until(&mut self, expected: &str) {
        loop {
            let line = self.next_line();
            assert!(!line.is_empty(), "the connection ended before: {expected}");
            if line == expected {
                return;
            }
        }
    }
}

#[test]
fn chat_separates_rooms_and_sends_announcements_to_all() {
    let _descriptors = Descriptors::counted();
    let (example, address) = Example::listening("chat");
    let mut ada = Guest::enter(address, "ada");
    let mut bob = Guest::enter(address, "bob");
    let mut cy = Guest::enter(address, "cy");
    for guest in [&mut ada, &mut bob] {
        guest.says("/join attic");
    }
    bob.read_until("* bob joined attic");
    ada.read_until("* bob joined attic");
    cy.read_until("* bob left");

    ada.says("just us two");
    cy.says("anybody?");
    for guest in [&mut ada, &mut bob] {
        assert_eq!(guest.next_line(), "ada: just us two");
    }
    assert_eq!(cy.next_line(), "cy: anybody?");

    cy.says("/all dinner!");
    for guest in [&mut ada, &mut bob, &mut cy] {
        assert_eq!(guest.next_line(), "cy to all: dinner!");
    }
    drop(bob);
    assert_eq!(ada.next_line(), "* bob left");
    example.terminate();
}

#[test]
fn chat_drops_a_reader_that_is_too_slow_and_a_guest_that_floods() {
    let _descriptors = Descriptors::counted();
    let (_example, address) = Example::listening("chat");
    let mut ada = Guest::enter(address, "ada");
    let mut slow = Guest::enter(address, "slow");
    ada.read_until("* guest-1 is slow now");
    let line = "x".repeat(1000);
    let started = Instant::now();
    // The slow guest never reads: its kernel buffers fill up, then its queue.
    loop {
        assert!(started.elapsed() < DEADLINE, "the slow guest is not dropped");
        ada.says(&line);
        if ada.next_line() == "* slow left" {
            break;
        }
    }
    ada.says("gone");
    ada.read_until("ada: gone");
    expect_gone(&mut slow.stream);

    let mut flood = Guest::enter(address, "flood");
    flood.stream.write_all("\n".repeat(10_000).as_bytes()).unwrap();
    ada.read_until("* flood left");
    let mut endless = Guest::enter(address, "endless");
    endless.stream.write_all("x".repeat(2_000).as_bytes()).unwrap();
    ada.read_until("* endless left");
}

/// A gateway with this heartbeat, and its addresses for devices and for operators.
fn gateway(heartbeat_seconds: &str) -> (Example, SocketAddr, SocketAddr) {
    let example = Example::start("idle_push", &[ANY_PORT, ANY_PORT, heartbeat_seconds]);
    let (devices, operators) = (example.address(), example.address());
    (example, devices, operators)
}

fn ask(operator: &mut TcpStream, command: &str) -> String {
    writeln!(operator, "{command}").unwrap();
    let mut answer = String::new();
    BufReader::new(operator).read_line(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

fn device(address: SocketAddr, operator: &mut TcpStream, number: u64) -> TcpStream {
    let before: u64 = ask(operator, "count").parse().unwrap();
    let mut device = peer(address);
    // A number may arrive in pieces.
    for digit in format!("{number}\n").bytes() {
        device.write_all(&[digit]).unwrap();
    }
    let deadline = Instant::now() + DEADLINE;
    while ask(operator, "count") != (before + 1).to_string() {
        assert!(Instant::now() < deadline, "device {number} is not known");
    }
    device
}

#[test]
fn idle_push_sends_to_one_device_or_to_all() {
    let _descriptors = Descriptors::counted();
    let (example, devices, operators) = gateway("60");
    let mut operator = peer(operators);
    let mut numbers =
        [7, 8, 18_446_744_073_709_551_615].map(|number| device(devices, &mut operator, number));
    assert_eq!(ask(&mut operator, "push 8 good morning"), "sent");
    expect(&mut numbers[1], b"good morning\n");
    assert_eq!(ask(&mut operator, "push 9 anybody"), "not here");
    assert_eq!(ask(&mut operator, "all update now"), "on its way");
    for device in &mut numbers {
        expect(device, b"update now\n");
    }

    // A device with the same number replaces the old one.
    let mut again = peer(devices);
    again.write_all(b"8\n").unwrap();
    expect_gone(&mut numbers[1]);
    assert_eq!(ask(&mut operator, "push 8 welcome back"), "sent");
    expect(&mut again, b"welcome back\n");
    assert_eq!(ask(&mut operator, "count"), "3");

    let mut stranger = peer(devices);
    stranger.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    expect_gone(&mut stranger);
    example.terminate();
}

#[test]
fn idle_push_closes_only_devices_without_a_heartbeat() {
    let _descriptors = Descriptors::counted();
    let (_example, devices, operators) = gateway("2.5");
    let mut operator = peer(operators);
    let mut silent = device(devices, &mut operator, 1);
    let mut lively = device(devices, &mut operator, 2);
    let mut nameless = peer(devices);
    let mut beat = lively.try_clone().unwrap();
    let (stop, stopped) = channel::<()>();
    let beating = thread::spawn(move || {
        while stopped.recv_timeout(Duration::from_millis(100)).is_err() {
            beat.write_all(b".").unwrap();
        }
    });
    expect_gone(&mut silent);
    expect_gone(&mut nameless);
    assert_eq!(ask(&mut operator, "push 1 hello"), "not here");
    assert_eq!(ask(&mut operator, "push 2 hello"), "sent");
    expect(&mut lively, b"hello\n");
    stop.send(()).unwrap();
    beating.join().unwrap();
    expect_gone(&mut lively);
}

/// Whether a program is installed. If not, its test is skipped, with a message.
fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).output().unwrap();
    if !found.status.success() {
        println!("{program} is not installed: its test is skipped");
    }
    found.status.success()
}

/// Runs a program until it exits; returns its output.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

const WEBSOCKET_CLIENT: &str = "
import asyncio, ssl, sys, websockets
async def main():
    context = ssl.create_default_context(cafile='cert.pem')
    url = 'wss://localhost:' + sys.argv[1] + '/room'
    async with websockets.connect(url, ssl=context) as one, websockets.connect(url, ssl=context) as two:
        await (await one.ping())
        for text in ['hello', 'x' * 60000]:
            await one.send(text)
            for each in one, two:
                assert await asyncio.wait_for(each.recv(), 20) == text
        await two.close()
        await one.send('still here')
        assert await asyncio.wait_for(one.recv(), 20) == 'still here'
        try:
            await one.send('y' * 70000)
            await asyncio.wait_for(one.recv(), 20)
            raise SystemExit('a message that is too long is taken')
        except websockets.ConnectionClosed:
            print('all is well')
asyncio.run(main())
";

#[test]
fn wss_push_sends_each_text_to_all_through_tls() {
    let _descriptors = Descriptors::counted();
    const PYTHON: &str = "/usr/bin/python3";
    let has_module = Command::new(PYTHON).args(["-c", "import websockets"]).output();
    if !has("openssl") || !has_module.is_ok_and(|output| output.status.success()) {
        return println!("python3-websockets is not installed: the test of wss_push is skipped");
    }
    let folder = tempfile::tempdir().unwrap();
    said(
        Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
            ])
            .args([
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
            ])
            .args(["-addext", "subjectAltName=DNS:localhost"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .current_dir(&folder),
    );
    let path = |name: &str| folder.path().join(name).display().to_string();
    let example = Example::start("wss_push", &[ANY_PORT, &path("cert.pem"), &path("key.pem")]);
    let port = example.address().port().to_string();
    let mut python = Command::new(PYTHON);
    python.args(["-c", WEBSOCKET_CLIENT, &port]).current_dir(&folder);
    assert_eq!(said(&mut python), "all is well\n");

    // Connections without TLS, and those without WebSocket, are closed.
    let mut plain = peer(SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap())));
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    expect_gone(&mut plain);
    // The server answers a client's close_notify that leaves TCP open: `s_client` waits for that.
    let mut client = Command::new("openssl");
    client.args(["s_client", "-quiet", "-connect", &format!("localhost:{port}")]);
    client.stdin(Stdio::null()).stderr(Stdio::null()).current_dir(&folder);
    said(&mut client);
    example.terminate();
}

#[test]
fn mqtt_broker_serves_the_clients_of_mosquitto() {
    let _descriptors = Descriptors::counted();
    if !has("mosquitto_sub") || !has("mosquitto_pub") {
        return;
    }
    let (example, address) = Example::listening("mqtt_broker");
    let port = address.port().to_string();
    let publish = |words: &[&str]| {
        said(Command::new("mosquitto_pub").args(["-p", &port]).args(words));
    };
    publish(&["-t", "rooms/kitchen/light", "-m", "on", "-q", "1", "-r"]);
    let mut subscriber = Command::new("mosquitto_sub")
        .args(["-p", &port, "-q", "1", "-C", "4", "-k", "5", "-F", "%t %q %p"])
        .args(["-t", "rooms/+/light", "-t", "rooms/#", "-t", "alarm"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(subscriber.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    // It has subscribed when it has received the retained message, once for each of two matching filters.
    assert_eq!(next(), "rooms/kitchen/light 1 on");
    assert_eq!(next(), "rooms/kitchen/light 1 on");
    // Longer than its keep-alive: its pings are answered, and it stays connected.
    thread::sleep(Duration::from_millis(8_500));
    publish(&["-t", "elsewhere", "-m", "not for it"]);
    publish(&["-t", "rooms/hall/light", "-m", "off", "-q", "0"]);
    assert_eq!(next(), "rooms/hall/light 0 off");
    publish(&["-t", "alarm", "-m", "now", "-q", "1"]);
    assert_eq!(next(), "alarm 1 now");
    assert!(subscriber.wait().unwrap().success());

    // A silent client is closed after one and a half times its keep-alive.
    let mut silent = peer(address);
    silent.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x01\x00\x01s").unwrap();
    expect(&mut silent, b"\x20\x02\x00\x00");
    let began = Instant::now();
    expect_gone(&mut silent);
    assert!(began.elapsed() >= Duration::from_millis(1_400), "{:?}", began.elapsed());
    let mut wrong = peer(address);
    wrong.write_all(b"\xc0\x00").unwrap();
    expect_gone(&mut wrong);
    example.terminate();
}

#[test]
fn connect_proxy_serves_curl_and_keeps_slots_for_its_own_connects() {
    let _descriptors = Descriptors::counted();
    if !has("curl") {
        return;
    }
    let (web, web_address) = Example::listening("http_keepalive");
    // Half of the 24 slots are for connects.
    let example = Example::start("connect_proxy", &[ANY_PORT, "24"]);
    let address = example.address();
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--noproxy", "", "--proxytunnel", "--proxy"]);
    curl.arg(format!("http://{address}")).arg(format!("http://localhost:{}/", web_address.port()));
    assert_eq!(said(&mut curl), "hello\n");

    // With far more clients than slots, clients wait, and none fails.
    let ask = move || {
        let mut client = peer(address);
        let request = format!("CONNECT localhost:{} HTTP/1.1\r\n\r\n", web_address.port());
        client.write_all(request.as_bytes()).unwrap();
        expect(&mut client, b"HTTP/1.1 200 Connection established\r\n\r\n");
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        String::from_utf8(read_all(&mut client)).unwrap()
    };
    let clients: Vec<_> = (0..200).map(|_| thread::spawn(ask)).collect();
    for client in clients {
        assert!(client.join().unwrap().ends_with("hello\n"));
    }

    for (request, answer) in [
        ("CONNECT no.such.name.invalid:80 HTTP/1.1\r\n\r\n", "HTTP/1.1 502 Bad Gateway"),
        ("GET http://localhost/ HTTP/1.1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        ("nonsense\r\n\r\n", "HTTP/1.1 400 Bad Request"),
    ] {
        let mut client = peer(address);
        client.write_all(request.as_bytes()).unwrap();
        let said = String::from_utf8(read_all(&mut client)).unwrap();
        assert!(said.starts_with(answer), "{request:?}: {said:?}");
    }
    example.terminate();
    web.terminate();
}
