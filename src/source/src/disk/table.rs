//! Which slot of the cache file holds what. No clock, no I/O.
//!
//! ```text
//! index   0: header page    4096 + 32·n: record of slot n, 128 records to a page
//! chunks  128 KiB · n: slot n
//!
//! record  0: 16 bytes of the content's name   16: length u32, 0 = empty   20: zero
//! ```
//!
//! Records are hints. What a slot holds is checked against the name by whoever asked
//! for it, so a record may be lost, old or nonsense, and slot and record are written in
//! whatever order the kernel likes: what does not match is dropped and fetched again.
//! So there is nothing to recover after a crash, and nothing to sync.
//!
//! A slot is empty, being written, or holds something; while somebody reads it, it is
//! pinned. What has not been read since the hand last came by goes first (CLOCK).

use super::SLOT;
use crate::Content;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Bytes of a record.
pub(super) const RECORD: usize = 32;
/// Bytes of a page of the index file, the unit in which it is read and written.
pub(super) const PAGE: usize = 4096;
/// Records in a page.
pub(super) const PER_PAGE: usize = PAGE / RECORD;
/// Slots that the hand passes at most to find one: behind that, the next that nobody
/// reads goes.
const PASSES: usize = 1024;

/// A content's name, as far as it is kept: 128 bits of a cryptographic digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key(u128);

impl Key {
    pub(super) fn of(content: &Content) -> Self {
        let (value, page) = match content {
            Content::Chunk(value) => (value, 0),
            Content::Page(value) => (value, 1),
        };
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&value[..16]);
        // A page of a single value has the value of what it is about.
        Self(u128::from_le_bytes(bytes) & !1 | page)
    }
}

/// Where something lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub slot: usize,
    /// Bytes of it.
    pub len: usize,
}

impl Place {
    /// Offset in the file, bytes.
    pub(super) fn offset(&self) -> u64 {
        self.slot as u64 * SLOT as u64
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    key: u128,
    /// 0: empty.
    len: u32,
    readers: u16,
    writing: bool,
    /// Read since the hand last came by.
    used: bool,
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    slots: Vec<Slot>,
    places: HashMap<Key, usize>,
    /// On their way into a slot.
    coming: HashSet<Key>,
    hand: usize,
    /// Pages of the index file whose bytes are not what they should be.
    dirty: BTreeSet<usize>,
    evicted: u64,
}

impl Table {
    /// An empty table.
    pub(super) fn new(slots: usize) -> Self {
        Self {
            slots: vec![Slot::default(); slots],
            places: HashMap::new(),
            coming: HashSet::new(),
            hand: 0,
            dirty: BTreeSet::new(),
            evicted: 0,
        }
    }

    /// Pages of records that the index file has.
    pub(super) fn pages(&self) -> usize {
        self.slots.len().div_ceil(PER_PAGE)
    }

    /// How many slots hold something.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// How many slots there are.
    pub(super) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Whether the index file is behind.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// How much was evicted so far.
    pub(super) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Takes over what a page of the index file says.
    pub(super) fn load(&mut self, page: usize, bytes: &[u8]) {
        for (slot, record) in (page * PER_PAGE..).zip(bytes.chunks_exact(RECORD)) {
            let Some(place) = self.slots.get_mut(slot) else {
                return;
            };
            let (key, rest) = record.split_at(16);
            let key = u128::from_le_bytes(key.try_into().unwrap_or_default());
            let len = u32::from_le_bytes(rest[..4].try_into().unwrap_or_default());
            let good = len > 0 && len as usize <= SLOT && rest[4..].iter().all(|&byte| byte == 0);
            if !good || self.places.contains_key(&Key(key)) {
                continue;
            }
            (place.key, place.len) = (key, len);
            self.places.insert(Key(key), slot);
        }
    }

    /// The bytes of a page of the index file.
    pub(super) fn page(&self, page: usize) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        let slots = self.slots.iter().skip(page * PER_PAGE);
        for (record, slot) in bytes.chunks_exact_mut(RECORD).zip(slots) {
            if slot.len > 0 {
                record[..16].copy_from_slice(&slot.key.to_le_bytes());
                record[16..20].copy_from_slice(&slot.len.to_le_bytes());
            }
        }
        bytes
    }

    /// Takes a page that is to be written.
    pub(super) fn take_dirty(&mut self) -> Option<usize> {
        self.dirty.pop_first()
    }

    /// A page was not written after all.
    pub(super) fn still_dirty(&mut self, page: usize) {
        self.dirty.insert(page);
    }

    /// Where `key` lies; pinned until [`release`](Self::release).
    pub(super) fn find(&mut self, key: Key) -> Option<Place> {
        let slot = *self.places.get(&key)?;
        let place = &mut self.slots[slot];
        place.readers = place.readers.checked_add(1)?;
        place.used = true;
        Some(Place {
            slot,
            len: place.len as usize,
        })
    }

    /// Lets go of what was found.
    pub(super) fn release(&mut self, place: Place) {
        let slot = &mut self.slots[place.slot];
        slot.readers = slot.readers.saturating_sub(1);
    }

    /// Forgets `key`: what lies there is something else.
    pub(super) fn forget(&mut self, key: Key) {
        if let Some(slot) = self.places.remove(&key) {
            self.slots[slot].len = 0;
            self.dirty.insert(slot / PER_PAGE);
        }
    }

    /// A slot to write `key` to; none if it is there or on its way, or if every slot is
    /// in use.
    pub(super) fn allocate(&mut self, key: Key) -> Option<usize> {
        if self.places.contains_key(&key) || self.coming.contains(&key) {
            return None;
        }
        let at = self.empty().or_else(|| self.sweep())?;
        self.hand = (at + 1) % self.slots.len();
        if self.slots[at].len > 0 {
            self.evicted += 1;
            self.forget(Key(self.slots[at].key));
        }
        self.slots[at].writing = true;
        self.coming.insert(key);
        Some(at)
    }

