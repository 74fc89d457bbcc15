//! The records of the programs under test.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

pub(crate) use c1000k_record::{ClientRecord, Limit, ServerRecord, Verdict};

/// Reads a server's record, in which no field may be missing.
pub(crate) fn server(path: &Path) -> Result<ServerRecord> {
    let mut record = ServerRecord::read(path)?;
    is_whole(path, &record)?;
    // Arguments name paths of this machine, and the series is long.
    record.head.argv.clear();
    record.series.clear();
    Ok(record)
}

/// Reads a client's record, in which no field may be missing.
pub(crate) fn client(path: &Path) -> Result<ClientRecord> {
    let record = ClientRecord::read(path)?;
    is_whole(path, &record)?;
    Ok(record)
}

/// The types read records of older versions too, with a default for missing fields. The programs under test are of this
/// version, so there a missing field is an error.
fn is_whole(path: &Path, record: &impl Serialize) -> Result<()> {
    let written: Value = serde_json::from_slice(&fs::read(path)?)?;
    let known = serde_json::to_value(record)?;
    for (name, _) in known.as_object().context("a record is an object")? {
        if written.get(name).is_none() {
            bail!("{} lacks {name}", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_missing_is_an_error_and_no_zero() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.json");
        let contract = r#"{"schema": "c1000k.client/1", "target": 10, "attempted": 10, "established": 9,
            "verified": 9, "failed": 1, "failures": {}, "lost": 0, "limit": "server", "ramp_seconds": 0.5,
            "connects_per_second": 18.0, "connect_latency_us": {}, "verdict": "short"}"#;
        fs::write(&path, contract).unwrap();
        let older = ClientRecord::read(&path).unwrap();
        assert!(client(&path).unwrap_err().to_string().contains("lacks version"));
        fs::write(&path, serde_json::to_string(&older).unwrap()).unwrap();
        assert_eq!(client(&path).unwrap(), older);
    }
}
