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

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
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

/// A mapping of the whole memfd, in the daemon or in a worker.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory; who may touch which part of it, and
// when, is ruled by `Slot` (daemon) and by the requests (worker).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd`, shared.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice; it
        // replaces nothing.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, len })
    }

    /// Address of `len` bytes at `offset`, if they lie inside.
    pub(crate) fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        // SAFETY: `offset <= end <= self.len`, so the result stays inside the
        // mapping (or one past it).
        (end <= self.len).then(|| unsafe { self.base.add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; nothing borrowed from it outlives
        // the owner (slots and workers hold an `Arc`).
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::warn!(%error, "cannot unmap the cache's memory");
        }
    }
}

/// The shared memory and its two pools of slots.
pub struct Arena {
    chunks: Arc<Pool>,
    pages: Arc<Pool>,
    memory: Arc<Memory>,
}

struct Memory {
    mapping: Mapping,
    fd: OwnedFd,
}

/// Slots of one size.
pub struct Pool {
    memory: Arc<Memory>,
    /// Where the pool starts in the arena, bytes.
    start: usize,
    /// Bytes per slot.
    unit: usize,
    /// How many slots ordinary takers leave for reads that must be repeated
    /// into another slot.
    reserve: usize,
    /// Numbers of the free slots; the one returned last is used first, so that
    /// memory which was never needed is never touched.
    free: Mutex<Vec<u32>>,
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
        let mapping = Mapping::new(fd.as_fd(), bytes).map_err(failed("map"))?;
        let memory = Arc::new(Memory { mapping, fd });
        let pool = |start, unit, capacity: usize, reserve| {
            let numbers = 0..u32::try_from(capacity).unwrap_or(u32::MAX);
            Arc::new(Pool {
                memory: Arc::clone(&memory),
                start,
                unit,
                reserve,
                free: Mutex::new(numbers.rev().collect()),
                capacity: capacity - reserve,
                returned: OnceLock::new(),
                short: OnceLock::new(),
            })
        };
        Ok(Self {
            chunks: pool(0, CHUNK_SLOT, all_chunks, chunk_reserve),
            pages: pool(all_chunks * CHUNK_SLOT, PAGE_SLOT, all_pages, page_reserve),
            memory,
        })
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
        self.memory.fd.as_fd()
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
        free.pop().map(|number| Slot {
            pool: Arc::clone(self),
            number,
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
    number: u32,
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

    /// Where the slot starts in the arena, bytes.
    pub(crate) fn position(&self) -> usize {
        self.pool.start + self.number as usize * self.pool.unit
    }

    fn address(&self) -> NonNull<u8> {
        let at = self.pool.memory.mapping.at(self.position(), self.size());
        at.expect("the arena was made large enough for every slot of its pools")
    }

    /// The slot's bytes, as the last read left them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which the pool keeps alive.
        // This process writes it only through `bytes_mut`, which needs the slot
        // mutably; workers write it only while a read owns the slot, and then
        // nobody can call this.
        unsafe { std::slice::from_raw_parts(self.address().as_ptr(), self.size()) }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes it the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.address().as_ptr(), self.size()) }
    }

    /// Gives the slot new pages. What the kernel may still be writing on behalf
    /// of a process that is gone (direct reads survive their process) lands in
    /// the old ones, which nobody sees any more.
    pub(crate) fn renew(&mut self) -> io::Result<()> {
        rustix::fs::fallocate(
            &self.pool.memory.fd,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            self.position() as u64,
            self.size() as u64,
        )?;
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = self
            .pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        free.push(self.number);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({} of {} bytes)", self.number, self.pool.unit)
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
        slot.renew().unwrap();
        assert!(slot.bytes().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn the_memory_cannot_be_shrunk() {
        let arena = Arena::new(1, 1).unwrap();
        assert!(rustix::fs::ftruncate(arena.fd(), 0).is_err());
    }
}
