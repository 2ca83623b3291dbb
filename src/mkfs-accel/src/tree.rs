//! The tree in a published layer, read by erofs-rs, every chunk verified.
//!
//! erofs-rs is not ours: what it cannot read, the kernel may not read either.

use crate::published::Published;
use accel_erofs::Reader;
use anyhow::{Context, ensure};
use erofs_rs::r#async::EroFS;
use erofs_rs::backend::AsyncImage;
use futures_util::FutureExt;
use serde::Serialize;
use std::io;
use std::ops::Range;

/// A file in a layer's tree.
#[derive(Debug, Clone)]
pub struct Entry {
    /// From the root, without a slash in front; empty for the root.
    pub path: Vec<u8>,
    /// Its number in the image.
    pub nid: u64,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// In bytes.
    pub size: u64,
    /// Modification time: seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Names that it has.
    pub nlink: u32,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
    /// Where a symbolic link leads.
    pub target: Option<Vec<u8>>,
    /// Names of its extended attributes.
    pub xattrs: Vec<String>,
}

/// What kind of file something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// What hides a file of the layers below.
    Whiteout,
}

impl Entry {
    /// What kind of file it is.
    pub fn kind(&self) -> Kind {
        match self.mode & 0o170_000 {
            0o040_000 => Kind::Directory,
            0o120_000 => Kind::Symlink,
            0o020_000 if self.device == Some((0, 0)) => Kind::Whiteout,
            0o020_000 => Kind::CharacterDevice,
            0o060_000 => Kind::BlockDevice,
            0o010_000 => Kind::Fifo,
            0o140_000 => Kind::Socket,
            _ => Kind::File,
        }
    }

    /// Whether it is a directory that hides what the layers below have in it.
    pub fn is_opaque(&self) -> bool {
        self.xattrs
            .iter()
            .any(|name| name == "trusted.overlay.opaque")
    }

    /// Its mode as ls(1) writes it.
    pub fn mode_text(&self) -> String {
        let kind = match self.kind() {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Symlink => 'l',
            Kind::CharacterDevice | Kind::Whiteout => 'c',
            Kind::BlockDevice => 'b',
            Kind::Fifo => 'p',
            Kind::Socket => 's',
        };
        let mut text = String::from(kind);
        for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
            let bits = self.mode >> shift;
            text.push(if bits & 4 == 0 { '-' } else { 'r' });
            text.push(if bits & 2 == 0 { '-' } else { 'w' });
            text.push(match (bits & 1 == 0, self.mode & special == 0) {
                (true, true) => '-',
                (false, true) => 'x',
                (true, false) => letter.to_ascii_uppercase(),
                (false, false) => letter,
            });
        }
        text
    }
}

/// An image for erofs-rs, which never has to wait for it.
struct Image<'a>(&'a Published);

impl AsyncImage for Image<'_> {
    async fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> erofs_rs::Result<()> {
        use accel_erofs::Input;
        let error = |error| erofs_rs::Error::Io(io::Error::other(error));
        self.0.read_at(offset, bytes).map_err(error)
    }
}

/// What a future gives that does not wait.
fn now<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    future
        .now_or_never()
        .context("erofs-rs waits for something")
}

/// A layer's tree.
pub struct Tree<'a> {
    erofs: EroFS<Image<'a>>,
    ours: Reader<&'a Published>,
    /// Where the image's metadata lies.
    metadata: Range<u64>,
}

impl<'a> Tree<'a> {
    /// Opens the tree of a layer.
    ///
    /// # Errors
    /// It is no EROFS image, or damaged.
    pub fn open(layer: &'a Published) -> anyhow::Result<Self> {
        let range = layer.header().metadata();
        Ok(Self {
            erofs: now(EroFS::new(Image(layer)))??,
            ours: Reader::open(layer)?,
            metadata: range.offset..range.offset.saturating_add(range.length),
        })
    }

    /// Visits the root and everything below it; a directory before what is in it.
    ///
    /// # Errors
    /// The tree is damaged, or the visitor's.
    pub fn walk(&self, mut visit: impl FnMut(Entry) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let root = self.erofs.super_block().root_inode_id();
        visit(self.entry(Vec::new(), &now(self.erofs.get_inode(root))??)?)?;
        let mut walk = now(self.erofs.walk_dir("/"))??;
        while let Some(found) = now(walk.next_entry())? {
            let found = found?;
            let path = found.dir_entry.path();
            let path = path.as_bytes();
            let path = path.strip_prefix(b"/").unwrap_or(path).to_vec();
            visit(self.entry(path, &found.inode)?)?;
        }
        Ok(())
    }

    fn entry(&self, path: Vec<u8>, inode: &erofs_rs::types::Inode) -> anyhow::Result<Entry> {
        let place = || format!("{:?}", String::from_utf8_lossy(&path));
        let target = match inode.is_symlink() {
            true => {
                let target = now(self.erofs.read_link_inode(*inode))?;
                Some(target.with_context(place)?.as_bytes().to_vec())
            }
            false => None,
        };
        let xattrs = now(self.erofs.xattrs_inode(*inode))?.with_context(place)?;
        let text = |name: &Vec<u8>| String::from_utf8_lossy(name).into_owned();
        let xattrs = xattrs.keys().map(text).collect();
        use std::os::unix::fs::PermissionsExt;
        Ok(Entry {
            nid: inode.id(),
            mode: inode.file_type().as_raw_mode() | inode.permissions().mode() & 0o7777,
            uid: inode.uid(),
            gid: inode.gid(),
            size: inode.data_size(),
            mtime: inode.modified_unix(),
            nlink: inode.nlink(),
            device: inode.device(),
            target,
            xattrs,
            path,
        })
    }

    /// Where the bytes of a regular file lie in the image; nothing if it is something
    /// else.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn data(&self, entry: &Entry) -> anyhow::Result<Option<Range<u64>>> {
        let inode = self.ours.inode(entry.nid)?;
        let Some(range) = self.ours.file_range(&inode)? else {
            return Ok(None);
        };
        ensure!(
            range.is_empty() || range.end <= self.metadata.start,
            "{:?}: its data ({range:?}) lies behind the image's data",
            String::from_utf8_lossy(&entry.path),
        );
        Ok(Some(range))
    }
}
