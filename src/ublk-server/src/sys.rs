//! System calls for which no safe wrapper exists: the crate's only unsafe code.
#![allow(unsafe_code)]

use rustix::thread::UnshareFlags;

/// Gives this thread, and those it starts, a mount namespace of its own.
pub(crate) fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: NEWNS separates mounts, root and working directory of this thread
    // from others; it takes no descriptor or memory away from anyone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}
