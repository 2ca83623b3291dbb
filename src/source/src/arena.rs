//! The memory that the daemon and its workers share.
//!
//! One memfd, mapped by both: first the *chunk* slots, then the *page* slots.
//!
//! ```text
//! 0            chunks × 128 KiB             + pages × 4 KiB
//! ├──────┬──────┬─── … ──┬──────┬─┬─┬─ … ─┬─┤
//! │  0   │  1   │        │ n-1  │0│1│     │ │
//! ```
//!
//! A [`Slot`] is the right to one of them. It cannot be cloned; dropping it
//! gives the memory back to its [`Pool`]. The memfd is sealed against growing
//! and shrinking, so a worker cannot pull it from under the daemon.
//!
//! A slot has memory from the first time that it is read into. What is full of that can be
//! made huge pages ([`Arena::use_huge_pages`]; `huge.rs` says when).

use crate::huge;
use accel_sys::{HugePages, Part, SharedMemory};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Size of a chunk slot.
pub const CHUNK_SLOT: usize = 128 << 10;
/// Size of a page slot.
pub const PAGE_SLOT: usize = 4 << 10;

/// The shared memory could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the cache's memory of {bytes} bytes: {source}")]
pub struct ArenaError {
    what: &'static str,
    bytes: usize,
    source: io::Error,
}

/// The shared memory and its two pools of slots.
pub struct Arena {
    chunks: Arc<Pool>,
    pages: Arc<Pool>,
    fd: Arc<OwnedFd>,
    huge: Arc<huge::Shared>,
    memory: HugePages,
}

/// The memory of a slot.
struct Memory {
    part: Part,
    /// Bytes from its beginning that have been read into.
    backed: usize,
}

/// Slots of one size.
pub struct Pool {
    /// The memfd.
    fd: Arc<OwnedFd>,
    huge: Arc<huge::Shared>,
    /// Bytes per slot.
    unit: usize,
    /// How many slots ordinary takers leave for reads that must be repeated
    /// into another slot.
    reserve: usize,
    /// The memory of the free slots; the one returned last is used first, so that
    /// memory which was never needed is never touched.
    free: Mutex<Vec<Memory>>,
    capacity: usize,
    /// Called when a slot comes back that no request ended with.
    returned: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Called when a repeated read finds no slot: true if one may be free now.
    short: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

/// How often a repeated read has room made for it before it waits.
const EVICTIONS: usize = 4;

impl Arena {
    /// Makes memory for `chunks` slots of 128 KiB and `pages` slots of 4 KiB,
    /// and for the reserves that repeated reads draw on.
    pub fn new(chunks: usize, pages: usize) -> Result<Self, ArenaError> {
        let (chunk_reserve, page_reserve) = (16, 16);
        let (all_chunks, all_pages) = (chunks + chunk_reserve, pages + page_reserve);
        let bytes = all_chunks
            .saturating_mul(CHUNK_SLOT)
            .saturating_add(all_pages.saturating_mul(PAGE_SLOT));
        let failed = |what| {
            move |source: io::Error| ArenaError {
                what,
                bytes,
                source,
            }
        };
        let fd = rustix::fs::memfd_create(
            "image-accel-cache",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(|error| failed("create")(error.into()))?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(|error| failed("size")(error.into()))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| failed("seal")(error.into()))?;
        let memory = SharedMemory::map(fd.as_fd(), bytes).map_err(failed("map"))?;
        let sizes = std::iter::repeat_n(CHUNK_SLOT, all_chunks)
            .chain(std::iter::repeat_n(PAGE_SLOT, all_pages));
        let (mut of_chunks, memory) = memory.into_parts(sizes);
        let of_pages = of_chunks.split_off(all_chunks);
        let (fd, huge) = (Arc::new(fd), Arc::new(huge::Shared::new(memory.pieces())));
        let pool = |parts: Vec<Part>, unit, reserve| {
            let parts = parts.into_iter().rev();
            let free: Vec<_> = parts.map(|part| Memory { part, backed: 0 }).collect();
            Arc::new(Pool {
                fd: Arc::clone(&fd),
                huge: Arc::clone(&huge),
                unit,
                reserve,
                capacity: free.len() - reserve,
                free: Mutex::new(free),
                returned: OnceLock::new(),
                short: OnceLock::new(),
            })
        };
        Ok(Self {
            chunks: pool(of_chunks, CHUNK_SLOT, chunk_reserve),
            pages: pool(of_pages, PAGE_SLOT, page_reserve),
            fd,
            huge,
            memory,
        })
    }

    /// Has a thread make huge pages of what is full, as long as the arena is there. To be
    /// called once. That the kernel makes none is no error.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn use_huge_pages(&self) -> io::Result<()> {
        let (huge, memory) = (Arc::clone(&self.huge), self.memory.clone());
        let run = move || huge::run(&huge, &memory);
        let thread = std::thread::Builder::new().name("huge-pages".to_owned());
        thread.spawn(run).map(drop)
    }

    /// Bytes that lie in huge pages.
    pub fn huge_bytes(&self) -> u64 {
        self.huge.huge_bytes()
    }

    /// Slots of 128 KiB, for chunks.
    pub fn chunks(&self) -> &Arc<Pool> {
        &self.chunks
    }

    /// Slots of 4 KiB, for pages of the index.
    pub fn pages(&self) -> &Arc<Pool> {
        &self.pages
    }

    /// The memfd, for a worker to map.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.huge.close();
    }
}

