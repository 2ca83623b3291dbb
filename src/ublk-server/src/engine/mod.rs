//! The read engine: from a kernel request to verified bytes.
//!
//! ```text
//! ExportReader::read_at_once, read ─ 0 every chunk known from before and cached: fill
//!    │
//!    │ else ─ pieces, one per chunk ─► Engine::serve
//!    │                                             │ 1 walk: root → pages → chunk value
//!    │                                             │      a page that is not cached: park, load
//!    │                                             │ 2 a chunk of zeros: no memory, no read
//!    │                                             │ 3 look the chunk value up: hit → fill
//!    │                                             │      miss: park, load
//!    └── finish, when the last piece is gone       ▼
//!                                          Source::submit(slot)
//!                                                  ▼ done
//!      verifier thread, or the source's: hash in place ─ good ─► cache, fill all who wait
//!                                                   └ bad ──► reject: the source asks elsewhere,
//!                                                             or says that nobody has better
//! ```
//!
//! **Invariant**: [`fill`](accel_transport::Place::fill) is called only with
//! bytes of a cache entry, and an entry is made only by a verifier's job from bytes
//! that match the image's root (or are zeros that do).
//!
//! Nothing here blocks the thread that brings a request. Pages of the index live
//! in a cache of their own, in page slots of the same shared memory.

mod ahead;
mod around;
mod content;
mod counters;
mod export;
mod gate;
mod pending;
mod recent;
mod verify;
mod warm;

pub use counters::{ExportCounters, TIMED, Totals};
pub use export::{Export, ExportReader, Kept, OpenError};
pub use verify::SKIPS_VERIFICATION;
pub use warm::Warmer;

use accel_cache::{Cache, Load, Lookup};
use accel_source::{
    Arena, Filled, Operation, Patience, Rejected, Request, Slot, Source, SourceError,
};
use accel_ufs::index::{ChunkValue, PAGE_SIZE, PageValue, Step};
use accel_ufs::names::LayerName;
use around::Around;
use content::{ChunkLoad, Content, PageLoad};
use counters::Ledger;
use gate::Gate;
use pending::Piece;
use recent::Recent;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use verify::{Job, JobQueue, ZEROS};

/// Threads that hash and fill.
const VERIFIERS: usize = 2;

type Chunks = Cache<ChunkValue, Slot, Piece, ChunkLoad>;
type Pages = Cache<PageValue, Slot, Piece, PageLoad>;

/// Serves every export of the daemon.
pub struct Engine {
    chunks: Chunks,
    pages: Pages,
    recent: Recent,
    around: Around,
    source: Arc<dyn Source>,
    arena: Arc<Arena>,
    jobs: Arc<JobQueue>,
    /// How long to try for the bytes of a mounted image.
    patience: Patience,
    /// Damage is logged for every read that meets it: not all of them.
    log: Gate,
    /// Requests of the kernel that are not answered yet.
    unanswered: AtomicUsize,
    ledger: Ledger,
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
    /// An engine that reads from `source` into `arena`, with this patience, and its
    /// verifiers.
    pub fn start(
        source: Arc<dyn Source>,
        arena: Arc<Arena>,
        patience: Patience,
    ) -> std::io::Result<Arc<Self>> {
        let (chunk_pool, page_pool) = (Arc::clone(arena.chunks()), Arc::clone(arena.pages()));
        let jobs = Arc::new(JobQueue::default());
        let engine = Arc::new(Self {
            recent: Recent::new(chunk_pool.capacity()),
            around: Around::new(chunk_pool.capacity()),
            chunks: Cache::new(chunk_pool.capacity(), move || chunk_pool.take()),
            pages: Cache::new(page_pool.capacity(), move || page_pool.take()),
            source,
            arena,
            jobs,
            patience,
            log: Gate::default(),
            unanswered: AtomicUsize::new(0),
            ledger: Ledger::default(),
        });
        for _ in 0..VERIFIERS {
            verify::start(Arc::clone(&engine.jobs), Arc::downgrade(&engine))?;
        }
        // A slot that a late attempt held comes back long after its request is
        // over: loads that wait for memory hear of it here.
        for pool in [engine.arena.chunks(), engine.arena.pages()] {
            let engine = Arc::downgrade(&engine);
            pool.when_returned(move || {
                if let Some(engine) = engine.upgrade() {
                    let jobs = Arc::clone(&engine.jobs);
                    jobs.push(Job::waiting(engine));
                }
            });
        }
        // A read that another source is asked for needs a second slot, as long as
        // the first source may still write its own.
        let evicting = Arc::downgrade(&engine);
        let room = move || evicting.upgrade().is_some_and(|it| it.chunks.evict());
        engine.arena.chunks().when_short(room);
        let evicting = Arc::downgrade(&engine);
        let room = move || evicting.upgrade().is_some_and(|it| it.pages.evict());
        engine.arena.pages().when_short(room);
        Ok(engine)
    }

