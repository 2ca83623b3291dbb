//! From what a user calls an image to its record.

use crate::error::UfsError;
use crate::names;
use crate::publish::Ufs;
use crate::record::{ImageRecord, NameRecord, RecordError};
use accel_oci::{Digest, ImageSource, SourceError};
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// What a user calls a converted image: the source it was converted from, or
/// a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// The digest of its manifest, or of an index through which it was converted;
    /// of those the last conversion counts.
    Manifest(Digest),
    /// Where it came from; the last conversion counts.
    Source(ImageSource),
}

impl FromStr for ImageName {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        match text.parse() {
            Ok(digest) => Ok(Self::Manifest(digest)),
            Err(_) => text.parse().map(Self::Source),
        }
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Manifest(digest) => digest.fmt(f),
            Self::Source(source) => source.fmt(f),
        }
    }
}

/// The canonical form of a source, under which it is remembered: the directory
/// of an OCI layout, or the file of an archive, by its real path, so that it means
/// the same from every working directory.
///
/// What is gone keeps its absolute path: what was converted from it can still be
/// named.
pub fn canonical(source: &ImageSource) -> Result<ImageSource, UfsError> {
    let mut canonical = source.clone();
    let path = match &mut canonical {
        ImageSource::Registry(_) => return Ok(canonical),
        ImageSource::Oci(reference) => &mut reference.directory,
        ImageSource::OciArchive(reference) | ImageSource::DockerArchive(reference) => {
            &mut reference.file
        }
    };
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::path::absolute(&path).map_err(UfsError::io("find", path))?
        }
        Err(error) => return Err(UfsError::io("find", path)(error)),
    };
    check_path(&real)?;
    *path = real;
    Ok(canonical)
}

/// The path must survive being written as `oci:DIR` and read again.
fn check_path(path: &Path) -> Result<(), UfsError> {
    let wrong = |why| {
        let path = path.to_owned();
        Err(UfsError::SourcePath { path, why })
    };
    match path.to_str() {
        None => wrong("its path is not UTF-8"),
        Some(text) if text.contains(':') => wrong("a colon in the path would begin the tag"),
        Some(_) => Ok(()),
    }
}

impl Ufs {
    /// The record of the image that `name` means.
    pub fn resolve(&self, name: &ImageName) -> Result<ImageRecord, UfsError> {
        let manifest = match name {
            ImageName::Manifest(digest) => match self.image_record(digest)? {
                Some(record) => return Ok(record),
                None => self.manifest_of(digest)?,
            },
            ImageName::Source(source) => self.manifest_of(&canonical(source)?)?,
        };
        match manifest {
            Some(manifest) => self.image_record(&manifest)?,
            None => None,
        }
        .ok_or_else(|| self.not_converted(name))
    }

    /// The record of the image with this manifest digest, if there is one.
    pub fn image_record(&self, manifest: &Digest) -> Result<Option<ImageRecord>, UfsError> {
        let name = names::image_record(manifest);
        let Some(json) = self.read_record(&name)? else {
            return Ok(None);
        };
        let wrong = |error| UfsError::Record {
            path: self.path(&name),
            error,
        };
        let record = ImageRecord::parse(&json).map_err(wrong)?;
        if record.manifest != *manifest {
            return Err(wrong(RecordError::Misplaced {
                wanted: manifest.to_string(),
                found: record.manifest.to_string(),
            }));
        }
        Ok(Some(record))
    }

    /// The manifest digests of all images.
    pub fn images(&self) -> Result<Vec<Digest>, UfsError> {
        let Ok(directory) = format!("{}/sha256", names::IMAGES).parse() else {
            return Ok(Vec::new());
        };
        let files = self.list(&directory)?;
        let digest = |file: &String| {
            let hex = file.strip_suffix(".json")?;
            format!("sha256:{hex}").parse().ok()
        };
        let mut digests: Vec<_> = files.iter().filter_map(digest).collect();
        digests.sort();
        Ok(digests)
    }

    /// What `source` (as for [`names::name_directory`]) pointed to when it was last
    /// converted, if it ever was.
    pub fn manifest_of(&self, source: &dyn Display) -> Result<Option<Digest>, UfsError> {
        let Some(latest) = self.latest_name(source)? else {
            return Ok(None);
        };
        let name = names::name_record(source, latest);
        let Some(json) = self.read_record(&name)? else {
            return Ok(None);
        };
        let wrong = |error| UfsError::Record {
            path: self.path(&name),
            error,
        };
        let record = NameRecord::parse(&json).map_err(wrong)?;
        if record.source != source.to_string() {
            return Err(wrong(RecordError::Misplaced {
                wanted: source.to_string(),
                found: record.source,
            }));
        }
        Ok(Some(record.manifest))
    }

    fn not_converted(&self, name: &ImageName) -> UfsError {
        UfsError::NotConverted {
            image: name.to_string(),
            ufs: self.root().to_owned(),
        }
    }
}
