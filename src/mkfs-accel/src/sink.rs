//! Where an image goes: into a file, and through the index builder.
//!
//! The chunks cross over to a thread of their own, which writes and hashes them
//! while the layer's next bytes are decompressed. A chunk of zeros is hashed but
//! not written: a hole reads the same. Writing back to storage begins at once, so
//! that little is left to wait for when the image is synced.

use accel_layer::{LayerOptions, LayerSummary, LowerLookup, Output};
use accel_ufs::UfsError;
use accel_ufs::index::{BuildError, ByteRange, ChunkNo, HashedChunk, IndexBuilder, Root};
use anyhow::Context;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
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

/// Chunks between the two threads.
const QUEUE: usize = 4;

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
struct Chunk {
    offset: u64,
    bytes: Vec<u8>,
}

/// What was written since writing back was last asked for.
#[derive(Debug, Default)]
struct Window {
    start: u64,
}

impl Window {
    /// Large enough for storage to work well, small enough to start early.
    const SIZE: u64 = 8 << 20;

    /// Has what lies before `end` written back if it is enough. Chunks that come
    /// late are left to the sync at the end.
    fn wrote(&mut self, file: &File, end: u64) {
        if end.saturating_sub(self.start) < Self::SIZE {
            return;
        }
        // The kernel starts writing dirty pages when it is told that they are not
        // needed, and drops those that are clean already. It is only advice: what
        // comes of it is for the sync to say.
        let len = NonZero::new(end - self.start);
        let _ = fadvise(file, self.start, len, Advice::DontNeed);
        self.start = end;
    }
}

/// Takes the chunks of one image.
#[derive(Debug)]
struct Sink<'scope> {
    chunks: SyncSender<Chunk>,
    /// Buffers to use again.
    used: Receiver<Vec<u8>>,
    thread: ScopedJoinHandle<'scope, Result<IndexBuilder, SinkError>>,
}

impl<'scope> Sink<'scope> {
    /// A sink into `file`, on a thread of `scope`.
    fn start<'env>(scope: &'scope Scope<'scope, 'env>, file: &'env File) -> Self {
        let (chunks, queue) = mpsc::sync_channel::<Chunk>(QUEUE);
        let (give_back, used) = mpsc::channel();
        let thread = scope.spawn(move || {
            let mut index = IndexBuilder::new();
            let mut window = Window::default();
            for Chunk { offset, bytes } in queue {
                let hashed = HashedChunk::new(ChunkNo::containing(offset), &bytes)?;
                if !hashed.is_zero() {
                    file.write_all_at(&bytes, offset)?;
                    window.wrote(file, offset + bytes.len() as u64);
                }
                index.insert(hashed)?;
                // The other side may have finished already.
                let _ = give_back.send(bytes);
            }
            Ok(index)
        });
        Self {
            chunks,
            used,
            thread,
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
        let index = match self.thread.join() {
            Ok(index) => index?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
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
        let mut copy = self.used.try_recv().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(bytes);
        let chunk = Chunk {
            offset,
            bytes: copy,
        };
        self.chunks.send(chunk).map_err(|_| SinkError::Ended)
    }
}
