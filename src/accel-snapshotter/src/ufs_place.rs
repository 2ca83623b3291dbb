//! Where UFS is, for who writes to it again and again while it comes and goes.

use accel_client::mountinfo;
use accel_ufs::publish::Ufs;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::PathBuf;

/// The directory that is UFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UfsPlace {
    /// Its path.
    pub path: PathBuf,
    /// Whether it has to be on a file system that is mounted: else it is taken for the
    /// directory on the local disk that such a one is mounted at.
    pub mounted: bool,
}

impl UfsPlace {
    /// UFS, if it is there now.
    ///
    /// # Errors
    /// It is not.
    pub fn open(&self) -> Result<Ufs> {
        if self.mounted {
            let path = fs::canonicalize(&self.path)
                .with_context(|| format!("cannot open UFS {}", self.path.display()))?;
            let mounts = mountinfo::read().context("cannot read the list of mounts")?;
            ensure!(
                mountinfo::has_mount_of_its_own(&mounts, &path),
                "UFS is not mounted at {}",
                path.display()
            );
        }
        Ok(Ufs::open(&self.path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_where_nothing_is_mounted_is_refused_if_something_has_to_be() {
        let place = |path: &str, mounted| UfsPlace {
            path: path.into(),
            mounted,
        };
        place("/", false).open().unwrap();
        let refused = place("/", true).open().unwrap_err();
        assert!(refused.to_string().contains("not mounted"), "{refused}");
        place("/proc/self", true).open().unwrap();
    }
}
