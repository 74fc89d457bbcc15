//! Debian packages of a kernel, busybox, and qemu if the machine has none. They are unpacked into cargo's target
//! directory and not installed, so the machine does not change, and any user can do it.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::print_line;
use crate::process::output;
use crate::programs::root;

const QEMU: &str = "qemu-system-x86_64";

/// Starts the unpacked qemu with its unpacked libraries.
const QEMU_STARTER: &str = r#"#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH=$here/usr/lib/x86_64-linux-gnu:$here/lib/x86_64-linux-gnu exec "$here/usr/bin/qemu-system-x86_64" "$@"
"#;

/// The unpacked packages.
#[derive(Debug)]
pub(crate) struct Packages {
    folder: PathBuf,
    kernel: String,
    /// The program.
    pub(crate) qemu: PathBuf,
}

impl Packages {
    /// Downloads and unpacks those that are missing.
    pub(crate) fn fetch() -> Result<Self> {
        let machine = env::consts::ARCH;
        if machine != "x86_64" {
            bail!("guests are for x86_64 only, and this is {machine}: use --native");
        }
        let lab = target_folder().join("lab");
        fs::create_dir_all(&lab).with_context(|| lab.display().to_string())?;
        let folder = lab.canonicalize()?.join("packages");
        let path = env::var_os("PATH").unwrap_or_default();
        let installed =
            env::split_paths(&path).map(|path| path.join(QEMU)).find(|file| file.is_file());
        if !folder.is_dir() || installed.is_none() && !folder.join(QEMU).is_file() {
            unpack(&lab, &folder, installed.is_none())?;
        }
        let qemu = installed.unwrap_or_else(|| folder.join(QEMU));
        let mut kernels = fs::read_dir(folder.join("lib/modules"))?;
        let kernel = kernels.next().context("the kernel's package has no kernel")??;
        Ok(Self { folder, kernel: kernel.file_name().display().to_string(), qemu })
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

/// Cargo's target directory, in which the packages are kept.
fn target_folder() -> PathBuf {
    let set = ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR"].into_iter().find_map(env::var_os);
    set.map_or_else(|| root().join("target"), PathBuf::from)
}

/// Unpacks to another directory first, so that an interrupted run leaves no incomplete directory.
fn unpack(lab: &Path, folder: &Path, with_qemu: bool) -> Result<()> {
    let mut packages = vec!["busybox-static".to_owned(), kernel_package()?];
    if with_qemu {
        // With its dependencies that are not installed.
        let install = ["install", "--simulate", "--no-install-recommends", "qemu-system-x86"];
        let added = packages_added(&apt("apt-get", &install)?);
        if added.is_empty() {
            bail!("apt finds no qemu-system-x86: run apt-get update, or install qemu");
        }
        packages.extend(added);
    }
    let (count, shown) = (packages.len(), folder.display());
    print_line(format!(
        "unpacking {count} packages into {shown}, without installing them: kernel, busybox, qemu"
    ));
    let download = tempfile::Builder::new().prefix("download.").tempdir_in(lab)?;
    run(Command::new("apt-get").arg("download").args(packages).current_dir(&download))?;
    let tree = download.path().join("tree");
    for entry in fs::read_dir(&download)? {
        let file = entry?.path();
        if file.extension().is_some_and(|kind| kind == "deb") {
            run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&tree))?;
        }
    }
    if with_qemu {
        fs::write(tree.join(QEMU), QEMU_STARTER)?;
        fs::set_permissions(tree.join(QEMU), fs::Permissions::from_mode(0o755))?;
    }
    if folder.is_dir() {
        fs::remove_dir_all(folder)?;
    }
    Ok(fs::rename(tree, folder)?)
}

/// The packages of a simulated installation: `Inst NAME (VERSION ...)`.
fn packages_added(simulated: &str) -> Vec<String> {
    let lines = simulated.lines().filter_map(|line| line.strip_prefix("Inst "));
    lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// The current package of Debian's cloud kernel.
fn kernel_package() -> Result<String> {
    let output = apt("apt-cache", &["depends", "linux-image-cloud-amd64"])?;
    let name = output.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(name.context("apt finds no linux-image-cloud-amd64: run apt-get update")?.to_owned())
}

fn apt(tool: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(tool).args(arguments))
}

fn run(command: &mut Command) -> Result<String> {
    output(command).context(
        "if the package lists are old, run apt-get update; on another system than Debian, unpack Debian's \
         linux-image-cloud-amd64 and busybox-static into target/lab/packages by hand",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_a_simulated_installation_are_parsed() {
        let output =
            "Reading lists...\nInst libfoo (1 Debian:12 [amd64])\nInst foo (2)\nConf foo (2)\n";
        assert_eq!(packages_added(output), ["libfoo", "foo"]);
        assert!(packages_added("").is_empty());
    }
}
