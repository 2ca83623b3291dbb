//! `gc` and `shutdown`, and what `list` says of leftovers.
//!
//! A leftover is a device that no journal knows, a mount that no note knows, or a
//! note of a mount that is not there. They come from clients or daemons that were
//! killed half-way. What somebody uses is told and stays: an unmount here is never a
//! lazy one, and a device that is open is not stopped.

use super::lock;
use super::mount::{Noted, leave, noted, take_back};
use super::users::{self, Containers};
use crate::journal::Journal;
use crate::lock::Lock;
use crate::orphans;
use crate::paths::Paths;
use crate::protocol::{Command, DeviceView, Holder, HolderStatus, Orphan, Status};
use crate::{mountinfo, wire};
use accel_client::exports::release;
use accel_client::system;
use accel_transport::ublk::Inventory;
use accel_ufs::index::Root;
use anyhow::{Context, Result, bail};
use std::collections::HashSet;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the daemon may take to end.
const END: Duration = Duration::from_secs(120);

/// Something that nobody will come back for.
#[derive(Debug)]
enum Leftover {
    /// A note of a mount that is not there, or whose device is not served.
    Note(Noted, &'static str),
    /// A mounted layer that no note knows.
    Layer(PathBuf),
    /// A FUSE file that is not served.
    File(PathBuf),
    /// A mount that the daemon counts and of which there is no note.
    Holder(String),
}

impl Leftover {
    fn describe(&self) -> String {
        match self {
            Self::Note(note, why) => format!("mount {}: {why}", note.directory.display()),
            Self::Layer(path) => format!("layer {}: no mount needs it", path.display()),
            Self::File(path) => format!("file {}: nobody serves it", path.display()),
            Self::Holder(holder) => format!("exports held by {holder}, which is not mounted"),
        }
    }

