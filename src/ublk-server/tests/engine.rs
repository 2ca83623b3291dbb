//! The read engine over the real worker: every byte right, or an error.

mod common;

use accel_source::{
    Arena, Done, Fault, Faulty, Filled, Operation, Patience, Request as SourceRequest, Source,
    SourceError, Sources, WorkerCommand, WorkerSource,
};
use accel_transport::{Place, ReadError, Reader, Request};
use accel_ufs::canary::{self, Canary};
use accel_ufs::index::CHUNK_SIZE;
use accel_ufs::names::LayerName;
use accel_ufs::node::NodeName;
use accel_ufs::publish::Ufs;
use common::{Layer, Stalled, noise, publish};
use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use ublk_server::engine::{Engine, Export, ExportReader, Kept, TIMED};

const CHUNK: usize = CHUNK_SIZE;

/// A request whose bytes go to a buffer.
struct Buffer {
    bytes: Mutex<Vec<u8>>,
    filled: AtomicUsize,
    done: mpsc::Sender<Result<Vec<u8>, ReadError>>,
}

impl Place for Buffer {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        self.filled.fetch_add(bytes.len(), Relaxed);
        Ok(())
    }
}

impl Request for Buffer {
    fn finish(self, result: Result<(), ReadError>) {
        let bytes = self.bytes.into_inner().unwrap();
        if result.is_ok() {
            assert_eq!(
                self.filled.into_inner(),
                bytes.len(),
                "filled more or less than once"
            );
        }
        self.done.send(result.map(|()| bytes)).unwrap();
    }
}

struct Setup {
    engine: Arc<Engine>,
    worker: Arc<WorkerSource>,
    sources: Arc<Sources>,
}

fn setup(ufs: &Path, chunks: usize, pages: usize) -> Setup {
    setup_with(ufs, chunks, pages, |source| source)
}

fn setup_with(
    ufs: &Path,
    chunks: usize,
    pages: usize,
    decorate: impl FnOnce(Arc<dyn Source>) -> Arc<dyn Source>,
) -> Setup {
    setup_patient(ufs, chunks, pages, Patience::DATA, decorate)
}

fn setup_patient(
    ufs: &Path,
    chunks: usize,
    pages: usize,
    patience: Patience,
    decorate: impl FnOnce(Arc<dyn Source>) -> Arc<dyn Source>,
) -> Setup {
    let arena = Arc::new(Arena::new(chunks, pages).unwrap());
    let worker = worker("the test's UFS", ufs, &arena);
    let source: Arc<dyn Source> = Arc::<WorkerSource>::clone(&worker);
    let source = decorate(source);
    let sources = Arc::new(Sources::new(vec![source]).unwrap());
    let shared = Arc::<Sources>::clone(&sources);
    let engine = Engine::start(shared, arena, patience).unwrap();
    Setup {
        engine,
        worker,
        sources,
    }
}

/// Two UFS directories, of which the first is the better one.
fn setup_two(ufs: [&Path; 2], chunks: usize, pages: usize) -> Setup {
    let arena = Arc::new(Arena::new(chunks, pages).unwrap());
    let [first, second] = ufs.map(|ufs| worker(&ufs.to_string_lossy(), ufs, &arena));
    let sources: Vec<Arc<dyn Source>> = vec![first, Arc::<WorkerSource>::clone(&second)];
    let sources = Arc::new(Sources::new(sources).unwrap());
    let patience = Patience {
        attempt: Duration::from_millis(300),
        ..Patience::DATA
    };
    let shared = Arc::<Sources>::clone(&sources);
    let engine = Engine::start(shared, arena, patience).unwrap();
    Setup {
        engine,
        worker: second,
        sources,
    }
}

fn worker(name: &str, ufs: &Path, arena: &Arc<Arena>) -> Arc<WorkerSource> {
    let command = WorkerCommand {
        program: env!("CARGO_BIN_EXE_ublk-server").into(),
        arguments: vec!["source-worker".into(), ufs.into()],
    };
    Arc::new(WorkerSource::start(name, command, Arc::clone(arena)).unwrap())
}

