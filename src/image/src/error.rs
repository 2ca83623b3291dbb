//! Why an image cannot be had.

use accel_oci::{Digest, Platform, Problem};
use std::path::PathBuf;
use std::{fmt, io};

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A directory that is no OCI layout.
    #[error("{directory:?} is not an OCI layout: {why}")]
    Layout {
        /// What was given.
        directory: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file that is no archive of images, or lacks something.
    #[error("the archive {path:?} cannot be used: {why}")]
    Archive {
        /// What was given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A layout or archive without the tag.
    #[error("{path:?} has no image tagged {tag:?}; it has {}", Names(.known))]
    NoTag {
        /// The layout or archive.
        path: PathBuf,
        /// What was asked for.
        tag: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No tag given, and more than one image.
    #[error(
        "{path:?} holds {images} images: say which, with its tag behind a colon; it has {}",
        Names(.known)
    )]
    Ambiguous {
        /// The layout or archive.
        path: PathBuf,
        /// How many there are.
        images: usize,
        /// Their tags.
        known: Vec<String>,
    },
    /// A file of a layout.
    #[error("cannot read {path:?}: {error}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why; part of the message, hence not its source.
        error: io::Error,
    },
    /// The program itself could not be set up to talk to registries.
    #[error("cannot set up the connection to registries: {0}")]
    Setup(String),
    /// A file that says how to reach registries.
    #[error("{path:?}{}: {why}", Field(.field))]
    Hosts {
        /// The file, or the directory.
        path: PathBuf,
        /// Which part of it; empty for all of it.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// What a registry answered, or that it did not.
    #[error("cannot get {what} from {registry}: {why}")]
    Registry {
        /// The registry.
        registry: String,
        /// What was wanted.
        what: String,
        /// Why it was not had, and what to do.
        why: String,
        /// The same in one word.
        problem: Problem,
    },
    /// What a registry answered to a push, or that it did not.
    #[error("cannot push {what} to {registry}: {why}")]
    Push {
        /// The registry.
        registry: String,
        /// What was to be pushed.
        what: String,
        /// Why it was not taken, and what to do.
        why: String,
        /// The same in one word.
        problem: Problem,
    },
    /// A registry that does not let us in, or is none.
    #[error("cannot log in at {registry}: {why}")]
    Login {
        /// The registry.
        registry: String,
        /// Why not, and what to do.
        why: String,
        /// The same in one word.
        problem: Problem,
    },
    /// A file with logins.
    #[error("the login file {path:?} cannot be used: {why}")]
    LoginFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What a registry answered when something was to be removed, or that it did not.
    #[error("cannot remove {what} from {registry}: {why}")]
    Remove {
        /// The registry.
        registry: String,
        /// What was to be removed.
        what: String,
        /// Why it was not, and what to do.
        why: String,
    },
    /// A file of a layout that is written.
    #[error("cannot write {path:?}: {error}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why; part of the message, hence not its source.
        error: io::Error,
    },
    /// A target that cannot be written to.
    #[error("cannot write to {target}: {why}")]
    Target {
        /// What was given.
        target: String,
        /// Why not.
        why: &'static str,
    },
    /// Nothing is wanted any more; see [`Image::stop`](crate::Image::stop).
    #[error("the download was given up")]
    Stopped,
    /// Bytes that are not those the digest promises.
    #[error("{what} is damaged: its digest is {found}, expected {expected}")]
    Digest {
        /// What was read.
        what: String,
        /// What led to it.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// A blob of another size than its descriptor says.
    #[error("{what} is damaged: it has {found} bytes, its descriptor says {expected}")]
    Size {
        /// What was read.
        what: String,
        /// What its descriptor says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// A manifest or config that is too large to be one.
    #[error("{what} has {size} bytes, more than the {limit} that are read of one")]
    TooLarge {
        /// What was to be read.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A manifest or config that is not what it should be.
    #[error("{what} cannot be used: {why}")]
    Malformed {
        /// What was read.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A kind of thing that is no image we can convert.
    #[error("{what} has the media type {media_type:?}: {why}")]
    MediaType {
        /// What was read.
        what: String,
        /// What it says it is.
        media_type: String,
        /// Why it is not taken.
        why: &'static str,
    },
    /// The image is not for the wanted platform.
    #[error("{what} is not for {wanted} but for {}: choose with --platform", Names(.offered))]
    Platform {
        /// What was read.
        what: String,
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        offered: Vec<String>,
    },
    /// Manifest and config disagree.
    #[error(
        "the manifest {manifest} has {layers} layers, but its config {diff_ids} diffIDs: the image is broken"
    )]
    LayerCount {
        /// Which manifest.
        manifest: Digest,
        /// Layers in it.
        layers: usize,
        /// diffIDs in the config.
        diff_ids: usize,
    },
    /// An image of nothing.
    #[error("the manifest {manifest} has no layers: there is nothing to mount")]
    NoLayers {
        /// Which manifest.
        manifest: Digest,
    },
}

impl ImageError {
    /// Which registry does not do what it is asked for, and why, if it is that.
    pub fn refusal(&self) -> Option<(&str, Problem)> {
        match self {
            Self::Registry {
                registry, problem, ..
            }
            | Self::Push {
                registry, problem, ..
            }
            | Self::Login {
                registry, problem, ..
            } => Some((registry.as_str(), *problem)),
            Self::LoginFile { .. } => Some(("", Problem::NoLoginFile)),
            _ => None,
        }
    }
}

/// A field of a file in a message.
struct Field<'a>(&'a str);

impl fmt::Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            field => write!(f, ", {field}"),
        }
    }
}

/// Some names in a message: the first few of them.
struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let shown = &self.0[..self.0.len().min(SHOWN)];
        f.write_str(&shown.join(", "))?;
        match self.0.len() - shown.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
