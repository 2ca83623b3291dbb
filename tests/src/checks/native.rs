//! Mounts that containerd makes itself (`mounts = "native"`).

use super::snapshots::{clear_after, layers_of, mount};
use crate::daemon::{Daemon, run_in};
use crate::snapshotter::{Labels, Snapshotter, api};
use crate::{Setting, fixture, tree};
use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::UnmountFlags;
use std::fs;
use std::path::{Path, PathBuf};

/// What containerd 2.2 and later makes of the mounts it is given for an image is the
/// ordinary unpack; writes go to the upper directory. It outlives the snapshotter, and
/// when it is gone nothing is in the way of ending the layers.
pub fn containerd_mounts_the_devices(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mut snapshotter = Snapshotter::start(setting, &daemon.socket(), scratch.path())?;
    let done = run(setting, &mut snapshotter, scratch.path())
        .with_context(|| format!("{}\n{}", snapshotter.log(), daemon.log()));
    clear_after(done, scratch.path(), &daemon)?;
    drop(snapshotter);
    daemon.stop()
}

fn run(setting: &Setting, snapshotter: &mut Snapshotter, directory: &Path) -> Result<()> {
    snapshotter.kill()?;
    snapshotter.restart_with(&["--mounts", "native"])?;
    let image = fixture::image(setting, "tiny")?;
    let mut names = Vec::new();
    let mut parent = String::new();
    for labels in layers_of(setting, "tiny")? {
        let (name, _) = snapshotter.pull("extract", &parent, &labels)?;
        parent = name.context("not lazy")?;
        names.push(parent.clone());
    }

    let mounts = snapshotter.view("view", &parent)?;
    let view = Mounted::make(&mounts, names.len(), &directory.join("view"))?;
    let found = tree::manifest(&view.root)?;
    if let Some(report) = tree::difference(&image.tree()?, &found) {
        bail!("the tree differs from the ordinary unpack\n{report}");
    }
    view.end()?;
    snapshotter.remove("view")?;
    // A single layer is its device and nothing else.
    let mounts = snapshotter.view("single", &names[0])?;
    let kinds: Vec<_> = mounts.iter().map(|mount| &*mount.r#type).collect();
    ensure!(kinds == ["erofs"], "{mounts:?}");
    snapshotter.remove("single")?;

    let mounts = snapshotter.prepare("container", &parent, &Labels::new())?;
    ensure!(snapshotter.mounts("container")? == mounts, "other mounts");
    let container = Mounted::make(&mounts, names.len(), &directory.join("container"))?;
    ensure!(run_in(&container.root, &image.program)? == image.output()?);
    run_in(&container.root, "echo changed >/app/data/greeting")?;
    snapshotter.kill()?;
    snapshotter.restart_with(&["--mounts", "native"])?;
    ensure!(run_in(&container.root, "cat /app/data/greeting")? == "changed\n");
    container.end()?;
    snapshotter.remove("container")?;
    for name in names.iter().rev() {
        snapshotter.remove(name)?;
    }
    snapshotter.cleanup()?;
    let left = fs::read_dir(snapshotter.root().join("layers"))?.count();
    ensure!(left == 0, "{left} layers are left");
    Ok(())
}

/// What containerd's mount manager makes.
struct Mounted {
    root: PathBuf,
    layers: Vec<PathBuf>,
}

impl Mounted {
    /// The first ones on directories of their own, the last, which refers to those, on
    /// `root`.
    fn make(mounts: &[api::Mount], layers: usize, directory: &Path) -> Result<Self> {
        let Some((last, first)) = mounts.split_last() else {
            bail!("no mounts");
        };
        ensure!(
            first.len() == layers && first.iter().all(|mount| mount.r#type == "erofs"),
            "{layers} layers: {mounts:?}"
        );
        let mut points = Vec::new();
        for (number, mounted) in first.iter().enumerate() {
            let point = directory.join(number.to_string());
            fs::create_dir_all(&point)?;
            mount(std::slice::from_ref(mounted), &point)?;
            points.push(point);
        }
        let kind = last.r#type.strip_prefix("format/");
        let kind = kind.with_context(|| format!("{last:?} refers to nothing"))?;
        let mut overlay = last.clone();
        overlay.r#type = kind.to_owned();
        for option in &mut overlay.options {
            *option = expand(option, &points)?;
        }
        let root = directory.join("root");
        fs::create_dir(&root)?;
        mount(&[overlay], &root)?;
        Ok(Self {
            root,
            layers: points,
        })
    }

    fn end(self) -> Result<()> {
        for point in std::iter::once(&self.root).chain(&self.layers) {
            rustix::mount::unmount(point, UnmountFlags::empty())
                .with_context(|| format!("unmounting {}", point.display()))?;
        }
        Ok(())
    }
}

/// `{{ mount N }}` is the place of a mount, `{{ overlay M N }}` those of several.
fn expand(option: &str, points: &[PathBuf]) -> Result<String> {
    let mut out = String::new();
    let mut rest = option;
    while let Some((before, from)) = rest.split_once("{{") {
        let (inside, after) = from.split_once("}}").context("no end")?;
        let words: Vec<_> = inside.split_whitespace().collect();
        let some: Vec<_> = match words.as_slice() {
            ["mount", one] => vec![one.parse::<usize>()?],
            ["overlay", first, last] => (first.parse()?..=last.parse()?).collect(),
            _ => bail!("{option:?} is none of containerd's"),
        };
        let places: Option<Vec<_>> = some
            .iter()
            .map(|&number| points.get(number)?.to_str())
            .collect();
        out += before;
        out += &places
            .with_context(|| format!("{option:?} refers to what is not there"))?
            .join(":");
        rest = after;
    }
    Ok(out + rest)
}
