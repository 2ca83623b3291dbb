//! What is exported, and who needs it.
//!
//! Exports are shared by root: a layer that ten images have is one device. Each
//! *holder* (a mount, or an operator's `attach`) holds all layers of one image;
//! an export ends with its last holder.
//!
//! Two locks: `operations` orders attach and detach, which may wait for the kernel;
//! `state` is held for moments only (a second at most, where memory is short), so that
//! `status` always answers. `operations` is taken first. What has to be known of UFS is
//! looked up before either: a UFS that stalls holds up who asks for it, and nobody else.

use crate::catalog::Image;
use crate::devices::{Device, Devices};
use crate::engine::{Engine, Export, ExportReader, Warmer};
use crate::journal::{Entry, HolderEntry, Journal, State as JournalState};
use crate::protocol::{Detached, DeviceView, Ended, ExportStatus, Holder, HolderStatus};
use crate::remake::{Recipe, Remake};
use crate::threads::Threads;
use accel_oci::Digest;
use accel_transport::ublk::Removal;
use accel_ufs::index::Root;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

mod ahead;
mod attach;
mod look_up;
mod observe;
mod ready;
mod recovery;

pub use observe::Counted;

use ahead::Ahead;
use ready::Readiness;

/// Every export of the daemon.
#[derive(Debug)]
pub struct Registry {
    engine: Arc<Engine>,
    devices: Devices,
    journal: Journal,
    warmer: Warmer,
    threads: Arc<Threads>,
    ufs: PathBuf,
    /// What the devices of this run directory are marked with.
    mark: u64,
    operations: Mutex<()>,
    state: Mutex<State>,
    /// Images that were looked up and are about to be attached.
    prepared: Mutex<Vec<Prepared>>,
    /// Layers that are about to be asked for.
    ahead: Ahead,
    /// Exports that were taken over from an earlier daemon.
    recovered: AtomicU64,
    /// What makes layers again.
    remake: Option<Arc<Remake>>,
    /// Devices of an earlier daemon that could not be recovered yet.
    unrecovered: Mutex<Vec<Entry>>,
}

/// An image that was looked up.
#[derive(Debug)]
struct Prepared {
    /// As it was asked for.
    image: String,
    at: Instant,
    found: Found,
}

/// What is known of an image.
#[derive(Debug)]
struct Found {
    image: Image,
    /// Layers that were not exported when it was looked up.
    opened: HashMap<Root, Arc<Export>>,
    /// When the look-up began, and how many bytes it read, indexes not included.
    began: Instant,
    looked_up: u64,
}

/// How long a look-up counts.
const PREPARED: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct State {
    exports: HashMap<Root, Served>,
    holders: BTreeMap<String, Holding>,
    /// The daemon ends: nothing new is exported.
    closed: bool,
}

#[derive(Debug, Clone)]
struct Served {
    export: Arc<Export>,
    device: Device,
    entry: Option<Entry>,
}

#[derive(Debug, Clone)]
struct Holding {
    image: String,
    manifest: Digest,
    layers: Vec<Root>,
    /// Whether the roots came with the request.
    signed: bool,
    /// Unless an earlier daemon exported it.
    ready: Option<Arc<Readiness>>,
}

/// Name of an operator's holder.
fn operator(manifest: &Digest) -> String {
    format!("attach {manifest}")
}

impl Registry {
    /// A registry without exports.
    pub fn new(
        engine: Arc<Engine>,
        devices: Devices,
        journal: Journal,
        ufs: PathBuf,
        threads: Arc<Threads>,
    ) -> Result<Self> {
        let warmer = Warmer::start(&engine, &threads).context("cannot start a thread")?;
        Ok(Self {
            ahead: Ahead::new(&engine, &ufs, &threads),
            threads,
            engine,
            journal,
            warmer,
            mark: devices.mark(),
            devices,
            ufs,
            operations: Mutex::default(),
            state: Mutex::default(),
            prepared: Mutex::default(),
            recovered: AtomicU64::new(0),
            unrecovered: Mutex::default(),
            remake: None,
        })
    }

    /// Has layers made again by `remake` when no source has them any more.
    pub fn make_again_with(&mut self, remake: Option<Arc<Remake>>) {
        self.remake = remake;
    }

    /// Tells who makes layers again about an export.
    fn note_origin(&self, served: &Served) {
        let origin = served.entry.as_ref().and_then(|entry| entry.origin.clone());
        if let (Some(remake), Some(origin)) = (&self.remake, origin) {
            remake.know(Recipe {
                name: served.export.name,
                root: served.export.root,
                size: served.export.image_size(),
                origin,
            });
        }
    }

    /// The transport.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn operate(&self) -> MutexGuard<'_, ()> {
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn check_open(&self) -> Result<()> {
        match self.state().closed {
            true => bail!("the daemon is ending"),
            false => Ok(()),
        }
    }

