//! From an OCI layer's bytes to an EROFS image: decompression, tar, whiteouts,
//! digests.
//!
//! [`convert_layer`] reads a layer's blob once, from its first byte to its last,
//! and writes one image (`accel_erofs`). The files' bytes go from the tar to the
//! image as they come; only the tree is held in memory.
//!
//! What the tree looks like follows what containerd's overlayfs unpack does with
//! the same layer; [`apply`](crate::apply) has the rules and the differences.
//!
//! A directory that only a path implies ("usr/bin/x" without "usr/") takes its
//! attributes from the nearest lower layer that has it. Whoever converts a
//! layer answers for those below it ([`LowerLookup`]); the summary says whether
//! it was asked ([`LayerSummary::needs_lower`]), because such an image is right
//! on top of those layers only and is named by its chain ID.

pub mod apply;
mod convert;
mod error;
mod lower;
mod options;
mod walk;

pub use accel_erofs::{Attributes, Output, Summary as ImageSummary, Uuid};
pub use convert::{convert_layer, image_uuid};
pub use error::{EntryProblem, LayerError, LowerError};
pub use lower::{ErofsLower, LowerDirectory, LowerLookup, LowerStack, NoLower};
pub use options::{Compression, Expected, LayerOptions, LayerSummary, UnknownMediaType};
