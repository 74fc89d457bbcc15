//! The programs of a guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{OUT, shell};
use crate::guest::request::{Message, Start};
use crate::process::{Isolation, Process, isolated, last_lines};

/// A program that runs, or has ended with a code.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) process: Process,
    pub(super) code: Option<i32>,
    /// The last line of its log that was sent.
    shown: String,
}

/// By name.
#[derive(Debug, Default)]
pub(super) struct Programs(BTreeMap<String, Program>);

impl Programs {
    pub(super) fn named(&mut self, name: &str) -> Result<&mut Program> {
        self.0.get_mut(name).with_context(|| format!("no '{name}' was started"))
    }

    /// The server, while it runs.
    pub(super) fn server(&self) -> Option<&Program> {
        self.0.get("server").filter(|server| server.code.is_none())
    }

    pub(super) fn start(&mut self, start: Start) -> Result<()> {
        let Start { name, user, cgroup, command } = start;
        let [program, arguments @ ..] = command.as_slice() else { bail!("no program is given") };
        let isolation = Isolation {
            cgroup: cgroup.map(PathBuf::from),
            user: Some(user),
            ..Isolation::default()
        };
        let mut process = isolated(&isolation, Path::new("/bin").join(program))?;
        process.args(arguments).current_dir("/").env("PATH", "/bin");
        let log = Path::new(OUT).join(format!("{name}.log"));
        let process = Process::spawn_logged(&name, &mut process, log)?;
        self.0.insert(name, Program { process, code: None, shown: String::new() });
        Ok(())
    }

    /// Those that have ended since the last call.
    pub(super) fn ended(&mut self) -> Result<Vec<Message>> {
        let mut ended = Vec::new();
        for (name, program) in &mut self.0 {
            if program.code.is_some() {
                continue;
            }
            let Some(code) = program.process.exit_code()? else { continue };
            program.code = Some(code);
            let mut output = last_lines(&program.process.log()?);
            if code > 128 {
                output.push('\n');
                output += &shell("dmesg | grep -i 'out of memory' | tail -n 1").unwrap_or_default();
            }
            ended.push(Message::Ended { name: name.clone(), code, output });
        }
        Ok(ended)
    }

    /// The last line of each running program's log, if it is new.
    pub(super) fn progress(&mut self) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        for (name, program) in self.0.iter_mut().filter(|(_, program)| program.code.is_none()) {
            let line = program.process.log()?.lines().next_back().unwrap_or_default().to_owned();
            if line != program.shown {
                program.shown.clone_from(&line);
                messages.push(Message::Progress { name: name.clone(), line });
            }
        }
        Ok(messages)
    }
}
