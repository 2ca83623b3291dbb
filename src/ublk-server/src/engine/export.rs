//! A layer that is served: its geometry, its zero map, its counters.

use super::counters::{ExportCounters, TIMED};
use super::pending::{KernelRequest, Pending as _, Piece};
use super::recent::Near;
use super::verify::ZEROS;
use super::{ChunkLoad, Engine};
use accel_cache::Guard;
use accel_source::{
    FileName, Origin, Patience, RequestId, Slot, SourceError, read_checked, see_to,
};
use accel_transport::{Place, ReadError, Reader, Request};
use accel_ufs::index::{
    ByteRange, CHUNK_SIZE, ChunkNo, Header, HeaderError, ImageSize, Layout, PAGE_SIZE, Page, Root,
};
use accel_ufs::names::LayerName;
use accel_ufs::start::LayerStart;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Largest zero map that is kept: of an image of 128 GiB. Chunks beyond are read
/// like any other.
const ZERO_MAP: usize = 128 << 10;

/// Pieces that a request served at once has at most: 1 MiB at any offset.
const PIECES: usize = 9;

/// Numbers of exports, which are used once.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// Why a layer cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its index cannot be read.
    #[error("cannot read the index of {layer}: {source}")]
    Source {
        /// Which layer.
        layer: LayerName,
        /// Why.
        source: SourceError,
    },
    /// Its index is no index.
    #[error("{layer}: {file}: {source}")]
    Header {
        /// Which layer.
        layer: LayerName,
        /// Which file.
        file: FileName,
        /// What is wrong.
        source: HeaderError,
    },
    /// The index is of another image than the record.
    #[error("{layer}: {file} is the index of another image: {what} differs from what is wanted")]
    Differs {
        /// Which layer.
        layer: LayerName,
        /// Which file.
        file: FileName,
        /// What differs.
        what: &'static str,
        /// The root that the index has.
        found: Root,
    },
}

/// A layer that is served.
pub struct Export {
    /// Which layer.
    pub name: LayerName,
    /// No other export of this daemon has it, past ones included.
    pub(super) number: u64,
    /// Its image.
    pub(super) image: FileName,
    /// Its index.
    pub(super) index: FileName,
    pub(super) layout: Layout,
    /// What every byte is checked against.
    pub root: Root,
    /// Where the image's metadata lies: a hint.
    pub metadata: ByteRange,
    /// Not known before the index was opened.
    zeros: OnceLock<Zeros>,
    /// What was read for the mount, if only that was.
    start: Option<Arc<LayerStart>>,
    /// What it has done.
    pub counters: Arc<ExportCounters>,
    /// The topmost page of its index, unverified, and who gave it, until it is in the
    /// cache: it came with the header.
    top: Mutex<Option<(Box<Page>, Origin)>>,
    /// When its metadata had been fetched, and how many bytes in the background by then.
    complete: OnceLock<(Instant, u64)>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Export({}, {})", self.name, self.root)
    }
}

impl Export {
    /// Opens the layer `name` whose image has this root and size: reads the
    /// index's header and zero map, both of which are only hints, and in the same
    /// operation the page that every read needs first. Waits for the source.
    pub fn open(
        engine: &Engine,
        name: LayerName,
        root: Root,
        size: ImageSize,
        patience: Patience,
    ) -> Result<Self, OpenError> {
        let export = Self::unopened(name, root, size);
        let header = export.open_index(engine, patience)?;
        Ok(Self {
            metadata: header.metadata(),
            ..export
        })
    }

    /// A layer of which what a mount reads is known: nothing is read, but that its index
    /// is there is seen to. Waits for the source.
    pub fn begun(
        engine: &Engine,
        name: LayerName,
        start: &Arc<LayerStart>,
        patience: Patience,
    ) -> Result<Self, OpenError> {
        let export = Self::unopened(name, start.root(), start.size());
        let (source, pool) = (engine.source(), engine.arena().chunks());
        let there = see_to(source, pool, &export.index, patience);
        there.map_err(|source| OpenError::Source {
            layer: name,
            source,
        })?;
        Ok(Self {
            metadata: start.metadata(),
            start: Some(Arc::clone(start)),
            ..export
        })
    }

