//! The threads of one server, and how they start and end together.
//!
//! The first reactor runs on the main thread, which also handles signals, samples and logs. Each of the others, the
//! workers, has its own thread and its own listeners on the same ports; the kernel distributes the connections. Threads
//! share only the counts of [`Admission`], which change when a connection opens or closes, not per message.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use reactor::{Mailbox, Reactor, Sender, Waker};

use crate::admission::Admission;
use crate::args::Settings;
use crate::echo::{Echo, Moment, ThreadRole};
use crate::metrics::{Sampler, Totals};
use crate::sync::lock;

/// A worker gets a command to shut down, and possibly a second one to end at once.
const COMMANDS_MAX: usize = 2;

/// The role of the main thread.
#[derive(Debug)]
pub(crate) struct MainThread {
    pub(crate) admission: Arc<Admission>,
    pub(crate) sampler: Sampler,
    pub(crate) workers: Workers,
}

impl MainThread {
    /// The sum of what this thread and the workers have counted.
    pub(crate) fn totals(&self, mut counted: Totals) -> Totals {
        for worker in &self.workers.workers {
            counted.add(&lock(&worker.totals));
        }
        // A single reactor counts the peak itself.
        if !self.workers.workers.is_empty() {
            counted.stats.open_max = self.admission.open_max();
        }
        counted
    }
}

impl ThreadRole for MainThread {
    const SAMPLES_MEMORY: bool = true;

    fn report(&mut self, counted: Totals, at: &Moment) {
        let totals = self.totals(counted);
        self.sampler.sample(totals, at.shortage, at.now, at.interval);
    }

    fn wants_shutdown(&mut self) -> bool {
        let lost_one =
            !self.workers.shutting_down && self.workers.running() < self.workers.workers.len();
        if lost_one {
            log::error!("a reactor has ended unexpectedly, and the others end too");
        }
        lost_one
    }

    fn shut_down(&mut self) {
        self.workers.shutting_down = true;
        for worker in &self.workers.workers {
            // Full: it has the command already. Disconnected: it has ended.
            let _ = worker.commands.send(ShutDown);
        }
    }
}

/// The role of every other thread.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    commands: Mailbox<ShutDown>,
    totals: Arc<Mutex<Totals>>,
}

impl ThreadRole for WorkerThread {
    const SAMPLES_MEMORY: bool = false;

    fn report(&mut self, counted: Totals, _at: &Moment) {
        *lock(&self.totals) = counted;
    }

    fn wants_shutdown(&mut self) -> bool {
        self.commands.receive().is_some()
    }

    fn shut_down(&mut self) {}
}

/// The command to close all connections and to end; the second one does not wait for them.
#[derive(Debug)]
struct ShutDown;

/// The main thread's view of the workers.
#[derive(Debug)]
pub(crate) struct Workers {
    workers: Vec<Worker>,
    running: Arc<AtomicUsize>,
    shutting_down: bool,
}

#[derive(Debug)]
struct Worker {
    commands: Sender<ShutDown>,
    /// The worker's counts at its last sample.
    totals: Arc<Mutex<Totals>>,
    thread: Option<JoinHandle<Result<(), reactor::Error>>>,
}

impl Workers {
    /// Starts a thread for each of the reactors, which already listen. Signals must be blocked.
    ///
    /// # Errors
    /// One line: what could not be started.
    pub(crate) fn start(
        reactors: Vec<Reactor<()>>,
        settings: &Settings,
        admission: &Arc<Admission>,
        main_thread: &Waker,
    ) -> Result<Self, String> {
        let running = Arc::new(AtomicUsize::new(0));
        let mut workers = Vec::new();
        for reactor in reactors {
            let counted = Running::new(&running, main_thread);
            workers.push(spawn(reactor, settings, admission, counted)?);
        }
        Ok(Self { workers, running, shutting_down: false })
    }

    /// The number of workers that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Acquire)
    }

    /// Waits for all of them to end.
    ///
    /// # Errors
    /// One line: why a worker failed.
    pub(crate) fn join(&mut self) -> Result<(), String> {
        for thread in self.workers.iter_mut().filter_map(|worker| worker.thread.take()) {
            let ended = thread.join().map_err(|_| "a reactor's thread has panicked".to_owned())?;
            ended.map_err(|error| format!("a reactor failed: {error}"))?;
        }
        Ok(())
    }
}

fn spawn(
    mut reactor: Reactor<()>,
    settings: &Settings,
    admission: &Arc<Admission>,
    running: Running,
) -> Result<Worker, String> {
    let (commands, mailbox) = reactor.context().mailbox(COMMANDS_MAX);
    let totals = Arc::new(Mutex::new(Totals::default()));
    let role = WorkerThread { commands: mailbox, totals: Arc::clone(&totals) };
    let mut echo = Echo::new(settings, admission, role);
    echo.start(reactor.context()).map_err(|error| error.to_string())?;
    let serve = move || {
        let _running = running;
        let ended = reactor.run(&mut echo);
        echo.report(reactor.context());
        ended
    };
    let thread = thread::Builder::new()
        .name("reactor".to_owned())
        .spawn(serve)
        .map_err(|error| format!("a thread can't be started: {error}; use fewer --threads"))?;
    Ok(Worker { commands, totals, thread: Some(thread) })
}

/// Counts a running thread, and wakes the main thread when it ends, however it ends.
#[derive(Debug)]
struct Running {
    count: Arc<AtomicUsize>,
    main_thread: Waker,
}

impl Running {
    fn new(count: &Arc<AtomicUsize>, main_thread: &Waker) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self { count: Arc::clone(count), main_thread: main_thread.clone() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Release);
        self.main_thread.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::admission::MemoryGuard;
    use crate::args::{Args, Command};
    use clap::Parser;
    use reactor::{Config, Status};

    #[test]
    fn a_worker_that_ends_unexpectedly_ends_the_server() {
        let args = Args::parse_from(["c1000k-server", "--threads", "2"]);
        let Ok(Command::Serve(settings)) = args.check() else { panic!("the arguments are valid") };
        let guard = MemoryGuard::new(settings.memory_reserve, settings.threads);
        let admission = Arc::new(Admission::new(&settings, 10, guard));
        let config = Config { connections_max: 10, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let others = vec![Reactor::new(&config).unwrap()];
        let main_thread = reactor.context().waker();
        let workers = Workers::start(others, &settings, &admission, &main_thread).unwrap();
        workers.workers[0].commands.send(ShutDown).unwrap();

        let sampler = Sampler::start(settings.overload);
        let role = MainThread { admission: Arc::clone(&admission), sampler, workers };
        let mut echo = Echo::new(&settings, &admission, role);
        let deadline = Instant::now() + Duration::from_secs(20);
        while reactor.turn(&mut echo, Some(Duration::from_secs(1))).unwrap() == Status::Running {
            assert!(Instant::now() < deadline, "the main thread does not end");
        }
        assert!(echo.role.workers.shutting_down && echo.role.workers.running() == 0);
        assert_eq!(echo.role.workers.join(), Ok(()));
    }
}
