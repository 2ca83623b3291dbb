//! Generated layers against a model of their rules that knows paths and nothing else.

mod common;

use accel_layer::NoLower;
use common::{Tar, convert_with, on_another, picture};
use proptest::{collection::vec, prelude::*};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Clone)]
enum Entry {
    File(u8),
    Dir(u32),
    Hard(String),
    Whiteout,
}

fn paths() -> impl Strategy<Value = String> {
    vec(prop_oneof!["a", "b"], 1..4).prop_map(|parts| parts.join("/"))
}

fn entries() -> impl Strategy<Value = (String, Entry)> {
    let entry = prop_oneof![
        4 => any::<u8>().prop_map(Entry::File),
        4 => prop_oneof![Just(0o755), Just(0o1700)].prop_map(Entry::Dir),
        2 => paths().prop_map(Entry::Hard),
        1 => Just(Entry::Whiteout),
    ];
    (paths(), entry)
}

/// What is at a path; files by number, for their names.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    File(usize, u8),
    Dir(u32, bool),
    Whiteout,
}

/// The tree, or nothing if an entry has no place in it.
fn model(entries: &[(String, Entry)]) -> Option<BTreeMap<String, Node>> {
    let mut tree: BTreeMap<String, Node> = BTreeMap::new();
    for (number, (path, entry)) in entries.iter().enumerate() {
        for (end, _) in path.match_indices('/') {
            let above = tree
                .entry(path[..end].to_owned())
                .or_insert(Node::Dir(0o755, false));
            if !matches!(above, Node::Dir(..)) {
                return None;
            }
        }
        let there = tree.get(path).cloned();
        match (entry, there) {
            (Entry::Whiteout, None | Some(Node::Whiteout)) => {
                tree.insert(path.clone(), Node::Whiteout);
                continue;
            }
            (Entry::Whiteout, Some(_)) => return None,
            (Entry::Dir(mode), Some(Node::Dir(..))) => {
                tree.insert(path.clone(), Node::Dir(*mode, true));
                continue;
            }
            _ => {}
        }
        let below = format!("{path}/");
        tree.retain(|other, _| other != path && !other.starts_with(&below));
        let node = match entry {
            Entry::File(byte) => Node::File(number, *byte),
            Entry::Dir(mode) => Node::Dir(*mode, true),
            Entry::Hard(target) => match tree.get(target)? {
                Node::Dir(..) => return None,
                node => node.clone(),
            },
            Entry::Whiteout => Node::Whiteout,
        };
        // A link to a whiteout would give it attributes; see the other tests.
        if matches!((entry, &node), (Entry::Hard(_), Node::Whiteout)) {
            return None;
        }
        tree.insert(path.clone(), node);
    }
    Some(tree)
}

/// Where entries said that there was a directory: its time is set last of all, whatever is
/// at its path by then.
fn directories(entries: &[(String, Entry)]) -> BTreeSet<&str> {
    let directories = entries.iter();
    directories
        .filter(|(_, entry)| matches!(entry, Entry::Dir(_)))
        .map(|(path, _)| path.as_str())
        .collect()
}

fn lines(tree: &BTreeMap<String, Node>, directories: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let mut first: BTreeMap<usize, &String> = BTreeMap::new();
    let mut lines = BTreeMap::from([("/".to_owned(), "d 0755 0:0 0".to_owned())]);
    // In the order of the image's paths.
    for (path, node) in tree {
        let time = if directories.contains(path.as_str()) {
            3
        } else {
            0
        };
        let line = match node {
            Node::File(number, byte) => match first.get(number) {
                Some(first) => format!("= /{first}"),
                None => {
                    first.insert(*number, path);
                    format!("f 0644 1:2 3 {:?}", byte.to_string())
                }
            },
            Node::Dir(_, false) => format!("d 0755 0:0 {time}"),
            Node::Dir(mode, true) => format!("d {mode:04o} 1:2 3"),
            Node::Whiteout => format!("c 0000 1:2 {time} 0:0"),
        };
        lines.insert(format!("/{path}"), line);
    }
    lines
}

/// Whether a layer of these entries is converted to what the model says, or refused by both.
fn check(entries: &[(String, Entry)]) -> Result<(), TestCaseError> {
    let mut tar = Tar::default();
    for (path, entry) in entries {
        match entry {
            Entry::File(byte) => tar.file(path, byte.to_string().as_bytes()),
            Entry::Dir(mode) => tar.dir(path, *mode),
            Entry::Hard(target) => tar.hard(path, target),
            Entry::Whiteout => {
                let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
                let slash = if above.is_empty() { "" } else { "/" };
                tar.file(&format!("{above}{slash}.wh.{name}"), b"")
            }
        };
    }
    let links_to_whiteout = entries
        .iter()
        .any(|(_, entry)| matches!(entry, Entry::Hard(_)))
        && entries
            .iter()
            .any(|(_, entry)| matches!(entry, Entry::Whiteout));
    let converted = convert_with(&tar.end(), &on_another(), &mut NoLower);
    match (model(entries), converted) {
        (Some(tree), Ok((_, image))) => {
            prop_assert_eq!(picture(&image), lines(&tree, &directories(entries)));
        }
        (None, Err(_)) => {}
        (None, Ok(_)) if links_to_whiteout => {}
        (tree, converted) => prop_assert!(false, "{tree:?} {:?}", converted.map(|_| ())),
    }
    Ok(())
}

/// A directory that is gone because one above it was replaced, and is there again because a
/// path implies it.
#[test]
fn what_is_implied_again_has_the_time_of_what_was_there() {
    let dir = |path: &str| (path.to_owned(), Entry::Dir(0o755));
    let file = |path: &str| (path.to_owned(), Entry::File(0));
    check(&[dir("b/a"), file("b"), dir("b"), file("b/a/a")]).unwrap();
    check(&[dir("b/b"), file("b/b"), file("b"), dir("b"), file("b/b/a")]).unwrap();
    check(&[dir("a/b/c"), file("a"), file("a/b/c/d")]).unwrap();
    check(&[
        dir("a/b/c"),
        file("a"),
        dir("a"),
        dir("a/b"),
        file("a/b/c/d"),
    ])
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_layer_is_what_its_entries_say(entries in vec(entries(), 0..14)) {
        check(&entries)?;
    }
}
