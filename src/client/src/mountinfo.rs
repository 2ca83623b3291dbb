//! `/proc/self/mountinfo`, see proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Undoes the kernel's `\ooo` for blanks and backslashes.
pub fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let value = octal.and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match value {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(plain))
}

/// The mounts of this process's namespace, one a line. Not every mount point's
/// name is UTF-8; all of ours are, and the others must not hide them.
pub fn read() -> io::Result<String> {
    Ok(text(fs::read("/proc/self/mountinfo")?))
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// File system types of what is mounted at `path` (a real path), lowest first.
pub fn kinds_at(path: &Path) -> io::Result<Vec<String>> {
    Ok(kinds_in(&read()?, path))
}

fn kinds_in(text: &str, path: &Path) -> Vec<String> {
    let at = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let point = unescape(front.split(' ').nth(4)?);
        let kind = back.split(' ').next()?;
        (point == path).then(|| kind.to_owned())
    };
    text.lines().filter_map(at).collect()
}

/// Whether something is mounted at `path` (a real path), in a text that [`read`] gave.
pub fn is_mount_point(text: &str, path: &Path) -> bool {
    !kinds_in(text, path).is_empty()
}

/// Mount points of this kind in a text that [`read`] gave, each with what is mounted
/// there: a device or file, as it was named.
pub fn mounts(text: &str, kind: &str) -> Vec<(PathBuf, PathBuf)> {
    let of_kind = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let point = unescape(front.split(' ').nth(4)?);
        let mut back = back.split(' ');
        (back.next()? == kind).then_some((point, unescape(back.next()?)))
    };
    text.lines().filter_map(of_kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_of_a_kind_are_found() {
        let text = "1 0 0:5 / /a rw - erofs x ro\n2 0 0:6 / /b rw shared:1 - ext4 y rw\n";
        assert_eq!(mounts(text, "erofs"), [("/a".into(), "x".into())]);
    }

    #[test]
    fn octal_is_undone() {
        assert_eq!(unescape("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescape("/a\\x\\04"), Path::new("/a\\x\\04"));
    }

    #[test]
    fn a_name_that_is_not_utf8_hides_no_other() {
        let bytes = b"1 0 8:1 / /media/M\xfcll rw - vfat a rw\n2 0 0:5 / /mnt rw - erofs b ro\n";
        let text = text(bytes.to_vec());
        assert_eq!(kinds_in(&text, Path::new("/mnt")), ["erofs"]);
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(!kinds_at(Path::new("/")).unwrap().is_empty());
        assert!(
            kinds_at(Path::new("/proc"))
                .unwrap()
                .contains(&"proc".to_owned())
        );
        assert!(
            kinds_at(Path::new("/proc/self/nothing"))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn what_is_beneath_a_mount_is_no_mount_point() {
        let text = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                    40 22 0:50 / /mnt/a\\040b rw - nfs h:/x rw\n";
        let is = |path| is_mount_point(text, Path::new(path));
        assert!(is("/mnt/a b") && is("/"));
        assert!(!is("/mnt") && !is("/mnt/a b2") && !is("/mnt/a b/ufs"));
    }
}
