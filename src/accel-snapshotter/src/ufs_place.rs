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
    /// What has to be a mount point, if anything: while nothing is mounted there the path is
    /// one on the local disk.
    pub mount_point: Option<PathBuf>,
}

impl UfsPlace {
    /// UFS, if it is there now.
    ///
    /// # Errors
    /// It is not.
    pub fn open(&self) -> Result<Ufs> {
        if let Some(point) = &self.mount_point {
            let point = fs::canonicalize(point)
                .with_context(|| format!("cannot open UFS {}", point.display()))?;
            let mounts = mountinfo::read().context("cannot read the list of mounts")?;
            ensure!(
                mountinfo::is_mount_point(&mounts, &point),
                "UFS is not mounted at {}",
                point.display()
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
        let place = |path: &str, point: Option<&str>| UfsPlace {
            path: path.into(),
            mount_point: point.map(PathBuf::from),
        };
        place("/usr", None).open().unwrap();
        place("/proc/self", Some("/proc")).open().unwrap();
        // What is mounted above is something else.
        let refused = place("/proc/self", Some("/proc/self")).open().unwrap_err();
        assert!(refused.to_string().contains("not mounted"), "{refused}");
    }
}
