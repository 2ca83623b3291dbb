//! `mkfs-accel gc`: what converters that are no more left unfinished.
//!
//! Temporaries go with the lease of their maker (`accel_ufs::lease`): what a living
//! process works on is never touched, on whatever machine it is. A temporary without
//! any lease, which no converter leaves, goes when it has not changed for as long as
//! a lease may be silent.
//!
//! An image without an index lies under its final name but is not published: its
//! maker ended between the two. The next conversion of the layer would complete it.
//! If there is none, and nobody else is at work, it goes too. (A converter that
//! begins just then and meets the image looks after it again once its index is
//! there.)
//!
//! What nodes read to see whether they can (`accel_ufs::canary`) goes when its node has had
//! no other for a day.
//!
//! A layer that no image has and nobody has claimed is whole: a conversion had finished it
//! when it failed. The next attempt will use it, so it is only named, unless it is asked
//! for (`--unclaimed`); then it goes in the way of `mkfs-accel delete`.

use super::InUse;
use crate::interrupt;
use crate::output::{Bytes, say};
use accel_ufs::UfsError;
use accel_ufs::claim::{BY_HAND, ClaimName, ClaimRecord};
use accel_ufs::lease::{EXPIRY, FoundLease, Owner, Sign};
use accel_ufs::names::LayerName;
use accel_ufs::publish::Ufs;
use accel_ufs::removal::{Outcome, Removal, Removed};
use serde::Serialize;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// How long to watch a process of another machine that seems to be dead,
    /// before its files are removed. Living ones say so every 20 seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    watch: u64,
    /// Also remove layers that no image has and nobody has claimed, which conversions that
    /// failed had finished
    #[arg(long)]
    unclaimed: bool,
    /// As of `delete`: seconds to wait, twice, for what nodes say that they use
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        requires = "unclaimed"
    )]
    settle: u64,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    /// Bytes of what was removed.
    bytes: u64,
    removed: Vec<Item>,
    kept: Vec<Item>,
    /// What became of layers without an image, with `--unclaimed`.
    unclaimed: Option<Removed>,
}

#[derive(Debug, Serialize)]
struct Item {
    path: PathBuf,
    /// In bytes.
    size: u64,
    why: &'static str,
}

