//! The layers of an image, several at a time.
//!
//! Threads take the layers lowest first. A layer waits for another only
//!
//! * when it asks for the attributes of a directory below it, for the nearest
//!   layers one after the other, and
//! * when it has the same diffID as a lower one: that may already be all of it.
//!
//! Both are lower layers, which were taken before it; so the lowest unfinished
//! layer never waits, and all of them come to their end. What is published does
//! not depend on the number of threads.
//!
//! The first error stops the others where they are. What was published before
//! stays: the next run goes on from there.

use crate::output::{Bytes, Seconds, say};
use crate::progress::{Bar, Bars};
use crate::published::{Below, Names, Published};
use crate::sink::{self, Converted};
use crate::tree::{Kind, Tree};
use accel_image::{Image, Layer};
use accel_layer::{Compression, Expected, LayerOptions, LowerError};
use accel_ufs::UfsError;
use accel_ufs::index::{ImageSize, Layout, Root};
use accel_ufs::names::{self, LayerName};
use accel_ufs::publish::{Outcome, Publication, Ufs};
use accel_ufs::record::{self, DigestRecord, ErofsRecord, LayerRecord};
use accel_ufs::turn::Turn;
use anyhow::{Context, bail, ensure};
use serde::Serialize;
use std::io::{self, Read, Seek};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What became of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It was there before.
    Present,
    /// It was read and published.
    Converted,
    /// It was read, but another converter had published it meanwhile.
    Overtaken,
}

/// A layer that is on UFS now.
#[derive(Debug)]
pub struct Done {
    /// How it came there.
    pub fate: Fate,
    /// What it is.
    pub record: LayerRecord,
    /// How long it took.
    pub took: Duration,
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

/// What is told of the work while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tell {
    /// Nothing.
    Nothing,
    /// A line for each layer, and bars on a terminal.
    People,
    /// JSON objects, one a line: [`Progress`].
    Programs,
}

/// How far the work is.
#[derive(Debug, Serialize)]
struct Progress {
    progress: Figures,
}

#[derive(Debug, Serialize)]
struct Figures {
    platform: String,
    layers: usize,
    /// Those of them that are on UFS.
    layers_done: usize,
    /// What has to be read for the others.
    bytes: u64,
    /// What has been read of that.
    bytes_done: u64,
}

/// How often to look whether another process is done with a layer.
const LOOK: Duration = Duration::from_millis(100);
/// How long to wait for a process that converts the same layer.
const PATIENCE: Duration = accel_ufs::lease::EXPIRY;

/// How long [`Tell::Programs`] may say nothing.
const INTERVAL: Duration = Duration::from_secs(2);

/// Sees to it that every layer of `image` is on UFS, `jobs` at a time.
pub fn convert_all(ufs: &Ufs, image: &Image, jobs: usize, tell: Tell) -> anyhow::Result<Vec<Done>> {
    let size = image.layers.iter().map(|layer| layer.size).sum();
    let show = tell == Tell::People;
    let work = Work {
        ufs,
        image,
        bars: Bars::new(show, size),
        show,
        stop: AtomicBool::new(false),
        state: Mutex::new(State {
            next: 0,
            done: image.layers.iter().map(|_| None).collect(),
            failed: None,
        }),
        changed: Condvar::new(),
    };
    thread::scope(|scope| {
        if tell == Tell::Programs {
            scope.spawn(|| work.tell());
        }
        // The caller's thread is one of them.
        for _ in 1..jobs.min(image.layers.len()) {
            scope.spawn(|| work.run());
        }
        work.run();
    });
    let state = work
        .state
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.failed {
        return Err(error);
    }
    let done: Option<Vec<_>> = state.done.into_iter().collect();
    done.context("a layer was left out")
}

/// What the threads share.
struct Work<'a> {
    ufs: &'a Ufs,
    image: &'a Image,
    bars: Bars,
    show: bool,
    /// Set with the first error, for those who only look now and then.
    stop: AtomicBool,
    state: Mutex<State>,
    /// A layer is done, or has failed.
    changed: Condvar,
}

