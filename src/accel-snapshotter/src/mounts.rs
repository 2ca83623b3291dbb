//! Which mounts containerd is told to make: plain overlay over directories and
//! mounted layers, or on request EROFS mounts of the layers' devices and an overlay
//! over those. Nothing is looked at or mounted here.

use crate::snapshot::{Kind, LayerNumber, SnapshotId};
use crate::store::{Lower, Stack};
use std::collections::{HashMap, HashSet};
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

    /// Lower directories with mapped ids, by snapshot.
    pub fn idmaps(&self) -> PathBuf {
        self.root.join("idmaps")
    }

    /// Those of one snapshot.
    pub fn idmap(&self, id: SnapshotId) -> PathBuf {
        self.idmaps().join(id.0.to_string())
    }

    fn lower(&self, lower: &Lower) -> PathBuf {
        match lower {
            Lower::Directory(id) => self.files(*id),
            Lower::Layer(layer) => self.layer(layer.number),
        }
    }
}

/// How mounts are planned.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    /// Overlayfs knows the option `index`, which must be off for directories that
    /// several overlays share.
    pub index_off: bool,
    /// What is mounted at the mount points of layers, if containerd is to mount it
    /// itself, once more, with mounts that refer to each other (from 2.2 on).
    pub native: Option<&'a HashMap<PathBuf, PathBuf>>,
}

/// The directories below a snapshot, topmost first, with their own ids.
pub fn lowers(stack: &Stack, places: &Places) -> Vec<PathBuf> {
    // Of a layer that comes twice, the lower one shows nothing that the upper one
    // does not hide or show as well; overlayfs takes it once.
    let mut seen = HashSet::new();
    let all = stack.lower.iter().map(|lower| places.lower(lower));
    all.filter(|path| seen.insert(path.clone())).collect()
}

/// Where they are with mapped ids, in the same order.
pub fn mapped(stack: &Stack, places: &Places, number: usize) -> Vec<PathBuf> {
    let directory = places.idmap(stack.id);
    (0..number)
        .map(|number| directory.join(number.to_string()))
        .collect()
}