    /// Ends it, unless it is in use.
    fn end(&self, paths: &Paths) -> Result<()> {
        match self {
            Self::Note(note, _) => {
                take_back(paths, note).map_err(|error| with_users(error, &note.directory))
            }
            Self::Layer(path) => {
                system::unmount_directory(path).map_err(|error| with_users(error, path))
            }
            Self::File(path) => system::unmount_file(path).map_err(|error| with_users(error, path)),
            Self::Holder(holder) => release(paths, Holder::Mount(holder.clone())).map(drop),
        }
    }
}

fn with_users(error: anyhow::Error, point: &Path) -> anyhow::Error {
    match users::of_mount(point) {
        users if users.is_empty() => error,
        users => error.context(format!("in use by {users}")),
    }
}

/// Where something of this kind is mounted.
fn points(mounts: &str, kind: &str) -> Vec<PathBuf> {
    let found = mountinfo::mounts(mounts, kind).into_iter();
    found.map(|(point, _)| point).collect()
}

/// What is left over besides devices. The caller has the clients' lock.
fn leftovers(paths: &Paths, status: &Status) -> Result<Vec<Leftover>> {
    let mounts = mountinfo::read().context("cannot read the list of mounts")?;
    let overlays = points(&mounts, "overlay");
    let served: HashSet<Root> = status.exports.iter().map(|export| export.root).collect();
    let notes = noted(paths)?;
    let mut found = Vec::new();
    let mut needed = HashSet::new();
    let mut directories = HashSet::new();
    for note in notes {
        needed.extend(note.layers.iter().map(|root| paths.layer(*root)));
        directories.insert(note.directory.to_string_lossy().into_owned());
        if !overlays.contains(&note.directory) {
            found.push(Leftover::Note(note, "it is noted, but not mounted"));
        } else if !note.layers.iter().all(|root| served.contains(root)) {
            found.push(Leftover::Note(note, "a device of it is gone"));
        }
    }
    let layers = points(&mounts, "erofs").into_iter();
    let layers = layers.filter(|point| point.parent() == Some(&paths.layers()));
    let unneeded: HashSet<_> = layers.filter(|point| !needed.contains(point)).collect();
    found.extend(unneeded.into_iter().map(Leftover::Layer));
    let exports: HashSet<_> = served.iter().map(|root| paths.export(*root)).collect();
    for file in fs::read_dir(paths.exports())
        .into_iter()
        .flatten()
        .flatten()
    {
        if !exports.contains(&file.path()) {
            found.push(Leftover::File(file.path()));
        }
    }
    let holders = status.holders.iter().map(|holder| &holder.holder);
    let holders = holders.filter(|holder| holder.starts_with('/'));
    for holder in holders.filter(|holder| !directories.contains(*holder)) {
        found.push(Leftover::Holder(holder.clone()));
    }
    Ok(found)
}

fn device(orphan: &Orphan) -> String {
    format!(
        "device /dev/ublkb{} that no journal knows, {}",
        orphan.device, orphan.state
    )
}

/// What `list` adds, a line each. While another client mounts, only devices.
pub(super) fn show(paths: &Paths, status: &Status) -> Result<Vec<String>> {
    let orphans = Command::Orphans { remove: Vec::new() };
    let orphans: Vec<Orphan> = wire::ask(&paths.socket, &orphans, None)?;
    let mut lines: Vec<_> = orphans.iter().map(device).collect();
    // What a mount that is under way has made would look like a leftover.
    if let Ok(Some(lock)) = Lock::attempt(&paths.client_lock()) {
        let found = leftovers(paths, status);
        lock.remove();
        lines.extend(found?.iter().map(Leftover::describe));
    }
    Ok(lines)
}

/// `ublk-server gc`: says what was removed, and what is in use and stays.
pub fn gc(paths: &Paths) -> Result<String> {
    let lock = lock(paths)?;
    let result = match UnixStream::connect(&paths.socket) {
        Ok(_) => gc_served(paths),
        Err(_) => gc_unserved(paths),
    };
    leave(paths, lock);
    result
}

fn gc_served(paths: &Paths) -> Result<String> {
    let mut text = String::new();
    let status: Status = wire::ask(&paths.socket, &Command::Status, None)?;
    // Mounts first: they keep devices busy.
    for leftover in leftovers(paths, &status)? {
        let what = leftover.describe();
        text += &match leftover.end(paths) {
            Ok(()) => format!("removed: {what}\n"),
            Err(error) => format!("kept: {what}: {error:#}\n"),
        };
    }
    let ask = |remove| -> Result<Vec<Orphan>> {
        wire::ask(&paths.socket, &Command::Orphans { remove }, None)
    };
    let before = ask(Vec::new())?;
    let (unused, mut kept) = unused(&before);
    kept.extend(ask(unused)?);
    text += &told(&before, &kept);
    Ok(text)
}

/// Those that no process has open, and why the others have to stay. What is mounted
/// the kernel knows.
fn unused(orphans: &[Orphan]) -> (Vec<u32>, Vec<Orphan>) {
    let (mut unused, mut used) = (Vec::new(), Vec::new());
    for orphan in orphans {
        let path = format!("/dev/ublkb{}", orphan.device);
        match users::of_file(Path::new(&path)) {
            users if users.is_empty() => unused.push(orphan.device),
            users => used.push(Orphan {
                kept: Some(format!("in use by {users}")),
                ..orphan.clone()
            }),
        }
    }
    (unused, used)
}

/// Without a daemon: devices only. What else there is may be needed by the next one.
fn gc_unserved(paths: &Paths) -> Result<String> {
    let lock = Lock::attempt(&paths.daemon_lock())?;
    let lock = lock.context("a daemon is starting or ending: try again")?;
    let result = (|| {
        let journal = Journal::open(&paths.run, Path::new(""))?;
        let known = journal.load().context("cannot read the journal")?;
        let known = known.iter().map(|entry| entry.device).collect();
        let Ok(inventory) = Inventory::open(orphans::BOUND) else {
            return Ok(String::new());
        };
        let found = || orphans::find(&inventory, orphans::mark(&paths.run), &known);
        let before = orphans::end(&inventory, found()?, |_| false);
        let (unused, mut kept) = unused(&before);
        kept.extend(orphans::end(&inventory, found()?, |info| {
            unused.contains(&info.id)
        }));
        Ok(told(&before, &kept))
    })();
    let _ = fs::remove_dir(paths.run.join("journal"));
    lock.remove();
    result
}

fn told(before: &[Orphan], after: &[Orphan]) -> String {
    let mut text = String::new();
    for orphan in before {
        // The first one says why.
        let left = after.iter().find(|left| left.device == orphan.device);
        text += &match left {
            None => format!("removed: {}\n", device(orphan)),
            Some(left) => {
                let why = left.kept.as_deref().unwrap_or("in use");
                format!("kept: {}: {why}\n", device(orphan))
            }
        };
    }
    text
}

/// `ublk-server shutdown`: unmounts and detaches everything that nobody uses, and
/// unless `leave_daemon`, ends the daemon if nothing is left. An error names what is
/// in use, and by whom; that goes on being served.
pub fn shutdown(paths: &Paths, leave_daemon: bool) -> Result<()> {
    let lock = lock(paths)?;
    let result = end_all(paths);
    leave(paths, lock);
    let left = result?;
    if !left.is_empty() {
        bail!(
            "what is in use goes on being served:\n  {}",
            left.join("\n  ")
        );
    }
    if leave_daemon {
        return Ok(());
    }
    let status: Status = wire::ask(&paths.socket, &Command::Status, None)?;
    let pid = i32::try_from(status.pid).ok();
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    let pid = pid.context("the daemon has no process id")?;
    let gone = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
    let gone = gone.context("cannot watch the daemon")?;
    rustix::process::pidfd_send_signal(&gone, rustix::process::Signal::TERM)
        .context("cannot end the daemon")?;
    let since = Instant::now();
    let limit = rustix::event::Timespec::try_from(END).ok();
    loop {
        let mut polled = [rustix::event::PollFd::new(
            &gone,
            rustix::event::PollFlags::IN,
        )];
        match rustix::event::poll(&mut polled, limit.as_ref()) {
            Ok(1) => return Ok(()),
            Err(rustix::io::Errno::INTR) if since.elapsed() < END => {}
            _ => bail!("the daemon (process {}) does not end", status.pid),
        }
    }
}

/// Ends what can be ended; says what cannot.
fn end_all(paths: &Paths) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let containers = Containers::look();
    let notes = noted(paths)?;
    let images = notes.iter().map(|note| note.directory.clone());
    let images: Vec<_> = images.collect();
    for note in &notes {
        // A container may be on a copy of the mount, which goes on without this one.
        let layers = note.layers.iter().map(|root| paths.layer(*root));
        let layers: Vec<_> = layers.collect();
        let users = containers.of_image(&note.directory, &layers, &images);
        if !users.is_empty() {
            left.push(format!("{}: in use by {users}", note.directory.display()));
            continue;
        }
        if let Err(error) = take_back(paths, note) {
            let error = with_users(error, &note.directory);
            left.push(format!("{}: {error:#}", note.directory.display()));
        }
    }
    let status: Status = wire::ask(&paths.socket, &Command::Status, None)?;
    for holder in &status.holders {
        if noted(paths)?
            .iter()
            .any(|note| Path::new(&holder.holder) == note.directory)
        {
            continue;
        }
        if let Err(error) = end_holder(paths, holder, &status, &containers) {
            left.push(format!("{}: {error:#}", holder.holder));
        }
    }
    Ok(left)
}

