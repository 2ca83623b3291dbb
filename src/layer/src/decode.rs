//! From the blob to the uncompressed tar, hashing both.
//!
//! A thread of its own reads, hashes and decompresses the blob; the caller takes
//! blocks of the tar from it, and another thread hashes the same blocks: a digest is
//! what takes longest where nothing is to be decompressed. A blob without compression
//! is the tar, and is hashed only there. What is in flight is bounded.
//!
//! The blob is read to its end whatever its stream says, because its digest is
//! over all of it. If something is wrong and a digest is expected, reading goes
//! on: bytes that are not the layer's explain any error in them.

use crate::options::{Compression, Expected};
use accel_oci::{DiffId, Digest};
use sha2::{Digest as _, Sha256};
use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

const BLOCK: usize = 128 * 1024;
/// Blocks between two threads: few, so that they stay in the processor's cache.
const IN_FLIGHT: usize = 4;

/// The longest window of a zstd frame, as a power of two: 2 GiB, what zstd itself
/// makes at most (`--long=31`). containerd reads up to 512 MiB. The decoder holds as
/// much of what it gave last as the window is long, and no more than it gave.
const MAX_WINDOW_LOG: u32 = 31;

/// What the blob was found to be.
#[derive(Debug, Clone, Copy)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

/// The tar as far as the caller took it, which is all of it if nothing failed and the
/// caller took it to its end.
#[derive(Debug, Clone, Copy)]
pub struct Tar {
    pub diff_id: DiffId,
    pub size: u64,
}

/// Why the tar did not come.
#[derive(Debug)]
pub enum DecodeError {
    Read {
        offset: u64,
        source: io::Error,
    },
    Size {
        found: u64,
    },
    Compression {
        found: Compression,
    },
    Decompress {
        compression: Compression,
        offset: u64,
        source: io::Error,
    },
}

/// What became of the decoding thread.
#[derive(Debug)]
pub struct Outcome {
    /// Nothing if reading did not get to the end.
    pub blob: Option<Blob>,
    /// What came of the tar.
    pub tar: Tar,
    /// The first error.
    pub error: Option<DecodeError>,
}

/// Counts and hashes what is read, and remembers errors: decoders wrap them.
struct Source<R> {
    reader: R,
    /// `None` if what is read is the tar.
    hasher: Option<Sha256>,
    size: u64,
    limit: Option<u64>,
    failed: Option<io::Error>,
    too_large: bool,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.failed.is_some() || self.too_large {
            return Err(io::Error::other("the blob cannot be read any further"));
        }
        let len = loop {
            match self.reader.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.failed = Some(error);
                    return Err(io::Error::other("the blob cannot be read any further"));
                }
                Ok(len) => break len,
            }
        };
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..len]);
        }
        self.size += len as u64;
        if self.limit.is_some_and(|limit| self.size > limit) {
            self.too_large = true;
            return Err(io::Error::other("the blob is larger than announced"));
        }
        Ok(len)
    }
}

/// Bytes that were read to look at them, then the rest.
type Peeked<R> = io::Chain<io::Cursor<Vec<u8>>, R>;

enum Decoder<R: Read> {
    Plain(R),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<R>>>),
    Zstd(zstd::Decoder<'static, BufReader<R>>),
}

impl<R: Read> Decoder<R> {
    fn new(compression: Compression, source: R) -> io::Result<Self> {
        let buffered = |source| BufReader::with_capacity(BLOCK, source);
        Ok(match compression {
            Compression::None => Self::Plain(source),
            Compression::Gzip => Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(
                buffered(source),
            ))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(buffered(source))?;
                decoder.window_log_max(MAX_WINDOW_LOG)?;
                Self::Zstd(decoder)
            }
        })
    }

    fn into_source(self) -> R {
        match self {
            Self::Plain(source) => source,
            Self::Gzip(decoder) => decoder.into_inner().into_inner(),
            Self::Zstd(decoder) => decoder.finish().into_inner(),
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer).map_err(zstd_error),
        }
    }
}

/// Says what libzstd's words for it mean here.
fn zstd_error(error: io::Error) -> io::Error {
    let problem = match error.to_string().as_str() {
        "Frame requires too much memory for decoding" => {
            "a frame's window is longer than 2 GiB, the most that zstd makes (--long=31); compress the layer again with a shorter one"
        }
        "Allocation error : not enough memory" => {
            "not enough memory for a frame's window (zstd --long), which is held as a whole; compress the layer again with a shorter one, or convert it where there is more memory"
        }
        _ => return error,
    };
    io::Error::other(problem)
}

/// A block of the tar, for the caller and for who hashes it.
type Block = Arc<Vec<u8>>;

/// The tar, block by block, on the side of the caller.
#[derive(Debug)]
pub struct Blocks {
    full: Receiver<Block>,
    empty: Sender<Block>,
    block: Block,
    taken: usize,
}

impl Blocks {
    /// Takes all that is left; gives up, and says so, when it is more than `limit`.
    pub fn drain(&mut self, limit: u64) -> bool {
        let mut left = limit;
        while let Ok(bytes @ [_, ..]) = self.fill_buf() {
            let len = bytes.len() as u64;
            if len > left {
                return false;
            }
            left -= len;
            self.taken = self.block.len();
        }
        true
    }
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(buffer.len());
        buffer[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}

impl BufRead for Blocks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.taken == self.block.len() {
            self.taken = 0;
            match self.full.recv() {
                Ok(block) => {
                    // The thread may have ended; then nobody wants the buffer.
                    let _ = self.empty.send(std::mem::replace(&mut self.block, block));
                }
                Err(_) => self.block = Block::default(),
            }
        }
        Ok(&self.block[self.taken..])
    }

    fn consume(&mut self, len: usize) {
        self.taken += len;
    }
}

