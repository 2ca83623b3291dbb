//! Which snapshots there are: containerd's rules for them, and a database on disk.
//!
//! Everything is held in memory and every change goes to the database (redb: one
//! file, transactions, a crash leaves the last one that was committed) before it
//! counts. Values are JSON.
//!
//! | table | key | value |
//! |---|---|---|
//! | `snapshots` | name | [`Snapshot`] |
//! | `layers` | root | [`Layer`] |
//! | `numbers` | `layout`, `next` | format of this database; the next free number |
//!
//! Directories are made before the snapshot is in the database and removed after it
//! has left it, so what is on disk without being in the database is garbage.

use crate::idmap::IdMap;
use crate::snapshot::{
    Kind, Labels, Layer, LayerNumber, Lazy, Moment, Snapshot, SnapshotId, Trust, Usage,
};
use accel_oci::ChainId;
use accel_ufs::annotations::LayerAnnotations;
use accel_ufs::index::Root;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const LAYERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("layers");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// Format of the database.
const LAYOUT: u64 = 1;

/// Why something about a snapshot is not possible.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such snapshot.
    #[error("there is no snapshot {0:?}")]
    NotFound(String),
    /// There is one already.
    #[error("the snapshot {0:?} exists already")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not in the snapshot's present state.
    #[error("{0}")]
    State(String),
    /// The database or a directory cannot be changed.
    #[error("cannot {doing} {path:?}: {why}")]
    Disk {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        why: String,
    },
}

type Result<T> = std::result::Result<T, StoreError>;

/// The snapshots of one root directory.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    database: Database,
    snapshots: BTreeMap<String, Snapshot>,
    layers: HashMap<Root, Layer>,
    next: u64,
    /// Layers that somebody is about to make a snapshot of.
    pinned: HashMap<Root, usize>,
}

/// A change on its way to the database. `None` removes.
#[derive(Default)]
struct Change<'a> {
    snapshots: Vec<(&'a str, Option<&'a Snapshot>)>,
    layers: Vec<(Root, Option<&'a Layer>)>,
    next: Option<u64>,
}

/// What lies below a snapshot, topmost first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lower {
    /// An ordinary snapshot's directory.
    Directory(SnapshotId),
    /// A mounted layer.
    Layer(Layer),
}

/// A snapshot that is to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its directory.
    pub id: SnapshotId,
    /// View or active.
    pub kind: Kind,
    /// What is below, topmost first.
    pub lower: Vec<Lower>,
    /// How ids are mapped.
    pub idmap: Option<IdMap>,
}

/// What is new about a view or active snapshot, beside its name and place.
#[derive(Debug, Clone, Default)]
pub struct New {
    /// Its labels.
    pub labels: Labels,
    /// Why its layer is not loaded lazily.
    pub fallback: Option<String>,
    /// How ids are mapped.
    pub idmap: Option<IdMap>,
}

