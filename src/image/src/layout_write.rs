//! Writing into an OCI layout directory (image specification, "Image Layout").
//!
//! Files get their names when they are complete. The index is last, so that it never
//! names what is not there.

use crate::ImageError;
use crate::accelerated::Document;
use crate::image::{MAX_MANIFEST, limit};
use crate::layout::TAG;
use accel_oci::{Digest, OciReference};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// A layout that is written to.
#[derive(Debug)]
pub(crate) struct LayoutWriter {
    directory: PathBuf,
    tag: Option<String>,
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |error| ImageError::Write { path, error }
}

impl LayoutWriter {
    /// Makes the layout unless it is there.
    pub fn open(reference: &OciReference) -> Result<Self, ImageError> {
        let opened = Self {
            directory: reference.directory.clone(),
            tag: reference.tag.clone(),
        };
        let blobs = opened.directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(write_error(&blobs))?;
        let version = opened.directory.join("oci-layout");
        if !version.exists() {
            opened.put("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        opened.index()?;
        Ok(opened)
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.directory.join("blobs/sha256").join(digest.hex())
    }

    /// Whether there is a blob of that name and size.
    pub fn has_blob(&self, digest: Digest, size: u64) -> bool {
        fs::metadata(self.blob(digest)).is_ok_and(|found| found.len() == size)
    }

    /// Copies a blob, if its bytes are those of the digest.
    pub fn write_blob(&self, digest: Digest, from: &mut dyn Read) -> Result<(), ImageError> {
        let path = self.blob(digest);
        let unfinished = path.with_extension("unfinished");
        let copied = copy(from, &unfinished).map_err(write_error(&unfinished));
        let found = copied.inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
        if found != digest {
            let _ = fs::remove_file(&unfinished);
            return Err(ImageError::Digest {
                what: format!("the blob {digest}"),
                expected: digest,
                found,
            });
        }
        fs::rename(&unfinished, &path).map_err(write_error(&path))
    }

    /// Writes a manifest or index and names it in the layout's index, in place of what
    /// has the same tag.
    pub fn write_document(&self, document: &Document) -> Result<(), ImageError> {
        self.write_blob(document.digest, &mut &*document.json)?;
        let mut entry = Value::Object(document.descriptor());
        if let Some(tag) = &self.tag {
            entry["annotations"] = json!({ TAG: tag });
        }
        let mut index = self.index()?;
        let tag_of = |entry: &Value| entry["annotations"][TAG].as_str().map(str::to_owned);
        if let Some(entries) = index["manifests"].as_array_mut() {
            entries.retain(|old| tag_of(old) != self.tag);
            entries.push(entry);
        }
        self.put("index.json", index.to_string().as_bytes())
    }

    fn index(&self) -> Result<Value, ImageError> {
        let path = self.directory.join("index.json");
        let wrong = |why: String| ImageError::Layout {
            directory: self.directory.clone(),
            why: format!("index.json: {why}"),
        };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(json!({"schemaVersion": 2, "manifests": []}));
            }
            Err(error) => return Err(wrong(error.to_string())),
        };
        limit("index.json", text.len() as u64, MAX_MANIFEST)?;
        let index: Value =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if !index["manifests"].is_array() {
            return Err(wrong("it has no list of manifests".to_owned()));
        }
        Ok(index)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.directory.join(name);
        let unfinished = self.directory.join(format!("{name}.unfinished"));
        let written = copy(&mut &*bytes, &unfinished).and_then(|_| fs::rename(&unfinished, &path));
        written.map_err(write_error(&path))
    }
}

fn copy(from: &mut dyn Read, to: &Path) -> io::Result<Digest> {
    let mut file = File::create(to)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&buffer[..read]);
        file.write_all(&buffer[..read])?;
    }
    file.sync_all()?;
    Ok(Digest::from_bytes(hash.finalize().into()))
}
