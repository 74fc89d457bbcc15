//! Runs server and clients against each other, natively where this machine allows it and else in guests, and keeps the
//! records.

mod capacity;
mod hosts;
mod native;
pub(crate) mod plan;
mod teardown;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use c1000k_host::check::{Requirements, predict};
use c1000k_host::command_line::{self, USAGE};
use c1000k_host::format;
use c1000k_report::Report;
use c1000k_report::run::{Run, Topology};
use clap::Args;
use procfs::Current;

use crate::guest::million as guest;
use crate::namespace::Maker;
use crate::patience;
use crate::process::{Place, Process, inside};
use crate::programs::{Programs, date, date_for_name, revision, root};
use crate::say;
use plan::Plan;

/// For each GB, on a machine that has never touched its memory before.
const TOUCHED_WITHIN_PER_GB: u64 = 60;

/// Holds N TCP connections with one single-threaded reactor, and proves it
///
/// Server and clients run against each other, and records, logs and snapshots of the kernel go to a folder with a page
/// about the run. Exits as the client does: 0 target reached and verified, 1 short of it, 2 wrong usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Connections, as in 15000, 10k or 1M
    #[arg(value_name = "N", default_value = "1M", value_parser = plan::parse_connections)]
    connections: u64,
    /// On this machine itself
    #[arg(long, conflicts_with = "vm")]
    native: bool,
    /// In a virtual machine that this boots; by default natively where N fits, and else so
    #[arg(long)]
    vm: bool,
    /// Which ends are on which host
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Topology::OneHost)]
    topology: Topology,
    /// The clients have no sockets: one program is all of them, by a tun device
    #[arg(long, conflicts_with_all = ["vm", "topology", "memory"])]
    stateless: bool,
    /// Of the virtual machine, or of all three together; as in 14G, 900M
    #[arg(long, value_name = "SIZE", value_parser = plan::parse_mebibytes)]
    memory: Option<u64>,
    /// Of these for the server (three-hosts): half if left out
    #[arg(long, value_name = "SIZE", requires = "memory", value_parser = plan::parse_mebibytes)]
    server_memory: Option<u64>,
    /// Touch as much memory first as the run will need: on a virtual machine, memory that is touched for the first time
    /// may be slow, and then the ramp is, by no fault of the software
    #[arg(long)]
    warm: bool,
    /// A new folder; out/million-N-DATE if left out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Where the connections are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Native(Option<Maker>),
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
    if let Where::Native(Some(maker)) = place {
        maker.prepare()?;
    }
    patience::take_interrupts()?;
    if arguments.warm {
        touch_first(&plan)?;
    }
    let count = format::count(connections);
    say(format!(
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
        Ok(text) => say(text),
        Err(why) => say(format!("there is no summary: {why}")),
    }
    match code {
        0 => say(format!("reached: {count} connections held and verified")),
        _ => say(format!("short of {count}: see the last lines of the client above")),
    }
    say(format!("records, logs and snapshots: {}", plan.out.display()));
    Ok(ExitCode::from(code))
}

/// With too few descriptors, files or watches a native run that was asked for is tried as far as it goes; with too little
/// memory, or its ports in use, it is not.
fn decide(arguments: &Arguments, plan: &Plan) -> Result<Where> {
    if arguments.vm {
        return Ok(Where::Guests);
    }
    let obstacles = capacity::obstacles(plan)?;
    let has_hosts = plan.topology == Topology::OneHost && !plan.stateless;
    let maker = if has_hosts { None } else { Maker::find() };
    let no_hosts = (!has_hosts && maker.is_none()).then_some(
        "hosts that are network namespaces need ip and unshare (Debian: apt-get install iproute2 util-linux), and \
         root or user namespaces",
    );
    if !arguments.native && !plan.stateless {
        let why = obstacles.first().map(|obstacle| obstacle.line.as_str()).or(no_hosts);
        return Ok(match why {
            None => Where::Native(maker),
            Some(why) => {
                say(format!("a virtual machine, for natively {why}"));
                Where::Guests
            }
        });
    }
    let in_guests = words(arguments, plan).join(" ");
    for obstacle in &obstacles {
        match plan.stateless {
            true => say(format!("capped: {}", obstacle.line)),
            false => say(format!(
                "capped: {}; or without changing this machine: scripts/million {in_guests}",
                obstacle.line
            )),
        }
    }
    if let Some(why) = obstacles.iter().find_map(|obstacle| obstacle.stops) {
        bail!("not started: {why}");
    }
    if let Some(why) = no_hosts {
        bail!("{why}{}", if plan.stateless { "" } else { "; or run with --vm" });
    }
    if !obstacles.is_empty() {
        say("trying as far as it goes");
    }
    Ok(Where::Native(maker))
}

