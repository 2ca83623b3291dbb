//! The read engine: from a kernel request to verified bytes.
//!
//! ```text
//! ExportReader::read ─ pieces, one per chunk ─► Engine::serve
//!    │                                             │ 1 walk: root → pages → chunk value
//!    │                                             │      a page that is not cached: park, load
//!    │                                             │ 2 a chunk of zeros: no memory, no read
//!    │                                             │ 3 look the chunk value up: hit → fill
//!    │                                             │      miss: park, load
//!    └── finish, when the last piece is gone       ▼
//!                                          Source::submit(slot)
//!                                                  ▼ done
//!                    verifier thread: hash in place ─ good ─► cache, fill all who wait
//!                                                   └ bad ──► read once more, afresh; then fail
//! ```
//!
//! **Invariant**: [`fill`](accel_transport::Request::fill) is called only with
//! bytes of a cache entry, and an entry is made only by a verifier from bytes
//! that match the image's root (or are zeros that do).
//!
//! Nothing here blocks the thread that brings a request. Pages of the index live
//! in a cache of their own, in page slots of the same shared memory.

mod export;
mod pending;
mod verify;
mod warm;

pub use export::{Export, ExportCounters, ExportReader, OpenError};
pub use verify::SKIPS_VERIFICATION;
pub use warm::Warmer;

use accel_cache::{Cache, Load, Lookup};
use accel_source::{Arena, Filled, Operation, Patience, Request, Slot, Source, SourceError};
use accel_ufs::index::{ByteRange, ChunkNo, ChunkValue, PAGE_SIZE, PageValue, Step, TreePage};
use pending::Piece;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use verify::{Job, JobQueue, ZEROS};

/// Threads that hash and fill.
const VERIFIERS: usize = 2;

/// A chunk to be loaded, by the export that asked first.
pub(crate) struct ChunkLoad {
    export: Arc<Export>,
    chunk: ChunkNo,
}

/// A page of the index to be loaded.
pub(crate) struct PageLoad {
    export: Arc<Export>,
    page: TreePage,
    range: ByteRange,
}

type Chunks = Cache<ChunkValue, Slot, Piece, ChunkLoad>;
type Pages = Cache<PageValue, Slot, Piece, PageLoad>;

/// Serves every export of the daemon.
pub struct Engine {
    chunks: Chunks,
    pages: Pages,
    source: Arc<dyn Source>,
    arena: Arc<Arena>,
    jobs: Arc<JobQueue>,
    /// Requests of the kernel that are not answered yet.
    unanswered: AtomicUsize,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("chunks", &self.chunks)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine that reads from `source` into `arena`, and its verifiers.
    pub fn start(source: Arc<dyn Source>, arena: Arc<Arena>) -> std::io::Result<Arc<Self>> {
        let (chunk_pool, page_pool) = (Arc::clone(arena.chunks()), Arc::clone(arena.pages()));
        let jobs = Arc::new(JobQueue::default());
        for _ in 0..VERIFIERS {
            verify::start(Arc::clone(&jobs))?;
        }
        let engine = Arc::new(Self {
            chunks: Cache::new(chunk_pool.capacity(), move || chunk_pool.take()),
            pages: Cache::new(page_pool.capacity(), move || page_pool.take()),
            source,
            arena,
            jobs,
            unanswered: AtomicUsize::new(0),
        });
        // A slot that an attempt held which was given up comes back long after
        // its request has failed: loads that wait for memory hear of it here.
        for pool in [engine.arena.chunks(), engine.arena.pages()] {
            let engine = Arc::downgrade(&engine);
            pool.when_returned(move || {
                if let Some(engine) = engine.upgrade() {
                    let jobs = Arc::clone(&engine.jobs);
                    jobs.push(Job::waiting(engine));
                }
            });
        }
        Ok(engine)
    }

    /// Where the bytes come from.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// The memory that the cache lives in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Hits, misses and evictions of chunks.
    pub fn chunk_counters(&self) -> &accel_cache::Counters {
        self.chunks.counters()
    }

