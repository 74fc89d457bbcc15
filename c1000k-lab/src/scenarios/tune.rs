//! The tune scripts on a real kernel, whose settings they raise and restore.

use anyhow::Result;

use super::run::{ROOT, Run};

pub(super) const NAME: &str = "tune";

pub(super) fn tune(run: &mut Run<'_>) -> Result<()> {
    run.start("tune-test", ROOT, None, "c1000k-lab tune-test --really")?;
    run.await_end("tune-test", 300)?;
    run.collect()?;
    run.expect_code("tune-test", 0)
}
