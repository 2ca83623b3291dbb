//! `mkfs-accel verify`: every byte of an image against its roots.

use super::Verdict;
use crate::output::{Bytes, Seconds, say};
use crate::published::{Published, PublishedError};
use accel_ufs::index::{CHUNK_SIZE, ChunkNo, PAGE_SIZE, Page, PageValue, Root};
use accel_ufs::publish::Ufs;
use accel_ufs::record::LayerRecord;
use accel_ufs::resolve::ImageName;
use anyhow::Context;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The image: the source it was converted from, or its manifest digest
    image: ImageName,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
}

/// How much damage is listed per layer.
const LISTED: usize = 10;

pub fn run(arguments: &Arguments) -> anyhow::Result<Verdict> {
    let started = Instant::now();
    let ufs = Ufs::open(&arguments.ufs)?;
    let record = ufs.resolve(&arguments.image)?;
    let layers = record.layers.len();
    let mut verdict = Verdict::Good;
    let mut bytes = 0;
    for (number, layer) in (1..).zip(&record.layers) {
        let mut damage = Damage::default();
        match check_layer(&ufs, layer, &mut damage) {
            Ok(()) => {}
            Err(error) => damage.add(error.to_string()),
        }
        bytes += layer.erofs.size.bytes();
        let label = format!("layer {number}/{layers} {}", layer.erofs.path);
        if damage.count == 0 {
            say!("{label}: good ({})", Bytes(layer.erofs.size.bytes()))?;
            continue;
        }
        verdict = Verdict::Damaged;
        say!("{label}: DAMAGED, {} findings", damage.count)?;
        for finding in &damage.listed {
            say!("  {finding}")?;
        }
    }
    say!(
        "image {}: {}, {} read in {}",
        record.manifest,
        match verdict {
            Verdict::Good => "good",
            Verdict::Damaged => "DAMAGED; remove the damaged layers' files and convert again",
        },
        Bytes(bytes),
        Seconds(started.elapsed()),
    )?;
    Ok(verdict)
}

/// What was found to be wrong.
#[derive(Default)]
struct Damage {
    count: u64,
    listed: Vec<String>,
}

impl Damage {
    fn add(&mut self, finding: String) {
        self.count += 1;
        if self.listed.len() < LISTED {
            self.listed.push(finding);
        }
    }
}

/// Errors are damage too: a file that cannot be read serves no node.
fn check_layer(ufs: &Ufs, layer: &LayerRecord, damage: &mut Damage) -> anyhow::Result<()> {
    let name = layer.name().context("the record names no path of ours")?;
    let published = Published::open(ufs, &name)?;
    let (header, erofs) = (published.header(), &layer.erofs);
    if header.root() != erofs.root || header.image_size() != erofs.size {
        damage.add(format!(
            "{:?} is the index of another image (root {}, {} bytes)",
            published.index_path(),
            header.root(),
            header.image_size(),
        ));
        return Ok(());
    }
    for (path, size, wanted) in [
        (
            published.image_path(),
            published.image_size()?,
            erofs.size.bytes(),
        ),
        (
            published.index_path(),
            published.index_size()?,
            erofs.index_size,
        ),
    ] {
        if size != wanted {
            damage.add(format!("{path:?} has {size} bytes instead of {wanted}"));
        }
    }
    let values = check_tree(&published, erofs.root, damage)?;
    check_chunks(&published, &values, damage)?;
    Ok(())
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
