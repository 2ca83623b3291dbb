//! What an overlay has below it is in nobody's list of mounts: containers on layers of the
//! snapshotter, which run in mount namespaces of their own, and those that do not run yet.

use super::snapshots::{clear_after, layers_of, mount, points};
use crate::Setting;
use crate::daemon::Daemon;
use crate::leftovers::State;
use crate::snapshotter::{Labels, Snapshotter};
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

/// `ublk-server shutdown` while a container runs on layers of the snapshotter: it is named,
/// goes on reading, and nothing is taken from under it; when it has ended all goes.
pub fn shutdown_names_them_and_lets_them_run(setting: &Setting) -> Result<()> {
    let before = State::now(setting)?;
    let scratch = setting.scratch_dir()?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mut snapshotter = Snapshotter::start(setting, &daemon.socket(), scratch.path())?;
    let done = shut_down_under_a_container(setting, &daemon, &mut snapshotter, scratch.path())
        .with_context(|| format!("{}\n{}", snapshotter.log(), daemon.log()));
    clear_after(done, scratch.path(), &daemon)?;
    drop(snapshotter);
    daemon.stop()?;
    drop(scratch);
    before.check_same_now(setting)
}

fn shut_down_under_a_container(
    setting: &Setting,
    daemon: &Daemon,
    snapshotter: &mut Snapshotter,
    directory: &Path,
) -> Result<()> {
    let mut parent = String::new();
    for labels in layers_of(setting, "tiny")? {
        let (name, _) = snapshotter.pull("extract", &parent, &labels)?;
        parent = name.context("not lazy")?;
    }
    let mounts = snapshotter.prepare("container", &parent, &Labels::new())?;
    let root = directory.join("rootfs");
    std::fs::create_dir(&root)?;
    mount(&mounts, &root)?;
    let layers = points(&snapshotter.root())?;
    ensure!(layers.len() > 1, "an image of one layer shows little");
    let named = format!("the overlay mounted at {}", root.display());
    shutdown_is_refused(daemon, snapshotter, &layers, &named)
        .context("before the container runs")?;
    mounted_by_others(daemon, snapshotter, &layers, directory)?;
    // As a runtime does: a mount namespace of its own, in which there is nothing else. It
    // reads what it is told to.
    let enter = "cd \"$1\"; mkdir old; pivot_root . old; exec /bin/sh -ec \"$2\"";
    let read = "busybox umount -l /old; while read -r path; do busybox head -n 1 \"$path\"; done";
    let mut container = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .args([enter.as_ref(), "container".as_ref(), root.as_os_str()])
        .arg(read)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a container")?;
    let told = container.stdin.take().context("no input")?;
    let said = container.stdout.take().context("no output")?;
    let checked = while_it_runs(daemon, snapshotter, container.id(), told, said);
    // It ends with its input.
    let ended = container.wait()?;
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::empty())?;
    checked?;
    ensure!(ended.success(), "the container ended with {ended}");
    // As the units have it: a snapshotter that runs mounts again what its images need.
    snapshotter.kill()?;
    daemon.ask(["shutdown", "--leave-daemon"])?;
    let left = points(&snapshotter.root())?;
    ensure!(left.is_empty(), "still mounted: {left:?}");
    let status = serde_json::json!({"op": "status"});
    let status = crate::daemon::ask(&daemon.socket(), &status)?;
    for list in ["exports", "holders"] {
        let left = &status[list];
        ensure!(left.as_array().is_some_and(Vec::is_empty), "{list}: {left}");
    }
    Ok(())
}

fn while_it_runs(
    daemon: &Daemon,
    snapshotter: &Snapshotter,
    container: u32,
    mut told: ChildStdin,
    said: ChildStdout,
) -> Result<()> {
    let mut said = BufReader::new(said);
    let mut read = |happened: &str| -> Result<()> {
        crate::drop_caches()?;
        writeln!(told, "/app/data/greeting")?;
        let mut line = String::new();
        said.read_line(&mut line)?;
        ensure!(line == "image-accel\n", "{happened} it read {line:?}");
        Ok(())
    };
    read("in a container")?;
    let layers = points(&snapshotter.root())?;
    let named = format!("(process {container})");
    // And once more: the first has changed nothing.
    for _ in 0..2 {
        shutdown_is_refused(daemon, snapshotter, &layers, &named)?;
        read("after a shutdown")?;
    }
    Ok(())
}

/// `ublk-server shutdown` names who uses each of these layers, and leaves them where they are.
fn shutdown_is_refused(
    daemon: &Daemon,
    snapshotter: &Snapshotter,
    layers: &BTreeSet<PathBuf>,
    named: &str,
) -> Result<()> {
    let refused = daemon.client(["shutdown", "--leave-daemon"])?;
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "all of it went");
    ensure!(
        message.matches(named).count() == layers.len(),
        "{named} is not named for each of {layers:?}: {message}"
    );
    let left = points(&snapshotter.root())?;
    ensure!(left == *layers, "of {layers:?} are left {left:?}");
    Ok(())
}

/// The same with overlays that others mount: with names that are relative to where they are,
/// and in a mount namespace that a process is in, but not on the overlay.
fn mounted_by_others(
    daemon: &Daemon,
    snapshotter: &Snapshotter,
    layers: &BTreeSet<PathBuf>,
    directory: &Path,
) -> Result<()> {
    let point = directory.join("other");
    std::fs::create_dir(&point)?;
    let root = snapshotter.root();
    let lower: Vec<_> = layers
        .iter()
        .map(|layer| Ok(layer.strip_prefix(&root)?.to_string_lossy()))
        .collect::<Result<_>>()?;
    let options = format!("lowerdir={}", lower.join(":"));
    let mount = "mount -t overlay -o \"$1\" overlay \"$2\"; echo mounted; read -r end";
    for namespace in [false, true] {
        let mut words = vec!["sh", "-ec"];
        if namespace {
            words.splice(..0, ["unshare", "--mount", "--propagation", "private"]);
        }
        let mut process = Command::new(words[0])
            .args(&words[1..])
            .args([mount, "mount", &options, &point.to_string_lossy()])
            .current_dir(&root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a process that mounts")?;
        let mut said = BufReader::new(process.stdout.take().context("no output")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let mut named = format!("the overlay mounted at {}", point.display());
        if namespace {
            named += &format!(" in the mount namespace of sh (process {})", process.id());
        }
        let refused = shutdown_is_refused(daemon, snapshotter, layers, &named);
        // It ends with its input, and so does its namespace.
        drop(process.stdin.take());
        process.wait()?;
        if !namespace {
            rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty())?;
        }
        ensure!(line == "mounted\n", "it could not mount");
        refused.with_context(|| format!("by hand, {options}"))?;
    }
    Ok(())
}
