//! The tars that Go and CPython test with.

use super::{
    Cases, Expect,
    Expect::{Lenient, Refused, Same},
};
use crate::containerd;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Tars that the authors of Go's and CPython's readers found awkward, and what
/// becomes of them if not the same tree.
const FOREIGN: &[(&str, Expect)] = &[
    ("go-gnu-incremental", Refused("type 'D'")),
    ("go-gnu-nil-sparse-data", Lenient),
    ("go-gnu-nil-sparse-hole", Lenient),
    ("go-issue10968", Refused("the size is no number")),
    ("go-issue11169", Refused("a pax record that is none")),
    ("go-issue12435", Refused("the size is no number")),
    ("go-neg-size", Refused("the size is no number")),
    ("go-pax-bad-hdr-file", Refused("a pax record that is none")),
    (
        "go-pax-bad-mtime-file",
        Refused("a pax mtime that is no time"),
    ),
    ("go-pax-nul-path", Refused("a pax record that is none")),
    ("go-pax-nul-xattrs", Refused("a pax record that is none")),
    ("go-sparse-formats", Lenient),
    // They end within files of 16 GiB.
    ("go-writer-big", Refused("larger than")),
    ("go-writer-big-long", Refused("larger than")),
    ("python-recursion", Refused("a pax record that is none")),
    ("python-testtar", Refused("type 'X'")),
];

/// Go's and CPython's test data, from the packages of this Debian release.
pub fn foreign(cases: &mut Cases) -> Option<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let (go, python) = match release.contains("bookworm") {
        true => ("1.19", "3.11"),
        false => ("1.24", "3.13"),
    };
    let from_go = containerd::package(&format!("golang-{go}-src"))?;
    let from_go = from_go.join(format!("usr/share/go-{go}/src/archive/tar/testdata"));
    let from_python = containerd::package(&format!("libpython{python}-testsuite"))?;
    let from_python = from_python.join(format!("usr/lib/python{python}/test"));
    let mut found = 0;
    for (whose, directory) in [("go", from_go), ("python", from_python)] {
        let mut entries: Vec<PathBuf> = walk(&directory);
        entries.sort();
        for path in entries {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let name = format!("{whose}-{name}").to_lowercase();
            found += 1;
            // 60 GiB of zeros each.
            if name.ends_with("-sparse-big") {
                continue;
            }
            let expect = FOREIGN.iter().find(|(other, _)| *other == name);
            let expect = expect.map_or(Same, |(_, expect)| *expect);
            cases.image(&name, expect, vec![fs::read(&path).unwrap()]);
        }
    }
    assert!(found > 30, "only {found} tars");
    Some(())
}

/// The tars in a directory and its first subdirectories.
fn walk(directory: &Path) -> Vec<PathBuf> {
    let list = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let below: Vec<PathBuf> = list(directory);
    let deeper = below.iter().filter(|path| path.is_dir());
    let deeper: Vec<PathBuf> = deeper.flat_map(|path| list(path)).collect();
    let is_tar = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "tar");
    below
        .iter()
        .chain(&deeper)
        .filter(|path| is_tar(path))
        .cloned()
        .collect()
}
