//! Several reactors as one server: what their threads share, and how they begin and end together.
//!
//! The first reactor is the lead's: it runs on the main thread, takes the signals, measures and tells. Each of the
//! others, the workers, has a thread of its own and its own listeners on the same ports; the kernel spreads the
//! connections. What is shared is touched when a connection opens or closes, never for a message, and the counters not
//! at all where there is no worker.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use reactor::{Mailbox, Reactor, Sender, Stats, Waker};

use crate::admission::memory::Guard;
use crate::admission::per_source::PerSourceLimit;
use crate::args::Settings;
use crate::echo::Echo;
use crate::metrics::Sampler;

/// Time between two lines about the bound of connections.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

/// A worker is told to shut down, and perhaps not to wait any longer.
const COMMANDS_MAX: usize = 2;

/// What all threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) connections_max: u64,
    pub(crate) guard: Mutex<Guard>,
    /// What one thread may have drawn of the guard's admissions and not used yet.
    pub(crate) share: AtomicU64,
    pub(crate) full: FullNotice,
    /// Peers refused because their source held its share.
    pub(crate) refused_by_source: AtomicU64,
    /// `None` for one thread, whose reactor knows it all.
    pub(crate) held: Option<Held>,
    pub(crate) sources: Option<PerSourceLimit>,
}

impl Shared {
    pub(crate) fn new(settings: &Settings, connections_max: u64, guard: Guard) -> Self {
        Self {
            connections_max,
            guard: Mutex::new(guard),
            share: AtomicU64::new(0),
            full: FullNotice::default(),
            refused_by_source: AtomicU64::new(0),
            held: (settings.threads > 1).then(Held::default),
            sources: settings.max_per_source.map(PerSourceLimit::new),
        }
    }

    pub(crate) fn guard(&self) -> MutexGuard<'_, Guard> {
        lock(&self.guard)
    }
}

/// When it is worth a line that the bound of connections is reached, and that there is room again: whoever comes and goes
/// at the bound can't fill the log.
#[derive(Debug, Default)]
pub(crate) struct FullNotice {
    /// The bound was told of, and no room was since.
    is_told: AtomicBool,
    told_at: Mutex<Option<Instant>>,
}

impl FullNotice {
    /// Whether to tell now that all places are taken.
    pub(crate) fn wants_full(&self, now: Instant) -> bool {
        self.changes(true, now)
    }

    /// Whether to tell now that there is room.
    pub(crate) fn wants_room(&self, held: u64, most: u64, now: Instant) -> bool {
        self.is_told.load(Ordering::Relaxed)
            && held <= most - room_again(most)
            && self.changes(false, now)
    }

    fn changes(&self, to: bool, now: Instant) -> bool {
        if self.is_told.load(Ordering::Relaxed) == to {
            return false;
        }
        let mut told_at = lock(&self.told_at);
        let is_early =
            told_at.is_some_and(|at| now.saturating_duration_since(at) < NOTICE_INTERVAL);
        if is_early || self.is_told.swap(to, Ordering::Relaxed) == to {
            return false;
        }
        *told_at = Some(now);
        true
    }
}

/// So many places must be free before a line says so: 5%, and more than one peer that leaves where there are more.
fn room_again(most: u64) -> u64 {
    (most / 20).max(2).min(most)
}

/// The connections of all threads together, so that bound and peak are those of the whole.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Those that are open or about to be.
    claimed: AtomicU64,
    open: AtomicU64,
    open_max: AtomicU64,
}

impl Held {
    /// Takes a place for a connection that is about to open, if there are fewer than so many.
    pub(crate) fn claim(&self, max: u64) -> bool {
        let one_more = |claimed| (claimed < max).then_some(claimed + 1);
        self.claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Gives the place of a connection back that did not open.
    pub(crate) fn release(&self) {
        self.claimed.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn note_open(&self) {
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        self.open_max.fetch_max(open, Ordering::Relaxed);
    }

    pub(crate) fn note_close(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.release();
    }

    pub(crate) fn count(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed)
    }
}

/// What one thread has counted, or all of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) stats: Stats,
    /// Those who were not let in, and those who were thrown out: reason to count.
    pub(crate) refused_by: BTreeMap<&'static str, u64>,
    pub(crate) closed_by: BTreeMap<&'static str, u64>,
}

impl Totals {
    /// Adds all but the peak.
    fn add(&mut self, more: &Totals) {
        self.stats += &more.stats;
        add_each(&mut self.refused_by, &more.refused_by);
        add_each(&mut self.closed_by, &more.closed_by);
    }
}

