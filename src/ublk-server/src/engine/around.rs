//! Reading around: who had to wait for a chunk from a source that is far away gets what
//! lies beside it, too.
//!
//! Programs map their libraries page by page and wait for one read after the other, and
//! most of what they touch lies together. Of the waits of starting Python with numpy (with
//! PyTorch), reading by aligned pairs saves 39 (41) in a hundred and costs 19 (10) per cent
//! more bytes; by aligned groups of four it saves 61 (65) and costs 50 (24) per cent; what
//! merely follows saves less for more (`tools/bench-around`). The neighbours of a chunk are
//! read in the background, in operations of their own, so the chunk itself comes as soon as
//! ever.
//!
//! That is worth it while the bytes take no more than half the time of the wait that they
//! save: at 100 MB/s one more chunk takes 1.3 ms, three take 4 ms. Slow means each of a
//! source's last answers, by its own time: what is slow only now and then, because others
//! read too, is not far away; nor is one whose bytes waited here, for memory or a verifier.

use super::pending::{Pending, Piece};
use super::{Engine, Export};
use accel_source::RequestId;
use accel_ufs::index::ChunkNo;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Answers that are looked at.
const ANSWERS: usize = 8;
/// How long each of them took at least, and the chunks of a group then, a power of two; fewer
/// than a slot of a canary has (`accel_ufs::canary`), which has to be read slot by slot.
const GROUPS: [(Duration, u64); 2] = [(Duration::from_millis(8), 4), (Duration::from_millis(2), 2)];
/// Chunks that are on their way at most because of this, in all: 4 MiB.
const MOST: usize = 32;

/// How fast sources answer, and what is on its way.
#[derive(Debug)]
pub(super) struct Around {
    pace: Pace,
    /// Chunks on their way.
    on_their_way: Arc<AtomicUsize>,
    most: usize,
}

/// How long sources took for the last reads.
#[derive(Debug, Default)]
struct Pace {
    /// Microseconds; 0 is no answer yet.
    last: [AtomicU64; ANSWERS],
    next: AtomicUsize,
}

impl Pace {
    fn note(&self, took: Duration) {
        let at = self.next.fetch_add(1, Relaxed) % ANSWERS;
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.last[at].store(took.max(1), Relaxed);
    }

    /// Chunks that are worth a read; 1 if only those that are asked for are.
    fn group(&self) -> u64 {
        let least = self.last.iter().map(|last| last.load(Relaxed)).min();
        let least = Duration::from_micros(least.unwrap_or(0));
        let group = GROUPS.iter().find(|(slow, _)| least >= *slow);
        group.map_or(1, |(_, chunks)| *chunks)
    }
}

/// Nobody waits for neighbours. Counts them as long as they are on their way.
struct Neighbours {
    id: RequestId,
    chunks: usize,
    on_their_way: Arc<AtomicUsize>,
}

impl Pending for Neighbours {
    fn fill(&self, _at: usize, _bytes: &[u8]) {}
    fn fail(&self, _reason: &str) {}
    fn waits(&self) {}
    fn id(&self) -> RequestId {
        self.id
    }
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        self.on_their_way.fetch_sub(self.chunks, Relaxed);
    }
}

impl Around {
    /// For a cache of `capacity` chunks, of which one in sixteen may be on its way.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            pace: Pace::default(),
            on_their_way: Arc::default(),
            most: MOST.min(capacity / 16),
        }
    }

    /// A chunk that somebody waited for has come, for which its source took so long. Not
    /// what else it waited for: memory, or a verifier. More reads make that no shorter.
    pub(super) fn came(&self, took: Duration) {
        self.pace.note(took);
    }

    /// Takes so many chunks onto the way, unless that would be too many.
    fn set_out(&self, chunks: usize, id: RequestId) -> Option<Neighbours> {
        let more = |now: usize| Some(now + chunks).filter(|sum| *sum <= self.most);
        let taken = self.on_their_way.fetch_update(Relaxed, Relaxed, more);
        taken.ok().map(|_| Neighbours {
            id,
            chunks,
            on_their_way: Arc::clone(&self.on_their_way),
        })
    }
}

impl Engine {
    /// These chunks of `export` are on their way to somebody who waits: begins to read
    /// what lies beside them, if that pays. Waits for nothing.
    pub(super) fn read_around(self: &Arc<Self>, export: &Arc<Export>, wanted: RangeInclusive<u64>) {
        let group = self.around.pace.group();
        if group == 1 {
            return;
        }
        let (first, last) = (wanted.start() / group, wanted.end() / group);
        let end = ((last + 1) * group).min(export.layout.chunks());
        let beside = (first * group..end).filter(|chunk| !wanted.contains(chunk));
        // Zeros are not read.
        let beside = beside.map(ChunkNo).filter(|&it| !export.says_zeros(it));
        let beside: Vec<_> = beside.collect();
        if beside.is_empty() {
            return;
        }
        let Some(neighbours) = self.around.set_out(beside.len(), export.background()) else {
            return;
        };
        let pending = Arc::new(neighbours);
        for chunk in beside {
            let pending = Arc::<Neighbours>::clone(&pending);
            if let Some(piece) = Piece::of_no_bytes(export, chunk, pending) {
                self.serve(piece);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_slow_every_time_is_far_away() {
        let pace = Pace::default();
        let all = |milliseconds| {
            for _ in 0..ANSWERS {
                pace.note(Duration::from_millis(milliseconds));
            }
            pace.group()
        };
        for _ in 1..ANSWERS {
            pace.note(Duration::from_secs(1));
        }
        assert_eq!(pace.group(), 1, "too few answers");
        assert_eq!([all(20), all(8), all(7), all(2), all(1)], [4, 4, 2, 2, 1]);
        assert_eq!(all(20), 4);
        pace.note(Duration::from_micros(300));
        assert_eq!(pace.group(), 1);
    }

    #[test]
    fn no_more_is_on_its_way_than_the_cache_can_bear() {
        let around = Around::new(128);
        let id = RequestId::new(1, 0);
        let first = around.set_out(7, id).unwrap();
        assert!(around.set_out(3, id).is_none());
        let second = around.set_out(1, id).unwrap();
        drop((first, second));
        assert!(around.set_out(8, id).is_some());
        assert!(Around::new(15).set_out(1, id).is_none());
        assert!(Around::new(1 << 20).set_out(MOST + 1, id).is_none());
    }
}
