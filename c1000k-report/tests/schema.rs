//! The printed JSON Schema, tested with all records of this repository and with broken ones.

#![expect(clippy::unwrap_used, reason = "the panic of a test is its report")]

#[expect(dead_code, reason = "the tests of summaries use the rest")]
mod fixture;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fixture::{Fixture, report};
use jsonschema::Validator;
use serde_json::{Value, json};

/// The schema that is printed.
fn schema(program: &str) -> Value {
    let output = report(&["schema", program]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The same without room for fields that it does not name.
fn strict(mut schema: Value) -> Value {
    let definitions = schema.get_mut("$defs").and_then(Value::as_object_mut);
    for definition in definitions.into_iter().flat_map(|all| all.values_mut()) {
        if definition.get("properties").is_some() {
            definition["additionalProperties"] = json!(false);
        }
    }
    schema["additionalProperties"] = json!(false);
    schema
}

fn record(fixture: &Fixture, name: &str) -> Value {
    serde_json::from_str(&fixture.read(name)).unwrap()
}

fn errors(validator: &Validator, record: &Value) -> Vec<String> {
    validator.iter_errors(record).map(|error| error.to_string()).collect()
}

fn assert_valid(validator: &Validator, record: &Value) {
    assert_eq!(errors(validator, record), Vec::<String>::new());
}

fn for_each_json(folder: &Path, check: &mut impl FnMut(&Path, &Value)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            for_each_json(&path, check);
        } else if path.extension().is_some_and(|extension| extension == "json") {
            check(&path, &serde_json::from_slice(&fs::read(&path).unwrap()).unwrap());
        }
    }
}

#[test]
fn all_records_in_docs_results_are_valid_and_every_field_of_theirs_is_described() {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/results");
    let validators = ["client", "server"].map(|program| {
        let validator = jsonschema::validator_for(&strict(schema(program))).unwrap();
        (format!("c1000k.{program}/1"), validator)
    });
    let validators = BTreeMap::from(validators);
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for_each_json(&results, &mut |path, record| {
        let version = record.get("schema").and_then(Value::as_str).unwrap_or_default();
        let Some(validator) = validators.get(version) else { return };
        assert_eq!(errors(validator, record), Vec::<String>::new(), "{}", path.display());
        *seen.entry(version.to_owned()).or_default() += 1;
    });
    assert!(validators.keys().all(|version| seen.contains_key(version)), "{seen:?}");
}

#[test]
fn a_record_of_a_later_version_with_more_fields_is_valid() {
    let fixture = Fixture::one_host();
    for program in ["client", "server"] {
        let mut record = record(&fixture, &format!("{program}.json"));
        record["moonlight"] = json!({"bright": true});
        assert_valid(&jsonschema::validator_for(&schema(program)).unwrap(), &record);
    }
}

#[test]
fn what_is_no_such_record_is_invalid() {
    let fixture = Fixture::one_host();
    let validator = jsonschema::validator_for(&schema("client")).unwrap();
    let good = record(&fixture, "client.json");
    assert_valid(&validator, &good);
    for (field, value) in [
        ("schema", json!("c1000k.server/1")),
        ("target", json!(-1)),
        ("target", json!("many")),
        ("target", json!(null)),
        ("verdict", json!("splendid")),
        ("limit", json!("moonlight")),
        ("failures", json!({"ECONNREFUSED": "often"})),
        ("ramp_series", json!([{"seconds": 1.0}])),
        ("connect_latency_us", json!({"p50": 1, "p90": 2, "p99": 3, "p999": 4})),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        assert!(!validator.is_valid(&bad), "{field}: {}", bad[field]);
    }
}

#[test]
fn an_unavailable_figure_is_null_and_never_left_out() {
    let fixture = Fixture::one_host();
    for (program, field) in [("client", "verified"), ("server", "user_bytes_per_connection")] {
        let validator = jsonschema::validator_for(&schema(program)).unwrap();
        let mut record = record(&fixture, &format!("{program}.json"));
        record[field] = Value::Null;
        assert_valid(&validator, &record);
        record.as_object_mut().unwrap().remove(field);
        assert!(!validator.is_valid(&record), "{field}");
    }
}
