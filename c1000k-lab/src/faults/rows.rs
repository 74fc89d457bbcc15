//! The table of the rows: each fault, and what must hold. A new row is a function and a line of the table.

mod exhaustion;
mod many;
mod memory;
mod network;
mod shutdown;

use anyhow::Result;

use super::run::Run;

/// A fault, and the function that runs it.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) fault: &'static str,
    pub(crate) must_hold: &'static str,
    pub(crate) run: fn(&mut Run<'_>) -> Result<()>,
    /// It takes minutes, and runs only if named.
    pub(crate) is_long: bool,
}

impl Row {
    const fn new(
        name: &'static str,
        fault: &'static str,
        must_hold: &'static str,
        run: fn(&mut Run<'_>) -> Result<()>,
    ) -> Self {
        Self { name, fault, must_hold, run, is_long: false }
    }
}

#[rustfmt::skip]
pub(crate) const ROWS: &[Row] = &[
    Row::new("descriptors", "RLIMIT_NOFILE 200 from the start, 5,000 clients",
        "holds the maximum, refuses further connections, wakes a few times a second, and admits again when connections close", exhaustion::descriptors),
    Row::new("registered-files", "RLIMIT_NOFILE 200 from the start, 5,000 clients, registered files",
        "holds all of them, and no place of a table leaks", exhaustion::registered_files),
    Row::new("descriptors-lowered", "RLIMIT_NOFILE lowered to 200 while it runs: EMFILE on accept, 5,000 clients",
        "the same, and waiting peers are admitted when connections close", exhaustion::descriptors_lowered),
    Row::new("exhausted", "ENFILE, ENOMEM, ENOBUFS on each accept, ENOSPC, ENOMEM on each epoll_ctl that adds (injected by a tracer)",
        "keeps its connections, wakes a few times a second, and admits waiting peers when the fault ends", exhaustion::exhausted),
    Row::new("memory-cgroup", "a memory cgroup of 12 MB, 18,000 clients",
        "not killed; each admitted connection echoes; refusals are counted; when connections close it admits again", memory::cgroup),
    Row::new("memory-pause", "the same with --overload pause", "the same, and peers wait instead of being reset", memory::pause),
    Row::new("killed-clients", "15,000 clients killed with SIGKILL at once",
        "no slot or descriptor leaks; the bystander waits at most 100 ms", many::killed_clients),
    Row::new("rst-burst", "15,000 connections reset in one burst", "the same", many::rst_burst),
    Row::new("half-closes", "5,000 peers that send, half-close, and then read", "each gets its echo, then the end of the stream; no leak", many::half_closes),
    Row::new("reset-before-accept", "2,000 connections reset before they are accepted, the server suspended meanwhile",
        "no leak, and no error that ends the server", many::reset_before_accept),
    Row::new("slowloris", "15,000 peers that send one byte each second",
        "the bystander's latency and the memory stay bounded", many::slowloris),
    Row::new("messages-at-once", "15,000 peers that send 8 to 32 KiB at once, three times",
        "each gets its complete echo; the bystander waits at most 100 ms", many::messages_at_once),
    Row::new("tiny-windows", "the same with receive buffers of 4 KiB, so that each echo is sent in many parts",
        "the same", many::tiny_windows),
    Row::new("never-reading", "500 peers that send up to 1 MB and read nothing",
        "each takes a bounded queue, is dropped after --slow-reader-timeout, and affects no other connection", memory::never_reading),
    Row::new("never-reading-many", "15,000 peers that send up to 1 MB and read nothing",
        "all queues together are bounded, each is dropped and counted, and no other connection is affected", memory::never_reading_many),
    Row::new("full-accept-queue", "5,000 connects at ports with a backlog of 16, the server suspended for 2 s",
        "the overflow is counted (ListenOverflows), and all connections are admitted afterwards", network::full_accept_queue),
    Row::new("syn-flood", "50,000 SYNs from forged addresses, as fast as they can be sent",
        "the bystander is served; other peers are admitted during the flood and after it", network::syn_flood),
    Row::new("bytes", "random bytes on 20 connections, 1 GB on one, a million messages of one byte",
        "all bytes are echoed correctly", many::odd_bytes),
    Row::new("sigterm-under-load", "SIGTERM with 1,000 busy connections and 50 whose output is queued",
        "everything that was read is sent back within the grace period; exit code 0; the record is written", shutdown::sigterm_under_load),
    Row::new("sigkill-restart", "SIGKILL with 10,000 connections, then a restart",
        "the new server listens on the same ports at once", shutdown::sigkill_restart),
    Row::new("server-killed", "the server killed under a client that holds 10,000",
        "the client reports it correctly, within seconds", shutdown::server_killed),
    Row::new("link-down", "the network link down for 5 s, and up again",
        "connections survive; the client reports correctly and never hangs", network::link_down),
    Row::new("peer-machine-gone",
        "the machine of 1,000 peers disappears without a FIN or RST: 500 silent peers of a server with --keepalive 1s, and 500 with an answer in flight of one with --tcp-user-timeout 3s",
        "each server detects it within that time, and closes the connections", network::peer_machine_gone),
    Row::new("suspended", "the server suspended for 12 s with 5,000 idle timeouts of 5 s due meanwhile (SIGSTOP, SIGCONT)",
        "each timeout fires once, and the server wakes a few times a second afterwards", shutdown::suspended),
    Row { is_long: true, ..Row::new("suspended-minutes", "the same for 3 minutes", "the same", shutdown::suspended_minutes) },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_a_unique_name_that_is_a_valid_file_name() {
        let mut names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '-')));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
    }
}
