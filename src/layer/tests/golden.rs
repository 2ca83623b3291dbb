//! The bytes of layout 1. They never change: what is published by these names
//! exists already. A change of bytes is a new layout number.

mod common;

use accel_erofs::Timestamp;
use accel_layer::{Attributes, LayerOptions, LowerDirectory, NoLower, convert_layer};
use common::{Below, Memory, Tar, chain, convert, convert_with, header, on_another, picture};
use std::{
    fmt::Write as _,
    io::{self, Read, Write},
};

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

/// An entry without data of its own mode, owner and time.
#[derive(Clone, Copy)]
struct Of {
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
}

const PLAIN: Of = Of {
    mode: 0o755,
    owner: (1, 2),
    mtime: 3,
};

fn at(mtime: u64) -> Of {
    Of { mtime, ..PLAIN }
}

fn of(tar: &mut Tar, kind: u8, path: &str, link: &str, of: Of) {
    let mut header = header(path.as_bytes(), kind, 0);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_mode(of.mode);
    header.set_uid(of.owner.0);
    header.set_gid(of.owner.1);
    header.set_mtime(of.mtime);
    tar.raw(header, b"");
}

fn dir(tar: &mut Tar, path: &str, mtime: u64) {
    of(tar, b'5', path, "", at(mtime));
}

/// Directories that something else replaces, each with a time of its own, and what is at
/// their paths in the end.
fn replaced_directories() -> Vec<u8> {
    let mut tar = Tar::default();
    // Implied again below one that is given again; two that are; all of it given again.
    dir(&mut tar, "a", 11);
    dir(&mut tar, "a/a", 12);
    tar.file("a", b"");
    dir(&mut tar, "a", 13);
    tar.file("a/a/f", b"");
    dir(&mut tar, "b", 21);
    dir(&mut tar, "b/b", 22);
    dir(&mut tar, "b/b/b", 23);
    tar.file("b", b"");
    dir(&mut tar, "b", 24);
    tar.file("b/b/b/f", b"");
    dir(&mut tar, "c", 31);
    dir(&mut tar, "c/c", 32);
    tar.file("c", b"");
    dir(&mut tar, "c", 33);
    tar.file("c/c/f", b"");
    dir(&mut tar, "c/c", 34);
    // A file in the end, a link, what a link leads to, and nothing.
    dir(&mut tar, "d", 41);
    tar.file("d", b"");
    dir(&mut tar, "e", 51);
    tar.file("target", b"").symlink("e", "target");
    dir(&mut tar, "f", 61);
    dir(&mut tar, "f/f", 62);
    dir(&mut tar, "g", 63);
    tar.symlink("f", "g").file("f/f/f", b"");
    dir(&mut tar, "h", 71);
    tar.symlink("h", "nowhere");
    // A directory replaced by a link to one that comes earlier, and one that comes later.
    dir(&mut tar, "i", 81);
    tar.symlink("i", "a");
    dir(&mut tar, "j", 91);
    tar.symlink("j", "k");
    dir(&mut tar, "k", 92);
    tar.end()
}

/// What comes twice, in other orders and under other spellings.
fn given_again() -> Vec<u8> {
    let mut tar = Tar::default();
    let capability: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    // The data of the first stays where it is, without a name.
    tar.file("./a", &bytes(1, 5000)).file("a", &bytes(2, 300));
    tar.file("b", b"b").hard("b1", "b").file("b", b"again");
    // An owner of a link becomes the file's, and its capability is lost.
    tar.pax(&[("SCHILY.xattr.security.capability", capability)])
        .file("c", b"c");
    let owner = Of {
        mode: 0o4711,
        owner: (10, 20),
        mtime: 99,
    };
    of(&mut tar, b'1', "c1", "c", owner);
    tar.symlink("s", "nowhere").hard("s1", "./s");
    tar.dir("d", 0o700).file("d/f", b"").dir("/d//.", 0o755);
    tar.raw(header(b"d/x/../y", b'3', 0), b"");
    tar.symlink("l", "/d").file("l/z", b"through a link");
    tar.pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
        .dir("e", 0o755);
    tar.pax(&[
        ("SCHILY.xattr.user.a", b"2"),
        ("SCHILY.xattr.trusted.c", b"3"),
    ])
    .dir("e", 0o755);
    // A global header takes the name it has.
    tar.file("global", b"gone")
        .raw(header(b"global", b'g', 0), b"");
    tar.raw(header(b"new/global", b'g', 0), b"");
    // Times beyond what a container sees.
    for time in ["-1", "9223372036.854775807", "9223372037", "1.5"] {
        tar.pax(&[("mtime", time.as_bytes())]).file(time, b"");
    }
    tar.pax(&[("uid", b"-1")]).file("nobody", b"");
    tar.end()
}

