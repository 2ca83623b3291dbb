//! `mkfs-accel list` and `inspect`: what is on UFS.

use crate::output::{Bytes, say};
use crate::published::Published;
use accel_ufs::publish::Ufs;
use accel_ufs::record::ImageRecord;
use accel_ufs::resolve::ImageName;
use anyhow::Context;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct ListArguments {
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Print a JSON array of image records instead of lines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct InspectArguments {
    /// The image: the source it was converted from, or its manifest digest
    image: ImageName,
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Print the image record instead of lines
    #[arg(long)]
    json: bool,
}

pub fn list(arguments: &ListArguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    let mut records = Vec::new();
    for manifest in ufs.images()? {
        records.extend(ufs.image_record(&manifest)?);
    }
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&records)?)?;
        return Ok(());
    }
    for record in &records {
        say!(
            "{}  {}  {} layers  {}  {}",
            record.manifest,
            record.platform,
            record.layers.len(),
            Bytes(size(record)),
            record.source,
        )?;
    }
    Ok(())
}

fn size(record: &ImageRecord) -> u64 {
    record.layers.iter().map(|l| l.erofs.size.bytes()).sum()
}

pub fn inspect(arguments: &InspectArguments) -> anyhow::Result<()> {
    let ufs = Ufs::open(&arguments.ufs)?;
    let record = ufs.resolve(&arguments.image)?;
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&record)?)?;
        return Ok(());
    }
    let process = &record.process;
    let command = [&process.entrypoint[..], &process.cmd].concat();
    say!("manifest  {}", record.manifest)?;
    say!("config    {}", record.config)?;
    say!("source    {}", record.source)?;
    say!("platform  {}", record.platform)?;
    say!("command   {command:?}")?;
    say!("size      {} as EROFS", Bytes(size(&record)))?;
    for (number, layer) in (1..).zip(&record.layers) {
        let name = layer.name().context("the record names no path of ours")?;
        let published = Published::open(&ufs, &name)?;
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
        if header.root() != erofs.root || header.image_size() != erofs.size {
            let path = published.index_path();
            say!("  DAMAGED   {path:?} is the index of another image")?;
        }
    }
    Ok(())
}
