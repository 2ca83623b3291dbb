//! Reading a published image, every chunk verified.

use accel_erofs::Input;
use accel_layer::{ErofsLower, LowerDirectory, LowerError, LowerLookup};
use accel_ufs::index::{
    CHUNK_SIZE, ChunkNo, Header, Layout, Mismatch, PAGE_SIZE, Page, Root, Step,
};
use accel_ufs::names::{LayerName, RelPath};
use accel_ufs::publish::Ufs;
use accel_ufs::start::{Block, LayerStart, StartError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Why bytes of a published image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PublishedError {
    /// A file cannot be read.
    #[error("cannot read {path:?}: {error}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Bytes are not what the root promises.
    #[error("{path:?} is damaged: {error}")]
    Damaged {
        /// The image.
        path: PathBuf,
        /// Where.
        error: Mismatch,
    },
    /// The index is none.
    #[error("{path:?} is damaged: {error}")]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        error: accel_ufs::index::HeaderError,
    },
    /// Blocks do not match their proofs.
    #[error("{path:?} is damaged: {error}")]
    Start {
        /// The image.
        path: PathBuf,
        /// Which.
        error: StartError,
    },
}

/// An image on UFS with its index.
#[derive(Debug)]
pub struct Published {
    image: (File, PathBuf),
    index: (File, PathBuf),
    header: Header,
    /// Chunks that were read last, each in the slot of its number.
    chunks: Mutex<Vec<(ChunkNo, Vec<u8>)>>,
}

/// How many chunks are kept: enough that going to and fro in a tree seldom reads one
/// twice. 8 MiB.
const KEPT: u64 = 64;
const NONE: ChunkNo = ChunkNo(u64::MAX);

impl Published {
    /// Opens a layer on UFS. What its index's header says is not verified yet;
    /// compare [`Published::header`] with what is known.
    pub fn open(ufs: &Ufs, name: &LayerName) -> Result<Self, PublishedError> {
        let open = |name: &RelPath| {
            let path = ufs.path(name);
            match ufs.open_layer_file(name) {
                Ok(file) => Ok((file, path)),
                Err(error) => Err(PublishedError::Read { path, error }),
            }
        };
        let index = open(&name.index())?;
        let mut page: Page = [0; 4096];
        read_at(&index, &mut page, 0)?;
        let header = Header::parse(&page).map_err(|error| PublishedError::Index {
            path: index.1.clone(),
            error,
        })?;
        Ok(Self {
            image: open(&name.image())?,
            index,
            header,
            chunks: Mutex::new((0..KEPT).map(|_| (NONE, Vec::new())).collect()),
        })
    }

    /// What the index's header says.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The image file's path.
    pub fn image_path(&self) -> &Path {
        &self.image.1
    }

    /// The image file's size.
    pub fn image_size(&self) -> io::Result<u64> {
        Ok(self.image.0.metadata()?.len())
    }

    /// The index file's path.
    pub fn index_path(&self) -> &Path {
        &self.index.1
    }

    /// The index file's size.
    pub fn index_size(&self) -> io::Result<u64> {
        Ok(self.index.0.metadata()?.len())
    }

    /// Reads bytes of the index.
    pub fn read_index(&self, bytes: &mut [u8], offset: u64) -> Result<(), PublishedError> {
        read_at(&self.index, bytes, offset)
    }

    /// Reads bytes of the image, unverified.
    pub fn read_image(&self, bytes: &mut [u8], offset: u64) -> Result<(), PublishedError> {
        read_at(&self.image, bytes, offset)
    }

    /// Reads a chunk and verifies it against the root in the header.
    fn read_chunk(&self, chunk: ChunkNo, bytes: &mut Vec<u8>) -> Result<(), PublishedError> {
        let damaged = |error| PublishedError::Damaged {
            path: self.image.1.clone(),
            error,
        };
        let (layout, root): (&Layout, Root) = (self.header.layout(), self.header.root());
        let mut walk = layout.walk(root, chunk).map_err(damaged)?;
        let value = loop {
            match walk.step() {
                Step::Fetch { range, .. } => {
                    let mut page: Page = [0; 4096];
                    read_at(&self.index, &mut page, range.offset)?;
                    walk.supply(&page).map_err(damaged)?;
                }
                Step::Found(value) => break value,
            }
        };
        let range = layout.chunk_range(chunk).unwrap_or_default();
        // A chunk has at most 128 KiB.
        bytes.resize(usize::try_from(range.length).unwrap_or(CHUNK_SIZE), 0);
        read_at(&self.image, bytes, range.offset)?;
        layout.verify_chunk(chunk, bytes, value).map_err(damaged)
    }
}

