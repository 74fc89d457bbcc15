//! The records as JSON Schema (draft 2020-12), made from their types.
//!
//! A schema is valid for every record of its version, old and new: fields that were added later may be missing, and
//! unknown fields are allowed.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use serde_json::{Value, json};

pub use schemars::Schema;

use crate::{CLIENT_SCHEMA, ClientRecord, SERVER_SCHEMA, ServerRecord};

/// The schema of [`ClientRecord`].
///
/// ```
/// let schema = c1000k_record::schema::client();
/// assert_eq!(schema.get("title").unwrap(), c1000k_record::CLIENT_SCHEMA);
/// ```
#[must_use]
pub fn client() -> Schema {
    schema_of::<ClientRecord>(CLIENT_SCHEMA)
}

/// The schema of [`ServerRecord`].
#[must_use]
pub fn server() -> Schema {
    schema_of::<ServerRecord>(SERVER_SCHEMA)
}

fn schema_of<T: JsonSchema>(version: &str) -> Schema {
    let settings = SchemaSettings::draft2020_12();
    let settings = settings
        .with_transform(RecursiveTransform(require_what_has_no_default))
        .with_transform(RecursiveTransform(join_lines));
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    schema.insert("title".to_owned(), version.into());
    if let Some(field) = schema.pointer_mut("/properties/schema") {
        field["const"] = json!(version);
    }
    schema
}

/// A figure that is not known is null and never omitted; only a field that was added later has a default.
fn require_what_has_no_default(schema: &mut Schema) {
    let Some(Value::Object(properties)) = schema.get("properties") else { return };
    let fields = properties.iter().filter(|(_, field)| field.get("default").is_none());
    let required = fields.map(|(name, _)| json!(name)).collect();
    schema.insert("required".to_owned(), Value::Array(required));
}

/// Comments are wrapped in the code; a description is one line.
fn join_lines(schema: &mut Schema) {
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.replace('\n', " ");
    }
}
