//! From a source to an image whose layers can be read.

use crate::config::Config;
use crate::docker_archive::DockerArchive;
use crate::layout::Layout;
use crate::manifest::{Document, Manifest, Pointer, is_attestation, platform_of, select};
use crate::registry::Registry;
use crate::{ImageError, ProcessConfig};
use accel_oci::{ChainId, DiffId, Digest, ImageSource, Platform};
use oci_spec::image::Descriptor;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

/// Manifests and indexes are at most this long; registries allow no more.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Configs are at most this long.
pub(crate) const MAX_CONFIG: u64 = 16 << 20;
/// Indexes in indexes go at most this deep.
const MAX_DEPTH: usize = 4;
/// An index leads to at most so many images.
const MAX_IMAGES: usize = 128;

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
    /// Where the logins are, in the form of docker's `config.json`; without, where the
    /// user's tools keep them.
    pub login_file: Option<PathBuf>,
    /// Talk HTTP instead of HTTPS to the registry.
    pub plain_http: bool,
    /// Where `hosts.toml` files lie; without, where containerd and docker have theirs.
    pub hosts: Option<PathBuf>,
    /// Which of an index's images is meant.
    pub platform: Platform,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            credentials: None,
            login_file: None,
            plain_http: false,
            hosts: None,
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
    /// The entry of an index that named it, if one did.
    pub(crate) entry: Option<Box<Descriptor>>,
    origin: Arc<dyn Origin>,
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

/// Which of an index's images are meant.
#[derive(Debug, Clone)]
pub enum Platforms {
    /// All for Linux.
    All,
    /// One for each of these.
    These(Vec<Platform>),
}

/// The images of a source that are meant, and what else there is.
#[derive(Debug)]
pub struct Images {
    /// At least one, each with another manifest.
    pub images: Vec<Image>,
    /// Of the outermost index: its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Platforms of images in the outermost index that are not meant.
    pub left_out: Vec<String>,
    /// How many entries of the outermost index only tell of other images
    /// (attestations).
    pub attestations: usize,
}

/// Finds the image that `source` names for the wanted platform, and reads its
/// manifest and config.
pub fn open(source: &ImageSource, options: &OpenOptions) -> Result<Image, ImageError> {
    let origin = origin(source, options)?;
    let outermost = Outermost::read(origin.as_ref(), source)?;
    let found = outermost.find(origin.as_ref(), source, &options.platform)?;
    read(&origin, found, Some(&options.platform))
}

/// Finds the images that `source` names for the wanted platforms, and reads their
/// manifests and configs. [`OpenOptions::platform`] does not count.
///
/// They have one connection to the source: [`Image::stop`] of one stops all.
pub fn open_all(
    source: &ImageSource,
    options: &OpenOptions,
    wanted: &Platforms,
) -> Result<Images, ImageError> {
    let origin = origin(source, options)?;
    let outermost = Outermost::read(origin.as_ref(), source)?;
    let mut images: Vec<Image> = Vec::new();
    match wanted {
        Platforms::These(platforms) => {
            for platform in platforms {
                let found = outermost.find(origin.as_ref(), source, platform)?;
                if images.iter().all(|image| image.manifest != found.digest) {
                    images.push(read(&origin, found, Some(platform))?);
                }
            }
        }
        Platforms::All => {
            for found in outermost.all(origin.as_ref(), source)? {
                if images.iter().all(|image| image.manifest != found.digest) {
                    images.push(read(&origin, found, None)?);
                }
            }
        }
    }
    let (left_out, attestations) = outermost.others(&images);
    let annotations = match &outermost {
        Outermost::Index { annotations, .. } => annotations.clone(),
        Outermost::Manifest(_) => BTreeMap::new(),
    };
    Ok(Images {
        images,
        annotations,
        left_out,
        attestations,
    })
}

fn origin(source: &ImageSource, options: &OpenOptions) -> Result<Arc<dyn Origin>, ImageError> {
    Ok(match source {
        ImageSource::Oci(reference) => Arc::new(Layout::open_directory(reference)?),
        ImageSource::OciArchive(reference) => Arc::new(Layout::open_archive(reference)?),
        ImageSource::DockerArchive(reference) => Arc::new(DockerArchive::open(reference)?),
        ImageSource::Registry(reference) => Arc::new(Registry::open(reference, options)?),
    })
}