impl Published {
    /// What mounting the layer reads, with its proofs.
    ///
    /// # Errors
    /// Image or index cannot be read, or are not what the root promises.
    pub fn start(&self) -> Result<LayerStart, PublishedError> {
        let (layout, root) = (self.header.layout(), self.header.root());
        let metadata = self.header.metadata();
        let mut blocks = Vec::new();
        let mut chunk = (NONE, Vec::new());
        for number in LayerStart::wanted(metadata) {
            let offset = number * PAGE_SIZE as u64;
            let of = ChunkNo::containing(offset);
            if chunk.0 != of {
                self.read_chunk(of, &mut chunk.1)?;
                chunk.0 = of;
            }
            let proof = layout.prove_block(root, number, &chunk.1, |at| {
                let mut page: Page = [0; PAGE_SIZE];
                read_at(&self.index, &mut page, at).map(|()| page)
            })?;
            // Less than a chunk.
            let from = usize::try_from(offset % CHUNK_SIZE as u64).unwrap_or(0);
            let bytes = chunk.1.get(from..).and_then(|rest| rest.first_chunk());
            if let Some(bytes) = bytes {
                let bytes = Box::new(*bytes);
                blocks.push((Block { number, bytes }, proof));
            }
        }
        LayerStart::new(root, layout.image_size(), metadata, blocks).map_err(|error| {
            PublishedError::Start {
                path: self.image.1.clone(),
                error,
            }
        })
    }
}

impl Input for &Published {
    type Error = PublishedError;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), PublishedError> {
        Input::read_at(*self, offset, bytes)
    }
}

impl Input for Published {
    type Error = PublishedError;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), PublishedError> {
        let mut kept = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let chunk = ChunkNo::containing(offset);
            // Less than 64.
            let slot = usize::try_from(chunk.0 % KEPT).unwrap_or(0);
            let (number, there) = &mut kept[slot];
            if *number != chunk {
                // Not this one until it is verified.
                *number = NONE;
                self.read_chunk(chunk, there)?;
                *number = chunk;
            }
            let from = usize::try_from(offset % CHUNK_SIZE as u64).unwrap_or(CHUNK_SIZE);
            let there = there.get(from..).unwrap_or_default();
            let length = there.len().min(bytes.len());
            if length == 0 {
                return Err(PublishedError::Read {
                    path: self.image.1.clone(),
                    error: io::ErrorKind::UnexpectedEof.into(),
                });
            }
            let (now, later) = bytes.split_at_mut(length);
            now.copy_from_slice(&there[..length]);
            bytes = later;
            offset += length as u64;
        }
        Ok(())
    }
}

/// How long a lower layer may be missing that is being replaced.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often to look for it.
const LOOK: Duration = Duration::from_millis(20);

/// [`Published::open`] for a layer that is known to be there. One that another process
/// replaces, since it was damaged, is missing for a moment: this looks again.
fn open_patiently(ufs: &Ufs, name: &LayerName) -> Result<Published, PublishedError> {
    let began = Instant::now();
    loop {
        match Published::open(ufs, name) {
            Err(PublishedError::Read { error, .. })
                if error.kind() == io::ErrorKind::NotFound && began.elapsed() < PATIENCE =>
            {
                thread::sleep(LOOK);
            }
            opened => return opened,
        }
    }
}

fn read_at(
    (file, path): &(File, PathBuf),
    bytes: &mut [u8],
    at: u64,
) -> Result<(), PublishedError> {
    file.read_exact_at(bytes, at)
        .map_err(|error| PublishedError::Read {
            path: path.clone(),
            error,
        })
}

/// The names of an image's layers, which other threads are converting.
pub trait Names: Sync {
    /// The name of layer `number` (0 for the lowest), as soon as it is published.
    ///
    /// # Errors
    /// It will not be.
    fn wait_for(&self, number: usize) -> Result<LayerName, LowerError>;
}

/// The layers below the one that is converted, waited for and opened when they
/// are asked for, the nearest first.
pub struct Below<'a> {
    ufs: &'a Ufs,
    names: &'a dyn Names,
    /// Lowest first.
    opened: Vec<Option<ErofsLower<Published>>>,
}

impl<'a> Below<'a> {
    /// The layers below layer `number` of an image.
    pub fn new(ufs: &'a Ufs, names: &'a dyn Names, number: usize) -> Self {
        Self {
            ufs,
            names,
            opened: (0..number).map(|_| None).collect(),
        }
    }
}

impl LowerLookup for Below<'_> {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        for (number, opened) in self.opened.iter_mut().enumerate().rev() {
            let lower = match opened {
                Some(lower) => lower,
                None => {
                    let name = self.names.wait_for(number)?;
                    opened.insert(ErofsLower::open(open_patiently(self.ufs, &name)?)?)
                }
            };
            match lower.directory(path)? {
                LowerDirectory::Absent => {}
                answer => return Ok(answer),
            }
        }
        Ok(LowerDirectory::Absent)
    }
}
