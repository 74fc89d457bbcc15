//! A fake kernel in place of `sys.rs`, for the unit tests and the fuzzer: the same functions and types, and nothing
//! real behind them.
//!
//! It is driven by choices that come from a seed or from a fuzzer's bytes, so every run can be repeated. It keeps to
//! what a kernel may do, and does of that the worst: it cuts reads and writes short, refuses calls with each errno that
//! they document, runs out of descriptors and epoll watches, reports events late, in any order, without cause, or for
//! what is closed already. Its peers connect, send, finish, reset and vanish as they like. Each thread has a kernel of
//! its own, with a clock of its own.

// The real one: what is pure in it is shared, and its own tests run as well.
#[allow(dead_code)]
#[path = "sys.rs"]
mod real;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File as RealFile;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::address::Address;
use crate::config::Keepalive;
use crate::error::Error;
use crate::signal::Signal;

use real::{accepted, refused, transferred};

pub use real::Readiness;
pub(crate) use real::Transferred;

pub(crate) type Accepted = real::Accepted<Descriptor>;

thread_local! {
    static KERNEL: RefCell<Kernel> = RefCell::new(Kernel::new(Choices::seeded(0)));
}

fn kernel<T>(act: impl FnOnce(&mut Kernel) -> T) -> T {
    KERNEL.with_borrow_mut(act)
}

// --- what the simulation asks for ------------------------------------------------------------------------------------

/// Boots a fresh kernel on this thread.
pub(crate) fn boot(choices: Choices) {
    kernel(|kernel| *kernel = Kernel::new(choices));
}

/// From now on no call fails and nothing is reported late, twice or without cause; peers read all they are sent, and
/// do nothing else. With no fault and no news, a reactor must come to rest.
pub(crate) fn calm_down() {
    kernel(Kernel::calm_down);
}

/// The next choice: a number below `bound`.
pub(crate) fn below(bound: u32) -> u32 {
    kernel(|kernel| kernel.choices.below(bound))
}

/// True in so many cases of a hundred.
pub(crate) fn percent(chance: u32) -> bool {
    below(100) < chance
}

/// Whether the script is over.
pub(crate) fn has_choices() -> bool {
    kernel(|kernel| kernel.choices.any_left())
}

/// How often calls fail and events lie from now on, in per cent.
pub(crate) fn set_faults(percent: u32) {
    kernel(|kernel| kernel.faults_percent = percent);
}

/// What became of a wait that had no end and nothing to report: a real one would not have returned.
pub(crate) fn rests() -> bool {
    kernel(|kernel| kernel.rests)
}

/// How many fatal errors of `epoll_wait` were made up so far.
pub(crate) fn broken_waits() -> u64 {
    kernel(|kernel| kernel.broken_waits)
}

/// Descriptors that are open on this thread.
pub(crate) fn open_descriptors() -> usize {
    kernel(|kernel| kernel.files.len())
}

pub(crate) fn signals_raised() -> u64 {
    kernel(|kernel| kernel.signals_raised)
}

pub(crate) fn accepts_granted() -> u64 {
    kernel(|kernel| kernel.accepts_granted)
}

/// Everything that all sockets were given to send.
pub(crate) fn bytes_taken() -> u64 {
    kernel(|kernel| kernel.bytes_taken)
}

/// Peers that wait to be accepted.
pub(crate) fn peers_waiting() -> usize {
    let waiting = |file: &File| match file {
        File::Listener { backlog } => backlog.len(),
        _ => 0,
    };
    kernel(|kernel| kernel.files.values().map(waiting).sum())
}

/// The watched descriptors have nothing to tell, as if they had been read.
pub(crate) fn read_watched() {
    kernel(|kernel| {
        for file in kernel.files.values_mut() {
            if let File::Foreign { ready, .. } = file {
                *ready = Readiness::NONE;
            }
        }
    });
}

/// A line of the log of a replayed seed.
pub(crate) fn trace(line: impl FnOnce() -> String) {
    static ASKED: OnceLock<bool> = OnceLock::new();
    if *ASKED.get_or_init(|| std::env::var_os("REACTOR_TRACE").is_some()) {
        println!("{}", line());
    }
}

/// What a connection's peer has done, and what it was sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wire {
    pub(crate) sent: Vec<u8>,
    /// Bytes that came from the peer.
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

