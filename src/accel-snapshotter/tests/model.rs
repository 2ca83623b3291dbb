//! The store against a plain model: random operations over ordinary and lazy chains
//! of two namespaces, with garbage collection, restarts and crashes.
//!
//! A crash is a copy of the database file as it lies on disk while the store has it
//! open: what SIGKILL leaves.

use accel_oci::{ChainId, DiffId, Digest};
use accel_snapshotter::snapshot::{Kind, Labels, Lazy, SNAPSHOT_REF, Trust, Usage};
use accel_snapshotter::store::{Lower, New, Store, StoreError};
use accel_ufs::annotations::LayerAnnotations;
use accel_ufs::index::{ImageSize, Root};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
enum Operation {
    Create {
        kind: Kind,
        key: String,
        parent: Option<String>,
    },
    Commit {
        key: String,
        name: String,
    },
    Remove {
        key: String,
    },
    Label {
        key: String,
        value: String,
    },
    /// A pull prepares layer `layer` on a parent.
    Lazy {
        parent: Option<String>,
        layer: u8,
    },
    /// containerd's `Cleanup`; one of the layers cannot be unmounted.
    CleanUp {
        busy: u8,
    },
    Restart,
    Crash,
}

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plain {
    kind: Kind,
    parent: Option<String>,
    label: String,
    layer: Option<u8>,
}

#[derive(Debug, Default)]
struct Model {
    snapshots: BTreeMap<String, Plain>,
    layers: BTreeSet<u8>,
}

/// Of which kind a result is.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    NotFound,
    Exists,
    Invalid,
    State,
}

fn outcome<T>(result: Result<T, StoreError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(StoreError::NotFound(_)) => Outcome::NotFound,
        Err(StoreError::Exists(_)) => Outcome::Exists,
        Err(StoreError::Invalid(_)) => Outcome::Invalid,
        Err(StoreError::State(_)) => Outcome::State,
        Err(error @ StoreError::Disk { .. }) => panic!("{error}"),
    }
}

impl Model {
    fn parent(&self, parent: Option<&String>) -> Outcome {
        match parent.map(|parent| self.snapshots.get(parent)) {
            None => Outcome::Done,
            Some(None) => Outcome::NotFound,
            Some(Some(plain)) if plain.kind == Kind::Committed => Outcome::Done,
            Some(Some(_)) => Outcome::Invalid,
        }
    }

    /// Numbers of the layers that snapshots need.
    fn needed(&self) -> BTreeSet<u8> {
        self.snapshots
            .values()
            .filter_map(|plain| plain.layer)
            .collect()
    }
}

fn layer(number: u8) -> LayerAnnotations {
    LayerAnnotations {
        diff_id: DiffId(Digest::of(&[number])),
        root: Root([number; 32]),
        size: ImageSize::new(4096 * (u64::from(number) + 1)).unwrap(),
    }
}

/// The chain ID that the store gives for a parent; every snapshot of the model has
/// one, by its label or because it is lazy.
fn lazy(store: &Store, parent: Option<&str>, number: u8) -> Lazy {
    let chain = store.chain_of(parent).unwrap();
    Lazy {
        chain_id: ChainId::new(chain, layer(number).diff_id),
        root: layer(number).root,
        // Snapshots that trust UFS are kept apart by the same comparison.
        trust: Trust::Manifest,
    }
}

