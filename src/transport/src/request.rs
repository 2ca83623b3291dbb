//! The border between a transport and what serves its bytes.
//!
//! A read never blocks the thread that brings it. The transport calls
//! [`Reader::read`] from its queue thread; the reader either serves it at once
//! (everything cached) or keeps the [`Request`] and finishes it later from a
//! thread of its own. To be kept a request needs owners that are counted, which one that
//! is served at once does not: a transport may ask for that first, with
//! [`Reader::read_at_once`].

use std::io::{self, IoSlice};

/// Why a request could not be served. The kernel sees `EIO`; the log has the reason.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct ReadError {
    /// What went wrong, naming layer, chunk, file and source.
    pub reason: String,
}

impl ReadError {
    /// A request that is finished without having been filled would hand out
    /// whatever lay in its memory.
    pub(crate) fn unless_full(filled: usize, len: usize) -> Result<(), ReadError> {
        if filled == len {
            return Ok(());
        }
        let reason = format!("the reader filled {filled} of {len} bytes");
        Err(ReadError { reason })
    }
}

/// Where the bytes of a kernel request go.
///
/// Fill with verified bytes only: a piece that covers the whole request may be
/// with the kernel before the request is answered.
pub trait Place {
    /// Copies `bytes` to offset `at` (in bytes, from the start of the request).
    /// This is the one copy a cached byte makes in user space.
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// Copies all bytes of the request, which lie in `parts`, in this order.
    fn fill_from(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut at = 0;
        for part in parts {
            self.fill(at, part)?;
            at += part.len();
        }
        Ok(())
    }
}

/// A kernel request that waits for its bytes.
///
/// Pieces may arrive in any order and from several threads at once; each byte
/// of the request is filled exactly once before [`finish`](Request::finish)
/// reports success. Dropping a request without finishing it fails it.
pub trait Request: Place + Send + Sync + Sized + 'static {
    /// Answers the kernel: all bytes are filled, or none of them counts.
    fn finish(self, result: Result<(), ReadError>);
}

/// What serves the bytes of one export.
pub trait Reader: Send + Sync + 'static {
    /// What a thread that brings requests keeps between them, for all readers of this
    /// kind and for nobody else: what lies here needs neither lock nor atomic operation.
    type Kept: Default;

    /// Size of the export in bytes, a multiple of 4096.
    fn size(&self) -> u64;

    /// Serves `len` bytes from `offset`, if they are at hand; if not, says so, and nothing
    /// has happened. Then, and whenever a transport does not ask this first,
    /// [`read`](Reader::read) serves them. The range lies within the export. Never blocks.
    ///
    /// What is to be counted may wait in `kept` for [`settle`](Reader::settle).
    ///
    /// # Errors
    /// The request has failed.
    fn read_at_once(
        &self,
        _offset: u64,
        _len: usize,
        _kept: &mut Self::Kept,
        _place: &impl Place,
    ) -> Result<bool, ReadError> {
        Ok(false)
    }

    /// Called after neighbouring calls of [`read_at_once`](Reader::read_at_once) on this
    /// reader, before the kernel hears of what they served and before another reader gets
    /// the same `kept`.
    fn settle(&self, _kept: &mut Self::Kept) {}

    /// Serves `len` bytes from `offset`. The range lies within the export:
    /// transports check what the kernel asks. Never blocks.
    fn read<R: Request>(&self, offset: u64, len: usize, request: R);
}
