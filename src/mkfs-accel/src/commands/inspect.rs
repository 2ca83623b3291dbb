//! `mkfs-accel inspect`: an image on UFS, its layers, its tree, and where a file's
//! bytes lie.
//!
//! The tree is the one that a container sees: the layers above hide what is below, as
//! overlayfs has it. Everything that is read is verified.

use super::images;
use crate::output::{Bytes, say};
use crate::published::Published;
use crate::tree::{Entry, Kind, Tree};
use accel_ufs::index::{CHUNK_SIZE, ChunkNo};
use accel_ufs::publish::Ufs;
use accel_ufs::record::{ImageRecord, LayerRecord};
use accel_ufs::resolve::ImageName;
use anyhow::{Context, ensure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The image: the source it was converted from, or the digest of its manifest or
    /// index
    image: ImageName,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// List the tree that a container sees
    #[arg(long, conflicts_with = "path")]
    tree: bool,
    /// With --tree: only what layer N (from 1, the lowest) itself has, whiteouts
    /// included
    #[arg(long, value_name = "N", requires = "tree")]
    layer: Option<usize>,
    /// Say which layer a file comes from, and where in its image its bytes lie
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Print JSON instead of lines: the image record, an array of files, or a file
    #[arg(long)]
    json: bool,
}

/// A file, in JSON. Paths and targets that are not UTF-8 are shown with replacement
/// characters.
#[derive(Debug, Serialize)]
struct File {
    path: String,
    kind: Kind,
    /// The layer that has it, from 1 for the lowest.
    layer: usize,
    /// Permissions, in octal.
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    /// Seconds since 1970, and nanoseconds.
    mtime: (i64, u32),
    nlink: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<(u32, u32)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    xattrs: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data>,
}

/// Where a file's bytes lie.
#[derive(Debug, Serialize)]
struct Data {
    /// The image, beneath UFS.
    image: String,
    /// Its root.
    root: String,
    /// Of the first byte, in the image and so in the device.
    offset: u64,
    /// In bytes.
    length: u64,
    /// The first and the last chunk; nothing for an empty file.
    chunks: Option<(u64, u64)>,
}

impl File {
    fn new(entry: &Entry, layer: usize) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            path: format!("/{}", text(&entry.path)),
            kind: entry.kind(),
            layer: layer + 1,
            mode: format!("{:04o}", entry.mode & 0o7777),
            uid: entry.uid,
            gid: entry.gid,
            size: entry.size,
            mtime: entry.mtime,
            nlink: entry.nlink,
            device: entry.device,
            target: entry.target.as_deref().map(text),
            xattrs: entry.xattrs.clone(),
            data: None,
        }
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    let record = ufs.resolve(&arguments.image)?;
    let count = record.layers.len();
    match (&arguments.path, arguments.tree) {
        (Some(path), _) => find(&ufs, &record, path, arguments.json),
        (None, false) => summary(&ufs, &record, arguments.json),
        (None, true) => {
            let layers = match arguments.layer {
                None => 0..count,
                Some(layer) => {
                    ensure!(
                        (1..=count).contains(&layer),
                        "the image has {count} layers, not {layer}"
                    );
                    layer - 1..layer
                }
            };
            list(&ufs, &record, layers, arguments.json)
        }
    }
}

/// Opens a layer and sees that it is the one of the record.
pub fn open(ufs: &Ufs, layer: &LayerRecord) -> anyhow::Result<Published> {
    let name = layer.name().context("the record names no path of ours")?;
    let published = Published::open(ufs, &name)?;
    ensure!(
        is_same(&published, layer),
        "{:?} is the index of another image: run mkfs-accel verify",
        published.index_path()
    );
    Ok(published)
}

fn is_same(published: &Published, layer: &LayerRecord) -> bool {
    let (header, erofs) = (published.header(), &layer.erofs);
    header.root() == erofs.root && header.image_size() == erofs.size
}

fn summary(ufs: &Ufs, record: &ImageRecord, json: bool) -> anyhow::Result<()> {
    if json {
        say!("{}", serde_json::to_string_pretty(record)?)?;
        return Ok(());
    }
    let process = &record.process;
    let command = [&process.entrypoint[..], &process.cmd].concat();
    say!("manifest  {}", record.manifest)?;
    say!("config    {}", record.config)?;
    say!("source    {}", record.source)?;
    say!("platform  {}", record.platform)?;
    say!("command   {command:?}")?;
    say!("size      {} as EROFS", Bytes(images::size(record)))?;
    for (number, layer) in (1..).zip(&record.layers) {
        let name = layer.name().context("the record names no path of ours")?;
        let published = Published::open(ufs, &name)?;
        let (header, erofs) = (published.header(), &layer.erofs);
        say!("layer {number}")?;
        say!("  digest    {} ({})", layer.digest, Bytes(layer.size))?;
        say!("  diffID    {}", layer.diff_id)?;
        say!("  chain ID  {}", layer.chain_id)?;
        say!("  image     {} ({})", erofs.path, Bytes(erofs.size.bytes()))?;
        say!("  metadata  {}", Bytes(header.metadata().length))?;
        say!("  index     {}", Bytes(erofs.index_size))?;
        say!("  root      {}", erofs.root)?;
        say!("  UUID      {}", erofs.uuid)?;
        if !is_same(&published, layer) {
            let path = published.index_path();
            say!("  DAMAGED   {path:?} is the index of another image")?;
        }
    }
    Ok(())
}

