//! The bounds of a reactor, and the options of listeners and connects.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::error::Error;

/// The bounds of a reactor. Every loop and every queue is bounded.
///
/// ```
/// let config = reactor::Config { connections_max: 50_000, ..Default::default() };
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Maximum number of connections. Address space for all of them is reserved at the start; pages that are
    /// never used cost nothing. Default: 1,048,576.
    pub connections_max: usize,
    /// The number of these slots that accepted connections never take: at most `connections_max - connects_reserved`
    /// accepted connections are held at once, whatever the number of connects, so that this number of outbound connects
    /// and adopted sockets always finds a slot. Connects may also take any other free slot; accepts then wait for one.
    /// A proxy with one connect per client reserves half. Less than `connections_max`. With the process's descriptor
    /// table, and `connections_max` at the descriptor limit, this reserves descriptors too. Default: 0.
    pub connects_reserved: usize,
    /// Maximum number of listeners. Default: 1,024.
    pub listeners_max: usize,
    /// Maximum number of timers and tagged timeouts together. If each connection may have a tagged timeout, set it to
    /// `connections_max` or more. Default: 4,096.
    pub timers_max: usize,
    /// Maximum number of watched descriptors. Default: 1,024.
    pub watches_max: usize,
    /// Maximum number of sweeps, in progress and pending. Default: 64.
    pub sweeps_max: usize,
    /// Maximum number of events per wait; values above 1,024 count as 1,024, so that the reads after one wait return at
    /// most 4 MiB. Default: 1,024.
    pub events_per_wait: usize,
    /// Maximum number of connections accepted from one listener before other events are served. Default: 64.
    pub accepts_per_wake: usize,
    /// Maximum number of timers examined or fired before other events are served. Default: 4,096.
    pub timers_per_turn: u32,
    /// Maximum number of slots that a shutdown visits before other events are served. Default: 4,096.
    pub closes_per_turn: usize,
    /// Maximum number of connections that a sweep visits before other events are served. Default: 1,024.
    pub visits_per_turn: usize,
    /// Size of the read buffer that all connections share. Default: 64 KiB.
    pub read_buffer_bytes: usize,
    /// Maximum bytes in the write queue of one connection; a larger message is refused even if the queue is empty. Only
    /// the queued bytes count: not the about 40 bytes of each queued chunk, the spare capacity of a `Vec`, or the rest
    /// of a buffer of which a [`SharedPart`](crate::SharedPart) is queued. Default: 256 KiB.
    pub write_queue_bytes_max: usize,
    /// Maximum bytes in all write queues together, counted in the same way. If it is reached, a connection of which the
    /// kernel has accepted a part of a message is reset. Default: 256 MiB, which 1,024 full queues use up.
    pub write_queues_bytes_max: usize,
    /// How long [`close`](crate::Context::close) waits until the peer has received all bytes. Default: 30 s.
    pub flush_timeout: Duration,
    /// The first pause of the listeners, which share it, after descriptors, memory, epoll watches or slots have run
    /// out; it doubles up to [`accept_pause_max`](Self::accept_pause_max). Default: 10 ms.
    pub accept_pause_min: Duration,
    /// The longest pause of the listeners. Default: 1 s.
    pub accept_pause_max: Duration,
    /// Where connections' sockets are held. Default: [`FileTable::Auto`].
    pub file_table: FileTable,
    /// Time each callback, for [`Stats::callback_longest`](crate::Stats::callback_longest). This reads the clock twice
    /// per callback, which takes longer than the reactor itself spends on a message. Default: no.
    pub times_callbacks: bool,
}

/// The kernel's table that holds the files of connections' sockets. A handler works with both;
/// [`Registered`](Self::Registered) describes the differences. Listeners and watched descriptors always use the process's
/// descriptor table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileTable {
    /// Registered files if [`Config::connections_max`] and [`Config::listeners_max`] do not fit under the soft limit of
    /// descriptors (`RLIMIT_NOFILE`), otherwise descriptors. If io_uring is not available, descriptors are used, and
    /// the reason is logged as a warning. [`Context::file_table`](crate::Context::file_table) returns the table in use.
    #[default]
    Auto,
    /// The process's descriptor table: one descriptor per connection, limited by `RLIMIT_NOFILE`.
    Process,
    /// Registered-file tables of io_uring. `RLIMIT_NOFILE` does not count their files: it bounds the size of one table,
    /// not the number of tables. Raise the soft limit to the hard limit before creating the reactor, so that few tables
    /// are needed; each takes one descriptor and 8 to 28 KiB of locked memory (`RLIMIT_MEMLOCK`). Requires Linux 6.8
    /// and an io_uring that is not disabled (`kernel.io_uring_disabled`, seccomp); otherwise
    /// [`Reactor::new`](crate::Reactor::new) fails.
    ///
    /// A connection has a descriptor only from `accept4` or `connect` to the end of the turn, at most 64 connections at
    /// a time. [`peer_addr`](crate::Context::peer_addr), [`local_addr`](crate::Context::local_addr) and
    /// [`connection_fd`](crate::Context::connection_fd) open one for a moment. All fail with `EMFILE` if none is left,
    /// so keep the soft limit above the sum of the tables, these 64, and what the rest of the process opens.
    ///
    /// The receives, sends and closes of one turn go to the kernel together. A write of up to 2,048 bytes in a callback
    /// is added to a batch, which is sent after the events, accepts and deferred calls of the turn, and again at its
    /// end; [`Written::Sent`](crate::Written::Sent) means that it will be sent then.
    Registered,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections_max: 1 << 20,
            connects_reserved: 0,
            listeners_max: 1024,
            timers_max: 4096,
            watches_max: 1024,
            sweeps_max: 64,
            events_per_wait: 1024,
            accepts_per_wake: 64,
            timers_per_turn: 4096,
            closes_per_turn: 4096,
            visits_per_turn: 1024,
            read_buffer_bytes: 64 * 1024,
            write_queue_bytes_max: 256 * 1024,
            write_queues_bytes_max: 256 * 1024 * 1024,
            flush_timeout: Duration::from_secs(30),
            accept_pause_min: Duration::from_millis(10),
            accept_pause_max: Duration::from_secs(1),
            file_table: FileTable::Auto,
            times_callbacks: false,
        }
    }
}

