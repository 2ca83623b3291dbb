//! Where everything lies in an index file: a function of the image's size alone.

use super::{
    ByteRange, CHUNK, CHUNK_SIZE_LOG2, ChunkNo, ImageSize, PAGE, Page, VALUES_PER_PAGE,
    verify::value_at,
};
use super::{ChunkValue, PageValue, Root};

/// Levels of the largest tree: 2²⁷ chunk values, 2²⁰, 2¹³, 64.
pub(super) const MAX_LEVELS: usize = 4;
const VALUES_LOG2: u32 = VALUES_PER_PAGE.trailing_zeros();
const VALUES: u64 = 1 << VALUES_LOG2;

/// A page of the tree: a level (0 holds the chunk values) and its number there.
///
/// Only a [`Layout`] makes one, so it lies inside that layout's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreePage {
    pub(super) level: u8,
    pub(super) number: u64,
}

impl TreePage {
    /// The level: 0 holds chunk values, each further one values of 128 of the
    /// level below.
    pub const fn level(self) -> usize {
        self.level as usize
    }

    /// The page's number within its level.
    pub const fn number(self) -> u64 {
        self.number
    }
}

impl std::fmt::Display for TreePage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "page {} of level {}", self.number, self.level)
    }
}

/// Geometry of an image and of its index.
///
/// ```text
/// 0      header
/// 4096   zero map, one bit per chunk, padded to 4096
///        top level of the tree (at most one page)
///        …
///        level 0: the chunk values, padded to 4096
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    size: ImageSize,
    levels: usize,
    /// Values in each level, level 0 first.
    values: [u64; MAX_LEVELS],
    /// Offset of each level in the index file, level 0 first.
    offsets: [u64; MAX_LEVELS],
    zero_map: ByteRange,
    tree: ByteRange,
}

impl Layout {
    /// The layout of the index of an image of `size` bytes.
    pub const fn new(size: ImageSize) -> Self {
        let zero_map = ByteRange::new(PAGE, size.chunks().div_ceil(8).next_multiple_of(PAGE));
        let start = zero_map.offset + zero_map.length;
        let mut values = [0; MAX_LEVELS];
        let mut levels = 0;
        if size.chunks() > 1 {
            values[0] = size.chunks();
            levels = 1;
            while values[levels - 1] > VALUES {
                values[levels] = values[levels - 1].div_ceil(VALUES);
                levels += 1;
            }
        }
        let mut offsets = [0; MAX_LEVELS];
        let mut offset = start;
        let mut level = levels;
        while level > 0 {
            level -= 1;
            offsets[level] = offset;
            offset += values[level].div_ceil(VALUES) * PAGE;
        }
        Self {
            size,
            levels,
            values,
            offsets,
            zero_map,
            tree: ByteRange::new(start, offset - start),
        }
    }

    /// The image's size.
    pub const fn image_size(&self) -> ImageSize {
        self.size
    }

    /// How many chunks the image has; at least one.
    pub const fn chunks(&self) -> u64 {
        self.size.chunks()
    }

    /// Where `chunk` lies in the image; `None` past the end.
    pub fn chunk_range(&self, chunk: ChunkNo) -> Option<ByteRange> {
        if chunk.0 >= self.chunks() {
            return None;
        }
        let offset = chunk.0 << CHUNK_SIZE_LOG2;
        Some(ByteRange::new(
            offset,
            CHUNK.min(self.size.bytes() - offset),
        ))
    }

    /// Size of the index file.
    pub const fn index_size(&self) -> u64 {
        self.tree.offset + self.tree.length
    }

    /// Where the zero map lies in the index file.
    pub const fn zero_map(&self) -> ByteRange {
        self.zero_map
    }

    /// Where the tree lies in the index file; empty for an image of one chunk.
    pub const fn tree(&self) -> ByteRange {
        self.tree
    }

    /// Levels of the tree; 0 for an image of one chunk.
    pub const fn levels(&self) -> usize {
        self.levels
    }

    /// Where `page` lies in the index file.
    pub const fn page_range(&self, page: TreePage) -> ByteRange {
        ByteRange::new(self.offsets[page.level()] + page.number * PAGE, PAGE)
    }

    /// How many of the page's 128 values are in use; the others are zero.
    pub(super) fn values_in(&self, page: TreePage) -> usize {
        let rest = self.values[page.level()] - page.number * VALUES;
        // At most 128.
        usize::try_from(rest.min(VALUES)).unwrap_or(VALUES_PER_PAGE)
    }

    /// The page of `level` on the way to `chunk`; `None` if there is none.
    pub fn page(&self, level: usize, chunk: ChunkNo) -> Option<TreePage> {
        if level >= self.levels || chunk.0 >= self.chunks() {
            return None;
        }
        Some(TreePage {
            level: u8::try_from(level).ok()?,
            number: chunk.0 >> (VALUES_LOG2 * (u32::try_from(level).ok()? + 1)),
        })
    }

