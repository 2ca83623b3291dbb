//! What the entries of a layer mean.

mod common;

use accel_layer::{Attributes, ErofsLower, LayerOptions, LowerDirectory, LowerStack};
use common::{
    Below, Tar, assert_image, assert_tree, convert, convert_with, header, on_another, picture,
    refusal, through_symlinks,
};
use std::{collections::HashMap, fs};

const IMPLIED: &str = "d 0755 0:0 0";

#[test]
fn every_kind_of_file_arrives() {
    let mut device = header(b"dev", b'3', 0);
    device.set_device_major(259).unwrap();
    device.set_device_minor(70_000).unwrap();
    let mut block = header(b"blk", b'4', 0);
    block.set_device_major(8).unwrap();
    block.set_device_minor(1).unwrap();
    let mut suid = header(b"suid", b'0', 1);
    suid.set_mode(0o104_755);
    assert_tree(
        &Tar::default()
            .dir("d/", 0o1777)
            .file("d/f", b"data")
            .symlink("d/s", "../else/where")
            .hard("h", "d/f")
            .raw(device, b"")
            .raw(block, b"")
            .raw(header(b"fifo", b'6', 0), b"")
            .raw(suid, b"x")
            .file("empty", b"")
            .end(),
        &[
            ("/d", "d 1777 1:2 3"),
            ("/d/f", "f 0644 1:2 3 \"data\""),
            ("/d/s", "l 0777 1:2 3 -> ../else/where"),
            ("/h", "= /d/f"),
            ("/dev", "c 0644 1:2 3 259:70000"),
            ("/blk", "b 0644 1:2 3 8:1"),
            ("/fifo", "p 0644 1:2 3"),
            ("/suid", "f 4755 1:2 3 \"x\""),
            ("/empty", "f 0644 1:2 3 \"\""),
        ],
    );
}

#[test]
fn whiteouts_become_what_overlayfs_reads() {
    assert_tree(
        &Tar::default()
            .dir("d", 0o755)
            .file("d/.wh.gone", b"")
            .file("d/.wh..wh..opq", b"")
            .file(".wh.top", b"")
            .end(),
        &[
            ("/d", "d 0755 1:2 3 trusted.overlay.opaque=\"y\""),
            ("/d/gone", "c 0000 1:2 0 0:0"),
            ("/top", "c 0000 1:2 0 0:0"),
        ],
    );
}

#[test]
fn an_opaque_mark_survives_its_directory_coming_again() {
    assert_tree(
        &Tar::default()
            .file("d/.wh..wh..opq", b"")
            .dir("d", 0o700)
            .end(),
        &[("/d", "d 0700 1:2 3 trusted.overlay.opaque=\"y\"")],
    );
    let tar = Tar::default().file(".wh..wh..opq", b"").end();
    let (_, image) = convert_with(&tar, &on_another(), &mut accel_layer::NoLower).unwrap();
    assert_eq!(
        picture(&image)["/"],
        "d 0755 0:0 0 trusted.overlay.opaque=\"y\""
    );
}

#[test]
fn names_that_aufs_kept_for_itself_are_like_others() {
    assert_tree(
        &Tar::default()
            .file(".wh..wh.aufs", b"x")
            .file(".wh..wh.plnk/1.2", b"x")
            .file(".wh.d/f", b"x")
            .end(),
        &[
            ("/.wh.aufs", "c 0000 1:2 0 0:0"),
            ("/.wh..wh.plnk", IMPLIED),
            ("/.wh..wh.plnk/1.2", "f 0644 1:2 3 \"x\""),
            ("/.wh.d", IMPLIED),
            ("/.wh.d/f", "f 0644 1:2 3 \"x\""),
        ],
    );
}