impl Config {
    /// Returns an error for a bound that can't work.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let needed = [
            (self.connections_max, "connections_max must not be zero"),
            (self.listeners_max, "listeners_max must not be zero"),
            (self.events_per_wait, "events_per_wait must not be zero"),
            (self.accepts_per_wake, "accepts_per_wake must not be zero"),
            (self.timers_per_turn as usize, "timers_per_turn must not be zero"),
            (self.read_buffer_bytes, "read_buffer_bytes must not be zero"),
            (self.write_queue_bytes_max, "write_queue_bytes_max must not be zero"),
        ];
        if let Some(&(_, why)) = needed.iter().find(|(bound, _)| *bound == 0) {
            return Err(Error::Invalid(why));
        }
        if self.connects_reserved >= self.connections_max {
            return Err(Error::Invalid("connects_reserved must be less than connections_max"));
        }
        Ok(())
    }
}

impl FileTable {
    /// Checks whether [`Registered`](Self::Registered) is available, by making a table.
    ///
    /// # Errors
    /// The reason: io_uring is disabled (`EPERM`, `ENOSYS`), there is no descriptor or lockable memory for a ring, or
    /// the kernel is older than Linux 6.8.
    pub fn check_registered() -> Result<(), Error> {
        crate::sys::Sockets::new(Self::Registered, 1, 0).map(drop)
    }
}

/// TCP keepalive (`SO_KEEPALIVE`): the kernel probes a silent peer, to detect that it is gone. The system refuses
/// values out of range: times of 1 s to 32,767 s, and 1 to 127 probes, are valid. Fractions of a second are rounded up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe (`TCP_KEEPIDLE`). Default: 60 s.
    pub idle: Duration,
    /// Time between probes (`TCP_KEEPINTVL`). Default: 10 s.
    pub interval: Duration,
    /// Number of unanswered probes after which the connection fails (`TCP_KEEPCNT`). Default: 3.
    pub probes_max: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { idle: Duration::from_secs(60), interval: Duration::from_secs(10), probes_max: 3 }
    }
}

/// The TCP options that are set on a listener, for its connections to inherit, or on an outbound connection.
#[derive(Debug)]
pub(crate) struct TcpOptions {
    pub(crate) nodelay: bool,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) user_timeout: Option<Duration>,
    pub(crate) send_buffer_bytes: Option<usize>,
    pub(crate) receive_buffer_bytes: Option<usize>,
    pub(crate) notsent_lowat_bytes: Option<u32>,
}

/// Options of a listener. Accepted connections inherit the socket options, so they cost no call per connection.
///
/// All options except the backlog and `connections_max` are for TCP; a Unix-domain listener ignores them.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Maximum number of connections that wait to be accepted; `None` sets the kernel's maximum
    /// (`net.core.somaxconn`, which also limits any other value).
    pub backlog: Option<u32>,
    /// Maximum number of connections of this listener, so that one listener can't use up [`Config::connections_max`].
    /// Further peers wait in its backlog until one of its connections has closed;
    /// [`on_accept_error`](crate::Handler::on_accept_error) is called with [`Error::Full`] when the first one has to
    /// wait. If any listener has such a bound, each slot takes 8 bytes more. Default: `None`, no bound.
    pub connections_max: Option<usize>,
    /// Share the address with other sockets of this user; the kernel distributes connections among them
    /// (`SO_REUSEPORT`). Default: no.
    pub reuse_port: bool,
    /// For an IPv6 address: do not accept IPv4 connections (`IPV6_V6ONLY`). Default: no, so `::` accepts both.
    pub only_v6: bool,
    /// Send small messages at once (`TCP_NODELAY`). Default: yes.
    pub nodelay: bool,
    /// Probe silent peers. Default: no.
    pub keepalive: Option<Keepalive>,
    /// How long sent bytes may stay unacknowledged before the connection fails (`TCP_USER_TIMEOUT`); `None` leaves
    /// this to the kernel (about a quarter of an hour). It also limits how long the kernel keeps bytes for a peer whose
    /// receive window is zero, so it ends a peer that acknowledges but does not read. It overrides the number of
    /// keepalive probes. Fractions of a millisecond are rounded up.
    pub user_timeout: Option<Duration>,
    /// Size of the kernel's send buffer (`SO_SNDBUF`). The kernel doubles the value for its own overhead, limits it to
    /// `net.core.wmem_max`, and no longer adapts the buffer to the path. `None` leaves the size to the kernel, which
    /// may buffer megabytes for a peer that never reads (`net.ipv4.tcp_wmem`).
    pub send_buffer_bytes: Option<usize>,
    /// Size of the kernel's receive buffer (`SO_RCVBUF`); doubled, limited to `net.core.rmem_max`, and fixed likewise.
    pub receive_buffer_bytes: Option<usize>,
    /// Maximum bytes in the kernel's send buffer that have not been transmitted yet (`TCP_NOTSENT_LOWAT`). The rest
    /// stays in the bounded write queue, and the send buffer still adapts to the path. With a small value, such as
    /// 16 KiB, a burst is partly queued also for a peer that reads fast. `None` leaves the system's setting
    /// (`net.ipv4.tcp_notsent_lowat`), by default unlimited.
    pub notsent_lowat_bytes: Option<u32>,
}

