//! The cache of verified chunks: keys, single flight, eviction.
//!
//! No clock, no file, no thread: the cache decides, its user reads, verifies and
//! copies. It is generic over
//!
//! * `K`, the key: names content (a chunk value), so an entry is never stale;
//! * `S`, a slot of memory. The cache takes one from the pool that it is given
//!   and gives it back by dropping it, so memory is bounded by the pool;
//! * `W`, a waiter: whatever is to be finished when a load ends;
//! * `L`, a load: what its leader needs to start it.
//!
//! ```text
//! lookup ─┬─ Hit(guard)    copy from it, drop it
//!         ├─ Joined        the waiter is kept: the load was started by another,
//!         │                or waits for a slot
//!         └─ Lead(load) ─► read into load.slot, verify ─┬─ complete ─► guard, waiters
//!                                                       └─ fail ─────► waiters
//!            after every complete, fail and dropped guard: next ─► Option<load>
//! ```
//!
//! **Why it cannot deadlock.** A waiter holds no slot. A slot is free, or belongs
//! to a load in flight, or to an entry; an entry can always be evicted, and while
//! a guard pins its memory the slot comes back with the guard. Loads that found
//! no slot wait in a queue, and whatever frees a slot is followed by a call of
//! [`Cache::next`]. At most one lock is held at any time, and nothing is copied,
//! hashed or waited for under it.
//!
//! **Eviction** is S3-FIFO with one change. New entries pass through a small
//! queue; those used again move to the main queue, where each use buys one more
//! round; a ghost queue remembers keys that left early, so that their return goes
//! to the main queue at once. The change: an entry counts as used once when as
//! many bytes as it holds were served from it. The kernel caches above us what it
//! was given, so an entry served whole is the least likely to be asked for again
//! and leaves first, and one served in part gets a second round. One long scan
//! therefore passes through the small queue and leaves the main queue alone.

mod shard;
mod sync;

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use shard::{Entry, Shard};
use std::collections::VecDeque;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::ops::Deref;

/// Entries per shard below which another shard is not worth it.
const SHARD_ENTRIES: usize = 64;
const MOST_SHARDS: usize = 16;

type Take<S> = Box<dyn Fn() -> Option<S> + Send + Sync>;

/// The cache. See the crate's documentation for the protocol.
pub struct Cache<K, S, W, L> {
    shards: Box<[Mutex<Shard<K, S, W>>]>,
    hasher: RandomState,
    take: Take<S>,
    /// Loads that found no slot, oldest first.
    queue: Mutex<VecDeque<(K, L)>>,
    queued: AtomicUsize,
    counters: Counters,
}

/// What the cache has done so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Look-ups answered from memory.
    pub hits: AtomicU64,
    /// Look-ups that started a load.
    pub misses: AtomicU64,
    /// Look-ups that joined a load under way.
    pub joined: AtomicU64,
    /// Entries evicted.
    pub evicted: AtomicU64,
}

/// The outcome of [`Cache::lookup`].
#[derive(Debug)]
pub enum Lookup<K, S, L> {
    /// It is there.
    Hit(Guard<S>),
    /// The waiter was kept. The caller starts this load, which may be for an
    /// earlier key that had waited for a slot.
    Lead(Load<K, S, L>),
    /// The waiter was kept; there is nothing to do.
    Joined,
}

/// A load that may start: exactly one of [`Cache::complete`] and [`Cache::fail`]
/// must follow.
#[derive(Debug)]
pub struct Load<K, S, L> {
    /// What to load.
    pub key: K,
    /// Where to.
    pub slot: S,
    /// What the first look-up said about how.
    pub what: L,
}

/// A pinned entry. Its memory stays as it is until the guard is dropped, even if
/// the entry is evicted meanwhile.
pub struct Guard<S>(Arc<Entry<S>>);

impl<S> Guard<S> {
    /// Notes that `bytes` were served from the entry. Of two threads that do at the same
    /// time one may be forgotten: it is but a hint at what leaves first, and an addition
    /// that forgets none would cost every hit more than that is worth.
    pub fn served(&self, bytes: usize) {
        let served = self.0.served.load(Ordering::Relaxed);
        let served = served.saturating_add(bytes as u64);
        self.0.served.store(served, Ordering::Relaxed);
    }

    /// A note of the entry that does not pin it.
    pub fn trace(&self) -> Trace<S> {
        Trace(Arc::downgrade(&self.0))
    }

    /// Valid bytes of the entry, as given to [`Cache::complete`].
    #[allow(clippy::len_without_is_empty)] // a chunk is never empty
    pub fn len(&self) -> usize {
        self.0.len
    }
}

impl<S> Clone for Guard<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Deref for Guard<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0.slot
    }
}

impl<S> fmt::Debug for Guard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard({} bytes)", self.0.len)
    }
}

/// Where an entry was. It neither pins the entry nor keeps its memory, and finds it
/// without a look-up as long as it is there.
pub struct Trace<S>(Weak<Entry<S>>);

impl<S> Trace<S> {
    /// The entry, if it has not been evicted.
    pub fn follow(&self) -> Option<Guard<S>> {
        self.0.upgrade().map(Guard)
    }
}

impl<S> Default for Trace<S> {
    /// Leads nowhere.
    fn default() -> Self {
        Self(Weak::new())
    }
}

impl<S> fmt::Debug for Trace<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace(to {} guards)", self.0.strong_count())
    }
}

