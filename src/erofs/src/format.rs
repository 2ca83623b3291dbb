//! What lies on disk, byte by byte.
//!
//! Specified by the kernel: `Documentation/filesystems/erofs.rst` and
//! `fs/erofs/erofs_fs.h`. Everything is little-endian. Here are only the parts
//! that layout 1 uses: no compression, no chunk-based files, no devices.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Bytes of a block.
pub const BLOCK_SIZE: u64 = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_BITS: u8 = 12;
/// Bytes of a chunk: the unit in which images are written and verified.
pub const CHUNK_SIZE: u64 = 128 * 1024;

/// [`BLOCK_SIZE`], [`CHUNK_SIZE`] and [`XATTR_UNIT`] as lengths in memory.
pub const BLOCK_LEN: usize = 4096;
pub const CHUNK_LEN: usize = 128 * 1024;
pub const XATTR_UNIT_LEN: usize = 4;

/// Where the superblock lies in the image.
pub const SUPERBLOCK_OFFSET: usize = 1024;
/// The superblock's magic.
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// Compatible feature: the superblock has a checksum.
pub const COMPAT_CHECKSUM: u32 = 0x1;
/// Compatible feature: times of inodes are times of modification.
pub const COMPAT_MTIME: u32 = 0x2;

/// Inodes lie on multiples of this; a node number (nid) counts them.
pub const INODE_SLOT: u64 = 32;
/// Bytes of an extended inode.
pub const INODE_SIZE: u64 = 64;
/// `i_format` bit 0: an extended inode.
pub const FORMAT_EXTENDED: u16 = 1;
/// `i_format` bits 1 to 3: data in blocks of its own.
pub const LAYOUT_PLAIN: u16 = 0;
/// `i_format` bits 1 to 3: the last, partial block follows the inode.
pub const LAYOUT_INLINE: u16 = 2;

/// Bytes of a directory entry without its name.
pub const DIRENT_SIZE: u64 = 12;
/// Bytes before the first attribute of an inode.
pub const XATTR_HEADER_SIZE: u64 = 12;
/// Bytes of an attribute without its name and value; their alignment, too, and
/// the unit of shared attributes' numbers.
pub const XATTR_UNIT: u64 = 4;

/// The superblock, at [`SUPERBLOCK_OFFSET`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Superblock {
    pub magic: U32,
    pub checksum: U32,
    pub feature_compat: U32,
    pub block_bits: u8,
    pub extension_slots: u8,
    pub root_nid: U16,
    pub inodes: U64,
    pub build_time: U64,
    pub build_time_nanos: U32,
    pub blocks: U32,
    pub meta_block: U32,
    pub xattr_block: U32,
    pub uuid: [u8; 16],
    pub volume_name: [u8; 16],
    pub feature_incompat: U32,
    pub compression_algorithms: U16,
    pub extra_devices: U16,
    pub device_slot_offset: U16,
    pub directory_block_bits: u8,
    pub xattr_prefix_count: u8,
    pub xattr_prefix_start: U32,
    pub packed_nid: U64,
    pub xattr_filter_reserved: u8,
    pub reserved: [u8; 23],
}

/// An inode of 64 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExtendedInode {
    pub format: U16,
    pub xattr_count: U16,
    pub mode: U16,
    pub reserved: U16,
    pub size: U64,
    /// First block of the data, or the device number.
    pub block_or_device: U32,
    /// Inode number for 32-bit `stat` only; the kernel otherwise shows the nid.
    pub number: U32,
    pub uid: U32,
    pub gid: U32,
    pub mtime: U64,
    pub mtime_nanos: U32,
    pub nlink: U32,
    pub reserved2: [u8; 16],
}

/// A directory entry; the names follow the entries of the block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Dirent {
    pub nid: U64,
    pub name_offset: U16,
    pub file_type: u8,
    pub reserved: u8,
}

/// What precedes an inode's attributes: numbers of shared ones follow, then the
/// inline ones.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XattrHeader {
    pub name_filter: U32,
    pub shared_count: u8,
    pub reserved: [u8; 7],
}

/// An attribute; name (without its prefix) and value follow, padded to 4 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XattrEntry {
    pub name_len: u8,
    pub prefix: u8,
    pub value_size: U16,
}

const _: () = {
    assert!(BLOCK_LEN as u64 == BLOCK_SIZE && BLOCK_SIZE == 1 << BLOCK_BITS);
    assert!(CHUNK_LEN as u64 == CHUNK_SIZE && XATTR_UNIT_LEN as u64 == XATTR_UNIT);
    assert!(size_of::<Superblock>() == 128);
    assert!(size_of::<ExtendedInode>() as u64 == INODE_SIZE);
    assert!(size_of::<Dirent>() as u64 == DIRENT_SIZE);
    assert!(size_of::<XattrHeader>() as u64 == XATTR_HEADER_SIZE);
    assert!(size_of::<XattrEntry>() as u64 == XATTR_UNIT);
};
