//! `mkfs-accel convert`: an image and all of its layers, and the accelerated image
//! that names them.

use crate::layers::{self, Done, Fate, Tell};
use crate::output::{Bytes, Seconds, complain, say};
use crate::published::Published;
use crate::registry::{RegistryArguments, tell_refusal};
use crate::{interrupt, jobs};
use accel_image::{Accelerated, Image, Images, OpenOptions, Platforms, Target};
use accel_oci::{Digest, ImageSource, Platform, PlatformError};
use accel_ufs::UfsError;
use accel_ufs::annotations::{IMAGE_KEY, LayerAnnotations, ORIGINAL_KEY};
use accel_ufs::claim::{ClaimName, ClaimRecord, ClaimedLayer, NewClaim};
use accel_ufs::names::{self, LayerName};
use accel_ufs::publish::{Outcome, Ufs};
use accel_ufs::record::{self, ImageRecord, LayerRecord, NameRecord, Process};
use accel_ufs::resolve::canonical;
use accel_ufs::start;
use anyhow::{Context, bail, ensure};
use serde::Serialize;
use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    // Brackets in a doc comment would be links.
    #[arg(
        help = "The image: docker://HOST[:PORT]/REPO[:TAG|@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME[:TAG]]"
    )]
    source: ImageSource,
    /// The shared file system's directory; it must exist
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    #[command(flatten)]
    registry: RegistryArguments,
    #[arg(
        long,
        value_name = "OS/ARCHITECTURE[/VARIANT]|all",
        help = "Which images of a multi-platform one; may be given several times, and the accelerated image is then an index [default: linux and this machine's architecture]"
    )]
    platform: Vec<Wanted>,
    #[arg(
        long,
        value_name = "N",
        help = "How many layers to work on at a time [default: one per processor, as far as memory reaches]"
    )]
    jobs: Option<NonZeroU16>,
    #[arg(
        long,
        value_name = "docker://HOST[:PORT]/REPO:TAG",
        value_parser = push_target,
        help = "Push the accelerated image: the same config and layers, and annotations by which nodes find the converted ones"
    )]
    push: Option<ImageSource>,
    #[arg(
        long,
        value_name = "oci:DIR[:TAG]",
        value_parser = out_target,
        help = "Write the accelerated image to an OCI layout"
    )]
    out: Option<ImageSource>,
    /// For whom: what is claimed under this name stays on UFS until `mkfs-accel delete
    /// --claim` gives it up [default: what is converted by hand stays until it is deleted by
    /// hand]
    #[arg(long, value_name = "HOLDER/NAME")]
    claim: Option<ClaimName>,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// Print lines of JSON instead: that the registries let us, or why one does not; how far
    /// the work is, every two seconds at least; and at the end what --json prints
    #[arg(long, conflicts_with = "json")]
    json_lines: bool,
}

/// What `--platform` names.
#[derive(Debug, Clone)]
enum Wanted {
    All,
    One(Platform),
}

impl FromStr for Wanted {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        match text {
            "all" => Ok(Self::All),
            text => text.parse().map(Self::One),
        }
    }
}

impl Arguments {
    fn tell(&self) -> Tell {
        match (self.json, self.json_lines) {
            (_, true) => Tell::Programs,
            (true, false) => Tell::Nothing,
            (false, false) => Tell::People,
        }
    }

    fn platforms(&self) -> Platforms {
        let mut these = Vec::new();
        for wanted in &self.platform {
            match wanted {
                Wanted::All => return Platforms::All,
                Wanted::One(platform) => these.push(platform.clone()),
            }
        }
        if these.is_empty() {
            these.push(Platform::host());
        }
        Platforms::These(these)
    }
}

fn push_target(text: &str) -> Result<ImageSource, String> {
    match text.parse().map_err(|error| format!("{error}"))? {
        target @ ImageSource::Registry(_) => Ok(target),
        _ => Err("a directory is written with --out".to_owned()),
    }
}

fn out_target(text: &str) -> Result<ImageSource, String> {
    match text.parse().map_err(|error| format!("{error}"))? {
        target @ ImageSource::Oci(_) => Ok(target),
        ImageSource::Registry(_) => Err("to a registry it goes with --push".to_owned()),
        _ => Err("archives are not written, only directories".to_owned()),
    }
}

