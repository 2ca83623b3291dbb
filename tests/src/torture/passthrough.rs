//! A FUSE file system that shows another directory, for UFS that stalls in the worst
//! way: while a file of a given name exists, requests are taken and not answered, and
//! who waits for one cannot be killed.
//!
//! Read-only; one request at a time; nothing is cached by the kernel, so that what
//! changes beneath is seen at once. The protocol is that of `linux/fuse.h`, version 7.31.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// Of `struct fuse_in_header`.
const HEADER: usize = 40;

#[derive(Debug)]
struct Server {
    device: File,
    stall: PathBuf,
    /// Paths by node, node 1 the root; nothing is forgotten.
    nodes: Vec<PathBuf>,
    known: HashMap<PathBuf, u64>,
    /// Open files and listings by handle.
    files: HashMap<u64, File>,
    listings: HashMap<u64, Vec<(u64, u32, Vec<u8>)>>,
    last_handle: u64,
}

/// Mounts what `backing` has at `target` and serves it until it is unmounted. Stalls
/// while `stall` exists.
///
/// # Errors
/// When it cannot be mounted.
pub fn serve(backing: &Path, target: &Path, stall: &Path) -> Result<()> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.context("opening /dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
        device.as_raw_fd()
    );
    let options = CString::new(options)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount("accel-torture", target, "fuse", flags, &*options).context("mounting FUSE")?;
    let mut server = Server {
        device,
        stall: stall.to_owned(),
        nodes: vec![PathBuf::new(), backing.to_owned()],
        known: HashMap::new(),
        files: HashMap::new(),
        listings: HashMap::new(),
        last_handle: 0,
    };
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = match server.device.read(&mut buffer) {
            Ok(len) => len,
            Err(error) => match Errno::from_io_error(&error) {
                // Interrupted, or the request was taken back.
                Some(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                // Unmounted.
                _ => return Ok(()),
            },
        };
        while server.stall.exists() {
            std::thread::sleep(Duration::from_millis(50));
        }
        let request = &buffer[..len];
        let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        let answer = server.answer(opcode, u64_at(request, 16), &request[HEADER..]);
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend(u32::try_from(16 + body.len())?.to_ne_bytes());
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        // Fails when the request was taken back meanwhile.
        let _ = server.device.write_all(&reply);
        if opcode == DESTROY {
            return Ok(());
        }
    }
}

