//! What is kept of a snapshot, and of a lazily loaded layer.

use crate::idmap::IdMap;
use accel_oci::{ChainId, DiffId};
use accel_ufs::index::{ImageSize, Root};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// The label in which containerd says which chain ID it wants.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// Number of a snapshot: the name of its directory. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

/// Number of a layer: the name of its mount point. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerNumber(pub u64);

/// Kind of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only and temporary.
    View,
    /// Writable.
    Active,
    /// Read-only, and a possible parent.
    Committed,
}

impl Kind {
    /// As filters have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A moment: the time since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(pub Duration);

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        Self(
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
        )
    }
}

/// Disk space of a snapshot without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes on disk.
    pub size: u64,
    /// Inodes.
    pub inodes: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its directory.
    pub id: SnapshotId,
    /// What it is.
    pub kind: Kind,
    /// The committed snapshot below.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// When it was made, or committed.
    pub created: Moment,
    /// When its labels last changed.
    pub updated: Moment,
    /// Of a committed one: its disk space.
    pub usage: Usage,
    /// Of a committed one that is loaded lazily.
    pub lazy: Option<Lazy>,
    /// Of an ordinary one whose layer could have been loaded lazily: why it is not.
    pub fallback: Option<String>,
    /// Of a view or active one: how ids are mapped in its mounts.
    #[serde(default)]
    pub idmap: Option<IdMap>,
}

impl Snapshot {
    /// Of a committed one: its chain ID, if it is known.
    pub fn chain_id(&self) -> Option<ChainId> {
        if let Some(lazy) = self.lazy {
            return Some(lazy.chain_id);
        }
        // containerd says it of what it unpacked and checked itself.
        let digest = self.labels.get(SNAPSHOT_REF)?.parse().ok()?;
        Some(ChainId(digest))
    }
}

/// Who says which root a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// The image's manifest.
    #[default]
    Manifest,
    /// UFS, which the operator has allowed. Such a snapshot is another one than that of
    /// an accelerated image, though its root may be the same.
    Ufs,
}

impl Trust {
    /// As `status` shows it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Ufs => "ufs",
        }
    }
}

/// What makes a snapshot lazy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lazy {
    /// Its chain ID, checked.
    pub chain_id: ChainId,
    /// Its layer.
    pub root: Root,
    /// Who says that this is its layer.
    #[serde(default)]
    pub trust: Trust,
}

/// A layer that is, or is about to be, mounted for lazy snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its mount point.
    pub number: LayerNumber,
    /// Which layer.
    pub diff_id: DiffId,
    /// The chain ID it was first asked for with.
    pub chain_id: ChainId,
    /// What vouches for its bytes.
    pub root: Root,
    /// Size of its EROFS image.
    pub size: ImageSize,
    /// Who named the root first.
    #[serde(default)]
    pub trust: Trust,
}