    fn unopened(name: LayerName, root: Root, size: ImageSize) -> Self {
        Self {
            name,
            number: NUMBERS.fetch_add(1, Relaxed),
            image: FileName::new(name.image().as_str()),
            index: FileName::new(name.index().as_str()),
            layout: Layout::new(size),
            root,
            metadata: ByteRange::default(),
            zeros: OnceLock::new(),
            start: None,
            counters: Arc::default(),
            top: Mutex::default(),
            complete: OnceLock::new(),
        }
    }

    /// Whether it was [begun](Self::begun), and its index not read yet.
    pub(super) fn lacks_index(&self) -> bool {
        self.start.is_some() && self.zeros.get().is_none()
    }

    /// Reads the header of the index, the zero map and the topmost page. Waits for the
    /// source.
    pub(super) fn open_index(
        &self,
        engine: &Engine,
        patience: Patience,
    ) -> Result<Header, OpenError> {
        let (name, root, size) = (self.name, self.root, self.image_size());
        let (index, layout) = (&self.index, &self.layout);
        let map = usize::try_from(layout.zero_map().length).unwrap_or(ZERO_MAP);
        let map = map.min(ZERO_MAP);
        // It follows the zero map, if that is read to its end. A begun layer's is in use by
        // now.
        let top = layout
            .top_page(root)
            .map(|(page, _)| layout.page_range(page));
        let top =
            top.filter(|range| self.start.is_none() && range.offset == (PAGE_SIZE + map) as u64);
        let limit = PAGE_SIZE + map + top.map_or(0, |_| PAGE_SIZE);
        let (source, pool) = (engine.source(), engine.arena().chunks());
        let check = |bytes: &[u8], origin: &Origin| {
            let wrong = |source| OpenError::Header {
                layer: name,
                file: index.clone(),
                source,
            };
            let page = bytes.get(..PAGE_SIZE);
            let page = page.and_then(|bytes| <&Page>::try_from(bytes).ok());
            let page = page.ok_or_else(|| wrong(HeaderError::Magic))?;
            let header = Header::parse(page).map_err(wrong)?;
            for (what, same) in [
                ("its root", header.root() == root),
                ("its size", header.image_size() == size),
            ] {
                if !same {
                    return Err(OpenError::Differs {
                        layer: name,
                        file: index.clone(),
                        what,
                        found: header.root(),
                    });
                }
            }
            Ok((header, bytes.to_vec(), origin.clone()))
        };
        let read = read_checked(source, pool, index, limit, patience, check);
        let (header, bytes, origin) = read.map_err(|source| OpenError::Source {
            layer: name,
            source,
        })??;
        let counters = &self.counters;
        counters.source_bytes.fetch_add(bytes.len() as u64, Relaxed);
        // One that is cut off is read like other pages.
        let top = top.and_then(|_| {
            let page = bytes.get(PAGE_SIZE + map..)?;
            Some((Box::new(*<&Page>::try_from(page).ok()?), origin))
        });
        *self.top.lock().unwrap_or_else(PoisonError::into_inner) = top;
        let zeros = &bytes[PAGE_SIZE..bytes.len().min(PAGE_SIZE + map)];
        let _ = self.zeros.set(Zeros::new(zeros));
        Ok(header)
    }

    /// A layer that was opened by an earlier daemon. Nothing is read: its zeros
    /// are read like other bytes, and its metadata is not fetched ahead.
    pub fn recovered(name: LayerName, root: Root, size: ImageSize) -> Self {
        Self::unopened(name, root, size)
    }

    /// Whether the index says that the chunk is all zeros, and is not known to be wrong.
    pub(super) fn says_zeros(&self, chunk: ChunkNo) -> bool {
        self.zeros.get().is_some_and(|zeros| zeros.says(chunk))
    }

    /// Whether a verifier has found that the chunk is all zeros.
    pub(super) fn is_verified_zeros(&self, chunk: ChunkNo) -> bool {
        self.zeros
            .get()
            .is_some_and(|zeros| zeros.is_verified(chunk))
    }

    /// The chunk is all zeros, or is not.
    pub(super) fn found_zeros(&self, chunk: ChunkNo, zeros: bool) {
        match self.zeros.get() {
            Some(map) if zeros => map.verified(chunk),
            Some(map) => map.refuted(chunk),
            None => {}
        }
    }

