//! Which mounts containerd is told to make: plain overlay over directories and
//! mounted layers. Nothing is looked at or mounted here.

use crate::snapshot::{Kind, LayerNumber, SnapshotId};
use crate::store::{Lower, Stack};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// A mount as containerd makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Type of file system.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options.
    pub options: Vec<String>,
}

/// Where everything of a root directory lies. Names are short because overlayfs
/// takes all of them in one option string, from which containerd cuts off the
/// common beginning.
#[derive(Debug, Clone)]
pub struct Places {
    root: PathBuf,
}

impl Places {
    /// Beneath `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.root.join("metadata.redb")
    }

    /// Locked by the running snapshotter.
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Directories of snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// A snapshot's directory.
    pub fn snapshot(&self, id: SnapshotId) -> PathBuf {
        self.snapshots().join(id.0.to_string())
    }

    /// Where a snapshot's own files are.
    pub fn files(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join("fs")
    }

    /// Overlayfs' own directory of an active snapshot.
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join("work")
    }

    /// Mount points of layers.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Where a layer is mounted.
    pub fn layer(&self, number: LayerNumber) -> PathBuf {
        self.layers().join(number.0.to_string())
    }

    fn lower(&self, lower: &Lower) -> PathBuf {
        match lower {
            Lower::Directory(id) => self.files(*id),
            Lower::Layer(layer) => self.layer(layer.number),
        }
    }
}

/// The mounts of a view or active snapshot. `index_off`: overlayfs knows the option
/// `index`, which must be off for directories that several overlays share.
pub fn plan(stack: &Stack, places: &Places, index_off: bool) -> Vec<Mount> {
    let writable = stack.kind == Kind::Active;
    // Of a layer that comes twice, the lower one shows nothing that the upper one
    // does not hide or show as well; overlayfs takes it once.
    let mut seen = HashSet::new();
    let mut lower: Vec<_> = stack
        .lower
        .iter()
        .map(|lower| places.lower(lower))
        .collect();
    lower.retain(|path| seen.insert(path.clone()));
    let bind = |path: &Path, how: &str| {
        vec![Mount {
            kind: "bind",
            source: text(path),
            options: vec![how.to_owned(), "rbind".to_owned()],
        }]
    };
    match (lower.as_slice(), writable) {
        ([], true) => return bind(&places.files(stack.id), "rw"),
        ([], false) => return bind(&places.files(stack.id), "ro"),
        ([only], false) => return bind(only, "ro"),
        _ => {}
    }
    let mut options = Vec::new();
    if index_off {
        options.push("index=off".to_owned());
    }
    if writable {
        options.push(format!("workdir={}", text(&places.work(stack.id))));
        options.push(format!("upperdir={}", text(&places.files(stack.id))));
    }
    let lower: Vec<_> = lower.iter().map(|path| text(path)).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    vec![Mount {
        kind: "overlay",
        source: "overlay".to_owned(),
        options,
    }]
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Layer;
    use accel_oci::{ChainId, DiffId, Digest};
    use accel_ufs::index::{ImageSize, Root};

    fn stack(kind: Kind, lower: &[Lower]) -> Stack {
        Stack {
            id: SnapshotId(9),
            kind,
            lower: lower.to_vec(),
        }
    }

    fn layer(number: u64) -> Lower {
        let digest = Digest::of(b"x");
        Lower::Layer(Layer {
            number: LayerNumber(number),
            diff_id: DiffId(digest),
            chain_id: ChainId(digest),
            root: Root([1; 32]),
            size: ImageSize::new(4096).unwrap(),
        })
    }

    fn planned(kind: Kind, lower: &[Lower]) -> String {
        let mounts = plan(&stack(kind, lower), &Places::new(Path::new("/r")), false);
        let [mount] = mounts.as_slice() else {
            panic!("{mounts:?}");
        };
        format!(
            "{} {} {}",
            mount.kind,
            mount.source,
            mount.options.join(",")
        )
    }

    #[test]
    fn mounts_are_containerds() {
        let directory = Lower::Directory(SnapshotId(3));
        for (kind, lower, expected) in [
            (Kind::Active, vec![], "bind /r/snapshots/9/fs rw,rbind"),
            (Kind::View, vec![], "bind /r/snapshots/9/fs ro,rbind"),
            (Kind::View, vec![layer(5)], "bind /r/layers/5 ro,rbind"),
            (
                Kind::View,
                vec![layer(5), layer(5)],
                "bind /r/layers/5 ro,rbind",
            ),
            (
                Kind::View,
                vec![directory, layer(5)],
                "overlay overlay lowerdir=/r/snapshots/3/fs:/r/layers/5",
            ),
            (
                Kind::Active,
                vec![layer(5), directory, layer(5)],
                "overlay overlay workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs,lowerdir=/r/layers/5:/r/snapshots/3/fs",
            ),
        ] {
            assert_eq!(planned(kind, &lower), expected);
        }
    }
}
