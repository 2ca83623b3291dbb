//! What a conversion is told and what it tells back.

use accel_erofs::Uuid;
use accel_oci::{ChainId, DiffId, Digest};
use std::fmt;

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// The tar itself.
    None,
    /// gzip, one member or several (RFC 1952).
    Gzip,
    /// Zstandard, one frame or several, skippable frames included (RFC 8878).
    Zstd,
}

/// A media type that names no kind of layer we can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "media type {media_type:?} is not a tar layer; expected \
     application/vnd.oci.image.layer.v1.tar (+gzip, +zstd) or \
     application/vnd.docker.image.rootfs.diff.tar (.gzip, .zstd)"
)]
pub struct UnknownMediaType {
    /// What was given.
    pub media_type: String,
}

impl Compression {
    /// The compression a layer's media type names, in OCI's words or Docker's,
    /// non-distributable ("foreign") kinds included.
    ///
    /// # Errors
    /// A media type of something else.
    pub fn from_media_type(media_type: &str) -> Result<Self, UnknownMediaType> {
        const KINDS: [&str; 4] = [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.foreign.diff.tar",
        ];
        // Parameters ("; charset=…") are not part of the type.
        let name = media_type.split(';').next().unwrap_or_default().trim();
        KINDS
            .iter()
            .find_map(|kind| match name.strip_prefix(kind)? {
                "" => Some(Self::None),
                "+gzip" | ".gzip" => Some(Self::Gzip),
                "+zstd" | ".zstd" => Some(Self::Zstd),
                _ => None,
            })
            .ok_or_else(|| UnknownMediaType {
                media_type: media_type.to_owned(),
            })
    }

    /// The compression whose magic bytes `start`, the first bytes of a blob, has.
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no compression",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// What the layer must turn out to be; what is `None` is not checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected {
    /// The digest of the blob, from the manifest's descriptor.
    pub digest: Option<Digest>,
    /// The blob's size in bytes, from the same descriptor.
    pub size: Option<u64>,
    /// The diffID, from the image's config.
    pub diff_id: Option<DiffId>,
}

/// How to convert a layer.
#[derive(Debug, Clone)]
pub struct LayerOptions {
    /// The layer's name in errors: its digest, or a file's name.
    pub name: String,
    /// The compression that the media type names. The blob must begin as such a
    /// stream does. `None`: what its first bytes say.
    pub compression: Option<Compression>,
    /// What is checked at the end.
    pub expected: Expected,
    /// The chain ID of the layers below; `None` for the lowest.
    pub parent: Option<ChainId>,
    /// An image that would be larger is refused: a sparse file of a few bytes
    /// can claim terabytes. Bytes.
    pub max_image_size: u64,
    /// A tar that is larger is refused: a compressed one of a few megabytes can be
    /// of any size. Bytes, uncompressed.
    pub max_tar_size: u64,
    /// A tree that needs more memory is refused. Bytes, roughly: half a KiB for each
    /// entry and for each extended attribute, its own and inherited ones, and their
    /// names, link targets and values.
    pub max_tree_size: u64,
}

impl LayerOptions {
    /// The default of [`max_image_size`](Self::max_image_size): 1 TiB.
    pub const MAX_IMAGE_SIZE: u64 = 1 << 40;

    /// The default of [`max_tar_size`](Self::max_tar_size): 1 TiB.
    pub const MAX_TAR_SIZE: u64 = 1 << 40;
    /// The default of [`max_tree_size`](Self::max_tree_size): 4 GiB, some 8 million
    /// files.
    pub const MAX_TREE_SIZE: u64 = 4 << 30;

    /// Options for a layer called `name` in errors, with nothing expected of it.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            compression: None,
            expected: Expected::default(),
            parent: None,
            max_image_size: Self::MAX_IMAGE_SIZE,
            max_tar_size: Self::MAX_TAR_SIZE,
            max_tree_size: Self::MAX_TREE_SIZE,
        }
    }
}

/// What a layer was found to be, and the image made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSummary {
    /// SHA-256 of the blob as it came.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// SHA-256 of the uncompressed tar.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed tar.
    pub tar_size: u64,
    /// The layer's chain ID on [`LayerOptions::parent`].
    pub chain_id: ChainId,
    /// The tree depends on the layers below, or on that there are none: publish it
    /// by chain ID (`chains/`), never by diffID. The UUID is derived from the same
    /// name.
    pub needs_lower: bool,
    /// There are whiteouts or marks of opaque directories in the tar: as the lowest
    /// layer it has another tree than on top of others.
    pub whiteouts: bool,
    /// The image's UUID.
    pub uuid: Uuid,
    /// The image.
    pub image: accel_erofs::Summary,
    /// Extended attributes that were left out: `trusted.*`, and namespaces that
    /// Linux or EROFS does not have.
    pub ignored_xattrs: u64,
}
