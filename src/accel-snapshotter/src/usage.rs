//! Disk space of a directory.

use crate::snapshot::Usage;
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What `directory` and everything in it take on disk; hard links count once. What
/// vanishes meanwhile is left out.
pub fn of(directory: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut add = |metadata: &Metadata| {
        if seen.insert((metadata.dev(), metadata.ino())) {
            usage.size += metadata.blocks() * 512;
            usage.inodes += 1;
        }
    };
    add(&fs::symlink_metadata(directory)?);
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let Some(entries) = unless_gone(fs::read_dir(&directory))? else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            let Some(metadata) = unless_gone(entry.metadata())? else {
                continue;
            };
            add(&metadata);
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let directory = tempfile::tempdir().unwrap();
        let empty = of(directory.path()).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::create_dir(directory.path().join("d")).unwrap();
        let file = directory.path().join("d/file");
        fs::write(&file, [1; 10_000]).unwrap();
        fs::hard_link(&file, directory.path().join("link")).unwrap();
        let usage = of(directory.path()).unwrap();
        assert_eq!(usage.inodes, 3);
        assert!(usage.size >= 10_000 && usage.size < 100_000, "{usage:?}");
    }
}