/// What neither `mount` nor a client that died holds: attached images, and layers of
/// a snapshotter.
fn end_holder(
    paths: &Paths,
    holder: &HolderStatus,
    status: &Status,
    containers: &Containers,
) -> Result<()> {
    let name = &holder.holder;
    if name.starts_with('/') {
        release(paths, Holder::Mount(name.clone()))?;
    } else if name.starts_with("attach ") {
        release(paths, Holder::Operator(holder.manifest.to_string()))?;
    } else {
        // Who holds it may be asleep: only what is not mounted any more, or lets
        // itself be unmounted, ends.
        let mounts = mountinfo::read().context("cannot read the list of mounts")?;
        let mut mounted = Vec::new();
        for root in &holder.layers {
            let export = status.exports.iter().find(|export| export.root == *root);
            let (source, file) = match export.map(|export| &export.device) {
                Some(DeviceView::Ublk { path }) => (path.clone(), false),
                Some(DeviceView::Fuse { .. }) => (paths.export(*root), true),
                None => continue,
            };
            let points = system::points_of_layer(&mounts, &source);
            mounted.push((source, file, points));
        }
        // All of it first: a container does not keep a layer's mount point busy, and the
        // next one that is to start needs that.
        let points = mounted.iter().flat_map(|(_, _, points)| points);
        for point in points {
            let users = containers.of_layer(point);
            if !users.is_empty() {
                bail!("{} is in use by {users}", point.display());
            }
        }
        for (source, file, points) in &mounted {
            for point in points {
                system::unmount_point(point).map_err(|error| with_users(error, point))?;
            }
            if *file {
                system::unmount_file(source).map_err(|error| with_users(error, source))?;
            }
        }
        release(paths, Holder::Layer(name.clone()))?;
    }
    Ok(())
}
