//! Reads a tar as a stream of entries.
//!
//! Understood: v7, ustar, GNU (long names and links, base-256 numbers, sparse
//! files) and pax (any record length, binary values, sparse formats 0.0, 0.1 and
//! 1.0), as in POSIX.1-2024 `pax` and the GNU tar manual, "Tar Internals". Where
//! these leave a choice, it falls as Go's `archive/tar` has it, because that is
//! what containerd reads layers with: entries that are no regular file have no
//! data whatever their size says, records of global pax headers change no entry
//! (but the header's name is one, see the crate's documentation), checksums are right as signed or unsigned sums, and a tar may end without end blocks.
//!
//! (The `tar` crate is not used for reading: it splits pax records at newlines,
//! which binary attribute values may contain, and reads extension headers of any
//! size into memory.)
//!
//! Bounded: an entry has at most [`MAX_EXTENSIONS`] extension headers, each of at most
//! 1 MiB, and a sparse map of at most [`MAX_SPARSE`] parts; and the tar is as large as
//! its reader was told.

use crate::header::{BLOCK, Header, PaxSparse, Record, parse_records, record, until_nul};
use std::{
    collections::BTreeMap,
    io::{self, BufRead},
    ops::Range,
};

/// The most bytes of a long name or of pax records.
const MAX_EXTENSION: u64 = 1 << 20;
/// The most extension headers before an entry. Two long names and records are three.
const MAX_EXTENSIONS: u32 = 16;
/// The most parts of a sparse file.
pub const MAX_SPARSE: usize = 1 << 20;

/// Why the next entry could not be read.
#[derive(Debug)]
pub enum ArchiveError {
    /// From the stream below.
    Read(io::Error),
    /// A header that is none.
    Header { offset: u64, problem: &'static str },
    /// The stream ended within an entry.
    Truncated { offset: u64 },
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// Records for all entries behind it, which nobody heeds.
    Global,
    /// A type that is no file, by its letter.
    Other(u8),
}

/// One entry.
#[derive(Debug)]
pub struct Entry {
    pub kind: Kind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: i64,
    pub gid: i64,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    pub major: u64,
    pub minor: u64,
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Where the stored data belongs in a sparse file.
    pub sparse: Option<Vec<Range<u64>>>,
    /// Names (without "SCHILY.xattr.") and values.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A tar.
#[derive(Debug)]
pub struct Archive<R> {
    reader: R,
    position: u64,
    limit: u64,
    /// Stored data of the current entry that was not taken yet.
    data: u64,
    /// Bytes behind that data up to the next header.
    padding: u64,
}

impl<R: BufRead> Archive<R> {
    /// No header is read behind `limit` bytes.
    pub fn new(reader: R, limit: u64) -> Self {
        Self {
            reader,
            position: 0,
            limit,
            data: 0,
            padding: 0,
        }
    }

    /// The next entry; its data is then to be had from [`data`](Self::data).
    pub fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extensions = Extensions::default();
        let mut count = 0;
        loop {
            self.skip(self.data)?;
            let padded = self.skip_padding()?;
            (self.data, self.padding) = (0, 0);
            if !padded {
                return Ok(None);
            }
            let offset = self.position;
            let error = |problem| ArchiveError::Header { offset, problem };
            if offset > self.limit {
                return Err(error("the tar is larger than it may be"));
            }
            let Some(header) = self.header()? else {
                // An extension without an entry behind it says nothing.
                return Ok(None);
            };
            let size = header
                .number(124..136)
                .and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| error("the size is no number"))?;
            count += 1;
            if count > MAX_EXTENSIONS && matches!(header.0[156], b'x' | b'L' | b'K') {
                return Err(error("more than 16 extension headers before an entry"));
            }
            match header.0[156] {
                b'x' => {
                    let records = self.extension(size, offset)?;
                    extensions.records = parse_records(&records).map_err(error)?;
                }
                b'g' => {
                    let records = self.extension(size, offset)?;
                    let records = parse_records(&records).map_err(error)?;
                    return Ok(Some(global(&header, records)));
                }
                b'L' => extensions.name = self.long_text(size, offset)?,
                b'K' => extensions.link = self.long_text(size, offset)?,
                _ => return self.entry(&header, size, extensions, offset).map(Some),
            }
        }
    }

