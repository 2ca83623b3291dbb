//! Exporting what was looked up, for whoever needs it.

use super::look_up::{self, Rooted};
use super::ready::Readiness;
use super::{Found, Holding, PREPARED, Registry, Served, operator};
use crate::catalog::{Image, Layer};
use crate::devices::Device;
use crate::engine::{Export, ExportReader, OpenError};
use crate::journal::Entry;
use crate::protocol::{Attached, AttachedLayer, LayerAnswer};
use crate::remake::Origin;
use accel_oci::{ChainId, DiffId, Digest, Platform};
use accel_transport::ublk::Removal;
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

impl Registry {
    /// Exports the layers of `image` for `holder`.
    pub fn attach(self: &Arc<Self>, image: &str, holder: Option<String>) -> Result<Attached> {
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
        let layers = self.attach_found(&found, image, &holder, false)?;
        Ok(Attached { digest, layers })
    }

    /// Exports one layer, whose root is known, for `holder`. `by_ufs`: only UFS vouches
    /// for that. `image`: the name of a record that has the layer; the layers on top of it
    /// there are looked up in the background, to be asked for next.
    pub fn attach_layer(
        self: &Arc<Self>,
        diff_id: DiffId,
        chain_id: ChainId,
        (root, size): (Root, ImageSize),
        (origin, image): (Option<String>, Option<Digest>),
        holder: &str,
        by_ufs: bool,
    ) -> Result<LayerAnswer> {
        self.check_open()?;
        let began = Instant::now();
        if let Some(image) = image {
            let exported = self.state().exports.keys().copied().collect();
            self.ahead.begin(image, root, exported);
        }
        let names = [LayerName::Layer(diff_id), LayerName::Chain(chain_id)];
        let export = match self.ahead.take(names, root, size) {
            Some(export) => export,
            None => match self.open_rooted(diff_id, chain_id, (root, size)) {
                Ok(Rooted::Found(export)) => export,
                Ok(Rooted::Other(root)) => return Ok(LayerAnswer::OtherRoot(root)),
                Ok(Rooted::Absent) => return Ok(LayerAnswer::Absent),
                Err(error) => return Ok(LayerAnswer::Unreadable(error.to_string())),
            },
        };
        // What the client knows; else nothing.
        let origin = origin.map(|source| Origin {
            source,
            platform: Platform::host(),
            diff_id,
            chain_id,
        });
        let from = (diff_id.0, origin);
        self.attach_opened(export, from, began, holder, !by_ufs)
            .map(LayerAnswer::Attached)
    }

    /// Exports a node's canary, whose root is known, for `holder`.
    pub fn attach_canary(
        self: &Arc<Self>,
        digest: Digest,
        (root, size): (Root, ImageSize),
        holder: &str,
    ) -> Result<LayerAnswer> {
        self.check_open()?;
        let began = Instant::now();
        let layer = Layer {
            name: LayerName::Canary(digest),
            root,
            size,
            start: None,
        };
        match look_up::open_layer(&self.engine, &layer) {
            Ok(export) => self
                .attach_opened(export, (digest, None), began, holder, true)
                .map(LayerAnswer::Attached),
            Err(OpenError::Differs { found, .. }) => Ok(LayerAnswer::OtherRoot(found)),
            Err(OpenError::Source { source, .. }) if source.is_not_found() => {
                Ok(LayerAnswer::Absent)
            }
            Err(error) => Ok(LayerAnswer::Unreadable(error.to_string())),
        }
    }

    /// Exports one layer, which is open, for `holder`.
    fn attach_opened(
        self: &Arc<Self>,
        export: Arc<Export>,
        (digest, origin): (Digest, Option<Origin>),
        began: Instant,
        holder: &str,
        signed: bool,
    ) -> Result<AttachedLayer> {
        let (name, root, size) = (export.name, export.root, export.image_size());
        let origins = origin.map(|origin| (root, origin)).into_iter().collect();
        let image = Image {
            digest,
            layers: vec![Layer {
                name,
                root,
                size,
                start: None,
            }],
            origins,
        };
        let found = Found {
            image,
            opened: [(root, export)].into(),
            began,
            looked_up: 0,
        };
        let layers = self.attach_found(&found, &name.to_string(), holder, signed)?;
        layers.into_iter().next().context("no layer")
    }

    /// Exports what was found.
    fn attach_found(
        self: &Arc<Self>,
        found: &Found,
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
        let layers = self.attach_layers(found, &mut added).and_then(|layers| {
            let mut ready = Readiness::new(found.began, found.looked_up);
            let state = self.state();
            for layer in &layers {
                if let Some(served) = state.exports.get(&layer.root) {
                    ready.add(&served.export, added.contains(&layer.root));
                }
            }
            drop(state);
            let holding = Holding {
                image: image.to_owned(),
                manifest: digest,
                layers: layers.iter().map(|layer| layer.root).collect(),
                signed,
                ready: Some(Arc::new(ready)),
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
                // Nobody has been told of them: who has one open, as udev may, is not asked,
                // which would take a descriptor.
                for root in added {
                    if let Err(error) = self.end_when(root, Removal::Always) {
                        tracing::error!(%root, error = format!("{error:#}"), "cannot undo an export");
                    }
                }
                Err(error)
            }
        }
    }

    /// The layers, lowest first, each with a device. `added`: those that had none, also
    /// after an error.
    fn attach_layers(
        self: &Arc<Self>,
        found: &Found,
        added: &mut Vec<Root>,
    ) -> Result<Vec<AttachedLayer>> {
        // An image may have a layer twice.
        let mut missing = HashMap::new();
        for layer in &found.image.layers {
            if !self.state().exports.contains_key(&layer.root) {
                missing.insert(layer.root, layer.clone());
            }
        }
        let missing = missing.into_values().map(|layer| {
            let opened = found.opened.get(&layer.root).cloned();
            let origin = found.image.origins.get(&layer.root).cloned();
            (layer, opened, origin)
        });
        let registry = Arc::clone(self);
        // The driver starts several devices at the same time, each of which it takes its
        // time for.
        let (done, result) = self.threads.each_of(
            missing.collect(),
            move |(layer, opened, origin): (Layer, _, _)| {
                // Its last holder may have let it go since it was looked up.
                let export = opened.map_or_else(|| registry.open_layer(&layer), Ok)?;
                let served = registry.export(export, origin)?;
                registry.note_origin(&served);
                registry.state().exports.insert(layer.root, served);
                anyhow::Ok(layer.root)
            },
        );
        added.extend(done);
        result?;
        let mut layers = Vec::with_capacity(found.image.layers.len());
        for layer in &found.image.layers {
            let served = self.state().exports.get(&layer.root).cloned();
            let served = served.context("a layer was let go while it was attached")?;
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
    fn export(&self, export: Arc<Export>, origin: Option<Origin>) -> Result<Served> {
        let (name, root, size) = (export.name, export.root, export.image_size());
        let reader = Arc::new(ExportReader::new(&self.engine, &export));
        let mut entry = Entry::new(&self.journal, name, root, size);
        entry.origin = origin;
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
                .and_then(|()| {
                    let written = self.journal.write(&entry);
                    // It may be there all the same, of an export that is not.
                    written.inspect_err(|_| drop(self.journal.remove(root)))
                })
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
}
