//! `--disk-cache`: what was read and verified stays on a local disk.

use crate::log;
use crate::protocol::DiskCacheStatus;
use accel_source::{Arena, DiskCache, DiskOptions, Source, WorkerCommand};
use anyhow::Result;
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// How the disk cache is set up.
#[derive(Debug, Clone, Args)]
pub struct DiskCacheOptions {
    /// A directory on a local disk, for nothing else, in which verified chunks are kept
    /// across restarts; made if it is missing.
    #[arg(long, value_name = "DIR")]
    pub disk_cache: Option<PathBuf>,
    /// How much of that disk is used at most, such as 20G; at least 16M.
    #[arg(long, value_name = "SIZE", default_value = "10G", value_parser = crate::size::parse)]
    pub disk_cache_size: u64,
}

/// Puts a disk cache, if there is to be one, before `inner`. `namespace` is the mount
/// namespace that its directory is in. With `exclusive`, another daemon's is an error; without, nothing is waited for:
/// those who read devices of an earlier daemon come first.
pub fn start(
    options: &DiskCacheOptions,
    inner: &Arc<dyn Source>,
    arena: &Arc<Arena>,
    namespace: &str,
    exclusive: bool,
) -> Result<Option<Arc<DiskCache>>> {
    let Some(directory) = &options.disk_cache else {
        return Ok(None);
    };
    let directory = std::path::absolute(directory)?;
    let command = |name: &str, further: &[OsString]| {
        let mut arguments: Vec<OsString> = vec![name.into(), directory.clone().into()];
        arguments.extend(["--namespace".into(), namespace.into()]);
        arguments.extend(["--log-format".into(), log::format().to_string().into()]);
        arguments.extend(further.iter().cloned());
        WorkerCommand {
            program: "/proc/self/exe".into(),
            arguments,
        }
    };
    let slots = accel_source::disk_slots(options.disk_cache_size);
    let more = ["--slots".into(), slots.to_string().into()];
    let options = DiskOptions {
        name: directory.display().to_string(),
        size: options.disk_cache_size,
        reader: command("source-worker", &[]),
        writer: command("disk-cache-worker", &more),
    };
    let cache = DiskCache::start(Arc::clone(inner), Arc::clone(arena), &options)?;
    if exclusive {
        cache.claim()?;
    }
    Ok(Some(Arc::new(cache)))
}

/// What `status` says of it.
pub fn status(cache: &DiskCache) -> DiskCacheStatus {
    let (standing, counters) = (cache.standing(), cache.counters());
    DiskCacheStatus {
        name: standing.name,
        state: standing.state,
        in_use: standing.in_use,
        size: standing.size,
        used: standing.used,
        saved: standing.saved,
        hits: counters.hits.load(Relaxed),
        misses: counters.misses.load(Relaxed),
        written: counters.written.load(Relaxed),
        skipped: counters.skipped.load(Relaxed),
        evicted: standing.evicted,
        damaged: counters.damaged.load(Relaxed),
        failed: counters.failed.load(Relaxed),
    }
}
