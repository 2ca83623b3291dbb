//! What can go wrong on UFS, with what to do about it.

use crate::record::RecordError;
use std::io;
use std::path::{Path, PathBuf};

/// A failure on UFS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UfsError {
    /// The UFS directory is not there. It is never made: a mount that is missing
    /// must not turn into a directory on the local disk.
    #[error(
        "the UFS directory {path:?} does not exist: mount the shared file system there, or make the directory if it is to be a local one"
    )]
    Missing {
        /// What was given.
        path: PathBuf,
    },
    /// The UFS path is something else.
    #[error("{path:?} is not a directory: UFS must be one")]
    NotADirectory {
        /// What was given.
        path: PathBuf,
    },
    /// The UFS path leads elsewhere than when it was opened.
    #[error(
        "the UFS directory {path:?} is not the one any more that it was at the start: it was unmounted, removed or mounted over; mount it again, then start anew"
    )]
    Vanished {
        /// The directory.
        path: PathBuf,
    },
    /// A temporary file of this process was removed by somebody else.
    #[error(
        "the unfinished file {path:?} was removed by somebody else: this process was suspended, or could not reach UFS, for so long that mkfs-accel gc took it for dead; start anew"
    )]
    TakenForDead {
        /// The temporary file.
        path: PathBuf,
    },
    /// An operation on a file failed.
    #[error("cannot {doing} {path:?}: {error}{}", hint(.error))]
    Io {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed; part of the message, hence not its source.
        error: io::Error,
    },
    /// Something else already has the name.
    #[error(
        "{path:?} is already there with {there} bytes, but {here} were to be published under this name: what is there is damaged, or was made by another version of the converter; look at both, then remove it and its index"
    )]
    Differs {
        /// The final name.
        path: PathBuf,
        /// Size of what is there.
        there: u64,
        /// Size of what was made.
        here: u64,
    },
    /// A record that cannot be used.
    #[error("{path:?}: {error}")]
    Record {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        error: RecordError,
    },
    /// A directory or file whose path cannot be part of a source's canonical text.
    #[error("{path:?} cannot be named as an image source: {why}")]
    SourcePath {
        /// Its real path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Nothing of this name was converted.
    #[error(
        "{image} is not on UFS {ufs:?}: convert it first (mkfs-accel convert {image} --ufs {})",
        .ufs.display()
    )]
    NotConverted {
        /// The image as given, in canonical form.
        image: String,
        /// Where it was looked for.
        ufs: PathBuf,
    },
    /// The process is being ended; its temporaries are gone.
    #[error("interrupted")]
    Interrupted,
}

impl UfsError {
    /// Says what was being done to `path` when `source` happened; fit for
    /// `map_err`.
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { doing, path, error }
    }
}

/// What to do about an error of the operating system, where we know.
fn hint(error: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::StorageFull => {
            "; the file system is full: make room (mkfs-accel gc removes unfinished files) and try again"
        }
        Kind::QuotaExceeded => "; the quota of this user is used up",
        Kind::PermissionDenied => {
            "; this user may not do that there: check owner and mode of the UFS directory, and on NFS the export's root_squash"
        }
        Kind::ReadOnlyFilesystem => "; the file system is mounted read-only",
        Kind::StaleNetworkFileHandle => "; the NFS server no longer knows the file: mount it anew",
        _ => "",
    }
}
