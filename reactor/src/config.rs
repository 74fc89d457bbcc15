//! The bounds of a reactor, and the options of listeners and connects.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::error::Error;

/// The bounds of a reactor. Every loop and every queue has one.
///
/// ```
/// let config = reactor::Config { connections_max: 50_000, ..Default::default() };
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    /// Connections held at once at most. Address space for all of them is reserved at the start; pages that are
    /// never used cost nothing. Default: 1,048,576.
    pub connections_max: usize,
    /// Of these, how many accepted connections never take: at most `connections_max - connects_reserved` of them are
    /// held at once, however many connects there are, so that many outbound connects and adopted sockets always find a
    /// slot. They may take any other free slot too, and then accepts have to wait for one. A proxy with one connect for
    /// each client reserves half. Less than `connections_max`. In the process's descriptor table it keeps
    /// descriptors too, if `connections_max` is what its limit allows. Default: 0.
    pub connects_reserved: usize,
    /// Listeners at once at most. Default: 1,024.
    pub listeners_max: usize,
    /// Free timers and tagged timeouts at once at most. Default: 4,096.
    pub timers_max: usize,
    /// Watched descriptors at once at most. Default: 1,024.
    pub watches_max: usize,
    /// Sweeps that may wait for each other. Default: 64.
    pub sweeps_max: usize,
    /// The most events that one wait takes from the kernel; more than 1,024 are not, so that the reads of one round stay
    /// within 4 MiB. Default: 1,024.
    pub events_per_wait: usize,
    /// Connections accepted from one listener before other events get their turn. Default: 64.
    pub accepts_per_wake: usize,
    /// Timers that fire before sockets get their turn again. Default: 4,096.
    pub timers_per_turn: u32,
    /// Connections closed by a shutdown before sockets get their turn again. Default: 4,096.
    pub closes_per_turn: usize,
    /// Connections that a sweep visits before sockets get their turn again. Default: 1,024.
    pub visits_per_turn: usize,
    /// Size of the one buffer that all reads share. Default: 64 KiB.
    pub read_buffer_bytes: usize,
    /// Bytes that may wait in the write queue of one connection; a larger message is refused even where nothing waits.
    /// Default: 256 KiB.
    pub write_queue_bytes_max: usize,
    /// Bytes that may wait in all write queues together. Default: 256 MiB.
    pub write_queues_bytes_max: usize,
    /// How long a closed connection may take to deliver what the peer has not received yet. Default: 30 s.
    pub flush_timeout: Duration,
    /// The first pause of listeners, which share it, after descriptors, memory or epoll watches ran out; it doubles up
    /// to [`accept_pause_max`](Self::accept_pause_max). Default: 10 ms.
    pub accept_pause_min: Duration,
    /// The longest pause of listeners. Default: 1 s.
    pub accept_pause_max: Duration,
    /// Where connections' sockets are held. Default: [`FileTable::Auto`].
    pub file_table: FileTable,
    /// Time each callback, for [`Stats::callback_longest`](crate::Stats::callback_longest). That takes two readings of
    /// the clock for a callback, more than the reactor itself spends on a message. Default: no.
    pub times_callbacks: bool,
}

/// Where the kernel keeps the files of connections' sockets. A handler sees no difference but the time of its sends: see
/// [`Registered`](Self::Registered). Listeners and watched descriptors are descriptors in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileTable {
    /// Registered files where [`Config::connections_max`] and [`Config::listeners_max`] do not fit under the soft limit
    /// of descriptors (`RLIMIT_NOFILE`); descriptors where they do, or where io_uring is not available, which is then
    /// logged as a warning with the reason. [`Context::file_table`](crate::Context::file_table) says which one it took.
    #[default]
    Auto,
    /// The process's descriptor table: a descriptor for each connection, and at most `RLIMIT_NOFILE` of them.
    Process,
    /// Registered-file tables of io_uring, which `RLIMIT_NOFILE` does not count: it bounds the size of one table and not
    /// their number. Raise the soft limit to the hard one before making the reactor, so that few tables are enough; each
    /// takes one descriptor and 8 to 28 KiB of locked memory (`RLIMIT_MEMLOCK`). Requires Linux 6.8, and an io_uring
    /// that is not forbidden (`kernel.io_uring_disabled`, seccomp); otherwise [`Reactor::new`](crate::Reactor::new)
    /// fails.
    ///
    /// A connection has a descriptor from its accept, or its connect, to the end of the turn, 64 connections at most at
    /// a time. Receives, sends and closes of one turn go to the kernel together: a small
    /// [`write`](crate::Context::write) in a callback is sent at the end of the turn, when the callbacks of its events
    /// have run, and [`Written::Sent`](crate::Written::Sent) means that it is handed over then.
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
    /// Says which bound no reactor can work with.
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
    /// Whether [`Registered`](Self::Registered) is available here.
    ///
    /// # Errors
    /// Why not: io_uring is forbidden (`EPERM`, `ENOSYS`), there is no descriptor or no memory to lock for a ring, or the
    /// kernel is older than Linux 6.8.
    pub fn check_registered() -> Result<(), Error> {
        crate::sys::Sockets::new(Self::Registered, 1, 0).map(drop)
    }
}

