//! A fake kernel that replaces the real one in unit tests and under the fuzzer, and with the feature `testing` in the
//! test harness. It has the same functions and types, and makes no system calls.
//!
//! In the harness it does only what the test requests ([`SCRIPTED`]). Otherwise its behaviour is chosen at random from a
//! seed or from the fuzzer's bytes, so every run can be repeated. It does what a real kernel may do, at its worst: it
//! cuts reads and writes short, fails calls with each documented errno, runs out of descriptors and epoll watches, and
//! reports events late, in any order, without cause, or for closed descriptors. Its peers connect, send, finish, reset
//! and vanish at random. Each thread has its own kernel with its own clock.

use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File as RealFile;
use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::address::Address;
use crate::config::{FileTable, Keepalive};
use crate::error::Error;
use crate::signal::Signal;

use super::{AcceptResult, Adopted, IoResult, LentFd, Readiness, ReceiveBatch, SendBatch};
use super::{accept_result, io_result, refused};

pub(crate) type Accepted = AcceptResult<Descriptor>;

/// Whether the kernel serves the harness and makes no random choices.
const SCRIPTED: bool = !cfg!(any(test, fuzzing));

thread_local! {
    static KERNEL: RefCell<Kernel> = RefCell::new(Kernel::new(Choices::seeded(0)));
}

fn kernel<T>(act: impl FnOnce(&mut Kernel) -> T) -> T {
    KERNEL.with_borrow_mut(act)
}

// --- for the simulation ----------------------------------------------------------------------------------------------

/// Starts a new kernel on this thread.
pub(crate) fn boot(choices: Choices) {
    kernel(|kernel| *kernel = Kernel::new(choices));
}

/// Ends all faults: no call fails, and no event is late, repeated or without cause. Peers read everything, and do nothing
/// else. A reactor must then become idle.
pub(crate) fn calm_down() {
    kernel(Kernel::calm_down);
}

/// The next choice: a number below `bound`.
pub(crate) fn below(bound: u32) -> u32 {
    kernel(|kernel| kernel.choices.below(bound))
}

/// True in this percentage of cases.
pub(crate) fn percent(chance: u32) -> bool {
    below(100) < chance
}

/// Whether there are choices left.
pub(crate) fn has_choices() -> bool {
    kernel(|kernel| kernel.choices.any_left())
}

/// Sets the percentage of calls that fail and of events that are wrong.
pub(crate) fn set_faults(percent: u32) {
    kernel(|kernel| kernel.faults_percent = percent);
}

/// Whether the last wait had no time limit and no events: a real one would not have returned.
pub(crate) fn rests() -> bool {
    kernel(|kernel| kernel.rests)
}

/// Waits like another event loop, on the epoll descriptor and until a time; returns whether anything ends the wait.
pub(crate) fn wait_outside(until: Option<Instant>) -> bool {
    kernel(|kernel| {
        let has_events = !kernel.true_events(None).is_empty();
        if let Some(until) = until
            && !has_events
        {
            kernel.clock = kernel.clock.max(until.duration_since(kernel.started));
        }
        has_events || until.is_some()
    })
}

/// The number of injected fatal errors of `epoll_wait`.
pub(crate) fn broken_waits() -> u64 {
    kernel(|kernel| kernel.broken_waits)
}

/// The number of files that are open on this thread, with a descriptor or in a registered-file table, without the rings.
pub(crate) fn open_files() -> usize {
    kernel(|kernel| kernel.files.values().filter(|file| !matches!(file, File::Ring)).count())
}

/// The number of rings that are open on this thread.
pub(crate) fn open_rings() -> usize {
    kernel(|kernel| kernel.files.len()) - open_files()
}

pub(crate) fn signals_raised() -> u64 {
    kernel(|kernel| kernel.signals_raised)
}

pub(crate) fn accepts_granted() -> u64 {
    kernel(|kernel| kernel.accepts_granted)
}

/// The number of bytes that all sockets have accepted to send.
pub(crate) fn bytes_taken() -> u64 {
    kernel(|kernel| kernel.bytes_taken)
}

/// The number of peers that wait to be accepted.
pub(crate) fn peers_waiting() -> usize {
    let waiting = |file: &File| match file {
        File::Listener { backlog } => backlog.len(),
        _ => 0,
    };
    kernel(|kernel| kernel.files.values().map(waiting).sum())
}

/// Makes the watched descriptors not ready, as if they had been read.
pub(crate) fn read_watched() {
    kernel(|kernel| {
        for file in kernel.files.values_mut() {
            if let File::Foreign { ready, .. } = file {
                *ready = Readiness::NONE;
            }
        }
    });
}

/// Prints a line of the log when a seed is replayed.
pub(crate) fn trace(line: impl FnOnce() -> String) {
    static ASKED: OnceLock<bool> = OnceLock::new();
    if *ASKED.get_or_init(|| std::env::var_os("REACTOR_TRACE").is_some()) {
        println!("{}", line());
    }
}

/// Creates a connected or a listening socket outside of the reactor.
pub(crate) fn outside_socket(wanted: Adopted) -> OwnedFd {
    kernel(|kernel| {
        let file = match wanted {
            Adopted::Connection => {
                let mut socket = kernel.new_socket();
                socket.cuts_reads = kernel.percent(20);
                if kernel.percent(30) {
                    socket.room = 0;
                }
                File::Socket(socket)
            }
            Adopted::Listener => File::Listener { backlog: VecDeque::new() },
        };
        kernel.put_outside(file)
    })
}

/// The serial number of the socket that a stand-in descriptor represents.
pub(crate) fn serial_outside(descriptor: &OwnedFd) -> u32 {
    kernel(|kernel| match &kernel.outside[&descriptor.as_raw_fd()] {
        File::Socket(socket) => socket.serial,
        other => panic!("not a connection: {other:?}"),
    })
}

/// The state of a connection at its peer, and the bytes that were sent to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wire {
    pub(crate) sent: Vec<u8>,
    /// The number of bytes that have arrived from the peer.
    pub(crate) arrived: usize,
    pub(crate) fin: bool,
    pub(crate) gone: bool,
    pub(crate) resets: bool,
    pub(crate) connecting: bool,
}

/// The wire of a socket, which outlives the socket.
pub(crate) fn wire(serial: u32) -> Wire {
    kernel(|kernel| kernel.wire(serial))
}

/// The byte that the peer of this socket sends at this position of its stream.
pub(crate) fn byte_of(serial: u32, place: usize) -> u8 {
    (serial as u8).wrapping_mul(31).wrapping_add(place as u8) ^ (place >> 8) as u8
}

impl Socket {
    /// The serial number, which is unique among all sockets of the kernel.
    pub(crate) fn serial(&self) -> u32 {
        kernel(|kernel| kernel.socket(self.0).serial)
    }

    /// Whether the fake epoll watches it.
    pub(crate) fn is_watched(&self) -> bool {
        kernel(|kernel| kernel.watches.contains_key(&self.0))
    }

    /// Whether bytes may stay queued: epoll will report when they can be sent, or they can never be sent.
    pub(crate) fn has_reason_to_wait(&self) -> bool {
        kernel(|kernel| {
            let reports = kernel
                .watches
                .get(&self.0)
                .is_some_and(|watch| matches!(watch.trigger, Trigger::Edge { pending: true }));
            let socket = kernel.socket(self.0);
            let is_over = socket.wire.gone || socket.error.is_some();
            reports || is_over || socket.wants_room || socket.wants_memory
        })
    }
}

/// The source of random choices: bytes, or a generator if there are none or none are left.
#[derive(Debug)]
pub(crate) struct Choices {
    bytes: Option<VecDeque<u8>>,
    state: u64,
    left: u32,
}

/// The number of choices of a run.
const CHOICES_MAX: u32 = 4000;

impl Choices {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { bytes: None, state: seed, left: CHOICES_MAX }
    }

    #[cfg_attr(not(fuzzing), allow(dead_code))] // Only a fuzzer has bytes.
    pub(crate) fn scripted(bytes: &[u8]) -> Self {
        Self { bytes: Some(bytes.iter().copied().collect()), state: 0, left: CHOICES_MAX }
    }

    fn any_left(&self) -> bool {
        self.left > 0 && self.bytes.as_ref().is_none_or(|bytes| !bytes.is_empty())
    }

    fn below(&mut self, bound: u32) -> u32 {
        self.left = self.left.saturating_sub(1);
        if let Some(byte) = self.bytes.as_mut().and_then(VecDeque::pop_front) {
            return u32::from(byte) % bound;
        }
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % u64::from(bound)) as u32
    }
}