impl Setup {
    fn open(&self, layer: &Layer) -> ExportReader {
        let (name, root, size) = (layer.name, layer.root, layer.size);
        let patience = self.engine.patience().lookup();
        let export = Export::open(&self.engine, name, root, size, patience).unwrap();
        ExportReader::new(&self.engine, &Arc::new(export))
    }
}

type Answer = mpsc::Receiver<Result<Vec<u8>, ReadError>>;

fn buffer(len: usize) -> (Buffer, Answer) {
    let (done, answer) = mpsc::channel();
    let buffer = Buffer {
        bytes: Mutex::new(vec![0xEE; len]),
        filled: AtomicUsize::new(0),
        done,
    };
    (buffer, answer)
}

thread_local! {
    /// What this thread keeps between requests, and how many it has started.
    static QUEUE: RefCell<(Kept, usize)> = RefCell::default();
}

/// Every other one as a transport does that asks for what is at hand first.
fn start(reader: &ExportReader, offset: usize, len: usize) -> Answer {
    let (request, answer) = buffer(len);
    let at_once = QUEUE.with_borrow_mut(|(kept, number)| {
        *number += 1;
        if number.is_multiple_of(2) {
            return Ok(false);
        }
        let at_once = reader.read_at_once(offset as u64, len, kept, &request);
        reader.settle(kept);
        at_once
    });
    match at_once {
        Ok(false) => reader.read(offset as u64, len, request),
        at_once => request.finish(at_once.map(drop)),
    }
    answer
}

fn read(reader: &ExportReader, offset: usize, len: usize) -> Result<Vec<u8>, String> {
    let answer = start(reader, offset, len).recv().unwrap();
    answer.map_err(|error| error.reason)
}

/// An image with noise, zeros, a short last chunk and more than one page of chunk
/// values.
fn image() -> Vec<u8> {
    let mut image = noise(3 * CHUNK, 1);
    image.extend(vec![0; 127 * CHUNK]);
    image.extend(noise(CHUNK + 4096 * 5, 2));
    image
}

#[test]
fn every_range_is_right_also_with_little_memory() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    // Fewer slots than reads under way: loads wait for memory.
    let setup = setup(ufs.path(), 2, 1);
    let reader = setup.open(&layer);
    assert_eq!(reader.size(), image.len() as u64);
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % below
    };
    for _ in 0..20 {
        let waiting: Vec<_> = (0..32)
            .map(|_| {
                let offset = random(image.len() / 512) * 512;
                let len = (random(1024) + 1) * 512;
                let len = len.min(image.len() - offset);
                (offset, len, start(&reader, offset, len))
            })
            .collect();
        for (offset, len, answer) in waiting {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(
                bytes == image[offset..offset + len],
                "{len} bytes at {offset}"
            );
        }
    }
}

#[test]
fn zeros_are_not_fetched_and_hits_read_nothing() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    let fetched = || reader.export().counters.source_bytes.load(Relaxed);
    let before = fetched();
    let zeros = read(&reader, 3 * CHUNK, 127 * CHUNK).unwrap();
    assert!(zeros.iter().all(|&byte| byte == 0));
    // Pages of the index and nothing else.
    assert!(
        fetched() - before <= 4 * 4096,
        "{} bytes",
        fetched() - before
    );
    assert!(read(&reader, 0, CHUNK).unwrap() == image[..CHUNK]);
    let before = fetched();
    assert!(read(&reader, 512, 1024).unwrap() == image[512..1536]);
    assert_eq!(fetched(), before);
}

