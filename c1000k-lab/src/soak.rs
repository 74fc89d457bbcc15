//! Holds connections for a long time while many close and open, and looks for what grows.

pub(crate) mod churn;
mod judge;

use std::env;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::check::FileTableChoice;
use c1000k_host::command_line::SHORT;
use c1000k_host::limits::raise_descriptor_limit;
use clap::Args;
use serde::Serialize;

use crate::bystander::Seen;
use crate::patience::{self, sleep};
use crate::process::{Place, Process, inside};
use crate::programs::Programs;
use crate::record::{self, ServerRecord};
use crate::scenarios::{self, soak::Soak};
use crate::server::{Lab, Server, Setup};

/// Holds connections for a long time while many close and open, and looks for what grows
///
/// Each second some connections close (every other one by a reset), as many open, twice as many messages are echoed,
/// and the idle timeout closes those that have fallen silent. At the end descriptors, slots and memory must be flat and
/// all counts agree exactly. The record, the series and a chart of it go to DIR.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How long they close and open
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    #[arg(long, default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(2..))]
    connections: u32,
    /// Closes and opens a second
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    churn: u32,
    /// Where the server's sockets are held
    #[arg(long, value_name = "TABLE", value_enum, default_value = "auto", conflicts_with = "vm")]
    file_table: FileTableChoice,
    /// Server and peers run in a guest, where many more fit
    #[arg(long)]
    vm: bool,
    #[arg(long, value_name = "DIR", default_value = "out/soak")]
    out: PathBuf,
}

impl Arguments {
    fn seconds(&self) -> f64 {
        self.minutes * 60.0
    }

    /// Four times as long as a connection waits for its turn to send, for the machine may be slow.
    fn idle_seconds(&self) -> u32 {
        (2 * self.connections / self.churn).max(2)
    }
}

/// What was measured in a soak.
#[derive(Debug)]
struct Observed {
    /// What the peers printed.
    peers: String,
    samples: Vec<ServerSample>,
    server: ServerRecord,
    bystander: Option<Seen>,
}

/// What the server uses at one moment.
#[derive(Debug, Clone, Serialize)]
struct ServerSample {
    seconds: f64,
    /// In a guest all files that are open there, of both ends.
    descriptors: u64,
    rss_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel_slab_bytes: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    fs::create_dir_all(&arguments.out)?;
    let observed = if arguments.vm { in_guest(arguments)? } else { natively(arguments)? };
    let record = judge::judge(arguments, observed)?;
    fs::write(arguments.out.join("soak.json"), serde_json::to_string_pretty(&record)? + "\n")?;
    record.draw(&arguments.out)?;
    for check in record.checks() {
        println!("{:8} {}", if check.holds { "holds" } else { "FAILS" }, check.what);
    }
    let is_right = record.checks().iter().all(|check| check.holds);
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(SHORT) })
}

fn natively(arguments: &Arguments) -> Result<Observed> {
    patience::take_interrupts()?;
    raise_descriptor_limit()?;
    let lab = Lab {
        programs: Programs::find("FAULTS_BINARIES")?,
        file_table: arguments.file_table.as_str(),
    };
    let idle = format!("{}s", arguments.idle_seconds());
    let setup = Setup { arguments: &["--idle-timeout", &idle], ..Setup::default() };
    let server = Server::start(&lab, &setup)?;
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("peers");
    let ports = server.ports();
    let mut command = inside(&Place::default(), env::current_exe()?)?;
    command
        .args(["churn", &ports.ip.to_string(), &ports.first.to_string()])
        .args([arguments.connections.to_string(), arguments.seconds().to_string()])
        .args(["--ports", &ports.count.to_string(), "--churn", &arguments.churn.to_string()])
        .stdout(File::create(&log)?);
    let peers = Process::spawn("crowd", &mut command)?;
    let samples = watch(&server, &peers, Duration::from_secs_f64(arguments.seconds() + 600.0))?;
    drop(peers);
    let ended = server.end()?;
    Ok(Observed {
        peers: fs::read_to_string(log)?,
        samples,
        server: ended.record.context("the server left no record")?,
        bystander: ended.bystander,
    })
}

/// Samples once a second until the peers have ended.
fn watch(server: &Server, peers: &Process, within: Duration) -> Result<Vec<ServerSample>> {
    let started = Instant::now();
    let mut samples = Vec::new();
    while peers.is_running() && started.elapsed() < within {
        samples.push(ServerSample {
            seconds: started.elapsed().as_secs_f64(),
            descriptors: server.descriptors()? as u64,
            rss_bytes: server.rss_bytes()?,
            kernel_slab_bytes: None,
        });
        sleep(Duration::from_secs(1))?;
    }
    Ok(samples)
}

/// As one of the scenarios; it is judged by the same checks as natively.
fn in_guest(arguments: &Arguments) -> Result<Observed> {
    let folder = arguments.out.canonicalize()?;
    scenarios::run_soak(
        &folder,
        Soak {
            seconds: arguments.seconds().round() as u64,
            connections: arguments.connections.into(),
            churn: arguments.churn.into(),
            idle_seconds: arguments.idle_seconds().into(),
        },
    )?;
    let guest = folder.join("guest-soak");
    Ok(Observed {
        peers: fs::read_to_string(guest.join("peers.log"))?,
        samples: guest_samples(&fs::read_to_string(guest.join("samples.log"))?)?,
        server: record::server(&guest.join("server.json"))?,
        bystander: None,
    })
}

/// A line each: seconds, files, the process's memory in kB, and the kernel's slabs in kB.
fn guest_samples(log: &str) -> Result<Vec<ServerSample>> {
    let mut samples: Vec<ServerSample> = Vec::new();
    let mut first = None;
    for line in log.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // The last one may be cut off at the server's end.
        let [seconds, files, rss_kb, slab_kb] = words[..] else { break };
        let seconds: f64 = seconds.parse()?;
        let began = *first.get_or_insert(seconds);
        samples.push(ServerSample {
            seconds: seconds - began,
            descriptors: files.parse()?,
            rss_bytes: rss_kb.parse::<u64>()? << 10,
            kernel_slab_bytes: Some(slab_kb.parse::<u64>()? << 10),
        });
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_guest_begin_at_zero_and_end_where_they_are_cut() {
        let samples = guest_samples("10.5 300 4000 20\n15.5 301 4004 21\n20.5 302\n").unwrap();
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].seconds, 0.0);
        assert_eq!((samples[1].seconds, samples[1].rss_bytes), (5.0, 4004 << 10));
    }
}