/// The byte that the peer of this socket sends at this place.
pub(crate) fn byte_of(serial: u32, place: usize) -> u8 {
    (serial as u8).wrapping_mul(31).wrapping_add(place as u8) ^ (place >> 8) as u8
}

impl Descriptor {
    /// Which of all sockets ever made it is.
    pub(crate) fn serial(&self) -> u32 {
        kernel(|kernel| kernel.socket(self).serial)
    }

    /// What the fake epoll watches it for.
    pub(crate) fn registered(&self) -> Option<Readiness> {
        kernel(|kernel| kernel.watches.get(&self.0).map(|watch| watch.interest))
    }
}

/// Where decisions come from: bytes, and when those are used up (or there were none) a generator.
#[derive(Debug)]
pub(crate) struct Choices {
    bytes: Option<VecDeque<u8>>,
    state: u64,
    left: u32,
}

/// Decisions of a seeded script.
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

// --- the kernel --------------------------------------------------------------------------------------------------------

/// Reports of one descriptor in a row that the reactor may leave without any call on it.
const IGNORED_MAX: u32 = 3;
const SOCKETS_MAX: usize = 40;
const ROOM_BYTES_MAX: u32 = 200;

#[derive(Debug)]
struct Kernel {
    choices: Choices,
    faults_percent: u32,
    calm: bool,
    started: Instant,
    clock: Duration,
    files: BTreeMap<i32, File>,
    files_max: usize,
    /// A security module lets nobody in, which is no reason for an event to go away.
    refuses_accepts: bool,
    watches: BTreeMap<i32, Watch>,
    watches_max: usize,
    /// The data of watches that are gone, for events that come too late.
    retired: VecDeque<u64>,
    buried: BTreeMap<u32, Wire>,
    serial_next: u32,
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
    Bell { rung: bool },
    Signals { pending: VecDeque<Signal> },
    Listener { backlog: VecDeque<Socket> },
    Socket(Socket),
    Foreign { descriptor: OwnedFd, ready: Readiness },
}

#[derive(Debug)]
struct Socket {
    serial: u32,
    listens: bool,
    error: Option<Errno>,
    incoming: VecDeque<u8>,
    /// Bytes that the peer can still be sent.
    room: usize,
    finished: bool,
    wire: Wire,
}

#[derive(Debug)]
struct Watch {
    interest: Readiness,
    data: u64,
    /// True reports since the last call on the descriptor.
    ignored: u32,
}

