//! What has to be known of UFS before anything is exported: no lock is held meanwhile.

use super::{Found, PREPARED, Prepared, Registry};
use crate::catalog::{Catalog, Image, Layer};
use crate::engine::Export;
use crate::protocol::FindAnswer;
use accel_oci::{ChainId, Digest};
use accel_source::Source;
use accel_ufs::index::Root;
use accel_ufs::resolve::ImageName;
use anyhow::Result;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

impl Registry {
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

    pub(super) fn prepared(&self) -> MutexGuard<'_, Vec<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn look_up(&self, image: &str) -> Result<Found> {
        let (began, catalog) = (Instant::now(), self.catalog());
        let name: ImageName = image.parse()?;
        let image = catalog.find(&name)?;
        let opened = self.open(&image)?;
        Ok(Found {
            image,
            opened,
            began,
            looked_up: catalog.fetched.get(),
        })
    }

    /// Opens the layers of `image` that are not exported yet.
    pub(super) fn open(&self, image: &Image) -> Result<HashMap<Root, Arc<Export>>> {
        let mut opened = HashMap::new();
        for layer in &image.layers {
            let known = self.state().exports.contains_key(&layer.root);
            if !known && !opened.contains_key(&layer.root) {
                opened.insert(layer.root, self.open_layer(*layer)?);
            }
        }
        Ok(opened)
    }

    pub(super) fn open_layer(&self, layer: Layer) -> Result<Arc<Export>> {
        let Layer { name, root, size } = layer;
        let patience = self.engine.patience().lookup();
        let export = Export::open(&self.engine, name, root, size, patience)?;
        Ok(Arc::new(export))
    }

    /// What UFS has for a chain ID on top of `below`.
    pub fn find_layer(
        &self,
        chain_id: ChainId,
        below: Option<ChainId>,
        digest: Option<Digest>,
    ) -> Result<FindAnswer> {
        self.check_open()?;
        match self.catalog().layer_of_chain(chain_id, below, digest) {
            Ok(Some((diff_id, layer))) => Ok(FindAnswer::Found {
                diff_id,
                root: layer.root,
                size: layer.size,
            }),
            Ok(None) => Ok(FindAnswer::Absent),
            Err(error) => Ok(FindAnswer::Unreadable(error.to_string())),
        }
    }

    pub(super) fn catalog(&self) -> Catalog<'_, dyn Source> {
        Catalog {
            source: &**self.engine.source(),
            pool: self.engine.arena().chunks(),
            ufs: &self.ufs,
            fetched: Cell::new(0),
        }
    }
}
