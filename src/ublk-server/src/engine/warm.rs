//! Metadata that follows a mount in the background.
//!
//! One thread reads the metadata ranges of exports, up to 1 MiB at a time, and
//! steps aside while the kernel waits for anything.

use super::pending::{Pending, Piece};
use super::{Engine, Export};
use accel_source::RequestId;
use accel_ufs::index::ChunkNo;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak, mpsc};
use std::thread;
use std::time::Duration;

/// Chunks that are asked for together.
const BATCH: u64 = 8;
/// How long to step aside at a time, and how often at most for one batch.
const ASIDE: Duration = Duration::from_millis(2);
const TURNS: usize = 250;

/// Takes exports whose metadata is to be fetched.
#[derive(Debug)]
pub struct Warmer(mpsc::Sender<Weak<Export>>);

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
    /// Starts the thread.
    pub fn start(engine: &Arc<Engine>) -> std::io::Result<Self> {
        let (sender, exports) = mpsc::channel::<Weak<Export>>();
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
        Ok(Self(sender))
    }

    /// Has the metadata of `export` fetched, unless it goes away first.
    pub fn push(&self, export: &Arc<Export>) {
        if self.0.send(Arc::downgrade(export)).is_err() {
            tracing::warn!(layer = %export.name, "the thread that fetches metadata is gone");
        }
    }
}

/// Fetches the metadata of `export`, if it is still there: at most a quarter of what the
/// cache holds, lest images push each other's out.
fn warm(engine: &Arc<Engine>, export: &Weak<Export>) {
    let Some((range, done)) = export.upgrade().map(|export| {
        if export.lacks_index()
            && let Err(error) = export.open_index(engine, engine.patience.lookup())
        {
            // Zeros are read like other bytes then.
            tracing::warn!(layer = %export.name, %error, "cannot read the index's header");
        }
        (export.metadata, export.complete().is_some())
    }) else {
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