    /// Some of the current entry's stored data; nothing at its end.
    pub fn data(&mut self) -> Result<&[u8], ArchiveError> {
        if self.data == 0 {
            return Ok(&[]);
        }
        let offset = self.position;
        let buffer = self.reader.fill_buf()?;
        if buffer.is_empty() {
            return Err(ArchiveError::Truncated { offset });
        }
        let len = usize::try_from(self.data).unwrap_or(usize::MAX);
        Ok(&buffer[..buffer.len().min(len)])
    }

    /// Says that `len` bytes of [`data`](Self::data) were taken.
    pub fn consume(&mut self, len: usize) {
        self.reader.consume(len);
        self.position += len as u64;
        self.data -= len as u64;
    }

    /// Bytes of the tar that were read.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Takes the stream back as it is.
    pub fn into_reader(self) -> R {
        self.reader
    }

    fn skip(&mut self, mut len: u64) -> Result<(), ArchiveError> {
        while len > 0 {
            let available = self.reader.fill_buf()?.len();
            if available == 0 {
                return Err(ArchiveError::Truncated {
                    offset: self.position,
                });
            }
            let step = usize::try_from(len).unwrap_or(usize::MAX).min(available);
            self.reader.consume(step);
            self.position += step as u64;
            len -= step as u64;
        }
        Ok(())
    }

    /// Whether the padding was there. A tar may end without it, as it may end
    /// without end blocks: umoci 0.4 writes such layers, and Go reads them.
    fn skip_padding(&mut self) -> Result<bool, ArchiveError> {
        match self.skip(self.padding) {
            Ok(()) => Ok(true),
            Err(ArchiveError::Truncated { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, ArchiveError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                let offset = self.position;
                return match filled {
                    0 => Ok(None),
                    _ => Err(ArchiveError::Truncated { offset }),
                };
            }
            let len = buffer.len().min(BLOCK - filled);
            block[filled..filled + len].copy_from_slice(&buffer[..len]);
            self.reader.consume(len);
            self.position += len as u64;
            filled += len;
        }
        Ok(Some(block))
    }

    /// The next header, or the end: two blocks of zeros, or one at the very end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let offset = self.position;
        let error = |problem| ArchiveError::Header { offset, problem };
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block == [0; BLOCK] {
            return match self.block()? {
                Some(second) if second != [0; BLOCK] => {
                    Err(error("a block of zeros with an entry behind it"))
                }
                _ => Ok(None),
            };
        }
        let header = Header(block);
        let expected = header.number(148..156);
        let sum = |byte: fn(u8) -> i64| -> i64 {
            let bytes = block.iter().enumerate();
            bytes
                .map(|(at, &value)| {
                    byte(if (148..156).contains(&at) {
                        b' '
                    } else {
                        value
                    })
                })
                .sum()
        };
        let signed = sum(|byte| i64::from(byte.cast_signed()));
        if expected != Some(sum(i64::from)) && expected != Some(signed) {
            return Err(error("the checksum is wrong"));
        }
        Ok(Some(header))
    }

    /// The data of a long name or of pax records.
    fn extension(&mut self, size: u64, offset: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_EXTENSION {
            return Err(ArchiveError::Header {
                offset,
                problem: "an extension header of more than 1 MiB",
            });
        }
        self.set_data(size, offset)?;
        let mut bytes = Vec::new();
        loop {
            let data = self.data()?;
            if data.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(data);
            let len = data.len();
            self.consume(len);
        }
    }

    /// A long name or link target; an empty one says nothing.
    fn long_text(&mut self, size: u64, offset: u64) -> Result<Option<Vec<u8>>, ArchiveError> {
        let bytes = self.extension(size, offset)?;
        let text = until_nul(&bytes);
        Ok((!text.is_empty()).then(|| text.to_vec()))
    }

    fn set_data(&mut self, size: u64, offset: u64) -> Result<(), ArchiveError> {
        let end = size.checked_next_multiple_of(BLOCK as u64);
        let end = end.ok_or(ArchiveError::Header {
            offset,
            problem: "the size is beyond any file's",
        })?;
        self.data = size;
        self.padding = end - size;
        Ok(())
    }

