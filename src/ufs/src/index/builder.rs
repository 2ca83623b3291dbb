//! Making the index of an image whose chunks come in any order.

use super::header::Header;
use super::verify::{hash_chunk, page_value_of};
use super::{ByteRange, CHUNK_SIZE, ChunkNo, ImageSize, Layout, MAX_IMAGE_SIZE};
use super::{CHUNK, HeaderError, Root, SizeError, VALUES_PER_PAGE, is_zero};
use blake3::hazmat::HasherExt;

/// Chunks or sizes that make no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// A chunk of a length that no chunk has.
    #[error(
        "chunk {chunk} came with {length} bytes: expected a multiple of 4096 of at most {CHUNK_SIZE}"
    )]
    ChunkLength {
        /// Which chunk.
        chunk: ChunkNo,
        /// How many bytes were given.
        length: u64,
    },
    /// A chunk beyond the largest image.
    #[error("chunk {chunk} lies past the largest image ({MAX_IMAGE_SIZE} bytes)")]
    PastEnd {
        /// Which chunk.
        chunk: ChunkNo,
    },
    /// A chunk came twice.
    #[error("chunk {chunk} came twice")]
    Repeated {
        /// Which chunk.
        chunk: ChunkNo,
    },
    /// A chunk never came.
    #[error("chunk {chunk} is missing from an image of {size} bytes")]
    Missing {
        /// Which chunk.
        chunk: ChunkNo,
        /// The image's size.
        size: ImageSize,
    },
    /// A chunk does not fit the image's size.
    #[error("chunk {chunk} does not fit an image of {size} bytes")]
    Misfit {
        /// Which chunk.
        chunk: ChunkNo,
        /// The image's size.
        size: ImageSize,
    },
    /// The size is none.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The metadata range does not lie in the image.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// A chunk's hashes, computed on whichever thread has the bytes.
#[derive(Debug, Clone, Copy)]
pub struct HashedChunk {
    chunk: ChunkNo,
    length: usize,
    value: [u8; 32],
    /// What the root is if the image ends after this chunk; only for chunk 0.
    root_if_only: Option<Root>,
    zero: bool,
}

impl HashedChunk {
    /// Hashes `bytes`, the chunk number `chunk` of an image.
    pub fn new(chunk: ChunkNo, bytes: &[u8]) -> Result<Self, BuildError> {
        if bytes.is_empty() || bytes.len() > CHUNK_SIZE || !bytes.len().is_multiple_of(4096) {
            return Err(BuildError::ChunkLength {
                chunk,
                length: bytes.len() as u64,
            });
        }
        if chunk.0 >= MAX_IMAGE_SIZE / CHUNK {
            return Err(BuildError::PastEnd { chunk });
        }
        let hasher = hash_chunk(chunk, bytes);
        Ok(Self {
            chunk,
            length: bytes.len(),
            value: hasher.finalize_non_root(),
            root_if_only: (chunk.0 == 0).then(|| Root(*hasher.finalize().as_bytes())),
            zero: is_zero(bytes),
        })
    }

    /// Whether the chunk is all zeros, so that a hole in the file serves.
    pub const fn is_zero(&self) -> bool {
        self.zero
    }
}

/// Collects chunks, in any order and each once, and makes the index of them.
///
/// Keeps 33 bytes per chunk.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    values: Vec<[u8; 32]>,
    /// Beside `values`: what is known of each chunk.
    seen: Vec<Seen>,
    root_if_only: Option<Root>,
    short: Option<(ChunkNo, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Seen {
    #[default]
    No,
    Data,
    Zeros,
}

impl IndexBuilder {
    /// An index of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hashes and adds a chunk: 128 KiB, or a smaller multiple of 4096 for the
    /// image's last.
    pub fn add(&mut self, chunk: ChunkNo, bytes: &[u8]) -> Result<(), BuildError> {
        self.insert(HashedChunk::new(chunk, bytes)?)
    }

    /// Adds a chunk that was hashed elsewhere.
    pub fn insert(&mut self, hashed: HashedChunk) -> Result<(), BuildError> {
        let chunk = hashed.chunk;
        let Ok(at) = usize::try_from(chunk.0) else {
            return Err(BuildError::PastEnd { chunk });
        };
        if at >= self.seen.len() {
            self.seen.resize(at + 1, Seen::No);
            self.values.resize(at + 1, [0; 32]);
        }
        if self.seen[at] != Seen::No {
            return Err(BuildError::Repeated { chunk });
        }
        if hashed.length != CHUNK_SIZE {
            if self.short.is_some() {
                return Err(BuildError::ChunkLength {
                    chunk,
                    length: hashed.length as u64,
                });
            }
            self.short = Some((chunk, hashed.length));
        }
        self.seen[at] = if hashed.zero { Seen::Zeros } else { Seen::Data };
        self.values[at] = hashed.value;
        self.root_if_only = self.root_if_only.or(hashed.root_if_only);
        Ok(())
    }

    /// The root and the bytes of the index file of an image of `size` bytes
    /// whose metadata lies at `metadata`.
    pub fn finish(self, size: u64, metadata: ByteRange) -> Result<(Root, Vec<u8>), BuildError> {
        let size = ImageSize::new(size)?;
        let layout = Layout::new(size);
        self.check(&layout)?;

        // Levels from level 0 up; the file has them from the top down.
        let mut levels = vec![self.values];
        let root = loop {
            let level = levels.last().map_or(&[][..], Vec::as_slice);
            match (level, self.root_if_only) {
                ([_], Some(root)) if levels.len() == 1 => break root,
                _ if level.len() <= VALUES_PER_PAGE => break Root(page_value_of(level, true).0),
                _ => {
                    let pages = level.chunks(VALUES_PER_PAGE);
                    let above = pages.map(|page| page_value_of(page, false).0).collect();
                    levels.push(above);
                }
            }
        };
        if layout.levels() == 0 {
            levels.clear();
        }

        let mut bytes = Vec::new();
        bytes.extend_from_slice(&Header::new(root, size, metadata)?.encode());
        let zero_map = layout.zero_map();
        let mut map = vec![0u8; usize::try_from(zero_map.length).unwrap_or(usize::MAX)];
        for (at, _) in (0..).zip(&self.seen).filter(|(_, s)| **s == Seen::Zeros) {
            let at: usize = at;
            map[at / 8] |= 1 << (at % 8);
        }
        bytes.extend_from_slice(&map);
        for level in levels.iter().rev() {
            bytes.extend_from_slice(level.as_flattened());
            bytes.resize(bytes.len().next_multiple_of(4096), 0);
        }
        Ok((root, bytes))
    }

    /// Every chunk of the image came, each with its length, and no other.
    fn check(&self, layout: &Layout) -> Result<(), BuildError> {
        let size = layout.image_size();
        let numbers = || (0..).map(ChunkNo);
        if let Some((chunk, _)) = numbers().zip(&self.seen).find(|(_, s)| **s == Seen::No) {
            return Err(BuildError::Missing { chunk, size });
        }
        let came = self.seen.len() as u64;
        if came < layout.chunks() {
            let chunk = ChunkNo(came);
            return Err(BuildError::Missing { chunk, size });
        }
        if came > layout.chunks() {
            let chunk = ChunkNo(came - 1);
            return Err(BuildError::Misfit { chunk, size });
        }
        let last = ChunkNo(came - 1);
        let (short, length) = self.short.unwrap_or((last, CHUNK_SIZE));
        let want = layout.chunk_range(short).map_or(0, |range| range.length);
        if length as u64 != want {
            return Err(BuildError::Misfit { chunk: short, size });
        }
        Ok(())
    }
}