#[test]
fn what_is_at_hand_is_counted_when_it_is_settled() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 16, 16);
    let readers = [setup.open(&layer), setup.open(&layer)];
    let mut kept = Kept::default();
    // Whether it was at hand.
    let at_once = |reader: &ExportReader, kept: &mut Kept, offset: usize, len| {
        let (request, answer) = buffer(len);
        if !reader
            .read_at_once(offset as u64, len, kept, &request)
            .unwrap()
        {
            assert_eq!(request.filled.into_inner(), 0);
            return false;
        }
        request.finish(Ok(()));
        let bytes = answer.recv().unwrap().unwrap();
        assert!(bytes == image[offset..offset + len], "{len} at {offset}");
        true
    };
    let counted = |reader: &ExportReader| {
        let counters = &reader.export().counters;
        [&counters.requests, &counters.hits, &counters.served_bytes]
            .map(|counter| counter.load(Relaxed))
    };
    let all = || {
        let (totals, cache) = (setup.engine.totals(), setup.engine.chunk_counters());
        let cached = cache.hits.load(Relaxed);
        [totals.requests, totals.hits, totals.served_bytes, cached]
    };
    for reader in &readers {
        // Nothing is known yet, and that counts for nothing.
        for (offset, len) in [(0, 4096), (CHUNK - 4096, 8192), (4 * CHUNK, 4096)] {
            assert!(!at_once(reader, &mut kept, offset, len));
        }
        reader.settle(&mut kept);
        assert_eq!(counted(reader), [0; 3]);
        for (offset, len) in [(0, 2 * CHUNK), (4 * CHUNK, 4096), (0, 2 * CHUNK)] {
            let (request, answer) = buffer(len);
            reader.read(offset as u64, len, request);
            answer.recv().unwrap().unwrap();
        }
    }
    for reader in &readers {
        let (before, sum) = (counted(reader), all());
        // One chunk, two, and zeros, which are no hits.
        for (offset, len) in [(4096, 4096), (CHUNK - 4096, 8192), (4 * CHUNK, 4096)] {
            assert!(at_once(reader, &mut kept, offset, len));
        }
        assert_eq!((counted(reader), all()), (before, sum));
        reader.settle(&mut kept);
        let more = [3, 3, 4 * 4096];
        let after: [u64; 3] = std::array::from_fn(|at| before[at] + more[at]);
        assert_eq!(counted(reader), after);
        let more = [3, 3, 4 * 4096, 3];
        assert_eq!(all(), std::array::from_fn(|at| sum[at] + more[at]));
        // Once.
        reader.settle(&mut kept);
        assert_eq!(counted(reader), after);
    }
    let timed = || setup.engine.totals().from_memory.count();
    let before = timed();
    (0..10 * TIMED).for_each(|_| assert!(at_once(&readers[0], &mut kept, 0, 4096)));
    readers[0].settle(&mut kept);
    assert_eq!(timed(), before + 10);
}