// --- for the harness -------------------------------------------------------------------------------------------------

/// The local address, whatever was bound.
const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 2);

/// Advances the clock of all harnesses on this thread.
pub(crate) fn advance(time: Duration) {
    kernel(|kernel| kernel.clock += time);
}

/// Whether a wait of this poller would find an event.
pub(crate) fn has_events(poller: &Poller) -> bool {
    kernel(|kernel| !kernel.true_events(Some(poller.0.0)).is_empty())
}

/// Connects a peer to this listener, where it waits to be accepted; returns its serial number.
pub(crate) fn arrive(listener: &Descriptor, peer: SocketAddr) -> u32 {
    kernel(|kernel| {
        let socket = FakeSocket { peer, ..kernel.new_socket() };
        let serial = socket.serial;
        match kernel.files.get_mut(&listener.0) {
            Some(File::Listener { backlog }) => backlog.push_back(socket),
            other => panic!("not a listener: {other:?}"),
        }
        serial
    })
}

/// Takes the outbound connects that were started since the last call, with their addresses.
pub(crate) fn take_connects() -> Vec<(u32, Address)> {
    kernel(|kernel| std::mem::take(&mut kernel.connects))
}

/// Creates a connected socket; returns its stand-in descriptor and its serial number.
pub(crate) fn outside_peer() -> (OwnedFd, u32) {
    kernel(|kernel| {
        let socket = kernel.new_socket();
        let serial = socket.serial;
        (kernel.put_outside(File::Socket(socket)), serial)
    })
}

/// The user data with which epoll watches the socket of this peer.
pub(crate) fn data_of(serial: u32) -> Option<u64> {
    kernel(|kernel| {
        let (number, _) = kernel
            .files
            .iter()
            .find(|(_, file)| matches!(file, File::Socket(socket) if socket.serial == serial))?;
        kernel.watches.get(number).map(|watch| watch.data)
    })
}

/// Changes the socket of a peer, and lets epoll report it. Returns `false` if the socket is closed.
fn act_as_peer(serial: u32, act: impl FnOnce(&mut FakeSocket)) -> bool {
    act_on(serial, true, act)
}

/// The same without a report.
fn act_quietly(serial: u32, act: impl FnOnce(&mut FakeSocket)) -> bool {
    act_on(serial, false, act)
}

fn act_on(serial: u32, reports: bool, act: impl FnOnce(&mut FakeSocket)) -> bool {
    kernel(|kernel| {
        let mut found = None;
        for (&number, file) in kernel.files.iter_mut().chain(&mut kernel.outside) {
            match file {
                File::Socket(socket) if socket.serial == serial => found = Some((number, socket)),
                File::Listener { backlog } => {
                    let waits = backlog.iter_mut().find(|socket| socket.serial == serial);
                    found = waits.map(|socket| (number, socket)).or(found);
                }
                _ => {}
            }
        }
        let Some((number, socket)) = found else { return false };
        act(socket);
        if reports {
            kernel.change(number);
        }
        true
    })
}

/// Completes the connect to this peer, successfully or with `ECONNREFUSED`.
pub(crate) fn answer(serial: u32, works: bool) -> bool {
    act_as_peer(serial, |socket| {
        if std::mem::take(&mut socket.wire.connecting) && !works {
            socket.error = Some(Errno::ECONNREFUSED);
            socket.wire.gone = true;
        }
    })
}

/// Sends bytes from the peer.
pub(crate) fn feed(serial: u32, bytes: &[u8]) -> bool {
    act_as_peer(serial, |socket| socket.incoming.extend(bytes))
}

/// Finishes the peer's writing.
pub(crate) fn finish_peer(serial: u32) -> bool {
    act_as_peer(serial, |socket| socket.wire.fin = true)
}

/// Resets the connection from its peer; unread bytes are lost.
pub(crate) fn reset_peer(serial: u32) -> bool {
    act_as_peer(serial, |socket| {
        socket.incoming.clear();
        socket.error = Some(Errno::ECONNRESET);
        socket.wire.connecting = false;
        socket.wire.gone = true;
    })
}

/// Sets the number of bytes that the peer still accepts.
pub(crate) fn set_room(serial: u32, bytes: usize) -> bool {
    act_as_peer(serial, |socket| {
        socket.room = bytes;
        socket.wants_room = false;
    })
}

/// Takes the bytes that the peer has received since the last call.
pub(crate) fn take_sent(serial: u32) -> Vec<u8> {
    let mut sent = Vec::new();
    let is_alive = act_quietly(serial, |socket| sent = std::mem::take(&mut socket.wire.sent));
    if !is_alive {
        kernel(|kernel| {
            if let Some(wire) = kernel.reaped.get_mut(&serial) {
                sent = std::mem::take(&mut wire.sent);
            }
        });
    }
    sent
}

/// The state of a connection as its peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OtherSide {
    /// The peer waits in the backlog, or its connect has not been answered.
    Waiting,
    Open,
    Finished,
    Closed,
    Reset,
}

pub(crate) fn other_side(serial: u32) -> OtherSide {
    kernel(|kernel| {
        if let Some(wire) = kernel.reaped.get(&serial) {
            return if wire.resets { OtherSide::Reset } else { OtherSide::Closed };
        }
        let alive = kernel.files.values().chain(kernel.outside.values());
        let mut found = alive.filter_map(|file| match file {
            File::Socket(socket) if socket.serial == serial => Some(match socket.wire.connecting {
                true => OtherSide::Waiting,
                false if socket.finished => OtherSide::Finished,
                false => OtherSide::Open,
            }),
            File::Listener { backlog } if backlog.iter().any(|socket| socket.serial == serial) => {
                Some(OtherSide::Waiting)
            }
            _ => None,
        });
        // A peer that is not found was in the backlog of a listener that was closed.
        found.next().unwrap_or(OtherSide::Reset)
    })
}

/// Delivers a signal to all signal readers on this thread.
pub(crate) fn raise(signal: Signal) {
    kernel(|kernel| {
        for file in kernel.files.values_mut() {
            if let File::Signals { pending } = file {
                pending.push_back(signal);
            }
        }
    });
}

/// Makes the descriptor that is watched with this user data ready, for one turn.
pub(crate) fn set_ready(data: u64, readiness: Readiness) {
    kernel(|kernel| {
        let watched = kernel.watches.iter().find(|(_, watch)| watch.data == data);
        if let Some((number, _)) = watched
            && let Some(File::Foreign { ready, .. }) = kernel.files.get_mut(number)
        {
            *ready = readiness;
        }
    });
}

// --- the kernel --------------------------------------------------------------------------------------------------------

/// The number of successive reports of a descriptor that the reactor may ignore, without a call on it. A listener is
/// ignored for as many turns as it takes to serve each connection once.
const IGNORED_MAX: u32 = 24;
const SOCKETS_MAX: usize = 40;
const ROOM_BYTES_MAX: u32 = 200;

#[derive(Debug)]
struct Kernel {
    choices: Choices,
    faults_percent: u32,
    calm: bool,
    started: Instant,
    clock: Duration,
    /// The open files by descriptor; those of registered-file tables by the complement of their place.
    files: BTreeMap<i32, File>,
    files_max: usize,
    /// Sockets that the reactor does not own, by the descriptor of `/dev/null` that represents them.
    outside: BTreeMap<i32, File>,
    /// A security module refuses every peer; the listener stays readable nevertheless.
    refuses_accepts: bool,
    watches: BTreeMap<i32, Watch>,
    watches_max: usize,
    /// The user data of removed watches, for late events.
    retired: VecDeque<u64>,
    reaped: BTreeMap<u32, Wire>,
    serial_next: u32,
    connects: Vec<(u32, Address)>,
    rests: bool,
    broken_waits: u64,
    signals_raised: u64,
    accepts_granted: u64,
    bytes_taken: u64,
}

