//! A connection that is no part of the fault and sends one message after the other, all the time.
//!
//! It measures how long its echoes take, and how much of a delay is the machine's and not the server's: how long the
//! server and this thread waited for a processor while they were runnable, and how much longer than asked this thread
//! slept.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::crowd::name_of;
use crate::namespace::Namespace;
use crate::sockets::{connect, echo};

const PAUSE: Duration = Duration::from_millis(2);
const MESSAGE: &[u8] = b"bystanderbystanderbystanderbystanderbystanderbystanderbystander";

/// What a bystander has measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) echoes: usize,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) max_ms: Option<f64>,
    pub(crate) max_ms_without_waits_for_a_processor: f64,
    pub(crate) oversleep_max_ms: f64,
    pub(crate) lost: Option<String>,
}

/// A running bystander, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Bystander {
    thread: JoinHandle<Seen>,
    switches: Arc<Switches>,
}

#[derive(Debug, Default)]
struct Switches {
    is_silent: AtomicBool,
    is_over: AtomicBool,
}

impl Bystander {
    /// Connects, and begins once the first echo has come back.
    pub(crate) fn start(
        to: SocketAddr,
        server: Pid,
        namespace: Option<&Namespace>,
    ) -> Result<Self> {
        let first = || {
            let stream = connect(to)?;
            echo(&stream, MESSAGE)?;
            Ok(stream)
        };
        let stream = match namespace {
            Some(namespace) => namespace.there.run(first)?,
            None => first()?,
        };
        let switches = Arc::<Switches>::default();
        let given = Arc::clone(&switches);
        Ok(Self { thread: thread::spawn(move || watch(&stream, server, &given)), switches })
    }

    /// Its messages wake the server too.
    pub(crate) fn pause(&self) {
        self.switches.is_silent.store(true, Ordering::Relaxed);
    }

    pub(crate) fn resume(&self) {
        self.switches.is_silent.store(false, Ordering::Relaxed);
    }

    /// Waits for its last echo, half a minute at most.
    pub(crate) fn end(self) -> Result<Seen> {
        self.switches.is_over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the bystander panicked"))
    }
}

fn watch(stream: &TcpStream, server: Pid, switches: &Switches) -> Seen {
    let schedules = ["/proc/thread-self/schedstat".to_owned(), format!("/proc/{server}/schedstat")];
    let schedules: Vec<File> = schedules.iter().filter_map(|path| File::open(path).ok()).collect();
    let mut echoes = Vec::new();
    let (mut oversleep, mut unexplained, mut lost) = (Duration::ZERO, Duration::ZERO, None);
    while !switches.is_over.load(Ordering::Relaxed) {
        if switches.is_silent.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let waited = waits_for_a_processor(&schedules);
        let started = Instant::now();
        if let Err(error) = echo(stream, MESSAGE) {
            lost = Some(name_of(&error));
            break;
        }
        let took = started.elapsed();
        echoes.push(took);
        let waited = waits_for_a_processor(&schedules).saturating_sub(waited);
        unexplained = unexplained.max(took.saturating_sub(waited));
        let started = Instant::now();
        thread::sleep(PAUSE);
        oversleep = oversleep.max(started.elapsed().saturating_sub(PAUSE));
    }
    echoes.sort_unstable();
    let at = |percent: usize| {
        let last = echoes.len().checked_sub(1)?;
        Some(milliseconds(echoes[percent * last / 100]))
    };
    Seen {
        echoes: echoes.len(),
        p50_ms: at(50),
        p99_ms: at(99),
        max_ms: at(100),
        max_ms_without_waits_for_a_processor: milliseconds(unexplained),
        oversleep_max_ms: milliseconds(oversleep),
        lost,
    }
}

/// The sum so far; zero where the kernel does not count them.
fn waits_for_a_processor(schedules: &[File]) -> Duration {
    let waits = schedules.iter().map(|schedule| {
        let mut buffer = [0; 128];
        let count = schedule.read_at(&mut buffer, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&buffer[..count]);
        text.split_whitespace().nth(1).and_then(|waited| waited.parse().ok()).unwrap_or(0)
    });
    Duration::from_nanos(waits.sum())
}

/// Rounded to a hundredth.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}
