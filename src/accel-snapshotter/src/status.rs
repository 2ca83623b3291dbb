//! What `accel-snapshotter status` shows.

use accel_oci::{ChainId, DiffId};
use accel_ufs::index::Root;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

/// Everything there is to say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Process id.
    pub pid: u32,
    /// Version.
    pub version: String,
    /// The root directory.
    pub root: PathBuf,
    /// Where `ublk-server` is asked.
    pub server: PathBuf,
    /// The UFS that layers have to come from, if one was named.
    #[serde(default)]
    pub ufs: Option<PathBuf>,
    /// How many snapshots there are.
    pub snapshots: usize,
    /// Layers that could be loaded lazily, since the start.
    pub hits: u64,
    /// Layers of accelerated images that had to be unpacked, since the start.
    pub fallbacks: u64,
    /// The same by reason.
    pub fallback_reasons: BTreeMap<String, u64>,
    /// Layers that are loaded lazily.
    pub layers: Vec<LayerStatus>,
    /// What containers run on, and pulls are putting something on top of, by the chain ID of the
    /// uppermost layer; images that have no lazily loaded layer are not among it. Missing from a
    /// snapshotter of an older version.
    #[serde(default)]
    pub used_chain_ids: Option<BTreeSet<ChainId>>,
    /// Snapshots of accelerated images that were unpacked.
    pub unpacked: Vec<Unpacked>,
}

/// A lazily loaded layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerStatus {
    /// Which one.
    pub diff_id: DiffId,
    /// Its BLAKE3.
    pub root: Root,
    /// Size of its EROFS image in bytes.
    pub size: u64,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Whether it is.
    pub mounted: bool,
    /// How many snapshots have it.
    pub snapshots: usize,
    /// How many containers run on it, and pulls are putting something on top of it.
    #[serde(default)]
    pub users: usize,
    /// `manifest`: the images name its root. `ufs`: of one of them nobody does but UFS.
    pub trust: String,
}

/// A snapshot that was unpacked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Unpacked {
    /// Its name.
    pub snapshot: String,
    /// Why.
    pub why: String,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "snapshotter process {}, version {}",
            self.pid, self.version
        )?;
        writeln!(f, "root        {}", self.root.display())?;
        writeln!(f, "ublk-server {}", self.server.display())?;
        if let Some(ufs) = &self.ufs {
            writeln!(f, "UFS         {}, and no other", ufs.display())?;
        }
        writeln!(f, "snapshots   {}", self.snapshots)?;
        writeln!(f, "hits        {}", self.hits)?;
        write!(f, "fallbacks   {}", self.fallbacks)?;
        for (reason, number) in &self.fallback_reasons {
            write!(f, "; {reason} {number}")?;
        }
        writeln!(f)?;
        for layer in &self.layers {
            let state = if layer.mounted {
                "mounted"
            } else {
                "NOT MOUNTED"
            };
            let digest = layer.diff_id.to_string();
            writeln!(
                f,
                "lazy        {} {} bytes, {state} at {}, {} snapshots, {} users, trust: {}",
                &digest[..19],
                layer.size,
                layer.point.display(),
                layer.snapshots,
                layer.users,
                layer.trust
            )?;
        }
        for unpacked in &self.unpacked {
            writeln!(f, "unpacked    {}: {}", unpacked.snapshot, unpacked.why)?;
        }
        Ok(())
    }
}
