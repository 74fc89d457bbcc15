//! A run, read from its directory: the records, the machine and snapshots of the kernel.
//!
//! Everything but one record may be missing, which is `None` and reported as missing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use c1000k_record::{ClientRecord, Limit, ReadError, ServerRecord, Verdict, input};
use clap::ValueEnum;

use crate::snapshot::Snapshot;

/// A run, read from its directory.
#[derive(Debug, Default)]
pub struct Run {
    /// The directory.
    pub folder: PathBuf,
    /// The clients' records with their names (`client`, `client-1`, ..), in order.
    pub clients: Vec<(String, ClientRecord)>,
    /// The server's record.
    pub server: Option<ServerRecord>,
    /// The lines of `machine.txt`.
    pub machine: MachineFile,
    /// The snapshots, by host and moment.
    hosts: BTreeMap<String, BTreeMap<String, Snapshot>>,
}

/// The lines of `machine.txt`, `key: value`, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineFile(pub Vec<(String, String)>);

/// The hosts of the two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Topology {
    /// Server and clients on one host
    OneHost,
    /// A server and two clients, each on its own host
    ThreeHosts,
}

/// Why the connections of several clients can't be added up to connections held at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apart {
    /// Their holds do not overlap.
    Times,
    /// They name different servers.
    Servers,
    /// A record does not have the times of its hold.
    TimesUnknown,
}

/// When a snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the first connection.
    Before,
    /// While all connections were held.
    Peak,
    /// After the teardown, with the server still running.
    After,
}

impl Run {
    /// Reads a directory.
    ///
    /// # Errors
    /// The directory can't be read, has no record, or has a malformed one.
    pub fn read(folder: &Path) -> Result<Self, RunError> {
        let clients = client_records(folder)?;
        let server = present(ServerRecord::read(&folder.join("server.json")))?;
        if clients.is_empty() && server.is_none() {
            return Err(RunError::Empty(folder.to_owned()));
        }
        let mut run = Self {
            folder: folder.to_owned(),
            clients,
            server,
            machine: MachineFile::read(&folder.join("machine.txt")),
            hosts: hosts(&folder.join("snapshots")),
        };
        run.omit_shrunk_memory();
        run.name_merged_slabs();
        Ok(run)
    }

    /// Memory that did not grow is unknown; records of earlier versions have it as a negative number.
    fn omit_shrunk_memory(&mut self) {
        let omit = |bytes: &mut Option<f64>| *bytes = bytes.filter(|&bytes| bytes > 0.0);
        for layers in
            self.clients.iter_mut().filter_map(|(_, client)| client.connection_bytes.as_mut())
        {
            omit(&mut layers.kernel);
        }
        if let Some(server) = &mut self.server {
            omit(&mut server.kernel_bytes_per_connection);
        }
    }

    /// Applies the names that the server found in its kernel; all hosts of a run have the same kernel.
    fn name_merged_slabs(&mut self) {
        let Some(server) = &self.server else { return };
        let snapshots = self.hosts.values_mut().flat_map(BTreeMap::values_mut);
        for slabs in snapshots.filter_map(|snapshot| snapshot.slabs.as_mut()) {
            for (name, shown) in &server.slabs_shown_as {
                slabs.name_merged(name, shown);
            }
        }
    }

