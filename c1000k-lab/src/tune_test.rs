//! Applies and reverts tune-server and tune-client, and compares every value before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::unistd::Uid;
use tempfile::TempDir;

use crate::process::Process;
use crate::programs::Programs;
use crate::wait;

/// The settings that the scripts may change; a kernel may lack some.
const KEYS: &[&str] = &[
    "fs.nr_open",
    "fs.file-max",
    "fs.epoll.max_user_watches",
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_max_orphans",
    "net.ipv4.tcp_mem",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.conf.all.rp_filter",
    "net.netfilter.nf_conntrack_max",
];

const CONNECTIONS: u64 = 3_000_000;
const CONNECTIONS_OPTION: &str = "3M";
/// What a process with 100 listening ports needs.
const DESCRIPTORS: u64 = CONNECTIONS + 132;

/// A script waits for the other for at most 30 s.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Applies and reverts the settings of scripts/tune-*, and checks that each value is restored
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("where").required(true)))]
pub(crate) struct Arguments {
    /// On a copy of this machine's settings, as any user
    #[arg(long, group = "where")]
    fake: bool,
    /// On this kernel, as root: for a disposable guest
    #[arg(long, group = "where")]
    really: bool,
    /// The directory of the scripts
    #[arg(long, value_name = "DIR", default_value = "scripts")]
    scripts: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.really && !Uid::effective().is_root() {
        bail!("--really changes settings of the kernel: run it as root, in a disposable guest");
    }
    wait::handle_interrupts()?;
    let fake = if arguments.fake { Some(fake_root()?) } else { None };
    let scripts = arguments.scripts.canonicalize().context("--scripts")?;
    let (logs, programs) = (tempfile::tempdir()?, Programs::find_built("FAULTS_BINARIES")?);
    let mut test = Test { fake, logs, scripts, programs, before: BTreeMap::new() };
    test.before = test.settings();
    test.run_all()?;
    println!("tune-test: passed");
    Ok(ExitCode::SUCCESS)
}

/// A copy of this machine's settings, with connection tracking in use and a strict reverse path filter.
fn fake_root() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    let copies = KEYS
        .iter()
        .filter_map(|key| Some((*key, fs::read_to_string(path(Path::new("/"), key)).ok()?)));
    let changed = [
        ("net.netfilter.nf_conntrack_max", "262144\n"),
        ("net.netfilter.nf_conntrack_count", "7\n"),
        ("net.ipv4.conf.all.rp_filter", "1\n"),
    ];
    for (key, text) in copies.chain(changed.map(|(key, text)| (key, text.to_owned()))) {
        let file = path(root, key);
        fs::create_dir_all(file.parent().context("no folder")?)?;
        fs::write(file, text)?;
    }
    fs::copy("/proc/meminfo", root.join("proc/meminfo"))?;
    Ok(folder)
}

fn path(root: &Path, key: &str) -> PathBuf {
    root.join("proc/sys").join(key.replace('.', "/"))
}

struct Test {
    fake: Option<TempDir>,
    logs: TempDir,
    scripts: PathBuf,
    programs: Programs,
    before: BTreeMap<&'static str, String>,
}

struct Ended {
    code: i32,
    text: String,
}

fn end(mut script: Process) -> Result<Ended> {
    Ok(Ended { code: script.wait(TIMEOUT)?, text: script.log()? })
}

fn succeed(script: Process) -> Result<String> {
    let Ended { code, text } = end(script)?;
    ensure!(code == 0, "it exits with {code}: {text}");
    Ok(text)
}

impl Test {
    fn run_all(&self) -> Result<()> {
        self.printing_changes_nothing()?;
        self.applying_raises_and_reverting_restores()?;
        self.applying_twice_is_applying_once()?;
        self.a_smaller_target_takes_back_what_it_does_not_need()?;
        self.either_order_of_reverting_restores()?;
        self.both_at_once_lose_nothing()?;
        self.the_original_is_applied_or_its_refusal_is_reported()?;
        self.wrong_usage_is_refused()?;
        let Some(root) = &self.fake else { return Ok(()) };
        self.what_is_enough_is_left_alone(root.path())?;
        self.nothing_changes_before_the_old_values_are_kept(root.path())?;
        self.nothing_changes_without_a_drop_in(root.path())?;
        self.a_value_that_the_kernel_keeps_is_not_forgotten(root.path())?;
        self.a_state_that_is_gone_is_reported(root.path())
    }

