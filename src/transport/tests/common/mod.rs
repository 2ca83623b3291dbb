//! A reader whose bytes are known at every offset, and ways to check them.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use accel_transport::{ReadError, Reader, Request};

pub const CHUNK: u64 = 128 << 10;

/// A small generator of pseudo-random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Length of the table behind [`pattern`]: a prime, so that no two places that
/// a confused offset could mix up look alike.
const PERIOD: usize = 1_048_573;

/// The bytes of image `seed` at `offset`. Made of few copies of a table: in an
/// emulated guest, computing every byte would be most of the time.
pub fn pattern(seed: u64, offset: u64, len: usize) -> Vec<u8> {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut random = Random(1);
        let words = PERIOD.div_ceil(8);
        let mut table: Vec<u8> = (0..words)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        table.truncate(PERIOD);
        table
    });
    let place = mix(seed).wrapping_add(offset) % PERIOD as u64;
    let mut at = usize::try_from(place).unwrap();
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let n = (len - bytes.len()).min(PERIOD - at);
        bytes.extend_from_slice(&table[at..at + n]);
        at = 0;
    }
    bytes
}

/// How a [`PatternReader`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// At once, in one piece.
    Inline,
    /// At once, a piece for every chunk.
    InlinePieces,
    /// At once, in one call, from a place for every chunk.
    InlineGathered,
    /// From other threads, a piece for every chunk, the last chunk first.
    Elsewhere,
}

type Job = Box<dyn FnOnce() + Send>;

pub struct PatternReader {
    pub seed: u64,
    size: u64,
    answers: Answers,
    faults: Vec<Range<u64>>,
    /// Reads that touch this are kept, not answered.
    holds: Option<Range<u64>>,
    held: Mutex<Vec<Box<dyn Send>>>,
    on_hold: Box<dyn Fn() + Send + Sync>,
    pub reads: AtomicU64,
    workers: Vec<Mutex<Sender<Job>>>,
}

impl PatternReader {
    pub fn new(seed: u64, size: u64, answers: Answers) -> Self {
        let workers = if answers == Answers::Elsewhere { 3 } else { 0 };
        let workers = (0..workers)
            .map(|_| {
                let (sender, jobs) = mpsc::channel::<Job>();
                thread::spawn(move || jobs.iter().for_each(|job| job()));
                Mutex::new(sender)
            })
            .collect();
        PatternReader {
            seed,
            size,
            answers,
            faults: Vec::new(),
            holds: None,
            held: Mutex::default(),
            on_hold: Box::new(|| {}),
            reads: AtomicU64::new(0),
            workers,
        }
    }

    pub fn failing(mut self, fault: Range<u64>) -> Self {
        self.faults.push(fault);
        self
    }

    pub fn holding(mut self, range: Range<u64>, then: impl Fn() + Send + Sync + 'static) -> Self {
        self.holds = Some(range);
        self.on_hold = Box::new(then);
        self
    }

    /// Drops the requests that are held.
    pub fn drop_held(&self) {
        self.held.lock().unwrap().clear();
    }
}

fn touches(range: &Range<u64>, offset: u64, len: usize) -> bool {
    offset < range.end && range.start < offset + len as u64
}

/// Chunk-wise pieces of a range, as offsets in the image.
fn pieces(offset: u64, len: usize) -> Vec<Range<u64>> {
    let end = offset + len as u64;
    let mut pieces = Vec::new();
    let mut at = offset;
    while at < end {
        let next = (at / CHUNK * CHUNK + CHUNK).min(end);
        pieces.push(at..next);
        at = next;
    }
    pieces
}

impl Reader for PatternReader {
    type Kept = ();

    fn size(&self) -> u64 {
        self.size
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self
            .holds
            .as_ref()
            .is_some_and(|range| touches(range, offset, len))
        {
            self.held.lock().unwrap().push(Box::new(request));
            (self.on_hold)();
            return;
        }
        if let Some(fault) = self.faults.iter().find(|range| touches(range, offset, len)) {
            let reason = format!("bytes {fault:?} are bad");
            return request.finish(Err(ReadError { reason }));
        }
        let fill = |request: &R, piece: &Range<u64>, seed| {
            let at = usize::try_from(piece.start - offset).unwrap();
            let len = usize::try_from(piece.end - piece.start).unwrap();
            request.fill(at, &pattern(seed, piece.start, len)).unwrap();
        };
        match self.answers {
            Answers::Inline => {
                request.fill(0, &pattern(self.seed, offset, len)).unwrap();
                request.finish(Ok(()));
            }
            Answers::InlinePieces => {
                for piece in pieces(offset, len) {
                    fill(&request, &piece, self.seed);
                }
                request.finish(Ok(()));
            }
            Answers::InlineGathered => {
                let bytes: Vec<_> = pieces(offset, len)
                    .into_iter()
                    .map(|piece| {
                        let len = usize::try_from(piece.end - piece.start).unwrap();
                        pattern(self.seed, piece.start, len)
                    })
                    .collect();
                let slices: Vec<_> = bytes.iter().map(|bytes| IoSlice::new(bytes)).collect();
                request.fill_from(&slices).unwrap();
                request.finish(Ok(()));
            }
            Answers::Elsewhere => {
                // Whoever fills the last piece finishes.
                let request = Arc::new(request);
                for (index, piece) in pieces(offset, len).into_iter().enumerate().rev() {
                    let request = Arc::clone(&request);
                    let seed = self.seed;
                    let job = move || {
                        let at = usize::try_from(piece.start - offset).unwrap();
                        let len = usize::try_from(piece.end - piece.start).unwrap();
                        request.fill(at, &pattern(seed, piece.start, len)).unwrap();
                        if let Some(request) = Arc::into_inner(request) {
                            request.finish(Ok(()));
                        }
                    };
                    let worker = &self.workers[index % self.workers.len()];
                    let sender = worker.lock().unwrap_or_else(PoisonError::into_inner);
                    sender.send(Box::new(job)).unwrap();
                }
                if let Some(request) = Arc::into_inner(request) {
                    request.finish(Ok(()));
                }
            }
        }
    }
}

