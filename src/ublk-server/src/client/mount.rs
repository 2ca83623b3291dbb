//! `mount` and `unmount`.
//!
//! ```text
//! DIR                          overlay, read-only or with --rw UPPER
//!  └ RUN/layers/<root>         EROFS, once per layer, shared by images
//!     └ /dev/ublkbN or RUN/exports/<root>
//! ```
//!
//! What a mount needs is noted in `RUN/mounts/` before the first step, so that
//! `unmount` can take back whatever a client that died had done. Both are the
//! same procedure: a failed mount is undone by an unmount.

use super::{check_daemon, image_name, lock, prepare};
use crate::lock::Lock;
use crate::paths::Paths;
use crate::protocol::{Attached, AttachedLayer, Command, Holder, Status};
use crate::wire;
use accel_client::exports::{device, release};
use accel_client::system::{self, MountFlags, MountedLayer, Overlay};
use accel_ufs::index::Root;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

/// An empty directory below the only layer of an image: an overlay has two.
const EMPTY: &str = "empty";

/// Layers that are mounted at the same time.
const AT_ONCE: usize = 4;

/// One mounted image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Noted {
    /// Number of the format.
    layout: u32,
    pub(super) directory: PathBuf,
    image: String,
    /// Lowest first.
    pub(super) layers: Vec<Root>,
}

pub(super) fn noted(paths: &Paths) -> Result<Vec<Noted>> {
    let files = match fs::read_dir(paths.mounts()) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut notes = Vec::new();
    for file in files {
        let path = file?.path();
        let json = fs::read(&path)?;
        let note = serde_json::from_slice(&json);
        notes.push(note.with_context(|| format!("{} cannot be read", path.display()))?);
    }
    Ok(notes)
}

/// The real path of a directory that must exist.
fn real_directory(path: &Path) -> Result<PathBuf> {
    let real = path.canonicalize().with_context(|| {
        format!(
            "cannot find the directory {}: make it first",
            path.display()
        )
    })?;
    if !real.is_dir() {
        bail!("{} is not a directory", path.display());
    }
    if real.to_str().is_none() {
        bail!("the path of {} is not UTF-8", path.display());
    }
    Ok(real)
}

/// `ublk-server mount IMAGE DIR [--rw UPPER]`
pub fn mount(paths: &Paths, image: &str, directory: &Path, upper: Option<&Path>) -> Result<()> {
    check_daemon(paths)?;
    let image = image_name(image)?;
    let directory = real_directory(directory)?;
    let prepared = prepare(paths, &image);
    prepared.with_context(|| format!("cannot mount {image}"))?;
    let lock = lock(paths)?;
    let taken = system::is_mount_point(&directory);
    if !matches!(taken, Ok(false)) {
        leave(paths, lock);
        taken?;
        bail!("something is already mounted at {}", directory.display());
    }
    let holder = directory.to_string_lossy().into_owned();
    let command = Command::Attach {
        image: image.clone(),
        holder: Some(holder.clone()),
    };
    let result = wire::ask::<Attached>(&paths.socket, &command, None).and_then(|attached| {
        let note = Noted {
            layout: 1,
            directory: directory.clone(),
            image: image.clone(),
            layers: attached.layers.iter().map(|layer| layer.root).collect(),
        };
        mount_attached(paths, &attached, &note, upper).inspect_err(|_| {
            if let Err(error) = take_back(paths, &note) {
                tracing::error!(error = format!("{error:#}"), "cannot undo the mount");
            }
        })
    });
    leave(paths, lock);
    // Whoever looks at new devices may do so once all is mounted.
    let _layers = result.with_context(|| format!("cannot mount {image}"))?;
    let command = Command::Mounted { holder };
    if let Err(error) = wire::ask::<()>(&paths.socket, &command, None) {
        tracing::warn!(
            error = format!("{error:#}"),
            "metadata will not be fetched ahead"
        );
    }
    Ok(())
}