    /// How long to try for the bytes of a mounted image.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Where the bytes come from.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// The memory that the cache lives in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// What all exports have done since the daemon started.
    pub fn totals(&self) -> Totals {
        self.ledger.sum()
    }

    /// Requests of the kernel that are not answered yet.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Relaxed)
    }

    /// Loads that wait for memory.
    pub fn waiting_for_memory(&self) -> usize {
        self.chunks.queued() + self.pages.queued()
    }

    /// Hits, misses and evictions of pages of the index.
    pub fn page_counters(&self) -> &accel_cache::Counters {
        self.pages.counters()
    }

    /// Pages of the index in memory.
    pub fn cached_pages(&self) -> usize {
        self.pages.len()
    }

    /// Hits, misses and evictions of chunks.
    pub fn chunk_counters(&self) -> &accel_cache::Counters {
        self.chunks.counters()
    }

    /// Chunks in memory.
    pub fn cached_chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Serves one piece, now or when its chunk has come. Whether it is the first to want
    /// a chunk that is not in memory.
    fn serve(self: &Arc<Self>, mut piece: Piece) -> bool {
        let Some(value) = self.chunk_value(&mut piece) else {
            return false;
        };
        let (export, chunk) = (&piece.export, piece.chunk);
        if export.says_zeros(chunk) {
            if export.is_verified_zeros(chunk) {
                piece.fill(&ZEROS);
            } else {
                let engine = Arc::clone(self);
                self.jobs.push(Job::zeros(engine, piece, value));
            }
            return false;
        }
        let park = || {
            let load = ChunkLoad::new(export, chunk, piece.pending.id());
            (piece.clone(), load)
        };
        match self.chunks.lookup(value, park) {
            Lookup::Hit(guard) => {
                export.counters.hits.fetch_add(1, Relaxed);
                self.recent.note(export.number, chunk, &guard);
                piece.fill(&guard.bytes()[..guard.len()]);
                guard.served(piece.len());
                drop(guard);
                self.start_waiting::<ChunkLoad>();
            }
            Lookup::Lead(load) => {
                export.counters.misses.fetch_add(1, Relaxed);
                piece.pending.waits();
                tracing::debug!(
                    request = %piece.pending.id(), layer = %export.name, chunk = chunk.0,
                    "not in memory"
                );
                self.load(load, Rejected::default());
                return true;
            }
            Lookup::Joined => {
                export.counters.misses.fetch_add(1, Relaxed);
                export.counters.joined.fetch_add(1, Relaxed);
                piece.pending.waits();
                tracing::debug!(
                    request = %piece.pending.id(), layer = %export.name, chunk = chunk.0,
                    "waits for a read under way"
                );
            }
        }
        false
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
                let load = PageLoad::new(&piece.export, page, range, piece.pending.id());
                (piece.clone(), load)
            };
            match self.pages.lookup(expected, park) {
                Lookup::Hit(guard) => {
                    guard.served(PAGE_SIZE);
                    piece.learn(guard.bytes());
                    drop(guard);
                    self.start_waiting::<PageLoad>();
                }
                Lookup::Lead(load) => {
                    piece.pending.waits();
                    tracing::debug!(
                        request = %piece.pending.id(), layer = %piece.export.name, %page,
                        "not in memory"
                    );
                    self.load(load, Rejected::default());
                    return None;
                }
                Lookup::Joined => {
                    piece.pending.waits();
                    return None;
                }
            }
        }
    }

    /// What is waited for. Only UFS itself has what a node put there: that a replica lacks it
    /// says nothing of the replica, and whoever reads it wants to know at once that it is gone.
    const fn patience_with(&self, layer: &LayerName) -> Patience {
        match layer {
            LayerName::Canary(_) => Patience {
                await_file: false,
                ..self.patience
            },
            LayerName::Layer(_) | LayerName::Chain(_) => self.patience,
        }
    }

    /// Reads what a load is for, but not what was rejected.
    fn load<C: Content>(self: &Arc<Self>, load: Load<C::Key, Slot, C>, rejected: Rejected) {
        let Load { key, slot, what } = load;
        let range = what.range();
        let operation = Operation::Read {
            offset: range.offset,
            // At most a chunk.
            len: usize::try_from(range.length).unwrap_or(0),
            fresh: false,
        };
        let file = what.file().clone();
        let request = Request {
            id: what.request(),
            rejected: rejected.clone(),
            content: Some(C::identity(key)),
            ..Request::new(
                file,
                operation,
                slot,
                self.patience_with(&what.export().name),
            )
        };
        let engine = Arc::clone(self);
        self.source.submit(
            request,
            Box::new(move |outcome| {
                let jobs = Arc::clone(&engine.jobs);
                let alone = outcome.as_ref().is_ok_and(|filled| filled.alone);
                let job = Job::new(move || {
                    let export = Arc::clone(what.export());
                    let came = || engine.came(key, what, outcome, rejected);
                    if catch_unwind(AssertUnwindSafe(came)).is_err() {
                        // Whoever waits for it must not wait for ever.
                        let waiters = C::cache(&engine).fail(&key);
                        engine.fail(waiters, &export, "the daemon failed at verifying it");
                    }
                });
                // Who waits for one chunk after the other does not wait for a thread to wake, too.
                if alone {
                    job.run();
                } else {
                    jobs.push(job);
                }
            }),
        );
    }

    /// Starts loads that had found no memory.
    fn start_waiting<C: Content>(self: &Arc<Self>) {
        while let Some(load) = C::cache(self).next() {
            self.load(load, Rejected::default());
        }
    }

    /// Whether loads wait for memory.
    fn has_waiting(&self) -> bool {
        self.chunks.queued() > 0 || self.pages.queued() > 0
    }

    /// Fails the loads that have waited for memory as long as a read may take.
    fn expire_waiting<C: Content>(self: &Arc<Self>) {
        let Some(limit) = self.patience.whole else {
            return;
        };
        let now = Instant::now();
        let over = C::cache(self).withdraw(|what| now >= what.since() + limit);
        for (key, what) in over {
            let reason = format!(
                "{}: {}: all memory of the cache has been held for {} s by reads that are not \
                 answered",
                what.export().name,
                what.file(),
                limit.as_secs()
            );
            self.report(&reason);
            self.fail(C::cache(self).fail(&key), what.export(), &reason);
        }
    }

    /// What was to be loaded has come, or not.
    fn came<C: Content>(
        self: &Arc<Self>,
        key: C::Key,
        what: C,
        outcome: Result<Filled, SourceError>,
        mut rejected: Rejected,
    ) {
        let problem = match outcome {
            Ok(filled) => {
                let (export, len) = (what.export(), filled.len);
                export.counters.source_bytes.fetch_add(len as u64, Relaxed);
                if what.request().is_background() {
                    let background = &export.counters.background_bytes;
                    background.fetch_add(len as u64, Relaxed);
                } else if what.chunk().is_some() {
                    self.around.came(filled.took);
                }
                match what.check(filled.bytes(), key) {
                    Ok(()) => {
                        let origin = filled.origin;
                        let (guard, waiters) = C::cache(self).complete(key, filled.slot, len);
                        let kept = guard.clone();
                        C::give(self, guard, waiters);
                        // Nobody waits for this.
                        let bytes = &kept.bytes()[..len];
                        self.source.verified(C::identity(key), bytes, &origin);
                        drop(kept);
                        return self.start_waiting::<C>();
                    }
                    Err(problem) => {
                        export.counters.digest_failures.fetch_add(1, Relaxed);
                        self.report_digest(&what, &filled, &problem);
                        rejected.add(&filled, problem);
                        let slot = filled.slot;
                        return self.load(Load { key, slot, what }, rejected);
                    }
                }
            }
            Err(error) => error.to_string(),
        };
        let reason = format!("{}: {what}: {problem}", what.export().name);
        self.report(&reason);
        self.fail(C::cache(self).fail(&key), what.export(), &reason);
        self.start_waiting::<C>();
    }

    /// Logs that a source gave wrong bytes. They go no further.
    fn report_digest<C: Content>(&self, what: &C, filled: &Filled, problem: &str) {
        if let Some(silenced) = self.log.pass(Instant::now()) {
            tracing::warn!(
                layer = %what.export().name, chunk = what.chunk(), file = %what.file(),
                offset = what.range().offset, source = %filled.origin.name,
                request = %what.request(), silenced, "digest mismatch: {problem}"
            );
        }
    }

    /// Logs that something cannot be served.
    fn report(&self, reason: &str) {
        if let Some(silenced) = self.log.pass(Instant::now()) {
            tracing::error!(silenced, "cannot be served: {reason}");
        }
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
            export.found_zeros(piece.chunk, true);
            piece.fill(&ZEROS);
        } else {
            tracing::warn!(
                layer = %export.name, chunk = piece.chunk.0, file = %export.index,
                "the zero map is wrong about a chunk; reading it"
            );
            export.found_zeros(piece.chunk, false);
            self.serve(piece);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.jobs.close();
    }
}
