//! The disk cache in front of a real source: this test binary is its own worker.

use accel_source::{
    Arena, Content, DiskCache, DiskError, DiskOptions, FileName, Filled, Operation, Patience,
    Rejected, Request, Source, SourceError, WorkerCommand, WorkerSource, disk_slots, disk_worker,
    worker,
};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const CHUNK: usize = 128 << 10;
const SIZE: u64 = 16 << 20;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let word = arguments.get(1).and_then(|word| word.to_str());
    let result = match word {
        Some("source-worker") => worker::run(Path::new(&arguments[2]), None),
        Some("disk-cache-worker") => {
            let slots = arguments[3].to_str().unwrap().parse().unwrap();
            disk_worker::run(Path::new(&arguments[2]), slots, None)
        }
        _ => {
            let tests: [(&str, fn()); 9] = [
                ("what_was_read_is_there_after_a_restart", warm),
                ("changed_bytes_are_fetched_again", changed),
                ("any_index_will_do", indexes),
                ("it_never_grows", bounded),
                ("a_full_disk_is_no_error", full),
                ("a_disk_that_hangs_is_left_alone", hangs),
                ("another_daemon_is_refused", taken),
                ("a_name_leads_nowhere_else", links),
                ("a_directory_that_cannot_be_is_no_error", broken),
            ];
            let trials = tests.map(|(name, test)| {
                Trial::test(name, move || {
                    test();
                    Ok::<_, Failed>(())
                })
            });
            return libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code();
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A source of a file of so many chunks (the last one is short), and what is in front.
struct Node {
    scratch: TempDir,
    cache: PathBuf,
    data: Vec<u8>,
    running: Option<Running>,
}

struct Running {
    cache: DiskCache,
    arena: Arc<Arena>,
    source: Arc<WorkerSource>,
}

impl Node {
    fn new(chunks: usize) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let data: Vec<_> = (0..chunks * CHUNK - 5000).map(|_| next()).collect();
        fs::create_dir(scratch.path().join("ufs")).unwrap();
        fs::write(scratch.path().join("ufs/file"), &data).unwrap();
        Self {
            cache: scratch.path().join("cache"),
            scratch,
            data,
            running: None,
        }
    }

    fn chunks(&self) -> usize {
        self.data.len().div_ceil(CHUNK)
    }

    fn try_start(&mut self) -> Result<&Running, DiskError> {
        let ufs = self.scratch.path().join("ufs");
        let arena = Arc::new(Arena::new(8, 8).unwrap());
        let command = |words: &[&str], directory: &Path| WorkerCommand {
            program: "/proc/self/exe".into(),
            arguments: [words[0].into(), directory.into()]
                .into_iter()
                .chain(words[1..].iter().map(Into::into))
                .collect(),
        };
        let source = command(&["source-worker"], &ufs);
        let source = WorkerSource::start("UFS", source, Arc::clone(&arena)).unwrap();
        let source = Arc::new(source);
        let inner: Arc<dyn Source> = Arc::<WorkerSource>::clone(&source);
        let slots = disk_slots(SIZE).to_string();
        let options = DiskOptions {
            name: self.cache.display().to_string(),
            size: SIZE,
            reader: command(&["source-worker"], &self.cache),
            writer: command(&["disk-cache-worker", &slots], &self.cache),
        };
        let cache = DiskCache::start(inner, Arc::clone(&arena), &options)?;
        cache.claim()?;
        self.running = Some(Running {
            cache,
            arena,
            source,
        });
        Ok(self.running.as_ref().unwrap())
    }

    /// Starts anew and waits until the index was read.
    fn start(&mut self) {
        self.running = None;
        let running = self.try_start().unwrap();
        await_that(|| running.cache.standing().in_use);
    }

    fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// Reads a chunk as the daemon does: what is wrong is rejected.
    fn read(&self, chunk: usize) {
        let Running { cache, arena, .. } = self.running();
        let want = self.data.chunks(CHUNK).nth(chunk).unwrap();
        let mut name = [0; 32];
        name[..8].copy_from_slice(&(chunk as u64 + 1).to_be_bytes());
        name[8..16].copy_from_slice(&want[..8]);
        let content = Content::Chunk(name);
        let mut rejected = Rejected::default();
        loop {
            let operation = Operation::Read {
                offset: (chunk * CHUNK) as u64,
                len: want.len(),
                fresh: false,
            };
            let slot = loop {
                match arena.chunks().take() {
                    Some(slot) => break slot,
                    None => std::thread::yield_now(),
                }
            };
            let request = Request {
                content: Some(content),
                rejected: rejected.clone(),
                ..Request::new(FileName::new("file"), operation, slot, Patience::DATA)
            };
            let (sender, receiver) = mpsc::channel::<Result<Filled, SourceError>>();
            cache.submit(request, Box::new(move |outcome| drop(sender.send(outcome))));
            let filled = receiver.recv().unwrap().unwrap();
            if filled.bytes() == want {
                cache.verified(content, filled.bytes(), &filled.origin);
                return;
            }
            rejected.add(&filled, "wrong".to_owned());
        }
    }

    fn read_all(&self) {
        for chunk in 0..self.chunks() {
            self.read(chunk);
        }
    }

    /// Reads until everything is kept, and known after a restart.
    fn fill(&self) {
        await_that(|| {
            self.read_all();
            let cache = &self.running().cache;
            cache.save();
            cache.standing().used == (self.chunks() * CHUNK) as u64 && cache.standing().saved
        });
    }

    /// How often the source was asked since the start.
    fn asked(&self) -> u64 {
        self.running().source.counters().reads.load(Relaxed)
    }

    fn file(&self, name: &str) -> File {
        let path = self.cache.join(name);
        File::options().read(true).write(true).open(path).unwrap()
    }
}

#[track_caller]
fn await_that(mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "it never came to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn warm() {
    let mut node = Node::new(20);
    node.start();
    node.fill();
    assert!(node.asked() >= 20);
    for _ in 0..2 {
        node.start();
        node.read_all();
        assert_eq!(node.asked(), 0, "everything is on the disk");
    }
    let counters = node.running().cache.counters();
    assert_eq!(counters.hits.load(Relaxed), 20);
    assert_eq!(counters.damaged.load(Relaxed), 0);
}

fn changed() {
    let mut node = Node::new(20);
    node.start();
    node.fill();
    node.start();
    // One bit of each of two slots, behind the cache's back.
    let chunks = node.file("chunks");
    for slot in [3, 19_u64] {
        let mut byte = [0];
        let at = slot * CHUNK as u64 + 777;
        chunks.read_exact_at(&mut byte, at).unwrap();
        chunks.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
    chunks.sync_all().unwrap();
    node.read_all();
    let damaged = || node.running().cache.counters().damaged.load(Relaxed);
    assert_eq!((damaged(), node.asked()), (2, 2));
    // They are kept anew.
    node.fill();
    node.start();
    node.read_all();
    assert_eq!(node.asked(), 0);
}

fn indexes() {
    let mut node = Node::new(20);
    node.start();
    node.fill();
    node.running = None;
    let good = fs::read(node.cache.join("index")).unwrap();
    let mut noise = good.clone();
    noise[4096..].copy_from_slice(&node.data[..good.len() - 4096]);
    // Every record, but of the neighbour's slot.
    let mut shifted = good.clone();
    shifted.copy_within(4096..good.len() - 32, 4096 + 32);
    let short = node.data[..9000].to_vec();
    for index in [&noise[..], &short, &good[..5000], &[], &shifted] {
        fs::write(node.cache.join("index"), index).unwrap();
        node.start();
        node.read_all();
        node.fill();
        node.start();
        node.read_all();
        assert_eq!(node.asked(), 0, "it is as good as new");
        node.running = None;
    }
    // A file of chunks that was cut, or is gone.
    for len in [5 * CHUNK as u64 + 9, 0] {
        node.file("chunks").set_len(len).unwrap();
        node.start();
        node.read_all();
        assert!(node.asked() > 0);
        node.fill();
        node.running = None;
    }
}

fn bounded() {
    let mut node = Node::new(400);
    node.start();
    node.read_all();
    node.read_all();
    await_that(|| {
        node.read(0);
        node.running().cache.standing().evicted > 0
    });
    node.running().cache.save();
    let standing = node.running().cache.standing();
    assert!(
        standing.used <= SIZE && standing.used > SIZE / 2,
        "{standing:?}"
    );
    let mut bytes = 0;
    let mut names = Vec::new();
    for file in fs::read_dir(&node.cache).unwrap() {
        let file = file.unwrap();
        let metadata = file.metadata().unwrap();
        bytes += metadata.len().max(metadata.blocks() * 512);
        names.push(file.file_name());
    }
    names.sort();
    assert_eq!(names, ["chunks", "index", "lock"]);
    assert!(bytes <= SIZE, "{bytes} bytes");
    node.start();
    node.read_all();
}

fn full() {
    let mut node = Node::new(100);
    fs::create_dir(&node.cache).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    let size = std::ffi::CString::new("size=4m").unwrap();
    rustix::mount::mount("full", &node.cache, "tmpfs", flags, &*size)
        .expect("this test mounts a tmpfs: run it as root");
    node.start();
    await_that(|| {
        node.read_all();
        !node.running().cache.standing().in_use
    });
    let state = node.running().cache.standing().state;
    assert!(
        state.contains("No space") && state.contains("not written"),
        "{state}"
    );
    node.read_all();
    // What fitted is used.
    assert!(node.running().cache.counters().hits.load(Relaxed) > 0);
    node.running = None;
    rustix::mount::unmount(&node.cache, rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// The worker processes of this test on its cache.
fn workers(node: &Node, kind: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        let ours = words.contains(node.cache.to_str().unwrap()) && words.contains(kind);
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (true, Some(pid)) = (ours, pid) {
            found.extend(Pid::from_raw(pid));
        }
    }
    found
}

fn hangs() {
    let mut node = Node::new(20);
    node.start();
    node.fill();
    node.start();
    node.read(0);
    assert_eq!(node.asked(), 0);
    let readers = workers(&node, "source-worker");
    assert_eq!(readers.len(), 1);
    kill_process(readers[0], Signal::STOP).unwrap();
    // The first one waits for the disk a while, the others not at all.
    node.read_all();
    assert_eq!(node.asked(), 20);
    let state = node.running().cache.standing().state;
    assert!(state.contains("no answer"), "{state}");
    kill_process(readers[0], Signal::CONT).unwrap();
    await_that(|| {
        node.read(5);
        node.running().cache.standing().in_use
    });
    // The writer too: nothing is kept any more, and that is all.
    let writers = workers(&node, "disk-cache-worker");
    kill_process(writers[0], Signal::KILL).unwrap();
    node.read_all();
}

fn taken() {
    let mut node = Node::new(2);
    node.start();
    let first = node.running.take();
    let error = node.try_start().map(drop).unwrap_err();
    assert!(matches!(error, DiskError::Taken(_)), "{error}");
    assert!(error.to_string().contains("another daemon"), "{error}");
    drop(first);
    node.start();
}

/// The cache's own files are never symlinks.
fn links() {
    for name in ["chunks", "index", "lock"] {
        let mut node = Node::new(4);
        let outside = node.scratch.path().join("outside");
        fs::write(&outside, "precious").unwrap();
        fs::create_dir(&node.cache).unwrap();
        std::os::unix::fs::symlink(&outside, node.cache.join(name)).unwrap();
        node.try_start().unwrap();
        await_that(|| {
            node.read_all();
            node.running().cache.standing().state.contains("not used")
        });
        node.running = None;
        assert_eq!(fs::read(&outside).unwrap(), b"precious", "{name}");
    }
}

fn broken() {
    let mut node = Node::new(4);
    fs::write(&node.cache, "a file").unwrap();
    node.try_start().unwrap();
    await_that(|| {
        node.read_all();
        node.running().cache.standing().state.contains("not used")
    });
    let standing = node.running().cache.standing();
    assert!(
        !standing.in_use && standing.state.contains("cache"),
        "{standing:?}"
    );
    fs::remove_file(&node.cache).unwrap();
    await_that(|| node.running().cache.standing().in_use);
    node.fill();
}