#[derive(Debug)]
enum File {
    Epoll,
    Null,
    Ring,
    Wake { signaled: Arc<AtomicBool> },
    Signals { pending: VecDeque<Signal> },
    Listener { backlog: VecDeque<FakeSocket> },
    Socket(FakeSocket),
    Foreign { descriptor: OwnedFd, ready: Readiness },
}

#[derive(Debug)]
struct FakeSocket {
    serial: u32,
    peer: SocketAddr,
    listens: bool,
    error: Option<Errno>,
    incoming: VecDeque<u8>,
    /// The number of bytes that the peer still accepts.
    room: usize,
    /// A send has found no room; epoll reports when there is some.
    wants_room: bool,
    /// A send has failed because there was no memory; epoll does not report when there is some.
    wants_memory: bool,
    /// Reads may be short, because the peer has sent urgent data, or descriptors over a Unix-domain stream.
    cuts_reads: bool,
    urgent: bool,
    finished: bool,
    wire: Wire,
}

#[derive(Debug)]
struct Watch {
    /// The descriptor of the epoll instance.
    poller: i32,
    trigger: Trigger,
    data: u64,
    /// The number of correct reports since the last call on the descriptor.
    ignored: u32,
}

#[derive(Clone, Copy, Debug)]
enum Trigger {
    Level(Readiness),
    /// `pending`: there was a change since the last report.
    Edge {
        pending: bool,
    },
}

impl Kernel {
    fn new(choices: Choices) -> Self {
        Self {
            choices,
            faults_percent: 0,
            calm: SCRIPTED,
            started: Instant::now(),
            clock: Duration::ZERO,
            files: BTreeMap::new(),
            files_max: usize::MAX,
            outside: BTreeMap::new(),
            refuses_accepts: false,
            watches: BTreeMap::new(),
            watches_max: usize::MAX,
            retired: VecDeque::new(),
            reaped: BTreeMap::new(),
            serial_next: 0,
            connects: Vec::new(),
            rests: false,
            broken_waits: 0,
            signals_raised: 0,
            accepts_granted: 0,
            bytes_taken: 0,
        }
    }

    fn percent(&mut self, chance: u32) -> bool {
        self.choices.below(100) < chance
    }

    /// Decides whether this call fails, and with which errno.
    fn fault(&mut self, call: &str, errnos: &[Errno]) -> Result<(), Errno> {
        if self.faults_percent == 0 || !self.percent(self.faults_percent) {
            return Ok(());
        }
        let errno = errnos[self.choices.below(errnos.len() as u32) as usize];
        trace(|| format!("  {call} fails: {errno:?}"));
        Err(errno)
    }

    fn calm_down(&mut self) {
        self.calm = true;
        self.faults_percent = 0;
        self.files_max = usize::MAX;
        self.refuses_accepts = false;
        self.watches_max = usize::MAX;
        for (&number, file) in &mut self.files {
            match file {
                File::Socket(socket) => {
                    socket.room = usize::MAX;
                    let changes = std::mem::take(&mut socket.wire.connecting) || socket.wants_room;
                    if changes && let Some(watch) = self.watches.get_mut(&number) {
                        watch.report_change();
                    }
                }
                File::Listener { backlog } => {
                    backlog.iter_mut().for_each(|socket| socket.room = usize::MAX);
                }
                File::Foreign { ready, .. } => *ready = Readiness::NONE,
                _ => {}
            }
        }
    }

    fn now(&mut self) -> Instant {
        if !self.calm {
            self.clock += Duration::from_micros(self.choices.below(30).into());
        }
        self.started + self.clock
    }

    // Descriptors.

    /// Opens a file with the lowest free number, like a real kernel, so that numbers are reused at once.
    fn open(&mut self, call: &str, file: File) -> Result<Descriptor, Errno> {
        self.room_for_descriptor(call)?;
        let number = (3..).find(|number| !self.files.contains_key(number)).ok_or(Errno::EMFILE)?;
        self.files.insert(number, file);
        Ok(Descriptor(number))
    }

    /// Gives an open file another number, without checking the limit.
    fn open_unlimited(&mut self, file: File) -> Descriptor {
        let files_max = std::mem::replace(&mut self.files_max, usize::MAX);
        let opened = self.open("open", file).expect("there is no limit");
        self.files_max = files_max;
        opened
    }

    /// Moves a socket out of the reactor; returns a descriptor that represents it.
    fn put_outside(&mut self, file: File) -> OwnedFd {
        let stands_for_it = OwnedFd::from(open_null());
        self.outside.insert(stands_for_it.as_raw_fd(), file);
        stands_for_it
    }

    fn room_for_descriptor(&mut self, call: &str) -> Result<(), Errno> {
        if self.files.range(0..).count() >= self.files_max {
            trace(|| format!("  {call}: no descriptor left"));
            return Err(Errno::EMFILE);
        }
        Ok(())
    }

    fn close(&mut self, number: i32) {
        let Some(file) = self.files.remove(&number) else { return };
        if let File::Epoll = file {
            self.watches.retain(|_, watch| watch.poller != number);
        }
        if let File::Foreign { .. } = file {
            assert!(
                !self.watches.contains_key(&number) || std::thread::panicking(),
                "a watched descriptor was let go while epoll knew it: a duplicate would keep it there"
            );
        }
        if let Some(watch) = self.watches.remove(&number) {
            self.retire(watch);
        }
        if let File::Socket(socket) = file {
            self.reaped.insert(socket.serial, socket.wire);
        }
    }

    fn retire(&mut self, watch: Watch) {
        if self.retired.len() == 16 {
            self.retired.pop_front();
        }
        self.retired.push_back(watch.data);
    }

    fn touch(&mut self, number: i32) {
        if let Some(watch) = self.watches.get_mut(&number) {
            watch.ignored = 0;
        }
    }

    /// Reports a change of the file, if it is watched edge-triggered.
    fn change(&mut self, number: i32) {
        if let Some(watch) = self.watches.get_mut(&number) {
            watch.report_change();
        }
    }

    fn socket(&mut self, number: i32) -> &mut FakeSocket {
        self.touch(number);
        match self.files.get_mut(&number) {
            Some(File::Socket(socket)) => socket,
            other => panic!("{number} is not a socket: {other:?}"),
        }
    }

    fn wire(&self, serial: u32) -> Wire {
        let alive = self.files.values().chain(self.outside.values()).find_map(|file| match file {
            File::Socket(socket) if socket.serial == serial => Some(socket.wire.clone()),
            _ => None,
        });
        alive
            .or_else(|| self.reaped.get(&serial).cloned())
            .expect("each serial number belongs to a socket")
    }

    fn new_socket(&mut self) -> FakeSocket {
        self.serial_next += 1;
        // There is some room at first, because the end of a connect must be reported.
        let room =
            if self.calm { usize::MAX } else { 1 + self.choices.below(ROOM_BYTES_MAX) as usize };
        FakeSocket {
            serial: self.serial_next,
            peer: SocketAddr::from(([127, 0, 0, 1], 1)),
            listens: false,
            error: None,
            incoming: VecDeque::new(),
            room,
            wants_room: false,
            wants_memory: false,
            cuts_reads: false,
            urgent: false,
            finished: false,
            wire: Wire::default(),
        }
    }

    // Peers.

    fn world_moves(&mut self) {
        if self.calm {
            return;
        }
        if self.percent(2) {
            self.clock += Duration::from_secs(self.choices.below(100).into()); // The machine was suspended.
        }
        for _ in 0..self.choices.below(6) {
            let Some(&number) = nth(&self.files, &mut self.choices) else { return };
            let Some(mut file) = self.files.remove(&number) else { return };
            let is_changed = self.move_file(&mut file);
            self.files.insert(number, file);
            if is_changed {
                self.change(number);
            }
        }
    }