#[test]
fn a_flipped_bit_fails_its_chunk_alone_and_heals() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.image().beneath(ufs.path());
    let flip = |bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
        file.write_all_at(bytes, CHUNK as u64 + 1000).unwrap();
    };
    flip(&[image[CHUNK + 1000] ^ 1]);
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, CHUNK).unwrap() == image[..CHUNK]);
    for (offset, len) in [(CHUNK, 512), (0, 3 * CHUNK), (2 * CHUNK - 512, 1024)] {
        let error = read(&reader, offset, len).unwrap_err();
        for part in [
            layer.name.to_string().as_str(),
            "chunk 1",
            "the test's UFS",
            ".erofs",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
    assert!(read(&reader, 2 * CHUNK, CHUNK).unwrap() == image[2 * CHUNK..3 * CHUNK]);
    flip(&[image[CHUNK + 1000]]);
    assert!(read(&reader, 0, 3 * CHUNK).unwrap() == image[..3 * CHUNK]);
}

/// What a source says of files that are not there, as often as it is asked.
fn asked_in_vain(setup: &Setup, times: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    let failed = || setup.worker.counters().failed_attempts.load(Relaxed);
    while failed() < times {
        assert!(Instant::now() < until, "asked {} times", failed());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_read_waits_for_files_that_are_gone_and_not_for_ever() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 9);
    let layer = publish(ufs.path(), "a", &image);
    let (there, gone) = (ufs.path().join("layers"), ufs.path().join("gone"));
    let patient = setup(ufs.path(), 16, 16);
    // Only so that the test ends: on a slow machine, too, it is asked several times meanwhile.
    let whole = Some(Duration::from_secs(5));
    let patience = Patience {
        whole,
        ..Patience::DATA
    };
    let impatient = setup_patient(ufs.path(), 16, 16, patience, |source| source);
    let [reader, other] = [&patient, &impatient].map(|setup| setup.open(&layer));
    // As when another directory, or none, is where UFS was.
    fs::rename(&there, &gone).unwrap();
    let waiting = start(&reader, CHUNK, 4096);
    let given_up = start(&other, CHUNK, 4096);
    asked_in_vain(&patient, 3);
    asked_in_vain(&impatient, 3);
    assert!(matches!(waiting.try_recv(), Err(mpsc::TryRecvError::Empty)));
    let error = given_up.recv().unwrap().unwrap_err().reason;
    for part in ["chunk 1", ".erofs", "the test's UFS"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(matches!(waiting.try_recv(), Err(mpsc::TryRecvError::Empty)));
    fs::rename(&gone, &there).unwrap();
    assert!(waiting.recv().unwrap().unwrap() == image[CHUNK..CHUNK + 4096]);
    assert!(read(&other, CHUNK, 4096).unwrap() == image[CHUNK..CHUNK + 4096]);
}

#[test]
fn truncation_fails_what_is_gone_and_heals() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(5 * CHUNK, 3);
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.image().beneath(ufs.path());
    fs::write(&file, &image[..2 * CHUNK + 4096]).unwrap();
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, 2 * CHUNK).unwrap() == image[..2 * CHUNK]);
    assert!(read(&reader, 2 * CHUNK, 512).is_err());
    assert!(read(&reader, 4 * CHUNK, 512).is_err());
    // Put right by replacing the file: another inode.
    let new = ufs.path().join("new");
    fs::write(&new, &image).unwrap();
    fs::rename(&new, &file).unwrap();
    assert!(read(&reader, 0, 5 * CHUNK).unwrap() == image);
}

#[test]
fn a_wrong_index_never_lets_wrong_bytes_through() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.index().beneath(ufs.path());
    let index = fs::read(&file).unwrap();
    // Every page but the header, one bit each: in the zero map it is a wrong hint,
    // in the tree an error.
    for page in 1..index.len() / 4096 {
        let mut wrong = index.clone();
        wrong[page * 4096] ^= 1;
        fs::write(&file, &wrong).unwrap();
        let setup = setup(ufs.path(), 16, 16);
        let reader = setup.open(&layer);
        match read(&reader, 0, CHUNK) {
            Ok(bytes) => assert!(bytes == image[..CHUNK]),
            Err(error) => assert!(error.contains(".idx"), "{error}"),
        }
    }
    // A header that is about something else is refused at once.
    let setup = setup(ufs.path(), 16, 16);
    let mut wrong = index;
    wrong[24] ^= 1;
    fs::write(&file, &wrong).unwrap();
    let (name, root, size) = (layer.name, layer.root, layer.size);
    Export::open(&setup.engine, name, root, size, Patience::LOOKUP).unwrap_err();
}

#[test]
fn one_lie_of_the_source_is_forgiven() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 5);
    let layer = publish(ufs.path(), "a", &image);
    let lies = |file: &str, operation| match operation {
        Operation::Read { fresh: true, .. } | Operation::List | Operation::Write { .. } => {
            Fault::None
        }
        Operation::Read { len, .. } if len == CHUNK => Fault::Flip(77),
        Operation::Read { .. } if file.ends_with(".idx") => Fault::Truncate(4096),
        Operation::Read { .. } => Fault::None,
    };
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, Box::new(lies)))
    });
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, 4 * CHUNK).unwrap() == image);
}