/// What `--json` prints. `manifest` and `layers` are those of this machine's platform,
/// or of the first.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    manifest: Digest,
    seconds: f64,
    layers: Vec<LayerReport<'a>>,
    /// All that were converted.
    images: Vec<ImageReport<'a>>,
    /// Platforms that were not asked for.
    left_out: &'a [String],
    /// The accelerated images that were written.
    accelerated: &'a [Written],
}

#[derive(Debug, Serialize)]
struct ImageReport<'a> {
    platform: String,
    manifest: Digest,
    layers: Vec<LayerReport<'a>>,
}

impl<'a> ImageReport<'a> {
    fn new((image, layers): &'a (&Image, Vec<Done>), others: Option<&Needed>) -> Self {
        Self {
            platform: image.platform.to_string(),
            manifest: image.manifest,
            layers: layer_reports(layers, others),
        }
    }
}

#[derive(Debug, Serialize)]
struct Written {
    target: String,
    manifest: Digest,
}

#[derive(Debug, Serialize)]
struct LayerReport<'a> {
    fate: Fate,
    seconds: f64,
    /// Whether others need it, too: missing if that could not be found out.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<bool>,
    #[serde(flatten)]
    record: &'a LayerRecord,
}

fn layer_reports<'a>(layers: &'a [Done], others: Option<&Needed>) -> Vec<LayerReport<'a>> {
    let report = |done: &'a Done| LayerReport {
        fate: done.fate,
        seconds: done.took.as_secs_f64(),
        shared: others.map(|others| others.has(&done.record)),
        record: &done.record,
    };
    layers.iter().map(report).collect()
}

/// The layers that others have claimed.
struct Needed(HashSet<LayerName>);

impl Needed {
    /// By all but whom these images are claimed for.
    fn by_others(ufs: &Ufs, arguments: &Arguments, found: &Images) -> Result<Self, UfsError> {
        let by_hand = |name: &ClaimName| {
            let mut images = found.images.iter();
            images.any(|image| ClaimName::by_hand(&image.manifest) == *name)
        };
        let own = |name: &ClaimName| match &arguments.claim {
            Some(own) => own == name,
            None => by_hand(name),
        };
        let claims = ufs.claims()?;
        let others = claims
            .iter()
            .filter(|claim| !claim.going && !own(&claim.name));
        let layers = others.flat_map(|claim| &claim.record.layers);
        Ok(Self(layers.flat_map(ClaimedLayer::names).collect()))
    }

