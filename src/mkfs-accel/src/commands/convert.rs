//! `mkfs-accel convert`: an image, layer by layer, lowest first.

use crate::interrupt;
use crate::output::{Bytes, Progress, Seconds, say};
use crate::published::Below;
use crate::sink::{self, Converted};
use accel_image::{Image, Layer, OpenOptions};
use accel_layer::{Compression, Expected, LayerOptions};
use accel_oci::{ChainId, Digest, ImageSource, Platform};
use accel_ufs::UfsError;
use accel_ufs::index::{ImageSize, Layout, Root};
use accel_ufs::names::{self, LayerName};
use accel_ufs::publish::{Outcome, Publication, Ufs};
use accel_ufs::record::{
    self, DigestRecord, ErofsRecord, ImageRecord, LayerRecord, NameRecord, Process,
};
use accel_ufs::resolve::{ImageName, canonical};
use anyhow::{bail, ensure};
use serde::Serialize;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    // Brackets in a doc comment would be links.
    #[arg(help = "The image: oci:DIR[:TAG] or docker://HOST[:PORT]/REPO[:TAG|@DIGEST]")]
    source: ImageSource,
    /// The shared file system's directory; it must exist
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Talk HTTP instead of HTTPS to the registry
    #[arg(long)]
    plain_http: bool,
    #[arg(
        long,
        value_name = "OS/ARCHITECTURE[/VARIANT]",
        help = "Which image of a multi-platform one [default: linux and this machine's architecture]"
    )]
    platform: Option<Platform>,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Fate {
    /// It was there before.
    Present,
    /// It was read and published.
    Converted,
    /// It was read, but another converter had published it meanwhile.
    Overtaken,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    manifest: Digest,
    seconds: f64,
    layers: Vec<LayerReport<'a>>,
}

#[derive(Debug, Serialize)]
struct LayerReport<'a> {
    fate: Fate,
    seconds: f64,
    #[serde(flatten)]
    record: &'a LayerRecord,
}

/// A layer that is on UFS now.
struct Done {
    fate: Fate,
    record: LayerRecord,
    took: Duration,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let ufs = Ufs::open(&arguments.ufs)?;
    let signal = ufs.clone();
    interrupt::on_interrupt(move || signal.remove_temporaries());
    let source = canonical(&arguments.source)?;
    let options = OpenOptions {
        plain_http: arguments.plain_http,
        platform: arguments.platform.clone().unwrap_or_else(Platform::host),
    };
    let image = accel_image::open(&source, &options)?;
    let layers = image.layers.len();
    ensure!(
        layers <= record::MAX_LAYERS,
        "the image {} has {layers} layers; overlayfs stacks at most {}",
        image.manifest,
        record::MAX_LAYERS,
    );

    let mut below = Below::new(&ufs);
    let mut parent = None;
    let mut all = Vec::new();
    for (number, layer) in (1..).zip(&image.layers) {
        let work = LayerWork {
            ufs: &ufs,
            image: &image,
            layer,
            parent,
            label: format!("layer {number}/{layers} {}", layer.digest),
            show: !arguments.json,
        };
        let done = work.run(&mut below)?;
        if !arguments.json {
            say!("{}: {done}", work.label)?;
        }
        parent = Some(layer.chain_id);
        all.push(done);
    }

    publish_image(&ufs, &source, &image, &all)?;
    let took = started.elapsed();
    if arguments.json {
        let report = Report {
            source: source.to_string(),
            manifest: image.manifest,
            seconds: took.as_secs_f64(),
            layers: all.iter().map(Done::report).collect(),
        };
        say!("{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    let sum = |of: fn(&Done) -> u64| Bytes(all.iter().map(of).sum());
    say!(
        "image {}: {layers} layers, {} compressed, {} as EROFS, {}",
        image.manifest,
        sum(|done| done.record.size),
        sum(|done| done.record.erofs.size.bytes()),
        Seconds(took),
    )?;
    Ok(())
}

impl Done {
    fn report(&self) -> LayerReport<'_> {
        LayerReport {
            fate: self.fate,
            seconds: self.took.as_secs_f64(),
            record: &self.record,
        }
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let erofs = &self.record.erofs;
        let (from, to) = (Bytes(self.record.size), Bytes(erofs.size.bytes()));
        match self.fate {
            Fate::Present => write!(f, "already on UFS ({to})"),
            Fate::Converted => write!(f, "{from} -> {to} in {}", Seconds(self.took)),
            Fate::Overtaken => write!(
                f,
                "{from} -> {to} in {}, but another converter published it first",
                Seconds(self.took)
            ),
        }
    }
}

/// What is known about a layer before it is read.
struct LayerWork<'a> {
    ufs: &'a Ufs,
    image: &'a Image,
    layer: &'a Layer,
    parent: Option<ChainId>,
    label: String,
    show: bool,
}

