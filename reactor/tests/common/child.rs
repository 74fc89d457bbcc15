//! Runs this test binary as a child process, with line-based queries and answers.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use reactor::Waker;

use super::DEADLINE;

const ROLE: &str = "REACTOR_TEST_IS_CHILD";
/// The prefix of answers, which separates them from the output of the test harness.
const MARK: &str = "child: ";

/// Whether this process is the child.
pub(crate) fn is_child() -> bool {
    std::env::var_os(ROLE).is_some()
}

/// Runs the test of this name in a separate process with this limit of descriptors; panics if it fails.
pub(crate) fn run_alone(test: &str, descriptors: u64) {
    let script = format!("ulimit -n {descriptors}; exec \"$0\" --exact {test} --nocapture");
    let mut alone = Command::new("sh");
    alone.args(["-c", &script]).arg(std::env::current_exe().unwrap()).env(ROLE, "1");
    let output = alone.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) struct Child {
    process: std::process::Child,
    questions: ChildStdin,
    answers: Receiver<String>,
}

impl Child {
    /// Runs the test of this name in a separate process, with this limit of descriptors.
    pub(crate) fn start(test: &str, descriptors: Option<u64>) -> Self {
        let limit = descriptors.map_or(String::new(), |limit| format!("ulimit -n {limit};"));
        let mut process = Command::new("sh")
            .arg("-c")
            .arg(format!("{limit} exec \"$0\" --exact {test} --nocapture --test-threads 1"))
            .arg(std::env::current_exe().unwrap())
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let questions = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, answer)) = line.split_once(MARK) {
                    let _ = sender.send(answer.to_owned());
                }
            }
        });
        Self { process, questions, answers }
    }

    /// Waits for the answer with this name.
    pub(crate) fn read(&self, name: &str) -> String {
        self.read_within(name, DEADLINE)
    }

    pub(crate) fn read_within(&self, name: &str, deadline: Duration) -> String {
        let answer = self.answers.recv_timeout(deadline);
        let answer = answer.unwrap_or_else(|error| panic!("no answer to {name}: {error}"));
        let (said, value) = answer.split_once(' ').unwrap();
        assert_eq!(said, name);
        value.to_owned()
    }

    pub(crate) fn ask(&mut self, question: &str) -> u64 {
        writeln!(self.questions, "{question}").unwrap();
        self.read(question).parse().unwrap()
    }

    /// Ends the child, and checks that its test has passed.
    pub(crate) fn end(mut self) {
        writeln!(self.questions, "end").unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "the child failed: {status}");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Ends the child if the test has failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child's side: the parent's queries, which wake the child's reactor.
pub(crate) struct Questions(Receiver<String>);

impl Questions {
    pub(crate) fn start(waker: Waker) -> Self {
        let (sender, questions) = channel();
        std::thread::spawn(move || {
            let mut lines = std::io::stdin().lines().map_while(Result::ok);
            loop {
                // No line means that the parent has exited.
                let line = lines.next().unwrap_or_else(|| "end".to_owned());
                let is_end = line == "end";
                let _ = sender.send(line);
                waker.wake();
                if is_end {
                    return;
                }
            }
        });
        Self(questions)
    }

    pub(crate) fn next(&self) -> Option<String> {
        self.0.try_recv().ok()
    }

    pub(crate) fn answer(&self, name: &str, value: impl Display) {
        println!("{MARK}{name} {value}");
    }
}
