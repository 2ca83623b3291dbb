//! The process that writes the cache: owns the directory, and makes it ready.

use super::table::{PAGE, PER_PAGE};
use super::{CHUNKS, INDEX, LOCK, SLOT, TAKEN};
use crate::worker::{self, WorkerError, failed};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: &[u8; 8] = b"ACCELDSK";
const LAYOUT: u32 = 1;

/// Runs the worker that writes a cache of so many slots in `directory`, until the
/// daemon closes the socket. As [`worker::run`](crate::worker::run), with standard input
/// and output taken.
///
/// # Errors
/// The directory or its files cannot be made, or another daemon uses it.
pub fn run(directory: &Path, slots: usize, namespace: Option<&Path>) -> Result<(), WorkerError> {
    worker::run_with(directory, namespace, OFlags::RDWR, |directory| {
        prepare(directory, slots)
    })
}

/// Makes the directory and its files. Both have their full size from the start, in
/// holes; what is cut off is forgotten.
fn prepare(directory: &Path, slots: usize) -> Result<(), WorkerError> {
    let what = |doing: &str, file: &Path| format!("cannot {doing} {}", file.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed(what("make the directory", directory)))?;
    let lock = directory.join(LOCK);
    let file = open(&lock).map_err(failed(what("open", &lock)))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let what = format!("{}: {TAKEN}", directory.display());
            return Err(failed(what)(io::Error::from(Errno::WOULDBLOCK)));
        }
        Err(error) => return Err(failed(what("lock", &lock))(error)),
    }
    // As long as this process lives.
    std::mem::forget(file);

    let index = directory.join(INDEX);
    let file = open(&index).map_err(failed(what("open", &index)))?;
    let header = header();
    let mut there = vec![0; PAGE];
    let known = file.read_exact_at(&mut there, 0).is_ok() && there == header;
    if !known {
        // Of another version, damaged, or not there yet.
        file.set_len(0)
            .and_then(|()| file.write_all_at(&header, 0))
            .map_err(failed(what("write", &index)))?;
    }
    let pages = slots.div_ceil(PER_PAGE) as u64;
    file.set_len((1 + pages) * PAGE as u64)
        .map_err(failed(what("resize", &index)))?;
    let chunks = directory.join(CHUNKS);
    let file = open(&chunks).map_err(failed(what("open", &chunks)))?;
    file.set_len(slots as u64 * SLOT as u64)
        .map_err(failed(what("resize", &chunks)))
}

/// Opens a file of the cache's own directory, which nobody else may write to.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW.bits();
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(Mode::from_bits_truncate(0o600).bits())
        .custom_flags(i32::try_from(flags).unwrap_or(0))
        .open(path)
}

/// The index file's first page: magic, layout, slot size.
fn header() -> Vec<u8> {
    let mut page = vec![0; PAGE];
    page[..8].copy_from_slice(MAGIC);
    page[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
    page[12..20].copy_from_slice(&(SLOT as u64).to_le_bytes());
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn another_versions_index_is_emptied_and_sizes_follow() {
        let directory = tempfile::tempdir().unwrap();
        let (index, chunks) = (directory.path().join(INDEX), directory.path().join(CHUNKS));
        prepare(directory.path(), 200).unwrap();
        let size = |path: &Path| fs::metadata(path).unwrap().len();
        assert_eq!(size(&index), 3 * 4096);
        assert_eq!(size(&chunks), 200 * SLOT as u64);
        let mut bytes = fs::read(&index).unwrap();
        bytes[5000] = 7;
        fs::write(&index, &bytes).unwrap();
        // The lock is this process's own now.
        fs::remove_file(directory.path().join(LOCK)).unwrap();
        prepare(directory.path(), 100).unwrap();
        assert_eq!((size(&index), fs::read(&index).unwrap()[5000]), (8192, 7));
        assert_eq!(size(&chunks), 100 * SLOT as u64);
        bytes[8] = 2;
        fs::write(&index, &bytes).unwrap();
        fs::remove_file(directory.path().join(LOCK)).unwrap();
        prepare(directory.path(), 100).unwrap();
        assert_eq!(fs::read(&index).unwrap()[5000], 0);
        let error = prepare(directory.path(), 100).unwrap_err().to_string();
        assert!(error.contains(TAKEN), "{error}");
    }
}
