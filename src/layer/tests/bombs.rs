//! Layers that are made to be too much: each ends in a clear error, and none takes
//! more memory than it may.

mod common;

use accel_layer::{LayerError, LayerOptions, LayerSummary, NoLower, Output, convert_layer};
use common::{Tar, chain, header, peak};
use std::{
    convert::Infallible,
    io::{self, Read},
    process::Command,
};

/// Takes an image and keeps nothing.
struct Nowhere;

impl Output for Nowhere {
    type Error = Infallible;

    fn write_at(&mut self, _offset: u64, _bytes: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }
}

fn convert(
    blob: impl Read + Send,
    options: &LayerOptions,
) -> Result<LayerSummary, LayerError<Infallible>> {
    convert_layer(blob, options, &mut NoLower, Nowhere)
}

#[track_caller]
fn refused(blob: impl Read + Send, options: &LayerOptions, reason: &str) {
    let text = chain(&convert(blob, options).expect_err("must be refused"));
    assert!(
        text.starts_with("layer test: ") && text.contains(reason),
        "{text}"
    );
}

fn options() -> LayerOptions {
    LayerOptions::new("test")
}

/// The same bytes again and again, without an end.
struct Endless {
    bytes: Vec<u8>,
    position: usize,
}

impl Endless {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, position: 0 }
    }
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.bytes[self.position..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.position = (self.position + len) % self.bytes.len();
        Ok(len)
    }
}

/// Entries by their number, as many as there are to be.
struct Numbered<F> {
    entry: F,
    numbers: std::ops::Range<u64>,
    bytes: Vec<u8>,
    position: usize,
}

fn numbered(count: u64, entry: impl FnMut(u64, &mut Tar) + Send) -> impl Read + Send {
    Numbered {
        entry,
        numbers: 0..count,
        bytes: Vec::new(),
        position: 0,
    }
}

impl<F: FnMut(u64, &mut Tar)> Read for Numbered<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.bytes.len() {
            let Some(number) = self.numbers.next() else {
                return Ok(0);
            };
            let mut tar = Tar::default();
            (self.entry)(number, &mut tar);
            (self.bytes, self.position) = (tar.open_end(), 0);
        }
        let rest = &self.bytes[self.position..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.position += len;
        Ok(len)
    }
}

/// `start`, then the same without an end.
fn endless(start: &Tar, again: Vec<u8>) -> impl Read + Send {
    io::Cursor::new(start.open_end()).chain(Endless::new(again))
}

#[test]
fn entries_without_end() {
    let mut options = options();
    options.max_tree_size = 1 << 20;
    let reason = "larger than 1048576 bytes, the most that is held in memory";
    // The same name over and over: it is one file in the end, but not before.
    for tar in [
        Tar::default().file("f", b""),
        Tar::default().file("f", b"").hard("h", "f"),
        Tar::default().dir("d", 0o755),
        Tar::default().file(".wh.f", b""),
        Tar::default().dir("d", 0o755).file("d", b""),
        Tar::default().file("a/b", b"").symlink("a", "x"),
    ] {
        refused(endless(&Tar::default(), tar.open_end()), &options, reason);
    }
    let value = vec![b'x'; 60_000];
    let tar = Tar::default()
        .pax(&[("SCHILY.xattr.user.x", &value)])
        .file("f", b"")
        .open_end();
    refused(endless(&Tar::default(), tar), &options, reason);
}

#[test]
fn streams_without_end() {
    let mut small = options();
    small.max_tar_size = 1 << 20;
    small.max_image_size = 1 << 20;
    let larger = "the tar is larger than it may be";
    // Global headers are entries without a file.
    let global = Tar::default().raw(header(b".", b'g', 0), b"").open_end();
    refused(endless(&Tar::default(), global), &small, larger);
    let root = Tar::default().dir("./", 0o755).open_end();
    refused(endless(&Tar::default(), root), &small, larger);
    for kind in [b'x', b'L', b'K'] {
        let extension = Tar::default().raw(header(b"x", kind, 0), b"").open_end();
        let reason = "more than 16 extension headers before an entry";
        refused(endless(&Tar::default(), extension), &options(), reason);
    }
    let mut sparse = header(b"f", b'S', 0);
    sparse.as_mut_bytes()[482] = 1;
    let mut more = vec![0; 512];
    more[504] = 1;
    let reason = "a sparse map of more than";
    refused(
        endless(Tar::default().raw(sparse, b""), more),
        &options(),
        reason,
    );
    // A file of which there is more than an image can hold.
    let huge = Tar::default()
        .raw(header(b"f", b'0', 1 << 32), b"")
        .open_end();
    refused(
        io::Cursor::new(huge.clone()).chain(io::repeat(1)),
        &small,
        "larger than 1048576 bytes",
    );
    // Fewer bytes than it says.
    refused(&huge[..], &options(), "ends in the middle of an entry");
    // Nothing but the end, for ever.
    let reason = "more than 256 MiB lie behind the end of the archive";
    refused(io::repeat(0), &options(), reason);
}

