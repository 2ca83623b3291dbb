//! Pass 2, first half: where each piece of metadata lies.
//!
//! ```text
//! meta_blkaddr                                                        end
//! │ 32 zeros │ inodes … │ directory blocks, long link targets │ shared xattrs │
//! ```
//!
//! * The zeros are node number 0: user space takes a directory entry with inode
//!   number 0 for a deleted one. The root is node 1.
//! * Inodes: the root, then for each directory, in depth-first order, those of
//!   its entries that have none yet, in the order of their names. So a listing
//!   with attributes reads neighbours.
//! * An inode that fits into one block together with its attributes and inline
//!   data never crosses a block boundary (before Linux 6.12, an inline link that
//!   does is an error, and inline data always is). The room this leaves at the
//!   end of a block is filled by later inodes; there is one such gap, the latest.
//! * A directory's last, partial block and a link's target are inline if they
//!   fit into a block together with the inode and its attributes; else they have
//!   a block of their own.
//! * An attribute that two or more inodes have, name and value, is shared.

use crate::{
    format::{BLOCK_SIZE, DIRENT_SIZE, INODE_SIZE, INODE_SLOT, XATTR_HEADER_SIZE, XATTR_UNIT},
    tree::{Content, Directory, NodeId, Tree},
    write::Counts,
    xattr::{self, XattrName, Xattrs},
};
use std::collections::HashMap;

/// A tree that EROFS cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Block numbers have 32 bits.
    #[error("data and metadata together are larger than 16 TiB, the most an image can have")]
    TooLarge,
    /// Shared attributes are numbered with 32 bits.
    #[error("shared extended attributes are larger than 16 GiB, the most an image can have")]
    SharedXattrs,
}

/// Node number of the root.
pub(crate) const ROOT_NID: u16 = 1;

/// The most shared attributes an inode can refer to.
const MAX_SHARED: usize = 255;

/// An inode's place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub node: NodeId,
    /// Offset in the metadata, a multiple of 32.
    pub offset: u64,
    pub nlink: u32,
    /// The directory that holds a directory; the root for itself.
    pub parent: NodeId,
    /// Blocks of directory data or link target before the inline part.
    pub blocks: u64,
    /// Bytes in all.
    pub size: u64,
    /// Offset of those blocks in the metadata.
    pub blocks_at: u64,
    /// Whether there is an inline part.
    pub inline: bool,
}

/// Where all metadata lies. Offsets count from the metadata's start.
#[derive(Debug)]
pub(crate) struct Plan<'tree> {
    /// Offset of the metadata in the image.
    pub start: u64,
    /// In the order of their first mention, which numbers them from 1.
    pub inodes: Vec<Placed>,
    /// Position in `inodes` by node; `None` for nodes that are in no directory.
    positions: Vec<Option<u32>>,
    pub shared: SharedXattrs<'tree>,
    pub shared_at: u64,
    /// Bytes of all metadata.
    pub size: u64,
    pub counts: Counts,
}

impl<'tree> Plan<'tree> {
    /// Lays out `tree` from `start`, the image's first free block, on.
    pub fn new(tree: &'tree Tree, start: u64) -> Result<Self, LayoutError> {
        let mut plan = Self {
            start,
            inodes: Vec::new(),
            positions: vec![None; tree.len()],
            shared: SharedXattrs::default(),
            shared_at: 0,
            size: 0,
            counts: Counts::default(),
        };
        plan.enumerate(tree);
        plan.shared = SharedXattrs::of(tree, &plan.inodes)?;
        plan.counts.shared_xattrs = plan.shared.entries.len() as u64;
        plan.place(tree);
        if (start + plan.size) / BLOCK_SIZE > u64::from(u32::MAX) {
            return Err(LayoutError::TooLarge);
        }
        Ok(plan)
    }

    /// The place of a node that is in the tree.
    pub fn placed(&self, node: NodeId) -> &Placed {
        let position = self.positions[node.index()]
            .expect("enumerate reaches every node that a directory in the tree names");
        &self.inodes[position as usize]
    }

    /// The node number of a node that is in the tree.
    pub fn nid(&self, node: NodeId) -> u64 {
        self.placed(node).offset / INODE_SLOT
    }

