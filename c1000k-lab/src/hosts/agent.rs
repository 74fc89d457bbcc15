//! The agent of a host: starts programs, waits for conditions, and replies, as the lab requests.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use procfs::{Current, Meminfo};

use super::condition::{Look, look_for};
use super::request::{Message, Numbered, Request, Start};
use crate::process::{Place, Process, inside, last_words, output};
use crate::{record, snapshot};

/// Between two looks at what is waited for.
const TICK: Duration = Duration::from_millis(200);

/// Between two lines of a program's progress in a guest, whose serial port is slow.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Is the agent of a host of this machine, in the folder that it runs in
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The host's name
    name: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let (name, folder) = (arguments.name.clone(), env::current_dir()?);
    let mut agent = Agent::new(name, folder, io::stdin(), Box::new(io::stdout()));
    agent.is_native = true;
    agent.serve()?;
    Ok(ExitCode::SUCCESS)
}

/// A program, how much of its log was sent, and whether its end was.
#[derive(Debug)]
struct Program {
    process: Process,
    sent_bytes: usize,
    has_ended: bool,
}

impl Program {
    /// The lines that were not sent yet.
    fn news(&mut self) -> Result<String> {
        let log = self.process.log()?;
        let news = log.get(self.sent_bytes..).unwrap_or_default();
        let whole = news.rfind('\n').map_or(0, |end| end + 1);
        self.sent_bytes += whole;
        Ok(news[..whole].trim_end().to_owned())
    }
}

/// The programs of a host by name.
#[derive(Debug, Default)]
pub(super) struct Programs(BTreeMap<String, Program>);

impl Programs {
    pub(super) fn named(&mut self, name: &str) -> Result<&mut Process> {
        let program = self.0.get_mut(name).with_context(|| format!("no '{name}' was started"))?;
        Ok(&mut program.process)
    }
}

/// A request that has no reply yet.
struct Wait {
    number: u64,
    look: Look,
    until: Instant,
    /// What is waited for.
    what: String,
}

pub(crate) struct Agent {
    name: String,
    /// Where the programs work, and all files are.
    folder: PathBuf,
    is_native: bool,
    port: Box<dyn Write>,
    requests: Receiver<Numbered>,
    programs: Programs,
    waits: Vec<Wait>,
    progress_at: Instant,
}