    /// Decides whether epoll reports a change of a connection.
    fn move_file(&mut self, file: &mut File) -> bool {
        match file {
            File::Socket(socket) if !socket.listens => return self.move_socket(socket),
            File::Listener { backlog } if self.files.len() + backlog.len() < SOCKETS_MAX => {
                for _ in 0..=self.choices.below(3) {
                    let mut socket = self.new_socket();
                    if self.percent(30) {
                        self.move_socket(&mut socket);
                    }
                    backlog.push_back(socket);
                }
            }
            File::Signals { pending } if self.percent(20) => {
                let signals = [Signal::Hangup, Signal::User1, Signal::Terminate];
                pending.push_back(signals[self.choices.below(3) as usize]);
                self.signals_raised += 1;
            }
            File::Foreign { ready, .. } => {
                let states = [
                    Readiness::NONE,
                    Readiness::READABLE,
                    Readiness::WRITABLE,
                    Readiness::READABLE.with(Readiness::HANGUP),
                    Readiness::ERROR,
                ];
                *ready = states[self.choices.below(5) as usize];
            }
            _ => {}
        }
        false
    }

    fn move_socket(&mut self, socket: &mut FakeSocket) -> bool {
        if socket.wire.gone {
            return false;
        }
        if socket.wire.connecting {
            match self.choices.below(4) {
                0 => self.fail(socket, &CONNECT_ERRNOS),
                1 | 2 => socket.wire.connecting = false,
                _ => return false,
            }
            return true;
        }
        match self.choices.below(12) {
            0..=4 if !socket.wire.fin => {
                for _ in 0..=self.choices.below(100) {
                    socket.incoming.push_back(byte_of(socket.serial, socket.wire.arrived));
                    socket.wire.arrived += 1;
                }
                if self.percent(5) {
                    socket.urgent = true;
                    socket.cuts_reads = true;
                }
            }
            5 => socket.wire.fin = true,
            6 => self.fail(socket, &[Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EHOSTUNREACH]),
            // Like a Unix-domain peer that closes: no error is pending, but sends fail.
            7 => {
                socket.wire.fin = true;
                socket.wire.gone = true;
            }
            _ => {
                socket.room += self.choices.below(ROOM_BYTES_MAX) as usize;
                return socket.room > 0 && std::mem::take(&mut socket.wants_room);
            }
        }
        true
    }

    fn fail(&mut self, socket: &mut FakeSocket, errnos: &[Errno]) {
        socket.error = Some(errnos[self.choices.below(errnos.len() as u32) as usize]);
        socket.wire.gone = true;
        socket.wire.connecting = false;
    }

    // Events.

    fn ready(&self, number: i32) -> Readiness {
        let readable = |yes: bool| if yes { Readiness::READABLE } else { Readiness::NONE };
        match &self.files[&number] {
            File::Epoll | File::Null | File::Ring => Readiness::NONE,
            File::Wake { signaled } => readable(signaled.load(Ordering::SeqCst)),
            File::Signals { pending } => readable(!pending.is_empty()),
            File::Listener { backlog } => readable(!backlog.is_empty()),
            File::Foreign { ready, .. } => *ready,
            File::Socket(socket) => socket.ready(),
        }
    }

    /// The events that a correct kernel would report.
    fn true_events(&self, poller: Option<i32>) -> Vec<(i32, u64, Readiness)> {
        let mut events = Vec::new();
        let of_poller = |watch: &Watch| poller.is_none_or(|poller| poller == watch.poller);
        for (&number, watch) in self.watches.iter().filter(|(_, watch)| of_poller(watch)) {
            let ready = match watch.trigger {
                Trigger::Level(interest) => reported(self.ready(number), interest),
                Trigger::Edge { pending: true } => self.ready(number),
                Trigger::Edge { pending: false } => Readiness::NONE,
            };
            if ready != Readiness::NONE {
                events.push((number, watch.data, ready));
            }
        }
        events
    }

    fn wait(
        &mut self,
        poller: i32,
        events: &mut Events,
        wait: Option<Duration>,
    ) -> Result<(), Errno> {
        self.world_moves();
        events.filled.clear();
        self.rests = false;
        if let Err(errno) = self.fault("epoll_wait", &[Errno::EINTR, Errno::EINTR, Errno::EBADF]) {
            self.broken_waits += u64::from(errno == Errno::EBADF);
            return if errno == Errno::EINTR { Ok(()) } else { Err(errno) };
        }
        let mut reports = self.true_events(Some(poller));
        if reports.is_empty() {
            match wait {
                Some(wait) => {
                    self.clock += Duration::from_millis(wait.as_nanos().div_ceil(1_000_000) as u64);
                }
                None => self.rests = self.calm,
            }
        }
        self.shuffle(&mut reports);
        if self.faults_percent > 0 && self.percent(30) {
            reports.truncate(self.choices.below(4) as usize);
        }
        reports.truncate(events.capacity);
        for &(number, _, _) in &reports {
            self.count_report(number);
        }
        events.filled.extend(reports.iter().map(|&(_, data, ready)| (data, ready)));
        self.make_noise(events);
        trace(|| format!("wait {wait:?} at {:?}: {:?}", self.clock, events.filled));
        Ok(())
    }

    fn count_report(&mut self, number: i32) {
        if let Some(File::Foreign { ready, .. }) = self.files.get_mut(&number) {
            if SCRIPTED {
                *ready = Readiness::NONE;
            }
            return; // The service decides whether it reads.
        }
        if let Some(watch) = self.watches.get_mut(&number) {
            if let Trigger::Edge { pending } = &mut watch.trigger {
                *pending = false;
                return;
            }
            watch.ignored += 1;
            assert!(
                watch.ignored <= IGNORED_MAX,
                "a spin: descriptor {number} is reported again and again, and nothing is done about it"
            );
        }
    }

    fn shuffle(&mut self, reports: &mut [(i32, u64, Readiness)]) {
        if SCRIPTED {
            return;
        }
        for last in (1..reports.len()).rev() {
            reports.swap(last, self.choices.below(last as u32 + 1) as usize);
        }
    }

    /// Adds events without a cause, and late events.
    fn make_noise(&mut self, events: &mut Events) {
        if self.faults_percent == 0 {
            return;
        }
        for _ in 0..self.choices.below(3) {
            let late = self.percent(50);
            let (data, ready) = if late {
                let Some(&data) = nth_of(&self.retired, &mut self.choices) else { continue };
                let ready = [
                    Readiness::READABLE,
                    Readiness::WRITABLE,
                    Readiness::READABLE.with(Readiness::WRITABLE),
                    Readiness::READABLE.with(Readiness::HANGUP).with(Readiness::ERROR),
                ];
                (data, ready[self.choices.below(4) as usize])
            } else {
                let Some(&number) = nth(&self.watches, &mut self.choices) else { continue };
                // No kernel reports a pending connect as completed.
                if matches!(&self.files[&number], File::Socket(socket) if socket.wire.connecting) {
                    continue;
                }
                let watch = &self.watches[&number];
                let noise = Readiness::READABLE_AND_WRITABLE;
                let ready = match watch.trigger {
                    Trigger::Level(interest) => reported(noise, interest),
                    Trigger::Edge { .. } => noise,
                };
                if ready == Readiness::NONE || events.filled.iter().any(|e| e.0 == watch.data) {
                    continue;
                }
                (watch.data, ready)
            };
            if events.filled.len() < events.capacity {
                let place = self.choices.below(events.filled.len() as u32 + 1) as usize;
                events.filled.insert(place, (data, ready));
            }
        }
    }
}

impl Watch {
    fn report_change(&mut self) {
        if let Trigger::Edge { pending } = &mut self.trigger {
            *pending = true;
        }
    }
}

impl FakeSocket {
    fn ready(&self) -> Readiness {
        let all = Readiness::READABLE.with(Readiness::WRITABLE).with(Readiness::HANGUP);
        let mut ready = Readiness::NONE;
        if self.wire.connecting {
            return ready;
        }
        if self.wire.gone {
            ready = all;
        }
        if self.error.is_some() {
            ready = ready.with(Readiness::ERROR);
        }
        if !self.incoming.is_empty() || self.wire.fin {
            ready = ready.with(Readiness::READABLE);
        }
        if self.room > 0 || self.finished {
            ready = ready.with(Readiness::WRITABLE);
        }
        if self.wire.fin && self.finished {
            ready = ready.with(all);
        }
        if self.wire.fin || self.wire.gone {
            ready = ready.with(Readiness::PEER_FINISHED);
        }
        if self.urgent {
            ready = ready.with(Readiness::URGENT);
        }
        ready
    }