impl Kernel {
    fn new(choices: Choices) -> Self {
        Self {
            choices,
            faults_percent: 0,
            calm: false,
            started: Instant::now(),
            clock: Duration::ZERO,
            files: BTreeMap::new(),
            files_max: usize::MAX,
            refuses_accepts: false,
            watches: BTreeMap::new(),
            watches_max: usize::MAX,
            retired: VecDeque::new(),
            buried: BTreeMap::new(),
            serial_next: 0,
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

    /// Whether this call fails, and with what.
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
        for file in self.files.values_mut() {
            match file {
                File::Socket(socket) => {
                    socket.room = usize::MAX;
                    socket.wire.connecting = false;
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

    /// The lowest number that is free, as the real one does, so that numbers are used again at once.
    fn open(&mut self, call: &str, file: File) -> Result<Descriptor, Errno> {
        self.room_for_descriptor(call)?;
        let number = (3..).find(|number| !self.files.contains_key(number)).ok_or(Errno::EMFILE)?;
        self.files.insert(number, file);
        Ok(Descriptor(number))
    }

    fn room_for_descriptor(&mut self, call: &str) -> Result<(), Errno> {
        if self.files.len() >= self.files_max {
            trace(|| format!("  {call}: no descriptor left"));
            return Err(Errno::EMFILE);
        }
        Ok(())
    }

    fn close(&mut self, number: i32) {
        let Some(file) = self.files.remove(&number) else { return };
        if let File::Epoll = file {
            self.watches.clear();
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
            self.buried.insert(socket.serial, socket.wire);
        }
    }

    fn retire(&mut self, watch: Watch) {
        if self.retired.len() == 16 {
            self.retired.pop_front();
        }
        self.retired.push_back(watch.data);
    }

    fn touch(&mut self, descriptor: &Descriptor) {
        if let Some(watch) = self.watches.get_mut(&descriptor.0) {
            watch.ignored = 0;
        }
    }

    fn socket(&mut self, descriptor: &Descriptor) -> &mut Socket {
        self.touch(descriptor);
        match self.files.get_mut(&descriptor.0) {
            Some(File::Socket(socket)) => socket,
            other => panic!("{descriptor:?} is no socket: {other:?}"),
        }
    }

    fn wire(&self, serial: u32) -> Wire {
        let alive = self.files.values().find_map(|file| match file {
            File::Socket(socket) if socket.serial == serial => Some(socket.wire.clone()),
            _ => None,
        });
        alive
            .or_else(|| self.buried.get(&serial).cloned())
            .expect("each serial was given to a socket")
    }

    fn new_socket(&mut self) -> Socket {
        self.serial_next += 1;
        let room = if self.calm { usize::MAX } else { self.choices.below(ROOM_BYTES_MAX) as usize };
        Socket {
            serial: self.serial_next,
            listens: false,
            error: None,
            incoming: VecDeque::new(),
            room,
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
            self.clock += Duration::from_secs(self.choices.below(100).into()); // The machine slept.
        }
        for _ in 0..self.choices.below(6) {
            let Some(&number) = nth(&self.files, &mut self.choices) else { return };
            let Some(mut file) = self.files.remove(&number) else { return };
            self.move_file(&mut file);
            self.files.insert(number, file);
        }
    }

    fn move_file(&mut self, file: &mut File) {
        match file {
            File::Socket(socket) if !socket.listens => self.move_socket(socket),
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
    }

    fn move_socket(&mut self, socket: &mut Socket) {
        if socket.wire.gone {
            return;
        }
        if socket.wire.connecting {
            return match self.choices.below(4) {
                0 => self.fail(socket, &CONNECT_ERRNOS),
                1 | 2 => socket.wire.connecting = false,
                _ => {}
            };
        }
        match self.choices.below(12) {
            0..=4 if !socket.wire.fin => {
                for _ in 0..=self.choices.below(100) {
                    socket.incoming.push_back(byte_of(socket.serial, socket.wire.arrived));
                    socket.wire.arrived += 1;
                }
            }
            5 => socket.wire.fin = true,
            6 => self.fail(socket, &[Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EHOSTUNREACH]),
            // As a Unix-domain peer that closes: no error waits, but sending is over.
            7 => {
                socket.wire.fin = true;
                socket.wire.gone = true;
            }
            _ => socket.room += self.choices.below(ROOM_BYTES_MAX) as usize,
        }
    }

    fn fail(&mut self, socket: &mut Socket, errnos: &[Errno]) {
        socket.error = Some(errnos[self.choices.below(errnos.len() as u32) as usize]);
        socket.wire.gone = true;
        socket.wire.connecting = false;
    }

    // Events.

    fn ready(&self, number: i32) -> Readiness {
        let readable = |yes: bool| if yes { Readiness::READABLE } else { Readiness::NONE };
        match &self.files[&number] {
            File::Epoll | File::Null => Readiness::NONE,
            File::Bell { rung } => readable(*rung),
            File::Signals { pending } => readable(!pending.is_empty()),
            File::Listener { backlog } => readable(!backlog.is_empty()),
            File::Foreign { ready, .. } => *ready,
            File::Socket(socket) => socket.ready(),
        }
    }

    /// What is truly there to be reported.
    fn true_events(&mut self) -> Vec<(i32, u64, Readiness)> {
        let mut events = Vec::new();
        for (&number, watch) in &self.watches {
            let ready = reported(self.ready(number), watch.interest);
            if ready != Readiness::NONE {
                events.push((number, watch.data, ready));
            }
        }
        events
    }

    fn wait(&mut self, events: &mut Events, wait: Option<Duration>) -> Result<(), Errno> {
        self.world_moves();
        events.filled.clear();
        self.rests = false;
        if let Err(errno) = self.fault("epoll_wait", &[Errno::EINTR, Errno::EINTR, Errno::EBADF]) {
            self.broken_waits += u64::from(errno == Errno::EBADF);
            return if errno == Errno::EINTR { Ok(()) } else { Err(errno) };
        }
        let mut reports = self.true_events();
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
        if matches!(self.files[&number], File::Foreign { .. }) {
            return; // Whether it is read is the service's affair.
        }
        if let Some(watch) = self.watches.get_mut(&number) {
            watch.ignored += 1;
            assert!(
                watch.ignored <= IGNORED_MAX,
                "a spin: descriptor {number} is reported again and again, and nothing is done about it"
            );
        }
    }

    fn shuffle(&mut self, reports: &mut [(i32, u64, Readiness)]) {
        for last in (1..reports.len()).rev() {
            reports.swap(last, self.choices.below(last as u32 + 1) as usize);
        }
    }

    /// Events without a cause, and events that come too late.
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
                // No kernel calls a connect decided that is not.
                if matches!(&self.files[&number], File::Socket(socket) if socket.wire.connecting) {
                    continue;
                }
                let watch = &self.watches[&number];
                let noise = Readiness::READABLE.with(Readiness::WRITABLE);
                let ready = reported(noise, watch.interest);
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

impl Socket {
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
        if self.room > 0 && !self.finished {
            ready = ready.with(Readiness::WRITABLE);
        }
        if self.wire.fin && self.finished {
            ready = ready.with(all);
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
        match self.room.min(most) {
            0 if most > 0 => Err(Errno::EAGAIN),
            taken => Ok(taken),
        }
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

/// What level-triggered epoll reports: errors and hang-ups whatever the interest.
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

// --- the calls, as in sys.rs -------------------------------------------------------------------------------------------

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
        // Not at the end of the thread, nor while a failed assertion unwinds through the kernel.
        let _ = KERNEL.try_with(|kernel| {
            if let Ok(mut kernel) = kernel.try_borrow_mut() {
                kernel.close(self.0);
            }
        });
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(descriptor: OwnedFd) -> Self {
        let file = File::Foreign { descriptor, ready: Readiness::NONE };
        // It was open already, so no limit is in its way.
        kernel(|kernel| {
            let files_max = std::mem::replace(&mut kernel.files_max, usize::MAX);
            let opened = kernel.open("watch", file).expect("there is no limit");
            kernel.files_max = files_max;
            opened
        })
    }
}

impl From<Descriptor> for OwnedFd {
    fn from(descriptor: Descriptor) -> Self {
        let number = descriptor.0;
        std::mem::forget(descriptor);
        kernel(|kernel| {
            assert!(
                !kernel.watches.contains_key(&number),
                "a watched descriptor was given back while epoll knew it"
            );
            match kernel.files.remove(&number) {
                Some(File::Foreign { descriptor, .. }) => descriptor,
                other => panic!("only a watched descriptor is given back: {other:?}"),
            }
        })
    }
}

impl AsFd for Descriptor {
    /// Good for nothing but being there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        static NULL: OnceLock<RealFile> = OnceLock::new();
        NULL.get_or_init(|| RealFile::open("/dev/null").expect("there is a null device")).as_fd()
    }
}

pub(crate) fn now() -> Instant {
    kernel(Kernel::now)
}

#[derive(Debug)]
pub(crate) struct Poller(#[allow(dead_code)] Descriptor);

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
        kernel(|kernel| {
            assert!(!kernel.watches.contains_key(&descriptor.0), "EEXIST: {descriptor:?}");
            let foreign = matches!(kernel.files[&descriptor.0], File::Foreign { .. });
            let last = if foreign { Errno::EPERM } else { Errno::ENOMEM };
            kernel.fault("epoll_ctl", &[Errno::ENOMEM, Errno::ENOSPC, last])?;
            if kernel.watches.len() >= kernel.watches_max {
                return Err(Errno::ENOSPC);
            }
            kernel.watches.insert(descriptor.0, Watch { interest, data, ignored: 0 });
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
            kernel.watches.insert(descriptor.0, Watch { interest, data, ignored: 0 });
            Ok(())
        })
        .map_err(refused("epoll_ctl"))
    }

    /// Fails for sockets only: there is nothing in the real one that could fail, and with a watched descriptor nobody
    /// could help it.
    pub(crate) fn delete(&self, descriptor: &Descriptor) -> Result<(), Error> {
        kernel(|kernel| {
            assert!(kernel.watches.contains_key(&descriptor.0), "ENOENT: {descriptor:?}");
            if !matches!(kernel.files[&descriptor.0], File::Foreign { .. }) {
                kernel.fault("epoll_ctl", &[Errno::ENOMEM])?;
            }
            if let Some(watch) = kernel.watches.remove(&descriptor.0) {
                kernel.retire(watch);
            }
            Ok(())
        })
        .map_err(refused("epoll_ctl"))
    }

    pub(crate) fn wait(&self, events: &mut Events, wait: Option<Duration>) -> Result<(), Error> {
        kernel(|kernel| kernel.wait(events, wait)).map_err(refused("epoll_wait"))
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

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Readiness)> {
        self.filled.iter().copied()
    }
}

pub(crate) fn bound(
    address: &Address,
    _reuse_port: bool,
    _only_v6: bool,
) -> Result<Descriptor, Error> {
    let socket = stream_socket(address)?;
    bind(&socket, address)?;
    Ok(socket)
}

pub(crate) fn stream_socket(_address: &Address) -> Result<Descriptor, Error> {
    kernel(|kernel| {
        let errnos = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EACCES];
        kernel.fault("socket", &errnos)?;
        let mut socket = kernel.new_socket();
        socket.wire.connecting = true;
        kernel.open("socket", File::Socket(socket))
    })
    .map_err(refused("socket"))
}

/// Calls that only set something: nothing comes of them here, but they may be refused.
fn set(call: &'static str, socket: &Descriptor, errnos: &[Errno]) -> Result<(), Error> {
    kernel(|kernel| {
        kernel.touch(socket);
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

pub(crate) fn set_nodelay(socket: &Descriptor) -> Result<(), Error> {
    set("setsockopt(TCP_NODELAY)", socket, &[Errno::ENOPROTOOPT])
}

pub(crate) fn set_keepalive(socket: &Descriptor, _keepalive: &Keepalive) -> Result<(), Error> {
    set("setsockopt(SO_KEEPALIVE)", socket, &[Errno::EINVAL])
}

pub(crate) fn set_user_timeout(socket: &Descriptor, _timeout: Duration) -> Result<(), Error> {
    set("setsockopt(TCP_USER_TIMEOUT)", socket, &[Errno::EINVAL])
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
        if !address.is_tcp() || kernel.percent(10) {
            kernel.socket(socket).wire.connecting = false; // Decided at once.
        }
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
    accepted(kernel(|kernel| {
        if kernel.refuses_accepts {
            return Err(Errno::EPERM);
        }
        kernel.touch(listener);
        // Linux looks for a descriptor before it looks for a peer.
        kernel.room_for_descriptor("accept4")?;
        let fault = kernel.fault("accept4", &errnos);
        let Some(File::Listener { backlog }) = kernel.files.get_mut(&listener.0) else {
            panic!("{listener:?} does not listen");
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

pub(crate) fn receive(socket: &Descriptor, buffer: &mut [u8]) -> Transferred {
    let errnos = [
        Errno::EAGAIN,
        Errno::EINTR,
        Errno::ENOMEM,
        Errno::ECONNRESET,
        Errno::ETIMEDOUT,
        Errno::EHOSTUNREACH,
    ];
    let answer = kernel(|kernel| {
        kernel.touch(socket);
        kernel.fault("recv", &errnos)?;
        let most = kernel.cut_short(buffer.len());
        kernel.socket(socket).receive(&mut buffer[..most])
    });
    transferred("recv", answer)
}

pub(crate) fn send(socket: &Descriptor, bytes: &[u8]) -> Transferred {
    send_vectored(socket, &[IoSlice::new(bytes)])
}

pub(crate) fn send_vectored(socket: &Descriptor, slices: &[IoSlice<'_>]) -> Transferred {
    let errnos = [
        Errno::EAGAIN,
        Errno::EINTR,
        Errno::ENOBUFS,
        Errno::ENOMEM,
        Errno::EPIPE,
        Errno::ECONNRESET,
        Errno::EHOSTUNREACH,
    ];
    let answer = kernel(|kernel| {
        kernel.touch(socket);
        kernel.fault("send", &errnos)?;
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let most = kernel.cut_short(total);
        let socket = kernel.socket(socket);
        let taken = socket.send(most)?;
        socket.room -= taken;
        socket.wire.sent.extend(slices.iter().flat_map(|slice| slice.iter()).take(taken));
        kernel.bytes_taken += taken as u64;
        trace(|| format!("  send takes {taken} of {total}"));
        Ok(taken)
    });
    transferred("send", answer)
}

impl Kernel {
    /// A part of so many bytes, one at the least where there is one.
    fn cut_short(&mut self, bytes: usize) -> usize {
        if self.faults_percent > 0 && bytes > 1 && self.percent(30) {
            1 + self.choices.below(bytes as u32 - 1) as usize
        } else {
            bytes
        }
    }
}

pub(crate) fn finish_writing(socket: &Descriptor) -> Result<(), Error> {
    kernel(|kernel| {
        kernel.touch(socket);
        kernel.fault("shutdown", &[Errno::ENOTCONN, Errno::ENOBUFS])?;
        let socket = kernel.socket(socket);
        assert!(!socket.wire.connecting, "shutdown before the connect was decided");
        if socket.wire.gone {
            return Err(Errno::ENOTCONN);
        }
        socket.finished = true;
        Ok(())
    })
    .map_err(refused("shutdown"))
}

pub(crate) fn reset_on_close(socket: &Descriptor) -> Result<(), Error> {
    set("setsockopt(SO_LINGER)", socket, &[Errno::EINVAL])?;
    kernel(|kernel| kernel.socket(socket).wire.resets = true);
    Ok(())
}

pub(crate) fn has_unsent(socket: &Descriptor) -> bool {
    kernel(|kernel| !kernel.socket(socket).wire.sent.is_empty() && kernel.percent(50))
}

pub(crate) fn take_error(socket: &Descriptor, call: &'static str) -> Option<Error> {
    kernel(|kernel| {
        kernel.touch(socket);
        if let Err(errno) = kernel.fault("getsockopt", &[Errno::ENOBUFS]) {
            return Some(refused("getsockopt(SO_ERROR)")(errno));
        }
        kernel.socket(socket).error.take().map(refused(call))
    })
}

pub(crate) fn peer_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    set("getpeername", socket, &[Errno::ENOTCONN, Errno::ENOBUFS])?;
    Ok(SocketAddr::from(([127, 0, 0, 1], 1)))
}

pub(crate) fn local_addr(socket: &Descriptor) -> Result<SocketAddr, Error> {
    set("getsockname", socket, &[Errno::ENOBUFS])?;
    Ok(SocketAddr::from(([127, 0, 0, 1], 2)))
}

pub(crate) fn spare() -> Result<Descriptor, Error> {
    kernel(|kernel| {
        kernel.fault("open", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
        kernel.open("open", File::Null)
    })
    .map_err(refused("open"))
}

#[derive(Debug)]
pub(crate) struct Bell(Descriptor);

impl Bell {
    pub(crate) fn new() -> Result<Self, Error> {
        kernel(|kernel| {
            kernel.fault("eventfd", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
            kernel.open("eventfd", File::Bell { rung: false })
        })
        .map(Self)
        .map_err(refused("eventfd"))
    }

    fn set_rung(&self, on: bool) {
        kernel(|kernel| {
            kernel.touch(&self.0);
            if let Some(File::Bell { rung }) = kernel.files.get_mut(&self.0.0) {
                *rung = on;
            }
        });
    }

    pub(crate) fn ring(&self) {
        self.set_rung(true);
    }

    pub(crate) fn hush(&self) {
        self.set_rung(false);
    }

    pub(crate) fn watch(&self, poller: &Poller, data: u64) -> Result<(), Error> {
        poller.add(&self.0, Readiness::READABLE, data)
    }
}

#[derive(Debug)]
pub(crate) struct SignalReader(Descriptor);

impl SignalReader {
    pub(crate) fn new(_signals: &[Signal]) -> Result<Self, Error> {
        kernel(|kernel| {
            kernel.fault("signalfd", &[Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM])?;
            kernel.open("signalfd", File::Signals { pending: VecDeque::new() })
        })
        .map(Self)
        .map_err(refused("signalfd"))
    }

    pub(crate) fn read(&self) -> Option<Signal> {
        kernel(|kernel| {
            kernel.touch(&self.0);
            match kernel.files.get_mut(&self.0.0) {
                Some(File::Signals { pending }) => pending.pop_front(),
                other => panic!("no signals are read from {other:?}"),
            }
        })
    }

    pub(crate) fn watch(&self, poller: &Poller, data: u64) -> Result<(), Error> {
        poller.add(&self.0, Readiness::READABLE, data)
    }
}

impl Kernel {
    /// Fewer descriptors and watches than may be asked for.
    fn limit(&mut self) {
        self.files_max = self.files.len() + 1 + self.choices.below(30) as usize;
        self.watches_max = self.watches.len() + 1 + self.choices.below(30) as usize;
        self.refuses_accepts = self.percent(10);
    }
}

/// Lowers the limits of descriptors and epoll watches, and now and then lets nobody in any more.
pub(crate) fn lower_limits() {
    kernel(Kernel::limit);
}
