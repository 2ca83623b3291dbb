//! The FUSE protocol as `/dev/fuse` speaks it: as much of it as a file system
//! needs whose root is a single read-only regular file.
//!
//! A request is one `read`, a reply one `write`; both begin with a header that
//! bears the request's number. All integers are the machine's own. The layouts
//! here are those of protocol 7.31 (Linux 5.4) and have only grown since.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version that we speak.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 31;

/// The only inode.
pub(super) const ROOT: u64 = 1;

/// Type and mode of the root; what `mount` must be told, too.
pub(super) const ROOT_MODE: u32 = 0o100_400;

/// Largest read that we accept, in pages of 4096 bytes.
pub(super) const MAX_PAGES: u16 = 256;
/// `max_write`; there are no writes, but the kernel insists on a page.
const MAX_WRITE: u32 = 4096;
/// The kernel wants at least 8192 of a reader.
pub(super) const REQUEST_BUFFER: usize = 64 << 10;

/// Operations that get more than ENOSYS.
pub(super) mod op {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const READ: u32 = 15;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
}

/// `FUSE_NOTIFY_RESEND` (Linux 6.9): send again what was read but not answered.
const NOTIFY_RESEND: i32 = 7;

mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub const MAX_PAGES: u32 = 1 << 22;

    pub const WANTED: u32 = ASYNC_READ | ASYNC_DIO | NO_OPEN_SUPPORT | MAX_PAGES;
}

/// How long the kernel may rely on attributes that never change, in seconds:
/// as long as its clocks can count.
const FOR_EVER: u64 = 1 << 31;

#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub extensions: u32,
}

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct OutHeader {
    len: u32,
    error: i32,
    unique: u64,
}

impl OutHeader {
    /// `payload` is at most [`MAX_PAGES`] pages.
    pub fn new(unique: u64, error: i32, payload: usize) -> Self {
        let len = size_of::<OutHeader>() + payload;
        OutHeader {
            len: u32::try_from(len).unwrap_or(u32::MAX),
            error,
            unique,
        }
    }

    /// Not a reply: asks the kernel to send unanswered requests again.
    pub fn resend() -> Self {
        OutHeader::new(0, NOTIFY_RESEND, 0)
    }
}

#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
}

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    unused: [u32; 7],
}

impl InitOut {
    /// Takes of the kernel's offer what we want.
    pub fn new(offer: &InitIn) -> Self {
        InitOut {
            major: MAJOR,
            minor: MINOR,
            max_readahead: offer.max_readahead,
            flags: offer.flags & init::WANTED,
            max_background: 64,
            congestion_threshold: 48,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: MAX_PAGES,
            map_alignment: 0,
            flags2: 0,
            unused: [0; 7],
        }
    }
}

#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ReadIn {
    pub handle: u64,
    pub offset: u64,
    pub size: u32,
    pub read_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct AttrOut {
    valid: u64,
    valid_nsec: u32,
    dummy: u32,
    ino: u64,
    size: u64,
    blocks: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
}

impl AttrOut {
    pub fn new(size: u64) -> Self {
        AttrOut {
            valid: FOR_EVER,
            valid_nsec: 0,
            dummy: 0,
            ino: ROOT,
            size,
            blocks: size / 512,
            atime: 0,
            mtime: 0,
            ctime: 0,
            atimensec: 0,
            mtimensec: 0,
            ctimensec: 0,
            mode: ROOT_MODE,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct StatfsOut {
    blocks: u64,
    free: u64,
    available: u64,
    files: u64,
    free_files: u64,
    bsize: u32,
    name_len: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
}

impl StatfsOut {
    pub fn new(size: u64) -> Self {
        StatfsOut {
            blocks: size / 4096,
            free: 0,
            available: 0,
            files: 1,
            free_files: 0,
            bsize: 4096,
            name_len: 255,
            frsize: 4096,
            padding: 0,
            spare: [0; 6],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes in linux/fuse.h of protocol 7.31; a wrong one is EINVAL or a
    /// reply that the kernel misreads.
    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<AttrOut>(), 16 + 88);
        assert_eq!(size_of::<StatfsOut>(), 80);
    }
}
