//! A recovery that its process did not survive.
//!
//! `START_USER_RECOVERY` makes the driver forget the dead daemon. A successor that is
//! killed after it, and before the driver has all of its tags, leaves a device in
//! between. On Linux 6.12 that state has no way out of its own: recovery cannot be
//! started again (EINVAL), as there is no complete set of tags to forget, and the
//! descriptors cannot be mapped (EINVAL), as the driver remembers whose memory had them
//! first. Once it has had all tags of somebody who then ends, recovery starts as ever.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use accel_sys::ublk::{QueueRing, Wake};

/// Hands the driver `depth` tags of the device whose character device is at `path`, from
/// a thread that then ends. The driver lets go of it a little later.
///
/// # Errors
/// EBUSY as long as a process has the character device open.
pub(super) fn complete(path: &Path, depth: u16) -> io::Result<()> {
    let cdev = File::options().read(true).write(true).open(path)?;
    let hand_over = move || -> io::Result<()> {
        let wake = Wake::new()?;
        // Dropped before the file: the commands end first.
        let mut ring = QueueRing::new(&wake)?;
        for tag in 0..depth {
            // Those that the driver has already, or has no room for, it refuses.
            ring.hand_over(cdev.as_fd(), 0, tag, None)?;
        }
        ring.turn(&wake, false, &mut Vec::new())
    };
    let thread = thread::Builder::new().name("ublk-unfinished".to_owned());
    thread
        .spawn(hand_over)?
        .join()
        .map_err(|_| io::Error::other("the thread panicked"))?
}
