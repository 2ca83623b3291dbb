//! The read engine over the real worker: every byte right, or an error.

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod ranges;
mod sharing;
mod sources;

use accel_source::{Arena, Patience, Source, Sources, WorkerCommand, WorkerSource};
use accel_transport::{Place, ReadError, Reader, Request};
use accel_ufs::index::CHUNK_SIZE;
use common::{Layer, noise};
use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use ublk_server::engine::{Engine, Export, ExportReader, Kept};

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
