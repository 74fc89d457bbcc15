//! Both real programs against each other: their records and the kernel's counts must agree.
//!
//! The kernel counts sockets by network namespace: each test runs in one of its own, in which no other process opens any.

#![allow(clippy::unwrap_used)] // A test may unwrap: its panic is its report.

use std::collections::BTreeSet;
use std::env::consts::EXE_SUFFIX;
use std::fs;
use std::hint;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use c1000k_record::schema::{self, Schema};
use c1000k_record::{ClientRecord, ServerRecord, Verdict};
use serde_json::Value;

const CONNECTIONS: u64 = 3_000;
const PORTS: u16 = 10;
const DEADLINE: Duration = Duration::from_secs(60);

/// The variable that is set within the namespace, to the folder of the programs.
const INSIDE: &str = "C1000K_TOGETHER_INSIDE";

#[test]
fn both_records_and_the_kernel_agree_on_three_thousand_connections() {
    in_a_network_of_its_own(
        "both_records_and_the_kernel_agree_on_three_thousand_connections",
        play,
    );
}

#[test]
fn a_limit_that_is_met_is_named_in_the_summary() {
    in_a_network_of_its_own("a_limit_that_is_met_is_named_in_the_summary", meet_each_limit);
}

/// Runs a test of this file, by its name, once more in a network namespace, and there what it does.
fn in_a_network_of_its_own(name: &str, act: fn(&Path)) {
    if let Some(programs) = std::env::var_os(INSIDE) {
        return act(Path::new(&programs));
    }
    let Some(mut inside) = in_a_new_network() else {
        return skip(name, "no network namespace can be made here");
    };
    inside.arg(std::env::current_exe().unwrap()).args(["--exact", name]);
    let output = inside.env(INSIDE, build()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

/// Says so past the test harness, which keeps what a passing test prints.
fn skip(what: &str, why: &str) {
    let mut stderr = io::stderr();
    writeln!(stderr, "{what} is skipped: {why}").unwrap();
}

/// What runs a program in a network namespace that has a loopback and nothing else; an ordinary user needs one of users
/// for that.
fn in_a_new_network() -> Option<Command> {
    const LOOPBACK: &str = "ip link set lo up && exec \"$0\" \"$@\"";
    let command = |new: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(new).args(["sh", "-c", LOOPBACK]);
        command
    };
    let works = |new: &&[&str]| {
        let tried = command(new).arg("true").stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    let ways = [&["--net"][..], &["--net", "--user", "--map-root-user"]];
    ways.into_iter().find(works).map(command)
}

fn play(programs: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let first_port = free_ports(PORTS);
    let before = sockets_in_use();
    let mut server = Program::start(
        Command::new(programs.join(format!("c1000k-server{EXE_SUFFIX}")))
            .args(["--bind", "127.0.0.1", "--first-port", &first_port.to_string()])
            .args(["--ports", &PORTS.to_string(), "--json"])
            .arg(folder.path().join("server.json")),
    );
    server.wait_for("ready");
    let mut client = Program::start(
        Command::new(programs.join(format!("c1000k-client{EXE_SUFFIX}")))
            .args(["127.0.0.1", &first_port.to_string(), "--ports", &PORTS.to_string()])
            .args(["-c", &CONNECTIONS.to_string(), "--hold", "2s", "--json"])
            .arg(folder.path().join("client.json")),
    );
    client.wait_for("holding");
    let held = sockets_in_use();
    let by_port = established_at(first_port..first_port + PORTS);
    assert_eq!(client.exit_code(), 0);
    server.terminate();
    assert_eq!(server.exit_code(), 0);

    assert_eq!(by_port, CONNECTIONS, "the kernel's table of the server's ends");
    assert!(held >= before + 2 * CONNECTIONS, "sockstat rose from {before} to {held} only");
    let [client, server] = ["client.json", "server.json"].map(|name| folder.path().join(name));
    assert_has_all_of(&schema::client(), &client);
    assert_has_all_of(&schema::server(), &server);
    compare(&ClientRecord::read(&client).unwrap(), &ServerRecord::read(&server).unwrap());
}

/// Both programs against each other, once for each limit that can be set here.
fn meet_each_limit(programs: &Path) {
    let few = ["--ports", "1", "-c", "500", "--hold", "100ms"];
    // Most of them wait a second or more.
    let fewer = ["--ports", "1", "-c", "150", "--hold", "100ms"];
    let with_few = |more: &[&'static str]| [&few[..], more].concat();
    let tiny_backlog = &["--backlog", "1"][..];
    let no_memory = &["--memory-reserve", "99%"][..];
    let in_process = &["--file-table", "process"][..];

    // As fast as the processors allow, which have other work too: so none of them is idle, however many there are.
    let flood = ["--ports", "1", "-c", "10000", "--hold", "100ms"];
    let kind =
        with_busy_processors(|| meet(programs, Meeting { client: &flood, ..Meeting::default() }));
    let cpu = ["client_cpu", "server_cpu", "other_cpu"];
    assert!(cpu.contains(&kind.as_str()), "{kind}");

    let meetings = [
        ("backlog", Meeting { server: tiny_backlog, client: &fewer, ..Meeting::default() }),
        ("memory", Meeting { server: no_memory, client: &few, ..Meeting::default() }),
        (
            "descriptors",
            Meeting {
                client_before: "ulimit -n 300",
                client: &with_few(in_process),
                ..Meeting::default()
            },
        ),
        (
            "descriptors",
            Meeting {
                server_before: "ulimit -n 300",
                server: in_process,
                client: &few,
                ..Meeting::default()
            },
        ),
        (
            "ports",
            Meeting {
                client_before: "echo 40000 40299 >/proc/sys/net/ipv4/ip_local_port_range",
                client: &with_few(&["--source", "127.0.0.1"]),
                ..Meeting::default()
            },
        ),
    ];
    for (kind, meeting) in meetings {
        assert_eq!(meet(programs, meeting), kind);
    }

    if has_a_far_end_that_is_silent() {
        let away = ["--ports", "1", "-c", "20", "--connect-timeout", "2500ms"];
        let meeting = Meeting { to: "192.0.2.7", client: &away, ..Meeting::default() };
        assert_eq!(meet(programs, meeting), "network");
    } else {
        skip("the limit of the network", "no pair of interfaces can be made here");
    }
}

/// How server and client are started.
#[derive(Debug)]
struct Meeting<'a> {
    /// What the shell does before it becomes the server.
    server_before: &'a str,
    server: &'a [&'a str],
    client_before: &'a str,
    client: &'a [&'a str],
    to: &'a str,
}