    /// The next slot whose content was not read since the hand last came by.
    fn sweep(&mut self) -> Option<usize> {
        for pass in 0..self.slots.len().min(2 * PASSES) {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[at];
            if slot.writing || slot.readers > 0 {
                continue;
            }
            if slot.len > 0 && std::mem::take(&mut slot.used) && pass < PASSES {
                continue;
            }
            return Some(at);
        }
        None
    }

    /// The next empty slot, if there may be one: nothing leaves before all are full. After
    /// a start they may lie anywhere.
    fn empty(&self) -> Option<usize> {
        if self.places.len() + self.coming.len() >= self.slots.len() {
            return None;
        }
        let mut all = (self.hand..self.slots.len()).chain(0..self.hand);
        all.find(|&at| {
            let slot = &self.slots[at];
            slot.len == 0 && slot.readers == 0 && !slot.writing
        })
    }

    /// `len` bytes named `key` are in `slot`, or the attempt to write them has failed.
    pub(super) fn written(&mut self, slot: usize, key: Key, len: Option<usize>) {
        self.coming.remove(&key);
        let place = &mut self.slots[slot];
        place.writing = false;
        let Some(len) = len.and_then(|len| u32::try_from(len).ok()) else {
            return;
        };
        (place.key, place.len, place.used) = (key.0, len, false);
        self.places.insert(key, slot);
        self.dirty.insert(slot / PER_PAGE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u128) -> Key {
        Key(number << 1)
    }

    fn put(table: &mut Table, number: u128) -> usize {
        let slot = table.allocate(key(number)).unwrap();
        table.written(slot, key(number), Some(SLOT));
        slot
    }

    #[test]
    fn kinds_do_not_mix() {
        let value = [7; 32];
        assert_ne!(
            Key::of(&Content::Chunk(value)),
            Key::of(&Content::Page(value))
        );
    }

    #[test]
    fn what_was_read_stays_longest_and_nothing_goes_while_it_is_read() {
        let mut table = Table::new(4);
        for number in 0..4 {
            put(&mut table, number);
        }
        for number in [1, 3] {
            let place = table.find(key(number)).unwrap();
            table.release(place);
        }
        let pinned = table.find(key(2)).unwrap();
        put(&mut table, 4);
        assert!(table.find(key(0)).is_none(), "it was never read");
        put(&mut table, 5);
        assert!(table.find(key(2)).is_some(), "it is being read");
        assert_eq!((table.len(), table.evicted()), (4, 2));
        // Nobody lets go: there is nothing to be had.
        table.release(pinned);
        let mut full = Table::new(1);
        put(&mut full, 1);
        full.find(key(1)).unwrap();
        assert!(full.allocate(key(2)).is_none());
    }

    #[test]
    fn one_thing_is_written_once() {
        let mut table = Table::new(4);
        let slot = table.allocate(key(1)).unwrap();
        assert!(table.allocate(key(1)).is_none(), "on its way");
        table.written(slot, key(1), None);
        assert!(table.find(key(1)).is_none(), "it did not arrive");
        put(&mut table, 1);
        assert!(table.allocate(key(1)).is_none(), "there");
    }

    #[test]
    fn pages_read_back_also_into_fewer_slots() {
        let mut table = Table::new(300);
        for number in 0..300 {
            put(&mut table, number);
        }
        table.forget(key(5));
        let mut pages = Vec::new();
        while let Some(page) = table.take_dirty() {
            pages.push((page, table.page(page)));
        }
        assert_eq!(pages.len(), 3);
        for (slots, left) in [(300, 299), (200, 199), (1, 1)] {
            let mut read = Table::new(slots);
            for (page, bytes) in &pages {
                read.load(*page, bytes);
            }
            assert_eq!(read.len(), left);
            let place = read.find(key(0)).unwrap();
            assert_eq!((place.offset(), place.len), (0, SLOT));
            assert!(read.find(key(5)).is_none());
        }
    }

    #[test]
    fn nothing_leaves_before_all_slots_are_full() {
        let mut before = Table::new(300);
        for number in 0..200 {
            put(&mut before, number);
        }
        before.forget(key(70));
        let mut table = Table::new(300);
        for page in 0..before.pages() {
            table.load(page, &before.page(page));
        }
        for number in 200..301 {
            put(&mut table, number);
        }
        assert_eq!((table.len(), table.evicted()), (300, 0));
        put(&mut table, 301);
        assert_eq!((table.len(), table.evicted()), (300, 1));
    }

    #[test]
    fn nonsense_names_nothing_that_is_asked_for() {
        let mut table = Table::new(PER_PAGE);
        let mut page = [0; PAGE];
        let mut state = 1_u32;
        for byte in &mut page {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_be_bytes()[0];
        }
        // Two records of the same name, and one that is too long.
        for (at, len) in [(0, 9_u32), (1, 9), (2, 1 << 20)] {
            let record = &mut page[at * RECORD..][..RECORD];
            record.fill(0);
            record[..16].copy_from_slice(&(key(7 + at as u128 / 2).0).to_le_bytes());
            record[16..20].copy_from_slice(&len.to_le_bytes());
        }
        table.load(0, &page);
        assert_eq!(table.len(), 1);
        assert_eq!(table.find(key(7)).map(|place| place.slot), Some(0));
        for number in 0..1000 {
            put(&mut table, 100 + number);
        }
        assert_eq!(table.len(), PER_PAGE);
    }
}