    /// The hosts of the connections; one host if they are not known.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.topology_known().unwrap_or(Topology::OneHost)
    }

    /// The hosts of the connections, by `machine.txt`, the snapshots or the addresses; `None` if they are not known.
    #[must_use]
    pub fn topology_known(&self) -> Option<Topology> {
        let is_loopback = |(_, client): &(String, ClientRecord)| {
            client.destination.split(", ").all(|to| {
                is_unix(to) || to.parse().is_ok_and(|to: SocketAddr| to.ip().is_loopback())
            })
        };
        match self.machine.value("topology") {
            Some("three-hosts") => Some(Topology::ThreeHosts),
            Some(_) => Some(Topology::OneHost),
            None if self.hosts.contains_key("server") => Some(Topology::ThreeHosts),
            None if self.hosts.contains_key("one") => Some(Topology::OneHost),
            None if self.clients.is_empty() => None,
            None => self.clients.iter().all(is_loopback).then_some(Topology::OneHost),
        }
    }

    /// Whether both ends of each connection are in one kernel. Three hosts that are network namespaces of one machine
    /// share its kernel.
    #[must_use]
    pub fn is_one_kernel(&self) -> bool {
        !self.is_stateless()
            && (self.topology() == Topology::OneHost
                || self.machine.value("where") == Some("native"))
    }

    /// Whether the clients had no sockets.
    #[must_use]
    pub fn is_stateless(&self) -> bool {
        self.clients.iter().any(|(_, client)| client.stateless)
    }

    /// The number of ends of each connection that are in one kernel.
    #[must_use]
    pub fn ends_in_kernel(&self) -> u64 {
        if self.is_one_kernel() { 2 } else { 1 }
    }

    /// The host of the server.
    #[must_use]
    pub fn server_host(&self) -> &'static str {
        match self.topology() {
            Topology::OneHost => "one",
            Topology::ThreeHosts => "server",
        }
    }

    /// The hosts of such a run, the server's first.
    #[must_use]
    pub fn hosts_expected(&self) -> &'static [&'static str] {
        match self.topology() {
            Topology::OneHost => &["one"],
            Topology::ThreeHosts => &["server", "client-1", "client-2"],
        }
    }

    /// The hosts that have snapshots.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.hosts.keys().map(String::as_str)
    }

    /// The snapshot of a host at a moment.
    #[must_use]
    pub fn snapshot(&self, host: &str, moment: Moment) -> Option<&Snapshot> {
        self.hosts.get(host)?.get(moment.name())
    }

    /// The expected number of clients.
    #[must_use]
    pub fn clients_expected(&self) -> usize {
        match self.topology() {
            Topology::OneHost => 1.max(self.clients.len()),
            Topology::ThreeHosts => 2,
        }
    }

    /// Whether the records of all clients exist.
    #[must_use]
    pub fn has_all_clients(&self) -> bool {
        self.clients.len() >= self.clients_expected()
    }

    /// The names of missing records.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let expected: &[&str] = match self.topology() {
            Topology::OneHost if self.clients.is_empty() => &["client"],
            Topology::OneHost => &[],
            Topology::ThreeHosts => &["client-1", "client-2"],
        };
        let has = |name: &str| self.clients.iter().any(|(client, _)| client == name);
        let is_short_of_clients = !self.has_all_clients();
        let mut missing: Vec<_> =
            expected.iter().copied().filter(|name| is_short_of_clients && !has(name)).collect();
        missing.extend(self.server.is_none().then_some("server"));
        missing
    }

    /// The missing directories of snapshots: that of all hosts, of a host, or of a moment of it.
    #[must_use]
    pub fn missing_snapshots(&self) -> Vec<String> {
        if self.hosts.is_empty() {
            return vec!["snapshots".to_owned()];
        }
        let mut missing = Vec::new();
        for &name in self.hosts_expected() {
            let Some(moments) = self.hosts.get(name) else {
                missing.push(format!("snapshots/{name}"));
                continue;
            };
            let absent = Moment::ALL.iter().filter(|moment| !moments.contains_key(moment.name()));
            missing.extend(absent.map(|moment| format!("snapshots/{name}/{}", moment.name())));
        }
        missing
    }

    /// Why the clients did not hold their connections at once, by the records; `None` if they did.
    #[must_use]
    pub fn apart(&self) -> Option<Apart> {
        // A client without connections does not matter.
        let holders = || {
            self.clients.iter().map(|(_, client)| client).filter(|client| client.established > 0)
        };
        if holders().count() < 2 || self.is_seen_by_server() {
            return None;
        }
        let places = holders().map(|client| (&client.destination, client.ports));
        if places.collect::<BTreeSet<_>>().len() > 1 {
            return Some(Apart::Servers);
        }
        let times: Option<Vec<_>> = holders().map(ClientRecord::held_between).collect();
        let Some(times) = times else { return Some(Apart::TimesUnknown) };
        let last_begin = times.iter().map(|(from, _)| from).max();
        let first_end = times.iter().map(|(_, until)| until).min();
        (last_begin >= first_end).then_some(Apart::Times)
    }

    /// Whether the server had at least as many connections at once, and none of other clients. Then it had those of
    /// these clients, whatever their clocks and addresses say.
    fn is_seen_by_server(&self) -> bool {
        let sum = |figure: fn(&ClientRecord) -> u64| {
            total(self.clients.iter().map(|(_, client)| figure(client)))
        };
        self.server.as_ref().is_some_and(|server| {
            server.peak >= sum(|client| client.established)
                && server.accepted <= sum(|client| client.attempted)
        })
    }

    /// Why the server's counts can't be compared with those of the clients; `None` if they can.
    #[must_use]
    pub fn incomparable(&self) -> Option<&'static str> {
        let has_others = |client: &ClientRecord| {
            client.established > 0 && (client.targets.len() > 1 || is_unix(&client.destination))
        };
        let has_others = self.clients.iter().any(|(_, client)| has_others(client));
        (has_others && !self.is_seen_by_server()).then_some(
            "a client connected to other servers too, and the server's record has only a part of its connections",
        )
    }

    /// Whether a client connected over Unix-domain sockets, which the kernel does not count among those of TCP.
    #[must_use]
    pub fn has_unix_sockets(&self) -> bool {
        self.clients.iter().any(|(_, client)| client.destination.split(", ").any(is_unix))
    }

    /// The connections that the server held at once.
    #[must_use]
    pub(crate) fn server_connections(&self) -> Option<u64> {
        let server = self.server.as_ref().filter(|_| self.incomparable().is_some());
        server.map(|server| server.peak).or_else(|| self.connections()).filter(|held| *held > 0)
    }

    /// The sum of a figure over the clients; `None` if a record is missing.
    #[must_use]
    pub fn sum(&self, figure: impl Fn(&ClientRecord) -> u64) -> Option<u64> {
        self.has_all_clients().then(|| total(self.clients.iter().map(|(_, client)| figure(client))))
    }

    /// The connections verified in the last pass, of the clients that verified; `None` if none did, or a record is
    /// missing.
    #[must_use]
    pub fn verified(&self) -> Option<u64> {
        let each: Vec<u64> =
            self.clients.iter().filter_map(|(_, client)| client.verified).collect();
        let is_known = self.has_all_clients() && !each.is_empty();
        is_known.then(|| total(each.into_iter()))
    }

    /// The connections of the clients that did not verify (`--no-verify`).
    #[must_use]
    pub fn unverified(&self) -> u64 {
        let skipped = self.clients.iter().filter(|(_, client)| client.verified.is_none());
        total(skipped.map(|(_, client)| client.established))
    }

    /// The connections held at once, by the clients' records, or else by the server's. If the clients did not hold them
    /// at once, those of the server, or else those of the client with the most.
    #[must_use]
    pub fn connections(&self) -> Option<u64> {
        let server = self.server.as_ref().map(|server| server.peak);
        let held = if self.apart().is_some() {
            server.or(self.clients.iter().map(|(_, client)| client.established).max())
        } else {
            self.sum(|client| client.established).or(server)
        };
        held.filter(|held| *held > 0)
    }

    /// The connections that have an end on a host.
    #[must_use]
    pub fn connections_of(&self, host: &str) -> Option<u64> {
        if host == self.server_host() {
            return self.connections();
        }
        let (_, client) = self.clients.iter().find(|(name, _)| name == host)?;
        Some(client.established).filter(|held| *held > 0)
    }

    /// Whether the records contradict their verdicts: the target was not reached, more was verified than held or more
    /// held than attempted, or the server never had as many connections.
    #[must_use]
    pub fn is_contradicted(&self) -> bool {
        let claims_too_much = self.clients.iter().any(|(_, client)| {
            client.verdict != Verdict::Short && client.established < client.target
        });
        let is_impossible = self.clients.iter().any(|(_, client)| {
            // A pass of one that was lost afterwards may count too.
            let once_held = client.established.saturating_add(client.lost);
            client.established > client.attempted
                || client.verified.is_some_and(|verified| verified > once_held)
        });
        let held = total(self.clients.iter().map(|(_, client)| client.established));
        let server_had_fewer = self.server.as_ref().is_some_and(|server| server.peak < held);
        let is_comparable = self.apart().is_none() && self.incomparable().is_none();
        claims_too_much || is_impossible || (server_had_fewer && is_comparable)
    }

    /// Short if a client's verdict is; otherwise the lowest of all clients. `None` if a client's record is missing, if
    /// they did not hold at once, or if the figures contradict their verdicts.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        if self.is_contradicted() {
            return None;
        }
        let mut verdicts = self.clients.iter().map(|(_, client)| client.verdict);
        if verdicts.clone().any(|verdict| verdict == Verdict::Short) {
            return Some(Verdict::Short);
        }
        let least = verdicts.find(|verdict| *verdict != Verdict::Reached);
        let is_whole = self.has_all_clients() && self.apart().is_none();
        is_whole.then(|| least.unwrap_or(Verdict::Reached))
    }

    /// Whether no other process can have changed the figures of the whole system: in a guest that ran nothing else.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.machine.value("where") == Some("vm")
    }

    /// The same for the figures of a network namespace: each of three hosts has its own.
    #[must_use]
    pub fn is_alone_in_its_network(&self) -> bool {
        let has_its_own = self.machine.value("where") == Some("native");
        self.is_alone() || (has_its_own && self.topology() == Topology::ThreeHosts)
    }

    /// The limits of clients that were limited, with the details.
    pub fn limits(&self) -> impl Iterator<Item = (&str, Limit, Option<&str>)> {
        self.clients.iter().filter_map(|(name, client)| {
            Some((name.as_str(), client.limit?, client.limit_detail.as_deref()))
        })
    }
}

