//! The bystander: a connection that takes no part in the fault, and sends one message after the other.
//!
//! It measures the latency of its echoes, and how much of it the machine caused: how long the server and this thread
//! were runnable and had no processor, and how late this thread was woken.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::unistd::{Pid, gettid};
use procfs::process::{Process, Schedstat};
use serde::{Deserialize, Serialize};

use crate::load::name_of;
use crate::namespace::Namespace;
use crate::sockets::{connect, echo};

const PAUSE: Duration = Duration::from_millis(2);
const MESSAGE: &[u8] = b"bystanderbystanderbystanderbystanderbystanderbystanderbystander";

/// What a bystander measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Latencies {
    pub(crate) echoes: usize,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) max_ms: Option<f64>,
    pub(crate) max_ms_without_waits_for_a_processor: f64,
    pub(crate) oversleep_max_ms: f64,
    pub(crate) lost: Option<String>,
}

/// A running bystander, on its own thread.
#[derive(Debug)]
pub(crate) struct Bystander {
    thread: JoinHandle<Latencies>,
    control: Arc<Control>,
}

#[derive(Debug, Default)]
struct Control {
    is_paused: AtomicBool,
    is_over: AtomicBool,
}

impl Bystander {
    /// Connects, and starts after its first echo.
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
            Some(namespace) => namespace.network.run(first)?,
            None => first()?,
        };
        let control = Arc::<Control>::default();
        let shared = Arc::clone(&control);
        Ok(Self { thread: thread::spawn(move || measure(&stream, server, &shared)), control })
    }

    /// While wake-ups of the server are counted, which its messages cause too.
    pub(crate) fn pause(&self) {
        self.control.is_paused.store(true, Ordering::Relaxed);
    }

    pub(crate) fn resume(&self) {
        self.control.is_paused.store(false, Ordering::Relaxed);
    }

    /// Waits for its last echo, for at most 30 s.
    pub(crate) fn end(self) -> Result<Latencies> {
        self.control.is_over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the bystander panicked"))
    }
}

fn measure(stream: &TcpStream, server: Pid, control: &Control) -> Latencies {
    let own = Process::myself().and_then(|own| own.task_from_tid(gettid().as_raw())).ok();
    let server = Process::new(server.as_raw()).ok();
    // The sum so far; zero if the kernel does not count it.
    let waits_for_a_processor = || {
        let own = own.as_ref().and_then(|task| task.schedstat().ok());
        let server = server.as_ref().and_then(|process| process.schedstat().ok());
        let delays = [own, server].into_iter().flatten();
        Duration::from_nanos(delays.map(|Schedstat { run_delay, .. }| run_delay).sum())
    };
    let mut echoes = Vec::new();
    let (mut oversleep, mut unexplained, mut lost) = (Duration::ZERO, Duration::ZERO, None);
    while !control.is_over.load(Ordering::Relaxed) {
        if control.is_paused.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let waited = waits_for_a_processor();
        let started = Instant::now();
        if let Err(error) = echo(stream, MESSAGE) {
            lost = Some(name_of(&error));
            break;
        }
        let took = started.elapsed();
        echoes.push(took);
        let waited = waits_for_a_processor().saturating_sub(waited);
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
    Latencies {
        echoes: echoes.len(),
        p50_ms: at(50),
        p99_ms: at(99),
        max_ms: at(100),
        max_ms_without_waits_for_a_processor: milliseconds(unexplained),
        oversleep_max_ms: milliseconds(oversleep),
        lost,
    }
}

/// Rounded to hundredths.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}
