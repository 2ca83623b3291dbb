//! The read engine over the real worker: every byte right, or an error.

mod common;

use accel_source::{
    Arena, Fault, Faulty, Operation, Patience, Source, WorkerCommand, WorkerSource,
};
use accel_transport::{ReadError, Reader, Request};
use accel_ufs::index::CHUNK_SIZE;
use common::{Layer, noise, publish};
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use ublk_server::engine::{Engine, Export, ExportReader};

const CHUNK: usize = CHUNK_SIZE;

/// A request whose bytes go to a buffer.
struct Buffer {
    bytes: Mutex<Vec<u8>>,
    filled: AtomicUsize,
    done: mpsc::Sender<Result<Vec<u8>, ReadError>>,
}

impl Request for Buffer {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        self.filled.fetch_add(bytes.len(), Relaxed);
        Ok(())
    }

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
    _keep: Vec<Arc<dyn Source>>,
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
    let arena = Arc::new(Arena::new(chunks, pages).unwrap());
    let command = WorkerCommand {
        program: env!("CARGO_BIN_EXE_ublk-server").into(),
        arguments: vec!["source-worker".into(), ufs.into()],
    };
    let worker = WorkerSource::start("the test's UFS", command, Arc::clone(&arena)).unwrap();
    let worker = Arc::new(worker);
    let source: Arc<dyn Source> = Arc::<WorkerSource>::clone(&worker);
    let source = decorate(source);
    let engine = Engine::start(Arc::clone(&source), arena).unwrap();
    Setup {
        engine,
        worker,
        _keep: vec![source],
    }
}

impl Setup {
    fn open(&self, layer: &Layer) -> ExportReader {
        let (name, root, size) = (layer.name, layer.root, layer.size);
        let export = Export::open(&self.engine, name, root, size, Patience::LOOKUP).unwrap();
        ExportReader::new(&self.engine, &Arc::new(export))
    }
}

type Answer = mpsc::Receiver<Result<Vec<u8>, ReadError>>;

fn start(reader: &ExportReader, offset: usize, len: usize) -> Answer {
    let (done, answer) = mpsc::channel();
    let request = Buffer {
        bytes: Mutex::new(vec![0xEE; len]),
        filled: AtomicUsize::new(0),
        done,
    };
    reader.read(offset as u64, len, request);
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
        Operation::Read { fresh: true, .. } | Operation::List => Fault::None,
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