/// Opens for buffered reading.
pub fn buffered(path: &Path) -> File {
    File::open(path).unwrap()
}

/// Opens for reading past the page cache.
pub fn direct(path: &Path) -> File {
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

/// Like `read_exact_at`, into memory that suits O_DIRECT; short at the end.
pub fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut memory = vec![0; len + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[skip..skip + len];
    let mut done = 0;
    while done < len {
        let n = file.read_at(&mut buffer[done..], offset + done as u64)?;
        if n == 0 {
            break;
        }
        done += n;
    }
    Ok(buffer[..done].to_vec())
}

/// Panics with the first difference, not with megabytes.
pub fn assert_pattern(seed: u64, offset: u64, got: &[u8]) {
    let want = pattern(seed, offset, got.len());
    if got != want {
        let at = (0..got.len()).find(|&at| got[at] != want[at]).unwrap();
        panic!(
            "image {seed}: byte {} of a read of {} at {offset} is {:#x}, not {:#x}",
            at,
            got.len(),
            got[at],
            want[at]
        );
    }
}

/// Reads at many offsets and sizes, multiples of `unit`, also across the end.
pub fn check_random_reads(
    file: &File,
    seed: u64,
    size: u64,
    unit: u64,
    rounds: u32,
    random: &mut Random,
) {
    for _ in 0..rounds {
        // Small and large, anywhere, and often across the edges of chunks.
        let len = match random.below(4) {
            0 => unit,
            1 => unit * (1 + random.below(8)),
            2 => unit * (1 + random.below(2 * CHUNK / unit)),
            _ => unit * (1 + random.below(9 * CHUNK / unit)),
        };
        let offset = match random.below(4) {
            0 => random.below(size / CHUNK + 1) * CHUNK,
            1 => size.saturating_sub(random.below(2 * CHUNK)),
            2 => (random.below(size / CHUNK + 1) * CHUNK + CHUNK).saturating_sub(len / 2),
            _ => random.below(size),
        } / unit
            * unit;
        let want = len.min(size.saturating_sub(offset));
        let got = read_at(file, offset, usize::try_from(len).unwrap())
            .unwrap_or_else(|error| panic!("{len} bytes at {offset}: {error}"));
        assert_eq!(got.len() as u64, want, "{len} bytes at {offset} of {size}");
        assert_pattern(seed, offset, &got);
    }
}

/// Names under /proc/self/fd, resolved: what this process has open.
pub fn open_files() -> Vec<String> {
    let mut files: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|path| path.display().to_string())
        .filter(|name| !name.starts_with("/proc/"))
        .collect();
    files.sort();
    files
}

/// Finishes without having filled everything, differently in each chunk.
pub struct Lazy;

impl Reader for Lazy {
    type Kept = ();

    fn size(&self) -> u64 {
        4 * CHUNK
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        match offset / CHUNK {
            0 => request.finish(Ok(())),
            1 => {
                request.fill(0, &vec![1; len / 2]).unwrap();
                request.finish(Ok(()));
            }
            2 => {
                assert!(request.fill(1, &vec![1; len]).is_err());
                drop(request);
            }
            _ => panic!("a reader with a bug"),
        }
    }
}

/// Serves an image from memory.
pub struct Image(pub Vec<u8>);

impl Reader for Image {
    type Kept = ();

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        let offset = usize::try_from(offset).unwrap();
        request.fill(0, &self.0[offset..offset + len]).unwrap();
        request.finish(Ok(()));
    }
}

/// Path and content of every file under `root`, in order.
pub fn contents(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().to_owned();
            if metadata.is_dir() {
                todo.push(path);
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.push((name, target.into_os_string().into_encoded_bytes()));
            } else {
                found.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// A tree under `dir`, and an EROFS image of it.
pub fn erofs_image(dir: &Path) -> (PathBuf, Vec<u8>) {
    let tree = dir.join("tree");
    let mut random = Random(12);
    for name in ["a", "a/b", "empty"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    for file in 0..200 {
        let len = if file % 10 == 0 {
            random.below(3 << 20)
        } else {
            random.below(9000)
        };
        let bytes = pattern(file, 0, usize::try_from(len).unwrap());
        let place = ["", "a", "a/b"][usize::try_from(file % 3).unwrap()];
        fs::write(tree.join(place).join(format!("file{file}")), bytes).unwrap();
    }
    std::os::unix::fs::symlink("a/b", tree.join("link")).unwrap();
    let image = dir.join("image.erofs");
    let made = Command::new("mkfs.erofs")
        .args([&image, &tree])
        .stdout(Stdio::null())
        .status()
        .expect("mkfs.erofs (package erofs-utils) makes the image");
    assert!(made.success());
    let image = fs::read(image).unwrap();
    (tree, image)
}
