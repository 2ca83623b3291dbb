//! What a node's agent says of the node, for who tells the cluster.
//!
//! The one has UFS and devices and no credentials, the other the reverse; between them is a
//! file on the node's own disk, not on UFS, which is what may be away.

use crate::error::UfsError;
use accel_oci::ChainId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Who reads the file takes an agent that has checked nothing for so long for dead.
pub const SILENCE: Duration = Duration::from_secs(15);

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Whether the node can serve.
    pub healthy: bool,
    /// Whether the last check has failed because nothing could be read from UFS, so that perhaps
    /// UFS is away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ufs_unread: bool,
    /// What came of the last check.
    pub message: String,
    /// How many checks there were: who reads it sees that it goes on, whatever the clocks say.
    pub checks: u64,
    /// How many of the last ones disagree with what is said.
    pub in_a_row: u32,
    /// What containers run on, by the chain ID of the uppermost layer, as it was known last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_chain_ids: Option<BTreeSet<ChainId>>,
}

impl Health {
    /// Reads it.
    ///
    /// # Errors
    /// There is no such file, or it says something else.
    pub fn read(path: &Path) -> Result<Self, UfsError> {
        let json = fs::read(path).map_err(UfsError::io("read", path))?;
        serde_json::from_slice(&json)
            .map_err(io::Error::from)
            .map_err(UfsError::io("understand", path))
    }

    /// Whether it was written just now, by the local clock, by an agent that may be at work still.
    pub fn is_fresh(path: &Path) -> bool {
        let modified = fs::metadata(path).and_then(|found| found.modified());
        let age = modified.ok().and_then(|modified| modified.elapsed().ok());
        age.is_some_and(|age| age < SILENCE)
    }

    /// Writes it, whole.
    ///
    /// # Errors
    /// The file, or one beside it, cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), UfsError> {
        let new = path.with_extension("new");
        let json = serde_json::to_vec(self).map_err(io::Error::from);
        json.and_then(|json| fs::write(&new, json))
            .and_then(|()| fs::rename(&new, path))
            .map_err(UfsError::io("write", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::FileTimes;
    use std::time::SystemTime;

    #[test]
    fn what_is_written_is_read_and_becomes_old() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health.json");
        Health::read(&path).unwrap_err();
        assert!(!Health::is_fresh(&path));
        let health = Health {
            healthy: true,
            ufs_unread: false,
            message: "why".to_owned(),
            checks: 7,
            in_a_row: 1,
            used_chain_ids: None,
        };
        health.write(&path).unwrap();
        assert_eq!(Health::read(&path).unwrap(), health);
        assert!(Health::is_fresh(&path));
        // Programs of different versions meet here.
        let text = r#"{"healthy":true,"message":"why","checks":7,"in_a_row":1}"#;
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        let unread = r#"{"healthy":false,"ufs_unread":true,"message":"","checks":1,"in_a_row":0}"#;
        fs::write(&path, unread).unwrap();
        assert!(Health::read(&path).unwrap().ufs_unread);
        let hex = "ab".repeat(32);
        let used = format!(
            r#"{{"healthy":true,"message":"","checks":1,"in_a_row":0,"used_chain_ids":["sha256:{hex}"]}}"#
        );
        fs::write(&path, used).unwrap();
        let used = Health::read(&path).unwrap().used_chain_ids.unwrap();
        assert_eq!(used.first().unwrap().0.hex(), hex);
        let file = fs::File::options().write(true).open(&path).unwrap();
        let past = SystemTime::now().checked_sub(SILENCE).unwrap();
        file.set_times(FileTimes::new().set_modified(past)).unwrap();
        assert!(!Health::is_fresh(&path));
        fs::write(&path, "{").unwrap();
        let error = Health::read(&path).unwrap_err().to_string();
        assert!(error.starts_with("cannot understand "), "{error}");
    }
}