impl ListenOptions {
    pub(crate) fn tcp(&self) -> TcpOptions {
        TcpOptions {
            nodelay: self.nodelay,
            keepalive: self.keepalive,
            user_timeout: self.user_timeout,
            send_buffer_bytes: self.send_buffer_bytes,
            receive_buffer_bytes: self.receive_buffer_bytes,
            notsent_lowat_bytes: self.notsent_lowat_bytes,
        }
    }
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            backlog: None,
            connections_max: None,
            reuse_port: false,
            only_v6: false,
            nodelay: true,
            keepalive: None,
            user_timeout: None,
            send_buffer_bytes: None,
            receive_buffer_bytes: None,
            notsent_lowat_bytes: None,
        }
    }
}

/// Options of an outbound connect. Each option that is set costs one system call per connection, keepalive four.
///
/// All options except the timeout are for TCP. For a Unix-domain socket, a source is an error and the others are
/// ignored.
#[derive(Clone, Debug, Default)]
pub struct ConnectOptions {
    /// Local address to connect from. With port 0 the kernel chooses the port in `connect`, when the whole 5-tuple is
    /// known (`IP_BIND_ADDRESS_NO_PORT`, Linux 4.2), so that one address can have far more connections than ports.
    pub source: Option<SocketAddr>,
    /// Range of local ports that the kernel chooses from (`IP_LOCAL_PORT_RANGE`, Linux 6.3; older kernels ignore it and
    /// use the system's range). Setting it, even to the system's range, keeps the choice fast when more than half of
    /// the range is in use.
    pub port_range: Option<RangeInclusive<u16>>,
    /// How long the connect may take; `None` leaves this to the kernel (about two minutes).
    pub timeout: Option<Duration>,
    /// Send small messages at once (`TCP_NODELAY`). Default: no.
    pub nodelay: bool,
    /// Probe a silent peer. Default: no.
    pub keepalive: Option<Keepalive>,
    /// As [`ListenOptions::user_timeout`]; it also limits the duration of the connect.
    pub user_timeout: Option<Duration>,
    /// As [`ListenOptions::send_buffer_bytes`].
    pub send_buffer_bytes: Option<usize>,
    /// As [`ListenOptions::receive_buffer_bytes`].
    pub receive_buffer_bytes: Option<usize>,
    /// As [`ListenOptions::notsent_lowat_bytes`].
    pub notsent_lowat_bytes: Option<u32>,
}

impl ConnectOptions {
    pub(crate) fn tcp(&self) -> TcpOptions {
        TcpOptions {
            nodelay: self.nodelay,
            keepalive: self.keepalive,
            user_timeout: self.user_timeout,
            send_buffer_bytes: self.send_buffer_bytes,
            receive_buffer_bytes: self.receive_buffer_bytes,
            notsent_lowat_bytes: self.notsent_lowat_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_bound_is_refused_and_named_in_the_error() {
        type Spoil = fn(&mut Config);
        let spoilt: [(&str, Spoil); 8] = [
            ("connections_max", |config| config.connections_max = 0),
            ("listeners_max", |config| config.listeners_max = 0),
            ("events_per_wait", |config| config.events_per_wait = 0),
            ("accepts_per_wake", |config| config.accepts_per_wake = 0),
            ("timers_per_turn", |config| config.timers_per_turn = 0),
            ("read_buffer_bytes", |config| config.read_buffer_bytes = 0),
            ("write_queue_bytes_max", |config| config.write_queue_bytes_max = 0),
            ("connects_reserved", |config| config.connects_reserved = config.connections_max),
        ];
        assert!(Config::default().check().is_ok());
        for (name, spoil) in spoilt {
            let mut config = Config::default();
            spoil(&mut config);
            let refused = config.check().unwrap_err().to_string();
            assert!(refused.starts_with(name), "{name}: {refused}");
        }
    }
}