    /// The bytes at `offset`, if they are of one block that came before the mount.
    fn started(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let number = offset / PAGE_SIZE as u64;
        let mut blocks = self.start.as_ref()?.blocks();
        let block = blocks.find(|block| block.number == number)?;
        // Less than a block.
        let from = usize::try_from(offset % PAGE_SIZE as u64).unwrap_or(0);
        block.bytes.get(from..from.checked_add(len)?)
    }

    /// When all of its metadata, or as much as is fetched ahead, had been.
    pub fn complete(&self) -> Option<Instant> {
        self.complete.get().map(|(at, _)| *at)
    }

    /// Bytes of it that were read in the background until its metadata was complete, so
    /// far if it is not.
    pub fn metadata_bytes(&self) -> u64 {
        let now = || self.counters.background_bytes.load(Relaxed);
        self.complete.get().map_or_else(now, |(_, bytes)| *bytes)
    }

    pub(super) fn is_complete(&self) {
        let bytes = self.counters.background_bytes.load(Relaxed);
        let _ = self.complete.set((Instant::now(), bytes));
    }

    /// The topmost page of its index, if it came with the header; once.
    pub(super) fn take_top(&self) -> Option<(Box<Page>, Origin)> {
        let mut top = self.top.lock().unwrap_or_else(PoisonError::into_inner);
        top.take()
    }

    /// Names what the daemon does for the export by itself.
    pub(super) fn background(&self) -> RequestId {
        RequestId::new(self.number, 0)
    }

    /// Names what is read before the kernel asks for it, as it soon will.
    pub(super) fn expected(&self) -> RequestId {
        RequestId::new(self.number, u64::MAX)
    }

    /// Size of the image.
    pub fn image_size(&self) -> ImageSize {
        self.layout.image_size()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.layout.image_size().bytes()
    }
}

/// Chunks of zeros: what the index says, and what was verified.
struct Zeros {
    /// The index's bits; a bit is cleared when it turns out wrong.
    said: Box<[AtomicU8]>,
    verified: Box<[AtomicU8]>,
}

impl Zeros {
    fn new(map: &[u8]) -> Self {
        Self {
            said: map.iter().copied().map(AtomicU8::new).collect(),
            verified: map.iter().map(|_| AtomicU8::new(0)).collect(),
        }
    }

    fn place(chunk: ChunkNo) -> (usize, u8) {
        let byte = usize::try_from(chunk.0 / 8).unwrap_or(usize::MAX);
        (byte, 1 << (chunk.0 % 8))
    }

    /// Whether the index says that the chunk is all zeros, and is not known to be
    /// wrong.
    fn says(&self, chunk: ChunkNo) -> bool {
        let (byte, bit) = Self::place(chunk);
        let said = self.said.get(byte);
        said.is_some_and(|said| said.load(Relaxed) & bit != 0)
    }

    /// Whether a verifier has found that it is.
    fn is_verified(&self, chunk: ChunkNo) -> bool {
        let (byte, bit) = Self::place(chunk);
        let verified = self.verified.get(byte);
        verified.is_some_and(|verified| verified.load(Relaxed) & bit != 0)
    }

    fn verified(&self, chunk: ChunkNo) {
        let (byte, bit) = Self::place(chunk);
        if let Some(verified) = self.verified.get(byte) {
            verified.fetch_or(bit, Relaxed);
        }
    }

    fn refuted(&self, chunk: ChunkNo) {
        let (byte, bit) = Self::place(chunk);
        if let Some(said) = self.said.get(byte) {
            said.fetch_and(!bit, Relaxed);
        }
    }
}

/// What a transport reads an export through.
#[derive(Debug)]
pub struct ExportReader {
    engine: Arc<Engine>,
    export: Arc<Export>,
}

impl ExportReader {
    /// Serves `export` with `engine`.
    pub fn new(engine: &Arc<Engine>, export: &Arc<Export>) -> Self {
        engine.ledger.enter(&export.counters);
        Self {
            engine: Arc::clone(engine),
            export: Arc::clone(export),
        }
    }

    /// The export.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }
}

/// Where a piece's bytes lie.
enum Cached {
    Chunk(Guard<Slot>),
    Zeros,
}

impl Cached {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Chunk(guard) => &guard.bytes()[..guard.len()],
            Self::Zeros => &ZEROS,
        }
    }
}