/// What new files take over from their directory: groups and default ACLs.
fn inherited() -> Vec<u8> {
    let mut tar = Tar::default();
    let group = Of {
        mode: 0o2775,
        owner: (0, 50),
        mtime: 3,
    };
    of(&mut tar, b'5', "group", "", group);
    tar.file("group/f", b"").dir("group/d", 0o755);
    tar.file("group/implied/f", b"").symlink("group/s", "f");
    tar.pax(&[("gid", b"-1")]).file("group/as-above", b"");
    tar.pax(&[("SCHILY.xattr.system.posix_acl_default", ACL)])
        .dir("acl", 0o755);
    tar.file("acl/f", b"").dir("acl/d", 0o750);
    tar.file("acl/implied/f", b"").symlink("acl/s", "f");
    tar.raw(header(b"acl/fifo", b'6', 0), b"");
    // One that says no more than the mode is none.
    tar.pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff")])
        .file("minimal", b"");
    tar.end()
}

/// Whiteouts and marks: on other layers they stay, in the lowest they remove.
fn whiteouts() -> Vec<u8> {
    let mut tar = Tar::default();
    tar.file(".wh.a", b"").file("a", b"");
    tar.file(".wh.b", b"").file(".wh.b", b"");
    tar.dir("d", 0o755)
        .file("d/f", b"")
        .file("d/implied/f", b"");
    tar.file("d/.wh..wh..opq", b"").file("d/.wh.gone", b"");
    tar.file("e/.wh..wh..opq", b"").dir("e", 0o700);
    tar.pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .dir("not-opaque", 0o755);
    tar.pax(&[("uid", b"70000")]).file("d/.wh.owned", b"");
    tar.end()
}

/// Directories that whiteouts and marks remove, and that paths imply again.
fn removed_directories() -> Vec<u8> {
    let mut tar = Tar::default();
    dir(&mut tar, "a", 11);
    dir(&mut tar, "a/a", 12);
    tar.file(".wh.a", b"").file("a/a/f", b"");
    dir(&mut tar, "b/b", 21);
    dir(&mut tar, "b/b/b", 22);
    tar.file(".wh..wh..opq", b"").file("b/b/b/f", b"");
    dir(&mut tar, "c", 31);
    dir(&mut tar, "c/c/c", 32);
    tar.file("c/.wh..wh..opq", b"").file("c/c/c/f", b"");
    tar.end()
}

