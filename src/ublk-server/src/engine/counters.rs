//! What exports have done, one by one and in sum.
//!
//! Counting costs a few relaxed additions a request and no lock. The sums outlive the
//! exports: what ended is added to a remainder, so that no sum ever falls.

use accel_source::{Latencies, Latency};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// Of requests that are answered from memory one in so many is timed: reading the
/// clock twice would be a good part of what such a request costs.
pub const TIMED: u64 = 64;

/// What an export has done so far.
#[derive(Debug, Default)]
pub struct ExportCounters {
    /// Requests of the kernel.
    pub requests: AtomicU64,
    /// Pieces of requests (what lies in one chunk) served from memory.
    pub hits: AtomicU64,
    /// Pieces that had to wait for a read.
    pub misses: AtomicU64,
    /// Those of them whose read another had begun.
    pub joined: AtomicU64,
    /// Bytes given to the kernel.
    pub served_bytes: AtomicU64,
    /// Bytes read from the source, index included.
    pub source_bytes: AtomicU64,
    /// Those of them that were read in the background.
    pub background_bytes: AtomicU64,
    /// Pieces that failed.
    pub errors: AtomicU64,
    /// Answers of sources that did not match their digest.
    pub digest_failures: AtomicU64,
    /// Of requests that waited for a read: from then until they were answered.
    pub waited: Latency,
    /// Of one in [`TIMED`] of the others: from the queue to the answer.
    pub from_memory: Latency,
}

/// The same as plain numbers.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)] // as above
pub struct Totals {
    pub requests: u64,
    pub hits: u64,
    pub misses: u64,
    pub joined: u64,
    pub served_bytes: u64,
    pub source_bytes: u64,
    pub background_bytes: u64,
    pub errors: u64,
    pub digest_failures: u64,
    pub waited: Latencies,
    pub from_memory: Latencies,
}

impl ExportCounters {
    /// As they are now.
    pub fn totals(&self) -> Totals {
        // Joined before misses: what is counted between must not make it the larger.
        let joined = self.joined.load(Relaxed);
        Totals {
            requests: self.requests.load(Relaxed),
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed).max(joined),
            joined,
            served_bytes: self.served_bytes.load(Relaxed),
            source_bytes: self.source_bytes.load(Relaxed),
            background_bytes: self.background_bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            digest_failures: self.digest_failures.load(Relaxed),
            waited: self.waited.snapshot(),
            from_memory: self.from_memory.snapshot(),
        }
    }
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.hits += other.hits;
        self.misses += other.misses;
        self.joined += other.joined;
        self.served_bytes += other.served_bytes;
        self.source_bytes += other.source_bytes;
        self.background_bytes += other.background_bytes;
        self.errors += other.errors;
        self.digest_failures += other.digest_failures;
        self.waited.add(&other.waited);
        self.from_memory.add(&other.from_memory);
    }
}

/// The counters of all exports there are, and what those that ended had counted.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    ended: Totals,
    open: Vec<Arc<ExportCounters>>,
}

impl Books {
    /// Closes the books of exports that nobody has any more.
    fn close(&mut self) {
        let ended = &mut self.ended;
        self.open.retain_mut(|counters| {
            // With this the only one left nobody counts on them any more.
            let over = Arc::get_mut(counters).map(|counters| counters.totals());
            if let Some(totals) = &over {
                ended.add(totals);
            }
            over.is_none()
        });
    }
}

impl Ledger {
    /// Enters the counters of an export, unless they are in it.
    pub(super) fn enter(&self, counters: &Arc<ExportCounters>) {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !books.open.iter().any(|open| Arc::ptr_eq(open, counters)) {
            books.close();
            books.open.push(Arc::clone(counters));
        }
    }

    /// Everything that was ever counted.
    pub(super) fn sum(&self) -> Totals {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        books.close();
        let mut sum = books.ended.clone();
        for counters in &books.open {
            sum.add(&counters.totals());
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_keeps_what_ended_exports_had_counted() {
        let ledger = Ledger::default();
        for round in 1..=3 {
            let counters = Arc::new(ExportCounters::default());
            for _ in 0..2 {
                ledger.enter(&counters);
                counters.hits.fetch_add(1, Relaxed);
                assert_eq!(
                    ledger.sum().hits,
                    counters.hits.load(Relaxed) + (round - 1) * 2
                );
            }
        }
        assert_eq!(ledger.sum().hits, 6);
        assert!(ledger.0.lock().unwrap().open.is_empty());
    }
}