/// The options for the same run in guests.
fn words(arguments: &Arguments, plan: &Plan) -> Vec<String> {
    let mut words = vec![plan.connections.to_string(), "--vm".to_owned()];
    if plan.topology == Topology::ThreeHosts {
        words.extend(["--topology", plan.topology.name()].map(str::to_owned));
    }
    let sizes = [("--memory", plan.memory_mb), ("--server-memory", plan.server_memory_mb)];
    for (name, mebibytes) in sizes {
        words.extend(mebibytes.iter().flat_map(|size| [name.to_owned(), format!("{size}M")]));
    }
    if arguments.warm {
        words.push("--warm".to_owned());
    }
    words
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
    fs::create_dir_all(out).map_err(|error| anyhow!("can't make the folder {shown}: {error}"))?;
    if fs::read_dir(out)?.next().is_some() {
        bail!("{shown} is not empty: give --out a new folder, so that no record is overwritten");
    }
    Ok(())
}

/// The run and the machine, a line for each thing.
fn machine(plan: &Plan, is_warm: bool, place: Where) -> Result<String> {
    let folder = env::var("MILLION_BINARIES").map(|folder| format!("MILLION_BINARIES={folder} "));
    let words: Vec<String> =
        env::args_os().skip(2).map(|word| word.display().to_string()).collect();
    let kernel = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}"));
    let mut lines = vec![
        format!("command: {}scripts/million {}", folder.unwrap_or_default(), words.join(" ")),
        format!("where: {}", place.name()),
        format!("topology: {}", plan.topology.name()),
        format!("clients: {}", if plan.stateless { "stateless" } else { "with sockets" }),
        format!("date: {}", date()),
        format!("git: {}", revision()),
        format!("target: {}", plan.connections),
        format!("memory touched before the run: {}", if is_warm { "yes" } else { "no" }),
    ];
    // A guest's is not known yet.
    if place != Where::Guests {
        lines.extend([
            "accel: none".to_owned(),
            format!("kernel: {} {}", kernel("ostype")?.trim(), kernel("osrelease")?.trim()),
            format!("cpus: {}", thread::available_parallelism()?),
            format!("memory_kb: {}", procfs::Meminfo::current()?.mem_total >> 10),
        ]);
    }
    Ok(lines.join("\n") + "\n")
}

/// Has a process write as much memory as the run will need, and end.
fn touch_first(plan: &Plan) -> Result<()> {
    let bytes = plan.memory_mb.map_or_else(
        || predict(&Requirements::new(plan.role(), plan.connections)).total_bytes(),
        |size| size << 20,
    );
    say(format!("touching {} of memory first", format::bytes(bytes)));
    let place = Place { is_expendable: true, ..Place::default() };
    let mut command = inside(&place, env::current_exe()?)?;
    let mut process = Process::spawn("memory", command.arg("touch").arg(bytes.to_string()))?;
    let within = Duration::from_secs(TOUCHED_WITHIN_PER_GB * (1 + bytes / 1_000_000_000));
    if !process.wait(within)?.success() {
        bail!("the memory could not be touched");
    }
    Ok(())
}

/// Writes the page about the run, and returns its verdict. The exit code stays the client's, whatever it finds.
fn summarize(out: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let report = Report::new(Run::read(out)?)?;
    report.write(out)?;
    Ok(format!("{}\n{}", report.verdict(), Report::pages(out)))
}
