//! The tree of an image, as it grows.
//!
//! Invariants, kept by every method: the root is a directory; a directory has
//! exactly one name (the root none) as long as it is in the tree; any other node
//! may have several names (hard links). A node that lost its last name stays in
//! memory and is not written.

use crate::{
    place::Extent,
    values::{Device, FileKind, Name, Permissions, SymlinkTarget, Timestamp},
    xattr::Xattrs,
};
use std::collections::BTreeMap;

/// A node of one [`Tree`]; of no use with another tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What every node has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub permissions: Permissions,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last modification.
    pub mtime: Timestamp,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// The entries of a directory, ordered by their bytes.
#[derive(Debug, Default)]
pub struct Directory(BTreeMap<Name, NodeId>);

impl Directory {
    /// The entries, without "." and "..".
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Name, NodeId)> {
        self.0.iter().map(|(name, node)| (name, *node))
    }
}

/// What a node is.
#[derive(Debug)]
pub enum Content {
    /// A directory; a new one is empty.
    Directory(Directory),
    /// A regular file and where its data lies.
    File(Extent),
    /// A symbolic link.
    Symlink(SymlinkTarget),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

impl Content {
    /// The kind of file.
    pub const fn kind(&self) -> FileKind {
        match self {
            Self::Directory(_) => FileKind::Directory,
            Self::File(_) => FileKind::File,
            Self::Symlink(_) => FileKind::Symlink,
            Self::CharDevice(_) => FileKind::CharDevice,
            Self::BlockDevice(_) => FileKind::BlockDevice,
            Self::Fifo => FileKind::Fifo,
            Self::Socket => FileKind::Socket,
        }
    }
}

/// A node.
#[derive(Debug)]
pub struct Node {
    attributes: Attributes,
    content: Content,
}

impl Node {
    /// Owner, mode, time, extended attributes.
    pub const fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// What the node is.
    pub const fn content(&self) -> &Content {
        &self.content
    }

    /// The node's entries if it is a directory.
    pub const fn directory(&self) -> Option<&Directory> {
        match &self.content {
            Content::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

/// A change that would break the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// An entry in something that is no directory.
    #[error("the parent is not a directory")]
    NotADirectory,
    /// A second name for a directory.
    #[error("a directory cannot have a second name")]
    DirectoryLink,
    /// More than 2^32 nodes.
    #[error("the tree has more than 4294967295 nodes")]
    TooMany,
}

/// A tree of nodes.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree of an empty root directory.
    pub fn new(root: Attributes) -> Self {
        Self {
            nodes: vec![Node {
                attributes: root,
                content: Content::Directory(Directory::default()),
            }],
        }
    }

    /// The root directory.
    pub const fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The attributes of a node, to be changed.
    pub fn attributes_mut(&mut self, id: NodeId) -> &mut Attributes {
        &mut self.nodes[id.index()].attributes
    }

    /// How many nodes were ever made: ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// What `name` in `parent` is.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.node(parent).directory()?.0.get(name).copied()
    }

    /// Makes a node under `name`. What had that name loses it, with all below.
    ///
    /// # Errors
    /// `parent` is no directory.
    pub fn insert(
        &mut self,
        parent: NodeId,
        name: Name,
        attributes: Attributes,
        content: Content,
    ) -> Result<NodeId, TreeError> {
        let id = NodeId(u32::try_from(self.nodes.len()).map_err(|_| TreeError::TooMany)?);
        self.entries_mut(parent)?.insert(name, id);
        self.nodes.push(Node {
            attributes,
            content,
        });
        Ok(id)
    }

    /// Gives `node` one more name. What had that name loses it.
    ///
    /// # Errors
    /// `parent` is no directory, or `node` is one.
    pub fn link(&mut self, parent: NodeId, name: Name, node: NodeId) -> Result<(), TreeError> {
        if self.node(node).directory().is_some() {
            return Err(TreeError::DirectoryLink);
        }
        self.entries_mut(parent)?.insert(name, node);
        Ok(())
    }

    /// Takes `name` out of `parent`, with all below; says what it was.
    pub fn remove(&mut self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.entries_mut(parent).ok()?.remove(name)
    }

    fn entries_mut(&mut self, parent: NodeId) -> Result<&mut BTreeMap<Name, NodeId>, TreeError> {
        match &mut self.nodes[parent.index()].content {
            Content::Directory(directory) => Ok(&mut directory.0),
            _ => Err(TreeError::NotADirectory),
        }
    }
}
