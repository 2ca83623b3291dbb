//! Checking pages against values and chunks against pages.

use super::{ByteRange, CHUNK};
use super::{ChunkNo, ChunkValue, Layout, Page, PageValue, Root, TreePage, is_zero};
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

/// Bytes that are not what root and size of the image promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A page of the index.
    #[error("{page} of the index ({range}) does not match the value above it")]
    Page {
        /// Which page.
        page: TreePage,
        /// Where it lies in the index file.
        range: ByteRange,
    },
    /// A chunk of the image.
    #[error("chunk {chunk} of the image ({range}) does not match its value in the index")]
    Chunk {
        /// Which chunk.
        chunk: ChunkNo,
        /// Where it lies in the image.
        range: ByteRange,
    },
    /// A chunk of the wrong length.
    #[error("chunk {chunk} of the image came with {got} bytes instead of {want}")]
    Length {
        /// Which chunk.
        chunk: ChunkNo,
        /// How many bytes were given.
        got: u64,
        /// How many it has.
        want: u64,
    },
    /// A chunk number past the end of the image.
    #[error("chunk {chunk} lies past the image's {chunks} chunks")]
    PastEnd {
        /// Which chunk.
        chunk: ChunkNo,
        /// How many the image has.
        chunks: u64,
    },
}

/// The value in slot `slot` (modulo 128) of a page.
pub(super) fn value_at(page: &Page, slot: u64) -> [u8; 32] {
    let (values, _) = page.as_chunks::<32>();
    // The remainder is below 128, the number of values in a page.
    values[(slot % 128) as usize]
}

/// The value of a subtree that consists of `values`, each but the last a full
/// power of two. As in BLAKE3, the left side takes the largest power of two that
/// leaves something to the right.
pub(super) fn subtree(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [] => [0; 32],
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(left_of(values.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

pub(super) fn left_of(values: usize) -> usize {
    values.next_power_of_two() / 2
}

/// The value of a page with these values; `top` for the page that merges to the
/// root.
pub(super) fn page_value_of(values: &[ChainingValue], top: bool) -> PageValue {
    if !top || values.len() < 2 {
        return PageValue(subtree(values));
    }
    let (left, right) = values.split_at(left_of(values.len()));
    let root = merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
    PageValue(*root.as_bytes())
}

/// Hashes a chunk. `bytes` must not be empty nor longer than a chunk, and
/// `chunk` must lie below 2⁴⁷ (every image does).
pub(super) fn hash_chunk(chunk: ChunkNo, bytes: &[u8]) -> blake3::Hasher {
    hash_piece(chunk.0 * CHUNK, bytes)
}

/// Hashes a piece of an image, a whole subtree of BLAKE3's, that begins at `offset`.
pub(super) fn hash_piece(offset: u64, bytes: &[u8]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset).update(bytes);
    hasher
}

impl Layout {
    /// Checks `bytes`, read from [`Layout::page_range`], against the value that
    /// the page above (or the root, for the top page) has for `page`.
    pub fn verify_page(
        &self,
        page: TreePage,
        bytes: &Page,
        expected: PageValue,
    ) -> Result<(), Mismatch> {
        let (values, _) = bytes.as_chunks::<32>();
        let (used, padding) = values.split_at(self.values_in(page));
        let top = page.level() + 1 == self.levels();
        if page_value_of(used, top) == expected && is_zero(padding.as_flattened()) {
            return Ok(());
        }
        Err(Mismatch::Page {
            page,
            range: self.page_range(page),
        })
    }

    /// Checks the bytes of `chunk` against its value.
    pub fn verify_chunk(
        &self,
        chunk: ChunkNo,
        bytes: &[u8],
        expected: ChunkValue,
    ) -> Result<(), Mismatch> {
        let range = self.chunk_range(chunk).ok_or(Mismatch::PastEnd {
            chunk,
            chunks: self.chunks(),
        })?;
        if bytes.len() as u64 != range.length {
            return Err(Mismatch::Length {
                chunk,
                got: bytes.len() as u64,
                want: range.length,
            });
        }
        let value = if self.levels() == 0 {
            *blake3::hash(bytes).as_bytes()
        } else {
            hash_chunk(chunk, bytes).finalize_non_root()
        };
        if value == expected.0 {
            Ok(())
        } else {
            Err(Mismatch::Chunk { chunk, range })
        }
    }

    /// Starts the way from the root to the value of `chunk`.
    pub fn walk(&self, root: Root, chunk: ChunkNo) -> Result<Walk, Mismatch> {
        if chunk.0 >= self.chunks() {
            return Err(Mismatch::PastEnd {
                chunk,
                chunks: self.chunks(),
            });
        }
        Ok(Walk {
            layout: *self,
            chunk,
            below: self.levels(),
            value: root.0,
        })
    }
}

/// The way from an image's root to a chunk's value, page by page.
///
/// ```
/// # use accel_ufs::index::*;
/// # fn read(_: ByteRange) -> Page { [0; PAGE_SIZE] }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let root = Root([7; 32]);
/// let layout = Layout::new(ImageSize::new(4096)?);
/// let mut walk = layout.walk(root, ChunkNo(0))?;
/// let value = loop {
///     match walk.step() {
///         Step::Fetch { range, .. } => walk.supply(&read(range))?,
///         Step::Found(value) => break value,
///     }
/// };
/// # assert_eq!(value.0, root.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    layout: Layout,
    chunk: ChunkNo,
    /// Levels still to go.
    below: usize,
    /// What the next page, or the chunk, is checked against.
    value: [u8; 32],
}

/// What a [`Walk`] needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Read this page of the index and [`Walk::supply`] it.
    Fetch {
        /// Which page.
        page: TreePage,
        /// Where it lies in the index file.
        range: ByteRange,
        /// What it must match; names its content, so it is a cache's key.
        expected: PageValue,
    },
    /// The way is at its end: check the chunk against this.
    Found(ChunkValue),
}

impl Walk {
    /// What is needed next.
    pub fn step(&self) -> Step {
        match self.page() {
            None => Step::Found(ChunkValue(self.value)),
            Some(page) => Step::Fetch {
                page,
                range: self.layout.page_range(page),
                expected: PageValue(self.value),
            },
        }
    }

    /// Verifies the page that [`Walk::step`] asked for and goes one level down.
    /// After an error the same page is still asked for. Does nothing at the end.
    pub fn supply(&mut self, bytes: &Page) -> Result<(), Mismatch> {
        if let Some(page) = self.page() {
            self.layout
                .verify_page(page, bytes, PageValue(self.value))?;
            self.supply_verified(bytes);
        }
        Ok(())
    }

    /// The same for a page that was verified against the same
    /// [`PageValue`] before, such as one from a cache with that key.
    pub fn supply_verified(&mut self, bytes: &Page) {
        if self.below > 0 {
            self.below -= 1;
            let shift = 7 * self.below;
            self.value = value_at(bytes, self.chunk.0 >> shift);
        }
    }

    fn page(&self) -> Option<TreePage> {
        self.layout.page(self.below.checked_sub(1)?, self.chunk)
    }
}
