//! Owners, modes, times, devices, extended attributes.

use super::{
    ACCESS, CAPABILITY, Cases, DEFAULT,
    Expect::{Refused, Same, Stricter},
    MINIMAL, NO_ID, USERS, acl, at,
};
use crate::common::{Tar, header};

pub fn attributes(cases: &mut Cases) {
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

pub fn xattrs(cases: &mut Cases) {
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
