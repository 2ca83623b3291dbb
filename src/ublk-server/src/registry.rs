//! What is exported, and who needs it.
//!
//! Exports are shared by root: a layer that ten images have is one device. Each
//! *holder* (a mount, or an operator's `attach`) holds all layers of one image;
//! an export ends with its last holder.
//!
//! Two locks: `operations` orders attach and detach, which may wait for the kernel;
//! `state` is held for moments only, so that `status` always answers. `operations` is
//! taken first. What has to be known of UFS is looked up before either: a UFS that
//! stalls holds up who asks for it, and nobody else.

use crate::catalog::{Catalog, CatalogError, Image, Layer, RootedLayer};
use crate::devices::{Device, Devices};
use crate::engine::{Engine, Export, ExportReader, Warmer};
use crate::journal::{Entry, HolderEntry, Journal, State as JournalState, Transport};
use crate::paths::Paths;
use crate::protocol::{
    Attached, AttachedLayer, Detached, DeviceView, Ended, ExportStatus, Holder, HolderStatus,
    LayerAnswer,
};
use accel_oci::{ChainId, DiffId, Digest};
use accel_source::Source;
use accel_transport::ublk::{DeviceState, Removal};
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::resolve::ImageName;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Every export of the daemon.
#[derive(Debug)]
pub struct Registry {
    engine: Arc<Engine>,
    devices: Devices,
    journal: Journal,
    warmer: Warmer,
    ufs: PathBuf,
    operations: Mutex<()>,
    state: Mutex<State>,
    /// Images that were looked up and are about to be attached.
    prepared: Mutex<Vec<Prepared>>,
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
    ) -> Result<Self> {
        let warmer = Warmer::start(&engine).context("cannot start a thread")?;
        Ok(Self {
            engine,
            devices,
            journal,
            warmer,
            ufs,
            operations: Mutex::default(),
            state: Mutex::default(),
            prepared: Mutex::default(),
            unrecovered: Mutex::default(),
        })
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

    /// Looks `image` up, so that attaching it soon does not wait for UFS.
    pub fn prepare(&self, image: &str) -> Result<()> {
        self.check_open()?;
        let found = self.look_up(image)?;
        let mut prepared = self.prepared();
        prepared.retain(|other| other.image != image && other.at.elapsed() < PREPARED);
        prepared.push(Prepared {
            image: image.to_owned(),
            at: Instant::now(),
            found,
        });
        Ok(())
    }

    fn prepared(&self) -> MutexGuard<'_, Vec<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, image: &str) -> Result<Found> {
        let name: ImageName = image.parse()?;
        let image = self.catalog().find(&name)?;
        let opened = self.open(&image)?;
        Ok(Found { image, opened })
    }

    /// Opens the layers of `image` that are not exported yet.
    fn open(&self, image: &Image) -> Result<HashMap<Root, Arc<Export>>> {
        let mut opened = HashMap::new();
        for layer in &image.layers {
            let known = self.state().exports.contains_key(&layer.root);
            if !known && !opened.contains_key(&layer.root) {
                opened.insert(layer.root, self.open_layer(*layer)?);
            }
        }
        Ok(opened)
    }

    fn open_layer(&self, layer: Layer) -> Result<Arc<Export>> {
        let Layer { name, root, size } = layer;
        let patience = self.engine.patience().lookup();
        let export = Export::open(&self.engine, name, root, size, patience)?;
        Ok(Arc::new(export))
    }

    /// Exports the layers of `image` for `holder`.
    pub fn attach(&self, image: &str, holder: Option<String>) -> Result<Attached> {
        self.check_open()?;
        let prepared = {
            let mut prepared = self.prepared();
            let at = prepared.iter().position(|other| other.image == image);
            at.map(|at| prepared.swap_remove(at))
        };
        let prepared = prepared.filter(|prepared| prepared.at.elapsed() < PREPARED);
        let found = match prepared {
            Some(prepared) => prepared.found,
            None => self.look_up(image)?,
        };
        let digest = found.image.digest;
        let holder = holder.unwrap_or_else(|| operator(&digest));
        let layers = self.attach_found(found, image, &holder, false)?;
        Ok(Attached { digest, layers })
    }

    /// Exports one layer, whose root is known, for `holder`.
    pub fn attach_layer(
        &self,
        diff_id: DiffId,
        chain_id: ChainId,
        (root, size): (Root, ImageSize),
        holder: &str,
    ) -> Result<LayerAnswer> {
        self.check_open()?;
        let found = self
            .catalog()
            .layer_with_root(diff_id, chain_id, root, size);
        let layer = match found {
            Ok(RootedLayer::Found(layer)) => layer,
            Ok(RootedLayer::Other(root)) => return Ok(LayerAnswer::OtherRoot(root)),
            Ok(RootedLayer::Absent) => return Ok(LayerAnswer::Absent),
            Err(error @ (CatalogError::Source(_) | CatalogError::Index { .. })) => {
                return Ok(LayerAnswer::Unreadable(error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        let image = Image {
            digest: diff_id.0,
            layers: vec![layer],
        };
        let name = layer.name.to_string();
        let opened = self.open(&image)?;
        let found = Found { image, opened };
        let layers = self.attach_found(found, &name, holder, true)?;
        let layer = layers.into_iter().next().context("no layer")?;
        Ok(LayerAnswer::Attached(layer))
    }

    fn check_open(&self) -> Result<()> {
        match self.state().closed {
            true => bail!("the daemon is ending"),
            false => Ok(()),
        }
    }

    fn catalog(&self) -> Catalog<'_, dyn Source> {
        Catalog {
            source: &**self.engine.source(),
            pool: self.engine.arena().chunks(),
            ufs: &self.ufs,
        }
    }

    /// Exports what was found.
    fn attach_found(
        &self,
        mut found: Found,
        image: &str,
        holder: &str,
        signed: bool,
    ) -> Result<Vec<AttachedLayer>> {
        let _one = self.operate();
        self.check_open()?;
        let digest = found.image.digest;
        if let Some(other) = self.state().holders.get(holder)
            && other.manifest != digest
        {
            bail!(
                "{holder} already holds {} ({})",
                other.image,
                other.manifest
            );
        }
        let mut added = Vec::new();
        let layers = self
            .attach_layers(&mut found, &mut added)
            .and_then(|layers| {
                let holding = Holding {
                    image: image.to_owned(),
                    manifest: digest,
                    layers: layers.iter().map(|layer| layer.root).collect(),
                    signed,
                };
                self.hold(holder, holding)?;
                Ok(layers)
            });
        match layers {
            Ok(layers) => {
                tracing::info!(image, holder, layers = layers.len(), "attached");
                Ok(layers)
            }
            Err(error) => {
                for root in added {
                    if let Err(error) = self.end(root) {
                        tracing::error!(%root, error = format!("{error:#}"), "cannot undo an export");
                    }
                }
                Err(error)
            }
        }
    }

    fn attach_layers(
        &self,
        found: &mut Found,
        added: &mut Vec<Root>,
    ) -> Result<Vec<AttachedLayer>> {
        let mut layers = Vec::with_capacity(found.image.layers.len());
        for layer in &found.image.layers {
            let known = self.state().exports.get(&layer.root).cloned();
            let served = match known {
                Some(served) => served,
                None => {
                    let export = match found.opened.remove(&layer.root) {
                        Some(export) => export,
                        // Its last holder has let it go since it was looked up.
                        None => self.open_layer(*layer)?,
                    };
                    let served = self.export(export)?;
                    added.push(layer.root);
                    self.state().exports.insert(layer.root, served.clone());
                    served
                }
            };
            layers.push(AttachedLayer {
                name: served.export.name.to_string(),
                root: layer.root,
                size: layer.size,
                uuid: layer.name.uuid(),
                device: self.devices.view(layer.root, &served.device),
            });
        }
        Ok(layers)
    }

    /// Makes a device for a layer.
    fn export(&self, export: Arc<Export>) -> Result<Served> {
        let (name, root, size) = (export.name, export.root, export.image_size());
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        let mut entry = Entry::new(&self.journal, name, root, size);
        let mut noted = false;
        let device = self.devices.add(&reader, |device| {
            entry.device = device.id;
            entry.features = device.features.bits();
            entry.queue_depth = device.queue_depth;
            self.journal.check_vacant(root)?;
            noted = true;
            self.journal.write(&entry)
        });
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                if noted {
                    self.undo(&entry)?;
                }
                return Err(error).with_context(|| format!("cannot export {name}"));
            }
        };
        if matches!(device, Device::Fuse) {
            entry = entry.over_fuse();
            self.journal
                .check_vacant(root)
                .and_then(|()| self.journal.write(&entry))
                .with_context(|| format!("cannot export {name}"))?;
        }
        Ok(Served {
            export,
            device,
            entry: Some(entry),
        })
    }

    /// Removes the entry of a device that was not made after all. If the driver still
    /// has it, the entry stays: a later daemon removes both.
    fn undo(&self, entry: &Entry) -> Result<()> {
        let left = self.devices.ublk().map(|ublk| ublk.state(entry.device));
        if let Some(Ok(Some(_)) | Err(_)) = left {
            tracing::error!(
                device = entry.device,
                "a device that did not start cannot be removed; the next daemon tries again"
            );
            return Ok(());
        }
        self.journal
            .remove(entry.root)
            .context("cannot undo the journal")
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

    /// Ends an export.
    fn end(&self, root: Root) -> Result<()> {
        let served = self.state().exports.get(&root).cloned();
        let served = served.ok_or_else(|| anyhow!("{root} is not exported"))?;
        if let Some(mut entry) = served.entry.clone() {
            entry.state = JournalState::Deleting;
            self.journal
                .write(&entry)
                .context("cannot write the journal")?;
        }
        if let Err(error) = self.devices.remove(root, &served.device) {
            if let Some(entry) = &served.entry {
                self.journal
                    .write(entry)
                    .context("cannot write the journal")?;
            }
            return Err(error).with_context(|| format!("cannot end {}", served.export.name));
        }
        self.journal
            .remove(root)
            .context("cannot remove a journal entry")?;
        self.state().exports.remove(&root);
        Ok(())
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
        // The top layer is looked at first.
        for root in holding.layers.iter().rev() {
            if let Some(served) = state.exports.get(root) {
                self.warmer.push(&served.export);
            }
        }
    }

    /// Takes over the devices that an earlier daemon left. One that cannot be
    /// recovered is told and left; the others go on. Mounts that were undone
    /// meanwhile are forgotten.
    pub fn recover(&self, paths: &Paths) -> Result<()> {
        self.recover_devices()?;
        self.forget_unmounted(paths);
        Ok(())
    }

    /// Ends what mounts held of which the clients have no note any more: they
    /// were unmounted while no daemon served.
    fn forget_unmounted(&self, paths: &Paths) {
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
                Transport::Ublk => self.recover_ublk(entry)?,
                Transport::Fuse => {
                    let connection = kept.remove(&entry.root);
                    self.recover_fuse(entry, connection)?;
                }
            }
        }
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

    fn recover_ublk(&self, entry: Entry) -> Result<()> {
        let Some(ublk) = self.devices.ublk() else {
            bail!("no ublk");
        };
        let (id, name) = (entry.device, entry.name());
        let info = match ublk.state(id) {
            Ok(info) => info,
            Err(error) => {
                tracing::error!(device = id, layer = %name, %error, "cannot look at a device");
                return Ok(());
            }
        };
        let Some(info) = info else {
            tracing::info!(device = id, layer = %name, "a device is gone; dropping its entry");
            self.journal.remove(entry.root)?;
            return Ok(());
        };
        if entry.state != JournalState::Live || info.state == DeviceState::Stopped {
            match ublk.remove(id, Removal::Always) {
                Ok(()) => {
                    tracing::info!(device = id, layer = %name, "removed an unfinished device");
                    self.journal.remove(entry.root)?;
                }
                Err(error) => {
                    tracing::error!(device = id, layer = %name, %error, "cannot remove a device");
                }
            }
            return Ok(());
        }
        self.recover_or_note(entry);
        Ok(())
    }

    fn unrecovered(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.unrecovered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn recover_or_note(&self, entry: Entry) {
        if let Err(error) = self.recover_one(&entry) {
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

    fn recover_one(&self, entry: &Entry) -> Result<()> {
        let Some(ublk) = self.devices.ublk() else {
            bail!("no ublk");
        };
        let export = Export::recovered(entry.name(), entry.root, entry.size);
        let export = Arc::new(export);
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        let device = ublk.recover(entry.device, reader)?;
        tracing::info!(device = entry.device, layer = %export.name, "recovered");
        self.recovered(export, Device::Ublk(device), entry.clone());
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
            };
            state.holders.insert(holder.holder.clone(), holding);
        }
        let served = Served {
            export,
            device,
            entry: Some(entry),
        };
        state.exports.insert(served.export.root, served);
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
        });
        (exports, holders.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::DiffId;
    use accel_source::{Arena, Done, Patience, Request, Source};
    use accel_transport::Wanted;
    use accel_ufs::index::ImageSize;
    use accel_ufs::names::LayerName;
    use std::fs;

    const ROOT: Root = Root([7; 32]);

    struct NoSource;

    impl Source for NoSource {
        fn submit(&self, _: Request, _: Done) {}

        fn name(&self) -> &str {
            "nothing"
        }
    }

    /// A registry with one export, whose journal is real and whose device is not.
    fn registry(paths: &Paths) -> Registry {
        let engine = Engine::start(
            Arc::new(NoSource),
            Arc::new(Arena::new(1, 1).unwrap()),
            Patience::DATA,
        );
        let engine = engine.unwrap();
        let devices = Devices::start(Wanted::Fuse, paths).unwrap();
        let journal = Journal::open(&paths.run, Path::new("/ufs")).unwrap();
        let name = LayerName::Layer(DiffId(Digest::of(b"layer")));
        let size = ImageSize::new(4096).unwrap();
        let served = Served {
            export: Arc::new(Export::recovered(name, ROOT, size)),
            device: Device::Fuse,
            entry: Some(Entry::new(&journal, name, ROOT, size)),
        };
        let registry = Registry::new(engine, devices, journal, "/ufs".into()).unwrap();
        registry.state().exports.insert(ROOT, served);
        registry
    }

    fn paths(directory: &Path) -> Paths {
        Paths::new(&directory.join("socket"), Some(directory.to_owned()))
    }

    fn holding() -> Holding {
        Holding {
            image: "oci:/x".to_owned(),
            manifest: Digest::of(b"manifest"),
            layers: vec![ROOT],
            signed: false,
        }
    }

    /// Holders in memory and on disk.
    fn holders(registry: &Registry) -> (Vec<String>, Vec<String>) {
        let memory = registry.state().holders.keys().cloned().collect();
        let entries = registry.journal.load().unwrap();
        let disk = entries.iter().flat_map(|entry| &entry.holders);
        (memory, disk.map(|holder| holder.holder.clone()).collect())
    }

    #[test]
    fn memory_and_journal_agree_also_after_a_failed_write() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&paths(directory.path()));
        let journal = directory.path().join("journal");
        let broken = |what: &dyn Fn() -> Result<()>| {
            fs::rename(&journal, directory.path().join("away")).unwrap();
            assert!(what().is_err());
            fs::rename(directory.path().join("away"), &journal).unwrap();
        };
        broken(&|| registry.hold("/a", holding()));
        assert_eq!(holders(&registry), (vec![], vec![]));
        registry.hold("/a", holding()).unwrap();
        let a = vec!["/a".to_owned()];
        assert_eq!(holders(&registry), (a.clone(), a.clone()));
        // Whoever holds it already still does when asking again fails.
        broken(&|| {
            registry
                .hold("/a", holding())
                .and(registry.hold("/b", holding()))
        });
        assert_eq!(holders(&registry), (a.clone(), a.clone()));
        registry.hold("/b", holding()).unwrap();
        broken(&|| registry.detach(&Holder::Mount("/b".to_owned())).map(drop));
        registry.hold("/a", holding()).unwrap();
        assert_eq!(holders(&registry), (a.clone(), a));
    }

    #[test]
    fn what_was_unmounted_without_a_daemon_ends() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths(directory.path());
        let registry = registry(&paths);
        let attach = operator(&holding().manifest);
        for holder in ["/gone", "/there", &attach] {
            registry.hold(holder, holding()).unwrap();
        }
        fs::create_dir(paths.mounts()).unwrap();
        fs::write(paths.note(Path::new("/there")), "{}").unwrap();
        registry.forget_unmounted(&paths);
        let left = vec!["/there".to_owned(), attach.clone()];
        assert_eq!(holders(&registry), (left.clone(), left));
        registry.state().holders.remove(&attach);
        fs::remove_file(paths.note(Path::new("/there"))).unwrap();
        registry.forget_unmounted(&paths);
        assert_eq!(holders(&registry), (vec![], vec![]));
        assert!(registry.state().exports.is_empty());
    }

    #[test]
    fn nothing_is_attached_once_the_daemon_ends() {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(&paths(directory.path()));
        assert_eq!(registry.shut_down(), 0);
        let image = Digest::of(b"manifest").to_string();
        let error = registry.attach(&image, None).unwrap_err().to_string();
        assert!(error.contains("ending"), "{error}");
    }
}