impl Server {
    fn answer(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(node)?.to_owned();
        match opcode {
            INIT => {
                let mut reply = vec![0; 64];
                reply[..4].copy_from_slice(&7_u32.to_ne_bytes());
                reply[4..8].copy_from_slice(&31_u32.to_ne_bytes());
                // max_readahead; max_write
                reply[8..12].copy_from_slice(&(128_u32 << 10).to_ne_bytes());
                reply[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
                Ok(reply)
            }
            LOOKUP => {
                let name = body.split(|byte| *byte == 0).next().unwrap_or_default();
                let path = path.join(OsStr::from_bytes(name));
                let metadata = fs::symlink_metadata(&path).map_err(errno)?;
                let node = self.node(path);
                let mut reply = Vec::new();
                reply.extend(node.to_ne_bytes());
                // generation; how long entry and attributes are valid: not at all
                reply.extend([0; 32]);
                reply.extend(attributes(node, &metadata));
                Ok(reply)
            }
            GETATTR => {
                let metadata = fs::symlink_metadata(&path).map_err(errno)?;
                let mut reply = vec![0; 16];
                reply.extend(attributes(node, &metadata));
                Ok(reply)
            }
            OPEN => {
                let file = File::open(&path).map_err(errno)?;
                self.last_handle += 1;
                self.files.insert(self.last_handle, file);
                Ok(opened(self.last_handle))
            }
            READ => {
                let file = self.files.get(&u64_at(body, 0)).ok_or(Errno::BADF)?;
                let mut data = vec![0; u32_at(body, 16) as usize];
                let mut len = 0;
                while len < data.len() {
                    let at = u64_at(body, 8) + len as u64;
                    match file.read_at(&mut data[len..], at).map_err(errno)? {
                        0 => break,
                        more => len += more,
                    }
                }
                data.truncate(len);
                Ok(data)
            }
            OPENDIR => {
                let mut entries = Vec::new();
                for entry in fs::read_dir(&path).map_err(errno)? {
                    let entry = entry.map_err(errno)?;
                    let metadata = entry.metadata().map_err(errno)?;
                    let kind = metadata.mode() >> 12;
                    entries.push((metadata.ino(), kind, entry.file_name().as_bytes().to_vec()));
                }
                self.last_handle += 1;
                self.listings.insert(self.last_handle, entries);
                Ok(opened(self.last_handle))
            }
            READDIR => {
                let entries = self.listings.get(&u64_at(body, 0)).ok_or(Errno::BADF)?;
                let (from, room) = (u64_at(body, 8), u32_at(body, 16) as usize);
                let mut reply = Vec::new();
                for (number, (inode, kind, name)) in (0_u64..).zip(entries) {
                    let size = (24 + name.len()).next_multiple_of(8);
                    if number < from {
                        continue;
                    }
                    if reply.len() + size > room {
                        break;
                    }
                    let end = reply.len() + size;
                    reply.extend(inode.to_ne_bytes());
                    reply.extend((number + 1).to_ne_bytes());
                    reply.extend(u32::try_from(name.len()).unwrap_or(0).to_ne_bytes());
                    reply.extend(kind.to_ne_bytes());
                    reply.extend(name);
                    reply.resize(end, 0);
                }
                Ok(reply)
            }
            RELEASE => {
                self.files.remove(&u64_at(body, 0));
                Ok(Vec::new())
            }
            RELEASEDIR => {
                self.listings.remove(&u64_at(body, 0));
                Ok(Vec::new())
            }
            FLUSH | DESTROY => Ok(Vec::new()),
            _ => Err(Errno::NOSYS),
        }
    }

    fn path(&self, node: u64) -> Result<&Path, Errno> {
        let place = usize::try_from(node).unwrap_or(usize::MAX);
        Ok(self.nodes.get(place).ok_or(Errno::STALE)?)
    }

    fn node(&mut self, path: PathBuf) -> u64 {
        let next = self.nodes.len() as u64;
        let node = *self.known.entry(path.clone()).or_insert(next);
        if node == next {
            self.nodes.push(path);
        }
        node
    }
}

/// `struct fuse_open_out`
fn opened(handle: u64) -> Vec<u8> {
    let mut reply = vec![0; 16];
    reply[..8].copy_from_slice(&handle.to_ne_bytes());
    reply
}

/// `struct fuse_attr`
fn attributes(node: u64, metadata: &Metadata) -> Vec<u8> {
    let mut attr = Vec::with_capacity(88);
    let seconds = |time: i64| time.cast_unsigned().to_ne_bytes();
    attr.extend(node.to_ne_bytes());
    attr.extend(metadata.size().to_ne_bytes());
    attr.extend(metadata.blocks().to_ne_bytes());
    attr.extend(seconds(metadata.atime()));
    attr.extend(seconds(metadata.mtime()));
    attr.extend(seconds(metadata.ctime()));
    attr.extend([0; 12]);
    attr.extend(metadata.mode().to_ne_bytes());
    attr.extend(1_u32.to_ne_bytes());
    attr.extend(metadata.uid().to_ne_bytes());
    attr.extend(metadata.gid().to_ne_bytes());
    attr.extend(0_u32.to_ne_bytes());
    attr.extend(4096_u32.to_ne_bytes());
    attr.extend(0_u32.to_ne_bytes());
    attr
}

#[allow(clippy::needless_pass_by_value)] // as map_err wants it
fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    four.map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes
        .get(at..at + 8)
        .and_then(|eight| eight.try_into().ok());
    eight.map_or(0, u64::from_ne_bytes)
}