#[test]
fn blobs_without_end_are_read_as_far_as_announced() {
    let mut options = options();
    options.expected.size = Some(1 << 20);
    refused(io::repeat(0), &options, "1048576");
    options.expected.digest = Some(accel_oci::Digest::of(b"something else"));
    let entries = Tar::default().raw(header(b"f", b'V', 0), b"").open_end();
    refused(endless(&Tar::default(), entries), &options, "1048576");
}

#[test]
fn sizes_that_no_file_has() {
    let claims =
        |records: &[(&str, &[u8])], data: &[u8]| Tar::default().pax(records).file("f", data).end();
    for size in [
        "9223372036854775807",
        "18446744073709551615",
        "1099511627777",
    ] {
        let tar = claims(&[("size", size.as_bytes())], b"1");
        let text = chain(&convert(&tar[..], &options()).expect_err("must be refused"));
        assert!(
            text.contains("size") || text.contains("larger than"),
            "{size}: {text}"
        );
        let tar = claims(
            &[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.map", b"0,1"),
            ],
            b"1",
        );
        let text = chain(&convert(&tar[..], &options()).expect_err("must be refused"));
        assert!(
            text.contains("larger than") || text.contains("sparse"),
            "{size}: {text}"
        );
    }
}

#[test]
fn directories_within_directories() {
    // As deep as a path can be, and one more.
    let mut tar = Tar::default();
    let mut path = String::new();
    for _ in 0..2048 {
        path.push_str("d/");
        tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
    }
    assert_eq!(
        convert(&tar.end()[..], &options())
            .unwrap()
            .image
            .counts
            .directories,
        2049
    );
    path.push_str("d/");
    tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
    refused(
        &tar.end()[..],
        &options(),
        "4098 bytes long, more than 4096",
    );
    // Deeper through links.
    let mut tar = Tar::default();
    let half = "d/".repeat(1500);
    tar.pax(&[("path", half.as_bytes())]).dir("x", 0o755);
    tar.pax(&[("linkpath", half.as_bytes())]).symlink("l", "x");
    tar.pax(&[("path", format!("l/{half}").as_bytes())])
        .dir("x", 0o755);
    refused(&tar.end()[..], &options(), "bytes long, more than 4096");
}

/// Each directory in the one before, for a million entries: by paths that grow, and by links
/// to as deep as the paths lead, so that those stay short.
#[test]
fn a_million_nested_directories() {
    let nested: [(&str, fn()); 1] = [("nested directories", nested_directories)];
    run_apart("a_million_nested_directories", &nested, |_| 0);
}

fn nested_directories() {
    let longer = "bytes long, more than 4096";
    let by_path = numbered(1_000_000, |number, tar| {
        let path = "d/".repeat(usize::try_from(number).unwrap() + 1);
        tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
    });
    refused(by_path, &options(), longer);
    let by_links = numbered(1_000_000, |number, tar| {
        let (link, depth) = (number / 1000, usize::try_from(number % 1000).unwrap());
        let start = match link.checked_sub(1) {
            Some(before) => format!("link-{before}/"),
            None => String::new(),
        };
        let path = start + &"d/".repeat(depth + 1);
        tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
        if depth == 999 {
            tar.pax(&[("linkpath", path.as_bytes())])
                .symlink(&format!("link-{link}"), "x");
        }
    });
    refused(by_links, &options(), longer);
}

#[test]
fn attributes_by_the_thousand() {
    let many = |count: usize, size: usize| {
        let names: Vec<String> = (0..count)
            .map(|n| format!("SCHILY.xattr.user.{n}"))
            .collect();
        let value = vec![b'x'; size];
        let records: Vec<(&str, &[u8])> =
            names.iter().map(|name| (&name[..], &value[..])).collect();
        Tar::default().pax(&records).file("f", b"").end()
    };
    convert(&many(5000, 20)[..], &options()).unwrap();
    refused(
        &many(30_000, 4)[..],
        &options(),
        "EROFS holds at most 262148",
    );
    refused(
        &many(15, 60_000)[..],
        &options(),
        "EROFS holds at most 262148",
    );
    refused(
        &many(1, 70_000)[..],
        &options(),
        "EROFS holds at most 65535",
    );
    refused(
        &many(20, 60_000)[..],
        &options(),
        "an extension header of more than 1 MiB",
    );
}

