//! Whole layers against GNU tar: what it unpacks is what the kernel shows of the
//! image, and fsck.erofs finds nothing wrong with it.
#![allow(clippy::cast_possible_truncation)] // sizes here are small

mod common;
#[path = "common/seen.rs"]
mod seen;
#[path = "../../erofs/tests/common/tools.rs"]
mod tools;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chownat, lsetxattr,
    makedev, mknodat, utimensat,
};
use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, PermissionsExt, symlink},
    },
    path::Path,
    process::Command,
};

fn run(program: &str, args: &[&OsStr]) {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// A tree with one of everything that a root file system has.
fn source(root: &Path) {
    let at = |path: &str| root.join(path);
    for dir in ["bin", "empty", "etc", "many", "tmp", "usr", "usr/lib"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::set_permissions(at("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    for number in 0..2000 {
        let name = format!("many/file-{number:04}");
        fs::write(at(&name), format!("contents of {number}")).unwrap();
    }
    for (name, size) in [
        ("a", 131_072),
        ("b", 1),
        ("c", 200_001),
        ("d", 131_071),
        ("e", 4096),
    ] {
        let bytes: Vec<u8> = (0..size).map(|n: u32| (n * 7 / 3) as u8).collect();
        fs::write(at("usr/lib").join(name), bytes).unwrap();
    }
    fs::hard_link(at("usr/lib/c"), at("bin/c")).unwrap();
    symlink("usr/lib", at("lib")).unwrap();
    symlink("x".repeat(4000), at("long")).unwrap();
    symlink("/nowhere/\u{e4}", at("\u{e4}bsolut")).unwrap();
    fs::write(at("bin/suid"), b"#!/bin/sh\n").unwrap();
    let name = "n".repeat(255);
    fs::write(at("etc").join(&name), b"a long name").unwrap();
    fs::write(
        at("etc").join(OsStr::from_bytes(b"not\xffutf-8\nline")),
        b"",
    )
    .unwrap();
    let deep = format!("{0}/{0}/{0}", "d".repeat(100));
    fs::create_dir_all(at("etc").join(&deep)).unwrap();
    fs::write(at("etc").join(&deep).join("leaf"), b"deep").unwrap();

    let holes = fs::File::create(at("holes")).unwrap();
    holes.set_len(3_000_000).unwrap();
    holes.write_all_at(b"in the middle", 1_500_000).unwrap();
    holes.write_all_at(b"later", 2_600_000).unwrap();

    let mode = Mode::from_raw_mode(0o640);
    let node = |path: &str, kind, device| mknodat(CWD, at(path), kind, mode, device).unwrap();
    node("char", FileType::CharacterDevice, makedev(10, 300));
    node("block", FileType::BlockDevice, makedev(259, 70_000));
    node("fifo", FileType::Fifo, 0);

    let xattr = |path: &str, name: &str, value: &[u8]| {
        lsetxattr(at(path), name, value, XattrFlags::empty()).unwrap();
    };
    xattr("usr/lib/a", "user.text", b"value");
    xattr("usr/lib/b", "user.text", b"value");
    xattr("usr/lib/b", "user.binary", b"\n=\0\xff\n");
    xattr("usr", "user.of-directory", b"");
    xattr("lib", "trusted.of-link", b"left out");
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    let own = |path: &str, uid, gid| {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        chownat(
            CWD,
            at(path),
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .unwrap();
    };
    own("usr/lib/d", 1000, 1001);
    own("lib", 7, 8);
    own("etc", 100_000, 70_000);
    own("bin/suid", 33, 33);
    fs::set_permissions(at("bin/suid"), fs::Permissions::from_mode(0o6755)).unwrap();
    // Changing the owner would take it away.
    xattr("bin/suid", "security.capability", capability);
    for (path, seconds, nanos) in [
        ("usr/lib/a", 1, 0),
        ("lib", 1_000_000_000, 123_456_789),
        ("empty", 5_000_000_000, 1),
        ("etc", 1_600_000_000, 999_999_999),
    ] {
        let time = Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        utimensat(CWD, at(path), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// Converts a tar, mounts the image and compares it with what tar unpacks.
fn check(tar: &Path, work: &Path) {
    let (summary, image) = common::convert(&fs::read(tar).unwrap()).unwrap();
    assert!(!summary.needs_lower, "tar has an entry for every directory");
    let image_path = work.join("image.erofs");
    fs::write(&image_path, image).unwrap();
    if let Some(fsck) = tools::fsck() {
        tools::check_with_fsck(&fsck, &image_path);
    }
    let unpacked = work.join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    run(
        "tar",
        &[
            "--xattrs".as_ref(),
            "--xattrs-include=*".as_ref(),
            "--xattrs-exclude=trusted.*".as_ref(),
            "--numeric-owner".as_ref(),
            "-xpf".as_ref(),
            tar.as_os_str(),
            "-C".as_ref(),
            unpacked.as_os_str(),
        ],
    );
    let mounted = tools::try_mount(&image_path).expect("the image mounts");
    let expected = seen::look(&unpacked);
    let found = seen::look(mounted.0.path());
    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>()
    );
    for (path, line) in &expected {
        assert_eq!(&found[path], line, "{path:?}");
    }
    fs::remove_dir_all(&unpacked).unwrap();
}

#[test]
fn the_kernel_shows_what_gnu_tar_unpacks() {
    let Some(()) = tools::root() else { return };
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    source(&root);
    for (what, extra) in [
        (
            "pax",
            &["--format=pax", "--xattrs", "--xattrs-include=*"][..],
        ),
        (
            "pax, sparse 0.0",
            &["--format=pax", "--sparse", "--sparse-version=0.0"],
        ),
        (
            "pax, sparse 0.1",
            &["--format=pax", "--sparse", "--sparse-version=0.1"],
        ),
        (
            "pax, sparse 1.0",
            &["--format=pax", "--sparse", "--sparse-version=1.0"],
        ),
        ("gnu", &["--format=gnu", "--sparse"]),
        ("gnu, gzip", &["--format=gnu", "--gzip"]),
    ] {
        eprintln!("{what}");
        let tar = work.path().join("layer.tar");
        let mut args: Vec<&OsStr> = extra.iter().map(OsStr::new).collect();
        let numeric = "--numeric-owner";
        args.extend([numeric.as_ref(), "-cf".as_ref(), tar.as_os_str()]);
        args.extend(["-C".as_ref(), root.as_os_str(), ".".as_ref()]);
        run("tar", &args);
        check(&tar, work.path());
    }
}
