//! `slow-ufs FROM TO --delay MS --rate MBPS`: the directory FROM at TO, over FUSE, for
//! reading, as if it were far away: every operation waits for a while, and all data
//! goes through one narrow line. For measurements; ends when TO is unmounted.
//!
//! The requests are FUSE's (linux/fuse.h, version 7.31), little-endian. Inodes are
//! numbered as they are seen and never forgotten; nothing is expected to change.

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Serves a directory slowly
#[derive(Debug, Parser)]
struct Arguments {
    /// The directory to be served
    from: PathBuf,
    /// Where to mount it
    to: PathBuf,
    /// How long every operation waits, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0)]
    delay: u64,
    /// How much data comes in a second, in MB (10^6 bytes); 0: no limit
    #[arg(long, value_name = "MBPS", default_value_t = 0)]
    rate: u64,
}

/// So many operations are under way at once.
const THREADS: usize = 64;
/// The longest read, in bytes.
const MAX_READ: usize = 1 << 20;
const ROOT: u64 = 1;
/// How long the kernel may keep names and attributes, in seconds.
const VALID: u64 = 60;

struct Served {
    device: File,
    delay: Duration,
    /// Bytes per second.
    rate: u64,
    /// When the line is free again.
    free: Mutex<Instant>,
    nodes: Mutex<Nodes>,
}

#[derive(Default)]
struct Nodes {
    paths: Vec<PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    files: HashMap<u64, Arc<File>>,
}

impl Nodes {
    fn number(&mut self, path: PathBuf) -> u64 {
        let paths = &mut self.paths;
        *self.numbers.entry(path.clone()).or_insert_with(|| {
            paths.push(path);
            paths.len() as u64
        })
    }
}

/// Little-endian fields one after the other.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn attributes(self, number: u64, of: &fs::Metadata) -> Self {
        let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
        self.u64(number)
            .u64(of.len())
            .u64(of.blocks())
            .u64(seconds(of.atime()))
            .u64(seconds(of.mtime()))
            .u64(seconds(of.ctime()))
            .u32(0)
            .u32(0)
            .u32(0)
            .u32(of.mode())
            .u32(1)
            .u32(of.uid())
            .u32(of.gid())
            .u32(0)
            .u32(4096)
            .u32(0)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

/// A name, which ends with a zero byte.
fn name(bytes: &[u8]) -> &std::ffi::OsStr {
    let end = bytes.iter().position(|byte| *byte == 0);
    std::ffi::OsStr::from_bytes(&bytes[..end.unwrap_or(bytes.len())])
}

type Answer = std::io::Result<Vec<u8>>;

