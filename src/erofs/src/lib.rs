//! The EROFS on-disk format and its writer, without I/O.
//!
//! An image is written in two passes:
//!
//! 1. [`ImageWriter::begin_file`] places a file's data as it streams by, in the
//!    order of the calls, and gives back an [`Extent`] for it.
//! 2. [`ImageWriter::finish`] takes the [`Tree`] that refers to those extents,
//!    lays out all metadata behind the data, and writes it and the superblock.
//!
//! The image's format is in `ARCHITECTURE.md`, "The EROFS image (layout 1)"; the
//! same calls with the same tree give the same bytes. Memory grows with the tree,
//! never with the data: the writer holds at most three chunks of it.
//!
//! What the writer gives to its [`Output`] are whole chunks, each once. What a
//! [`Tree`] can hold, EROFS can hold: names, link targets, device numbers, times
//! and attributes are checked when they are made, not when they are written.
//!
//! [`Reader`] reads the metadata of such images back, for those who need the
//! attributes of a directory in a layer converted earlier.

mod chunk;
mod crc32c;
mod format;
mod layout;
mod metadata;
mod place;
mod read;
mod tree;
mod values;
mod write;
mod xattr;

pub use chunk::ChunkBuffer;
pub use format::{BLOCK_SIZE, CHUNK_SIZE};
pub use layout::LayoutError;
pub use place::{Extent, FileWriter};
pub use read::{Inode, Input, ReadError, Reader};
pub use tree::{Attributes, Content, Directory, Node, NodeId, Tree, TreeError};
pub use values::{
    Device, DeviceError, FileKind, Name, NameError, Permissions, SymlinkTarget, TargetError,
    Timestamp, TimestampError, Uuid,
};
pub use write::{Counts, ImageWriter, Output, Summary, WriteError};
pub use xattr::{XattrError, XattrName, Xattrs};
