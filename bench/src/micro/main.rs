//! Compares the reactor's slab and timing wheel with alternatives, and prints the costs as JSON.
//!
//! Both are private to the reactor, so their source files are included here.

// These are modules of another crate: some items are unused here, none is public, and the documentation of token.rs
// links to items of the reactor.
#[allow(dead_code, unreachable_pub)]
#[path = "../../../reactor/src/slab.rs"]
mod slab;
#[allow(dead_code, unreachable_pub)]
#[path = "../../../reactor/src/token.rs"]
mod token;
#[allow(dead_code, unreachable_pub)]
#[path = "../../../reactor/src/wheel.rs"]
mod wheel;

mod memory;
mod slabs;
mod timers;

use std::fs;
use std::io;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use serde::Serialize;

#[derive(Debug, Parser)]
struct Args {
    /// The numbers of entries to measure, one after the other
    #[arg(long, value_delimiter = ',')]
    entries: Vec<usize>,
    #[arg(long)]
    rounds: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args).and_then(|all| Ok(serde_json::to_writer(io::stdout(), &all)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("c1000k-bench-micro: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The cost of one operation.
#[derive(Debug, Serialize)]
struct Micro {
    /// "memory", "timers" or "slab".
    subject: &'static str,
    structure: &'static str,
    entries: usize,
    operation: &'static str,
    /// Bytes per entry for "memory", nanoseconds per operation for the others.
    cost: f64,
    round: usize,
}

/// Measures each structure with each number of entries, in this number of rounds.
fn run(args: &Args) -> io::Result<Vec<Micro>> {
    let mut all = Vec::new();
    for round in 0..args.rounds {
        for &entries in &args.entries {
            let mut note = |subject, structure, operation, cost| {
                all.push(Micro { subject, structure, entries, operation, cost, round });
            };
            memory::run(entries, &mut |structure, operation, bytes| {
                note("memory", structure, operation, bytes);
            })?;
            timers::run(entries, &mut |structure, operation, ns| {
                note("timers", structure, operation, ns);
            })?;
            slabs::run(entries, &mut |structure, operation, ns| {
                note("slab", structure, operation, ns);
            })?;
        }
    }
    Ok(all)
}

/// Anonymous memory of this process.
fn anonymous_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kb = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kb.map(|kb| kb * 1024).ok_or_else(|| io::Error::other("smaps_rollup has no Anonymous line"))
}

/// Nanoseconds per operation.
fn time_each(operations: usize, act: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    act();
    begin.elapsed().as_nanos() as f64 / operations as f64
}

/// Numbers that are the same in each run (xorshift).
#[derive(Debug)]
struct Numbers(u64);

impl Numbers {
    fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * bound as u128) >> 64) as usize
    }
}
