//! The summary for programs: one JSON object. Its names are stable; fields may be added.

use std::collections::BTreeMap;
use std::error::Error;

use c1000k_record::{
    Churn, ClientRecord, ConnectionBytes, FileTable, LatencyUs, Limit, ServerRecord, Storm,
    Threshold, Workload,
};
use serde::Serialize;

use super::Export;
use crate::bottleneck::{self, Finding};
use crate::checks::{Check, CheckOutcome};
use crate::compare::{Comparison, Row, Spread};
use crate::cost::{self, HostCost, ProcessMemory};
use crate::run::{Run, Topology};
use crate::{Report, escape};

/// The value of `schema`.
pub const SUMMARY_SCHEMA: &str = "c1000k.summary/1";

/// The object, followed by a newline. A figure that is not known is null.
#[derive(Debug)]
pub(super) struct Json;

impl Export for Json {
    fn file_name(&self) -> &'static str {
        "summary.json"
    }

    fn export(&self, report: &Report) -> Result<String, Box<dyn Error>> {
        let text = serde_json::to_string_pretty(&summary(&report.run, &report.checks))?;
        Ok(escape::json(&text) + "\n")
    }

    fn compare(&self, comparison: &Comparison) -> Result<String, Box<dyn Error>> {
        let [first, second] = &comparison.sides;
        let figures = comparison.rows.iter().map(|row| (row.name, Compared::of(row)));
        let object = Compare {
            schema: "c1000k.comparison/1",
            first: &first.name,
            second: &second.name,
            runs: [first.runs.len(), second.runs.len()],
            figures: figures.collect(),
        };
        Ok(escape::json(&serde_json::to_string_pretty(&object)?) + "\n")
    }
}

/// Two runs side by side. The unit of each figure is given.
#[derive(Debug, Serialize)]
struct Compare<'a> {
    schema: &'static str,
    first: &'a str,
    second: &'a str,
    /// The number of runs on each side; figures are their medians.
    runs: [usize; 2],
    figures: BTreeMap<&'static str, Compared>,
}

#[derive(Debug, Serialize)]
struct Compared {
    first: Option<f64>,
    second: Option<f64>,
    ratio: Option<f64>,
    /// The range of the runs of one side as a share of their median; null with one run each.
    noise: Option<f64>,
    /// `unknown`, `within` the noise or `beyond` it.
    difference: &'static str,
    unit: &'static str,
    first_min: Option<f64>,
    first_max: Option<f64>,
    first_runs: usize,
    second_min: Option<f64>,
    second_max: Option<f64>,
    second_runs: usize,
}

impl Compared {
    fn of(row: &Row) -> Self {
        let [first, second] = row.values;
        let runs = |side: Option<Spread>| side.map_or(0, |side| side.runs);
        Self {
            first: first.map(|side| side.median),
            second: second.map(|side| side.median),
            ratio: row.ratio(),
            noise: row.noise(),
            difference: row.difference().name(),
            unit: row.unit.name(),
            first_min: first.map(|side| side.min),
            first_max: first.map(|side| side.max),
            first_runs: runs(first),
            second_min: second.map(|side| side.min),
            second_max: second.map(|side| side.max),
            second_runs: runs(second),
        }
    }
}

#[derive(Debug, Serialize)]
struct Summary<'a> {
    schema: &'static str,
    /// `reached`, `short` or another verdict of the clients'; `apart` or `unknown`.
    verdict: String,
    /// The reason if it is `apart`.
    verdict_detail: Option<String>,
    /// What limited the run, with the evidence; null if no figure shows it.
    bottleneck: Option<Finding>,
    missing: Vec<&'static str>,
    missing_snapshots: Vec<String>,
    topology: Option<&'static str>,
    memory_warmed: Option<bool>,
    target: Option<u64>,
    held_at_once: Option<u64>,
    attempted: Option<u64>,
    retried: Option<u64>,
    verified: Option<u64>,
    not_verified: u64,
    failed: Option<u64>,
    lost: Option<u64>,
    refused_by_server: Option<u64>,
    clients: Vec<Client<'a>>,
    server: Option<Server<'a>>,
    process: Process,
    kernel: Vec<Kernel>,
    kernel_bytes_per_end: Option<f64>,
    checks: Vec<CheckRow<'a>>,
    machine: BTreeMap<&'a str, &'a str>,
}

#[derive(Debug, Serialize)]
struct Client<'a> {
    name: &'a str,
    verdict: String,
    limit: Option<Limit>,
    limit_detail: Option<&'a str>,
    destination: &'a str,
    target: u64,
    established: u64,
    verified: Option<u64>,
    failed: u64,
    lost: u64,
    ramp_seconds: f64,
    connects_per_second: f64,
    connect_latency_us: LatencyUs,
    hold_seconds: f64,
    held_from: Option<&'a str>,
    held_until: Option<&'a str>,
    file_table: Option<FileTable>,
    connection_bytes: Option<ConnectionBytes>,
    process_bytes_per_connection: Option<f64>,
    workload: Option<&'a Workload>,
    churn: Option<&'a Churn>,
    storm: Option<&'a Storm>,
    thresholds: &'a [Threshold],
}

