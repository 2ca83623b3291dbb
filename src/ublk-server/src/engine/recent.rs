//! The short way to chunks that were served lately: from export and number straight to
//! the cache entry, without the pages of the index and without hashing.
//!
//! A table of a fixed size, direct-mapped: what falls on the same place replaces what
//! was there. Nothing is pinned; an entry that was evicted is not found. Nobody waits
//! for a place: one that another thread looks at is passed over, and the long way taken.

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

impl Recent {
    /// A table for a cache of `chunks` entries: 40 bytes for each of twice as many.
    pub(super) fn new(chunks: usize) -> Self {
        let places = (2 * chunks).next_power_of_two();
        Self {
            places: (0..places).map(|_| Mutex::default()).collect(),
        }
    }

    fn place(&self, export: u64, chunk: ChunkNo) -> Option<&Mutex<Place>> {
        // Neighbours lie side by side; exports begin at places far from each other.
        let at = chunk
            .0
            .wrapping_add(export.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20);
        let mask = self.places.len() - 1;
        self.places.get(usize::try_from(at).unwrap_or(0) & mask)
    }

    /// The entry of a chunk of `export`, if it is remembered and still there.
    pub(super) fn find(&self, export: u64, chunk: ChunkNo) -> Option<Guard<Slot>> {
        let place = self.place(export, chunk)?.try_lock().ok()?;
        if place.export == export && place.chunk == chunk.0 {
            place.entry.follow()
        } else {
            None
        }
    }

    /// Remembers where a chunk of `export` lies.
    pub(super) fn note(&self, export: u64, chunk: ChunkNo, guard: &Guard<Slot>) {
        if let Some(place) = self.place(export, chunk)
            && let Ok(mut place) = place.try_lock()
        {
            *place = Place {
                export,
                chunk: chunk.0,
                entry: guard.trace(),
            };
        }
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
        let found = |export, chunk| recent.find(export, ChunkNo(chunk)).map(|guard| guard.len());
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
}
