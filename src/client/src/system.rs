//! What a client does to the kernel: EROFS, overlay and FUSE mounts.

use crate::loop_device::{self, loop_device};
use crate::mountinfo;
use crate::protocol::Command;
use crate::wire;
use accel_transport::fuse;
use accel_ufs::index::Root;
use accel_ufs::names::Uuid;
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
pub use rustix::mount::MountFlags;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use rustix::mount::{UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long a mount that looks busy is asked again: whoever looks at every mount
/// of the machine, or forks with a file open, is done in a moment.
const BUSY: Duration = Duration::from_secs(1);
/// How long the daemon may take to serve a file.
const SERVED: Duration = Duration::from_secs(60);
/// Where the UUID lies in an EROFS image: in the superblock, which is at 1024.
const UUID_OFFSET: u64 = 1024 + 48;
/// What statfs(2) calls EROFS.
const EROFS_MAGIC: rustix::fs::FsWord = 0xE0F5_E1E2;
/// The kernel takes option strings of less than a page.
const OPTIONS: usize = 4000;

/// A layer is mounted. Until this is dropped udev does not look into the loop device
/// that it may have: it reads a dozen places of each new one, and so a dozen chunks.
#[derive(Debug, Default)]
pub struct MountedLayer {
    unprobed: Option<File>,
}

/// Mounts a layer's device, or file, at `point`, which is made; nothing happens
/// if that is mounted there already. Read-only, and with these flags.
pub fn mount_layer(
    device: &Path,
    point: &Path,
    uuid: Uuid,
    flags: MountFlags,
) -> Result<MountedLayer> {
    let mut mounted = MountedLayer::default();
    if is_mounted(point, "erofs")? {
        if is_of(device, point) {
            return Ok(mounted);
        }
        // The device was lost; mounts of it that containers have stay as they are.
        detach(point)?;
    }
    fs::create_dir_all(point).with_context(|| format!("cannot make {}", point.display()))?;
    let failed = || format!("cannot mount {} at {}", device.display(), point.display());
    match mount_erofs(device, point, flags) {
        Ok(()) => {}
        // Before 6.12 EROFS wants a block device.
        Err(Errno::NOTBLK) => {
            let (path, locked) = loop_device(device)
                .with_context(|| format!("cannot make a loop device of {}", device.display()))?;
            mount_erofs(&path, point, flags).with_context(failed)?;
            mounted.unprobed = Some(locked);
        }
        Err(error) => return Err(error).with_context(failed),
    }
    let mut found = [0; 16];
    let read = File::open(device).and_then(|file| file.read_exact_at(&mut found, UUID_OFFSET));
    let wrong = match read {
        Ok(()) if found == uuid.0 => return Ok(mounted),
        Ok(()) => format!("it has the UUID {}, not {uuid}", Uuid(found)),
        Err(error) => format!("cannot read its UUID: {error}"),
    };
    drop(mounted);
    unmount_directory(point)?;
    bail!(
        "{} is not the layer it should be: {wrong}",
        device.display()
    );
}

/// Whether what is mounted at `point` is this block device. Files are taken to be what
/// is mounted: before one is served anew, what is mounted of it is taken away.
fn is_of(device: &Path, point: &Path) -> bool {
    match (fs::metadata(device), fs::symlink_metadata(point)) {
        (Ok(device), Ok(root)) if device.file_type().is_block_device() => {
            root.dev() == device.rdev()
        }
        (_, root) => root.is_ok(),
    }
}

fn mount_erofs(device: &Path, point: &Path, flags: MountFlags) -> rustix::io::Result<()> {
    rustix::mount::mount(device, point, "erofs", flags | MountFlags::RDONLY, None)
}

/// The directories of an overlay.
#[derive(Debug)]
pub struct Overlay<'a> {
    /// Lower directories by name in `base`, topmost first.
    pub lower: Vec<OsString>,
    /// Where the lower directories are.
    pub base: &'a Path,
    /// Where changes go, and overlayfs' own directory beside it.
    pub upper: Option<(&'a Path, &'a Path)>,
}

