//! Mount namespaces, and mounts that show other owners.

use rustix::thread::UnshareFlags;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Gives this thread, and those it starts, a mount namespace of its own.
///
/// # Errors
/// Those of unshare(2).
pub fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: NEWNS separates mounts, root and working directory of this thread
    // from others; it takes no descriptor or memory away from anyone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Has the mount `tree`, which is attached nowhere yet, show owners as the user namespace
/// `users` maps them.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn map_mount_ids(tree: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = MountAttr {
        attr_set: MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(users.as_raw_fd()).unwrap_or(u64::MAX),
    };
    // SAFETY: the path is a string with a zero at its end, the attributes are of the
    // kernel's layout and as long as said, both live until the call returns, and the
    // kernel writes to neither. Descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