    /// Chunks in memory.
    pub fn cached_chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Serves one piece, now or when its chunk has come.
    fn serve(self: &Arc<Self>, mut piece: Piece) {
        let Some(value) = self.chunk_value(&mut piece) else {
            return;
        };
        let (export, chunk) = (&piece.export, piece.chunk);
        if export.zeros.says(chunk) {
            if export.zeros.is_verified(chunk) {
                piece.fill(&ZEROS);
            } else {
                let engine = Arc::clone(self);
                self.jobs.push(Job::zeros(engine, piece, value));
            }
            return;
        }
        let park = || {
            let export = Arc::clone(export);
            (piece.clone(), ChunkLoad { export, chunk })
        };
        match self.chunks.lookup(value, park) {
            Lookup::Hit(guard) => {
                export.counters.hits.fetch_add(1, Relaxed);
                piece.fill(&guard.bytes()[..guard.len()]);
                guard.served(piece.len());
                drop(guard);
                self.start_waiting_chunks();
            }
            Lookup::Lead(load) => {
                export.counters.misses.fetch_add(1, Relaxed);
                self.load_chunk(load, false);
            }
            Lookup::Joined => {
                export.counters.misses.fetch_add(1, Relaxed);
            }
        }
    }

    /// The value of the piece's chunk, if every page on the way is cached. If one
    /// is not, the piece waits for it. What it has learnt stays in its walk, so
    /// that it advances however few pages fit the cache.
    fn chunk_value(self: &Arc<Self>, piece: &mut Piece) -> Option<ChunkValue> {
        loop {
            let (page, range, expected) = match piece.walk.step() {
                Step::Found(value) => return Some(value),
                Step::Fetch {
                    page,
                    range,
                    expected,
                } => (page, range, expected),
            };
            let park = || {
                let export = Arc::clone(&piece.export);
                (
                    piece.clone(),
                    PageLoad {
                        export,
                        page,
                        range,
                    },
                )
            };
            match self.pages.lookup(expected, park) {
                Lookup::Hit(guard) => {
                    guard.served(PAGE_SIZE);
                    piece.learn(guard.bytes());
                    drop(guard);
                    self.start_waiting_pages();
                }
                Lookup::Lead(load) => {
                    self.load_page(load, false);
                    return None;
                }
                Lookup::Joined => return None,
            }
        }
    }

    fn load_chunk(self: &Arc<Self>, load: Load<ChunkValue, Slot, ChunkLoad>, fresh: bool) {
        let Load { key, slot, what } = load;
        let range = what.export.layout.chunk_range(what.chunk);
        let range = range.unwrap_or_default();
        let request = read(&what.export.image, range, slot, fresh);
        let engine = Arc::clone(self);
        self.source.submit(
            request,
            Box::new(move |outcome| {
                let jobs = Arc::clone(&engine.jobs);
                jobs.push(Job::chunk(engine, key, what, outcome, fresh));
            }),
        );
    }

    fn load_page(self: &Arc<Self>, load: Load<PageValue, Slot, PageLoad>, fresh: bool) {
        let Load { key, slot, what } = load;
        let request = read(&what.export.index, what.range, slot, fresh);
        let engine = Arc::clone(self);
        self.source.submit(
            request,
            Box::new(move |outcome| {
                let jobs = Arc::clone(&engine.jobs);
                jobs.push(Job::page(engine, key, what, outcome, fresh));
            }),
        );
    }

    /// Starts loads that had found no memory.
    fn start_waiting_chunks(self: &Arc<Self>) {
        while let Some(load) = self.chunks.next() {
            self.load_chunk(load, false);
        }
    }

    fn start_waiting_pages(self: &Arc<Self>) {
        while let Some(load) = self.pages.next() {
            self.load_page(load, false);
        }
    }