impl Agent {
    pub(crate) fn new(
        name: String,
        folder: PathBuf,
        requests: impl Read + Send + 'static,
        port: Box<dyn Write>,
    ) -> Self {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            for line in BufReader::new(requests).lines().map_while(Result::ok) {
                let sent = serde_json::from_str(&line).map(|request| sender.send(request));
                match sent {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return,
                    Err(why) => eprintln!("no request, {why}: {line}"),
                }
            }
        });
        Self {
            name,
            folder,
            is_native: false,
            port,
            requests: receiver,
            programs: Programs::default(),
            waits: Vec::new(),
            progress_at: Instant::now(),
        }
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        self.port.write_all(line.as_bytes())?;
        Ok(self.port.flush()?)
    }

    /// Returns after the request to end.
    pub(crate) fn serve(&mut self) -> Result<()> {
        self.send(&Message::Ready(describe_machine()?))?;
        loop {
            match self.requests.recv_timeout(TICK) {
                Ok(Numbered { number, request }) => {
                    let is_last = matches!(request, Request::End);
                    match self.handle(number, request) {
                        Ok(None) => {}
                        reply => self.reply(number, reply.map(Option::unwrap_or_default))?,
                    }
                    if is_last {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the lab has ended"),
            }
            self.send_news()?;
            self.look_at_waits()?;
        }
    }

    fn reply(&mut self, number: u64, reply: Result<String>) -> Result<()> {
        let reply = reply.map_err(|why| format!("{why:#}"));
        self.send(&Message::Reply { number, reply })
    }

    /// `None` where the reply comes later.
    fn handle(&mut self, number: u64, request: Request) -> Result<Option<String>> {
        let mut reply = String::new();
        match request {
            Request::Start(start) => self.start(start)?,
            Request::Signal { name, signal } => {
                self.programs.named(&name)?.signal(Signal::try_from(signal)?)?;
            }
            Request::Run(command) => reply = shell(&command)?,
            Request::Snapshot(moment) => {
                let server =
                    self.programs.named("server").ok().filter(|server| server.is_running());
                let folder = self.folder.join("snapshots").join(&self.name).join(moment);
                snapshot::take(&folder, server.map(|server| server.pid()))?;
            }
            Request::Established(client) => {
                let record = record::client(&self.folder.join(format!("{client}.json")))?;
                reply = record.established.to_string();
            }
            Request::Sample { name, every_seconds } => {
                let pid = self.programs.named(&name)?.pid();
                let log = File::create(self.folder.join("samples.log"))?;
                thread::spawn(move || sample(pid, Duration::from_secs(every_seconds), log));
            }
            Request::Await { condition, within_seconds } => {
                let what = format!("not within {within_seconds} s: {condition:?}");
                let look = look_for(condition, &mut self.programs)?;
                let until = Instant::now() + Duration::from_secs(within_seconds);
                self.waits.push(Wait { number, look, until, what });
                return Ok(None);
            }
            Request::End if self.is_native => {}
            Request::End => crate::guest::init::write_disk(&self.name)?,
        }
        Ok(Some(reply))
    }

    fn start(&mut self, start: Start) -> Result<()> {
        let Start { name, user, cgroup, words } = start;
        let [program, arguments @ ..] = words.as_slice() else { bail!("no program is given") };
        let place = Place {
            cgroup: cgroup.map(PathBuf::from),
            user: (user != 0).then_some(user),
            is_expendable: self.is_native,
            ..Place::default()
        };
        let mut command = inside(&place, program)?;
        command.args(arguments).current_dir(&self.folder).env("PATH", path());
        let log = self.folder.join(format!("{name}.log"));
        let process = Process::spawn_logged(&name, &mut command, log)?;
        self.programs.0.insert(name, Program { process, sent_bytes: 0, has_ended: false });
        Ok(())
    }

    /// Sends what the programs have logged since the last time, and which have ended.
    fn send_news(&mut self) -> Result<()> {
        let mut messages = Vec::new();
        let is_due = self.is_native || self.progress_at.elapsed() >= PROGRESS_EVERY;
        if is_due {
            self.progress_at = Instant::now();
        }
        for (name, program) in self.programs.0.iter_mut().filter(|(_, program)| !program.has_ended)
        {
            let (name, code) = (name.clone(), program.process.code()?);
            let Some(code) = code else {
                let news = if is_due { program.news()? } else { String::new() };
                let newest = news.lines().next_back().unwrap_or_default();
                let lines = if self.is_native { news } else { newest.to_owned() };
                messages.extend((!lines.is_empty()).then_some(Message::Progress { name, lines }));
                continue;
            };
            program.has_ended = true;
            let words = match self.is_native {
                true => program.news()?,
                false => guest_words(&program.process.log()?, code),
            };
            messages.push(Message::Ended { name, code, words });
        }
        messages.iter().try_for_each(|message| self.send(message))
    }

    fn look_at_waits(&mut self) -> Result<()> {
        for mut wait in std::mem::take(&mut self.waits) {
            match (wait.look)(&mut self.programs).transpose() {
                Some(reply) => self.reply(wait.number, reply)?,
                None if Instant::now() > wait.until => {
                    self.reply(wait.number, Err(anyhow::Error::msg(wait.what)))?;
                }
                None => self.waits.push(wait),
            }
        }
        Ok(())
    }
}

/// The end of a log, and what the kernel has printed if a signal ended the program.
fn guest_words(log: &str, code: i32) -> String {
    let mut words = last_words(log);
    if code > 128 {
        words.push('\n');
        words += &shell("dmesg | grep -i 'out of memory' | tail -n 1").unwrap_or_default();
    }
    words
}

/// The kernel starts process 1 of a guest without one.
fn path() -> OsString {
    env::var_os("PATH").unwrap_or_else(|| "/bin".into())
}

/// The output of a command; an error if it fails.
pub(crate) fn shell(command: &str) -> Result<String> {
    output(Command::new("sh").args(["-c", command]).env("PATH", path()))
}

fn describe_machine() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let memory_kb = Meminfo::current()?.mem_total >> 10;
    let cpus = thread::available_parallelism()?;
    Ok(format!("kernel: Linux {}\ncpus: {cpus}\nmemory_kb: {memory_kb}\n", release.trim()))
}

/// Logs how many files are open here, the process's memory in kB, and the kernel's slabs in kB, until the process has
/// ended. To list 300,000 descriptors would itself take memory and time.
fn sample(pid: Pid, every: Duration, mut log: File) -> Result<()> {
    let process = procfs::process::Process::new(pid.as_raw())?;
    let began = Instant::now();
    while let Some(rss_kb) = process.status()?.vmrss {
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files.split_whitespace().next().unwrap_or_default();
        let slab_kb = Meminfo::current()?.slab >> 10;
        writeln!(log, "{:.2} {files} {rss_kb} {slab_kb}", began.elapsed().as_secs_f64())?;
        thread::sleep(every);
    }
    Ok(())
}
