//! What scenarios do in their guests, and what they expect of the programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use c1000k_host::format;
use nix::sys::signal::Signal;

use super::Settings;
use super::check::Checks;
use super::check::Must::{BeAtMost, Equal};
use crate::guest::guests::{Guests, wait_for};
use crate::guest::request::{Condition, Message, Request, Start};
use crate::million::plan::{FIRST_PORT, address};
use crate::print_line;
use crate::record::{self, ClientRecord, Limit, ServerRecord};

/// For a client of a server that is slow under this fault.
pub(super) const LONG_CONNECT_TIMEOUT: &str = "--connect-timeout 60s";

/// The name of the program under test, and of its files.
pub(super) const SERVER: &str = "server";

/// Listeners, and sockets that the kernel frees a moment later.
const IDLE_SOCKETS_MAX: u64 = 150;

/// Users of the guests.
pub(super) const ROOT: u32 = 0;
pub(super) const USER_1: u32 = 1001;
pub(super) const USER_2: u32 = 1002;
pub(super) const USER_3: u32 = 1003;
pub(super) const USER_4: u32 = 1004;

/// A running scenario.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub(super) settings: &'a Settings,
    pub(super) checks: Checks,
    out: PathBuf,
    guests: Guests<'a>,
    /// The guests of server and clients, which may be the same.
    server: &'static str,
    clients: &'static str,
    /// Exit codes by program.
    codes: BTreeMap<String, u64>,
}

/// Prints the progress of the programs.
pub(super) fn shown(message: &Message) -> Option<String> {
    match message {
        Message::Progress { name, line } => Some(format!("{name}: {line}")),
        _ => None,
    }
}

impl<'a> Run<'a> {
    pub(super) fn new(
        out: &Path,
        settings: &'a Settings,
        guests: Guests<'a>,
        checks: Checks,
    ) -> Self {
        let names = guests.names();
        let (server, clients) = (names[0], names[names.len() - 1]);
        let (out, codes) = (out.to_owned(), BTreeMap::new());
        Self { settings, checks, out, guests, server, clients, codes }
    }

    /// Runs a command in a shell of the server's guest, and returns its output.
    pub(super) fn shell(&mut self, command: &str) -> Result<String> {
        self.request(Request::Run(command.to_owned()))
    }

    /// Sends a request to the server's guest.
    pub(super) fn request(&mut self, request: Request) -> Result<String> {
        self.guests.request(self.server, request)
    }

    /// Waits in the server's guest.
    pub(super) fn wait(&mut self, condition: Condition, timeout_seconds: u64) -> Result<String> {
        self.request(wait_for(condition, timeout_seconds))
    }

