//! `mkfs-accel repair`: layers whose files are missing or damaged, made again.
//!
//! What a layer's files must be is known from its root: that of the image record, or of
//! an accelerated image's manifest. A layer is made again from the registry's original
//! (or an OCI layout, or an archive), and published only if its root is the one that is
//! wanted. Files that are good stay as they are; others are set aside
//! ([`Publication::replace`](accel_ufs::publish::Publication::replace)).
//!
//! Layers are looked at lowest first: what a layer is made of is good by then. It can be
//! interrupted anywhere and repeated.

use super::Verdict;
use super::verify::{Damage, check_bytes};
use crate::interrupt;
use crate::layers::{self, Made};
use crate::output::{Bytes, Seconds, say};
use crate::progress::Bars;
use crate::published::Names;
use crate::registry::RegistryArguments;
use accel_image::{Image, OpenOptions};
use accel_layer::LowerError;
use accel_oci::{ChainId, DiffId, Digest, ImageSource, Version};
use accel_ufs::UfsError;
use accel_ufs::annotations::LayerAnnotations;
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use accel_ufs::publish::{Outcome, Ufs};
use accel_ufs::record::ImageRecord;
use accel_ufs::resolve::{ImageName, canonical};
use anyhow::{Context, ensure};
use serde::Serialize;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The image: the source it was converted from, the digest of its manifest or index,
    /// or an accelerated image; or one layer: its diffID, chain ID or blob's digest
    image: ImageName,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    // Brackets in a doc comment would be links.
    #[arg(
        long,
        value_name = "SOURCE",
        help = "Where the original image is [default: where it was converted from]"
    )]
    from: Option<ImageSource>,
    /// The accelerated image, in a registry or an OCI layout, whose manifest says which
    /// roots are right, instead of the record on UFS
    #[arg(long, value_name = "SOURCE")]
    accelerated: Option<ImageSource>,
    /// Look only whether files are there and as long as they should be; do not read them
    #[arg(long)]
    quick: bool,
    /// Only say what is damaged
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// What is known of a layer before its files are looked at.
#[derive(Debug, Clone)]
struct Wanted {
    diff_id: DiffId,
    chain_id: ChainId,
    /// `None` if neither index is there, and no record says.
    name: Option<LayerName>,
    root: Root,
    size: ImageSize,
}

/// What is to be repaired: layers, lowest first, of which some are left out.
#[derive(Debug)]
struct Task {
    layers: Vec<Wanted>,
    /// By number.
    chosen: Vec<usize>,
    /// Where the original is.
    source: ImageSource,
    /// How to open it.
    options: OpenOptions,
    /// Opened already.
    image: Option<Image>,
}

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Good,
    Repaired,
    Damaged,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether all layers are good now.
    good: bool,
    seconds: f64,
    layers: Vec<LayerReport>,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    diff_id: DiffId,
    image: Option<String>,
    state: State,
    /// Where what was damaged is now.
    set_aside: Vec<PathBuf>,
    #[serde(flatten)]
    damage: Damage,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Verdict> {
    let started = Instant::now();
    let ufs = Ufs::open(&arguments.ufs)?;
    interrupt::on_interrupt(ufs.closer());
    let mut task = Task::find(&ufs, arguments)?;
    let lines = !arguments.json;
    let bytes = task.chosen.iter().map(|&n| task.layers[n].size.bytes());
    let bars = Bars::new(lines, bytes.sum());
    let mut reports = Vec::new();
    let count = task.layers.len();
    for number in task.chosen.clone() {
        let label = format!("layer {}/{count}", number + 1);
        let mut report = examine(&ufs, &task.layers[number], arguments, &bars, &label)?;
        if report.state == State::Damaged && !arguments.dry_run {
            if lines {
                bars.say(|| report.say(&label))?;
            }
            let made = task
                .make(&ufs, number, &bars)
                .with_context(|| format!("cannot make {label} again"))?;
            report.set_aside = publish(&made)?;
            report.image = Some(made.name.image().to_string());
            report.state = State::Repaired;
            task.layers[number].name = Some(made.name);
        }
        if lines {
            bars.say(|| report.say(&label))?;
        }
        reports.push(report);
    }
    drop(bars);
    let report = Report {
        good: reports.iter().all(|layer| layer.state != State::Damaged),
        seconds: started.elapsed().as_secs_f64(),
        layers: reports,
    };
    if lines {
        let of = |state| report.layers.iter().filter(|l| l.state == state).count();
        say!(
            "{} layers: {} good, {} made again, {} damaged, {}",
            report.layers.len(),
            of(State::Good),
            of(State::Repaired),
            of(State::Damaged),
            Seconds(started.elapsed()),
        )?;
    } else {
        say!("{}", serde_json::to_string_pretty(&report)?)?;
    }
    Ok(match report.good {
        true => Verdict::Good,
        false => Verdict::Damaged,
    })
}

