//! Awkward layers, and what is to happen with each.

mod attributes;
mod dialects;
mod entries;
mod foreign;

use crate::common::{Tar, header};

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

/// Everything that can be awkward in a layer.
pub fn awkward() -> Vec<Case> {
    let mut cases = Cases::default();
    entries::replaced(&mut cases);
    entries::whiteouts(&mut cases);
    entries::implied(&mut cases);
    attributes::attributes(&mut cases);
    attributes::xattrs(&mut cases);
    dialects::dialects(&mut cases);
    cases.0
}

/// The tars that others test with, if they can be had.
pub fn of_others() -> Option<Vec<Case>> {
    let mut cases = Cases::default();
    foreign::foreign(&mut cases)?;
    Some(cases.0)
}