    /// Collects the nodes in the tree, their order, parents and link counts.
    fn enumerate(&mut self, tree: &Tree) {
        self.mention(tree, tree.root(), tree.root());
        let mut waiting = vec![tree.root()];
        while let Some(parent) = waiting.pop() {
            let Some(directory) = tree.node(parent).directory() else {
                continue;
            };
            let first_child = waiting.len();
            for (_, child) in directory.iter() {
                self.mention(tree, child, parent);
                if tree.node(child).directory().is_some() {
                    waiting.push(child);
                    let position = self.positions[parent.index()].unwrap_or_default();
                    self.inodes[position as usize].nlink += 1;
                }
            }
            // The first of them is to be taken first.
            waiting[first_child..].reverse();
        }
    }

    /// Counts one name of `node`, which is in `parent`.
    fn mention(&mut self, tree: &Tree, node: NodeId, parent: NodeId) {
        if let Some(position) = self.positions[node.index()] {
            self.inodes[position as usize].nlink += 1;
            return;
        }
        // There are at most as many as node ids, which have 32 bits.
        self.positions[node.index()] = Some(u32::try_from(self.inodes.len()).unwrap_or(u32::MAX));
        let content = tree.node(node).content();
        self.counts.add(content.kind());
        let (nlink, size) = match content {
            // "." and the name in the parent; each subdirectory's ".." adds one.
            Content::Directory(directory) => (2, DirectoryShape::of(directory).size()),
            Content::File(extent) => {
                self.counts.file_bytes += extent.size();
                (1, extent.size())
            }
            Content::Symlink(target) => (1, target.as_bytes().len() as u64),
            _ => (1, 0),
        };
        self.inodes.push(Placed {
            node,
            offset: 0,
            nlink,
            parent,
            blocks: 0,
            size,
            blocks_at: 0,
            inline: false,
        });
    }

    /// Gives every inode and every block its offset.
    fn place(&mut self, tree: &'tree Tree) {
        let mut slots = Slots {
            cursor: u64::from(ROOT_NID) * INODE_SLOT,
            gap: 0..0,
        };
        let mut blocks = 0;
        for placed in &mut self.inodes {
            let node = tree.node(placed.node);
            let fixed = INODE_SIZE + self.shared.body(&node.attributes().xattrs).size();
            let has_data = matches!(node.content(), Content::Directory(_) | Content::Symlink(_));
            let mut inline = 0;
            if has_data {
                // A directory always has "." and "..", a link a target.
                let tail = (placed.size - 1) % BLOCK_SIZE + 1;
                placed.inline = fixed + tail <= BLOCK_SIZE;
                inline = if placed.inline { tail } else { 0 };
                placed.blocks = (placed.size - inline).div_ceil(BLOCK_SIZE);
                // For now counted from the first of the blocks.
                placed.blocks_at = blocks * BLOCK_SIZE;
                blocks += placed.blocks;
            }
            placed.offset = slots.take(fixed + inline);
        }
        let blocks_at = slots.cursor.next_multiple_of(BLOCK_SIZE);
        for placed in &mut self.inodes {
            placed.blocks_at += blocks_at;
        }
        self.shared_at = blocks_at + blocks * BLOCK_SIZE;
        self.size = (self.shared_at + self.shared.size).next_multiple_of(BLOCK_SIZE);
    }
}

/// Hands out room for inodes.
struct Slots {
    /// Behind everything handed out; on a slot.
    cursor: u64,
    /// Room before the cursor at the end of a block.
    gap: std::ops::Range<u64>,
}

impl Slots {
    fn take(&mut self, bytes: u64) -> u64 {
        let room = bytes.next_multiple_of(INODE_SLOT);
        if room <= self.gap.end - self.gap.start {
            let offset = self.gap.start;
            self.gap.start += room;
            return offset;
        }
        let left = BLOCK_SIZE - self.cursor % BLOCK_SIZE;
        if bytes > left && bytes <= BLOCK_SIZE {
            self.gap = self.cursor..self.cursor + left;
            self.cursor += left;
        }
        let offset = self.cursor;
        self.cursor += room;
        offset
    }
}