/// Mounts an overlay. Device nodes do not work in it: they come from an image.
pub fn mount_overlay(overlay: &Overlay<'_>, point: &Path) -> Result<()> {
    // Short relative names keep the option string short.
    rustix::process::chdir(overlay.base)
        .with_context(|| format!("cannot enter {}", overlay.base.display()))?;
    let options = options(overlay);
    let result = if options.len() < OPTIONS {
        mount_by_string(&options, overlay.upper.is_none(), point)
    } else {
        mount_by_parts(overlay, point).context(
            "this image has so many layers that the kernel must take them one by one, \
             which Linux does since 6.8",
        )
    };
    // Do not pin what was entered.
    let _ = rustix::process::chdir("/");
    result.with_context(|| format!("cannot mount an overlay at {}", point.display()))
}

fn options(overlay: &Overlay<'_>) -> Vec<u8> {
    let mut options = b"lowerdir=".to_vec();
    for (number, lower) in overlay.lower.iter().enumerate() {
        if number > 0 {
            options.push(b':');
        }
        options.extend(escape(lower));
    }
    if let Some((upper, work)) = overlay.upper {
        options.extend(b",upperdir=");
        options.extend(escape(upper.as_os_str()));
        options.extend(b",workdir=");
        options.extend(escape(work.as_os_str()));
    }
    options
}

/// Hides what has a meaning in the option string.
fn escape(path: &OsStr) -> Vec<u8> {
    let mut escaped = Vec::new();
    for &byte in path.as_bytes() {
        if matches!(byte, b',' | b':' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

fn mount_by_string(options: &[u8], read_only: bool, point: &Path) -> Result<()> {
    let options = CString::new(options).context("a path has a zero byte")?;
    let mut flags = MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    rustix::mount::mount("overlay", point, "overlay", flags, &*options)?;
    Ok(())
}

fn mount_by_parts(overlay: &Overlay<'_>, point: &Path) -> Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for lower in &overlay.lower {
        fsconfig_set_string(&context, "lowerdir+", lower)?;
    }
    let mut flags = MountAttrFlags::MOUNT_ATTR_NODEV;
    match overlay.upper {
        Some((upper, work)) => {
            fsconfig_set_string(&context, "upperdir", upper)?;
            fsconfig_set_string(&context, "workdir", work)?;
        }
        None => flags |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    fsconfig_set_string(&context, "source", "overlay")?;
    fsconfig_create(&context)?;
    let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mounted, "", rustix::fs::CWD, point, flags)?;
    Ok(())
}

/// Where the layer with this device, or file, is mounted, by a text that [`mountinfo::read`]
/// gave; the last one mounted first.
pub fn points_of_layer(mounts: &str, device: &Path) -> Vec<PathBuf> {
    let mounted = mountinfo::mounts(mounts, "erofs").into_iter().rev();
    let from_it = |from: &Path| from == device || loop_device::is_over(from, device);
    let found = mounted.filter(|(_, from)| from_it(from));
    found.map(|(point, _)| point).collect()
}

/// Whether the topmost mount at `point` is of this kind.
pub fn is_mounted(point: &Path, kind: &str) -> Result<bool> {
    let point = match point.canonicalize() {
        Ok(point) => point,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        // A dead FUSE connection answers like this; it is mounted.
        Err(_) => point.to_owned(),
    };
    let kinds = mountinfo::kinds_at(&point).context("cannot read the list of mounts")?;
    Ok(kinds.last().is_some_and(|last| last == kind))
}

/// Whether anything is mounted at `point` (a real path). Neither what is mounted there nor
/// who serves it is asked for anything; what the directory is in is. Where that may not
/// answer, [`mountinfo::is_mount_point`] is the one to ask.
pub fn is_mount_point(point: &Path) -> Result<bool> {
    // A node has thousands of mounts: their list takes the kernel longer than a container
    // may wait, and each of its layers asks.
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    match statx(CWD, point, flags, StatxFlags::empty()) {
        // Linux 5.8 and later.
        Ok(found)
            if found
                .stx_attributes_mask
                .contains(StatxAttributes::MOUNT_ROOT) =>
        {
            Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        }
        Err(Errno::NOENT) => Ok(false),
        // What is mounted may be dead, and say so.
        Ok(_) | Err(_) => {
            let kinds = mountinfo::kinds_at(point).context("cannot read the list of mounts")?;
            Ok(!kinds.is_empty())
        }
    }
}

/// Whether EROFS is mounted at `point` (a real path), topmost. Who serves its image is asked
/// for nothing.
pub fn is_erofs(point: &Path) -> Result<bool> {
    Ok(is_mount_point(point)?
        // Of another kind, or gone meanwhile.
        && rustix::fs::statfs(point).is_ok_and(|found| found.f_type == EROFS_MAGIC))
}

/// Unmounts what is at `point`, if anything is.
pub fn unmount_point(point: &Path) -> Result<()> {
    let since = Instant::now();
    loop {
        match rustix::mount::unmount(point, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) if since.elapsed() < BUSY => thread::sleep(BUSY / 50),
            Err(Errno::BUSY) => bail!(
                "{} is in use: a process has a file or its working directory there (see fuser -vm {})",
                point.display(),
                point.display()
            ),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot unmount {}", point.display()));
            }
        }
    }
}

