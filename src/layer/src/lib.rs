//! From an OCI layer's bytes to an EROFS image: decompression, tar, whiteouts,
//! digests.
//!
//! [`convert_layer`] reads a layer's blob once, from its first byte to its last,
//! and writes one image (`accel_erofs`). The files' bytes go from the tar to the
//! image as they come; only the tree is held in memory.
//!
//! # Rules
//!
//! The tree is what containerd's overlayfs unpack of the same layer gives
//! (`tests/containerd.rs` compares them):
//!
//! * Each layer by itself: what lies below is not looked through. Symbolic links
//!   on an entry's way are followed within what the layer has made so far.
//! * `.wh.NAME` becomes a character device 0:0 called NAME, `.wh..wh..opq` marks
//!   its directory `trusted.overlay.opaque="y"`. A whiteout of what the same layer
//!   made before is refused.
//! * In the lowest layer of an image instead (no [`LayerOptions::parent`]),
//!   `.wh.NAME` removes NAME and `.wh..wh..opq` the directories below its own that
//!   only a path implied.
//! * An entry given twice: the last one counts. A directory given twice keeps what
//!   is in it. A hard link keeps the file it was made to, and its entry's owner,
//!   mode and time become the file's; a capability that the file had is lost.
//! * What replaces a directory gets the directory's time, and so does what a
//!   symbolic link in its place leads to, and a directory that is implied where one was
//!   replaced or removed.
//! * `trusted.*` attributes of a tar are left out, and those that Linux does not
//!   have for such a file. `SCHILY.xattr.*` records are heeded; `LIBARCHIVE.xattr.*`,
//!   the same in another form, are not, because containerd does not heed them: a tar
//!   that has attributes in that form only has none there either.
//! * POSIX ACLs are as the kernel leaves them: those that say no more than the mode
//!   are dropped, the mode changes the mask, new files inherit default ACLs. New
//!   files in a setgid directory are of its group, unless their entry names one.
//! * Times before 1970 or after 2262-04-11 become 1970-01-01. Owner or group -1
//!   leaves what is.
//! * An entry for the root itself is left out but for its time: the root is 0755,
//!   owned by root (1970-01-01 without an entry).
//! * Records of global pax headers change nothing, but their names are like those
//!   of entries: what had the name is removed, directories on the way are made.
//! * Entries that no file system can have (a link to nothing, a file on the way, a
//!   path that climbs out, an unknown type, an ACL that is none) are errors that
//!   name the entry.
//!
//! Where containerd takes the time of unpacking, something fixed must stand here:
//! 1970-01-01 for whiteouts; for implied directories (below) the time of the lower
//! directory, or 1970-01-01 without one. Otherwise than with containerd, a path with
//! ".." may not climb out of the root, device numbers and owners that Linux does not
//! have are refused instead of cut, and old GNU sparse files, contiguous files and
//! directories below a name that a lower layer has deleted are understood.
//!
//! A directory that only a path implies ("usr/bin/x" without "usr/") takes its
//! attributes from the nearest lower layer that has it. Whoever converts a
//! layer answers for those below it ([`LowerLookup`]); the summary says whether
//! it was asked ([`LayerSummary::needs_lower`]), because such an image is right
//! on top of those layers only and is named by its chain ID.

mod acl;
mod apply;
mod archive;
mod attributes;
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
