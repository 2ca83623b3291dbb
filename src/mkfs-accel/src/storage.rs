//! Writes an image's bytes to where it is stored, the fastest way there is.
//!
//! On a local disk that is direct I/O: what is written is not read again here, and
//! copying it into the kernel's cache, finding room for it there and writing it back
//! takes as long as hashing it. A network file system is faster with its own cache:
//! there every direct write would wait for the server's disk. So direct I/O is used
//! on file systems of one block device that name its alignment to `statx(2)` (Linux
//! 6.1).
//!
//! Where the cache is used, writing back begins at once, so that little is left to
//! wait for when the image is synced.

use accel_erofs::ChunkBuffer;
use rustix::fs::{Advice, AtFlags, OFlags, StatxFlags, fadvise, fcntl_getfl, fcntl_setfl, statx};
use rustix::io::{Errno, pwritev, retry_on_intr};
use std::fs::File;
use std::io::{self, IoSlice};
use std::num::NonZero;

/// Chunks that are written in one go at most: 1 MiB.
pub const BATCH: usize = 8;

/// All that is written is a multiple of this long, on a multiple of it in file and
/// memory.
const ALIGNMENT: u32 = 4096;

/// Cached bytes before writing back is asked for: enough for storage to work well, and
/// little enough to start early.
const WINDOW: u64 = 8 << 20;

/// Writes into one file.
#[derive(Debug)]
pub struct Writer<'a> {
    file: &'a File,
    direct: bool,
    /// Before this, writing back was asked for.
    window: u64,
}

impl<'a> Writer<'a> {
    /// Of `file`, whose flag for direct I/O is set until this is dropped.
    pub fn new(file: &'a File) -> Self {
        let mut writer = Self {
            file,
            direct: false,
            window: 0,
        };
        if takes_direct(file) {
            writer.direct = set_direct(file, true).is_ok();
        }
        tracing::debug!(direct = writer.direct, "writing");
        writer
    }

    /// Writes `chunks`, at most [`BATCH`], one behind the other from `offset` on.
    pub fn write(&mut self, offset: u64, chunks: &[ChunkBuffer]) -> io::Result<()> {
        let mut slices: Vec<_> = chunks.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let mut slices = &mut slices[..];
        let mut position = offset;
        while !slices.is_empty() {
            match retry_on_intr(|| pwritev(self.file, slices, position)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    position += len as u64;
                    IoSlice::advance_slices(&mut slices, len);
                }
                // Not here after all, or not from where a write stopped short.
                Err(Errno::INVAL) if self.direct => {
                    set_direct(self.file, false)?;
                    self.direct = false;
                }
                Err(error) => return Err(error.into()),
            }
        }
        if !self.direct && position.saturating_sub(self.window) >= WINDOW {
            // The kernel starts writing dirty pages when it is told that they are not
            // needed, and drops those that are clean already. It is only advice: what
            // comes of it is for the sync to say. Chunks that come late are left to
            // that, too.
            let len = NonZero::new(position - self.window);
            let _ = fadvise(self.file, self.window, len, Advice::DontNeed);
            self.window = position;
        }
        Ok(())
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.direct
            && let Err(error) = set_direct(self.file, false)
        {
            tracing::warn!(%error, "cannot end direct I/O");
        }
    }
}

/// Whether `file` lies on a block device, and takes direct I/O of our alignment.
fn takes_direct(file: &File) -> bool {
    let Ok(found) = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return false;
    };
    let fits = |align: u32| align > 0 && ALIGNMENT.is_multiple_of(align);
    // Network file systems have numbers without a driver, and may say it of theirs, too.
    found.stx_dev_major != 0
        && StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN)
        && fits(found.stx_dio_mem_align)
        && fits(found.stx_dio_offset_align)
}

fn set_direct(file: &File, on: bool) -> rustix::io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, on);
    fcntl_setfl(file, flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What a file holds after chunks of 1, 2, … were written to it, with a hole.
    fn written(file: &File) {
        let fill = |fill, len| ChunkBuffer::of(&vec![fill; len]);
        let mut writer = Writer::new(file);
        let full: Vec<_> = (1..=8).map(|n| fill(n, 128 << 10)).collect();
        writer.write(0, &full).unwrap();
        writer.write(9 * (128 << 10), &[fill(9, 4096)]).unwrap();
    }

    fn expected() -> Vec<u8> {
        let mut bytes: Vec<u8> = (1..=8).flat_map(|n| vec![n; 128 << 10]).collect();
        bytes.resize(9 * (128 << 10), 0);
        bytes.extend([9; 4096]);
        bytes
    }

    #[test]
    fn what_is_written_is_there_and_the_file_is_as_before() {
        // A disk, as far as the machine has one there, and memory.
        for directory in ["/var/tmp", "/dev/shm"] {
            let named = tempfile::NamedTempFile::new_in(directory).unwrap();
            assert!(directory == "/var/tmp" || !takes_direct(named.as_file()));
            written(named.as_file());
            assert!(fs::read(named.path()).unwrap() == expected(), "{directory}");
            assert!(
                !fcntl_getfl(named.as_file())
                    .unwrap()
                    .contains(OFlags::DIRECT)
            );
        }
    }

    #[test]
    fn a_file_that_takes_no_direct_writes_after_all_gets_others() {
        let named = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        if !takes_direct(named.as_file()) {
            eprintln!("not tested: no direct I/O in /var/tmp");
            return;
        }
        let mut writer = Writer::new(named.as_file());
        assert!(writer.direct);
        // As of a disk with larger sectors.
        writer.write(0, &[ChunkBuffer::of(b"x")]).unwrap();
        assert!(!writer.direct);
        assert_eq!(fs::read(named.path()).unwrap(), b"x");
    }
}
