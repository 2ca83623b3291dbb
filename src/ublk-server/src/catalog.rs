//! From what an operator calls an image to its layers, read through the source.

use crate::remake::Origin;
use accel_oci::{ChainId, DiffId, Digest, ImageSource, Version};
use accel_source::{
    FileName, Origin as Giver, Patience, Pool, Source, SourceError, list, read_checked, read_file,
};
use accel_ufs::UfsError;
use accel_ufs::index::{Header, HeaderError, ImageSize, PAGE_SIZE, Page, Root};
use accel_ufs::names::{self, LayerName, Nanoseconds};
use accel_ufs::record::{
    DigestRecord, ImageRecord, LayerRecord, MAX_RECORD, NameRecord, RecordError,
};
use accel_ufs::resolve::ImageName;
use accel_ufs::start::{self, LayerStart};
use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// It is not there, or its record is wrong.
    #[error(transparent)]
    Ufs(#[from] UfsError),
    /// UFS does not answer.
    #[error("cannot look the image up: {0}")]
    Source(#[from] SourceError),
    /// A layer's index is none.
    #[error("{name}: {source}")]
    Index {
        /// Which layer.
        name: LayerName,
        /// What is wrong.
        source: HeaderError,
    },
    /// A record's layer has a path that is not its name.
    #[error("the image record of {manifest} has a layer whose path is not its name")]
    Path {
        /// Which image.
        manifest: Digest,
    },
}

/// What there is to serve.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the manifest, or of the only layer.
    pub digest: Digest,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// Where they came from, as far as that is known.
    pub origins: HashMap<Root, Origin>,
}

/// A layer to serve.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What it is called on UFS.
    pub name: LayerName,
    /// What vouches for its bytes.
    pub root: Root,
    /// Its size.
    pub size: ImageSize,
    /// What a mount reads of it, if that came with its image's record.
    pub start: Option<Arc<LayerStart>>,
}

/// Where an image's layers came from. Of a registry's image the manifest's digest counts:
/// a tag may have moved since.
fn origins(record: &ImageRecord) -> HashMap<Root, Origin> {
    let Ok(mut source) = record.source.parse::<ImageSource>() else {
        return HashMap::new();
    };
    if let ImageSource::Registry(reference) = &mut source {
        reference.version = Version::Digest(record.manifest);
    }
    let origin = |layer: &LayerRecord| Origin {
        source: source.to_string(),
        platform: record.platform.clone(),
        diff_id: layer.diff_id,
        chain_id: layer.chain_id,
    };
    let layers = record.layers.iter();
    layers
        .map(|layer| (layer.erofs.root, origin(layer)))
        .collect()
}

/// Looks images up on one UFS.
#[derive(Debug)]
pub struct Catalog<'a, S: Source + ?Sized> {
    /// Where to read.
    pub source: &'a S,
    /// Memory to read into.
    pub pool: &'a Arc<Pool>,
    /// What the UFS directory is called, for messages.
    pub ufs: &'a Path,
    /// Bytes read so far.
    pub fetched: Cell<u64>,
}

