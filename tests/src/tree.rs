//! A directory tree as text, for comparing two trees that are not at hand at the same
//! time: one line per entry, sorted by path.
//!
//! ```text
//! ./app/hello f 0755 0:0 1750000000.000000000 54 blake3:9c… user.app=612076616c7565
//! ./srv/greeting f 0644 0:0 1750000000.000000000 12 blake3:11… =./app/data/greeting
//! ```
//!
//! Fields, separated by single spaces: path, type as in `ls -l` (`f` for a regular
//! file), permission bits in octal, owner and group, modification time; then for a
//! regular file size and BLAKE3, for a symbolic link `->` and its target, for a device
//! major and minor; `=` and a path when the entry is a further name of that earlier
//! one; the extended attributes, sorted.
//!
//! Left out are: access and change times, link counts, sizes of directories and inode
//! numbers, which an ordinary unpack does not keep; overlayfs' own `trusted.overlay.*`.
//! A directory that an unpack made on its own account, because only a path implied it,
//! has the time of that unpack: see [`Options::own_since`].
//!
//! Bytes outside of printable ASCII, spaces, `=` and `\` are written `\xHH`, so a
//! manifest is a text and a field never has a space in it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Values of extended attributes longer than this are given by their BLAKE3.
const LONG_VALUE: usize = 64;

const ANY_TIME: &str = "-";
/// Also the kernel's limit for a list of extended attributes.
const BUFFER: usize = 64 * 1024;
/// The kernel's limit for the value of one.
const XATTR_SIZE_MAX: usize = 64 * 1024;

/// How a manifest is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Directories modified at this second (since 1970) or later have `-` for their
    /// time, which [`difference`] takes for any time.
    pub own_since: Option<i64>,
}

/// Writes the manifest of everything below `root`, mounts on it included.
///
/// # Errors
/// When an entry cannot be read; the error names it.
pub fn write_manifest(root: &Path, options: Options, out: &mut dyn Write) -> Result<()> {
    Walk {
        root,
        options,
        buffer: vec![0; BUFFER],
        value: vec![0; XATTR_SIZE_MAX],
        first_names: HashMap::new(),
    }
    .entry(Path::new("."), out)
}

/// The same as lines.
///
/// # Errors
/// As [`write_manifest`].
pub fn manifest(root: &Path) -> Result<Vec<String>> {
    let mut text = Vec::new();
    write_manifest(root, Options::default(), &mut text)?;
    Ok(String::from_utf8(text)?.lines().map(String::from).collect())
}

/// Is the found line what the wanted one says?
fn same(wanted: &str, found: &str) -> bool {
    const TIME: usize = 4;
    let (wanted, found) = (wanted.split(' '), found.split(' '));
    wanted.clone().count() == found.clone().count()
        && wanted
            .zip(found)
            .enumerate()
            .all(|(field, (wanted, found))| {
                wanted == found || (field == TIME && wanted == ANY_TIME)
            })
}

/// What differs between two manifests, as text for a person; `None` when nothing does.
pub fn difference(wanted: &[String], found: &[String]) -> Option<String> {
    const SHOWN: usize = 20;
    fn path(line: &str) -> &str {
        line.split(' ').next().unwrap_or(line)
    }
    let by_path = |lines: &[String]| -> HashMap<String, String> {
        lines
            .iter()
            .map(|line| (path(line).to_owned(), line.clone()))
            .collect()
    };
    let (in_wanted, in_found) = (by_path(wanted), by_path(found));
    let mut report = Vec::new();
    for line in wanted {
        match in_found.get(path(line)) {
            None => report.push(format!("missing:  {line}")),
            Some(other) if !same(line, other) => {
                report.push(format!("expected: {line}\n   found: {other}"));
            }
            Some(_) => {}
        }
    }
    for line in found {
        if !in_wanted.contains_key(path(line)) {
            report.push(format!("too much: {line}"));
        }
    }
    if report.is_empty() {
        return None;
    }
    let total = report.len();
    report.truncate(SHOWN);
    if total > SHOWN {
        report.push(format!("… and {} more", total - SHOWN));
    }
    Some(report.join("\n"))
}

