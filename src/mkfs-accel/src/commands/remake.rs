//! `mkfs-accel remake`: one layer into a directory of a node's own, for the daemon.
//!
//! `ublk-server` starts it when no source has a layer any more, and says on standard
//! input what it wants ([`Job`], JSON). The directory is laid out as UFS is, and the
//! daemon reads it as one. Beforehand everything goes that the daemon does not name, and
//! what earlier jobs left unfinished. Standard output says how far it is, a line
//! `progress BYTES` at a time.

use super::repair::check;
use super::verify::{Damage, check_bytes};
use crate::interrupt;
use crate::layers::{self, Done, Made, Tell};
use crate::output::{Bytes, say};
use crate::progress::{self, Bars};
use crate::published::Names;
use crate::registry::RegistryArguments;
use accel_image::Image;
use accel_layer::LowerError;
use accel_oci::{ChainId, DiffId, ImageSource, Platform};
use accel_ufs::UfsError;
use accel_ufs::index::{ImageSize, Layout, Root};
use accel_ufs::lease::{Owner, Sign};
use accel_ufs::names::{LayerName, RelPath};
use accel_ufs::publish::Ufs;
use anyhow::{Context, ensure};
use serde::Deserialize;
use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The directory; made if it is missing
    #[arg(long, value_name = "DIR")]
    into: PathBuf,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// What the daemon wants.
#[derive(Debug, Deserialize)]
struct Job {
    /// Bytes that the directory may hold.
    limit: u64,
    /// Images of layers that stay: paths in the directory.
    keep: Vec<RelPath>,
    /// What to make; nothing if only the rest is to go.
    #[serde(default)]
    layer: Option<Wanted>,
}

#[derive(Debug, Deserialize)]
struct Wanted {
    /// The original image.
    source: ImageSourceText,
    platform: Platform,
    diff_id: DiffId,
    chain_id: ChainId,
    /// Whether it is called by its chain ID.
    chain: bool,
    root: Root,
    size: ImageSize,
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct ImageSourceText(ImageSource);

impl TryFrom<String> for ImageSourceText {
    type Error = accel_oci::SourceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

/// The longest job.
const MAX_JOB: u64 = 16 << 20;
/// How often progress is told.
const RATE: Duration = Duration::from_millis(250);

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut json = Vec::new();
    io::stdin()
        .take(MAX_JOB)
        .read_to_end(&mut json)
        .context("cannot read the job from standard input")?;
    let job: Job = serde_json::from_slice(&json).context("standard input is no job")?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&arguments.into)
        .map_err(UfsError::io("make the directory", &arguments.into))?;
    let ufs = Ufs::open(&arguments.into)?;
    interrupt::on_interrupt(ufs.closer());
    let name = job.layer.as_ref().map(Wanted::name);
    clear_unfinished(&ufs)?;
    let mut keep: HashSet<_> = job.keep.into_iter().collect();
    keep.extend(name.map(|name| name.image()));
    let left = clear_layers(&ufs, &keep)?;
    let Some(wanted) = job.layer else {
        return Ok(());
    };
    tell_progress();
    // By an earlier job, and still what it was.
    let mut damage = Damage::default();
    let bars = Bars::new(false, 0);
    let bar = bars.bar(String::new(), 0);
    let name = wanted.name();
    let there = check_bytes(
        &ufs,
        &name,
        (wanted.root, wanted.size),
        Some(&bar),
        &mut damage,
    );
    if matches!(there, Ok(Some(_))) && damage.count == 0 {
        return Ok(());
    }
    let needed = wanted.size.bytes() + Layout::new(wanted.size).index_size();
    ensure!(
        left.saturating_add(needed) <= job.limit,
        "there is no room for it: {} of the {} for remade layers are in use, and it has {}",
        Bytes(left),
        Bytes(job.limit),
        Bytes(needed),
    );
    let room = job.limit - needed;
    let made = make(&ufs, &wanted, room, arguments, &bars)?;
    check(&made, Some(name), wanted.root, wanted.size)?;
    made.publication.replace(&name.image())?;
    let index = made.publication.sibling("idx")?;
    index
        .file()
        .write_all(&made.index)
        .map_err(index.error("write"))?;
    index.replace(&name.index())?;
    Ok(())
}

