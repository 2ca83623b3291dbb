//! The snapshotter: what containerd asks for, done to database, directories and
//! layers.
//!
//! While containerd collects garbage it holds a lock that every pull and every
//! start waits for. So what it calls then, and all questions about what there is
//! (`remove`, `walk`, `stat`, `usage`, `mounts`), touch the database, ordinary
//! directories and the kernel's list of mounts, never UFS, the daemon or a lazy
//! tree. Removing only forgets; [`Snapshotter::clean_up`] unmounts and deletes.

mod lazy;

use crate::filter::{FilterError, Filters};
use crate::idmap::{self, IdMap};
use crate::layers::Layers;
use crate::mounts::{self, How, Mount, Places, plan};
use crate::remote::{self, Budget, Fallback};
use crate::snapshot::{Kind, Labels, Layer, Snapshot, SnapshotId, Trust, Usage};
use crate::status::{LayerStatus, Status, Unpacked};
use crate::store::{Lower, New, Stack, Store, StoreError};
use crate::usage;
use accel_client::idmapped::{mount_mapped, user_namespace};
use accel_client::system;
use accel_oci::ChainId;
use accel_ufs::index::Root;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It does not fit the snapshots that there are.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A filter is wrong.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A lazy layer is not mounted.
    #[error("the layer {diff_id} is not mounted: {why}")]
    NotMounted {
        /// Which layer.
        diff_id: String,
        /// Why not.
        why: String,
    },
    /// Ids cannot be mapped.
    #[error("{0}")]
    IdMap(String),
    /// A file or directory cannot be used.
    #[error("cannot {doing} {path:?}: {error}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
}

impl Failure {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { doing, path, error }
    }
}

type Result<T> = std::result::Result<T, Failure>;

/// What the operator chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Choices {
    /// containerd mounts layers itself, see [`How`].
    pub native: bool,
    /// Layers of images that name no roots are looked up on UFS by chain ID.
    pub trust_ufs: bool,
}

/// Everything that answers containerd.
#[derive(Debug)]
pub struct Snapshotter {
    store: Store,
    places: Places,
    layers: Layers,
    budget: Budget,
    index_off: bool,
    choices: Choices,
    hits: AtomicU64,
    fallbacks: Mutex<BTreeMap<&'static str, u64>>,
    cleaning: Mutex<Complaints>,
}

/// Why layers could not be unmounted the last time, so that it is said once.
type Complaints = HashMap<Root, String>;

impl Snapshotter {
    /// Opens the snapshots beneath a root directory.
    pub fn open(places: Places, layers: Layers, budget: Budget, choices: Choices) -> Result<Self> {
        for directory in [places.snapshots(), places.layers(), places.idmaps()] {
            let mut builder = DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(&directory);
            made.map_err(Failure::io("make", &directory))?;
        }
        let store = Store::open(&places.database())?;
        for snapshot in store.all().values() {
            if let Some(lazy) = snapshot.lazy {
                layers.note_origin(lazy.root, &snapshot.labels);
            }
        }
        Ok(Self {
            store,
            places,
            layers,
            budget,
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            choices,
            hits: AtomicU64::new(0),
            fallbacks: Mutex::default(),
            cleaning: Mutex::default(),
        })
    }

    /// Makes a view or active snapshot. For a layer that can be loaded lazily it
    /// makes the committed snapshot instead, and says that it exists.
    pub async fn create(
        self: &Arc<Self>,
        kind: Kind,
        key: String,
        parent: Option<String>,
        labels: Labels,
    ) -> Result<Vec<Mount>> {
        let lower = self.store.below(parent.as_deref())?;
        let mut fallback = None;
        if kind == Kind::Active {
            self.keep_apart(&labels, parent.as_deref())?;
            let started = Instant::now();
            let lazily = self.lazily(&labels, parent.as_deref()).await;
            self.spend(&labels, parent.as_deref(), started);
            match lazily {
                Ok(Some(lazy)) => {
                    self.hits.fetch_add(1, Relaxed);
                    tracing::info!(chain = %lazy.chain_id, root = %lazy.root, "lazy");
                    return Err(StoreError::Exists(key).into());
                }
                Ok(None) => {}
                Err(Fallback { reason, detail }) => {
                    let reason = reason.name();
                    *self.fallbacks().entry(reason).or_default() += 1;
                    tracing::warn!(
                        key,
                        reason,
                        detail,
                        "the layer is unpacked the ordinary way"
                    );
                    fallback = Some(format!("{reason}: {detail}"));
                }
            }
        }
        self.make_ready(&lower).await?;
        let this = Arc::clone(self);
        blocking(move || {
            let idmap = this.idmap(&labels, lower.first())?;
            let owner = idmap.as_ref().map(|idmap| idmap.root);
            let new = New {
                labels,
                fallback,
                idmap,
            };
            let prepare = |id| this.prepare_directory(id, kind, owner, lower.first());
            let stack = this
                .store
                .create(kind, &key, parent.as_deref(), new, prepare)?;
            let made = this.map_ids(&stack).and_then(|()| this.plan(&stack));
            if made.is_err() {
                // Whoever asked does not know it.
                let _ = this.store.remove(&key);
            }
            made
        })
        .await
    }

