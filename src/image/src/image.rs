//! From a source to an image whose layers can be read.

use crate::config::Config;
use crate::docker_archive::DockerArchive;
use crate::layout::Layout;
use crate::manifest::{Document, Manifest, Pointer, select};
use crate::registry::Registry;
use crate::{ImageError, ProcessConfig};
use accel_oci::{ChainId, DiffId, Digest, ImageSource, Platform};
use oci_spec::image::Descriptor;
use std::fmt;
use std::io::Read;

/// Manifests and indexes are at most this long; registries allow no more.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Configs are at most this long.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;
/// Indexes in indexes go at most this deep.
const MAX_DEPTH: usize = 4;

/// A user's name and password for a registry.
#[derive(Clone)]
pub struct Credentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A password does not belong into any log.
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// How to get an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Who to be to the registry; without, whoever the user's logins say.
    pub credentials: Option<Credentials>,
    /// Talk HTTP instead of HTTPS to the registry.
    pub plain_http: bool,
    /// Which of an index's images is meant.
    pub platform: Platform,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            credentials: None,
            plain_http: false,
            platform: Platform::host(),
        }
    }
}

/// An image: verified manifest and config, and where its layers are.
pub struct Image {
    /// Digest of the manifest: the image's name.
    pub manifest: Digest,
    /// Digests of the indexes that led to it, the outermost first.
    pub indexes: Vec<Digest>,
    /// Digest of the config.
    pub config: Digest,
    /// For which machines it is.
    pub platform: Platform,
    /// What to run.
    pub process: ProcessConfig,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// The manifest as it was read.
    pub(crate) manifest_json: Vec<u8>,
    /// The config as it was read.
    pub(crate) config_json: Vec<u8>,
    origin: Box<dyn Origin>,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the uncompressed tar, as the config has it.
    pub diff_id: DiffId,
    /// Name of the stack up to this layer.
    pub chain_id: ChainId,
    /// Digest of the blob, as the manifest has it.
    pub digest: Digest,
    /// The blob's media type, one of OCI's or Docker's for a tar, a gzipped or a
    /// zstd one.
    pub media_type: String,
    /// The blob's size in bytes, as the manifest has it.
    pub size: u64,
    /// Where else the blob may lie: web addresses, only of "foreign" layers, which
    /// registries need not hold.
    pub urls: Vec<String>,
}

/// Where manifests and blobs come from, several at a time.
pub(crate) trait Origin: Send + Sync {
    /// What the source names.
    fn start(&self) -> Result<Start, ImageError>;
    /// A manifest or index that an index led to; not yet verified.
    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError>;
    /// A blob, to be read to its end; not verified.
    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError>;
    /// Ends what waits for something far away; see [`Image::stop`].
    fn stop(&self) {}
}

/// What a source names.
pub(crate) enum Start {
    /// A manifest or index; not yet verified.
    Document {
        json: Vec<u8>,
        /// Its digest if that is what the source names it by; a tag may point
        /// to anything.
        expected: Option<Digest>,
    },
    /// Entries of an index, one of which is meant.
    Entries(Vec<Descriptor>),
}

/// Finds the image that `source` names for the wanted platform, and reads its
/// manifest and config.
pub fn open(source: &ImageSource, options: &OpenOptions) -> Result<Image, ImageError> {
    let origin: Box<dyn Origin> = match source {
        ImageSource::Oci(reference) => Box::new(Layout::open_directory(reference)?),
        ImageSource::OciArchive(reference) => Box::new(Layout::open_archive(reference)?),
        ImageSource::DockerArchive(reference) => Box::new(DockerArchive::open(reference)?),
        ImageSource::Registry(reference) => Box::new(Registry::open(reference, options)?),
    };
    let mut indexes = Vec::new();
    let (manifest_digest, manifest_json, manifest) =
        find_manifest(origin.as_ref(), source, &options.platform, &mut indexes)?;
    let (config_json, config) = read_config(origin.as_ref(), &manifest)?;
    if manifest.layers.len() != config.diff_ids.len() {
        return Err(ImageError::LayerCount {
            manifest: manifest_digest,
            layers: manifest.layers.len(),
            diff_ids: config.diff_ids.len(),
        });
    }
    if manifest.layers.is_empty() {
        return Err(ImageError::NoLayers {
            manifest: manifest_digest,
        });
    }
    if !options.platform.accepts(&config.platform) {
        return Err(ImageError::Platform {
            what: format!("the image {manifest_digest}"),
            wanted: options.platform.clone(),
            offered: vec![config.platform.to_string()],
        });
    }
    let mut parent = None;
    let layers = manifest.layers.into_iter().zip(config.diff_ids);
    let layers = layers.map(|(pointer, diff_id)| {
        let chain_id = ChainId::new(parent, diff_id);
        parent = Some(chain_id);
        Layer {
            diff_id,
            chain_id,
            digest: pointer.digest,
            media_type: pointer.media_type,
            size: pointer.size,
            urls: pointer.urls,
        }
    });
    Ok(Image {
        manifest: manifest_digest,
        indexes,
        config: manifest.config.digest,
        platform: config.platform,
        process: config.process,
        layers: layers.collect(),
        manifest_json,
        config_json,
        origin,
    })
}

