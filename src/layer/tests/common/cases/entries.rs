//! Entries that replace, hide and imply others.

use super::{
    CAPABILITY, Cases,
    Expect::{Lenient, Refused, Same, Stricter},
    at, base, owned,
};
use crate::common::{Tar, header, through_symlinks};

pub fn replaced(cases: &mut Cases) {
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

pub fn whiteouts(cases: &mut Cases) {
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

pub fn implied(cases: &mut Cases) {
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
        through_symlinks()
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