fn mount_attached(
    paths: &Paths,
    attached: &Attached,
    note: &Noted,
    upper: Option<&Path>,
) -> Result<Vec<MountedLayer>> {
    if note.layers.is_empty() {
        bail!("the image has no layers");
    }
    fs::create_dir_all(paths.mounts())?;
    let path = paths.note(&note.directory);
    // Half a note would be in the way of every other mount.
    let unfinished = paths.unfinished_note();
    fs::write(&unfinished, serde_json::to_vec_pretty(note)?)
        .and_then(|()| fs::rename(&unfinished, &path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    let mounted = mount_layers(paths, &attached.layers)?;
    // Topmost first. Of a layer that comes twice, the lower one shows nothing
    // that the upper one does not hide or show as well; overlayfs takes it once.
    let mut seen = HashSet::new();
    let top_down = note.layers.iter().rev().filter(|root| seen.insert(**root));
    let name = |root: &Root| paths.layer(*root).file_name().map(OsString::from);
    let mut lower: Vec<_> = top_down.filter_map(name).collect();
    let dirs = upper.map(upper_directories).transpose()?;
    if lower.len() == 1 && dirs.is_none() {
        fs::create_dir_all(paths.layers().join(EMPTY))?;
        lower.push(EMPTY.into());
    }
    let overlay = Overlay {
        lower,
        base: &paths.layers(),
        upper: dirs.as_ref().map(|(upper, work)| (&**upper, &**work)),
    };
    system::mount_overlay(&overlay, &note.directory)?;
    Ok(mounted)
}

/// Mounts layers, several at a time: each waits for the daemon in between. When this
/// returns, nobody mounts any more, also after an error.
fn mount_layers(paths: &Paths, layers: &[AttachedLayer]) -> Result<Vec<MountedLayer>> {
    let mut seen = HashSet::new();
    let once = layers.iter().filter(|layer| seen.insert(layer.root));
    let once: Vec<_> = once.collect();
    let mount = |layer: &AttachedLayer| {
        let device = device(paths, layer)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        system::mount_layer(&device, &paths.layer(layer.root), layer.uuid, flags)
            .with_context(|| format!("cannot mount {}", layer.name))
    };
    let (once, mount) = (&once, &mount);
    let some = |first: usize| -> Result<Vec<MountedLayer>> {
        let layers = once.iter().skip(first).step_by(AT_ONCE);
        layers.map(|layer| mount(layer)).collect()
    };
    let mounted = thread::scope(|scope| {
        let others = 1..AT_ONCE.min(once.len());
        let others = others.map(|first| scope.spawn(move || some(first)));
        let others: Vec<_> = others.collect();
        let mut mounted = vec![some(0)];
        for other in others {
            mounted.push(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        mounted
    });
    let mounted = mounted.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(mounted.into_iter().flatten().collect())
}

fn upper_directories(upper: &Path) -> Result<(PathBuf, PathBuf)> {
    let make = |name: &str| {
        let path = upper.join(name);
        fs::create_dir_all(&path)
            .and_then(|()| path.canonicalize())
            .with_context(|| format!("cannot make {}", path.display()))
    };
    Ok((make("upper")?, make("work")?))
}

/// `ublk-server unmount DIR`
pub fn unmount(paths: &Paths, directory: &Path) -> Result<()> {
    // A mount whose daemon or device is gone may refuse to be looked at.
    let real = directory.canonicalize();
    let directory = real.or_else(|_| std::path::absolute(directory))?;
    let path = paths.note(&directory);
    if !path.exists() {
        if release_unnoted(paths, &directory)? {
            return Ok(());
        }
        bail!(
            "no image is mounted at {} by way of {}",
            directory.display(),
            paths.socket.display()
        );
    }
    let lock = lock(paths)?;
    let result = fs::read(&path)
        .with_context(|| format!("cannot read {}", path.display()))
        .and_then(|json| {
            let note: Noted = serde_json::from_slice(&json)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            take_back(paths, &note)
        });
    leave(paths, lock);
    result.with_context(|| format!("cannot unmount {}", directory.display()))
}

/// Releases what a client had asked for that died before it noted anything, or
/// that was unmounted while no daemon served. False if there is no such thing.
fn release_unnoted(paths: &Paths, directory: &Path) -> Result<bool> {
    if system::is_mount_point(directory)? || check_daemon(paths).is_err() {
        return Ok(false);
    }
    let lock = lock(paths)?;
    let holder = Holder::Mount(directory.to_string_lossy().into_owned());
    let released = release(paths, holder);
    leave(paths, lock);
    released
}

/// Undoes a mount, whole or in part. May be repeated after an error.
pub(super) fn take_back(paths: &Paths, note: &Noted) -> Result<()> {
    if system::is_mounted(&note.directory, "overlay")? {
        system::unmount_point(&note.directory)?;
    }
    let others: Vec<_> = noted(paths)?
        .into_iter()
        .filter(|other| other.directory != note.directory)
        .flat_map(|other| other.layers)
        .collect();
    let unused = || note.layers.iter().filter(|root| !others.contains(root));
    for root in unused() {
        system::unmount_directory(&paths.layer(*root))?;
    }
    let holder = Holder::Mount(note.directory.to_string_lossy().into_owned());
    if let Err(error) = check_daemon(paths) {
        tracing::warn!(
            error = format!("{error:#}"),
            "the daemon is not told; it finds out when it starts"
        );
        for root in unused() {
            system::unmount_file(&paths.export(*root))?;
        }
    } else {
        release(paths, holder)?;
        // Of a client that died after the daemon had ended exports and before it
        // took their files away.
        let is_there = |root: &&Root| {
            let file = fs::symlink_metadata(paths.export(**root));
            !file.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let left: Vec<_> = unused().filter(is_there).collect();
        if !left.is_empty() {
            let status: Status = wire::ask(&paths.socket, &Command::Status, None)?;
            for root in left {
                if !status.exports.iter().any(|export| export.root == *root) {
                    system::unmount_file(&paths.export(*root))?;
                }
            }
        }
    }
    match fs::remove_file(paths.note(&note.directory)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes what is empty, and ends the lock.
pub(super) fn leave(paths: &Paths, lock: Lock) {
    if !paths.mounts().exists() || fs::remove_dir(paths.mounts()).is_ok() {
        // Some overlay may still have it otherwise.
        let _ = fs::remove_dir(paths.layers().join(EMPTY));
    }
    let _ = fs::remove_file(paths.unfinished_note());
    lock.remove();
    paths.tidy();
}