fn add_each<K: Ord + Copy>(counts: &mut BTreeMap<K, u64>, more: &BTreeMap<K, u64>) {
    for (&key, &count) in more {
        *counts.entry(key).or_default() += count;
    }
}

/// What a thread does beside serving its connections.
pub(crate) trait Duty {
    /// Whether this thread looks at memory by the clock; the others go by what it has seen.
    const LOOKS: bool;

    /// Passes on what the thread has counted.
    fn report(&mut self, mine: Totals, shared: &Shared, moment: &Moment<'_>);

    /// Woken by another thread: whether the server is to end; said again, at once.
    fn wants_end(&mut self) -> bool;

    /// The server ends; said again, at once.
    fn end(&mut self);
}

/// When a report is made.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    pub(crate) now: Instant,
    /// The time between two status lines.
    pub(crate) interval: Duration,
    /// What the status line says beside the figures.
    pub(crate) state: &'a str,
}

/// The duty of the main thread.
#[derive(Debug)]
pub(crate) struct Lead {
    pub(crate) sampler: Sampler,
    pub(crate) workers: Workers,
}

impl Lead {
    /// The sum of what this thread and the workers have counted.
    pub(crate) fn totals(&self, mut mine: Totals, shared: &Shared) -> Totals {
        for worker in &self.workers.workers {
            mine.add(&lock(&worker.board));
        }
        if let Some(held) = &shared.held {
            mine.stats.open_max = held.open_max.load(Ordering::Relaxed);
        }
        mine
    }
}

impl Duty for Lead {
    const LOOKS: bool = true;

    fn report(&mut self, mine: Totals, shared: &Shared, moment: &Moment<'_>) {
        let stats = self.totals(mine, shared).stats;
        self.sampler.sample(&stats, moment.now, moment.interval, moment.state);
    }

    fn wants_end(&mut self) -> bool {
        let lost_one =
            !self.workers.is_ending && self.workers.running() < self.workers.workers.len();
        if lost_one {
            log::error!("a reactor has ended, and the others end with it");
        }
        lost_one
    }

    fn end(&mut self) {
        self.workers.is_ending = true;
        for worker in &self.workers.workers {
            // Full: it was told. Disconnected: it has ended.
            let _ = worker.commands.send(ShutDown);
        }
    }
}

/// The duty of every other thread.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    commands: Mailbox<ShutDown>,
    board: Arc<Mutex<Totals>>,
}

impl Duty for WorkerThread {
    const LOOKS: bool = false;

    fn report(&mut self, mine: Totals, _shared: &Shared, _moment: &Moment<'_>) {
        *lock(&self.board) = mine;
    }

    fn wants_end(&mut self) -> bool {
        self.commands.receive().is_some()
    }

    fn end(&mut self) {}
}

/// The order to let all connections go, and to end; the second one does not wait for them.
#[derive(Debug)]
struct ShutDown;

/// The workers, as the lead sees them.
#[derive(Debug)]
pub(crate) struct Workers {
    workers: Vec<Worker>,
    running: Arc<AtomicUsize>,
    is_ending: bool,
}

#[derive(Debug)]
struct Worker {
    commands: Sender<ShutDown>,
    /// What the worker had counted a moment ago.
    board: Arc<Mutex<Totals>>,
    thread: Option<JoinHandle<Result<(), reactor::Error>>>,
}

impl Workers {
    /// Starts a thread for each of the reactors, which listen already. Signals must be blocked by now.
    ///
    /// # Errors
    /// One line: what could not be started.
    pub(crate) fn start(
        reactors: Vec<Reactor<()>>,
        settings: &Settings,
        shared: &Arc<Shared>,
        lead: &Waker,
    ) -> Result<Self, String> {
        let running = Arc::new(AtomicUsize::new(0));
        let mut workers = Vec::new();
        for reactor in reactors {
            workers.push(spawn(reactor, settings, shared, Shift::begin(&running, lead))?);
        }
        Ok(Self { workers, running, is_ending: false })
    }

    /// How many have not ended.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    /// Waits for all of them to end.
    ///
    /// # Errors
    /// One line: why one could not go on.
    pub(crate) fn join(&mut self) -> Result<(), String> {
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            let ended = thread.join().map_err(|_| "a reactor's thread has panicked".to_owned())?;
            ended.map_err(|error| format!("a reactor can't go on: {error}"))?;
        }
        Ok(())
    }
}

