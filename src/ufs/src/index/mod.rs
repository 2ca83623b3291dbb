//! The chunk index: BLAKE3's inner values for every 128 KiB of an image.
//!
//! The *root* of an image is the plain BLAKE3 of its bytes. BLAKE3 is a binary
//! tree, so the hash of any aligned piece is a value inside that tree. The index
//! keeps the values of every 128 KiB (*chunk values*) and of every 128-fold of
//! that, in pages of 128 values. A page is verified by merging its values as
//! BLAKE3 does and comparing with the one value above it; the top page merges to
//! the root. Whoever knows root and size of an image can thus verify any chunk
//! after reading one page per level, and needs to trust nothing on UFS.
//!
//! The bytes are specified in `ARCHITECTURE.md`, "The chunk index (layout 1)".
//! Nothing here does I/O:
//!
//! * writing: [`HashedChunk`] (on any thread) → [`IndexBuilder`] → the file's bytes;
//! * reading: [`Layout`] says where everything lies, [`Walk`] which pages to
//!   fetch for a chunk and whether they are right, [`Layout::verify_chunk`]
//!   whether the chunk is.
//!
//! Every input may be hostile: errors are fine, panics are bugs.

mod builder;
mod header;
mod layout;
mod proof;
mod units;
mod verify;

pub use builder::{BuildError, HashedChunk, IndexBuilder};
pub use header::{Header, HeaderError};
pub use layout::{Layout, TreePage};
pub use proof::BlockProof;
pub use units::{ByteRange, ChunkNo, ChunkValue, ImageSize, PageValue, Root, SizeError};
pub use verify::{Mismatch, Step, Walk};

/// The number that every layout-1 index carries.
pub const LAYOUT: u32 = 1;
/// log2 of [`CHUNK_SIZE`].
pub const CHUNK_SIZE_LOG2: u32 = 17;
/// Bytes in a chunk; the last chunk of an image may be shorter.
pub const CHUNK_SIZE: usize = 1 << CHUNK_SIZE_LOG2;
/// Bytes in a page of the index, and the unit of an image's size.
pub const PAGE_SIZE: usize = 4096;
/// Values in a page of the tree.
pub const VALUES_PER_PAGE: usize = PAGE_SIZE / 32;
/// The largest image: what EROFS addresses with 32-bit numbers of 4 KiB blocks.
pub const MAX_IMAGE_SIZE: u64 = 1 << 44;

/// A page of the index file.
pub type Page = [u8; PAGE_SIZE];

const CHUNK: u64 = 1 << CHUNK_SIZE_LOG2;
const PAGE: u64 = 4096;

/// Whether `bytes` holds nothing but zeros.
fn is_zero(bytes: &[u8]) -> bool {
    // Plain comparison of words vectorises; a tail shorter than one is rare.
    let words = bytes.chunks_exact(32);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|w| w == [0; 32])
}
