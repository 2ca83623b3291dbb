//! Memory that processes share.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

/// A mapping of memory that other processes map, too. Nothing of it is lent as Rust sees
/// it; for that there are its [`Part`]s.
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    /// Held while this process writes.
    writes: Mutex<()>,
}

// SAFETY: the mapping is plain memory, which is only written under a lock, or through
// parts that do not overlap.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes of `fd`, for reading and writing. The file has to stay as long as
    /// that.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn map(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
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
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?,
            len,
            writes: Mutex::default(),
        })
    }

    /// Gives it out in parts of these sizes, one after the other from its beginning, as
    /// far as it goes.
    pub fn into_parts(self, sizes: impl IntoIterator<Item = usize>) -> Vec<Part> {
        let (memory, mut start) = (Arc::new(self), 0);
        let part = |len| {
            let offset = start;
            start = memory.end(offset, len)?;
            let memory = Arc::clone(&memory);
            Some(Part {
                memory,
                offset,
                len,
            })
        };
        sizes.into_iter().map_while(part).collect()
    }

    /// Copies `bytes` to `offset`; false if they do not fit there. To be called only where
    /// other processes do not look at the same time.
    #[must_use]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let Some(end) = self.end(offset, bytes.len()) else {
            return false;
        };
        let Some(place) = self.address(offset..end) else {
            return false;
        };
        let _one = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range lies in the mapping. No reference to it exists: parts are made
        // only by giving this up.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place.as_ptr(), bytes.len()) };
        true
    }

    /// The address of these bytes, if they lie inside.
    pub(crate) fn address(&self, place: Range<usize>) -> Option<NonNull<u8>> {
        let inside = place.start <= place.end && place.end <= self.len;
        // SAFETY: the result stays inside the mapping, or one past it.
        inside.then(|| unsafe { self.base.add(place.start) })
    }

    /// Where `len` bytes from `offset` end, if they lie inside.
    fn end(&self, offset: usize, len: usize) -> Option<usize> {
        offset.checked_add(len).filter(|end| *end <= self.len)
    }

    /// Whether these bytes lie inside.
    pub fn holds(&self, offset: usize, len: usize) -> bool {
        self.end(offset, len).is_some()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; nothing borrowed from it outlives the owner
        // (parts and rings hold an `Arc`).
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes)", self.len)
    }
}

/// A part of shared memory, and in this process the only way to its bytes. That another
/// process writes only what nobody here looks at is for them to agree on.
pub struct Part {
    memory: Arc<SharedMemory>,
    offset: usize,
    len: usize,
}

impl Part {
    /// Where it begins in the memory, bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which `memory` keeps, and no other part
        // has any of it.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes it the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }

    fn address(&self) -> *mut u8 {
        // SAFETY: `into_parts` has seen that it lies in the mapping.
        unsafe { self.memory.base.add(self.offset) }.as_ptr()
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({} bytes at {})", self.len, self.offset)
    }
}
