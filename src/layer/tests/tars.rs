//! The forms that a tar can have.

mod common;

use common::{Tar, assert_tree, convert, header, picture, refusal, sparse_0_0, sparse_1_0};

#[test]
fn long_names_in_every_form() {
    let name = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let name = name.as_str();
    let target = "t".repeat(300);
    let gnu = |kind| header(b"././@LongLink", kind, 0);
    let mut long_name = gnu(b'L');
    long_name.set_size(name.len() as u64 + 1);
    let mut long_link = gnu(b'K');
    long_link.set_size(target.len() as u64 + 1);
    let mut prefixed = header(b"in-name", b'0', 0);
    let prefix = b"in/prefix";
    prefixed.as_ustar_mut().unwrap().prefix[..prefix.len()].copy_from_slice(prefix);
    let (_, image) = convert(
        &Tar::default()
            .raw(long_name, format!("{name}\0").as_bytes())
            .file("short", b"1")
            .raw(long_link, format!("{target}\0").as_bytes())
            .symlink("gnu-link", "short")
            .pax(&[("path", b"pax/path"), ("linkpath", target.as_bytes())])
            .symlink("short", "short")
            .raw(prefixed, b"")
            .end(),
    )
    .unwrap();
    let found = picture(&image);
    assert_eq!(found[&format!("/{name}")], "f 0644 1:2 3 \"1\"");
    let link = format!("l 0777 1:2 3 -> {target}");
    assert_eq!(found["/gnu-link"], link);
    assert_eq!(found["/pax/path"], link);
    assert_eq!(found["/in/prefix/in-name"], "f 0644 1:2 3 \"\"");
}

#[test]
fn numbers_in_every_form() {
    let mut octal = header(b"octal", b'0', 2);
    octal.as_old_mut().uid = *b"  17777\0";
    octal.as_old_mut().gid = [0; 8];
    octal.as_old_mut().size = *b"         2 \0";
    let mut base256 = header(b"base256", b'0', 0);
    base256.as_old_mut().uid = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe];
    base256.as_old_mut().gid = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe];
    base256.as_old_mut().mtime = [0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    base256.as_old_mut().size = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
    let pax: &[(&str, &[u8])] = &[("uid", b"3000000000"), ("gid", b"5"), ("size", b"4")];
    assert_tree(
        &Tar::default()
            .raw(octal, b"22")
            .raw(base256, b"333")
            .pax(pax)
            .raw(header(b"pax", b'0', 0), b"4444")
            .file("next", b"")
            .end(),
        &[
            ("/octal", "f 0644 8191:0 3 \"22\""),
            (
                "/base256",
                "f 0644 4294967294:4294967294 4294967296 \"333\"",
            ),
            ("/pax", "f 0644 3000000000:5 3 \"4444\""),
            ("/next", "f 0644 1:2 3 \"\""),
        ],
    );
}

#[test]
fn a_global_header_changes_nothing() {
    let records = common::record("mtime", b"77");
    let global = header(b"pax_global_header", b'g', records.len() as u64);
    assert_tree(
        &Tar::default().raw(global, &records).file("f", b"").end(),
        &[("/f", "f 0644 1:2 3 \"\"")],
    );
}

#[test]
fn what_is_no_file_has_no_data_whatever_its_size_says() {
    let mut link = header(b"h", b'1', 5);
    link.as_old_mut().linkname[0] = b'f';
    assert_tree(
        &Tar::default()
            .file("f", b"12345")
            .raw(link, b"")
            .raw(header(b"d", b'5', 4096), b"")
            .file("g", b"")
            .end(),
        &[
            ("/f", "f 0644 1:2 3 \"12345\""),
            ("/h", "= /f"),
            ("/d", "d 0644 1:2 3"),
            ("/g", "f 0644 1:2 3 \"\""),
        ],
    );
}

#[test]
fn a_v7_tar_is_understood() {
    let v7 = |path: &[u8], size| {
        let mut header = header(path, 0, size);
        header.as_old_mut().linkflag = [0];
        header.as_mut_bytes()[257..].fill(0);
        header
    };
    assert_tree(
        &Tar::default()
            .raw(v7(b"d/", 0), b"")
            .raw(v7(b"d/f", 1), b"1")
            .open_end(),
        &[("/d", "d 0644 1:2 3"), ("/d/f", "f 0644 1:2 3 \"1\"")],
    );
}

#[test]
fn the_end_may_be_missing_or_followed_by_more() {
    let mut tar = Tar::default();
    tar.file("f", b"1");
    let expected = [("/f", "f 0644 1:2 3 \"1\"")];
    assert_tree(&tar.open_end(), &expected);
    assert_tree(&[&tar.open_end()[..], &[0; 512]].concat(), &expected);
    assert_tree(&[&tar.end()[..], &[0; 9000], b"more"].concat(), &expected);
    // Not even the last file's padding: umoci 0.4 ends layers so.
    assert_tree(&tar.open_end()[..513], &expected);
    assert_tree(&tar.open_end()[..700], &expected);
    assert_tree(&[], &[]);
}