    fn printing_changes_nothing(&self) -> Result<()> {
        self.server("")?;
        self.client("")?;
        self.expect_as_before("printing")?;
        let text = self.client("--ports 1")?;
        ensure!(
            text.matches("too few").count() == 1,
            "too few 5-tuples are not reported once: {text}"
        );
        let text = self.server("--revert")?;
        ensure!(text.contains("nothing is applied"), "a revert of nothing does not say so: {text}");
        Ok(())
    }

    fn applying_raises_and_reverting_restores(&self) -> Result<()> {
        self.server("--apply")?;
        self.at_least("fs.nr_open", DESCRIPTORS)?;
        self.at_least("fs.file-max", 2 * CONNECTIONS)?;
        self.at_least("fs.epoll.max_user_watches", 2 * CONNECTIONS)?;
        self.at_least("net.core.somaxconn", 4_096)?;
        self.at_least("net.ipv4.tcp_max_syn_backlog", 4_096)?;
        self.at_least("net.ipv4.tcp_max_orphans", CONNECTIONS)?;
        if self.fake.is_some() {
            self.at_least("net.netfilter.nf_conntrack_max", CONNECTIONS)?;
        }
        let line = format!("\nfs.nr_open = {}\n", self.value("fs.nr_open")?);
        ensure!(
            self.text("etc/sysctl.d/90-c1000k-server.conf").contains(&line),
            "no drop-in has{line}"
        );
        let line = format!("\nroot hard nofile {DESCRIPTORS}\n");
        let limits = self.text("etc/security/limits.d/90-c1000k-server.conf");
        ensure!(limits.contains(&line), "no drop-in has{line}");
        self.revert("server", "reverting the server")
    }

    fn applying_twice_is_applying_once(&self) -> Result<()> {
        let apply = "--ports 40 --sources 2 --apply";
        self.client(apply)?;
        self.has_wide_ports()?;
        if self.fake.is_some() {
            ensure!(self.value("net.ipv4.conf.all.rp_filter")? == "2", "rp_filter is still strict");
        }
        let once = (self.settings(), self.drop_ins());
        self.client(apply)?;
        ensure!((self.settings(), self.drop_ins()) == once, "applying twice differs from once");
        self.revert("client", "reverting the client")
    }

    fn a_smaller_target_takes_back_what_it_does_not_need(&self) -> Result<()> {
        self.server("--apply")?;
        self.server("-c 1 --ports 1 --apply")?;
        let is_back = self.settings()["fs.nr_open"] == self.before["fs.nr_open"];
        ensure!(is_back, "a smaller target leaves fs.nr_open raised");
        self.revert("server", "reverting a smaller target")
    }

    fn either_order_of_reverting_restores(&self) -> Result<()> {
        for [first, second] in [["server", "client"], ["client", "server"]] {
            self.server("--apply")?;
            self.client("-c 2M --apply")?;
            self.at_least("fs.nr_open", DESCRIPTORS)?;
            self.run(first, "--revert")?;
            self.at_least("fs.nr_open", 2_000_032)?;
            self.revert(second, &format!("reverting the {first} first"))?;
        }
        Ok(())
    }

    fn both_at_once_lose_nothing(&self) -> Result<()> {
        for _ in 0..3 {
            let both = [
                self.start("server", "--apply")?,
                self.start("client", "-c 2M --ports 40 --apply")?,
            ];
            both.into_iter().try_for_each(|script| succeed(script).map(drop))?;
            self.at_least("fs.nr_open", DESCRIPTORS)?;
            self.has_wide_ports()?;
            let both = [self.start("server", "--revert")?, self.start("client", "--revert")?];
            both.into_iter().try_for_each(|script| succeed(script).map(drop))?;
            self.expect_as_before("applying and reverting both at once")?;
        }
        Ok(())
    }

