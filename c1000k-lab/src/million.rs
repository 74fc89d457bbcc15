//! Runs server and clients against each other, natively if this machine allows it, otherwise in guests, and collects
//! the records.

mod capacity;
mod hosts;
mod native;
pub(crate) mod plan;
pub(crate) mod teardown;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use c1000k_host::check::{Requirements, predict};
use c1000k_host::command_line::{self, USAGE};
use c1000k_host::format;
use c1000k_report::Report;
use c1000k_report::run::{Run, Topology};
use clap::Args;

use crate::guest::million as guest;
use crate::namespace::Privilege;
use crate::print_line;
use crate::process::{Isolation, Process, isolated};
use crate::programs::{Programs, date, date_for_name, revision, root};
use crate::snapshot::describe_machine;
use crate::wait;
use plan::Plan;

/// For the first touch of a virtual machine's memory.
const TOUCH_SECONDS_PER_GB: u64 = 60;

/// Holds N TCP connections with one single-threaded reactor, and verifies them
///
/// Server and clients run against each other. Records, logs, snapshots of the kernel's figures and a summary go to a
/// directory. Exits as the client does: 0 if the target was reached and verified, 1 if not, 2 for wrong usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Connections, as in 15000, 10k or 1M
    #[arg(value_name = "N", default_value = "1M", value_parser = plan::parse_connections)]
    connections: u64,
    /// Run on this machine
    #[arg(long, conflicts_with = "vm")]
    native: bool,
    /// Run in virtual machines, which this boots; by default only if N does not fit natively
    #[arg(long)]
    vm: bool,
    /// Both ends on one host, or a server and two clients on three
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Topology::OneHost)]
    topology: Topology,
    /// Clients without sockets: one program simulates all of them over a tun device
    #[arg(long, conflicts_with_all = ["vm", "topology", "memory"])]
    stateless: bool,
    /// Memory of the virtual machines together, as in 14G or 900M
    #[arg(long, value_name = "SIZE", value_parser = plan::parse_mebibytes)]
    memory: Option<u64>,
    /// The server's part of it (three-hosts), by default half
    #[arg(long, value_name = "SIZE", requires = "memory", value_parser = plan::parse_mebibytes)]
    server_memory: Option<u64>,
    /// Before the run, write as much memory as it will need: in a virtual machine the first touch may be slow, and
    /// would slow down the ramp
    #[arg(long)]
    warm: bool,
    /// A new directory, by default out/million-N-DATE
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Where the connections are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    /// With the privilege to create network namespaces, if the run needs some.
    Native(Option<Privilege>),
    Guests,
}