impl LayerWork<'_> {
    /// Sees to it that the layer is on UFS, and puts it onto `below`.
    fn run(&self, below: &mut Below<'_>) -> anyhow::Result<Done> {
        let started = Instant::now();
        let (diff_id, chain_id) = (self.layer.diff_id, self.layer.chain_id);
        let (name, fate, root, size) = match self.ufs.find_layer(diff_id, chain_id)? {
            Some(name) => {
                let header = self.ufs.index_header(&name)?;
                (name, Fate::Present, header.root(), header.image_size())
            }
            None => self.convert(below)?,
        };
        below.push(name);
        Ok(Done {
            fate,
            took: started.elapsed(),
            record: LayerRecord {
                diff_id,
                chain_id,
                digest: self.layer.digest,
                media_type: self.layer.media_type.clone(),
                size: self.layer.size,
                erofs: ErofsRecord {
                    path: name.image(),
                    root,
                    size,
                    uuid: name.uuid(),
                    index_size: Layout::new(size).index_size(),
                },
            },
        })
    }

    /// Reads the layer and publishes what it becomes.
    fn convert(&self, below: &mut Below<'_>) -> anyhow::Result<(LayerName, Fate, Root, ImageSize)> {
        let publication = self.ufs.create("erofs")?;
        let blob = self.image.open_layer(self.layer)?;
        let progress = Progress::new(blob, self.label.clone(), self.layer.size, self.show);
        let options = LayerOptions {
            compression: Some(Compression::from_media_type(&self.layer.media_type)?),
            expected: Expected {
                digest: Some(self.layer.digest),
                size: Some(self.layer.size),
                diff_id: Some(self.layer.diff_id),
            },
            parent: self.parent,
            ..LayerOptions::new(self.layer.digest.to_string())
        };
        let (file, path) = (publication.file(), publication.path());
        let Converted {
            summary,
            root,
            index,
        } = sink::convert_layer(progress, &options, below, file, path)?;
        let name = match summary.needs_lower {
            true => LayerName::Chain(self.layer.chain_id),
            false => LayerName::Layer(self.layer.diff_id),
        };
        let size = ImageSize::new(summary.image.size)?;
        ensure!(
            summary.uuid.0 == name.uuid().0,
            "layer {}: the image's UUID does not follow from its name {name}",
            self.layer.digest,
        );
        self.publish_layer(publication, &name, root, &index)
            .map(|fate| (name, fate, root, size))
    }

    /// The image first, its index last: the index is the commit.
    fn publish_layer(
        &self,
        publication: Publication,
        name: &LayerName,
        root: Root,
        index: &[u8],
    ) -> anyhow::Result<Fate> {
        let image = publication.commit(&name.image())?;
        if image == Outcome::AlreadyThere {
            // Of a converter that works on the same layer now, or that died
            // before it came to its index.
            let path = self.ufs.path(&name.image());
            let mut there = std::fs::File::open(&path).map_err(UfsError::io("open", &path))?;
            let found = hash(&mut there).map_err(UfsError::io("read", &path))?;
            if found != root {
                bail!(
                    "{path:?} is already there, but has the root {found} instead of {root}: it is damaged, or was made by another version of the converter; look at it, then remove it and its index"
                );
            }
        }
        let outcome = self.ufs.publish(&name.index(), index)?;
        let digest = DigestRecord {
            layout: record::LAYOUT,
            digest: self.layer.digest,
            diff_id: self.layer.diff_id,
        };
        let path = names::by_digest(&self.layer.digest);
        self.ufs.publish(&path, &digest.to_json())?;
        Ok(match outcome {
            Outcome::Published => Fate::Converted,
            Outcome::AlreadyThere => Fate::Overtaken,
        })
    }
}

fn hash(file: &mut (impl Read + Seek)) -> io::Result<Root> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(Root(*hasher.finalize().as_bytes()))
}

/// Ties the layers together, and remembers where they came from.
fn publish_image(
    ufs: &Ufs,
    source: &ImageSource,
    image: &Image,
    layers: &[Done],
) -> anyhow::Result<()> {
    let process = &image.process;
    let record = ImageRecord {
        layout: record::LAYOUT,
        manifest: image.manifest,
        config: image.config,
        platform: image.platform.clone(),
        source: source.to_string(),
        process: Process {
            env: process.env.clone(),
            entrypoint: process.entrypoint.clone(),
            cmd: process.cmd.clone(),
            working_dir: process.working_dir.clone(),
            user: process.user.clone(),
        },
        layers: layers.iter().map(|done| done.record.clone()).collect(),
    };
    let path = names::image_record(&image.manifest);
    match ufs.publish(&path, &record.to_json()) {
        Ok(Outcome::Published) => {}
        // The same image from another source, or converted before.
        Ok(Outcome::AlreadyThere) | Err(UfsError::Differs { .. }) => {
            let there = ufs.image_record(&image.manifest)?;
            let same = there.is_some_and(|there| {
                let source = record.source.clone();
                ImageRecord { source, ..there } == record
            });
            if !same {
                bail!(
                    "{:?} is already there and tells of other layers: it was made by another version of the converter, or layers were removed and made again; remove it and convert again",
                    ufs.path(&path)
                );
            }
        }
        Err(error) => return Err(error.into()),
    }
    // Converting again what is up to date leaves no trace.
    if let Ok(last) = ufs.resolve(&ImageName::Source(source.clone()))
        && last.manifest == image.manifest
    {
        return Ok(());
    }
    let name = NameRecord {
        layout: record::LAYOUT,
        source: source.to_string(),
        manifest: image.manifest,
    };
    ufs.publish_name(source, &name.to_json())?;
    Ok(())
}