#[test]
fn whiteouts_of_the_lowest_layer_remove_and_leave_nothing() {
    let tar = Tar::default()
        .file("f", b"1")
        .file(".wh.f", b"")
        .file(".wh.nothing", b"")
        .dir("d", 0o755)
        .file("d/implied/f", b"")
        .dir("d/described", 0o755)
        .file("d/.wh..wh..opq", b"")
        .file("d/later/f", b"")
        .end();
    let (summary, image) = convert(&tar).unwrap();
    assert!(summary.needs_lower);
    assert_image(
        &image,
        &[
            ("/d", "d 0755 1:2 3"),
            ("/d/described", "d 0755 1:2 3"),
            ("/d/later", IMPLIED),
            ("/d/later/f", "f 0644 1:2 3 \"\""),
        ],
    );
    for marker in [".wh.f", ".wh..wh..opq"] {
        let tar = Tar::default().file(marker, b"").end();
        assert!(convert(&tar).unwrap().0.needs_lower);
        let on_another = convert_with(&tar, &on_another(), &mut accel_layer::NoLower);
        assert!(!on_another.unwrap().0.needs_lower);
    }
}

#[test]
fn what_replaces_a_directory_gets_its_time() {
    let mut dir = header(b"d", b'5', 0);
    dir.set_mtime(50);
    let mut other = header(b"e", b'5', 0);
    other.set_mtime(60);
    assert_tree(
        &Tar::default()
            .raw(dir, b"")
            .file("d", b"")
            .raw(other, b"")
            .symlink("e", "f")
            .file("f", b"")
            .end(),
        &[
            ("/d", "f 0644 1:2 50 \"\""),
            ("/e", "l 0777 1:2 3 -> f"),
            ("/f", "f 0644 1:2 60 \"\""),
        ],
    );
}

#[test]
fn whiteouts_of_nothing_are_refused() {
    for path in [".wh.", "d/.wh..", ".wh..."] {
        let text = refusal(&Tar::default().file(path, b"").end());
        assert!(
            text.contains(path) && text.contains("no valid whiteout"),
            "{text}"
        );
    }
    let text = refusal(&Tar::default().file("f", b"").file(".wh.f", b"").end());
    assert!(
        text.contains("\".wh.f\"") && text.contains("same layer"),
        "{text}"
    );
    // The other order, and twice, are fine.
    assert_tree(
        &Tar::default().file(".wh.f", b"").file(".wh.f", b"").end(),
        &[("/f", "c 0000 1:2 0 0:0")],
    );
    assert_tree(
        &Tar::default().file(".wh.f", b"").file("f", b"1").end(),
        &[("/f", "f 0644 1:2 3 \"1\"")],
    );
}

#[test]
fn an_entry_given_twice_counts_last() {
    assert_tree(
        &Tar::default()
            .file("f", b"first")
            .hard("kept", "f")
            .file("f", b"second")
            .file("dir-then-file/inside", b"")
            .file("dir-then-file", b"file")
            .file("file-then-dir", b"")
            .dir("file-then-dir", 0o750)
            .file("file-then-dir/inside", b"")
            .dir("twice", 0o700)
            .file("twice/stays", b"")
            .dir("twice", 0o755)
            .end(),
        &[
            ("/f", "f 0644 1:2 3 \"second\""),
            ("/kept", "f 0644 1:2 3 \"first\""),
            ("/dir-then-file", "f 0644 1:2 3 \"file\""),
            ("/file-then-dir", "d 0750 1:2 3"),
            ("/file-then-dir/inside", "f 0644 1:2 3 \"\""),
            ("/twice", "d 0755 1:2 3"),
            ("/twice/stays", "f 0644 1:2 3 \"\""),
        ],
    );
}

#[test]
fn a_hard_link_gives_its_attributes_to_the_file() {
    let mut link = header(b"b", b'1', 0);
    link.as_old_mut().linkname[0] = b'a';
    link.set_mode(0o600);
    link.set_uid(10);
    link.set_mtime(99);
    assert_tree(
        &Tar::default().file("a", b"x").raw(link, b"").end(),
        &[("/a", "f 0600 10:2 99 \"x\""), ("/b", "= /a")],
    );
}

