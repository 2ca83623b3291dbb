//! Pass 2, second half: the bytes of the metadata and the superblock.

use crate::{
    crc32c,
    format::{
        BLOCK_BITS, BLOCK_LEN, BLOCK_SIZE, COMPAT_CHECKSUM, COMPAT_MTIME, Dirent, ExtendedInode,
        FORMAT_EXTENDED, LAYOUT_INLINE, LAYOUT_PLAIN, MAGIC, SUPERBLOCK_OFFSET, Superblock,
        XATTR_UNIT, XattrEntry, XattrHeader,
    },
    layout::{DirectoryShape, Entry, Placed, Plan, ROOT_NID, XattrBody, merge_dots},
    place::{Placer, Tail},
    tree::{Content, Directory, Tree},
    values::{FileKind, Uuid},
    write::{Output, Summary, WriteError},
    xattr::XattrName,
};
use zerocopy::{
    FromZeros, IntoBytes,
    little_endian::{U16, U32},
};

/// Writes everything that `plan` has a place for.
pub fn write<O: Output>(
    placer: Placer<O>,
    tree: &Tree,
    plan: &Plan<'_>,
    uuid: Uuid,
) -> Result<(Summary, O), WriteError<O::Error>> {
    let mut tail = placer.into_tail(plan.size)?;
    let mut order: Vec<usize> = (0..plan.inodes.len()).collect();
    order.sort_unstable_by_key(|&position| plan.inodes[position].offset);
    let mut bytes = Vec::new();
    for position in order {
        let placed = &plan.inodes[position];
        tail.pad_to(plan.start + placed.offset)?;
        bytes.clear();
        inode(&mut bytes, tree, plan, placed, position);
        tail.write(&bytes)?;
    }
    for placed in plan.inodes.iter().filter(|placed| placed.blocks > 0) {
        tail.pad_to(plan.start + placed.blocks_at)?;
        blocks(&mut tail, tree, plan, placed)?;
    }
    tail.pad_to(plan.start + plan.shared_at)?;
    for (name, value) in &plan.shared.entries {
        bytes.clear();
        xattr(&mut bytes, name, value);
        tail.write(&bytes)?;
    }
    tail.pad_to(plan.start + plan.size)?;

    let size = tail.position();
    let summary = Summary {
        size,
        metadata: plan.start..size,
        root_nid: ROOT_NID,
        counts: plan.counts,
    };
    let superblock = superblock(plan, uuid, size);
    let output = tail.finish(SUPERBLOCK_OFFSET, superblock.as_bytes())?;
    Ok((summary, output))
}

/// A block's number. The plan has checked that the image has at most 2^32.
fn block(offset: u64) -> U32 {
    U32::new(u32::try_from(offset / BLOCK_SIZE).unwrap_or(u32::MAX))
}

/// A count that is known to fit: within a block, or checked by its type.
fn u16_of(value: u64) -> U16 {
    U16::new(u16::try_from(value).unwrap_or(u16::MAX))
}

fn superblock(plan: &Plan<'_>, uuid: Uuid, size: u64) -> Superblock {
    let mut superblock = Superblock::new_zeroed();
    superblock.magic = MAGIC.into();
    superblock.feature_compat = (COMPAT_CHECKSUM | COMPAT_MTIME).into();
    superblock.block_bits = BLOCK_BITS;
    superblock.root_nid = ROOT_NID.into();
    superblock.inodes = (plan.inodes.len() as u64).into();
    superblock.blocks = block(size);
    superblock.meta_block = block(plan.start);
    superblock.xattr_block = block(plan.start + plan.shared_at);
    superblock.uuid = uuid.0;
    // Over the rest of the block, the checksum itself as zero.
    let rest = [0; BLOCK_LEN - SUPERBLOCK_OFFSET - size_of::<Superblock>()];
    let register = crc32c::update(!0, superblock.as_bytes());
    superblock.checksum = crc32c::update(register, &rest).into();
    superblock
}

