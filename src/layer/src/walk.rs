//! Follows a path through a tree, symbolic links included, without leaving it.
//!
//! As containerd resolves paths in a layer (`continuity/fs.RootPath`): a link's
//! target counts from the tree's root if it is absolute, ".." stops at the root,
//! and what does not exist is taken as it is spelled.

use accel_erofs::FileKind;

/// The most symbolic links on one way.
pub const MAX_LINKS: u32 = 255;
/// The most bytes of a path, links on it followed: `PATH_MAX`.
pub const MAX_PATH: usize = 4096;

/// A tree of files.
pub trait Files {
    /// A file in it.
    type File: Clone;
    /// Why it cannot be read.
    type Error;

    /// The root directory.
    fn root(&self) -> Result<Self::File, Self::Error>;
    /// What has that name in a directory.
    fn child(&self, directory: &Self::File, name: &[u8])
    -> Result<Option<Self::File>, Self::Error>;
    /// What kind of file it is.
    fn kind(&self, file: &Self::File) -> FileKind;
    /// What a symbolic link says.
    fn target(&self, file: &Self::File) -> Result<Vec<u8>, Self::Error>;
}

/// Where a path leads.
#[derive(Debug)]
pub enum Resolved<F> {
    /// To this file, which is no symbolic link.
    File(F),
    /// To nothing, by these names from the root.
    Missing(Vec<Vec<u8>>),
    /// To what is so many bytes from the root, more than [`MAX_PATH`].
    TooLong(usize),
    /// Through a file that is neither directory nor link.
    ThroughFile,
    /// Round and round.
    TooManyLinks,
}

/// Follows `path`, its parts from the root.
pub fn resolve<T: Files>(files: &T, path: &[&[u8]]) -> Result<Resolved<T::File>, T::Error> {
    // The parts still to go, the next one last.
    let mut ahead: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
    // The way so far: names, and the file each leads to as long as there is one.
    let mut way: Vec<(Vec<u8>, Option<T::File>)> = Vec::new();
    let root = files.root()?;
    let mut links = 0;
    while let Some(part) = ahead.pop() {
        match &*part {
            b"" | b"." => continue,
            b".." => {
                way.pop();
                continue;
            }
            _ => {}
        }
        let parent = way.last().map_or(Some(&root), |(_, file)| file.as_ref());
        let Some(parent) = parent else {
            way.push((part, None));
            continue;
        };
        if files.kind(parent) != FileKind::Directory {
            return Ok(Resolved::ThroughFile);
        }
        let child = files.child(parent, &part)?;
        match child {
            Some(link) if files.kind(&link) == FileKind::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(Resolved::TooManyLinks);
                }
                let target = files.target(&link)?;
                if target.starts_with(b"/") {
                    way.clear();
                }
                ahead.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            }
            child => way.push((part, child)),
        }
    }
    let len = way.iter().map(|(name, _)| name.len() + 1).sum();
    Ok(match way.last() {
        Some(_) if len > MAX_PATH => Resolved::TooLong(len),
        None => Resolved::File(root),
        Some((_, Some(file))) => Resolved::File(file.clone()),
        Some((_, None)) => Resolved::Missing(way.into_iter().map(|(name, _)| name).collect()),
    })
}
