//! The daemon's side of the admin socket.

use crate::disk_cache;
use crate::engine::SKIPS_VERIFICATION;
use crate::handover;
use crate::metrics;
use crate::protocol::{CacheStatus, Command, FindAnswer, LayerAnswer, Reply, SourceStatus, Status};
use crate::remake::Remake;
use crate::serve::Daemon;
use crate::wire;
use accel_source::{Condition, Standing, WorkerSource};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// How long a client may take to say what it wants.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);

/// Answers one client, on a thread of its own.
pub fn serve(daemon: &Arc<Daemon>, stream: UnixStream) {
    let stream = Arc::new(stream);
    let started = daemon.threads.run("admin", {
        let (daemon, stream) = (Arc::clone(daemon), Arc::clone(&stream));
        move || {
            if let Err(error) = answer(&daemon, &stream) {
                tracing::debug!(error = format!("{error:#}"), "a client went away");
            }
        }
    });
    if let Err(error) = started {
        // Memory is short for now. What it asked for was not begun.
        tracing::warn!(%error, "no thread for a client, which is to ask again");
        let again = format!("the daemon cannot start a thread: {error}");
        // The buffer of a new connection takes it.
        if let Err(error) = wire::send(&stream, &Reply::<()>::Again(again), None) {
            tracing::debug!(error = format!("{error:#}"), "a client went away");
        }
    }
}

fn answer(daemon: &Daemon, stream: &UnixStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let _client = daemon.handover.client();
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if !peer.uid.is_root() {
        let error = "only root may use this socket".to_owned();
        return wire::send(stream, &Reply::<()>::Error(error), None);
    }
    let (command, fd) = wire::receive::<Command>(stream)?;
    let registry = &daemon.registry;
    match command {
        Command::Prepare { image } => {
            let prepared = registry.prepare(&image);
            reply_or_again(stream, prepared, registry.is_closed())
        }
        Command::Attach { image, holder } => {
            let attached = registry.attach(&image, holder);
            reply_or_again(stream, attached, registry.is_closed())
        }
        Command::AttachLayer {
            diff_id,
            chain_id,
            root,
            size,
            origin,
            image,
            holder,
            by_ufs,
            ufs,
        } => {
            let layer = (root, size);
            let from = (origin, image);
            let answer = match other_ufs(daemon, ufs.as_deref()) {
                Some(why) => Ok(LayerAnswer::Unreadable(why)),
                None => registry.attach_layer(diff_id, chain_id, layer, from, &holder, by_ufs),
            };
            reply_or_again(stream, answer, registry.is_closed())
        }
        Command::AttachCanary {
            digest,
            root,
            size,
            holder,
        } => {
            let answer = registry.attach_canary(digest, (root, size), &holder);
            reply_or_again(stream, answer, registry.is_closed())
        }
        Command::FindLayer {
            chain_id,
            below,
            digest,
            ufs,
        } => {
            let found = match other_ufs(daemon, ufs.as_deref()) {
                Some(why) => Ok(FindAnswer::Unreadable(why)),
                None => registry.find_layer(chain_id, below, digest),
            };
            reply_or_again(stream, found, registry.is_closed())
        }
        Command::Detach { holder } => {
            let detached = registry.detach(&holder);
            reply_or_again(stream, detached, registry.is_closed())
        }
        Command::Serve { root } => {
            let served = fd
                .context("no descriptor came with the request")
                .and_then(|fd| registry.serve_fuse(root, fd));
            reply(stream, served)
        }
        Command::Mounted { holder } => {
            registry.warm(&holder);
            reply(stream, Ok(()))
        }
        Command::Status => reply(stream, Ok(status(daemon))),
        Command::Metrics => reply(stream, Ok(metrics::render(daemon))),
        Command::Orphans { remove } => reply(stream, registry.orphans(&remove)),
        Command::Upgrade { program } => upgrade(daemon, stream, &program),
    }
}

