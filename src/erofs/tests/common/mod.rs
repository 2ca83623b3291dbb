//! Generated trees, an output that checks the writer's promises, and a plain
//! picture of a tree that every judge's reading is compared with.
#![allow(dead_code)] // each test program uses its part
#![allow(clippy::cast_possible_truncation)] // sizes here are small

use accel_erofs::{
    Attributes, BLOCK_SIZE, CHUNK_SIZE, Content, Device, Directory, Extent, ImageWriter, Name,
    NodeId, Output, Permissions, Summary, SymlinkTarget, Timestamp, Tree, Uuid, XattrName, Xattrs,
};
use proptest::{collection::vec, prelude::*, sample::Index};
use std::{collections::BTreeMap, convert::Infallible};

pub const UUID: Uuid = Uuid(*b"0123456789\x8bcdef\x81");

/// `u::rwx,g::r-x,o::r-x` as an attribute's value: version 2, then tag,
/// permissions and no id for owner, group and others.
pub const MINIMAL_ACL: [u8; 28] = *b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\
    \x04\0\x05\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff";

/// `cap_net_raw=ep` as an attribute's value, version 2.
pub const CAP_NET_RAW: [u8; 20] = *b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Takes an image into memory and checks what [`Output`] promises.
#[derive(Debug, Default)]
pub struct Memory {
    chunks: BTreeMap<u64, Vec<u8>>,
    order: Vec<u64>,
}

impl Output for Memory {
    type Error = Infallible;

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Infallible> {
        assert_eq!(offset % CHUNK_SIZE, 0, "not on a chunk");
        assert!(!bytes.is_empty() && bytes.len() as u64 <= CHUNK_SIZE);
        assert!((bytes.len() as u64).is_multiple_of(BLOCK_SIZE));
        let before = self.chunks.insert(offset / CHUNK_SIZE, bytes.to_vec());
        assert!(before.is_none(), "chunk at {offset} came twice");
        self.order.push(offset / CHUNK_SIZE);
        Ok(())
    }
}

impl Memory {
    /// The image, once it is complete.
    pub fn image(self) -> Vec<u8> {
        assert_eq!(self.order.last(), Some(&0), "chunk 0 is not the last");
        // Besides chunk 0, at most one chunk at a time is late.
        for (position, index) in self.order.iter().enumerate() {
            let later = self.order[position..].iter();
            let late = later.filter(|other| **other != 0 && *other < index);
            assert!(late.count() <= 1, "more than one chunk is late");
        }
        let count = self.chunks.len() as u64;
        let mut image = Vec::new();
        for (expected, (index, bytes)) in (0..).zip(self.chunks) {
            assert_eq!(index, expected, "a chunk is missing");
            assert!(bytes.len() as u64 == CHUNK_SIZE || index + 1 == count);
            image.extend(bytes);
        }
        image
    }
}

/// What a test wants of a node.
#[derive(Debug, Clone)]
pub enum Want {
    Directory,
    /// Size and a seed for the contents.
    File(usize, u8),
    Symlink(Vec<u8>),
    Char(u64, u64),
    Block(u64, u64),
    Fifo,
    Socket,
    /// One more name for an earlier node that is no directory.
    Link(Index),
}

#[derive(Debug, Clone)]
pub struct WantNode {
    pub parent: Index,
    pub name: Vec<u8>,
    pub want: Want,
    pub attributes: WantAttributes,
}

#[derive(Debug, Clone)]
pub struct WantAttributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub seconds: i64,
    pub nanos: u32,
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl WantAttributes {
    pub fn plain(mode: u32) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            seconds: 0,
            nanos: 0,
            xattrs: vec![],
        }
    }

    fn attributes(&self) -> Attributes {
        let mut xattrs = Xattrs::new();
        for (name, value) in &self.xattrs {
            xattrs
                .insert(XattrName::new(name.as_bytes()).unwrap(), value)
                .unwrap();
        }
        Attributes {
            permissions: Permissions::of_mode(self.mode),
            uid: self.uid,
            gid: self.gid,
            mtime: Timestamp::new(self.seconds, self.nanos).unwrap(),
            xattrs,
        }
    }
}

pub fn names() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => "[a-z!,.~-]{1,12}".prop_map(String::into_bytes),
        1 => vec(prop_oneof![1u8..b'/', b'0'..=255], 1..=255usize),
        1 => vec(Just(b'n'), 200..=255usize),
    ]
    .prop_filter("no name", |name| Name::new(name).is_ok())
}

