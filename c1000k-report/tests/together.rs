//! Both real programs against each other: their records and the kernel's counts must agree.
//!
//! The kernel counts sockets by network namespace: the test runs in a separate one without other sockets.

#![allow(clippy::unwrap_used)] // A test may unwrap: its panic is its report.

use std::collections::BTreeSet;
use std::env::consts::EXE_SUFFIX;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use c1000k_record::schema::{self, Schema};
use c1000k_record::{ClientRecord, ServerRecord, Verdict};
use serde_json::Value;

const CONNECTIONS: u64 = 3_000;
const PORTS: u16 = 10;
const DEADLINE: Duration = Duration::from_secs(60);

/// The variable that is set within the namespace, to the directory of the programs.
const INSIDE: &str = "C1000K_TOGETHER_INSIDE";

#[test]
fn both_records_and_the_kernel_agree_on_three_thousand_connections() {
    if let Some(programs) = std::env::var_os(INSIDE) {
        return run_both(Path::new(&programs));
    }
    let Some(mut inside) = in_a_new_network() else {
        let why = "no network namespace can be made here";
        // The test harness does not capture this.
        return writeln!(io::stderr(), "the test of both programs is skipped: {why}").unwrap();
    };
    inside.arg(std::env::current_exe().unwrap());
    let output = inside.env(INSIDE, build()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A command that runs a program in a network namespace with only a loopback device; for an ordinary user this needs a
/// user namespace.
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

fn run_both(programs: &Path) {
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
    each_bottleneck_is_named(programs);
}

/// The limits that can be reached without other machines; a busy CPU is covered by unit tests.
fn each_bottleneck_is_named(programs: &Path) {
    let no_other = "";
    for (bottleneck, server, before, client) in [
        ("backlog", "--backlog 1", no_other, "-c 3000 --in-flight 1000"),
        ("server_bound", "--max-connections 50", no_other, "-c 500"),
        ("memory", "--memory-reserve 99%", no_other, "-c 500"),
        ("descriptors", no_other, "ulimit -n 200;", "-c 500 --file-table process"),
        (
            "ports",
            no_other,
            "sysctl -q -w net.ipv4.ip_local_port_range='40000 40099';",
            "-c 500 --source 127.0.0.1",
        ),
        ("network", no_other, no_other, "198.51.100.1 -c 5"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let first_port = free_ports(1).to_string();
        let words = format!(
            "--bind 127.0.0.1 --first-port {first_port} --ports 1 --json server.json {server}"
        );
        let mut served = Program::start(
            Command::new(programs.join(format!("c1000k-server{EXE_SUFFIX}")))
                .args(words.split_whitespace())
                .current_dir(&folder),
        );
        served.wait_for("ready");
        let to = if client.starts_with('1') { "" } else { "127.0.0.1" };
        let script = format!(
            "{before} exec \"$0\" {to} {client} --hold 0s --connect-timeout 2s --ports 1 --json client.json"
        );
        // The target may be the first of the client's arguments.
        let script = script.replace("198.51.100.1", &format!("198.51.100.1 {first_port}"));
        let script = script.replace("127.0.0.1 -c", &format!("127.0.0.1 {first_port} -c"));
        let program = programs.join(format!("c1000k-client{EXE_SUFFIX}"));
        let mut command = Command::new("bash");
        command.args(["-c", &script]).arg(program).current_dir(&folder);
        Program::start(&mut command).exit_code();
        served.terminate();
        assert_eq!(served.exit_code(), 0, "{bottleneck}");
        let report = Command::new(env!("CARGO_BIN_EXE_c1000k-report"))
            .args(["summarize", "--format", "json"])
            .arg(folder.path())
            .output()
            .unwrap();
        let summary: Value = serde_json::from_slice(&report.stdout).unwrap();
        assert_eq!(summary["bottleneck"]["bottleneck"], bottleneck, "{summary:#}");
    }
}

/// The record is valid and has exactly the fields of its schema.
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

/// Builds both programs with the profile of this test, and returns their directory.
fn build() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let programs = here.parent().and_then(Path::parent).unwrap().to_owned();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "-p", "c1000k-server", "-p", "c1000k-client"]);
    if programs.ends_with("release") {
        build.arg("--release");
    }
    // If a target triple is set (CARGO_BUILD_TARGET), this is already the directory of that triple.
    build.env("CARGO_TARGET_DIR", programs.parent().unwrap()).env_remove("CARGO_BUILD_TARGET");
    assert!(build.status().unwrap().success(), "the programs could not be built");
    programs
}

/// The first of `count` consecutive free ports.
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
            let line = line.unwrap_or_else(|_| panic!("no line contains {word:?}"));
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
