//! `mkfs-accel layer`: one tar, without registry or UFS.

use crate::interrupt;
use crate::output::{Bytes, Seconds, say};
use crate::progress::Bars;
use crate::sink::{self, Converted};
use accel_layer::{LayerOptions, NoLower};
use accel_ufs::UfsError;
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
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let input = &arguments.file;
    let (blob, size): (Box<dyn Read + Send>, u64) = if input.as_os_str() == "-" {
        (Box::new(io::stdin()), 0)
    } else {
        let file = File::open(input).map_err(UfsError::io("open", input))?;
        let size = file.metadata().map_err(UfsError::io("look at", input))?;
        (Box::new(file), size.len())
    };
    let image = New::create(&arguments.output)?;
    let index = New::create(&arguments.output.with_extension("idx"))?;
    let bars = Bars::new(true, size);
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
    say!("diffID  {}", summary.diff_id)?;
    say!("root    {root}")?;
    say!("UUID    {}", accel_ufs::names::Uuid(summary.uuid.0))?;
    if summary.needs_lower {
        say!("        some directories are only implied by paths; they got mode 0755 and root")?;
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
