//! `mkfs-accel list`: the images on UFS.

use crate::output::{Bytes, say};
use accel_ufs::publish::Ufs;
use accel_ufs::record::ImageRecord;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The shared file system's directory
    #[arg(long, value_name = "DIR")]
    ufs: PathBuf,
    /// Print a JSON array of image records instead of lines
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
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

/// Bytes of all its layers.
pub fn size(record: &ImageRecord) -> u64 {
    record.layers.iter().map(|l| l.erofs.size.bytes()).sum()
}
