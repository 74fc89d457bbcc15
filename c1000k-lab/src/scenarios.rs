//! Faults that need a kernel of their own: a guest whose memory, file table, epoll watches or tracked connections run
//! out under load, or whose network loses packets.
//!
//! A scenario boots guests, runs programs in them, and compares what was counted with what must be.

mod check;
mod full;
mod memory;
mod network;
mod scene;
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
use crate::guest::initramfs::More;
use crate::guest::packages::Packages;
use crate::guest::qemu::{Kit, Spec};
use crate::million::plan::parse_mebibytes;
use crate::patience;
use crate::programs::{Programs, date, date_for_name, revision, root};
use crate::say;
use check::Checks;
use scene::Scene;

const SMALL_MB: u64 = 512;

/// Runs faults that need a kernel of their own, in guests
///
/// Each scenario boots guests, runs server and clients in them while something runs out, and compares what was counted
/// with what must be; its records go to DIR/guest-NAME. Exits 1 if one does not hold, and 2 for wrong usage.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// All if left out, but for soak, which `scripts/soak --vm` runs
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(SCENARIOS.iter().map(|scenario| scenario.name)))]
    names: Vec<String>,
    /// Of the server's guest in 'memory', as in 2G or 900M; the client's is somewhat larger
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_mebibytes)]
    memory: u64,
    /// A new folder, out/scenarios-DATE if left out
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
    /// A tool of this machine that it needs, and its package.
    tool: Option<(&'static str, &'static str)>,
    run: fn(&mut Scene<'_>) -> Result<()>,
}

impl Scenario {
    const fn new(
        name: &'static str,
        guests: fn(&Settings) -> Vec<Spec>,
        run: fn(&mut Scene<'_>) -> Result<()>,
    ) -> Self {
        Self { name, guests, tool: None, run }
    }

    /// With a tool of this machine.
    const fn with(self, tool: &'static str, package: &'static str) -> Self {
        Self { tool: Some((tool, package)), ..self }
    }
}

const SCENARIOS: [Scenario; 9] = [
    Scenario::new("memory", memory::pair, memory::memory),
    Scenario::new("cgroup", |_| alone(30_000), memory::cgroup),
    Scenario::new("watches", |_| alone(10_000), full::watches),
    Scenario::new("files", |_| alone(10_000), full::files),
    // That of busybox has no netem.
    Scenario::new("loss", |_| alone(10_000), network::loss).with("tc", "iproute2"),
    Scenario::new("stateless", |_| alone(10_000), network::stateless).with("tc", "iproute2"),
    Scenario::new("conntrack", |_| alone(10_000), network::conntrack),
    // busybox has none.
    Scenario::new(tune::NAME, |_| alone(10_000), tune::tune).with("flock", "util-linux"),
    Scenario::new(soak::NAME, soak::guests, soak::soak),
];

/// In addition to those of every guest.
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
    patience::take_interrupts()?;
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
    let stage = Stage::new(&out, settings)?;
    let mut broken = Vec::new();
    for scenario in &chosen {
        let holds = match stage.run(scenario) {
            Ok(holds) => holds,
            Err(why) => {
                patience::go_on()?;
                say(format!("{}: {why:#}", scenario.name));
                false
            }
        };
        if !holds {
            broken.push(scenario.name);
        }
    }
    let names: Vec<&str> = chosen.iter().map(|scenario| scenario.name).collect();
    if broken.is_empty() {
        say(format!("held: {}; records: {}", names.join(" "), out.display()));
        return Ok(ExitCode::SUCCESS);
    }
    bail!("not held: {}; records: {}", broken.join(" "), out.display());
}

/// Runs the soak alone, with its records in `OUT/guest-soak`; whether the scenario held.
pub(crate) fn run_soak(out: &Path, soak: soak::Soak) -> Result<bool> {
    patience::take_interrupts()?;
    let stage = Stage::new(out, Settings { memory_mb: 0, soak })?;
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == soak::NAME);
    stage.run(scenario.context("the soak is one of them")?)
}

/// What all scenarios of a run have in common.
#[derive(Debug)]
struct Stage {
    out: PathBuf,
    settings: Settings,
    kit: Kit,
}

impl Stage {
    fn new(out: &Path, settings: Settings) -> Result<Self> {
        // Before the programs are built, which takes minutes.
        Packages::fetch()?;
        let kit = Kit::new(Programs::for_guests()?)?;
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        Ok(Self { out: out.canonicalize()?, settings, kit })
    }

    /// Whether all checks hold. A scenario that fails before its end leaves the files that there are.
    fn run(&self, scenario: &Scenario) -> Result<bool> {
        let name = scenario.name;
        let out = self.out.join(format!("guest-{name}"));
        if out.exists() {
            bail!("{} is there already: give --out a new folder", out.display());
        }
        fs::create_dir(&out)?;
        say(format!("== {name}: {}", out.display()));
        self.write_machine(name, &out)?;
        let tools = scenario.tool.map(|(tool, package)| find_tool(tool, package)).transpose()?;
        let scripts = (name == tune::NAME).then(|| root().join("scripts"));
        let more = More { modules: &MODULES, tools: tools.into_iter().collect(), scripts };
        let machine = self.kit.machine(&out, &more)?;
        let specs = (scenario.guests)(&self.settings);
        let guests = Guests::boot(machine, &out, &specs, scene::shown)?;
        let mut scene = Scene::new(&out, &self.settings, guests, Checks::create(&out)?);
        if let Err(why) = (scenario.run)(&mut scene) {
            patience::go_on()?;
            scene.checks.fail(&format!("{why:#}"))?;
            scene.save();
        }
        Ok(scene.checks.all_hold)
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

/// Ordinary users may not have it in their PATH.
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

    fn parse(words: &[&str]) -> Option<Arguments> {
        let words = [&["scenarios"], words].concat();
        Probe::try_parse_from(words).ok().map(|probe| probe.arguments)
    }

    #[test]
    fn scenarios_go_by_their_names_and_memory_by_a_size() {
        let all = parse(&[]).unwrap();
        assert_eq!((all.names.len(), all.memory), (0, 1_024));
        let two = parse(&["loss", "cgroup", "--memory", "320M"]).unwrap();
        assert_eq!((two.names, two.memory), (vec!["loss".to_owned(), "cgroup".to_owned()], 320));
        assert_eq!(parse(&["--memory", "14g"]).unwrap().memory, 14 << 10);
        for size in ["", "14", "M", "ten", "0G", "00M"] {
            assert!(parse(&["--memory", size]).is_none(), "{size:?}");
        }
        for words in [&["flood"][..], &["--memory"], &["--out"], &["--bogus"]] {
            assert!(parse(words).is_none(), "{words:?}");
        }
    }
}