impl Pool {
    /// A free slot, unless only the reserve is left.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        self.take_leaving(self.reserve)
    }

    /// A free slot, from the reserve if need be: for a read whose own slot is
    /// held by an attempt that was given up.
    pub(crate) fn take_reserved(self: &Arc<Self>) -> Option<Slot> {
        for _ in 0..EVICTIONS {
            if let Some(slot) = self.take_leaving(0) {
                return Some(slot);
            }
            if !self.short.get().is_some_and(|make_room| make_room()) {
                return None;
            }
        }
        self.take_leaving(0)
    }

    fn take_leaving(self: &Arc<Self>, rest: usize) -> Option<Slot> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() <= rest {
            return None;
        }
        let memory = free.pop()?;
        Some(Slot {
            pool: Arc::clone(self),
            memory: Some(memory),
        })
    }

    /// Has `hook` called whenever a slot comes back that no request ended with:
    /// one that an attempt held which was given up. Whoever waits for a slot
    /// may have one now. The hook must neither block nor call the source. Only
    /// the first one counts.
    pub fn when_returned(&self, hook: impl Fn() + Send + Sync + 'static) {
        let _ = self.returned.set(Box::new(hook));
    }

    /// Has `make_room` called when a read that must be repeated finds no slot: it
    /// gives up content and says whether there was any. It must neither block nor
    /// call the source. Only the first one counts.
    pub fn when_short(&self, make_room: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.short.set(Box::new(make_room));
    }

    /// Takes a slot back that no request ended with.
    pub(crate) fn take_back(slot: Slot) {
        let pool = Arc::clone(&slot.pool);
        drop(slot);
        if let Some(hook) = pool.returned.get() {
            hook();
        }
    }

    /// Number of slots for ordinary use.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes per slot.
    pub fn slot_size(&self) -> usize {
        self.unit
    }
}

/// The right to use one piece of the arena, and the only way to its bytes.
pub struct Slot {
    pool: Arc<Pool>,
    /// There until this is dropped.
    memory: Option<Memory>,
}

impl Slot {
    /// Bytes that fit.
    pub fn size(&self) -> usize {
        self.pool.unit
    }

    /// The pool that this slot returns to.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn memory(&self) -> &Memory {
        let memory = self.memory.as_ref();
        memory.expect("it is given back in drop alone")
    }

    fn memory_mut(&mut self) -> &mut Memory {
        let memory = self.memory.as_mut();
        memory.expect("it is given back in drop alone")
    }

    /// Where the slot starts in the arena, bytes.
    pub(crate) fn position(&self) -> usize {
        self.memory().part.offset()
    }

    /// The slot's bytes, as the last read left them.
    ///
    /// Workers write them only while a read owns the slot, and then nobody can call this.
    pub fn bytes(&self) -> &[u8] {
        self.memory().part.bytes()
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory_mut().part.bytes_mut()
    }

    /// Notes that a worker has read so many bytes into it: they have memory from now on.
    pub(crate) fn filled(&mut self, len: usize) {
        let len = len.next_multiple_of(PAGE_SLOT).min(self.size());
        let memory = self.memory_mut();
        let more = len.saturating_sub(memory.backed);
        if more > 0 {
            memory.backed = len;
            self.pool.huge.gained(self.position(), more);
        }
    }

    /// Takes the slot's pages away, so that it gets new ones. What the kernel may still be
    /// writing on behalf of a process that is gone (direct reads survive their process) lands
    /// in the old ones, which nobody sees any more.
    ///
    /// False if it keeps them: they are part of a huge page that somebody holds, be it such a
    /// read or one into another slot. Then it may still be written, and this is to be tried
    /// again. After true it is written no more: a process that is gone takes hold of nothing.
    pub(crate) fn renew(&mut self) -> io::Result<bool> {
        let (start, len) = (self.position() as u64, self.size() as u64);
        rustix::fs::fallocate(
            &*self.pool.fd,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            start,
            len,
        )?;
        match rustix::fs::seek(&*self.pool.fd, SeekFrom::Data(start)) {
            Ok(data) if data < start + len => return Ok(false),
            // Nothing follows.
            Ok(_) | Err(Errno::NXIO) => {}
            Err(error) => return Err(error.into()),
        }
        let backed = std::mem::take(&mut self.memory_mut().backed);
        self.pool.huge.lost(self.position(), backed);
        Ok(true)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = self
            .pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.extend(self.memory.take());
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({:?})", self.memory().part)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} slots of {} bytes)", self.capacity, self.unit)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({:?}, {:?})", self.chunks, self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_come_back() {
        let arena = Arena::new(3, 2).unwrap();
        let mut slots = Vec::new();
        while let Some(slot) = arena.chunks().take() {
            slots.push(slot);
        }
        assert_eq!(slots.len(), 3);
        slots.extend(arena.pages().take());
        slots.extend(arena.pages().take());
        assert!(arena.pages().take().is_none());
        for (slot, byte) in slots.iter_mut().zip(1..) {
            slot.bytes_mut().fill(byte);
        }
        for (slot, byte) in slots.iter().zip(1..) {
            assert!(slot.bytes().iter().all(|&b| b == byte), "{slot:?}");
        }
        slots.truncate(2);
        assert!(arena.chunks().take().is_some());
    }

    #[test]
    fn the_reserve_is_for_repeated_reads() {
        let arena = Arena::new(1, 1).unwrap();
        let _all = arena.chunks().take().unwrap();
        assert!(arena.chunks().take().is_none());
        assert!(arena.chunks().take_reserved().is_some());
    }

    #[test]
    fn a_renewed_slot_leaves_its_old_pages_behind() {
        let arena = Arena::new(1, 1).unwrap();
        let mut slot = arena.chunks().take().unwrap();
        slot.bytes_mut().fill(7);
        assert!(slot.renew().unwrap());
        assert!(slot.bytes().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn the_memory_cannot_be_shrunk() {
        let arena = Arena::new(1, 1).unwrap();
        assert!(rustix::fs::ftruncate(arena.fd(), 0).is_err());
    }
}
