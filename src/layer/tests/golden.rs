//! The bytes of layout 1. They never change: what is published by these names
//! exists already. A change of bytes is a new layout number.

mod common;

use accel_erofs::Timestamp;
use accel_layer::{Attributes, LayerOptions, LowerDirectory, NoLower, convert_layer};
use common::{Below, Memory, Tar, convert, convert_with, header, on_another};
use std::io::{self, Read, Write};

/// BLAKE3 in hex.
fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Bytes that repeat at no block and no chunk.
fn bytes(seed: u32, len: u32) -> Vec<u8> {
    (0..len).map(|n| ((n + seed) % 251) as u8).collect()
}

#[test]
fn layout_1_gives_these_bytes() {
    let large: Vec<u8> = (0..150_000u32).map(|n| (n % 251) as u8).collect();
    let shared: &[(&str, &[u8])] = &[("SCHILY.xattr.user.shared", b"twice")];
    let own: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.own", b"once"),
        ("mtime", b"1700000000.123456789"),
    ];
    let mut device = header(b"dev", b'3', 0);
    device.set_device_major(259).unwrap();
    device.set_device_minor(70_000).unwrap();
    let mut tar = Tar::default();
    tar.dir("./", 0o755)
        .dir("d/", 0o1777)
        .pax(shared)
        .file("d/small", b"small")
        .pax(shared)
        .file("d/large", &large)
        .file("d/in-the-gap", &large[..5000])
        .pax(own)
        .hard("hard", "d/large")
        .symlink("soft", "d/small")
        .raw(device, b"")
        .raw(header(b"fifo", b'6', 0), b"")
        .file(".wh.gone", b"")
        .file("d/.wh..wh..opq", b"")
        .dir("many", 0o700);
    for number in 0..300 {
        tar.file(&format!("many/{number}-{}", "x".repeat(50)), b"");
    }
    let (summary, image) = convert_with(&tar.end(), &on_another(), &mut NoLower).unwrap();
    assert_eq!(
        summary.uuid.to_string(),
        "23f87a21-9975-8e63-b44f-02916a554bf8"
    );
    assert_eq!(
        hash(&image),
        "31f43f3303c4c0fdec78e165816c31a1003d15a8aca4cb71d8c6ff0b24be59f6"
    );
}

/// What the first does not have: every kind of inode, the largest of everything,
/// gaps that are kept, replaced and filled, and more than 128 chunks.
fn everything() -> Vec<u8> {
    let mut tar = Tar::default();
    let mut block = header(b"block", b'4', 0);
    block.set_device_major(8).unwrap();
    block.set_device_minor(1_048_575).unwrap();
    let mut setuid = header(b"setuid", b'0', 0);
    setuid.set_mode(0o6755);
    tar.dir("./", 0o700)
        .raw(block, b"")
        .raw(setuid, b"")
        .raw(header(b"fifo", b'6', 0), b"");
    // Links that are inline, and that have a block of their own.
    for len in [1, 3000, 4033, 4095] {
        tar.pax(&[("linkpath", "t".repeat(len).as_bytes())])
            .symlink(&format!("link-{len}"), "-");
    }
    // Owners and times that a ustar header cannot hold.
    tar.pax(&[
        ("uid", b"4294967294"),
        ("gid", b"70000"),
        ("mtime", b"4294967296.000000001"),
    ])
    .file("far", b"");
    // More shared attributes than an inode refers to, a binary value, a large one.
    let many: Vec<(String, Vec<u8>)> = (0..260)
        .map(|n| (format!("SCHILY.xattr.user.{n}"), vec![b'v'; n % 7]))
        .collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(k, v)| (&k[..], &v[..])).collect();
    tar.pax(&many).dir("attributes", 0o755);
    tar.pax(&many).file("attributes/file", b"x");
    tar.pax(&[
        (
            "SCHILY.xattr.security.capability",
            b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
        ("SCHILY.xattr.system.posix_acl_access", ACL),
        ("SCHILY.xattr.user.large", &bytes(3, 5000)),
    ])
    .file("attributes/binary", b"");
    // A gap of 120 KiB less a bit, which a chunk keeps open, small files fill and
    // another gap replaces.
    tar.dir("gaps", 0o755)
        .file("gaps/first", &bytes(1, 9000))
        .file("gaps/large", &bytes(2, 131_072))
        .file("gaps/exact", &bytes(3, 262_144))
        .file("gaps/small", &bytes(4, 4096))
        .file("gaps/too-large-for-it", &bytes(5, 120_000))
        .file("gaps/fits", &bytes(6, 60_000))
        .file("gaps/another", &bytes(7, 131_073))
        .file("gaps/into-that", &bytes(8, 100))
        .file("gaps/empty", b"");
    tar.file("zeros", &vec![0; 300_000]);
    // More chunks than a page of the index has values.
    for number in 0..9 {
        tar.file(&format!("data-{number}"), &bytes(number, 2_000_000));
    }
    tar.dir("wide", 0o755);
    for number in 0..2000 {
        tar.file(&format!("wide/{number:04}-{}", "w".repeat(40)), b"");
    }
    tar.end()
}

