//! A randomized simulation: a service that calls any method at any time, on a kernel with all faults.
//!
//! The kernel is `sys/fake.rs`; this module is the service. Both draw their choices from one source: a seed in the unit
//! test, bytes under the fuzzer. Whatever they choose, each guarantee of [`Handler`](crate::Handler) must hold:
//! [`Service`] keeps a record of each connection and checks every callback against it, and
//! [`Context::check_invariants`](crate::Context::check_invariants) checks the reactor's state after each turn. At the end
//! the faults stop. Then everything pending must happen, the reactor must become idle, and nothing may leak.

mod acts;
mod service;

use std::time::Duration;

use crate::config::{Config, FileTable};
use crate::reactor::{Reactor, Status};
use crate::sys::{self, Choices};

use service::{Conn, Service};

/// The number of turns within which a reactor without faults must become idle.
const CALM_TURNS_MAX: u32 = 3000;
const TURNS_MAX: u32 = 60;

/// Runs the simulation with choices from these bytes; panics if a guarantee is violated.
#[cfg(fuzzing)]
pub fn play_bytes(bytes: &[u8]) {
    play(Choices::scripted(bytes));
}

fn play(choices: Choices) {
    sys::boot(choices);
    let config = small_config();
    fail_to_start(&config);
    let mut world = World::new(&config);
    world.live();
    world.calm_down();
    world.shut_down();
    world.end();
    assert_eq!(sys::open_files() + sys::open_rings(), 0, "files have leaked");
}

/// Small bounds, which are often reached.
fn small_config() -> Config {
    let up_to = |bound: u32| 1 + sys::below(bound) as usize;
    let connections_max = up_to(20);
    Config {
        connections_max,
        connects_reserved: sys::below(connections_max as u32) as usize,
        listeners_max: up_to(3),
        timers_max: up_to(6),
        watches_max: up_to(3),
        sweeps_max: up_to(2),
        events_per_wait: up_to(16),
        accepts_per_wake: up_to(5),
        timers_per_turn: up_to(8) as u32,
        closes_per_turn: up_to(6),
        visits_per_turn: up_to(6),
        read_buffer_bytes: up_to(80),
        write_queue_bytes_max: up_to(300),
        write_queues_bytes_max: up_to(900),
        flush_timeout: Duration::from_millis(sys::below(40).into()),
        accept_pause_min: Duration::from_millis(sys::below(5).into()),
        accept_pause_max: Duration::from_millis(sys::below(40).into()),
        file_table: [FileTable::Auto, FileTable::Process, FileTable::Registered]
            [sys::below(3) as usize],
        times_callbacks: sys::percent(20),
    }
}

/// Checks that a reactor that can't be created leaks nothing.
fn fail_to_start(config: &Config) {
    sys::set_faults(40);
    let made = Reactor::<Conn>::new(config);
    sys::set_faults(0);
    drop(made);
    assert_eq!(sys::open_files(), 0, "a reactor that could not be created has leaked files");
}

struct World {
    reactor: Reactor<Conn>,
    service: Service,
    /// The number of files that the reactor uses itself.
    own_files: usize,
}

impl World {
    fn new(config: &Config) -> Self {
        let mut reactor = Reactor::new(config).expect("no faults are injected yet");
        let service = Service::new(reactor.context());
        Self { reactor, service, own_files: sys::open_files() }
    }

    /// Runs turns with faults.
    fn live(&mut self) {
        for _ in 0..4 {
            self.service.act(self.reactor.context(), None);
        }
        let faults = [0, 2, 5, 15][sys::below(4) as usize];
        sys::set_faults(faults);
        if faults > 0 && sys::percent(50) {
            sys::lower_limits();
        }
        let mut turns = 0;
        while turns < TURNS_MAX && sys::has_choices() {
            turns += 1;
            let max_wait = match sys::below(4) {
                0 => None,
                1 => Some(Duration::ZERO),
                _ => Some(Duration::from_millis(sys::below(20).into())),
            };
            self.turn(max_wait);
            for _ in 0..sys::below(4) {
                self.service.act(self.reactor.context(), None);
            }
        }
    }

    fn turn(&mut self, max_wait: Option<Duration>) {
        let broken_before = sys::broken_waits();
        match self.reactor.turn(&mut self.service, max_wait) {
            Ok(status) => {
                self.reactor.context().check_invariants();
                self.service.after_turn(self.reactor.context(), status);
            }
            Err(error) => assert!(sys::broken_waits() > broken_before, "{error}"),
        }
    }

    /// Runs turns without faults: everything pending happens, and the reactor becomes idle.
    fn calm_down(&mut self) {
        sys::calm_down();
        self.service.calm_down(self.reactor.context());
        self.rest();
        self.service.check_at_rest(self.reactor.context());
    }

    /// Makes a turn, by its own wait or by that of another event loop.
    fn rest(&mut self) {
        let embedded = sys::percent(50);
        for _ in 0..CALM_TURNS_MAX {
            if embedded && !sys::wait_outside(self.reactor.next_deadline()) {
                return;
            }
            self.turn(if embedded { Some(Duration::ZERO) } else { None });
            if sys::rests() {
                return;
            }
        }
        panic!("the reactor does not become idle");
    }

    /// Checks that a shutdown ends within its grace period.
    fn shut_down(&mut self) {
        let called = self.reactor.context().now();
        self.service.shutdown(self.reactor.context(), Duration::from_millis(50));
        for _ in 0..CALM_TURNS_MAX {
            let status = self
                .reactor
                .turn(&mut self.service, None)
                .expect("no faults are injected any more");
            self.reactor.context().check_invariants();
            if status == Status::Stopped {
                return self.service.check_shut_down(self.reactor.context(), called);
            }
        }
        panic!("the shutdown does not end");
    }

    fn end(mut self) {
        self.service.let_go(self.reactor.context());
        let cx = self.reactor.context();
        cx.check_invariants();
        assert_eq!(cx.stats().timers_armed, 0, "timers have leaked");
        assert_eq!(cx.connections(), 0);
        let held = sys::open_files();
        // The spare descriptor may be missing, if descriptors had run out.
        assert!(
            held == self.own_files || held + 1 == self.own_files,
            "{held} files are open and not {}",
            self.own_files
        );
        self.service.check_end();
    }
}

#[cfg(test)]
mod tests {
    use std::panic;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    /// The number of seeds, unless `REACTOR_SEEDS` is set.
    const SEEDS: u64 = 3000;

    fn number(variable: &str) -> Option<u64> {
        let text = std::env::var(variable).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
    }

    #[test]
    fn each_guarantee_holds_on_a_faulty_kernel() {
        if let Some(seed) = number("REACTOR_SEED") {
            return play(Choices::seeded(seed));
        }
        let seeds = number("REACTOR_SEEDS").unwrap_or(SEEDS);
        let next = AtomicU64::new(0);
        let play_all = || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds {
                    return;
                }
                if let Err(failure) = panic::catch_unwind(|| play(Choices::seeded(seed))) {
                    eprintln!(
                        "Seed {seed} fails. To replay it with a log:\n    REACTOR_SEED={seed} \
                         REACTOR_TRACE=1 cargo test -p c1000k-reactor --lib simulation -- --nocapture"
                    );
                    next.store(seeds, Ordering::Relaxed);
                    panic::resume_unwind(failure);
                }
            }
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(play_all);
            }
        });
    }
}
