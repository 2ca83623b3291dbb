//! Descriptors that a process was started with.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

/// A descriptor that this process was started with, and of which nothing else in it knows.
/// Only once for each number.
///
/// # Errors
/// EBADF if there is no such descriptor, or it is one of the three standard ones.
pub fn inherited(number: i32) -> rustix::io::Result<OwnedFd> {
    if number < 3 {
        return Err(rustix::io::Errno::BADF);
    }
    // SAFETY: only looked at, and an error if there is no such descriptor.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: it is open, and it was passed for us to own: the numbers come from the
    // program in whose place this one was started, at a time when no file was opened yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes everything but the three standard files. To be called when the process has just
/// started, and owns no file of its own yet.
///
/// # Errors
/// `/proc/self/fd` cannot be listed.
pub fn close_inherited() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        if let Some(fd) = name.to_str().and_then(|name| name.parse::<i32>().ok()) {
            open.push(fd);
        }
    }
    // The listing's own descriptor is closed by now.
    open.retain(|&fd| fd > 2 && Path::new(&format!("/proc/self/fd/{fd}")).is_symlink());
    for fd in open {
        // SAFETY: the descriptor is open, and the process has just started: it
        // owns no file of its own yet that could be pulled from under it.
        unsafe { rustix::io::close(fd) };
    }
    Ok(())
}