    fn guest_of(&self, program: &str) -> &'static str {
        if program == SERVER { self.server } else { self.clients }
    }

    pub(super) fn start(
        &mut self,
        name: &str,
        user: u32,
        cgroup: Option<&str>,
        command: &str,
    ) -> Result<()> {
        let command = command.split_whitespace().map(str::to_owned).collect();
        let cgroup = cgroup.map(str::to_owned);
        let start = Start { name: name.to_owned(), user, cgroup, command };
        self.guests.request(self.guest_of(name), Request::Start(start)).map(drop)
    }

    /// As the first user; returns when the server is ready.
    pub(super) fn start_server(&mut self, cgroup: Option<&str>, options: &str) -> Result<()> {
        let command = format!("c1000k-server --json /out/server.json {options}");
        self.start(SERVER, USER_1, cgroup, &command)?;
        self.wait(Condition::logged(SERVER, "ready"), 120).map(drop)
    }

    pub(super) fn start_client(
        &mut self,
        name: &str,
        user: u32,
        connections: u64,
        options: &str,
    ) -> Result<()> {
        print_line(format!("client '{name}': {} connections", format::count(connections)));
        let to = if self.clients == self.server { "127.0.0.1".to_owned() } else { address(1, 1) };
        let record = format!("/out/{name}.json");
        let command =
            format!("c1000k-client {to} {FIRST_PORT} -c {connections} --json {record} {options}");
        self.start(name, user, None, &command)
    }

    /// Waits until a program has ended.
    pub(super) fn await_end(&mut self, name: &str, timeout_seconds: u64) -> Result<()> {
        let ended = wait_for(Condition::Ended(name.to_owned()), timeout_seconds);
        let code = self.guests.request(self.guest_of(name), ended)?.parse()?;
        self.codes.insert(name.to_owned(), code);
        Ok(())
    }

    /// Waits until a client holds its connections, and stops the client, so that it holds them until it is resumed.
    pub(super) fn pause(&mut self, name: &str, timeout_seconds: u64) -> Result<()> {
        let holds = wait_for(Condition::Holds(name.to_owned()), timeout_seconds);
        self.guests.request(self.guest_of(name), holds).map(drop)
    }

    pub(super) fn resume(&mut self, name: &str) -> Result<()> {
        self.signal(name, Signal::SIGCONT)
    }

    fn signal(&mut self, name: &str, signal: Signal) -> Result<()> {
        self.guests.request(self.guest_of(name), Request::signal(name, signal)).map(drop)
    }

    /// The field of a client's record.
    pub(super) fn established(&mut self, client: &str) -> Result<u64> {
        let established = Request::Established(client.to_owned());
        Ok(self.guests.request(self.guest_of(client), established)?.parse()?)
    }

    pub(super) fn server_wakes(&mut self) -> Result<u64> {
        let wakes = Condition::Wakes { name: SERVER.to_owned(), seconds: 10 };
        Ok(self.wait(wakes, 20)?.parse()?)
    }

    pub(super) fn snapshot(&mut self, moment: &str) -> Result<()> {
        self.request(Request::Snapshot(moment.to_owned())).map(drop)
    }

    /// Waits until the server's guest has no connection left.
    pub(super) fn drained(&mut self, timeout_seconds: u64) -> Result<()> {
        self.wait(Condition::Drained { sockets_max: IDLE_SOCKETS_MAX }, timeout_seconds).map(drop)
    }

    /// Ends the server.
    pub(super) fn end_server(&mut self) -> Result<()> {
        self.signal(SERVER, Signal::SIGTERM)?;
        self.await_end(SERVER, 60)
    }

    /// Collects the files of all guests and ends them.
    pub(super) fn collect(&mut self) -> Result<()> {
        self.guests.names().into_iter().try_for_each(|name| self.guests.collect(name))
    }

    /// The same after a failure, with what else may help.
    pub(super) fn save(&mut self) {
        for name in self.guests.names() {
            let _ = self.guests.request(name, Request::Snapshot("failure".to_owned()));
            let _ = self.guests.request(name, Request::Run("cp /proc/net/tcp /out/tcp".to_owned()));
            let _ = self.guests.collect(name);
        }
    }

    // The following need the collected files.

    pub(super) fn client(&self, name: &str) -> Result<ClientRecord> {
        record::client(&self.out.join(format!("{name}.json")))
    }

    pub(super) fn server(&self) -> Result<ServerRecord> {
        record::server(&self.out.join("server.json"))
    }

    /// The number of lines in the guests' kernel logs with one of these texts.
    pub(super) fn kernel_lines(&self, texts: &[&str]) -> Result<u64> {
        let mut count = 0;
        for entry in fs::read_dir(&self.out)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("kernel") && name.ends_with(".log") {
                let log = String::from_utf8_lossy(&fs::read(&path)?).to_lowercase();
                let matches = |line: &&str| texts.iter().any(|text| line.contains(text));
                count += log.lines().filter(matches).count() as u64;
            }
        }
        Ok(count)
    }

    pub(super) fn code(&self, name: &str) -> Result<u64> {
        self.codes.get(name).copied().with_context(|| format!("no exit code of '{name}'"))
    }

    pub(super) fn expect_code(&mut self, name: &str, code: u64) -> Result<()> {
        self.checks.expect(&format!("{name}: exit code"), self.code(name)?, Equal(code))
    }

    /// No connection is lost, and each echoes once more.
    pub(super) fn expect_alive(&mut self, name: &str) -> Result<()> {
        let record = self.client(name)?;
        self.checks.expect(&format!("{name}: lost"), record.lost, Equal(0))?;
        let what = format!("{name}: verified again after the hold");
        self.checks.expect(&what, verified_again(&record)?, Equal(record.established))
    }

    pub(super) fn expect_all(&mut self, name: &str) -> Result<()> {
        self.expect_code(name, 0)?;
        self.expect_alive(name)
    }

    pub(super) fn expect_limit(&mut self, name: &str, limit: Limit) -> Result<()> {
        let is_it = self.client(name)?.limit == Some(limit);
        self.checks.expect(&format!("{name}: its limit is the {limit}"), is_it.into(), Equal(1))
    }

    pub(super) fn expect_short(&mut self, name: &str) -> Result<()> {
        self.expect_code(name, 1)?;
        self.expect_limit(name, Limit::Server)
    }

    pub(super) fn expect_survived(&mut self) -> Result<()> {
        self.expect_code(SERVER, 0)?;
        let open = self.server()?.open;
        self.checks.expect("server: connections still open at the end", open, Equal(0))?;
        let kills = self.kernel_lines(&["out of memory", "oom-kill"])?;
        self.checks.expect("kernel: processes killed for memory", kills, Equal(0))
    }

    pub(super) fn expect_few_wakes(&mut self, when: &str, wakes: u64) -> Result<()> {
        self.checks.expect(
            &format!("server: wake-ups per second while {when}"),
            wakes,
            BeAtMost(50),
        )
    }
}

/// The second pass of echoes, after the hold.
pub(super) fn verified_again(record: &ClientRecord) -> Result<u64> {
    record.verified_passes.get(1).copied().context("the record has no second pass of echoes")
}
