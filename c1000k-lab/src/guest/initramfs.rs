//! What a guest boots into: this program as process 1, the programs under test, busybox, and modules of the kernel.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::Packages;
use crate::process::tool;
use crate::programs::Programs;

/// Process 1, started with the words of the kernel's command line.
pub(crate) const INIT: &str = "/bin/c1000k-lab";
pub(super) const BUSYBOX: &str = "/bin/busybox";
/// The modules that process 1 loads, in order.
pub(super) const MODULES_LISTED: &str = "/modules";

const FOLDERS: [&str; 5] = ["dev", "out", "proc", "sys", "tmp"];

/// In the order in which they depend on each other.
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

/// What some guests have in addition.
#[derive(Debug, Default)]
pub(crate) struct More {
    /// Modules that a command loads: they go to `/lib`.
    pub(crate) modules: &'static [&'static str],
    /// Programs of this machine, which go to `/bin`.
    pub(crate) tools: Vec<PathBuf>,
    /// A folder that goes to `/scripts`.
    pub(crate) scripts: Option<PathBuf>,
}

/// The programs need no libraries.
pub(super) fn build(
    file: &Path,
    packages: &Packages,
    programs: &Programs,
    more: &More,
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
    // Debug information would take of the guest's memory.
    tool("strip", &["--strip-debug", "-o", &text(&tree.path(INIT)), &text(&this)])?;
    tree.copy_libraries(&this)?;
    for tool in &more.tools {
        tree.copy(tool, &format!("/bin/{}", name_of(tool)))?;
        tree.copy_libraries(tool)?;
    }
    if let Some(scripts) = &more.scripts {
        tool("cp", &["-r", &text(scripts), &text(&tree.path("/scripts"))])?;
    }
    let mut listed = String::new();
    for module in MODULES.iter().chain(more.modules) {
        let (from, path) = (packages.module(module), format!("/lib/{}.ko", name_of(module)));
        // Else it is built into the kernel.
        if from.is_file() {
            tree.copy(&from, &path)?;
            if MODULES.contains(module) {
                listed += &format!("{path}\n");
            }
        }
    }
    fs::write(tree.path(MODULES_LISTED), listed)?;
    let pack = r#"cd "$1" && "$0" find . | "$0" cpio -o -H newc >"$2""#;
    tool("sh", &["-c", pack, &text(&packages.busybox()), &text(&tree.0), &text(file)])?;
    Ok(fs::remove_dir_all(&tree.0)?)
}

/// A folder with the files of an archive.
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

    /// To their own paths, where the loader looks for them.
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

/// Those that `ldd` names; none where a program is linked statically.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = said.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(PathBuf::from).filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_found_and_their_loader_too() {
        let libraries = libraries_of(&env::current_exe().unwrap()).unwrap();
        let has = |name| libraries.iter().any(|path| text(path).contains(name));
        assert!(has("libc.so"), "{libraries:?}");
        assert!(has("ld-linux"), "{libraries:?}");
    }
}
