//! What mounting an image reads, of all its layers, in one small file.
//!
//! The kernel mounts a layer from two blocks of 4 KiB: the one with the superblock and
//! the one in which the metadata, and with it the root directory's inode, begins. Read as
//! chunks, which are the unit of the index, they cost 256 KiB a layer. This file has the
//! blocks themselves, each with its *proof*: the values of BLAKE3's tree that lie beside
//! its way to the root, at most one for every doubling of 4 KiB to the image's size. So
//! whoever knows a layer's root and size needs nothing else of it until it is mounted.
//!
//! Blocks that do not match their layer's root are no blocks: [`parse`] refuses them. The
//! file is a help; without it a mount reads chunks.
//!
//! The bytes are specified in `ARCHITECTURE.md`, "The start file (layout 1)". Nothing
//! here does I/O.

use crate::index::{BlockProof, ChunkNo};
use crate::index::{ByteRange, ImageSize, Layout, PAGE_SIZE, Page, Root, SizeError};

const MAGIC: [u8; 8] = *b"ACCELBEG";
/// The number that every layout-1 start file carries.
pub const LAYOUT: u32 = 1;
/// The largest file that is written or read, in bytes: with the image's record it stays
/// below 1 MiB. Layers that do not fit any more are left out.
pub const MAX_START: usize = 768 << 10;

const HEAD: usize = 16;
const CHECKSUM: usize = 32;

/// A file that is no start file, or of other layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The magic is not there.
    #[error("this is not a start file: it does not begin with \"ACCELBEG\"")]
    Magic,
    /// A layout that this program does not know.
    #[error("the start file has layout {0}, this program reads layout {LAYOUT}: use a newer one")]
    Layout(u32),
    /// The checksum does not match.
    #[error("the start file is damaged: its checksum does not match")]
    Checksum,
    /// It ends in the middle, or goes on after its end.
    #[error("the start file ends at the wrong place")]
    Length,
    /// A layer's size is none.
    #[error("the start file: {0}")]
    Size(#[from] SizeError),
    /// A layer's metadata is not in it.
    #[error("the start file has a metadata range outside of its layer: {0}")]
    Metadata(ByteRange),
    /// A block is not what the layer's root promises.
    #[error("block {block} of the layer with root {root} in the start file does not match it")]
    Block {
        /// Which layer.
        root: Root,
        /// Number of the block in the layer's image, from 0.
        block: u64,
    },
}

/// A block of a layer's image that matches the layer's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Where it lies in the image, in blocks of 4 KiB.
    pub number: u64,
    /// Its bytes.
    pub bytes: Box<Page>,
}

/// The first that is needed of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerStart {
    root: Root,
    size: ImageSize,
    metadata: ByteRange,
    blocks: Vec<(Block, BlockProof)>,
}

impl LayerStart {
    /// Which blocks belong in it, of a layer with its metadata there.
    pub fn wanted(metadata: ByteRange) -> impl Iterator<Item = u64> {
        let first = metadata.offset / PAGE_SIZE as u64;
        [0, first].into_iter().take(if first == 0 { 1 } else { 2 })
    }

    /// Puts the [wanted](Self::wanted) blocks, with their proofs, together.
    ///
    /// # Errors
    /// One does not match the root, or the metadata is not in the image.
    pub fn new(
        root: Root,
        size: ImageSize,
        metadata: ByteRange,
        blocks: Vec<(Block, BlockProof)>,
    ) -> Result<Self, StartError> {
        if metadata.end().is_none_or(|end| end > size.bytes()) {
            return Err(StartError::Metadata(metadata));
        }
        let layout = Layout::new(size);
        for (block, proof) in &blocks {
            let number = block.number;
            if !layout.verify_block(root, number, &block.bytes, proof) {
                return Err(StartError::Block {
                    root,
                    block: number,
                });
            }
        }
        Ok(Self {
            root,
            size,
            metadata,
            blocks,
        })
    }

    /// The BLAKE3 of the layer's image.
    pub const fn root(&self) -> Root {
        self.root
    }

    /// The image's size.
    pub const fn size(&self) -> ImageSize {
        self.size
    }