impl Store {
    /// Opens the database, or makes it.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |why: String| StoreError::Disk {
            doing: "open the database",
            path: path.to_owned(),
            why,
        };
        let database = Database::create(path).map_err(|error| fail(error.to_string()))?;
        let inner = load(database).map_err(|error| fail(error.to_string()))?;
        Ok(Self {
            path: path.to_owned(),
            inner: Mutex::new(inner),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, inner: &Inner, change: &Change<'_>) -> Result<()> {
        commit(&inner.database, change).map_err(|error| StoreError::Disk {
            doing: "write the database",
            path: self.path.clone(),
            why: error.to_string(),
        })
    }

    /// Makes a snapshot of kind view or active. `prepare` makes its directory.
    pub fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        new: New,
        prepare: impl FnOnce(SnapshotId) -> io::Result<PathBuf>,
    ) -> Result<Stack> {
        if key.is_empty() {
            return Err(StoreError::Invalid(
                "a snapshot must have a name".to_owned(),
            ));
        }
        let mut inner = self.inner();
        inner.check_parent(parent)?;
        if inner.snapshots.contains_key(key) {
            return Err(StoreError::Exists(key.to_owned()));
        }
        let now = Moment::now();
        let snapshot = Snapshot {
            id: SnapshotId(inner.next),
            kind,
            parent: parent.map(str::to_owned),
            labels: filled(new.labels),
            created: now,
            updated: now,
            usage: Usage::default(),
            lazy: None,
            fallback: new.fallback,
            idmap: new.idmap,
        };
        let directory = prepare(snapshot.id).map_err(|error| StoreError::Disk {
            doing: "make the directory of",
            path: key.into(),
            why: error.to_string(),
        })?;
        let next = inner.next + 1;
        let change = Change {
            snapshots: vec![(key, Some(&snapshot))],
            next: Some(next),
            ..Change::default()
        };
        if let Err(error) = self.write(&inner, &change) {
            // Nothing refers to it; if this fails too, the next clean-up does it.
            let _ = std::fs::remove_dir_all(directory);
            return Err(error);
        }
        inner.next = next;
        inner.snapshots.insert(key.to_owned(), snapshot);
        inner.stack(key)
    }

    /// Makes an active snapshot a committed one with another name. `usage` is what
    /// its directory has.
    pub fn commit(&self, key: &str, name: &str, labels: Labels, usage: Usage) -> Result<()> {
        if name.is_empty() {
            return Err(StoreError::Invalid(
                "a snapshot must have a name".to_owned(),
            ));
        }
        let mut inner = self.inner();
        let active = inner.get(key)?;
        if active.kind != Kind::Active {
            let kind = active.kind.name();
            return Err(StoreError::State(format!(
                "the snapshot {key:?} is {kind}, not active"
            )));
        }
        if inner.snapshots.contains_key(name) {
            return Err(StoreError::Exists(name.to_owned()));
        }
        let now = Moment::now();
        let snapshot = Snapshot {
            kind: Kind::Committed,
            labels: filled(labels),
            created: now,
            updated: now,
            usage,
            idmap: None,
            ..active.clone()
        };
        let change = Change {
            snapshots: vec![(key, None), (name, Some(&snapshot))],
            ..Change::default()
        };
        self.write(&inner, &change)?;
        inner.snapshots.remove(key);
        inner.snapshots.insert(name.to_owned(), snapshot);
        Ok(())
    }

    /// Forgets a snapshot. What it has on disk becomes garbage.
    pub fn remove(&self, key: &str) -> Result<()> {
        let mut inner = self.inner();
        inner.get(key)?;
        if inner
            .snapshots
            .values()
            .any(|other| other.parent.as_deref() == Some(key))
        {
            return Err(StoreError::State(format!(
                "cannot remove the snapshot {key:?}: it has children"
            )));
        }
        let change = Change {
            snapshots: vec![(key, None)],
            ..Change::default()
        };
        self.write(&inner, &change)?;
        inner.snapshots.remove(key);
        Ok(())
    }

    /// Changes labels: all of them, or those that `paths` name (`labels`,
    /// `labels.<key>`). One without a value goes.
    pub fn update(&self, key: &str, labels: &Labels, paths: &[String]) -> Result<Snapshot> {
        let mut inner = self.inner();
        let mut snapshot = inner.get(key)?.clone();
        if paths.is_empty() {
            snapshot.labels = labels.clone();
        }
        for path in paths {
            match path.strip_prefix("labels.") {
                Some(label) => {
                    let value = labels.get(label).cloned().unwrap_or_default();
                    snapshot.labels.insert(label.to_owned(), value);
                }
                None if path == "labels" => snapshot.labels = labels.clone(),
                None => {
                    return Err(StoreError::Invalid(format!(
                        "the field {path:?} of the snapshot {key:?} cannot be changed"
                    )));
                }
            }
        }
        snapshot.labels = filled(snapshot.labels);
        snapshot.updated = Moment::now();
        let change = Change {
            snapshots: vec![(key, Some(&snapshot))],
            ..Change::default()
        };
        self.write(&inner, &change)?;
        inner.snapshots.insert(key.to_owned(), snapshot.clone());
        Ok(snapshot)
    }

    /// One snapshot.
    pub fn stat(&self, key: &str) -> Result<Snapshot> {
        self.inner().get(key).cloned()
    }

    /// All snapshots by name.
    pub fn all(&self) -> BTreeMap<String, Snapshot> {
        self.inner().snapshots.clone()
    }

    /// Those snapshots that are wanted, by name.
    pub fn matching(
        &self,
        mut wanted: impl FnMut(&str, &Snapshot) -> bool,
    ) -> Vec<(String, Snapshot)> {
        let inner = self.inner();
        let all = inner.snapshots.iter();
        all.filter(|(name, snapshot)| wanted(name, snapshot))
            .map(|(name, snapshot)| (name.clone(), snapshot.clone()))
            .collect()
    }

    /// What a view or active snapshot consists of.
    pub fn stack(&self, key: &str) -> Result<Stack> {
        self.inner().stack(key)
    }

    /// What lies below a new snapshot on this parent, topmost first.
    pub fn below(&self, parent: Option<&str>) -> Result<Vec<Lower>> {
        let inner = self.inner();
        inner.check_parent(parent)?;
        inner.below(parent)
    }

    /// The chain ID of a parent: none if there is no parent, an error if it is not
    /// known.
    pub fn chain_of(&self, parent: Option<&str>) -> Result<Option<ChainId>> {
        let Some(parent) = parent else {
            return Ok(None);
        };
        let inner = self.inner();
        let snapshot = inner.get(parent)?;
        snapshot.chain_id().map(Some).ok_or_else(|| {
            StoreError::State(format!(
                "the chain ID of the snapshot {parent:?} is not known"
            ))
        })
    }

    /// A committed snapshot on that parent that is loaded lazily from this layer.
    pub fn find_lazy(&self, parent: Option<&str>, lazy: Lazy) -> Option<String> {
        let inner = self.inner();
        let mut all = inner.snapshots.iter();
        let same = |snapshot: &Snapshot| {
            snapshot.lazy == Some(lazy) && snapshot.parent.as_deref() == parent
        };
        all.find(|(_, snapshot)| same(snapshot))
            .map(|(name, _)| name.clone())
    }

    /// A lazy snapshot on that parent with this chain ID, whoever vouches for its root.
    pub fn find_chain(&self, parent: Option<&str>, chain_id: ChainId) -> Option<Lazy> {
        let inner = self.inner();
        let mut all = inner.snapshots.values();
        let same = |snapshot: &&Snapshot| {
            snapshot.parent.as_deref() == parent
                && snapshot.lazy.is_some_and(|lazy| lazy.chain_id == chain_id)
        };
        all.find(same).and_then(|snapshot| snapshot.lazy)
    }

    /// The first of a parent and those below it whose root nobody but UFS vouches for.
    pub fn trusting_ufs(&self, parent: Option<&str>) -> Option<ChainId> {
        let inner = self.inner();
        let mut below = parent;
        while let Some(snapshot) = below.and_then(|name| inner.snapshots.get(name)) {
            match snapshot.lazy {
                Some(lazy) if lazy.trust == Trust::Ufs => return Some(lazy.chain_id),
                _ => below = snapshot.parent.as_deref(),
            }
        }
        None
    }

    /// The layer with this root, entered if need be, and kept until the pin is gone.
    pub fn pin(&self, wanted: &LayerAnnotations, lazy: Lazy) -> Result<Layer> {
        let mut inner = self.inner();
        let layer = match inner.layers.get(&wanted.root) {
            Some(layer) if layer.size != wanted.size => {
                return Err(StoreError::Invalid(format!(
                    "the layer with the root {} has {} bytes, not {}",
                    wanted.root,
                    layer.size.bytes(),
                    wanted.size.bytes()
                )));
            }
            Some(layer) => *layer,
            None => {
                let layer = Layer {
                    number: LayerNumber(inner.next),
                    diff_id: wanted.diff_id,
                    chain_id: lazy.chain_id,
                    root: wanted.root,
                    size: wanted.size,
                    trust: lazy.trust,
                };
                let next = inner.next + 1;
                let change = Change {
                    layers: vec![(layer.root, Some(&layer))],
                    next: Some(next),
                    ..Change::default()
                };
                self.write(&inner, &change)?;
                inner.next = next;
                inner.layers.insert(layer.root, layer);
                layer
            }
        };
        *inner.pinned.entry(layer.root).or_default() += 1;
        Ok(layer)
    }

    /// Ends a pin.
    pub fn unpin(&self, root: Root) {
        let mut inner = self.inner();
        if let Some(pins) = inner.pinned.get_mut(&root) {
            *pins -= 1;
            if *pins == 0 {
                inner.pinned.remove(&root);
            }
        }
    }

    /// Makes a committed lazy snapshot; its layer must be pinned. If there is one
    /// already, that is as good.
    pub fn commit_lazy(&self, parent: Option<&str>, labels: Labels, lazy: Lazy) -> Result<()> {
        let mut inner = self.inner();
        inner.check_parent(parent)?;
        let same = |other: &Snapshot| other.lazy == Some(lazy) && other.parent.as_deref() == parent;
        if inner.snapshots.values().any(same) {
            return Ok(());
        }
        let id = SnapshotId(inner.next);
        // containerd takes the first that it is told of: in the order of names that is
        // one whose root a manifest names.
        let kind = match lazy.trust {
            Trust::Manifest => "lazy",
            Trust::Ufs => "ufs",
        };
        let name = format!("{kind}/{}/{}", id.0, lazy.chain_id);
        let now = Moment::now();
        let snapshot = Snapshot {
            id,
            kind: Kind::Committed,
            parent: parent.map(str::to_owned),
            labels: filled(labels),
            created: now,
            updated: now,
            usage: Usage::default(),
            lazy: Some(lazy),
            fallback: None,
            idmap: None,
        };
        let next = inner.next + 1;
        let change = Change {
            snapshots: vec![(&name, Some(&snapshot))],
            next: Some(next),
            ..Change::default()
        };
        self.write(&inner, &change)?;
        inner.next = next;
        inner.snapshots.insert(name, snapshot);
        Ok(())
    }

    /// All layers, and whether a snapshot or a pin needs them.
    pub fn layers(&self) -> Vec<(Layer, bool)> {
        let inner = self.inner();
        let needed = inner.needed();
        let mut layers: Vec<_> = inner
            .layers
            .values()
            .map(|layer| (*layer, needed.contains(&layer.root)))
            .collect();
        layers.sort_by_key(|(layer, _)| layer.number);
        layers
    }

    /// Forgets a layer, unless it is needed; `end` unmounts it first. While this
    /// runs nobody can pin it. Whether it is gone.
    pub fn forget_layer<E>(
        &self,
        root: Root,
        end: impl FnOnce(&Layer) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<bool, E>> {
        let layer = {
            let inner = self.inner();
            let needed = inner.needed().contains(&root);
            inner.layers.get(&root).copied().filter(|_| !needed)
        };
        let Some(layer) = layer else {
            return Ok(Ok(false));
        };
        if let Err(error) = end(&layer) {
            return Ok(Err(error));
        }
        let mut inner = self.inner();
        if inner.needed().contains(&root) {
            // Wanted again meanwhile: whoever did mounts it anew.
            return Ok(Ok(false));
        }
        let change = Change {
            layers: vec![(root, None)],
            ..Change::default()
        };
        self.write(&inner, &change)?;
        inner.layers.remove(&root);
        Ok(Ok(true))
    }

    /// Calls `list` for the names of directories there are, while no snapshot can
    /// be made, and gives those that belong to no snapshot.
    pub fn garbage(
        &self,
        list: impl FnOnce() -> io::Result<Vec<String>>,
    ) -> io::Result<Vec<String>> {
        let inner = self.inner();
        let known: HashSet<_> = inner
            .snapshots
            .values()
            .map(|snapshot| snapshot.id.0.to_string())
            .collect();
        Ok(list()?
            .into_iter()
            .filter(|name| !known.contains(name))
            .collect())
    }
}