impl Catalog<'_, dyn Source> {
    /// The layers of the image that `name` (canonical) means. A digest may also
    /// be a single layer's. What a mount reads of the layers comes with them, unless all
    /// are `known`: such layers are not opened any more.
    pub fn find(
        &self,
        name: &ImageName,
        known: impl Fn(Root) -> bool,
    ) -> Result<Image, CatalogError> {
        let record = match self.record(name) {
            Err(CatalogError::Ufs(UfsError::NotConverted { .. }))
                if let ImageName::Manifest(digest) = name
                    && let Some(layer) = self.layer(digest)? =>
            {
                return Ok(Image {
                    digest: *digest,
                    layers: vec![layer],
                    origins: HashMap::new(),
                });
            }
            record => record?,
        };
        let manifest = record.manifest;
        let starts = match record.layers.iter().all(|layer| known(layer.erofs.root)) {
            true => HashMap::new(),
            false => self.starts(&manifest),
        };
        let layers = record.layers.iter().map(|layer| {
            let name = layer.name().ok_or(CatalogError::Path { manifest })?;
            let (root, size) = (layer.erofs.root, layer.erofs.size);
            let start = starts.get(&root).filter(|start| start.size() == size);
            Ok(Layer {
                name,
                root,
                size,
                start: start.map(Arc::clone),
            })
        });
        Ok(Image {
            digest: manifest,
            origins: origins(&record),
            layers: layers.collect::<Result<_, CatalogError>>()?,
        })
    }

    /// The layer with this chain ID or diffID.
    fn layer(&self, digest: &Digest) -> Result<Option<Layer>, CatalogError> {
        for layer in self.named(ChainId(*digest), DiffId(*digest)) {
            if let Some(layer) = layer? {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    /// The layer with this chain ID on top of `below`, whatever its root is. `digest`
    /// is its blob's, if that is known: of all but the lowest the diffID follows from
    /// nothing else.
    pub fn layer_of_chain(
        &self,
        chain_id: ChainId,
        below: Option<ChainId>,
        digest: Option<Digest>,
    ) -> Result<Option<(DiffId, Layer)>, CatalogError> {
        let record = match digest {
            Some(digest) => self.digest_record(&digest)?,
            None => None,
        };
        let diff_id = match (below, &record) {
            (None, _) => DiffId(chain_id.0),
            (Some(_), Some(record)) => record.diff_id,
            (Some(_), None) => return Ok(None),
        };
        // What a record says is nothing without this.
        if ChainId::new(below, diff_id) != chain_id {
            return Ok(None);
        }
        // As the lowest layer it would have whiteouts that hide nothing, for all that is
        // known.
        let own_place_only = below.is_none()
            && record.is_none_or(|record| record.whiteouts || record.diff_id != diff_id);
        for layer in self.named(chain_id, diff_id) {
            if let Some(layer) = layer? {
                let serves = matches!(layer.name, LayerName::Chain(_)) || !own_place_only;
                return Ok(serves.then_some((diff_id, layer)));
            }
        }
        Ok(None)
    }

    /// What is noted of a blob.
    fn digest_record(&self, digest: &Digest) -> Result<Option<DigestRecord>, CatalogError> {
        let file = names::by_digest(digest);
        let Some(json) = self.read(file.as_str(), MAX_RECORD + 1)? else {
            return Ok(None);
        };
        let record = DigestRecord::parse(&json).map_err(|source| self.wrong(&file, source))?;
        if record.digest != *digest {
            let misplaced = RecordError::Misplaced {
                wanted: digest.to_string(),
                found: record.digest.to_string(),
            };
            return Err(self.wrong(&file, misplaced).into());
        }
        Ok(Some(record))
    }

    /// What there is by chain ID, and by diffID.
    fn named(
        &self,
        chain_id: ChainId,
        diff_id: DiffId,
    ) -> impl Iterator<Item = Result<Option<Layer>, CatalogError>> {
        let names = [LayerName::Chain(chain_id), LayerName::Layer(diff_id)];
        names.into_iter().map(|name| {
            let Some(bytes) = self.read(name.index().as_str(), PAGE_SIZE)? else {
                return Ok(None);
            };
            let page = <&Page>::try_from(&*bytes).map_err(|_| HeaderError::Magic);
            let header = page
                .and_then(Header::parse)
                .map_err(|source| CatalogError::Index { name, source })?;
            Ok(Some(Layer {
                name,
                root: header.root(),
                size: header.image_size(),
                start: None,
            }))
        })
    }

    /// What mounting an image reads of its layers, if that lies beside its record. It is a
    /// help: without it layers are opened one by one.
    fn starts(&self, manifest: &Digest) -> HashMap<Root, Arc<LayerStart>> {
        let name = names::image_start(manifest);
        let file = FileName::new(name.as_str());
        let mut read = 0;
        let parse = |bytes: &[u8], _: &Giver| {
            read += bytes.len();
            start::parse(bytes)
        };
        let limit = start::MAX_START + 1;
        let patience = Patience::HELP;
        let starts = match read_checked(self.source, self.pool, &file, limit, patience, parse) {
            Ok(Ok(starts)) => starts,
            Ok(Err(error)) => {
                tracing::warn!(%file, %error, "mounting the image takes more of UFS than it need");
                Vec::new()
            }
            Err(error) if error.is_not_found() => Vec::new(),
            Err(error) => {
                tracing::debug!(%file, %error, "cannot be read");
                Vec::new()
            }
        };
        self.count(read);
        let starts = starts.into_iter();
        starts
            .map(|start| (start.root(), Arc::new(start)))
            .collect()
    }

    /// The record of the image that `name` means.
    pub(crate) fn record(&self, name: &ImageName) -> Result<ImageRecord, CatalogError> {
        let not_converted = || UfsError::NotConverted {
            image: name.to_string(),
            ufs: self.ufs.to_owned(),
        };
        let json = |manifest| self.read(names::image_record(manifest).as_str(), MAX_RECORD + 1);
        let own = match name {
            ImageName::Manifest(digest) => json(digest)?.map(|json| (*digest, json)),
            ImageName::Source(_) => None,
        };
        let (manifest, json) = match own {
            Some(own) => own,
            None => {
                let manifest = match name {
                    // It may be an index.
                    ImageName::Manifest(digest) => self.latest(digest)?,
                    ImageName::Source(source) => self.latest(source)?,
                };
                let manifest = manifest.ok_or_else(not_converted)?;
                let json = json(&manifest)?.ok_or_else(not_converted)?;
                (manifest, json)
            }
        };
        let file = names::image_record(&manifest);
        let record = ImageRecord::parse(&json).map_err(|source| self.wrong(&file, source))?;
        if record.manifest != manifest {
            let source = RecordError::Misplaced {
                wanted: manifest.to_string(),
                found: record.manifest.to_string(),
            };
            return Err(self.wrong(&file, source).into());
        }
        Ok(record)
    }

    /// What `source`, or an index, pointed to when it was last converted.
    fn latest(&self, source: &dyn std::fmt::Display) -> Result<Option<Digest>, CatalogError> {
        let directory = names::name_directory(source);
        let directory = FileName::new(directory.as_str());
        let files = match list(self.source, self.pool, &directory, Patience::LOOKUP) {
            Ok(files) => files,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let listed: usize = files.iter().map(|name| name.len() + 1).sum();
        self.count(listed);
        let newest = files
            .iter()
            .find_map(|file| Nanoseconds::from_file_name(file));
        let Some(newest) = newest else {
            return Ok(None);
        };
        let file = names::name_record(source, newest);
        let Some(json) = self.read(file.as_str(), MAX_RECORD + 1)? else {
            return Ok(None);
        };
        let record = NameRecord::parse(&json).map_err(|source| self.wrong(&file, source))?;
        if record.source != source.to_string() {
            let misplaced = RecordError::Misplaced {
                wanted: source.to_string(),
                found: record.source,
            };
            return Err(self.wrong(&file, misplaced).into());
        }
        Ok(Some(record.manifest))
    }

    fn read(&self, file: &str, limit: usize) -> Result<Option<Vec<u8>>, CatalogError> {
        let file = FileName::new(file);
        match read_file(self.source, self.pool, &file, limit, Patience::LOOKUP) {
            Ok(bytes) => {
                self.count(bytes.len());
                Ok(Some(bytes))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn count(&self, bytes: usize) {
        self.fetched.set(self.fetched.get() + bytes as u64);
    }

    fn wrong(&self, file: &names::RelPath, source: RecordError) -> UfsError {
        let path: PathBuf = file.beneath(self.ufs);
        UfsError::Record {
            path,
            error: source,
        }
    }
}
