//! Metadata that follows a mount in the background.
//!
//! ```text
//! push ─► its index was not read yet? ─ yes ─► an opener: header and zero map
//!                 │ no                            │
//!                 └──────────────► fetch ◄────────┘   one thread, export by export
//! ```
//!
//! One thread reads the metadata ranges of exports, up to 1 MiB at a time, and
//! steps aside while the kernel waits for anything. Indexes are opened before that by a
//! few threads, which do that only while there is something to open: an index that does
//! not come, and is waited for a while, holds up no other.

use super::pending::{Pending, Piece};
use super::{Engine, Export};
use crate::threads::Threads;
use accel_source::RequestId;
use accel_ufs::index::ChunkNo;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread;
use std::time::Duration;

/// Indexes that are opened at the same time: of the reads that a source has at once they
/// leave the most to others.
const OPENERS: usize = 4;
/// Chunks that are asked for together.
const BATCH: u64 = 8;
/// How long to step aside at a time, and how often at most for one batch.
const ASIDE: Duration = Duration::from_millis(2);
const TURNS: usize = 250;

/// Takes exports whose metadata is to be fetched.
#[derive(Debug)]
pub struct Warmer(Arc<Queues>);

#[derive(Debug)]
struct Queues {
    engine: Weak<Engine>,
    threads: Arc<Threads>,
    opening: Mutex<Opening>,
    /// Exports whose index is open, or cannot be opened.
    fetch: mpsc::Sender<Weak<Export>>,
}

#[derive(Debug, Default)]
struct Opening {
    /// Exports whose index is to be opened.
    waiting: VecDeque<Weak<Export>>,
    /// Threads that do that.
    openers: usize,
}

/// Says when its pieces are over, and whether all went well.
struct Ticket {
    over: mpsc::SyncSender<bool>,
    id: RequestId,
    failed: AtomicBool,
}

impl Pending for Ticket {
    fn fill(&self, _at: usize, _bytes: &[u8]) {}
    fn fail(&self, _reason: &str) {
        self.failed.store(true, Relaxed);
    }
    fn waits(&self) {}
    fn id(&self) -> RequestId {
        self.id
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Nobody listens only when the daemon ends.
        let _ = self.over.try_send(!*self.failed.get_mut());
    }
}

impl Warmer {
    /// Starts the thread that fetches.
    pub fn start(engine: &Arc<Engine>, threads: &Arc<Threads>) -> std::io::Result<Self> {
        let (fetch, exports) = mpsc::channel::<Weak<Export>>();
        let queues = Arc::new(Queues {
            engine: Arc::downgrade(engine),
            threads: Arc::clone(threads),
            opening: Mutex::default(),
            fetch,
        });
        let engine = Arc::downgrade(engine);
        let run = move || {
            for export in exports {
                let Some(engine) = engine.upgrade() else {
                    return;
                };
                warm(&engine, &export);
            }
        };
        thread::Builder::new()
            .name("warmer".to_owned())
            .spawn(run)?;
        Ok(Self(queues))
    }

    /// Has the metadata of `export` fetched, unless it goes away first. Waits for nothing.
    pub fn push(&self, export: &Arc<Export>) {
        if export.lacks_index() {
            self.0.open(Arc::downgrade(export));
        } else {
            self.0.fetch(Arc::downgrade(export));
        }
    }
}

impl Queues {
    fn opening(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetch(&self, export: Weak<Export>) {
        if self.fetch.send(export).is_err() {
            tracing::warn!("the thread that fetches metadata is gone");
        }
    }

    /// Has the index of `export` opened, and then its metadata fetched.
    fn open(self: &Arc<Self>, export: Weak<Export>) {
        let mut opening = self.opening();
        opening.waiting.push_back(export);
        if opening.openers == OPENERS {
            return;
        }
        let queues = Arc::clone(self);
        let started = self.threads.run("index", move || queues.open_all());
        match started {
            Ok(()) => opening.openers += 1,
            // The others do its part.
            Err(_) if opening.openers > 0 => {}
            Err(error) => {
                tracing::warn!(%error, "cannot start a thread to open indexes");
                for export in opening.waiting.drain(..) {
                    self.fetch(export);
                }
            }
        }
    }

    /// Opens indexes until there is none left to open.
    fn open_all(&self) {
        loop {
            let export = {
                let mut opening = self.opening();
                let Some(export) = opening.waiting.pop_front() else {
                    opening.openers -= 1;
                    return;
                };
                export
            };
            if let (Some(engine), Some(it)) = (self.engine.upgrade(), export.upgrade())
                && it.lacks_index()
                && let Err(error) = it.open_index(&engine, engine.patience().lookup())
            {
                // Zeros are read like other bytes then.
                tracing::warn!(layer = %it.name, %error, "cannot read the index's header");
            }
            self.fetch(export);
        }
    }
}

/// Fetches the metadata of `export`, if it is still there: at most a quarter of what the
/// cache holds, lest images push each other's out.
fn warm(engine: &Arc<Engine>, export: &Weak<Export>) {
    let known = export.upgrade();
    let known = known.map(|export| (export.metadata, export.complete().is_some()));
    let Some((range, done)) = known else {
        return;
    };
    let most = (engine.arena().chunks().capacity() / 4).max(1) as u64;
    let (first, end) = match range.end().filter(|_| range.length > 0 && !done) {
        Some(end) => {
            let first = ChunkNo::containing(range.offset).0;
            let end = ChunkNo::containing(end - 1).0 + 1;
            (first, end.min(first + most))
        }
        None => (0, 0),
    };
    let mut chunk = first;
    while chunk < end {
        step_aside(engine);
        let Some(export) = export.upgrade() else {
            return;
        };
        let (sender, over) = mpsc::sync_channel(1);
        let ticket = Arc::new(Ticket {
            over: sender,
            id: export.background(),
            failed: AtomicBool::new(false),
        });
        // Reads end on whole multiples of their size.
        let next = ((chunk / BATCH + 1) * BATCH).min(end);
        for chunk in (chunk..next).map(ChunkNo) {
            let Some(piece) = Piece::of_no_bytes(&export, chunk, Arc::<Ticket>::clone(&ticket))
            else {
                return;
            };
            engine.serve(piece);
        }
        chunk = next;
        drop(ticket);
        // Ends in any case: the ticket is dropped with the last piece. A source
        // that stalls must not keep the metadata of others from being fetched.
        let limit = engine.patience.attempt * 2;
        if over.recv_timeout(limit) != Ok(true) {
            return;
        }
    }
    if let Some(export) = export.upgrade() {
        export.is_complete();
    }
}

/// Waits as long as the kernel waits for anything, within reason.
fn step_aside(engine: &Engine) {
    for _ in 0..TURNS {
        if engine.unanswered() == 0 {
            return;
        }
        thread::sleep(ASIDE);
    }
}
