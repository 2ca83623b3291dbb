//! Files in a tar, read where they lie: the tar is indexed once by its headers and
//! never unpacked.

use crate::ImageError;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Archives of images have a few entries per layer.
const MAX_ENTRIES: usize = 100_000;
/// Links to links go at most this far.
const MAX_LINKS: usize = 16;

/// A tar and what is in it.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    entries: HashMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    File {
        offset: u64,
        size: u64,
    },
    /// To another entry, by its path from the top.
    Link(String),
}

/// How files begin that are a compressed tar rather than one.
const COMPRESSED: [(&[u8], &str); 4] = [
    (&[0x1f, 0x8b], "gunzip"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "unzstd"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "unxz"),
    (b"BZh", "bunzip2"),
];

impl Archive {
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let io = |error| ImageError::Io {
            path: path.to_owned(),
            error,
        };
        let wrong = |why: String| ImageError::Archive {
            path: path.to_owned(),
            why,
        };
        // Look before opening: a FIFO would block.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(wrong(
                "it is not a regular file, and an archive is not read from front to back: save it into a file first".to_owned(),
            ));
        }
        let mut file = File::open(path).map_err(io)?;
        let mut start = Vec::new();
        (&file).take(8).read_to_end(&mut start).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        if let Some((_, tool)) = COMPRESSED
            .iter()
            .find(|(magic, _)| start.starts_with(magic))
        {
            return Err(wrong(format!(
                "it is compressed as a whole: decompress it first ({tool})"
            )));
        }
        let mut entries = HashMap::new();
        let unreadable = |error: io::Error| wrong(format!("it is no tar: {error}"));
        let mut tar = tar::Archive::new(&file);
        for entry in tar.entries_with_seek().map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.path_bytes();
            let Some(name) = plain("", &String::from_utf8_lossy(&name)) else {
                continue;
            };
            let kind = entry.header().entry_type();
            let link = entry.link_name_bytes();
            let link = link.map(|link| String::from_utf8_lossy(&link).into_owned());
            let found = if kind.is_file() {
                Some(Entry::File {
                    offset: entry.raw_file_position(),
                    size: entry.size(),
                })
            } else if kind.is_symlink() {
                let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
                link.and_then(|link| plain(parent, &link)).map(Entry::Link)
            } else if kind.is_hard_link() {
                link.and_then(|link| plain("", &link)).map(Entry::Link)
            } else {
                None
            };
            if let Some(found) = found {
                entries.insert(name, found);
            }
            if entries.len() > MAX_ENTRIES {
                return Err(wrong(format!("it has more than {MAX_ENTRIES} entries")));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
            entries,
        })
    }

    /// Opens a file of the archive; with its size in bytes.
    pub fn open_file(&self, name: &str) -> Result<(Section, u64), ImageError> {
        let mut current = plain("", name).unwrap_or_default();
        for _ in 0..MAX_LINKS {
            match self.entries.get(&current) {
                Some(Entry::Link(target)) => current.clone_from(target),
                Some(Entry::File { offset, size }) => {
                    let section = Section {
                        file: Arc::clone(&self.file),
                        offset: *offset,
                        rest: *size,
                    };
                    return Ok((section, *size));
                }
                None => break,
            }
        }
        Err(ImageError::Archive {
            path: self.path.clone(),
            why: format!("it has no file {name:?}"),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// `path`, seen from the directory `parent`, without "." and ".."; nothing if it
/// leads out of the archive or to its top.
fn plain(parent: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    let parent = if path.starts_with('/') { "" } else { parent };
    for part in parent.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// The bytes of one file in an archive.
#[derive(Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    offset: u64,
    rest: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let length = self.file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += length as u64;
        self.rest -= length as u64;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn paths_stay_within_the_archive() {
        for (parent, path, found) in [
            ("", "./a//b/", Some("a/b")),
            ("x/y", "../b/layer.tar", Some("x/b/layer.tar")),
            ("x", "/b", Some("b")),
            ("x", "../../b", None),
            ("", "..", None),
            ("", "./", None),
        ] {
            assert_eq!(plain(parent, path).as_deref(), found, "{parent} {path}");
        }
    }
}