/// The files of some layers, as overlayfs merges them, by path.
type Merged = BTreeMap<Vec<Vec<u8>>, (usize, Entry)>;

fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/');
    parts
        .filter(|part| !part.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

fn merge(ufs: &Ufs, record: &ImageRecord, layers: Range<usize>) -> anyhow::Result<Merged> {
    let alone = layers.len() == 1;
    let mut merged = Merged::new();
    for number in layers {
        let published = open(ufs, &record.layers[number])?;
        Tree::open(&published)?.walk(|entry| {
            let path = parts(&entry.path);
            let kind = entry.kind();
            if !alone && (kind != Kind::Directory || entry.is_opaque()) {
                hide(&mut merged, &path, number);
            }
            if alone || kind != Kind::Whiteout {
                merged.insert(path, (number, entry));
            }
            Ok(())
        })?;
    }
    Ok(merged)
}

/// Takes away `path` and what is below it, as far as it comes from the layers below
/// `layer`.
fn hide(merged: &mut Merged, path: &[Vec<u8>], layer: usize) {
    let hidden: Vec<_> = merged
        .range(path.to_vec()..)
        .take_while(|(below, _)| below.starts_with(path))
        .filter(|(_, (from, _))| *from < layer)
        .map(|(below, _)| below.clone())
        .collect();
    for path in hidden {
        merged.remove(&path);
    }
}

fn list(ufs: &Ufs, record: &ImageRecord, layers: Range<usize>, json: bool) -> anyhow::Result<()> {
    let merged = merge(ufs, record, layers)?;
    if json {
        let files = merged
            .values()
            .map(|(layer, entry)| File::new(entry, *layer));
        let files: Vec<_> = files.collect();
        say!("{}", serde_json::to_string_pretty(&files)?)?;
        return Ok(());
    }
    for (layer, entry) in merged.values() {
        say!("{}", line(entry, *layer))?;
    }
    Ok(())
}

/// A file in a line: mode, names, owner, size or device, layer, path.
fn line(entry: &Entry, layer: usize) -> String {
    let size = match entry.device {
        Some((major, minor)) => format!("{major},{minor}"),
        None => entry.size.to_string(),
    };
    let Entry {
        nlink, uid, gid, ..
    } = entry;
    let mode = entry.mode_text();
    let path = shown(&entry.path);
    let what = match (&entry.target, entry.kind()) {
        (Some(target), _) => format!(" -> {}", target.escape_ascii()),
        (None, Kind::Whiteout) => " (whiteout)".to_owned(),
        _ => String::new(),
    };
    format!(
        "{mode} {nlink:>3} {uid:>5} {gid:>5} {size:>12}  layer {:<3} /{path}{what}",
        layer + 1
    )
}

/// UTF-8 as it is, other bytes and control characters escaped.
fn shown(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}

fn find(ufs: &Ufs, record: &ImageRecord, path: &str, json: bool) -> anyhow::Result<()> {
    let wanted = parts(path.as_bytes());
    let merged = merge(ufs, record, 0..record.layers.len())?;
    let link = (1..wanted.len()).find_map(|length| {
        let (_, entry) = merged.get(&wanted[..length])?;
        entry.target.as_ref().map(|_| shown(&entry.path))
    });
    let (layer, entry) = merged.get(&wanted).with_context(|| match link {
        Some(link) => format!("the image has no {path:?}; /{link} on the way is a symbolic link"),
        None => format!("the image has no {path:?}"),
    })?;
    let published = open(ufs, &record.layers[*layer])?;
    let erofs = &record.layers[*layer].erofs;
    let data = Tree::open(&published)?.data(entry)?.map(|range| Data {
        image: erofs.path.to_string(),
        root: erofs.root.to_string(),
        offset: range.start,
        length: range.end - range.start,
        chunks: (!range.is_empty()).then(|| {
            let chunk = |offset| ChunkNo::containing(offset).0;
            (chunk(range.start), chunk(range.end - 1))
        }),
    });
    let mut file = File::new(entry, *layer);
    file.data = data;
    if json {
        say!("{}", serde_json::to_string_pretty(&file)?)?;
        return Ok(());
    }
    say!("{}", line(entry, *layer))?;
    say!("layer     {} of {}", layer + 1, record.layers.len())?;
    say!("image     {}", erofs.path)?;
    say!("root      {}", erofs.root)?;
    let Some(data) = file.data else {
        say!("data      none: it lies in the image's metadata, if anywhere")?;
        return Ok(());
    };
    let end = data.offset + data.length;
    say!(
        "data      {} bytes, {}..{end} of the image",
        data.length,
        data.offset
    )?;
    if let Some((first, last)) = data.chunks {
        let size = CHUNK_SIZE >> 10;
        say!("chunks    {first} to {last}, of {size} KiB each")?;
    }
    Ok(())
}
