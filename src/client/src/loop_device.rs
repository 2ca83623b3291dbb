//! Loop devices, for kernels whose EROFS mounts no files.

use accel_sys::loop_devices::{configure, free_number};
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long a lock of others is waited for.
const LOCKED: Duration = Duration::from_secs(1);

/// A read-only loop device over `file` that goes away with its last user. Keep
/// the returned file open until the device is mounted. It is locked: udev waits with
/// devices that others have locked (systemd's "Block Device Locking").
pub(crate) fn loop_device(file: &Path) -> io::Result<(PathBuf, File)> {
    let backing = File::open(file)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    let started = Instant::now();
    loop {
        let number = free_number(&control)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::open(&path)?;
        // Before udev hears of the device. Who has it locked makes it too, or is udev that
        // looks at what it was: in the end it is as good without the lock.
        while flock(&device, FlockOperation::NonBlockingLockExclusive).is_err()
            && started.elapsed() < LOCKED
        {
            thread::sleep(Duration::from_millis(10));
        }
        match configure(&device, &backing) {
            Ok(()) => return Ok((path, device)),
            // Another was faster with this number.
            Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `device` is a loop device over `file`, by that name.
pub(crate) fn is_over(device: &Path, file: &Path) -> bool {
    let name = device.strip_prefix("/dev").ok().and_then(Path::to_str);
    let Some(name) = name.filter(|name| name.starts_with("loop")) else {
        return false;
    };
    let backing = std::fs::read(format!("/sys/block/{name}/loop/backing_file"));
    backing.is_ok_and(|path| path.trim_ascii_end() == file.as_os_str().as_encoded_bytes())
}
