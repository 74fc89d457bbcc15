//! The compared servers, and one round of the comparison: ramps, then echoes on all connections, then on a few.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::process::{self, Load, Server};
use crate::sampler::{self, Sample, Sampler};

/// A compared server.
#[derive(Clone, Debug)]
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
}

/// The size of the measurement.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Size {
    pub(crate) rounds: usize,
    pub(crate) connections: usize,
    pub(crate) ports: u16,
    /// How often all connections are opened in a round.
    pub(crate) ramps: usize,
    /// Messages per connection while all are active.
    pub(crate) messages_all: usize,
    /// The number of active connections in the phase with few of them.
    pub(crate) active_few: usize,
    /// Messages per connection in that phase.
    pub(crate) messages_few: usize,
}

/// The paths and ports of a measurement.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// The compiled C programs.
    pub(crate) programs: PathBuf,
    /// This program.
    pub(crate) own: PathBuf,
    /// The folder for temporary files.
    pub(crate) scratch: PathBuf,
    pub(crate) first_port: u16,
    pub(crate) ports: u16,
    pub(crate) perf: bool,
}

impl Setting {
    /// Starts a contestant, possibly under a tool, as soon as the ports are free: io_uring releases them some time after
    /// its process has exited.
    pub(crate) fn server(&self, tool: &[String], contestant: &Contestant) -> io::Result<Server> {
        process::wait_until("the ports are still in use", || {
            Ok((self.first_port..self.first_port + self.ports)
                .all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()))
        })?;
        Server::start(tool, &contestant.command)
    }

    pub(crate) fn load(&self) -> io::Result<Load> {
        Load::start(&self.programs.join("load"), self.first_port, self.ports)
    }

    /// One of the C programs as a server.
    pub(crate) fn floor(&self, name: &str, program: &str, more: &[&str]) -> Contestant {
        let mut command = vec![self.programs.join(program).display().to_string()];
        command.extend(self.ports_text());
        command.extend(more.iter().map(|&text| text.to_owned()));
        Contestant { name: name.to_owned(), command }
    }

    /// One of the Rust servers.
    pub(crate) fn library(&self, library: &str, more: &[&str]) -> Contestant {
        let mut command =
            vec![self.own.display().to_string(), "serve".to_owned(), library.to_owned()];
        command.extend(self.ports_text());
        command.extend(more.iter().map(|&text| text.to_owned()));
        let name =
            if more.is_empty() { library.to_owned() } else { format!("{library}, idle timeout") };
        Contestant { name, command }
    }

    fn ports_text(&self) -> [String; 2] {
        [self.first_port.to_string(), self.ports.to_string()]
    }

    /// The floor, the reactor, and the other libraries.
    pub(crate) fn contestants(&self) -> Vec<Contestant> {
        let libraries = ["reactor", "registered", "mio", "polling", "tokio", "monoio"];
        let floor = self.floor("floor", "floor", &[]);
        std::iter::once(floor).chain(libraries.map(|library| self.library(library, &[]))).collect()
    }

    /// Prototypes in C that use other kernel interfaces.
    pub(crate) fn prototypes(&self) -> Vec<Contestant> {
        vec![
            self.floor("floor", "floor", &[]),
            self.floor("1 accept a wake", "floor", &["1"]),
            self.floor("8 accepts a wake", "floor", &["8"]),
            self.floor("1024 accepts a wake", "floor", &["1024"]),
            self.floor("edge-triggered", "floor", &["64", "edge"]),
            self.floor("io_uring", "uring", &[]),
        ]
    }
}

/// The result of one contestant in one round.
#[derive(Debug, Serialize)]
pub(crate) struct Result {
    pub(crate) contestant: String,
    pub(crate) round: usize,
    pub(crate) phases: Vec<Phase>,
}

/// The cost of one phase of a round.
#[derive(Debug, Serialize)]
pub(crate) struct Phase {
    pub(crate) name: String,
    /// The number of connections or messages.
    pub(crate) operations: u64,
    /// The duration as measured by the load generator.
    pub(crate) seconds: f64,
    /// The server's CPU time, exact.
    pub(crate) cpu_ns: u64,
    /// User and system time as accounted by the clock tick, in ticks of 10 ms.
    pub(crate) ticks_user: u64,
    pub(crate) ticks_system: u64,
    /// User and system time as sampled by perf, in samples.
    pub(crate) samples_user: u64,
    pub(crate) samples_system: u64,
    pub(crate) latency_us: Option<Latency>,
}

