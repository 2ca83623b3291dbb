//! `rescue`: when no daemon can be started any more, readers get an error instead of
//! waiting for ever.
//!
//! Run by a unit of its own when restarts keep failing, or by an operator. It waits
//! for a daemon for a while; if none serves by then, it takes the daemon's lock, stops
//! every device of this run directory, and has the keeper close its connections. Who
//! reads gets EIO; mounts stay until they are unmounted. It needs nothing of the
//! daemon but its journal, and is a program of its own (`ublk-rescue`), too: the
//! daemon's may be what is broken.

use crate::journal::{Journal, Transport};
use crate::keeper::Keeper;
use crate::lock::Lock;
use crate::orphans;
use crate::paths::Paths;
use crate::protocol::{Command, Status};
use crate::wire;
use accel_transport::ublk::{Inventory, Removal};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a daemon may take to say that it serves.
const ANSWER: Duration = Duration::from_secs(5);
/// How long one that ends may keep its lock.
const LOCK: Duration = Duration::from_secs(30);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Waits `after` for a daemon, then ends what waits for one. Says what it did.
pub fn run(paths: &Paths, after: Duration) -> Result<String> {
    let since = Instant::now();
    loop {
        let status = wire::ask_within::<Status>(&paths.socket, &Command::Status, ANSWER);
        if let Ok(status) = status {
            return Ok(format!(
                "process {} serves: nothing to rescue\n",
                status.pid
            ));
        }
        let left = after.saturating_sub(since.elapsed());
        if left.is_zero() {
            break;
        }
        thread::sleep(left.min(PAUSE));
    }
    let lock = take(paths)?;
    let result = rescue(paths);
    let _ = std::fs::remove_dir(paths.run.join("journal"));
    lock.remove();
    paths.tidy();
    result
}

fn take(paths: &Paths) -> Result<Lock> {
    let since = Instant::now();
    loop {
        let lock = Lock::attempt(&paths.daemon_lock());
        match lock.with_context(|| format!("cannot lock {}", paths.daemon_lock().display()))? {
            Some(lock) => return Ok(lock),
            None if since.elapsed() < LOCK => thread::sleep(PAUSE),
            None => bail!(
                "a daemon has {} locked and does not answer: end it first",
                paths.daemon_lock().display()
            ),
        }
    }
}

fn rescue(paths: &Paths) -> Result<String> {
    let journal = Journal::open(&paths.run, Path::new(""))
        .with_context(|| format!("cannot open the journal in {}", paths.run.display()))?;
    // Of whatever layout: a device is known by its mark, too.
    let entries = journal.load_known().context("cannot read the journal")?;
    let mark = orphans::mark(&paths.run);
    let (mut text, mut failed) = (String::new(), 0);
    if let Ok(inventory) = Inventory::open(orphans::BOUND) {
        for info in inventory.devices()? {
            let entry = entries
                .iter()
                .find(|entry| entry.transport == Transport::Ublk && entry.device == info.id);
            if info.mark != mark && entry.is_none() {
                continue;
            }
            match inventory.remove(info.id, Removal::Always) {
                Ok(()) => text += &format!("stopped /dev/ublkb{}\n", info.id),
                Err(error) => {
                    failed += 1;
                    text += &format!("cannot stop /dev/ublkb{}: {error}\n", info.id);
                    continue;
                }
            }
            if let Some(entry) = entry {
                journal.remove(entry.root)?;
            }
        }
    }
    let keeper = Keeper::new(paths.keeper());
    for root in keeper.take_over()?.into_keys() {
        keeper.release(root);
        journal.remove(root)?;
        text += &format!("closed the connection of {root}\n");
    }
    if failed > 0 {
        bail!("{text}{failed} devices could not be stopped");
    }
    Ok(text)
}
