//! The short way to chunks that were served lately: from export and number straight to
//! the cache entry, without the pages of the index and without hashing.
//!
//! A table of a fixed size, direct-mapped: what falls on the same place replaces what
//! was there. Nothing is pinned; an entry that was evicted is not found. Nobody waits
//! for a place: one that another thread looks at is passed over, and the long way taken.
//!
//! Before it stands a smaller one of each queue thread, [`Near`], whose places need no
//! lock.

use accel_cache::{Guard, Trace};
use accel_source::Slot;
use accel_ufs::index::ChunkNo;
use std::sync::Mutex;

/// See the module's documentation.
pub(super) struct Recent {
    /// A power of two of them.
    places: Box<[Mutex<Place>]>,
}

#[derive(Default)]
struct Place {
    /// Number of the export; 0 is none's.
    export: u64,
    chunk: u64,
    entry: Trace<Slot>,
}

impl Place {
    fn new(export: u64, chunk: ChunkNo, guard: &Guard<Slot>) -> Self {
        Self {
            export,
            chunk: chunk.0,
            entry: guard.trace(),
        }
    }

    /// The entry of a chunk of `export`, if it lies here and is still there.
    fn follow(&self, export: u64, chunk: ChunkNo) -> Option<Guard<Slot>> {
        let same = self.export == export && self.chunk == chunk.0;
        same.then(|| self.entry.follow()).flatten()
    }
}

/// Where a chunk belongs in a table of so many places, a power of two.
fn place_of(export: u64, chunk: ChunkNo, places: usize) -> usize {
    // Neighbours lie side by side; exports begin at places far from each other.
    let at = chunk
        .0
        .wrapping_add(export.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20);
    // Truncation on 32-bit machines loses nothing that matters.
    usize::try_from(at & (places as u64 - 1)).unwrap_or(0)
}

impl Recent {
    /// A table for a cache of `chunks` entries: 40 bytes for each of twice as many.
    pub(super) fn new(chunks: usize) -> Self {
        let places = (2 * chunks).next_power_of_two();
        Self {
            places: (0..places).map(|_| Mutex::default()).collect(),
        }
    }

    fn place(&self, export: u64, chunk: ChunkNo) -> Option<&Mutex<Place>> {
        self.places.get(place_of(export, chunk, self.places.len()))
    }

    /// The entry of a chunk of `export`, if it is remembered and still there.
    pub(super) fn find(&self, export: u64, chunk: ChunkNo) -> Option<Guard<Slot>> {
        let place = self.place(export, chunk)?.try_lock().ok()?;
        place.follow(export, chunk)
    }

    /// Remembers where a chunk of `export` lies.
    pub(super) fn note(&self, export: u64, chunk: ChunkNo, guard: &Guard<Slot>) {
        if let Some(place) = self.place(export, chunk)
            && let Ok(mut place) = place.try_lock()
        {
            *place = Place::new(export, chunk, guard);
        }
    }
}

/// Places of a [`Near`]: 128 KiB of them, for the chunks of 512 MiB.
const NEAR: usize = 4096;

/// What one thread has found in [`Recent`].
#[derive(Default)]
pub(super) struct Near {
    /// None before something was found.
    places: Box<[Place]>,
}

impl Near {
    /// The entry of a chunk of `export`, if this thread or `recent` remembers it and it is
    /// still there.
    pub(super) fn find(
        &mut self,
        recent: &Recent,
        export: u64,
        chunk: ChunkNo,
    ) -> Option<Guard<Slot>> {
        let at = place_of(export, chunk, NEAR);
        let place = self.places.get(at);
        let known = place.and_then(|place| place.follow(export, chunk));
        known.or_else(|| {
            let guard = recent.find(export, chunk)?;
            if self.places.is_empty() {
                self.places = (0..NEAR).map(|_| Place::default()).collect();
            }
            self.places[at] = Place::new(export, chunk, &guard);
            Some(guard)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_cache::{Cache, Lookup};
    use accel_source::Arena;
    use std::sync::Arc;

    #[test]
    fn what_is_noted_is_found_until_it_is_evicted_or_replaced() {
        let arena = Arena::new(4, 1).unwrap();
        let pool = Arc::clone(arena.chunks());
        let cache: Cache<u64, Slot, (), ()> = Cache::new(4, move || pool.take());
        let recent = Recent::new(2);
        let put = |key: u64, len| {
            let Lookup::Lead(load) = cache.lookup(key, || ((), ())) else {
                panic!("{key} does not lead");
            };
            cache.complete(load.key, load.slot, len).0
        };
        let mut near = Near::default();
        let mut found = |export, chunk| {
            let shared = recent.find(export, ChunkNo(chunk)).map(|guard| guard.len());
            // Also from what the thread itself remembers.
            for _ in 0..2 {
                let own = near.find(&recent, export, ChunkNo(chunk));
                assert_eq!(own.map(|guard| guard.len()), shared);
            }
            shared
        };
        for chunk in 0..4 {
            let len = 10 + usize::try_from(chunk).unwrap();
            recent.note(1, ChunkNo(chunk), &put(chunk, len));
        }
        for chunk in 0..4 {
            assert_eq!(found(1, chunk), Some(10 + usize::try_from(chunk).unwrap()));
            assert_eq!(found(2, chunk), None, "another export's");
            assert_eq!(found(1, chunk + 4), None, "another chunk's");
        }
        while cache.evict() {}
        assert_eq!(found(1, 0), None, "an evicted entry's");
        recent.note(1, ChunkNo(4), &put(4, 20));
        assert_eq!((found(1, 4), found(1, 0)), (Some(20), None));
    }

    /// What a thread remembers needs neither the shared table nor its locks, and pins
    /// nothing either.
    #[test]
    fn what_a_thread_has_found_it_finds_by_itself() {
        let arena = Arena::new(4, 1).unwrap();
        let pool = Arc::clone(arena.chunks());
        let cache: Cache<u64, Slot, (), ()> = Cache::new(4, move || pool.take());
        let (recent, other) = (Recent::new(2), Recent::new(2));
        let Lookup::Lead(load) = cache.lookup(0, || ((), ())) else {
            panic!("it does not lead");
        };
        let mut near = Near::default();
        recent.note(1, ChunkNo(0), &cache.complete(load.key, load.slot, 10).0);
        assert!(near.find(&other, 1, ChunkNo(0)).is_none());
        assert!(near.find(&recent, 1, ChunkNo(0)).is_some());
        assert!(near.find(&other, 1, ChunkNo(0)).is_some());
        assert!(near.find(&other, 2, ChunkNo(0)).is_none());
        assert!(near.find(&other, 1, ChunkNo(NEAR as u64)).is_none());
        while cache.evict() {}
        assert!(near.find(&recent, 1, ChunkNo(0)).is_none());
        // Its memory is free again.
        let loads: Vec<_> = (1..=4).map(|key| cache.lookup(key, || ((), ()))).collect();
        assert!(loads.iter().all(|load| matches!(load, Lookup::Lead(_))));
    }
}
