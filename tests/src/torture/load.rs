//! The verified load: readers that know what every byte has to be.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, OFlags, fadvise};

use super::Scene;
use super::images::{Known, Made};
use super::node::raise;
use crate::random::Random;

const BLOCK: u64 = 4096;
const LARGEST: u64 = 512 << 10;
/// After an error, so that a lost device does not fill the log.
const PAUSE: Duration = Duration::from_millis(200);

/// What has happened.
#[derive(Debug, Default)]
pub struct Tally {
    pub reads: AtomicU64,
    pub bytes: AtomicU64,
    pub kills: AtomicU64,
    pub in_flight_at_kill: AtomicU64,
    /// Kills that had any.
    pub kills_in_flight: AtomicU64,
    pub stalls: AtomicU64,
    pub corrupted: AtomicU64,
    pub repaired: AtomicU64,
    pub wrong: AtomicU64,
    pub errors: AtomicU64,
    pub longest_wait_ms: AtomicU64,
    /// Reads that had to fail, and did.
    pub refused: AtomicU64,
    /// Attach, detach, mount, unmount.
    pub operations: AtomicU64,
    pub worker_kills: AtomicU64,
    /// The first of them, in words.
    messages: Mutex<Vec<String>>,
}

impl Tally {
    /// Notes something that must not happen.
    pub fn error(&self, message: &str) {
        self.errors.fetch_add(1, Relaxed);
        self.say(message);
    }

    fn wrong(&self, message: &str) {
        self.wrong.fetch_add(1, Relaxed);
        self.say(message);
    }

    fn say(&self, message: &str) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() < 40 {
            println!("BAD: {message}");
            messages.push(message.to_owned());
        }
    }

    /// `reads=… … longest_wait_ms=…`
    pub fn line(&self) -> String {
        let get = |figure: &AtomicU64| figure.load(Relaxed);
        format!(
            "reads={} bytes={} kills={} inflight_at_kill={} stalls={} corrupted={} repaired={} \
             wrong={} errors={} longest_wait_ms={}",
            get(&self.reads),
            get(&self.bytes),
            get(&self.kills),
            get(&self.in_flight_at_kill),
            get(&self.stalls),
            get(&self.corrupted),
            get(&self.repaired),
            get(&self.wrong),
            get(&self.errors),
            get(&self.longest_wait_ms)
        )
    }
}

/// One reader's read under way, for whoever counts or waits.
#[derive(Debug, Default)]
pub struct Slot {
    /// Since when, in milliseconds of the run plus one; 0: none.
    since: AtomicU64,
    what: Mutex<String>,
}

impl Slot {
    /// For how long a read has been under way, and which.
    pub fn under_way(&self, scene: &Scene) -> Option<(Duration, String)> {
        let since = self.since.load(Relaxed).checked_sub(1)?;
        let now = scene.milliseconds();
        let what = self.what.lock().unwrap_or_else(PoisonError::into_inner);
        Some((
            Duration::from_millis(now.saturating_sub(since)),
            what.clone(),
        ))
    }

    /// Whether a read is under way.
    pub fn is_reading(&self) -> bool {
        self.since.load(Relaxed) != 0
    }
}

/// A buffer whose start is on a page, as O_DIRECT wants it.
#[derive(Debug)]
pub struct Aligned {
    room: Vec<u8>,
    start: usize,
}

impl Default for Aligned {
    fn default() -> Self {
        let room = vec![0; usize::try_from(LARGEST + BLOCK).unwrap_or(0)];
        let start = room.as_ptr().align_offset(4096);
        Self { room, start }
    }
}

impl Aligned {
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.room[self.start..self.start + len]
    }
}

