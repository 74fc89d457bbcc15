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
    check_fields(path, &record)?;
    // The arguments have paths of this machine, and the series is long.
    record.head.argv.clear();
    record.series.clear();
    Ok(record)
}

/// Reads a client's record, in which no field may be missing.
pub(crate) fn client(path: &Path) -> Result<ClientRecord> {
    let record = ClientRecord::read(path)?;
    check_fields(path, &record)?;
    Ok(record)
}

/// The types also read records of older versions, with a default for missing fields. The programs under test have this
/// version, so a missing field is an error here.
fn check_fields(path: &Path, record: &impl Serialize) -> Result<()> {
    let fields: Value = serde_json::from_slice(&fs::read(path)?)?;
    let known = serde_json::to_value(record)?;
    for (name, _) in known.as_object().context("a record is an object")? {
        if fields.get(name).is_none() {
            bail!("{} lacks {name}", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_field_is_an_error() {
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
