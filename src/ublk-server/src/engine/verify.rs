//! Verifier threads: whatever hashes, and what follows from it.

use super::pending::Piece;
use super::{ChunkLoad, Engine, Export, PageLoad};
use accel_ufs::index::{CHUNK_SIZE, ChunkNo, ChunkValue, Mismatch, Page, PageValue, TreePage};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

/// A chunk of zeros.
pub(super) static ZEROS: LazyLock<Box<[u8]>> = LazyLock::new(|| vec![0; CHUNK_SIZE].into());

/// Whether this build serves bytes without looking at them. Only for the test
/// that shows that corruption would be noticed.
pub const SKIPS_VERIFICATION: bool = cfg!(feature = "insecure-skip-verification");

/// Something for a verifier to do.
pub(super) struct Job(Box<dyn FnOnce() + Send>);

impl Job {
    pub(super) fn new(run: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(run))
    }

    /// Does it in this thread.
    pub(super) fn run(self) {
        // A job that panics fails its own requests, not all others.
        if catch_unwind(AssertUnwindSafe(self.0)).is_err() {
            tracing::error!("verifying panicked; its thread goes on");
        }
    }

    /// Memory came back: loads that had found none may start.
    pub(super) fn waiting(engine: Arc<Engine>) -> Self {
        Self(Box::new(move || {
            engine.start_waiting::<ChunkLoad>();
            engine.start_waiting::<PageLoad>();
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

    /// The next job; `Err` when the queue is closed, `Ok(None)` when none came
    /// within the time.
    fn pop(&self, limit: Option<Duration>) -> Result<Option<Job>, ()> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |(jobs, closed): &mut (VecDeque<Job>, bool)| jobs.is_empty() && !*closed;
        let mut jobs = match limit {
            None => {
                let waited = self.more.wait_while(jobs, idle);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
            Some(limit) => {
                let waited = self.more.wait_timeout_while(jobs, limit, idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        let (queue, closed) = &mut *jobs;
        match queue.pop_front() {
            None if *closed => Err(()),
            job => Ok(job),
        }
    }
}

/// How often loads that wait for memory are looked at. They wait for others, whose
/// end is a job: so a verifier comes by here before it sleeps without a limit.
const LOOK: Duration = Duration::from_secs(1);

/// Starts one verifier.
pub(super) fn start(jobs: Arc<JobQueue>, engine: Weak<Engine>) -> std::io::Result<()> {
    let run = move || {
        loop {
            let waiting = engine.upgrade().filter(|engine| engine.has_waiting());
            if let Some(engine) = &waiting {
                engine.expire_waiting::<ChunkLoad>();
                engine.expire_waiting::<PageLoad>();
            }
            let limit = waiting.map(|_| LOOK);
            match jobs.pop(limit) {
                Err(()) => return,
                Ok(None) => {}
                Ok(Some(job)) => job.run(),
            }
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