/// What is to become of a file, and why.
type Judgement = Result<Keep, Remove>;
#[derive(Debug, Clone, Copy)]
struct Keep(&'static str);
#[derive(Debug, Clone, Copy)]
struct Remove(&'static str);

const GONE: Remove = Remove("the process that made it is gone");
const SILENT: Remove = Remove("the process that made it, on another machine, was silent for long");
const OWNERLESS: Remove = Remove("nobody's, and unchanged for long");
const INDEXLESS: Remove = Remove("an image without its index, which nobody works on");
const UNCLAIMED: &str = "a layer that no image has: the next conversion that needs it will use it, and --unclaimed removes it";
const ABANDONED: Remove = Remove("the canary of a node that is gone");
const DAMAGED: Remove = Remove("was damaged, and replaced by mkfs-accel repair");
const ALIVE: Keep = Keep("the process that makes it is at work");
const YOUNG: Keep = Keep("nobody's that is known, but changed not long ago");

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    interrupt::on_interrupt(ufs.closer());
    // In this order: a living process's lease is older than its temporaries.
    let temporaries = ufs.temporaries()?;
    let clock = ufs.clock()?;
    let leases = judge_leases(&ufs, clock, Duration::from_secs(arguments.watch))?;
    let mut sweep = Sweep {
        report: Report {
            dry_run: arguments.dry_run,
            bytes: 0,
            removed: Vec::new(),
            kept: Vec::new(),
            unclaimed: None,
        },
        lines: !arguments.json,
    };
    for temporary in temporaries {
        let lease = temporary.owner.as_ref().and_then(|owner| leases.get(owner));
        let judgement = match lease {
            Some((_, judgement)) => *judgement,
            None => match is_old(temporary.modified, clock) {
                true => Err(OWNERLESS),
                false => Ok(YOUNG),
            },
        };
        sweep.file(&temporary.path, temporary.size, judgement)?;
    }
    // Behind the temporaries that they are about.
    for (path, judgement) in leases.values() {
        match judgement {
            Ok(_) => {}
            Err(_) if arguments.dry_run => {}
            Err(_) => remove(path)?,
        }
    }
    if !arguments.dry_run {
        ufs.tidy_turns()?;
    }
    for (path, size) in ufs.quarantined()? {
        sweep.file(&path, size, Err(DAMAGED))?;
    }
    for (path, size) in ufs.abandoned_canaries(clock)? {
        sweep.file(&path, size, Err(ABANDONED))?;
    }
    let is_dead = |lease: &FoundLease| {
        let owner = lease.owner.as_ref();
        let judged = owner.and_then(|owner| leases.get(owner));
        owner == Some(ufs.owner()) || judged.is_some_and(|(_, judgement)| judgement.is_err())
    };
    if ufs.leases()?.iter().all(is_dead) {
        for (path, size) in indexless(&ufs, clock)? {
            sweep.file(&path, size, Err(INDEXLESS))?;
        }
    }
    if arguments.unclaimed && !arguments.dry_run {
        let layers = ufs.unclaimed_layers()?;
        sweep.report.unclaimed = Some(remove_unclaimed(&ufs, &layers, arguments.settle)?);
    } else {
        let judgement = match arguments.unclaimed {
            true => Err(Remove("a layer that no image has")),
            false => Ok(Keep(UNCLAIMED)),
        };
        match ufs.unclaimed_layers() {
            Ok(layers) => sweep.layers(&ufs, &layers, judgement)?,
            // Everything else is done, and needs no claim or image that is whole.
            Err(error) if !arguments.unclaimed => {
                tracing::warn!(%error, "which layers no image has is not known");
            }
            Err(error) => return Err(error.into()),
        }
    }
    sweep.finish()
}

/// Claims the layers, and gives them up: a converter that begins meanwhile, a node that
/// mounts one, and an end at any moment are then what they are to every removal.
fn remove_unclaimed(ufs: &Ufs, layers: &[LayerName], settle: u64) -> anyhow::Result<Removed> {
    let name = ClaimName {
        holder: BY_HAND.to_owned(),
        name: "unclaimed".to_owned(),
    };
    if !layers.is_empty() {
        ufs.claim(&name, &ClaimRecord::of_layers(layers))?;
    }
    // Without layers: of one that was interrupted.
    match Removal::new(ufs, &name, &[])?.run(|| thread::sleep(Duration::from_secs(settle)))? {
        Outcome::Removed(removed) => Ok(removed),
        Outcome::InUse(users) => Err(InUse(users).into()),
    }
}

/// Every lease but our own, and whether its holder lives.
type Leases = HashMap<Owner, (PathBuf, Judgement)>;

fn judge_leases(ufs: &Ufs, clock: SystemTime, watch: Duration) -> anyhow::Result<Leases> {
    let mut all = Leases::new();
    let mut silent: Vec<(FoundLease, Owner, SystemTime)> = Vec::new();
    for lease in ufs.leases()? {
        let Some(owner) = lease.owner.clone().filter(|owner| owner != ufs.owner()) else {
            continue;
        };
        let judgement = match lease.look()? {
            // Given up since, and its temporaries before it.
            None => continue,
            Some(Sign::Held) => Ok(ALIVE),
            Some(Sign::Abandoned) => Err(GONE),
            Some(Sign::Renewed(time)) if is_old(Some(time), clock) => {
                silent.push((lease, owner, time));
                continue;
            }
            Some(Sign::Renewed(_)) => Ok(ALIVE),
        };
        all.insert(owner, (lease.path, judgement));
    }
    if silent.is_empty() {
        return Ok(all);
    }
    // A clock may be wrong; a change is a change.
    thread::sleep(watch);
    for (lease, owner, time) in silent {
        let judgement = match lease.look()? {
            None => continue,
            Some(Sign::Renewed(again)) if again == time => Err(SILENT),
            Some(_) => Ok(ALIVE),
        };
        all.insert(owner, (lease.path, judgement));
    }
    Ok(all)
}

fn is_old(modified: Option<SystemTime>, clock: SystemTime) -> bool {
    modified
        .and_then(|modified| clock.duration_since(modified).ok())
        .is_some_and(|age| age >= EXPIRY)
}

/// Images without an index that have been lying there for long, with their sizes.
fn indexless(ufs: &Ufs, clock: SystemTime) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for file in ufs.layer_files()? {
        let path = ufs.path(&file);
        if path.extension() != Some("erofs".as_ref()) || path.with_extension("idx").try_exists()? {
            continue;
        }
        let metadata = fs::metadata(&path).map_err(UfsError::io("look at", &path))?;
        if is_old(metadata.modified().ok(), clock) {
            found.push((path, metadata.len()));
        }
    }
    Ok(found)
}

/// Removes files and tells of them.
struct Sweep {
    report: Report,
    lines: bool,
}

impl Sweep {
    fn file(&mut self, path: &Path, size: u64, judgement: Judgement) -> anyhow::Result<()> {
        let item = |why| Item {
            path: path.to_owned(),
            size,
            why,
        };
        let (done, Ok(Keep(why)) | Err(Remove(why))) = (
            match judgement {
                Ok(_) => "kept",
                Err(_) if self.report.dry_run => "would remove",
                Err(_) => "removed",
            },
            judgement,
        );
        match judgement {
            Ok(Keep(why)) => self.report.kept.push(item(why)),
            Err(Remove(why)) => {
                if !self.report.dry_run {
                    remove(path)?;
                }
                self.report.bytes += size;
                self.report.removed.push(item(why));
            }
        }
        if self.lines {
            say!("{done} {} ({}): {why}", path.display(), Bytes(size))?;
        }
        Ok(())
    }

    fn layers(
        &mut self,
        ufs: &Ufs,
        layers: &[LayerName],
        judgement: Judgement,
    ) -> anyhow::Result<()> {
        for file in layers
            .iter()
            .flat_map(|layer| [layer.image(), layer.index()])
        {
            let size = ufs.regular_file(&file)?.unwrap_or_default();
            self.file(&ufs.path(&file), size, judgement)?;
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        let report = self.report;
        if !self.lines {
            say!("{}", serde_json::to_string_pretty(&report)?)?;
            return Ok(());
        }
        let done = match report.dry_run {
            true => "to remove",
            false => "removed",
        };
        let (count, bytes) = (report.removed.len(), Bytes(report.bytes));
        say!("{count} unfinished files {done}, {bytes}")?;
        if let Some(removed) = report.unclaimed {
            let (layers, bytes) = (removed.layers, Bytes(removed.bytes));
            say!("{layers} layers removed that no image has, {bytes}")?;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), UfsError> {
    match fs::remove_file(path) {
        // Its maker was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(UfsError::io("remove", path)),
    }
}