    fn entry(
        &mut self,
        header: &Header,
        size: u64,
        extensions: Extensions,
        offset: u64,
    ) -> Result<Entry, ArchiveError> {
        let error = |problem| ArchiveError::Header { offset, problem };
        let number = |range, problem| header.number(range).ok_or_else(|| error(problem));
        let mut entry = Entry {
            kind: Kind::Other(header.0[156]),
            path: header.path(),
            link: header.text(157..257).to_vec(),
            mode: 0,
            uid: number(108..116, "the owner is no number")?,
            gid: number(116..124, "the group is no number")?,
            mtime: (number(136..148, "the time is no number")?, 0),
            major: 0,
            minor: 0,
            size,
            sparse: None,
            xattrs: BTreeMap::new(),
        };
        // Only the low 12 bits are of use; some tars put the file type above.
        let mode = number(100..108, "the mode is no number")?;
        entry.mode = u32::try_from(mode & 0o7777).unwrap_or(0);
        if header.has_devices() && matches!(header.0[156], b'3' | b'4') {
            let device = |range| {
                let number = header.number(range);
                let number = number.and_then(|number| u64::try_from(number).ok());
                number.ok_or_else(|| error("the device is no number"))
            };
            entry.major = device(329..337)?;
            entry.minor = device(337..345)?;
        }
        let mut sparse = PaxSparse::default();
        for (key, value) in extensions.records {
            record(&mut entry, &mut sparse, &key, value).map_err(error)?;
        }
        // GNU's long names go before pax', should there be both.
        if let Some(name) = extensions.name {
            entry.path = name;
        }
        if let Some(link) = extensions.link {
            entry.link = link;
        }
        entry.kind = match header.0[156] {
            // Before there was a type for directories, a slash said it.
            0 if entry.path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        if entry.kind != Kind::File {
            entry.size = 0;
            return Ok(entry);
        }

        let stored = entry.size;
        if header.0[156] == b'S' {
            let (map, size) = self.old_gnu_map(header, offset)?;
            self.set_data(stored, offset)?;
            entry.size = size;
            entry.sparse = Some(map);
        } else {
            self.set_data(stored, offset)?;
            match (sparse.major, sparse.minor) {
                (Some(1), Some(0)) => {
                    let start = self.position;
                    sparse.map = self.pax_1_0_map(offset)?;
                    // The map is padded to a block of its own.
                    let used = self.position - start;
                    let rest = used.next_multiple_of(BLOCK as u64) - used;
                    if rest > self.data {
                        return Err(error("the sparse map is longer than the entry"));
                    }
                    self.data -= rest;
                    self.skip_now(rest)?;
                    entry.sparse = Some(pairs(&sparse.map).map_err(error)?);
                }
                (Some(0), Some(0 | 1)) => entry.sparse = Some(pairs(&sparse.map).map_err(error)?),
                (None, None) if !sparse.map.is_empty() => {
                    entry.sparse = Some(pairs(&sparse.map).map_err(error)?);
                }
                // Not sparse, or in a way that nobody knows.
                _ => {}
            }
            if entry.sparse.is_some() {
                entry.size = sparse.size.or(sparse.real_size).unwrap_or(stored);
                if let Some(name) = sparse.name {
                    entry.path = name;
                }
            }
        }
        if let Some(map) = &entry.sparse {
            check_map(map, entry.size, self.data).map_err(error)?;
        }
        Ok(entry)
    }

    /// Skips part of the current data, which was already counted off.
    fn skip_now(&mut self, len: u64) -> Result<(), ArchiveError> {
        let (data, padding) = (self.data, self.padding);
        self.skip(len)?;
        (self.data, self.padding) = (data, padding);
        Ok(())
    }

    /// The map of an old GNU sparse file and the file's size.
    fn old_gnu_map(
        &mut self,
        header: &Header,
        offset: u64,
    ) -> Result<(Vec<Range<u64>>, u64), ArchiveError> {
        let error = |problem| ArchiveError::Header { offset, problem };
        let unsigned = |header: &Header, range| {
            let number = header
                .number(range)
                .and_then(|number| u64::try_from(number).ok());
            number.ok_or_else(|| error("a sparse map that is no numbers"))
        };
        let size = unsigned(header, 483..495)?;
        let mut map = Vec::new();
        let mut add = |header: &Header, start: usize, count: usize| {
            for at in (start..).step_by(24).take(count) {
                if header.0[at] == 0 {
                    break;
                }
                let from = unsigned(header, at..at + 12)?;
                let len = unsigned(header, at + 12..at + 24)?;
                let to = from.checked_add(len);
                map.push(from..to.ok_or_else(|| error("a sparse map beyond any file"))?);
            }
            Ok::<(), ArchiveError>(())
        };
        add(header, 386, 4)?;
        let mut more = header.0[482] != 0;
        let mut blocks = 0;
        while more {
            let offset = self.position;
            let block = self.block()?.ok_or(ArchiveError::Truncated { offset })?;
            add(&Header(block), 0, 21)?;
            more = block[504] != 0;
            blocks += 1;
            if blocks > MAX_SPARSE / 21 {
                return Err(error("a sparse map of more than 1048576 parts"));
            }
        }
        Ok((map, size))
    }

    /// The numbers at the start of a pax 1.0 sparse file's data.
    fn pax_1_0_map(&mut self, offset: u64) -> Result<Vec<u64>, ArchiveError> {
        let error = |problem| ArchiveError::Header { offset, problem };
        let mut numbers = Vec::new();
        let mut left = 1;
        let mut current: Option<u64> = None;
        while left > 0 {
            let data = self.data()?;
            let Some(&byte) = data.first() else {
                return Err(error("a sparse map that ends early"));
            };
            self.consume(1);
            match byte {
                b'0'..=b'9' => {
                    let value = current.unwrap_or(0).checked_mul(10);
                    let value = value.and_then(|value| value.checked_add(u64::from(byte - b'0')));
                    current = Some(value.ok_or_else(|| error("a sparse map beyond any file"))?);
                }
                b'\n' => {
                    let value = current.take();
                    let value = value.ok_or_else(|| error("a sparse map that is no numbers"))?;
                    left -= 1;
                    if numbers.is_empty() && left == 0 {
                        if value > MAX_SPARSE as u64 {
                            return Err(error("a sparse map of more than 1048576 parts"));
                        }
                        left = 2 * value;
                        numbers.push(value);
                    } else {
                        numbers.push(value);
                    }
                }
                _ => return Err(error("a sparse map that is no numbers")),
            }
        }
        numbers.remove(0);
        Ok(numbers)
    }
}

/// What precedes an entry.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<Record>,
}

