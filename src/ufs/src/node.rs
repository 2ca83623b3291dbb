//! Which layers nodes use.
//!
//! A node's agent keeps the file `nodes/<cluster>.<node>.<20 digits>.json`: the layers that
//! containers run on, and those that are mounted and might be run on at any time. When that
//! changes the next number is published and the last one removed; while it does not, the
//! file's modification time is renewed every [`RENEWAL`]. One that was not renewed for
//! [`EXPIRY`], by the file system's own clock, tells nothing of the present: then all that
//! is mounted counts as used, until somebody knows that the node is no more.

use crate::claim::is_plain;
use crate::error::UfsError;
use crate::index::Root;
use crate::publish::Ufs;
use crate::record;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

/// Where nodes say what they use.
pub const NODES: &str = "nodes";
/// How often a node says that nothing has changed.
pub const RENEWAL: Duration = Duration::from_secs(20);
/// After how long without that nothing is known of it.
pub const EXPIRY: Duration = Duration::from_secs(90);
/// How long a removal waits for what nodes say of themselves: what is used now must be said
/// by then.
pub const SETTLE: Duration = Duration::from_secs(10);

/// What a node uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Always [`record::LAYOUT`].
    pub layout: u32,
    /// Layers that something runs on, by the root of their image.
    pub used: BTreeSet<Root>,
    /// Layers that are mounted, those that are used among them.
    pub held: BTreeSet<Root>,
}

/// A node: its cluster, and its name there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeName {
    /// The cluster.
    pub cluster: String,
    /// The node.
    pub node: String,
}

/// Longer than any name of a node, so that a file can be called like it.
const MAX_NAME: usize = 200;

impl NodeName {
    /// `cluster`: letters, digits, `-` and `_`; `node`: those and dots, as Kubernetes names
    /// nodes.
    pub fn new(cluster: &str, node: &str) -> Option<Self> {
        let fits = node.len() <= MAX_NAME && node.split('.').all(is_plain) && is_plain(cluster);
        fits.then(|| Self {
            cluster: cluster.to_owned(),
            node: node.to_owned(),
        })
    }

    fn of_file(file: &str) -> Option<(Self, u64)> {
        let (cluster, rest) = file.strip_suffix(".json")?.split_once('.')?;
        let (node, number) = rest.rsplit_once('.')?;
        let digits = number.len() == 20 && number.bytes().all(|b| b.is_ascii_digit());
        let number = number.parse().ok().filter(|_| digits)?;
        Some((Self::new(cluster, node)?, number))
    }

    fn file(&self, number: u64) -> String {
        format!("{NODES}/{}.{}.{number:020}.json", self.cluster, self.node)
    }

    /// Where it is noted which canary is the node's.
    pub(crate) fn canary_note(&self) -> String {
        format!("{NODES}/{}.{}.canary", self.cluster, self.node)
    }
}

/// What a node has said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundNode {
    /// Which node.
    pub name: NodeName,
    /// Whether that was long ago.
    pub expired: bool,
    /// What it said.
    pub record: NodeRecord,
}

impl FoundNode {
    /// The layers that must not go because of it.
    pub const fn needs(&self) -> &BTreeSet<Root> {
        match self.expired {
            true => &self.record.held,
            false => &self.record.used,
        }
    }
}

/// A node's word on UFS, kept by its agent.
#[derive(Debug)]
pub struct NodeLease {
    ufs: Ufs,
    name: NodeName,
    number: u64,
    said: Option<NodeRecord>,
}

impl NodeLease {
    /// Goes on from what the node has said before.
    pub fn open(ufs: Ufs, name: NodeName) -> Result<Self, UfsError> {
        ufs.check_there()?;
        ufs.make_nodes()?;
        let mut lease = Self {
            ufs,
            name,
            number: 0,
            said: None,
        };
        lease.number = lease.files()?.into_iter().max().unwrap_or(0);
        Ok(lease)
    }

