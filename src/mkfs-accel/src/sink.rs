//! Where an image goes: into a file, and through the index builder.
//!
//! The chunks cross over to a thread that hashes them while the layer's next bytes
//! are decompressed, and from there to one that writes them, many at a time. A chunk
//! of zeros is hashed but not written: a hole reads the same. Nobody copies them:
//! their buffers go round.

use crate::storage::{BATCH, Writer};
use accel_erofs::ChunkBuffer;
use accel_layer::{LayerOptions, LayerSummary, LowerLookup, Output};
use accel_ufs::UfsError;
use accel_ufs::index::{BuildError, ByteRange, ChunkNo, HashedChunk, IndexBuilder, Root};
use anyhow::Context;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, Scope, ScopedJoinHandle};

/// A layer as an image.
#[derive(Debug)]
pub struct Converted {
    /// What the layer was found to be.
    pub summary: LayerSummary,
    /// The image's root.
    pub root: Root,
    /// The bytes of the image's chunk index.
    pub index: Vec<u8>,
}

/// Reads the layer `blob` to its end and writes its image into `file`, which is
/// called `path` in errors. `lower` answers for the layers below.
pub fn convert_layer(
    blob: impl Read + Send,
    options: &LayerOptions,
    lower: &mut impl LowerLookup,
    file: &File,
    path: &Path,
) -> anyhow::Result<Converted> {
    thread::scope(|scope| {
        let mut sink = Sink::start(scope, file);
        let layer = accel_layer::convert_layer(blob, options, lower, &mut sink);
        let image = layer.as_ref().ok().map(|summary| {
            let metadata = &summary.image.metadata;
            let length = metadata.end - metadata.start;
            (summary.image.size, ByteRange::new(metadata.start, length))
        });
        // If the sink failed, the layer failed because of it.
        let finished = sink.finish(file, image).map_err(|error| match error {
            SinkError::Write(error) => anyhow::Error::new(UfsError::io("write", path)(error)),
            other => anyhow::Error::new(other),
        })?;
        let summary = layer?;
        let (root, index) = finished.context("the image has no index")?;
        Ok(Converted {
            summary,
            root,
            index,
        })
    })
}

/// Chunks between the caller and the thread that hashes.
const TO_HASH: usize = 4;

/// Why a chunk was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] io::Error),
    /// The chunks make no image.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The other thread has ended; [`Sink::finish`] says why.
    #[error("the thread that writes the image has ended")]
    Ended,
}

/// A chunk on its way.
#[derive(Debug)]
struct Chunk {
    offset: u64,
    bytes: ChunkBuffer,
}

/// Takes the chunks of one image.
#[derive(Debug)]
struct Sink<'scope> {
    chunks: SyncSender<Chunk>,
    /// Buffers to use again.
    used: Receiver<ChunkBuffer>,
    hashing: ScopedJoinHandle<'scope, Result<IndexBuilder, SinkError>>,
    writing: ScopedJoinHandle<'scope, io::Result<()>>,
}

impl<'scope> Sink<'scope> {
    /// A sink into `file`, on threads of `scope`.
    fn start<'env>(scope: &'scope Scope<'scope, 'env>, file: &'env File) -> Self {
        let (chunks, to_hash) = mpsc::sync_channel(TO_HASH);
        let (hashed, to_write) = mpsc::sync_channel(BATCH);
        let (give_back, used) = mpsc::channel();
        let zeros_back = give_back.clone();
        Self {
            chunks,
            used,
            hashing: scope.spawn(move || hash(to_hash, &hashed, &zeros_back)),
            writing: scope.spawn(move || write(file, &to_write, &give_back)),
        }
    }

    /// Waits until everything is written, and gives root and index of the image.
    /// `image` is its size and the range of its metadata; `None` if it was not
    /// completed, to learn why the sink failed.
    fn finish(
        self,
        file: &File,
        image: Option<(u64, ByteRange)>,
    ) -> Result<Option<(Root, Vec<u8>)>, SinkError> {
        drop(self.chunks);
        let index = join(self.hashing);
        // If writing failed, hashing ended because of it.
        join(self.writing)?;
        let index = index?;
        let Some((size, metadata)) = image else {
            return Ok(None);
        };
        // Zeros at the end were not written.
        file.set_len(size)?;
        Ok(Some(index.finish(size, metadata)?))
    }
}

impl Output for Sink<'_> {
    type Error = SinkError;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SinkError> {
        self.write_chunk(offset, ChunkBuffer::of(bytes)).map(drop)
    }

    fn write_chunk(&mut self, offset: u64, bytes: ChunkBuffer) -> Result<ChunkBuffer, SinkError> {
        let chunk = Chunk { offset, bytes };
        self.chunks.send(chunk).map_err(|_| SinkError::Ended)?;
        Ok(self.used.try_recv().unwrap_or_default())
    }
}

/// What a thread came to; its panic goes on here.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Hashes chunks and passes on those that must be written.
fn hash(
    chunks: Receiver<Chunk>,
    to_write: &SyncSender<Chunk>,
    give_back: &Sender<ChunkBuffer>,
) -> Result<IndexBuilder, SinkError> {
    let mut index = IndexBuilder::new();
    for chunk in chunks {
        let hashed = HashedChunk::new(ChunkNo::containing(chunk.offset), &chunk.bytes)?;
        if hashed.is_zero() {
            // The other side may have finished already.
            let _ = give_back.send(chunk.bytes);
        } else {
            to_write.send(chunk).map_err(|_| SinkError::Ended)?;
        }
        index.insert(hashed)?;
    }
    Ok(index)
}

/// Writes chunks, those that follow each other in one go.
fn write(file: &File, chunks: &Receiver<Chunk>, give_back: &Sender<ChunkBuffer>) -> io::Result<()> {
    let mut writer = Writer::new(file);
    let mut start = 0;
    let mut batch: Vec<ChunkBuffer> = Vec::with_capacity(BATCH);
    loop {
        let chunk = chunks.recv().ok();
        let end = start + batch.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        let follows = chunk.as_ref().is_some_and(|chunk| chunk.offset == end);
        if !batch.is_empty() && (!follows || batch.len() == BATCH) {
            writer.write(start, &batch)?;
            for bytes in batch.drain(..) {
                // The other side may have finished already.
                let _ = give_back.send(bytes);
            }
        }
        let Some(Chunk { offset, bytes }) = chunk else {
            return Ok(());
        };
        if batch.is_empty() {
            start = offset;
        }
        batch.push(bytes);
    }
}
