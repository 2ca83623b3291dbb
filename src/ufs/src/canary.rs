//! A node's canary: what it reads to see whether it can read.
//!
//! It looks like a layer, and no image has it: 256 slots of a mebibyte, each with 4 KiB
//! of bytes at its beginning that exist nowhere else, and a hole behind them. So it takes a
//! mebibyte on UFS. Each slot is read once: no cache of the node can have what comes, and
//! what comes is known beforehand. When all were read another canary takes its place.
//!
//! A slot is greater than what a daemon reads together because one chunk of it is wanted;
//! chunks of zeros are not read at all.
//!
//! It lies where nodes write what they use (`nodes/`), because they need not be able to write
//! anywhere else. Beside it is a note of which canary is the node's, so that it goes when the
//! node has another one, or is no more.

use crate::error::UfsError;
use crate::index::{ByteRange, CHUNK_SIZE, ChunkNo, ImageSize, IndexBuilder, Root};
use crate::names::LayerName;
use crate::node::{NODES, NodeName};
use crate::publish::Ufs;
use crate::removal::unlink;
use accel_oci::Digest;
use rustix::fs::Advice;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of a read.
pub const READ: usize = 4096;
/// Slots of a canary.
const SLOTS: u64 = 256;
/// Chunks of a slot.
const SLOT: u64 = 8;
/// Slots at either end that are left alone: the kernel, and who wants to know what is on a
/// device, look there.
const LOOKED_AT: u64 = 2;
/// Reads jump by so many slots, so that nobody takes them for the beginning of a long one. Has
/// no divisor in common with the number of slots that are read.
const STRIDE: u64 = 97;
/// After how long a canary is nobody's any more: a living node has another one within the hour.
const ABANDONED: Duration = Duration::from_hours(24);
/// How often a canary can be read.
pub const READS: u64 = SLOTS - 2 * LOOKED_AT;

/// A canary that is on UFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    /// What it is called.
    pub digest: Digest,
    /// Its BLAKE3.
    pub root: Root,
    /// Its size.
    pub size: ImageSize,
}

impl Canary {
    /// Where the read with this number (less than [`READS`]) is done, in bytes from the
    /// beginning: [`READ`] bytes.
    pub const fn offset(read: u64) -> u64 {
        start_of(chunk_of(read))
    }

    /// What that read gives.
    pub fn content(&self, read: u64) -> Vec<u8> {
        content(&self.digest, chunk_of(read))
    }
}

const fn chunk_of(read: u64) -> ChunkNo {
    ChunkNo((LOOKED_AT + read * STRIDE % READS) * SLOT)
}

const fn start_of(chunk: ChunkNo) -> u64 {
    chunk.0 * CHUNK_SIZE as u64
}

/// What a slot begins with: nothing that has to be a secret, only what nobody has.
fn content(digest: &Digest, chunk: ChunkNo) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(READ);
    let mut part = 0_u32;
    while bytes.len() < READ {
        let more = Digest::of(format!("canary {digest} {chunk} {part}").as_bytes());
        bytes.extend_from_slice(more.as_bytes());
        part += 1;
    }
    bytes.truncate(READ);
    bytes
}

impl Ufs {
    /// Puts a new canary on UFS in place of the one that the node had. May be repeated after
    /// an error.
    ///
    /// # Errors
    /// UFS cannot be written to.
    pub fn put_canary(&self, node: &NodeName) -> Result<Canary, UfsError> {
        self.check_there()?;
        self.make_nodes()?;
        self.remove_canary(node)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let digest = Digest::of(format!("{} {node:?} {now:?}", self.owner()).as_bytes());
        let name = LayerName::Canary(digest);
        // Before there is anything that would have to be removed.
        let note = self.root().join(node.canary_note());
        write(&note, |file| {
            (&*file).write_all(digest.to_string().as_bytes())
        })?;
        let bytes = SLOTS * SLOT * CHUNK_SIZE as u64;
        let mut index = IndexBuilder::new();
        let image = self.path(&name.image());
        write(&image, |file| {
            file.set_len(bytes)?;
            let zeros = vec![0; CHUNK_SIZE];
            let mut chunk = zeros.clone();
            for number in (0..SLOTS * SLOT).map(ChunkNo) {
                let added = if number.0.is_multiple_of(SLOT) {
                    chunk[..READ].copy_from_slice(&content(&digest, number));
                    file.write_all_at(&chunk[..READ], start_of(number))?;
                    index.add(number, &chunk)
                } else {
                    index.add(number, &zeros)
                };
                added.map_err(io::Error::other)?;
            }
            Ok(())
        })?;
        let metadata = ByteRange {
            offset: 0,
            length: READ as u64,
        };
        let size = ImageSize::new(bytes).map_err(io::Error::other);
        let built = index.finish(bytes, metadata).map_err(io::Error::other);
        let built = built.and_then(|(root, index)| Ok((root, index, size?)));
        let (root, index, size) = built.map_err(UfsError::io("make the index of", &image))?;
        let path = self.path(&name.index());
        write(&path, |file| (&*file).write_all(&index))?;
        Ok(Canary { digest, root, size })
    }

