//! Servers with various behaviours in this process, and the real client as a child, with a deadline on each wait.

use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use c1000k_host::limits::raise_descriptor_limit;
use c1000k_record::ClientRecord;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reactor::{Config, Context, Handler, Incoming, ListenOptions, Reactor, Token, Waker};

/// No wait of a test is longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The behaviour of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Manner {
    Echo,
    /// Echoes for this many, and resets all others.
    RefusePast(u64),
    /// Echoes for this many in all, and resets those that come later.
    RefuseAfter(u64),
    /// Echoes for this many, and ends the stream of all others in order.
    HangUpPast(u64),
    /// Echoes for this many, and reads from all others without an answer.
    SilentPast(u64),
    /// Sends the first half of each message back.
    Halve,
    /// The same, and ends the stream.
    HalveAndClose,
    /// Echoes the first message, and sends the first half of all others back.
    HalveAfterEcho,
    /// Answers with other bytes.
    Garble,
    /// Echoes in writes of one byte.
    Dribble,
    /// Echoes once, and ends the stream.
    CloseAfterEcho,
    /// Echoes the first message, and reads all others without an answer.
    SilentAfterEcho,
    /// Echoes the first message, and answers all others with other bytes.
    GarbleAfterEcho,
    /// Echoes, but stops once for some time after this many messages.
    PauseOnce {
        after: u64,
        pause: Duration,
    },
    /// Echoes the first message of each connection after a pause, and all others at once.
    DelayFirst(Duration),
    /// Echoes, but answers this message of all, counted from 1, with other bytes.
    GarbleOnce(u64),
    /// Answers each message like Redis a PING.
    Pong,
}

/// A server on consecutive ports of loopback, in a thread of its own.
pub(crate) struct Server {
    pub(crate) first_port: u16,
    end: Arc<AtomicBool>,
    to_drop: Arc<AtomicUsize>,
    is_silent: Arc<AtomicBool>,
    is_closed: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<u64>>,
}