impl LayerReport {
    fn say(&self, label: &str) -> std::io::Result<()> {
        let name = self.image.clone().unwrap_or(self.diff_id.to_string());
        match self.state {
            State::Good => return say!("{label} {name}: good"),
            State::Repaired => {
                say!("{label} {name}: made again")?;
                for path in &self.set_aside {
                    say!("  what was damaged is now {}", path.display())?;
                }
            }
            State::Damaged => {
                say!("{label} {name}: DAMAGED, {} findings", self.damage.count)?;
                for finding in &self.damage.listed {
                    say!("  {finding}")?;
                }
            }
        }
        Ok(())
    }
}

/// Looks at a layer's files.
fn examine(
    ufs: &Ufs,
    wanted: &Wanted,
    arguments: &Arguments,
    bars: &Bars,
    label: &str,
) -> anyhow::Result<LayerReport> {
    let mut damage = Damage::default();
    match &wanted.name {
        None => damage.add("it is not on UFS".to_owned()),
        Some(name) => {
            for file in [name.image(), name.index()] {
                match ufs.regular_file(&file) {
                    Ok(Some(_)) => {}
                    Ok(None) => damage.add(format!("{:?} is missing", ufs.path(&file))),
                    Err(error) => damage.add(error.to_string()),
                }
            }
            let bar = (!arguments.quick).then(|| bars.bar(label.to_owned(), wanted.size.bytes()));
            if damage.count == 0 {
                let expected = (wanted.root, wanted.size);
                // A file that cannot be read serves no node.
                if let Err(error) = check_bytes(ufs, name, expected, bar.as_ref(), &mut damage) {
                    damage.add(format!("{error:#}"));
                }
            }
        }
    }
    Ok(LayerReport {
        diff_id: wanted.diff_id,
        image: wanted.name.map(|name| name.image().to_string()),
        state: match damage.count {
            0 => State::Good,
            _ => State::Damaged,
        },
        set_aside: Vec::new(),
        damage,
    })
}

/// The image first, its index last, as ever.
fn publish(made: &Made) -> anyhow::Result<Vec<PathBuf>> {
    let (outcome, mut aside) = made.publication.replace(&made.name.image())?;
    let index = made.publication.sibling("idx")?;
    index
        .file()
        .write_all(&made.index)
        .map_err(index.error("write"))?;
    let (_, index) = index.replace(&made.name.index())?;
    if outcome == Outcome::AlreadyThere {
        // Before its index was there, gc may have taken it for nobody's.
        aside.extend(made.publication.replace(&made.name.image())?.1);
    }
    aside.extend(index);
    Ok(aside)
}

/// The names of the layers below.
struct Lower<'a>(&'a [Wanted]);

impl Names for Lower<'_> {
    fn wait_for(&self, number: usize) -> Result<LayerName, LowerError> {
        let name = self.0.get(number).and_then(|layer| layer.name);
        name.ok_or_else(|| format!("layer {} is not on UFS", number + 1).into())
    }
}