    /// Notes a holder, also in the journal of all its layers. If that fails, what
    /// it held before counts.
    fn hold(&self, holder: &str, holding: Holding) -> Result<()> {
        let mut state = self.state();
        let layers = holding.layers.clone();
        let before = state.holders.insert(holder.to_owned(), holding);
        self.note_holders(&mut state, &layers).inspect_err(|_| {
            match before {
                Some(before) => state.holders.insert(holder.to_owned(), before),
                None => state.holders.remove(holder),
            };
            if let Err(error) = self.note_holders(&mut state, &layers) {
                tracing::error!(
                    holder,
                    error = format!("{error:#}"),
                    "the journal is out of date"
                );
            }
        })
    }

    /// Rewrites the journal entries of `layers` with the holders of now.
    fn note_holders(&self, state: &mut State, layers: &[Root]) -> Result<()> {
        for root in layers {
            let holders = state.holders.iter();
            let holders = holders.filter(|(_, holding)| holding.layers.contains(root));
            let holders: Vec<_> = holders
                .map(|(holder, holding)| HolderEntry {
                    holder: holder.clone(),
                    image: holding.image.clone(),
                    manifest: holding.manifest,
                    layers: holding.layers.clone(),
                    signed: holding.signed,
                })
                .collect();
            let Some(served) = state.exports.get_mut(root) else {
                continue;
            };
            if let Some(entry) = &mut served.entry
                && (entry.state != JournalState::Live || entry.holders != holders)
            {
                let mut next = entry.clone();
                next.state = JournalState::Live;
                next.holders = holders;
                self.journal
                    .write(&next)
                    .context("cannot write the journal")?;
                // Not before: what is not on disk must be written next time.
                *entry = next;
            }
        }
        Ok(())
    }

    /// Takes a holder's image from it; exports that nobody needs end.
    pub fn detach(&self, who: &Holder) -> Result<Detached> {
        let _one = self.operate();
        self.check_open()?;
        let Some(holder) = self.find_holder(who)? else {
            return Ok(Detached {
                known: false,
                ended: Vec::new(),
            });
        };
        let Some(holding) = self.state().holders.remove(&holder) else {
            bail!("{holder} holds nothing");
        };
        let mut ended: Vec<Ended> = Vec::new();
        for &root in &holding.layers {
            let view = {
                let state = self.state();
                let needed = state.holders.values().any(|h| h.layers.contains(&root));
                let served = state.exports.get(&root);
                match served {
                    _ if needed => continue,
                    Some(served) => Some(self.devices.view(root, &served.device)),
                    None => None,
                }
            };
            let Some(device) = view else {
                // It ended in an attempt that did not come to its end. Its FUSE file
                // may still be there.
                if self.devices.ublk().is_none() {
                    let device = DeviceView::Fuse { served: false };
                    ended.push(Ended { root, device });
                }
                continue;
            };
            if let Err(error) = self.end(root) {
                // What is left can be tried again; its journal names the holder, and
                // what has ended is told then.
                self.state().holders.insert(holder, holding);
                return Err(error);
            }
            ended.push(Ended { root, device });
        }
        self.note_holders(&mut self.state(), &holding.layers)?;
        tracing::info!(holder, exports = ended.len(), "detached");
        Ok(Detached { known: true, ended })
    }

    fn find_holder(&self, who: &Holder) -> Result<Option<String>> {
        let state = self.state();
        let image = match who {
            Holder::Mount(holder) | Holder::Layer(holder) => {
                let known = state.holders.contains_key(holder);
                return Ok(known.then(|| holder.clone()));
            }
            Holder::Operator(image) => image,
        };
        let mut held = state.holders.iter().filter(|(holder, holding)| {
            **holder == operator(&holding.manifest)
                && (holding.image == *image || holding.manifest.to_string() == *image)
        });
        if let Some((holder, _)) = held.next() {
            return Ok(Some(holder.clone()));
        }
        let same = |h: &&Holding| h.image == *image || h.manifest.to_string() == *image;
        if state.holders.values().any(|holding| same(&holding)) {
            let mounts: Vec<_> = state.holders.iter().filter(|(_, h)| same(h)).collect();
            let mounts: Vec<_> = mounts.iter().map(|(holder, _)| holder.as_str()).collect();
            bail!(
                "{image} was not attached, but is mounted at {}: use `ublk-server unmount`",
                mounts.join(", ")
            );
        }
        Ok(None)
    }

    /// Ends an export that nobody uses.
    fn end(&self, root: Root) -> Result<()> {
        self.end_when(root, Removal::IfUnused)
    }

