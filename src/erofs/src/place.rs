//! Pass 1: where data lies, and whole chunks for the output.
//!
//! Small files (less than a chunk) follow each other on block boundaries. A file
//! of a chunk or more starts on the next chunk boundary. The room this leaves
//! before it becomes *the open gap*: the first later small file that fits goes
//! to its start, and so on, until it is full or the next large file leaves
//! another gap, which takes its place. An empty file takes no room.
//!
//! A chunk is given to the output as soon as nothing more can be placed in it.
//! So at most three are held: chunk 0, which will have the superblock, the chunk
//! of the open gap, and the one at the cursor.

use crate::{
    chunk::ChunkBuffer,
    format::{BLOCK_LEN, BLOCK_SIZE, CHUNK_LEN, CHUNK_SIZE},
    write::{Output, WriteError},
};
use std::ops::Range;

/// Where a file's data lies: made by [`FileWriter::finish`], for this image only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    start: u64,
    size: u64,
}

impl Extent {
    /// The data of an empty file.
    pub const EMPTY: Self = Self { start: 0, size: 0 };

    /// Offset of the first byte in the image; 0 for an empty file.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Bytes of the file.
    pub const fn size(self) -> u64 {
        self.size
    }
}

/// A chunk that is not full yet.
#[derive(Debug)]
struct OpenChunk {
    index: u64,
    bytes: ChunkBuffer,
}

/// Places data and gives whole chunks to the output.
#[derive(Debug)]
pub(crate) struct Placer<O> {
    output: O,
    limit: u64,
    /// First free byte behind everything placed so far; on a block.
    cursor: u64,
    /// The open gap: on blocks, within one chunk, up to that chunk's end.
    gap: Option<Range<u64>>,
    open: Vec<OpenChunk>,
    /// Buffers of chunks that were written, for the next ones.
    spare: Vec<ChunkBuffer>,
    /// A file was begun and not finished.
    unfinished: bool,
}

impl<O: Output> Placer<O> {
    /// Block 0 is the superblock's; an image of more than `limit` bytes is refused.
    pub fn new(output: O, limit: u64) -> Self {
        // The superblock counts blocks with 32 bits.
        let limit = limit.min(BLOCK_SIZE * u64::from(u32::MAX));
        let mut placer = Self {
            output,
            limit,
            cursor: BLOCK_SIZE,
            gap: None,
            open: Vec::with_capacity(3),
            spare: Vec::new(),
            unfinished: false,
        };
        placer.chunk(0);
        placer
    }