    fn has(&self, layer: &LayerRecord) -> bool {
        layer.name().is_some_and(|name| self.0.contains(&name))
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let done = work(arguments);
    if let Tell::Programs = arguments.tell() {
        tell_refusal(&done)?;
    }
    done
}

fn work(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let ufs = Ufs::open(&arguments.ufs)?;
    interrupt::on_interrupt(ufs.closer());
    let source = canonical(&arguments.source)?;
    let options = arguments.registry.options()?;
    let (found, targets) = open(arguments, &source, &options)?;
    if arguments.tell() == Tell::Programs {
        let targets: Vec<_> = targets.iter().map(|(name, _)| name).collect();
        let checked = serde_json::json!({"source": source.to_string(), "targets": targets});
        say!("{}", serde_json::json!({"checked": checked}))?;
    }

    // Before it is looked what is there: who deletes looks in the other order.
    let claimed = claim(&ufs, arguments, &source, &found)?;
    if !claimed.is_empty() {
        // Opened anew: this stays for good, and would keep the lease.
        let (root, claimed) = (ufs.root().to_owned(), claimed.clone());
        interrupt::on_interrupt(move || match Ufs::open(&root) {
            Ok(ufs) => give_up(&ufs, &claimed),
            Err(error) => tracing::warn!(%error, "the claim stays"),
        });
    }
    let done = convert(arguments, &ufs, &source, &found, &targets, started);
    if done.is_err() {
        give_up(&ufs, &claimed);
    }
    done
}

/// The source's manifests, and where the result goes, which takes it: before any work is done,
/// because what cannot be written must not cost hours.
fn open(
    arguments: &Arguments,
    source: &ImageSource,
    options: &OpenOptions,
) -> anyhow::Result<(Images, Vec<(String, Target)>)> {
    let found = accel_image::open_all(source, options, &arguments.platforms())?;
    for image in &found.images {
        let layers = image.layers.len();
        ensure!(
            layers <= record::MAX_LAYERS,
            "the image {} has {layers} layers; overlayfs stacks at most {}",
            image.manifest,
            record::MAX_LAYERS,
        );
    }
    if arguments.tell() == Tell::People {
        tell_of_others(&found)?;
    }
    let targets = [&arguments.out, &arguments.push].into_iter().flatten();
    let targets = targets.map(|target| {
        let opened = Target::open(target, options, source)?;
        Ok((target.to_string(), opened))
    });
    let targets = targets.collect::<anyhow::Result<Vec<_>>>()?;
    Ok((found, targets))
}

fn convert(
    arguments: &Arguments,
    ufs: &Ufs,
    source: &ImageSource,
    found: &Images,
    targets: &[(String, Target)],
    started: Instant,
) -> anyhow::Result<()> {
    let tell = arguments.tell();
    let jobs = arguments
        .jobs
        .map_or_else(jobs::default, |jobs| jobs.get().into());
    let mut done = Vec::new();
    for image in &found.images {
        if found.images.len() > 1 && tell == Tell::People {
            say!("{}: {}", image.platform, image.manifest)?;
        }
        // What an earlier one has is not converted again.
        let layers = layers::convert_all(ufs, image, jobs, tell)?;
        publish_image(ufs, source, image, &layers)?;
        done.push((image, layers));
    }
    // The source's name stands for this machine's image.
    let host = Platform::host();
    let main = done
        .iter()
        .find(|(image, _)| host.accepts(&image.platform))
        .or_else(|| done.first());
    let (main, main_layers) = main.context("the source has no image")?;
    remember(ufs, source, main.manifest)?;
    for index in &main.indexes {
        remember(ufs, index, main.manifest)?;
    }
    let written = accelerate(found, &done, targets)?;
    let took = started.elapsed();
    if tell != Tell::People {
        let others = Needed::by_others(ufs, arguments, found);
        let others = others
            .inspect_err(|error| tracing::warn!(%error, "who else needs its layers is not known"))
            .ok();
        let report = Report {
            source: source.to_string(),
            manifest: main.manifest,
            seconds: took.as_secs_f64(),
            layers: layer_reports(main_layers, others.as_ref()),
            images: (done.iter())
                .map(|image| ImageReport::new(image, others.as_ref()))
                .collect(),
            left_out: &found.left_out,
            accelerated: &written,
        };
        say!(
            "{}",
            match tell {
                Tell::Programs => serde_json::to_string(&report)?,
                _ => serde_json::to_string_pretty(&report)?,
            }
        )?;
        return Ok(());
    }
    for (image, layers) in &done {
        let sum = |of: fn(&Done) -> u64| Bytes(layers.iter().map(of).sum());
        say!(
            "image {}: {} layers, {} compressed, {} as EROFS, {}",
            image.manifest,
            layers.len(),
            sum(|done| done.record.size),
            sum(|done| done.record.erofs.size.bytes()),
            Seconds(took),
        )?;
    }
    let platforms: Vec<_> = done
        .iter()
        .map(|(image, _)| image.platform.to_string())
        .collect();
    for Written { target, manifest } in &written {
        let platforms = platforms.join(", ");
        say!("accelerated image {target}: {manifest}, for {platforms}")?;
    }
    Ok(())
}

/// What was converted so far stays for the next attempt, but is nobody's.
fn give_up(ufs: &Ufs, claims: &[NewClaim]) {
    for claim in claims {
        if let Err(error) = ufs.unclaim(claim) {
            tracing::warn!(%claim, %error, "the claim stays");
        }
    }
}

/// Says who needs what is going to be converted. Gives the claims that are new and by hand.
fn claim(
    ufs: &Ufs,
    arguments: &Arguments,
    source: &ImageSource,
    found: &Images,
) -> Result<Vec<NewClaim>, UfsError> {
    let record = |images: &[Image]| {
        let layers = images.iter().flat_map(|image| &image.layers);
        let indexes = images.iter().flat_map(|image| &image.indexes);
        let indexes: std::collections::BTreeSet<_> = indexes.map(Digest::to_string).collect();
        ClaimRecord {
            layout: record::LAYOUT,
            names: std::iter::once(source.to_string()).chain(indexes).collect(),
            targets: arguments.push.iter().map(ToString::to_string).collect(),
            images: images.iter().map(|image| image.manifest).collect(),
            layers: layers
                .map(|layer| ClaimedLayer {
                    diff_id: layer.diff_id,
                    chain_id: layer.chain_id,
                    digest: layer.digest,
                })
                .collect(),
        }
    };
    if let Some(name) = &arguments.claim {
        ufs.claim(name, &record(&found.images))?;
        return Ok(Vec::new());
    }
    let mut new = Vec::new();
    for image in &found.images {
        let name = ClaimName::by_hand(&image.manifest);
        new.extend(ufs.claim(&name, &record(std::slice::from_ref(image)))?);
    }
    Ok(new)
}

/// A word about what is in the index and will not be converted.
fn tell_of_others(found: &Images) -> io::Result<()> {
    if !found.left_out.is_empty() {
        let left_out = found.left_out.join(", ");
        say!("left out: {left_out} (choose with --platform, or take --platform all)")?;
    }
    match found.attestations {
        0 => Ok(()),
        1 => say!("left out: an attestation, which is no image"),
        more => say!("left out: {more} attestations, which are no images"),
    }
}

/// Writes the accelerated image. All of its layers are on UFS, so that its tag never
/// points to layers that are not.
fn accelerate(
    found: &Images,
    done: &[(&Image, Vec<Done>)],
    targets: &[(String, Target)],
) -> anyhow::Result<Vec<Written>> {
    let original = |digest: Digest| (ORIGINAL_KEY.to_owned(), digest.to_string());
    let images = done.iter().map(|(image, layers)| {
        let annotations = layers.iter().map(|done| {
            let record = &done.record;
            let layer = LayerAnnotations {
                diff_id: record.diff_id,
                root: record.erofs.root,
                size: record.erofs.size,
            };
            let mut annotations = layer.to_map();
            annotations.insert(IMAGE_KEY.to_owned(), image.manifest.to_string());
            annotations
        });
        Accelerated {
            image,
            own: [original(image.manifest)].into(),
            layers: annotations.collect(),
        }
    });
    let images: Vec<_> = images.collect();
    let mut index = found.annotations.clone();
    let outermost = done.first().and_then(|(image, _)| image.indexes.first());
    index.extend(outermost.copied().map(original));
    let write = |(name, target): &(String, Target)| {
        Ok(Written {
            target: name.clone(),
            manifest: target.write(&images, &index)?,
        })
    };
    targets.iter().map(write).collect()
}

/// Ties the layers of an image together.
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
    // First, so that who finds the record finds it.
    publish_start(ufs, &record)?;
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
    Ok(())
}

