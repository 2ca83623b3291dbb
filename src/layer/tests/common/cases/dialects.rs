//! What tars are written like.

use super::{
    Cases,
    Expect::{Lenient, Refused, Same},
    at, base,
};
use crate::common::{self, Tar, header, sparse_0_0, sparse_1_0};

pub fn dialects(cases: &mut Cases) {
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
    cases.both("sparse-0-0", Same, &sparse_0_0());
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
    cases.both("sparse-1-0", Same, &sparse_1_0());
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
