//! Faults that need a separate kernel: a guest whose memory, file table, epoll watches or connection tracking table is
//! exhausted under load, or whose network loses packets.
//!
//! A scenario boots guests, runs programs in them, and compares the counters with expected values.

mod check;
mod full;
mod memory;
mod network;
mod run;
pub(crate) mod soak;
mod tune;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::guest::guests::{ALONE, Guests};
use crate::guest::initramfs::Extras;
use crate::guest::packages::Packages;
use crate::guest::qemu::{Kit, Spec};
use crate::million::plan::parse_mebibytes;
use crate::print_line;
use crate::programs::{Programs, date, date_for_name, revision, root};
use crate::wait;
use check::Checks;
use run::Run;

const SMALL_MB: u64 = 512;

/// Injects faults that need a separate kernel, in guests
///
/// Each scenario boots guests, runs server and clients in them while a resource is exhausted, and compares the counters
/// with expected values; its records go to DIR/guest-NAME. Exits with 1 if a scenario fails, and with 2 for wrong
/// usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// By default all but soak, which `scripts/soak --vm` runs
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(SCENARIOS.iter().map(|scenario| scenario.name)))]
    names: Vec<String>,
    /// Memory of the server's guest in 'memory', as in 2G or 900M; the client's guest gets 256M more
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_mebibytes)]
    memory: u64,
    /// A new directory, by default out/scenarios-DATE
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The parameters of the scenarios.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) memory_mb: u64,
    pub(crate) soak: soak::Soak,
}

/// A scenario: its guests, and the function that runs it.
#[derive(Debug)]
struct Scenario {
    name: &'static str,
    guests: fn(&Settings) -> Vec<Spec>,
    /// A tool of this machine that it needs, and the Debian package of the tool.
    tool: Option<(&'static str, &'static str)>,
    run: fn(&mut Run<'_>) -> Result<()>,
}

impl Scenario {
    const fn new(
        name: &'static str,
        guests: fn(&Settings) -> Vec<Spec>,
        run: fn(&mut Run<'_>) -> Result<()>,
    ) -> Self {
        Self { name, guests, tool: None, run }
    }

    /// Copies a tool of this machine into the guest.
    const fn with(self, tool: &'static str, package: &'static str) -> Self {
        Self { tool: Some((tool, package)), ..self }
    }
}

const SCENARIOS: [Scenario; 9] = [
    Scenario::new("memory", memory::pair, memory::memory),
    Scenario::new("cgroup", |_| alone(30_000), memory::cgroup),
    Scenario::new("watches", |_| alone(10_000), full::watches),
    Scenario::new("files", |_| alone(10_000), full::files),
    // busybox has a tc without netem.
    Scenario::new("loss", |_| alone(10_000), network::loss).with("tc", "iproute2"),
    Scenario::new("stateless", |_| alone(10_000), network::stateless).with("tc", "iproute2"),
    Scenario::new("conntrack", |_| alone(10_000), network::conntrack),
    // Debian's busybox lacks flock.
    Scenario::new(tune::NAME, |_| alone(10_000), tune::tune).with("flock", "util-linux"),
    Scenario::new(soak::NAME, soak::guests, soak::soak),
];

/// In addition to the modules of every guest.
const MODULES: [&str; 6] = [
    "drivers/net/tun",
    "lib/libcrc32c",
    "net/ipv4/netfilter/nf_defrag_ipv4",
    "net/ipv6/netfilter/nf_defrag_ipv6",
    "net/netfilter/nf_conntrack",
    "net/sched/sch_netem",
];

/// One small guest for both ends.
fn alone(connections: u64) -> Vec<Spec> {
    vec![Spec { name: ALONE, memory_mb: SMALL_MB, connections, end: 1, cables: &[] }]
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    wait::handle_interrupts()?;
    let named = |name: &str| SCENARIOS.iter().find(|scenario| scenario.name == name);
    let mut chosen: Vec<&Scenario> =
        arguments.names.iter().filter_map(|name| named(name)).collect();
    if chosen.is_empty() {
        chosen.extend(SCENARIOS.iter().filter(|scenario| scenario.name != soak::NAME));
    }
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| format!("out/scenarios-{}", date_for_name()).into());
    let settings = Settings { memory_mb: arguments.memory, soak: soak::Soak::default() };
    let runner = Runner::new(&out, settings)?;
    let mut failed = Vec::new();
    for scenario in &chosen {
        let holds = match runner.run(scenario) {
            Ok(holds) => holds,
            Err(why) => {
                wait::check_deadline()?;
                print_line(format!("{}: {why:#}", scenario.name));
                false
            }
        };
        if !holds {
            failed.push(scenario.name);
        }
    }
    let names: Vec<&str> = chosen.iter().map(|scenario| scenario.name).collect();
    if failed.is_empty() {
        print_line(format!("held: {}; records: {}", names.join(" "), out.display()));
        return Ok(ExitCode::SUCCESS);
    }
    bail!("not held: {}; records: {}", failed.join(" "), out.display());
}

/// Runs the soak test, with its records in `OUT/guest-soak`; returns whether all its checks hold.
pub(crate) fn run_soak(out: &Path, soak: soak::Soak) -> Result<bool> {
    wait::handle_interrupts()?;
    let runner = Runner::new(out, Settings { memory_mb: 0, soak })?;
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == soak::NAME);
    runner.run(scenario.context("there is no scenario for it")?)
}