/// The mounts of a view or active snapshot.
pub fn plan(stack: &Stack, places: &Places, how: How<'_>) -> Vec<Mount> {
    let writable = stack.kind == Kind::Active;
    let mut lower = lowers(stack, places);
    if stack.idmap.is_some() {
        lower = mapped(stack, places, lower.len());
    }
    let bind = |path: &Path, how: &str| Mount {
        kind: "bind",
        source: text(path),
        options: vec![how.to_owned(), "rbind".to_owned()],
    };
    let device = |path: &PathBuf| how.native.and_then(|devices| devices.get(path));
    let erofs = |device: &PathBuf| Mount {
        kind: "erofs",
        source: text(device),
        options: vec!["ro".to_owned()],
    };
    match (lower.as_slice(), writable) {
        ([], true) => return vec![bind(&places.files(stack.id), "rw")],
        ([], false) => return vec![bind(&places.files(stack.id), "ro")],
        ([only], false) => {
            return vec![device(only).map_or_else(|| bind(only, "ro"), erofs)];
        }
        _ => {}
    }
    let mut mounts: Vec<_> = lower.iter().filter_map(device).map(erofs).collect();
    let mut options = Vec::new();
    if how.index_off {
        options.push("index=off".to_owned());
    }
    if writable {
        options.push(format!("workdir={}", text(&places.work(stack.id))));
        options.push(format!("upperdir={}", text(&places.files(stack.id))));
    }
    let names: Vec<_> = if mounts.len() == lower.len() && mounts.len() > 1 {
        vec![format!("{{{{ overlay 0 {} }}}}", mounts.len() - 1)]
    } else {
        let mut numbers = 0..mounts.len();
        let name = |path: &PathBuf| match device(path).and_then(|_| numbers.next()) {
            Some(number) => format!("{{{{ mount {number} }}}}"),
            None => text(path),
        };
        lower.iter().map(name).collect()
    };
    options.push(format!("lowerdir={}", names.join(":")));
    mounts.push(Mount {
        kind: match mounts.is_empty() {
            true => "overlay",
            false => "format/overlay",
        },
        source: "overlay".to_owned(),
        options,
    });
    mounts
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idmap::IdMap;
    use crate::snapshot::{Layer, Trust};
    use accel_oci::{ChainId, DiffId, Digest};
    use accel_ufs::index::{ImageSize, Root};

    fn stack(kind: Kind, lower: &[Lower]) -> Stack {
        Stack {
            id: SnapshotId(9),
            kind,
            lower: lower.to_vec(),
            idmap: None,
        }
    }

    fn layer(number: u64) -> Lower {
        let digest = Digest::of(b"x");
        Lower::Layer(Layer {
            number: LayerNumber(number),
            diff_id: DiffId(digest),
            chain_id: ChainId(digest),
            root: Root([1; 32]),
            trust: Trust::Manifest,
            size: ImageSize::new(4096).unwrap(),
        })
    }

    fn planned(stack: &Stack, native: bool) -> String {
        let devices = HashMap::from([("/r/layers/5".into(), "/dev/ublkb3".into())]);
        let how = How {
            index_off: false,
            native: native.then_some(&devices),
        };
        let mounts = plan(stack, &Places::new(Path::new("/r")), how);
        let text = |mount: &Mount| {
            let options = mount.options.join(",");
            format!("{} {} {options}", mount.kind, mount.source)
        };
        mounts.iter().map(text).collect::<Vec<_>>().join("; ")
    }

    const WRITABLE: &str = "workdir=/r/snapshots/9/work,upperdir=/r/snapshots/9/fs";

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
                &format!("overlay overlay {WRITABLE},lowerdir=/r/layers/5:/r/snapshots/3/fs"),
            ),
        ] {
            assert_eq!(planned(&stack(kind, &lower), false), expected);
        }
    }

    #[test]
    fn containerd_can_mount_the_devices_itself() {
        let directory = Lower::Directory(SnapshotId(3));
        let erofs = "erofs /dev/ublkb3 ro";
        for (kind, lower, expected) in [
            (
                Kind::Active,
                vec![],
                "bind /r/snapshots/9/fs rw,rbind".to_owned(),
            ),
            (Kind::View, vec![layer(5)], erofs.to_owned()),
            (
                Kind::Active,
                vec![layer(5)],
                format!("{erofs}; format/overlay overlay {WRITABLE},lowerdir={{{{ mount 0 }}}}"),
            ),
            (
                Kind::View,
                vec![directory, layer(5)],
                format!(
                    "{erofs}; format/overlay overlay lowerdir=/r/snapshots/3/fs:{{{{ mount 0 }}}}"
                ),
            ),
            // Nothing of it is a device: as ever.
            (
                Kind::Active,
                vec![directory],
                format!("overlay overlay {WRITABLE},lowerdir=/r/snapshots/3/fs"),
            ),
        ] {
            assert_eq!(planned(&stack(kind, &lower), true), expected);
        }
        let devices = HashMap::from([5, 6, 7].map(|number| {
            let point = format!("/r/layers/{number}");
            (point.into(), format!("/dev/ublkb{number}").into())
        }));
        let how = How {
            index_off: true,
            native: Some(&devices),
        };
        let three = stack(Kind::Active, &[layer(7), layer(6), layer(5)]);
        let mounts = plan(&three, &Places::new(Path::new("/r")), how);
        let sources: Vec<_> = mounts.iter().map(|mount| mount.source.as_str()).collect();
        assert_eq!(
            sources,
            ["/dev/ublkb7", "/dev/ublkb6", "/dev/ublkb5", "overlay"]
        );
        assert_eq!(mounts[3].options[0], "index=off");
        assert_eq!(mounts[3].options[3], "lowerdir={{ overlay 0 2 }}");
    }

    #[test]
    fn lower_directories_are_those_with_mapped_ids() {
        let mapped = |kind, lower: &[Lower]| Stack {
            idmap: Some(IdMap {
                uids: "0:7:9".to_owned(),
                gids: "0:8:9".to_owned(),
                root: (7, 8),
            }),
            ..stack(kind, lower)
        };
        let directory = Lower::Directory(SnapshotId(3));
        for (kind, lower, expected) in [
            (Kind::Active, vec![], "bind /r/snapshots/9/fs rw,rbind"),
            (Kind::View, vec![layer(5)], "bind /r/idmaps/9/0 ro,rbind"),
            (
                Kind::Active,
                vec![directory, layer(5), directory],
                &format!("overlay overlay {WRITABLE},lowerdir=/r/idmaps/9/0:/r/idmaps/9/1"),
            ),
        ] {
            assert_eq!(planned(&mapped(kind, &lower), true), expected);
        }
    }
}