#[test]
fn hard_links_to_what_is_not_there_are_refused() {
    let to = |target: &str| Tar::default().dir("d", 0o755).hard("d/l", target).end();
    for (target, reason) in [
        ("missing", "\"missing\", which the same layer has not made"),
        ("d/missing", "has not made"),
        ("d", "to the directory \"d\""),
        ("../d", "climbs out"),
        // The root.
        ("", "to the directory \"\""),
        // The link takes its own name first.
        ("d/l", "has not made"),
    ] {
        let text = refusal(&to(target));
        assert!(
            text.contains("\"d/l\"") && text.contains(reason),
            "{target}: {text}"
        );
    }
}

#[test]
fn a_hard_link_to_a_symlink_is_one_more_name_of_it() {
    assert_tree(
        &Tar::default().symlink("s", "nowhere").hard("h", "s").end(),
        &[("/h", "l 0777 1:2 3 -> nowhere"), ("/s", "= /h")],
    );
}

#[test]
fn paths_may_be_spelled_in_many_ways() {
    assert_tree(
        &Tar::default()
            .dir("./a//", 0o755)
            .file("/a/./b", b"")
            .file("a//c/../d", b"")
            .hard("e", "./a//b")
            .dir("./", 0o700)
            .end(),
        &[
            ("/a", "d 0755 1:2 3"),
            ("/a/b", "f 0644 1:2 3 \"\""),
            ("/a/d", "f 0644 1:2 3 \"\""),
            ("/e", "= /a/b"),
        ],
    );
}

#[test]
fn paths_that_climb_out_are_refused() {
    for path in ["../f", "a/../../f", "/..", "a/.."] {
        let result = convert(&Tar::default().file(path, b"").end());
        if path == "a/.." {
            // The root, by another name.
            result.unwrap();
            continue;
        }
        let text = common::chain(&result.unwrap_err());
        assert!(text.contains(path) && text.contains("climbs out"), "{text}");
    }
}

#[test]
fn of_the_root_only_the_time_is_taken() {
    let mut root = header(b"./", b'5', 0);
    root.set_mode(0o700);
    root.set_uid(5);
    root.set_mtime(1234);
    let (summary, image) = convert(&Tar::default().raw(root, b"").end()).unwrap();
    assert_eq!(picture(&image)["/"], "d 0755 0:0 1234");
    assert!(!summary.needs_lower);
}

#[test]
fn symlinks_of_the_layer_are_followed_within_it() {
    assert_tree(
        &through_symlinks().hard("i", "lib/f").end(),
        &[
            ("/usr", "d 0755 1:2 3"),
            ("/usr/lib", "d 0755 1:2 3"),
            ("/usr/lib/f", "= /i"),
            ("/i", "f 0644 1:2 3 \"1\""),
            ("/usr/g", "f 0644 1:2 3 \"2\""),
            ("/new", IMPLIED),
            ("/new/place", IMPLIED),
            ("/new/place/h", "f 0644 1:2 3 \"3\""),
            ("/lib", "l 0777 1:2 3 -> usr/lib"),
            ("/out", "l 0777 1:2 3 -> /../../usr"),
            ("/dangling", "l 0777 1:2 3 -> new/place"),
        ],
    );
    let text = refusal(
        &Tar::default()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/f", b"")
            .end(),
    );
    assert!(
        text.contains("\"a/f\"") && text.contains("255 symbolic links"),
        "{text}"
    );
    let text = refusal(&Tar::default().file("f", b"").file("f/g/h", b"").end());
    assert!(
        text.contains("\"f/g\" on its way is not a directory"),
        "{text}"
    );
}

#[test]
fn a_symlink_is_replaced_not_followed() {
    assert_tree(
        &Tar::default()
            .file("t", b"t")
            .symlink("s", "t")
            .file("s", b"s")
            .end(),
        &[("/t", "f 0644 1:2 3 \"t\""), ("/s", "f 0644 1:2 3 \"s\"")],
    );
}

