//! The first page of an index file.

use super::{
    ByteRange, CHUNK_SIZE_LOG2, ImageSize, LAYOUT, Layout, PAGE_SIZE, Page, Root, SizeError,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"ACCELIDX";
/// The only way in which image bytes are stored so far: as they are.
const STORAGE_PLAIN: u32 = 0;

/// The page as it lies in the file.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    layout: U32,
    chunk_size_log2: U32,
    image_size: U64,
    root: [u8; 32],
    metadata: RawRange,
    zero_map: RawRange,
    tree: RawRange,
    storage: U32,
    reserved: [u8; 3956],
    /// BLAKE3 of everything before.
    checksum: [u8; 32],
}

const _: () = assert!(size_of::<Raw>() == PAGE_SIZE);
const CHECKED: usize = PAGE_SIZE - 32;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRange {
    offset: U64,
    length: U64,
}

impl From<ByteRange> for RawRange {
    fn from(range: ByteRange) -> Self {
        Self {
            offset: range.offset.into(),
            length: range.length.into(),
        }
    }
}

impl From<RawRange> for ByteRange {
    fn from(raw: RawRange) -> Self {
        Self::new(raw.offset.get(), raw.length.get())
    }
}

/// A page that is no header of an index we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The magic is not there.
    #[error("this is not a chunk index: it does not begin with \"ACCELIDX\"")]
    Magic,
    /// A layout that this program does not know.
    #[error("the chunk index has layout {0}, this program reads layout {LAYOUT}: use a newer one")]
    Layout(u32),
    /// The checksum does not match.
    #[error("the chunk index's header is damaged: its checksum does not match")]
    Checksum,
    /// Chunks of another size.
    #[error("the chunk index has chunks of 2^{0} bytes; layout {LAYOUT} has 2^{CHUNK_SIZE_LOG2}")]
    ChunkSize(u32),
    /// A size that no image has.
    #[error("the chunk index's header: {0}")]
    Size(#[from] SizeError),
    /// The image's bytes are stored in a way that this program does not know.
    #[error(
        "the image is stored in form {0}, this program reads form {STORAGE_PLAIN}: use a newer one"
    )]
    Storage(u32),
    /// A range that does not fit the image's size.
    #[error("the chunk index's header has a wrong {what}: {range}")]
    Range {
        /// Which range.
        what: &'static str,
        /// What was found.
        range: ByteRange,
    },
    /// Bytes that layout 1 wants to be zero.
    #[error("the chunk index's header has bytes in use that layout {LAYOUT} leaves zero")]
    Reserved,
}

/// What the first page of an index says. Compare [`Header::root`] and
/// [`Header::image_size`] with what you know before relying on the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    root: Root,
    layout: Layout,
    metadata: ByteRange,
}

impl Header {
    /// The header of the index of an image; `metadata` must lie in it.
    pub fn new(root: Root, size: ImageSize, metadata: ByteRange) -> Result<Self, HeaderError> {
        if metadata.end().is_none_or(|end| end > size.bytes()) {
            return Err(HeaderError::Range {
                what: "metadata range",
                range: metadata,
            });
        }
        Ok(Self {
            root,
            layout: Layout::new(size),
            metadata,
        })
    }

    /// Reads a header. Whatever the page holds, the result's ranges lie within
    /// image and index.
    pub fn parse(page: &Page) -> Result<Self, HeaderError> {
        let raw: &Raw = zerocopy::transmute_ref!(page);
        if raw.magic != MAGIC {
            return Err(HeaderError::Magic);
        }
        // Before the checksum: another layout may have its own.
        if raw.layout.get() != LAYOUT {
            return Err(HeaderError::Layout(raw.layout.get()));
        }
        if raw.checksum != *blake3::hash(&page[..CHECKED]).as_bytes() {
            return Err(HeaderError::Checksum);
        }
        if raw.chunk_size_log2.get() != CHUNK_SIZE_LOG2 {
            return Err(HeaderError::ChunkSize(raw.chunk_size_log2.get()));
        }
        if raw.storage.get() != STORAGE_PLAIN {
            return Err(HeaderError::Storage(raw.storage.get()));
        }
        if raw.reserved.iter().any(|byte| *byte != 0) {
            return Err(HeaderError::Reserved);
        }
        let size = ImageSize::new(raw.image_size.get())?;
        let header = Self::new(Root(raw.root), size, raw.metadata.into())?;
        for (what, found, wanted) in [
            ("zero map", raw.zero_map, header.layout.zero_map()),
            ("tree", raw.tree, header.layout.tree()),
        ] {
            let range = ByteRange::from(found);
            if range != wanted {
                return Err(HeaderError::Range { what, range });
            }
        }
        Ok(header)
    }

    /// The page for the file.
    pub fn encode(&self) -> Page {
        let mut raw = Raw {
            magic: MAGIC,
            layout: LAYOUT.into(),
            chunk_size_log2: CHUNK_SIZE_LOG2.into(),
            image_size: self.image_size().bytes().into(),
            root: self.root.0,
            metadata: self.metadata.into(),
            zero_map: self.layout.zero_map().into(),
            tree: self.layout.tree().into(),
            storage: STORAGE_PLAIN.into(),
            reserved: [0; 3956],
            checksum: [0; 32],
        };
        raw.checksum = *blake3::hash(&raw.as_bytes()[..CHECKED]).as_bytes();
        zerocopy::transmute!(raw)
    }

    /// The BLAKE3 of the image.
    pub const fn root(&self) -> Root {
        self.root
    }

    /// The image's size.
    pub const fn image_size(&self) -> ImageSize {
        self.layout.image_size()
    }

    /// Where everything else in the index lies.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the image's metadata (inodes, directories, xattrs) lies. A hint
    /// about what to fetch first.
    pub const fn metadata(&self) -> ByteRange {
        self.metadata
    }
}
