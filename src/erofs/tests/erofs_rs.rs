//! erofs-rs, which is not ours, reads back what was written.
#![allow(clippy::cast_possible_truncation)] // sizes here are small

mod common;

use common::{Built, Picture, Seen, Want, WantAttributes, WantNode, build, compare, trees};
use erofs_rs::{EroFS, backend::SliceImage, types::Inode};
use proptest::{prelude::*, sample::Index};
use std::{collections::HashMap, os::unix::fs::PermissionsExt};

type Fs<'a> = EroFS<SliceImage<'a>>;

fn see(fs: &Fs<'_>, inode: Inode, first: Vec<u8>) -> Seen {
    let kind = inode.file_type();
    let mut data = vec![];
    if inode.is_file() {
        data = vec![0; usize::try_from(inode.data_size()).unwrap()];
        let file = fs.open_inode_file(inode).unwrap();
        let mut done = 0;
        while done < data.len() {
            let count = file.read_at(&mut data[done..], done as u64).unwrap();
            assert!(count > 0, "a file ends early");
            done += count;
        }
    } else if inode.is_symlink() {
        data = fs.read_link_inode(inode).unwrap().as_bytes().to_vec();
    }
    let mode_bits = match kind {
        k if k.is_dir() => 0o040_000,
        k if k.is_file() => 0o100_000,
        k if k.is_symlink() => 0o120_000,
        other => match format!("{other:?}").as_str() {
            "CharDevice" | "CharacterDevice" => 0o020_000,
            "BlockDevice" => 0o060_000,
            "Fifo" | "FIFO" => 0o010_000,
            "Socket" => 0o140_000,
            name => panic!("erofs-rs calls it {name}"),
        },
    };
    Seen {
        mode: mode_bits | (inode.permissions().mode() & 0o7777) as u16,
        uid: inode.uid(),
        gid: inode.gid(),
        mtime: inode.modified_unix(),
        nlink: inode.nlink(),
        xattrs: fs.xattrs_inode(inode).unwrap(),
        device: inode.device(),
        data,
        first,
    }
}

fn read(image: &[u8]) -> Picture {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let mut paths: Vec<(Vec<u8>, u64)> = vec![(vec![], fs.super_block().root_inode_id())];
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path();
        paths.push((path.as_bytes().to_vec(), entry.dir_entry.nid()));
    }
    paths.sort();
    let mut first: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut picture = Picture::new();
    for (path, nid) in paths {
        let first = first.entry(nid).or_insert_with(|| path.clone()).clone();
        picture.insert(path, see(&fs, fs.get_inode(nid).unwrap(), first));
    }
    picture
}

fn check(wanted: &[WantNode]) -> Built {
    let built = build(wanted);
    assert_eq!(built.summary.size, built.image.len() as u64);
    assert_eq!(built.summary.metadata.end, built.summary.size);
    compare(&built.picture, &read(&built.image), "erofs-rs");
    built
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_is_read_back(wanted in trees(60)) {
        check(&wanted);
    }
}

fn node(parent: usize, name: &str, want: Want) -> WantNode {
    // `Index` picks proportionally; the tests below use the root or one directory.
    let parent = if parent == 0 { 0 } else { usize::MAX };
    WantNode {
        parent: index(parent),
        name: name.into(),
        want,
        attributes: WantAttributes::plain(0o644),
    }
}

fn index(raw: usize) -> Index {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    loop {
        let index = any::<Index>().new_tree(&mut runner).unwrap().current();
        // The root is the first of two, the only other directory the second.
        if (index.index(2) == 0) == (raw == 0) {
            return index;
        }
    }
}

#[test]
fn a_directory_of_100000_entries_is_found_whole() {
    let wanted: Vec<_> = (0..100_000)
        .map(|number| node(0, &format!("entry-{number}"), Want::Fifo))
        .collect();
    let built = check(&wanted);
    assert_eq!(built.summary.counts.inodes, 100_001);
}

#[test]
fn an_empty_tree_is_an_image() {
    let built = check(&[]);
    assert_eq!(built.summary.metadata, 4096..8192);
    assert_eq!(built.summary.counts.inodes, 1);
}

/// Where the data of each file lies, by the block that its inode names.
fn start(image: &[u8], path: &str) -> usize {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let file = fs.open(path).unwrap();
    let mut data = vec![0; usize::try_from(file.size()).unwrap()];
    file.read_at(&mut data, 0).unwrap();
    // Contents are unlike each other in their first block.
    let needle = &data[..data.len().min(4096)];
    (0..image.len())
        .step_by(4096)
        .find(|&offset| image[offset..].starts_with(needle))
        .unwrap()
}

#[test]
fn large_files_start_on_chunks_and_small_ones_fill_the_gap() {
    let chunk = 131_072;
    let wanted = [
        node(0, "small-1", Want::File(5000, 1)),
        node(0, "large-1", Want::File(chunk, 2)),
        node(0, "small-2", Want::File(4096, 3)),
        node(0, "large-2", Want::File(chunk + 1, 4)),
        node(0, "too-much", Want::File(chunk - 4096, 5)),
        node(0, "small-3", Want::File(1, 6)),
        node(0, "empty", Want::File(0, 7)),
    ];
    let built = check(&wanted);
    let at = |path| start(&built.image, path);
    assert_eq!(at("/small-1"), 4096);
    assert_eq!(at("/large-1"), chunk);
    // 3 blocks of chunk 0 are used.
    assert_eq!(at("/small-2"), 3 * 4096);
    // No gap before it: the one in chunk 0 stays open.
    assert_eq!(at("/large-2"), 2 * chunk);
    // What does not fit goes behind everything.
    assert_eq!(at("/too-much"), 3 * chunk + 4096);
    assert_eq!(at("/small-3"), 4 * 4096);
    assert_eq!(built.summary.metadata.start as usize, 4 * chunk);
}

#[test]
fn attributes_of_several_files_are_stored_once() {
    let value = vec![b'v'; 1000];
    let mut wanted = vec![];
    for name in ["a", "b", "c"] {
        let mut node = node(0, name, Want::Fifo);
        node.attributes.xattrs = vec![("user.shared".into(), value.clone())];
        wanted.push(node);
    }
    wanted[0]
        .attributes
        .xattrs
        .push(("user.own".into(), b"1".to_vec()));
    let built = check(&wanted);
    assert_eq!(built.summary.counts.shared_xattrs, 1);
    let found = built.image.windows(1000).filter(|window| *window == value);
    assert_eq!(found.count(), 1);
}

#[test]
fn more_than_255_shared_attributes_are_read_back() {
    let xattrs: Vec<_> = (0..300).map(|n| (format!("user.{n}"), vec![1])).collect();
    let mut wanted = vec![node(0, "a", Want::Fifo), node(0, "b", Want::Fifo)];
    for node in &mut wanted {
        node.attributes.xattrs = xattrs.clone();
    }
    check(&wanted);
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let wanted = [
        node(0, "d", Want::Directory),
        node(1, "f", Want::File(200_000, 3)),
        node(1, "s", Want::Symlink(b"target".to_vec())),
    ];
    assert!(build(&wanted).image == build(&wanted).image);
}