impl Server {
    /// On loopback.
    pub(crate) fn start(manner: Manner, ports: u16) -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST, manner, ports)
    }

    pub(crate) fn start_at(address: Ipv4Addr, manner: Manner, ports: u16) -> Self {
        Self::start_on(manner, move || listening(address, ports))
    }

    /// On a Unix-domain socket with this backlog.
    pub(crate) fn start_unix(path: &Path, manner: Manner, backlog: Option<u32>) -> Self {
        let path = path.to_owned();
        Self::start_on(manner, move || (listening_unix(path, backlog), 0))
    }

    fn start_on(
        manner: Manner,
        listen: impl FnOnce() -> (Reactor<Peer>, u16) + Send + 'static,
    ) -> Self {
        raise_descriptor_limit().unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let to_drop = Arc::new(AtomicUsize::new(0));
        let (is_silent, is_closed) = (Arc::default(), Arc::default());
        let (sender, receiver) = mpsc::channel();
        let (is_over, count) = (Arc::clone(&end), Arc::clone(&to_drop));
        let service = Service {
            manner,
            end: is_over,
            to_drop: count,
            is_silent: Arc::clone(&is_silent),
            is_closed: Arc::clone(&is_closed),
            open: 0,
            accepted: 0,
            peak: 0,
            messages: 0,
        };
        let thread = thread::spawn(move || {
            let (mut reactor, first_port) = listen();
            sender.send((first_port, reactor.context().waker())).unwrap();
            let mut service = service;
            reactor.run(&mut service).unwrap();
            service.peak
        });
        let (first_port, waker) = receiver.recv_timeout(DEADLINE).unwrap();
        Self { first_port, end, to_drop, is_silent, is_closed, waker, thread: Some(thread) }
    }

    /// Ends the streams of `count` of its connections.
    pub(crate) fn drop_some(&self, count: usize) {
        self.to_drop.store(count, Ordering::Release);
        self.waker.wake();
    }

    /// Answers nothing more.
    pub(crate) fn fall_silent(&self) {
        self.is_silent.store(true, Ordering::Release);
    }

    /// Closes its listeners, and keeps its connections.
    pub(crate) fn stop_listening(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Stops with all its connections; returns the maximum at once.
    pub(crate) fn die(mut self) -> u64 {
        self.end()
    }

    fn end(&mut self) -> u64 {
        self.end.store(true, Ordering::Release);
        self.waker.wake();
        self.thread.take().map_or(0, |thread| thread.join().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Listens on consecutive ports below the ephemeral ports, of which the tests use many, also where these begin at 10,000.
fn listening(address: Ipv4Addr, ports: u16) -> (Reactor<Peer>, u16) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    raise_descriptor_limit().unwrap(); // the usual soft limit, 1,024, is too low
    // So the TIME_WAITs of another test process do not interfere.
    let spread = (std::process::id() % 600) as u16 * 32;
    for _ in 0..500 {
        let config = Config { connections_max: 8_192, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let cx = reactor.context();
        let options = ListenOptions::default();
        // A test may also connect to the following ports, on which nothing may listen.
        let step = NEXT.fetch_add(ports + 20, Ordering::Relaxed);
        let first_port = 2_000 + (spread + step) % 7_500;
        let mut all = first_port..first_port + ports;
        if all.all(|port| cx.listen((address, port), &options).is_ok()) {
            return (reactor, first_port);
        }
    }
    panic!("no {ports} consecutive ports are free");
}

fn listening_unix(path: PathBuf, backlog: Option<u32>) -> Reactor<Peer> {
    let config = Config { connections_max: 8_192, ..Config::default() };
    let mut reactor = Reactor::new(&config).unwrap();
    let options = ListenOptions { backlog, ..ListenOptions::default() };
    reactor.context().listen(path, &options).unwrap();
    reactor
}

struct Service {
    manner: Manner,
    end: Arc<AtomicBool>,
    to_drop: Arc<AtomicUsize>,
    is_silent: Arc<AtomicBool>,
    is_closed: Arc<AtomicBool>,
    open: u64,
    accepted: u64,
    peak: u64,
    messages: u64,
}

/// The server's state of a connection.
struct Peer {
    is_answered: bool,
    was_answered: bool,
}

impl Handler for Service {
    type Conn = Peer;

    fn on_accept(&mut self, _: &mut Context<Peer>, _: &Incoming<'_>) -> Option<Peer> {
        match self.manner {
            Manner::RefusePast(most) if self.open >= most => None,
            Manner::RefuseAfter(most) if self.accepted >= most => None,
            _ => Some(Peer { is_answered: true, was_answered: false }),
        }
    }

    fn on_open(&mut self, cx: &mut Context<Peer>, token: Token, peer: &mut Peer) {
        self.open += 1;
        self.accepted += 1;
        match self.manner {
            Manner::HangUpPast(most) if self.open > most => cx.close(token),
            Manner::SilentPast(most) => peer.is_answered = self.open <= most,
            _ => self.peak = self.peak.max(self.open),
        }
    }

    fn on_data(&mut self, cx: &mut Context<Peer>, token: Token, peer: &mut Peer, bytes: &mut [u8]) {
        if !peer.is_answered || self.is_silent.load(Ordering::Acquire) {
            return;
        }
        self.messages += 1;
        let is_later = std::mem::replace(&mut peer.was_answered, true);
        let written = match self.manner {
            Manner::Pong => cx.write(token, b"+PONG\r\n"),
            Manner::PauseOnce { after, pause } if self.messages == after => {
                thread::sleep(pause);
                cx.write(token, bytes)
            }
            Manner::DelayFirst(pause) if !is_later => {
                thread::sleep(pause);
                cx.write(token, bytes)
            }
            Manner::GarbleOnce(one) if self.messages == one => {
                cx.write(token, &vec![b'?'; bytes.len()])
            }
            Manner::SilentAfterEcho if is_later => return,
            Manner::GarbleAfterEcho if is_later => cx.write(token, &vec![b'?'; bytes.len()]),
            Manner::Halve | Manner::HalveAndClose => cx.write(token, &bytes[..bytes.len() / 2]),
            Manner::HalveAfterEcho if is_later => cx.write(token, &bytes[..bytes.len() / 2]),
            Manner::Garble => cx.write(token, &vec![b'?'; bytes.len()]),
            Manner::Dribble => {
                bytes.chunks(1).try_fold(reactor::Written::Sent, |_, byte| cx.write(token, byte))
            }
            _ => cx.write(token, bytes),
        };
        let _ = written;
        if let Manner::CloseAfterEcho | Manner::HalveAndClose = self.manner {
            cx.close(token);
        }
    }

    fn on_close(&mut self, _: &mut Context<Peer>, _: Token, _: Peer, _: reactor::CloseReason) {
        self.open -= 1;
    }

    fn on_wake(&mut self, cx: &mut Context<Peer>) {
        if self.end.load(Ordering::Acquire) {
            return cx.stop();
        }
        if self.is_closed.load(Ordering::Acquire) {
            let listeners: Vec<_> = cx.listeners().collect();
            listeners.into_iter().for_each(|listener| cx.unlisten(listener));
        }
        let count = self.to_drop.swap(0, Ordering::AcqRel);
        let tokens: Vec<Token> = cx.tokens(0..cx.slots()).take(count).collect();
        tokens.into_iter().for_each(|token| cx.close(token));
    }
}

/// The real client, running.
pub(crate) struct Client {
    child: Child,
    /// What it writes to standard error, line by line.
    lines: Receiver<String>,
    seen: Vec<String>,
    stdout: JoinHandle<String>,
    deadline: Instant,
}

/// The result of a client.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: Vec<String>,
}

impl Client {
    /// Starts it with these words, separated by spaces.
    pub(crate) fn start(words: &str) -> Self {
        Self::spawn(
            Command::new(env!("CARGO_BIN_EXE_c1000k-client")).args(words.split_whitespace()),
        )
    }

    /// Starts it from a shell that runs `before` first.
    pub(crate) fn start_after(before: &str, words: &str) -> Self {
        let script = format!("{before}; exec \"$0\" {words}");
        Self::spawn(Command::new("bash").args(["-c", &script, env!("CARGO_BIN_EXE_c1000k-client")]))
    }

    /// The same in a mount namespace of its own.
    pub(crate) fn start_in_new_mounts(before: &str, words: &str) -> Self {
        let script = format!("{before} && exec \"$0\" {words}");
        let mut command = Command::new("unshare");
        Self::spawn(command.args([
            "--mount",
            "bash",
            "-c",
            &script,
            env!("CARGO_BIN_EXE_c1000k-client"),
        ]))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(stderr).lines().map_while(Result::ok);
            lines.for_each(|line| _ = tell.send(line));
        });
        let stdout = thread::spawn(move || {
            let mut text = String::new();
            BufReader::new(stdout).read_to_string(&mut text).unwrap();
            text
        });
        Self { child, lines, seen: vec![], stdout, deadline: Instant::now() + DEADLINE }
    }

    /// Waits for a line of standard error with this beginning.
    pub(crate) fn await_line(&mut self, start: &str) {
        self.await_line_that(|line| line.starts_with(start));
    }

    /// Waits until progress shows connections that are held.
    pub(crate) fn await_some_held(&mut self) {
        self.await_line_that(|line| {
            line.starts_with("opening: ") && !line.starts_with("opening: 0 ")
        });
    }

    /// Waits for a line of standard error with these words.
    pub(crate) fn await_words(&mut self, words: &str) {
        self.await_line_that(|line| line.contains(words));
    }

    fn await_line_that(&mut self, fits: impl Fn(&str) -> bool) {
        while !self.seen.last().is_some_and(|line| fits(line)) {
            self.take_line().unwrap_or_else(|| panic!("no such line: {:?}", self.seen));
        }
    }

    /// Lowers the limit on its descriptors while it runs.
    pub(crate) fn limit_descriptors(&self, most: u32) {
        let (process, limit) = (self.child.id().to_string(), format!("--nofile={most}"));
        let lowered = Command::new("prlimit").args(["--pid", &process, &limit]).status();
        assert!(lowered.unwrap().success(), "prlimit is part of util-linux");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn end(mut self) -> Ended {
        while self.take_line().is_some() {}
        let status = self.child.wait().unwrap();
        Ended { code: status.code(), stdout: self.stdout.join().unwrap(), stderr: self.seen }
    }

    /// The next line; `None` at the end of the stream. Past the deadline the client is ended and the test fails.
    fn take_line(&mut self) -> Option<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => self.seen.push(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => return None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.child.kill().unwrap();
                panic!("the client did not end in time: {:?}", self.seen);
            }
        }
        Some(())
    }
}

/// Runs the client to its end with `--json -`, and reads its record.
pub(crate) fn run(words: &str) -> (Ended, ClientRecord) {
    let ended = Client::start(&format!("{words} --json -")).end();
    let record = record(&ended);
    (ended, record)
}

pub(crate) fn record(ended: &Ended) -> ClientRecord {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}