    fn end_when(&self, root: Root, when: Removal) -> Result<()> {
        let served = self.state().exports.get(&root).cloned();
        let served = served.ok_or_else(|| anyhow!("{root} is not exported"))?;
        let mut noted = false;
        if let Some(mut entry) = served.entry.clone() {
            entry.state = JournalState::Deleting;
            // Without, as when there is no space or descriptor left, a daemon that dies
            // here leaves an export as it was before.
            match self.journal.write(&entry) {
                Ok(()) => noted = true,
                Err(error) => {
                    tracing::warn!(%root, %error, "cannot note that an export ends; going on");
                }
            }
        }
        if let Err(error) = self.devices.remove(root, &served.device, when) {
            if let Some(entry) = served.entry.as_ref().filter(|_| noted) {
                self.journal
                    .write(entry)
                    .context("cannot write the journal")?;
            }
            return Err(error).with_context(|| format!("cannot end {}", served.export.name));
        }
        // It is gone, whatever becomes of its entry.
        self.state().exports.remove(&root);
        if let Some(remake) = &self.remake {
            remake.forget(&served.export.name);
        }
        self.journal
            .remove(root)
            .context("cannot remove a journal entry")
    }

    /// Serves a layer on a FUSE file system that a client has mounted.
    pub fn serve_fuse(&self, root: Root, fd: OwnedFd) -> Result<()> {
        let export = self
            .state()
            .exports
            .get(&root)
            .map(|s| Arc::clone(&s.export));
        let export = export.with_context(|| format!("{root} is not attached"))?;
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        self.devices.serve_fuse(root, fd, &reader)
    }

    /// Has the metadata of a holder's layers fetched.
    pub fn warm(&self, holder: &str) {
        let state = self.state();
        let Some(holding) = state.holders.get(holder) else {
            return;
        };
        if let Some(ready) = &holding.ready {
            ready.mounted();
        }
        // The top layer is looked at first.
        let exports = holding.layers.iter().rev();
        let exports = exports.filter_map(|root| state.exports.get(root));
        let exports: Vec<_> = exports.map(|served| Arc::clone(&served.export)).collect();
        drop(state);
        // The root directories of all are looked at next, and one after the other.
        for export in &exports {
            self.engine.expect_look(export);
        }
        for export in &exports {
            self.warmer.push(export);
        }
    }

    /// Refuses whatever comes from here on; what has begun is finished first.
    pub fn close(&self) {
        let _one = self.operate();
        self.state().closed = true;
    }

    /// Whether [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Whether the lock that everything needs can be had.
    pub fn responds(&self) -> bool {
        (0..200).any(|attempt| {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(10));
            }
            !matches!(self.state.try_lock(), Err(TryLockError::WouldBlock))
        })
    }

    /// Ends what can be ended before the daemon does. Exports in use stay for the
    /// next daemon; their number is returned.
    pub fn shut_down(&self) -> usize {
        let _one = self.operate();
        self.state().closed = true;
        let roots: Vec<_> = self.state().exports.keys().copied().collect();
        let mut left = 0;
        for root in roots {
            let held = {
                let state = self.state();
                let mut holders = state.holders.values();
                holders.any(|holding| holding.layers.contains(&root))
            };
            if held || self.end(root).is_err() {
                left += 1;
            }
        }
        left
    }

    /// Everything about exports and holders.
    pub fn status(&self) -> (Vec<ExportStatus>, Vec<HolderStatus>) {
        let state = self.state();
        let mut exports: Vec<_> = state
            .exports
            .iter()
            .map(|(root, served)| {
                let counters = &served.export.counters;
                let holders = state.holders.iter();
                let holders = holders.filter(|(_, holding)| holding.layers.contains(root));
                let holders: Vec<_> = holders.collect();
                let signed =
                    !holders.is_empty() && holders.iter().all(|(_, holding)| holding.signed);
                let trust = if signed { "manifest" } else { "ufs" };
                ExportStatus {
                    name: served.export.name.to_string(),
                    root: *root,
                    size: served.export.size(),
                    device: self.devices.view(*root, &served.device),
                    trust: trust.to_owned(),
                    holders: holders
                        .iter()
                        .map(|(holder, _)| (*holder).clone())
                        .collect(),
                    hits: counters.hits.load(Relaxed),
                    misses: counters.misses.load(Relaxed),
                    served_bytes: counters.served_bytes.load(Relaxed),
                    source_bytes: counters.source_bytes.load(Relaxed),
                    errors: counters.errors.load(Relaxed),
                }
            })
            .collect();
        exports.sort_by(|a, b| a.name.cmp(&b.name));
        let holders = state.holders.iter().map(|(holder, holding)| HolderStatus {
            holder: holder.clone(),
            image: holding.image.clone(),
            manifest: holding.manifest,
            layers: holding.layers.clone(),
            ready: holding.ready.as_ref().and_then(|ready| ready.status()),
        });
        (exports, holders.collect())
    }
}

#[cfg(test)]
mod tests;