fn spawn(
    mut reactor: Reactor<()>,
    settings: &Settings,
    shared: &Arc<Shared>,
    shift: Shift,
) -> Result<Worker, String> {
    let (commands, mailbox) = reactor.context().mailbox(COMMANDS_MAX);
    let board = Arc::new(Mutex::new(Totals::default()));
    let worker = WorkerThread { commands: mailbox, board: Arc::clone(&board) };
    let mut service = Echo::new(settings, shared, worker);
    service.start(reactor.context()).map_err(|error| error.to_string())?;
    let serve = move || {
        let _shift = shift;
        let ended = reactor.run(&mut service);
        service.report(reactor.context());
        ended
    };
    let thread = thread::Builder::new()
        .name("reactor".to_owned())
        .spawn(serve)
        .map_err(|error| format!("a thread can't be started: {error}; give fewer --threads"))?;
    Ok(Worker { commands, board, thread: Some(thread) })
}

/// Tells the lead when a thread ends, in whatever way.
#[derive(Debug)]
struct Shift {
    running: Arc<AtomicUsize>,
    lead: Waker,
}

impl Shift {
    fn begin(running: &Arc<AtomicUsize>, lead: &Waker) -> Self {
        running.fetch_add(1, Ordering::Relaxed);
        Self { running: Arc::clone(running), lead: lead.clone() }
    }
}

impl Drop for Shift {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Ordering::Release);
        self.lead.wake();
    }
}

/// A thread that has panicked leaves whole counts behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;
    use reactor::{Config, Status};

    #[test]
    fn a_worker_that_ends_unasked_ends_them_all() {
        let args = Args::parse_from(["c1000k-server", "--threads", "2"]);
        let Ok(Command::Serve(settings)) = args.check() else { panic!("they are right") };
        let guard = Guard::new(settings.memory_reserve, settings.threads);
        let shared = Arc::new(Shared::new(&settings, 10, guard));
        let config = Config { connections_max: 10, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let others = vec![Reactor::new(&config).unwrap()];
        let workers =
            Workers::start(others, &settings, &shared, &reactor.context().waker()).unwrap();
        workers.workers[0].commands.send(ShutDown).unwrap();

        let mut service =
            Echo::new(&settings, &shared, Lead { sampler: Sampler::start(), workers });
        let deadline = Instant::now() + Duration::from_secs(20);
        while reactor.turn(&mut service, Some(Duration::from_secs(1))).unwrap() == Status::Running {
            assert!(Instant::now() < deadline, "the lead goes on and on");
        }
        assert!(service.duty.workers.is_ending && service.duty.workers.running() == 0);
        assert_eq!(service.duty.workers.join(), Ok(()));
    }

    #[test]
    fn whoever_comes_and_goes_at_the_bound_makes_a_line_a_second_at_the_most() {
        for most in [1, 2, 10, 1_000] {
            let notice = FullNotice::default();
            let start = Instant::now();
            let lines = (0..10_000_u64).filter(|&step| {
                let now = start + Duration::from_millis(step);
                notice.wants_full(now) | notice.wants_room(0, most, now)
            });
            assert!((9..=10).contains(&lines.count()), "{most}");
        }
        let notice = FullNotice::default();
        let now = Instant::now();
        assert!(notice.wants_full(now) && !notice.wants_full(now));
        let later = now + NOTICE_INTERVAL;
        assert!(!notice.wants_room(9, 10, later), "one that leaves is no room");
        assert!(notice.wants_room(8, 10, later) && !notice.wants_room(8, 10, later));
    }

    #[test]
    fn however_many_threads_claim_no_more_than_the_bound_get_a_place() {
        const MAX: u64 = 1_000;
        let held = Held::default();
        let claimed = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..MAX {
                        if held.claim(MAX) {
                            held.note_open();
                            claimed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!((claimed.into_inner(), held.count()), (MAX, MAX));
        held.note_close();
        assert!(held.claim(MAX) && !held.claim(MAX));
        held.release();
        assert_eq!((held.count(), held.open_max.into_inner()), (MAX - 1, MAX));
    }

    #[test]
    fn totals_add_up() {
        let mut stats = Stats::default();
        (stats.accepted, stats.opened, stats.closed) = (3, 3, 1);
        stats.accept_errors.insert(24, 2);
        let refused_by = BTreeMap::from([("memory", 1)]);
        let one = Totals { stats, refused_by, closed_by: BTreeMap::new() };
        let mut all = one.clone();
        all.closed_by.insert("idle", 1);
        all.add(&one);
        assert_eq!((all.stats.accepted, all.stats.open(), all.stats.accept_errors[&24]), (6, 4, 4));
        assert_eq!((all.refused_by["memory"], all.closed_by["idle"]), (2, 1));
    }
}