    fn send(&mut self, most: usize) -> Result<usize, Errno> {
        if let Some(errno) = self.error.take() {
            return Err(errno);
        }
        if self.wire.gone || self.finished {
            return Err(Errno::EPIPE);
        }
        let taken = self.room.min(most);
        self.wants_room |= taken < most;
        if taken == 0 && most > 0 { Err(Errno::EAGAIN) } else { Ok(taken) }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        if self.incoming.is_empty() {
            return match self.error.take() {
                Some(errno) => Err(errno),
                None if self.wire.fin || self.wire.gone => Ok(0),
                None => Err(Errno::EAGAIN),
            };
        }
        let taken = self.incoming.len().min(buffer.len());
        for (place, byte) in buffer.iter_mut().zip(self.incoming.drain(..taken)) {
            *place = byte;
        }
        Ok(taken)
    }
}

/// The events that level-triggered epoll reports: errors and hang-ups whatever the interest.
fn reported(ready: Readiness, interest: Readiness) -> Readiness {
    let mut report = Readiness::NONE;
    if ready.is_readable() && interest.is_readable() {
        report = report.with(Readiness::READABLE);
    }
    if ready.is_writable() && interest.is_writable() {
        report = report.with(Readiness::WRITABLE);
    }
    if ready.is_error() {
        report = report.with(Readiness::ERROR);
    }
    if ready.is_hangup() {
        report = report.with(Readiness::HANGUP);
    }
    report
}

fn nth<'a, K, V>(map: &'a BTreeMap<K, V>, choices: &mut Choices) -> Option<&'a K> {
    let index = if map.is_empty() { return None } else { choices.below(map.len() as u32) };
    map.keys().nth(index as usize)
}

fn nth_of<'a, T>(list: &'a VecDeque<T>, choices: &mut Choices) -> Option<&'a T> {
    let index = if list.is_empty() { return None } else { choices.below(list.len() as u32) };
    list.get(index as usize)
}

// --- the calls of the real backend -----------------------------------------------------------------------------------

const CONNECT_ERRNOS: [Errno; 5] = [
    Errno::ECONNREFUSED,
    Errno::ETIMEDOUT,
    Errno::EHOSTUNREACH,
    Errno::ENETUNREACH,
    Errno::ECONNRESET,
];

#[derive(Debug)]
pub(crate) struct Descriptor(i32);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // The kernel is not available at the end of the thread, or while a failed assertion unwinds through it.
        let _ = KERNEL.try_with(|kernel| {
            if let Ok(mut kernel) = kernel.try_borrow_mut() {
                kernel.close(self.0);
            }
        });
    }
}

impl Descriptor {
    pub(crate) fn number(&self) -> i32 {
        self.0
    }

    pub(super) fn into_number(self) -> i32 {
        let number = self.0;
        std::mem::forget(self);
        number
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(descriptor: OwnedFd) -> Self {
        // The file is already open, so no limit applies.
        kernel(|kernel| {
            let file = match kernel.outside.remove(&descriptor.as_raw_fd()) {
                Some(file) => file,
                None => File::Foreign { descriptor, ready: Readiness::NONE },
            };
            kernel.open_unlimited(file)
        })
    }
}

impl From<Descriptor> for OwnedFd {
    fn from(descriptor: Descriptor) -> Self {
        let number = descriptor.into_number();
        kernel(|kernel| {
            assert!(
                !kernel.watches.contains_key(&number),
                "a watched descriptor was given back while epoll knew it"
            );
            match kernel.files.remove(&number) {
                Some(File::Foreign { descriptor, .. }) => descriptor,
                Some(file @ (File::Socket(_) | File::Listener { .. })) => kernel.put_outside(file),
                other => panic!("not outside of the reactor: {other:?}"),
            }
        })
    }
}

impl AsFd for Descriptor {
    /// A real descriptor: that of a foreign file, or one of `/dev/null`, which can't be used.
    fn as_fd(&self) -> BorrowedFd<'_> {
        let foreign = kernel(|kernel| match kernel.files.get(&self.0) {
            Some(File::Foreign { descriptor, .. }) => Some(descriptor.as_raw_fd()),
            _ => None,
        });
        // SAFETY: the kernel keeps a foreign descriptor until this one, which is borrowed, is dropped or converted.
        foreign.map_or_else(null, |number| unsafe { BorrowedFd::borrow_raw(number) })
    }
}

fn null() -> BorrowedFd<'static> {
    static NULL: OnceLock<RealFile> = OnceLock::new();
    NULL.get_or_init(open_null).as_fd()
}

fn open_null() -> RealFile {
    RealFile::open("/dev/null").expect("/dev/null can be opened")
}

