//! Applies the entries of a layer to a tree, data to the image as it comes.
//!
//! The rules are in the crate's documentation.

use crate::{
    archive::{Archive, ArchiveError, Entry, Kind},
    error::{EntryProblem, LowerError},
    lower::{LowerDirectory, LowerLookup},
    walk::{self, Files, Resolved},
};
use accel_erofs::{
    Attributes, Content, Device, Directory, Extent, FileKind, ImageWriter, Name, NodeId, Output,
    Permissions, SymlinkTarget, Timestamp, Tree, WriteError, XattrError, XattrName, Xattrs,
};
use std::{convert::Infallible, error::Error, io::BufRead};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS kept for itself, and what marks a directory opaque.
const AUFS: &[u8] = b".wh..wh.";
/// `PATH_MAX`.
const MAX_PATH: usize = 4096;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why an entry could not be applied.
#[derive(Debug)]
pub enum ApplyError<E: Error + 'static> {
    Entry(EntryProblem),
    Archive(ArchiveError),
    Lower { path: String, source: LowerError },
    Write(WriteError<E>),
}

impl<E: Error, P: Into<EntryProblem>> From<P> for ApplyError<E> {
    fn from(problem: P) -> Self {
        Self::Entry(problem.into())
    }
}

/// A tree that grows, and the image its data goes to.
#[derive(Debug)]
pub struct Applier<'a, L: ?Sized, O> {
    pub tree: Tree,
    pub writer: ImageWriter<O>,
    lower: &'a mut L,
    /// The layers below were asked.
    pub needs_lower: bool,
    pub ignored_xattrs: u64,
}

impl<'a, L: LowerLookup + ?Sized, O: Output> Applier<'a, L, O> {
    pub fn new(lower: &'a mut L, writer: ImageWriter<O>) -> Self {
        Self {
            tree: Tree::new(new_directory()),
            writer,
            lower,
            needs_lower: false,
            ignored_xattrs: 0,
        }
    }