    /// How the ids of a new snapshot are to be mapped.
    fn idmap(&self, labels: &Labels, below: Option<&Lower>) -> Result<Option<IdMap>> {
        let wanted = IdMap::wanted(labels).map_err(StoreError::Invalid)?;
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        if let Some(Lower::Directory(below)) = below {
            let files = self.places.files(*below);
            let owner = fs::symlink_metadata(&files).map_err(Failure::io("look at", &files))?;
            if wanted.root != (0, 0) && (owner.uid(), owner.gid()) == wanted.root {
                return Ok(None);
            }
        }
        let release = idmap::release();
        if !idmap::supported(&release) {
            let why = format!(
                "this kernel, {release}, cannot map ids of overlays: remove \"remap-ids\" from the capabilities of this snapshotter in containerd's configuration"
            );
            return Err(StoreError::State(why).into());
        }
        Ok(Some(wanted))
    }

    fn plan(&self, stack: &Stack) -> Result<Vec<Mount>> {
        let mounted;
        let mut how = How {
            index_off: self.index_off,
            native: None,
        };
        if self.choices.native {
            mounted = self.mounted()?;
            how.native = Some(&mounted);
        }
        Ok(plan(stack, &self.places, how))
    }

    fn mounted(&self) -> Result<HashMap<PathBuf, PathBuf>> {
        let mounted = self.layers.mounted();
        mounted.map_err(Failure::io("read", Path::new("/proc/self/mountinfo")))
    }

    fn fallbacks(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.fallbacks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the layers mounted that a new snapshot stands on: after a reboot, or when
    /// a daemon that served files died, they may not be yet.
    async fn make_ready(self: &Arc<Self>, lower: &[Lower]) -> Result<()> {
        let Some(layer) = self.unmounted(lower)? else {
            return Ok(());
        };
        let this = Arc::clone(self);
        let lower = lower.to_vec();
        let mounting = blocking(move || {
            while let Some(layer) = this.unmounted(&lower)? {
                let mounted = this.layers.ensure(&layer, false);
                mounted.map_err(|error| not_mounted(&layer, error.to_string()))?;
            }
            Ok(())
        });
        match tokio::time::timeout(self.budget.limit(), mounting).await {
            Ok(result) => result,
            Err(_) => Err(not_mounted(
                &layer,
                "ublk-server or UFS does not answer in time",
            )),
        }
    }

    /// The first layer that is not mounted.
    fn unmounted(&self, lower: &[Lower]) -> Result<Option<Layer>> {
        for lower in lower {
            let Lower::Layer(layer) = lower else { continue };
            let mounted = self.layers.is_mounted(layer);
            if !mounted.map_err(|error| not_mounted(layer, format!("{error:#}")))? {
                return Ok(Some(*layer));
            }
        }
        Ok(None)
    }

    /// Makes a snapshot's directory. Its root belongs to `owner`, else to whom the one
    /// below does; a lazy layer's is always root's, and is not looked at.
    fn prepare_directory(
        &self,
        id: SnapshotId,
        kind: Kind,
        owner: Option<(u32, u32)>,
        below: Option<&Lower>,
    ) -> io::Result<PathBuf> {
        let directory = self.places.snapshot(id);
        // Of a snapshot that never came to be.
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        let make = |path: &Path, mode| {
            DirBuilder::new().create(path)?;
            // Whatever the umask is.
            fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
        };
        make(&directory, 0o700)?;
        let files = self.places.files(id);
        make(&files, 0o755)?;
        if kind == Kind::Active {
            make(&self.places.work(id), 0o711)?;
        }
        let owner = match (owner, below) {
            (Some(owner), _) => Some(owner),
            (None, Some(Lower::Directory(below))) => {
                let owner = fs::symlink_metadata(self.places.files(*below))?;
                Some((owner.uid(), owner.gid()))
            }
            (None, _) => None,
        };
        if let Some((user, group)) = owner {
            std::os::unix::fs::lchown(&files, Some(user), Some(group))?;
        }
        Ok(directory)
    }

    /// The mounts of a view or active snapshot.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let stack = self.store.stack(key)?;
        if let Some(layer) = self.unmounted(&stack.lower)? {
            let why = format!(
                "it is mounted as soon as ublk-server answers at {}",
                self.layers.server().display()
            );
            return Err(not_mounted(&layer, why));
        }
        self.map_ids(&stack)?;
        self.plan(&stack)
    }

