//! What has to be known of UFS before anything is exported: no lock is held meanwhile.

use super::{Found, PREPARED, Prepared, Registry};
use crate::catalog::{Catalog, Image, Layer};
use crate::engine::{Engine, Export, OpenError};
use crate::protocol::FindAnswer;
use accel_oci::{ChainId, DiffId, Digest};
use accel_source::Source;
use accel_ufs::index::{ImageSize, Root};
use accel_ufs::names::LayerName;
use accel_ufs::resolve::ImageName;
use anyhow::Result;
use std::cell::Cell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

/// What there is of a layer whose root is known.
pub(super) enum Rooted {
    /// The layer.
    Found(Arc<Export>),
    /// A layer of that name with this root or another size.
    Other(Root),
    /// Nothing.
    Absent,
}

/// Opens a layer, and begins to read what mounting it takes, if that is not known.
pub(super) fn open_layer(engine: &Arc<Engine>, layer: &Layer) -> Result<Arc<Export>, OpenError> {
    let patience = engine.patience().lookup();
    if let Some(start) = &layer.start {
        let export = Export::begun(engine, layer.name, start, patience)?;
        return Ok(Arc::new(export));
    }
    let export = Export::open(engine, layer.name, layer.root, layer.size, patience)?;
    let export = Arc::new(export);
    engine.expect_mount(&export);
    Ok(export)
}

/// A catalog of what `engine` reads from; `ufs` is for messages.
pub(super) fn catalog<'a>(engine: &'a Engine, ufs: &'a Path) -> Catalog<'a, dyn Source> {
    Catalog {
        source: &**engine.source(),
        pool: engine.arena().chunks(),
        ufs,
        fetched: Cell::new(0),
    }
}

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
        let exported = |root| self.state().exports.contains_key(&root);
        let image = catalog.find(&name, exported)?;
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
        let mut wanted: HashMap<Root, Layer> = HashMap::new();
        {
            let state = self.state();
            for layer in &image.layers {
                if !state.exports.contains_key(&layer.root) {
                    wanted.insert(layer.root, layer.clone());
                }
            }
        }
        let engine = Arc::clone(&self.engine);
        let (opened, result) = self
            .threads
            .each_of(wanted.into_values().collect(), move |layer: Layer| {
                open_layer(&engine, &layer).map(|export| (layer.root, export))
            });
        result?;
        Ok(opened.into_iter().collect())
    }

    pub(super) fn open_layer(&self, layer: &Layer) -> Result<Arc<Export>> {
        Ok(open_layer(&self.engine, layer)?)
    }

    /// The layer with this diffID on top of others, as long as its image has this root
    /// and size. Most layers go by their diffID, so that is looked for first.
    pub(super) fn open_rooted(
        &self,
        diff_id: DiffId,
        chain_id: ChainId,
        (root, size): (Root, ImageSize),
    ) -> Result<Rooted, OpenError> {
        let mut other = None;
        for name in [LayerName::Layer(diff_id), LayerName::Chain(chain_id)] {
            let layer = Layer {
                name,
                root,
                size,
                start: None,
            };
            match open_layer(&self.engine, &layer) {
                Ok(export) => return Ok(Rooted::Found(export)),
                Err(OpenError::Differs { found, .. }) => other = other.or(Some(found)),
                Err(OpenError::Source { source, .. }) if source.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(other.map_or(Rooted::Absent, Rooted::Other))
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
        catalog(&self.engine, &self.ufs)
    }
}