/// A global header, which is called as its records say or itself.
fn global(header: &Header, records: Vec<Record>) -> Entry {
    let mut paths = records
        .into_iter()
        .rev()
        .filter(|(key, path)| key == b"path" && !path.is_empty());
    Entry {
        kind: Kind::Global,
        path: paths.next().map_or_else(|| header.path(), |(_, path)| path),
        link: Vec::new(),
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        major: 0,
        minor: 0,
        size: 0,
        sparse: None,
        xattrs: BTreeMap::new(),
    }
}

/// Offsets and lengths as ranges.
fn pairs(numbers: &[u64]) -> Result<Vec<Range<u64>>, &'static str> {
    if !numbers.len().is_multiple_of(2) {
        return Err("a sparse map with an offset but no length");
    }
    numbers
        .chunks_exact(2)
        .map(|pair| {
            let end = pair[0].checked_add(pair[1]);
            Ok(pair[0]..end.ok_or("a sparse map beyond any file")?)
        })
        .collect()
}

/// The parts must follow each other within the file and be what is stored.
fn check_map(map: &[Range<u64>], size: u64, stored: u64) -> Result<(), &'static str> {
    let mut end = 0;
    let mut sum = 0u64;
    for part in map {
        if part.start < end || part.end > size {
            return Err("a sparse map that is out of order or beyond its file");
        }
        end = part.end;
        sum += part.end - part.start;
    }
    if sum != stored {
        return Err("a sparse map of other data than is stored");
    }
    Ok(())
}
