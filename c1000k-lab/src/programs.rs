//! The programs under test, and their directory.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process::output;

/// A directory with `c1000k-server` and `c1000k-client`.
#[derive(Debug)]
pub(crate) struct Programs(pub(crate) PathBuf);

impl Programs {
    /// The programs in the directory that the variable names; or if cargo runs this program, those that cargo builds;
    /// or those in the directory of this program.
    pub(crate) fn find(variable: &str) -> Result<Self> {
        match (env::var_os(variable), env::var_os("CARGO_MANIFEST_DIR")) {
            (None, Some(package)) => Self::within(&build(Path::new(&package), &[], None)?),
            _ => Self::find_built(variable),
        }
    }

    /// The same without a build.
    pub(crate) fn find_built(variable: &str) -> Result<Self> {
        match env::var_os(variable) {
            Some(folder) => Self::within(Path::new(&folder)),
            None => Self::within(env::current_exe()?.parent().context("no folder")?),
        }
    }

    /// Statically linked programs, because a guest has no libraries.
    pub(crate) fn for_guests() -> Result<Self> {
        let variable = "MILLION_BINARIES";
        match (env::var_os(variable), env::var_os("CARGO_MANIFEST_DIR")) {
            (Some(_), _) => Self::find_built(variable),
            (None, Some(package)) => {
                let target = ["--target", "x86_64-unknown-linux-gnu"];
                let flags = Some("-C target-feature=+crt-static");
                Self::within(&build(Path::new(&package), &target, flags)?)
            }
            (None, None) => bail!("for guests run this by cargo, or set {variable}"),
        }
    }

    fn within(folder: &Path) -> Result<Self> {
        // A bare name would be looked up in PATH.
        let programs = Self(folder.canonicalize().with_context(|| folder.display().to_string())?);
        for name in ["c1000k-server", "c1000k-client"] {
            if !programs.path(name).is_file() {
                bail!("there is no program {}", programs.path(name).display());
            }
        }
        Ok(programs)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// cargo's message about an artifact.
#[derive(Debug, Deserialize)]
struct Message {
    executable: Option<PathBuf>,
}

/// Builds both, and returns their directory, for any configured target directory or triple.
fn build(package: &Path, options: &[&str], flags: Option<&str>) -> Result<PathBuf> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    if let Some(flags) = flags {
        cargo.env("RUSTFLAGS", flags);
    }
    let output = cargo
        .args(["build", "--release", "--locked", "--message-format", "json-render-diagnostics"])
        .args(["-p", "c1000k-server", "-p", "c1000k-client", "--manifest-path"])
        .arg(package.join("../Cargo.toml"))
        .args(options)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo")?;
    if !output.status.success() {
        bail!("the build failed; cargo's messages are above");
    }
    folder_of("c1000k-server", &String::from_utf8_lossy(&output.stdout))
}

/// The checkout if cargo runs this program, else the current directory.
pub(crate) fn root() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    package.as_deref().and_then(Path::parent).map_or_else(|| ".".into(), Path::to_owned)
}

/// As `git describe` prints it.
pub(crate) fn revision() -> String {
    let mut git = Command::new("git");
    output(git.args(["describe", "--always", "--dirty"]).current_dir(root()))
        .unwrap_or_else(|_| "unknown".to_owned())
}

/// Now, as in `2026-11-27T22:14:43Z`.
pub(crate) fn date() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// Now, for the name of a directory: `20261127-221443`.
pub(crate) fn date_for_name() -> String {
    date().replace(['-', ':', 'Z'], "").replace('T', "-")
}

fn folder_of(program: &str, messages: &str) -> Result<PathBuf> {
    for line in messages.lines() {
        let message: Message = serde_json::from_str(line).context("cargo's message")?;
        if let Some(path) = message.executable.filter(|path| path.ends_with(program)) {
            return Ok(path.parent().context("no folder")?.to_owned());
        }
    }
    bail!("cargo does not print the path of {program}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_that_of_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                    {\"reason\":\"compiler-artifact\",\"executable\":\"/a folder/c1000k-server\"}\n\
                    {\"reason\":\"build-finished\",\"success\":true}";
        assert_eq!(folder_of("c1000k-server", messages).unwrap(), Path::new("/a folder"));
        assert!(folder_of("c1000k-client", messages).is_err());
    }
}
