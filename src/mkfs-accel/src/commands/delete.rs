//! `mkfs-accel delete`: gives up a claim, and removes what nobody needs any more.

use crate::interrupt;
use crate::output::{Bytes, say};
use crate::registry::RegistryArguments;
use accel_image::{OpenOptions, Untagged, remove_tag};
use accel_oci::{ImageSource, RegistryReference};
use accel_ufs::annotations::ORIGINAL_KEY;
use accel_ufs::claim::{ClaimName, ClaimRecord, FoundClaim};
use accel_ufs::node::{NodeName, SETTLE};
use accel_ufs::publish::Ufs;
use accel_ufs::record::ImageRecord;
use accel_ufs::removal::{Outcome, Removal, Removed, User};
use accel_ufs::resolve::ImageName;
use anyhow::Context;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(
        help = "An image that was converted by hand: its source, or the digest of its manifest",
        value_name = "IMAGE",
        required_unless_present = "claim"
    )]
    image: Option<ImageName>,
    /// Instead of an image, what was converted with this --claim
    #[arg(long, value_name = "HOLDER/NAME", conflicts_with = "image")]
    claim: Option<ClaimName>,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Leave the tags of accelerated images in their registries
    #[arg(long)]
    keep_tags: bool,
    #[arg(
        long,
        value_name = "CLUSTER/NODE",
        value_parser = node,
        help = "A node that is no more: what it has said last counts no longer; may be given several times"
    )]
    gone: Vec<NodeName>,
    /// Seconds to wait for what nodes say of themselves, twice; longer than the pause between
    /// two looks of their agents
    #[arg(long, value_name = "SECONDS", default_value_t = SETTLE.as_secs())]
    settle: u64,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

fn node(text: &str) -> Result<NodeName, String> {
    let name = text
        .split_once('/')
        .and_then(|(cluster, node)| NodeName::new(cluster, node));
    name.ok_or_else(|| format!("{text:?} is not CLUSTER/NODE"))
}

/// Nodes use what was to be deleted.
#[derive(Debug, thiserror::Error)]
#[error("nothing is removed from UFS, because nodes use it: {}; try again when they do not, or name a node that is no more with --gone", names(.0))]
pub struct InUse(pub Vec<User>);

fn names(users: &[User]) -> String {
    let names = users.iter().map(|user| {
        let NodeName { cluster, node } = &user.name;
        match user.expired {
            true => format!("{node} of cluster {cluster}, perhaps: it has been silent for long"),
            false => format!("{node} of cluster {cluster}"),
        }
    });
    names.collect::<Vec<_>>().join(", ")
}

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// None if nothing was.
    removed: Option<Removed>,
    /// Nodes because of which nothing was.
    in_use: Vec<User>,
    /// Tags that are gone.
    untagged: Vec<String>,
    /// What stays although it should not.
    warnings: Vec<String>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    interrupt::on_interrupt(ufs.closer());
    let options = arguments.registry.options()?;
    let name = match (&arguments.claim, &arguments.image) {
        (Some(name), _) => name.clone(),
        (None, Some(image)) => by_hand(&ufs, image)?,
        (None, None) => anyhow::bail!("neither an image nor --claim is given"),
    };
    let removal = Removal::new(&ufs, &name, &arguments.gone)?;
    let mut report = Report {
        in_use: removal.users()?,
        ..Report::default()
    };
    if report.in_use.is_empty() {
        // First, so that nobody begins to use it.
        if !arguments.keep_tags {
            untag(&removal, &options, &mut report)?;
        }
        let settle = || thread::sleep(Duration::from_secs(arguments.settle));
        match removal.run(settle)? {
            Outcome::Removed(removed) => report.removed = Some(removed),
            Outcome::InUse(users) => report.in_use = users,
        }
    }
    // Only tidies: what they have said is over. Whose directory that is may be another's.
    for node in &arguments.gone {
        if let Err(error) = ufs.forget_node(node) {
            tracing::warn!(%error, "what a node that is no more has said stays");
        }
    }
    tell(arguments.json, &report)?;
    match report.in_use.is_empty() {
        true => Ok(()),
        false => Err(InUse(report.in_use).into()),
    }
}

