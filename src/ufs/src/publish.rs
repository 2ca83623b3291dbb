//! How files get their final names: complete, durable, never replacing anything.
//!
//! A file is written under `tmp/`, synced, linked to its final name with
//! `link(2)` and its directory synced; then the temporary name goes. A reader
//! sees all of it or nothing, also after a crash of the machine, and over NFS
//! too: nothing that has a final name is ever replaced (a rename over a file
//! that another client has open gives that client ESTALE).
//!
//! Nothing relies on converters waiting for each other ([`turn`](crate::turn)). If the final
//! name is taken when a converter gets there, another was faster, and its bytes are the same.
//!
//! The exception is what is damaged: [`Publication::replace`] first *renames* it into
//! `quarantine/`, then links the good file. Who has the bad one open keeps it, finds
//! that its bytes are wrong, and opens the name again; who looks just between the two
//! finds nothing, and looks again.
//!
//! Temporaries are called `<lease>.<number>.<what>`, after the [`lease`](crate::lease)
//! of the process that makes them, so that [`Ufs::temporaries`] can say whose each is.

mod publication;

pub use publication::{Outcome, Publication};

use crate::claim::CLAIMS;
use crate::error::UfsError;
use crate::index::{Header, Page};
use crate::lease::{FoundLease, Lease, Owner};
use crate::names::{self, LEASES, LayerName, Nanoseconds, QUARANTINE, RelPath, TMP};
use crate::node::NODES;
use crate::record::{MAX_RECORD, RecordError};
use accel_oci::{ChainId, DiffId};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a file is called, before its maker, that is made so that a directory changes.
const LOOK: &str = "look.";

/// The UFS directory, for reading and publishing.
///
/// For converters and clients. The daemon that serves does not use it: it never
/// opens a file on UFS.
#[derive(Debug, Clone)]
pub struct Ufs {
    root: PathBuf,
    shared: Arc<Shared>,
}

/// What all clones of a [`Ufs`] have in common.
#[derive(Debug)]
struct Shared {
    owner: Owner,
    /// Device and inode of the UFS directory.
    identity: (u64, u64),
    open: Mutex<Open>,
}

/// Temporaries that this process has.
#[derive(Debug, Default)]
struct Open {
    paths: HashSet<PathBuf>,
    /// How many there ever were.
    made: u64,
    /// From the first temporary on.
    lease: Option<Lease>,
    closed: bool,
}

/// Which file a name leads to: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    const fn of(found: &rustix::fs::Stat) -> Self {
        Self(found.st_dev, found.st_ino)
    }
}