/// The digests of all layers of an image, which the CRI gives each of them: up to 4 KiB.
/// containerd keeps it itself, and reads all of our labels whenever it collects garbage,
/// which is when a container has ended, while the next one waits.
const IMAGE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";

/// What is kept of labels: as in containerd, one without a value is none.
fn filled(mut labels: Labels) -> Labels {
    labels.retain(|key, value| !value.is_empty() && key != IMAGE_LAYERS);
    labels
}

impl Inner {
    fn get(&self, key: &str) -> Result<&Snapshot> {
        let found = self.snapshots.get(key);
        found.ok_or_else(|| StoreError::NotFound(key.to_owned()))
    }

    fn check_parent(&self, parent: Option<&str>) -> Result<()> {
        let Some(parent) = parent else {
            return Ok(());
        };
        match self.get(parent)?.kind {
            Kind::Committed => Ok(()),
            kind => Err(StoreError::Invalid(format!(
                "the parent {parent:?} is {}, not committed",
                kind.name()
            ))),
        }
    }

    fn stack(&self, key: &str) -> Result<Stack> {
        let snapshot = self.get(key)?;
        if snapshot.kind == Kind::Committed {
            return Err(StoreError::State(format!(
                "the snapshot {key:?} is committed: only views and active ones are mounted"
            )));
        }
        Ok(Stack {
            id: snapshot.id,
            kind: snapshot.kind,
            lower: self.below(snapshot.parent.as_deref())?,
            idmap: snapshot.idmap.clone(),
        })
    }