    /// Some kernels (Debian's 6.1.192) refuse a `tcp_rmem` below 4096; then that must be reported.
    fn the_original_is_applied_or_its_refusal_is_reported(&self) -> Result<()> {
        let tiny = "512 512 1024";
        let Ended { text, .. } = end(self.start("server", "--original --apply")?)?;
        if self.value("net.ipv4.tcp_rmem")? != tiny {
            let stays = text.lines().find(|line| line.contains("tcp_rmem stays at"));
            ensure!(
                stays.is_some_and(|line| line.ends_with(&format!("the kernel refuses {tiny}"))),
                "tcp_rmem is not the original, and that is not reported: {text}"
            );
        }
        ensure!(self.value("net.ipv4.tcp_wmem")? == tiny, "tcp_wmem is not the original: {text}");
        self.at_least("fs.nr_open", 2_000_000)?;
        self.at_least("net.ipv4.tcp_mem", 524_288)?;
        self.revert("server", "reverting the original")
    }

    fn wrong_usage_is_refused(&self) -> Result<()> {
        for options in [
            "--apply --revert",
            "-c",
            "-c 0",
            "-c ten",
            "--ports -1",
            "--nonsense",
            "--root /no/such/directory",
        ] {
            let Ended { code, text } = end(self.start("server", options)?)?;
            ensure!(code == 2, "{options} is not refused as wrong usage: {code}, {text}");
        }
        Ok(())
    }

    /// The kernel uses the larger of `all` and the interface's value, which is loose here.
    fn what_is_enough_is_left_alone(&self, root: &Path) -> Result<()> {
        let all = "net.ipv4.conf.all.rp_filter";
        let own = path(root, "net.ipv4.conf.eth0.rp_filter");
        let folder = own.parent().context("no folder")?;
        fs::create_dir(folder)?;
        fs::write(&own, "2\n")?;
        fs::write(path(root, all), "0\n")?;
        self.client("--sources 2 --apply")?;
        ensure!(self.value(all)? == "0", "a loose reverse path filter is set again");
        self.client("--revert")?;
        fs::remove_dir_all(folder)?;
        fs::write(path(root, all), &self.before[all])?;
        self.expect_as_before("a reverse path that was loose")
    }

    /// Not even root can create files below a regular file.
    fn nothing_changes_before_the_old_values_are_kept(&self, root: &Path) -> Result<()> {
        let state = root.join("var/lib/c1000k");
        fs::create_dir_all(root.join("var/lib"))?;
        fs::write(&state, "")?;
        self.fails("server", "--apply", "can not be kept, so nothing is changed")?;
        self.expect_as_before("an apply that can not keep the old values")?;
        fs::remove_file(state)?;
        let lock = root.join("run");
        fs::remove_dir_all(&lock)?;
        fs::write(&lock, "")?;
        let text = self.fails("server", "--apply", "nothing is changed")?;
        ensure!(text.contains("can't write "), "a missing lock is not reported: {text}");
        self.expect_as_before("an apply that can not lock")?;
        Ok(fs::remove_file(lock)?)
    }

    fn nothing_changes_without_a_drop_in(&self, root: &Path) -> Result<()> {
        let drop_ins = root.join("etc/sysctl.d");
        fs::remove_dir_all(&drop_ins)?;
        fs::write(&drop_ins, "")?;
        self.fails("server", "--apply", "the kernel is left as it is")?;
        ensure!(
            self.settings() == self.before,
            "an apply that can not write its drop-in changes the kernel"
        );
        fs::remove_file(drop_ins)?;
        self.revert("server", "an apply that can not write its drop-in")
    }