fn find_manifest(
    origin: &dyn Origin,
    source: &ImageSource,
    platform: &Platform,
    indexes: &mut Vec<Digest>,
) -> Result<(Digest, Vec<u8>, Manifest), ImageError> {
    let mut what = source.to_string();
    let mut entries = match origin.start()? {
        Start::Entries(entries) => entries,
        Start::Document { json, expected } => {
            if let Some(expected) = expected {
                check(&what, &json, expected)?;
            }
            match Document::parse(&what, &json)? {
                Document::Manifest(manifest) => return Ok((Digest::of(&json), json, manifest)),
                Document::Index(entries) => {
                    indexes.push(Digest::of(&json));
                    entries
                }
            }
        }
    };
    for _ in 0..MAX_DEPTH {
        let pointer = select(&what, &entries, platform)?;
        what = format!("the manifest {}", pointer.digest);
        limit(&what, pointer.size, MAX_MANIFEST)?;
        let json = origin.manifest(&pointer)?;
        check(&what, &json, pointer.digest)?;
        match Document::parse(&what, &json)? {
            Document::Manifest(manifest) => return Ok((pointer.digest, json, manifest)),
            Document::Index(inner) => {
                indexes.push(pointer.digest);
                entries = inner;
            }
        }
    }
    Err(ImageError::Malformed {
        what: source.to_string(),
        why: format!("its indexes are nested more than {MAX_DEPTH} deep"),
    })
}

fn read_config(origin: &dyn Origin, manifest: &Manifest) -> Result<(Vec<u8>, Config), ImageError> {
    let pointer = &manifest.config;
    let what = format!("the config {}", pointer.digest);
    limit(&what, pointer.size, MAX_CONFIG)?;
    let mut json = Vec::new();
    let blob = origin.blob(&what, pointer)?;
    let read = blob.take(MAX_CONFIG + 1).read_to_end(&mut json);
    read.map_err(|error| ImageError::Malformed {
        what: what.clone(),
        why: error.to_string(),
    })?;
    check(&what, &json, pointer.digest)?;
    let config = Config::parse(&what, &json)?;
    Ok((json, config))
}

fn check(what: &str, bytes: &[u8], expected: Digest) -> Result<(), ImageError> {
    let found = Digest::of(bytes);
    if found == expected {
        return Ok(());
    }
    Err(ImageError::Digest {
        what: what.to_owned(),
        expected,
        found,
    })
}

/// Refuses what is too large to be read whole.
pub(crate) fn limit(what: &str, size: u64, limit: u64) -> Result<(), ImageError> {
    if size <= limit {
        return Ok(());
    }
    Err(ImageError::TooLarge {
        what: what.to_owned(),
        size,
        limit,
    })
}

impl Image {
    /// Opens the blob of one of [`Image::layers`], to be read once, to its end.
    ///
    /// What it gives is not verified against the layer's digest and size; its
    /// reader must do that.
    pub fn open_layer(&self, layer: &Layer) -> Result<Box<dyn Read + Send>, ImageError> {
        let pointer = Pointer {
            media_type: layer.media_type.clone(),
            digest: layer.digest,
            size: layer.size,
            urls: layer.urls.clone(),
        };
        let what = format!("the layer {}", layer.digest);
        self.origin.blob(&what, &pointer)
    }

    /// Ends every download at once, whatever it waits for: its reader gets an
    /// error. For a user who gave up, or for one layer that failed.
    pub fn stop(&self) {
        self.origin.stop();
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("manifest", &self.manifest)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}
