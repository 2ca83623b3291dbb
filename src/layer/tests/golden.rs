//! The bytes of layout 1. They never change: what is published by these names
//! exists already. A change of bytes is a new layout number.

mod common;

use common::{Tar, convert, header};

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
    let (summary, image) = convert(&tar.end()).unwrap();
    assert_eq!(
        summary.uuid.to_string(),
        "23f87a21-9975-8e63-b44f-02916a554bf8"
    );
    assert_eq!(
        blake3::hash(&image).to_hex().as_str(),
        "31f43f3303c4c0fdec78e165816c31a1003d15a8aca4cb71d8c6ff0b24be59f6"
    );
}
