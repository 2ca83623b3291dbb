//! Leases: which processes are at work on UFS.
//!
//! A process that makes temporaries holds a **lease**, the file
//! `leases/<host>.<boot id>.<pid>.<random>`; the names of its temporaries begin
//! with the lease's. As long as the lease is alive, its temporaries belong to
//! somebody. The holder says that it lives in two ways:
//!
//! * it holds the file's lock (`flock(2)`), which ends with the process however
//!   that ends. All processes under one kernel see it, in whatever container they
//!   are; those on other machines perhaps, that depends on the file system.
//! * it renews the file's modification time every [`RENEWAL`].
//!
//! A lease is dead
//!
//! * if it was made under this very kernel (boot id) and nobody holds its lock, or
//! * if it was not renewed for [`EXPIRY`] by the file system's own clock, *and* is
//!   not renewed either while it is being watched. So neither a wrong clock on any
//!   machine nor on the server makes a living lease a dead one.
//!
//! A process that was suspended for so long that its lease was taken for dead finds
//! its temporary gone when it publishes, and fails; nothing half-written gets a
//! name.
//!
//! A lease has its name only once it is locked; until then it is called `*.new`, and
//! no temporary refers to it. A process makes it before its first temporary and removes it after its last, so
//! whoever lists temporaries first and leases second finds every living lease of
//! the former.

use crate::error::UfsError;
use crate::names::LEASES;
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

/// How often a lease is renewed.
pub const RENEWAL: Duration = Duration::from_secs(20);
/// After how long without a renewal a lease may be dead.
pub const EXPIRY: Duration = Duration::from_mins(15);

const NEW: &str = "new";

/// The holder of a lease: a process, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The host's name, with `-` for what is not a letter, a digit or `-`.
    pub host: String,
    /// The boot of the host's kernel.
    pub boot_id: String,
    /// The process, in its own pid namespace.
    pub pid: u32,
    /// Tells it from all others with the same names.
    pub random: String,
}

impl Owner {
    /// A new owner in this process.
    pub fn new() -> Result<Self, UfsError> {
        let read = |path: &str| {
            let text = fs::read_to_string(path).map_err(UfsError::io("read", Path::new(path)))?;
            let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
            Ok(text.trim().chars().take(64).map(plain).collect::<String>())
        };
        Ok(Self {
            host: read("/proc/sys/kernel/hostname")?,
            boot_id: read("/proc/sys/kernel/random/boot_id")?,
            pid: std::process::id(),
            random: random()?,
        })
    }

    /// The owner in the name of a lease or a temporary, if it has the form of one.
    pub fn of_file(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let mut part = || parts.next().filter(|part| !part.is_empty());
        Some(Self {
            host: part()?.to_owned(),
            boot_id: part()?.to_owned(),
            pid: part()?.parse().ok()?,
            random: part()?.to_owned(),
        })
    }

    /// Whether it is or was under the kernel that this process runs under.
    pub fn is_here(&self) -> bool {
        Self::new().is_ok_and(|here| here.boot_id == self.boot_id)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            host, boot_id, pid, ..
        } = self;
        write!(f, "{host}.{boot_id}.{pid}.{}", self.random)
    }
}

fn random() -> Result<String, UfsError> {
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 8];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(UfsError::io("read", path))?;
    Ok(crate::hex::encode(&bytes))
}

/// A lease that this process holds; given up when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    path: PathBuf,
    file: Arc<File>,
    /// Whether the renewing thread is to end.
    end: Arc<(Mutex<bool>, Condvar)>,
}