#[test]
fn killed_workers_are_not_noticed() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(64 * CHUNK, 6);
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 4, 4);
    let reader = setup.open(&layer);
    for _ in 0..3 {
        let waiting: Vec<_> = (0..64)
            .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
            .collect();
        if let Some(pid) = setup.worker.worker_pid() {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        for (chunk, answer) in waiting.into_iter().enumerate() {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
        }
    }
    assert!(setup.worker.counters().workers.load(Relaxed) > 1);
}

#[test]
fn layers_that_share_a_chunk_do_not_share_its_damage() {
    let ufs = tempfile::tempdir().unwrap();
    let (mut one, mut two) = (noise(2 * CHUNK, 8), noise(2 * CHUNK, 8));
    one[CHUNK] ^= 1;
    two[CHUNK] ^= 2;
    let (one_layer, two_layer) = (
        publish(ufs.path(), "1", &one),
        publish(ufs.path(), "2", &two),
    );
    let file = one_layer.name.image().beneath(ufs.path());
    fs::write(&file, vec![1; 2 * CHUNK]).unwrap();
    let setup = setup(ufs.path(), 8, 8);
    let (one_reader, two_reader) = (setup.open(&one_layer), setup.open(&two_layer));
    for _ in 0..20 {
        let first = start(&one_reader, 0, CHUNK);
        let second = start(&two_reader, 0, CHUNK);
        let _ = first.recv().unwrap();
        assert!(second.recv().unwrap().unwrap() == two[..CHUNK]);
    }
}

#[test]
fn what_one_ufs_gives_wrongly_another_gives() {
    let image = image();
    for damage in 0..5 {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let layer = publish(first.path(), "a", &image);
        publish(second.path(), "a", &image);
        let file = layer.name.image().beneath(first.path());
        let index = layer.name.index().beneath(first.path());
        match damage {
            0 => fs::write(&file, noise(image.len(), 77)).unwrap(),
            1 => fs::write(&file, &image[..CHUNK / 2]).unwrap(),
            2 => fs::remove_file(&file).unwrap(),
            3 => fs::write(&index, noise(64 << 10, 78)).unwrap(),
            _ => fs::remove_dir_all(first.path()).unwrap(),
        }
        let setup = setup_two([first.path(), second.path()], 16, 16);
        let reader = setup.open(&layer);
        assert!(read(&reader, 0, image.len()).unwrap() == image, "{damage}");
        assert_eq!(reader.export().counters.errors.load(Relaxed), 0);
        assert_eq!(setup.sources.failed(), 0);
        assert!(setup.sources.standings()[0].times > 0, "{damage}");
    }
}

#[test]
fn a_ufs_that_never_answers_is_passed_over() {
    let (stalled, ufs) = (Stalled::new(), tempfile::tempdir().unwrap());
    let image = noise(40 * CHUNK, 9);
    let layer = publish(ufs.path(), "a", &image);
    // Less memory than the reads under way want, a part of it held by a worker
    // that cannot even be killed.
    let setup = setup_two([stalled.path(), ufs.path()], 8, 8);
    let reader = setup.open(&layer);
    for _ in 0..3 {
        let waiting: Vec<_> = (0..40)
            .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
            .collect();
        for (chunk, answer) in waiting.into_iter().enumerate() {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
        }
    }
    let standing = &setup.sources.standings()[0];
    let words = standing.condition.to_string();
    assert!(words.contains("does not answer"), "{words}");
    assert_eq!(setup.sources.failed(), 0);
}

