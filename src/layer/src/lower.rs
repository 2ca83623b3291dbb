//! The layers below, as far as a layer needs them: the attributes of a directory
//! that only a path implies.

use crate::{error::LowerError, walk};
use accel_erofs::{Attributes, FileKind, Inode, Input, Reader};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// What a layer below has at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LowerDirectory {
    /// A directory.
    Found(Attributes),
    /// Something else: the directory is a new one, whatever lies further below.
    Replaced,
    /// Nothing.
    Absent,
}

/// Answers for the layers below the one that is converted.
pub trait LowerLookup {
    /// The directory at `path` (parts without slashes, from the root) in the
    /// nearest layer that has anything there. Symbolic links on the way and at
    /// the end are followed within each layer by itself.
    ///
    /// # Errors
    /// A layer below could not be read: the conversion fails.
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError>;
}

/// No layers below.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLower;

impl LowerLookup for NoLower {
    fn directory(&mut self, _path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        Ok(LowerDirectory::Absent)
    }
}

impl<L: LowerLookup + ?Sized> LowerLookup for &mut L {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        (**self).directory(path)
    }
}

impl<L: LowerLookup + ?Sized> LowerLookup for Box<L> {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        (**self).directory(path)
    }
}

/// Several layers, the nearest first.
#[derive(Debug, Default)]
pub struct LowerStack<L>(pub Vec<L>);

impl<L: LowerLookup> LowerLookup for LowerStack<L> {
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        for layer in &mut self.0 {
            match layer.directory(path)? {
                LowerDirectory::Absent => {}
                answer => return Ok(answer),
            }
        }
        Ok(LowerDirectory::Absent)
    }
}

/// An image in a file.
#[derive(Debug)]
pub struct ImageFile(pub File);

impl Input for ImageFile {
    type Error = io::Error;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), io::Error> {
        self.0.read_exact_at(bytes, offset)
    }
}

/// One layer below, from its published image.
#[derive(Debug)]
pub struct ErofsLower<I>(Reader<I>);

impl ErofsLower<ImageFile> {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// Not an image of layout 1, or not readable.
    pub fn open_file(path: &Path) -> Result<Self, LowerError> {
        Self::open(ImageFile(File::open(path)?))
    }
}

impl<I> ErofsLower<I>
where
    I: Input,
    I::Error: Send + Sync,
{
    /// Opens an image.
    ///
    /// # Errors
    /// Not an image of layout 1, or not readable.
    pub fn open(input: I) -> Result<Self, LowerError> {
        Ok(Self(Reader::open(input)?))
    }
}

impl<I> walk::Files for Reader<I>
where
    I: Input,
    I::Error: Send + Sync,
{
    type File = Inode;
    type Error = LowerError;

    fn root(&self) -> Result<Inode, LowerError> {
        Ok(Reader::root(self)?)
    }

    fn child(&self, directory: &Inode, name: &[u8]) -> Result<Option<Inode>, LowerError> {
        Ok(self.lookup(directory, name)?)
    }

    fn kind(&self, file: &Inode) -> FileKind {
        file.kind()
    }

    fn target(&self, file: &Inode) -> Result<Vec<u8>, LowerError> {
        let target = self.symlink(file)?;
        Ok(target.map_or_else(Vec::new, |target| target.as_bytes().to_vec()))
    }
}

impl<I> LowerLookup for ErofsLower<I>
where
    I: Input,
    I::Error: Send + Sync,
{
    fn directory(&mut self, path: &[&[u8]]) -> Result<LowerDirectory, LowerError> {
        let found = match walk::resolve(&self.0, path)? {
            walk::Resolved::File(file) => file,
            // Nothing that has a path is there.
            walk::Resolved::Missing(_) | walk::Resolved::TooLong(_) => {
                return Ok(LowerDirectory::Absent);
            }
            walk::Resolved::ThroughFile | walk::Resolved::TooManyLinks => {
                return Ok(LowerDirectory::Replaced);
            }
        };
        if found.kind() != FileKind::Directory {
            return Ok(LowerDirectory::Replaced);
        }
        self.0
            .attributes(&found)
            .map(LowerDirectory::Found)
            .map_err(LowerError::from)
    }
}