/// Runs scenarios with the same programs, settings and directory.
#[derive(Debug)]
struct Runner {
    out: PathBuf,
    settings: Settings,
    kit: Kit,
}

impl Runner {
    fn new(out: &Path, settings: Settings) -> Result<Self> {
        // Fails early: building the programs takes minutes.
        Packages::fetch()?;
        let kit = Kit::new(Programs::for_guests()?)?;
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        Ok(Self { out: out.canonicalize()?, settings, kit })
    }

    /// Returns whether all checks hold. A scenario that fails before its checks leaves the files that exist.
    fn run(&self, scenario: &Scenario) -> Result<bool> {
        let name = scenario.name;
        let out = self.out.join(format!("guest-{name}"));
        if out.exists() {
            bail!("{} exists already: use a new directory for --out", out.display());
        }
        fs::create_dir(&out)?;
        print_line(format!("== {name}: {}", out.display()));
        self.write_machine(name, &out)?;
        let tools = scenario.tool.map(|(tool, package)| find_tool(tool, package)).transpose()?;
        let scripts = (name == tune::NAME).then(|| root().join("scripts"));
        let extras = Extras { modules: &MODULES, tools: tools.into_iter().collect(), scripts };
        let machine = self.kit.machine(&out, &extras)?;
        let specs = (scenario.guests)(&self.settings);
        let guests = Guests::boot(machine, &out, &specs, run::shown)?;
        let mut run = Run::new(&out, &self.settings, guests, Checks::create(&out)?);
        if let Err(why) = (scenario.run)(&mut run) {
            wait::check_deadline()?;
            run.checks.fail(&format!("{why:#}"))?;
            run.save();
        }
        Ok(run.checks.all_hold)
    }

    fn write_machine(&self, scenario: &str, out: &Path) -> Result<()> {
        let mut command = format!("scripts/scenarios {scenario}");
        if scenario == "memory" {
            command += &format!(" --memory {}M", self.settings.memory_mb);
        }
        let mut file = File::create(out.join("machine.txt"))?;
        writeln!(file, "command: {command}")?;
        writeln!(file, "date: {}\ngit: {}", date(), revision())?;
        Ok(writeln!(file, "accel: {}", self.kit.accelerator.name())?)
    }
}

/// Finds a tool without PATH, which lacks sbin for ordinary users.
fn find_tool(name: &str, package: &str) -> Result<PathBuf> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let mut paths = folders.iter().map(|folder| Path::new(folder).join(name));
    paths
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is missing: install {package}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Probe {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(arguments: &[&str]) -> Option<Arguments> {
        let arguments = [&["scenarios"], arguments].concat();
        Probe::try_parse_from(arguments).ok().map(|probe| probe.arguments)
    }

    #[test]
    fn names_and_sizes_are_parsed() {
        let all = parse(&[]).unwrap();
        assert_eq!((all.names.len(), all.memory), (0, 1_024));
        let two = parse(&["loss", "cgroup", "--memory", "320M"]).unwrap();
        assert_eq!((two.names, two.memory), (vec!["loss".to_owned(), "cgroup".to_owned()], 320));
        assert_eq!(parse(&["--memory", "14g"]).unwrap().memory, 14 << 10);
        for size in ["", "14", "M", "ten", "0G", "00M"] {
            assert!(parse(&["--memory", size]).is_none(), "{size:?}");
        }
        for arguments in [&["flood"][..], &["--memory"], &["--out"], &["--bogus"]] {
            assert!(parse(arguments).is_none(), "{arguments:?}");
        }
    }
}