#[test]
fn marks_of_opaque_directories_over_and_over() {
    let mut tar = Tar::default();
    for number in 0..10_000 {
        tar.file(&format!("f{number}"), b"");
    }
    let mark = Tar::default().file(".wh..wh..opq", b"").open_end();
    refused(
        endless(&tar, mark),
        &options(),
        "too many marks of opaque directories",
    );
}

/// A zstd frame without compression, of up to 128 KiB, with this window descriptor
/// (RFC 8878, 3.1.1.1.2).
fn frame(window: u8, bytes: &[u8]) -> Vec<u8> {
    let header = u32::try_from(bytes.len() << 3 | 1).unwrap();
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
    frame.extend_from_slice(&header.to_le_bytes()[..3]);
    frame.extend_from_slice(bytes);
    frame
}

/// The window of the blob's first frame, in bytes, rounded down to a power of two.
fn window_of(blob: &[u8]) -> u64 {
    assert_eq!(blob[4] & 0x20, 0, "the frame has no window descriptor");
    1 << (10 + (blob[5] >> 3))
}

#[test]
fn windows_longer_than_zstd_makes() {
    let tar = Tar::default().file("f", b"").end();
    // By an eighth, and the longest that can be said.
    for window in [0xa9, 0xff] {
        let blob = [frame(0xa8, &tar[..512]), frame(window, &tar[512..])].concat();
        refused(
            &blob[..],
            &options(),
            "a frame's window is longer than 2 GiB",
        );
    }
}

const CHILD: &str = "ACCEL_TEST_PEAK_CHILD";

/// Runs each of `bombs` in a process of its own, which runs `test` again and tells its
/// peak. Each may take 100 MiB, and what `more` says (KiB).
fn run_apart(test: &str, bombs: &[(&str, fn())], more: impl Fn(&str) -> u64) {
    if let Ok(name) = std::env::var(CHILD) {
        let (_, run) = bombs.iter().find(|(other, _)| *other == name).unwrap();
        run();
        println!("\npeak {}", peak());
        return;
    }
    for (name, _) in bombs {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, name)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{name}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let peak = text
            .lines()
            .find_map(|line| line.strip_prefix("peak "))
            .unwrap();
        let peak: u64 = peak.parse().unwrap();
        eprintln!("{name}: {peak} KiB");
        assert!(peak < 100 * 1024 + more(name), "{name}: {peak} KiB");
    }
}

#[test]
fn memory_does_not_grow_with_the_data() {
    let window = |name: &str| match name.starts_with("a zstd window of 256 MiB") {
        true => 256 * 1024,
        false => 0,
    };
    run_apart("memory_does_not_grow_with_the_data", &BOMBS, window);
}

/// What a tree may take of memory, in bytes.
const TREE: u64 = 64 << 20;

#[test]
fn memory_of_a_tree_is_what_it_is_counted_for() {
    let test = "memory_of_a_tree_is_what_it_is_counted_for";
    run_apart(test, &TREES, |_| TREE / 1024);
}

/// Grows a tree until it is refused, then converts the largest one that is not: where all
/// of it lies in the image takes memory too. Paths begin with "number/", or are it.
fn grow(entry: impl Fn(u64, &mut Tar) + Send + Copy) {
    let mut options = options();
    options.max_tree_size = TREE;
    let found = convert(numbered(u64::MAX, entry), &options).expect_err("must be refused");
    let text = chain(&found);
    let LayerError::Entry { entry: path, .. } = found else {
        panic!("{text}");
    };
    let reason = "larger than 67108864 bytes, the most that is held in memory";
    assert!(text.contains(reason), "{text}");
    let number = path.split('/').next().unwrap();
    let number = number.parse().unwrap_or_else(|_| panic!("{text}"));
    convert(numbered(number, entry), &options).unwrap();
    eprintln!("{number} were converted");
}

