//! Mounts that show files with other owners: what a user namespace makes of them.
//!
//! The kernel takes a mapping from a user namespace (mount_setattr(2)). One is made by
//! a process of its own, which ends as soon as the namespace is held open here.

use anyhow::{Context, Result, bail};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long it may take to start a process.
const PATIENCE: Duration = Duration::from_secs(10);

/// A user namespace with these mappings: `INSIDE:OUTSIDE:LENGTH`, several with commas.
pub fn user_namespace(uids: &str, gids: &str) -> Result<OwnedFd> {
    // It waits for its standard input to end.
    let mut child = Command::new("unshare")
        .args(["--user", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run unshare, which makes user namespaces")?;
    let made = of_process(&mut child, uids, gids);
    let _ = child.kill();
    let _ = child.wait();
    made.context("cannot make a user namespace")
}

fn of_process(child: &mut Child, uids: &str, gids: &str) -> Result<OwnedFd> {
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    let namespace = process.join("ns/user");
    let ours = fs::read_link("/proc/self/ns/user")?;
    let since = Instant::now();
    while fs::read_link(&namespace)? == ours {
        if let Some(status) = child.try_wait()? {
            bail!("unshare ended with {status}");
        }
        if since.elapsed() > PATIENCE {
            bail!("unshare does nothing");
        }
        thread::sleep(Duration::from_millis(1));
    }
    for (file, maps) in [("uid_map", uids), ("gid_map", gids)] {
        let lines: String = maps
            .split(',')
            .map(|map| map.replace(':', " ") + "\n")
            .collect();
        fs::write(process.join(file), lines).with_context(|| format!("the mapping {maps:?}"))?;
    }
    Ok(File::open(&namespace)?.into())
}

/// Mounts what is mounted at `source`, or the directory, once more at `point`, which is
/// made, as the namespace sees it.
pub fn mount_mapped(source: &Path, point: &Path, namespace: &OwnedFd) -> Result<()> {
    fs::create_dir_all(point).with_context(|| format!("cannot make {}", point.display()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags)
        .with_context(|| format!("cannot clone the mount of {}", source.display()))?;
    accel_sys::map_mount_ids(tree.as_fd(), namespace.as_fd())
        .with_context(|| format!("cannot map the ids of {}", source.display()))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, point, flags)
        .with_context(|| format!("cannot mount {}", point.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_that_makes_no_sense_is_an_error() {
        for wrong in ["", "x", "0:0:0"] {
            user_namespace(wrong, "0:1000:1").unwrap_err();
        }
    }
}