    /// Removes the node's canary, if it has one.
    ///
    /// # Errors
    /// UFS cannot be written to.
    pub fn remove_canary(&self, node: &NodeName) -> Result<(), UfsError> {
        let note = self.root().join(node.canary_note());
        let noted = match fs::read_to_string(&note) {
            Ok(noted) => noted,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(UfsError::io("read", &note)(error)),
        };
        // One that was not written to its end names nothing.
        if let Ok(digest) = noted.trim().parse() {
            let name = LayerName::Canary(digest);
            unlink(&self.path(&name.index()))?;
            unlink(&self.path(&name.image()))?;
        }
        unlink(&note)
    }

    /// Files of canaries, and notes of them, that nodes have left which are no more; with
    /// their sizes on UFS, bytes. `clock` is UFS's ([`Ufs::clock`]).
    ///
    /// # Errors
    /// UFS does not answer.
    pub fn abandoned_canaries(&self, clock: SystemTime) -> Result<Vec<(PathBuf, u64)>, UfsError> {
        let mut found = Vec::new();
        for name in self.list(&self.rel(NODES)?)? {
            let path = self.root().join(NODES).join(&name);
            if !matches!(path.extension(), Some(kind) if kind == "canary" || kind == "canary-idx") {
                continue;
            }
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(UfsError::io("look at", &path)(error)),
            };
            let age = |made| clock.duration_since(made).ok();
            let age = metadata.modified().ok().and_then(age);
            if age.is_some_and(|age| age >= ABANDONED) {
                found.push((path, metadata.blocks() * 512));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Makes a file that is complete, on stable storage, and not in this machine's memory.
fn write(path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), UfsError> {
    let make = || {
        let mut options = OpenOptions::new();
        // Nothing that somebody has put there leads elsewhere.
        let options = options.write(true).create_new(true).mode(0o644);
        let file = options.open(path)?;
        fill(&file)?;
        file.sync_all()?;
        // Who can read without O_DIRECT only must not be answered from here.
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(())
    };
    make().map_err(UfsError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Layout;
    use std::collections::HashSet;

    #[test]
    fn nothing_is_read_twice_nor_what_others_look_at() {
        let chunks: Vec<_> = (0..READS).map(|read| chunk_of(read).0).collect();
        let slots: HashSet<_> = chunks.iter().map(|chunk| chunk / SLOT).collect();
        assert_eq!(slots.len() as u64, READS);
        let inner = LOOKED_AT..SLOTS - LOOKED_AT;
        assert!(slots.iter().all(|slot| inner.contains(slot)));
        for two in chunks.windows(2) {
            assert_ne!(two[0] + SLOT, two[1], "a long read");
        }
    }

    #[test]
    fn what_is_on_ufs_is_what_will_be_compared_and_the_index_is_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let ufs = Ufs::open(directory.path()).unwrap();
        let node = NodeName::new("c", "n.x").unwrap();
        let canary = ufs.put_canary(&node).unwrap();
        let name = LayerName::Canary(canary.digest);
        let header = ufs.index_header(&name).unwrap();
        assert_eq!(
            (header.root(), header.image_size()),
            (canary.root, canary.size)
        );
        let image = File::open(ufs.path(&name.image())).unwrap();
        let found = image.metadata().unwrap();
        assert_eq!(found.len(), canary.size.bytes());
        assert!(found.blocks() * 512 <= 4 << 20, "holes take no room");
        let mut hash = blake3::Hasher::new();
        let (mut seen, layout) = (HashSet::new(), Layout::new(canary.size));
        let mut chunk = vec![0; CHUNK_SIZE];
        for number in (0..layout.chunks()).map(ChunkNo) {
            image.read_exact_at(&mut chunk, start_of(number)).unwrap();
            hash.update(&chunk);
            if number.0.is_multiple_of(SLOT) {
                assert!(seen.insert(chunk.clone()), "it exists elsewhere");
            } else {
                assert!(
                    chunk.iter().all(|byte| *byte == 0),
                    "its neighbours are read"
                );
            }
        }
        assert_eq!(hash.finalize().as_bytes(), &canary.root.0);
        for read in [0, 1, READS - 1] {
            let mut bytes = vec![0; READ];
            image
                .read_exact_at(&mut bytes, Canary::offset(read))
                .unwrap();
            assert_eq!(bytes, canary.content(read));
        }
    }

    #[test]
    fn a_node_has_one_and_none_when_it_is_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let ufs = Ufs::open(directory.path()).unwrap();
        let [node, other] = ["n", "m"].map(|node| NodeName::new("c", node).unwrap());
        let files = || {
            let mut files = ufs.list(&ufs.rel("nodes").unwrap()).unwrap();
            files.sort();
            files
        };
        let kept = ufs.put_canary(&other).unwrap();
        let others = files();
        let first = ufs.put_canary(&node).unwrap();
        let second = ufs.put_canary(&node).unwrap();
        assert_ne!(first.digest, second.digest);
        assert_eq!(files().len(), 6);
        // Nothing of it is taken for what a node says.
        assert_eq!(ufs.nodes().unwrap(), []);
        ufs.forget_node(&node).unwrap();
        assert_eq!(files(), others);
        ufs.index_header(&LayerName::Canary(kept.digest)).unwrap();
        // As a crash can leave it.
        fs::write(ufs.root().join(node.canary_note()), "sha2").unwrap();
        ufs.put_canary(&node).unwrap();
    }
}
