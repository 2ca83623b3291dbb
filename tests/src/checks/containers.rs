//! What an overlay has below it is in nobody's list of mounts: containers on layers of the
//! snapshotter, which run in mount namespaces of their own, and those that do not run yet.

use super::snapshots::{clear_after, layers_of, mount, points};
use crate::daemon::Daemon;
use crate::leftovers::State;
use crate::snapshotter::{Labels, Snapshotter};
use crate::{Setting, fixture};
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

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
    let container = Container::start(&root)?;
    let named = format!("(process {})", container.pid());
    let checked = container.run(|read| {
        // And once more: the first has changed nothing.
        for _ in 0..2 {
            shutdown_is_refused(daemon, snapshotter, &layers, &named)?;
            read("after a shutdown")?;
        }
        Ok(())
    });
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::empty())?;
    checked?;
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

/// What a runtime makes: a process with a mount namespace of its own, in which there is
/// nothing but the container. It reads what it is told to.
struct Container {
    child: Child,
    told: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Container {
    fn start(root: &Path) -> Result<Self> {
        let enter = "cd \"$1\"; mkdir old; pivot_root . old; exec /bin/sh -ec \"$2\"";
        let read =
            "busybox umount -l /old; while read -r path; do busybox head -n 1 \"$path\"; done";
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-ec"])
            .args([enter.as_ref(), "container".as_ref(), root.as_os_str()])
            .arg(read)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a container")?;
        let told = child.stdin.take().context("no input")?;
        let said = child.stdout.take().context("no output")?;
        let said = BufReader::new(said);
        Ok(Self { child, told, said })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Does something while it runs, which is given how to have it read, and ends it.
    fn run(self, act: impl FnOnce(&mut dyn FnMut(&str) -> Result<()>) -> Result<()>) -> Result<()> {
        let Self {
            mut child,
            mut told,
            mut said,
        } = self;
        let mut read = |happened: &str| -> Result<()> {
            crate::drop_caches()?;
            writeln!(told, "/app/data/greeting")?;
            let mut line = String::new();
            said.read_line(&mut line)?;
            ensure!(line == "image-accel\n", "{happened} it read {line:?}");
            Ok(())
        };
        let checked = read("in a container").and_then(|()| act(&mut read));
        // It ends with its input.
        drop(told);
        let ended = child.wait()?;
        checked?;
        ensure!(ended.success(), "the container ended with {ended}");
        Ok(())
    }
}

/// The same with a container on an image that `ublk-server mount` has mounted, and with an
/// overlay on top of one that nobody uses yet.
pub fn shutdown_leaves_mounted_images_to_them(setting: &Setting) -> Result<()> {
    let before = State::now(setting)?;
    let scratch = setting.scratch_dir()?;
    let image = fixture::image(setting, "tiny")?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let upper = scratch.path().join("upper");
    let mounted = daemon.mount_with(&image.source, &["--rw".as_ref(), upper.as_os_str()])?;
    let refused = |named: &str| -> Result<()> {
        let refused = daemon.client(["shutdown", "--leave-daemon"])?;
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success(), "it went");
        ensure!(message.contains(named), "{named} is not named: {message}");
        ensure!(
            mounted.path().join("app/data/greeting").exists(),
            "it is not mounted any more"
        );
        Ok(())
    };
    let container = Container::start(mounted.path())?;
    let named = format!("(process {})", container.pid());
    container
        .run(|read| {
            refused(&named)?;
            read("after a shutdown")
        })
        .with_context(|| daemon.log())?;
    let (point, empty) = (scratch.path().join("other"), scratch.path().join("empty"));
    std::fs::create_dir(&point)?;
    std::fs::create_dir(&empty)?;
    let options = format!("lowerdir={}:{}", mounted.path().display(), empty.display());
    let options = std::ffi::CString::new(options)?;
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("overlay", &point, "overlay", flags, &*options)?;
    let checked = refused(&format!("the overlay mounted at {}", point.display()));
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty())?;
    checked.with_context(|| daemon.log())?;
    mounted.unmount()?;
    daemon.stop()?;
    drop(scratch);
    before.check_same_now(setting)
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