/// Two ends: the thread's work, and the blocks that come of it.
pub fn pair() -> (Feeder, Blocks) {
    let (full_sender, full) = sync_channel(IN_FLIGHT);
    let (empty, empty_receiver) = channel();
    let feeder = Feeder {
        full: full_sender,
        empty: empty_receiver,
        idle: VecDeque::new(),
    };
    let blocks = Blocks {
        full,
        empty,
        block: Block::default(),
        taken: 0,
    };
    (feeder, blocks)
}

/// The thread's side.
#[derive(Debug)]
pub struct Feeder {
    full: SyncSender<Block>,
    empty: Receiver<Block>,
    /// Came back from the caller; some may not be hashed yet.
    idle: VecDeque<Block>,
}

impl Feeder {
    /// Reads and decompresses `reader` until its end, or until nobody takes
    /// the blocks any more.
    pub fn run<R: Read>(
        self,
        reader: R,
        declared: Option<Compression>,
        expected: &Expected,
    ) -> Outcome {
        let mut source = Source {
            reader,
            hasher: Some(Sha256::new()),
            size: 0,
            limit: expected.size,
            failed: None,
            too_large: false,
        };
        let (result, tar) = self.decode_and_hash(&mut source, declared);
        let wanted = expected.digest.is_some() || expected.size.is_some();
        let mut decoded = None;
        let complete = match result {
            Ok(Decoded::All) => drain(&mut source),
            Ok(Decoded::Abandoned) => false,
            Err(error) => {
                decoded = Some(error);
                wanted && drain(&mut source)
            }
        };
        let offset = source.size;
        let error = match (source.failed, source.too_large) {
            (Some(source), _) => Some(DecodeError::Read { offset, source }),
            (None, true) => Some(DecodeError::Size { found: offset }),
            (None, false) => decoded,
        };
        let blob = complete.then(|| Blob {
            // All of a blob that is the tar came through as blocks.
            digest: source.hasher.map_or(tar.diff_id.0, finish),
            size: source.size,
        });
        Outcome { blob, tar, error }
    }

    /// Makes the blocks; they end for the caller when this returns.
    fn decode_and_hash<R: Read>(
        mut self,
        source: &mut Source<R>,
        declared: Option<Compression>,
    ) -> (Result<Decoded, DecodeError>, Tar) {
        let (to_hash, blocks) = sync_channel(IN_FLIGHT);
        thread::scope(|scope| {
            let hashing = scope.spawn(|| hash(blocks));
            let result = self.decode(source, declared, &to_hash);
            drop((self, to_hash));
            // It returns whatever happens; a panic in it goes on here.
            let tar = hashing.join();
            (
                result,
                tar.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        })
    }

    /// A block that nobody has any more.
    fn block(&mut self) -> Block {
        self.idle.extend(self.empty.try_iter());
        let free = self.idle.iter_mut().position(|b| Arc::get_mut(b).is_some());
        free.and_then(|free| self.idle.remove(free))
            .unwrap_or_default()
    }

    fn decode<R: Read>(
        &mut self,
        source: &mut Source<R>,
        declared: Option<Compression>,
        to_hash: &SyncSender<Block>,
    ) -> Result<Decoded, DecodeError> {
        let read_error = |source| DecodeError::Read { offset: 0, source };
        let mut start = Vec::with_capacity(4);
        source
            .by_ref()
            .take(4)
            .read_to_end(&mut start)
            .map_err(read_error)?;
        let found = Compression::detect(&start);
        let compression = declared.unwrap_or(found);
        if compression != found {
            return Err(DecodeError::Compression { found });
        }
        if compression == Compression::None {
            source.hasher = None;
        }
        let peeked: Peeked<_> = io::Cursor::new(start).chain(source);
        let mut decoder = Decoder::new(compression, peeked).map_err(read_error)?;
        loop {
            let mut shared = self.block();
            let block = Arc::make_mut(&mut shared);
            block.resize(BLOCK, 0);
            let mut filled = 0;
            let mut end = false;
            while filled < BLOCK && !end {
                match decoder.read(&mut block[filled..]) {
                    Ok(0) => end = true,
                    Ok(len) => filled += len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        let (_, source) = decoder.into_source().into_inner();
                        return Err(DecodeError::Decompress {
                            compression,
                            offset: source.size,
                            source: error,
                        });
                    }
                }
            }
            block.truncate(filled);
            if filled > 0 {
                // Only a panic ends that thread early, and is seen when it is joined.
                let _ = to_hash.send(shared.clone());
                if self.full.send(shared).is_err() {
                    return Ok(Decoded::Abandoned);
                }
            }
            if end {
                return Ok(Decoded::All);
            }
        }
    }
}

/// Digest and size of what the blocks hold.
fn hash(blocks: Receiver<Block>) -> Tar {
    let mut hasher = Sha256::new();
    let mut size = 0;
    for block in blocks {
        hasher.update(&*block);
        size += block.len() as u64;
    }
    Tar {
        diff_id: DiffId(finish(hasher)),
        size,
    }
}

fn finish(hasher: Sha256) -> Digest {
    Digest::from_bytes(hasher.finalize().into())
}

/// How decoding ended without an error.
enum Decoded {
    All,
    Abandoned,
}

/// Reads what is left; says whether that was possible.
fn drain<R: Read>(source: &mut Source<R>) -> bool {
    io::copy(source, &mut io::sink()).is_ok()
}