    /// The pages on the way to `chunk`, top first; none for an image of one
    /// chunk or a chunk past the end.
    pub fn path(&self, chunk: ChunkNo) -> impl Iterator<Item = TreePage> + use<> {
        let layout = *self;
        (0..self.levels)
            .rev()
            .filter_map(move |level| layout.page(level, chunk))
    }

    /// Every page of the tree in the order of the file, so that each comes after
    /// the page that holds its value.
    pub fn pages(&self) -> impl Iterator<Item = TreePage> + use<> {
        let layout = *self;
        (0u8..4).take(self.levels).rev().flat_map(move |level| {
            let pages = layout.values[usize::from(level)].div_ceil(VALUES);
            (0..pages).map(move |number| TreePage { level, number })
        })
    }

    /// The page that holds the value of `page`; `None` for the top page, whose
    /// value is the root.
    pub fn parent(&self, page: TreePage) -> Option<TreePage> {
        (page.level() + 1 < self.levels).then(|| TreePage {
            level: page.level + 1,
            number: page.number >> VALUES_LOG2,
        })
    }

    /// The value of `page`, read from its parent's bytes.
    pub fn page_value(&self, parent: &Page, page: TreePage) -> PageValue {
        PageValue(value_at(parent, page.number % VALUES))
    }

    /// The value of the top page, or `None` for an image of one chunk.
    pub fn top_page(&self, root: Root) -> Option<(TreePage, PageValue)> {
        let page = self.page(self.levels.checked_sub(1)?, ChunkNo(0))?;
        Some((page, PageValue(root.0)))
    }

    /// The value of `chunk`, read from its page of level 0.
    pub fn chunk_value(&self, page: &Page, chunk: ChunkNo) -> ChunkValue {
        ChunkValue(value_at(page, chunk.0 % VALUES))
    }

    /// The value of the chunk of an image that has only one: its root's bytes.
    pub const fn only_chunk_value(&self, root: Root) -> ChunkValue {
        ChunkValue(root.0)
    }

    /// Whether `zero_map` (all of its bytes, from [`Layout::zero_map`]) says that
    /// `chunk` is all zeros. A hint: verify such a chunk like any other.
    pub fn is_zero(&self, zero_map: &[u8], chunk: ChunkNo) -> bool {
        usize::try_from(chunk.0 / 8)
            .ok()
            .and_then(|byte| zero_map.get(byte))
            .is_some_and(|byte| byte >> (chunk.0 % 8) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::MAX_IMAGE_SIZE;
    use proptest::prelude::*;

    fn layout(bytes: u64) -> Layout {
        Layout::new(ImageSize::new(bytes).unwrap())
    }

    #[test]
    fn the_tree_grows_a_level_where_the_format_says() {
        for (chunks, levels, pages) in [
            (1, 0, 0),
            (2, 1, 1),
            (128, 1, 1),
            (129, 2, 1 + 2),
            (128 * 128, 2, 1 + 128),
            (128 * 128 + 1, 3, 1 + 2 + 129),
            (1 << 27, 4, 1 + 64 + (1 << 13) + (1 << 20)),
        ] {
            let layout = layout(chunks * CHUNK);
            assert_eq!(layout.levels(), levels, "{chunks} chunks");
            assert_eq!(layout.tree().length, pages * PAGE, "{chunks} chunks");
        }
        assert_eq!(layout(4096).index_size(), 8192);
    }

    proptest! {
        #[test]
        fn pages_tile_the_tree_and_parents_hold_their_values(
            pages in 1u64..=1 << 20,
            chunk in any::<u64>(),
        ) {
            let layout = layout(pages * PAGE);
            let mut offset = layout.tree().offset;
            for page in layout.pages() {
                prop_assert_eq!(layout.page_range(page), ByteRange::new(offset, PAGE));
                offset += PAGE;
            }
            prop_assert_eq!(offset, layout.index_size());
            let chunk = ChunkNo(chunk % layout.chunks());
            let path: Vec<_> = layout.path(chunk).collect();
            prop_assert_eq!(path.len(), layout.levels());
            for pair in path.windows(2) {
                prop_assert_eq!(layout.parent(pair[1]), Some(pair[0]));
            }
        }

        #[test]
        fn no_size_and_no_chunk_number_makes_it_panic(
            pages in 1u64..=MAX_IMAGE_SIZE / PAGE,
            chunk in any::<u64>(),
        ) {
            let layout = layout(pages * PAGE);
            let inside = chunk < layout.chunks();
            prop_assert_eq!(layout.chunk_range(ChunkNo(chunk)).is_some(), inside);
            for page in layout.path(ChunkNo(chunk)) {
                prop_assert!(layout.page_range(page).end() <= Some(layout.index_size()));
            }
        }
    }
}
