//! The tune scripts on a real kernel, whose settings they raise and restore.

use anyhow::Result;

use super::scene::{ROOT, Scene};

pub(super) const NAME: &str = "tune";

pub(super) fn tune(scene: &mut Scene<'_>) -> Result<()> {
    scene.start("tune-test", ROOT, None, "c1000k-lab tune-test --really")?;
    scene.await_end("tune-test", 300)?;
    scene.collect()?;
    scene.expect_code("tune-test", 0)
}
