//! Runs `million` with stubs for the programs, and checks output, records and exit codes.

#![expect(clippy::unwrap_used, reason = "the panic of a test is its report")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

const READY: &str = "echo ready; exec sleep 60";

/// A folder for the programs and the records, with a space in its path.
struct Stubs(TempDir);

impl Stubs {
    fn new(server: &str, client: &str) -> Self {
        let stubs = Self(tempfile::Builder::new().prefix("a million ").tempdir().unwrap());
        fs::create_dir(stubs.path("bin")).unwrap();
        stubs.write("c1000k-server", server);
        stubs.write("c1000k-client", client);
        stubs
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }

    /// Returns the exit code and both outputs.
    fn run(&self, options: &[&str]) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_c1000k-lab"))
            .args(["million", "100", "--native", "--topology", topology(), "--out"])
            .arg(self.path("out"))
            .args(options)
            .env("MILLION_BINARIES", self.path("bin"))
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    }

    fn refuses_to_run(&self, reason: &str) {
        let (code, text) = self.run(&[]);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(reason), "{reason} is not in {text}");
        fs::remove_dir_all(self.path("out")).unwrap();
    }
}

/// Three hosts if possible, because the ports in their namespaces are free.
fn topology() -> &'static str {
    let works = |command: &[&str]| {
        let output = Command::new(command[0]).args(&command[1..]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let has_namespaces = works(&["ip", "link"])
        && (works(&["unshare", "--net", "true"])
            || works(&["unshare", "--user", "--map-root-user", "--net", "true"]));
    if has_namespaces { "three-hosts" } else { "one-host" }
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    for options in [
        "0",
        "1",
        "9M",
        "ten",
        "1k 2k",
        "--bogus",
        "--native --vm",
        "--memory",
        "--memory 12",
        "--memory 0G",
        "--server-memory 1G",
        "--topology three-hosts --memory 1G --server-memory 1G",
        "--memory 2G --server-memory 1G",
        "--out",
        "--out --native",
        "--topology",
        "--topology ring",
    ] {
        let mut lab = Command::new(env!("CARGO_BIN_EXE_c1000k-lab"));
        let output = lab.arg("million").args(options.split(' ')).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options}: {text}");
        assert!(text.lines().count() == 1 && text.ends_with("; see --help\n"), "{options}: {text}");
    }
}

#[test]
fn a_server_that_can_not_start_is_reported_at_once() {
    let stubs = Stubs::new("echo 'no such flag'; exit 2", "exit 2");
    stubs.refuses_to_run("no such flag");
    stubs.refuses_to_run("the server could not be started");
    fs::remove_file(stubs.path("bin/c1000k-server")).unwrap();
    stubs.refuses_to_run(&format!(
        "there is no program {}",
        stubs.path("bin/c1000k-server").display()
    ));
}

#[test]
fn already_in_use_is_not_ready() {
    let stubs = Stubs::new(
        "echo 'port 9900 is already in use'; exit 1",
        "echo 'the client was started'; exit 0",
    );
    stubs.refuses_to_run("the server could not be started");
}

#[test]
fn the_record_says_whether_memory_was_touched() {
    for (options, touched) in [(&[][..], "no"), (&["--warm"], "yes")] {
        let stubs = Stubs::new(READY, "echo 'holding 50 connections'; sleep 3");
        let (code, text) = stubs.run(options);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("reached: 100 connections held and verified"), "{text}");
        let machine = fs::read_to_string(stubs.path("out/machine.txt")).unwrap();
        let line = format!("memory touched before the run: {touched}");
        assert!(machine.lines().any(|found| found == line), "{machine}");
        for moment in ["before", "peak", "after", "end"] {
            let folders = fs::read_dir(stubs.path("out/snapshots")).unwrap();
            for host in folders.map(|folder| folder.unwrap().path()) {
                assert!(host.join(moment).join("sockstat").is_file(), "{moment}");
            }
        }
    }
}

#[test]
fn the_exit_code_is_the_worst_of_the_clients_and_1_where_a_signal_ended_one() {
    for (client, code) in [("exit 1", 1), ("exit 2", 2), ("exit 77", 1), ("kill -9 $$", 1)] {
        let stubs = Stubs::new(READY, client);
        let (found, text) = stubs.run(&[]);
        assert_eq!(found, code, "{client}: {text}");
        assert!(text.contains("not reached: see the client's last lines above"), "{text}");
    }
}

#[test]
fn a_folder_that_is_not_empty_is_left_as_it_is() {
    let stubs = Stubs::new(READY, "exit 0");
    fs::create_dir(stubs.path("out")).unwrap();
    fs::write(stubs.path("out/client.json"), "an older record").unwrap();
    let (code, text) = stubs.run(&[]);
    assert!(code == 1 && text.contains("is not empty: use a new directory for --out"), "{text}");
    assert_eq!(fs::read_dir(stubs.path("out")).unwrap().count(), 1);
}
