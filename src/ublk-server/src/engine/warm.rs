//! Metadata that follows a mount in the background.
//!
//! One thread reads the metadata ranges of exports, one chunk at a time, and
//! steps aside while the kernel waits for anything.

use super::pending::{Pending, Piece};
use super::{Engine, Export};
use accel_ufs::index::ChunkNo;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak, mpsc};
use std::thread;
use std::time::Duration;

/// How long to step aside at a time, and how often at most for one chunk.
const ASIDE: Duration = Duration::from_millis(2);
const TURNS: usize = 250;

/// Takes exports whose metadata is to be fetched.
#[derive(Debug)]
pub struct Warmer(mpsc::Sender<Weak<Export>>);

/// Says when the piece is over.
struct Ticket(mpsc::SyncSender<()>);

impl Pending for Ticket {
    fn fill(&self, _at: usize, _bytes: &[u8]) {}
    fn fail(&self, _reason: &str) {}
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Nobody listens only when the daemon ends.
        let _ = self.0.try_send(());
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

fn warm(engine: &Arc<Engine>, export: &Weak<Export>) {
    let Some(range) = export.upgrade().map(|export| export.metadata) else {
        return;
    };
    let Some(end) = range.end().filter(|_| range.length > 0) else {
        return;
    };
    let (first, last) = (
        ChunkNo::containing(range.offset),
        ChunkNo::containing(end - 1),
    );
    for chunk in first.0..=last.0 {
        for _ in 0..TURNS {
            if engine.unanswered.load(Relaxed) == 0 {
                break;
            }
            thread::sleep(ASIDE);
        }
        let Some(export) = export.upgrade() else {
            return;
        };
        let (sender, over) = mpsc::sync_channel(1);
        let chunk = ChunkNo(chunk);
        let Ok(walk) = export.layout.walk(export.root, chunk) else {
            return;
        };
        let piece = Piece {
            pending: Arc::new(Ticket(sender)),
            export,
            chunk,
            walk,
            start: 0,
            len: 0,
            at: 0,
        };
        engine.serve(piece);
        // Ends in any case: the ticket is dropped with the last piece. A source
        // that stalls must not keep the metadata of others from being fetched.
        let limit = engine.patience.attempt * 2;
        if over.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
    }
}