/// A manifest, and the way to it.
#[derive(Debug, Clone)]
struct Found {
    digest: Digest,
    json: Vec<u8>,
    /// Digests of the indexes that led to it, the outermost first.
    indexes: Vec<Digest>,
    /// The entry that named it, if one did.
    entry: Option<Box<Descriptor>>,
}

/// What a source names.
#[derive(Debug)]
enum Outermost {
    Manifest(Found),
    Index {
        entries: Vec<Descriptor>,
        /// Its digest, if it has one.
        digest: Option<Digest>,
        annotations: BTreeMap<String, String>,
    },
}

/// What an entry of an index leads to.
enum Entry {
    Manifest(Found),
    Index(Vec<Descriptor>, Digest),
}

impl Outermost {
    fn read(origin: &dyn Origin, source: &ImageSource) -> Result<Self, ImageError> {
        let what = source.to_string();
        match origin.start()? {
            Start::Document { json, expected } => {
                if let Some(expected) = expected {
                    check(&what, &json, expected)?;
                }
                Self::document(&what, json, None)
            }
            Start::Entries(entries) => {
                // A layout whose only entry is an index stands for that index.
                let images = |entry: &&Descriptor| !is_attestation(entry);
                if let [only] = entries.iter().filter(images).collect::<Vec<_>>()[..] {
                    let pointer = Pointer::new(&format!("an entry of {what}"), only)?;
                    let (what, json) = fetch(origin, &pointer)?;
                    return Self::document(&what, json, Some(Box::new(only.clone())));
                }
                Ok(Self::Index {
                    entries,
                    digest: None,
                    annotations: BTreeMap::new(),
                })
            }
        }
    }

    fn document(
        what: &str,
        json: Vec<u8>,
        entry: Option<Box<Descriptor>>,
    ) -> Result<Self, ImageError> {
        let digest = Digest::of(&json);
        Ok(match Document::parse(what, &json)? {
            Document::Manifest(_) => Self::Manifest(Found {
                digest,
                json,
                indexes: Vec::new(),
                entry,
            }),
            Document::Index(entries, annotations) => Self::Index {
                entries,
                digest: Some(digest),
                annotations,
            },
        })
    }

    /// The manifest for one platform.
    fn find(
        &self,
        origin: &dyn Origin,
        source: &ImageSource,
        platform: &Platform,
    ) -> Result<Found, ImageError> {
        let (entries, digest) = match self {
            Self::Manifest(found) => return Ok(found.clone()),
            Self::Index {
                entries, digest, ..
            } => (entries, digest),
        };
        let mut entries = entries.clone();
        let mut indexes: Vec<_> = digest.iter().copied().collect();
        let mut what = source.to_string();
        for _ in 0..MAX_DEPTH {
            let entry = select(&what, &entries, platform)?;
            match follow(origin, &what, &entry, &indexes)? {
                Entry::Manifest(found) => return Ok(found),
                Entry::Index(inner, digest) => {
                    what = format!("the index {digest}");
                    indexes.push(digest);
                    entries = inner;
                }
            }
        }
        Err(too_deep(source))
    }

    /// Every manifest for Linux.
    fn all(&self, origin: &dyn Origin, source: &ImageSource) -> Result<Vec<Found>, ImageError> {
        let (entries, digest) = match self {
            Self::Manifest(found) => return Ok(vec![found.clone()]),
            Self::Index {
                entries, digest, ..
            } => (entries, digest),
        };
        let mut all = Vec::new();
        let indexes: Vec<_> = digest.iter().copied().collect();
        collect(origin, source, entries, &indexes, &mut all)?;
        if all.is_empty() {
            return Err(ImageError::Malformed {
                what: source.to_string(),
                why: "it has no image for Linux".to_owned(),
            });
        }
        Ok(all)
    }

    /// The platforms of images that are not among `images`, and the number of
    /// entries that are none.
    fn others(&self, images: &[Image]) -> (Vec<String>, usize) {
        let Self::Index {
            entries, digest, ..
        } = self
        else {
            return (Vec::new(), 0);
        };
        // A manifest, or an index within the outermost one.
        let used: Vec<_> = images
            .iter()
            .map(|image| {
                let inner = image
                    .indexes
                    .iter()
                    .find(|index| Some(*index) != digest.as_ref());
                inner.unwrap_or(&image.manifest).to_string()
            })
            .collect();
        let is_image = |entry: &&Descriptor| !is_attestation(entry);
        let left_out = entries
            .iter()
            .filter(is_image)
            .filter(|entry| !used.contains(&entry.digest().to_string()))
            .map(|entry| match platform_of(entry) {
                Some(platform) => platform.to_string(),
                None => entry.digest().to_string(),
            });
        let attestations = entries.len() - entries.iter().filter(is_image).count();
        (left_out.collect(), attestations)
    }
}

