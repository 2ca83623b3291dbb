//! What is read before it is asked for: what a mount needs, and the layers of an image
//! that are asked for next.

mod common;

use accel_oci::{ChainId, Digest};
use accel_source::{
    Arena, Done, Fault, Faulty, Operation, Patience, Request as SourceRequest, Source, Sources,
    WorkerCommand, WorkerSource,
};
use accel_transport::{Place, ReadError, Reader, Request, Wanted};
use accel_ufs::canary::Canary;
use accel_ufs::index::{CHUNK_SIZE, Root};
use accel_ufs::names::{self, LayerName};
use accel_ufs::node::NodeName;
use accel_ufs::publish::Ufs;
use common::{Layer, noise, publish, publish_image, start_of};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use ublk_server::devices::Devices;
use ublk_server::engine::{Engine, Export, ExportReader, Warmer};
use ublk_server::journal::Journal;
use ublk_server::paths::Paths;
use ublk_server::protocol::{Holder, LayerAnswer};
use ublk_server::registry::Registry;
use ublk_server::threads::{self, Threads};

const PATIENCE: Duration = Duration::from_secs(60);

/// Every read of the source: which file, from where, how much.
type Reads = Arc<Mutex<Vec<(String, u64, usize)>>>;

fn worker(ufs: &Path, arena: &Arc<Arena>) -> WorkerSource {
    let command = WorkerCommand {
        program: env!("CARGO_BIN_EXE_ublk-server").into(),
        arguments: vec!["source-worker".into(), ufs.into()],
    };
    WorkerSource::start("the test's UFS", command, Arc::clone(arena)).unwrap()
}

/// An engine over a real worker whose answers go wrong as `fault` says; what is read.
fn engine(
    ufs: &Path,
    fault: impl Fn(&str, Operation) -> Fault + Send + Sync + 'static,
) -> (Arc<Engine>, Reads) {
    let arena = Arc::new(Arena::new(64, 64).unwrap());
    let worker = worker(ufs, &arena);
    let reads = Reads::default();
    let noted = Arc::clone(&reads);
    let plan = move |file: &str, operation| {
        if let Operation::Read { offset, len, .. } = operation {
            let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
            noted.push((file.to_owned(), offset, len));
        }
        fault(file, operation)
    };
    let source: Arc<dyn Source> = Arc::new(Faulty::new(worker, Box::new(plan)));
    let sources = Arc::new(Sources::new(vec![source]).unwrap());
    let engine = Engine::start(sources, arena, Patience::DATA).unwrap();
    (engine, reads)
}

fn until(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

struct Buffer(Mutex<Vec<u8>>, mpsc::Sender<Result<Vec<u8>, ReadError>>);

impl Place for Buffer {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

impl Request for Buffer {
    fn finish(self, result: Result<(), ReadError>) {
        let bytes = self.0.into_inner().unwrap();
        self.1.send(result.map(|()| bytes)).unwrap();
    }
}

fn read(reader: &ExportReader, offset: usize, len: usize) -> Vec<u8> {
    let (sender, answer) = mpsc::channel();
    let request = Buffer(Mutex::new(vec![0; len]), sender);
    reader.read(offset as u64, len, request);
    answer.recv().unwrap().unwrap()
}

/// Opens a layer and waits until what a mount needs is in memory; then reads it.
fn open_and_read(engine: &Arc<Engine>, layer: &Layer, image: &[u8]) {
    let (name, root, size) = (layer.name, layer.root, layer.size);
    let export = Export::open(engine, name, root, size, Patience::LOOKUP).unwrap();
    let export = Arc::new(export);
    engine.expect_mount(&export);
    until("two chunks come", || engine.cached_chunks() == 2);
    let reader = ExportReader::new(engine, &export);
    assert_eq!(export.counters.requests.load(Relaxed), 0);
    for at in [0, image.len() - 4096] {
        assert!(read(&reader, at, 4096) == image[at..at + 4096]);
    }
}

#[test]
fn a_mount_takes_one_read_of_the_index_and_two_of_the_image() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK_SIZE + 8192, 1);
    let layer = publish(ufs.path(), "a", &image);
    let (engine, reads) = engine(ufs.path(), |_, _| Fault::None);
    open_and_read(&engine, &layer, &image);
    let mut reads = reads.lock().unwrap().clone();
    reads.sort();
    let index = (layer.name.index().as_str().to_owned(), 0, 3 * 4096);
    let image = |offset, len| (layer.name.image().as_str().to_owned(), offset, len);
    let last = 4 * CHUNK_SIZE as u64;
    let mut wanted = [index, image(0, CHUNK_SIZE), image(last, 8192)];
    wanted.sort();
    assert_eq!(reads, wanted);
}