#[derive(Debug, Serialize)]
struct Server<'a> {
    accepted: u64,
    peak: u64,
    refused: u64,
    refused_by: &'a BTreeMap<String, u64>,
    closed: u64,
    open: u64,
    threads: u64,
    cpu_user_seconds: f64,
    cpu_system_seconds: f64,
    file_table: Option<FileTable>,
}

#[derive(Debug, Serialize)]
struct Process {
    before_bytes: Option<u64>,
    peak_bytes: Option<u64>,
    after_bytes: Option<u64>,
    bytes_per_connection: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Kernel {
    host: String,
    ends: u64,
    bytes_per_connection: f64,
    bytes_per_end: f64,
    caches: BTreeMap<String, f64>,
}

#[derive(Debug, Serialize)]
struct CheckRow<'a> {
    name: &'a str,
    outcome: &'static str,
    expected: &'a str,
    found: &'a str,
    note: &'a str,
}

fn summary<'a>(run: &'a Run, checks: &'a [Check]) -> Summary<'a> {
    let sum =
        |figure: fn(&ClientRecord) -> u64| run.sum(figure).filter(|_| !run.clients.is_empty());
    let apart = run.apart();
    let undecided = || if apart.is_some() { "apart" } else { "unknown" }.to_owned();
    Summary {
        schema: SUMMARY_SCHEMA,
        verdict: run.verdict().map_or_else(undecided, |verdict| verdict.to_string()),
        verdict_detail: apart.map(|apart| apart.to_string()),
        bottleneck: bottleneck::find(run),
        missing: run.missing(),
        missing_snapshots: run.missing_snapshots(),
        topology: run.topology_known().map(Topology::name),
        memory_warmed: run.machine.memory_warmed(),
        target: sum(|client| client.target),
        held_at_once: run.connections(),
        attempted: sum(|client| client.attempted),
        retried: sum(|client| client.retried),
        verified: run.verified(),
        not_verified: run.unverified(),
        failed: sum(|client| client.failed),
        lost: sum(|client| client.lost),
        refused_by_server: sum(|client| client.refused_by_server),
        clients: run.clients.iter().map(|(name, client)| Client::of(name, client)).collect(),
        server: run.server.as_ref().map(Server::of),
        process: cost::process(run).into(),
        kernel: cost::kernels(run).into_iter().map(Kernel::from).collect(),
        kernel_bytes_per_end: cost::server_end_bytes(run)
            .or_else(|| run.server.as_ref()?.kernel_bytes_per_connection),
        checks: checks.iter().map(CheckRow::of).collect(),
        machine: run.machine.0.iter().rev().map(|(key, value)| (&key[..], &value[..])).collect(),
    }
}

impl<'a> Client<'a> {
    fn of(name: &'a str, client: &'a ClientRecord) -> Self {
        Self {
            name,
            verdict: client.verdict.to_string(),
            limit: client.limit,
            limit_detail: client.limit_detail.as_deref(),
            destination: &client.destination,
            target: client.target,
            established: client.established,
            verified: client.verified,
            failed: client.failed,
            lost: client.lost,
            ramp_seconds: client.ramp_seconds,
            connects_per_second: client.connects_per_second,
            connect_latency_us: client.connect_latency_us,
            hold_seconds: client.hold_seconds,
            held_from: client.held_from.as_deref(),
            held_until: client.held_until.as_deref(),
            file_table: client.file_table,
            connection_bytes: client.connection_bytes,
            process_bytes_per_connection: client.process_bytes_per_connection,
            workload: client.workload.as_ref(),
            churn: client.churn.as_ref(),
            storm: client.storm.as_ref(),
            thresholds: &client.thresholds,
        }
    }
}

impl<'a> Server<'a> {
    fn of(server: &'a ServerRecord) -> Self {
        Self {
            accepted: server.accepted,
            peak: server.peak,
            refused: server.refused,
            refused_by: &server.refused_by,
            closed: server.closed,
            open: server.open,
            threads: server.threads,
            cpu_user_seconds: server.cpu_user_seconds,
            cpu_system_seconds: server.cpu_system_seconds,
            file_table: server.file_table,
        }
    }
}

impl From<ProcessMemory> for Process {
    fn from(memory: ProcessMemory) -> Self {
        let ProcessMemory { before_bytes, peak_bytes, after_bytes, bytes_each } = memory;
        Self { before_bytes, peak_bytes, after_bytes, bytes_per_connection: bytes_each }
    }
}

impl From<HostCost> for Kernel {
    fn from(cost: HostCost) -> Self {
        Self {
            bytes_per_connection: cost.bytes(),
            bytes_per_end: cost.end_bytes,
            host: cost.host,
            ends: cost.ends,
            caches: cost.caches.into_iter().map(|cache| (cache.name, cache.bytes)).collect(),
        }
    }
}

impl<'a> CheckRow<'a> {
    fn of(check: &'a Check) -> Self {
        let outcome = match check.outcome {
            CheckOutcome::Agrees => "agrees",
            CheckOutcome::Disagrees => "disagrees",
            CheckOutcome::Unknown => "not_seen",
            CheckOutcome::NotJudged => "not_judged",
        };
        let Check { name, expected, found, note, .. } = check;
        Self { name, outcome, expected, found, note }
    }
}