    /// Where the image's metadata lies: a hint, in the image.
    pub const fn metadata(&self) -> ByteRange {
        self.metadata
    }

    /// The blocks.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().map(|(block, _)| block)
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.root.0);
        for number in [
            self.size.bytes(),
            self.metadata.offset,
            self.metadata.length,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        for (block, proof) in &self.blocks {
            // What is not zero of it: of the superblock's block little is.
            let from = block.bytes.iter().position(|byte| *byte != 0).unwrap_or(0);
            let to = block.bytes.iter().rposition(|byte| *byte != 0);
            let piece = &block.bytes[from..to.map_or(from, |last| last + 1)];
            for number in [from, piece.len()] {
                // A block has 4096 bytes.
                bytes.extend(u16::try_from(number).unwrap_or(0).to_le_bytes());
            }
            bytes.extend(piece);
            bytes.extend(proof.values().as_flattened());
        }
    }
}

/// The file's bytes, for the layers of an image, lowest first; as many of them as fit.
pub fn encode<'a>(layers: impl IntoIterator<Item = &'a LayerStart>) -> Vec<u8> {
    let mut bytes = vec![0; HEAD];
    let mut count = 0u32;
    for layer in layers {
        let before = bytes.len();
        layer.encode(&mut bytes);
        if bytes.len() + CHECKSUM > MAX_START {
            bytes.truncate(before);
            break;
        }
        count += 1;
    }
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
    bytes[12..HEAD].copy_from_slice(&count.to_le_bytes());
    let checksum = blake3::hash(&bytes);
    bytes.extend(checksum.as_bytes());
    bytes
}

/// Reads a file. All blocks of the result match their layer's root; which roots those
/// are, nobody vouches for.
///
/// # Errors
/// It is none, or one of its blocks does not match.
pub fn parse(bytes: &[u8]) -> Result<Vec<LayerStart>, StartError> {
    if bytes.get(..8) != Some(&MAGIC) {
        return Err(StartError::Magic);
    }
    let mut head = Reader(&bytes[8..]);
    let layout = u32::from_le_bytes(head.take()?);
    if layout != LAYOUT {
        return Err(StartError::Layout(layout));
    }
    let (checked, checksum) = bytes
        .split_last_chunk::<CHECKSUM>()
        .ok_or(StartError::Length)?;
    if blake3::hash(checked) != *checksum {
        return Err(StartError::Checksum);
    }
    let count = u32::from_le_bytes(head.take()?);
    let mut rest = Reader(checked.get(HEAD..).ok_or(StartError::Length)?);
    let mut layers = Vec::new();
    for _ in 0..count {
        layers.push(rest.layer()?);
    }
    match rest.0 {
        [] => Ok(layers),
        _ => Err(StartError::Length),
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], StartError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(StartError::Length)?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, StartError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn layer(&mut self) -> Result<LayerStart, StartError> {
        let root = Root(self.take()?);
        let size = ImageSize::new(self.number()?)?;
        let metadata = ByteRange::new(self.number()?, self.number()?);
        if metadata.end().is_none_or(|end| end > size.bytes()) {
            return Err(StartError::Metadata(metadata));
        }
        let layout = Layout::new(size);
        let mut blocks = Vec::new();
        for number in LayerStart::wanted(metadata) {
            if ChunkNo::containing(number * PAGE_SIZE as u64).0 >= layout.chunks() {
                // Metadata of no length, at the image's end.
                return Err(StartError::Metadata(metadata));
            }
            let from = usize::from(u16::from_le_bytes(self.take()?));
            let length = usize::from(u16::from_le_bytes(self.take()?));
            let (piece, rest) = self.0.split_at_checked(length).ok_or(StartError::Length)?;
            self.0 = rest;
            let mut bytes = Box::new([0; PAGE_SIZE]);
            let place = bytes.get_mut(from..).and_then(|b| b.get_mut(..length));
            place.ok_or(StartError::Length)?.copy_from_slice(piece);
            let mut values = Vec::new();
            for _ in 0..layout.proof_length(number) {
                values.push(self.take()?);
            }
            blocks.push((Block { number, bytes }, BlockProof::new(values)));
        }
        LayerStart::new(root, size, metadata, blocks)
    }
}
