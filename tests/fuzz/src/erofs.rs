//! Arbitrary bytes as an EROFS image, for both readers of images: this project's
//! own and erofs-rs. Errors are fine; where both give an answer it is the same one.

use accel_erofs::{Inode, Input, Reader};
use erofs_rs::{EroFS, backend::SliceImage};
use std::{collections::HashSet, io, os::unix::fs::PermissionsExt};

/// The most entries of an image that are looked at: directories can contain each
/// other's blocks, and so any number of entries.
const MAX_ENTRIES: usize = 4096;

struct Bytes<'a>(&'a [u8]);

impl Input for Bytes<'_> {
    type Error = io::Error;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = self.0.get(start..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Runs one input.
#[allow(dead_code)] // the other target has its own
pub fn run(image: &[u8]) {
    let _ = check(image);
    // What erofs-rs does not get to.
    if let Ok(reader) = Reader::open(Bytes(image))
        && let Ok(root) = reader.root()
    {
        for name in [&b"."[..], b"..", b"a", b"many", b"zzz"] {
            if let Ok(Some(inode)) = reader.lookup(&root, name) {
                let _ = (reader.attributes(&inode), reader.symlink(&inode));
            }
        }
    }
}

/// Reads everything there is, through erofs-rs, and compares it with what our own
/// reader says. How many inodes there are, or what is wrong with the image.
///
/// # Panics
/// When the two readers disagree.
pub fn check(image: &[u8]) -> Result<u64, String> {
    let text = |error: erofs_rs::Error| error.to_string();
    let fs = EroFS::new(SliceImage::new(image)).map_err(text)?;
    let ours = Reader::open(Bytes(image)).ok();
    let mut inodes = HashSet::from([fs.super_block().root_inode_id()]);
    let root = fs
        .get_inode(fs.super_block().root_inode_id())
        .map_err(text)?;
    if let Some(reader) = &ours {
        compare(&fs, root, reader, reader.root().map_err(|e| e.to_string())?)?;
    }
    for entry in fs.walk_dir("/").map_err(text)?.take(MAX_ENTRIES) {
        let entry = entry.map_err(text)?;
        inodes.insert(entry.dir_entry.nid());
        if let Some(reader) = &ours
            && let Some(inode) = find(reader, entry.dir_entry.path().as_bytes())?
        {
            compare(&fs, entry.inode, reader, inode)?;
        }
        if entry.inode.is_file() {
            read(&fs, entry.inode)?;
        }
    }
    Ok(inodes.len() as u64)
}

/// Looks a path up as the converter of a later layer does.
fn find(reader: &Reader<Bytes<'_>>, path: &[u8]) -> Result<Option<Inode>, String> {
    let text = |error: accel_erofs::ReadError<io::Error>| error.to_string();
    let mut inode = reader.root().map_err(text)?;
    for name in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        match reader.lookup(&inode, name).map_err(text)? {
            Some(child) => inode = child,
            None => return Ok(None),
        }
    }
    Ok(Some(inode))
}

fn compare(
    fs: &EroFS<SliceImage<'_>>,
    theirs: erofs_rs::types::Inode,
    reader: &Reader<Bytes<'_>>,
    inode: Inode,
) -> Result<(), String> {
    let ours = reader
        .attributes(&inode)
        .map_err(|error| error.to_string())?;
    let xattrs = fs.xattrs_inode(theirs).map_err(|error| error.to_string())?;
    let permissions = theirs.permissions().mode() & 0o7777;
    assert_eq!(u32::from(ours.permissions.bits()), permissions);
    assert_eq!((ours.uid, ours.gid), (theirs.uid(), theirs.gid()));
    let mtime = (ours.mtime.seconds(), ours.mtime.nanos());
    assert_eq!(mtime, theirs.modified_unix());
    let of_ours = ours
        .xattrs
        .iter()
        .map(|(name, value)| (name.full(), value.to_vec()));
    assert_eq!(
        of_ours.collect::<std::collections::BTreeMap<_, _>>(),
        xattrs
    );
    if theirs.is_symlink() {
        let target = fs
            .read_link_inode(theirs)
            .map_err(|error| error.to_string())?;
        if let Ok(Some(ours)) = reader.symlink(&inode) {
            assert_eq!(ours.as_bytes(), target.as_bytes());
        }
    }
    Ok(())
}

/// Reads a file's data, the beginning of a very long one.
fn read(fs: &EroFS<SliceImage<'_>>, inode: erofs_rs::types::Inode) -> Result<(), String> {
    let file = fs
        .open_inode_file(inode)
        .map_err(|error| error.to_string())?;
    let mut buffer = [0; 4096];
    let mut done = 0;
    while done < file.size().min(1 << 20) {
        let count = file
            .read_at(&mut buffer, done)
            .map_err(|error| error.to_string())?;
        assert!(count > 0, "a file ends early");
        done += count as u64;
    }
    Ok(())
}