struct Walk<'a> {
    root: &'a Path,
    options: Options,
    /// For contents and lists of attributes; made once, because there are many files.
    buffer: Vec<u8>,
    /// For values of attributes.
    value: Vec<u8>,
    /// (device, inode) of files with several names, and the first of them.
    first_names: HashMap<(u64, u64), String>,
}

impl Walk<'_> {
    fn entry(&mut self, path: &Path, out: &mut dyn Write) -> Result<()> {
        self.line(path, out)
            .with_context(|| format!("reading {}", self.root.join(path).display()))?;
        let full = self.root.join(path);
        if full.symlink_metadata()?.is_dir() {
            let mut names = fs::read_dir(&full)
                .and_then(|entries| {
                    entries
                        .map(|entry| Ok(entry?.file_name()))
                        .collect::<Result<Vec<OsString>, _>>()
                })
                .with_context(|| format!("listing {}", full.display()))?;
            names.sort_unstable();
            for name in names {
                self.entry(&path.join(name), out)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, path: &Path, out: &mut dyn Write) -> Result<()> {
        let full = self.root.join(path);
        let meta = full.symlink_metadata()?;
        let kind = meta.file_type();
        let name = escape(path.as_os_str().as_bytes());
        let own = self
            .options
            .own_since
            .is_some_and(|since| meta.mtime() >= since);
        let time = if kind.is_dir() && own {
            ANY_TIME.to_owned()
        } else {
            format!("{}.{:09}", meta.mtime(), meta.mtime_nsec())
        };
        let (letter, detail) = if kind.is_file() {
            (
                'f',
                format!(
                    " {} blake3:{}",
                    meta.len(),
                    hash_file(&full, &mut self.buffer)?
                ),
            )
        } else if kind.is_dir() {
            ('d', String::new())
        } else if kind.is_symlink() {
            (
                'l',
                format!(
                    " ->{}",
                    escape(fs::read_link(&full)?.as_os_str().as_bytes())
                ),
            )
        } else if kind.is_fifo() {
            ('p', String::new())
        } else if kind.is_socket() {
            ('s', String::new())
        } else {
            let device = meta.rdev();
            let letter = if kind.is_block_device() { 'b' } else { 'c' };
            (
                letter,
                format!(
                    " {}:{}",
                    rustix::fs::major(device),
                    rustix::fs::minor(device)
                ),
            )
        };
        write!(
            out,
            "{name} {letter} {:04o} {}:{} {time}{detail}",
            meta.mode() & 0o7777,
            meta.uid(),
            meta.gid()
        )?;
        if meta.nlink() > 1 && !kind.is_dir() {
            let first = self
                .first_names
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| name.clone());
            if *first != name {
                write!(out, " ={first}")?;
            }
        }
        for (attribute, value) in xattrs(&full, &mut self.buffer, &mut self.value)? {
            write!(out, " {}={value}", escape(attribute.as_bytes()))?;
        }
        writeln!(out)?;
        Ok(())
    }
}

fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_graphic() && byte != b'\\' && byte != b'=' {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

fn hash_file(path: &Path, buffer: &mut [u8]) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    loop {
        match file.read(buffer)? {
            0 => return Ok(hasher.finalize().to_hex()[..32].to_owned()),
            n => {
                hasher.update(&buffer[..n]);
            }
        }
    }
}

