//! System calls for which no safe wrapper exists: the crate's only unsafe code.
#![allow(unsafe_code)]

use rustix::thread::UnshareFlags;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// A descriptor that this process was started with. Only once for each number.
pub(crate) fn inherited(number: i32) -> rustix::io::Result<OwnedFd> {
    if number < 3 {
        return Err(rustix::io::Errno::BADF);
    }
    // SAFETY: only looked at, and an error if there is no such descriptor.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: it is open, and it was passed for us to own: the numbers come from the
    // program in whose place this one was started, at a time when no file was opened yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Gives this thread, and those it starts, a mount namespace of its own.
pub(crate) fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: NEWNS separates mounts, root and working directory of this thread
    // from others; it takes no descriptor or memory away from anyone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}
