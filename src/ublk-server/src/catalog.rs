//! From what an operator calls an image to its record, read through the source.

use accel_oci::Digest;
use accel_source::{FileName, Patience, Pool, Source, SourceError, list, read_file};
use accel_ufs::UfsError;
use accel_ufs::names::{self, Nanoseconds};
use accel_ufs::record::{ImageRecord, MAX_RECORD, NameRecord, RecordError};
use accel_ufs::resolve::ImageName;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// It is not there, or its record is wrong.
    #[error(transparent)]
    Ufs(#[from] UfsError),
    /// UFS does not answer.
    #[error("cannot look the image up: {0}")]
    Source(#[from] SourceError),
}

/// Looks images up on one UFS.
#[derive(Debug)]
pub struct Catalog<'a, S: Source + ?Sized> {
    /// Where to read.
    pub source: &'a S,
    /// Memory to read into.
    pub pool: &'a Arc<Pool>,
    /// What the UFS directory is called, for messages.
    pub ufs: &'a Path,
}

impl Catalog<'_, dyn Source> {
    /// The record of the image that `name` (canonical) means.
    pub fn find(&self, name: &ImageName) -> Result<ImageRecord, CatalogError> {
        let not_converted = || UfsError::NotConverted {
            image: name.to_string(),
            ufs: self.ufs.to_owned(),
        };
        let manifest = match name {
            ImageName::Manifest(digest) => Some(*digest),
            ImageName::Source(source) => self.latest(source)?,
        };
        let manifest = manifest.ok_or_else(not_converted)?;
        let file = names::image_record(&manifest);
        let json = self.read(file.as_str())?.ok_or_else(not_converted)?;
        let record = ImageRecord::parse(&json).map_err(|source| self.wrong(&file, source))?;
        if record.manifest != manifest {
            let source = RecordError::Misplaced {
                wanted: manifest.to_string(),
                found: record.manifest.to_string(),
            };
            return Err(self.wrong(&file, source).into());
        }
        Ok(record)
    }

    /// What `source` pointed to when it was last converted.
    fn latest(&self, source: &accel_oci::ImageSource) -> Result<Option<Digest>, CatalogError> {
        let directory = names::name_directory(source);
        let directory = FileName::new(directory.as_str());
        let files = match list(self.source, self.pool, &directory, Patience::LOOKUP) {
            Ok(files) => files,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let newest = files
            .iter()
            .find_map(|file| Nanoseconds::from_file_name(file));
        let Some(newest) = newest else {
            return Ok(None);
        };
        let file = names::name_record(source, newest);
        let Some(json) = self.read(file.as_str())? else {
            return Ok(None);
        };
        let record = NameRecord::parse(&json).map_err(|source| self.wrong(&file, source))?;
        if record.source != source.to_string() {
            let misplaced = RecordError::Misplaced {
                wanted: source.to_string(),
                found: record.source,
            };
            return Err(self.wrong(&file, misplaced).into());
        }
        Ok(Some(record.manifest))
    }

    fn read(&self, file: &str) -> Result<Option<Vec<u8>>, CatalogError> {
        let file = FileName::new(file);
        let limit = MAX_RECORD + 1;
        match read_file(self.source, self.pool, &file, limit, Patience::LOOKUP) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn wrong(&self, file: &names::RelPath, source: RecordError) -> UfsError {
        let path: PathBuf = file.beneath(self.ufs);
        UfsError::Record { path, error: source }
    }
}
