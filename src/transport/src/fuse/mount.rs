//! The mounting side: runs in the client, never in the daemon that serves.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::abi;

/// The kernel's FUSE device.
pub(super) const DEVICE: &str = "/dev/fuse";

/// Why a file could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No FUSE.
    #[error("opening /dev/fuse: {0} (load the driver with `modprobe fuse`)")]
    Device(#[source] io::Error),
    /// What is to be mounted over is not an ordinary file.
    #[error("{} is not a regular file: create an empty one to mount the export on", .0.display())]
    NotAFile(PathBuf),
    /// The kernel refused.
    #[error("{action} {}: {errno}", .path.display())]
    Refused {
        /// What was being done.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Mounts a FUSE file system, whose root is a file, on the regular file `path`.
///
/// The result is the connection; give it to [`FuseTransport::add`]. Until then
/// whoever touches the file waits. The last copy to be closed ends the
/// connection: keep a duplicate where it should outlive the daemon.
///
/// [`FuseTransport::add`]: super::FuseTransport::add
pub fn mount_file(path: &Path) -> Result<OwnedFd, MountError> {
    let metadata = path
        .symlink_metadata()
        .map_err(|error| MountError::Refused {
            action: "looking at",
            path: path.to_owned(),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
    if !metadata.is_file() {
        return Err(MountError::NotAFile(path.to_owned()));
    }
    let fd: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(MountError::Device)?
        .into();
    let options = format!(
        "fd={},rootmode={:o},user_id=0,group_id=0,allow_other,default_permissions",
        fd.as_raw_fd(),
        abi::ROOT_MODE
    );
    // Formatted numbers and words contain no zero byte.
    let options = CString::new(options).unwrap_or_default();
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("image-accel", path, "fuse.image-accel", flags, &*options).map_err(
        |errno| MountError::Refused {
            action: "mounting a FUSE file on",
            path: path.to_owned(),
            errno,
        },
    )?;
    Ok(fd)
}

/// Unmounts what [`mount_file`] mounted. EBUSY while somebody uses the file.
pub fn unmount_file(path: &Path) -> Result<(), MountError> {
    rustix::mount::unmount(path, UnmountFlags::NOFOLLOW).map_err(|errno| MountError::Refused {
        action: "unmounting",
        path: path.to_owned(),
        errno,
    })
}