impl Default for Meeting<'_> {
    fn default() -> Self {
        Self { server_before: ":", server: &[], client_before: ":", client: &[], to: "127.0.0.1" }
    }
}

/// Runs both, and gives the kind of the bottleneck in the summary.
fn meet(programs: &Path, meeting: Meeting<'_>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let first_port = free_ports(1).to_string();
    let start = |name: &str, before: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{before} && exec \"$0\" \"$@\"")]);
        command.arg(programs.join(format!("{name}{EXE_SUFFIX}")));
        command.arg("--json").arg(folder.path().join(format!("{}.json", &name[7..])));
        command
    };
    let mut server = Program::start(
        start("c1000k-server", meeting.server_before)
            .args(["--bind", "127.0.0.1", "--ports", "1", "--first-port", &first_port])
            .args(meeting.server),
    );
    server.wait_for("ready");
    let mut client = Program::start(
        start("c1000k-client", meeting.client_before)
            .args([meeting.to, &first_port])
            .args(meeting.client),
    );
    client.exit_code();
    server.terminate();
    server.exit_code();
    let mut summarize = Command::new(env!("CARGO_BIN_EXE_c1000k-report"));
    summarize.arg("summarize").arg(folder.path()).args(["--format", "json"]);
    let summary: Value = serde_json::from_slice(&summarize.output().unwrap().stdout).unwrap();
    println!("{meeting:?}: {}", summary["bottleneck"]);
    summary["bottleneck"]["kind"].as_str().unwrap().to_owned()
}

fn with_busy_processors<T>(act: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    let count = thread::available_parallelism().unwrap().get();
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            });
        }
        let outcome = panic::catch_unwind(AssertUnwindSafe(act));
        is_over.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// 192.0.2.7 is at the other end of a pair of interfaces, where nothing answers.