/// Every form of a sparse file; each is stored with its zeros.
fn sparse() -> Vec<u8> {
    let mut tar = Tar::default();
    let numbers = |header: &mut tar::Header, offset: usize, number: u64| {
        let text = format!("{number:011o}\0");
        header.as_mut_bytes()[offset..offset + 12].copy_from_slice(text.as_bytes());
    };
    // Old GNU: pieces in the header, the size behind them.
    let mut old = tar::Header::new_gnu();
    old.set_path("old").unwrap();
    old.set_entry_type(tar::EntryType::new(b'S'));
    old.set_mode(0o644);
    old.set_uid(1);
    old.set_gid(2);
    old.set_mtime(3);
    old.set_size(8);
    for (offset, number) in [
        (386, 4096),
        (398, 5),
        (410, 200_000),
        (422, 3),
        (483, 250_000),
    ] {
        numbers(&mut old, offset, number);
    }
    tar.raw(old, b"startend");
    tar.pad();
    for (name, map) in [("0.1", "10,5,140000,3"), ("0.1-empty", "")] {
        tar.pax(&[
            ("GNU.sparse.size", b"150000"),
            ("GNU.sparse.map", map.as_bytes()),
        ])
        .file(name, if map.is_empty() { b"" } else { b"startend" });
    }
    tar.pax(&[
        ("GNU.sparse.size", b"20000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"5"),
        ("GNU.sparse.offset", b"19997"),
        ("GNU.sparse.numbytes", b"3"),
    ])
    .file("0.0", b"startend");
    let mut map = b"2\n512\n5\n299997\n3\n".to_vec();
    map.resize(512, 0);
    map.extend(b"startend");
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"1.0"),
        ("GNU.sparse.realsize", b"300000"),
    ])
    .file("GNUSparseFile.0/1.0", &map);
    tar.end()
}

/// Directories and attributes at the borders of blocks, and names at those of bytes.
fn borders_of_metadata() -> Vec<u8> {
    let mut tar = Tar::default();
    // Before ".", between the dots, behind them; no text; the longest.
    tar.dir("names", 0o755);
    for name in [
        &b"!"[..],
        b"-",
        b".-",
        b"...",
        b"..a",
        b".a",
        b"\xff\xfe",
        b"\x01",
        b"a b",
    ] {
        tar.raw(header(&[b"names/", name].concat(), b'0', 0), b"");
    }
    let long = format!("names/{}", "n".repeat(255));
    tar.pax(&[("path", long.as_bytes())]).file("x", b"");
    // Directories that fill a block to the byte less some, and go one over. Each entry is
    // 12 bytes and its name, "." and ".." 27 bytes.
    for fill in [4030, 4031, 4032, 4033, 4096, 4097] {
        let path = format!("fill-{fill}");
        tar.dir(&path, 0o755);
        let entries = fill - 27;
        let full = (entries - 20) / 62;
        for number in 0..=full {
            let len = if number < full {
                50
            } else {
                entries - full * 62 - 12
            };
            let name = format!("{number:03}{}", "f".repeat(len - 3));
            tar.hard(&format!("{path}/{name}"), "names/a b");
        }
    }
    // Inodes that no block holds, with a directory or a link behind them; smaller ones that
    // go into the room they leave.
    for (number, size) in [0usize, 3000, 3950, 4000, 4020, 4032, 5000, 9000]
        .into_iter()
        .enumerate()
    {
        let value = bytes(u32::try_from(number).unwrap(), u32::try_from(size).unwrap());
        let own: &[(&str, &[u8])] = &[("SCHILY.xattr.user.own", &value)];
        tar.pax(own).dir(&format!("own-{size}"), 0o755);
        tar.file(&format!("own-{size}/entry"), b"");
        let security: &[(&str, &[u8])] = &[("SCHILY.xattr.security.own", &value)];
        tar.pax(security).symlink(&format!("link-{size}"), "target");
        tar.pax(own)
            .raw(header(format!("fifo-{size}").as_bytes(), b'6', 0), b"");
    }
    // Shared by name and value; a name with two values; by two names of one file only.
    for (path, value) in [("s1", "v"), ("s2", "v"), ("s3", "w"), ("s4", "")] {
        tar.pax(&[
            ("SCHILY.xattr.user.shared", value.as_bytes()),
            ("SCHILY.xattr.user.one", path.as_bytes()),
        ])
        .file(path, b"");
    }
    tar.pax(&[("SCHILY.xattr.user.linked", b"once")])
        .file("linked", b"")
        .hard("names/linked", "linked");
    // Links are mentioned where their first name is in the image, not in the tar.
    tar.file("z/z", b"z")
        .hard("a-link", "z/z")
        .hard("z/a", "z/z");
    tar.end()
}

