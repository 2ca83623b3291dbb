//! The snapshotter, asked as containerd asks it, over a real daemon.

use crate::daemon::Daemon;
use crate::random::Random;
use crate::snapshotter::{Labels, REF, Snapshotter, api};
use crate::{Setting, drop_caches, fixture};
use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::Code;

/// The label that names a layer's root.
pub(super) const ROOT: &str = "containerd.io/snapshot/accel.root";

/// A converted layer as its image's manifest would name it.
#[derive(Debug, Clone)]
struct Layer {
    labels: Labels,
    root: String,
    /// A file of it, and what is in that.
    witness: Option<(PathBuf, Vec<u8>)>,
}

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq)]
struct Plain {
    kind: api::Kind,
    parent: String,
    /// Of a lazy one: image and number of its layer.
    layer: Option<(usize, usize)>,
    /// Of an ordinary one: the file that was written to it, also its content.
    file: Option<String>,
}

struct World<'a> {
    daemon: &'a Daemon,
    snapshotter: Snapshotter,
    images: Vec<Vec<Layer>>,
    model: BTreeMap<String, Plain>,
    mounted: BTreeMap<String, PathBuf>,
    directory: &'a Path,
    number: u32,
    /// How often the machine "went down".
    reboots: u32,
}

/// Random operations over lazy and ordinary chains of two namespaces, with garbage
/// collection, restarts, SIGKILL of either daemon and what a reboot leaves, compared
/// with a plain model. At the end nothing is left.
pub fn mixed_chains_are_the_model(setting: &Setting) -> Result<()> {
    let rounds = 90;
    let scratch = setting.scratch_dir()?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let images = ["tiny", "foreign"];
    let images: Result<Vec<_>> = images.iter().map(|name| layers(setting, name)).collect();
    let mut world = World {
        daemon: &daemon,
        snapshotter: Snapshotter::start(setting, &daemon.socket(), scratch.path())?,
        images: images?,
        model: BTreeMap::new(),
        mounted: BTreeMap::new(),
        directory: scratch.path(),
        number: 0,
        reboots: 0,
    };
    let mut random = Random::new(20_261_125);
    let done = world
        .find_witnesses()
        .and_then(|()| {
            for round in 0..rounds {
                world
                    .operate(&mut random, round)
                    .with_context(|| format!("operation {round}"))?;
            }
            // Over ublk nothing that a reboot ends can be ended without one.
            ensure!(
                world.reboots > 0 || !daemon.is_fuse(),
                "chance has brought no reboot: other operations, or more, are needed"
            );
            world.end()
        })
        .with_context(|| format!("{}\n{}", world.snapshotter.log(), daemon.log()));
    world.unmount_all();
    clear_after(done, scratch.path(), &daemon)?;
    drop(world);
    daemon.stop()
}

/// While `ublk-server` and whatever reads UFS for it do not move at all, everything that
/// containerd asks while it holds its lock is answered, and so is what needs no layer.
pub fn a_stopped_server_is_not_waited_for(setting: &Setting) -> Result<()> {
    let scratch = setting.scratch_dir()?;
    let daemon = Daemon::start(setting, &setting.ufs())?;
    let mut world = World {
        daemon: &daemon,
        snapshotter: Snapshotter::start(setting, &daemon.socket(), scratch.path())?,
        images: vec![layers(setting, "tiny")?],
        model: BTreeMap::new(),
        mounted: BTreeMap::new(),
        directory: scratch.path(),
        number: 0,
        reboots: 0,
    };
    let done = world
        .ask_while_stopped()
        .with_context(|| format!("{}\n{}", world.snapshotter.log(), daemon.log()));
    daemon.resume()?;
    let done = done.and_then(|()| world.end());
    clear_after(done, scratch.path(), &daemon)?;
    drop(world);
    daemon.stop()
}

/// The labels with which a layer of an accelerated image is asked for, from what the
/// image's record on UFS has of it.
pub(super) fn labels(layer: &serde_json::Value) -> Result<Labels> {
    let text = |value: &serde_json::Value| -> Result<String> {
        Ok(value.as_str().context("no text")?.to_owned())
    };
    let of = |name: &str| format!("containerd.io/snapshot/accel.{name}");
    let size = layer["erofs"]["size"].as_u64().context("no size")?;
    Ok([
        (REF.to_owned(), text(&layer["chain_id"])?),
        (of("layout"), "1".to_owned()),
        (of("diff-id"), text(&layer["diff_id"])?),
        (ROOT.to_owned(), text(&layer["erofs"]["root"])?),
        (of("size"), size.to_string()),
    ]
    .into())
}