    fn files(&self) -> Result<Vec<u64>, UfsError> {
        let files = self.ufs.list(&self.ufs.rel(NODES)?)?;
        let mine = files.iter().filter_map(|file| NodeName::of_file(file));
        Ok(mine
            .filter(|(name, _)| *name == self.name)
            .map(|(_, number)| number)
            .collect())
    }

    /// Says what the node uses now.
    pub fn say(&mut self, used: BTreeSet<Root>, held: BTreeSet<Root>) -> Result<(), UfsError> {
        let record = NodeRecord {
            layout: record::LAYOUT,
            used,
            held,
        };
        if self.said.as_ref() == Some(&record) {
            let path = self.ufs.root().join(self.name.file(self.number));
            let renewed = OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|file| crate::lease::renew(&file));
            match renewed {
                // Somebody has removed it: said anew below.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renewed => return renewed.map_err(UfsError::io("renew", &path)),
            }
        }
        self.said = None;
        self.number = self.number.saturating_add(1);
        self.ufs.check_there()?;
        let path = self.ufs.root().join(self.name.file(self.number));
        // Not by way of tmp/, which nodes need not be able to write to: nobody reads this one
        // before the last one is gone but whoever finds it whole.
        let new = path.with_extension("new");
        let write = || {
            let file = File::create(&new)?;
            io::Write::write_all(&mut &file, &record::to_json(&record))?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(UfsError::io("write", &path))?;
        for number in self.files()? {
            if number < self.number {
                crate::removal::unlink(&self.ufs.root().join(self.name.file(number)))?;
            }
        }
        self.said = Some(record);
        Ok(())
    }
}

impl Ufs {
    /// Makes the directory that nodes say in what they use, and lets every node in: on NFS
    /// they are nobody in particular. None can touch what is another's.
    pub(crate) fn make_nodes(&self) -> Result<(), UfsError> {
        let directory = self.root().join(NODES);
        match fs::create_dir(&directory) {
            Ok(()) => {
                let all = fs::Permissions::from_mode(0o1777);
                fs::set_permissions(&directory, all)
                    .map_err(UfsError::io("set permissions of", &directory))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(UfsError::io("make the directory", &directory)(error)),
        }
    }

    /// What each node has said last.
    ///
    /// # Errors
    /// What one has said cannot be read: then it is not known what it needs.
    pub fn nodes(&self) -> Result<Vec<FoundNode>, UfsError> {
        let directory = self.rel(NODES)?;
        let clock = self.clock()?;
        // A node may say something new, and remove what it said, while it is being read.
        'again: loop {
            let mut last = BTreeMap::new();
            for file in self.list_now(&directory)? {
                if let Some((name, number)) = NodeName::of_file(&file) {
                    let there = last.entry(name).or_insert(number);
                    *there = number.max(*there);
                }
            }
            let mut found = Vec::new();
            for (name, number) in last {
                let path = self.rel(&name.file(number))?;
                let Some(json) = self.read_record(&path)? else {
                    continue 'again;
                };
                let path = self.path(&path);
                let record =
                    record::parse(&json, "a node's word").map_err(|error| UfsError::Record {
                        path: path.clone(),
                        error,
                    })?;
                let renewed = match File::open(&path).and_then(|file| file.metadata()?.modified()) {
                    Ok(renewed) => renewed,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue 'again,
                    Err(error) => return Err(UfsError::io("look at", &path)(error)),
                };
                found.push(FoundNode {
                    name,
                    expired: is_over(renewed, clock),
                    record,
                });
            }
            return Ok(found);
        }
    }

    /// Forgets what a node that is no more has said, and what it has left.
    pub fn forget_node(&self, name: &NodeName) -> Result<(), UfsError> {
        for file in self.list_now(&self.rel(NODES)?)? {
            match NodeName::of_file(&file) {
                Some((found, number)) if found == *name => {
                    crate::removal::unlink(&self.root().join(name.file(number)))?;
                }
                _ => {}
            }
        }
        self.remove_canary(name)
    }
}