#[derive(Debug)]
pub(crate) struct Poller(Descriptor);

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Poller {
    pub(crate) fn new() -> Result<Self, Error> {
        kernel(|kernel| {
            kernel.fault("epoll_create1", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
            kernel.open("epoll_create1", File::Epoll)
        })
        .map(Self)
        .map_err(refused("epoll_create1"))
    }

    pub(crate) fn add(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        self.watch(descriptor, data, |_, _| Trigger::Level(interest))
    }

    pub(crate) fn add_connection(&self, descriptor: &Descriptor, data: u64) -> Result<(), Error> {
        self.watch(descriptor, data, |kernel, number| Trigger::Edge {
            pending: kernel.ready(number) != Readiness::NONE,
        })
    }

    fn watch(
        &self,
        descriptor: &Descriptor,
        data: u64,
        trigger: impl FnOnce(&Kernel, i32) -> Trigger,
    ) -> Result<(), Error> {
        kernel(|kernel| {
            assert!(!kernel.watches.contains_key(&descriptor.0), "EEXIST: {descriptor:?}");
            let foreign = matches!(kernel.files[&descriptor.0], File::Foreign { .. });
            let last = if foreign { Errno::EPERM } else { Errno::ENOMEM };
            kernel.fault("epoll_ctl", &[Errno::ENOMEM, Errno::ENOSPC, last])?;
            if kernel.watches.len() >= kernel.watches_max {
                return Err(Errno::ENOSPC);
            }
            let trigger = trigger(kernel, descriptor.0);
            kernel
                .watches
                .insert(descriptor.0, Watch { poller: self.0.0, trigger, data, ignored: 0 });
            Ok(())
        })
        .map_err(refused("epoll_ctl"))
    }

    pub(crate) fn modify(
        &self,
        descriptor: &Descriptor,
        interest: Readiness,
        data: u64,
    ) -> Result<(), Error> {
        kernel(|kernel| {
            let watch = kernel.watches.get_mut(&descriptor.0).expect("ENOENT");
            watch.ignored = 0;
            kernel.fault("epoll_ctl", &[Errno::ENOMEM])?;
            let trigger = Trigger::Level(interest);
            kernel
                .watches
                .insert(descriptor.0, Watch { poller: self.0.0, trigger, data, ignored: 0 });
            Ok(())
        })
        .map_err(refused("epoll_ctl"))
    }

    /// Never fails, because the real one can't fail for a watched descriptor.
    pub(crate) fn delete(&self, descriptor: &Descriptor) -> Result<(), Error> {
        kernel(|kernel| {
            assert!(kernel.watches.contains_key(&descriptor.0), "ENOENT: {descriptor:?}");
            if let Some(watch) = kernel.watches.remove(&descriptor.0) {
                kernel.retire(watch);
            }
            Ok(())
        })
        .map_err(refused("epoll_ctl"))
    }

    /// A file that was moved to a table is still watched by the number of its old descriptor.
    pub(crate) fn delete_connection(
        &self,
        descriptor: &Descriptor,
        _number: i32,
    ) -> Result<(), Error> {
        self.delete(descriptor)
    }

    pub(crate) fn now(&self) -> Instant {
        kernel(Kernel::now)
    }

    pub(crate) fn wait(&self, events: &mut Events, wait: Option<Duration>) -> Result<(), Error> {
        kernel(|kernel| kernel.wait(self.0.0, events, wait)).map_err(refused("epoll_wait"))
    }
}

#[derive(Debug)]
pub(crate) struct Events {
    capacity: usize,
    filled: Vec<(u64, Readiness)>,
}

impl Events {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { capacity, filled: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.filled.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled.len() == self.capacity
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Readiness)> {
        self.filled.iter().copied()
    }
}

/// Socket options: they have no effect here, but the calls may fail.
fn set(call: &'static str, socket: &Descriptor, errnos: &[Errno]) -> Result<(), Error> {
    kernel(|kernel| {
        kernel.touch(socket.0);
        kernel.fault(call, errnos)
    })
    .map_err(refused(call))
}

pub(crate) fn bind(socket: &Descriptor, _address: &Address) -> Result<(), Error> {
    set("bind", socket, &[Errno::EADDRINUSE, Errno::EADDRNOTAVAIL, Errno::EACCES])
}

pub(crate) fn listen(socket: &Descriptor, _backlog: Option<u32>) -> Result<(), Error> {
    set("listen", socket, &[Errno::EADDRINUSE, Errno::EOPNOTSUPP])?;
    kernel(|kernel| {
        if let Some(file @ File::Socket(_)) = kernel.files.get_mut(&socket.0) {
            *file = File::Listener { backlog: VecDeque::new() };
        }
    });
    Ok(())
}

pub(crate) fn adopt(socket: &Descriptor, wanted: Adopted) -> Result<bool, Error> {
    set("getpeername", socket, &[Errno::ENOTSOCK, Errno::ENOTCONN, Errno::ENOBUFS])?;
    let is_tcp = kernel(|kernel| match (&kernel.files[&socket.0], wanted) {
        (File::Socket(socket), Adopted::Connection) => Some(!socket.cuts_reads),
        (File::Listener { .. }, Adopted::Listener) => Some(true),
        _ => None,
    });
    is_tcp.ok_or(Error::Invalid("the socket is of another kind"))
}

pub(crate) fn set_nodelay(socket: &Descriptor) -> Result<(), Error> {
    set("setsockopt(TCP_NODELAY)", socket, &[Errno::ENOPROTOOPT])
}

pub(crate) fn set_keepalive(socket: &Descriptor, _keepalive: &Keepalive) -> Result<(), Error> {
    set("setsockopt(SO_KEEPALIVE)", socket, &[Errno::EINVAL])
}

pub(crate) fn set_user_timeout(socket: &Descriptor, _timeout: Duration) -> Result<(), Error> {
    set("setsockopt(TCP_USER_TIMEOUT)", socket, &[Errno::EINVAL])
}

pub(crate) fn set_send_buffer(socket: &Descriptor, _bytes: usize) -> Result<(), Error> {
    set("setsockopt(SO_SNDBUF)", socket, &[Errno::ENOBUFS])
}

pub(crate) fn set_receive_buffer(socket: &Descriptor, _bytes: usize) -> Result<(), Error> {
    set("setsockopt(SO_RCVBUF)", socket, &[Errno::ENOBUFS])
}

pub(crate) fn set_notsent_lowat(socket: &Descriptor, _bytes: u32) -> Result<(), Error> {
    set("setsockopt(TCP_NOTSENT_LOWAT)", socket, &[Errno::ENOPROTOOPT])
}

pub(crate) fn defer_source_port(socket: &Descriptor) -> Result<(), Error> {
    set("setsockopt(IP_BIND_ADDRESS_NO_PORT)", socket, &[Errno::ENOPROTOOPT])
}

pub(crate) fn set_port_range(
    socket: &Descriptor,
    _range: &RangeInclusive<u16>,
) -> Result<(), Error> {
    set("setsockopt(IP_LOCAL_PORT_RANGE)", socket, &[Errno::EINVAL])
}

pub(crate) fn connect(socket: &Descriptor, address: &Address) -> Result<(), Error> {
    let errnos = [
        Errno::EADDRNOTAVAIL,
        Errno::ENETUNREACH,
        Errno::ECONNREFUSED,
        Errno::EAGAIN,
        Errno::EACCES,
        Errno::EPERM,
    ];
    set("connect", socket, &errnos)?;
    kernel(|kernel| {
        let is_decided_at_once = !SCRIPTED && (!address.is_tcp() || kernel.percent(10));
        let serial = kernel.socket(socket.0).serial;
        if SCRIPTED {
            kernel.connects.push((serial, address.clone()));
        }
        let socket = kernel.socket(socket.0);
        if let Address::Ip(destination) = address {
            socket.peer = *destination;
        }
        socket.cuts_reads |= !address.is_tcp();
        socket.wire.connecting &= !is_decided_at_once;
    });
    Ok(())
}

pub(crate) fn accept(listener: &Descriptor) -> Accepted {
    let errnos = [
        Errno::EINTR,
        Errno::ECONNABORTED,
        Errno::EPROTO,
        Errno::EPERM,
        Errno::ENETDOWN,
        Errno::ENOPROTOOPT,
        Errno::EHOSTDOWN,
        Errno::ENONET,
        Errno::EHOSTUNREACH,
        Errno::ENETUNREACH,
        Errno::ETIMEDOUT,
        Errno::EMFILE,
        Errno::ENFILE,
        Errno::ENOBUFS,
        Errno::ENOMEM,
        Errno::EAGAIN,
        Errno::EINVAL,
        Errno::EOPNOTSUPP,
        Errno::ENOSR,
    ];
    accept_result(kernel(|kernel| {
        if kernel.refuses_accepts {
            return Err(Errno::EPERM);
        }
        kernel.touch(listener.0);
        // Linux looks for a descriptor before it looks for a peer.
        kernel.room_for_descriptor("accept4")?;
        let fault = kernel.fault("accept4", &errnos);
        let Some(File::Listener { backlog }) = kernel.files.get_mut(&listener.0) else {
            panic!("{listener:?} is not a listener");
        };
        if fault == Err(Errno::ECONNABORTED) {
            backlog.pop_front();
        }
        fault?;
        let socket = backlog.pop_front().ok_or(Errno::EAGAIN)?;
        let socket = kernel.open("accept4", File::Socket(socket))?;
        kernel.accepts_granted += 1;
        Ok(socket)
    }))
}

fn receive(number: i32, buffer: &mut [u8]) -> Result<usize, Errno> {
    let errnos = [
        Errno::EAGAIN,
        Errno::EINTR,
        Errno::ENOMEM,
        Errno::ECONNRESET,
        Errno::ETIMEDOUT,
        Errno::EHOSTUNREACH,
    ];
    kernel(|kernel| {
        kernel.touch(number);
        kernel.fault_or_later("recv", number, &errnos)?;
        let cuts_reads = kernel.socket(number).cuts_reads;
        let most = if cuts_reads { kernel.cut_short(buffer.len()) } else { buffer.len() };
        kernel.socket(number).receive(&mut buffer[..most])
    })
}

fn send(number: i32, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let errnos = [
        Errno::EAGAIN,
        Errno::EINTR,
        Errno::ENOBUFS,
        Errno::ENOMEM,
        Errno::EPIPE,
        Errno::ECONNRESET,
        Errno::EHOSTUNREACH,
    ];
    kernel(|kernel| {
        kernel.touch(number);
        kernel.socket(number).wants_memory = false;
        kernel.fault_or_later("send", number, &errnos).inspect_err(|&errno| {
            let socket = kernel.socket(number);
            socket.wants_memory = errno == Errno::ENOBUFS;
            socket.wants_room |= errno == Errno::EAGAIN && socket.room == 0;
        })?;
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let most = kernel.cut_short(total);
        if most < total {
            kernel.change(number); // As if room had become available directly afterwards.
        }
        let socket = kernel.socket(number);
        let taken = socket.send(most)?;
        socket.wants_room |= taken < total;
        socket.room -= taken;
        socket.wire.sent.extend(slices.iter().flat_map(|slice| slice.iter()).take(taken));
        kernel.bytes_taken += taken as u64;
        trace(|| format!("  send takes {taken} of {total}"));
        Ok(taken)
    })
}

impl Kernel {
    /// Decides whether this read or write fails, and with which errno. A spurious EAGAIN is followed by a change.
    fn fault_or_later(&mut self, call: &str, number: i32, errnos: &[Errno]) -> Result<(), Errno> {
        self.fault(call, errnos).inspect_err(|&errno| {
            if errno == Errno::EAGAIN {
                self.change(number);
            }
        })
    }

    /// A random part of this number of bytes, at least one if there is one.
    fn cut_short(&mut self, bytes: usize) -> usize {
        if self.faults_percent > 0 && bytes > 1 && self.percent(30) {
            1 + self.choices.below(bytes as u32 - 1) as usize
        } else {
            bytes
        }
    }
}

pub(crate) fn reset_on_close(socket: &Descriptor) -> Result<(), Error> {
    set("setsockopt(SO_LINGER)", socket, &[Errno::EINVAL])?;
    kernel(|kernel| kernel.socket(socket.0).wire.resets = true);
    Ok(())
}

/// A connection's socket: a descriptor, or the complement of a place in the registered-file tables.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Socket(i32);

impl From<Descriptor> for Socket {
    fn from(descriptor: Descriptor) -> Self {
        Self(descriptor.into_number())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.0 >= 0 {
            drop(Descriptor(self.0));
        }
    }
}

impl Socket {
    pub(crate) const DETACHED: Self = Self(i32::MIN);

    pub(crate) fn is_detached(&self) -> bool {
        *self == Self::DETACHED
    }

    pub(crate) fn at_place(place: u32) -> Self {
        Self(!(place as i32))
    }

    /// Returns the socket with this number.
    pub(crate) fn of_number(number: i32) -> Self {
        Self(number)
    }

    pub(crate) fn place(&self) -> Option<u32> {
        if self.0 < 0 { Some(!self.0 as u32) } else { None }
    }

    pub(crate) fn take_descriptor(self) -> Option<Descriptor> {
        let number = self.0;
        std::mem::forget(self);
        if number < 0 { None } else { Some(Descriptor(number)) }
    }
}

/// The calls on connections' sockets, and registered-file tables of a few places each, whose creation and updates can
/// fail, and which can be lost.
#[derive(Debug)]
pub(crate) struct Sockets {
    rings: Option<RefCell<Rings>>,
    closing: Vec<(u32, bool)>,
}

#[derive(Debug)]
struct Rings {
    places_each: u32,
    made: BTreeMap<u32, Descriptor>,
    lost: Vec<u32>,
    /// All tables that were ever lost: only their places may be empty.
    ever_lost: BTreeSet<u32>,
}

impl Rings {
    fn make(&mut self, index: u32) -> Result<(), Errno> {
        if let Entry::Vacant(missing) = self.made.entry(index) {
            missing.insert(kernel(|kernel| {
                kernel.fault("io_uring_setup", &[Errno::EPERM, Errno::ENOSYS, Errno::ENOMEM])?;
                kernel.open("io_uring_setup", File::Ring)
            })?);
        }
        Ok(())
    }

    /// Gives up a ring to which nothing can be submitted, and closes its files.
    fn enter(&mut self, place: u32) -> Result<(), Errno> {
        let index = place / self.places_each;
        let is_empty = kernel(|kernel| !kernel.files.contains_key(&!(place as i32)));
        if !self.made.contains_key(&index) || (is_empty && self.ever_lost.contains(&index)) {
            return Err(Errno::EBADF);
        }
        if kernel(|kernel| kernel.faults_percent > 0 && kernel.choices.below(300) == 0) {
            trace(|| format!("  ring {index} is lost"));
            self.made.remove(&index);
            self.lost.push(index);
            self.ever_lost.insert(index);
            let places = self.places(index);
            kernel(|kernel| places.for_each(|place| kernel.close(!(place as i32))));
            return Err(Errno::ENOMEM);
        }
        Ok(())
    }

    fn places(&self, index: u32) -> Range<u32> {
        index * self.places_each..(index + 1) * self.places_each
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        for &index in self.made.keys() {
            let places = self.places(index);
            let _ = KERNEL.try_with(|kernel| {
                if let Ok(mut kernel) = kernel.try_borrow_mut() {
                    places.for_each(|place| kernel.close(!(place as i32)));
                }
            });
        }
    }
}

impl Sockets {
    pub(crate) fn new(wanted: FileTable, _places: usize, _others: usize) -> Result<Self, Error> {
        let is_wanted = match wanted {
            _ if SCRIPTED => false,
            FileTable::Process => false,
            FileTable::Registered => true,
            FileTable::Auto => percent(50),
        };
        if !is_wanted {
            return Ok(Self { rings: None, closing: Vec::new() });
        }
        let places_each = 1 + below(8);
        let mut rings = Rings {
            places_each,
            made: BTreeMap::new(),
            lost: Vec::new(),
            ever_lost: BTreeSet::new(),
        };
        match rings.make(0) {
            Ok(()) => Ok(Self { rings: Some(RefCell::new(rings)), closing: Vec::new() }),
            Err(_) if wanted == FileTable::Auto => Ok(Self { rings: None, closing: Vec::new() }),
            Err(errno) => Err(refused("io_uring_setup")(errno)),
        }
    }

    pub(crate) fn bound(
        &self,
        address: &Address,
        _reuse_port: bool,
        _only_v6: bool,
    ) -> Result<Descriptor, Error> {
        let socket = self.stream_socket(address)?;
        bind(&socket, address)?;
        Ok(socket)
    }

    pub(crate) fn stream_socket(&self, _address: &Address) -> Result<Descriptor, Error> {
        kernel(|kernel| {
            let errnos =
                [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EACCES];
            kernel.fault("socket", &errnos)?;
            let mut socket = kernel.new_socket();
            socket.wire.connecting = true;
            kernel.open("socket", File::Socket(socket))
        })
        .map_err(refused("socket"))
    }

    pub(crate) fn own(&self, descriptor: OwnedFd) -> Descriptor {
        descriptor.into()
    }

    pub(crate) fn has_tables(&self) -> bool {
        self.rings.is_some()
    }

    /// Makes a call, through the ring if the socket is in its table.
    fn enter(&self, socket: &Socket) -> Result<(), Errno> {
        match (socket.place(), &self.rings) {
            (Some(place), Some(rings)) => rings.borrow_mut().enter(place),
            _ => Ok(()),
        }
    }

    pub(crate) fn receive(&self, socket: &Socket, buffer: &mut [u8]) -> IoResult {
        io_result("recv", self.enter(socket).and_then(|()| receive(socket.0, buffer)))
    }

    pub(crate) fn send(&self, socket: &Socket, bytes: &[u8]) -> IoResult {
        self.send_vectored(socket, &[IoSlice::new(bytes)])
    }

    pub(crate) fn send_vectored(&self, socket: &Socket, slices: &[IoSlice<'_>]) -> IoResult {
        io_result("send", self.enter(socket).and_then(|()| send(socket.0, slices)))
    }

    pub(crate) fn send_file(
        &self,
        socket: &Socket,
        file: &RealFile,
        place: u64,
        bytes: usize,
    ) -> IoResult {
        let mut buffer = vec![0; bytes.min(64 * 1024)];
        match file.read_at(&mut buffer, place) {
            Ok(0) => IoResult::Bytes(0),
            Ok(read) => self.send(socket, &buffer[..read]),
            Err(source) => IoResult::Failed(Error::System { call: "pread", source }),
        }
    }

    pub(crate) fn finish_writing(&self, socket: &Socket) -> Result<(), Error> {
        let number = socket.0;
        let finish = |kernel: &mut Kernel| {
            kernel.touch(number);
            kernel.fault("shutdown", &[Errno::ENOTCONN, Errno::ENOBUFS])?;
            let socket = kernel.socket(number);
            assert!(!socket.wire.connecting, "shutdown of a pending connect");
            if socket.wire.gone {
                return Err(Errno::ENOTCONN);
            }
            socket.finished = true;
            let is_hangup = socket.wire.fin;
            if is_hangup {
                kernel.change(number);
            }
            Ok(())
        };
        self.enter(socket).and_then(|()| kernel(finish)).map_err(refused("shutdown"))
    }

    pub(crate) fn unacknowledged_bytes(&self, socket: &Socket) -> usize {
        if self.enter(socket).is_err() {
            return 0;
        }
        let reports = |kernel: &mut Kernel| !SCRIPTED && kernel.percent(50);
        kernel(|kernel| if reports(kernel) { kernel.socket(socket.0).wire.sent.len() } else { 0 })
    }

    pub(crate) fn take_error(&self, socket: &Socket, call: &'static str) -> Option<Error> {
        if let Err(errno) = self.enter(socket) {
            return Some(refused(call)(errno));
        }
        kernel(|kernel| {
            kernel.touch(socket.0);
            if let Err(errno) = kernel.fault("getsockopt", &[Errno::ENOBUFS]) {
                return Some(refused("getsockopt(SO_ERROR)")(errno));
            }
            kernel.socket(socket.0).error.take().map(refused(call))
        })
    }

    pub(crate) fn peer_addr(&self, socket: &Socket) -> Result<SocketAddr, Error> {
        self.reach(socket)?;
        Ok(kernel(|kernel| kernel.socket(socket.0).peer))
    }

    pub(crate) fn local_addr(&self, socket: &Socket) -> Result<SocketAddr, Error> {
        self.reach(socket)?;
        Ok(LOCAL)
    }

    /// A detached socket can't be used.
    fn reach(&self, socket: &Socket) -> Result<(), Error> {
        if socket.is_detached() {
            return Err(Error::Stale);
        }
        self.enter(socket).map_err(refused("io_uring(FIXED_FD_INSTALL)"))
    }

    pub(crate) fn descriptor<'a>(&self, socket: &'a Socket) -> Result<LentFd<'a>, Error> {
        self.reach(socket)?;
        Ok(LentFd::borrowed(null()))
    }

    /// A file is removed from its table at once, so that no close remains to be done.
    pub(crate) fn detach(&mut self, socket: &mut Socket) -> Result<Descriptor, Error> {
        if socket.place().is_some() {
            const CALL: &str = "io_uring(FIXED_FD_INSTALL)";
            self.enter(socket).map_err(refused(CALL))?;
            let from = socket.0;
            *socket = Socket::DETACHED;
            return kernel(|kernel| {
                let file = kernel.files.remove(&from).expect("the file is open");
                let watch = kernel.watches.remove(&from);
                let descriptor = kernel.open_unlimited(file);
                if let Some(watch) = watch {
                    kernel.watches.insert(descriptor.0, watch);
                }
                Ok(descriptor)
            });
        }
        let socket = std::mem::replace(socket, Socket::DETACHED);
        Ok(socket.take_descriptor().expect("the socket has a descriptor"))
    }

    pub(crate) fn close(&mut self, socket: Socket, reset: bool) {
        match socket.place() {
            _ if socket.is_detached() => {}
            Some(place) => self.closing.push((place, reset)),
            None => {
                let descriptor = Descriptor(socket.0);
                std::mem::forget(socket);
                if reset {
                    let _ = reset_on_close(&descriptor);
                }
            }
        }
    }

    pub(crate) fn has_closes(&self) -> bool {
        !self.closing.is_empty()
    }

    pub(crate) fn flush_closes(&mut self) {
        for (place, reset) in std::mem::take(&mut self.closing) {
            let socket = Socket::at_place(place);
            if self.enter(&socket).is_ok() {
                kernel(|kernel| {
                    kernel.socket(socket.0).wire.resets |= reset;
                    kernel.close(socket.0);
                });
            }
        }
    }

    pub(crate) fn register(&self, moving: &mut Vec<(u32, Descriptor)>) {
        let Some(rings) = &self.rings else { return };
        let mut rings = rings.borrow_mut();
        for (place, descriptor) in std::mem::take(moving) {
            let index = place / rings.places_each;
            let has_room = kernel(|kernel| kernel.fault("register", &[Errno::ENOMEM])).is_ok();
            if !has_room || rings.make(index).is_err() {
                moving.push((place, descriptor));
                continue;
            }
            let (from, to) = (descriptor.into_number(), !(place as i32));
            kernel(|kernel| {
                let file = kernel.files.remove(&from).expect("the file is open");
                assert!(kernel.files.insert(to, file).is_none(), "place {place} is in use");
                if let Some(watch) = kernel.watches.remove(&from) {
                    kernel.watches.insert(to, watch);
                }
            });
        }
    }

    pub(crate) fn receive_all(&self, batch: &mut ReceiveBatch) {
        let (entries, buffer, bytes_each) = batch.operations();
        for (entry, part) in entries.iter_mut().zip(buffer.chunks_mut(bytes_each)) {
            let socket = Socket::at_place(entry.place);
            let answer = self.enter(&socket).and_then(|()| receive(socket.0, part));
            entry.result = to_ring_answer(answer);
        }
    }

    pub(crate) fn send_all(&self, batch: &mut SendBatch) {
        let (entries, buffer) = batch.operations();
        for entry in entries {
            let socket = Socket::at_place(entry.operation.place);
            let bytes = &buffer[entry.start..entry.end];
            let answer = self.enter(&socket).and_then(|()| send(socket.0, &[IoSlice::new(bytes)]));
            entry.operation.result = to_ring_answer(answer);
        }
    }

    pub(crate) fn take_lost(&self) -> Option<Range<usize>> {
        let mut rings = self.rings.as_ref()?.borrow_mut();
        let index = rings.lost.pop()?;
        let places = rings.places(index);
        Some(places.start as usize..places.end as usize)
    }
}