/// How to find out that a peer is gone without a word: TCP asks it (`SO_KEEPALIVE`), and no byte of the service's is
/// spent. The system refuses what is out of its range: 1 s to 32,767 s, and 1 to 127 probes. Fractions of a second are
/// rounded up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence after which the first probe is sent (`TCP_KEEPIDLE`). Default: 60 s.
    pub idle: Duration,
    /// Time between probes (`TCP_KEEPINTVL`). Default: 10 s.
    pub interval: Duration,
    /// Unanswered probes after which the connection has failed (`TCP_KEEPCNT`). Default: 3.
    pub probes_max: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { idle: Duration::from_secs(60), interval: Duration::from_secs(10), probes_max: 3 }
    }
}

/// What is set on a listener for its connections to inherit, and on an outbound connection.
#[derive(Debug)]
pub(crate) struct TcpOptions {
    pub(crate) nodelay: bool,
    pub(crate) keepalive: Option<Keepalive>,
    pub(crate) user_timeout: Option<Duration>,
    pub(crate) send_buffer_bytes: Option<usize>,
    pub(crate) receive_buffer_bytes: Option<usize>,
    pub(crate) notsent_lowat_bytes: Option<u32>,
}

/// How to listen. Accepted connections inherit the socket options, so they cost no call per connection.
///
/// All options but the backlog and `connections_max` are for TCP, and a Unix-domain listener goes without them.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Connections that may wait to be accepted; `None` asks for as many as the kernel allows
    /// (`net.core.somaxconn`, which caps any other number too).
    pub backlog: Option<u32>,
    /// Connections of this listener held at once at most, so that none takes all of
    /// [`Config::connections_max`]: peers beyond wait in its backlog until one of its connections has gone, and
    /// [`on_accept_error`](crate::Handler::on_accept_error) is called with [`Error::Full`] when the first has to. With such a
    /// listener each slot costs 8 bytes more. `None`, the default, is no bound of its own.
    pub connections_max: Option<usize>,
    /// Share the address with other sockets of this user, and let the kernel spread connections over them
    /// (`SO_REUSEPORT`). Default: no.
    pub reuse_port: bool,
    /// For an IPv6 address: leave IPv4 alone (`IPV6_V6ONLY`). Default: no, so `::` takes both.
    pub only_v6: bool,
    /// Send small messages at once (`TCP_NODELAY`). Default: yes.
    pub nodelay: bool,
    /// Probe silent peers. Default: no.
    pub keepalive: Option<Keepalive>,
    /// How long sent bytes may go unacknowledged before the connection has failed (`TCP_USER_TIMEOUT`); `None` leaves
    /// that to the kernel (about a quarter of an hour). It also replaces the number of keepalive probes. Fractions of
    /// a millisecond are rounded up.
    pub user_timeout: Option<Duration>,
    /// How much the kernel may hold of what was sent to a peer (`SO_SNDBUF`). The kernel doubles the figure for its own
    /// overhead, bounds it by `net.core.wmem_max`, and no longer adapts the buffer to the path. `None` leaves it to the
    /// kernel, which may take megabytes from a peer that never reads (`net.ipv4.tcp_wmem`).
    pub send_buffer_bytes: Option<usize>,
    /// How much may arrive before it is read (`SO_RCVBUF`), doubled, bounded by `net.core.rmem_max` and fixed likewise.
    pub receive_buffer_bytes: Option<usize>,
    /// How much of what was sent may wait in the kernel for its first transmission (`TCP_NOTSENT_LOWAT`): the rest stays
    /// in the bounded write queue, and the send buffer still adapts to the path. `None` is the system's setting
    /// (`net.ipv4.tcp_notsent_lowat`), by default without a bound.
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

/// How to connect. Each option that is not at its default costs one system call per connection, a keepalive four.
///
/// All options but the timeout are for TCP; a connect to a Unix-domain socket refuses a source and goes without the
/// others.
#[derive(Clone, Debug, Default)]
pub struct ConnectOptions {
    /// Local address to connect from. With port 0 the kernel chooses the port when it knows the whole 5-tuple
    /// (`IP_BIND_ADDRESS_NO_PORT`, Linux 4.2), so that one address can hold far more connections than it has ports.
    pub source: Option<SocketAddr>,
    /// Local ports that the kernel may choose from (`IP_LOCAL_PORT_RANGE`, Linux 6.3; silently the system's range on
    /// older kernels). Setting it, even to the system's own range, keeps the choice fast when more than half of the
    /// range is in use.
    pub port_range: Option<RangeInclusive<u16>>,
    /// How long the peer may take to answer; `None` leaves that to the kernel (about two minutes).
    pub timeout: Option<Duration>,
    /// Send small messages at once (`TCP_NODELAY`). Default: no.
    pub nodelay: bool,
    /// Probe a silent peer. Default: no.
    pub keepalive: Option<Keepalive>,
    /// As [`ListenOptions::user_timeout`]; it also bounds the time of the connect itself.
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
    fn a_bound_that_can_not_be_is_refused_by_its_name() {
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