#[test]
fn times_are_clamped_as_containerd_does() {
    let mut tar = Tar::default();
    for (name, mtime) in [
        ("before", "-1.5"),
        ("last", "9223372036.854775807"),
        ("after", "9223372036.854775808"),
        ("far", "99999999999999"),
        ("fine", "12.0000000019"),
        ("coarse", "12.5"),
    ] {
        tar.pax(&[("mtime", mtime.as_bytes())]).file(name, b"");
    }
    // Base-256: -1.
    let mut negative = header(b"negative", b'0', 0);
    negative.as_old_mut().mtime = [0xff; 12];
    tar.raw(negative, b"");
    assert_tree(
        &tar.end(),
        &[
            ("/before", "f 0644 1:2 0 \"\""),
            ("/last", "f 0644 1:2 9223372036.854775807 \"\""),
            ("/after", "f 0644 1:2 0 \"\""),
            ("/far", "f 0644 1:2 0 \"\""),
            ("/fine", "f 0644 1:2 12.000000001 \"\""),
            ("/coarse", "f 0644 1:2 12.500000000 \"\""),
            ("/negative", "f 0644 1:2 0 \"\""),
        ],
    );
}

#[test]
fn xattrs_arrive_but_for_what_a_tar_must_not_set() {
    let value = b"a\nb=\0\xff";
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.x", value),
        ("SCHILY.xattr.user.empty", b""),
        ("SCHILY.xattr.security.any", b"any"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.system.nfs4_acl", b"acl"),
    ];
    let tar = Tar::default()
        .pax(records)
        .file("f", b"")
        .pax(&[
            ("SCHILY.xattr.user.x", b"1"),
            ("SCHILY.xattr.security.s", b"2"),
        ])
        .symlink("s", "f")
        .end();
    let (summary, image) = convert(&tar).unwrap();
    assert_image(
        &image,
        &[
            (
                "/f",
                "f 0644 1:2 3 \"\" security.any=\"any\" user.empty=\"\" \
                 user.x=\"a\\\\nb=\\\\x00\\\\xff\"",
            ),
            ("/s", "l 0777 1:2 3 -> f security.s=\"2\""),
        ],
    );
    assert_eq!(summary.ignored_xattrs, 3);
    let big = vec![1; 70_000];
    let text = refusal(
        &Tar::default()
            .pax(&[("SCHILY.xattr.user.big", &big)])
            .file("f", b"")
            .end(),
    );
    assert!(
        text.contains("\"f\"") && text.contains("user.big") && text.contains("65535"),
        "{text}"
    );
}

fn attributes(mode: u32) -> Attributes {
    let mut xattrs = accel_erofs::Xattrs::new();
    for name in ["user.kept", "trusted.overlay.opaque"] {
        let name = accel_erofs::XattrName::new(name.as_bytes()).unwrap();
        xattrs.insert(name, b"y").unwrap();
    }
    Attributes {
        permissions: accel_erofs::Permissions::of_mode(mode),
        uid: 7,
        gid: 8,
        mtime: accel_erofs::Timestamp::new(500, 1).unwrap(),
        xattrs,
    }
}

#[test]
fn an_implied_directory_is_like_the_lower_one() {
    let mut below = Below(
        HashMap::from([
            ("a", LowerDirectory::Found(attributes(0o2775))),
            ("a/b", LowerDirectory::Replaced),
        ]),
        vec![],
    );
    let options = LayerOptions::new("test");
    let tar = Tar::default().file("a/b/c/f", b"").file("a/g", b"").end();
    let (summary, image) = convert_with(&tar, &options, &mut below).unwrap();
    assert!(summary.needs_lower);
    // Nothing lies below what was replaced.
    assert_eq!(below.1, ["a", "a/b"]);
    assert_image(
        &image,
        &[
            ("/a", "d 2775 7:8 500.000000001 user.kept=\"y\""),
            // Of its directory's group, as that is setgid.
            ("/a/b", "d 0755 0:8 0"),
            ("/a/b/c", IMPLIED),
            ("/a/b/c/f", "f 0644 1:2 3 \"\""),
            ("/a/g", "f 0644 1:2 3 \"\""),
        ],
    );
}

#[test]
fn the_lowest_layer_needs_lower_too_if_a_directory_is_implied() {
    let (summary, image) = convert(&Tar::default().file("a/f", b"").end()).unwrap();
    assert!(summary.needs_lower);
    assert_eq!(picture(&image)["/a"], IMPLIED);
    let (summary, _) = convert(&Tar::default().dir("a", 0o755).file("a/f", b"").end()).unwrap();
    assert!(!summary.needs_lower);
}