/// How a directory's entries fall into blocks.
#[derive(Debug)]
pub(crate) struct DirectoryShape {
    /// Entries in each block, "." and ".." included.
    pub entries: Vec<u32>,
    /// Bytes used of the last block.
    tail: u64,
}

impl DirectoryShape {
    pub fn of(directory: &Directory) -> Self {
        let mut shape = Self {
            entries: vec![0],
            tail: 0,
        };
        // In which order the entries come does matter: those on disk.
        for name in merge_dots(directory).map(|(name, _)| name) {
            let need = DIRENT_SIZE + name.len() as u64;
            if shape.tail + need > BLOCK_SIZE {
                shape.entries.push(0);
                shape.tail = 0;
            }
            shape.tail += need;
            if let Some(last) = shape.entries.last_mut() {
                *last += 1;
            }
        }
        shape
    }

    /// Bytes of the directory.
    pub fn size(&self) -> u64 {
        (self.entries.len() as u64 - 1) * BLOCK_SIZE + self.tail
    }
}

/// An entry of a directory on disk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry {
    Itself,
    Parent,
    Child(NodeId),
}

/// All entries in strict byte order: names can sort before ".".
pub(crate) fn merge_dots(directory: &Directory) -> impl Iterator<Item = (&[u8], Entry)> {
    let mut dots = [(&b"."[..], Entry::Itself), (&b".."[..], Entry::Parent)]
        .into_iter()
        .peekable();
    let mut children = directory
        .iter()
        .map(|(name, child)| (name.as_bytes(), Entry::Child(child)))
        .peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some((dot, _)), Some((child, _))) if child < dot => children.next(),
        (Some(_), _) => dots.next(),
        (None, _) => children.next(),
    })
}

/// The attributes that several inodes have.
#[derive(Debug, Default)]
pub(crate) struct SharedXattrs<'tree> {
    /// By name and value.
    pub entries: Vec<(&'tree XattrName, &'tree [u8])>,
    /// The number of each: its offset from `shared_at` in units of 4.
    numbers: HashMap<(&'tree XattrName, &'tree [u8]), u32>,
    size: u64,
}

impl<'tree> SharedXattrs<'tree> {
    fn of(tree: &'tree Tree, inodes: &[Placed]) -> Result<Self, LayoutError> {
        let mut uses: HashMap<(&XattrName, &[u8]), bool> = HashMap::new();
        for placed in inodes {
            for attribute in tree.node(placed.node).attributes().xattrs.iter() {
                let repeated = uses.contains_key(&attribute);
                uses.insert(attribute, repeated);
            }
        }
        let repeated = uses.into_iter().filter(|(_, repeated)| *repeated);
        let mut entries: Vec<_> = repeated.map(|(attribute, _)| attribute).collect();
        entries.sort_unstable();
        let mut shared = Self::default();
        for &(name, value) in &entries {
            let number =
                u32::try_from(shared.size / XATTR_UNIT).map_err(|_| LayoutError::SharedXattrs)?;
            shared.numbers.insert((name, value), number);
            shared.size += xattr::entry_size(name, value);
        }
        shared.entries = entries;
        Ok(shared)
    }

    /// How the attributes of one inode are stored.
    pub fn body<'a>(&self, xattrs: &'a Xattrs) -> XattrBody<'a> {
        let mut body = XattrBody::default();
        for (name, value) in xattrs.iter() {
            match self.numbers.get(&(name, value)) {
                Some(&number) if body.shared.len() < MAX_SHARED => body.shared.push(number),
                _ => body.inline.push((name, value)),
            }
        }
        body
    }
}

/// The attributes of one inode.
#[derive(Debug, Default)]
pub(crate) struct XattrBody<'a> {
    pub shared: Vec<u32>,
    pub inline: Vec<(&'a XattrName, &'a [u8])>,
}

impl XattrBody<'_> {
    /// Bytes behind the inode; 0 without attributes.
    pub fn size(&self) -> u64 {
        if self.shared.is_empty() && self.inline.is_empty() {
            return 0;
        }
        let inline = self.inline.iter();
        XATTR_HEADER_SIZE
            + self.shared.len() as u64 * XATTR_UNIT
            + inline
                .map(|(name, value)| xattr::entry_size(name, value))
                .sum::<u64>()
    }
}
