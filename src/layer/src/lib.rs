//! From an OCI layer's bytes to an EROFS image: decompression, tar, whiteouts,
//! digests.
//!
//! [`convert_layer`] reads a layer's blob once, from its first byte to its last,
//! and writes one image (`accel_erofs`). The files' bytes go from the tar to the
//! image as they come; only the tree is held in memory.
//!
//! # Rules
//!
//! The tree is what containerd's overlayfs unpack of the same layer gives:
//!
//! * Each layer by itself: what lies below is not looked through. Symbolic links
//!   on an entry's way are followed within what the layer has made so far.
//! * `.wh.NAME` becomes a character device 0:0 called NAME, `.wh..wh..opq` marks
//!   its directory `trusted.overlay.opaque="y"`; other `.wh..wh.*` names are AUFS'
//!   own and left out. A whiteout of what the same layer made before is refused.
//! * An entry given twice: the last one counts. A directory given twice keeps what
//!   is in it. A hard link keeps the file it was made to, and its entry's owner,
//!   mode and time become the file's.
//! * `trusted.*` attributes of a tar are left out, and namespaces that Linux or
//!   EROFS does not have.
//! * Times before 1970 or after 2262-04-11 become 1970-01-01.
//! * An entry for the root itself is left out but for its time: the root is 0755,
//!   owned by root (1970-01-01 without an entry).
//! * Entries that no file system can have (a link to nothing, a file on the way, a
//!   path that climbs out, an unknown type) are errors that name the entry.
//!
//! Where containerd takes the time of unpacking, something fixed must stand here:
//! 1970-01-01 for whiteouts; for implied directories (below) the time of the lower
//! directory, or 1970-01-01 without one. Unlike containerd's, a path with ".." may
//! not climb out of the root, and old GNU sparse files are understood.
//!
//! A directory that only a path implies ("usr/bin/x" without "usr/") takes its
//! attributes from the nearest lower layer that has it. Whoever converts a
//! layer answers for those below it ([`LowerLookup`]); the summary says whether
//! it was asked ([`LayerSummary::needs_lower`]), because such an image is right
//! on top of those layers only and is named by its chain ID.

mod apply;
mod archive;
mod convert;
mod decode;
mod error;
mod header;
mod lower;
mod options;
mod walk;

pub use accel_erofs::{Attributes, Output, Summary as ImageSummary, Uuid};
pub use convert::{convert_layer, image_uuid};
pub use error::{EntryProblem, LayerError, LowerError};
pub use lower::{ErofsLower, ImageFile, LowerDirectory, LowerLookup, LowerStack, NoLower};
pub use options::{Compression, Expected, LayerOptions, LayerSummary, UnknownMediaType};