/// Those of all layers of an image, lowest first.
pub(super) fn layers_of(setting: &Setting, image: &str) -> Result<Vec<Labels>> {
    let image = fixture::image(setting, image)?;
    let record = fixture::record(&setting.ufs(), &image.digest)?;
    let layers = record["layers"].as_array().context("no layers")?;
    layers.iter().map(labels).collect()
}

fn layers(setting: &Setting, image: &str) -> Result<Vec<Layer>> {
    let layers = layers_of(setting, image)?.into_iter();
    Ok(layers
        .map(|labels| {
            let root = labels[ROOT].clone();
            Layer {
                labels,
                root,
                witness: None,
            }
        })
        .collect())
}

impl World<'_> {
    /// Pulls every image lazily once, and takes a file of each layer from where the
    /// layer is mounted.
    fn find_witnesses(&mut self) -> Result<()> {
        let mut witnesses: BTreeMap<String, (PathBuf, Vec<u8>)> = BTreeMap::new();
        for image in 0..self.images.len() {
            let mut names = Vec::new();
            let mut parent = String::new();
            for number in 0..self.images[image].len() {
                let before = points(&self.snapshotter.root())?;
                let (labels, root) = {
                    let layer = &self.images[image][number];
                    (layer.labels.clone(), layer.root.clone())
                };
                let (name, _) = self.snapshotter.pull("extract", &parent, &labels)?;
                parent = name.with_context(|| format!("layer {number} is not lazy"))?;
                names.push(parent.clone());
                let after = points(&self.snapshotter.root())?;
                if let Some(point) = after.difference(&before).next()
                    && let Some(file) = first_file(point)?
                {
                    let path = point.join(&file);
                    witnesses.insert(root.clone(), (file, fs::read(path)?));
                }
                self.images[image][number].witness = witnesses.get(&root).cloned();
            }
            for name in names.iter().rev() {
                self.snapshotter.remove(name)?;
            }
        }
        self.snapshotter.cleanup()?;
        let left = points(&self.snapshotter.root())?;
        ensure!(left.is_empty(), "still mounted: {left:?}");
        Ok(())
    }

    fn operate(&mut self, random: &mut Random, round: u32) -> Result<()> {
        match random.below(24) {
            0..=5 => self.pull(random)?,
            6..=9 => self.container(random)?,
            10..=15 => self.remove(random)?,
            16..=17 => self.snapshotter.cleanup()?,
            18..=19 => {
                self.snapshotter.kill()?;
                self.snapshotter.restart()?;
            }
            20 => self.daemon.kill_and_restart()?,
            21 => {
                // Both; the snapshotter is there first.
                self.snapshotter.kill()?;
                self.snapshotter.restart()?;
                self.daemon.kill_and_restart()?;
            }
            // Not often: it waits for what is mounted again.
            22 if round.is_multiple_of(2) && self.daemon.is_fuse() => self.reboot()?,
            _ => self.half_a_pull(random)?,
        }
        self.compare()
    }

    /// Pulls an image, or the lower part of it, into a namespace; some layers are
    /// unpacked.
    fn pull(&mut self, random: &mut Random) -> Result<()> {
        let image = below(random, self.images.len());
        let namespace = random.below(2);
        let depth = 1 + below(random, self.images[image].len());
        let mut parent = String::new();
        for number in 0..depth {
            let mut labels = self.images[image][number].labels.clone();
            let ordinary = random.below(4) == 0;
            if ordinary {
                labels.retain(|key, _| key == REF);
            }
            self.number += 1;
            let key = format!("ns{namespace}/{}/extract", self.number);
            // containerd looks before it asks: what it has unpacked has this name.
            let unpacked = format!("ns{namespace}/{}", labels[REF]);
            if self.model.contains_key(&unpacked) {
                if self.model[&unpacked].parent != parent {
                    return Ok(());
                }
                parent = unpacked;
                continue;
            }
            let (lazy, mounts) = self.snapshotter.pull(&key, &parent, &labels)?;
            let name = lazy.clone().unwrap_or(unpacked);
            let mut plain = Plain {
                kind: api::Kind::Committed,
                parent: parent.clone(),
                layer: lazy.is_some().then(|| self.same(image, number)),
                file: None,
            };
            ensure!(lazy.is_some() != ordinary, "layer {number}: lazy {lazy:?}");
            if lazy.is_none() {
                let file = format!("file-{}", self.number);
                self.with_mounted(&mounts, |point| {
                    fs::write(point.join(&file), &file)?;
                    Ok(())
                })?;
                plain.file = Some(file);
                self.snapshotter.commit(&key, &name, &labels)?;
            }
            if let Some(known) = self.model.insert(name.clone(), plain.clone()) {
                ensure!(known == plain, "{name} was {known:?}, is {plain:?}");
            }
            parent = name;
        }
        Ok(())
    }

    /// Of all layers with the same bytes, the first.
    fn same(&self, image: usize, number: usize) -> (usize, usize) {
        let root = &self.images[image][number].root;
        let mut all = self.images.iter().enumerate().flat_map(|(image, layers)| {
            let layers = layers.iter().enumerate();
            layers.map(move |(number, layer)| (image, number, &layer.root))
        });
        let first = all.find(|(_, _, other)| *other == root);
        first.map_or((image, number), |(image, number, _)| (image, number))
    }

    /// An unpack that does not end: its active snapshot stays.
    fn half_a_pull(&mut self, random: &mut Random) -> Result<()> {
        let image = below(random, self.images.len());
        let mut labels = self.images[image][0].labels.clone();
        // No layer on UFS is this one.
        let root = "containerd.io/snapshot/accel.root".to_owned();
        labels.insert(root, "0".repeat(64));
        self.number += 1;
        let key = format!("ns0/{}/extract", self.number);
        let (lazy, _) = self.snapshotter.pull(&key, "", &labels)?;
        ensure!(lazy.is_none(), "a layer with a root that nothing has");
        let plain = Plain {
            kind: api::Kind::Active,
            parent: String::new(),
            layer: None,
            file: None,
        };
        self.model.insert(key, plain);
        Ok(())
    }

    /// A container or view on some committed snapshot, or on one that is none.
    fn container(&mut self, random: &mut Random) -> Result<()> {
        let names: Vec<_> = self.model.keys().cloned().collect();
        if names.is_empty() {
            return Ok(());
        }
        let parent = names[below(random, names.len())].clone();
        self.number += 1;
        let key = format!("ns{}/{}/container", random.below(2), self.number);
        let view = random.below(3) == 0;
        let made = match view {
            true => self.snapshotter.view(&key, &parent),
            false => self.snapshotter.prepare(&key, &parent, &Labels::new()),
        };
        if self.model[&parent].kind != api::Kind::Committed {
            let status = made.err().context("a child of what is not committed")?;
            ensure!(status.code() == Code::InvalidArgument, "{status}");
            return Ok(());
        }
        let mounts = made?;
        let plain = Plain {
            kind: match view {
                true => api::Kind::View,
                false => api::Kind::Active,
            },
            parent,
            layer: None,
            file: None,
        };
        self.model.insert(key.clone(), plain);
        ensure!(self.snapshotter.mounts(&key)? == mounts, "other mounts");
        let point = self.directory.join(format!("mnt-{}", self.number));
        fs::create_dir(&point)?;
        mount(&mounts, &point)?;
        self.mounted.insert(key.clone(), point);
        self.look_into(&key)?;
        // Some keep running.
        if random.below(2) == 0 {
            self.stop(&key)?;
        }
        Ok(())
    }

    /// Everything that lies below a container is there.
    fn look_into(&self, key: &str) -> Result<()> {
        let Some(point) = self.mounted.get(key) else {
            return Ok(());
        };
        let mut topmost = true;
        let mut below = &self.model[key].parent;
        while !below.is_empty() {
            let plain = &self.model[below];
            if let Some(file) = &plain.file {
                let found = fs::read_to_string(point.join(file));
                let found = found.with_context(|| format!("{file} in {key}"))?;
                ensure!(&found == file, "{file} in {key} has {found:?}");
            }
            // What is in lower ones may be hidden.
            if let (Some((image, number)), true) = (plain.layer, topmost) {
                topmost = false;
                if let Some((file, expected)) = &self.images[image][number].witness {
                    let found = fs::read(point.join(file));
                    let found = found.with_context(|| format!("{} in {key}", file.display()))?;
                    ensure!(&found == expected, "{} in {key}", file.display());
                }
            }
            below = &plain.parent;
        }
        Ok(())
    }

    fn stop(&mut self, key: &str) -> Result<()> {
        if let Some(point) = self.mounted.remove(key) {
            rustix::mount::unmount(&point, UnmountFlags::empty())
                .with_context(|| format!("unmounting {}", point.display()))?;
            fs::remove_dir(point)?;
        }
        Ok(())
    }

    fn unmount_all(&mut self) {
        for point in std::mem::take(&mut self.mounted).into_values() {
            let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH);
        }
    }

    fn remove(&mut self, random: &mut Random) -> Result<()> {
        let names: Vec<_> = self.model.keys().cloned().collect();
        if names.is_empty() || random.below(10) == 0 {
            let status = self.snapshotter.remove("ns0/nothing");
            let status = status.err().context("removed what is not there")?;
            ensure!(status.code() == Code::NotFound, "{status}");
            return Ok(());
        }
        let key = names[below(random, names.len())].clone();
        let has_children = self.model.values().any(|plain| plain.parent == key);
        self.stop(&key)?;
        let removed = self.snapshotter.remove(&key);
        if has_children {
            let status = removed.err().context("removed what has children")?;
            ensure!(status.code() == Code::FailedPrecondition, "{status}");
        } else {
            removed?;
            self.model.remove(&key);
        }
        Ok(())
    }

    /// What is left when the machine went down: the root directory, and nothing
    /// mounted, served or known to the daemon.
    fn reboot(&mut self) -> Result<()> {
        let running: Vec<_> = self.mounted.keys().cloned().collect();
        for key in running {
            self.stop(&key)?;
        }
        self.snapshotter.kill()?;
        self.daemon.kill_and_forget(&self.snapshotter.root())?;
        self.snapshotter.restart()?;
        self.daemon.start_again()?;
        self.reboots += 1;
        self.await_layers()
    }

    /// Waits until every layer that a snapshot needs is mounted.
    fn await_layers(&mut self) -> Result<()> {
        let needed: BTreeSet<_> = self
            .model
            .values()
            .filter_map(|plain| plain.layer)
            .collect();
        let needed: BTreeSet<_> = needed
            .into_iter()
            .map(|(image, number)| &self.images[image][number].root)
            .collect();
        let started = Instant::now();
        loop {
            let mounted = points(&self.snapshotter.root())?;
            if mounted.len() >= needed.len() {
                return Ok(());
            }
            ensure!(
                started.elapsed() < Duration::from_secs(300),
                "of {} layers only {mounted:?} are mounted again",
                needed.len()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn compare(&mut self) -> Result<()> {
        let found: BTreeMap<_, _> = self
            .snapshotter
            .walk("")?
            .into_iter()
            .map(|info| (info.name.clone(), (info.kind, info.parent)))
            .collect();
        let expected: BTreeMap<_, _> = self
            .model
            .iter()
            .map(|(name, plain)| (name.clone(), (plain.kind.into(), plain.parent.clone())))
            .collect();
        ensure!(
            found == expected,
            "found {found:#?}\nexpected {expected:#?}"
        );
        let running: Vec<_> = self.mounted.keys().cloned().collect();
        for key in &running {
            self.look_into(key)?;
        }
        Ok(())
    }

    /// Removes everything, and looks for what is left.
    fn end(&mut self) -> Result<()> {
        let running: Vec<_> = self.mounted.keys().cloned().collect();
        for key in running {
            self.stop(&key)?;
        }
        while !self.model.is_empty() {
            let parents: BTreeSet<_> = self
                .model
                .values()
                .map(|plain| plain.parent.clone())
                .collect();
            let leaf = self.model.keys().find(|name| !parents.contains(*name));
            let leaf = leaf.context("no leaf")?.clone();
            self.snapshotter.remove(&leaf)?;
            self.model.remove(&leaf);
        }
        self.snapshotter.cleanup()?;
        let root = self.snapshotter.root();
        let mounted = points(&root)?;
        ensure!(mounted.is_empty(), "still mounted: {mounted:?}");
        for name in ["layers", "snapshots"] {
            let left: Vec<_> = fs::read_dir(root.join(name))?.collect();
            ensure!(left.is_empty(), "{name} has {left:?}");
        }
        let status = self.daemon.ask(["status", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        for what in ["exports", "holders"] {
            let left = status[what].as_array().context("no array")?;
            ensure!(left.is_empty(), "ublk-server has {what}: {left:?}");
        }
        Ok(())
    }

    fn ask_while_stopped(&mut self) -> Result<()> {
        let mut parent = String::new();
        let mut names = Vec::new();
        for number in 0..self.images[0].len() {
            let labels = self.images[0][number].labels.clone();
            let (name, _) = self.snapshotter.pull("extract", &parent, &labels)?;
            parent = name.context("not lazy")?;
            names.push(parent.clone());
        }
        let mounts = self
            .snapshotter
            .prepare("container", &parent, &Labels::new())?;
        self.snapshotter.prepare("other", &parent, &Labels::new())?;
        // Whoever looks into a layer then waits for the daemon.
        drop_caches()?;
        self.daemon.stop_moving()?;
        // Whoever asks the daemon how it is waits for ten seconds.
        self.snapshotter.patience = Duration::from_secs(9);
        ensure!(self.snapshotter.walk("")?.len() == names.len() + 2);
        ensure!(self.snapshotter.mounts("container")? == mounts);
        for name in &names {
            ensure!(self.snapshotter.stat(name)?.name == *name);
            let usage = self.snapshotter.usage(name)?;
            ensure!(usage == api::UsageResponse::default(), "{usage:?}");
        }
        // Its own directory, and nothing of what lies below.
        let usage = self.snapshotter.usage("container")?;
        ensure!(usage.inodes == 1, "{usage:?}");
        self.snapshotter.remove("other")?;
        // An ordinary snapshot lives as ever.
        self.snapshotter.prepare("ordinary", "", &Labels::new())?;
        self.snapshotter
            .commit("ordinary", "committed", &Labels::new())?;
        self.snapshotter
            .prepare("on it", "committed", &Labels::new())?;
        self.snapshotter.remove("on it")?;
        self.snapshotter.remove("committed")?;
        // So does a container on layers that are mounted.
        self.snapshotter.prepare("third", &parent, &Labels::new())?;
        self.snapshotter.remove("third")?;
        self.snapshotter.remove("container")?;
        for name in names.iter().rev() {
            self.snapshotter.remove(name)?;
        }
        ensure!(self.snapshotter.walk("")?.is_empty());
        // Restarted, it answers all the same.
        self.snapshotter.kill()?;
        self.snapshotter.restart()?;
        ensure!(self.snapshotter.walk("")?.is_empty());
        self.snapshotter.prepare("ordinary", "", &Labels::new())?;
        self.snapshotter.remove("ordinary")?;
        self.snapshotter.patience = Duration::from_secs(100);
        Ok(())
    }

    fn with_mounted(
        &self,
        mounts: &[api::Mount],
        work: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let point = self.directory.join("unpack");
        fs::create_dir(&point)?;
        mount(mounts, &point)?;
        let done = work(&point);
        rustix::mount::unmount(&point, UnmountFlags::empty())?;
        fs::remove_dir(&point)?;
        done
    }
}

fn below(random: &mut Random, bound: usize) -> usize {
    let bound = u64::try_from(bound).unwrap_or(1);
    usize::try_from(random.below(bound)).unwrap_or_default()
}

/// Makes mounts as containerd does: one after the other at the same point.
pub(super) fn mount(mounts: &[api::Mount], point: &Path) -> Result<()> {
    for mount in mounts {
        let (mut flags, mut data) = (MountFlags::empty(), Vec::new());
        for option in &mount.options {
            match option.as_str() {
                "ro" => flags |= MountFlags::RDONLY,
                "rw" => {}
                "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
                other => data.push(other),
            }
        }
        let data = CString::new(data.join(","))?;
        rustix::mount::mount(&*mount.source, point, &*mount.r#type, flags, &*data)
            .with_context(|| format!("mounting {mount:?}"))?;
    }
    Ok(())
}

/// Where EROFS is mounted beneath a snapshotter's root.
pub(super) fn points(root: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let layers = root.join("layers");
    let points = text.lines().filter(|line| line.contains(" - erofs "));
    let points = points.filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    Ok(points.filter(|point| point.starts_with(&layers)).collect())
}

/// Unmounts what a check that failed has left.
pub(super) fn clear_after(done: Result<()>, scratch: &Path, daemon: &Daemon) -> Result<()> {
    if done.is_err() {
        unmount_below(scratch);
        unmount_below(daemon.socket().parent().unwrap_or(Path::new("/nowhere")));
    }
    done
}

fn unmount_below(directory: &Path) {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let mut points: Vec<_> = points
        .filter(|point| Path::new(point).starts_with(directory))
        .collect();
    points.reverse();
    for point in points {
        let _ = rustix::mount::unmount(point, UnmountFlags::DETACH);
    }
}

/// The first regular file with something in it, relative to `directory`, by name.
fn first_file(directory: &Path) -> Result<Option<PathBuf>> {
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let mut entries: Vec<_> =
            fs::read_dir(directory.join(&below))?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = below.join(entry.file_name());
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                waiting.push(path);
            } else if metadata.is_file() && (1..1 << 20).contains(&metadata.len()) {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}