    /// The first free byte behind all data.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    fn check(&self, end: Option<u64>) -> Result<u64, WriteError<O::Error>> {
        match end {
            Some(end) if end <= self.limit => Ok(end),
            _ => Err(WriteError::TooLarge { limit: self.limit }),
        }
    }

    pub fn begin(&mut self, size: u64) -> Result<FileWriter<'_, O>, WriteError<O::Error>> {
        if self.unfinished {
            return Err(WriteError::Unfinished);
        }
        let room = size.checked_next_multiple_of(BLOCK_SIZE);
        let room = self.check(room)?;
        let mut in_gap = false;
        let start = if size == 0 {
            0
        } else if let Some(gap) = self.gap.as_mut().filter(|gap| room <= gap.end - gap.start) {
            let start = gap.start;
            gap.start += room;
            in_gap = true;
            start
        } else {
            let mut start = self.cursor;
            if size >= CHUNK_SIZE {
                start = self.cursor.next_multiple_of(CHUNK_SIZE);
            }
            let end = self.check(start.checked_add(room))?;
            if start > self.cursor {
                self.gap = Some(self.cursor..start);
                self.seal(self.cursor)?;
            }
            self.cursor = end;
            start
        };
        self.unfinished = true;
        Ok(FileWriter {
            placer: self,
            extent: Extent { start, size },
            in_gap,
            written: 0,
        })
    }

    /// Writes bytes of the region before the cursor. All bytes of a region are
    /// written in ascending order.
    fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<(), WriteError<O::Error>> {
        while !bytes.is_empty() {
            let (index, within) = (offset / CHUNK_SIZE, offset % CHUNK_SIZE);
            let room = CHUNK_SIZE - within;
            let len = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (piece, rest) = bytes.split_at(len);
            // `within` is less than a chunk, which fits any usize we run on.
            let within = usize::try_from(within).unwrap_or(usize::MAX);
            self.chunk(index).put(within, piece);
            offset += len as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// The buffer of a chunk that is not full yet.
    fn chunk(&mut self, index: u64) -> &mut ChunkBuffer {
        let position = self.open.iter().position(|chunk| chunk.index == index);
        let position = position.unwrap_or_else(|| {
            let mut bytes = self.spare.pop().unwrap_or_default();
            bytes.clear();
            self.open.push(OpenChunk { index, bytes });
            self.open.len() - 1
        });
        &mut self.open[position].bytes
    }

    /// Gives away the chunks before `position` in which nothing more can be placed.
    fn seal(&mut self, position: u64) -> Result<(), WriteError<O::Error>> {
        let gap = self.gap.clone().filter(|gap| !gap.is_empty());
        let gap_chunk = gap.map(|gap| gap.start / CHUNK_SIZE);
        self.seal_where(u64::MAX, |index| {
            index != 0 && index < position / CHUNK_SIZE && Some(index) != gap_chunk
        })
    }

    /// `size` is the image's, which may end within a chunk.
    fn seal_where(
        &mut self,
        size: u64,
        done: impl Fn(u64) -> bool,
    ) -> Result<(), WriteError<O::Error>> {
        // Chunks are few; the lowest goes first, so that the order is ascending
        // but for the held ones.
        while let Some(position) = (0..self.open.len())
            .filter(|&position| done(self.open[position].index))
            .min_by_key(|&position| self.open[position].index)
        {
            let OpenChunk { index, mut bytes } = self.open.swap_remove(position);
            let offset = index * CHUNK_SIZE;
            let end = size.saturating_sub(offset).min(CHUNK_SIZE);
            bytes.resize(usize::try_from(end).unwrap_or(CHUNK_LEN));
            let spare = self.output.write_chunk(offset, bytes);
            let spare = spare.map_err(|source| WriteError::Output { offset, source })?;
            self.spare.push(spare);
        }
        Ok(())
    }

    /// Ends pass 1: what comes now is metadata, from the cursor on.
    pub fn into_tail(mut self, size: u64) -> Result<Tail<O>, WriteError<O::Error>> {
        if self.unfinished {
            return Err(WriteError::Unfinished);
        }
        self.gap = None;
        self.check(self.cursor.checked_add(size))?;
        Ok(Tail {
            position: self.cursor,
            placer: self,
        })
    }
}

/// The end of the image, written in order, and block 0.
#[derive(Debug)]
pub(crate) struct Tail<O> {
    placer: Placer<O>,
    position: u64,
}

impl<O: Output> Tail<O> {
    /// Offset in the image of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError<O::Error>> {
        self.placer.write(self.position, bytes)?;
        self.position += bytes.len() as u64;
        self.placer.seal(self.position)
    }

    /// Leaves zeros up to `position`, which is less than a chunk away.
    pub fn pad_to(&mut self, position: u64) -> Result<(), WriteError<O::Error>> {
        const ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
        while self.position < position {
            let len = (position - self.position).min(BLOCK_SIZE);
            self.write(&ZEROS[..usize::try_from(len).unwrap_or(0)])?;
        }
        Ok(())
    }

    /// Puts `bytes` into block 0 and gives away the last chunks, chunk 0 last.
    pub fn finish(mut self, offset: usize, bytes: &[u8]) -> Result<O, WriteError<O::Error>> {
        let size = self.position;
        self.placer.chunk(0).put(offset, bytes);
        self.placer.seal_where(size, |index| index != 0)?;
        self.placer.seal_where(size, |_| true)?;
        Ok(self.placer.output)
    }
}

/// Takes the bytes of one file: exactly as many as were announced.
#[derive(Debug)]
#[must_use = "a file that is not finished makes the image unusable"]
pub struct FileWriter<'a, O> {
    placer: &'a mut Placer<O>,
    extent: Extent,
    in_gap: bool,
    written: u64,
}

impl<O: Output> FileWriter<'_, O> {
    /// Appends bytes of the file.
    ///
    /// # Errors
    /// More bytes than announced, or the output's error.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError<O::Error>> {
        let size = self.extent.size;
        if bytes.len() as u64 > size - self.written {
            return Err(WriteError::FileSize {
                announced: size,
                came: self.written + bytes.len() as u64,
            });
        }
        self.placer.write(self.extent.start + self.written, bytes)?;
        self.written += bytes.len() as u64;
        // What lies in the gap is behind the chunk at the cursor.
        if !self.in_gap {
            self.placer.seal(self.extent.start + self.written)?;
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Fewer bytes than announced, or the output's error.
    pub fn finish(self) -> Result<Extent, WriteError<O::Error>> {
        if self.written != self.extent.size {
            return Err(WriteError::FileSize {
                announced: self.extent.size,
                came: self.written,
            });
        }
        self.placer.unfinished = false;
        self.placer.seal(self.placer.cursor)?;
        Ok(self.extent)
    }
}