/// One reader.
#[derive(Debug)]
pub struct Reader<'a> {
    pub scene: &'a Scene,
    pub slot: &'a Slot,
    pub random: Random,
    pub buffer: Aligned,
    pub wanted: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub fn new(scene: &'a Scene, slot: &'a Slot, seed: u64) -> Self {
        Self {
            scene,
            slot,
            random: Random::new(seed),
            buffer: Aligned::default(),
            wanted: vec![0; usize::try_from(LARGEST).unwrap_or(0)],
        }
    }

    /// A length of any order of magnitude.
    fn length(&mut self) -> u64 {
        let limit = BLOCK << self.random.below(u64::from((LARGEST / BLOCK).ilog2()) + 1);
        1 + self.random.below(limit)
    }

    /// Reads `len` bytes at `offset` and compares them with `wanted`; `None` when the
    /// read failed. Exactly the bytes that there are have to come.
    fn read(&mut self, file: &File, what: &str, offset: u64, len: usize) -> Option<io::Error> {
        let tally = &self.scene.tally;
        {
            let mut text = self
                .slot
                .what
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            text.clear();
            text.push_str(what);
        }
        let since = Instant::now();
        self.slot
            .since
            .store(self.scene.milliseconds() + 1, Relaxed);
        let found = self.buffer.bytes(len);
        found.fill(0xa5);
        let mut done = 0;
        let result = loop {
            match file.read_at(&mut found[done..], offset + done as u64) {
                Ok(0) => break Ok(()),
                Ok(more) => {
                    done += more;
                    if done == len {
                        break Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.slot.since.store(0, Relaxed);
        raise(&tally.longest_wait_ms, since.elapsed());
        if let Err(error) = result {
            return Some(error);
        }
        tally.reads.fetch_add(1, Relaxed);
        tally.bytes.fetch_add(done as u64, Relaxed);
        if done != len {
            tally.wrong(&format!("{what}: {done} bytes at {offset}, not {len}"));
        } else if let Some(at) = found
            .iter()
            .zip(&self.wanted[..len])
            .position(|(a, b)| a != b)
        {
            tally.wrong(&format!(
                "{what}: reading {len} bytes at {offset}: byte {at} is {:#x}, not {:#x}",
                found[at], self.wanted[at]
            ));
        }
        None
    }

    fn must_read(&mut self, file: &File, what: &str, offset: u64, len: usize) {
        if let Some(error) = self.read(file, what, offset, len) {
            let at = self.scene.milliseconds();
            self.scene.tally.error(&format!(
                "{what}: reading {len} bytes at {offset}: {error} (at {at} ms)"
            ));
            std::thread::sleep(PAUSE);
        }
    }

    /// Random reads of an exported device past the page cache.
    pub fn device(&mut self, path: &Path, made: &Made, times: u64) {
        let what = path.display().to_string();
        let file = match direct(path) {
            Ok(file) => file,
            Err(error) => {
                self.scene.tally.error(&format!("opening {what}: {error}"));
                return std::thread::sleep(PAUSE);
            }
        };
        let blocks = made.image().len() as u64 / BLOCK;
        for _ in 0..times {
            let offset = self.random.below(blocks) * BLOCK;
            let len = self.length().next_multiple_of(BLOCK);
            self.exact(&file, &what, made, offset, len.min(blocks * BLOCK - offset));
            if self.scene.is_over() {
                return;
            }
        }
    }

    fn expect(&mut self, made: &Made, offset: u64, len: usize) -> Option<()> {
        let offset = usize::try_from(offset).ok()?;
        let wanted = made.image().get(offset..offset + len)?;
        self.wanted[..len].copy_from_slice(wanted);
        Some(())
    }

    fn exact(&mut self, file: &File, what: &str, made: &Made, offset: u64, len: u64) {
        let len = usize::try_from(len).unwrap_or(0);
        if self.expect(made, offset, len).is_some() {
            self.must_read(file, what, offset, len);
        }
    }

    /// All of an exported device.
    pub fn whole_device(&mut self, path: &Path, made: &Made) {
        let what = path.display().to_string();
        match direct(path) {
            Ok(file) => {
                let size = made.image().len() as u64;
                let mut offset = 0;
                while offset < size {
                    let len = LARGEST.min(size - offset);
                    self.exact(&file, &what, made, offset, len);
                    offset += len;
                }
            }
            Err(error) => self.scene.tally.error(&format!("opening {what}: {error}")),
        }
    }

    /// Reads that may fail with EIO, as no source has right bytes: `Some(true)` if it
    /// did.
    pub fn may_fail(&mut self, path: &Path, made: &Made, offset: u64, len: usize) -> Option<bool> {
        let what = path.display().to_string();
        let file = direct(path).ok()?;
        self.expect(made, offset, len)?;
        let error = self.read(&file, &what, offset, len);
        match error {
            None => Some(false),
            Some(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Some(true)
            }
            Some(error) => {
                let text = format!("{what}: at {offset}: {error}, where EIO was in order");
                self.scene.tally.error(&text);
                None
            }
        }
    }

    /// The same, once the bytes are right again.
    pub fn has_to_succeed(&mut self, path: &Path, made: &Made, offset: u64, len: usize) {
        match direct(path) {
            Ok(file) => self.exact(&file, &path.display().to_string(), made, offset, len as u64),
            Err(error) => {
                let text = format!("opening {}: {error}", path.display());
                self.scene.tally.error(&text);
            }
        }
    }

    /// Reads of files of a mounted image; the kernel is made to forget them before.
    pub fn files(&mut self, root: &Path, files: &[Known], times: u64) {
        for _ in 0..times {
            let which = usize::try_from(self.random.below(files.len() as u64)).unwrap_or(0);
            let known = &files[which];
            let path = root.join(&known.name);
            let what = path.display().to_string();
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) => {
                    self.scene.tally.error(&format!("opening {what}: {error}"));
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            let offset = self.random.below(known.size);
            let len = self.length().min(known.size - offset);
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            if self.random.below(2) == 0 {
                let _ = fadvise(&file, 0, None, Advice::Random);
            }
            let len = usize::try_from(len).unwrap_or(0);
            let mut wanted = std::mem::take(&mut self.wanted);
            known.fill(offset, &mut wanted[..len]);
            self.wanted = wanted;
            self.must_read(&file, &what, offset, len);
            if self.scene.is_over() {
                return;
            }
        }
    }

    /// Lists the tree of a mounted image: names and sizes have to be right.
    pub fn tree(&mut self, root: &Path, files: &[Known]) {
        let since = Instant::now();
        self.slot
            .since
            .store(self.scene.milliseconds() + 1, Relaxed);
        let found = list(root);
        self.slot.since.store(0, Relaxed);
        raise(&self.scene.tally.longest_wait_ms, since.elapsed());
        let mut wanted: Vec<_> = files
            .iter()
            .map(|file| (root.join(&file.name), file.size))
            .collect();
        wanted.sort();
        match found {
            Err(error) => {
                let text = format!("listing {}: {error}", root.display());
                self.scene.tally.error(&text);
                std::thread::sleep(PAUSE);
            }
            Ok(mut found) => {
                found.sort();
                self.scene.tally.reads.fetch_add(1, Relaxed);
                if found != wanted {
                    let text = format!(
                        "{}: {} files, not {}",
                        root.display(),
                        found.len(),
                        wanted.len()
                    );
                    self.scene.tally.wrong(&text);
                }
            }
        }
    }
}

fn list(root: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for directory in fs::read_dir(root)? {
        for file in fs::read_dir(directory?.path())? {
            let file = file?;
            found.push((file.path(), file.metadata()?.len()));
        }
    }
    Ok(found)
}

fn direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
}