impl Served {
    fn nodes(&self) -> std::sync::MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: u64) -> std::io::Result<PathBuf> {
        let index = usize::try_from(number).unwrap_or(0).wrapping_sub(1);
        self.nodes()
            .paths
            .get(index)
            .cloned()
            .ok_or_else(|| Errno::NOENT.into())
    }

    /// Answers requests until the file system is unmounted.
    fn run(&self) -> Result<()> {
        let mut request = vec![0; MAX_READ + (64 << 10)];
        loop {
            let length = match rustix::io::read(&self.device, &mut request[..]) {
                Ok(length) => length,
                Err(Errno::NODEV) => return Ok(()),
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(error) => return Err(error).context("cannot read a request"),
            };
            let (head, body) = request[..length].split_at(40.min(length));
            let (operation, unique, node) = (u32_at(head, 4), u64_at(head, 8), u64_at(head, 16));
            // Forgetting and interrupting get no answer.
            if matches!(operation, 2 | 36 | 42) {
                continue;
            }
            let answer = self.answer(operation, node, body);
            let (error, data) = match answer {
                Ok(data) => (0, data),
                Err(error) => (-error.raw_os_error().unwrap_or(5), Vec::new()),
            };
            let length = u32::try_from(16 + data.len()).context("an answer is too long")?;
            let mut answer = Fields::default().u32(length);
            answer.0.extend(error.to_le_bytes());
            let mut answer = answer.u64(unique);
            answer.0.extend(data);
            match rustix::io::write(&self.device, &answer.0) {
                // Interrupted meanwhile, or unmounted.
                Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
                Err(error) => return Err(error).context("cannot answer"),
            }
        }
    }

    fn answer(&self, operation: u32, node: u64, body: &[u8]) -> Answer {
        match operation {
            // What the kernel asks only itself about.
            26 => return Ok(greeting(body)),
            18 | 29 | 38 => return Ok(Vec::new()),
            _ => thread::sleep(self.delay),
        }
        match operation {
            1 => self.look_up(node, name(body)),
            3 => {
                let attributes = fs::symlink_metadata(self.path(node)?)?;
                Ok(Fields::default()
                    .u64(VALID)
                    .u32(0)
                    .u32(0)
                    .attributes(node, &attributes)
                    .0)
            }
            5 => Ok(fs::read_link(self.path(node)?)?.into_os_string().into_vec()),
            14 => {
                let file = Arc::new(File::open(self.path(node)?)?);
                self.nodes().files.entry(node).or_insert(file);
                Ok(Fields::default().u64(node).u32(0).u32(0).0)
            }
            15 => self.read(body),
            17 => {
                let [blocks, free, files] = [1 << 30, 1 << 29, 1 << 20];
                let fields = Fields::default().u64(blocks).u64(free).u64(free);
                let fields = fields.u64(files).u64(files).u32(4096).u32(255).u32(4096);
                let mut fields = fields.u32(0).0;
                fields.resize(80, 0);
                Ok(fields)
            }
            27 => Ok(Fields::default().u64(node).u32(0).u32(0).0),
            28 => self.list(node, body),
            34 => Ok(Vec::new()),
            _ => Err(Errno::NOSYS.into()),
        }
    }

    fn look_up(&self, parent: u64, name: &std::ffi::OsStr) -> Answer {
        let path = self.path(parent)?.join(name);
        let attributes = fs::symlink_metadata(&path)?;
        let number = self.nodes().number(path);
        let fields = Fields::default()
            .u64(number)
            .u64(0)
            .u64(VALID)
            .u64(VALID)
            .u32(0)
            .u32(0);
        Ok(fields.attributes(number, &attributes).0)
    }

    fn read(&self, body: &[u8]) -> Answer {
        let (node, offset, size) = (u64_at(body, 0), u64_at(body, 8), u32_at(body, 16));
        let file = self.nodes().files.get(&node).cloned();
        let file = file.ok_or(Errno::BADF)?;
        let mut data = vec![0; usize::try_from(size).unwrap_or(0).min(MAX_READ)];
        let mut length = 0;
        while length < data.len() {
            match file.read_at(&mut data[length..], offset + length as u64)? {
                0 => break,
                more => length += more,
            }
        }
        data.truncate(length);
        if self.rate > 0 {
            let takes = Duration::from_secs_f64(length as f64 / self.rate as f64);
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            *free = (*free).max(Instant::now()) + takes;
            let until = *free;
            drop(free);
            thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        Ok(data)
    }

    fn list(&self, node: u64, body: &[u8]) -> Answer {
        let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
        let mut names: Vec<_> = fs::read_dir(self.path(node)?)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        let mut data = Fields::default();
        for (number, name) in names
            .iter()
            .enumerate()
            .skip(usize::try_from(offset).unwrap_or(0))
        {
            let length = name.len().next_multiple_of(8);
            if data.0.len() + 24 + length > usize::try_from(size).unwrap_or(0) {
                break;
            }
            data = data.u64(u64::MAX).u64(number as u64 + 1);
            data = data.u32(u32::try_from(name.len()).unwrap_or(0)).u32(0);
            data.0.extend(name.as_bytes());
            let end = data.0.len() + length - name.len();
            data.0.resize(end, 0);
        }
        Ok(data.0)
    }
}

/// The answer to the kernel's greeting: reads of 1 MiB, many at a time.
fn greeting(body: &[u8]) -> Vec<u8> {
    const ASYNC_READ: u32 = 1;
    const ASYNC_DIO: u32 = 1 << 15;
    const PARALLEL_DIROPS: u32 = 1 << 18;
    const MAX_PAGES: u32 = 1 << 22;
    let wanted = ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES;
    let (readahead, flags) = (u32_at(body, 8), u32_at(body, 12) & wanted);
    let fields = Fields::default().u32(7).u32(31).u32(readahead).u32(flags);
    let most = u32::try_from(MAX_READ).unwrap_or(0);
    let mut fields = fields.u16(1024).u16(768).u32(most).u32(1).u16(256).u16(0).0;
    fields.resize(64, 0);
    fields
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let from = arguments
        .from
        .canonicalize()
        .context("cannot find the directory")?;
    if !from.is_dir() {
        bail!("{} is no directory", from.display());
    }
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.context("cannot open /dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_READ}",
        device.as_raw_fd(),
    );
    let options = std::ffi::CString::new(options)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    let to: &Path = &arguments.to;
    mount(
        "slow-ufs",
        to,
        "fuse.slow-ufs",
        flags,
        Some(options.as_c_str()),
    )
    .with_context(|| format!("cannot mount at {}", to.display()))?;
    let mut nodes = Nodes::default();
    assert_eq!(nodes.number(from), ROOT);
    let served = Served {
        device,
        delay: Duration::from_millis(arguments.delay),
        rate: arguments.rate * 1_000_000,
        free: Mutex::new(Instant::now()),
        nodes: Mutex::new(nodes),
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| served.run())).collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}
