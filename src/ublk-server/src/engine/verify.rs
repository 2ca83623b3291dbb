//! Verifier threads: whatever hashes, and what follows from it.

use super::pending::Piece;
use super::{ChunkLoad, Engine, Export, PageLoad};
use accel_source::{Filled, SourceError};
use accel_ufs::index::{CHUNK_SIZE, ChunkNo, ChunkValue, Mismatch, Page, PageValue, TreePage};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};

/// A chunk of zeros.
pub(super) static ZEROS: LazyLock<Box<[u8]>> = LazyLock::new(|| vec![0; CHUNK_SIZE].into());

/// Whether this build serves bytes without looking at them. Only for the test
/// that shows that corruption would be noticed.
pub const SKIPS_VERIFICATION: bool = cfg!(feature = "insecure-skip-verification");

/// Something for a verifier to do.
pub(super) struct Job(Box<dyn FnOnce() + Send>);

impl Job {
    pub(super) fn chunk(
        engine: Arc<Engine>,
        key: ChunkValue,
        what: ChunkLoad,
        outcome: Result<Filled, SourceError>,
        fresh: bool,
    ) -> Self {
        Self(Box::new(move || {
            engine.chunk_came(key, what, outcome, fresh);
        }))
    }

    pub(super) fn page(
        engine: Arc<Engine>,
        key: PageValue,
        what: PageLoad,
        outcome: Result<Filled, SourceError>,
        fresh: bool,
    ) -> Self {
        Self(Box::new(move || {
            engine.page_came(key, what, outcome, fresh);
        }))
    }

    /// Memory came back: loads that had found none may start.
    pub(super) fn waiting(engine: Arc<Engine>) -> Self {
        Self(Box::new(move || {
            engine.start_waiting_chunks();
            engine.start_waiting_pages();
        }))
    }

    pub(super) fn zeros(engine: Arc<Engine>, piece: Piece, value: ChunkValue) -> Self {
        Self(Box::new(move || engine.check_zeros(piece, value)))
    }
}

/// Jobs, first come, first served.
#[derive(Default)]
pub(super) struct JobQueue {
    /// And whether the queue is closed.
    jobs: Mutex<(VecDeque<Job>, bool)>,
    more: Condvar,
}

impl JobQueue {
    pub(super) fn push(&self, job: Job) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.0.push_back(job);
        drop(jobs);
        self.more.notify_one();
    }

    pub(super) fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.more.notify_all();
    }

    fn pop(&self) -> Option<Job> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut jobs = self
            .more
            .wait_while(jobs, |(jobs, closed)| jobs.is_empty() && !*closed)
            .unwrap_or_else(PoisonError::into_inner);
        jobs.0.pop_front()
    }
}

/// Starts one verifier.
pub(super) fn start(jobs: Arc<JobQueue>) -> std::io::Result<()> {
    let run = move || {
        while let Some(job) = jobs.pop() {
            (job.0)();
        }
    };
    let thread = std::thread::Builder::new().name("verifier".to_owned());
    thread.spawn(run).map(drop)
}

/// Checks a chunk's bytes.
pub(super) fn chunk(
    export: &Export,
    chunk: ChunkNo,
    bytes: &[u8],
    value: ChunkValue,
) -> Result<(), Mismatch> {
    match export.layout.verify_chunk(chunk, bytes, value) {
        Err(Mismatch::Chunk { .. }) if SKIPS_VERIFICATION => Ok(()),
        result => result,
    }
}

/// Checks a page's bytes.
pub(super) fn page(
    export: &Export,
    page: TreePage,
    bytes: &[u8],
    value: PageValue,
) -> Result<(), String> {
    let bytes = <&Page>::try_from(bytes)
        .map_err(|_| format!("the index ends within {page} ({} bytes came)", bytes.len()))?;
    let checked = export.layout.verify_page(page, bytes, value);
    checked.map_err(|error| error.to_string())
}
