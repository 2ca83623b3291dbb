//! What can be wrong with a layer.

use accel_oci::{DiffId, Digest};
use std::{error::Error, io};

use crate::options::Compression;

/// Any error of someone else: the output's, the lower layers'.
pub type LowerError = Box<dyn Error + Send + Sync>;

/// What is wrong with one entry of the tar.
#[derive(Debug, thiserror::Error)]
pub enum EntryProblem {
    /// ".." leads above the root.
    #[error("the path climbs out of the image with \"..\"")]
    ClimbsOut,
    /// Longer than `PATH_MAX`.
    #[error("the path is {0} bytes long, more than 4096")]
    PathTooLong(usize),
    /// A part of the path is no name.
    #[error("the path's part {part:?} {source}")]
    Name {
        /// That part.
        part: String,
        /// Why not.
        source: accel_erofs::NameError,
    },
    /// Too many symbolic links on the way.
    #[error("more than 255 symbolic links on the way")]
    TooManyLinks,
    /// A part of the path that was made by this layer is no directory.
    #[error("{0:?} on its way is not a directory")]
    NotADirectory(String),
    /// "`.wh.`" with nothing that could be deleted behind it.
    #[error("is no valid whiteout: \".wh.\" must be followed by the name of what is hidden")]
    Whiteout,
    /// A whiteout of something that the same layer has made before.
    #[error("hides something that the same layer made before it")]
    WhiteoutOfOwn,
    /// A hard link to nothing.
    #[error("a hard link to {0:?}, which the same layer has not made before it")]
    MissingTarget(String),
    /// A hard link to a directory.
    #[error("a hard link to the directory {0:?}")]
    LinkToDirectory(String),
    /// A symbolic link's target.
    #[error("the link's target {0}")]
    Target(#[from] accel_erofs::TargetError),
    /// A device number.
    #[error(transparent)]
    Device(#[from] accel_erofs::DeviceError),
    /// An extended attribute too large.
    #[error(transparent)]
    Xattr(#[from] accel_erofs::XattrError),
    /// An extended attribute that Linux does not take.
    #[error("extended attribute {name:?} {reason}")]
    XattrValue {
        /// Its name.
        name: String,
        /// What is wrong with its value.
        reason: &'static str,
    },
    /// A number that does not fit.
    #[error("its {field} is {value}, out of the range of up to {max}")]
    Number {
        /// Which number.
        field: &'static str,
        /// What it is.
        value: i64,
        /// What it may be.
        max: u64,
    },
    /// A tar entry type that is no file.
    #[error("tar entry type {0:?} is not known")]
    Type(char),
    /// A sparse file's map.
    #[error("its sparse map is not understood: {0}")]
    Sparse(&'static str),
    /// More entries, names and attributes than may be held in memory.
    #[error(
        "with it the layer's tree is larger than {limit} bytes, the most that is held in memory"
    )]
    TreeTooLarge {
        /// [`LayerOptions::max_tree_size`](crate::LayerOptions::max_tree_size).
        limit: u64,
    },
    /// Marks of opaque directories in a lowest layer, over and over.
    #[error("there are too many marks of opaque directories over too many files")]
    TooManyMarks,
    /// Too many nodes.
    #[error(transparent)]
    Tree(#[from] accel_erofs::TreeError),
}

/// Why a layer was not converted. Every message names the layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError<E: Error + 'static> {
    /// The blob could not be read.
    #[error("layer {layer}: reading the blob at byte {offset}")]
    Read {
        /// The layer.
        layer: String,
        /// Bytes read before.
        offset: u64,
        /// The reader's error.
        source: io::Error,
    },
    /// The blob does not start as its media type says.
    #[error(
        "layer {layer}: the media type says {declared}, the first bytes say {found}; the manifest or the blob is wrong"
    )]
    Compression {
        /// The layer.
        layer: String,
        /// From the media type.
        declared: Compression,
        /// From the first bytes.
        found: Compression,
    },
    /// The compressed stream is damaged or ends early.
    #[error("layer {layer}: decompressing ({compression}) near byte {offset} of the blob")]
    Decompress {
        /// The layer.
        layer: String,
        /// How it is compressed.
        compression: Compression,
        /// Bytes of the blob read before.
        offset: u64,
        /// The decoder's error.
        source: io::Error,
    },
    /// The tar is damaged.
    #[error("layer {layer}: the tar header at byte {offset}: {problem}")]
    Tar {
        /// The layer.
        layer: String,
        /// Offset of the header in the uncompressed tar.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The tar ends in the middle of an entry.
    #[error("layer {layer}: the tar ends in the middle of an entry, at byte {offset}")]
    Truncated {
        /// The layer.
        layer: String,
        /// Offset in the uncompressed tar.
        offset: u64,
    },
    /// An entry that no image can have.
    #[error("layer {layer}: entry {entry:?}: {problem}")]
    Entry {
        /// The layer.
        layer: String,
        /// The entry's name as the tar has it.
        entry: String,
        /// What is wrong.
        problem: EntryProblem,
    },
    /// The layers below could not be asked.
    #[error("layer {layer}: looking up the directory {path:?} in the layers below")]
    Lower {
        /// The layer.
        layer: String,
        /// The directory that an entry's path implies.
        path: String,
        /// Why not.
        source: LowerError,
    },
    /// The image could not be written.
    #[error("layer {layer}: writing its image")]
    Write {
        /// The layer.
        layer: String,
        /// Why not.
        source: accel_erofs::WriteError<E>,
    },
    /// The blob is not what the manifest says.
    #[error(
        "layer {layer}: the blob's digest is {found}, but the manifest says {expected}; fetch it again"
    )]
    Digest {
        /// The layer.
        layer: String,
        /// From the manifest.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// The blob has another size than the manifest says.
    #[error("layer {layer}: the blob has {found} bytes{more}, but the manifest says {expected}; fetch it again", more = if found > expected { " or more" } else { "" })]
    Size {
        /// The layer.
        layer: String,
        /// From the manifest.
        expected: u64,
        /// Bytes read.
        found: u64,
    },
    /// The tar is not what the config says.
    #[error(
        "layer {layer}: its diffID is {found}, but the image's config says {expected}; the config or the layer is wrong"
    )]
    DiffId {
        /// The layer.
        layer: String,
        /// From the config.
        expected: DiffId,
        /// Of the bytes.
        found: DiffId,
    },
}