    /// A chunk has come, or not.
    fn chunk_came(
        self: &Arc<Self>,
        key: ChunkValue,
        what: ChunkLoad,
        outcome: Result<Filled, SourceError>,
        fresh: bool,
    ) {
        let export = Arc::clone(&what.export);
        let problem = match outcome {
            Ok(Filled { slot, len }) => {
                export.counters.source_bytes.fetch_add(len as u64, Relaxed);
                match verify::chunk(&export, what.chunk, &slot.bytes()[..len], key) {
                    Ok(()) => {
                        let (guard, waiters) = self.chunks.complete(key, slot, len);
                        for piece in waiters {
                            piece.fill(&guard.bytes()[..len]);
                            guard.served(piece.len());
                        }
                        drop(guard);
                        return self.start_waiting_chunks();
                    }
                    Err(_) if !fresh => {
                        return self.load_chunk(Load { key, slot, what }, true);
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        let reason = format!(
            "{}: chunk {}: {} in {}: {problem}",
            export.name,
            what.chunk,
            export.image,
            self.source.name()
        );
        tracing::error!(
            layer = %export.name, chunk = what.chunk.0, file = %export.image,
            source = self.source.name(), problem, "a chunk cannot be served"
        );
        self.fail(self.chunks.fail(&key), &export, &reason);
        self.start_waiting_chunks();
    }

    /// A page has come, or not.
    fn page_came(
        self: &Arc<Self>,
        key: PageValue,
        what: PageLoad,
        outcome: Result<Filled, SourceError>,
        fresh: bool,
    ) {
        let export = Arc::clone(&what.export);
        let problem = match outcome {
            Ok(Filled { slot, len }) => {
                export.counters.source_bytes.fetch_add(len as u64, Relaxed);
                match verify::page(&export, what.page, &slot.bytes()[..len], key) {
                    Ok(()) => {
                        let (guard, mut waiters) = self.pages.complete(key, slot, len);
                        for piece in &mut waiters {
                            piece.learn(guard.bytes());
                        }
                        drop(guard);
                        for piece in waiters {
                            self.serve(piece);
                        }
                        return self.start_waiting_pages();
                    }
                    Err(_) if !fresh => {
                        return self.load_page(Load { key, slot, what }, true);
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error.to_string(),
        };
        let reason = format!(
            "{}: {} in {}: {problem}",
            export.name,
            export.index,
            self.source.name()
        );
        tracing::error!(
            layer = %export.name, page = %what.page, file = %export.index,
            source = self.source.name(), problem, "a page of the index cannot be used"
        );
        self.fail(self.pages.fail(&key), &export, &reason);
        self.start_waiting_pages();
    }

    /// Fails the pieces of `export`. Those of other exports, which wait for the
    /// same content from a file of their own, try that.
    fn fail(self: &Arc<Self>, pieces: Vec<Piece>, export: &Arc<Export>, reason: &str) {
        for piece in pieces {
            if Arc::ptr_eq(&piece.export, export) {
                export.counters.errors.fetch_add(1, Relaxed);
                piece.fail(reason);
            } else {
                self.serve(piece);
            }
        }
    }

    /// The zero map said that the piece's chunk is all zeros: see whether its
    /// value says so too.
    fn check_zeros(self: &Arc<Self>, piece: Piece, value: ChunkValue) {
        let export = &piece.export;
        let range = export.layout.chunk_range(piece.chunk).unwrap_or_default();
        let len = usize::try_from(range.length).unwrap_or(0);
        if verify::chunk(export, piece.chunk, &ZEROS[..len], value).is_ok() {
            export.zeros.verified(piece.chunk);
            piece.fill(&ZEROS);
        } else {
            tracing::warn!(
                layer = %export.name, chunk = piece.chunk.0, file = %export.index,
                "the zero map is wrong about a chunk; reading it"
            );
            export.zeros.refuted(piece.chunk);
            self.serve(piece);
        }
    }
}

fn read(file: &accel_source::FileName, range: ByteRange, slot: Slot, fresh: bool) -> Request {
    Request {
        file: file.clone(),
        operation: Operation::Read {
            offset: range.offset,
            // At most a chunk.
            len: usize::try_from(range.length).unwrap_or(0),
            fresh,
        },
        slot,
        patience: Patience::DATA,
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.jobs.close();
    }
}
