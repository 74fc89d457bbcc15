//! Connections that close and open for a long time, for `scripts/soak --vm`.

use anyhow::Result;

use super::Settings;
use super::scene::{SERVER, Scene, USER_2};
use crate::guest::guests::ALONE;
use crate::guest::order::Order;
use crate::guest::qemu::Spec;
use crate::million::plan::FIRST_PORT;

pub(super) const NAME: &str = "soak";

const MEMORY_MB: u64 = 4_096;

/// The parameters of `scripts/soak`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Soak {
    pub(crate) seconds: u64,
    pub(crate) connections: u64,
    /// Closes and opens a second.
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

pub(super) fn soak(scene: &mut Scene<'_>) -> Result<()> {
    let Soak { seconds, connections, churn, idle_seconds } = scene.settings.soak;
    scene.start_server(None, &format!("--idle-timeout {idle_seconds}s"))?;
    scene.order(Order::Sample { name: SERVER.to_owned(), every_seconds: 5 })?;
    let words =
        format!("c1000k-lab churn 127.0.0.1 {FIRST_PORT} {connections} {seconds} --churn {churn}");
    scene.start("peers", USER_2, None, &words)?;
    scene.await_end("peers", seconds + 900 + connections / 500)?;
    scene.drained(300)?;
    scene.end_server()?;
    scene.collect()?;
    scene.expect_survived()?;
    scene.expect_code("peers", 0)
}