impl Ufs {
    /// Opens the UFS directory at `root`, which must exist.
    pub fn open(root: &Path) -> Result<Self, UfsError> {
        let path = root.to_owned();
        let found = match fs::metadata(root) {
            Ok(found) if found.is_dir() => found,
            Ok(_) => return Err(UfsError::NotADirectory { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(UfsError::Missing { path });
            }
            Err(error) => return Err(UfsError::io("open", root)(error)),
        };
        Ok(Self {
            root: fs::canonicalize(root).map_err(UfsError::io("open", root))?,
            shared: Arc::new(Shared {
                owner: Owner::new()?,
                identity: (found.dev(), found.ino()),
                open: Mutex::default(),
            }),
        })
    }

    /// The real path of the UFS directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The real path of `name`.
    pub fn path(&self, name: &RelPath) -> PathBuf {
        name.beneath(&self.root)
    }

    /// Whether the layer is there: its index is.
    pub fn exists(&self, layer: &LayerName) -> Result<bool, UfsError> {
        let index = self.path(&layer.index());
        index.try_exists().map_err(UfsError::io("look for", &index))
    }

    /// The name under which a layer is there; the chain comes first.
    pub fn find_layer(
        &self,
        diff_id: DiffId,
        chain_id: ChainId,
    ) -> Result<Option<LayerName>, UfsError> {
        for name in [LayerName::Chain(chain_id), LayerName::Layer(diff_id)] {
            if self.exists(&name)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The header of a layer's index.
    pub fn index_header(&self, layer: &LayerName) -> Result<Header, UfsError> {
        let path = self.path(&layer.index());
        let mut page: Page = [0; 4096];
        self.open_layer_file(&layer.index())
            .and_then(|mut file| file.read_exact(&mut page))
            .map_err(UfsError::io("read", &path))?;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        Header::parse(&page)
            .map_err(invalid)
            .map_err(UfsError::io("use", &path))
    }

    /// The bytes of a record, or `None` if there is none of this name.
    pub fn read_record(&self, name: &RelPath) -> Result<Option<Vec<u8>>, UfsError> {
        let path = self.path(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(UfsError::io("open", &path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_RECORD as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(UfsError::io("read", &path))?;
        if bytes.len() > MAX_RECORD {
            let bytes = bytes.len() as u64;
            let error = RecordError::TooLarge { bytes };
            return Err(UfsError::Record { path, error });
        }
        Ok(Some(bytes))
    }

    /// Starts a file. `what` ends its temporary name, for people who look.
    pub fn create(&self, what: &str) -> Result<Publication, UfsError> {
        self.check_there()?;
        let directory = self.root.join(TMP);
        make_directory(&directory)?;
        // The lock is held over the creation: remove_temporaries() then either
        // sees the file or prevents it.
        let mut open = self.lock();
        self.hold_lease(&mut open)?;
        open.made += 1;
        let path = directory.join(format!("{}.{}.{what}", self.shared.owner, open.made));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .map_err(UfsError::io("create", &path))?;
        open.paths.insert(path.clone());
        drop(open);
        Ok(Publication {
            ufs: self.clone(),
            file,
            path,
        })
    }

    /// Takes the lease if this process does not have it yet.
    fn hold_lease<'a>(&self, open: &'a mut Open) -> Result<&'a Lease, UfsError> {
        if open.closed {
            return Err(UfsError::Interrupted);
        }
        let lease = match open.lease.take() {
            Some(lease) => lease,
            None => {
                let directory = self.root.join(LEASES);
                make_directory(&directory)?;
                Lease::take(&directory, &self.shared.owner)?
            }
        };
        Ok(open.lease.insert(lease))
    }

    /// Whether the path still leads to the directory that was opened: without
    /// this, a file system that was unmounted meanwhile would go on as a directory
    /// of the local disk.
    pub(crate) fn check_there(&self) -> Result<(), UfsError> {
        let vanished = || UfsError::Vanished {
            path: self.root.clone(),
        };
        match fs::metadata(&self.root) {
            Ok(found) if (found.dev(), found.ino()) == self.shared.identity => Ok(()),
            Ok(_) => Err(vanished()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(vanished()),
            Err(error) => Err(UfsError::io("look at", &self.root)(error)),
        }
    }

    /// What time it is on the file system. Takes this process's lease.
    pub fn clock(&self) -> Result<SystemTime, UfsError> {
        self.check_there()?;
        self.hold_lease(&mut self.lock())?.renew()
    }

    /// Who holds this process's lease.
    pub fn owner(&self) -> &Owner {
        &self.shared.owner
    }

    /// The leases on UFS, of whatever process. Whoever wants to know which
    /// temporaries are alive lists those first.
    pub fn leases(&self) -> Result<Vec<FoundLease>, UfsError> {
        let names = self.list_path(&self.root.join(LEASES))?;
        let mut found: Vec<_> = names
            .iter()
            .map(|name| FoundLease::new(&self.root, name))
            .collect();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Whether all that publishing needs can be done here: a file is made, written, synced,
    /// linked to a second name, and read back by that. Nothing of it stays.
    ///
    /// # Errors
    /// What of that cannot be done, or that other bytes are read.
    pub fn try_out(&self) -> Result<(), UfsError> {
        let publication = self.create("check")?;
        let bytes = format!("{}\n", self.shared.owner);
        let mut file = publication.file();
        file.write_all(bytes.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(publication.error("write"))?;
        let link = publication.path().with_extension("link");
        self.keep(&link, || match fs::hard_link(publication.path(), &link) {
            // Over NFS an answer may be lost, and what is asked for again is there then.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(UfsError::io("make the link", &link)(error))
            }
            _ => Ok(Some(())),
        })?;
        let read = fs::read(&link).map_err(UfsError::io("read", &link));
        self.end(&link);
        if read? != bytes.as_bytes() {
            let other = io::Error::new(io::ErrorKind::InvalidData, "these are other bytes");
            return Err(publication.error("read back")(other));
        }
        Ok(())
    }

    /// Publishes a small file: a record, or an index.
    pub fn publish(&self, name: &RelPath, bytes: &[u8]) -> Result<Outcome, UfsError> {
        let what = name.as_str().rsplit('/').next().unwrap_or("record");
        let publication = self.create(what)?;
        let mut file = publication.file();
        file.write_all(bytes).map_err(publication.error("write"))?;
        publication.commit(name)
    }

    /// Publishes what `source` (as for [`names::name_directory`]) points to now. Later records win, so
    /// a clock that lags behind an older record is overruled.
    pub fn publish_name(&self, source: &dyn Display, json: &[u8]) -> Result<(), UfsError> {
        loop {
            let last = self.latest_name(source)?;
            let next = last.map_or(Nanoseconds(0), |last| Nanoseconds(last.0.saturating_add(1)));
            let name = names::name_record(source, now().max(next));
            // Taken in the same nanosecond: look again.
            match self.publish(&name, json) {
                Ok(Outcome::Published) => return Ok(()),
                Ok(Outcome::AlreadyThere) | Err(UfsError::Differs { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// When the last name record of `source` was made, if any.
    pub fn latest_name(&self, source: &dyn Display) -> Result<Option<Nanoseconds>, UfsError> {
        let files = self.list(&names::name_directory(source))?;
        let times = files.iter().filter_map(|f| Nanoseconds::from_file_name(f));
        Ok(times.max())
    }

    /// The names in a directory of UFS, in no order; none if it is not there.
    /// Names that are not UTF-8 are not ours and are left out.
    pub fn list(&self, directory: &RelPath) -> Result<Vec<String>, UfsError> {
        self.list_path(&self.path(directory))
    }

    /// As [`list`](Self::list), but as the file system has them now: a machine remembers
    /// for a while what was in a directory, until it changes something there itself.
    pub(crate) fn list_now(&self, directory: &RelPath) -> Result<Vec<String>, UfsError> {
        let path = self.path(directory);
        // So that what a process that is killed here leaves is known to be nobody's.
        self.check_there()?;
        let mut open = self.lock();
        self.hold_lease(&mut open)?;
        let look = path.join(format!("{LOOK}{}", self.shared.owner));
        match File::create(&look) {
            Ok(_) => crate::removal::unlink(&look)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(UfsError::io("create", &look)(error)),
        }
        // Until here, so that a signal that ends the process leaves none.
        drop(open);
        self.list_path(&path)
    }

    fn list_path(&self, path: &Path) -> Result<Vec<String>, UfsError> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(UfsError::io("list", path)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(UfsError::io("list", path))?;
            names.extend(entry.file_name().into_string());
        }
        Ok(names)
    }

    /// A directory of UFS, opened beneath its root and through no symlink.
    fn open_beneath(&self, directory: &Path) -> Result<OwnedFd, UfsError> {
        let error = |error: Errno| UfsError::io("open", directory)(error.into());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.root, flags, Mode::empty()).map_err(error)?;
        let relative = directory.strip_prefix(&self.root).unwrap_or(directory);
        if relative.as_os_str().is_empty() {
            return Ok(root);
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&root, relative, flags, Mode::empty(), resolve).map_err(error)
    }

    /// As [`list`](Self::list), but through no symlink: for who removes what is listed.
    pub fn list_beneath(&self, directory: &RelPath) -> Result<Vec<String>, UfsError> {
        let path = self.path(directory);
        let error = |error: Errno| UfsError::io("list", &path)(error.into());
        let found = match self.open_beneath(&path) {
            Err(UfsError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            found => found?,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&found, ".", flags, Mode::empty()).map_err(error)?;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::new(opened).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name().to_str().unwrap_or(".");
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// The files of all layers, published or not; through no symlink.
    pub fn layer_files(&self) -> Result<Vec<RelPath>, UfsError> {
        let mut found = Vec::new();
        for room in [names::LAYERS, names::CHAINS] {
            let room = self.rel(&format!("{room}/sha256"))?;
            for shard in self.list_beneath(&room)? {
                let Ok(shard) = format!("{room}/{shard}").parse() else {
                    continue;
                };
                let files = self.list_beneath(&shard)?.into_iter();
                found.extend(files.filter_map(|file| format!("{shard}/{file}").parse().ok()));
            }
        }
        Ok(found)
    }

    /// Renames `path`, in `directory`, into the quarantine if it is `damaged` still; its new
    /// path, or `None` if another has set that aside meanwhile.
    fn set_aside(
        &self,
        directory: &OwnedFd,
        path: &Path,
        damaged: Identity,
    ) -> Result<Option<PathBuf>, UfsError> {
        let error = |error: Errno| UfsError::io("set aside", path)(error.into());
        let room = self.root.join(QUARANTINE);
        make_directory(&room)?;
        let target = self.open_beneath(&room)?;
        let name = path.file_name().unwrap_or_default();
        let mut open = self.lock();
        open.made += 1;
        let mut aside = OsString::from(format!("{}.{}.", self.shared.owner, open.made));
        drop(open);
        aside.push(name);
        let identity = |directory, name| {
            rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                .map(|found| Identity::of(&found))
        };
        match identity(directory, name) {
            Ok(found) if found == damaged => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(error(errno)),
        }
        match rustix::fs::renameat(directory, name, &target, &aside) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(error(errno)),
        }
        // Another may have replaced it just then, with what is good. There is no rename
        // that looks first; so it goes back, unless there is one again.
        if identity(&target, &aside).is_ok_and(|moved| moved != damaged) {
            match rustix::fs::linkat(&target, &aside, directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => {
                    sync_directory(path.parent().unwrap_or(&self.root))?;
                    rustix::fs::unlinkat(&target, &aside, AtFlags::empty()).map_err(error)?;
                    return Ok(None);
                }
                // What has no second name, a directory, say, is nothing good.
                Err(_) => {}
            }
        }
        sync_directory(&room)?;
        Ok(Some(room.join(aside)))
    }

    /// Whether `name` is a file, and not something that leads elsewhere. Its size.
    pub fn regular_file(&self, name: &RelPath) -> Result<Option<u64>, UfsError> {
        let path = self.path(name);
        let directory = match self.open_beneath(path.parent().unwrap_or(&self.root)) {
            Ok(directory) => directory,
            Err(UfsError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let file = path.file_name().unwrap_or_default();
        let found = rustix::fs::statat(&directory, file, AtFlags::SYMLINK_NOFOLLOW);
        match found {
            Ok(found) if rustix::fs::FileType::from_raw_mode(found.st_mode).is_file() => {
                Ok(u64::try_from(found.st_size).ok())
            }
            Ok(_) => Err(UfsError::io("use", &path)(io::Error::other(
                "it is no regular file",
            ))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(UfsError::io("look at", &path)(error.into())),
        }
    }

    /// The files that were damaged and replaced, with their sizes.
    pub fn quarantined(&self) -> Result<Vec<(PathBuf, u64)>, UfsError> {
        let room = self.root.join(QUARANTINE);
        let mut found = Vec::new();
        for name in self.list_path(&room)? {
            let path = room.join(name);
            let size = fs::symlink_metadata(&path).map_or(0, |metadata| metadata.len());
            found.push((path, size));
        }
        found.sort();
        Ok(found)
    }

    /// Every unfinished file on UFS with what is known of its maker, and what a process has
    /// left that wanted to see a directory as it is.
    pub fn temporaries(&self) -> Result<Vec<Temporary>, UfsError> {
        let mut found = Vec::new();
        for (room, prefix) in [(TMP, ""), (CLAIMS, LOOK), (NODES, LOOK)] {
            let directory = self.root.join(room);
            for name in self.list_path(&directory)? {
                let Some(maker) = name.strip_prefix(prefix) else {
                    continue;
                };
                let path = directory.join(&name);
                let metadata = match fs::symlink_metadata(&path) {
                    Ok(metadata) => metadata,
                    // Finished between the listing and now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(UfsError::io("look at", &path)(error)),
                };
                found.push(Temporary {
                    owner: Owner::of_file(maker),
                    size: metadata.len(),
                    modified: metadata.modified().ok(),
                    path,
                });
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Unlinks every temporary of this process, gives up its lease and lets it
    /// make no more. For a signal's sake: the process is to exit right after.
    pub fn remove_temporaries(&self) {
        self.shared.close();
    }

    /// Does [`Ufs::remove_temporaries`] when it is called, if there still is
    /// anything of this UFS then; does not keep its lease.
    pub fn closer(&self) -> impl Fn() + Send + 'static + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.close();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.shared.lock()
    }

    /// Has `make` make a file that goes with this process; `None` if it made none. A signal
    /// that ends the process comes before or after.
    pub(crate) fn keep<T>(
        &self,
        path: &Path,
        make: impl FnOnce() -> Result<Option<T>, UfsError>,
    ) -> Result<Option<T>, UfsError> {
        let mut open = self.lock();
        if open.closed {
            return Err(UfsError::Interrupted);
        }
        let made = make()?;
        if made.is_some() {
            open.paths.insert(path.to_owned());
        }
        Ok(made)
    }

    /// Removes it.
    pub(crate) fn end(&self, path: &Path) {
        let mut open = self.lock();
        if open.paths.remove(path)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(?path, %error, "cannot remove a temporary file");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        // The set stays usable whatever a thread that held it did.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let mut open = self.lock();
        open.closed = true;
        for path in open.paths.drain() {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(?path, %error, "cannot remove a temporary file");
            }
        }
        // After the temporaries: whoever finds one finds its lease too.
        open.lease = None;
    }
}

/// An unfinished file.
#[derive(Debug, Clone)]
pub struct Temporary {
    /// Where it is.
    pub path: PathBuf,
    /// Which process makes or made it; `None` if the name is not of our form.
    pub owner: Option<Owner>,
    /// How large it is so far, in bytes.
    pub size: u64,
    /// When it was written to last, by the clock of the file system.
    pub modified: Option<SystemTime>,
}

fn now() -> Nanoseconds {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Nanoseconds(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Makes `directory` and what is missing above it, up to `root`, durably.
fn make_directories(root: &Path, directory: &Path) -> Result<(), UfsError> {
    if directory == root || directory.is_dir() {
        return Ok(());
    }
    if let Some(parent) = directory.parent() {
        make_directories(root, parent)?;
    }
    make_directory(directory)
}

fn make_directory(directory: &Path) -> Result<(), UfsError> {
    match DirBuilder::new().create(directory) {
        Ok(()) => directory.parent().map_or(Ok(()), sync_directory),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(UfsError::io("make the directory", directory)(error)),
    }
}

fn sync_directory(directory: &Path) -> Result<(), UfsError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(UfsError::io("sync the directory", directory))
}
