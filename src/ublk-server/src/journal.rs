//! What a successor needs to know, on local disk before it is relied on.
//!
//! One JSON file per export under `RUN_DIR/journal/`, named after the
//! layer's root. Its `state` is `intent` (the device has its id, nobody can use
//! it yet), then `live`, then `deleting`. Files are written whole: temporary
//! file, fsync, rename, fsync of the directory. Ids mean nothing after a reboot,
//! so every file carries the boot's id.
//!
//! Of an export over FUSE the device is not in the kernel but with the
//! [keeper](crate::keeper), under the same name.

use crate::remake::Origin;
use accel_oci::{ChainId, DiffId, Digest};
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long entries wait for memory, which the kernel takes from somebody else.
const WAIT_FOR_MEMORY: Duration = Duration::from_secs(1);

/// They wait once in so long: others wait for who writes them.
const AGAIN: Duration = Duration::from_secs(10);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// Number of the format; entries of FUSE exports have the second, because a daemon
/// that knows only the first would take them for block devices.
const LAYOUT: u32 = 1;
const LAYOUT_FUSE: u32 = 2;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A newer version wrote it.
    #[error(
        "the journal entry {path} has layout {layout}, which this version (layouts up to {LAYOUT_FUSE}) \
         does not know: a newer ublk-server made the device and must serve it; nothing was touched"
    )]
    Newer {
        /// Which entry.
        path: String,
        /// Its layout.
        layout: u32,
    },
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What an entry of every layout has.
#[derive(Debug, Deserialize)]
struct Head {
    layout: u32,
    boot_id: String,
}

/// How far a device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Added, not started.
    Intent,
    /// In use, or about to be.
    Live,
    /// To be removed.
    Deleting,
}

/// How a layer is exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// As a block device.
    #[default]
    Ublk,
    /// As a file on FUSE.
    Fuse,
}

/// Who holds a device's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderEntry {
    /// The holder.
    pub holder: String,
    /// The image as it was asked for.
    pub image: String,
    /// Its manifest.
    pub manifest: Digest,
    /// All of its layers, lowest first.
    pub layers: Vec<Root>,
    /// Whether the holder knew the roots from elsewhere than UFS.
    #[serde(default)]
    pub signed: bool,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Number of the format.
    pub layout: u32,
    /// Of this boot only.
    pub boot_id: String,
    /// How far it has come.
    pub state: State,
    /// How it is exported.
    #[serde(default)]
    pub transport: Transport,
    /// `N` of `/dev/ublkbN`.
    pub device: u32,
    /// ublk flags it was made with; for people.
    pub features: u64,
    /// Its queue's depth; for people.
    pub queue_depth: u16,
    /// The UFS directory it is served from.
    pub ufs: PathBuf,
    /// `layer`, `chain` or `canary`.
    pub kind: String,
    /// diffID, chain ID, or the canary's digest.
    pub digest: Digest,
    /// The layer's BLAKE3.
    pub root: Root,
    /// Its size.
    pub size: ImageSize,
    /// Who needs it.
    pub holders: Vec<HolderEntry>,
    /// Where it came from, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

impl Entry {
    /// An entry of this boot and format.
    pub fn new(journal: &Journal, name: LayerName, root: Root, size: ImageSize) -> Self {
        let (kind, digest) = match name {
            LayerName::Layer(DiffId(digest)) => ("layer", digest),
            LayerName::Chain(ChainId(digest)) => ("chain", digest),
            LayerName::Canary(digest) => ("canary", digest),
        };
        Self {
            layout: LAYOUT,
            boot_id: journal.boot_id.clone(),
            state: State::Intent,
            transport: Transport::Ublk,
            device: 0,
            features: 0,
            queue_depth: 0,
            ufs: journal.ufs.clone(),
            kind: kind.to_owned(),
            digest,
            root,
            size,
            holders: Vec::new(),
            origin: None,
        }
    }

    /// The same for an export over FUSE.
    pub fn over_fuse(self) -> Self {
        Self {
            layout: LAYOUT_FUSE,
            transport: Transport::Fuse,
            ..self
        }
    }