/// Adds every manifest for Linux that `entries` lead to.
fn collect(
    origin: &dyn Origin,
    source: &ImageSource,
    entries: &[Descriptor],
    indexes: &[Digest],
    all: &mut Vec<Found>,
) -> Result<(), ImageError> {
    if indexes.len() > MAX_DEPTH {
        return Err(too_deep(source));
    }
    let what = match indexes.last() {
        Some(digest) => format!("the index {digest}"),
        None => source.to_string(),
    };
    for entry in entries {
        let linux = platform_of(entry).is_none_or(|platform| platform.os == "linux");
        if is_attestation(entry) || !linux {
            continue;
        }
        match follow(origin, &what, entry, indexes)? {
            Entry::Manifest(_) if all.len() == MAX_IMAGES => {
                return Err(ImageError::Malformed {
                    what: source.to_string(),
                    why: format!("it has more than {MAX_IMAGES} images"),
                });
            }
            Entry::Manifest(found) => all.push(found),
            Entry::Index(inner, digest) => {
                let indexes: Vec<_> = indexes.iter().copied().chain([digest]).collect();
                collect(origin, source, &inner, &indexes, all)?;
            }
        }
    }
    Ok(())
}

fn too_deep(source: &ImageSource) -> ImageError {
    ImageError::Malformed {
        what: source.to_string(),
        why: format!("its indexes are nested more than {MAX_DEPTH} deep"),
    }
}

/// Reads what an entry of the index `what` names.
fn follow(
    origin: &dyn Origin,
    what: &str,
    entry: &Descriptor,
    indexes: &[Digest],
) -> Result<Entry, ImageError> {
    let pointer = Pointer::new(&format!("an entry of {what}"), entry)?;
    let (what, json) = fetch(origin, &pointer)?;
    Ok(match Document::parse(&what, &json)? {
        Document::Manifest(_) => Entry::Manifest(Found {
            digest: pointer.digest,
            json,
            indexes: indexes.to_vec(),
            entry: Some(Box::new(entry.clone())),
        }),
        Document::Index(entries, _) => Entry::Index(entries, pointer.digest),
    })
}

/// Reads a manifest or index, verified; with what to call it.
fn fetch(origin: &dyn Origin, pointer: &Pointer) -> Result<(String, Vec<u8>), ImageError> {
    let what = format!("the manifest {}", pointer.digest);
    limit(&what, pointer.size, MAX_MANIFEST)?;
    let json = origin.manifest(pointer)?;
    check(&what, &json, pointer.digest)?;
    Ok((what, json))
}

/// Reads the config of a manifest; the image has to be for the wanted platform.
fn read(
    origin: &Arc<dyn Origin>,
    found: Found,
    wanted: Option<&Platform>,
) -> Result<Image, ImageError> {
    let what = format!("the manifest {}", found.digest);
    let Document::Manifest(manifest) = Document::parse(&what, &found.json)? else {
        return Err(ImageError::Malformed {
            what,
            why: "it is an index".to_owned(),
        });
    };
    let (config_json, config) = read_config(origin.as_ref(), &manifest)?;
    if manifest.layers.len() != config.diff_ids.len() {
        return Err(ImageError::LayerCount {
            manifest: found.digest,
            layers: manifest.layers.len(),
            diff_ids: config.diff_ids.len(),
        });
    }
    if manifest.layers.is_empty() {
        return Err(ImageError::NoLayers {
            manifest: found.digest,
        });
    }
    if let Some(wanted) = wanted
        && !wanted.accepts(&config.platform)
    {
        return Err(ImageError::Platform {
            what: format!("the image {}", found.digest),
            wanted: wanted.clone(),
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
        manifest: found.digest,
        indexes: found.indexes,
        config: manifest.config.digest,
        platform: config.platform,
        process: config.process,
        layers: layers.collect(),
        manifest_json: found.json,
        config_json,
        entry: found.entry,
        origin: Arc::clone(origin),
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
