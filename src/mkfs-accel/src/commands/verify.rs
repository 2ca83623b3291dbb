//! `mkfs-accel verify`: every byte of an image against its roots, and its trees.

use super::Verdict;
use crate::output::{Bytes, Seconds, say};
use crate::progress::{Bar, Bars};
use crate::published::{Published, PublishedError};
use crate::tree::Tree;
use accel_oci::Digest;
use accel_ufs::index::{CHUNK_SIZE, ChunkNo, ImageSize, Layout, PAGE_SIZE, Page, PageValue, Root};
use accel_ufs::names::LayerName;
use accel_ufs::publish::Ufs;
use accel_ufs::record::LayerRecord;
use accel_ufs::resolve::ImageName;
use anyhow::Context;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The image: the source it was converted from, or the digest of its manifest or
    /// index
    image: ImageName,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// How much damage is listed per layer.
const LISTED: usize = 10;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    manifest: Digest,
    good: bool,
    /// Bytes of all layers.
    bytes: u64,
    seconds: f64,
    layers: Vec<LayerReport>,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    image: String,
    good: bool,
    bytes: u64,
    /// In the layer's tree; 0 if it was not looked at because of damage.
    files: u64,
    #[serde(flatten)]
    damage: Damage,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Verdict> {
    let started = Instant::now();
    let lines = !arguments.json;
    let ufs = Ufs::open(&arguments.ufs)?;
    let record = ufs.resolve(&arguments.image)?;
    let count = record.layers.len();
    let bytes = record.layers.iter().map(|l| l.erofs.size.bytes()).sum();
    let bars = Bars::new(lines, bytes);
    let mut layers = Vec::new();
    for (number, layer) in (1..).zip(&record.layers) {
        let bar = bars.bar(format!("layer {number}/{count}"), layer.erofs.size.bytes());
        let mut damage = Damage::default();
        let files = check_layer(&ufs, layer, &bar, &mut damage).unwrap_or_else(|error| {
            damage.add(format!("{error:#}"));
            0
        });
        let report = LayerReport {
            image: layer.erofs.path.to_string(),
            good: damage.count == 0,
            bytes: layer.erofs.size.bytes(),
            files,
            damage,
        };
        if lines {
            bars.say(|| report.say(&format!("layer {number}/{count}")))?;
        }
        layers.push(report);
    }
    drop(bars);
    let report = Report {
        manifest: record.manifest,
        good: layers.iter().all(|layer| layer.good),
        bytes,
        seconds: started.elapsed().as_secs_f64(),
        layers,
    };
    if lines {
        say!(
            "image {}: {}, {} read in {}",
            report.manifest,
            match report.good {
                true => "good",
                false => "DAMAGED; mkfs-accel repair makes the damaged layers again",
            },
            Bytes(bytes),
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
        let Self { image, files, .. } = self;
        if self.good {
            let bytes = Bytes(self.bytes);
            return say!("{label} {image}: good ({bytes}, {files} files)");
        }
        say!("{label} {image}: DAMAGED, {} findings", self.damage.count)?;
        for finding in &self.damage.listed {
            say!("  {finding}")?;
        }
        Ok(())
    }
}

/// What was found to be wrong.
#[derive(Debug, Default, Serialize)]
pub(super) struct Damage {
    #[serde(rename = "findings")]
    pub(super) count: u64,
    /// The first of them.
    #[serde(rename = "damage")]
    pub(super) listed: Vec<String>,
}

impl Damage {
    pub(super) fn add(&mut self, finding: String) {
        self.count += 1;
        if self.listed.len() < LISTED {
            self.listed.push(finding);
        }
    }
}

/// Gives the number of files in the layer's tree. Errors are damage too: a file that
/// cannot be read serves no node.
fn check_layer(
    ufs: &Ufs,
    layer: &LayerRecord,
    bar: &Bar,
    damage: &mut Damage,
) -> anyhow::Result<u64> {
    let name = layer.name().context("the record names no path of ours")?;
    let (root, size) = (layer.erofs.root, layer.erofs.size);
    let published = check_bytes(ufs, &name, (root, size), Some(bar), damage)?;
    match published.filter(|_| damage.count == 0) {
        // The bytes are right, so whatever is wrong now was written so.
        Some(published) => check_files(&published).context("the tree is not what EROFS should be"),
        None => Ok(0),
    }
}

/// Compares a layer's two files with what its root and size promise; without `bar`
/// only whether they are there, as long as they should be, and of that layer.
pub(super) fn check_bytes(
    ufs: &Ufs,
    name: &LayerName,
    (root, size): (Root, ImageSize),
    bar: Option<&Bar>,
    damage: &mut Damage,
) -> anyhow::Result<Option<Published>> {
    let published = Published::open(ufs, name)?;
    let header = published.header();
    if header.root() != root || header.image_size() != size {
        damage.add(format!(
            "{:?} is the index of another image (root {}, {} bytes)",
            published.index_path(),
            header.root(),
            header.image_size(),
        ));
        return Ok(None);
    }
    for (path, size, wanted) in [
        (
            published.image_path(),
            published.image_size()?,
            size.bytes(),
        ),
        (
            published.index_path(),
            published.index_size()?,
            Layout::new(size).index_size(),
        ),
    ] {
        if size != wanted {
            damage.add(format!("{path:?} has {size} bytes instead of {wanted}"));
        }
    }
    if let Some(bar) = bar {
        let values = check_tree(&published, root, damage)?;
        check_chunks(&published, &values, bar, damage)?;
    }
    Ok(Some(published))
}

/// Reads the whole tree, and sees that each file's data lies among the data. Gives the
/// number of files.
fn check_files(published: &Published) -> anyhow::Result<u64> {
    let tree = Tree::open(published)?;
    let mut files = 0;
    tree.walk(|entry| {
        files += 1;
        tree.data(&entry).map(drop)
    })?;
    Ok(files)
}

/// Verifies every page of the index and collects the pages of level 0; those
/// that are damaged, or below one that is, are `None`.
fn check_tree(
    published: &Published,
    root: Root,
    damage: &mut Damage,
) -> Result<Vec<Option<Page>>, PublishedError> {
    let layout = published.header().layout();
    // Pages come top down, so that the level above is always complete.
    let mut above: Vec<Option<Page>> = Vec::new();
    let mut current: Vec<Option<Page>> = Vec::new();
    let mut level = layout.levels();
    for page in layout.pages() {
        if page.level() != level {
            level = page.level();
            above = std::mem::take(&mut current);
        }
        let mut bytes: Page = [0; PAGE_SIZE];
        published.read_index(&mut bytes, layout.page_range(page).offset)?;
        let expected = match layout.parent(page) {
            None => Some(PageValue(root.0)),
            Some(parent) => usize::try_from(parent.number())
                .ok()
                .and_then(|number| above.get(number)?.as_ref())
                .map(|parent| layout.page_value(parent, page)),
        };
        let good = expected.is_some_and(|expected| {
            let result = layout.verify_page(page, &bytes, expected);
            result
                .map_err(|error| damage.add(error.to_string()))
                .is_ok()
        });
        current.push(good.then_some(bytes));
    }
    Ok(current)
}

/// Verifies every chunk, and the zero map against what the chunks really are.
fn check_chunks(
    published: &Published,
    pages: &[Option<Page>],
    bar: &Bar,
    damage: &mut Damage,
) -> Result<(), PublishedError> {
    let header = published.header();
    let layout = header.layout();
    let mut map = vec![0; usize::try_from(layout.zero_map().length).unwrap_or(0)];
    published.read_index(&mut map, layout.zero_map().offset)?;
    let mut buffer = vec![0; CHUNK_SIZE];
    for chunk in (0..layout.chunks()).map(ChunkNo) {
        let range = layout.chunk_range(chunk).unwrap_or_default();
        let bytes = &mut buffer[..usize::try_from(range.length).unwrap_or(CHUNK_SIZE)];
        published.read_image(bytes, range.offset)?;
        bar.add(range.length);
        let value = match layout.path(chunk).last() {
            None => Some(layout.only_chunk_value(header.root())),
            Some(page) => usize::try_from(page.number())
                .ok()
                .and_then(|number| pages.get(number)?.as_ref())
                .map(|page| layout.chunk_value(page, chunk)),
        };
        match value.map(|value| layout.verify_chunk(chunk, bytes, value)) {
            None => damage.add(format!(
                "chunk {chunk} of the image ({range}) cannot be checked: its page of the index is damaged"
            )),
            Some(Err(error)) => damage.add(error.to_string()),
            Some(Ok(())) => {
                let zero = bytes.iter().all(|byte| *byte == 0);
                if zero != layout.is_zero(&map, chunk) {
                    damage.add(format!("chunk {chunk}: the zero map is wrong about it"));
                }
            }
        }
    }
    Ok(())
}
