//! `mkfs-accel convert`: an image and all of its layers, and the accelerated image
//! that names them.

use crate::layers::{self, Done, Fate};
use crate::output::{Bytes, Seconds, say};
use crate::{interrupt, jobs};
use accel_image::{Credentials, Image, OpenOptions, Target};
use accel_oci::{Digest, ImageSource, Platform};
use accel_ufs::UfsError;
use accel_ufs::annotations::{LayerAnnotations, ORIGINAL_KEY};
use accel_ufs::names;
use accel_ufs::publish::{Outcome, Ufs};
use accel_ufs::record::{self, ImageRecord, LayerRecord, NameRecord, Process};
use accel_ufs::resolve::canonical;
use anyhow::{Context, bail, ensure};
use serde::Serialize;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU16;
use std::path::PathBuf;
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
    /// Talk HTTP instead of HTTPS to the registry
    #[arg(long)]
    plain_http: bool,
    /// The user's name for the registry, instead of the logins of docker, podman
    /// or skopeo
    #[arg(long, value_name = "NAME", requires = "password")]
    username: Option<String>,
    /// Read the password from standard input
    #[arg(long, group = "password", requires = "username")]
    password_stdin: bool,
    /// Read the password from a file
    #[arg(long, group = "password", requires = "username", value_name = "FILE")]
    password_file: Option<PathBuf>,
    #[arg(
        long,
        value_name = "OS/ARCHITECTURE[/VARIANT]",
        help = "Which image of a multi-platform one [default: linux and this machine's architecture]"
    )]
    platform: Option<Platform>,
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
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// The credentials that the user gives here.
    fn credentials(&self) -> anyhow::Result<Option<Credentials>> {
        let Some(user) = self.username.clone() else {
            return Ok(None);
        };
        let mut text = String::new();
        match &self.password_file {
            Some(path) => File::open(path)
                .and_then(|file| file.take(MAX_PASSWORD).read_to_string(&mut text))
                .with_context(|| format!("cannot read the password from {path:?}"))?,
            None => io::stdin()
                .take(MAX_PASSWORD)
                .read_to_string(&mut text)
                .context("cannot read the password from standard input")?,
        };
        // The end of the line is not part of it.
        let password = text.strip_suffix('\n').unwrap_or(&text);
        let password = password.strip_suffix('\r').unwrap_or(password).to_owned();
        ensure!(!password.is_empty(), "the password is empty");
        Ok(Some(Credentials { user, password }))
    }
}

/// Longer than any token that serves as a password, in bytes.
const MAX_PASSWORD: u64 = 64 << 10;

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

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    manifest: Digest,
    seconds: f64,
    layers: Vec<LayerReport<'a>>,
    /// The accelerated images that were written.
    accelerated: &'a [Accelerated],
}

#[derive(Debug, Serialize)]
struct Accelerated {
    target: String,
    manifest: Digest,
}

#[derive(Debug, Serialize)]
struct LayerReport<'a> {
    fate: Fate,
    seconds: f64,
    #[serde(flatten)]
    record: &'a LayerRecord,
}

impl<'a> LayerReport<'a> {
    fn new(done: &'a Done) -> Self {
        Self {
            fate: done.fate,
            seconds: done.took.as_secs_f64(),
            record: &done.record,
        }
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let ufs = Ufs::open(&arguments.ufs)?;
    interrupt::on_interrupt(ufs.closer());
    let source = canonical(&arguments.source)?;
    let options = OpenOptions {
        credentials: arguments.credentials()?,
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

    // Before any work is done: what cannot be written must not cost hours.
    let targets = [&arguments.out, &arguments.push].into_iter().flatten();
    let targets = targets
        .map(|target| {
            let opened = Target::open(target, &options, &source)?;
            Ok((target.to_string(), opened))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;

    let jobs = arguments
        .jobs
        .map_or_else(jobs::default, |jobs| jobs.get().into());
    let all = layers::convert_all(&ufs, &image, jobs, !arguments.json)?;
    publish_image(&ufs, &source, &image, &all)?;
    let accelerated = accelerate(&image, &all, &targets)?;
    let took = started.elapsed();
    if arguments.json {
        let report = Report {
            source: source.to_string(),
            manifest: image.manifest,
            seconds: took.as_secs_f64(),
            layers: all.iter().map(LayerReport::new).collect(),
            accelerated: &accelerated,
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
    for Accelerated { target, manifest } in &accelerated {
        say!(
            "accelerated image {target}: {manifest}, for {}",
            image.platform
        )?;
    }
    Ok(())
}

/// Writes the accelerated image. All of its layers are on UFS, so that its tag never
/// points to layers that are not.
fn accelerate(
    image: &Image,
    layers: &[Done],
    targets: &[(String, Target)],
) -> anyhow::Result<Vec<Accelerated>> {
    let own = [(ORIGINAL_KEY.to_owned(), image.manifest.to_string())].into();
    let layers: Vec<_> = layers
        .iter()
        .map(|done| {
            let record = &done.record;
            LayerAnnotations {
                diff_id: record.diff_id,
                root: record.erofs.root,
                size: record.erofs.size,
            }
            .to_map()
        })
        .collect();
    let write = |(name, target): &(String, Target)| {
        Ok(Accelerated {
            target: name.clone(),
            manifest: target.write(image, &own, &layers)?,
        })
    };
    targets.iter().map(write).collect()
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
    remember(ufs, source, image.manifest)?;
    for index in &image.indexes {
        remember(ufs, index, image.manifest)?;
    }
    Ok(())
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
