//! One file's way from its temporary to its final name.

use super::{Identity, Ufs, make_directories, sync_directory};
use crate::error::UfsError;
use crate::names::RelPath;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How often a damaged file is replaced that others put there meanwhile.
const REPLACEMENTS: usize = 16;

/// What became of a [`Publication`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It has its final name now.
    Published,
    /// The name was there already, with the same number of bytes.
    AlreadyThere,
}

/// A file on its way to its final name. Dropped, what is left of it is what
/// [`Publication::commit`] made.
#[derive(Debug)]
pub struct Publication {
    pub(super) ufs: Ufs,
    pub(super) file: File,
    pub(super) path: PathBuf,
}

impl Publication {
    /// The file, open for reading and writing.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Starts another file on the same UFS.
    pub fn sibling(&self, what: &str) -> Result<Self, UfsError> {
        self.ufs.create(what)
    }

    /// Its temporary name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says what was being done to the file when an error happened; fit for
    /// `map_err`.
    pub fn error(&self, doing: &'static str) -> impl FnOnce(io::Error) -> UfsError {
        UfsError::io(doing, &self.path)
    }

    /// Makes the file durable and gives it its final name. The temporary name
    /// stays until the value is dropped.
    pub fn commit(&self, name: &RelPath) -> Result<Outcome, UfsError> {
        self.file.sync_all().map_err(self.error("sync"))?;
        self.ufs.check_there()?;
        let path = self.ufs.path(name);
        let directory = path.parent().unwrap_or(&self.ufs.root);
        make_directories(&self.ufs.root, directory)?;
        let outcome = loop {
            // The lock is held so that a signal's clean-up comes before or after.
            let open = self.ufs.lock();
            if open.closed {
                return Err(UfsError::Interrupted);
            }
            let linked = fs::hard_link(&self.path, &path);
            drop(open);
            match linked {
                Ok(()) => break Outcome::Published,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    match self.compare(&path) {
                        // A removal has hidden it meanwhile: it is ours to publish.
                        Err(UfsError::Io { error, .. })
                            if error.kind() == io::ErrorKind::NotFound && self.path.exists() => {}
                        compared => break compared?,
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.path.exists() => {
                    return Err(UfsError::TakenForDead {
                        path: self.path.clone(),
                    });
                }
                Err(error) => return Err(UfsError::io("publish", &path)(error)),
            }
        };
        // Also if another made the link: it may not have come to this yet, and
        // what we publish next may rely on it.
        sync_directory(directory)?;
        tracing::debug!(%name, ?outcome, "published");
        Ok(outcome)
    }

    /// As [`commit`](Self::commit), but what has the name already and differs in its
    /// bytes, or is no file, goes aside first: its new path is given. May be repeated
    /// after an interruption. No symlink is followed: a name leads nowhere else.
    pub fn replace(&self, name: &RelPath) -> Result<(Outcome, Vec<PathBuf>), UfsError> {
        self.file.sync_all().map_err(self.error("sync"))?;
        self.ufs.check_there()?;
        let path = self.ufs.path(name);
        let parent = path.parent().unwrap_or(&self.ufs.root);
        let file = path.file_name().unwrap_or_default();
        let directory = match self.ufs.open_beneath(parent) {
            Err(UfsError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                make_directories(&self.ufs.root, parent)?;
                self.ufs.open_beneath(parent)?
            }
            opened => opened?,
        };
        let mut aside = Vec::new();
        // Others may be repairing the same layer.
        for _ in 0..REPLACEMENTS {
            let open = self.ufs.lock();
            if open.closed {
                return Err(UfsError::Interrupted);
            }
            let cwd = rustix::fs::CWD;
            let linked = rustix::fs::linkat(cwd, &self.path, &directory, file, AtFlags::empty());
            drop(open);
            let outcome = match linked {
                Ok(()) => Outcome::Published,
                Err(Errno::EXIST) => {
                    // Known before it is looked into, so that nothing else goes aside.
                    let found =
                        match rustix::fs::statat(&directory, file, AtFlags::SYMLINK_NOFOLLOW) {
                            Ok(found) => Identity::of(&found),
                            // Another has just set it aside.
                            Err(Errno::NOENT) => continue,
                            Err(error) => return Err(UfsError::io("look at", &path)(error.into())),
                        };
                    match self.is_same(&directory, file)? {
                        Some(outcome) => outcome,
                        None => {
                            aside.extend(self.ufs.set_aside(&directory, &path, found)?);
                            // Whatever happens next: it is known as missing, not as damaged.
                            sync_directory(parent)?;
                            continue;
                        }
                    }
                }
                Err(Errno::NOENT) if !self.path.exists() => {
                    return Err(UfsError::TakenForDead {
                        path: self.path.clone(),
                    });
                }
                Err(error) => return Err(UfsError::io("publish", &path)(error.into())),
            };
            sync_directory(parent)?;
            return Ok((outcome, aside));
        }
        Err(UfsError::io("replace", &path)(io::Error::other(
            "others put damaged files there again and again",
        )))
    }

    /// Whether what has the name has our bytes; `None` if not.
    fn is_same(&self, directory: &OwnedFd, name: &OsStr) -> Result<Option<Outcome>, UfsError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let Ok(there) = rustix::fs::openat(directory, name, flags, Mode::empty()) else {
            return Ok(None);
        };
        let there = File::from(there);
        let here = self.file.metadata().map_err(self.error("look at"))?;
        let Ok(found) = there.metadata() else {
            return Ok(None);
        };
        if (found.dev(), found.ino()) == (here.dev(), here.ino()) {
            return Ok(Some(Outcome::Published));
        }
        if !found.is_file() || found.len() != here.len() {
            return Ok(None);
        }
        // What this machine has cached of it may be better, or worse, than what is there.
        let _ = rustix::fs::fadvise(&there, 0, None, rustix::fs::Advice::DontNeed);
        let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut at = 0;
        while at < here.len() {
            let len = (here.len() - at).min(1 << 20);
            // At most a MiB.
            let len = usize::try_from(len).unwrap_or(0);
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            self.file
                .read_exact_at(ours, at)
                .map_err(self.error("read"))?;
            if there.read_exact_at(theirs, at).is_err() || ours != theirs {
                return Ok(None);
            }
            at += len as u64;
        }
        Ok(Some(Outcome::AlreadyThere))
    }

    /// What it means that `path` exists.
    fn compare(&self, path: &Path) -> Result<Outcome, UfsError> {
        let there = fs::metadata(path).map_err(UfsError::io("look at", path))?;
        let here = self.file.metadata().map_err(self.error("look at"))?;
        if (there.dev(), there.ino()) == (here.dev(), here.ino()) {
            // NFS: the reply to our link was lost and the repetition found ours.
            return Ok(Outcome::Published);
        }
        if there.len() != here.len() {
            return Err(UfsError::Differs {
                path: path.to_owned(),
                there: there.len(),
                here: here.len(),
            });
        }
        Ok(Outcome::AlreadyThere)
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        self.ufs.end(&self.path);
    }
}
