//! What a directory tree shows through the kernel.
#![allow(dead_code)] // each test program uses its part

use rustix::{
    fs::{lgetxattr, llistxattr},
    io::Errno,
};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fmt, fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// One file.
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Of a regular file, else 0.
    pub size: u64,
    /// Names; 0 for directories, which count them as their file system likes.
    pub links: u64,
    /// The first name of the same file, in the order of paths.
    pub same_as: PathBuf,
    pub device: u64,
    /// A file's hash, a link's target.
    pub data: String,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Seen {
    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    pub fn is_whiteout(&self) -> bool {
        self.mode & 0o170_000 == 0o020_000 && self.device == 0
    }
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            mode,
            uid,
            gid,
            size,
            links,
            same_as,
            device,
            data,
            ..
        } = self;
        let (seconds, nanos) = self.mtime;
        write!(
            f,
            "{mode:o} {uid}:{gid} {seconds}.{nanos:09} size {size} links {links} of {same_as:?} dev {device:x} {data}"
        )?;
        for (name, value) in &self.xattrs {
            write!(f, " {name}={}", value.escape_ascii())?;
        }
        Ok(())
    }
}

/// All that is to be known of every file below `root`, by path.
pub fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut paths = vec![];
    let mut waiting = vec![PathBuf::new()];
    while let Some(path) = waiting.pop() {
        let full = root.join(&path);
        match fs::symlink_metadata(&full) {
            Ok(meta) if meta.is_dir() => {
                for entry in fs::read_dir(&full).unwrap() {
                    waiting.push(path.join(entry.unwrap().file_name()));
                }
            }
            Ok(_) => {}
            // A whiteout in a directory that overlayfs does not merge.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{}: {error}", full.display()),
        }
        paths.push(path);
    }
    paths.sort();
    let mut first: HashMap<(u64, u64), PathBuf> = HashMap::new();
    for path in paths {
        let full = root.join(&path);
        let Ok(meta) = fs::symlink_metadata(&full) else {
            found.insert(path, nothing());
            continue;
        };
        let same_as = first
            .entry((meta.dev(), meta.ino()))
            .or_insert_with(|| path.clone())
            .clone();
        let data = if meta.is_file() {
            blake3::hash(&fs::read(&full).unwrap()).to_string()
        } else if meta.is_symlink() {
            match fs::read_link(&full) {
                Ok(target) => format!("{target:?}"),
                Err(error) => panic!("{}: {error}", full.display()),
            }
        } else {
            String::new()
        };
        let seen = Seen {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            size: if meta.is_file() { meta.size() } else { 0 },
            links: if meta.is_dir() { 0 } else { meta.nlink() },
            same_as,
            device: meta.rdev(),
            data,
            xattrs: xattrs(&full),
        };
        found.insert(path, seen);
    }
    found
}

/// A name that is listed but cannot be looked up.
fn nothing() -> Seen {
    Seen {
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        size: 0,
        links: 0,
        same_as: PathBuf::new(),
        device: 0,
        data: "only listed".into(),
        xattrs: BTreeMap::new(),
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 65536];
    let len = llistxattr(path, &mut names).unwrap();
    let names = names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut found = BTreeMap::new();
    for name in names {
        let mut value = vec![0; 65536];
        match lgetxattr(path, OsStr::from_bytes(name), &mut value) {
            Ok(len) => {
                value.truncate(len);
                found.insert(name.escape_ascii().to_string(), value);
            }
            // What the file's type cannot have is listed, but not to be had.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(error) => panic!("{}: {}: {error}", path.display(), name.escape_ascii()),
        }
    }
    found
}
