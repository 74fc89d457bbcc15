//! The server binary on real sockets, ended when the test ends, and peers with a deadline on each wait.

#![allow(dead_code)] // Each test binary uses a part of it.
#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

use std::borrow::Borrow;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use c1000k_host::limits::raise_descriptor_limit;
use c1000k_record::ServerRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longer than any step on a busy machine; only a failure waits this long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_c1000k-server");

/// Below the ephemeral ports, of which tests leave many in TIME_WAIT, also where these begin at 10,000.
const PORTS_FROM: u16 = 2_000;
const PORTS_TO: u16 = 9_800;

/// A server that listens, and its log.
pub(crate) struct Server {
    child: Child,
    pub(crate) first_port: u16,
    folder: TempDir,
    log: Receiver<String>,
    lines: Vec<String>,
}

impl Server {
    /// Starts it on `ports` free ports of the loopback and waits until it is ready.
    pub(crate) fn start(ports: u16, arguments: &[&str]) -> Self {
        Self::start_by("", ports, arguments)
    }

    /// The same, with a hard limit on its descriptors.
    pub(crate) fn start_limited(descriptors: u32, ports: u16, arguments: &[&str]) -> Self {
        Self::start_by(&descriptor_limit(descriptors), ports, arguments)
    }

    /// The same by a shell that first runs `prelude` and then becomes the server.
    pub(crate) fn start_by(prelude: &str, ports: u16, arguments: &[&str]) -> Self {
        // Many peers need more than the usual soft limit of 1,024.
        raise_descriptor_limit().unwrap();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let first_port = free_ports(ports);
            let folder = tempfile::tempdir().unwrap();
            let mut command = by_shell(prelude);
            if !arguments.contains(&"--bind") {
                command.args(["--bind", "127.0.0.1"]);
            }
            command.arg(format!("--first-port={first_port}")).args(["--ports", &ports.to_string()]);
            command.args(["--interval", "100ms", "--json"]).arg(folder.path().join("record"));
            command
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let log = read_lines(child.stderr.take().unwrap());
            let mut server = Self { child, first_port, folder, log, lines: Vec::new() };
            if server.sees_line("ready: ") {
                return server;
            }
            // Another test may have taken a port between the probe and now.
            let in_use = server.lines.iter().any(|line| line.contains("in use"));
            assert!(in_use && Instant::now() < deadline, "no start: {:?}", server.lines);
        }
    }

    pub(crate) fn address(&self, offset: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.first_port + offset).into()
    }

    pub(crate) fn connect(&self, offset: u16) -> TcpStream {
        connect(self.address(offset))
    }

    /// Whether a new connection is reset.
    pub(crate) fn refuses(&self, offset: u16) -> bool {
        try_connect(self.address(offset)).is_none_or(|stream| is_refused(&stream))
    }

    /// The number of connections that are reset before one is admitted because another has closed.
    ///
    /// # Panics
    /// If none is admitted within [`DEADLINE`].
    pub(crate) fn refusals_until_room(&self, offset: u16) -> u64 {
        let mut refusals = 0;
        let admitted = until(DEADLINE, || {
            let refused = self.refuses(offset);
            refusals += u64::from(refused);
            !refused
        });
        assert!(admitted, "the place of the closed connection is not reused");
        refusals
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains this, from the start of the log; `false` if the log ends without one.
    pub(crate) fn sees_line(&mut self, part: &str) -> bool {
        if self.lines.iter().any(|line| line.contains(part)) {
            return true;
        }
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.log.recv_timeout(left) else {
                assert!(Instant::now() < deadline, "{part:?} is not in {:#?}", self.lines);
                return false;
            };
            let found = line.contains(part);
            self.lines.push(line);
            if found {
                return true;
            }
        }
    }

    /// All lines so far that contain this.
    pub(crate) fn lines_with(&mut self, part: &str) -> Vec<String> {
        self.lines.extend(self.log.try_iter());
        self.lines.iter().filter(|line| line.contains(part)).cloned().collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// Ends it with SIGTERM, reads its record, and checks both.
    pub(crate) fn stop(mut self) -> ServerRecord {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{:#?}", self.lines_with(""));
        let record = self.record();
        assert_eq!(record.open, 0, "{record:?}");
        assert_eq!(record.accepted, record.closed, "{record:?}");
        assert_eq!(record.refused, record.refused_by.values().sum::<u64>(), "{record:?}");
        assert!(record.rss_peak_bytes >= record.rss_at_peak_bytes, "{record:?}");
        record
    }

    pub(crate) fn record(&self) -> ServerRecord {
        ServerRecord::read(&self.folder.path().join("record")).unwrap()
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Resident memory now.
    pub(crate) fn rss_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server with a hard descriptor limit.
pub(crate) fn limited(descriptors: u32) -> Command {
    by_shell(&descriptor_limit(descriptors))
}

/// The commands of a shell before it becomes the server.
fn descriptor_limit(descriptors: u32) -> String {
    format!("ulimit -n {descriptors} &&")
}

/// The server, by a shell that runs `prelude` and then becomes the server.
pub(crate) fn by_shell(prelude: &str) -> Command {
    by_shell_as(Path::new(BINARY), prelude)
}

/// The same with another copy of the server.
pub(crate) fn by_shell_as(binary: &Path, prelude: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{prelude} exec \"$0\" \"$@\"")]).arg(binary);
    command
}

