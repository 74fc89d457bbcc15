//! The soak test: holds connections for a long time while many close and open, and checks for growth.

pub(crate) mod churn;
mod evaluate;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use c1000k_host::check::FileTableChoice;
use c1000k_host::command_line::{REACHED, SHORT};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::bystander::Latencies;
use crate::process::{Isolation, Process, isolated};
use crate::record::{self, ServerRecord};
use crate::scenarios::{self, soak::Soak};
use crate::server::{Lab, Server, Setup};
use crate::wait::sleep;

/// Holds connections for a long time while many close and open, and checks for growth
///
/// Each second some connections close (every other one by a reset), as many open, twice as many messages are echoed,
/// and the idle timeout closes connections that have become silent. Descriptors, slots and memory must not grow, and
/// all counts must be exact. The record with its series and a chart go to DIR.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How long connections close and open
    #[arg(long, value_name = "N", default_value_t = 30.0)]
    minutes: f64,
    /// Connections that are held
    #[arg(long, value_name = "N", default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(2..))]
    connections: u32,
    /// Connections that close and open per second
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    churn: u32,
    /// The table that holds the server's sockets
    #[arg(long, value_name = "TABLE", value_enum, default_value = "auto", conflicts_with = "vm")]
    file_table: FileTableChoice,
    /// Run server and peers in a guest, which can hold many more
    #[arg(long)]
    vm: bool,
    /// The directory for the record and the chart
    #[arg(long, value_name = "DIR", default_value = "out/soak")]
    out: PathBuf,
}

impl Arguments {
    fn seconds(&self) -> f64 {
        self.minutes * 60.0
    }

    /// Four times as long as a connection waits until it sends again, because the machine may be slow.
    fn idle_seconds(&self) -> u32 {
        (2 * self.connections / self.churn).max(2)
    }
}

/// What was measured.
#[derive(Debug)]
struct Measurements {
    /// The output of the peers.
    peers: String,
    samples: Vec<ServerSample>,
    server: ServerRecord,
    bystander: Option<Latencies>,
}

/// What the server uses at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ServerSample {
    pub(crate) seconds: f64,
    /// In a guest the open files of all processes, of both ends.
    pub(crate) descriptors: u64,
    pub(crate) rss_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kernel_slab_bytes: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    fs::create_dir_all(&arguments.out)?;
    let measurements = if arguments.vm { in_guest(arguments)? } else { natively(arguments)? };
    let record = evaluate::evaluate(arguments, measurements)?;
    fs::write(arguments.out.join("soak.json"), serde_json::to_string_pretty(&record)? + "\n")?;
    record.draw(&arguments.out)?;
    for check in record.checks() {
        println!("{:8} {}", if check.holds { "holds" } else { "FAILS" }, check.what);
    }
    let all_hold = record.checks().iter().all(|check| check.holds);
    Ok(ExitCode::from(if all_hold { REACHED } else { SHORT }))
}

fn natively(arguments: &Arguments) -> Result<Measurements> {
    let lab = Lab::new(arguments.file_table)?;
    let idle = format!("{}s", arguments.idle_seconds());
    let setup = Setup { arguments: &["--idle-timeout", &idle], ..Setup::default() };
    let server = Server::start(&lab, &setup)?;
    let folder = tempfile::tempdir()?;
    let ports = server.ports();
    let mut command = isolated(&Isolation::default(), env::current_exe()?)?;
    command
        .args(["churn", &ports.ip.to_string(), &ports.first.to_string()])
        .args([arguments.connections.to_string(), arguments.seconds().to_string()])
        .args(["--ports", &ports.count.to_string(), "--churn", &arguments.churn.to_string()]);
    let peers = Process::spawn_logged("peers", &mut command, folder.path().join("peers"))?;
    let samples = sample(&server, &peers, Duration::from_secs_f64(arguments.seconds() + 600.0))?;
    let output = peers.log()?;
    drop(peers);
    for complaint in output.lines().filter(|line| !line.starts_with('{')) {
        eprintln!("{complaint}");
    }
    let ended = server.end()?;
    Ok(Measurements {
        peers: output,
        samples,
        server: ended.record.context("the server wrote no record")?,
        bystander: ended.bystander,
    })
}

/// Samples once a second until the peers have ended.
fn sample(server: &Server, peers: &Process, timeout: Duration) -> Result<Vec<ServerSample>> {
    let started = Instant::now();
    let mut samples = Vec::new();
    while peers.is_running() && started.elapsed() < timeout {
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

/// As one of the scenarios, with the same checks as natively.
fn in_guest(arguments: &Arguments) -> Result<Measurements> {
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
    Ok(Measurements {
        peers: fs::read_to_string(guest.join("peers.log"))?,
        samples: guest_samples(&fs::read_to_string(guest.join("samples.log"))?)?,
        server: record::server(&guest.join("server.json"))?,
        bystander: None,
    })
}

/// Each line is a sample; the last one may be incomplete, because the guest ends while it is written.
fn guest_samples(log: &str) -> Result<Vec<ServerSample>> {
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_guest_end_where_they_are_cut() {
        let line = |seconds: u32| {
            format!(
                r#"{{"seconds":{seconds},"descriptors":300,"rss_bytes":4000,"kernel_slab_bytes":20}}"#
            ) + "\n"
        };
        let log = line(0) + &line(5);
        let samples = guest_samples(&(log.clone() + &line(10)[..30])).unwrap();
        assert_eq!(samples.len(), 2);
        assert_eq!((samples[1].seconds, samples[1].rss_bytes), (5.0, 4000));
        assert!(guest_samples(&(log + "5 300\n")).is_err());
    }
}