impl Lease {
    /// Takes `owner`'s lease in the directory of leases, which exists.
    pub fn take(directory: &Path, owner: &Owner) -> Result<Self, UfsError> {
        let path = directory.join(owner.to_string());
        let new = directory.join(format!("{owner}.{NEW}"));
        let file = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&new)
                .map_err(UfsError::io("create", &new))?;
            let locked = match file.try_lock() {
                // Somebody only looks whether it is locked.
                Err(TryLockError::WouldBlock) => file.lock(),
                Err(TryLockError::Error(error)) => Err(error),
                Ok(()) => Ok(()),
            };
            if let Err(error) = locked {
                // Then the lease counts by its renewals alone.
                tracing::debug!(?new, %error, "the file system has no locks");
            }
            match fs::rename(&new, &path) {
                Ok(()) => break file,
                // Found before it was locked, and taken for abandoned.
                Err(error) if error.kind() == io::ErrorKind::NotFound && directory.is_dir() => {}
                Err(error) => {
                    let _ = fs::remove_file(&new);
                    return Err(UfsError::io("rename", &new)(error));
                }
            }
        };
        let lease = Self {
            path,
            file: Arc::new(file),
            end: Arc::default(),
        };
        let (file, end, path) = (
            Arc::clone(&lease.file),
            Arc::clone(&lease.end),
            lease.path.clone(),
        );
        thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || keep(&file, &end, &path))
            .map_err(UfsError::io("start a thread to renew", &lease.path))?;
        Ok(lease)
    }

    /// Renews the lease, and says what time it is on the file system.
    pub fn renew(&self) -> Result<SystemTime, UfsError> {
        renew(&self.file)
            .and_then(|()| self.file.metadata()?.modified())
            .map_err(UfsError::io("renew", &self.path))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.end.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.end.1.notify_all();
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove the lease");
        }
    }
}

/// Renews the lease until the end.
fn keep(file: &File, (end, changed): &(Mutex<bool>, Condvar), path: &Path) {
    let mut ended = end.lock().unwrap_or_else(PoisonError::into_inner);
    while !*ended {
        ended = changed
            .wait_timeout_while(ended, RENEWAL, |ended| !*ended)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        if *ended {
            return;
        }
        drop(ended);
        if let Err(error) = renew(file) {
            tracing::warn!(?path, %error, "cannot renew the lease");
        }
        ended = end.lock().unwrap_or_else(PoisonError::into_inner);
    }
}

/// Sets the modification time to now, by the file system's clock where it is
/// that clock which sets times.
pub(crate) fn renew(file: &File) -> io::Result<()> {
    let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps {
        last_access: special(UTIME_OMIT),
        last_modification: special(UTIME_NOW),
    };
    rustix::fs::futimens(file, &times)?;
    Ok(())
}

/// What a lease looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Somebody under this kernel holds its lock.
    Held,
    /// It was made under this kernel, and nobody holds its lock.
    Abandoned,
    /// All that is known is when it was renewed last, by the file system's clock.
    Renewed(SystemTime),
}

/// A lease that lies on UFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLease {
    /// Where it is.
    pub path: PathBuf,
    /// Whose it is; `None` if the name is not of our form.
    pub owner: Option<Owner>,
}

impl FoundLease {
    pub(crate) fn new(root: &Path, name: &str) -> Self {
        Self {
            path: root.join(LEASES).join(name),
            owner: Owner::of_file(name),
        }
    }

    /// Looks at it now; `None` if it is gone.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn look(&self) -> Result<Option<Sign>, UfsError> {
        let error = |doing| UfsError::io(doing, &self.path);
        // Opened anew each time: only then does NFS ask the server.
        let opened = OpenOptions::new().read(true).write(true).open(&self.path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(other) => return Err(error("open")(other)),
        };
        let metadata = file.metadata().map_err(error("look at"))?;
        if metadata.nlink() == 0 {
            return Ok(None);
        }
        if self.owner.as_ref().is_some_and(Owner::is_here) {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Sign::Abandoned)),
                Err(TryLockError::WouldBlock) => return Ok(Some(Sign::Held)),
                // No locks here.
                Err(TryLockError::Error(_)) => {}
            }
        }
        let modified = metadata.modified().map_err(error("look at"))?;
        Ok(Some(Sign::Renewed(modified)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_read_back_from_names() {
        let owner = Owner::new().unwrap();
        assert_eq!(Owner::of_file(&owner.to_string()), Some(owner.clone()));
        let temporary = format!("{owner}.3.a.b.erofs");
        assert_eq!(Owner::of_file(&temporary), Some(owner.clone()));
        assert!(owner.is_here());
        for name in ["", "a", "a.b.c.d", "a.b.1", "..1.x"] {
            assert_eq!(Owner::of_file(name), None, "{name:?}");
        }
    }
}