const TREES: [(&str, fn()); 9] = [
    ("files", || {
        grow(|number, tar| {
            tar.file(&number.to_string(), b"");
        });
    }),
    ("links to one file", || {
        grow(|number, tar| {
            match number {
                0 => tar.file("0", b""),
                _ => tar.hard(&number.to_string(), "0"),
            };
        });
    }),
    ("symbolic links", || {
        grow(|number, tar| {
            tar.symlink(&number.to_string(), &"target/".repeat(14));
        });
    }),
    ("implied directories of one file", || {
        grow(|number, tar| {
            tar.file(&format!("{number}/d/d/d/d/d/d/d/d/d/f"), b"");
        });
    }),
    ("directories within directories", || {
        grow(|number, tar| {
            let mut path = number.to_string();
            for _ in 0..200 {
                path.push_str("/d");
                tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
            }
        });
    }),
    // Their times are kept by their paths.
    ("directories within directories, replaced", || {
        grow(|number, tar| {
            let mut path = format!("{number}/d");
            for _ in 0..200 {
                path.push_str("/d");
                tar.pax(&[("path", path.as_bytes())]).dir("x", 0o755);
            }
            tar.file(&format!("{number}/d"), b"");
        });
    }),
    ("inherited access control lists", || {
        // Version 2; the owner, users, the group, mask and others, all with r-x.
        let mut list = vec![2, 0, 0, 0];
        let mut add = |tag: u16, id: u32| {
            list.extend(tag.to_le_bytes());
            list.extend(5u16.to_le_bytes());
            list.extend(id.to_le_bytes());
        };
        add(1, u32::MAX);
        (0..1000).for_each(|user| add(2, user));
        for tag in [4, 16, 32] {
            add(tag, u32::MAX);
        }
        let list: &'static [u8] = list.leak();
        grow(|number, tar| {
            tar.pax(&[("SCHILY.xattr.system.posix_acl_default", list)])
                .dir(&number.to_string(), 0o755);
            for file in 0..1000 {
                tar.file(&format!("{number}/{file}"), b"");
            }
        });
    }),
    ("an attribute each", || {
        grow(|number, tar| {
            tar.pax(&[("SCHILY.xattr.user.a", number.to_string().as_bytes())])
                .file(&number.to_string(), b"");
        });
    }),
    ("thousands of attributes each", || {
        grow(|number, tar| {
            let names: Vec<String> = (0..4000)
                .map(|n| format!("SCHILY.xattr.user.{n}"))
                .collect();
            let value = number.to_string();
            let records: Vec<(&str, &[u8])> = names
                .iter()
                .map(|name| (&name[..], value.as_bytes()))
                .collect();
            tar.pax(&records).file(&value, b"");
        });
    }),
];

const BOMBS: [(&str, fn()); 6] = [
    ("a file of 512 MiB", || {
        let size = 512 << 20;
        let tar = Tar::default().raw(header(b"f", b'0', size), b"").open_end();
        let blob = io::Cursor::new(tar).chain(io::repeat(7).take(size));
        let summary = convert(blob, &options()).unwrap();
        assert!(summary.image.size > size);
    }),
    ("a sparse file of 1 GiB", || {
        let records: &[(&str, &[u8])] = &[
            ("GNU.sparse.size", b"1073741824"),
            ("GNU.sparse.map", b"0,1"),
        ];
        let tar = Tar::default().pax(records).file("f", b"1").end();
        assert!(convert(&tar[..], &options()).unwrap().image.size > 1 << 30);
    }),
    ("512 MiB of zeros as zstd", || {
        let size = 512 << 20;
        let tar = Tar::default().raw(header(b"f", b'0', size), b"").open_end();
        let tar = io::Cursor::new(tar).chain(io::repeat(0).take(size));
        let blob = zstd::encode_all(tar, 1).unwrap();
        assert!(blob.len() < 1 << 20);
        assert!(convert(&blob[..], &options()).unwrap().image.size > size);
    }),
    ("a zstd window of 256 MiB, over 512 MiB of zeros", || {
        let size = 512 << 20;
        let tar = Tar::default().raw(header(b"f", b'0', size), b"").open_end();
        let mut tar = io::Cursor::new(tar).chain(io::repeat(0).take(size));
        let mut encoder = zstd::Encoder::new(vec![], 1).unwrap();
        encoder.window_log(28).unwrap();
        io::copy(&mut tar, &mut encoder).unwrap();
        let blob = encoder.finish().unwrap();
        assert_eq!(window_of(&blob), 1 << 28);
        assert!(convert(&blob[..], &options()).unwrap().image.size > size);
    }),
    // Memory is taken as it is filled, not as it is asked for.
    ("small zstd frames with windows of 2 GiB", || {
        let tar = Tar::default().file("f", &[7; 300_000]).end();
        let blob: Vec<u8> = tar
            .chunks(50_000)
            .flat_map(|part| frame(0xa8, part))
            .collect();
        assert_eq!(window_of(&blob), 1 << 31);
        convert(&blob[..], &options()).unwrap();
    }),
    ("extension headers of 1 MiB", || {
        let mut tar = Tar::default();
        let long = vec![b'x'; 1 << 20];
        for _ in 0..16 {
            tar.raw(header(b"x", b'L', 1 << 20), &long);
        }
        refused(
            &tar.raw(header(b"f", b'0', 0), b"").end()[..],
            &options(),
            "bytes long",
        );
    }),
];
