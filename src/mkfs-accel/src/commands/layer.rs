//! `mkfs-accel layer`: one tar, without registry or UFS.

use crate::interrupt;
use crate::output::{Bytes, Seconds, say};
use crate::progress::Bars;
use crate::sink::{self, Converted};
use accel_image::ImageError;
use accel_layer::{LayerOptions, NoLower};
use accel_oci::{DiffId, Digest};
use accel_ufs::UfsError;
use accel_ufs::index::Root;
use accel_ufs::names::Uuid;
use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The layer's tar: plain, gzip or zstd; - reads standard input
    file: PathBuf,
    /// The image to write; its index goes beside it with the extension .idx.
    /// Neither may exist
    #[arg(short, long, value_name = "OUT.erofs")]
    output: PathBuf,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Digest of the file as it came.
    digest: Digest,
    /// Bytes of the file.
    size: u64,
    diff_id: DiffId,
    /// Bytes of the tar in it.
    tar_size: u64,
    /// Whether the tree depends on layers below, of which there were none.
    needs_lower: bool,
    root: Root,
    uuid: Uuid,
    /// Bytes of the image.
    image_size: u64,
    /// Bytes of its index.
    index_size: u64,
    /// Extended attributes that were left out.
    ignored_xattrs: u64,
    seconds: f64,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let input = &arguments.file;
    let (blob, size): (Box<dyn Read + Send>, u64) = if input.as_os_str() == "-" {
        (Box::new(io::stdin()), 0)
    } else {
        let wrong = |error| ImageError::Io {
            path: input.clone(),
            error,
        };
        let file = File::open(input).map_err(wrong)?;
        let size = file.metadata().map_err(wrong)?;
        (Box::new(file), size.len())
    };
    let image = New::create(&arguments.output)?;
    let index = New::create(&arguments.output.with_extension("idx"))?;
    let bars = Bars::new(!arguments.json, 0);
    let never = AtomicBool::new(false);
    let blob = bars
        .bar(input.display().to_string(), size)
        .watch(blob, &never);
    let options = LayerOptions::new(input.display().to_string());
    let Converted {
        summary,
        root,
        index: bytes,
    } = sink::convert_layer(blob, &options, &mut NoLower, &image.file, &image.path)?;
    (&index.file)
        .write_all(&bytes)
        .map_err(UfsError::io("write", &index.path))?;
    image.keep()?;
    index.keep()?;
    drop(bars);
    let report = Report {
        digest: summary.digest,
        size: summary.size,
        diff_id: summary.diff_id,
        tar_size: summary.tar_size,
        needs_lower: summary.needs_lower,
        root,
        uuid: Uuid(summary.uuid.0),
        image_size: summary.image.size,
        index_size: bytes.len() as u64,
        ignored_xattrs: summary.ignored_xattrs,
        seconds: started.elapsed().as_secs_f64(),
    };
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    say!("diffID  {}", report.diff_id)?;
    say!("root    {root}")?;
    say!("UUID    {}", report.uuid)?;
    if summary.whiteouts {
        say!(
            "        as the lowest layer of an image: its whiteouts hide nothing and are left out"
        )?;
    }
    if summary.needs_lower {
        say!("        directories that only a path implies got mode 0755 and root")?;
    }
    say!(
        "{} of tar -> {} in {}",
        Bytes(summary.tar_size),
        Bytes(summary.image.size),
        Seconds(started.elapsed()),
    )?;
    Ok(())
}

/// A file that did not exist before, and does not afterwards unless it is kept.
struct New {
    file: File,
    path: PathBuf,
    kept: bool,
}

impl New {
    fn create(path: &Path) -> Result<Self, UfsError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(UfsError::io("create", path))?;
        let signal = path.to_owned();
        interrupt::on_interrupt(move || drop(fs::remove_file(&signal)));
        Ok(Self {
            file,
            path: path.to_owned(),
            kept: false,
        })
    }

    fn keep(mut self) -> Result<(), UfsError> {
        self.file
            .sync_all()
            .map_err(UfsError::io("sync", &self.path))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for New {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = ?self.path, %error, "cannot remove an unfinished file");
        }
    }
}
