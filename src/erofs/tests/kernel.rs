//! The kernel mounts what was written, and fsck.erofs finds nothing wrong.
#![allow(clippy::cast_possible_truncation)] // sizes here are small

mod common;
#[path = "common/tools.rs"]
mod tools;

use common::{Built, Picture, Seen, build, compare, trees};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use rustix::fs::{lgetxattr, llistxattr};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::Path,
};

/// Trees for judges that are too slow for thousands of them: always the same.
fn some_trees(count: usize) -> impl Iterator<Item = Built> {
    let config = Config::default();
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    (0..count).map(move |_| {
        let wanted = trees(300).new_tree(&mut runner).unwrap().current();
        build(&wanted)
    })
}

fn file(image: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    file
}

#[test]
fn fsck_finds_nothing() {
    let Some(fsck) = tools::fsck() else { return };
    for built in some_trees(20) {
        tools::check_with_fsck(&fsck, file(&built.image).path());
    }
}

#[test]
fn the_kernel_checks_the_superblocks_checksum() {
    let Some(()) = tools::root() else { return };
    let mut image = some_trees(1).next().unwrap().image;
    // A byte of the UUID, and the last one of the block.
    for position in [1024 + 48, 4095] {
        image[position] ^= 1;
        let mounted = tools::try_mount(file(&image).path());
        assert!(mounted.is_none(), "byte {position} is not covered");
        image[position] ^= 1;
    }
    assert!(tools::try_mount(file(&image).path()).is_some());
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let len = llistxattr(path, &mut names).unwrap();
    let mut found = BTreeMap::new();
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|n| !n.is_empty())
    {
        let mut value = vec![0; 65536];
        let name_os = OsStr::from_bytes(name);
        match lgetxattr(path, name_os, &mut value) {
            Ok(len) => {
                found.insert(name.to_vec(), value[..len].to_vec());
            }
            // What the file's type cannot have is listed, but not to be had.
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => panic!("{}: {}: {error}", path.display(), name.escape_ascii()),
        }
    }
    found
}

fn read(mounted: &Path) -> Picture {
    let mut paths: Vec<Vec<u8>> = vec![];
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let full = [mounted.as_os_str().as_bytes(), &path].concat();
        let full = Path::new(OsStr::from_bytes(&full));
        if fs::symlink_metadata(full).unwrap().is_dir() {
            for entry in fs::read_dir(full).unwrap() {
                let name = entry.unwrap().file_name().into_vec();
                waiting.push([&path[..], b"/", &name].concat());
            }
        }
        paths.push(path);
    }
    paths.sort();
    let mut first: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut picture = Picture::new();
    for path in paths {
        let full = [mounted.as_os_str().as_bytes(), &path].concat();
        let full = Path::new(OsStr::from_bytes(&full));
        let meta = fs::symlink_metadata(full).unwrap();
        let data = if meta.is_file() {
            fs::read(full).unwrap()
        } else if meta.is_symlink() {
            fs::read_link(full).unwrap().into_os_string().into_vec()
        } else {
            vec![]
        };
        let device = (meta.mode() & 0o170_000 == 0o020_000 || meta.mode() & 0o170_000 == 0o060_000)
            .then(|| {
                let rdev = meta.rdev();
                (rustix::fs::major(rdev), rustix::fs::minor(rdev))
            });
        let seen = Seen {
            mode: meta.mode() as u16,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            nlink: meta.nlink() as u32,
            xattrs: xattrs(full),
            device,
            data,
            first: first
                .entry(meta.ino())
                .or_insert_with(|| path.clone())
                .clone(),
        };
        picture.insert(path, seen);
    }
    picture
}

const SOCKET: u16 = 0o140_000;

/// What the kernel shows of it: user attributes only of files and directories
/// (Linux 7.x: and of sockets), ACLs not of links.
fn as_the_kernel_shows(mut picture: Picture, found: &Picture) -> Picture {
    // All sockets show theirs, or none.
    let of_sockets = found.values().any(|seen| {
        seen.mode & 0o170_000 == SOCKET && seen.xattrs.keys().any(|name| name.starts_with(b"user."))
    });
    for seen in picture.values_mut() {
        let kind = seen.mode & 0o170_000;
        let plain = kind == 0o100_000 || kind == 0o040_000 || (kind == SOCKET && of_sockets);
        seen.xattrs.retain(|name, _| {
            (plain || !name.starts_with(b"user."))
                && (kind != 0o120_000 || !name.starts_with(b"system."))
        });
    }
    picture
}

#[test]
fn the_kernel_shows_the_tree() {
    let Some(()) = tools::root() else { return };
    for built in some_trees(20) {
        let file = file(&built.image);
        let mounted = tools::try_mount(file.path()).expect("the image mounts");
        let found = read(mounted.0.path());
        let expected = as_the_kernel_shows(built.picture, &found);
        compare(&expected, &found, "the kernel");
    }
}