    /// Sees to it that there are mounts of the lower directories with mapped ids, if
    /// they have to be. This waits for no layer.
    fn map_ids(&self, stack: &Stack) -> Result<()> {
        let Some(idmap) = &stack.idmap else {
            return Ok(());
        };
        let lowers = mounts::lowers(stack, &self.places);
        let points = mounts::mapped(stack, &self.places, lowers.len());
        let make = || -> anyhow::Result<()> {
            let mut namespace = None;
            for (source, point) in lowers.iter().zip(&points) {
                if system::is_mount_point(point)? {
                    continue;
                }
                let namespace = match &namespace {
                    Some(namespace) => namespace,
                    None => namespace.insert(user_namespace(&idmap.uids, &idmap.gids)?),
                };
                mount_mapped(source, point, namespace)?;
            }
            Ok(())
        };
        make().map_err(|error| Failure::IdMap(format!("{error:#}")))
    }

    /// Takes away such mounts of snapshots that are not there any more.
    fn unmap_ids(&self) -> Result<()> {
        let directory = self.places.idmaps();
        let garbage = self.store.garbage(|| names_in(&directory));
        for name in garbage.map_err(Failure::io("list", &directory))? {
            let path = directory.join(name);
            let end = || -> anyhow::Result<()> {
                for point in names_in(&path)? {
                    let point = path.join(point);
                    system::detach(&point)?;
                    fs::remove_dir(point)?;
                }
                Ok(fs::remove_dir(&path)?)
            };
            if let Err(error) = end() {
                tracing::warn!(path = %path.display(), error = format!("{error:#}"), "cannot unmount");
            }
        }
        Ok(())
    }

    /// Makes an active snapshot a committed one.
    pub async fn commit(self: &Arc<Self>, key: String, name: String, labels: Labels) -> Result<()> {
        let this = Arc::clone(self);
        blocking(move || {
            let snapshot = this.store.stat(&key)?;
            let usage = match snapshot.kind {
                Kind::Active => this.disk_usage(snapshot.id)?,
                // Refused below.
                _ => Usage::default(),
            };
            let chain = remote::chain(&labels).or_else(|| remote::chain(&snapshot.labels));
            this.store.commit(&key, &name, labels, usage)?;
            if let Some(chain) = chain {
                this.budget.unpacked(chain, Instant::now());
            }
            Ok(())
        })
        .await
    }

    fn disk_usage(&self, id: SnapshotId) -> Result<Usage> {
        let files = self.places.files(id);
        usage::of(&files).map_err(Failure::io("measure", &files))
    }

    /// Forgets a snapshot.
    pub fn remove(&self, key: &str) -> Result<()> {
        Ok(self.store.remove(key)?)
    }

    /// One snapshot.
    pub fn stat(&self, key: &str) -> Result<Snapshot> {
        Ok(self.store.stat(key)?)
    }

    /// Changes labels.
    pub fn update(&self, key: &str, labels: &Labels, paths: &[String]) -> Result<Snapshot> {
        Ok(self.store.update(key, labels, paths)?)
    }

    /// The snapshots that match the filters.
    pub fn walk(&self, filters: &[String]) -> Result<Vec<(String, Snapshot)>> {
        let filters = Filters::parse(filters)?;
        Ok(self.store.matching(|name, snapshot| {
            filters.matches(|path| {
                let (first, rest) = path.split_first()?;
                match (first.as_str(), rest) {
                    ("kind", _) => Some(snapshot.kind.name()),
                    ("name", _) => Some(name),
                    ("parent", _) => Some(snapshot.parent.as_deref().unwrap_or_default()),
                    ("labels", rest) => snapshot.labels.get(&rest.join(".")).map(String::as_str),
                    _ => None,
                }
            })
        }))
    }

