//! The writer as its callers see it.

use crate::{
    chunk::ChunkBuffer,
    layout::{LayoutError, Plan},
    metadata,
    place::{FileWriter, Placer},
    tree::Tree,
    values::{FileKind, Uuid},
};
use std::{error::Error, ops::Range};

/// Where an image goes.
///
/// The writer calls [`write_chunk`](Self::write_chunk) with whole chunks: `offset` is a
/// multiple of [`CHUNK_SIZE`](crate::CHUNK_SIZE) and `bytes` is as long as a
/// chunk; only the image's last chunk is shorter (a multiple of 4096). Each chunk
/// comes exactly once, and together they are the image without a hole. The order
/// is ascending but for two kinds: a chunk in which a gap is open comes when the
/// gap is filled or given up, and chunk 0 comes last of all. Chunks of zeros come
/// like others.
pub trait Output {
    /// Why bytes could not be taken.
    type Error: Error + 'static;

    /// Takes one chunk.
    ///
    /// # Errors
    /// The writer gives up and hands the error on.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Takes one chunk with its buffer, and gives a buffer in return: whatever is in
    /// it. For outputs that keep chunks for a while; others copy from
    /// [`write_at`](Self::write_at), which is what this calls.
    ///
    /// # Errors
    /// As `write_at`.
    fn write_chunk(&mut self, offset: u64, chunk: ChunkBuffer) -> Result<ChunkBuffer, Self::Error> {
        self.write_at(offset, &chunk)?;
        Ok(chunk)
    }
}

impl<O: Output + ?Sized> Output for &mut O {
    type Error = O::Error;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Self::Error> {
        (**self).write_at(offset, bytes)
    }

    fn write_chunk(&mut self, offset: u64, chunk: ChunkBuffer) -> Result<ChunkBuffer, Self::Error> {
        (**self).write_chunk(offset, chunk)
    }
}

/// Why an image was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E: Error + 'static> {
    /// The output refused a chunk.
    #[error("writing the image at offset {offset}")]
    Output {
        /// Offset of the chunk.
        offset: u64,
        /// What the output said.
        source: E,
    },
    /// The image would be larger than allowed.
    #[error("the image would be larger than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// A file had more or fewer bytes than announced.
    #[error("a file was announced with {announced} bytes, but {came} came")]
    FileSize {
        /// Bytes announced.
        announced: u64,
        /// Bytes written, or tried.
        came: u64,
    },
    /// A file was begun and never finished.
    #[error("a file of the image was not finished")]
    Unfinished,
    /// The tree has no place in an image.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// How many inodes of each kind an image has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All inodes; a file with several names counts once.
    pub inodes: u64,
    /// Regular files.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices (whiteouts among them), FIFOs and sockets.
    pub special: u64,
    /// Bytes in the regular files.
    pub file_bytes: u64,
    /// Extended attributes stored once for several inodes.
    pub shared_xattrs: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, kind: FileKind) {
        self.inodes += 1;
        *match kind {
            FileKind::File => &mut self.files,
            FileKind::Directory => &mut self.directories,
            FileKind::Symlink => &mut self.symlinks,
            _ => &mut self.special,
        } += 1;
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the image, a multiple of 4096.
    pub size: u64,
    /// The bytes that hold all metadata but the superblock: from a block to the
    /// image's end.
    pub metadata: Range<u64>,
    /// The root directory's node number.
    pub root_nid: u16,
    /// What is in it.
    pub counts: Counts,
}

/// Writes one image.
#[derive(Debug)]
pub struct ImageWriter<O> {
    placer: Placer<O>,
}

impl<O: Output> ImageWriter<O> {
    /// An image of at most `max_size` bytes (and never more than 16 TiB).
    pub fn new(output: O, max_size: u64) -> Self {
        Self {
            placer: Placer::new(output, max_size),
        }
    }

    /// Places the next file of `size` bytes.
    ///
    /// # Errors
    /// The image would become too large, or an earlier file was not finished.
    pub fn begin_file(&mut self, size: u64) -> Result<FileWriter<'_, O>, WriteError<O::Error>> {
        self.placer.begin(size)
    }

    /// Writes the metadata of `tree`, whose extents are this writer's, and the
    /// superblock. Gives the output back.
    ///
    /// # Errors
    /// The output's, or a tree too large for an image.
    pub fn finish(self, tree: &Tree, uuid: Uuid) -> Result<(Summary, O), WriteError<O::Error>> {
        let plan = Plan::new(tree, self.placer.cursor())?;
        metadata::write(self.placer, tree, &plan, uuid)
    }
}