#[test]
fn a_wrong_page_that_came_with_the_header_is_read_again() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK_SIZE + 8192, 1);
    let layer = publish(ufs.path(), "a", &image);
    // Only what is read together with the header is wrong.
    let (engine, reads) = engine(ufs.path(), |_, operation| match operation {
        Operation::Read { offset: 0, len, .. } if len == 3 * 4096 => Fault::Flip(2 * 4096 + 5),
        _ => Fault::None,
    });
    open_and_read(&engine, &layer, &image);
    let page = (layer.name.index().as_str().to_owned(), 2 * 4096, 4096);
    assert!(reads.lock().unwrap().contains(&page));
}

struct Node {
    ufs: tempfile::TempDir,
    _run: tempfile::TempDir,
    layers: Vec<Layer>,
    image: Digest,
    engine: Arc<Engine>,
    registry: Arc<Registry>,
    reads: Reads,
}

/// Three layers of an image, and a daemon's registry.
fn node() -> Node {
    let (ufs, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let layer = |(seed, name): (u32, &str)| {
        let size = 2 * CHUNK_SIZE + 4096;
        publish(ufs.path(), name, &noise(size, seed))
    };
    let layers: Vec<_> = (1..).zip(["low", "middle", "top"]).map(layer).collect();
    let image = publish_image(ufs.path(), &layers);
    let (engine, reads) = engine(ufs.path(), |_, _| Fault::None);
    let paths = Paths::new(&run.path().join("socket"), Some(run.path().to_owned()));
    let devices = Devices::start(Wanted::Fuse, &paths, Duration::ZERO, true).unwrap();
    let journal = Journal::open(&paths.run, ufs.path()).unwrap();
    let served = Arc::clone(&engine);
    let threads = Arc::new(Threads::start(threads::COUNT).unwrap());
    let registry = Registry::new(served, devices, journal, ufs.path().to_owned(), threads);
    Node {
        registry: Arc::new(registry.unwrap()),
        _run: run,
        layers,
        image,
        engine,
        reads,
        ufs,
    }
}

impl Node {
    /// Asks for a layer as the snapshotter does, with this root.
    fn attach(&self, number: usize, root: Root, image: Option<Digest>) -> LayerAnswer {
        self.attach_named(self.layers[number].name, number, root, image)
    }

    fn attach_named(
        &self,
        name: LayerName,
        number: usize,
        root: Root,
        image: Option<Digest>,
    ) -> LayerAnswer {
        let layer = &self.layers[number];
        let LayerName::Layer(diff_id) = name else {
            panic!("a chain");
        };
        let chain_id = ChainId(Digest::of(b"any"));
        let (layer, from) = ((root, layer.size), (None, image));
        let holder = format!("test {number}");
        let answer = self
            .registry
            .attach_layer(diff_id, chain_id, layer, from, &holder, false);
        answer.unwrap()
    }

    fn lose_indexes(&self) {
        for layer in &self.layers {
            fs::remove_file(layer.name.index().beneath(self.ufs.path())).unwrap();
        }
    }
}

#[test]
fn layers_on_top_are_opened_before_they_are_asked_for() {
    let node = node();
    let root = |number: usize| node.layers[number].root;
    let lowest = node.attach(0, root(0), Some(node.image));
    assert!(matches!(lowest, LayerAnswer::Attached(_)), "{lowest:?}");
    until("the layers come", || node.engine.cached_chunks() == 6);
    // Nothing more has to be asked of UFS.
    node.lose_indexes();
    let before = node.reads.lock().unwrap().clone();
    let middle = node.attach(1, root(1), Some(node.image));
    assert!(matches!(middle, LayerAnswer::Attached(_)), "{middle:?}");
    assert_eq!(*node.reads.lock().unwrap(), before);
    for layer in &node.layers {
        let index = layer.name.index();
        let times = before.iter().filter(|(file, ..)| file == index.as_str());
        assert_eq!(times.count(), 1, "{index} in {before:?}");
    }
    // What was opened ahead vouches for nothing: neither for another name,
    let lowest = node.layers[0].name;
    let other = node.attach_named(lowest, 2, root(2), Some(node.image));
    assert!(matches!(other, LayerAnswer::OtherRoot(_)), "{other:?}");
    // nor for another root.
    let other = node.attach(2, Root([7; 32]), Some(node.image));
    assert!(matches!(other, LayerAnswer::OtherRoot(_)), "{other:?}");
}

#[test]
fn without_a_word_about_the_image_nothing_is_opened_ahead() {
    let node = node();
    let lowest = node.attach(0, node.layers[0].root, None);
    assert!(matches!(lowest, LayerAnswer::Attached(_)), "{lowest:?}");
    until("the layer comes", || node.engine.cached_chunks() == 2);
    node.lose_indexes();
    let middle = node.attach(1, node.layers[1].root, None);
    assert!(matches!(middle, LayerAnswer::Absent), "{middle:?}");
}

#[test]
fn of_an_image_whose_layers_are_all_attached_its_record_alone_is_read() {
    let node = node();
    let files = |layers: &[Layer]| {
        let image = publish_image(node.ufs.path(), layers);
        (
            image,
            [names::image_record(&image), names::image_start(&image)],
        )
    };
    let attach = |image: Digest, holder: &str| -> Vec<String> {
        node.reads.lock().unwrap().clear();
        let holder = Some(holder.to_owned());
        node.registry.attach(&image.to_string(), holder).unwrap();
        let reads = node.reads.lock().unwrap();
        let files = reads.iter().map(|(file, ..)| file.clone());
        files.filter(|file| file.starts_with("images/")).collect()
    };
    let (lower, with_start) = files(&node.layers[..2]);
    assert_eq!(
        attach(lower, "first"),
        with_start.map(|file| file.as_str().to_owned())
    );
    let (lower, [record, _]) = files(&node.layers[..2]);
    assert_eq!(attach(lower, "second"), [record.as_str()]);
    // One more layer, which is not attached yet.
    let (all, with_start) = files(&node.layers);
    assert_eq!(
        attach(all, "third"),
        with_start.map(|file| file.as_str().to_owned())
    );
}

type Kept = Arc<Mutex<Vec<(SourceRequest, Done)>>>;

/// A source that keeps what is asked of some files, and does not answer it until the test
/// has it answered.
struct Keeping {
    inner: Arc<WorkerSource>,
    files: Vec<String>,
    kept: Kept,
}

impl Source for Keeping {
    fn submit(&self, request: SourceRequest, done: Done) {
        let reads = matches!(request.operation, Operation::Read { len, .. } if len > 0);
        if reads && self.files.iter().any(|file| file == request.file.as_str()) {
            self.kept.lock().unwrap().push((request, done));
        } else {
            self.inner.submit(request, done);
        }
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

#[test]
fn metadata_follows_whichever_index_does_not_come() {
    let ufs = tempfile::tempdir().unwrap();
    let image = |seed| noise(4 * CHUNK_SIZE, seed);
    let layers: Vec<_> = (0..6)
        .map(|seed| publish(ufs.path(), &seed.to_string(), &image(seed)))
        .collect();
    let arena = Arc::new(Arena::new(64, 64).unwrap());
    let inner = Arc::new(worker(ufs.path(), &arena));
    let kept = Kept::default();
    let index = |layer: &Layer| layer.name.index().as_str().to_owned();
    let source: Arc<dyn Source> = Arc::new(Keeping {
        inner: Arc::clone(&inner),
        files: layers[..3].iter().map(index).collect(),
        kept: Arc::clone(&kept),
    });
    let sources = Arc::new(Sources::new(vec![source]).unwrap());
    // Nothing that is kept is given up.
    let patience = Patience {
        attempt: PATIENCE * 10,
        ..Patience::DATA
    };
    let engine = Engine::start(sources, arena, patience).unwrap();
    let threads = Arc::new(Threads::start(threads::COUNT).unwrap());
    let warmer = Warmer::start(&engine, &threads).unwrap();
    let exports: Vec<_> = (0..)
        .zip(&layers)
        .map(|(seed, layer)| {
            let start = Arc::new(start_of(ufs.path(), layer, &image(seed)));
            let export = Export::begun(&engine, layer.name, &start, Patience::LOOKUP);
            Arc::new(export.unwrap())
        })
        .collect();
    for export in &exports {
        warmer.push(export);
    }
    let complete = |all: &[Arc<Export>]| all.iter().all(|export| export.complete().is_some());
    until("the metadata of the others comes", || {
        complete(&exports[3..])
    });
    let kept: Vec<_> = std::mem::take(&mut *kept.lock().unwrap());
    assert_eq!(kept.len(), 3);
    assert!(
        exports[..3]
            .iter()
            .all(|export| export.complete().is_none())
    );
    for (request, done) in kept {
        inner.submit(request, done);
    }
}

#[test]
fn a_canary_is_exported_under_its_own_name_only() {
    let node = node();
    let ufs = Ufs::open(node.ufs.path()).unwrap();
    let name = NodeName::new("c", "n").unwrap();
    let [before, canary] = [(); 2].map(|()| ufs.put_canary(&name).unwrap());
    let attach_one = |canary: &Canary, root| {
        let bytes = (root, canary.size);
        let attached = node.registry.attach_canary(canary.digest, bytes, "agent");
        attached.unwrap()
    };
    let attach = |root| attach_one(&canary, root);
    // Another one has taken its place.
    assert!(matches!(
        attach_one(&before, before.root),
        LayerAnswer::Absent
    ));
    let wrong = attach(node.layers[0].root);
    assert!(matches!(wrong, LayerAnswer::OtherRoot(root) if root == canary.root));
    let LayerAnswer::Attached(attached) = attach(canary.root) else {
        panic!("not attached")
    };
    assert_eq!(attached.name, format!("canary {}", canary.digest));
    assert_eq!(node.registry.status().0[0].holders, ["agent"]);
    let released = node.registry.detach(&Holder::Layer("agent".to_owned()));
    assert_eq!(released.unwrap().ended.len(), 1);
}
