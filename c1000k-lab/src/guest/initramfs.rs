//! The initramfs of a guest: this program as process 1, the programs under test, busybox, and modules of the kernel.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::Packages;
use crate::process::tool;
use crate::programs::Programs;

/// Process 1; its arguments are on the kernel's command line.
pub(crate) const INIT: &str = "/bin/c1000k-lab";
pub(super) const BUSYBOX: &str = "/bin/busybox";
/// The modules that process 1 loads, in order.
pub(super) const MODULE_LIST: &str = "/modules";

const FOLDERS: [&str; 5] = ["dev", "out", "proc", "sys", "tmp"];

/// Dependencies first.
const MODULES: [&str; 9] = [
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/net/virtio_net",
];

/// Additional files of some guests.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    /// Modules that a scenario loads, in `/lib`.
    pub(crate) modules: &'static [&'static str],
    /// Programs of this machine, in `/bin`.
    pub(crate) tools: Vec<PathBuf>,
    /// A directory, as `/scripts`.
    pub(crate) scripts: Option<PathBuf>,
}

/// Server and client must be linked statically.
pub(super) fn build(
    file: &Path,
    packages: &Packages,
    programs: &Programs,
    extras: &Extras,
) -> Result<()> {
    let tree = Tree(file.with_extension("tree"));
    for folder in FOLDERS {
        fs::create_dir_all(tree.0.join(folder))?;
    }
    tree.copy(&packages.busybox(), BUSYBOX)?;
    for name in ["c1000k-server", "c1000k-client"] {
        tree.copy(&programs.path(name), &format!("/bin/{name}"))?;
    }
    let this = env::current_exe()?;
    // Debug information would use the guest's memory.
    tool("strip", &["--strip-debug", "-o", &text(&tree.path(INIT)), &text(&this)])?;
    tree.copy_libraries(&this)?;
    for tool in &extras.tools {
        tree.copy(tool, &format!("/bin/{}", name_of(tool)))?;
        tree.copy_libraries(tool)?;
    }
    if let Some(scripts) = &extras.scripts {
        tool("cp", &["-r", &text(scripts), &text(&tree.path("/scripts"))])?;
    }
    let mut list = String::new();
    for module in MODULES.iter().chain(extras.modules) {
        let (from, path) = (packages.module(module), format!("/lib/{}.ko", name_of(module)));
        // A missing one is built into the kernel.
        if from.is_file() {
            tree.copy(&from, &path)?;
            if MODULES.contains(module) {
                list += &format!("{path}\n");
            }
        }
    }
    fs::write(tree.path(MODULE_LIST), list)?;
    let pack = r#"cd "$1" && "$0" find . | "$0" cpio -o -H newc >"$2""#;
    tool("sh", &["-c", pack, &text(&packages.busybox()), &text(&tree.0), &text(file)])?;
    Ok(fs::remove_dir_all(&tree.0)?)
}

/// A directory with the files of an archive.
struct Tree(PathBuf);

impl Tree {
    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    fn copy(&self, from: &Path, path: &str) -> Result<()> {
        let to = self.path(path);
        fs::create_dir_all(to.parent().context("a file has a folder")?)?;
        fs::copy(from, to).with_context(|| from.display().to_string())?;
        Ok(())
    }

    /// To the same paths, where the loader looks for them.
    fn copy_libraries(&self, program: &Path) -> Result<()> {
        let libraries = libraries_of(program)?;
        libraries.iter().try_for_each(|library| self.copy(library, &text(library)))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn name_of(path: impl AsRef<Path>) -> String {
    path.as_ref().file_name().unwrap_or_default().display().to_string()
}

/// The libraries that `ldd` names; none if the program is linked statically.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = output.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_a_program_include_the_loader() {
        let libraries = libraries_of(&env::current_exe().unwrap()).unwrap();
        let has = |name| libraries.iter().any(|path| text(path).contains(name));
        assert!(has("libc.so"), "{libraries:?}");
        assert!(has("ld-linux"), "{libraries:?}");
    }
}