fn xattr_lists() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let name = prop_oneof![
        "user\\.[a-c]{1,3}",
        Just("security.capability".to_owned()),
        Just("trusted.overlay.opaque".to_owned()),
        Just("system.posix_acl_access".to_owned()),
        "user\\.[a-z]{100,250}",
    ];
    // Few different small values, so that some are shared.
    let value = prop_oneof![
        6 => vec(0u8..2, 0..=2usize),
        1 => vec(any::<u8>(), 0..=300usize),
        1 => (0usize..=9000).prop_map(|size| vec![7; size]),
    ];
    // The kernel wants an ACL and capabilities to be what they say.
    let list = vec((name, value), 1..=6usize).prop_map(|mut list| {
        for (name, value) in &mut list {
            if name.starts_with("system.") {
                *value = MINIMAL_ACL.to_vec();
            } else if name == "security.capability" {
                *value = CAP_NET_RAW.to_vec();
            }
        }
        list
    });
    prop_oneof![
        3 => Just(vec![]),
        2 => list,
    ]
}

fn attributes() -> impl Strategy<Value = WantAttributes> {
    (
        0u32..=0o7777,
        any::<u32>(),
        any::<u32>(),
        prop_oneof![Just(0i64), any::<u32>().prop_map(i64::from), any::<i64>()],
        0u32..1_000_000_000,
        xattr_lists(),
    )
        .prop_map(|(mode, uid, gid, seconds, nanos, xattrs)| WantAttributes {
            mode,
            uid,
            gid,
            seconds,
            nanos,
            xattrs,
        })
}

fn wants() -> impl Strategy<Value = Want> {
    let size = prop_oneof![
        4 => 0usize..=300,
        3 => 4000usize..=9000,
        2 => 100_000usize..=140_000,
        1 => 250_000usize..=400_000,
    ];
    prop_oneof![
        4 => Just(Want::Directory),
        6 => (size, any::<u8>()).prop_map(|(size, seed)| Want::File(size, seed)),
        2 => vec(1u8..=255, 1..=60usize).prop_map(Want::Symlink),
        1 => vec(Just(b'l'), 3000..=4095usize).prop_map(Want::Symlink),
        1 => (0u64..4096, 0u64..1 << 20).prop_map(|(major, minor)| Want::Char(major, minor)),
        1 => (0u64..4096, 0u64..1 << 20).prop_map(|(major, minor)| Want::Block(major, minor)),
        1 => Just(Want::Fifo),
        1 => Just(Want::Socket),
        2 => any::<Index>().prop_map(Want::Link),
    ]
}

/// Trees of up to `most` nodes.
pub fn trees(most: usize) -> impl Strategy<Value = Vec<WantNode>> {
    let node = (any::<Index>(), names(), wants(), attributes()).prop_map(
        |(parent, name, want, attributes)| WantNode {
            parent,
            name,
            want,
            attributes,
        },
    );
    vec(node, 0..=most)
}