    /// Disk space of a snapshot. A lazy one has none.
    pub async fn usage(self: &Arc<Self>, key: String) -> Result<Usage> {
        let this = Arc::clone(self);
        blocking(move || {
            let snapshot = this.store.stat(&key)?;
            match snapshot.kind {
                Kind::Active => this.disk_usage(snapshot.id),
                Kind::View | Kind::Committed => Ok(snapshot.usage),
            }
        })
        .await
    }

    /// Deletes and unmounts what no snapshot needs any more. What cannot be is tried
    /// again the next time.
    pub fn clean_up(&self) -> Result<()> {
        let mut complaints = self.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
        self.unmap_ids()?;
        let snapshots = self.places.snapshots();
        let garbage = self.store.garbage(|| names_in(&snapshots));
        for name in garbage.map_err(Failure::io("list", &snapshots))? {
            let path = snapshots.join(name);
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove a directory");
            }
        }
        for (layer, needed) in self.store.layers() {
            let before = complaints.remove(&layer.root);
            if needed {
                continue;
            }
            let _one = self.layers.operate();
            let ended = self
                .store
                .forget_layer(layer.root, |layer| self.layers.end(layer))?;
            match ended {
                Ok(true) => tracing::info!(layer = %layer.diff_id, "unmounted"),
                Ok(false) => {}
                Err(error) => {
                    let error = format!("{error:#}");
                    if before.as_ref() != Some(&error) {
                        tracing::warn!(layer = %layer.diff_id, error, "cannot unmount a layer; it is tried again");
                    }
                    complaints.insert(layer.root, error);
                }
            }
        }
        Ok(())
    }

    /// Whether there are layers that [`Snapshotter::clean_up`] would unmount.
    pub fn has_unneeded_layers(&self) -> bool {
        self.store.layers().iter().any(|(_, needed)| !needed)
    }

    /// Gives back what the daemon holds for layers that the database does not know.
    pub fn forget_others(&self) -> anyhow::Result<()> {
        let known: Vec<_> = self
            .store
            .layers()
            .into_iter()
            .map(|(layer, _)| layer)
            .collect();
        self.layers.forget_others(&known)
    }

    /// Mounts needed layers that are not mounted, or that nobody serves any more.
    /// Nothing to do is the ordinary case.
    pub fn mend(&self) -> anyhow::Result<()> {
        let layers = self.store.layers().into_iter();
        let needed: Vec<_> = layers
            .filter(|(_, needed)| *needed)
            .map(|(layer, _)| layer)
            .collect();
        if needed.is_empty() {
            return Ok(());
        }
        let mut first = Ok(());
        for layer in self.layers.broken(&needed)? {
            match self.layers.ensure(&layer, true) {
                Ok(()) => tracing::info!(layer = %layer.diff_id, "mounted again"),
                Err(error) if first.is_ok() => {
                    first = Err(anyhow::anyhow!(
                        "cannot mount the layer {}: {error}",
                        layer.diff_id
                    ));
                }
                Err(_) => {}
            }
        }
        first
    }

    /// Everything there is to say.
    pub fn status(&self) -> Result<Status> {
        let mounted = self.mounted()?;
        let snapshots = self.store.all();
        let users = users(&snapshots);
        let layers = self.store.layers().into_iter().map(|(layer, _)| {
            let lazy = snapshots.values().filter_map(|snapshot| snapshot.lazy);
            let mine: Vec<_> = lazy.filter(|lazy| lazy.root == layer.root).collect();
            let by_ufs = mine.iter().any(|lazy| lazy.trust == Trust::Ufs);
            let trust = if by_ufs { Trust::Ufs } else { Trust::Manifest };
            LayerStatus {
                diff_id: layer.diff_id,
                root: layer.root,
                size: layer.size.bytes(),
                point: self.places.layer(layer.number),
                mounted: mounted.contains_key(&self.places.layer(layer.number)),
                snapshots: mine.len(),
                users: users.get(&layer.root).copied().unwrap_or(0),
                trust: trust.name().to_owned(),
            }
        });
        let unpacked = snapshots.iter().filter_map(|(name, snapshot)| {
            Some(Unpacked {
                snapshot: name.clone(),
                why: snapshot.fallback.clone()?,
            })
        });
        let fallbacks = self.fallbacks();
        Ok(Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: self.places.root().to_owned(),
            server: self.layers.server().to_owned(),
            ufs: self.layers.ufs().map(Path::to_owned),
            snapshots: snapshots.len(),
            hits: self.hits.load(Relaxed),
            fallbacks: fallbacks.values().sum(),
            fallback_reasons: fallbacks
                .iter()
                .map(|(reason, number)| ((*reason).to_owned(), *number))
                .collect(),
            layers: layers.collect(),
            used_chain_ids: Some(used_chain_ids(&snapshots)),
            unpacked: unpacked.collect(),
        })
    }
}