/// The latency of messages, from the send to the echo.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl Phase {
    /// The share of the CPU time in user space, by perf, or by the clock tick if perf is not available.
    fn user_share(&self) -> f64 {
        let (user, system) = match self.samples_user + self.samples_system {
            0 => (self.ticks_user, self.ticks_system),
            _ => (self.samples_user, self.samples_system),
        };
        user as f64 / ((user + system).max(1)) as f64
    }

    pub(crate) fn user_ns_each(&self) -> f64 {
        self.cpu_ns as f64 * self.user_share() / self.operations as f64
    }

    pub(crate) fn system_ns_each(&self) -> f64 {
        self.cpu_ns as f64 * (1.0 - self.user_share()) / self.operations as f64
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.operations as f64 / self.seconds
    }
}

/// A completed phase, and its time.
struct Measured {
    phase: Phase,
    from_ns: u64,
    to_ns: u64,
}

/// Runs one round of one contestant.
pub(crate) fn run(
    setting: &Setting,
    size: &Size,
    contestant: &Contestant,
    round: usize,
) -> io::Result<Result> {
    let server = setting.server(&[], contestant)?;
    let mut load = setting.load()?;
    let sampler =
        setting.perf.then(|| Sampler::start(server.id(), &setting.scratch)).transpose()?;
    let mut measured = Vec::new();
    for ramp in 0..size.ramps {
        measured.push(measure(&server, &mut load, "ramp", &format!("open {}", size.connections))?);
        if ramp + 1 < size.ramps {
            load.command("close")?;
            server.wait_until_idle()?;
        }
    }
    for (name, active, each) in [
        ("echo, all active", size.connections, size.messages_all),
        ("echo, 1% active", size.active_few, size.messages_few),
    ] {
        let file = setting.scratch.join("latencies");
        let command = format!("echo {active} {each} {}", file.display());
        let mut part = measure(&server, &mut load, name, &command)?;
        part.phase.latency_us = Some(latency(&file)?);
        measured.push(part);
    }
    let samples = sampler.map(Sampler::stop).transpose()?.unwrap_or_default();
    let phases = measured.into_iter().map(|part| with_samples(part, &samples)).collect();
    Ok(Result { contestant: contestant.name.clone(), round, phases })
}

fn measure(server: &Server, load: &mut Load, name: &str, command: &str) -> io::Result<Measured> {
    server.wait_until_idle()?;
    let from_ns = sampler::now_ns()?;
    let (cpu_before, ticks_before) = (server.cpu_ns()?, server.ticks()?);
    let (operations, time) = load.command(command)?;
    server.wait_until_idle()?;
    let (cpu_after, ticks_after) = (server.cpu_ns()?, server.ticks()?);
    let phase = Phase {
        name: name.to_owned(),
        operations,
        seconds: time.as_secs_f64(),
        cpu_ns: cpu_after - cpu_before,
        ticks_user: ticks_after.0 - ticks_before.0,
        ticks_system: ticks_after.1 - ticks_before.1,
        samples_user: 0,
        samples_system: 0,
        latency_us: None,
    };
    Ok(Measured { phase, from_ns, to_ns: sampler::now_ns()? })
}

fn with_samples(measured: Measured, samples: &[Sample]) -> Phase {
    let Measured { mut phase, from_ns, to_ns } = measured;
    let within = samples.iter().filter(|sample| (from_ns..to_ns).contains(&sample.at_ns));
    for sample in within {
        if sample.in_kernel {
            phase.samples_system += 1;
        } else {
            phase.samples_user += 1;
        }
    }
    phase
}

fn latency(file: &Path) -> io::Result<Latency> {
    let mut histogram =
        Histogram::<u64>::new_with_max(u64::from(u32::MAX), 3).map_err(io::Error::other)?;
    for ns in fs::read(file)?.chunks_exact(4) {
        histogram.saturating_record(u64::from(u32::from_le_bytes([ns[0], ns[1], ns[2], ns[3]])));
    }
    let us = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Latency { p50: us(0.5), p99: us(0.99), p999: us(0.999), max: us(1.0) })
}