    /// What the layer is called on UFS.
    pub fn name(&self) -> LayerName {
        match self.kind.as_str() {
            "chain" => LayerName::Chain(ChainId(self.digest)),
            "canary" => LayerName::Canary(self.digest),
            _ => LayerName::Layer(DiffId(self.digest)),
        }
    }
}

/// What a file of the journal is.
enum Found {
    Entry(Box<Entry>),
    EarlierBoot,
    Newer(u32),
}

/// The directory of entries.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    boot_id: String,
    ufs: PathBuf,
    memory: Memory,
}

impl Journal {
    /// Opens the journal beneath `run_dir`, making its directory.
    pub fn open(run_dir: &Path, ufs: &Path) -> io::Result<Self> {
        let directory = run_dir.join("journal");
        fs::create_dir_all(&directory)?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self {
            directory,
            boot_id: boot_id.trim().to_owned(),
            ufs: ufs.to_owned(),
            memory: Memory::default(),
        })
    }

    fn path(&self, root: Root) -> PathBuf {
        self.directory.join(format!("{root}.json"))
    }

    /// Makes sure that nothing is noted about this layer yet: an entry that is
    /// there is all that a later daemon knows of a device which waits for it.
    pub fn check_vacant(&self, root: Root) -> io::Result<()> {
        let path = self.path(root);
        if !path.try_exists()? {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!(
                "an earlier daemon's device of this layer was not recovered (see {} and the log): \
                 restart the daemon to try again, or delete the device and then this file",
                path.display()
            ),
        ))
    }

    /// Writes an entry; when this returns it is on disk.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut json = serde_json::to_vec_pretty(entry)?;
        json.push(b'\n');
        self.memory
            .when_there_is_some(|| self.write_file(entry.root, &json))
    }

    fn write_file(&self, root: Root, json: &[u8]) -> io::Result<()> {
        let temporary = self.directory.join(format!(".{root}.tmp"));
        let mut file = File::create(&temporary)?;
        file.write_all(json)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path(root))?;
        File::open(&self.directory)?.sync_all()
    }

    /// Removes an entry.
    pub fn remove(&self, root: Root) -> io::Result<()> {
        let path = self.path(root);
        let removed = self.memory.when_there_is_some(|| fs::remove_file(&path));
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// The entries of this boot. One that cannot be read is left alone, and told; one
    /// of a newer layout is an error.
    pub fn load(&self) -> Result<Vec<Entry>, JournalError> {
        let mut entries = Vec::new();
        for path in self.files()? {
            let json = fs::read(&path)?;
            match self.parse(&json) {
                Ok(Found::Entry(entry)) => entries.push(*entry),
                Ok(Found::EarlierBoot) => {}
                Ok(Found::Newer(layout)) => {
                    let path = path.display().to_string();
                    return Err(JournalError::Newer { path, layout });
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error,
                        "a journal entry cannot be read and is left alone: its device waits until \
                         `ublk-server gc` removes it");
                }
            }
        }
        Ok(entries)
    }

    /// The entries of this boot that this version can read.
    pub fn load_known(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for path in self.files()? {
            if let Ok(Found::Entry(entry)) = self.parse(&fs::read(&path)?) {
                entries.push(*entry);
            }
        }
        Ok(entries)
    }

    /// Removes entries that a daemon was killed while writing: nothing relies on them.
    pub fn forget_unfinished(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "tmp") {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Removes the entries of earlier boots, whose devices are gone, and gives those
    /// that can be read.
    pub fn forget_earlier_boots(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for path in self.files()? {
            let json = fs::read(&path)?;
            if matches!(self.parse(&json), Ok(Found::EarlierBoot)) {
                tracing::info!(path = %path.display(), "dropping a device of an earlier boot");
                fs::remove_file(&path)?;
                entries.extend(serde_json::from_slice::<Entry>(&json));
            }
        }
        Ok(entries)
    }

    /// Removes entries that cannot be read: when there is no device that one of them
    /// could be about, all that they do is to keep their layers from being exported.
    pub fn forget_damaged(&self) -> io::Result<()> {
        for path in self.files()? {
            if let Err(error) = self.parse(&fs::read(&path)?) {
                tracing::warn!(path = %path.display(), %error,
                    "dropping a journal entry that cannot be read: it has no device");
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    fn parse(&self, json: &[u8]) -> serde_json::Result<Found> {
        let head: Head = serde_json::from_slice(json)?;
        Ok(match head {
            head if head.boot_id != self.boot_id => Found::EarlierBoot,
            Head { layout, .. } if layout > LAYOUT_FUSE => Found::Newer(layout),
            _ => Found::Entry(serde_json::from_slice(json)?),
        })
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for file in fs::read_dir(&self.directory)? {
            let path = file?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                files.push(path);
            }
        }
        Ok(files)
    }
}

/// Waits for memory: pages of files count, too, where a daemon's memory is limited.
#[derive(Debug, Default)]
struct Memory {
    /// Until when it was last waited for.
    until: Mutex<Option<Instant>>,
}

impl Memory {
    /// Until when to wait, if there is none at `now`.
    fn until(&self, now: Instant) -> Instant {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        match *until {
            Some(at) if now < at + AGAIN => at,
            _ => *until.insert(now + WAIT_FOR_MEMORY),
        }
    }

    /// Does it again for a while if it fails for want of memory.
    fn when_there_is_some<T>(&self, mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            let result = act();
            let now = Instant::now();
            match result {
                Err(error)
                    if error.kind() == io::ErrorKind::OutOfMemory && now < self.until(now) =>
                {
                    thread::sleep(PAUSE);
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_waited_for_and_nothing_else() {
        let mut answers = vec![
            Err(io::ErrorKind::StorageFull.into()),
            Ok(7),
            Err(io::ErrorKind::OutOfMemory.into()),
            Err(io::ErrorKind::OutOfMemory.into()),
        ];
        let (memory, mut next) = (Memory::default(), || answers.pop().unwrap());
        assert_eq!(memory.when_there_is_some(&mut next).unwrap(), 7);
        let error = memory.when_there_is_some(&mut next).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let without =
            || memory.when_there_is_some(|| Err::<(), _>(io::ErrorKind::OutOfMemory.into()));
        assert_eq!(without().unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn memory_is_waited_for_once_in_a_while() {
        let (memory, now) = (Memory::default(), Instant::now());
        let end = now + WAIT_FOR_MEMORY;
        assert_eq!(memory.until(now), end);
        assert_eq!(memory.until(now + PAUSE), end);
        assert_eq!(memory.until(end + AGAIN - PAUSE), end);
        let later = end + AGAIN;
        assert_eq!(memory.until(later), later + WAIT_FOR_MEMORY);
    }

    fn entry(journal: &Journal) -> Entry {
        let name = LayerName::Chain(ChainId(Digest::of(b"x")));
        let mut entry = Entry::new(journal, name, Root([7; 32]), ImageSize::new(4096).unwrap());
        entry.holders.push(HolderEntry {
            holder: "/mnt".to_owned(),
            image: "oci:/x".to_owned(),
            manifest: Digest::of(b"m"),
            layers: vec![Root([7; 32])],
            signed: false,
        });
        entry
    }

    #[test]
    fn entries_read_back_and_the_last_state_counts() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Path::new("/ufs")).unwrap();
        let mut entry = entry(&journal);
        journal.check_vacant(entry.root).unwrap();
        journal.write(&entry).unwrap();
        let error = journal.check_vacant(entry.root).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        entry.state = State::Live;
        journal.write(&entry).unwrap();
        assert_eq!(journal.load().unwrap(), [entry.clone()]);
        assert_eq!(entry.name(), LayerName::Chain(ChainId(Digest::of(b"x"))));
        let canary = LayerName::Canary(Digest::of(b"x"));
        let of_canary = Entry::new(&journal, canary, entry.root, entry.size);
        assert_eq!(of_canary.name(), canary);
        // A daemon was killed while it wrote another one.
        let unfinished = directory.path().join("journal/.x.tmp");
        fs::write(&unfinished, "{").unwrap();
        journal.forget_unfinished().unwrap();
        assert!(!unfinished.exists());
        assert_eq!(journal.load().unwrap(), [entry.clone()]);
        journal.remove(entry.root).unwrap();
        journal.remove(entry.root).unwrap();
        assert_eq!(journal.load().unwrap(), []);
    }

    #[test]
    fn an_earlier_boot_is_dropped_and_nonsense_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Path::new("/ufs")).unwrap();
        let mut entry = entry(&journal);
        entry.boot_id = "another".to_owned();
        journal.write(&entry).unwrap();
        let nonsense = directory.path().join("journal/x.json");
        fs::write(&nonsense, "{").unwrap();
        assert_eq!(journal.load().unwrap(), []);
        assert_eq!(journal.forget_earlier_boots().unwrap(), [entry.clone()]);
        assert!(!journal.path(entry.root).exists());
        assert!(nonsense.exists());
        journal.write(&entry).unwrap();
        journal.forget_damaged().unwrap();
        assert!(journal.path(entry.root).exists());
        assert!(!nonsense.exists());
    }

    #[test]
    fn a_newer_layout_is_refused_and_left() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Path::new("/ufs")).unwrap();
        let newer = directory.path().join("journal/newer.json");
        let boot = &journal.boot_id;
        // Nothing but these two has to be as it is today.
        let json = format!(r#"{{"layout": 3, "boot_id": "{boot}", "device": {{"other": true}}}}"#);
        fs::write(&newer, &json).unwrap();
        journal.write(&entry(&journal)).unwrap();
        let error = journal.load().unwrap_err().to_string();
        assert!(
            error.contains("newer.json") && error.contains("layout 3"),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&newer).unwrap(), json);
        // After a reboot its device is gone, whatever it was.
        fs::write(&newer, json.replace(boot, "another")).unwrap();
        assert_eq!(journal.load().unwrap().len(), 1);
        journal.forget_earlier_boots().unwrap();
        assert!(!newer.exists());
    }

    /// Entries as earlier versions wrote them.
    #[test]
    fn every_published_layout_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path(), Path::new("/ufs")).unwrap();
        let (boot, root) = (&journal.boot_id, Root([7; 32]).to_string());
        let digest = Digest::of(b"x").to_string();
        for (layout, transport, wanted) in [
            (1, "", Transport::Ublk),
            (1, r#""transport": "ublk","#, Transport::Ublk),
            (2, r#""transport": "fuse","#, Transport::Fuse),
        ] {
            let json = format!(
                r#"{{"layout": {layout}, "boot_id": "{boot}", "state": "live", {transport}
                    "device": 5, "features": 218, "queue_depth": 32, "ufs": "/ufs",
                    "kind": "chain", "digest": "{digest}", "root": "{root}", "size": 4096,
                    "holders": [{{"holder": "/mnt", "image": "oci:/x", "manifest": "{digest}",
                                  "layers": ["{root}"]}}]}}"#
            );
            fs::write(journal.path(Root([7; 32])), json).unwrap();
            let [entry] = &journal.load().unwrap()[..] else {
                panic!("not one entry");
            };
            assert_eq!((entry.transport, entry.device), (wanted, 5));
            assert_eq!((entry.state, entry.queue_depth), (State::Live, 32));
            assert_eq!(entry.holders[0].layers, [Root([7; 32])]);
        }
    }

    proptest::proptest! {
        /// Whatever is in a file, it is an entry or it is not.
        #[test]
        fn nonsense_is_no_panic(json in "\\PC*", cut in 0usize..2000, flip: u8) {
            let directory = tempfile::tempdir().unwrap();
            let journal = Journal::open(directory.path(), Path::new("/ufs")).unwrap();
            let _ = journal.parse(json.as_bytes());
            let mut real = serde_json::to_vec(&entry(&journal)).unwrap();
            real.truncate(cut);
            if let Some(byte) = real.get_mut(cut / 2) {
                *byte ^= flip;
            }
            let _ = journal.parse(&real);
        }
    }
}