    /// Applies one entry and takes its data.
    pub fn apply<R: BufRead>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), ApplyError<O::Error>> {
        let parts = clean(&entry.path)?;
        let Some((&base, above)) = parts.split_last() else {
            // Of the root only the time is taken.
            let root = self.tree.root();
            self.tree.attributes_mut(root).mtime = clamp(entry.mtime);
            return Ok(());
        };
        if above.iter().any(|part| part.starts_with(AUFS))
            || (base.starts_with(AUFS) && base != OPAQUE)
        {
            return Ok(());
        }
        if above.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(EntryProblem::Whiteout.into());
        }
        let parent = self.parent(above)?;
        if base == OPAQUE {
            let name = XattrName::new(b"trusted.overlay.opaque")?;
            self.tree.attributes_mut(parent).xattrs.insert(name, b"y")?;
            return Ok(());
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            return self.whiteout(entry, parent, hidden);
        }
        let name = to_name(base)?;
        if let Some(existing) = self.tree.lookup(parent, base) {
            let is_directory = self.tree.node(existing).directory().is_some();
            if is_directory && entry.kind == Kind::Directory {
                return self.set_attributes(existing, entry);
            }
            self.tree.remove(parent, base);
        }
        self.create(entry, archive, parent, name)
    }

    fn create<R: BufRead>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
        parent: NodeId,
        name: Name,
    ) -> Result<(), ApplyError<O::Error>> {
        let device = || Device::new(entry.major, entry.minor);
        let content = match entry.kind {
            Kind::File => Content::File(self.data(entry, archive)?),
            Kind::Directory => Content::Directory(Directory::default()),
            Kind::Symlink => Content::Symlink(SymlinkTarget::new(&entry.link)?),
            Kind::CharDevice => Content::CharDevice(device()?),
            Kind::BlockDevice => Content::BlockDevice(device()?),
            Kind::Fifo => Content::Fifo,
            Kind::HardLink => {
                let target = self.link_target(&entry.link)?;
                self.tree.link(parent, name, target)?;
                return self.set_attributes(target, entry);
            }
            Kind::Other(letter) => return Err(EntryProblem::Type(letter.into()).into()),
        };
        let node = self.tree.insert(parent, name, new_directory(), content)?;
        self.set_attributes(node, entry)
    }

    /// The directory that the path's parts lead to; what is missing is made.
    fn parent(&mut self, path: &[&[u8]]) -> Result<NodeId, ApplyError<O::Error>> {
        let missing = match resolve(&self.tree, path) {
            Resolved::File(node) if self.tree.node(node).directory().is_some() => return Ok(node),
            Resolved::File(_) | Resolved::ThroughFile => {
                return Err(EntryProblem::NotADirectory(join(path)).into());
            }
            Resolved::TooManyLinks => return Err(EntryProblem::TooManyLinks.into()),
            Resolved::Missing(path) => path,
        };
        let len = missing.iter().map(|part| part.len() + 1).sum::<usize>();
        if len > MAX_PATH {
            return Err(EntryProblem::PathTooLong(len).into());
        }
        let mut node = self.tree.root();
        let mut sofar: Vec<&[u8]> = Vec::with_capacity(missing.len());
        for part in &missing {
            sofar.push(part);
            node = match self.tree.lookup(node, part) {
                Some(child) => child,
                None => {
                    let name = to_name(part)?;
                    let attributes = self.implied(&sofar)?;
                    let content = Content::Directory(Directory::default());
                    self.tree.insert(node, name, attributes, content)?
                }
            };
        }
        Ok(node)
    }

    /// The attributes of a directory that only a path implies.
    fn implied(&mut self, path: &[&[u8]]) -> Result<Attributes, ApplyError<O::Error>> {
        self.needs_lower = true;
        let found = self
            .lower
            .directory(path)
            .map_err(|source| ApplyError::Lower {
                path: join(path),
                source,
            })?;
        Ok(match found {
            LowerDirectory::Found(mut attributes) => {
                // Above all not the mark of an opaque directory.
                attributes.xattrs.retain(|name| !name.is_trusted());
                attributes.mtime = clamp((attributes.mtime.seconds(), attributes.mtime.nanos()));
                attributes
            }
            LowerDirectory::Replaced | LowerDirectory::Absent => new_directory(),
        })
    }

    fn whiteout(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        hidden: &[u8],
    ) -> Result<(), ApplyError<O::Error>> {
        let name = Name::new(hidden).map_err(|_| EntryProblem::Whiteout)?;
        if let Some(existing) = self.tree.lookup(parent, hidden) {
            let content = self.tree.node(existing).content();
            if !matches!(content, Content::CharDevice(Device::WHITEOUT)) {
                return Err(EntryProblem::WhiteoutOfOwn.into());
            }
        }
        let attributes = Attributes {
            permissions: Permissions::of_mode(0),
            uid: id("owner", entry.uid)?,
            gid: id("group", entry.gid)?,
            mtime: Timestamp::EPOCH,
            xattrs: Xattrs::new(),
        };
        let content = Content::CharDevice(Device::WHITEOUT);
        self.tree.insert(parent, name, attributes, content)?;
        Ok(())
    }

    fn link_target(&self, link: &[u8]) -> Result<NodeId, ApplyError<O::Error>> {
        let text = || String::from_utf8_lossy(link).into_owned();
        let missing = || EntryProblem::MissingTarget(text());
        let parts = clean(link)?;
        let (base, above) = parts.split_last().ok_or_else(missing)?;
        let parent = match resolve(&self.tree, above) {
            Resolved::File(node) => node,
            Resolved::Missing(_) | Resolved::ThroughFile => return Err(missing().into()),
            Resolved::TooManyLinks => return Err(EntryProblem::TooManyLinks.into()),
        };
        let target = self.tree.lookup(parent, base).ok_or_else(missing)?;
        if self.tree.node(target).directory().is_some() {
            return Err(EntryProblem::LinkToDirectory(text()).into());
        }
        Ok(target)
    }

    /// Takes owner, mode, time and extended attributes from an entry.
    fn set_attributes(&mut self, node: NodeId, entry: &Entry) -> Result<(), ApplyError<O::Error>> {
        let kind = self.tree.node(node).content().kind();
        let attributes = self.tree.attributes_mut(node);
        attributes.uid = id("owner", entry.uid)?;
        attributes.gid = id("group", entry.gid)?;
        attributes.mtime = clamp(entry.mtime);
        attributes.permissions = match kind {
            FileKind::Symlink => Permissions::of_mode(0o777),
            _ => Permissions::of_mode(entry.mode),
        };
        for (name, value) in &entry.xattrs {
            let allowed = match kind {
                FileKind::File | FileKind::Directory => true,
                // The kernel has user attributes of nothing else.
                _ => !name.starts_with(b"user."),
            };
            match XattrName::new(name) {
                Ok(name) if allowed && !name.is_trusted() => {
                    attributes.xattrs.insert(name, value)?;
                }
                Ok(_) | Err(XattrError::Namespace { .. }) => self.ignored_xattrs += 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Streams a file's data into the image.
    fn data<R: BufRead>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<Extent, ApplyError<O::Error>> {
        let mut file = self
            .writer
            .begin_file(entry.size)
            .map_err(ApplyError::Write)?;
        let zeros = |file: &mut accel_erofs::FileWriter<'_, O>, mut len: u64| {
            while len > 0 {
                let step = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
                file.write(&ZEROS[..step]).map_err(ApplyError::Write)?;
                len -= step as u64;
            }
            Ok::<(), ApplyError<O::Error>>(())
        };
        let whole = 0..entry.size;
        let whole = std::slice::from_ref(&whole);
        let mut position = 0;
        for part in entry.sparse.as_deref().unwrap_or(whole) {
            zeros(&mut file, part.start - position)?;
            position = part.start;
            while position < part.end {
                let data = archive.data().map_err(ApplyError::Archive)?;
                let left = usize::try_from(part.end - position).unwrap_or(usize::MAX);
                let data = &data[..data.len().min(left)];
                let len = data.len();
                file.write(data).map_err(ApplyError::Write)?;
                archive.consume(len);
                position += len as u64;
            }
        }
        zeros(&mut file, entry.size - position)?;
        file.finish().map_err(ApplyError::Write)
    }
}

impl Files for Tree {
    type File = NodeId;
    type Error = Infallible;

    fn root(&self) -> Result<NodeId, Infallible> {
        Ok(Tree::root(self))
    }

    fn child(&self, directory: &NodeId, name: &[u8]) -> Result<Option<NodeId>, Infallible> {
        Ok(self.lookup(*directory, name))
    }

    fn kind(&self, file: &NodeId) -> FileKind {
        self.node(*file).content().kind()
    }

    fn target(&self, file: &NodeId) -> Result<Vec<u8>, Infallible> {
        Ok(match self.node(*file).content() {
            Content::Symlink(target) => target.as_bytes().to_vec(),
            _ => Vec::new(),
        })
    }
}

fn resolve(tree: &Tree, path: &[&[u8]]) -> Resolved<NodeId> {
    match walk::resolve(tree, path) {
        Ok(resolved) => resolved,
        Err(never) => match never {},
    }
}

/// A directory that nobody described.
fn new_directory() -> Attributes {
    Attributes {
        permissions: Permissions::of_mode(0o755),
        uid: 0,
        gid: 0,
        mtime: Timestamp::EPOCH,
        xattrs: Xattrs::new(),
    }
}

/// The parts of a path, without "." and empty ones; ".." takes one away.
fn clean(path: &[u8]) -> Result<Vec<&[u8]>, EntryProblem> {
    if path.len() > MAX_PATH {
        return Err(EntryProblem::PathTooLong(path.len()));
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or(EntryProblem::ClimbsOut)?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn to_name(part: &[u8]) -> Result<Name, EntryProblem> {
    Name::new(part).map_err(|source| EntryProblem::Name {
        part: String::from_utf8_lossy(part).into_owned(),
        source,
    })
}

fn join(path: &[&[u8]]) -> String {
    String::from_utf8_lossy(&path.join(&b'/')).into_owned()
}

/// An owner or group; -2 is 4294967294, as `chown(2)` takes it.
fn id(field: &'static str, value: i64) -> Result<u32, EntryProblem> {
    u32::try_from(value)
        .or_else(|_| i32::try_from(value).map(i32::cast_unsigned))
        .map_err(|_| EntryProblem::Number {
            field,
            value: value.cast_unsigned(),
            max: u32::MAX.into(),
        })
}

/// A time within what containerd sets: others become 1970-01-01.
fn clamp((seconds, nanos): (i64, u32)) -> Timestamp {
    // The last nanosecond that fits 63 bits.
    const LAST: (i64, u32) = (i64::MAX / 1_000_000_000, (i64::MAX % 1_000_000_000) as u32);
    if seconds < 0 || (seconds, nanos) > LAST {
        return Timestamp::EPOCH;
    }
    Timestamp::new(seconds, nanos).unwrap_or(Timestamp::EPOCH)
}