/// The parts of a range, by chunk: the chunk, where the part starts in it, and its
/// length, bytes.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (ChunkNo, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at as u64;
        // Less than a chunk.
        let start = usize::try_from(position % CHUNK_SIZE as u64).unwrap_or(0);
        let part = (CHUNK_SIZE - start).min(len - at);
        at += part;
        Some((ChunkNo::containing(position), start, part))
    })
}

impl ExportReader {
    /// Serves a request whose every chunk is known and in memory: how many of them the
    /// cache had. None if not all are, and then nothing has happened. What has been served
    /// once is served again by way of this: no page is walked, nothing is hashed or
    /// allocated, and all bytes go to the kernel in one call. `find` finds the entries of
    /// chunks.
    fn read_known(
        &self,
        offset: u64,
        len: usize,
        find: impl FnMut(ChunkNo) -> Option<Guard<Slot>>,
        place: &impl Place,
    ) -> io::Result<Option<u64>> {
        // Less than a chunk.
        let start = usize::try_from(offset % CHUNK_SIZE as u64).unwrap_or(0);
        let hits = if start + len <= CHUNK_SIZE {
            self.fill_from_one(ChunkNo::containing(offset), start, len, find, place)
        } else {
            self.fill_from_many(offset, len, find, place)
        };
        // A guard may have been the last to hold an entry's memory.
        self.engine.start_waiting::<ChunkLoad>();
        hits
    }

    /// What [`read_known`](Self::read_known) does with a request within one chunk, as
    /// most of the small ones are: it makes no list of one.
    fn fill_from_one(
        &self,
        chunk: ChunkNo,
        start: usize,
        len: usize,
        find: impl FnMut(ChunkNo) -> Option<Guard<Slot>>,
        place: &impl Place,
    ) -> io::Result<Option<u64>> {
        let Some(cached) = self.known(chunk, find) else {
            return Ok(None);
        };
        let Some(bytes) = cached.bytes().get(start..start + len) else {
            return Ok(None);
        };
        place.fill_from(&[IoSlice::new(bytes)])?;
        let Cached::Chunk(guard) = &cached else {
            return Ok(Some(0));
        };
        guard.served(len);
        Ok(Some(1))
    }

    /// The same with one of any length.
    fn fill_from_many(
        &self,
        offset: u64,
        len: usize,
        mut find: impl FnMut(ChunkNo) -> Option<Guard<Slot>>,
        place: &impl Place,
    ) -> io::Result<Option<u64>> {
        let mut found: [Option<(Cached, usize, usize)>; PIECES] = [const { None }; PIECES];
        let mut hits = 0;
        for (at, (chunk, start, part)) in parts(offset, len).enumerate() {
            let Some(piece) = found.get_mut(at) else {
                return Ok(None);
            };
            let Some(cached) = self.known(chunk, &mut find) else {
                return Ok(None);
            };
            if cached.bytes().len() < start + part {
                return Ok(None);
            }
            hits += u64::from(matches!(cached, Cached::Chunk(_)));
            *piece = Some((cached, start, part));
        }
        let mut slices = [IoSlice::new(&[]); PIECES];
        let mut count = 0;
        for (cached, start, part) in found.iter().flatten() {
            slices[count] = IoSlice::new(&cached.bytes()[*start..*start + *part]);
            count += 1;
        }
        place.fill_from(&slices[..count])?;
        for (cached, _, part) in found.iter().flatten() {
            if let Cached::Chunk(guard) = cached {
                guard.served(*part);
            }
        }
        Ok(Some(hits))
    }

    /// Where the bytes of a chunk lie that was served before, if they are still in memory.
    fn known(
        &self,
        chunk: ChunkNo,
        mut find: impl FnMut(ChunkNo) -> Option<Guard<Slot>>,
    ) -> Option<Cached> {
        find(chunk).map(Cached::Chunk).or_else(|| {
            let export = &self.export;
            let zeros = export.says_zeros(chunk) && export.is_verified_zeros(chunk);
            zeros.then_some(Cached::Zeros)
        })
    }

    /// Counts requests that were served from what is [known](Self::read_known).
    fn count(&self, tally: &Tally) {
        let counters = &self.export.counters;
        self.engine.chunks.followed(tally.hits);
        counters.hits.fetch_add(tally.hits, Relaxed);
        counters.served_bytes.fetch_add(tally.bytes, Relaxed);
    }
}