/// Files at the borders of blocks and chunks; metadata that begins in the last chunk.
fn borders_of_data() -> Vec<u8> {
    let mut tar = Tar::default();
    for (number, len) in (0u32..).zip([
        131_072, 126_976, 4096, 1, 131_071, 4095, 4097, 0, 131_073, 393_216, 8192, 126_977,
        262_145, 122_880, 131_072, 12_288, 65_536, 131_072, 1, 61_440, 4096,
    ]) {
        tar.file(&format!("{number:02}-{len}"), &bytes(number, len));
    }
    tar.end()
}

/// Each by itself, so that a change says what it changed: its name, the tar, whether other
/// layers lie below, whether its tree depends on them, and the image's BLAKE3.
type Case = (&'static str, fn() -> Vec<u8>, bool, bool, &'static str);

const CASES: [Case; 12] = [
    (
        "empty",
        || Tar::default().end(),
        false,
        false,
        "d2ef75929d7e529b7cfca95ce5f36da3aa3dc05b1b0138f1886c064d2e68eeff",
    ),
    (
        "replaced directories",
        replaced_directories,
        true,
        true,
        "8ce1f587283883689d00d8de129b730557ea155e5d7716bcf4af38367a4b7cc4",
    ),
    (
        "given again",
        given_again,
        true,
        true,
        "ca9ec355fdabcbab6afb22b5d5d6699fc2df037cc7c43567229f92f3f9a7e2d7",
    ),
    (
        "inherited",
        inherited,
        true,
        true,
        "03b8b112dea373fd066f0ea8dee8ba52c1ad40f9766d7f9927d203ce2903330d",
    ),
    (
        "whiteouts",
        whiteouts,
        true,
        true,
        "bf4e3e59efdeef1415eb30848b20a8fc019d8e032a3df8e9dbe5481d0ea55e80",
    ),
    (
        "whiteouts of the lowest",
        whiteouts,
        false,
        true,
        "09f2f0ce54a91b3ba9de4bc9020c47804ece71ad6c60c2fa572b6a57810824f1",
    ),
    (
        "removed directories",
        removed_directories,
        false,
        true,
        "e2b942adf9c2bd4670d45fee0381967260259297068bc52877a8124d1e1cb485",
    ),
    (
        "sparse",
        sparse,
        false,
        false,
        "01a54c6679a1d4776a43e507e2224e1a63e231e0c0312a506cf97c3b17b65b1b",
    ),
    (
        "borders of metadata",
        borders_of_metadata,
        false,
        true,
        "7f5c574aeb0c9dcab2422b1985154cd9ed84e6f6f8c9de446fb1a0738eaba0fb",
    ),
    (
        "borders of data",
        borders_of_data,
        false,
        false,
        "34fca1ffddc3fd9b1db18f164d6f3025ef2e5aa697471dad64db71a2b7924c35",
    ),
    (
        "one chunk",
        || Tar::default().file("f", &bytes(1, 114_688)).end(),
        false,
        false,
        "b50d3473cc0eb59662fc4563c01ccae96c98668b203dea514a3e8b4e03c292b7",
    ),
    (
        "a byte in a second chunk",
        || {
            Tar::default()
                .file("f", &bytes(1, 118_785))
                .file("g", b"1")
                .end()
        },
        false,
        false,
        "d45642ad81e98fcaaf74f60474127ebf116a61a733ec08d894402660e4c5ae92",
    ),
];

#[test]
fn layout_1_gives_these_bytes_of_every_corner() {
    let mut changed = String::new();
    for (name, tar, on_others, needs_lower, wanted) in CASES {
        let options = match on_others {
            true => on_another(),
            false => LayerOptions::new("test"),
        };
        let converted = convert_with(&tar(), &options, &mut NoLower);
        let (summary, image) = converted.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        assert_eq!(summary.needs_lower, needs_lower, "{name}");
        if hash(&image) != wanted {
            writeln!(changed, "{name}: {}", hash(&image)).unwrap();
            for (path, line) in picture(&image) {
                writeln!(changed, "    {path} {line}").unwrap();
            }
        }
    }
    assert!(changed.is_empty(), "other bytes than published:\n{changed}");
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
