//! What a guest is made of: a kernel, busybox, and qemu where the machine has none. They are unpacked into cargo's
//! target folder and not installed, so that nothing of the machine's own changes, and any user may do it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::programs::root;
use crate::say::say;

const QEMU: &str = "qemu-system-x86_64";

/// Starts the unpacked qemu with the libraries that were unpacked with it.
const QEMU_STARTER: &str = r#"#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH=$here/usr/lib/x86_64-linux-gnu:$here/lib/x86_64-linux-gnu exec "$here/usr/bin/qemu-system-x86_64" "$@"
"#;

/// A folder with all of it.
#[derive(Debug)]
pub(crate) struct Packages {
    folder: PathBuf,
    kernel: String,
    /// Its program.
    pub(crate) qemu: PathBuf,
}

impl Packages {
    /// Those that are in the folder, after those that are missing were fetched.
    pub(crate) fn fetch() -> Result<Self> {
        let machine = env::consts::ARCH;
        if machine != "x86_64" {
            bail!(
                "the virtual machine is built for x86_64 only, and this is {machine}: use --native"
            );
        }
        let folder = target_folder().join("lab");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let folder = folder.canonicalize()?;
        let qemu = find_qemu(&folder)?;
        if !folder.join("bin/busybox").is_file() {
            unpack(&folder, "busybox-static")?;
        }
        if newest_kernel(&folder)?.is_none() {
            unpack(&folder, &kernel_package()?)?;
        }
        let kernel = newest_kernel(&folder)?.context("the kernel's package has no kernel")?;
        Ok(Self { folder, kernel, qemu })
    }

    pub(crate) fn busybox(&self) -> PathBuf {
        self.folder.join("bin/busybox")
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join(format!("boot/vmlinuz-{}", self.kernel))
    }

    /// As in `net/sched/sch_netem`.
    pub(crate) fn module(&self, name: &str) -> PathBuf {
        self.folder.join(format!("lib/modules/{}/kernel/{name}.ko", self.kernel))
    }
}

/// Cargo's, for what is kept between runs.
fn target_folder() -> PathBuf {
    let set = ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"].into_iter().find_map(env::var_os);
    set.map_or_else(|| root().join("target"), PathBuf::from)
}

/// The machine's own, or that of the folder.
fn find_qemu(folder: &Path) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = env::split_paths(&path).map(|path| path.join(QEMU));
    if let Some(installed) = installed.into_iter().find(|file| file.is_file()) {
        return Ok(installed);
    }
    let unpacked = folder.join("qemu").join(QEMU);
    if !unpacked.is_file() {
        unpack_qemu(folder)?;
    }
    Ok(unpacked)
}

/// With all the packages that it needs and that are not installed here, its libraries among them.
fn unpack_qemu(folder: &Path) -> Result<()> {
    let install = ["install", "--simulate", "--no-install-recommends", "qemu-system-x86"];
    let names = packages_added(&apt("apt-get", &install)?);
    if names.is_empty() {
        bail!("apt knows no qemu-system-x86: run apt-get update, or install qemu by hand");
    }
    say(format!(
        "fetching qemu-system-x86, which boots the virtual machine, and the {} packages that it needs into {}, where they \
         are unpacked and not installed",
        names.len() - 1,
        folder.display()
    ));
    let download = download(folder, &names)?;
    let tree = download.path().join("tree");
    fs::write(tree.join(QEMU), QEMU_STARTER)?;
    fs::set_permissions(tree.join(QEMU), fs::Permissions::from_mode(0o755))?;
    Ok(fs::rename(tree, folder.join("qemu"))?)
}

/// Of a simulated installation: `Inst NAME (VERSION ...)`.
fn packages_added(simulated: &str) -> Vec<String> {
    let lines = simulated.lines().filter_map(|line| line.strip_prefix("Inst "));
    lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// The package that Debian's cloud kernel of today is.
fn kernel_package() -> Result<String> {
    let known = apt("apt-cache", &["depends", "linux-image-cloud-amd64"])?;
    let name = known.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(name.context("apt knows no linux-image-cloud-amd64: run apt-get update")?.to_owned())
}

fn newest_kernel(folder: &Path) -> Result<Option<String>> {
    let modules = folder.join("lib/modules");
    fs::create_dir_all(&modules)?;
    let mut versions = Vec::new();
    for entry in fs::read_dir(modules)? {
        versions.push(entry?.file_name().display().to_string());
    }
    Ok(versions.into_iter().max_by_key(|version| numbers(version)))
}

/// 6.1.0-56 is newer than 6.1.0-9.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Unpacked elsewhere and then moved: a run that is ended in between leaves nothing half there that a later one would
/// take for whole. What is looked for moves last.
fn unpack(folder: &Path, package: &str) -> Result<()> {
    say(format!("fetching {package} into {}", folder.display()));
    let download = download(folder, &[package.to_owned()])?;
    for part in ["boot", "bin", "lib/modules"] {
        let (from, to) = (download.path().join("tree").join(part), folder.join(part));
        if !from.is_dir() {
            continue;
        }
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::rename(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Packages, unpacked in `tree` of a folder that is removed when dropped.
fn download(folder: &Path, packages: &[String]) -> Result<TempDir> {
    let download = tempfile::Builder::new().prefix("download.").tempdir_in(folder)?;
    run(Command::new("apt-get").arg("download").args(packages).current_dir(&download))?;
    for entry in fs::read_dir(&download)? {
        let file = entry?.path();
        if file.extension() == Some(OsStr::new("deb")) {
            let tree = download.path().join("tree");
            run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(tree))?;
        }
    }
    Ok(download)
}

fn apt(tool: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(tool).args(arguments))
}

/// What it prints. Elsewhere than on Debian a person does what it would have done.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| {
        format!(
            "{} is missing: unpack Debian's linux-image-cloud-amd64 and busybox-static into target/lab by hand",
            command.get_program().display()
        )
    })?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let last = complaint.lines().next_back().unwrap_or_default();
        bail!("{command:?} failed: {last}; if its package lists are old: apt-get update");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packages_of_a_simulated_installation_are_those_that_it_adds() {
        let said =
            "Reading lists...\nInst libfoo (1 Debian:12 [amd64])\nInst foo (2)\nConf foo (2)\n";
        assert_eq!(packages_added(said), ["libfoo", "foo"]);
        assert!(packages_added("").is_empty());
    }

    #[test]
    fn the_newest_kernel_is_so_by_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_kernel(folder.path()).unwrap(), None);
        for version in ["6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-60-cloud-amd64"] {
            fs::create_dir_all(folder.path().join("lib/modules").join(version)).unwrap();
        }
        let newest = newest_kernel(folder.path()).unwrap();
        assert_eq!(newest.as_deref(), Some("6.1.0-56-cloud-amd64"));
    }
}
