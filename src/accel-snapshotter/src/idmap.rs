//! User namespaces: whose ids the files of a container have.
//!
//! For a pod with its own user namespace containerd (2.0 and later) says in labels how
//! ids are mapped, if this snapshotter's `capabilities` have `remap-ids`. Its overlay then
//! stands on id-mapped mounts of the lower directories, and no file is copied or changed;
//! what is written belongs to ids of the namespace. The mounts are made here: containerd,
//! told with the options `uidmap` and `gidmap` to do so, maps the directory that has all of
//! the lower ones in it, without what is mounted there (since 2.0.7 and 2.1.5).
//!
//! Without the capability containerd changes the owners of all files beforehand, in a
//! snapshot of its own; the labels come all the same, and mapping once more would be
//! wrong. So there is no mapping on top of a directory whose root belongs to the
//! namespace already.

use crate::snapshot::Labels;
use serde::{Deserialize, Serialize};

const UIDS: &str = "containerd.io/snapshot/uidmapping";
const GIDS: &str = "containerd.io/snapshot/gidmapping";
/// Overlayfs over id-mapped mounts, and id-mapped mounts of EROFS.
const SINCE: (u32, u32) = (5, 19);

/// A mapping, as containerd writes it: `INSIDE:OUTSIDE:LENGTH`, several with commas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// Of users.
    pub uids: String,
    /// Of groups.
    pub gids: String,
    /// User and group outside that are 0 inside.
    pub root: (u32, u32),
}

impl IdMap {
    /// The mapping that the labels ask for, if they do; else what is wrong with them.
    pub fn wanted(labels: &Labels) -> Result<Option<Self>, String> {
        match (labels.get(UIDS), labels.get(GIDS)) {
            (None, None) => Ok(None),
            (Some(uids), Some(gids)) => Ok(Some(Self {
                uids: uids.clone(),
                gids: gids.clone(),
                root: (root(UIDS, uids)?, root(GIDS, gids)?),
            })),
            _ => Err(format!("the labels {UIDS} and {GIDS} belong together")),
        }
    }
}

/// Which id outside is 0 inside.
fn root(label: &str, maps: &str) -> Result<u32, String> {
    let wrong = || format!("the label {label} is wrong: {maps:?}");
    for map in maps.split(',') {
        let numbers: Result<Vec<u32>, _> = map.split(':').map(str::parse).collect();
        match numbers.map_err(|_| wrong())?.as_slice() {
            [0, outside, length] if *length > 0 => return Ok(*outside),
            [_, _, _] => {}
            _ => return Err(wrong()),
        }
    }
    Err(format!("the label {label} maps nothing to 0: {maps:?}"))
}

/// Whether a kernel of this release can.
pub fn supported(release: &str) -> bool {
    version(release).is_some_and(|version| version >= SINCE)
}

/// Major and minor number of a kernel's release.
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The running kernel's release.
pub fn release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(uids: &str, gids: &str) -> Result<Option<IdMap>, String> {
        let labels = [(UIDS, uids), (GIDS, gids)];
        IdMap::wanted(
            &labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        )
    }

    #[test]
    fn the_root_of_a_namespace_is_found() {
        let map = wanted("5:7:1,0:100000:65536", "0:2000:10")
            .unwrap()
            .unwrap();
        assert_eq!(map.root, (100_000, 2000));
        assert_eq!(IdMap::wanted(&Labels::new()), Ok(None));
        for wrong in ["", "0:1", "0:1:x", "1:1:1", "0:1:0", "0:1:1:1"] {
            wanted(wrong, "0:1:1").unwrap_err();
        }
        let half = [(UIDS.to_owned(), "0:1:1".to_owned())].into();
        IdMap::wanted(&half).unwrap_err();
    }

    #[test]
    fn old_kernels_cannot() {
        assert!(supported("5.19.0-1-amd64") && supported("6.1.0") && supported("10.0"));
        assert!(!supported("5.18.9") && !supported("4.19") && !supported("x"));
    }
}