    /// A setting that even root can't write replaces one that the kernel refuses.
    fn a_value_that_the_kernel_keeps_is_not_forgotten(&self, root: &Path) -> Result<()> {
        self.server("--apply")?;
        let (file, aside) = (path(root, "fs.nr_open"), root.join("kept"));
        fs::rename(&file, &aside)?;
        symlink("/proc/sys/kernel/ngroups_max", &file)?;
        self.fails("server", "--revert", "the kernel refuses")?;
        let state = self.text("var/lib/c1000k/previous");
        let is_kept = state.lines().any(|line| line.starts_with("fs.nr_open "));
        ensure!(is_kept, "the value of a refused revert is forgotten: {state}");
        fs::rename(aside, file)?;
        self.revert("server", "a revert that was refused at first")
    }

    fn a_state_that_is_gone_is_reported(&self, root: &Path) -> Result<()> {
        self.server("--apply")?;
        let (state, aside) = (root.join("var/lib/c1000k"), root.join("kept"));
        fs::rename(&state, &aside)?;
        self.fails("server", "--revert", "previous is gone")?;
        fs::rename(aside, state)?;
        self.revert("server", "a state that was gone")
    }

    fn server(&self, options: &str) -> Result<String> {
        self.run("server", options)
    }

    fn client(&self, options: &str) -> Result<String> {
        self.run("client", options)
    }

    fn run(&self, role: &str, options: &str) -> Result<String> {
        succeed(self.start(role, options)?).with_context(|| format!("tune-{role} {options}"))
    }

    fn revert(&self, role: &str, what: &str) -> Result<()> {
        self.run(role, "--revert")?;
        self.expect_as_before(what)
    }

    fn fails(&self, role: &str, options: &str, part: &str) -> Result<String> {
        let Ended { code, text } = end(self.start(role, options)?)?;
        ensure!(code == 1 && text.contains(part), "tune-{role} {options}: {code}, {text}");
        Ok(text)
    }

    /// Starts a script for `CONNECTIONS`, unless the options have another number.
    fn start(&self, role: &str, options: &str) -> Result<Process> {
        let mut command = Command::new(self.scripts.join(format!("tune-{role}")));
        if let Some(root) = &self.fake {
            command.arg("--root").arg(root.path());
        }
        command
            .args(["-c", CONNECTIONS_OPTION])
            .args(options.split_whitespace())
            .env("C1000K_SERVER", self.programs.path("c1000k-server"))
            .env("C1000K_CLIENT", self.programs.path("c1000k-client"));
        Process::spawn_logged("script", &mut command, self.logs.path().join(role))
    }

    fn root(&self) -> &Path {
        self.fake.as_ref().map_or(Path::new("/"), TempDir::path)
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.root().join(file)).unwrap_or_default()
    }

    /// The contents of all files that the scripts may leave.
    fn drop_ins(&self) -> String {
        let files =
            ["sysctl.d", "security/limits.d", "modules-load.d"].into_iter().flat_map(|folder| {
                ["server", "client"].map(|role| format!("etc/{folder}/90-c1000k-{role}.conf"))
            });
        files.chain(["var/lib/c1000k/previous".to_owned()]).map(|file| self.text(&file)).collect()
    }

    fn settings(&self) -> BTreeMap<&'static str, String> {
        KEYS.iter().filter_map(|key| Some((*key, self.value(key).ok()?))).collect()
    }

    /// Its numbers, separated by one space.
    fn value(&self, key: &str) -> Result<String> {
        let text = fs::read_to_string(path(self.root(), key)).with_context(|| key.to_owned())?;
        Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    fn at_least(&self, key: &str, least: u64) -> Result<()> {
        let value = self.value(key)?;
        let first: u64 = value.split(' ').next().unwrap_or_default().parse()?;
        ensure!(first >= least, "{key} is {value}, not {least}");
        Ok(())
    }

    fn has_wide_ports(&self) -> Result<()> {
        let range = self.value("net.ipv4.ip_local_port_range")?;
        ensure!(range == "10000 65535", "the port range is not widened: {range}");
        Ok(())
    }

    fn expect_as_before(&self, what: &str) -> Result<()> {
        let (now, before) = (self.settings(), &self.before);
        ensure!(now == *before, "{what} leaves\n{now:#?}\nwhere there was\n{before:#?}");
        let left = self.drop_ins();
        ensure!(left.is_empty(), "{what} leaves {left}");
        Ok(())
    }
}