impl Task {
    fn find(ufs: &Ufs, arguments: &Arguments) -> anyhow::Result<Self> {
        // Once: a password may come from standard input.
        let options = arguments.registry.options()?;
        if let Some(accelerated) = &arguments.accelerated {
            return Self::of_accelerated(ufs, accelerated, arguments, options);
        }
        match (ufs.resolve(&arguments.image), &arguments.image) {
            (Ok(record), _) => Self::of_record(&record, arguments, options),
            (Err(UfsError::NotConverted { .. }), ImageName::Manifest(digest)) => {
                let (record, number) = find_layer(ufs, digest)?;
                let mut task = Self::of_record(&record, arguments, options)?;
                task.choose(number);
                Ok(task)
            }
            (Err(error), ImageName::Source(source)) => {
                // Perhaps an accelerated image, which says itself what is right.
                let task = Self::of_accelerated(ufs, source, arguments, options);
                task.with_context(|| error.to_string())
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    /// Leaves one layer, and those that it needs.
    fn choose(&mut self, number: usize) {
        self.chosen = match self.layers[number].name {
            Some(LayerName::Layer(_)) => vec![number],
            _ => (0..=number).collect(),
        };
    }

    fn of_record(
        record: &ImageRecord,
        arguments: &Arguments,
        mut options: OpenOptions,
    ) -> anyhow::Result<Self> {
        options.platform = record.platform.clone();
        let layers: Vec<_> = record
            .layers
            .iter()
            .map(|layer| Wanted {
                diff_id: layer.diff_id,
                chain_id: layer.chain_id,
                name: layer.name(),
                root: layer.erofs.root,
                size: layer.erofs.size,
            })
            .collect();
        let source = match &arguments.from {
            Some(source) => source.clone(),
            None => original(record)?,
        };
        Ok(Self {
            chosen: (0..layers.len()).collect(),
            layers,
            source,
            options,
            image: None,
        })
    }

    fn of_accelerated(
        ufs: &Ufs,
        source: &ImageSource,
        arguments: &Arguments,
        options: OpenOptions,
    ) -> anyhow::Result<Self> {
        let image = accel_image::open(source, &options)?;
        let mut layers = Vec::new();
        for (layer, annotations) in image.layers.iter().zip(image.layer_annotations()) {
            let get = |key: &str| annotations.get(key).map(String::as_str);
            let said = LayerAnnotations::read(get)?.with_context(|| {
                format!(
                    "{source} is no accelerated image: it does not say which roots its layers have"
                )
            })?;
            ensure!(
                said.diff_id == layer.diff_id,
                "{source}: the layer {} has the diffID {}, not the {} of its annotation",
                layer.digest,
                layer.diff_id,
                said.diff_id,
            );
            let name = find_files(ufs, layer.diff_id, layer.chain_id)?;
            layers.push(Wanted {
                diff_id: layer.diff_id,
                chain_id: layer.chain_id,
                name,
                root: said.root,
                size: said.size,
            });
        }
        let mut task = Self {
            chosen: (0..layers.len()).collect(),
            layers,
            source: arguments.from.clone().unwrap_or_else(|| source.clone()),
            options,
            // Its layers are the original's.
            image: arguments.from.is_none().then_some(image),
        };
        if let (Some(_), ImageName::Manifest(digest)) = (&arguments.accelerated, &arguments.image)
            && let Some(number) = task
                .layers
                .iter()
                .position(|layer| layer.diff_id.0 == *digest || layer.chain_id.0 == *digest)
        {
            task.choose(number);
        }
        Ok(task)
    }

    /// Makes layer `number` again.
    fn make(&mut self, ufs: &Ufs, number: usize, bars: &Bars) -> anyhow::Result<Made> {
        let image = match self.image.take() {
            Some(image) => image,
            None => accel_image::open(&canonical(&self.source)?, &self.options)?,
        };
        let image = self.image.insert(image);
        let same = image.layers.len() == self.layers.len()
            && image
                .layers
                .iter()
                .zip(&self.layers)
                .all(|(a, b)| a.diff_id == b.diff_id);
        ensure!(
            same,
            "{} is another image by now than the one on UFS: say with --from where that one is",
            self.source
        );
        let layer = &image.layers[number];
        let never = AtomicBool::new(false);
        let bar = bars.bar(format!("layer {}", number + 1), layer.size);
        let made = layers::make(ufs, image, number, &Lower(&self.layers), bar, &never)?;
        let wanted = &self.layers[number];
        check(&made, wanted.name, wanted.root, wanted.size)?;
        Ok(made)
    }
}

/// Refuses what is not what was wanted.
pub(super) fn check(
    made: &Made,
    name: Option<LayerName>,
    root: Root,
    size: ImageSize,
) -> anyhow::Result<()> {
    if made.root != root || made.size != size {
        return Err(WrongResult(format!(
            "what was made of it has the root {} and {}, not the root {root} and {} that are wanted: \
             nothing was published; the root comes from another version of the converter, or is wrong",
            made.root,
            Bytes(made.size.bytes()),
            Bytes(size.bytes()),
        ))
        .into());
    }
    if let Some(name) = name.filter(|name| *name != made.name) {
        return Err(WrongResult(format!(
            "it belongs to {}, not to {name}: nothing was published",
            made.name
        ))
        .into());
    }
    Ok(())
}

/// What was made is not what was wanted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongResult(String);

/// The name under which any file of the layer is there.
fn find_files(
    ufs: &Ufs,
    diff_id: DiffId,
    chain_id: ChainId,
) -> Result<Option<LayerName>, UfsError> {
    if let Some(name) = ufs.find_layer(diff_id, chain_id)? {
        return Ok(Some(name));
    }
    for name in [LayerName::Chain(chain_id), LayerName::Layer(diff_id)] {
        if matches!(ufs.regular_file(&name.image()), Ok(Some(_))) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The image with a layer that is called so, and the layer's number.
fn find_layer(ufs: &Ufs, digest: &Digest) -> anyhow::Result<(ImageRecord, usize)> {
    for manifest in ufs.images()? {
        let record = match ufs.image_record(&manifest) {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%error, "an image record is passed over");
                continue;
            }
        };
        let number = record
            .layers
            .iter()
            .position(|layer| [layer.diff_id.0, layer.chain_id.0, layer.digest].contains(digest));
        if let Some(number) = number {
            return Ok((record, number));
        }
    }
    Err(UfsError::NotConverted {
        image: digest.to_string(),
        ufs: ufs.root().to_owned(),
    }
    .into())
}

/// Where the image of a record is. A tag may have moved since.
fn original(record: &ImageRecord) -> anyhow::Result<ImageSource> {
    let source = record.source.parse();
    let mut source: ImageSource =
        source.context("the image record does not say where the image is: use --from")?;
    match &mut source {
        ImageSource::Registry(reference) => {
            reference.version = Version::Digest(record.manifest);
        }
        ImageSource::Oci(_) | ImageSource::OciArchive(_) | ImageSource::DockerArchive(_) => {}
    }
    Ok(source)
}
