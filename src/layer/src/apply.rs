//! Applies the entries of a layer to a tree, data to the image as it comes.
//!
//! The rules are in the crate's documentation.

use crate::{
    archive::{Archive, ArchiveError, Entry, Kind},
    attributes::{self, clamp, new_directory},
    error::{EntryProblem, LowerError},
    lower::{LowerDirectory, LowerLookup},
    options::LayerOptions,
    walk::{self, Files, MAX_PATH, Resolved},
};
use accel_erofs::{
    Attributes, Content, Device, Directory, Extent, FileKind, ImageWriter, Name, NodeId, Output,
    Permissions, SymlinkTarget, Timestamp, Tree, WriteError, XattrName, Xattrs,
};
use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    error::Error,
    io::BufRead,
};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What an entry takes of [`LayerOptions::max_tree_size`], its texts aside.
const NODE_SIZE: u64 = 512;
/// And what an extended attribute takes, name and value aside: it is in several maps.
const XATTR_SIZE: u64 = 512;
/// The most files that are looked at for all marks of opaque directories together.
const MAX_MARKED: u64 = 1 << 26;
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
    /// There are no layers below: whiteouts remove what the layer itself has made.
    lowest: bool,
    /// The tree depends on the layers below, or on that there are none.
    pub needs_lower: bool,
    /// There were whiteouts or marks of opaque directories.
    pub whiteouts: bool,
    pub ignored_xattrs: u64,
    /// Of `max_tree_size`, and what is left of it.
    tree_size: (u64, u64),
    /// What is left of [`MAX_MARKED`].
    markable: u64,
    /// Directories that only a path implied.
    implied: HashSet<NodeId>,
    times: DirectoryTimes,
}

/// containerd sets the times of directories last of all, by their paths. A
/// directory that something else has replaced, it or one above it, so gives its time to
/// what is there in the end, or to what a symbolic link in its place leads to.
#[derive(Debug, Default)]
struct DirectoryTimes {
    /// How many entries were directories.
    entries: u64,
    /// Which of these the last one of each directory was.
    last: HashMap<NodeId, u64>,
    /// Which entry, its path (parts between slashes) and its time.
    replaced: Vec<(u64, Box<[u8]>, Timestamp)>,
}

impl<'a, L: LowerLookup + ?Sized, O: Output> Applier<'a, L, O> {
    pub fn new(lower: &'a mut L, options: &LayerOptions, writer: ImageWriter<O>) -> Self {
        Self {
            tree: Tree::new(new_directory()),
            writer,
            lower,
            lowest: options.parent.is_none(),
            needs_lower: false,
            whiteouts: false,
            ignored_xattrs: 0,
            tree_size: (options.max_tree_size, options.max_tree_size),
            markable: MAX_MARKED,
            implied: HashSet::new(),
            times: DirectoryTimes::default(),
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
            if entry.kind == Kind::Directory {
                let root = self.tree.root();
                self.tree.attributes_mut(root).mtime = clamp(entry.mtime);
            }
            return Ok(());
        };
        self.charge(base.len() + entry.link.len())?;
        for (name, value) in &entry.xattrs {
            self.charge_bytes(XATTR_SIZE + (name.len() + value.len()) as u64)?;
        }
        let parent = self.parent(above)?;
        if base == OPAQUE {
            return self.opaque(parent, above);
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            return self.whiteout(entry, parent, above, hidden);
        }
        let name = to_name(base)?;
        if let Some(existing) = self.tree.lookup(parent, base) {
            let is_directory = self.tree.node(existing).directory().is_some();
            if is_directory && entry.kind == Kind::Directory {
                return self.set_attributes(existing, entry);
            }
            self.keep_times(existing, &parts)?;
            self.tree.remove(parent, base);
        }
        self.create(entry, archive, parent, name)
    }

    /// What is at `path` is replaced or removed, with all that is in it: notes the times
    /// of its directories for whatever is at their paths in the end.
    fn keep_times(&mut self, node: NodeId, path: &[&[u8]]) -> Result<(), EntryProblem> {
        let mut path: Vec<Vec<u8>> = path.iter().map(|part| part.to_vec()).collect();
        let Some(name) = path.pop() else {
            return Ok(());
        };
        // How deep it lies, its name, and what it is.
        let mut rest = vec![(path.len(), name, node)];
        while let Some((depth, name, node)) = rest.pop() {
            path.truncate(depth);
            path.push(name);
            let Some(directory) = self.tree.node(node).directory() else {
                continue;
            };
            let below = directory.iter();
            let below = below.filter(|(_, child)| self.tree.node(*child).directory().is_some());
            rest.extend(below.map(|(name, child)| (depth + 1, name.as_bytes().to_vec(), child)));
            if let Some(&last) = self.times.last.get(&node) {
                let time = self.tree.node(node).attributes().mtime;
                let path = path.join(&b'/').into_boxed_slice();
                self.charge(path.len())?;
                self.times.replaced.push((last, path, time));
            }
        }
        Ok(())
    }