fn has_a_far_end_that_is_silent() -> bool {
    const PAIR: &str = "ip link add near type veth peer name far &&
        ip addr add 192.0.2.1/24 dev near && ip link set near up && ip link set far up &&
        ip neigh add 192.0.2.7 lladdr 02:00:00:00:00:01 dev near";
    Command::new("sh").args(["-c", PAIR]).stderr(Stdio::null()).status().unwrap().success()
}

/// The record is valid, and has every field that its schema knows, and no other.
fn assert_has_all_of(schema: &Schema, record: &Path) {
    let record: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    jsonschema::validate(schema.as_value(), &record).unwrap();
    let names =
        |fields: &Value| fields.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&record), names(schema.get("properties").unwrap()));
}

fn compare(client: &ClientRecord, server: &ServerRecord) {
    assert_eq!(client.verdict, Verdict::Reached);
    assert_eq!(client.target, CONNECTIONS);
    assert_eq!(client.established, CONNECTIONS);
    assert_eq!(client.verified, Some(CONNECTIONS));
    assert_eq!(client.verified_passes, [CONNECTIONS, CONNECTIONS]);
    assert_eq!((client.failed, client.lost, client.limit), (0, 0, None));
    assert_eq!(server.accepted, client.established);
    assert_eq!(server.peak, client.established);
    assert_eq!((server.open, server.closed), (0, server.accepted));
    assert_eq!((server.refused, server.accept_errors.len()), (0, 0));
    assert_eq!(server.bytes_in, server.bytes_out);
    // "Hello Server, connections num:" and at least one digit, twice on each connection.
    assert!(server.bytes_in >= 2 * 31 * CONNECTIONS, "only {} bytes came in", server.bytes_in);
}

/// Builds both programs with the profile of this test, and says where they are.
fn build() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let programs = here.parent().and_then(Path::parent).unwrap().to_owned();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "-p", "c1000k-server", "-p", "c1000k-client"]);
    if programs.ends_with("release") {
        build.arg("--release");
    }
    // With a triple set, as by CARGO_BUILD_TARGET, this folder is that triple's already.
    build.env("CARGO_TARGET_DIR", programs.parent().unwrap()).env_remove("CARGO_BUILD_TARGET");
    assert!(build.status().unwrap().success(), "the programs could not be built");
    programs
}

/// The first of this number of consecutive ports that are free.
fn free_ports(count: u16) -> u16 {
    (20_000..30_000)
        .step_by(usize::from(count))
        .find(|&first| {
            let probes: Result<Vec<_>, _> =
                (first..first + count).map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
            probes.is_ok()
        })
        .expect("some ports are free")
}

/// TCP sockets in use, as the kernel counts them.
fn sockets_in_use() -> u64 {
    let text = fs::read_to_string("/proc/net/sockstat").unwrap();
    let line = text.lines().find(|line| line.starts_with("TCP:")).unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}

/// Established connections whose local port is one of these, as the kernel lists them.
fn established_at(ports: std::ops::Range<u16>) -> u64 {
    let text = fs::read_to_string("/proc/net/tcp").unwrap();
    let is_there = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().take(4).collect();
        let port = u16::from_str_radix(words[1].rsplit(':').next().unwrap(), 16).unwrap();
        words[3] == "01" && ports.contains(&port)
    };
    text.lines().skip(1).filter(is_there).count() as u64
}

/// A child process that does not outlive the test, and its lines.
struct Program {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        read_lines(child.stdout.take().unwrap(), sender.clone());
        read_lines(child.stderr.take().unwrap(), sender);
        Self { child, lines }
    }

    fn wait_for(&mut self, word: &str) {
        loop {
            let line = self.lines.recv_timeout(DEADLINE);
            let line = line.unwrap_or_else(|_| panic!("no line says {word:?}"));
            if line.contains(word) {
                return;
            }
        }
    }

    fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Both pipes end when the process does, so this waits no longer than the deadline.
    fn exit_code(&mut self) -> i32 {
        while let Ok(line) = self.lines.recv_timeout(DEADLINE) {
            println!("{line}");
        }
        self.child.wait().unwrap().code().expect("no signal ended it")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(pipe: impl Read + Send + 'static, sender: mpsc::Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
}