#[test]
fn all_memory_held_by_a_stalled_ufs_is_an_error_in_time() {
    let (stalled, ufs) = (Stalled::new(), tempfile::tempdir().unwrap());
    let image = noise(8 * CHUNK, 10);
    let layer = publish(ufs.path(), "a", &image);
    let arena = Arc::new(Arena::new(2, 2).unwrap());
    let source = worker("stalled", stalled.path(), &arena);
    let sources = Arc::new(Sources::new(vec![source]).unwrap());
    let patience = Patience {
        attempt: Duration::from_millis(50),
        whole: Some(Duration::from_millis(500)),
        await_file: true,
        optional: false,
    };
    let engine = Engine::start(sources, arena, patience).unwrap();
    let export = Export::recovered(layer.name, layer.root, layer.size);
    let reader = ExportReader::new(&engine, &Arc::new(export));
    let waiting: Vec<_> = (0..8)
        .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
        .collect();
    for answer in waiting {
        let error = answer.recv().unwrap().unwrap_err().reason;
        assert!(
            error.contains("stalled") || error.contains("memory"),
            "{error}"
        );
    }
}

/// The source as the engine sees it, with its reads of images counted.
#[allow(clippy::type_complexity)] // it is what `Faulty` takes
fn counted(
    reads: &Arc<AtomicUsize>,
    fault: fn(u64) -> Fault,
) -> Box<dyn Fn(&str, Operation) -> Fault + Send + Sync> {
    let reads = Arc::clone(reads);
    Box::new(move |file, operation| match operation {
        Operation::Read { offset, .. } if file.ends_with(".erofs") => {
            reads.fetch_add(1, Relaxed);
            fault(offset)
        }
        _ => Fault::None,
    })
}

#[test]
fn many_readers_of_one_missing_chunk_cause_one_read() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 11);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let slow = |_| Fault::Delay(Duration::from_secs(2));
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, counted(&reads, slow)))
    });
    // Two exports of one layer: what is cached has no owner.
    let readers = [setup.open(&layer), setup.open(&layer)];
    let waiting: Vec<_> = (0..32)
        .map(|at| start(&readers[at % 2], 2 * CHUNK + at * 4096, 4096))
        .collect();
    for (at, answer) in waiting.into_iter().enumerate() {
        let from = 2 * CHUNK + at * 4096;
        assert!(answer.recv().unwrap().unwrap() == image[from..from + 4096]);
    }
    assert_eq!(reads.load(Relaxed), 1);
    let totals = setup.engine.totals();
    assert_eq!(
        (totals.requests, totals.misses, totals.joined),
        (32, 32, 31)
    );
    // The time of a wait is noted when its answer is out.
    let since = Instant::now();
    while setup.engine.totals().waited.count() < 32 && since.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(setup.engine.totals().waited.count(), 32);
}

#[test]
fn a_chunk_that_never_comes_holds_up_no_other_and_nothing_in_memory() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(8 * CHUNK, 12);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let one = |offset| match offset {
        0 => Fault::Stall,
        _ => Fault::None,
    };
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, counted(&reads, one)))
    });
    let reader = setup.open(&layer);
    assert!(read(&reader, 7 * CHUNK, 512).unwrap() == image[7 * CHUNK..7 * CHUNK + 512]);
    let stuck = start(&reader, 0, 512);
    // What is cached is answered before `read` returns; this thread is the queue.
    let cached = start(&reader, 7 * CHUNK + 4096, 512);
    assert!(cached.try_recv().is_ok());
    for chunk in 1..7 {
        let bytes = read(&reader, chunk * CHUNK, CHUNK).unwrap();
        assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
    }
    assert!(stuck.try_recv().is_err(), "it was not stuck");
}