/// Takes away what is mounted at `point`, also if it is in use: it ends with its
/// last user. For what cannot be read any more.
pub fn detach(point: &Path) -> Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    loop {
        match rustix::mount::unmount(point, flags) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot unmount {}", point.display()));
            }
        }
    }
}

/// Unmounts `point` and removes the directory.
pub fn unmount_directory(point: &Path) -> Result<()> {
    unmount_point(point)?;
    match fs::remove_dir(point) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", point.display()))
        }
        _ => Ok(()),
    }
}

/// Unmounts the FUSE file at `path` and removes its mount point.
pub fn unmount_file(path: &Path) -> Result<()> {
    unmount_point(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Mounts a FUSE file for a layer and gives its connection to the daemon.
pub fn serve_file(socket: &Path, root: Root, path: &Path) -> Result<()> {
    // One that is there is dead: nobody has its connection any more.
    detach(path)?;
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let served = fuse::mount_file(path)
        .map_err(anyhow::Error::from)
        .and_then(|connection| {
            wire::ask_for::<()>(
                socket,
                &Command::Serve { root },
                Some(&connection),
                Some(SERVED),
            )
        })
        // The kernel learns from the first time that opening and closing are nothing to
        // ask the daemon about. Later there may be none, and what closes a file then, be
        // it a program that is started in its place, would wait for it.
        .and_then(|()| {
            File::open(path)?;
            Ok(())
        });
    if served.is_err() {
        unmount_file(path)?;
    }
    served
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink("/proc", path("link")).unwrap();
        for mounted in ["/", "/proc"] {
            assert!(is_mount_point(Path::new(mounted)).unwrap(), "{mounted}");
            // Not by us.
            assert!(!is_erofs(Path::new(mounted)).unwrap(), "{mounted}");
        }
        for other in ["", "file", "link", "missing", "file/beneath"] {
            assert!(!is_mount_point(&path(other)).unwrap(), "{other:?}");
        }
    }

    /// The list is long on a busy node, and it is asked for every layer of every start.
    #[test]
    fn mount_points_are_found_without_the_list_of_mounts() {
        let without = std::process::Command::new("unshare")
            .args(["--mount", "sh", "-ec"])
            .arg("mount -t tmpfs none /proc; exec \"$0\" --exact --ignored \"$1\"")
            .arg(std::env::current_exe().unwrap())
            .arg("system::tests::where_there_is_no_list")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&without.stdout);
        assert!(without.status.success(), "{without:?}");
        assert!(said.contains("1 passed"), "{said}");
    }

    #[test]
    #[ignore = "run by the one before, where /proc is empty"]
    fn where_there_is_no_list() {
        assert!(mountinfo::read().is_err());
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/none")).unwrap());
    }

    #[test]
    fn overlay_options_name_every_directory() {
        let overlay = Overlay {
            lower: vec!["top".into(), "base".into()],
            base: Path::new("/"),
            upper: Some((Path::new("/a,b/upper"), Path::new("/a:b/work"))),
        };
        let expected = "lowerdir=top:base,upperdir=/a\\,b/upper,workdir=/a\\:b/work";
        assert_eq!(String::from_utf8(options(&overlay)).unwrap(), expected);
    }
}
