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

/// What is at a path; what may have several names by the number of its entry.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    File(usize, u8),
    Dir(u32, bool),
    Whiteout(usize),
}

#[derive(Debug)]
struct Model {
    tree: BTreeMap<String, Node>,
    /// Whiteouts that a hard link was made to: it gives them its attributes.
    linked: BTreeSet<usize>,
}

/// The tree, or nothing if an entry has no place in it.
fn model(entries: &[(String, Entry)]) -> Option<Model> {
    let mut tree: BTreeMap<String, Node> = BTreeMap::new();
    let mut linked = BTreeSet::new();
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
            (Entry::Whiteout, None | Some(Node::Whiteout(_))) => {
                tree.insert(path.clone(), Node::Whiteout(number));
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
            Entry::Whiteout => Node::Whiteout(number),
        };
        if let Node::Whiteout(whiteout) = node {
            linked.insert(whiteout);
        }
        tree.insert(path.clone(), node);
    }
    Some(Model { tree, linked })
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

fn lines(model: &Model, directories: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let mut first: BTreeMap<usize, &String> = BTreeMap::new();
    let mut lines = BTreeMap::from([("/".to_owned(), "d 0755 0:0 0".to_owned())]);
    let late = |path: &str| if directories.contains(path) { 3 } else { 0 };
    // In the order of the image's paths.
    for (path, node) in &model.tree {
        let line = match node {
            Node::File(number, _) | Node::Whiteout(number) if first.contains_key(number) => {
                format!("= /{}", first[number])
            }
            Node::File(number, byte) => {
                first.insert(*number, path);
                format!("f 0644 1:2 3 {:?}", byte.to_string())
            }
            Node::Whiteout(number) => {
                first.insert(*number, path);
                let names = model.tree.iter().filter(|(_, other)| *other == node);
                let time = names.map(|(name, _)| late(name)).max().unwrap_or(0);
                match model.linked.contains(number) {
                    true => "c 0644 1:2 3 0:0".to_owned(),
                    false => format!("c 0000 1:2 {time} 0:0"),
                }
            }
            Node::Dir(_, false) => format!("d 0755 0:0 {}", late(path)),
            Node::Dir(mode, true) => format!("d {mode:04o} 1:2 3"),
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
    let converted = convert_with(&tar.end(), &on_another(), &mut NoLower);
    match (model(entries), converted) {
        (Some(model), Ok((_, image))) => {
            prop_assert_eq!(picture(&image), lines(&model, &directories(entries)));
        }
        (None, Err(_)) => {}
        (model, converted) => prop_assert!(false, "{model:?} {:?}", converted.map(|_| ())),
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

/// A hard link to a whiteout gives it its own attributes, and another whiteout at one of its
/// names leaves the other.
#[test]
fn links_to_whiteouts_are_whiteouts() {
    let out = |path: &str| (path.to_owned(), Entry::Whiteout);
    let hard = |path: &str, to: &str| (path.to_owned(), Entry::Hard(to.to_owned()));
    let dir = |path: &str| (path.to_owned(), Entry::Dir(0o755));
    check(&[out("a"), hard("b", "a")]).unwrap();
    check(&[out("a"), hard("b/a", "a"), hard("b/b", "b/a")]).unwrap();
    check(&[out("a"), hard("b", "a"), out("a")]).unwrap();
    check(&[dir("a"), hard("a", "b")]).unwrap();
    check(&[out("b"), dir("a"), hard("a", "b")]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_layer_is_what_its_entries_say(entries in vec(entries(), 0..14)) {
        check(&entries)?;
    }
}