#[test]
fn a_scan_of_one_image_leaves_the_hot_set_of_another() {
    const HOT: usize = 24;
    const SCAN: usize = 300;
    let ufs = tempfile::tempdir().unwrap();
    let (hot, cold) = (noise(HOT * CHUNK, 13), noise(SCAN * CHUNK, 14));
    let hot_layer = publish(ufs.path(), "hot", &hot);
    let cold_layer = publish(ufs.path(), "cold", &cold);
    let setup = setup(ufs.path(), 60, 64);
    let (hot_reader, cold_reader) = (setup.open(&hot_layer), setup.open(&cold_layer));
    for _ in 0..3 {
        for chunk in 0..HOT {
            read(&hot_reader, chunk * CHUNK, CHUNK).unwrap();
        }
    }
    for chunk in 0..SCAN {
        read(&cold_reader, chunk * CHUNK, CHUNK).unwrap();
    }
    let fetched = || hot_reader.export().counters.source_bytes.load(Relaxed);
    let before = fetched();
    for chunk in 0..HOT {
        assert!(
            read(&hot_reader, chunk * CHUNK, CHUNK).unwrap()
                == hot[chunk * CHUNK..(chunk + 1) * CHUNK]
        );
    }
    let again = usize::try_from(fetched() - before).unwrap();
    assert!(
        again <= HOT / 8 * CHUNK,
        "{again} bytes of the hot set had to be read again"
    );
}

#[test]
fn reads_that_are_under_way_end_when_their_export_does() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(16 * CHUNK, 15);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let slow = |_| Fault::Delay(Duration::from_millis(100));
    let setup = setup_with(ufs.path(), 4, 4, |source| {
        Arc::new(Faulty::new(source, counted(&reads, slow)))
    });
    let reader = setup.open(&layer);
    let waiting: Vec<_> = (0..16)
        .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
        .collect();
    let export = Arc::downgrade(reader.export());
    drop(reader);
    for (chunk, answer) in waiting.into_iter().enumerate() {
        let bytes = answer.recv().unwrap().unwrap();
        assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
    }
    // Nothing of it stays; what it did is still in the sum.
    while export.upgrade().is_some() || setup.engine.unanswered() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(setup.engine.totals().requests, 16);
}

#[test]
fn what_lies_beside_comes_with_it_from_a_source_far_away() {
    let ufs = tempfile::tempdir().unwrap();
    let mut image = noise(96 * CHUNK, 5);
    // Zeros among them.
    image[93 * CHUNK..94 * CHUNK].fill(0);
    let layer = publish(ufs.path(), "a", &image);
    let slow = |inner: Arc<dyn Source>| -> Arc<dyn Source> {
        let plan = |file: &str, _: Operation| match file.ends_with(".erofs") {
            true => Fault::Delay(Duration::from_millis(20)),
            false => Fault::None,
        };
        Arc::new(Faulty::new(inner, Box::new(plan)))
    };
    let setup = setup_with(ufs.path(), 256, 16, slow);
    let reader = setup.open(&layer);
    let counters = &reader.export().counters;
    let wanted = |chunk: usize| {
        let bytes = read(&reader, chunk * CHUNK + 4096, 4096).unwrap();
        assert!(bytes == image[chunk * CHUNK + 4096..][..4096]);
    };
    // One after the other, far from each other: how slow it is has to be seen.
    for group in 0..8 {
        wanted(group * 8);
    }
    assert_eq!(counters.background_bytes.load(Relaxed), 0);
    // Its group begins at 80.
    wanted(83);
    let until = Instant::now() + Duration::from_secs(60);
    while setup.engine.cached_chunks() < 8 + 4 {
        assert!(Instant::now() < until, "{}", setup.engine.cached_chunks());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (misses, read) = (
        counters.misses.load(Relaxed),
        counters.source_bytes.load(Relaxed),
    );
    for chunk in 80..84 {
        wanted(chunk);
    }
    assert_eq!(counters.source_bytes.load(Relaxed), read);
    assert_eq!(counters.misses.load(Relaxed), misses);
    // What is asked for goes across groups, and is not asked for twice; zeros are not read.
    let answer = start(&reader, 71 * CHUNK, 2 * CHUNK).recv().unwrap();
    assert!(answer.unwrap() == image[71 * CHUNK..73 * CHUNK]);
    wanted(95);
    while setup.engine.cached_chunks() < 12 + 8 + 3 {
        assert!(Instant::now() < until, "{}", setup.engine.cached_chunks());
        std::thread::sleep(Duration::from_millis(1));
    }
    let all = counters.source_bytes.load(Relaxed) - read;
    assert_eq!(all, (8 + 3) * CHUNK as u64);
}

/// A source near by, each of whose answers waits in the daemon before anybody hears of it:
/// as for a verifier that has much to do.
struct Held<S>(S);

impl<S: Source> Source for Held<S> {
    fn submit(&self, request: SourceRequest, done: Done) {
        let held = move |outcome: Result<Filled, SourceError>| {
            let outcome = outcome.map(|mut filled| {
                filled.took = Duration::from_micros(300);
                filled
            });
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                done(outcome);
            });
        };
        self.0.submit(request, Box::new(held));
    }

    fn name(&self) -> &str {
        self.0.name()
    }
}