    fn below(&self, parent: Option<&str>) -> Result<Vec<Lower>> {
        let mut lower = Vec::new();
        let mut below = parent;
        while let Some(name) = below {
            let parent = self.get(name)?;
            lower.push(match parent.lazy {
                None => Lower::Directory(parent.id),
                Some(lazy) => {
                    let layer = self.layers.get(&lazy.root);
                    Lower::Layer(*layer.ok_or_else(|| {
                        StoreError::State(format!("the layer {} of {name:?} is gone", lazy.root))
                    })?)
                }
            });
            below = parent.parent.as_deref();
        }
        Ok(lower)
    }

    /// Roots of the layers that must stay.
    fn needed(&self) -> HashSet<Root> {
        let lazy = self.snapshots.values().filter_map(|snapshot| snapshot.lazy);
        lazy.map(|lazy| lazy.root)
            .chain(self.pinned.keys().copied())
            .collect()
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn load(database: Database) -> std::result::Result<Inner, Failure> {
    let change = database.begin_write()?;
    {
        let mut numbers = change.open_table(NUMBERS)?;
        let layout = numbers.get("layout")?.map(|number| number.value());
        match layout {
            None => {
                numbers.insert("layout", LAYOUT)?;
            }
            Some(LAYOUT) => {}
            Some(other) => {
                return Err(format!(
                    "it has layout {other}, and this version reads layout {LAYOUT} only"
                )
                .into());
            }
        }
        change.open_table(SNAPSHOTS)?;
        change.open_table(LAYERS)?;
    }
    change.commit()?;
    let look = database.begin_read()?;
    let mut snapshots = BTreeMap::new();
    for entry in look.open_table(SNAPSHOTS)?.iter()? {
        let (name, json) = entry?;
        let mut snapshot: Snapshot = serde_json::from_slice(json.value())?;
        snapshot.labels = filled(snapshot.labels);
        snapshots.insert(name.value().to_owned(), snapshot);
    }
    let mut layers = HashMap::new();
    for entry in look.open_table(LAYERS)?.iter()? {
        let layer: Layer = serde_json::from_slice(entry?.1.value())?;
        layers.insert(layer.root, layer);
    }
    let next = look.open_table(NUMBERS)?.get("next")?;
    let next = next.map_or(1, |number| number.value());
    drop(look);
    Ok(Inner {
        database,
        snapshots,
        layers,
        next,
        pinned: HashMap::new(),
    })
}

fn commit(database: &Database, change: &Change<'_>) -> std::result::Result<(), Failure> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(SNAPSHOTS)?;
        for (name, snapshot) in &change.snapshots {
            match snapshot {
                Some(snapshot) => table.insert(*name, &*serde_json::to_vec(snapshot)?)?,
                None => table.remove(*name)?,
            };
        }
        let mut table = transaction.open_table(LAYERS)?;
        for (root, layer) in &change.layers {
            let key = root.to_string();
            match layer {
                Some(layer) => table.insert(&*key, &*serde_json::to_vec(layer)?)?,
                None => table.remove(&*key)?,
            };
        }
        if let Some(next) = change.next {
            transaction.open_table(NUMBERS)?.insert("next", next)?;
        }
    }
    transaction.commit()?;
    Ok(())
}
