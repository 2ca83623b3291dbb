//! The recovery half: what an earlier daemon has left is taken over or ended.
//!
//! The journal says what there is; the driver, and the keeper of FUSE connections,
//! say in which state it is. An entry or a device that is in disorder costs itself
//! alone: it is told, left, and where that can help, tried again.

use super::{Holding, Registry, Served};
use crate::devices::Device;
use crate::engine::{Export, ExportReader};
use crate::journal::{Entry, State as JournalState, Transport};
use crate::orphans;
use crate::paths::Paths;
use crate::protocol::{Holder, Orphan};
use accel_client::mountinfo;
use accel_transport::ublk::{DeviceInfo, DeviceState, Inventory, Removal, UblkError};
use anyhow::{Context, Result, bail};
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;

/// Devices recovered at once.
const TOGETHER: usize = 8;

impl Registry {
    /// Takes over the devices that an earlier daemon left. One that cannot be
    /// recovered is told and left; the others go on. Mounts that were undone
    /// meanwhile are forgotten.
    pub fn recover(&self, paths: &Paths) -> Result<()> {
        self.journal
            .forget_unfinished()
            .context("cannot tidy the journal")?;
        self.forget_earlier_boots(paths)?;
        self.recover_devices()?;
        self.forget_unmounted(paths);
        // Made by a daemon that died before it could note them.
        if let Err(error) = self.end_orphans(|info| info.state == DeviceState::Stopped) {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot look for unknown devices"
            );
        }
        Ok(())
    }

    /// After a crash of the node: its devices and mounts are gone, and so are notes
    /// of them.
    fn forget_earlier_boots(&self, paths: &Paths) -> Result<()> {
        let entries = self.journal.forget_earlier_boots();
        let entries = entries.context("cannot tidy the journal")?;
        // Not the directories themselves: they may be on a file system that does not answer.
        let mounts = mountinfo::read().context("cannot read the list of mounts")?;
        for entry in entries {
            for holder in entry.holders {
                let directory = Path::new(&holder.holder);
                if directory.is_absolute() && !mountinfo::is_mount_point(&mounts, directory) {
                    let _ = fs::remove_file(paths.note(directory));
                }
            }
            // Fails if somebody has mounted something there since.
            let _ = fs::remove_dir(paths.layer(entry.root));
            let _ = fs::remove_file(paths.export(entry.root));
        }
        Ok(())
    }

    /// Devices that are ours by their mark, and of which nothing is known. Those in
    /// `remove` are removed unless they are mounted; the answer is what is left.
    pub fn orphans(&self, remove: &[u32]) -> Result<Vec<Orphan>> {
        // Who only looks does not wait for the kernel, or for others that do: what is
        // being made right now would look unknown.
        if remove.is_empty() && matches!(self.operations.try_lock(), Err(TryLockError::WouldBlock))
        {
            return Ok(Vec::new());
        }
        self.end_orphans(|info| remove.contains(&info.id))
    }

    fn end_orphans(&self, remove: impl Fn(&DeviceInfo) -> bool) -> Result<Vec<Orphan>> {
        let _one = self.operate();
        let damaged = || self.journal.forget_damaged();
        if self.devices.ublk().is_none() {
            // Connections that no journal knows were closed at the start.
            damaged().context("cannot tidy the journal")?;
            return Ok(Vec::new());
        }
        let entries = self.journal.load().context("cannot read the journal")?;
        let mut known: HashSet<_> = entries.iter().map(|entry| entry.device).collect();
        for served in self.state().exports.values() {
            if let Device::Ublk(device) = &served.device {
                known.insert(device.id);
            }
        }
        let inventory = Inventory::open(orphans::BOUND)?;
        let found = orphans::find(&inventory, self.mark, &known)?;
        let left = orphans::end(&inventory, found, remove);
        if left.is_empty() {
            damaged().context("cannot tidy the journal")?;
        }
        Ok(left)
    }

    /// Ends what mounts held of which the clients have no note any more: they
    /// were unmounted while no daemon served.
    pub(super) fn forget_unmounted(&self, paths: &Paths) {
        let unmounted: Vec<_> = {
            let state = self.state();
            let mounts = state
                .holders
                .keys()
                .filter(|holder| holder.starts_with('/'));
            let gone = |holder: &&String| {
                let noted = paths.note(Path::new(holder)).try_exists();
                matches!(noted, Ok(false))
            };
            mounts.filter(gone).cloned().collect()
        };
        for holder in unmounted {
            if let Err(error) = self.detach(&Holder::Mount(holder.clone())) {
                tracing::warn!(
                    holder,
                    error = format!("{error:#}"),
                    "cannot end what an unmounted image held; unmount its directory again"
                );
            }
        }
    }

    fn recover_devices(&self) -> Result<()> {
        let entries = self.journal.load().context("cannot read the journal")?;
        let _one = self.operate();
        let mut kept = self.devices.kept();
        let mut devices = Vec::new();
        for entry in entries {
            let fuse = self.devices.ublk().is_none();
            match entry.transport {
                Transport::Ublk if fuse => {
                    tracing::error!(device = entry.device, layer = %entry.name(),
                        "a block device of an earlier daemon waits; start with --transport ublk");
                }
                Transport::Fuse if !fuse => {
                    tracing::error!(layer = %entry.name(),
                        "a FUSE export of an earlier daemon waits; start with --transport fuse");
                }
                Transport::Ublk => devices.push(entry),
                Transport::Fuse => {
                    let connection = kept.remove(&entry.root);
                    self.recover_fuse(entry, connection)?;
                }
            }
        }
        // Side by side: the last one's readers should not wait for all others.
        let devices = Mutex::new(devices.into_iter());
        thread::scope(|scope| {
            let recover = || {
                while let Some(entry) = {
                    let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
                    devices.next()
                } {
                    self.recover_or_note(entry);
                }
            };
            let threads = (1..TOGETHER).map_while(|_| {
                let thread = thread::Builder::new().name("recovery".to_owned());
                thread.spawn_scoped(scope, recover).ok()
            });
            let threads: Vec<_> = threads.collect();
            recover();
            drop(threads);
        });
        for root in kept.into_keys() {
            tracing::warn!(%root, "ending a FUSE export that no journal knows");
            self.devices.forget(root);
        }
        Ok(())
    }

    /// Takes over an export over FUSE. Without a connection, because nobody has
    /// mounted it or the keeper died, it is as if it had just been attached.
    fn recover_fuse(&self, entry: Entry, connection: Option<OwnedFd>) -> Result<()> {
        let (root, name) = (entry.root, entry.name());
        if entry.state != JournalState::Live {
            tracing::info!(layer = %name, "removed an unfinished export");
            drop(connection);
            self.devices.forget(root);
            self.journal.remove(root)?;
            return Ok(());
        }
        let export = Arc::new(Export::recovered(name, root, entry.size));
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        match connection.map(|fd| self.devices.adopt(root, fd, &reader)) {
            Some(Ok(())) => tracing::info!(layer = %name, "recovered"),
            Some(Err(error)) => tracing::error!(layer = %name, error = format!("{error:#}"),
                "cannot go on serving a file; who reads it waits"),
            None => tracing::warn!(layer = %name, "the file of an export is not mounted any more"),
        }
        self.recovered(export, Device::Fuse, entry);
        Ok(())
    }

    pub(super) fn unrecovered(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.unrecovered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn recover_or_note(&self, entry: Entry) {
        if let Err(error) = self.recover_ublk(entry.clone()) {
            tracing::error!(device = entry.device, layer = %entry.name(),
                error = format!("{error:#}"),
                "cannot recover a device; who reads it waits until another attempt succeeds");
            self.unrecovered().push(entry);
        }
    }

    /// Whether every device of an earlier daemon was recovered.
    pub fn all_recovered(&self) -> bool {
        self.unrecovered().is_empty()
    }

    /// Tries again to recover what could not be recovered; true if nothing is left.
    pub fn recover_again(&self) -> bool {
        let entries = std::mem::take(&mut *self.unrecovered());
        for entry in entries {
            self.recover_or_note(entry);
        }
        self.all_recovered()
    }

    fn recover_ublk(&self, mut entry: Entry) -> Result<()> {
        let Some(ublk) = self.devices.ublk() else {
            bail!("no ublk");
        };
        let (id, name) = (entry.device, entry.name());
        let Some(info) = ublk.state(id)? else {
            tracing::info!(device = id, layer = %name, "a device is gone; dropping its entry");
            return Ok(self.journal.remove(entry.root)?);
        };
        // Nobody has been told of a device that was being made. One that was being removed
        // may be in use: then its daemon died before it could take that back.
        let removal = match (entry.state, info.state) {
            (JournalState::Intent, _) | (_, DeviceState::Stopped) => Some(Removal::Always),
            (JournalState::Deleting, _) => Some(Removal::IfUnused),
            (JournalState::Live, _) => None,
        };
        match removal.map(|when| ublk.remove(id, when)) {
            None => {}
            Some(Ok(())) => {
                tracing::info!(device = id, layer = %name, "removed an unfinished device");
                return Ok(self.journal.remove(entry.root)?);
            }
            Some(Err(UblkError::InUse { .. })) => {
                tracing::warn!(device = id, layer = %name,
                    "a device was to be removed, but is in use: going on with it");
                entry.state = JournalState::Live;
                self.journal.write(&entry)?;
            }
            Some(Err(error)) => return Err(error.into()),
        }
        let export = Arc::new(Export::recovered(name, entry.root, entry.size));
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        let device = ublk.recover(id, reader)?;
        tracing::info!(device = id, layer = %name, "recovered");
        self.recovered(export, Device::Ublk(device), entry);
        Ok(())
    }

    /// Notes an export that an earlier daemon had, and who holds it.
    fn recovered(&self, export: Arc<Export>, device: Device, entry: Entry) {
        let mut state = self.state();
        for holder in &entry.holders {
            let holding = Holding {
                image: holder.image.clone(),
                manifest: holder.manifest,
                layers: holder.layers.clone(),
                signed: holder.signed,
                ready: None,
            };
            state.holders.insert(holder.holder.clone(), holding);
        }
        let served = Served {
            export,
            device,
            entry: Some(entry),
        };
        self.note_origin(&served);
        state.exports.insert(served.export.root, served);
        self.recovered.fetch_add(1, Relaxed);
    }
}