fn labels(value: &str) -> Labels {
    let chain = Digest::of(b"an unpacked chain").to_string();
    [(SNAPSHOT_REF, chain.as_str()), ("l", value)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

struct Tested {
    directory: PathBuf,
    store: Option<Store>,
    generation: u32,
    model: Model,
    ids: BTreeSet<u64>,
}

impl Tested {
    fn new(directory: &Path) -> Self {
        let store = Store::open(&directory.join("0")).unwrap();
        Self {
            directory: directory.to_owned(),
            store: Some(store),
            generation: 0,
            model: Model::default(),
            ids: BTreeSet::new(),
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn file(&self) -> PathBuf {
        self.directory.join(self.generation.to_string())
    }

    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Create { kind, key, parent } => self.create(*kind, key, parent.as_ref()),
            Operation::Commit { key, name } => {
                let expected = match self.model.snapshots.get(key) {
                    None => Outcome::NotFound,
                    Some(plain) if plain.kind != Kind::Active => Outcome::State,
                    Some(_) if self.model.snapshots.contains_key(name) => Outcome::Exists,
                    Some(_) => Outcome::Done,
                };
                let usage = Usage { size: 1, inodes: 1 };
                let found = self.store().commit(key, name, labels("committed"), usage);
                assert_eq!(outcome(found), expected);
                if expected == Outcome::Done {
                    let plain = self.model.snapshots.remove(key).unwrap();
                    let plain = Plain {
                        kind: Kind::Committed,
                        label: "committed".to_owned(),
                        ..plain
                    };
                    self.model.snapshots.insert(name.clone(), plain);
                }
            }
            Operation::Remove { key } => {
                let mut all = self.model.snapshots.values();
                let expected = match self.model.snapshots.get(key) {
                    None => Outcome::NotFound,
                    Some(_) if all.any(|plain| plain.parent.as_ref() == Some(key)) => {
                        Outcome::State
                    }
                    Some(_) => Outcome::Done,
                };
                assert_eq!(outcome(self.store().remove(key)), expected);
                if expected == Outcome::Done {
                    self.model.snapshots.remove(key);
                }
            }
            Operation::Label { key, value } => {
                let found = self
                    .store()
                    .update(key, &labels(value), &["labels.l".to_owned()]);
                match self.model.snapshots.get_mut(key) {
                    None => assert_eq!(outcome(found), Outcome::NotFound),
                    Some(plain) => {
                        assert_eq!(found.unwrap().labels["l"], *value);
                        plain.label.clone_from(value);
                    }
                }
            }
            Operation::Lazy { parent, layer } => self.lazy(parent.as_ref(), *layer),
            Operation::CleanUp { busy } => self.clean_up(*busy),
            Operation::Restart => {
                self.store = None;
                self.store = Some(Store::open(&self.file()).unwrap());
            }
            Operation::Crash => {
                let before = self.file();
                self.generation += 1;
                std::fs::copy(before, self.file()).unwrap();
                self.store = Some(Store::open(&self.file()).unwrap());
            }
        }
        self.check();
    }

    fn create(&mut self, kind: Kind, key: &str, parent: Option<&String>) {
        let expected = match self.model.parent(parent) {
            Outcome::Done if self.model.snapshots.contains_key(key) => Outcome::Exists,
            other => other,
        };
        let mut made = None;
        let directory = self.directory.join("directory");
        let parent = parent.map(String::as_str);
        let new = New {
            labels: labels("new"),
            ..New::default()
        };
        let found = self.store().create(kind, key, parent, new, |id| {
            made = Some(id.0);
            Ok(directory)
        });
        assert_eq!(outcome(found), expected);
        if expected == Outcome::Done {
            assert!(self.ids.insert(made.unwrap()), "a number was used twice");
            let plain = Plain {
                kind,
                parent: parent.map(str::to_owned),
                label: "new".to_owned(),
                layer: None,
            };
            self.model.snapshots.insert(key.to_owned(), plain);
        }
    }

    fn lazy(&mut self, parent: Option<&String>, number: u8) {
        if self.model.parent(parent) != Outcome::Done {
            assert!(self.store().below(parent.map(String::as_str)).is_err());
            return;
        }
        let parent = parent.map(String::as_str);
        let wanted = lazy(self.store(), parent, number);
        self.store().pin(&layer(number), wanted).unwrap();
        self.model.layers.insert(number);
        // A pin keeps the layer, whatever containerd collects meanwhile.
        let kept = self
            .store()
            .forget_layer(wanted.root, |_| Err("it was ended"));
        assert_eq!(kept.unwrap(), Ok(false));
        self.store()
            .commit_lazy(parent, labels("lazy"), wanted)
            .unwrap();
        self.store().unpin(wanted.root);
        let name = self.store().find_lazy(parent, wanted).unwrap();
        let plain = Plain {
            kind: Kind::Committed,
            parent: parent.map(str::to_owned),
            label: "lazy".to_owned(),
            layer: Some(number),
        };
        self.model.snapshots.entry(name).or_insert(plain);
    }

    fn clean_up(&mut self, busy: u8) {
        let needed = self.model.needed();
        for (layer, _) in self.store().layers() {
            let number = layer.root.0[0];
            let ended = self
                .store()
                .forget_layer(layer.root, |_| match number == busy {
                    true => Err("busy"),
                    false => Ok(()),
                });
            let expected = match (needed.contains(&number), number == busy) {
                (true, _) => Ok(false),
                (false, true) => Err("busy"),
                (false, false) => Ok(true),
            };
            assert_eq!(ended.unwrap(), expected);
            if expected == Ok(true) {
                self.model.layers.remove(&number);
            }
        }
    }

    /// Store and model are the same, and everything that can be mounted is there.
    fn check(&self) {
        let found: BTreeMap<_, _> = self.store().all().into_iter().collect();
        let plain = |snapshot: &accel_snapshotter::snapshot::Snapshot| Plain {
            kind: snapshot.kind,
            parent: snapshot.parent.clone(),
            label: snapshot.labels["l"].clone(),
            layer: snapshot.lazy.map(|lazy| lazy.root.0[0]),
        };
        let found: BTreeMap<_, _> = found
            .iter()
            .map(|(name, one)| (name.clone(), plain(one)))
            .collect();
        assert_eq!(found, self.model.snapshots);
        let layers: BTreeMap<_, _> = self
            .store()
            .layers()
            .into_iter()
            .map(|(layer, needed)| (layer.root.0[0], needed))
            .collect();
        let known: BTreeSet<_> = layers.keys().copied().collect();
        assert_eq!(known, self.model.layers);
        let needed: BTreeSet<_> = layers
            .iter()
            .filter(|(_, needed)| **needed)
            .map(|(number, _)| *number)
            .collect();
        assert_eq!(needed, self.model.needed());
        for (name, plain) in &self.model.snapshots {
            if plain.kind == Kind::Committed {
                continue;
            }
            let mut expected = Vec::new();
            let mut below = plain.parent.as_ref();
            while let Some(name) = below {
                let parent = &self.model.snapshots[name];
                expected.push(parent.layer);
                below = parent.parent.as_ref();
            }
            let stack = self.store().stack(name).unwrap();
            let found: Vec<_> = stack
                .lower
                .iter()
                .map(|lower| match lower {
                    Lower::Directory(_) => None,
                    Lower::Layer(layer) => Some(layer.root.0[0]),
                })
                .collect();
            assert_eq!(found, expected);
        }
    }
}

/// What an operation is about: an index into the snapshots that there are, or a new
/// name.
#[derive(Debug, Clone)]
struct Choice {
    what: u8,
    which: prop::sample::Index,
    other: prop::sample::Index,
    number: u8,
}

impl Choice {
    fn operation(&self, model: &Model) -> Operation {
        let names: Vec<_> = model.snapshots.keys().cloned().collect();
        let some = |index: &prop::sample::Index| match names.is_empty() {
            true => "missing".to_owned(),
            false => names[index.index(names.len())].clone(),
        };
        let fresh = format!("ns{}/{}", self.number % 2, self.number);
        let parent = (!self.number.is_multiple_of(5)).then(|| some(&self.other));
        match self.what {
            0..=3 => Operation::Create {
                kind: if self.number.is_multiple_of(4) {
                    Kind::View
                } else {
                    Kind::Active
                },
                key: fresh,
                parent,
            },
            4..=6 => Operation::Commit {
                key: some(&self.which),
                name: format!("{fresh}/committed"),
            },
            7..=9 => Operation::Remove {
                key: some(&self.which),
            },
            10 => Operation::Label {
                key: some(&self.which),
                value: format!("v{}", self.number),
            },
            11..=14 => Operation::Lazy {
                parent,
                layer: self.number % 6,
            },
            15..=16 => Operation::CleanUp {
                busy: self.number % 9,
            },
            17 => Operation::Restart,
            _ => Operation::Crash,
        }
    }
}

fn choices() -> impl Strategy<Value = Vec<Choice>> {
    let choice = (
        0..19u8,
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        any::<u8>(),
    )
        .prop_map(|(what, which, other, number)| Choice {
            what,
            which,
            other,
            number,
        });
    prop::collection::vec(choice, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_the_model(choices in choices()) {
        // In memory where there is such a file system: every change is synced.
        let shm = Path::new("/dev/shm");
        let directory = match shm.is_dir() {
            true => tempfile::tempdir_in(shm).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        let mut tested = Tested::new(directory.path());
        for choice in &choices {
            let operation = choice.operation(&tested.model);
            tested.apply(&operation);
        }
    }
}

/// containerd reads all labels of all snapshots each time it collects garbage, when a
/// container has ended, and what starts waits for that. What the CRI says to every layer
/// of the whole image it keeps itself.
#[test]
fn what_is_kept_of_labels_does_not_grow_with_the_image() {
    const ALL: &str = "containerd.io/snapshot/cri.image-layers";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metadata.redb");
    let store = Store::open(&path).unwrap();
    let said: Labels = [
        (ALL.to_owned(), "sha256:0".repeat(500)),
        (
            "containerd.io/snapshot/cri.image-ref".to_owned(),
            "i".to_owned(),
        ),
    ]
    .into_iter()
    .collect();
    let new = || New {
        labels: said.clone(),
        ..New::default()
    };
    let prepare = |_| Ok(PathBuf::new());
    let wanted = lazy(&store, None, 1);
    store.pin(&layer(1), wanted).unwrap();
    store.commit_lazy(None, said.clone(), wanted).unwrap();
    store
        .create(Kind::Active, "a", None, new(), prepare)
        .unwrap();
    store
        .create(Kind::Active, "b", None, new(), prepare)
        .unwrap();
    store
        .commit("a", "c", said.clone(), Usage::default())
        .unwrap();
    store.update("c", &said, &[]).unwrap();
    store
        .update("b", &said, &[format!("labels.{ALL}")])
        .unwrap();
    let all = store.all();
    assert_eq!(all.len(), 3);
    for (name, snapshot) in all {
        let kept: Vec<_> = snapshot.labels.keys().collect();
        assert_eq!(kept, ["containerd.io/snapshot/cri.image-ref"], "{name}");
    }
    drop(store);
    let kept = std::fs::read(&path).unwrap();
    let kept = String::from_utf8_lossy(&kept);
    assert!(kept.contains("cri.image-ref") && !kept.contains(ALL));
}