fn is_over(renewed: SystemTime, clock: SystemTime) -> bool {
    clock.duration_since(renewed).is_ok_and(|age| age >= EXPIRY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::FileTimes;

    fn ufs() -> (tempfile::TempDir, Ufs) {
        let directory = tempfile::tempdir().unwrap();
        let ufs = Ufs::open(directory.path()).unwrap();
        (directory, ufs)
    }

    fn roots(numbers: &[u8]) -> BTreeSet<Root> {
        numbers.iter().map(|number| Root([*number; 32])).collect()
    }

    #[test]
    fn names_with_dots_are_read_back() {
        let name = NodeName::new("c-1", "a.b-2.example").unwrap();
        let file = name.file(7);
        let file = file.strip_prefix("nodes/").unwrap();
        assert_eq!(NodeName::of_file(file), Some((name, 7)));
        for (cluster, node) in [
            ("a.b", "n"),
            ("", "n"),
            ("a", ""),
            ("a", "n/.."),
            ("a", ".."),
        ] {
            assert_eq!(NodeName::new(cluster, node), None, "{cluster} {node}");
        }
        assert_eq!(NodeName::of_file("a.b.1.json"), None);
    }

    #[test]
    fn what_a_node_said_last_counts() {
        let (_directory, ufs) = ufs();
        assert_eq!(ufs.nodes().unwrap(), []);
        let name = NodeName::new("c", "n.x").unwrap();
        let mut lease = NodeLease::open(ufs.clone(), name.clone()).unwrap();
        lease.say(roots(&[1]), roots(&[1, 2])).unwrap();
        lease.say(roots(&[1]), roots(&[1, 2])).unwrap();
        lease.say(roots(&[2]), roots(&[1, 2])).unwrap();
        let [found] = &ufs.nodes().unwrap()[..] else {
            panic!("not one")
        };
        assert_eq!((found.needs(), found.expired), (&roots(&[2]), false));
        // An agent that starts again.
        let mut lease = NodeLease::open(ufs.clone(), name.clone()).unwrap();
        lease.say(roots(&[3]), roots(&[3])).unwrap();
        assert_eq!(ufs.nodes().unwrap()[0].needs(), &roots(&[3]));
        assert_eq!(ufs.list(&ufs.rel(NODES).unwrap()).unwrap().len(), 1);
        // Its file is removed, and it says the same again.
        ufs.forget_node(&name).unwrap();
        assert_eq!(ufs.nodes().unwrap(), []);
        lease.say(roots(&[3]), roots(&[3])).unwrap();
        assert_eq!(ufs.nodes().unwrap()[0].needs(), &roots(&[3]));
    }

    #[test]
    fn of_a_silent_node_all_that_is_mounted_counts() {
        let (_directory, ufs) = ufs();
        let name = NodeName::new("c", "n").unwrap();
        let mut lease = NodeLease::open(ufs.clone(), name.clone()).unwrap();
        lease.say(roots(&[1]), roots(&[1, 2])).unwrap();
        let file = OpenOptions::new()
            .write(true)
            .open(ufs.root().join(name.file(1)))
            .unwrap();
        let set = |age: Duration| {
            let past = SystemTime::now().checked_sub(age).unwrap();
            file.set_times(FileTimes::new().set_modified(past)).unwrap();
        };
        set(EXPIRY / 2);
        assert_eq!(ufs.nodes().unwrap()[0].needs(), &roots(&[1]));
        set(EXPIRY * 2);
        let found = &ufs.nodes().unwrap()[0];
        assert_eq!((found.needs(), found.expired), (&roots(&[1, 2]), true));
        lease.say(roots(&[1]), roots(&[1, 2])).unwrap();
        assert!(!ufs.nodes().unwrap()[0].expired);
    }
}