    /// Counts one more node in memory, with `texts` bytes of its own.
    fn charge(&mut self, texts: usize) -> Result<(), EntryProblem> {
        self.charge_bytes(NODE_SIZE + texts as u64)
    }

    /// Counts attributes that a file does not have from its own entry.
    fn charge_xattrs(&mut self, xattrs: &Xattrs) -> Result<(), EntryProblem> {
        self.charge_bytes(xattrs.iter().len() as u64 * XATTR_SIZE + xattrs.size())
    }

    fn charge_bytes(&mut self, bytes: u64) -> Result<(), EntryProblem> {
        let (limit, left) = self.tree_size;
        let left = left.checked_sub(bytes);
        let left = left.ok_or(EntryProblem::TreeTooLarge { limit })?;
        self.tree_size = (limit, left);
        Ok(())
    }

    /// Says that all entries were applied.
    pub fn finish(&mut self) {
        self.times
            .replaced
            .sort_unstable_by_key(|(entry, ..)| *entry);
        for (entry, path, time) in std::mem::take(&mut self.times.replaced) {
            let path: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
            if let Resolved::File(node) = resolve(&self.tree, &path)
                && self.times.last.get(&node).is_none_or(|last| *last < entry)
            {
                self.tree.attributes_mut(node).mtime = time;
            }
        }
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
            // Only its name had a say.
            Kind::Global => return Ok(()),
            Kind::Other(letter) => return Err(EntryProblem::Type(letter.into()).into()),
        };
        let above = self.tree.node(parent).attributes();
        let attributes = attributes::born(above, content.kind())?;
        self.charge_xattrs(&attributes.xattrs)?;
        let node = self.tree.insert(parent, name, attributes, content)?;
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
            Resolved::TooLong(len) => return Err(EntryProblem::PathTooLong(len).into()),
            Resolved::Missing(path) => path,
        };
        let mut node = self.tree.root();
        let mut sofar: Vec<&[u8]> = Vec::with_capacity(missing.len());
        let mut below = true;
        for part in &missing {
            sofar.push(part);
            node = match self.tree.lookup(node, part) {
                Some(child) => child,
                None => {
                    let name = to_name(part)?;
                    self.charge(part.len())?;
                    let attributes = self.implied(node, &sofar, &mut below)?;
                    let content = Content::Directory(Directory::default());
                    let child = self.tree.insert(node, name, attributes, content)?;
                    self.implied.insert(child);
                    child
                }
            };
        }
        Ok(node)
    }

    /// The attributes of a directory in `parent` that only a path implies. `below`
    /// says whether a layer below has what it is in, then whether it has this.
    fn implied(
        &mut self,
        parent: NodeId,
        path: &[&[u8]],
        below: &mut bool,
    ) -> Result<Attributes, ApplyError<O::Error>> {
        self.needs_lower = true;
        let found = match *below {
            true => self.lower.directory(path),
            false => Ok(LowerDirectory::Absent),
        };
        let found = found.map_err(|source| ApplyError::Lower {
            path: join(path),
            source,
        })?;
        *below = matches!(found, LowerDirectory::Found(_));
        let above = self.tree.node(parent).attributes();
        let mut attributes = attributes::born(above, FileKind::Directory)?;
        attributes::chmod(&mut attributes, Permissions::of_mode(0o755))?;
        if let LowerDirectory::Found(lower) = found {
            attributes.uid = lower.uid;
            attributes.gid = lower.gid;
            attributes.mtime = clamp((lower.mtime.seconds(), lower.mtime.nanos()));
            attributes::chmod(&mut attributes, lower.permissions)?;
            for (name, value) in lower.xattrs.iter() {
                // Above all not the mark of an opaque directory.
                if !name.is_trusted() {
                    attributes.xattrs.insert(name.clone(), value)?;
                }
            }
        }
        self.charge_xattrs(&attributes.xattrs)?;
        Ok(attributes)
    }

    /// Hides what the layers below have in the directory at `path`.
    fn opaque(&mut self, directory: NodeId, path: &[&[u8]]) -> Result<(), ApplyError<O::Error>> {
        self.whiteouts = true;
        if !self.lowest {
            let name = XattrName::new(b"trusted.overlay.opaque")?;
            self.tree
                .attributes_mut(directory)
                .xattrs
                .insert(name, b"y")?;
            return Ok(());
        }
        // What no entry named is taken for a lower layer's.
        self.needs_lower = true;
        let mut path: Vec<Vec<u8>> = path.iter().map(|part| part.to_vec()).collect();
        // How much of the path leads to the one above it, its name, and what it is.
        let mut waiting = vec![(path.len(), None, directory)];
        while let Some((depth, name, directory)) = waiting.pop() {
            path.truncate(depth);
            path.extend(name);
            let Some(entries) = self.tree.node(directory).directory() else {
                continue;
            };
            let count = entries.iter().len() as u64;
            let left = self.markable.checked_sub(count + 1);
            self.markable = left.ok_or(EntryProblem::TooManyMarks)?;
            let mut gone = Vec::new();
            for (name, node) in entries.iter() {
                if self.implied.contains(&node) {
                    gone.push((name.clone(), node));
                } else if self.tree.node(node).directory().is_some() {
                    waiting.push((path.len(), Some(name.as_bytes().to_vec()), node));
                }
            }
            for (name, node) in gone {
                let mut path: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
                path.push(name.as_bytes());
                self.keep_times(node, &path)?;
                self.tree.remove(directory, name.as_bytes());
            }
        }
        Ok(())
    }

    fn whiteout(
        &mut self,
        entry: &Entry,
        parent: NodeId,
        above: &[&[u8]],
        hidden: &[u8],
    ) -> Result<(), ApplyError<O::Error>> {
        let name = Name::new(hidden).map_err(|_| EntryProblem::Whiteout)?;
        self.whiteouts = true;
        if self.lowest {
            self.needs_lower = true;
            if let Some(existing) = self.tree.lookup(parent, hidden) {
                self.keep_times(existing, &[above, &[hidden]].concat())?;
                self.tree.remove(parent, hidden);
            }
            return Ok(());
        }
        if let Some(existing) = self.tree.lookup(parent, hidden) {
            let content = self.tree.node(existing).content();
            if !matches!(content, Content::CharDevice(Device::WHITEOUT)) {
                return Err(EntryProblem::WhiteoutOfOwn.into());
            }
        }
        let kind = FileKind::CharDevice;
        let mut attributes = attributes::born(self.tree.node(parent).attributes(), kind)?;
        attributes::chmod(&mut attributes, Permissions::of_mode(0))?;
        attributes::chown(&mut attributes, kind, entry)?;
        self.charge_xattrs(&attributes.xattrs)?;
        let content = Content::CharDevice(Device::WHITEOUT);
        self.tree.insert(parent, name, attributes, content)?;
        Ok(())
    }

    /// What a hard link is to. Symbolic links on its way are followed before a ".."
    /// behind them counts; one at the end is not.
    fn link_target(&self, link: &[u8]) -> Result<NodeId, ApplyError<O::Error>> {
        let text = || String::from_utf8_lossy(link).into_owned();
        let missing = || EntryProblem::MissingTarget(text());
        clean(link)?;
        let parts: Vec<&[u8]> = link.split(|byte| *byte == b'/').collect();
        let (base, above) = match parts.split_last() {
            Some((&base, above)) if !matches!(base, b"" | b"." | b"..") => (Some(base), above),
            _ => (None, &parts[..]),
        };
        let found = match resolve(&self.tree, above) {
            Resolved::File(node) => node,
            Resolved::Missing(_) | Resolved::ThroughFile => return Err(missing().into()),
            Resolved::TooManyLinks => return Err(EntryProblem::TooManyLinks.into()),
            Resolved::TooLong(len) => return Err(EntryProblem::PathTooLong(len).into()),
        };
        let target = match base {
            Some(base) => self.tree.lookup(found, base).ok_or_else(missing)?,
            None => found,
        };
        if self.tree.node(target).directory().is_some() {
            return Err(EntryProblem::LinkToDirectory(text()).into());
        }
        Ok(target)
    }

    /// Takes owner, extended attributes, mode and time from an entry.
    fn set_attributes(&mut self, node: NodeId, entry: &Entry) -> Result<(), ApplyError<O::Error>> {
        let kind = self.tree.node(node).content().kind();
        if kind == FileKind::Directory {
            self.times.last.insert(node, self.times.entries);
            self.times.entries += 1;
            self.implied.remove(&node);
        }
        let attributes = self.tree.attributes_mut(node);
        attributes::chown(attributes, kind, entry)?;
        for (name, value) in &entry.xattrs {
            if !attributes::set_xattr(attributes, kind, name, value)? {
                self.ignored_xattrs += 1;
            }
        }
        let mode = match kind {
            FileKind::Symlink => 0o777,
            _ => entry.mode,
        };
        attributes::chmod(attributes, Permissions::of_mode(mode))?;
        attributes.mtime = clamp(entry.mtime);
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