/// rw- for the owner, r-x for user 1000 and the group, r-- for the mask and others:
/// as a mode, 0644.
const ACL: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x05\0\xe8\x03\0\0\
    \x04\0\x05\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

const EVERYTHING: &str = "57685032c6c85adcfaeaa8285e40d6c3fb3a9143ed7054625f42c8a7cd7f9349";

#[test]
fn layout_1_gives_these_bytes_of_everything() {
    let (summary, image) = convert(&everything()).unwrap();
    assert!(image.len() > 129 * 128 * 1024);
    assert!(!summary.needs_lower);
    assert_eq!(hash(&image), EVERYTHING);
}

/// What depends on the layers below is named by its chain ID, and so is its UUID.
#[test]
fn layout_1_gives_these_bytes_on_other_layers() {
    let mut tar = Tar::default();
    tar.file("tmp/file", b"in a directory that only the path implies")
        .file("new/file", b"and in one that no layer has")
        .file("tmp/.wh.gone", b"");
    let tar = tar.end();
    let tmp = Attributes {
        permissions: accel_erofs::Permissions::of_mode(0o1777),
        uid: 7,
        gid: 8,
        mtime: Timestamp::new(1_600_000_000, 5).unwrap(),
        xattrs: accel_erofs::Xattrs::new(),
    };
    let mut below = Below::default();
    below.0.insert("tmp", LowerDirectory::Found(tmp));
    let (lowest, _) = convert(&tar).unwrap();
    let options = LayerOptions {
        parent: Some(lowest.chain_id),
        ..LayerOptions::new("test")
    };
    let (summary, image) = convert_with(&tar, &options, &mut below).unwrap();
    assert!(summary.needs_lower);
    assert_eq!(
        summary.uuid.to_string(),
        "c383d89f-5556-855a-bac0-c468b60e2e69"
    );
    assert_eq!(
        hash(&image),
        "7643eaa7ed2797d60c41618a39c6cef4025cd02ea63f3b15e875c222368de5b3"
    );
}

/// Gives a few bytes at a time, never as many as asked for.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 % 70_001 + 1337;
        let len = self.1.min(buffer.len());
        self.0.read(&mut buffer[..len])
    }
}

#[test]
fn however_the_layer_comes_its_bytes_are_the_same() {
    let tar = everything();
    let gzip = |level, parts: usize| {
        let mut all = Vec::new();
        for part in tar.chunks(tar.len().div_ceil(parts)) {
            let level = flate2::Compression::new(level);
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(part).unwrap();
            all.extend(encoder.finish().unwrap());
        }
        all
    };
    let zstd = |level| zstd::encode_all(&tar[..], level).unwrap();
    for blob in [tar.clone(), gzip(1, 1), gzip(6, 3), zstd(1), zstd(5)] {
        let mut memory = Memory::default();
        let options = LayerOptions::new("test");
        let trickle = Trickle(&blob, 0);
        let summary = convert_layer(trickle, &options, &mut NoLower, &mut memory).unwrap();
        assert_eq!(summary.tar_size, tar.len() as u64);
        assert_eq!(summary.size, blob.len() as u64);
        assert_eq!(hash(&memory.image()), EVERYTHING);
    }
}