#[test]
fn what_waits_in_the_daemon_does_not_come_from_far_away() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(96 * CHUNK, 6);
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup_with(ufs.path(), 256, 16, |source| Arc::new(Held(source)));
    let reader = setup.open(&layer);
    for group in 0..10 {
        let bytes = read(&reader, group * 8 * CHUNK, 4096).unwrap();
        assert!(bytes == image[group * 8 * CHUNK..][..4096]);
    }
    // What is read around misses before the read returns.
    assert_eq!(reader.export().counters.misses.load(Relaxed), 10);
}

#[test]
fn each_read_of_a_canary_goes_to_the_source() {
    let ufs = tempfile::tempdir().unwrap();
    let node = NodeName::new("c", "n").unwrap();
    let canary = Ufs::open(ufs.path()).unwrap().put_canary(&node).unwrap();
    let layer = Layer {
        name: LayerName::Canary(canary.digest),
        root: canary.root,
        size: canary.size,
    };
    // So far away that as much as ever is read around what is wanted.
    let slow = |inner: Arc<dyn Source>| -> Arc<dyn Source> {
        let plan = |_: &str, _: Operation| Fault::Delay(Duration::from_millis(9));
        Arc::new(Faulty::new(inner, Box::new(plan)))
    };
    let setup = setup_with(ufs.path(), 512, 32, slow);
    let reader = setup.open(&layer);
    setup.engine.expect_mount(reader.export());
    let until = Instant::now() + Duration::from_secs(60);
    while setup.engine.cached_chunks() < 1 {
        assert!(Instant::now() < until, "its beginning does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
    let counters = &reader.export().counters;
    for number in 0..canary::READS {
        let before = counters.misses.load(Relaxed);
        let at = usize::try_from(Canary::offset(number)).unwrap();
        let bytes = read(&reader, at, canary::READ).unwrap();
        assert!(bytes == canary.content(number), "read {number}");
        assert_eq!(counters.misses.load(Relaxed), before + 1, "read {number}");
    }
    assert_eq!(counters.hits.load(Relaxed), 0);
}

#[test]
fn a_canary_that_is_missing_is_missed_at_once_and_held_against_no_source() {
    let [ufs, replica] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let node = NodeName::new("c", "n").unwrap();
    let opened = Ufs::open(ufs.path()).unwrap();
    let canary = opened.put_canary(&node).unwrap();
    let layer = Layer {
        name: LayerName::Canary(canary.digest),
        root: canary.root,
        size: canary.size,
    };
    let setup = setup_two([ufs.path(), replica.path()], 512, 32);
    let reader = setup.open(&layer);
    opened.remove_canary(&node).unwrap();
    // Not after the ten minutes that a file of an image is waited for.
    let at = usize::try_from(Canary::offset(0)).unwrap();
    let error = read(&reader, at, canary::READ).unwrap_err();
    assert!(error.contains(".canary"), "{error}");
    for standing in setup.sources.standings() {
        assert_eq!(standing.times, 0, "{standing:?}");
    }
}
