//! A run with all that is concluded from it.

use std::error::Error;

use crate::agree::{self, Check};
use crate::chart::{self, Chart};
use crate::run::Run;

/// What there is to tell of a run.
#[derive(Debug)]
pub struct Report {
    /// The run.
    pub run: Run,
    /// Whether clients, server and kernel agree.
    pub checks: Vec<Check>,
    /// The charts for which it has figures.
    pub charts: Vec<Chart>,
}

impl Report {
    /// Checks the run and draws its charts.
    ///
    /// # Errors
    /// A chart can't be laid out.
    pub fn new(run: Run) -> Result<Self, Box<dyn Error>> {
        let (checks, charts) = (agree::checks(&run), chart::charts(&run)?);
        Ok(Self { run, checks, charts })
    }
}