/// The claim of an image that was converted by hand. One from before there were claims gets it.
fn by_hand(ufs: &Ufs, image: &ImageName) -> anyhow::Result<ClaimName> {
    let claims = ufs.claims()?;
    if let ImageName::Manifest(manifest) = image {
        // Of a conversion that was killed, too.
        let name = ClaimName::by_hand(manifest);
        if claims.iter().any(|claim| claim.name == name) {
            return Ok(name);
        }
    }
    let record: ImageRecord = ufs.resolve(image)?;
    let name = ClaimName::by_hand(&record.manifest);
    if claims.iter().any(|claim| claim.name == name) {
        return Ok(name);
    }
    let holder = claims
        .iter()
        .find(|claim| !claim.going && claim.record.images.contains(&record.manifest));
    if let Some(holder) = holder {
        anyhow::bail!(
            "{image} was not converted by hand but for {}: it is deleted there, or with --claim {}",
            holder.name.holder,
            holder.name
        );
    }
    ufs.claim(&name, &ClaimRecord::of(&record))?;
    Ok(name)
}

/// Takes the tags away that were pushed, but for those that others have pushed, too.
fn untag(removal: &Removal<'_>, options: &OpenOptions, report: &mut Report) -> anyhow::Result<()> {
    let targets = |claim: &FoundClaim| claim.record.targets.clone();
    let own: BTreeSet<String> = removal.claims().iter().flat_map(targets).collect();
    let others: BTreeSet<String> = removal.others().flat_map(targets).collect();
    // What an accelerated image says that it was made from: an image, or an index of them.
    let originals = |claim: &FoundClaim| {
        let images = claim.record.images.iter().map(ToString::to_string);
        images
            .chain(claim.record.names.iter().cloned())
            .collect::<Vec<_>>()
    };
    let ours: Vec<_> = removal.claims().iter().flat_map(originals).collect();
    for target in own.difference(&others) {
        let reference = registry(target)?;
        let shared = removal.others().any(|claim| {
            let same = |target: &String| {
                registry(target).is_ok_and(|other| {
                    (&other.registry, &other.repository)
                        == (&reference.registry, &reference.repository)
                })
            };
            claim.record.targets.iter().any(same)
                && originals(claim).iter().any(|one| ours.contains(one))
        });
        match remove_tag(&reference, options, ORIGINAL_KEY, &ours, shared)? {
            Untagged::Gone => report.untagged.push(target.clone()),
            Untagged::Absent => {}
            Untagged::Foreign => report
                .warnings
                .push(format!("{target} stays: it is another image by now")),
            Untagged::Refused(why) => report.warnings.push(format!("{target} stays: {why}")),
        }
    }
    Ok(())
}

fn registry(target: &str) -> anyhow::Result<RegistryReference> {
    match target.parse() {
        Ok(ImageSource::Registry(reference)) => Ok(reference),
        _ => Err(anyhow::anyhow!("{target:?} is no image in a registry")),
    }
    .context("a claim on UFS is damaged")
}

fn tell(json: bool, report: &Report) -> anyhow::Result<()> {
    if json {
        say!("{}", serde_json::to_string(report)?)?;
        return Ok(());
    }
    for tag in &report.untagged {
        say!("removed {tag}")?;
    }
    for warning in &report.warnings {
        say!("warning: {warning}")?;
    }
    if let Some(removed) = &report.removed {
        say!(
            "removed from UFS: {} images and {} layers, {}; {} layers stay, which others need",
            removed.images.len(),
            removed.layers,
            Bytes(removed.bytes),
            removed.kept,
        )?;
    }
    Ok(())
}
