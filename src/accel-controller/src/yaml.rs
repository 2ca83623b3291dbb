//! What is printed for `kubectl apply -f -`.

use anyhow::Result;
use serde_json::Value;

/// All of them as YAML documents.
pub(crate) fn documents(all: impl IntoIterator<Item = Value>) -> Result<String> {
    let mut text = String::new();
    for document in all {
        text += "---\n";
        text += &serde_saphyr::to_string(&document)?;
    }
    Ok(text)
}
