//! End-to-end tests, run as root against the built programs, from outside: nothing
//! here links any other room of the workspace.
//!
//! * `tests/fixtures OUTDIR` makes, once, on any machine: a UFS directory with
//!   converted images, and beside it what an ordinary unpack of the same images
//!   looks like ([`fixture`]).
//! * `accel-e2e --fixtures DIR --bin DIR --transport ublk|fuse` runs the checks
//!   ([`checks`]) wherever the kernel has what the transport needs: on this machine,
//!   or in the test guest, with the same files.
//! * `tree-manifest DIR` writes a directory tree as text, one line per entry
//!   ([`tree`]); two trees are equal when their manifests are.
//!
//! Each check starts a daemon of its own and takes it down again ([`daemon`]), so the
//! checks run one after the other and in any order.

pub mod checks;
pub mod daemon;
pub mod fixture;
pub mod leftovers;
pub mod nfs;
pub mod random;
pub mod snapshotter;
pub mod torture;
pub mod tree;

use std::path::{Path, PathBuf};

/// An error without a cause.
pub fn fail(text: &'static str) -> anyhow::Error {
    anyhow::Error::msg(text)
}

/// What all checks are given on the command line.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Directory of `ublk-server`, `mkfs-accel` and `ublk-server-unverified`.
    pub bin: PathBuf,
    /// What `tests/fixtures` made.
    pub fixtures: PathBuf,
    /// Value for `ublk-server serve --transport`.
    pub transport: String,
    /// Where checks put their temporary files.
    pub scratch: PathBuf,
}

impl Setting {
    /// The node daemon and its client.
    pub fn ublk_server(&self) -> PathBuf {
        self.bin.join("ublk-server")
    }

    /// The same, built with verification switched off.
    pub fn unverified_ublk_server(&self) -> PathBuf {
        self.bin.join("ublk-server-unverified")
    }

    /// The UFS directory of all fixtures. Nobody writes to it.
    pub fn ufs(&self) -> PathBuf {
        self.fixtures.join("ufs")
    }

    /// A new temporary directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch_dir(&self) -> anyhow::Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new()
            .prefix("accel-e2e.")
            .tempdir_in(&self.scratch)?)
    }
}

/// Makes the kernel forget what it has read, so that the next read comes from the
/// daemon again.
///
/// # Errors
/// When the kernel refuses: it needs root.
pub fn drop_caches() -> anyhow::Result<()> {
    rustix::fs::sync();
    write_file(Path::new("/proc/sys/vm/drop_caches"), b"3")
}

fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use anyhow::Context as _;
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}
