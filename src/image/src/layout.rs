//! Images in an OCI layout (image specification, "Image Layout"): a directory, or a
//! tar of one.

use crate::ImageError;
use crate::archive::Archive;
use crate::image::{MAX_MANIFEST, Origin, Start, limit};
use crate::manifest::{Pointer, is_attestation};
use accel_oci::{ArchiveReference, OciReference};
use oci_spec::image::{Descriptor, ImageIndex, OciLayout};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub(crate) const TAG: &str = "org.opencontainers.image.ref.name";

/// An OCI layout and the image in it that is meant.
#[derive(Debug)]
pub(crate) struct Layout {
    files: Files,
    /// The entries of `index.json` that are meant.
    entries: Vec<Descriptor>,
}

/// Where a layout's files lie.
#[derive(Debug)]
enum Files {
    Directory(PathBuf),
    Archive(Archive),
}

impl Files {
    /// The directory or the archive.
    fn path(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Archive(archive) => archive.path(),
        }
    }

    /// Opens one; with its size in bytes.
    fn open(&self, name: &str) -> Result<(Box<dyn Read + Send>, u64), ImageError> {
        match self {
            Self::Directory(directory) => {
                let (file, size) = open_file(&directory.join(name))?;
                Ok((Box::new(file), size))
            }
            Self::Archive(archive) => {
                let (section, size) = archive.open_file(name)?;
                Ok((Box::new(section), size))
            }
        }
    }

    /// Reads a small one.
    fn read(&self, name: &str, most: u64) -> Result<Vec<u8>, ImageError> {
        let (file, size) = self.open(name)?;
        let path = self.path().join(name);
        limit(&path.display().to_string(), size, most)?;
        let mut bytes = Vec::new();
        file.take(most)
            .read_to_end(&mut bytes)
            .map_err(|error| ImageError::Io { path, error })?;
        Ok(bytes)
    }
}

impl Layout {
    pub fn open_directory(reference: &OciReference) -> Result<Self, ImageError> {
        let files = Files::Directory(reference.directory.clone());
        Self::open(files, reference.tag.as_deref())
    }

    pub fn open_archive(reference: &ArchiveReference) -> Result<Self, ImageError> {
        let files = Files::Archive(Archive::open(&reference.file)?);
        Self::open(files, reference.name.as_deref())
    }

    fn open(files: Files, tag: Option<&str>) -> Result<Self, ImageError> {
        let wrong = |why: String| ImageError::Layout {
            directory: files.path().to_owned(),
            why,
        };
        let read = |name: &str| {
            files.read(name, MAX_MANIFEST).map_err(|error| match error {
                ImageError::Io { error, .. } => wrong(format!("{name}: {error}")),
                ImageError::Archive { why, .. } => wrong(why),
                other => other,
            })
        };
        let layout: OciLayout = serde_json::from_slice(&read("oci-layout")?)
            .map_err(|error| wrong(format!("oci-layout: {error}")))?;
        let version = layout.image_layout_version();
        if !version.starts_with("1.") {
            return Err(wrong(format!("it has version {version:?}, not 1")));
        }
        let index: ImageIndex = serde_json::from_slice(&read("index.json")?)
            .map_err(|error| wrong(format!("index.json: {error}")))?;
        Ok(Self {
            entries: choose(files.path(), tag, index.manifests())?,
            files,
        })
    }

    fn blob_name(pointer: &Pointer) -> String {
        format!("blobs/sha256/{}", pointer.digest.hex())
    }
}

/// The entries with the tag; without a tag, the only entry there is.
fn choose(
    path: &Path,
    wanted: Option<&str>,
    entries: &[Descriptor],
) -> Result<Vec<Descriptor>, ImageError> {
    let path = || path.to_owned();
    let tag = |entry: &Descriptor| entry.annotations().as_ref()?.get(TAG).cloned();
    let known = || entries.iter().filter_map(tag).collect();
    match wanted {
        Some(wanted) => {
            let tagged = entries.iter().filter(|e| tag(e).as_deref() == Some(wanted));
            let tagged: Vec<_> = tagged.cloned().collect();
            if tagged.is_empty() {
                return Err(ImageError::NoTag {
                    path: path(),
                    tag: wanted.to_owned(),
                    known: known(),
                });
            }
            Ok(tagged)
        }
        None => {
            let images: Vec<_> = entries.iter().filter(|e| !is_attestation(e)).collect();
            let [only] = images.as_slice() else {
                return Err(ImageError::Ambiguous {
                    path: path(),
                    images: images.len(),
                    known: known(),
                });
            };
            Ok(vec![(*only).clone()])
        }
    }
}

impl Origin for Layout {
    fn start(&self) -> Result<Start, ImageError> {
        Ok(Start::Entries(self.entries.clone()))
    }

    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError> {
        self.files.read(&Self::blob_name(pointer), MAX_MANIFEST)
    }

    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError> {
        let name = Self::blob_name(pointer);
        let (file, size) = self.files.open(&name)?;
        if size != pointer.size {
            let path = self.files.path().join(name);
            return Err(ImageError::Size {
                what: format!("{what} ({})", path.display()),
                expected: pointer.size,
                found: size,
            });
        }
        Ok(file)
    }
}

fn open_file(path: &Path) -> Result<(File, u64), ImageError> {
    let error = |error| ImageError::Io {
        path: path.to_owned(),
        error,
    };
    // Look before opening: a FIFO would block.
    let metadata = std::fs::metadata(path).map_err(error)?;
    if !metadata.is_file() {
        let kind = io::ErrorKind::InvalidInput;
        return Err(error(io::Error::new(kind, "it is not a regular file")));
    }
    Ok((File::open(path).map_err(error)?, metadata.len()))
}
