//! Awkward layers, and what is to happen with each.

use crate::{
    common::{self, Tar, header},
    containerd,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What is to happen.
#[derive(Clone, Copy)]
pub enum Expect {
    /// The same tree.
    Same,
    /// Both refuse it; we with this text.
    Refused(&'static str),
    /// We refuse with this text what containerd takes.
    Stricter(&'static str),
    /// containerd refuses it; we do not.
    Lenient,
}
use Expect::{Lenient, Refused, Same, Stricter};

/// An image: its layers' tars, the lowest first.
pub struct Case {
    pub name: String,
    pub layers: Vec<Vec<u8>>,
    pub expect: Expect,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    /// A layer, as the lowest and on top of another.
    fn both(&mut self, name: &str, expect: Expect, tar: &Tar) {
        self.lowest(name, expect, tar);
        self.upper(name, expect, tar);
    }

    fn lowest(&mut self, name: &str, expect: Expect, tar: &Tar) {
        self.image(&format!("{name}-lowest"), expect, vec![tar.end()]);
    }

    fn upper(&mut self, name: &str, expect: Expect, tar: &Tar) {
        self.image(&format!("{name}-upper"), expect, vec![base(), tar.end()]);
    }

    fn image(&mut self, name: &str, expect: Expect, layers: Vec<Vec<u8>>) {
        self.0.push(Case {
            name: name.into(),
            layers,
            expect,
        });
    }
}

fn base() -> Vec<u8> {
    let mut tar = Tar::default();
    tar.dir("lower", 0o2751)
        .file("lower/f", b"below")
        .file("file", b"below")
        .hard("linked", "file")
        .symlink("way", "lower");
    tar.raw(
        owned(header(b"lower/set", b'5', 0), 0o1770, 70_000, 3_000_000_000),
        b"",
    )
    .pax(&[
        ("SCHILY.xattr.user.x", b"lower"),
        ("SCHILY.xattr.system.posix_acl_access", &acl(&USERS)),
    ])
    .dir("attributes", 0o750);
    tar.end()
}

fn owned(mut header: tar::Header, mode: u32, uid: u64, gid: u64) -> tar::Header {
    header.set_mode(mode);
    header.set_uid(uid);
    header.set_gid(gid);
    header
}

/// (tag, permissions, id) of a POSIX ACL.
type AclEntry = (u16, u16, u32);
const NO_ID: u32 = u32::MAX;
const USERS: [AclEntry; 5] = [
    (1, 7, NO_ID),
    (2, 5, 1000),
    (4, 5, NO_ID),
    (16, 5, NO_ID),
    (32, 0, NO_ID),
];
const MINIMAL: [AclEntry; 3] = [(1, 7, NO_ID), (4, 5, NO_ID), (32, 0, NO_ID)];

fn acl(entries: &[AclEntry]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const ACCESS: &str = "SCHILY.xattr.system.posix_acl_access";
const DEFAULT: &str = "SCHILY.xattr.system.posix_acl_default";
const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn at(path: &str, kind: u8, change: impl FnOnce(&mut tar::Header)) -> tar::Header {
    let mut header = header(path.as_bytes(), kind, 0);
    change(&mut header);
    header
}

fn replaced(cases: &mut Cases) {
    cases.both(
        "file-twice",
        Same,
        Tar::default()
            .file("f", b"1")
            .hard("h", "f")
            .file("f", b"2")
            .hard("i", "f"),
    );
    cases.both(
        "link-then-link",
        Same,
        Tar::default()
            .file("a", b"1")
            .file("b", b"2")
            .hard("h", "a")
            .hard("h", "b")
            .hard("a", "h"),
    );
    cases.both(
        "dir-then-file",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .file("d", b"1")
            .hard("h", "d"),
    );
    cases.both(
        "full-dir-then-file",
        Same,
        Tar::default()
            .dir("d", 0o700)
            .file("d/f", b"1")
            .file("d", b"1"),
    );
    cases.both(
        "dir-of-dirs-then-file",
        Lenient,
        Tar::default()
            .dir("d", 0o700)
            .dir("d/e", 0o700)
            .file("d", b"1"),
    );
    cases.both(
        "dir-of-dirs-then-dir",
        Lenient,
        Tar::default()
            .dir("d", 0o700)
            .dir("d/e", 0o700)
            .file("d", b"1")
            .dir("d", 0o711),
    );
    cases.both(
        "dir-file-dir",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .file("d/f", b"1")
            .file("d", b"1")
            .raw(at("d", b'5', |h| h.set_mtime(40)), b"")
            .file("d/g", b""),
    );
    cases.both(
        "dir-file-dir-implied",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .raw(at("d/d", b'5', |h| h.set_mtime(60)), b"")
            .raw(at("d/d/d", b'5', |h| h.set_mtime(70)), b"")
            .file("d", b"1")
            .dir("d", 0o700)
            .file("d/d/d/f", b"1"),
    );
    cases.both(
        "dir-then-link-to-file",
        Same,
        Tar::default()
            .file("f", b"1")
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .symlink("d", "f"),
    );
    cases.both(
        "dir-then-link-to-dir",
        Same,
        Tar::default()
            .dir("x", 0o700)
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .symlink("d", "x"),
    );
    cases.both(
        "dir-then-link-to-later-dir",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .symlink("d", "x")
            .dir("x", 0o700),
    );
    cases.both(
        "dir-then-link-to-nothing",
        Lenient,
        Tar::default().dir("d", 0o700).symlink("d", "nothing"),
    );
    cases.both(
        "dir-then-device",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .raw(at("d", b'6', |_| ()), b""),
    );
    cases.both(
        "file-then-dir",
        Same,
        Tar::default()
            .file("d", b"1")
            .dir("d", 0o700)
            .file("d/f", b""),
    );
    cases.both(
        "dir-twice",
        Same,
        Tar::default()
            .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
            .dir("d", 0o700)
            .file("d/f", b"1")
            .pax(&[("SCHILY.xattr.user.b", b"2")])
            .raw(owned(header(b"d/", b'5', 0), 0o1755, 9, 9), b""),
    );
    cases.both(
        "link-then-dir",
        Same,
        Tar::default()
            .dir("x", 0o755)
            .symlink("l", "x")
            .dir("l", 0o700)
            .file("l/f", b""),
    );
    cases.both(
        "link-then-file-through",
        Same,
        Tar::default()
            .dir("x", 0o755)
            .symlink("l", "x")
            .file("l/f", b"1")
            .dir("l/d", 0o711)
            .file("l/d/e/f", b"2"),
    );
    cases.both(
        "hard-link-gives-attributes",
        Same,
        Tar::default()
            .pax(&[
                ("SCHILY.xattr.user.a", b"1"),
                ("SCHILY.xattr.security.capability", CAPABILITY),
            ])
            .file("f", b"1")
            .pax(&[("SCHILY.xattr.user.b", b"1")])
            .raw(
                at("h", b'1', |h| {
                    h.set_link_name("f").unwrap();
                    h.set_mode(0o4711);
                    h.set_uid(7);
                    h.set_mtime(99);
                }),
                b"",
            ),
    );
    cases.both(
        "hard-link-with-capability",
        Same,
        Tar::default()
            .pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
            .file("f", b"1")
            .pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
            .hard("h", "f"),
    );
    cases.both(
        "hard-link-to-symlink",
        Same,
        Tar::default().symlink("s", "nothing").hard("h", "s"),
    );
    cases.both(
        "hard-link-to-device",
        Same,
        Tar::default()
            .raw(
                at("c", b'3', |h| {
                    h.set_device_major(10).unwrap();
                    h.set_device_minor(200).unwrap();
                }),
                b"",
            )
            .hard("h", "c"),
    );
    cases.both(
        "hard-link-through-symlink",
        Same,
        Tar::default()
            .dir("x", 0o755)
            .file("x/f", b"1")
            .symlink("l", "x")
            .hard("h", "l/f")
            .hard("i", "./x/../l//f"),
    );
    cases.both(
        "hard-link-to-itself",
        Refused("has not made before"),
        Tar::default().file("f", b"1").hard("f", "f"),
    );
    cases.both(
        "hard-link-to-nothing",
        Refused("has not made before"),
        Tar::default().hard("h", "nothing"),
    );
    cases.both(
        "hard-link-to-directory",
        Refused("a hard link to the directory"),
        Tar::default().dir("d", 0o755).hard("h", "d"),
    );
    cases.upper(
        "hard-link-to-lower",
        Refused("has not made before"),
        Tar::default().hard("h", "file"),
    );
}

fn whiteouts(cases: &mut Cases) {
    cases.both(
        "whiteout-before-file",
        Same,
        Tar::default().file(".wh.f", b"").file("f", b"1"),
    );
    cases.both(
        "whiteout-before-dir",
        Same,
        Tar::default()
            .file(".wh.lower", b"")
            .dir("lower", 0o700)
            .file("lower/g", b"1"),
    );
    cases.lowest(
        "whiteout-after-file",
        Same,
        Tar::default()
            .file("f", b"1")
            .file("g", b"1")
            .file(".wh.f", b""),
    );
    cases.upper(
        "whiteout-after-file",
        Refused("hides something that the same layer made"),
        Tar::default().file("f", b"1").file(".wh.f", b""),
    );
    cases.lowest(
        "whiteout-after-dir",
        Same,
        Tar::default()
            .dir("d", 0o755)
            .file("d/f", b"1")
            .dir("e", 0o755)
            .file("d/.wh.f", b""),
    );
    cases.lowest(
        "whiteout-of-dir",
        Lenient,
        Tar::default()
            .dir("d", 0o755)
            .file("d/f", b"1")
            .file(".wh.d", b""),
    );
    // Both times are set in the end.
    cases.lowest(
        "whiteout-of-dir-then-implied",
        Same,
        Tar::default()
            .raw(at("d", b'5', |h| h.set_mtime(50)), b"")
            .raw(at("d/e", b'5', |h| h.set_mtime(60)), b"")
            .file(".wh.d", b"")
            .file("d/e/f", b"1"),
    );
    cases.lowest(
        "opaque-over-dir-then-implied",
        Same,
        Tar::default()
            .dir("d", 0o755)
            .raw(at("d/e/f", b'5', |h| h.set_mtime(50)), b"")
            .raw(at("d/e/f/g", b'5', |h| h.set_mtime(60)), b"")
            .file("d/.wh..wh..opq", b"")
            .file("d/e/f/g/h", b"1"),
    );
    cases.lowest(
        "whiteout-of-implied-dir",
        Same,
        Tar::default().file("d/f", b"1").file(".wh.d", b""),
    );
    cases.upper(
        "whiteout-instead",
        Same,
        Tar::default()
            .file(".wh.file", b"")
            .file("lower/.wh.f", b"")
            .file(".wh.way", b""),
    );
    cases.both(
        "whiteout-of-nothing",
        Same,
        Tar::default()
            .file(".wh.nothing", b"")
            .dir("d", 0o755)
            .file("d/.wh.nothing", b"")
            .file("implied/.wh.nothing", b"")
            .file("lower/.wh.nothing", b""),
    );
    cases.lowest(
        "whiteout-twice",
        Same,
        Tar::default().file(".wh.f", b"").file(".wh.f", b""),
    );
    cases.upper(
        "whiteout-twice",
        Lenient,
        Tar::default().file(".wh.f", b"").file(".wh.f", b""),
    );
    cases.upper(
        "whiteout-with-a-link",
        Same,
        Tar::default().file(".wh.lower", b"").hard("h", "lower"),
    );
    cases.lowest(
        "whiteout-gone-with-a-link",
        Refused("has not made"),
        Tar::default().file(".wh.lower", b"").hard("h", "lower"),
    );
    cases.both(
        "whiteout-owner",
        Same,
        Tar::default().raw(owned(header(b".wh.f", b'0', 0), 0o777, 70_000, 5), b""),
    );
    cases.both(
        "whiteout-of-any-type",
        Same,
        Tar::default()
            .dir(".wh.d", 0o755)
            .symlink(".wh.s", "x")
            .raw(at(".wh.p", b'6', |_| ()), b"")
            .raw(header(b".wh.data", b'0', 5), b"bytes"),
    );
    cases.both(
        "whiteout-names",
        Same,
        Tar::default()
            .file(".wh..f", b"")
            .file(".wh...f", b"")
            .file(".wh.a.wh.b", b""),
    );
    cases.both(
        "whiteout-of-dot",
        Refused("no valid whiteout"),
        Tar::default().file(".wh..", b""),
    );
    cases.both(
        "whiteout-of-dots",
        Refused("no valid whiteout"),
        Tar::default().file(".wh...", b""),
    );
    cases.both(
        "whiteout-of-no-name",
        Refused("no valid whiteout"),
        Tar::default().file(".wh.", b""),
    );
    cases.both(
        "whiteout-as-directory",
        Same,
        Tar::default()
            .file(".wh.d/f", b"1")
            .dir("x", 0o755)
            .file("x/.wh..wh.e/f", b"1"),
    );
    cases.both(
        "aufs-names",
        Same,
        Tar::default()
            .file(".wh..wh.aufs", b"")
            .dir(".wh..wh.plnk", 0o700)
            .dir(".wh..wh.orph", 0o700)
            .file("lower/.wh..wh.x", b""),
    );
    cases.both(
        "opaque",
        Same,
        Tar::default()
            .dir("lower", 0o755)
            .file("lower/.wh..wh..opq", b"")
            .file("lower/g", b"1"),
    );
    cases.both(
        "opaque-last",
        Same,
        Tar::default()
            .dir("lower", 0o755)
            .file("lower/g", b"1")
            .file("lower/.wh..wh..opq", b""),
    );
    cases.both(
        "opaque-implied",
        Same,
        Tar::default()
            .file("lower/.wh..wh..opq", b"")
            .file("new/.wh..wh..opq", b""),
    );
    cases.both(
        "opaque-root",
        Same,
        Tar::default().file("f", b"1").file(".wh..wh..opq", b""),
    );
    cases.lowest(
        "opaque-over-implied",
        Same,
        Tar::default()
            .dir("d", 0o755)
            .file("d/e/f", b"1")
            .file("d/.wh..wh..opq", b"")
            .file("d/g", b"2"),
    );
    cases.both(
        "opaque-then-dir",
        Same,
        Tar::default()
            .file("d/.wh..wh..opq", b"")
            .dir("d", 0o700)
            .dir("d", 0o711),
    );
    cases.both(
        "opaque-through-link",
        Same,
        Tar::default()
            .dir("x", 0o755)
            .symlink("l", "x")
            .file("l/.wh..wh..opq", b"")
            .file("l/.wh.y", b""),
    );
    cases.both(
        "device-0-0",
        Same,
        Tar::default()
            .raw(at("lower", b'3', |_| ()), b"")
            .dir("d", 0o755)
            .raw(at("d/w", b'3', |_| ()), b""),
    );
    cases.both(
        "block-0-0",
        Same,
        Tar::default().raw(at("b", b'4', |_| ()), b""),
    );
    // Three layers: what lies between counts.
    let delete = Tar::default()
        .file(".wh.lower", b"")
        .file(".wh.attributes", b"")
        .end();
    cases.image(
        "implied-over-whiteout",
        Same,
        vec![
            base(),
            delete.clone(),
            Tar::default().file("lower/g", b"1").end(),
        ],
    );
    cases.image(
        "deep-implied-over-whiteout",
        Lenient,
        vec![base(), delete, Tar::default().file("lower/g/h", b"1").end()],
    );
    cases.image(
        "implied-over-file",
        Same,
        vec![base(), Tar::default().file("file/g", b"1").end()],
    );
    cases.image(
        "implied-over-opaque",
        Same,
        vec![
            base(),
            Tar::default()
                .dir("lower", 0o700)
                .file("lower/.wh..wh..opq", b"")
                .end(),
            Tar::default().file("lower/set/g", b"1").end(),
        ],
    );
}

fn implied(cases: &mut Cases) {
    cases.both(
        "implied",
        Same,
        Tar::default()
            .file("lower/set/f", b"1")
            .file("attributes/x/f", b"1")
            .file("way/x/f", b"")
            .file("new/er/f", b""),
    );
    cases.both(
        "implied-then-dir",
        Same,
        Tar::default()
            .file("attributes/f", b"1")
            .pax(&[("SCHILY.xattr.user.y", b"2")])
            .dir("attributes", 0o711),
    );
    cases.both(
        "implied-in-setgid",
        Same,
        Tar::default()
            .raw(owned(header(b"d", b'5', 0), 0o2775, 5, 50), b"")
            .file("d/e/g/f", b"1")
            .dir("d/h", 0o755)
            .file("d/i", b""),
    );
    cases.both(
        "paths",
        Same,
        Tar::default()
            .dir("./a//", 0o750)
            .file("/a/./b", b"1")
            .file("a//c/../d", b"2")
            .hard("e", "./a//b")
            .dir("./", 0o700)
            .file("a/x/../../y", b"")
            .file("z/", b"1")
            .symlink("s/", "a")
            .hard("k/", "z"),
    );
    cases.both(
        "a-name-for-the-root",
        Same,
        Tar::default()
            .file("a/..", b"")
            .dir("/", 0o700)
            .file(".", b"")
            .dir("", 0o1777),
    );
    cases.both(
        "through-file",
        Refused("not a directory"),
        Tar::default().file("f", b"").file("f/g", b""),
    );
    cases.both(
        "through-file-deep",
        Refused("not a directory"),
        Tar::default().file("f", b"").file("f/g/h", b""),
    );
    cases.both(
        "symlinks",
        Same,
        Tar::default()
            .dir("usr", 0o755)
            .dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .file("lib/f", b"1")
            .symlink("out", "/../../usr")
            .file("out/g", b"2")
            .symlink("dangling", "new/place")
            .file("dangling/h", b"3")
            .symlink("lib/up", "../..")
            .file("lib/up/k", b"4"),
    );
    cases.both(
        "symlink-loop",
        Refused("255 symbolic links"),
        Tar::default()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/f", b""),
    );
    cases.both(
        "climbs-out",
        Stricter("climbs out"),
        Tar::default().file("../f", b""),
    );
    cases.both(
        "climbs-out-late",
        Stricter("climbs out"),
        Tar::default().file("a/../../f", b""),
    );
    cases.both(
        "link-climbs-out",
        Stricter("climbs out"),
        Tar::default().file("f", b"").hard("h", "../f"),
    );
}

fn attributes(cases: &mut Cases) {
    let mut modes = Tar::default();
    for mode in [
        0, 0o7777, 0o4755, 0o2755, 0o1755, 0o6711, 0o100_644, 0o40_755,
    ] {
        modes.raw(at(&format!("f{mode:o}"), b'0', |h| h.set_mode(mode)), b"");
        modes.raw(at(&format!("d{mode:o}"), b'5', |h| h.set_mode(mode)), b"");
        modes.raw(at(&format!("p{mode:o}"), b'6', |h| h.set_mode(mode)), b"");
        modes.raw(
            at(&format!("s{mode:o}"), b'2', |h| {
                h.set_mode(mode);
                h.set_link_name("x").unwrap();
            }),
            b"",
        );
    }
    cases.both("modes", Same, &modes);
    let mut owners = Tar::default();
    for uid in [
        "0",
        "65534",
        "65535",
        "65536",
        "70000",
        "2147483648",
        "4294967294",
        "-1",
        "4294967295",
        "-2",
    ] {
        owners
            .pax(&[("uid", uid.as_bytes())])
            .file(&format!("u{uid}"), b"");
        owners
            .pax(&[("gid", uid.as_bytes())])
            .dir(&format!("g{uid}"), 0o2755);
        owners
            .pax(&[("gid", b"-1")])
            .file(&format!("g{uid}/f"), b"");
        owners
            .pax(&[("uid", uid.as_bytes())])
            .file(&format!(".wh.w{uid}"), b"");
    }
    owners.file("f", b"").pax(&[("uid", b"-1")]).hard("h", "f");
    cases.both("owners", Same, &owners);
    cases.both(
        "owner-too-large",
        Stricter("owner is 4294967296"),
        Tar::default().pax(&[("uid", b"4294967296")]).file("f", b""),
    );
    let mut base256 = header(b"f", b'0', 0);
    base256.as_old_mut().uid = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe];
    base256.as_old_mut().gid = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe];
    base256.as_old_mut().mtime = [0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    base256.as_old_mut().size = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
    let mut negative = header(b"g", b'0', 0);
    negative.as_old_mut().mtime = [0xff; 12];
    cases.both(
        "base-256",
        Same,
        Tar::default().raw(base256, b"abc").raw(negative, b""),
    );
    let mut times = Tar::default();
    for time in [
        "0",
        "-1",
        "-0.5",
        "0.5",
        "2147483647",
        "2147483648",
        "4294967296.000000001",
        "9223372036.854775807",
        "9223372036.854775808",
        "99999999999",
        "12.0000000019",
        "12.5",
        "1700000000.123456789",
        "5.",
    ] {
        for (kind, letter) in [(b'0', "f"), (b'5', "d"), (b'2', "s"), (b'6', "p")] {
            times.pax(&[("mtime", time.as_bytes())]).raw(
                at(&format!("{letter}{time}"), kind, |h| {
                    if kind == b'2' {
                        h.set_link_name("x").unwrap();
                    }
                }),
                b"",
            );
        }
    }
    cases.both("times", Same, &times);
    let mut devices = Tar::default();
    for (major, minor) in [
        (0, 1),
        (1, 0),
        (8, 255),
        (10, 256),
        (259, 70_000),
        (4095, 1_048_575),
    ] {
        for kind in [b'3', b'4'] {
            let name = format!("{}{major}-{minor}", char::from(kind));
            devices.raw(
                at(&name, kind, |h| {
                    h.set_device_major(major).unwrap();
                    h.set_device_minor(minor).unwrap();
                }),
                b"",
            );
        }
    }
    devices.raw(at("p", b'6', |h| h.set_device_major(5).unwrap()), b"");
    cases.both("devices", Same, &devices);
    cases.both(
        "device-too-large",
        Stricter("4096:0"),
        Tar::default().raw(at("c", b'3', |h| h.set_device_major(4096).unwrap()), b""),
    );
    let long = "n".repeat(255);
    let deep = format!("{0}/{0}/{0}", "d".repeat(200));
    cases.both(
        "names",
        Same,
        Tar::default()
            .pax(&[("path", long.as_bytes())])
            .file("x", b"1")
            .pax(&[("path", b"not\xffutf-8\n\\ \x01")])
            .file("x", b"2")
            .pax(&[("path", deep.as_bytes())])
            .file("x", b"3")
            .file("...", b"")
            .file("-", b"")
            .file("a b", b""),
    );
    cases.both(
        "name-too-long",
        Refused("256 bytes long, more than 255"),
        Tar::default()
            .pax(&[("path", "n".repeat(256).as_bytes())])
            .file("x", b"1"),
    );
    cases.both(
        "links",
        Same,
        Tar::default()
            .pax(&[("linkpath", "t".repeat(4095).as_bytes())])
            .symlink("long", "x")
            .pax(&[("linkpath", b"\xff/\n/")])
            .symlink("odd", "x")
            .symlink("slash", "/")
            .symlink("up", ".."),
    );
    cases.both(
        "link-too-long",
        Refused("4096 bytes long, more than 4095"),
        Tar::default()
            .pax(&[("linkpath", "t".repeat(4096).as_bytes())])
            .symlink("long", "x"),
    );
    cases.both(
        "link-empty",
        Refused("target is empty"),
        Tar::default().symlink("empty", ""),
    );
    cases.both(
        "unknown-type",
        Refused("type 'V'"),
        Tar::default().raw(header(b"v", b'V', 0), b""),
    );
}

fn xattrs(cases: &mut Cases) {
    let binary: Vec<u8> = (0..=255).collect();
    let all: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.binary", &binary),
        ("SCHILY.xattr.user.lines", b"a\nb=\0\xff\n"),
        ("SCHILY.xattr.user.empty", b""),
        ("SCHILY.xattr.user.with = and space", b"1"),
        ("SCHILY.xattr.security.any", b"2"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/lower"),
        ("SCHILY.xattr.trusted.any", b"3"),
        ("SCHILY.xattr.system.nfs4_acl", b"4"),
        ("SCHILY.xattr.com.apple.FinderInfo", b"5"),
        ("LIBARCHIVE.xattr.user.libarchive", b"dmFsdWU"),
    ];
    let mut tar = Tar::default();
    tar.pax(all)
        .file("f", b"1")
        .pax(all)
        .dir("d", 0o755)
        .pax(all)
        .symlink("s", "f");
    tar.pax(all).raw(at("p", b'6', |_| ()), b"");
    tar.pax(all)
        .raw(at("c", b'3', |h| h.set_device_minor(3).unwrap()), b"");
    tar.pax(all)
        .file(".wh.w", b"")
        .pax(all)
        .file("d/.wh..wh..opq", b"");
    tar.pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
        .file("capable", b"1");
    tar.pax(&[
        ("SCHILY.xattr.user.twice", b"1"),
        ("SCHILY.xattr.user.twice", b"2"),
    ])
    .file("twice", b"1");
    cases.both("xattrs", Same, &tar);
    cases.both(
        "xattr-without-name",
        Refused("user."),
        Tar::default()
            .pax(&[("SCHILY.xattr.user.", b"1")])
            .file("f", b""),
    );
    cases.both(
        "xattr-name-too-long",
        Refused("255"),
        Tar::default()
            .pax(&[(&format!("SCHILY.xattr.user.{}", "x".repeat(251)), b"1")])
            .file("f", b""),
    );
    let mut acls = Tar::default();
    acls.pax(&[(ACCESS, &acl(&USERS))])
        .raw(at("access", b'0', |h| h.set_mode(0o750)), b"");
    acls.pax(&[(ACCESS, &acl(&USERS))])
        .raw(at("other-mode", b'0', |h| h.set_mode(0o604)), b"");
    acls.pax(&[(ACCESS, &acl(&MINIMAL))])
        .raw(at("minimal", b'0', |h| h.set_mode(0o611)), b"");
    acls.pax(&[(
        ACCESS,
        &acl(&[
            (1, 7, 5),
            (2, 5, 1000),
            (2, 4, 1001),
            (4, 5, 6),
            (8, 1, 3),
            (16, 5, 7),
            (32, 0, 8),
        ]),
    )])
    .file("odd-ids", b"");
    acls.pax(&[(ACCESS, b"\x02\0\0\0")]).file("no-entries", b"");
    acls.pax(&[(ACCESS, b"")]).file("empty", b"");
    acls.pax(&[(ACCESS, b"\x01\0\0\0")]).file("foreign", b"");
    acls.pax(&[(ACCESS, &acl(&USERS))])
        .symlink("link", "access");
    acls.pax(&[(ACCESS, &acl(&USERS))])
        .raw(at("fifo", b'6', |_| ()), b"");
    acls.pax(&[(DEFAULT, b"\x02\0\0\0")])
        .file("default-of-nothing", b"");
    acls.pax(&[(ACCESS, &acl(&USERS)), (DEFAULT, &acl(&USERS))])
        .dir("d", 0o750);
    acls.file("d/f", b"")
        .dir("d/d", 0o2755)
        .file("d/d/f", b"")
        .file("d/implied/f", b"")
        .symlink("d/s", "f");
    acls.raw(at("d/p", b'6', |_| ()), b"")
        .file("d/.wh.w", b"")
        .raw(at("d/private", b'0', |h| h.set_mode(0o600)), b"");
    acls.pax(&[(ACCESS, &acl(&MINIMAL))])
        .file("d/taken-away", b"")
        .hard("d/h", "d/f");
    acls.pax(&[(DEFAULT, &acl(&MINIMAL))])
        .dir("m", 0o755)
        .file("m/f", b"")
        .dir("m/d", 0o700)
        .file("m/d/f", b"");
    acls.dir("d", 0o700);
    cases.both("acls", Same, &acls);
    let mut lower = Tar::default();
    lower
        .pax(&[(DEFAULT, &acl(&USERS))])
        .dir("d", 0o750)
        .dir("d/e", 0o755);
    cases.image(
        "acls-implied",
        Same,
        vec![
            lower.end(),
            Tar::default()
                .file("d/e/f", b"1")
                .file("d/new/f", b"2")
                .end(),
        ],
    );
    for (name, value) in [
        ("acl-of-no-version", &b"\x02\0\0"[..]),
        ("acl-cut", &acl(&USERS)[..20]),
        (
            "acl-out-of-order",
            &acl(&[(4, 5, NO_ID), (1, 7, NO_ID), (32, 0, NO_ID)]),
        ),
        (
            "acl-without-mask",
            &acl(&[(1, 7, NO_ID), (2, 5, 1000), (4, 5, NO_ID), (32, 0, NO_ID)]),
        ),
        (
            "acl-with-odd-permissions",
            &acl(&[(1, 15, NO_ID), (4, 5, NO_ID), (32, 0, NO_ID)]),
        ),
    ] {
        cases.lowest(
            name,
            Refused("posix_acl_access"),
            Tar::default().pax(&[(ACCESS, value)]).file("f", b""),
        );
    }
    cases.lowest(
        "default-acl-of-file",
        Refused("posix_acl_default"),
        Tar::default()
            .pax(&[(DEFAULT, &acl(&USERS))])
            .file("f", b""),
    );
    cases.lowest(
        "capability-that-is-none",
        Refused("security.capability"),
        Tar::default()
            .pax(&[("SCHILY.xattr.security.capability", b"cap")])
            .file("f", b""),
    );
}

fn dialects(cases: &mut Cases) {
    let v7 = |path: &[u8], size| {
        let mut header = header(path, 0, size);
        header.as_old_mut().linkflag = [0];
        header.as_mut_bytes()[257..].fill(0);
        header
    };
    cases.both(
        "v7",
        Same,
        Tar::default()
            .raw(v7(b"d/", 0), b"")
            .raw(v7(b"d/f", 1), b"1"),
    );
    let mut device = v7(b"c", 0);
    device.as_mut_bytes()[156] = b'3';
    device.as_mut_bytes()[329..336].copy_from_slice(b"0000012");
    cases.both("v7-device", Same, Tar::default().raw(device, b""));
    let mut tar = Tar::default();
    tar.file("f", b"1");
    let whole = tar.end();
    for (name, bytes) in [
        ("no-end", tar.open_end()),
        ("one-end-block", [&tar.open_end()[..], &[0; 512]].concat()),
        ("no-padding", tar.open_end()[..513].to_vec()),
        ("half-padding", tar.open_end()[..700].to_vec()),
        ("more-behind", [&whole[..], &[0; 9000], b"more"].concat()),
        ("empty", Vec::new()),
        ("only-end-blocks", vec![0; 1024]),
        ("one-block", vec![0; 512]),
    ] {
        cases.image(&format!("end-{name}"), Same, vec![bytes.clone()]);
        cases.image(&format!("end-{name}-upper"), Same, vec![base(), bytes]);
    }
    cases.image(
        "cut-header",
        Refused("ends in the middle"),
        vec![whole[..100].to_vec()],
    );
    cases.image(
        "cut-data",
        Refused("ends in the middle"),
        vec![whole[..512].to_vec()],
    );
    cases.image(
        "zeros-then-more",
        Refused("a block of zeros"),
        vec![[&[0; 512][..], &whole].concat()],
    );
    let records = [
        common::record("mtime", b"77"),
        common::record("path", b"no"),
    ]
    .concat();
    let named = common::record("mtime", b"77");
    let unnamed = header(b"global/header", b'g', named.len() as u64);
    let global = header(b"f", b'g', records.len() as u64);
    let again = header(b"g", b'g', named.len() as u64);
    cases.both(
        "global-header",
        Same,
        Tar::default()
            .file("f", b"")
            .raw(unnamed, &named)
            .raw(global, &records)
            .file("g", b"")
            .raw(again, &named),
    );
    let name = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let mut long_name = header(b"././@LongLink", b'L', 0);
    long_name.set_size(name.len() as u64 + 1);
    let mut long_link = header(b"././@LongLink", b'K', 0);
    long_link.set_size(301);
    let mut tar = Tar::default();
    tar.pax(&[("path", b"overruled")])
        .raw(long_name, format!("{name}\0").as_bytes())
        .file("short", b"1");
    tar.raw(long_link, format!("{}\0", "t".repeat(300)).as_bytes())
        .symlink("l", "short");
    let mut empty = header(b"././@LongLink", b'L', 0);
    empty.set_size(1);
    tar.raw(empty, b"\0").file("kept", b"1");
    cases.both("gnu-long", Same, &tar);
    let mut star = header(b"name", b'0', 0);
    star.as_mut_bytes()[345..476].fill(b'p');
    star.as_mut_bytes()[476..500].copy_from_slice(b"00000000001 00000000002 ");
    star.as_mut_bytes()[508..512].copy_from_slice(b"tar\0");
    cases.both("star", Same, Tar::default().raw(star, b""));
    let mut prefix = header(b"name", b'0', 0);
    prefix.as_mut_bytes()[345..500].fill(b'p');
    cases.both("ustar-prefix", Same, Tar::default().raw(prefix, b""));
    cases.both(
        "contiguous",
        Lenient,
        Tar::default().raw(header(b"f", b'7', 1), b"1"),
    );
    cases.both(
        "size-of-no-file",
        Same,
        Tar::default()
            .file("f", b"1")
            .raw(
                at("h", b'1', |h| {
                    h.set_link_name("f").unwrap();
                    h.set_size(5);
                }),
                b"",
            )
            .raw(header(b"d", b'5', 4096), b"")
            .raw(header(b"p", b'6', 7), b"")
            .file("g", b"2"),
    );
    cases.both(
        "pax-size",
        Same,
        Tar::default()
            .pax(&[("size", b"4")])
            .raw(header(b"f", b'0', 0), b"4444")
            .file("g", b""),
    );
    cases.both(
        "pax-empty-values",
        Same,
        Tar::default()
            .pax(&[
                ("path", b""),
                ("uid", b""),
                ("mtime", b""),
                ("size", b""),
                ("linkpath", b""),
            ])
            .file("f", b"1"),
    );
    cases.both(
        "pax-twice",
        Same,
        Tar::default()
            .pax(&[("path", b"a"), ("uid", b"9")])
            .pax(&[("path", b"b")])
            .file("f", b"1"),
    );
    cases.both(
        "pax-nul-in-path",
        Refused("pax"),
        Tar::default().pax(&[("path", b"a\0b")]).file("f", b"1"),
    );
    cases.both(
        "pax-nul-in-link",
        Refused("pax"),
        Tar::default()
            .pax(&[("linkpath", b"a\0b")])
            .symlink("f", "x"),
    );
    cases.both(
        "pax-nul-in-key",
        Refused("pax"),
        Tar::default()
            .pax(&[("SCHILY.xattr.user.a\0", b"1")])
            .file("f", b"1"),
    );
    cases.both(
        "pax-bad-size",
        Refused("size"),
        Tar::default().pax(&[("size", b"-4")]).file("f", b"1"),
    );
    sparse(cases);
}

fn sparse(cases: &mut Cases) {
    let zero_zero: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", b"30"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"10"),
        ("GNU.sparse.numbytes", b"5"),
        ("GNU.sparse.offset", b"20"),
        ("GNU.sparse.numbytes", b"5"),
    ];
    cases.both(
        "sparse-0-0",
        Same,
        Tar::default().pax(zero_zero).file("holes", b"aaaaabbbbb"),
    );
    let zero_one: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.size", b"30"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.map", b"10,5,20,5"),
    ];
    cases.both(
        "sparse-0-1",
        Same,
        Tar::default()
            .pax(zero_one)
            .file("GNUSparseFile.1/holes", b"aaaaabbbbb"),
    );
    cases.both(
        "sparse-0-1-without-version",
        Same,
        Tar::default()
            .pax(&zero_one[2..])
            .file("GNUSparseFile.1/holes", b"aaaaabbbbb"),
    );
    let one_zero: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"30"),
    ];
    let mut data = b"3\n10\n5\n20\n5\n30\n0\n".to_vec();
    data.resize(512, 0);
    data.extend_from_slice(b"aaaaabbbbb");
    cases.both(
        "sparse-1-0",
        Same,
        Tar::default()
            .pax(one_zero)
            .file("GNUSparseFile.1/holes", &data),
    );
    cases.both(
        "sparse-of-unknown-version",
        Same,
        Tar::default()
            .pax(&[
                ("GNU.sparse.major", b"2"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.map", b"10,5"),
                ("GNU.sparse.size", b"30"),
            ])
            .file("f", b"aaaaa"),
    );
    cases.both(
        "sparse-size-alone",
        Same,
        Tar::default()
            .pax(&[("GNU.sparse.size", b"30"), ("GNU.sparse.name", b"no")])
            .file("f", b"aaaaa"),
    );
    cases.both(
        "sparse-without-size",
        Same,
        Tar::default()
            .pax(&[
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"0,5"),
                ("GNU.sparse.name", b"yes"),
            ])
            .file("f", b"aaaaa"),
    );
    for (name, map) in [
        ("overlap", "10,5,12,5"),
        ("odd", "10,5,20"),
        ("beyond", "10,5,28,5"),
        ("none", "10,5,20,x"),
        ("less", "10,5"),
        ("more", "10,5,20,6"),
    ] {
        cases.lowest(
            &format!("sparse-{name}"),
            Refused("sparse map"),
            Tar::default()
                .pax(&[
                    ("GNU.sparse.size", b"30"),
                    ("GNU.sparse.map", map.as_bytes()),
                ])
                .file("f", b"aaaaabbbbb"),
        );
    }
    let mut gnu = tar::Header::new_gnu();
    let plain = header(b"holes", b'S', 10);
    gnu.as_mut_bytes()[..257].copy_from_slice(&plain.as_bytes()[..257]);
    gnu.as_mut_bytes()[386..410].copy_from_slice(b"00000000012\x0000000000005\0");
    gnu.as_mut_bytes()[410..434].copy_from_slice(b"00000000024\x0000000000005\0");
    gnu.as_mut_bytes()[483..495].copy_from_slice(b"00000000036\0");
    cases.both(
        "sparse-old-gnu",
        Lenient,
        Tar::default().raw(gnu, b"aaaaabbbbb"),
    );
}