impl Where {
    fn name(self) -> &'static str {
        match self {
            Self::Native(_) => "native",
            Self::Guests => "vm",
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Arguments { connections, topology, stateless, memory, server_memory, .. } = *arguments;
    if server_memory.is_some() && (topology == Topology::OneHost || server_memory >= memory) {
        let line = "--server-memory is a part of --memory, with --topology three-hosts; see --help";
        return Ok(command_line::fail(USAGE, line));
    }
    let out =
        std::path::absolute(arguments.out.clone().unwrap_or_else(|| out_default(connections)))?;
    let mut plan = Plan {
        connections,
        topology,
        stateless,
        memory_mb: memory,
        server_memory_mb: server_memory,
        out,
    };
    let place = decide(arguments, &plan)?;
    if place == Where::Guests {
        plan.memory_mb = Some(guest::prepare(&plan)?);
    }
    make_folder(&plan.out)?;
    let programs = match place {
        Where::Native(_) => Programs::find("MILLION_BINARIES")?,
        Where::Guests => Programs::for_guests()?,
    };
    fs::write(plan.out.join("machine.txt"), machine(&plan, arguments.warm, place)?)?;
    if let Where::Native(Some(privilege)) = place {
        privilege.enter()?;
    }
    wait::handle_interrupts()?;
    if arguments.warm {
        touch_first(&plan)?;
    }
    let count = format::count(connections);
    print_line(format!(
        "{count} connections, {}, {}: {}",
        topology.name(),
        place.name(),
        plan.out.display()
    ));
    let code = match place {
        Where::Native(_) => native::run(&plan, &programs)?,
        Where::Guests => guest::run(&plan, programs)?,
    };
    match summarize(&plan.out) {
        Ok(text) => print_line(text),
        Err(why) => print_line(format!("there is no summary: {why}")),
    }
    match code {
        0 => print_line(format!("reached: {count} connections held and verified")),
        _ => print_line("not reached: see the client's last lines above"),
    }
    print_line(format!("records, logs and snapshots: {}", plan.out.display()));
    Ok(ExitCode::from(code))
}

/// If `--native` was given, a limit of descriptors, files or watches only lowers the number of connections; too little
/// memory and ports in use prevent the run.
fn decide(arguments: &Arguments, plan: &Plan) -> Result<Where> {
    if arguments.vm {
        return Ok(Where::Guests);
    }
    let obstacles = capacity::obstacles(plan)?;
    let needs_namespaces = plan.topology == Topology::ThreeHosts || plan.stateless;
    let privilege = if needs_namespaces { Privilege::find() } else { None };
    let no_namespaces = (needs_namespaces && privilege.is_none()).then_some(
        "network namespaces need ip and unshare (Debian: apt-get install iproute2 util-linux), and root or user \
         namespaces",
    );
    if !arguments.native && !plan.stateless {
        let reason = obstacles.first().map(|obstacle| obstacle.line.as_str()).or(no_namespaces);
        let Some(reason) = reason else { return Ok(Where::Native(privilege)) };
        print_line(format!("in a virtual machine, because natively {reason}"));
        return Ok(Where::Guests);
    }
    let alternative = if plan.stateless { "" } else { "; or run with --vm instead of --native" };
    for obstacle in &obstacles {
        print_line(format!("capped: {}{alternative}", obstacle.line));
    }
    if let Some(reason) = obstacles.iter().find_map(|obstacle| obstacle.prevents) {
        bail!("not started: {reason}");
    }
    if let Some(reason) = no_namespaces {
        bail!("{reason}{alternative}");
    }
    if !obstacles.is_empty() {
        print_line("opening the maximum that fits");
    }
    Ok(Where::Native(privilege))
}

fn out_default(connections: u64) -> PathBuf {
    let name = match connections {
        millions if millions.is_multiple_of(1_000_000) => format!("{}M", millions / 1_000_000),
        thousands if thousands.is_multiple_of(1_000) => format!("{}k", thousands / 1_000),
        single => single.to_string(),
    };
    root().join(format!("out/million-{name}-{}", date_for_name()))
}

fn make_folder(out: &Path) -> Result<()> {
    let shown = out.display();
    fs::create_dir_all(out)
        .map_err(|error| anyhow!("can't create the directory {shown}: {error}"))?;
    if fs::read_dir(out)?.next().is_some() {
        bail!(
            "{shown} is not empty: use a new directory for --out, so that no record is overwritten"
        );
    }
    Ok(())
}

/// The text of `machine.txt`: the run and the machine.
fn machine(plan: &Plan, is_warm: bool, place: Where) -> Result<String> {
    let folder = env::var("MILLION_BINARIES").map(|folder| format!("MILLION_BINARIES={folder} "));
    let arguments: Vec<String> =
        env::args_os().skip(2).map(|argument| argument.display().to_string()).collect();
    let lines = [
        format!("command: {}scripts/million {}", folder.unwrap_or_default(), arguments.join(" ")),
        format!("where: {}", place.name()),
        format!("topology: {}", plan.topology.name()),
        format!("clients: {}", if plan.stateless { "stateless" } else { "with sockets" }),
        format!("date: {}", date()),
        format!("git: {}", revision()),
        format!("target: {}", plan.connections),
        format!("memory touched before the run: {}\n", if is_warm { "yes" } else { "no" }),
    ];
    // A guest's description is added when it has booted.
    let machine = match place {
        Where::Native(_) => format!("accel: none\n{}", describe_machine()?),
        Where::Guests => String::new(),
    };
    Ok(lines.join("\n") + &machine)
}

/// Starts a process that writes as much memory as the run will need, and ends.
fn touch_first(plan: &Plan) -> Result<()> {
    let bytes = plan.memory_mb.map_or_else(
        || predict(&Requirements::new(plan.role(), plan.connections)).total_bytes(),
        |size| size << 20,
    );
    print_line(format!("touching {} of memory first", format::bytes(bytes)));
    let place = Isolation { is_killed_first: true, ..Isolation::default() };
    let mut command = isolated(&place, env::current_exe()?)?;
    let mut process = Process::spawn("memory", command.arg("touch").arg(bytes.to_string()))?;
    let timeout = Duration::from_secs(TOUCH_SECONDS_PER_GB * (1 + bytes / 1_000_000_000));
    if process.wait(timeout)? != 0 {
        bail!("the memory could not be touched");
    }
    Ok(())
}

/// Writes the summary of the run, and returns its verdict, which does not affect the exit code.
fn summarize(out: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let report = Report::new(Run::read(out)?)?;
    report.write(out)?;
    Ok(format!("{}\n{}", report.verdict(), Report::pages(out)))
}
