//! The buffer of one chunk, as storage likes it.

use crate::format::CHUNK_LEN;
use std::ops::Deref;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A page of memory. Direct I/O asks for no more alignment than this anywhere.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Up to [`CHUNK_SIZE`](crate::CHUNK_SIZE) bytes that begin on a page of memory.
pub struct ChunkBuffer {
    pages: Vec<Page>,
    len: usize,
}

impl ChunkBuffer {
    /// A buffer with nothing in it.
    pub fn new() -> Self {
        Self {
            pages: vec![Page([0; 4096]); CHUNK_LEN / size_of::<Page>()],
            len: 0,
        }
    }

    /// A buffer with these bytes in it.
    ///
    /// # Panics
    /// If they are more than a chunk.
    pub fn of(bytes: &[u8]) -> Self {
        let mut buffer = Self::new();
        buffer.put(0, bytes);
        buffer
    }

    /// Forgets what is in it.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Puts `bytes` at `offset`; what there is none of before it becomes zeros.
    ///
    /// # Panics
    /// If the bytes reach beyond the end of a chunk.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.resize(self.len.max(offset));
        let end = offset + bytes.len();
        self.pages.as_mut_slice().as_mut_bytes()[offset..end].copy_from_slice(bytes);
        self.len = self.len.max(end);
    }

    /// Cuts off bytes, or appends zeros.
    ///
    /// # Panics
    /// If `len` is more than a chunk.
    pub(crate) fn resize(&mut self, len: usize) {
        if len > self.len {
            self.pages.as_mut_slice().as_mut_bytes()[self.len..len].fill(0);
        }
        self.len = len;
    }
}

impl Default for ChunkBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for ChunkBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages.as_slice().as_bytes()[..self.len]
    }
}

impl std::fmt::Debug for ChunkBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChunkBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_a_buffer_before_does_not_come_back() {
        let mut buffer = ChunkBuffer::new();
        buffer.put(0, &[7; CHUNK_LEN]);
        buffer.clear();
        buffer.put(4096, b"x");
        buffer.put(10, b"y");
        buffer.resize(CHUNK_LEN);
        let mut expected = vec![0; CHUNK_LEN];
        (expected[10], expected[4096]) = (b'y', b'x');
        assert!(buffer[..] == expected);
        assert!(buffer.as_ptr().addr().is_multiple_of(4096));
    }
}
