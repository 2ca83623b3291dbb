//! Lock files that may be removed while they are locked.

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked whether a lock has become free.
const PAUSE: Duration = Duration::from_millis(20);

/// A locked file. The lock ends when this is dropped, or the process ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits for the lock.
    pub fn wait(path: &Path) -> io::Result<Self> {
        take(path, FlockOperation::LockExclusive)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    /// Takes the lock unless another has it.
    pub fn attempt(path: &Path) -> io::Result<Option<Self>> {
        take(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Waits for the lock, but not for longer than that.
    ///
    /// # Errors
    /// Others keep it locked, or it cannot be made.
    pub fn wait_within(path: &Path, patience: Duration) -> anyhow::Result<Self> {
        let since = Instant::now();
        loop {
            let attempt = Self::attempt(path);
            match attempt.with_context(|| format!("cannot lock {}", path.display()))? {
                Some(lock) => return Ok(lock),
                None if since.elapsed() < patience => thread::sleep(PAUSE),
                None => bail!(
                    "other clients of ublk-server keep {} locked",
                    path.display()
                ),
            }
        }
    }

    /// The locked file, for another program in this process's place: it stays locked as
    /// long as the file is open anywhere.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// A lock at `path` that came with the locked file.
    pub fn inherit(file: File, path: PathBuf) -> Self {
        Self { file, path }
    }

    /// Removes the file and ends the lock. Who opened it before finds that it is
    /// gone and makes a new one.
    pub fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove a lock file");
        }
    }
}

fn take(path: &Path, operation: FlockOperation) -> io::Result<Option<Lock>> {
    loop {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut options = OpenOptions::new();
        let opened = options.write(true).create(true).mode(0o600).open(path);
        let file = match opened {
            Ok(file) => file,
            // Another has just tidied the directory away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match rustix::fs::flock(&file, operation) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let (ours, there) = (file.metadata()?, fs::metadata(path));
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            let path = path.to_owned();
            return Ok(Some(Lock { file, path }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_also_across_removal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/lock");
        let lock = Lock::attempt(&path).unwrap().unwrap();
        assert!(Lock::attempt(&path).unwrap().is_none());
        lock.remove();
        assert!(!path.exists());
        let lock = Lock::wait(&path).unwrap();
        assert!(Lock::attempt(&path).unwrap().is_none());
        assert!(Lock::wait_within(&path, Duration::ZERO).is_err());
        drop(lock);
        // A process that another test begins has the file, too, until it becomes a program.
        Lock::wait_within(&path, Duration::from_secs(30)).unwrap();
    }
}