/// Tars that the authors of Go's and CPython's readers found awkward, and what
/// becomes of them if not the same tree.
const FOREIGN: &[(&str, Expect)] = &[
    ("go-gnu-incremental", Refused("type 'D'")),
    ("go-gnu-nil-sparse-data", Lenient),
    ("go-gnu-nil-sparse-hole", Lenient),
    ("go-issue10968", Refused("the size is no number")),
    ("go-issue11169", Refused("a pax record that is none")),
    ("go-issue12435", Refused("the size is no number")),
    ("go-neg-size", Refused("the size is no number")),
    ("go-pax-bad-hdr-file", Refused("a pax record that is none")),
    (
        "go-pax-bad-mtime-file",
        Refused("a pax mtime that is no time"),
    ),
    ("go-pax-nul-path", Refused("a pax record that is none")),
    ("go-pax-nul-xattrs", Refused("a pax record that is none")),
    ("go-sparse-formats", Lenient),
    // They end within files of 16 GiB.
    ("go-writer-big", Refused("larger than")),
    ("go-writer-big-long", Refused("larger than")),
    ("python-recursion", Refused("a pax record that is none")),
    ("python-testtar", Refused("type 'X'")),
];

/// Go's and CPython's test data, from the packages of this Debian release.
fn foreign(cases: &mut Cases) -> Option<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let (go, python) = match release.contains("bookworm") {
        true => ("1.19", "3.11"),
        false => ("1.24", "3.13"),
    };
    let from_go = containerd::package(&format!("golang-{go}-src"))?;
    let from_go = from_go.join(format!("usr/share/go-{go}/src/archive/tar/testdata"));
    let from_python = containerd::package(&format!("libpython{python}-testsuite"))?;
    let from_python = from_python.join(format!("usr/lib/python{python}/test"));
    let mut found = 0;
    for (whose, directory) in [("go", from_go), ("python", from_python)] {
        let mut entries: Vec<PathBuf> = walk(&directory);
        entries.sort();
        for path in entries {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let name = format!("{whose}-{name}").to_lowercase();
            found += 1;
            // 60 GiB of zeros each.
            if name.ends_with("-sparse-big") {
                continue;
            }
            let expect = FOREIGN.iter().find(|(other, _)| *other == name);
            let expect = expect.map_or(Same, |(_, expect)| *expect);
            cases.image(&name, expect, vec![fs::read(&path).unwrap()]);
        }
    }
    assert!(found > 30, "only {found} tars");
    Some(())
}

/// The tars in a directory and its first subdirectories.
fn walk(directory: &Path) -> Vec<PathBuf> {
    let list = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let below: Vec<PathBuf> = list(directory);
    let deeper = below.iter().filter(|path| path.is_dir());
    let deeper: Vec<PathBuf> = deeper.flat_map(|path| list(path)).collect();
    let is_tar = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "tar");
    below
        .iter()
        .chain(&deeper)
        .filter(|path| is_tar(path))
        .cloned()
        .collect()
}

/// Everything that can be awkward in a layer.
pub fn awkward() -> Vec<Case> {
    let mut cases = Cases::default();
    replaced(&mut cases);
    whiteouts(&mut cases);
    implied(&mut cases);
    attributes(&mut cases);
    xattrs(&mut cases);
    dialects(&mut cases);
    cases.0
}

/// The tars that others test with, if they can be had.
pub fn of_others() -> Option<Vec<Case>> {
    let mut cases = Cases::default();
    foreign(&mut cases)?;
    Some(cases.0)
}
