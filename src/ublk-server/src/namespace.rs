//! The daemon's own mount namespace, free of mounts that pin its devices.
//!
//! A mount lives in every namespace that has a copy of it. If the daemon's
//! namespace kept a copy of an EROFS mount on one of its own devices, the device
//! would stay busy after everybody else had unmounted it; and as the last process
//! of its namespace the daemon would, on its way out, have to unmount a device
//! that it serves itself. So at start, before any thread and before the worker:
//!
//! 1. a namespace of its own, private: later mounts do not arrive;
//! 2. every copied mount beneath the run directory, and every mount of EROFS,
//!    overlay or an export on FUSE that nothing needed lies on, is detached.
//!
//! Mounts elsewhere stay, so binary, libraries and `/dev` are where they were. UFS is
//! read by workers in the namespace that the daemon was started in: what is mounted
//! there later is seen, and a copy of it here is not needed.

use anyhow::{Context, Result};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A line of `mountinfo`, as far as we look at it.
#[derive(Debug, PartialEq, Eq)]
struct MountLine {
    point: PathBuf,
    kind: String,
}

/// Leaves the namespace that this process was started in. `needed` are paths that
/// must stay reachable.
pub fn enter_private(run: &Path, needed: &[&Path]) -> Result<()> {
    unshare()
        .context("cannot make a mount namespace of our own: run as root with CAP_SYS_ADMIN")?;
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).context("cannot make the mount namespace private")?;
    let mut covers = Vec::new();
    let left = loop {
        let mut points = pins(run, needed)?;
        // The last one mounted first: it may lie on another.
        points.reverse();
        for point in points {
            if let Err(error) = rustix::mount::unmount(&point, UnmountFlags::DETACH) {
                tracing::debug!(path = %point.display(), %error, "cannot drop a copied mount");
            }
        }
        let left = pins(run, needed)?;
        match left.first().map(|left| lift_cover(left)).transpose()? {
            Some(Some(cover)) => covers.push(cover),
            None | Some(None) => break left,
        }
    };
    for (point, cover) in covers.into_iter().rev() {
        rustix::mount::move_mount(
            &cover,
            "",
            rustix::fs::CWD,
            &point,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .with_context(|| format!("cannot put the mount on {} back", point.display()))?;
    }
    if let Some(left) = left.first() {
        tracing::warn!(path = %left.display(), "a copied mount stays in the daemon's namespace");
    }
    Ok(())
}

/// Takes away the last mount that lies above `pin`, because nothing beneath it can be
/// reached: a sandbox mounts directories on themselves to make them writable. Gives it,
/// and where it was; `None` if there is none.
fn lift_cover(pin: &Path) -> Result<Option<(PathBuf, OwnedFd)>> {
    let text = crate::mountinfo::read().context("cannot read mountinfo")?;
    let lines: Vec<_> = text.lines().filter_map(parse).collect();
    let Some(at) = lines.iter().position(|line| line.point == pin) else {
        return Ok(None);
    };
    // What was mounted before the pin is what it lies on.
    let above = |line: &&MountLine| pin.starts_with(&line.point) && line.point != pin;
    let Some(cover) = lines[at..].iter().rev().find(above) else {
        return Ok(None);
    };
    let point = cover.point.clone();
    // With all that is mounted on it.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let what = || format!("cannot lift the mount on {}", point.display());
    let tree = rustix::mount::open_tree(rustix::fs::CWD, &point, flags).with_context(what)?;
    rustix::mount::unmount(&point, UnmountFlags::DETACH).with_context(what)?;
    tracing::debug!(path = %point.display(), "looked beneath a mount");
    Ok(Some((point, tree)))
}

fn unshare() -> rustix::io::Result<()> {
    accel_sys::unshare_mounts()
}

fn pins(run: &Path, needed: &[&Path]) -> Result<Vec<PathBuf>> {
    let text = crate::mountinfo::read().context("cannot read mountinfo")?;
    let run = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    let needed: Vec<_> = needed
        .iter()
        .map(|path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf()))
        .collect();
    let lines = text.lines().filter_map(parse);
    let pins = lines.filter(|line| is_pin(line, &run, &needed));
    Ok(pins.map(|line| line.point).collect())
}

/// Whether a copy of this mount could keep one of our devices busy.
fn is_pin(line: &MountLine, run: &Path, needed: &[PathBuf]) -> bool {
    if line.point.starts_with(run) && line.point != run {
        return true;
    }
    let kind = matches!(line.kind.as_str(), "erofs" | "overlay" | "fuse.image-accel");
    kind && !needed.iter().any(|path| path.starts_with(&line.point))
}

fn parse(line: &str) -> Option<MountLine> {
    let (front, back) = line.split_once(" - ")?;
    Some(MountLine {
        point: crate::mountinfo::unescape(front.split(' ').nth(4)?),
        kind: back.split(' ').next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pin_a_device_goes() {
        let run = Path::new("/run/image-accel");
        let needed = ["/srv/ufs".into(), "/usr/bin/x".into()];
        let drops = |point: &str, kind: &str| {
            let line = format!("36 35 98:0 / {point} rw,noatime - {kind} src rw");
            is_pin(&parse(&line).unwrap(), run, &needed)
        };
        assert!(drops("/run/image-accel/layers/0123", "erofs"));
        assert!(drops("/run/image-accel/exports/ab", "fuse"));
        assert!(drops("/mnt/image", "overlay"));
        assert!(drops("/mnt/with\\040space", "erofs"));
        assert!(!drops("/run/image-accel", "tmpfs"));
        assert!(!drops("/", "overlay"));
        assert!(!drops("/srv", "overlay"));
        assert!(!drops("/usr", "erofs"));
        assert!(!drops("/home", "ext4"));
    }
}
