//! Turns: of several processes that want to convert the same layer one does, and the others
//! wait and find it done.
//!
//! The turn is the lock (`flock(2)`) of the file `turns/<chain ID>`. It ends with the process,
//! however that ends. Where the file system has no locks, or none between machines, or the
//! one that has the turn is stuck, a layer is converted twice, which costs time and nothing
//! else: what is published is the same.
//!
//! Nobody waits in a circle: who has a turn may wait for that of a layer below in the same
//! stack, never for one above, and a chain ID stands for one place in a stack.

use crate::error::UfsError;
use crate::publish::Ufs;
use accel_oci::ChainId;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

/// Where turns lie.
pub const TURNS: &str = "turns";

/// A turn that this process has; the next one's when dropped.
#[derive(Debug)]
pub struct Turn {
    ufs: Ufs,
    path: PathBuf,
    /// Locked, unless the file system has no locks.
    _file: File,
}

impl Ufs {
    /// Takes the turn for a layer if nobody has it.
    ///
    /// # Errors
    /// UFS cannot be written to. Not that it has no locks.
    pub fn turn(&self, layer: ChainId) -> Result<Option<Turn>, UfsError> {
        self.check_there()?;
        let directory = self.root().join(TURNS);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(UfsError::io("make the directory", &directory)(error));
            }
            _ => {}
        }
        let path = directory.join(layer.0.hex());
        let take = || {
            loop {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o644)
                    .open(&path)
                    .map_err(UfsError::io("open", &path))?;
                match file.try_lock() {
                    Ok(()) => {}
                    Err(TryLockError::WouldBlock) => return Ok(None),
                    Err(TryLockError::Error(error)) => {
                        tracing::debug!(?path, %error, "the file system has no locks");
                        return Ok(Some(file));
                    }
                }
                // Whoever had it before may have removed the file meanwhile.
                let same = match (file.metadata(), fs::metadata(&path)) {
                    (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
                    _ => false,
                };
                if same {
                    return Ok(Some(file));
                }
            }
        };
        // A signal that ends the process takes it along.
        let file = self.keep(&path, take)?;
        Ok(file.map(|file| Turn {
            ufs: self.clone(),
            path,
            _file: file,
        }))
    }

    /// Removes what ended processes have left. Who waits for a turn is not disturbed.
    pub fn tidy_turns(&self) -> Result<(), UfsError> {
        for name in self.list(&self.rel(TURNS)?)? {
            if let Ok(digest) = format!("sha256:{name}").parse() {
                self.turn(ChainId(digest))?;
            }
        }
        Ok(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Before the lock goes: who waits for it looks whether the file is still there.
        self.ufs.end(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::{DiffId, Digest};

    #[test]
    fn one_has_the_turn_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = [(), ()].map(|()| Ufs::open(directory.path()).unwrap());
        let chain = |seed: &[u8]| ChainId::new(None, DiffId(Digest::of(seed)));
        let turn = one.turn(chain(b"a")).unwrap().unwrap();
        assert!(other.turn(chain(b"a")).unwrap().is_none());
        assert!(other.turn(chain(b"b")).unwrap().is_some());
        drop(turn);
        // As of one that was killed.
        fs::write(directory.path().join(TURNS).join(chain(b"c").0.hex()), "").unwrap();
        other.tidy_turns().unwrap();
        assert!(other.turn(chain(b"a")).unwrap().is_some());
        let left = fs::read_dir(directory.path().join(TURNS)).unwrap().count();
        assert_eq!(left, 0);
    }
    /// What a signal that ends the process sees removed is all there is.
    #[test]
    fn none_is_left_whenever_it_is_closed() {
        let chain = ChainId::new(None, DiffId(Digest::of(b"a")));
        for round in 0..200 {
            let directory = tempfile::tempdir().unwrap();
            let turns = directory.path().join(TURNS);
            let ufs = Ufs::open(directory.path()).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| while ufs.turn(chain).is_ok() {});
                while !turns.exists() {
                    std::thread::yield_now();
                }
                ufs.closer()();
                // Here the process ends.
                let left = fs::read_dir(&turns).unwrap().count();
                assert_eq!(left, 0, "round {round}");
            });
            assert!(matches!(ufs.turn(chain), Err(UfsError::Interrupted)));
        }
    }
}