impl MachineFile {
    /// The value of a key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Whether memory was touched before the run, so that the host of a virtual machine had already allocated it;
    /// `None` if it is not known.
    #[must_use]
    pub fn memory_warmed(&self) -> Option<bool> {
        match self.value("memory touched before the run")? {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        }
    }

    fn read(path: &Path) -> Self {
        let text = input::text(path).unwrap_or_default();
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Self(pairs.map(|(key, value)| (key.trim().into(), value.trim().into())).collect())
    }
}

impl Moment {
    const ALL: [Self; 3] = [Self::Before, Self::Peak, Self::After];

    /// The name of the directory.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Peak => "peak",
            Self::After => "after",
        }
    }
}

impl Topology {
    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::OneHost => "one-host",
            Self::ThreeHosts => "three-hosts",
        }
    }
}

impl fmt::Display for Apart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Times => "the times at which the clients held do not overlap",
            Self::Servers => {
                "the clients name different servers, and no server's record has all of them"
            }
            Self::TimesUnknown => "a client's record does not say when it held",
        })
    }
}

/// Why a directory is not a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunError {
    /// The directory can't be listed.
    Folder(PathBuf, io::Error),
    /// The directory has no record.
    Empty(PathBuf),
    /// A record can't be read.
    Record(ReadError),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path, error) => {
                write!(f, "cannot read {}: {error}; specify the directory of a run", path.display())
            }
            Self::Empty(path) => write!(
                f,
                "{} contains neither client.json nor server.json; specify the directory of a run",
                path.display()
            ),
            Self::Record(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for RunError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Folder(_, error) => Some(error),
            Self::Empty(_) => None,
            Self::Record(error) => Some(error),
        }
    }
}