/// What a queue thread keeps between requests.
#[derive(Default)]
pub struct Kept {
    near: Near,
    /// What the reader that has this has not counted yet.
    tally: Tally,
    /// Requests until one is timed again.
    until_timed: u64,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept({:?})", self.tally)
    }
}

/// Requests that were served from memory.
#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    hits: u64,
    bytes: u64,
}

fn not_handed(error: &io::Error) -> ReadError {
    let reason = format!("cannot hand bytes to the kernel: {error}");
    ReadError { reason }
}

impl Reader for ExportReader {
    type Kept = Kept;

    fn size(&self) -> u64 {
        self.export.size()
    }

    fn read_at_once(
        &self,
        offset: u64,
        len: usize,
        kept: &mut Kept,
        place: &impl Place,
    ) -> Result<bool, ReadError> {
        // Whoever follows single requests wants to know their numbers.
        if tracing::enabled!(tracing::Level::TRACE) {
            return Ok(false);
        }
        let Kept {
            near,
            tally,
            until_timed,
        } = kept;
        let came = (*until_timed <= 1).then(Instant::now);
        let find = |chunk| near.find(&self.engine.recent, self.export.number, chunk);
        match self.read_known(offset, len, find, place) {
            Ok(Some(hits)) => {
                tally.requests += 1;
                tally.hits += hits;
                tally.bytes += len as u64;
                *until_timed = until_timed.saturating_sub(1);
                if let Some(came) = came {
                    *until_timed = TIMED;
                    self.export.counters.from_memory.record(came.elapsed());
                }
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => {
                tally.requests += 1;
                self.export.counters.errors.fetch_add(1, Relaxed);
                Err(not_handed(&error))
            }
        }
    }

    fn settle(&self, kept: &mut Kept) {
        let tally = mem::take(&mut kept.tally);
        if tally.requests > 0 {
            let requests = &self.export.counters.requests;
            requests.fetch_add(tally.requests, Relaxed);
            self.count(&tally);
        }
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        let counters = &self.export.counters;
        let number = counters.requests.fetch_add(1, Relaxed) + 1;
        let id = RequestId::new(self.export.number, number);
        tracing::trace!(request = %id, layer = %self.export.name, offset, len, "read");
        let came = number.is_multiple_of(TIMED).then(Instant::now);
        // What is in the cache is found sooner than what came before the mount, which has
        // to be looked for.
        let find = |chunk| self.engine.recent.find(self.export.number, chunk);
        let known = match self.read_known(offset, len, find, &request) {
            Ok(Some(hits)) => {
                let bytes = len as u64;
                self.count(&Tally {
                    requests: 1,
                    hits,
                    bytes,
                });
                Ok(true)
            }
            Ok(None) => match self.export.started(offset, len) {
                Some(bytes) => {
                    counters.served_bytes.fetch_add(len as u64, Relaxed);
                    request.fill_from(&[IoSlice::new(bytes)]).map(|()| true)
                }
                None => Ok(false),
            },
            Err(error) => Err(error),
        };
        match known {
            Ok(true) => {
                request.finish(Ok(()));
                if let Some(came) = came {
                    counters.from_memory.record(came.elapsed());
                }
                tracing::trace!(request = %id, ok = true, "answered to the kernel");
                return;
            }
            Ok(false) => {}
            Err(error) => {
                counters.errors.fetch_add(1, Relaxed);
                return request.finish(Err(not_handed(&error)));
            }
        }
        let pending = KernelRequest::new(request, len, id, came, &self.engine, &self.export);
        let pending = Arc::new(pending);
        let mut at = 0;
        let mut missed: Option<(u64, u64)> = None;
        for (chunk, start, part) in parts(offset, len) {
            let walk = match self.export.layout.walk(self.export.root, chunk) {
                Ok(walk) => walk,
                Err(error) => return pending.fail(&error.to_string()),
            };
            let piece = Piece {
                pending: pending.clone(),
                export: Arc::clone(&self.export),
                chunk,
                walk,
                start,
                len: part,
                at,
            };
            at += part;
            if self.engine.serve(piece) {
                missed = Some((missed.map_or(chunk.0, |(first, _)| first), chunk.0));
            }
        }
        if let Some((first, last)) = missed {
            self.engine.read_around(&self.export, first..=last);
        }
    }
}