/// Why a layer of the UFS that a client names cannot be had here. Paths are compared as
/// they were given: what is on UFS is not looked at.
fn other_ufs(daemon: &Daemon, named: Option<&Path>) -> Option<String> {
    let named = named.filter(|named| *named != daemon.ufs)?;
    Some(format!(
        "ublk-server reads the UFS {}, not {}",
        daemon.ufs.display(),
        named.display()
    ))
}

fn upgrade(daemon: &Daemon, stream: &UnixStream, program: &Path) -> Result<()> {
    let checked = handover::check(program);
    let accepted = checked.is_ok();
    reply(stream, checked)?;
    if accepted {
        daemon.handover.ask(program)?;
        // The client sees by the end of its connection that this program is gone.
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

/// Tells a client that cannot be answered why.
pub fn refuse(stream: &UnixStream, why: &str) {
    let _ = wire::send(stream, &Reply::<()>::Error(why.to_owned()), None);
}

fn reply<T: Serialize>(stream: &UnixStream, result: Result<T>) -> Result<()> {
    reply_or_again(stream, result, false)
}

fn reply_or_again<T: Serialize>(stream: &UnixStream, result: Result<T>, again: bool) -> Result<()> {
    let reply = match result {
        Ok(answer) => Reply::Ok(answer),
        Err(error) if again => Reply::Again(format!("{error:#}")),
        Err(error) => {
            let error = format!("{error:#}");
            tracing::warn!(error, "a request failed");
            Reply::Error(error)
        }
    };
    if let Err(error) = wire::send(stream, &reply, None) {
        bail!("cannot answer: {error}");
    }
    Ok(())
}

fn status(daemon: &Daemon) -> Status {
    let (exports, holders) = daemon.registry.status();
    let devices = daemon.registry.devices();
    let engine = &daemon.engine;
    let sources = sources(daemon);
    let chunks = engine.chunk_counters();
    let pool = engine.arena().chunks();
    let chunk = pool.slot_size() as u64;
    Status {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        program: handover::program(),
        ufs: daemon.ufs.clone(),
        transport: devices.name().to_owned(),
        transport_reason: devices.reason.clone(),
        keeper: devices.keeper(),
        verifies: !SKIPS_VERIFICATION,
        fetched_bytes: sources.iter().map(|source| source.bytes).sum(),
        cache: CacheStatus {
            size: pool.capacity() as u64 * chunk,
            used: engine.cached_chunks() as u64 * chunk,
            hits: chunks.hits.load(Relaxed),
            misses: chunks.misses.load(Relaxed),
            joined: chunks.joined.load(Relaxed),
            evicted: chunks.evicted.load(Relaxed),
        },
        remake: daemon.remake.as_deref().map(Remake::status),
        disk_cache: daemon.disk_cache.as_deref().map(disk_cache::status),
        sources,
        failed_reads: daemon.sources.failed(),
        exports,
        holders,
    }
}

/// How every source stands, best first.
pub(crate) fn sources(daemon: &Daemon) -> Vec<SourceStatus> {
    let standings = daemon.sources.standings();
    let sources = daemon.workers.iter().zip(standings);
    sources
        .map(|(worker, standing)| source(worker, &standing))
        .collect()
}

fn source(worker: &WorkerSource, standing: &Standing) -> SourceStatus {
    let counters = worker.counters();
    SourceStatus {
        name: standing.name.clone(),
        state: standing.condition.to_string(),
        in_use: matches!(standing.condition, Condition::InUse),
        set_aside: standing.times,
        worker: worker.worker_pid(),
        workers: counters.workers.load(Relaxed),
        dying: counters.dying.load(Relaxed),
        reads: counters.reads.load(Relaxed),
        operations: counters.operations.load(Relaxed),
        bytes: counters.bytes.load(Relaxed),
        failed_attempts: counters.failed_attempts.load(Relaxed),
    }
}