struct State {
    /// The lowest layer that nobody has taken yet.
    next: usize,
    /// The layers that are on UFS.
    done: Vec<Option<Done>>,
    /// The first error.
    failed: Option<anyhow::Error>,
}

/// Another layer has failed.
#[derive(Debug, thiserror::Error)]
#[error("another layer failed")]
struct GivenUp;

impl Work<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thread: takes layers until there are no more, or one failed.
    fn run(&self) {
        while let Some(number) = self.take() {
            let guard = Unwinding(self);
            let result = self.layer(number);
            std::mem::forget(guard);
            match result {
                Ok(done) => self.lock().done[number] = Some(done),
                Err(error) => self.fail(error),
            }
            self.changed.notify_all();
        }
    }

    /// Tells how far the work is, until it is over.
    fn tell(&self) {
        let mut state = self.lock();
        loop {
            let layers_done = state.done.iter().flatten().count();
            let over = state.failed.is_some() || layers_done == state.done.len();
            drop(state);
            let (bytes_done, bytes) = self.bars.read();
            let progress = Progress {
                progress: Figures {
                    platform: self.image.platform.to_string(),
                    layers: self.image.layers.len(),
                    layers_done,
                    bytes,
                    bytes_done,
                },
            };
            let told = serde_json::to_string(&progress)
                .map_err(io::Error::from)
                .and_then(|line| say!("{line}"));
            if let Err(error) = told {
                return self.fail(error.into());
            }
            if over {
                return;
            }
            state = self.lock();
            // Nothing may have been missed meanwhile.
            if state.done.iter().flatten().count() == layers_done && state.failed.is_none() {
                let waited = self.changed.wait_timeout(state, INTERVAL);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn take(&self) -> Option<usize> {
        let mut state = self.lock();
        if state.failed.is_some() || state.next == state.done.len() {
            return None;
        }
        state.next += 1;
        Some(state.next - 1)
    }

    /// Has everything end; the first error is the one that counts.
    fn fail(&self, error: anyhow::Error) {
        self.lock().failed.get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
        self.image.stop();
        self.changed.notify_all();
    }

    /// The name of a lower layer, once it is on UFS.
    fn wait(&self, number: usize) -> Result<LayerName, GivenUp> {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() {
                return Err(GivenUp);
            }
            let done = state.done.get(number).and_then(Option::as_ref);
            if let Some(name) = done.and_then(|done| done.record.name()) {
                return Ok(name);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sees to it that the layer is on UFS.
    fn layer(&self, number: usize) -> anyhow::Result<Done> {
        let layers = &self.image.layers;
        let layer = &layers[number];
        // The nearest that is the same: it has waited for those below it.
        if let Some(same) = (0..number)
            .rev()
            .find(|lower| layers[*lower].diff_id == layer.diff_id)
        {
            self.wait(same)?;
        }
        let started = Instant::now();
        let mut found = self.ufs.find_layer(layer.diff_id, layer.chain_id)?;
        // Another process may be at it: once it is done there is nothing to do.
        let mut turn = None;
        if found.is_none() {
            turn = self.turn(layer)?;
            found = self.ufs.find_layer(layer.diff_id, layer.chain_id)?;
        }
        let noted = self.noted(layer)?;
        let hides = match (&noted, &found) {
            (Some(record), _) => record.whiteouts,
            // Of another blob, or of a converter that has not come to its note.
            (None, Some(name @ LayerName::Layer(_))) => self.hides_lower(name)?,
            (None, _) => false,
        };
        let found = match found {
            // Made for other places in an image.
            Some(LayerName::Layer(_)) if number == 0 && hides => None,
            found => found,
        };
        let (name, fate, root, size, whiteouts) = match found {
            Some(name) => {
                let header = self.ufs.index_header(&name)?;
                self.bars.skip(layer.size);
                (
                    name,
                    Fate::Present,
                    header.root(),
                    header.image_size(),
                    hides,
                )
            }
            None => {
                let label = format!("layer {}/{}", number + 1, layers.len());
                let bar = self.bars.bar(label, layer.size);
                self.convert(number, bar)?
            }
        };
        drop(turn);
        // Also for a converter that ended before it came to that.
        if noted.is_none() {
            self.note_digest(layer, whiteouts)?;
        }
        let done = Done {
            fate,
            took: started.elapsed(),
            record: LayerRecord {
                diff_id: layer.diff_id,
                chain_id: layer.chain_id,
                digest: layer.digest,
                media_type: layer.media_type.clone(),
                size: layer.size,
                erofs: ErofsRecord {
                    path: name.image(),
                    root,
                    size,
                    uuid: name.uuid(),
                    index_size: Layout::new(size).index_size(),
                },
            },
        };
        if self.show {
            let (count, digest) = (layers.len(), layer.digest);
            self.bars
                .say(|| say!("layer {}/{count} {digest}: {done}", number + 1))?;
        }
        Ok(done)
    }

    /// Waits until no other process converts the layer; `None` if that takes so long that
    /// the other one may be stuck.
    fn turn(&self, layer: &Layer) -> anyhow::Result<Option<Turn>> {
        let mut waits = None;
        loop {
            if let Some(turn) = self.ufs.turn(layer.chain_id)? {
                return Ok(Some(turn));
            }
            let since = *waits.get_or_insert_with(|| {
                tracing::info!(layer = %layer.digest, "another process converts it: waiting");
                Instant::now()
            });
            if since.elapsed() > PATIENCE {
                tracing::warn!(layer = %layer.digest, "another process has been converting it for {PATIENCE:?}: not waiting any longer");
                return Ok(None);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(GivenUp.into());
            }
            thread::sleep(LOOK);
        }
    }

    /// Reads the layer and publishes what it becomes.
    fn convert(
        &self,
        number: usize,
        bar: Bar,
    ) -> anyhow::Result<(LayerName, Fate, Root, ImageSize, bool)> {
        let Made {
            publication,
            name,
            root,
            size,
            index,
            whiteouts,
        } = make(self.ufs, self.image, number, self, bar, &self.stop)?;
        let fate = self.publish(&publication, &name, root, &index)?;
        Ok((name, fate, root, size, whiteouts))
    }

    /// What is noted of the layer's blob.
    fn noted(&self, layer: &Layer) -> Result<Option<DigestRecord>, UfsError> {
        let record = self.ufs.read_record(&names::by_digest(&layer.digest))?;
        Ok(record.and_then(|json| DigestRecord::parse(&json).ok()))
    }

    /// Whether a layer that is on UFS has whiteouts.
    fn hides_lower(&self, name: &LayerName) -> anyhow::Result<bool> {
        let published = Published::open(self.ufs, name)?;
        let mut hides = false;
        Tree::open(&published)?.walk(|entry| {
            hides |= entry.kind() == Kind::Whiteout || entry.is_opaque();
            Ok(())
        })?;
        Ok(hides)
    }

    /// Notes the diffID of the layer's blob.
    fn note_digest(&self, layer: &Layer, whiteouts: bool) -> Result<(), UfsError> {
        let digest = DigestRecord {
            layout: record::LAYOUT,
            digest: layer.digest,
            diff_id: layer.diff_id,
            whiteouts,
        };
        self.ufs
            .publish(&names::by_digest(&layer.digest), &digest.to_json())?;
        Ok(())
    }

    /// The image first, its index last: the index is the commit.
    fn publish(
        &self,
        publication: &Publication,
        name: &LayerName,
        root: Root,
        index: &[u8],
    ) -> anyhow::Result<Fate> {
        let image = publication.commit(&name.image())?;
        if image == Outcome::AlreadyThere {
            // Of a converter that works on the same layer now, or that died
            // before it came to its index.
            let path = self.ufs.path(&name.image());
            let there = self.ufs.open_layer_file(&name.image());
            let mut there = there.map_err(UfsError::io("open", &path))?;
            let found = hash(&mut there).map_err(UfsError::io("read", &path))?;
            if found != root {
                bail!(
                    "{path:?} is already there, but has the root {found} instead of {root}: it is damaged, or was made by another version of the converter; look at it, then remove it and its index"
                );
            }
        }
        let outcome = self.ufs.publish(&name.index(), index)?;
        if image == Outcome::AlreadyThere {
            // Before its index was there, gc may have taken it for nobody's.
            publication.commit(&name.image())?;
        }
        Ok(match outcome {
            Outcome::Published => Fate::Converted,
            Outcome::AlreadyThere => Fate::Overtaken,
        })
    }
}

impl Names for Work<'_> {
    fn wait_for(&self, number: usize) -> Result<LayerName, LowerError> {
        Ok(self.wait(number)?)
    }
}

/// A layer that was made and has no name on UFS yet.
#[derive(Debug)]
pub struct Made {
    /// Its image.
    pub publication: Publication,
    /// What it is to be called.
    pub name: LayerName,
    /// The image's root.
    pub root: Root,
    /// The image's size.
    pub size: ImageSize,
    /// The bytes of its index.
    pub index: Vec<u8>,
    /// Whether it hides anything below it.
    pub whiteouts: bool,
}

/// Reads layer `number` of `image` and makes its EROFS image. `names` are those of the
/// layers below, on the same UFS.
pub fn make(
    ufs: &Ufs,
    image: &Image,
    number: usize,
    names: &dyn Names,
    bar: Bar,
    stop: &AtomicBool,
) -> anyhow::Result<Made> {
    let layer = &image.layers[number];
    let publication = ufs.create("erofs")?;
    let blob = image.open_layer(layer)?;
    let options = LayerOptions {
        compression: compression(&layer.media_type)?,
        expected: Expected {
            digest: Some(layer.digest),
            size: Some(layer.size),
            diff_id: Some(layer.diff_id),
        },
        parent: number
            .checked_sub(1)
            .map(|below| image.layers[below].chain_id),
        ..LayerOptions::new(layer.digest.to_string())
    };
    let (file, path) = (publication.file(), publication.path());
    let mut below = Below::new(ufs, names, number);
    let Converted {
        summary,
        root,
        index,
    } = sink::convert_layer(bar.watch(blob, stop), &options, &mut below, file, path)?;
    let name = match summary.needs_lower {
        true => LayerName::Chain(layer.chain_id),
        false => LayerName::Layer(layer.diff_id),
    };
    ensure!(
        summary.uuid.0 == name.uuid().0,
        "layer {}: the image's UUID does not follow from its name {name}",
        layer.digest,
    );
    Ok(Made {
        publication,
        name,
        root,
        size: ImageSize::new(summary.image.size)?,
        index,
        whiteouts: summary.whiteouts,
    })
}

/// Lets the other threads go when one panics: the panic goes on when they have
/// ended.
struct Unwinding<'a, 'b>(&'a Work<'b>);

impl Drop for Unwinding<'_, '_> {
    fn drop(&mut self) {
        self.0.fail(GivenUp.into());
    }
}

/// How the blob must be compressed, if that matters. As in containerd, OCI's
/// plain tar is one, and with every other type the blob's first bytes count.
fn compression(media_type: &str) -> anyhow::Result<Option<Compression>> {
    let named = Compression::from_media_type(media_type)?;
    let plain = named == Compression::None && media_type.contains(".oci.");
    Ok(plain.then_some(Compression::None))
}

fn hash(file: &mut (impl Read + Seek)) -> io::Result<Root> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(Root(*hasher.finalize().as_bytes()))
}