/// A test of something that this machine does not have passes with a message.
pub(crate) fn skip(what: &str, why: &str) {
    // Not captured by the test harness.
    let _ = writeln!(std::io::stderr(), "{what} is skipped: {why}");
}

/// Shell commands that run the rest in a new mount namespace, after these commands.
pub(crate) fn in_new_mounts(commands: &str) -> String {
    format!("exec unshare --mount sh -c '{commands} && exec \"$0\" \"$@\"' \"$0\" \"$@\";")
}

/// Whether such commands work here; if not, prints a message.
pub(crate) fn can_mount(what: &str, commands: &str) -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "sh", "-c", commands])
        .stderr(Stdio::null())
        .status();
    let works = tried.is_ok_and(|status| status.success());
    if !works {
        skip(what, "no mounts can be made here");
    }
    works
}

/// Runs to the end, which must be soon.
pub(crate) fn run(command: &mut Command) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait(&mut child);
    child.wait_with_output().unwrap()
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let mut status = None;
    let ended = until(DEADLINE, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    if !ended {
        let _ = child.kill();
        panic!("the process does not end");
    }
    status.unwrap()
}

/// Checks repeatedly until the condition holds; returns whether it did in time.
pub(crate) fn until(most: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + most;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// The first of `count` consecutive ports on which no socket listens.
pub(crate) fn free_ports(count: u16) -> u16 {
    const COUNT_MAX: u16 = 128;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    assert!(count <= COUNT_MAX);
    let spread = (std::process::id() % 150) as u16 * 32;
    for _ in 0..1000 {
        // One modulus for all counts, so that no two calls get the same ports.
        let step = NEXT.fetch_add(count, Ordering::Relaxed);
        let first = PORTS_FROM + (spread + step) % (PORTS_TO - PORTS_FROM - COUNT_MAX);
        let free = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
        if (first..first + count).all(free) {
            return first;
        }
    }
    panic!("no {count} free ports in a row");
}

pub(crate) fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    try_connect(address).expect("is not reset")
}

/// A connection; `None` if it is reset before `connect` returns.
pub(crate) fn try_connect(address: impl Into<SocketAddr>) -> Option<TcpStream> {
    match TcpStream::connect_timeout(&address.into(), DEADLINE) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        connected => {
            let stream = connected.unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.set_write_timeout(Some(DEADLINE)).unwrap();
            // A refusing server may have reset it by now.
            let _ = stream.set_nodelay(true);
            Some(stream)
        }
    }
}

/// A connection from an address of this machine.
pub(crate) fn connect_from(source: IpAddr, to: SocketAddr) -> TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    use std::os::fd::AsRawFd;
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0))).unwrap();
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Sends the message and waits for the same bytes; returns how long that took.
pub(crate) fn echo(mut stream: &TcpStream, message: &[u8]) -> Duration {
    let started = Instant::now();
    stream.write_all(message).unwrap();
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer == message, "the echo differs");
    started.elapsed()
}

/// The same on each of them in turn.
pub(crate) fn echo_all<S: Borrow<TcpStream>>(streams: &[S], message: &[u8]) {
    for stream in streams {
        echo(stream.borrow(), message);
    }
}

/// Whether the server has reset the connection; waits for an echo or a reset.
pub(crate) fn is_refused(mut stream: &TcpStream) -> bool {
    let message = b"is anybody there?";
    let mut answer = [0; 17];
    match stream.write_all(message).and_then(|()| stream.read_exact(&mut answer)) {
        Ok(()) => false,
        Err(error) => {
            let reset = matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
            assert!(reset, "neither an echo nor a reset: {error}");
            true
        }
    }
}

/// The bytes read until the peer ends the connection, and how it ended.
pub(crate) fn read_to_end(mut stream: &TcpStream) -> (Vec<u8>, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, Ok(())),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => return (bytes, Err(error)),
        }
    }
}

/// Writes until the server accepts no more for `quiet`; returns how much it accepted.
pub(crate) fn fill(mut stream: &TcpStream, quiet: Duration, most: usize) -> usize {
    stream.set_write_timeout(Some(quiet)).unwrap();
    let mut written = 0;
    while written < most {
        let chunk: Vec<u8> = (written..written + 8192).map(pattern).collect();
        match stream.write(&chunk) {
            Ok(count) => written += count,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => break,
                _ => panic!("writing ended with {error}"),
            },
        }
    }
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    written
}

/// The byte that [`fill`] sends at a position.
pub(crate) fn pattern(position: usize) -> u8 {
    (position % 251) as u8
}
