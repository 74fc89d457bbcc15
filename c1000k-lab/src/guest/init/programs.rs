//! The programs that run in a guest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{OUT, shell};
use crate::guest::order::{Message, Start};
use crate::process::{Place, Process, inside};

/// A program of the guest: running, or ended with a code.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) process: Process,
    log: PathBuf,
    pub(super) code: Option<i32>,
    shown: String,
}

impl Program {
    pub(super) fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.log)?).into_owned())
    }
}

/// The programs of the guest by name.
#[derive(Debug, Default)]
pub(super) struct Programs(BTreeMap<String, Program>);

impl Programs {
    pub(super) fn named(&self, name: &str) -> Result<&Program> {
        self.0.get(name).with_context(|| format!("no '{name}' was started"))
    }

    /// The server, while it runs.
    pub(super) fn server(&self) -> Option<&Program> {
        self.0.get("server").filter(|server| server.code.is_none())
    }

    pub(super) fn start(&mut self, start: Start) -> Result<()> {
        let Start { name, user, cgroup, words } = start;
        let [program, arguments @ ..] = words.as_slice() else { bail!("no program is given") };
        let log = Path::new(OUT).join(format!("{name}.log"));
        let written = File::create(&log)?;
        let place =
            Place { cgroup: cgroup.map(PathBuf::from), user: Some(user), ..Place::default() };
        let mut command = inside(&place, Path::new("/bin").join(program))?;
        command.args(arguments).current_dir("/").env("PATH", "/bin");
        command.stdin(Stdio::null()).stdout(written.try_clone()?).stderr(written);
        let process = Process::spawn(&name, &mut command)?;
        let program = Program { process, log, code: None, shown: String::new() };
        self.0.insert(name, program);
        Ok(())
    }

    /// Those that have ended since the last look.
    pub(super) fn ended(&mut self) -> Result<Vec<Message>> {
        let mut ended = Vec::new();
        for (name, program) in &mut self.0 {
            if program.code.is_some() || program.process.is_running() {
                continue;
            }
            let status = program.process.wait(Duration::ZERO)?;
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            program.code = Some(code);
            let mut words = last_words(&program.log()?);
            if status.signal().is_some() {
                words.push('\n');
                words += &shell("dmesg | grep -i 'out of memory' | tail -n 1").unwrap_or_default();
            }
            ended.push(Message::Ended { name: name.clone(), code, words });
        }
        Ok(ended)
    }

    /// The newest line of each log of those that run, if it is a new one.
    pub(super) fn progress(&mut self) -> Result<Vec<Message>> {
        let mut news = Vec::new();
        for (name, program) in self.0.iter_mut().filter(|(_, program)| program.code.is_none()) {
            let line = program.log()?.lines().next_back().unwrap_or_default().to_owned();
            if line != program.shown {
                program.shown.clone_from(&line);
                news.push(Message::Progress { name: name.clone(), line });
            }
        }
        Ok(news)
    }
}

/// A verdict and, set in below it, the figures.
pub(super) fn last_words(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let verdict = lines.iter().rposition(|line| !line.starts_with(' ')).unwrap_or_default();
    lines[verdict..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_the_verdict_with_its_figures() {
        assert_eq!(
            last_words("target: 9\nreached\n  9 held\n  0 lost\n"),
            "reached\n  9 held\n  0 lost"
        );
        assert_eq!(last_words("  9 held\n"), "  9 held");
        assert_eq!(last_words(""), "");
    }
}