fn xattrs(path: &Path, list: &mut [u8], value: &mut [u8]) -> Result<Vec<(OsString, String)>> {
    let length = match rustix::fs::llistxattr(path, &mut *list) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other.context("listing extended attributes")?,
    };
    let mut names: Vec<&OsStr> = list[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay."))
        .map(OsStr::from_bytes)
        .collect();
    names.sort_unstable();
    names
        .into_iter()
        .map(|name| {
            let length = rustix::fs::lgetxattr(path, name, &mut *value)
                .with_context(|| format!("extended attribute {}", PathBuf::from(name).display()))?;
            let value = &value[..length];
            let shown = if length > LONG_VALUE {
                format!("blake3:{}", &blake3::hash(value).to_hex()[..32])
            } else {
                value.iter().map(|byte| format!("{byte:02x}")).collect()
            };
            Ok((name.to_owned(), shown))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn sample() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/file"), "content").unwrap();
        fs::hard_link(at("d/file"), at("d/other name")).unwrap();
        symlink("d/fi\nle", at("link")).unwrap();
        fs::write(at("lone"), "content").unwrap();
        for name in ["d/file", "lone"] {
            File::open(at(name))
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH)
                .unwrap();
        }
        dir
    }

    #[test]
    fn entries_have_all_their_fields() {
        let dir = sample();
        let lines = manifest(dir.path()).unwrap();
        let paths: Vec<_> = lines
            .iter()
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert_eq!(
            paths,
            [
                ".",
                "./d",
                "./d/file",
                "./d/other\\x20name",
                "./link",
                "./lone"
            ]
        );
        assert!(lines[3].ends_with(" =./d/file"), "{}", lines[3]);
        assert!(lines[4].ends_with(" ->d/fi\\x0ale"), "{}", lines[4]);
        let hash = &blake3::hash(b"content").to_hex()[..32];
        assert!(
            lines[5].contains(&format!(" 0.000000000 7 blake3:{hash}")),
            "{}",
            lines[5]
        );
    }

    #[test]
    fn directories_of_the_unpack_itself_have_any_time() {
        let dir = sample();
        let mut text = Vec::new();
        let options = Options { own_since: Some(1) };
        write_manifest(dir.path(), options, &mut text).unwrap();
        let wanted: Vec<String> = String::from_utf8(text)
            .unwrap()
            .lines()
            .map(String::from)
            .collect();
        let times: Vec<_> = wanted
            .iter()
            .map(|line| line.split(' ').nth(4).unwrap())
            .collect();
        assert_eq!((times[0], times[1]), ("-", "-"));
        assert_eq!(times[2], "0.000000000");
        assert_eq!(difference(&wanted, &manifest(dir.path()).unwrap()), None);
        fs::set_permissions(dir.path().join("d"), PermissionsExt::from_mode(0o700)).unwrap();
        assert!(difference(&wanted, &manifest(dir.path()).unwrap()).is_some());
    }

    #[test]
    fn every_change_shows() {
        type Change = fn(&Path);
        let changes: [(&str, Change); 6] = [
            ("content", |d| {
                fs::write(d.join("lone"), "CONTENT").unwrap();
                File::open(d.join("lone"))
                    .unwrap()
                    .set_modified(std::time::UNIX_EPOCH)
                    .unwrap();
            }),
            ("mode", |d| {
                fs::set_permissions(d.join("lone"), PermissionsExt::from_mode(0o4711)).unwrap();
            }),
            ("time", |d| {
                File::open(d.join("lone"))
                    .unwrap()
                    .set_modified(std::time::SystemTime::now())
                    .unwrap();
            }),
            ("target", |d| {
                fs::remove_file(d.join("link")).unwrap();
                symlink("elsewhere", d.join("link")).unwrap();
            }),
            ("removed", |d| fs::remove_file(d.join("lone")).unwrap()),
            ("link group", |d| {
                let copy = d.join("copy");
                fs::copy(d.join("d/file"), &copy).unwrap();
                File::open(&copy)
                    .unwrap()
                    .set_modified(std::time::UNIX_EPOCH)
                    .unwrap();
                fs::rename(copy, d.join("d/other name")).unwrap();
            }),
        ];
        for (what, change) in changes {
            let dir = sample();
            let before = manifest(dir.path()).unwrap();
            assert_eq!(difference(&before, &manifest(dir.path()).unwrap()), None);
            change(dir.path());
            let report = difference(&before, &manifest(dir.path()).unwrap());
            assert!(report.is_some(), "{what} did not show");
        }
    }
}