impl<K: Copy + Eq + Hash, S, W, L> Cache<K, S, W, L> {
    /// A cache for about `capacity` entries, whose slots `take` hands out. What
    /// bounds the memory is that `take` returns `None`.
    pub fn new(capacity: usize, take: impl Fn() -> Option<S> + Send + Sync + 'static) -> Self {
        let shards = (capacity / SHARD_ENTRIES).clamp(1, MOST_SHARDS);
        let each = capacity.div_ceil(shards);
        let shard = |_| Mutex::new(Shard::new(each));
        Self {
            shards: (0..shards).map(shard).collect(),
            hasher: RandomState::new(),
            take: Box::new(take),
            queue: Mutex::new(VecDeque::new()),
            queued: AtomicUsize::new(0),
            counters: Counters::default(),
        }
    }

    /// Looks `key` up. If it is not there, `make` says who waits for it and how
    /// to load it.
    pub fn lookup(&self, key: K, make: impl FnOnce() -> (W, L)) -> Lookup<K, S, L> {
        let what = {
            let mut shard = self.shard(self.shard_of(&key));
            if let Some(entry) = shard.get(&key) {
                drop(shard);
                self.counters.hits.fetch_add(1, Ordering::Relaxed);
                return Lookup::Hit(Guard(entry));
            }
            let (waiter, what) = make();
            if !shard.join(key, waiter) {
                self.counters.joined.fetch_add(1, Ordering::Relaxed);
                return Lookup::Joined;
            }
            what
        };
        self.counters.misses.fetch_add(1, Ordering::Relaxed);
        if let Some(slot) = self.slot_for(&key) {
            return Lookup::Lead(Load { key, slot, what });
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back((key, what));
        self.queued.fetch_add(1, Ordering::SeqCst);
        drop(queue);
        // A slot may have come back since the attempt above.
        self.next().map_or(Lookup::Joined, Lookup::Lead)
    }

    /// Counts a hit that was found by a [`Trace`].
    pub fn followed(&self, hits: u64) {
        self.counters.hits.fetch_add(hits, Ordering::Relaxed);
    }

    /// Whether `key` is there or on its way.
    pub fn knows(&self, key: &K) -> bool {
        self.shard(self.shard_of(key)).knows(key)
    }

    /// The load of `key` succeeded: `slot` holds `len` good bytes.
    pub fn complete(&self, key: K, slot: S, len: usize) -> (Guard<S>, Vec<W>) {
        let (entry, waiters) = self.shard(self.shard_of(&key)).complete(key, slot, len);
        (Guard(entry), waiters)
    }

    /// The load of `key` failed; its slot was dropped or is about to be. The next
    /// look-up tries anew.
    pub fn fail(&self, key: &K) -> Vec<W> {
        self.shard(self.shard_of(key)).fail(key)
    }

    /// A load that waited for a slot and can start now. To be called again and
    /// again until `None`, after whatever may have freed a slot; costs one atomic
    /// load if nothing waits.
    pub fn next(&self) -> Option<Load<K, S, L>> {
        while self.queued.load(Ordering::SeqCst) > 0 {
            let slot = (self.take)().or_else(|| self.evict_for_slot(0))?;
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((key, what)) = queue.pop_front() {
                self.queued.fetch_sub(1, Ordering::SeqCst);
                return Some(Load { key, slot, what });
            }
            drop(queue);
            // Another thread was faster. Whoever queues from now on looks for a
            // slot afterwards and finds this one; who queued before is seen by
            // the next turn.
            drop(slot);
        }
        None
    }

    /// Gives up one entry, so that its slot comes back; false if there is none.
    pub fn evict(&self) -> bool {
        let evicted = (0..self.shards.len()).find_map(|at| self.shard(at).evict());
        let some = evicted.is_some();
        self.counters
            .evicted
            .fetch_add(u64::from(some), Ordering::Relaxed);
        some
    }

    /// How many loads wait for a slot.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::SeqCst)
    }

    /// Takes the loads that wait for a slot and for which `over` holds out of the
    /// queue: [`Cache::fail`] must follow for each.
    pub fn withdraw(&self, over: impl Fn(&L) -> bool) -> Vec<(K, L)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let (out, rest): (VecDeque<_>, _) = queue.drain(..).partition(|(_, what)| over(what));
        *queue = rest;
        self.queued.fetch_sub(out.len(), Ordering::SeqCst);
        out.into()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        (0..self.shards.len()).map(|at| self.shard(at).len()).sum()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the cache has done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    fn shard_of(&self, key: &K) -> usize {
        // Truncation on 32-bit machines loses nothing that matters.
        #[allow(clippy::cast_possible_truncation)]
        let hash = self.hasher.hash_one(key) as usize;
        hash % self.shards.len()
    }

    fn shard(&self, at: usize) -> MutexGuard<'_, Shard<K, S, W>> {
        self.shards[at]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_for(&self, key: &K) -> Option<S> {
        (self.take)().or_else(|| self.evict_for_slot(self.shard_of(key)))
    }

    /// Evicts until the pool has a slot, beginning with the shard `from`. One
    /// eviction may not be enough: the entry may be pinned, or its slot may go
    /// to others first. Giving up while entries are left would leave the load
    /// to a call of [`next`](Cache::next) that need not come.
    fn evict_for_slot(&self, from: usize) -> Option<S> {
        loop {
            let mut order = (0..self.shards.len()).map(|at| (from + at) % self.shards.len());
            let evicted = order.find_map(|at| self.shard(at).evict())?;
            self.counters.evicted.fetch_add(1, Ordering::Relaxed);
            drop(evicted);
            if let Some(slot) = (self.take)() {
                return Some(slot);
            }
        }
    }
}

impl<K, S, W, L> fmt::Debug for Cache<K, S, W, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}
