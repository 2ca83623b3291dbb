//! Images in an OCI layout directory (image specification, "Image Layout").

use crate::ImageError;
use crate::image::{MAX_MANIFEST, Origin, Start, limit};
use crate::manifest::{Pointer, is_attestation};
use accel_oci::OciReference;
use oci_spec::image::{Descriptor, ImageIndex, OciLayout};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const TAG: &str = "org.opencontainers.image.ref.name";

/// An OCI layout and the image in it that is meant.
#[derive(Debug)]
pub(crate) struct LayoutDirectory {
    directory: PathBuf,
    /// The entries of `index.json` that are meant.
    entries: Vec<Descriptor>,
}

impl LayoutDirectory {
    pub fn open(reference: &OciReference) -> Result<Self, ImageError> {
        let directory = reference.directory.clone();
        let wrong = |why: String| ImageError::Layout {
            directory: directory.clone(),
            why,
        };
        let read = |name: &str| {
            let path = directory.join(name);
            read_file(&path, MAX_MANIFEST).map_err(|error| match error {
                ImageError::Io { error, .. } => wrong(format!("{name}: {error}")),
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
            entries: choose(reference, index.manifests())?,
            directory: directory.clone(),
        })
    }

    fn blob_path(&self, pointer: &Pointer) -> PathBuf {
        let blobs = self.directory.join("blobs/sha256");
        blobs.join(pointer.digest.hex())
    }
}

/// The entries with the tag; without a tag, the only entry there is.
fn choose(reference: &OciReference, entries: &[Descriptor]) -> Result<Vec<Descriptor>, ImageError> {
    let directory = || reference.directory.clone();
    let tag = |entry: &Descriptor| entry.annotations().as_ref()?.get(TAG).cloned();
    let known = || entries.iter().filter_map(tag).collect();
    match &reference.tag {
        Some(wanted) => {
            let tagged = entries.iter().filter(|e| tag(e).as_ref() == Some(wanted));
            let tagged: Vec<_> = tagged.cloned().collect();
            if tagged.is_empty() {
                return Err(ImageError::NoTag {
                    directory: directory(),
                    tag: wanted.clone(),
                    known: known(),
                });
            }
            Ok(tagged)
        }
        None => {
            let images: Vec<_> = entries.iter().filter(|e| !is_attestation(e)).collect();
            let [only] = images.as_slice() else {
                return Err(ImageError::Ambiguous {
                    directory: directory(),
                    images: images.len(),
                    known: known(),
                });
            };
            Ok(vec![(*only).clone()])
        }
    }
}

impl Origin for LayoutDirectory {
    fn start(&self) -> Result<Start, ImageError> {
        Ok(Start::Entries(self.entries.clone()))
    }

    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError> {
        read_file(&self.blob_path(pointer), MAX_MANIFEST)
    }

    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError> {
        let path = self.blob_path(pointer);
        let (file, size) = open_file(&path)?;
        if size != pointer.size {
            return Err(ImageError::Size {
                what: format!("{what} ({})", path.display()),
                expected: pointer.size,
                found: size,
            });
        }
        Ok(Box::new(file))
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

fn read_file(path: &Path, most: u64) -> Result<Vec<u8>, ImageError> {
    let (file, size) = open_file(path)?;
    limit(&path.display().to_string(), size, most)?;
    let mut bytes = Vec::new();
    file.take(most)
        .read_to_end(&mut bytes)
        .map_err(|error| ImageError::Io {
            path: path.to_owned(),
            error,
        })?;
    Ok(bytes)
}
