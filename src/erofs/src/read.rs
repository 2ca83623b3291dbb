//! Reads the metadata of an image of layout 1 back.
//!
//! For looking up single files in a layer converted earlier; file data is not
//! read. Nothing in the image is trusted: whatever it says, the answer is a value
//! or a [`ReadError`], and what is allocated is bounded by what the format allows
//! for one file.

use crate::{
    crc32c,
    format::{
        BLOCK_BITS, BLOCK_LEN, BLOCK_SIZE, COMPAT_CHECKSUM, Dirent, ExtendedInode, FORMAT_EXTENDED,
        INODE_SIZE, INODE_SLOT, LAYOUT_INLINE, LAYOUT_PLAIN, MAGIC, SUPERBLOCK_OFFSET, Superblock,
        XATTR_HEADER_SIZE, XATTR_UNIT, XATTR_UNIT_LEN, XattrEntry, XattrHeader,
    },
    tree::Attributes,
    values::{FileKind, Permissions, SymlinkTarget, Timestamp, Uuid},
    xattr::{XattrName, Xattrs},
};
use std::{error::Error, ops::Range};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Where an image comes from.
pub trait Input {
    /// Why bytes could not be read.
    type Error: Error + 'static;

    /// Fills `bytes` from `offset` on, or fails.
    ///
    /// # Errors
    /// The bytes are not there or cannot be read.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Self::Error>;
}

/// Why something could not be read from an image.
#[derive(Debug, thiserror::Error)]
pub enum ReadError<E: Error + 'static> {
    /// The bytes did not come.
    #[error("reading the image at offset {offset}")]
    Input {
        /// Offset in the image.
        offset: u64,
        /// What the input said.
        source: E,
    },
    /// Not an image of layout 1, or a damaged one.
    #[error("the image is not of layout 1, or damaged: {problem} at offset {offset}")]
    Format {
        /// Offset in the image.
        offset: u64,
        /// What is wrong there.
        problem: &'static str,
    },
}

/// A file in an image.
#[derive(Debug, Clone, Copy)]
pub struct Inode {
    offset: u64,
    kind: FileKind,
    raw: ExtendedInode,
}

impl Inode {
    /// What kind of file it is.
    pub const fn kind(&self) -> FileKind {
        self.kind
    }

    fn xattr_size(&self) -> u64 {
        match self.raw.xattr_count.get() {
            0 => 0,
            count => XATTR_HEADER_SIZE + XATTR_UNIT * (u64::from(count) - 1),
        }
    }

    fn is_inline(&self) -> bool {
        self.raw.format.get() >> 1 == LAYOUT_INLINE
    }

    fn format<E: Error>(&self, problem: &'static str) -> ReadError<E> {
        ReadError::Format {
            offset: self.offset,
            problem,
        }
    }
}

/// An image.
#[derive(Debug)]
pub struct Reader<I> {
    input: I,
    superblock: Superblock,
}

impl<I: Input> Reader<I> {
    /// Reads and checks the superblock.
    ///
    /// # Errors
    /// Not an image of layout 1.
    pub fn open(input: I) -> Result<Self, ReadError<I::Error>> {
        let mut reader = Self {
            input,
            superblock: Superblock::new_zeroed(),
        };
        let offset = SUPERBLOCK_OFFSET as u64;
        let mut block = [0; BLOCK_LEN - SUPERBLOCK_OFFSET];
        reader.read(offset, &mut block)?;
        let (superblock, rest) = Superblock::read_from_prefix(&block)
            .map_err(|_| reader.superblock_error("a short superblock"))?;
        reader.superblock = superblock;
        let problem = if superblock.magic.get() != MAGIC {
            "no EROFS magic"
        } else if superblock.block_bits != BLOCK_BITS
            || superblock.feature_incompat.get() != 0
            || superblock.feature_compat.get() & COMPAT_CHECKSUM == 0
            || superblock.directory_block_bits != 0
        {
            "a feature that layout 1 does not use"
        } else {
            let mut unsummed = superblock;
            unsummed.checksum = 0.into();
            let register = crc32c::update(!0, unsummed.as_bytes());
            if crc32c::update(register, rest) == superblock.checksum.get() {
                return Ok(reader);
            }
            "a wrong checksum of the superblock"
        };
        Err(reader.superblock_error(problem))
    }

    fn superblock_error(&self, problem: &'static str) -> ReadError<I::Error> {
        ReadError::Format {
            offset: SUPERBLOCK_OFFSET as u64,
            problem,
        }
    }

    /// The UUID in the superblock.
    pub const fn uuid(&self) -> Uuid {
        Uuid(self.superblock.uuid)
    }

