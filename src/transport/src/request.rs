//! The border between a transport and what serves its bytes.
//!
//! A read never blocks the thread that brings it. The transport calls
//! [`Reader::read`] from its queue thread; the reader either serves it at once
//! (everything cached) or keeps the [`Request`] and finishes it later from a
//! thread of its own.

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

/// A kernel request that waits for its bytes.
///
/// Pieces may arrive in any order and from several threads at once; each byte
/// of the request is filled exactly once before [`finish`](Request::finish)
/// reports success. Dropping a request without finishing it fails it.
///
/// Fill with verified bytes only: a piece that covers the whole request may be
/// with the kernel before `finish` is called.
pub trait Request: Send + Sync + Sized + 'static {
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

    /// Answers the kernel: all bytes are filled, or none of them counts.
    fn finish(self, result: Result<(), ReadError>);
}

/// What serves the bytes of one export.
pub trait Reader: Send + Sync + 'static {
    /// Size of the export in bytes, a multiple of 4096.
    fn size(&self) -> u64;

    /// Serves `len` bytes from `offset`. The range lies within the export:
    /// transports check what the kernel asks. Never blocks.
    fn read<R: Request>(&self, offset: u64, len: usize, request: R);
}
