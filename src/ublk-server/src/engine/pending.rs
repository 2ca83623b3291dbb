//! Requests on their way: split into pieces, answered when the last is gone.

use super::counters::ExportCounters;
use super::{Engine, Export};
use accel_source::RequestId;
use accel_transport::{ReadError, Request};
use accel_ufs::index::{ChunkNo, Page, Walk};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What the pieces of one request share.
pub(super) trait Pending: Send + Sync {
    /// Copies `bytes` to offset `at` of the request.
    fn fill(&self, at: usize, bytes: &[u8]);
    /// The request cannot succeed any more.
    fn fail(&self, reason: &str);
    /// A piece of it waits for a read.
    fn waits(&self);
    /// What it is called in the log.
    fn id(&self) -> RequestId;
}

/// A kernel request. It is answered when it is dropped, that is, when its last
/// piece is: well only if every byte was filled.
pub(super) struct KernelRequest<R: Request> {
    request: Option<R>,
    len: usize,
    filled: AtomicUsize,
    failure: OnceLock<ReadError>,
    engine: Arc<Engine>,
    id: RequestId,
    counters: Arc<ExportCounters>,
    /// When it came, if it is timed however it is served.
    came: Option<Instant>,
    /// When it began to wait for a read.
    since: OnceLock<Instant>,
}

impl<R: Request> KernelRequest<R> {
    /// A request of `export`, that came at this time, if that is wanted to be known.
    pub(super) fn new(
        request: R,
        len: usize,
        id: RequestId,
        came: Option<Instant>,
        engine: &Arc<Engine>,
        export: &Export,
    ) -> Self {
        engine.unanswered.fetch_add(1, Ordering::Relaxed);
        Self {
            request: Some(request),
            len,
            filled: AtomicUsize::new(0),
            failure: OnceLock::new(),
            engine: Arc::clone(engine),
            id,
            counters: Arc::clone(&export.counters),
            came,
            since: OnceLock::new(),
        }
    }
}

impl<R: Request> Pending for KernelRequest<R> {
    fn fill(&self, at: usize, bytes: &[u8]) {
        let Some(request) = &self.request else {
            return;
        };
        match request.fill(at, bytes) {
            Ok(()) => {
                self.filled.fetch_add(bytes.len(), Ordering::Relaxed);
            }
            Err(error) => self.fail(&format!("cannot hand bytes to the kernel: {error}")),
        }
    }

    fn fail(&self, reason: &str) {
        // The first reason is the one that is told.
        let _ = self.failure.set(ReadError {
            reason: reason.to_owned(),
        });
    }

    fn waits(&self) {
        self.since.get_or_init(Instant::now);
    }

    fn id(&self) -> RequestId {
        self.id
    }
}

impl<R: Request> Drop for KernelRequest<R> {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else {
            return;
        };
        // Dropping the last `Arc` of this orders every fill before.
        let result = match self.failure.take() {
            Some(error) => Err(error),
            None if *self.filled.get_mut() == self.len => Ok(()),
            None => Err(ReadError {
                reason: "the daemon gave the request up".to_owned(),
            }),
        };
        let ok = result.is_ok();
        request.finish(result);
        if let Some(since) = self.since.get() {
            self.counters.waited.record(since.elapsed());
        } else if let Some(came) = self.came {
            self.counters.from_memory.record(came.elapsed());
        }
        tracing::trace!(request = %self.id, ok, "answered to the kernel");
        self.engine.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The part of a request that lies in one chunk.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(super) pending: Arc<dyn Pending>,
    pub(super) export: Arc<Export>,
    pub(super) chunk: ChunkNo,
    /// How far the way from the root to the chunk's value is known.
    pub(super) walk: Walk,
    /// Where the part starts in the chunk, bytes.
    pub(super) start: usize,
    pub(super) len: usize,
    /// Where the part starts in the request, bytes.
    pub(super) at: usize,
}

impl Piece {
    /// A piece that has a chunk read, of which nobody wants any bytes; `None` if there is no
    /// such chunk.
    pub(super) fn of_no_bytes(
        export: &Arc<Export>,
        chunk: ChunkNo,
        pending: Arc<dyn Pending>,
    ) -> Option<Self> {
        Some(Self {
            pending,
            walk: export.layout.walk(export.root, chunk).ok()?,
            export: Arc::clone(export),
            chunk,
            start: 0,
            len: 0,
            at: 0,
        })
    }

    /// Fills the piece from the chunk's bytes.
    pub(super) fn fill(&self, chunk: &[u8]) {
        match chunk.get(self.start..self.start + self.len) {
            Some(bytes) => {
                self.pending.fill(self.at, bytes);
                let served = &self.export.counters.served_bytes;
                served.fetch_add(self.len as u64, Ordering::Relaxed);
            }
            None => self.fail("the chunk is shorter than the request"),
        }
    }

    /// Goes one step down, by the verified page that the walk asked for.
    pub(super) fn learn(&mut self, page: &[u8]) {
        match <&Page>::try_from(page) {
            Ok(page) => self.walk.supply_verified(page),
            Err(_) => self.fail("a page slot of the cache has another size"),
        }
    }

    pub(super) fn fail(&self, reason: &str) {
        self.pending.fail(reason);
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}