/// The contents of a file: different for every seed, with pages of zeros.
pub fn contents(size: usize, seed: u8) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    (0..size)
        .map(|position| {
            if position / 4096 % 5 == 3 {
                return 0;
            }
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// A node as any reader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub nlink: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub device: Option<(u32, u32)>,
    /// Contents, or the link's target.
    pub data: Vec<u8>,
    /// The first path of the same file: hard links have the same one.
    pub first: Vec<u8>,
}

/// A tree as any reader sees it, by path ("" is the root).
pub type Picture = BTreeMap<Vec<u8>, Seen>;

pub struct Built {
    pub image: Vec<u8>,
    pub summary: Summary,
    pub picture: Picture,
}

/// Builds a tree and its image, and paints what must be read from it.
pub fn build(wanted: &[WantNode]) -> Built {
    let root = WantAttributes {
        seconds: 7,
        ..WantAttributes::plain(0o755)
    };
    let mut tree = Tree::new(root.attributes());
    let mut writer = ImageWriter::new(Memory::default(), u64::MAX);
    let mut directories = vec![tree.root()];
    let mut leaves: Vec<NodeId> = vec![];
    let mut data: BTreeMap<NodeId, Vec<u8>> = BTreeMap::new();
    for node in wanted {
        let parent = directories[node.parent.index(directories.len())];
        // A name that is taken stays: otherwise directories in use would vanish.
        if tree.lookup(parent, &node.name).is_some() {
            continue;
        }
        let name = Name::new(&node.name).unwrap();
        let content = match &node.want {
            Want::Directory => Content::Directory(Directory::default()),
            Want::File(size, seed) => {
                Content::File(store(&mut writer, &contents(*size, *seed), *seed))
            }
            Want::Symlink(target) => Content::Symlink(SymlinkTarget::new(target).unwrap()),
            Want::Char(major, minor) => Content::CharDevice(Device::new(*major, *minor).unwrap()),
            Want::Block(major, minor) => Content::BlockDevice(Device::new(*major, *minor).unwrap()),
            Want::Fifo => Content::Fifo,
            Want::Socket => Content::Socket,
            Want::Link(index) => {
                if !leaves.is_empty() {
                    let target = leaves[index.index(leaves.len())];
                    tree.link(parent, name, target).unwrap();
                }
                continue;
            }
        };
        let attributes = node.attributes.attributes();
        let id = tree.insert(parent, name, attributes, content).unwrap();
        match &node.want {
            Want::Directory => directories.push(id),
            Want::File(size, seed) => {
                data.insert(id, contents(*size, *seed));
                leaves.push(id);
            }
            Want::Symlink(target) => {
                data.insert(id, target.clone());
                leaves.push(id);
            }
            _ => leaves.push(id),
        }
    }
    let picture = paint(&tree, &data);
    let (summary, output) = writer.finish(&tree, UUID).unwrap();
    let image = output.image();
    Built {
        image,
        summary,
        picture,
    }
}

/// Writes a file in pieces whose size depends on `seed`.
pub fn store(writer: &mut ImageWriter<Memory>, data: &[u8], seed: u8) -> Extent {
    let mut file = writer.begin_file(data.len() as u64).unwrap();
    let piece = [1, 100, 4096, 65536, 131_072, 1 << 20][usize::from(seed) % 6];
    if piece == 1 && data.len() > 10_000 {
        file.write(data).unwrap();
    } else {
        for piece in data.chunks(piece) {
            file.write(piece).unwrap();
        }
    }
    file.finish().unwrap()
}

fn paint(tree: &Tree, data: &BTreeMap<NodeId, Vec<u8>>) -> Picture {
    let mut picture = Picture::new();
    let mut names: BTreeMap<NodeId, Vec<Vec<u8>>> = BTreeMap::new();
    let mut waiting = vec![(Vec::new(), tree.root())];
    while let Some((path, id)) = waiting.pop() {
        names.entry(id).or_default().push(path.clone());
        for (name, child) in tree.node(id).directory().iter().flat_map(|d| d.iter()) {
            waiting.push(([&path[..], b"/", name.as_bytes()].concat(), child));
        }
    }
    for (id, mut paths) in names {
        paths.sort();
        let node = tree.node(id);
        let attributes = node.attributes();
        let nlink = match node.directory() {
            Some(directory) => {
                let is_dir = |id| tree.node(id).directory().is_some();
                2 + directory.iter().filter(|(_, id)| is_dir(*id)).count() as u32
            }
            None => paths.len() as u32,
        };
        let device = match node.content() {
            Content::CharDevice(device) | Content::BlockDevice(device) => {
                Some((device.major(), device.minor()))
            }
            _ => None,
        };
        let xattrs = attributes.xattrs.iter();
        let seen = Seen {
            mode: node.content().kind().mode_bits() | attributes.permissions.bits(),
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: (attributes.mtime.seconds(), attributes.mtime.nanos()),
            nlink,
            xattrs: xattrs
                .map(|(name, value)| (name.full(), value.to_vec()))
                .collect(),
            device,
            data: data.get(&id).cloned().unwrap_or_default(),
            first: paths[0].clone(),
        };
        for path in paths {
            picture.insert(path, seen.clone());
        }
    }
    picture
}

/// Compares two pictures and names the first difference.
pub fn compare(expected: &Picture, found: &Picture, by: &str) {
    let show = |path: &[u8]| format!("\"{}\"", path.escape_ascii());
    for path in found.keys() {
        assert!(
            expected.contains_key(path),
            "{by}: {} is too many",
            show(path)
        );
    }
    for (path, seen) in expected {
        let other = found.get(path);
        let other = other.unwrap_or_else(|| panic!("{by}: {} is missing", show(path)));
        let brief = |seen: &Seen| {
            let mut brief = seen.clone();
            brief.data.clear();
            brief
        };
        assert_eq!(brief(seen), brief(other), "{by}: {}", show(path));
        assert!(seen.data == other.data, "{by}: contents of {}", show(path));
    }
}