impl Wanted {
    fn name(&self) -> LayerName {
        match self.chain {
            true => LayerName::Chain(self.chain_id),
            false => LayerName::Layer(self.diff_id),
        }
    }
}

fn make(
    ufs: &Ufs,
    wanted: &Wanted,
    room: u64,
    arguments: &Arguments,
    bars: &Bars,
) -> anyhow::Result<Made> {
    let mut options = arguments.registry.options()?;
    options.platform = wanted.platform.clone();
    let source = &wanted.source.0;
    let image = accel_image::open(source, &options)?;
    let same = |layer: &accel_image::Layer| match wanted.chain {
        true => layer.chain_id == wanted.chain_id,
        false => layer.diff_id == wanted.diff_id,
    };
    let number = image.layers.iter().position(same);
    let number = number
        .with_context(|| format!("{source} has no such layer: it is another image by now"))?;
    // Only a tree that depends on others needs them.
    let lower = match wanted.chain && number > 0 {
        true => {
            let mut below: Image = accel_image::open(source, &options)?;
            below.layers.truncate(number);
            let below = layers::convert_all(ufs, &below, 1, Tell::Nothing)?;
            let size = |done: &Done| done.record.erofs.size.bytes();
            let taken: u64 = below.iter().map(size).sum();
            ensure!(
                taken <= room,
                "there is no room for it: it needs the layers below it, which have {}",
                Bytes(taken),
            );
            below
        }
        false => Vec::new(),
    };
    let layer = &image.layers[number];
    let never = AtomicBool::new(false);
    let bar = bars.bar(String::new(), layer.size);
    layers::make(ufs, &image, number, &Lower(&lower), bar, &never)
}

/// The names of the layers below.
struct Lower<'a>(&'a [Done]);

impl Names for Lower<'_> {
    fn wait_for(&self, number: usize) -> Result<LayerName, LowerError> {
        let name = self.0.get(number).and_then(|done| done.record.name());
        name.ok_or_else(|| format!("layer {} was not made", number + 1).into())
    }
}

fn tell_progress() {
    std::thread::spawn(|| {
        let mut told = None;
        loop {
            let read = progress::read_so_far();
            // Whoever does not hear it any more ends this process.
            if told != Some(read) && say!("progress {read}").is_err() {
                return;
            }
            told = Some(read);
            std::thread::sleep(RATE);
        }
    });
}

/// Removes what jobs left that were killed. The directory is one machine's: what was
/// begun before it started last is nobody's.
fn clear_unfinished(ufs: &Ufs) -> anyhow::Result<()> {
    let temporaries = ufs.temporaries()?;
    let mut alive: HashSet<Owner> = [ufs.owner().clone()].into();
    for lease in ufs.leases()? {
        let here = lease.owner.as_ref().is_some_and(Owner::is_here);
        if here && !matches!(lease.look()?, None | Some(Sign::Abandoned)) {
            alive.extend(lease.owner);
        } else {
            remove(&lease.path)?;
        }
    }
    for temporary in temporaries {
        if !temporary.owner.is_some_and(|owner| alive.contains(&owner)) {
            remove(&temporary.path)?;
        }
    }
    for (path, _) in ufs.quarantined()? {
        remove(&path)?;
    }
    Ok(())
}

/// Removes the layers whose image is not to be kept; gives the bytes of the others.
fn clear_layers(ufs: &Ufs, keep: &HashSet<RelPath>) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for path in ufs.layer_files()? {
        let image = match path.as_str().strip_suffix(".idx") {
            Some(stem) => format!("{stem}.erofs").parse()?,
            None => path.clone(),
        };
        let path = ufs.path(&path);
        match keep.contains(&image) {
            true => bytes += fs::symlink_metadata(&path).map_or(0, |m| m.len()),
            false => remove(&path)?,
        }
    }
    Ok(bytes)
}

fn remove(path: &Path) -> Result<(), UfsError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(UfsError::io("remove", path)),
    }
}