/// Publishes what mounting the image reads, of all its layers in one file.
fn publish_start(ufs: &Ufs, record: &ImageRecord) -> anyhow::Result<()> {
    let path = names::image_start(&record.manifest);
    // What is there already follows from the same layers.
    if ufs.path(&path).exists() {
        return Ok(());
    }
    let mut starts = Vec::new();
    for name in record.layers.iter().filter_map(LayerRecord::name) {
        match Published::open(ufs, &name).and_then(|layer| layer.start()) {
            Ok(start) => starts.push(start),
            // It was there before, and is not this conversion's to judge; who mends it
            // converts again.
            Err(error) => {
                complain!("mounting the image reads more of UFS than it need: {error}");
                return Ok(());
            }
        }
    }
    match ufs.publish(&path, &start::encode(&starts)) {
        Ok(_) | Err(UfsError::Differs { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Notes what `source` points to. What is noted already leaves no trace.
fn remember(ufs: &Ufs, source: &dyn Display, manifest: Digest) -> Result<(), UfsError> {
    if ufs
        .manifest_of(source)
        .is_ok_and(|last| last == Some(manifest))
    {
        return Ok(());
    }
    let name = NameRecord {
        layout: record::LAYOUT,
        source: source.to_string(),
        manifest,
    };
    ufs.publish_name(source, &name.to_json())
}