/// What each snapshot stands on that can be written to or looked at, topmost first.
fn stacks(snapshots: &BTreeMap<String, Snapshot>) -> impl Iterator<Item = Vec<&Snapshot>> {
    let below = |of: &Snapshot| snapshots.get(of.parent.as_ref()?);
    let tops = snapshots
        .values()
        .filter(|snapshot| snapshot.kind != Kind::Committed);
    tops.map(move |top| std::iter::successors(below(top), |snapshot| below(snapshot)).collect())
}

/// How many snapshots that can be written to or looked at stand on each lazy layer.
fn users(snapshots: &BTreeMap<String, Snapshot>) -> HashMap<Root, usize> {
    let mut users = HashMap::new();
    for stack in stacks(snapshots) {
        let lazy = stack.iter().filter_map(|snapshot| snapshot.lazy);
        let roots: HashSet<_> = lazy.map(|lazy| lazy.root).collect();
        for root in roots {
            *users.entry(root).or_default() += 1;
        }
    }
    users
}

/// The chain IDs of what such snapshots stand on, if any of it is lazy.
fn used_chain_ids(snapshots: &BTreeMap<String, Snapshot>) -> BTreeSet<ChainId> {
    let lazy = stacks(snapshots).filter(|stack| stack.iter().any(|below| below.lazy.is_some()));
    lazy.filter_map(|stack| stack.first()?.chain_id()).collect()
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name()));
    let names = names.collect::<io::Result<Vec<_>>>()?;
    let names = names.into_iter().filter_map(|name| name.into_string().ok());
    Ok(names.collect())
}

fn not_mounted(layer: &Layer, why: impl Into<String>) -> Failure {
    Failure::NotMounted {
        diff_id: layer.diff_id.to_string(),
        why: why.into(),
    }
}

/// Runs what may wait for a disk, or for longer.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Lazy, Moment, SNAPSHOT_REF};
    use accel_oci::Digest;
    use std::time::Duration;

    fn chain(name: &str) -> ChainId {
        ChainId(Digest::of(name.as_bytes()))
    }

    /// One of that name; its chain ID is of the name, too.
    fn snapshot(name: &str, kind: Kind, parent: Option<&str>, lazy: bool) -> (String, Snapshot) {
        let moment = Moment(Duration::ZERO);
        let labels = [(SNAPSHOT_REF.to_owned(), chain(name).to_string())];
        let lazy = lazy.then(|| Lazy {
            chain_id: chain(name),
            root: Root([1; 32]),
            trust: Trust::Manifest,
        });
        let snapshot = Snapshot {
            id: SnapshotId(1),
            kind,
            parent: parent.map(str::to_owned),
            labels: match lazy {
                Some(_) => Labels::new(),
                None => labels.into(),
            },
            created: moment,
            updated: moment,
            usage: Usage::default(),
            lazy,
            fallback: None,
            idmap: None,
        };
        (name.to_owned(), snapshot)
    }

    #[test]
    fn what_is_used_is_told_by_the_uppermost_layer_of_what_containers_run_on() {
        let (committed, active) = (Kind::Committed, Kind::Active);
        let mut all = BTreeMap::from([
            snapshot("lazy", committed, None, true),
            snapshot("more", committed, Some("lazy"), true),
            // Unpacked, on top of what is lazy.
            snapshot("top", committed, Some("lazy"), false),
            snapshot("plain", committed, None, false),
            snapshot("on plain", active, Some("plain"), false),
            snapshot("from nothing", active, None, false),
        ]);
        let used = |all: &BTreeMap<_, _>, names: &[&str]| {
            let expected = names.iter().map(|name| chain(name));
            assert_eq!(used_chain_ids(all), expected.collect::<BTreeSet<_>>());
        };
        used(&all, &[]);
        all.extend([snapshot("one", active, Some("more"), false)]);
        used(&all, &["more"]);
        all.extend([
            snapshot("two", Kind::View, Some("top"), false),
            snapshot("three", active, Some("more"), false),
        ]);
        used(&all, &["more", "top"]);
        all.remove("one");
        all.remove("three");
        used(&all, &["top"]);
    }
}