/// The inode with its attributes and inline data.
fn inode(bytes: &mut Vec<u8>, tree: &Tree, plan: &Plan<'_>, placed: &Placed, position: usize) {
    let node = tree.node(placed.node);
    let attributes = node.attributes();
    let content = node.content();
    let body = plan.shared.body(&attributes.xattrs);

    let layout = if placed.inline {
        LAYOUT_INLINE
    } else {
        LAYOUT_PLAIN
    };
    let mut inode = ExtendedInode::new_zeroed();
    inode.format = (FORMAT_EXTENDED | layout << 1).into();
    inode.xattr_count = match body.size() {
        0 => 0.into(),
        // The header counts as one; `Xattrs` keeps the rest below 65535.
        size => u16_of(1 + (size - size_of::<XattrHeader>() as u64) / XATTR_UNIT),
    };
    inode.mode = (content.kind().mode_bits() | attributes.permissions.bits()).into();
    inode.size = placed.size.into();
    inode.block_or_device = match content {
        Content::Directory(_) | Content::Symlink(_) if placed.blocks > 0 => {
            block(plan.start + placed.blocks_at)
        }
        Content::File(extent) => block(extent.start()),
        Content::CharDevice(device) | Content::BlockDevice(device) => device.encode().into(),
        _ => 0.into(),
    };
    inode.number = u32::try_from(position + 1).unwrap_or(u32::MAX).into();
    inode.uid = attributes.uid.into();
    inode.gid = attributes.gid.into();
    // Two's complement: the kernel reads a signed number.
    inode.mtime = attributes.mtime.seconds().cast_unsigned().into();
    inode.mtime_nanos = attributes.mtime.nanos().into();
    inode.nlink = placed.nlink.into();
    bytes.extend_from_slice(inode.as_bytes());
    xattrs(bytes, &body);
    if !placed.inline {
        return;
    }
    match content {
        Content::Symlink(target) => bytes.extend_from_slice(target.as_bytes()),
        Content::Directory(directory) => {
            let mut last = Vec::new();
            directory_blocks(tree, plan, placed, directory, |block| last = block);
            bytes.append(&mut last);
        }
        _ => {}
    }
}

fn xattrs(bytes: &mut Vec<u8>, body: &XattrBody<'_>) {
    if body.size() == 0 {
        return;
    }
    let mut header = XattrHeader::new_zeroed();
    // The plan takes at most 255.
    header.shared_count = u8::try_from(body.shared.len()).unwrap_or(u8::MAX);
    bytes.extend_from_slice(header.as_bytes());
    for &number in &body.shared {
        bytes.extend_from_slice(U32::new(number).as_bytes());
    }
    for (name, value) in &body.inline {
        xattr(bytes, name, value);
    }
}

fn xattr(bytes: &mut Vec<u8>, name: &XattrName, value: &[u8]) {
    let entry = XattrEntry {
        // Both were checked when they were made.
        name_len: u8::try_from(name.suffix().len()).unwrap_or(u8::MAX),
        prefix: name.prefix(),
        value_size: u16_of(value.len() as u64),
    };
    bytes.extend_from_slice(entry.as_bytes());
    bytes.extend_from_slice(name.suffix());
    bytes.extend_from_slice(value);
    let used = entry.as_bytes().len() + name.suffix().len() + value.len();
    bytes.resize(bytes.len() + used.next_multiple_of(4) - used, 0);
}

/// The blocks of a directory or a link that lie outside the inode.
fn blocks<O: Output>(
    tail: &mut Tail<O>,
    tree: &Tree,
    plan: &Plan<'_>,
    placed: &Placed,
) -> Result<(), WriteError<O::Error>> {
    match tree.node(placed.node).content() {
        Content::Symlink(target) => tail.write(target.as_bytes()),
        Content::Directory(directory) => {
            let mut left = placed.blocks;
            let mut result = Ok(());
            directory_blocks(tree, plan, placed, directory, |mut block| {
                if left > 0 && result.is_ok() {
                    block.resize(BLOCK_LEN, 0);
                    result = tail.write(&block);
                    left -= 1;
                }
            });
            result
        }
        _ => Ok(()),
    }
}

/// Makes the blocks of a directory, each as long as its entries need.
fn directory_blocks(
    tree: &Tree,
    plan: &Plan<'_>,
    placed: &Placed,
    directory: &Directory,
    mut take: impl FnMut(Vec<u8>),
) {
    let mut entries = merge_dots(directory);
    for count in DirectoryShape::of(directory).entries {
        let mut names = Vec::new();
        let mut block = Vec::new();
        let first_name = u64::from(count) * size_of::<Dirent>() as u64;
        for (name, entry) in entries.by_ref().take(count as usize) {
            let node = match entry {
                Entry::Itself => placed.node,
                Entry::Parent => placed.parent,
                Entry::Child(child) => child,
            };
            let kind = match entry {
                Entry::Child(child) => tree.node(child).content().kind(),
                _ => FileKind::Directory,
            };
            let dirent = Dirent {
                nid: plan.nid(node).into(),
                name_offset: u16_of(first_name + names.len() as u64),
                file_type: kind.dirent_type(),
                reserved: 0,
            };
            block.extend_from_slice(dirent.as_bytes());
            names.extend_from_slice(name);
        }
        block.append(&mut names);
        take(block);
    }
}
