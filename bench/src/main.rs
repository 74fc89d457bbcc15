//! Compares the reactor with other event loops. `scripts/bench` and `scripts/instructions` run it; docs/benchmarks.md
//! contains the results.

mod contest;
mod instructions;
mod memory;
mod process;
mod record;
mod report;
mod sampler;
mod serve;
mod syscalls;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use contest::{Contestant, Setting, Size};
use instructions::Instructions;
use record::{Micro, Record};

/// The first port of the servers, below the range from which the kernel chooses client ports.
const FIRST_PORT: u16 = 12_000;
const PORTS: u16 = 100;

/// The number of descriptors other than those of the connections.
const DESCRIPTORS_MORE: u64 = 200;

#[derive(Debug, Parser)]
#[command(about, version)]
struct CommandLine {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run one of the compared servers
    Serve {
        library: serve::Library,
        first_port: u16,
        ports: u16,
        /// Close connections that are idle for this time (reactor and tokio only)
        #[arg(long, value_name = "SECONDS")]
        idle_timeout: Option<u64>,
    },
    /// Measure all servers
    Run(Run),
    /// Count the reactor's instructions per accept and per message
    Instructions {
        /// The folder of the compiled C programs
        #[arg(long)]
        programs: PathBuf,
        /// The file of the recorded counts
        #[arg(long)]
        record: PathBuf,
        /// Compare with the recorded counts, instead of recording new ones
        #[arg(long)]
        check: bool,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// The folder of the compiled C programs
    #[arg(long)]
    programs: PathBuf,
    /// The folder for the results
    #[arg(long)]
    out: PathBuf,
    /// Make a smaller, less precise measurement
    #[arg(long)]
    quick: bool,
    /// Measure prototypes of other kernel interfaces, instead of the libraries
    #[arg(long)]
    prototypes: bool,
    /// The number of rounds
    #[arg(long)]
    rounds: Option<usize>,
    /// Measure only these and the floor, without memory and instructions
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", conflicts_with = "prototypes")]
    only: Vec<String>,
}

fn main() -> ExitCode {
    let done = match CommandLine::parse().task {
        Task::Serve { library, first_port, ports, idle_timeout } => {
            serve::serve(library, first_port, ports, idle_timeout.map(Duration::from_secs))
                .map(|()| ExitCode::SUCCESS)
        }
        Task::Run(run) => measure(&run).map(|()| ExitCode::SUCCESS),
        Task::Instructions { programs, record, check } => {
            count_instructions(&programs, &record, check)
        }
    };
    done.unwrap_or_else(|error| {
        eprintln!("c1000k-bench: {error}");
        ExitCode::FAILURE
    })
}

fn measure(run: &Run) -> io::Result<()> {
    let scratch = tempfile::tempdir()?;
    let setting = setting(&run.programs, scratch.path())?;
    let size = size(run);
    let machine = record::machine();
    prepare(&size)?;
    fs::create_dir_all(&run.out)?;
    let contestants = contestants(&setting, run)?;
    let name = if run.prototypes { "prototypes" } else { "bench" };
    let mut record = Record {
        command: command(run),
        machine,
        size,
        results: contest_rounds(&setting, &size, &contestants)?,
        syscalls: count_syscalls(&setting, &contestants)?,
        memory: Vec::new(),
        instructions: Vec::new(),
        micro: Vec::new(),
    };
    if !run.prototypes && run.only.is_empty() {
        say("memory");
        record.memory = memory::run(&setting, size.connections)?;
        record.instructions = count_all_instructions(&setting, &contestants)?;
        record.micro = micro(&setting, run.quick)?;
    }
    fs::write(run.out.join(format!("{name}.json")), serde_json::to_vec_pretty(&record)?)?;
    let tables = report::tables(&record);
    fs::write(run.out.join(format!("{name}.md")), &tables)?;
    println!("{tables}\nwritten to {}", run.out.display());
    Ok(())
}

/// The servers to compare, always including the floor.
fn contestants(setting: &Setting, run: &Run) -> io::Result<Vec<Contestant>> {
    if run.prototypes {
        return Ok(setting.prototypes());
    }
    let mut all = setting.contestants();
    if run.only.is_empty() {
        return Ok(all);
    }
    let names: Vec<_> = all.iter().map(|contestant| contestant.name.clone()).collect();
    if let Some(unknown) = run.only.iter().find(|name| !names.contains(name)) {
        let names = names.join(", ");
        return Err(io::Error::other(format!("--only {unknown}: there are {names}")));
    }
    all.retain(|contestant| contestant.name == "floor" || run.only.contains(&contestant.name));
    Ok(all)
}

/// The command that repeats this measurement.
fn command(run: &Run) -> String {
    let flags = [(run.prototypes, " --prototypes"), (run.quick, " --quick")];
    let flags = flags.iter().filter(|flag| flag.0).map(|flag| flag.1.to_owned());
    let rounds = run.rounds.map(|rounds| format!(" --rounds {rounds}"));
    let only = (!run.only.is_empty()).then(|| format!(" --only {}", run.only.join(",")));
    std::iter::once("scripts/bench".to_owned()).chain(flags).chain(rounds).chain(only).collect()
}

fn setting(programs: &Path, scratch: &Path) -> io::Result<Setting> {
    Ok(Setting {
        programs: programs.to_owned(),
        own: std::env::current_exe()?,
        scratch: scratch.to_owned(),
        first_port: FIRST_PORT,
        ports: PORTS,
        perf: sampler::is_available(),
    })
}

fn size(run: &Run) -> Size {
    let full = Size {
        rounds: 5,
        connections: 18_000,
        ports: PORTS,
        ramps: 4,
        messages_all: 15,
        active_few: 180,
        messages_few: 1_200,
    };
    let quick = Size { rounds: 2, ramps: 2, messages_all: 5, messages_few: 400, ..full };
    let chosen = if run.quick { quick } else { full };
    Size { rounds: run.rounds.unwrap_or(chosen.rounds), ..chosen }
}

/// Raises the descriptor limit, which the servers and the load inherit, and reserves one processor for the server.
fn prepare(size: &Size) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let needed = size.connections as u64 + DESCRIPTORS_MORE;
    if hard < needed {
        return Err(io::Error::other(format!(
            "RLIMIT_NOFILE is {hard} hard and {needed} are needed: raise it with `ulimit -Hn`"
        )));
    }
    if std::thread::available_parallelism()?.get() < 2 {
        return Err(io::Error::other(
            "two processors are needed, one for the server and one for the load",
        ));
    }
    let mut load_cpu = CpuSet::new();
    load_cpu.set(process::LOAD_CPU)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &load_cpu)?)
}

