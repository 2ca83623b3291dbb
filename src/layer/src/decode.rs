//! From the blob to the uncompressed tar, hashing both.
//!
//! A thread of its own reads, hashes and decompresses the blob; the caller takes
//! blocks of the tar from it, hashes them and goes on with them. What is in
//! flight between the two is bounded. A blob without compression is the tar, and
//! is hashed only once.
//!
//! The blob is read to its end whatever its stream says, because its digest is
//! over all of it. If something is wrong and a digest is expected, reading goes
//! on: bytes that are not the layer's explain any error in them.

use crate::options::{Compression, Expected};
use accel_oci::{DiffId, Digest};
use sha2::{Digest as _, Sha256};
use std::{
    io::{self, BufRead, BufReader, Read},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
};

const BLOCK: usize = 256 * 1024;
/// Blocks between the two threads.
const IN_FLIGHT: usize = 8;

/// What the blob was found to be.
#[derive(Debug, Clone, Copy)]
pub struct Blob {
    pub digest: Digest,
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
    /// The first error.
    pub error: Option<DecodeError>,
}

/// Counts and hashes what is read, and remembers errors: decoders wrap them.
struct Source<R> {
    reader: R,
    hasher: Sha256,
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
        self.hasher.update(&buffer[..len]);
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
            Compression::Zstd => Self::Zstd(zstd::Decoder::with_buffer(buffered(source))?),
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
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// A block of the tar on its way.
#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    /// These are the blob's own bytes, whose digest is the tar's too.
    hashed: bool,
}

/// The tar, block by block, on the side of the caller.
#[derive(Debug)]
pub struct Blocks {
    full: Receiver<Block>,
    empty: Sender<Vec<u8>>,
    block: Vec<u8>,
    taken: usize,
    /// Of the tar, as far as it was taken; unless the other side hashes it.
    hasher: Option<Sha256>,
    size: u64,
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

    /// The tar's digest and size, as far as it was taken; no digest if it is the
    /// blob's.
    pub fn finish(self) -> (Option<DiffId>, u64) {
        let digest = |hasher: Sha256| Digest::from_bytes(hasher.finalize().into());
        (self.hasher.map(digest).map(DiffId), self.size)
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
                Ok(Block { bytes, hashed }) => {
                    if hashed {
                        self.hasher = None;
                    } else if let Some(hasher) = &mut self.hasher {
                        hasher.update(&bytes);
                    }
                    self.size += bytes.len() as u64;
                    // The thread may have ended; then nobody wants the buffer.
                    let _ = self.empty.send(std::mem::replace(&mut self.block, bytes));
                }
                Err(_) => self.block.clear(),
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
    };
    let blocks = Blocks {
        full,
        empty,
        block: Vec::new(),
        taken: 0,
        hasher: Some(Sha256::new()),
        size: 0,
    };
    (feeder, blocks)
}

/// The thread's side.
#[derive(Debug)]
pub struct Feeder {
    full: SyncSender<Block>,
    empty: Receiver<Vec<u8>>,
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
            hasher: Sha256::new(),
            size: 0,
            limit: expected.size,
            failed: None,
            too_large: false,
        };
        let result = self.decode(&mut source, declared);
        // The blocks end here for the caller.
        drop(self);
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
            digest: Digest::from_bytes(source.hasher.finalize().into()),
            size: source.size,
        });
        Outcome { blob, error }
    }

    fn decode<R: Read>(
        &self,
        source: &mut Source<R>,
        declared: Option<Compression>,
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
        let peeked: Peeked<_> = io::Cursor::new(start).chain(source);
        let mut decoder = Decoder::new(compression, peeked).map_err(read_error)?;
        loop {
            let mut block = self.empty.try_recv().unwrap_or_default();
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
            let block = Block {
                bytes: block,
                hashed: compression == Compression::None,
            };
            if filled > 0 && self.full.send(block).is_err() {
                return Ok(Decoded::Abandoned);
            }
            if end {
                return Ok(Decoded::All);
            }
        }
    }
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