    /// The root directory.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    pub fn root(&self) -> Result<Inode, ReadError<I::Error>> {
        self.inode(self.superblock.root_nid.get().into())
    }

    /// What `name` in `directory` is; nothing if it is not there, or `directory`
    /// is no directory. "." and ".." are found as they lie on disk.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    pub fn lookup(
        &self,
        directory: &Inode,
        name: &[u8],
    ) -> Result<Option<Inode>, ReadError<I::Error>> {
        if directory.kind != FileKind::Directory {
            return Ok(None);
        }
        // A name sorts behind the first one of its block: find the last block
        // whose first name is not behind it.
        let blocks = directory.raw.size.get().div_ceil(BLOCK_SIZE);
        let (mut low, mut high) = (0, blocks);
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(directory, middle)?;
            let (_, first) = block.entry(0)?;
            if first <= name {
                if let Some(nid) = block.find(name)? {
                    return self.inode(nid).map(Some);
                }
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(None)
    }

    /// Owner, mode, time and extended attributes.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    pub fn attributes(&self, inode: &Inode) -> Result<Attributes, ReadError<I::Error>> {
        let raw = &inode.raw;
        let mtime = Timestamp::new(raw.mtime.get().cast_signed(), raw.mtime_nanos.get())
            .map_err(|_| inode.format("a time with more than a second of nanoseconds"))?;
        Ok(Attributes {
            permissions: Permissions::of_mode(raw.mode.get().into()),
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            mtime,
            xattrs: self.xattrs(inode)?,
        })
    }

    /// The target of a symbolic link; nothing if it is something else.
    ///
    /// # Errors
    /// The image is damaged or cannot be read.
    pub fn symlink(&self, inode: &Inode) -> Result<Option<SymlinkTarget>, ReadError<I::Error>> {
        if inode.kind != FileKind::Symlink {
            return Ok(None);
        }
        let size = usize::try_from(inode.raw.size.get()).unwrap_or(usize::MAX);
        if size > SymlinkTarget::MAX {
            return Err(inode.format("a link target longer than 4095 bytes"));
        }
        let mut target = vec![0; size];
        let offset = self.data_offset(inode, 0)?;
        self.read(offset, &mut target)?;
        SymlinkTarget::new(&target)
            .map(Some)
            .map_err(|_| inode.format("a link target that is empty or has a NUL"))
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ReadError<I::Error>> {
        self.input
            .read_at(offset, bytes)
            .map_err(|source| ReadError::Input { offset, source })
    }

    /// Where a regular file's data lies in the image, in bytes; nothing if it is
    /// something else. An empty file's range is empty.
    ///
    /// # Errors
    /// The range cannot lie in any image.
    pub fn file_range(&self, inode: &Inode) -> Result<Option<Range<u64>>, ReadError<I::Error>> {
        if inode.kind != FileKind::File {
            return Ok(None);
        }
        let start = self.data_offset(inode, 0)?;
        let end = start.checked_add(inode.raw.size.get());
        let end = end.ok_or_else(|| inode.format("data beyond any image"))?;
        Ok(Some(start..end))
    }

    /// The file with this node number.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError<I::Error>> {
        let start = u64::from(self.superblock.meta_block.get()) * BLOCK_SIZE;
        let offset = nid.checked_mul(INODE_SLOT);
        let offset = offset.and_then(|offset| offset.checked_add(start));
        let offset = offset.ok_or(ReadError::Format {
            offset: u64::MAX,
            problem: "a node number beyond any image",
        })?;
        let format = |problem| ReadError::Format { offset, problem };
        let mut raw = ExtendedInode::new_zeroed();
        self.read(offset, raw.as_mut_bytes())?;
        let layout = raw.format.get() >> 1;
        if raw.format.get() & 1 != FORMAT_EXTENDED
            || (layout != LAYOUT_PLAIN && layout != LAYOUT_INLINE)
        {
            return Err(format("an inode of a form that layout 1 does not use"));
        }
        let kind = FileKind::of_mode(raw.mode.get());
        let kind = kind.ok_or_else(|| format("an inode of no known type"))?;
        Ok(Inode { offset, kind, raw })
    }

    /// Where block `number` of a file's data lies.
    fn data_offset(&self, inode: &Inode, number: u64) -> Result<u64, ReadError<I::Error>> {
        let blocks = inode.raw.size.get().div_ceil(BLOCK_SIZE);
        let offset = if inode.is_inline() && number + 1 == blocks {
            Some(inode.offset + INODE_SIZE + inode.xattr_size())
        } else {
            number
                .checked_add(inode.raw.block_or_device.get().into())
                .and_then(|block| block.checked_mul(BLOCK_SIZE))
        };
        offset.ok_or_else(|| inode.format("data beyond any image"))
    }

    fn directory_block(
        &self,
        directory: &Inode,
        number: u64,
    ) -> Result<DirectoryBlock, ReadError<I::Error>> {
        let size = (directory.raw.size.get() - number * BLOCK_SIZE).min(BLOCK_SIZE);
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        let offset = self.data_offset(directory, number)?;
        self.read(offset, &mut bytes)?;
        DirectoryBlock::new(offset, bytes)
    }

    fn xattrs(&self, inode: &Inode) -> Result<Xattrs, ReadError<I::Error>> {
        let size = inode.xattr_size();
        let mut xattrs = Xattrs::new();
        if size == 0 {
            return Ok(xattrs);
        }
        let mut body = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read(inode.offset + INODE_SIZE, &mut body)?;
        let short = || inode.format("extended attributes that end early");
        let (header, rest) = XattrHeader::read_from_prefix(&body).map_err(|_| short())?;
        let shared_len = usize::from(header.shared_count) * XATTR_UNIT_LEN;
        let (numbers, mut inline) = rest.split_at_checked(shared_len).ok_or_else(short)?;

        let start = u64::from(self.superblock.xattr_block.get()) * BLOCK_SIZE;
        for number in numbers.chunks_exact(XATTR_UNIT_LEN) {
            let number = u32::from_le_bytes(number.try_into().map_err(|_| short())?);
            let offset = start + u64::from(number) * XATTR_UNIT;
            let mut entry = [0; XATTR_UNIT_LEN];
            self.read(offset, &mut entry)?;
            let entry = XattrEntry::read_from_bytes(&entry).map_err(|_| short())?;
            let mut text = vec![0; entry_text(&entry)];
            self.read(offset + XATTR_UNIT, &mut text)?;
            insert(&mut xattrs, &entry, &text).map_err(|problem| inode.format(problem))?;
        }
        while let Ok((entry, rest)) = XattrEntry::read_from_prefix(inline) {
            let len = entry_text(&entry);
            let text = rest.get(..len).ok_or_else(short)?;
            insert(&mut xattrs, &entry, text).map_err(|problem| inode.format(problem))?;
            inline = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(xattrs)
    }
}