/// Runs the rounds, each starting with another contestant.
fn contest_rounds(
    setting: &Setting,
    size: &Size,
    contestants: &[Contestant],
) -> io::Result<Vec<contest::Result>> {
    if !setting.perf {
        say("perf can't sample here: user and system time are divided by the clock tick alone");
    }
    let mut results = Vec::new();
    for round in 0..size.rounds {
        for place in 0..contestants.len() {
            let contestant = &contestants[(place + round) % contestants.len()];
            say(&format!("round {} of {}: {}", round + 1, size.rounds, contestant.name));
            results.push(contest::run(setting, size, contestant, round)?);
        }
    }
    Ok(results)
}

fn count_syscalls(
    setting: &Setting,
    contestants: &[Contestant],
) -> io::Result<Vec<syscalls::Syscalls>> {
    if !syscalls::is_available() {
        say("strace is missing: no system calls are counted");
        return Ok(Vec::new());
    }
    say("system calls");
    contestants.iter().map(|contestant| syscalls::run(setting, contestant)).collect()
}

fn count_all_instructions(
    setting: &Setting,
    contestants: &[Contestant],
) -> io::Result<Vec<Instructions>> {
    if !instructions::is_available() {
        say("valgrind is missing: no instructions are counted");
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    // valgrind does not support io_uring.
    for contestant in contestants.iter().filter(|contestant| contestant.name != "monoio") {
        say(&format!("instructions: {}", contestant.name));
        all.push(instructions::run(setting, contestant)?);
    }
    Ok(all)
}

fn micro(setting: &Setting, quick: bool) -> io::Result<Vec<Micro>> {
    say("timers and slabs");
    let (entries, rounds) = if quick { ("1000000", "1") } else { ("1000000,10000000", "3") };
    let program = setting.own.with_file_name("c1000k-bench-micro");
    let output = Command::new(program)
        .args(["--entries", entries, "--rounds", rounds])
        // Each large block is mapped separately and returned to the system when it is freed, so that no structure
        // reuses pages that another one has touched.
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn count_instructions(programs: &Path, file: &Path, check: bool) -> io::Result<ExitCode> {
    let scratch = tempfile::tempdir()?;
    let setting = setting(programs, scratch.path())?;
    let counted = instructions::run(&setting, &setting.library("reactor", &[]))?;
    if !check {
        fs::write(file, serde_json::to_vec_pretty(&counted)?)?;
        println!("{counted:?}\nwritten to {}", file.display());
        return Ok(ExitCode::SUCCESS);
    }
    let recorded: Instructions = serde_json::from_slice(&fs::read(file)?)?;
    let (text, within) = instructions::compare(&recorded, &counted);
    print!("{text}");
    Ok(if within { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn say(line: &str) {
    eprintln!("{line}");
}