#[test]
fn images_answer_for_the_layers_below() {
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str, tar: &mut Tar| {
        let (_, image) =
            convert_with(&tar.end(), &on_another(), &mut accel_layer::NoLower).unwrap();
        let path = dir.path().join(name);
        fs::write(&path, image).unwrap();
        ErofsLower::open_file(&path).unwrap()
    };
    let mut many = Tar::default();
    many.dir("usr", 0o755);
    many.pax(&[("SCHILY.xattr.user.x", b"1")])
        .dir("usr/lib", 0o711);
    for number in 0..500 {
        many.dir(&format!("usr/lib/{number}"), 0o700 + number % 8);
    }
    many.symlink("lib", "usr/lib")
        .symlink("dangling", "not/here");
    let bottom = image("bottom", many.dir("gone", 0o700).dir("dangling-2", 0o700));
    let top = image(
        "top",
        Tar::default()
            .file(".wh.gone", b"")
            .dir("usr", 0o750)
            .symlink("dangling-2", "nowhere"),
    );
    let mut stack = LowerStack(vec![top, bottom]);
    let tar = Tar::default()
        .file("usr/lib/f", b"")
        .file("lib/499/f", b"")
        .file("gone/f", b"")
        .file("dangling/f", b"")
        .file("dangling-2/f", b"")
        .end();
    let options = LayerOptions::new("test");
    let (_, image) = convert_with(&tar, &options, &mut stack).unwrap();
    let found = picture(&image);
    for (path, line) in [
        // The nearest layer that has it.
        ("/usr", "d 0750 1:2 3"),
        ("/usr/lib", "d 0711 1:2 3 user.x=\"1\""),
        // A link below is followed below, but a directory is made here.
        ("/lib", "d 0711 1:2 3 user.x=\"1\""),
        ("/lib/499", "d 0703 1:2 3"),
        // Hidden: a new one.
        ("/gone", IMPLIED),
        ("/dangling", IMPLIED),
        // A link to nothing is as good as nothing in its layer.
        ("/dangling-2", "d 0700 1:2 3"),
    ] {
        assert_eq!(found[path], line, "{path}");
    }
}

#[test]
fn what_no_image_can_have_is_refused_by_name() {
    let mut device = header(b"dev", b'3', 0);
    device.set_device_major(4096).unwrap();
    let text = refusal(&Tar::default().raw(device, b"").end());
    assert!(
        text.contains("\"dev\"") && text.contains("4096:0"),
        "{text}"
    );

    let text = refusal(&Tar::default().raw(header(b"volume", b'V', 0), b"").end());
    assert!(
        text.contains("\"volume\"") && text.contains("type 'V'"),
        "{text}"
    );

    let long = "x".repeat(300);
    let text = refusal(
        &Tar::default()
            .pax(&[("path", long.as_bytes())])
            .file("p", b"")
            .end(),
    );
    assert!(text.contains("300 bytes long, more than 255"), "{text}");

    let deep = "d/".repeat(2100);
    let text = refusal(
        &Tar::default()
            .pax(&[("path", deep.as_bytes())])
            .dir("p", 0o755)
            .end(),
    );
    assert!(text.contains("4200 bytes long, more than 4096"), "{text}");

    let text = refusal(
        &Tar::default()
            .pax(&[("uid", b"4294967296")])
            .file("f", b"")
            .end(),
    );
    assert!(text.contains("owner is 4294967296"), "{text}");

    let text = refusal(&Tar::default().symlink("s", "").end());
    assert!(
        text.contains("\"s\"") && text.contains("target is empty"),
        "{text}"
    );

    let mut options = LayerOptions::new("test");
    options.max_image_size = 100_000;
    let tar = Tar::default().file("f", &[1; 200_000]).end();
    let error = convert_with(&tar, &options, &mut accel_layer::NoLower).unwrap_err();
    assert!(
        common::chain(&error).contains("larger than 100000 bytes"),
        "{error}"
    );
}
