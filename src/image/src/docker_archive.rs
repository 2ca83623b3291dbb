//! Images in what `docker save` writes (containers-transports(5), `docker-archive:`).
//!
//! `manifest.json` at the top lists the images: the path of each one's config, and of
//! its layers, lowest first. Old versions have a layer in `<id>/layer.tar`, which may
//! be a link to another's; new ones have it in `blobs/sha256/`, and other files beside
//! that are not needed. Layers are plain tars; a compressed one is taken too.
//!
//! There is no manifest that a registry would know. One is made here, always the same
//! for the same config and layers, so that the image has a name.

use crate::ImageError;
use crate::archive::Archive;
use crate::config::Config;
use crate::image::{MAX_CONFIG, MAX_MANIFEST, Origin, Start, limit};
use crate::manifest::Pointer;
use accel_oci::{ArchiveReference, Digest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::io::{self, Read};

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const PLAIN: &str = "application/vnd.docker.image.rootfs.diff.tar";
const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// An image of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// The manifest that is made, with its fields in this order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Made {
    schema_version: u32,
    media_type: &'static str,
    config: MadeDescriptor,
    layers: Vec<MadeDescriptor>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct MadeDescriptor {
    media_type: &'static str,
    size: u64,
    digest: Digest,
}

/// An archive and the image in it that is meant.
#[derive(Debug)]
pub(crate) struct DockerArchive {
    archive: Archive,
    manifest: Vec<u8>,
    /// Where config and layers lie.
    paths: HashMap<Digest, String>,
}

impl DockerArchive {
    pub fn open(reference: &ArchiveReference) -> Result<Self, ImageError> {
        let archive = Archive::open(&reference.file)?;
        let wrong = |why: String| ImageError::Archive {
            path: reference.file.clone(),
            why,
        };
        let items: Vec<Item> =
            serde_json::from_slice(&read(&archive, "manifest.json", MAX_MANIFEST)?)
                .map_err(|error| wrong(format!("its manifest.json is none: {error}")))?;
        let item = choose(reference, &items)?;
        let json = read(&archive, &item.config, MAX_CONFIG)?;
        let what = format!("the config {} in {}", item.config, reference.file.display());
        let config = Config::parse(&what, &json)?;
        if config.diff_ids.len() != item.layers.len() {
            return Err(wrong(format!(
                "its manifest.json names {} layers, the config {} has {} diffIDs",
                item.layers.len(),
                item.config,
                config.diff_ids.len(),
            )));
        }
        let mut paths = HashMap::new();
        let mut layers = Vec::new();
        for (path, diff_id) in item.layers.iter().zip(&config.diff_ids) {
            let (digest, media_type, size) = look(&archive, path, diff_id.0)?;
            paths.insert(digest, path.clone());
            layers.push(MadeDescriptor {
                media_type,
                size,
                digest,
            });
        }
        let digest = Digest::of(&json);
        paths.insert(digest, item.config.clone());
        let made = Made {
            schema_version: 2,
            media_type: MANIFEST,
            config: MadeDescriptor {
                media_type: CONFIG,
                size: json.len() as u64,
                digest,
            },
            layers,
        };
        Ok(Self {
            manifest: serde_json::to_vec(&made).map_err(|error| wrong(error.to_string()))?,
            archive,
            paths,
        })
    }
}

/// Digest, media type and size of a layer. A plain tar's digest is its diffID, which
/// is checked when it is read.
fn look(
    archive: &Archive,
    path: &str,
    diff_id: Digest,
) -> Result<(Digest, &'static str, u64), ImageError> {
    let (mut section, size) = archive.open_file(path)?;
    let io = |error| ImageError::Io {
        path: archive.path().join(path),
        error,
    };
    let mut hasher = Sha256::new();
    let mut start = Vec::new();
    (&mut section).take(4).read_to_end(&mut start).map_err(io)?;
    let media_type = match start.as_slice() {
        [0x1f, 0x8b, ..] => GZIP,
        [0x28, 0xb5, 0x2f, 0xfd] => ZSTD,
        _ => return Ok((diff_id, PLAIN, size)),
    };
    hasher.update(&start);
    io::copy(&mut section, &mut hasher).map_err(io)?;
    Ok((
        Digest::from_bytes(hasher.finalize().into()),
        media_type,
        size,
    ))
}

/// The image that is meant: by its tag, its place (`@0`), or the only one.
fn choose<'a>(reference: &ArchiveReference, items: &'a [Item]) -> Result<&'a Item, ImageError> {
    let tags = items
        .iter()
        .flat_map(|item| item.repo_tags.iter().flatten());
    let known = || tags.clone().cloned().collect();
    let path = || reference.file.clone();
    let Some(wanted) = &reference.name else {
        return match items {
            [only] => Ok(only),
            _ => Err(ImageError::Ambiguous {
                path: path(),
                images: items.len(),
                known: known(),
            }),
        };
    };
    let full = full_name(wanted);
    let has = |item: &&Item| {
        let mut tags = item.repo_tags.iter().flatten();
        tags.any(|tag| full_name(tag) == full)
    };
    let found = match wanted.strip_prefix('@') {
        Some(place) => place.parse().ok().and_then(|place: usize| items.get(place)),
        None => items.iter().find(has),
    };
    found.ok_or_else(|| ImageError::NoTag {
        path: path(),
        tag: wanted.clone(),
        known: known(),
    })
}

/// A reference with all that docker leaves out of it.
fn full_name(name: &str) -> String {
    let is_host = |host: &str| host.contains(['.', ':']) || host == "localhost";
    let name = match name.split_once('/') {
        Some((host, _)) if is_host(host) => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    };
    let last = name.rsplit('/').next().unwrap_or_default();
    match last.contains(':') {
        true => name,
        false => format!("{name}:latest"),
    }
}

fn read(archive: &Archive, name: &str, most: u64) -> Result<Vec<u8>, ImageError> {
    let (section, size) = archive.open_file(name)?;
    let what = format!("{name} in {}", archive.path().display());
    limit(&what, size, most)?;
    let mut bytes = Vec::new();
    section
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(|error| ImageError::Io {
            path: archive.path().to_owned(),
            error,
        })?;
    Ok(bytes)
}

impl Origin for DockerArchive {
    fn start(&self) -> Result<Start, ImageError> {
        Ok(Start::Document {
            json: self.manifest.clone(),
            expected: None,
        })
    }

    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError> {
        // Only an index leads to one, and there is none.
        Err(ImageError::Archive {
            path: self.archive.path().to_owned(),
            why: format!("it has no manifest {}", pointer.digest),
        })
    }

    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError> {
        let path = self.paths.get(&pointer.digest);
        let path = path.ok_or_else(|| ImageError::Archive {
            path: self.archive.path().to_owned(),
            why: format!("it does not have {what}"),
        })?;
        Ok(Box::new(self.archive.open_file(path)?.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_compared_in_full() {
        for (short, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("team/app:v1", "docker.io/team/app:v1"),
            ("localhost/a", "localhost/a:latest"),
            ("h:5000/a/b:v1", "h:5000/a/b:v1"),
        ] {
            assert_eq!(full_name(short), full);
            assert_eq!(full_name(full), full);
        }
    }
}
