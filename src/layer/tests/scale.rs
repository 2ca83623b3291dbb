//! Layers of the size that real ones have, read back by the kernel and fsck.erofs.

mod common;
#[path = "../../erofs/tests/common/tools.rs"]
mod tools;

use accel_layer::{LayerOptions, LayerSummary, NoLower, Output, convert_layer};
use common::{Tar, header};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

/// An image in a file; zeros are holes.
struct Sparse(File);

impl Output for Sparse {
    type Error = io::Error;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.iter().any(|byte| *byte != 0) {
            self.0.write_all_at(bytes, offset)?;
        }
        let end = offset + bytes.len() as u64;
        if self.0.metadata()?.len() < end {
            self.0.set_len(end)?;
        }
        Ok(())
    }
}

fn convert(blob: impl Read + Send, path: &Path) -> LayerSummary {
    let output = Sparse(File::create(path).unwrap());
    let options = LayerOptions::new("test");
    convert_layer(blob, &options, &mut NoLower, output)
        .unwrap_or_else(|e| panic!("{}", common::chain(&e)))
}

/// Entries as they are asked for.
struct Entries<F>(std::ops::Range<u64>, F, Vec<u8>, usize);

impl<F: FnMut(u64) -> Vec<u8>> Read for Entries<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.3 == self.2.len() {
            let Some(number) = self.0.next() else {
                return Ok(0);
            };
            (self.2, self.3) = (self.1(number), 0);
        }
        let len = (self.2.len() - self.3).min(buffer.len());
        buffer[..len].copy_from_slice(&self.2[self.3..][..len]);
        self.3 += len;
        Ok(len)
    }
}

fn entries(count: u64, entry: impl FnMut(u64) -> Vec<u8> + Send) -> impl Read + Send {
    Entries(0..count, entry, Vec::new(), 0)
}

/// How many files there are below a directory; each must be readable.
fn count(directory: &Path) -> usize {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            1 + if meta.is_dir() { count(&path) } else { 0 }
        })
        .sum()
}

/// Whether tests that take long are wanted.
fn all_wanted() -> bool {
    std::env::var("ACCEL_TESTS_FULL").as_deref() == Ok("1")
}

#[test]
fn a_directory_of_100000_entries_with_thousands_of_shared_attributes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let blob = entries(100_000, |number| {
        let value = format!("value {}", number % 5000);
        let attribute: &[(&str, &[u8])] = &[("SCHILY.xattr.user.shared", value.as_bytes())];
        Tar::default()
            .pax(attribute)
            .file(&format!("entry-{number}"), b"")
            .open_end()
    });
    let summary = convert(blob, &path);
    assert_eq!(summary.image.counts.files, 100_000);
    assert_eq!(summary.image.counts.shared_xattrs, 5000);
    let Some(()) = tools::root() else { return };
    let mounted = tools::try_mount(&path).expect("the image mounts");
    assert_eq!(count(mounted.0.path()), 100_000);
    let mut value = [0; 64];
    for number in [0, 4999, 77_777, 99_999] {
        let file = mounted.0.path().join(format!("entry-{number}"));
        let len = rustix::fs::lgetxattr(file, "user.shared", &mut value).unwrap();
        assert_eq!(&value[..len], format!("value {}", number % 5000).as_bytes());
    }
    drop(mounted);
    if let Some(fsck) = tools::fsck() {
        tools::check_with_fsck(&fsck, &path);
    }
}

#[test]
fn half_a_million_small_files() {
    if !all_wanted() {
        eprintln!("not run: it takes long; ACCEL_TESTS_FULL=1 runs it");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let blob = entries(500_000, |number| {
        let mut tar = Tar::default();
        if number % 1000 == 0 {
            tar.dir(&format!("d{}", number / 1000), 0o755);
        }
        let name = format!("d{}/f{number}", number / 1000);
        tar.file(&name, number.to_string().as_bytes()).open_end()
    });
    let summary = convert(blob, &path);
    assert_eq!(summary.image.counts.files, 500_000);
    // 100 MiB, and half a KiB and a name for each: all that this process ever took, tests
    // beside this one included.
    let may_take = (100 << 20) + 500_500 * (512 + 7);
    let peak = common::peak() * 1024;
    eprintln!("{peak} bytes of memory, of {may_take}");
    assert!(peak < may_take, "{peak} bytes, more than {may_take}");
    let Some(()) = tools::root() else { return };
    let mounted = tools::try_mount(&path).expect("the image mounts");
    assert_eq!(count(mounted.0.path()), 500_500);
    for number in [0, 123_456, 499_999] {
        let file = mounted
            .0
            .path()
            .join(format!("d{}/f{number}", number / 1000));
        assert_eq!(fs::read_to_string(file).unwrap(), number.to_string());
    }
}

#[test]
fn files_beyond_4_gib() {
    if !all_wanted() {
        eprintln!("not run: it takes long; ACCEL_TESTS_FULL=1 runs it");
        return;
    }
    let size = (1u64 << 32) + 4097;
    let mut tar = Tar::default();
    tar.file("before", b"before");
    let sparse = format!("0,5,{size},4");
    let claimed = (size + 4).to_string();
    tar.pax(&[
        ("GNU.sparse.size", claimed.as_bytes()),
        ("GNU.sparse.map", sparse.as_bytes()),
    ]);
    tar.file("sparse", b"startends")
        .pax(&[("size", size.to_string().as_bytes())]);
    tar.raw(header(b"plain", b'0', 0), b"");
    let padding = size.next_multiple_of(512) - size;
    let blob = io::Cursor::new(tar.open_end())
        .chain(io::repeat(0).take(size - 1))
        .chain(&b"!"[..])
        .chain(io::repeat(0).take(padding))
        .chain(io::Cursor::new(
            Tar::default().file("after", b"after").end(),
        ));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let summary = convert(blob, &path);
    assert!(summary.image.size > 2 * size);
    let Some(()) = tools::root() else { return };
    let mounted = tools::try_mount(&path).expect("the image mounts");
    let at = |name: &str| mounted.0.path().join(name);
    let tail = |name: &str, len: usize| {
        let file = File::open(at(name)).unwrap();
        let mut bytes = vec![1; len];
        let end = file.metadata().unwrap().size();
        file.read_exact_at(&mut bytes, end - len as u64).unwrap();
        (end, bytes)
    };
    assert_eq!(tail("sparse", 6), (size + 4, b"\0\0ends".to_vec()));
    assert_eq!(tail("plain", 3), (size, b"\0\0!".to_vec()));
    let mut start = [0; 6];
    File::open(at("sparse"))
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    assert_eq!(&start, b"start\0");
    assert_eq!(fs::read(at("before")).unwrap(), b"before");
    assert_eq!(fs::read(at("after")).unwrap(), b"after");
}