/// Bytes of an attribute's name and value.
fn entry_text(entry: &XattrEntry) -> usize {
    usize::from(entry.name_len) + usize::from(entry.value_size.get())
}

fn insert(xattrs: &mut Xattrs, entry: &XattrEntry, text: &[u8]) -> Result<(), &'static str> {
    let (suffix, value) = text
        .split_at_checked(entry.name_len.into())
        .ok_or("an extended attribute that ends early")?;
    let name = XattrName::from_parts(entry.prefix, suffix)
        .ok_or("an extended attribute with a name that layout 1 does not have")?;
    xattrs
        .insert(name, value)
        .map_err(|_| "more extended attributes than a file can have")
}

/// The used bytes of one block of a directory.
struct DirectoryBlock {
    offset: u64,
    bytes: Vec<u8>,
    count: usize,
}

impl DirectoryBlock {
    fn new<E: Error>(offset: u64, bytes: Vec<u8>) -> Result<Self, ReadError<E>> {
        let mut block = Self {
            offset,
            bytes,
            count: 1,
        };
        let first_name = usize::from(block.dirent(0)?.name_offset.get());
        block.count = first_name / size_of::<Dirent>();
        if block.count == 0 || first_name > block.bytes.len() {
            return Err(block.format("a directory block without entries"));
        }
        Ok(block)
    }

    fn format<E: Error>(&self, problem: &'static str) -> ReadError<E> {
        ReadError::Format {
            offset: self.offset,
            problem,
        }
    }

    fn dirent<E: Error>(&self, index: usize) -> Result<Dirent, ReadError<E>> {
        let bytes = self.bytes.get(index * size_of::<Dirent>()..);
        bytes
            .and_then(|bytes| Dirent::read_from_prefix(bytes).ok())
            .map(|(dirent, _)| dirent)
            .ok_or_else(|| self.format("a directory entry that ends early"))
    }

    fn entry<E: Error>(&self, index: usize) -> Result<(u64, &[u8]), ReadError<E>> {
        let dirent = self.dirent(index)?;
        let start = usize::from(dirent.name_offset.get());
        let last = index + 1 == self.count;
        let end = if last {
            self.bytes.len()
        } else {
            self.dirent(index + 1)?.name_offset.get().into()
        };
        let name = self.bytes.get(start..end);
        let mut name = name.ok_or_else(|| self.format("a name outside its directory block"))?;
        if last {
            // Zeros fill the block up.
            let len = name.iter().position(|byte| *byte == 0);
            name = &name[..len.unwrap_or(name.len())];
        }
        Ok((dirent.nid.get(), name))
    }

    fn find<E: Error>(&self, name: &[u8]) -> Result<Option<u64>, ReadError<E>> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let (nid, other) = self.entry(middle)?;
            match other.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(nid)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}
