//! Memory that processes share.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of a huge page, where an ordinary one has 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;

/// A mapping of memory that other processes map, too. Nothing of it is lent as Rust sees
/// it; for that there are its [`Part`]s. It begins at a multiple of [`HUGE_PAGE`], so that
/// the kernel can map it by such pages.
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
        let room = len.checked_add(HUGE_PAGE).ok_or(Errno::NOMEM)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of no memory; it
        // replaces nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                room,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let before = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
        let base = start.wrapping_byte_add(before);
        // SAFETY: it replaces a part of the mapping just made, which nobody else knows. If
        // this fails, that stays: whether the kernel has taken a part of it away is not known.
        unsafe {
            rustix::mm::mmap(
                base,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        }?;
        let whole = len.next_multiple_of(rustix::param::page_size());
        for (start, len) in [
            (start, before),
            (base.wrapping_byte_add(whole), room - before - whole),
        ] {
            // SAFETY: what is left of the first mapping, on either side of the second. Where
            // it fails, which a length of zero does, there is a hole in the addresses.
            let _ = unsafe { rustix::mm::munmap(start, len) };
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?,
            len,
            writes: Mutex::default(),
        })
    }

    /// Gives it out in parts of these sizes, one after the other from its beginning, as
    /// far as it goes, with what makes huge pages of it.
    pub fn into_parts(self, sizes: impl IntoIterator<Item = usize>) -> (Vec<Part>, HugePages) {
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
        let parts = sizes.into_iter().map_while(part).collect();
        (parts, HugePages(memory))
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

/// Has the kernel put shared memory together from huge pages, *piece* by piece: what lies
/// from one multiple of [`HUGE_PAGE`] to the next. Who reads or writes it meanwhile is not
/// concerned.
#[derive(Debug, Clone)]
pub struct HugePages(Arc<SharedMemory>);

impl HugePages {
    /// How many whole pieces there are.
    pub fn pieces(&self) -> usize {
        self.0.len / HUGE_PAGE
    }

    /// Makes one huge page of a piece, or sees that it is one. Bytes that had no memory get
    /// some. It takes as long as copying the piece, and longer where the kernel has to make
    /// room first.
    ///
    /// # Errors
    /// Those of madvise(2) for `MADV_COLLAPSE` (Linux 6.1): `EINVAL` where the kernel makes
    /// none of such memory; `EAGAIN` or `EBUSY` while somebody holds a page of it, such as a
    /// read into it; `ENOMEM` where no huge page is free. `InvalidInput` if there is no such
    /// piece, `Unsupported` where an ordinary page has not 4 KiB.
    pub fn collapse(&self, piece: usize) -> io::Result<()> {
        if rustix::param::page_size() != 4096 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let start = piece.checked_mul(HUGE_PAGE);
        let place = start.and_then(|start| Some(start..self.0.end(start, HUGE_PAGE)?));
        let address = place.and_then(|place| self.0.address(place));
        let address = address.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in the mapping. Where its bytes lie changes, and none of
        // them: the kernel has those wait who look meanwhile.
        let result =
            unsafe { libc::madvise(address.as_ptr().cast(), HUGE_PAGE, libc::MADV_COLLAPSE) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Tries with memory of its own, of the size of a huge page, whether this kernel makes one.
    ///
    /// # Errors
    /// As [`HugePages::collapse`]; the memory cannot be had.
    pub fn probe() -> io::Result<()> {
        let file = rustix::fs::memfd_create("huge-page", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, HUGE_PAGE as u64)?;
        let memory = SharedMemory::map(file.as_fd(), HUGE_PAGE)?;
        let (mut parts, pages) = memory.into_parts([HUGE_PAGE]);
        for part in &mut parts {
            part.bytes_mut().fill(1);
        }
        pages.collapse(0)
    }
}