/// A saturating sum, because the figures of a record are untrusted.
pub(crate) fn total(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

/// Whether a destination of a record is a Unix-domain socket.
fn is_unix(destination: &str) -> bool {
    destination.starts_with("unix:")
}

fn client_records(folder: &Path) -> Result<Vec<(String, ClientRecord)>, RunError> {
    let names = names(folder).map_err(|error| RunError::Folder(folder.to_owned(), error))?;
    let mut clients = Vec::new();
    for name in names {
        let Some(stem) = name.as_bytes().strip_suffix(b".json") else { continue };
        if stem == b"client" || stem.starts_with(b"client-") {
            let record = ClientRecord::read(&folder.join(&name)).map_err(RunError::Record)?;
            clients.push((shown(OsStr::from_bytes(stem)), record));
        }
    }
    Ok(clients)
}

fn present<T>(outcome: Result<T, ReadError>) -> Result<Option<T>, RunError> {
    match outcome {
        Ok(record) => Ok(Some(record)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(RunError::Record(error)),
    }
}

fn hosts(folder: &Path) -> BTreeMap<String, BTreeMap<String, Snapshot>> {
    let moments = |host: &Path| {
        let names = names(host).unwrap_or_default().into_iter();
        names.map(|moment| (shown(&moment), Snapshot::read(&host.join(moment)))).collect()
    };
    let shown_moments = |host: OsString| (shown(&host), moments(&folder.join(host)));
    names(folder).unwrap_or_default().into_iter().map(shown_moments).collect()
}

/// The directories in a directory, sorted; none if it can't be read.
pub(crate) fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let paths = names(folder).unwrap_or_default().into_iter().map(|name| folder.join(name));
    paths.filter(|path| path.is_dir()).collect()
}

/// The names in a directory, sorted.
fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    let names: io::Result<Vec<_>> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names?;
    names.sort();
    Ok(names)
}

/// A file's name as text; invalid UTF-8 is replaced.
fn shown(name: &OsStr) -> String {
    name.display().to_string()
}
