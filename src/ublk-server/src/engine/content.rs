//! What is loaded: chunks of an image, and pages of its index.

use super::pending::Piece;
use super::{Engine, Export, verify};
use accel_cache::{Cache, Guard};
use accel_source::{Content as Identity, FileName, RequestId, Slot};
use accel_ufs::index::{ByteRange, ChunkNo, ChunkValue, PageValue, TreePage};
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Instant;

/// Something that is loaded into a cache of its own.
pub(crate) trait Content: fmt::Display + Sized + Send + 'static {
    /// What its bytes must hash to.
    type Key: Copy + Eq + Hash + Send + 'static;

    /// The cache.
    fn cache(engine: &Engine) -> &Cache<Self::Key, Slot, Piece, Self>;

    /// The export that asked first.
    fn export(&self) -> &Arc<Export>;

    /// The file that it lies in.
    fn file(&self) -> &FileName;

    /// And where in it.
    fn range(&self) -> ByteRange;

    /// What it is, wherever it lies.
    fn identity(key: Self::Key) -> Identity;

    /// Number of the chunk, if it is one.
    fn chunk(&self) -> Option<u64> {
        None
    }

    /// When it was first asked for.
    fn since(&self) -> Instant;

    /// Which request asked first.
    fn request(&self) -> RequestId;

    /// Says what is wrong with its bytes, if anything is.
    fn check(&self, bytes: &[u8], key: Self::Key) -> Result<(), String>;

    /// Gives it to those who wait.
    fn give(engine: &Arc<Engine>, guard: Guard<Slot>, waiters: Vec<Piece>);
}

/// A chunk.
pub(crate) struct ChunkLoad {
    export: Arc<Export>,
    chunk: ChunkNo,
    since: Instant,
    request: RequestId,
}

impl ChunkLoad {
    pub(super) fn new(export: &Arc<Export>, chunk: ChunkNo, request: RequestId) -> Self {
        Self {
            export: Arc::clone(export),
            chunk,
            since: Instant::now(),
            request,
        }
    }
}

impl fmt::Display for ChunkLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {} of {}", self.chunk, self.export.image)
    }
}

impl Content for ChunkLoad {
    type Key = ChunkValue;

    fn cache(engine: &Engine) -> &Cache<ChunkValue, Slot, Piece, Self> {
        &engine.chunks
    }

    fn export(&self) -> &Arc<Export> {
        &self.export
    }

    fn file(&self) -> &FileName {
        &self.export.image
    }

    fn range(&self) -> ByteRange {
        let range = self.export.layout.chunk_range(self.chunk);
        range.unwrap_or_default()
    }

    fn identity(key: ChunkValue) -> Identity {
        Identity::Chunk(key.0)
    }

    fn chunk(&self) -> Option<u64> {
        Some(self.chunk.0)
    }

    fn since(&self) -> Instant {
        self.since
    }

    fn request(&self) -> RequestId {
        self.request
    }

    fn check(&self, bytes: &[u8], key: ChunkValue) -> Result<(), String> {
        let checked = verify::chunk(&self.export, self.chunk, bytes, key);
        checked.map_err(|error| error.to_string())
    }

    fn give(engine: &Arc<Engine>, guard: Guard<Slot>, waiters: Vec<Piece>) {
        for piece in waiters {
            engine.recent.note(piece.export.number, piece.chunk, &guard);
            piece.fill(&guard.bytes()[..guard.len()]);
            guard.served(piece.len());
        }
    }
}

/// A page of the index.
pub(crate) struct PageLoad {
    export: Arc<Export>,
    page: TreePage,
    range: ByteRange,
    since: Instant,
    request: RequestId,
}

impl PageLoad {
    pub(super) fn new(
        export: &Arc<Export>,
        page: TreePage,
        range: ByteRange,
        request: RequestId,
    ) -> Self {
        Self {
            export: Arc::clone(export),
            page,
            range,
            since: Instant::now(),
            request,
        }
    }
}

impl fmt::Display for PageLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.page, self.export.index)
    }
}

impl Content for PageLoad {
    type Key = PageValue;

    fn cache(engine: &Engine) -> &Cache<PageValue, Slot, Piece, Self> {
        &engine.pages
    }

    fn export(&self) -> &Arc<Export> {
        &self.export
    }

    fn file(&self) -> &FileName {
        &self.export.index
    }

    fn range(&self) -> ByteRange {
        self.range
    }

    fn identity(key: PageValue) -> Identity {
        Identity::Page(key.0)
    }

    fn since(&self) -> Instant {
        self.since
    }

    fn request(&self) -> RequestId {
        self.request
    }

    fn check(&self, bytes: &[u8], key: PageValue) -> Result<(), String> {
        verify::page(&self.export, self.page, bytes, key)
    }

    fn give(engine: &Arc<Engine>, guard: Guard<Slot>, mut waiters: Vec<Piece>) {
        for piece in &mut waiters {
            piece.learn(guard.bytes());
        }
        drop(guard);
        for piece in waiters {
            engine.serve(piece);
        }
    }
}
