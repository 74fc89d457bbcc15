//! Connections that close and open for a long time, for `scripts/soak --vm`.

use anyhow::Result;

use super::Settings;
use super::run::{Run, SERVER, USER_2};
use crate::guest::guests::ALONE;
use crate::guest::qemu::Spec;
use crate::guest::request::Request;
use crate::million::plan::FIRST_PORT;

pub(super) const NAME: &str = "soak";

const MEMORY_MB: u64 = 4_096;

/// The parameters of `scripts/soak`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Soak {
    pub(crate) seconds: u64,
    pub(crate) connections: u64,
    /// Connections that close and open per second.
    pub(crate) churn: u64,
    pub(crate) idle_seconds: u64,
}

impl Default for Soak {
    fn default() -> Self {
        Self { seconds: 1_200, connections: 300_000, churn: 1_000, idle_seconds: 600 }
    }
}

pub(super) fn guests(settings: &Settings) -> Vec<Spec> {
    let connections = settings.soak.connections;
    vec![Spec { name: ALONE, memory_mb: MEMORY_MB, connections, end: 1, cables: &[] }]
}

pub(super) fn soak(run: &mut Run<'_>) -> Result<()> {
    let Soak { seconds, connections, churn, idle_seconds } = run.settings.soak;
    run.start_server(None, &format!("--idle-timeout {idle_seconds}s"))?;
    run.request(Request::Sample { name: SERVER.to_owned(), interval_seconds: 5 })?;
    let command =
        format!("c1000k-lab churn 127.0.0.1 {FIRST_PORT} {connections} {seconds} --churn {churn}");
    run.start("peers", USER_2, None, &command)?;
    run.await_end("peers", seconds + 900 + connections / 500)?;
    run.drained(300)?;
    run.end_server()?;
    run.collect()?;
    run.expect_survived()?;
    run.expect_code("peers", 0)
}