#[test]
fn damaged_tars_are_refused_with_their_place() {
    let mut tar = Tar::default();
    tar.file("f", &[1; 1000]);
    let bytes = tar.end();
    for cut in [100, 512, 700, 1511] {
        let text = refusal(&bytes[..cut]);
        assert!(
            text.contains("layer test") && text.contains("ends in the middle"),
            "{cut}: {text}"
        );
    }
    let mut flipped = bytes.clone();
    flipped[0] ^= 1;
    let text = refusal(&flipped);
    assert!(
        text.contains("at byte 0") && text.contains("checksum"),
        "{text}"
    );
    let hole = [&[0; 512][..], &bytes].concat();
    assert!(refusal(&hole).contains("a block of zeros with an entry behind it"));
    let mut size = header(b"f", b'0', 0);
    size.as_old_mut().size = *b"abcdefghijk\0";
    assert!(refusal(&Tar::default().raw(size, b"").end()).contains("the size is no number"));
}

#[test]
fn damaged_pax_records_are_refused() {
    for records in [
        "12 path=f\n",
        "x path=f\n",
        "10 path=ff",
        "8 noequ\n",
        "4 =\n",
        "9 mtime=x\n",
        "999999999 a=b\n",
    ] {
        let header = header(b"x", b'x', records.len() as u64);
        let text = refusal(
            &Tar::default()
                .raw(header, records.as_bytes())
                .file("f", b"")
                .end(),
        );
        assert!(text.contains("the tar header at byte"), "{records}: {text}");
    }
}

#[test]
fn an_extension_of_any_size_is_not_read_into_memory() {
    for kind in [b'x', b'L', b'K', b'g'] {
        let text = refusal(
            &Tar::default()
                .raw(header(b"x", kind, 1 << 32), b"")
                .open_end(),
        );
        assert!(text.contains("more than 1 MiB"), "{text}");
    }
}

const HOLES: &[u8] = b"\0\0\0\0\0\0\0\0\0\0aaaaa\0\0\0\0\0bbbbb\0\0\0\0\0";

fn expect_holes(tar: &mut Tar) {
    let mut expected = header(b"plain", b'0', HOLES.len() as u64);
    expected.set_mode(0o644);
    let bytes = tar.raw(expected, HOLES).end();
    let (_, image) = convert(&bytes).unwrap_or_else(|e| panic!("{}", common::chain(&e)));
    let found = picture(&image);
    assert_eq!(found["/holes"], found["/plain"]);
    assert_eq!(found.len(), 3);
}

#[test]
fn sparse_files_of_pax() {
    let version = |minor| [("GNU.sparse.major", &b"0"[..]), ("GNU.sparse.minor", minor)];
    expect_holes(&mut sparse_0_0());

    let mut zero_one: Vec<(&str, &[u8])> = version(b"1").into();
    zero_one.extend([
        ("GNU.sparse.size", &b"30"[..]),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.map", b"10,5,20,5"),
    ]);
    expect_holes(
        Tar::default()
            .pax(&zero_one)
            .file("GNUSparseFile.1/holes", b"aaaaabbbbb"),
    );

    expect_holes(&mut sparse_1_0());
}

#[test]
fn sparse_files_of_old_gnu() {
    let mut sparse = tar::Header::new_gnu();
    let plain = header(b"holes", b'S', 10);
    sparse.as_mut_bytes()[..257].copy_from_slice(&plain.as_bytes()[..257]);
    let gnu = sparse.as_gnu_mut().unwrap();
    gnu.sparse[0].offset = *b"00000000012\0";
    gnu.sparse[0].numbytes = *b"00000000005\0";
    gnu.isextended = [1];
    gnu.realsize = *b"00000000036\0";
    let mut extended = [0; 512];
    extended[..12].copy_from_slice(b"00000000024\0");
    extended[12..24].copy_from_slice(b"00000000005\0");
    sparse.set_cksum();
    let mut tar = Tar::default();
    tar.bytes(sparse.as_bytes())
        .bytes(&extended)
        .bytes(b"aaaaabbbbb")
        .pad();
    expect_holes(&mut tar);
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for (map, size) in [
        ("10,5,12,5", "30"),
        ("10,5,20,5", "24"),
        ("10,5,20,4", "30"),
        ("10,5,20", "30"),
        ("10,5,20,x", "30"),
        ("18446744073709551615,10", "30"),
    ] {
        let records: &[(&str, &[u8])] = &[
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.map", map.as_bytes()),
        ];
        let text = refusal(&Tar::default().pax(records).file("f", b"aaaaabbbbb").end());
        assert!(text.contains("sparse map"), "{map}: {text}");
    }
}