fn to_ring_answer(answer: Result<usize, Errno>) -> i32 {
    match answer {
        Ok(bytes) => bytes as i32,
        Err(errno) => -(errno as i32),
    }
}

pub(crate) fn peer_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    set("getpeername", socket, &[Errno::ENOTCONN, Errno::ENOBUFS])?;
    Ok(kernel(|kernel| kernel.socket(socket.0).peer))
}

pub(crate) fn local_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    set("getsockname", socket, &[Errno::ENOBUFS])?;
    Ok(LOCAL)
}

pub(crate) fn spare() -> Result<Descriptor, Error> {
    kernel(|kernel| {
        kernel.fault("eventfd", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
        kernel.open("eventfd", File::Null)
    })
    .map_err(refused("eventfd"))
}

/// Shared with the kernel of the waiting thread, because other threads signal it.
#[derive(Debug)]
pub(crate) struct WakeFd {
    signaled: Arc<AtomicBool>,
    descriptor: Option<Descriptor>,
    made_by: ThreadId,
}

impl Drop for WakeFd {
    fn drop(&mut self) {
        if std::thread::current().id() != self.made_by {
            std::mem::forget(self.descriptor.take()); // The number belongs to another thread's kernel.
        }
    }
}

impl WakeFd {
    pub(crate) fn watched(poller: &Poller, data: u64) -> Result<Self, Error> {
        let signaled = Arc::<AtomicBool>::default();
        let descriptor = kernel(|kernel| {
            kernel.fault("eventfd", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
            kernel.open("eventfd", File::Wake { signaled: signaled.clone() })
        })
        .map_err(refused("eventfd"))?;
        poller.add(&descriptor, Readiness::READABLE, data)?;
        let made_by = std::thread::current().id();
        Ok(Self { signaled, descriptor: Some(descriptor), made_by })
    }

    pub(crate) fn signal(&self) {
        self.signaled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn clear(&self) {
        if let Some(descriptor) = &self.descriptor {
            kernel(|kernel| kernel.touch(descriptor.0));
        }
        self.signaled.store(false, Ordering::SeqCst);
    }
}

#[derive(Debug)]
pub(crate) struct SignalReader(Descriptor);

impl SignalReader {
    pub(crate) fn watched(_signals: &[Signal], poller: &Poller, data: u64) -> Result<Self, Error> {
        let reader = kernel(|kernel| {
            kernel.fault("signalfd", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
            kernel.open("signalfd", File::Signals { pending: VecDeque::new() })
        })
        .map_err(refused("signalfd"))?;
        poller.add(&reader, Readiness::READABLE, data)?;
        Ok(Self(reader))
    }

    pub(crate) fn read(&self) -> Option<Signal> {
        kernel(|kernel| {
            kernel.touch(self.0.0);
            match kernel.files.get_mut(&self.0.0) {
                Some(File::Signals { pending }) => pending.pop_front(),
                other => panic!("not a signal reader: {other:?}"),
            }
        })
    }
}

impl Kernel {
    /// Sets limits for descriptors and watches that are lower than the configured bounds.
    fn limit(&mut self) {
        self.files_max = self.files.range(0..).count() + 1 + self.choices.below(30) as usize;
        self.watches_max = self.watches.len() + 1 + self.choices.below(30) as usize;
        self.refuses_accepts = self.percent(10);
    }
}

/// Changes the limits of descriptors and epoll watches, and sometimes refuses all peers.
pub(crate) fn lower_limits() {
    kernel(Kernel::limit);
}
