//! Images whose every byte is known: made from a seed, converted by `mkfs-accel`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::fixture;
use crate::random::Random;

/// Small files of each image; large ones take the rest.
const SMALL: u64 = 24;
const SMALL_LIMIT: u64 = 24 << 10;
const LARGE_LIMIT: u64 = 4 << 20;

/// A file whose content follows from its seed.
#[derive(Debug, Clone)]
pub struct Known {
    /// Path in the image.
    pub name: String,
    /// In bytes.
    pub size: u64,
    seed: u64,
}

impl Known {
    /// Bytes from `offset` on, as many as `buffer` holds.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let word = Random::new(self.seed.wrapping_add(at / 8)).next_u64();
            let bytes = &word.to_le_bytes()[usize::try_from(at % 8).unwrap_or(0)..];
            let len = bytes.len().min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&bytes[..len]);
            at += len as u64;
            rest = later;
        }
    }
}

/// A converted image of one layer.
#[derive(Debug)]
pub struct Made {
    /// Digest of its manifest, which names it.
    pub digest: String,
    /// What is in it.
    pub files: Vec<Known>,
    /// The layer's EROFS image and index, relative to UFS.
    pub published: [PathBuf; 2],
    /// What both have to be.
    pub bytes: [Vec<u8>; 2],
}

impl Made {
    /// The EROFS image.
    pub fn image(&self) -> &[u8] {
        &self.bytes[0]
    }
}

/// Makes the image `number` of about `size` bytes and converts it to `ufs`.
///
/// # Errors
/// When `mkfs-accel` fails.
pub fn make(
    mkfs: &Path,
    ufs: &Path,
    scratch: &Path,
    seed: u64,
    number: u64,
    size: u64,
) -> Result<Made> {
    let files = plan(seed, number, size);
    let layout = scratch.join(format!("layout-{number}"));
    let digest = write_layout(&layout, |tar| write_tar(tar, &files))?;
    convert(mkfs, ufs, &layout, digest, files)
}

/// Makes an image that has the bytes of `file` as `it`, and converts it to `ufs`.
///
/// # Errors
/// When `mkfs-accel` fails.
pub fn make_of(mkfs: &Path, ufs: &Path, scratch: &Path, file: &Path) -> Result<Made> {
    let layout = scratch.join("layout-of-file");
    let digest = write_layout(&layout, |tar| {
        let mut out = Hashed::create(tar)?;
        let bytes = fs::read(file)?;
        out.put(&header("it", bytes.len() as u64, b'0'))?;
        out.put(&bytes)?;
        out.pad(bytes.len() as u64)?;
        out.end()
    })?;
    convert(mkfs, ufs, &layout, digest, Vec::new())
}

/// Converts what is in `layout`, and removes that.
fn convert(
    mkfs: &Path,
    ufs: &Path,
    layout: &Path,
    digest: String,
    files: Vec<Known>,
) -> Result<Made> {
    let source = format!("oci:{}:it", layout.display());
    let converted = Command::new(mkfs)
        .args(["convert", &source, "--ufs"])
        .arg(ufs)
        .stdin(Stdio::null())
        .output()
        .context("running mkfs-accel")?;
    ensure!(
        converted.status.success(),
        "mkfs-accel convert failed: {}",
        String::from_utf8_lossy(&converted.stderr)
    );
    fs::remove_dir_all(layout)?;
    let layer = fixture::layers(ufs, &digest)?
        .pop()
        .context("an image without layers")?;
    let beneath = |path: &Path| path.strip_prefix(ufs).map(Path::to_owned);
    Ok(Made {
        digest,
        files,
        published: [beneath(&layer.erofs)?, beneath(&layer.index)?],
        bytes: [fs::read(&layer.erofs)?, fs::read(&layer.index)?],
    })
}

fn plan(seed: u64, number: u64, size: u64) -> Vec<Known> {
    let mut random = Random::new(seed ^ (number + 1).wrapping_mul(0x5851_f42d_4c95_7f2d));
    let mut files: Vec<Known> = Vec::new();
    let mut left = size;
    while left > 0 {
        let limit = match files.len() as u64 {
            0..SMALL => SMALL_LIMIT,
            _ => LARGE_LIMIT,
        };
        let size = (1 + random.below(limit)).min(left);
        files.push(Known {
            name: format!("d{}/f{}", files.len() % 7, files.len()),
            size,
            seed: random.next_u64(),
        });
        left -= size;
    }
    files
}

/// Writes the image as an OCI layout, tag `it`; the digest of its manifest.
///
/// # Errors
/// When it cannot be written.
pub fn write_image(layout: &Path, seed: u64, number: u64, size: u64) -> Result<String> {
    write_layout(layout, |tar| write_tar(tar, &plan(seed, number, size)))
}

/// Writes an OCI layout of one plain layer; the digest of its manifest. `tar` writes that,
/// and gives its SHA-256 and size.
fn write_layout(layout: &Path, tar: impl FnOnce(&Path) -> Result<(String, u64)>) -> Result<String> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )?;
    let unnamed = blobs.join("layer");
    let (diff_id, size) = tar(&unnamed)?;
    fs::rename(&unnamed, blobs.join(&diff_id))?;
    let config = serde_json::json!({
        "os": "linux", "architecture": "amd64", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    });
    let (config, config_size) = blob(&blobs, &config)?;
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config, "size": config_size,
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{diff_id}"), "size": size,
        }],
    });
    let (digest, size) = blob(&blobs, &manifest)?;
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest, "size": size,
            "annotations": {"org.opencontainers.image.ref.name": "it"},
        }],
    });
    fs::write(layout.join("index.json"), index.to_string())?;
    Ok(digest)
}

fn blob(blobs: &Path, json: &serde_json::Value) -> Result<(String, usize)> {
    let text = json.to_string();
    let hex = hex(&Sha256::digest(&text));
    fs::write(blobs.join(&hex), &text)?;
    Ok((format!("sha256:{hex}"), text.len()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes and counts what passes.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl Hashed<BufWriter<File>> {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            inner: BufWriter::new(File::create(path)?),
            hash: Sha256::new(),
            size: 0,
        })
    }
}

impl<W: Write> Hashed<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write_all(bytes)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// To the next whole block after the content of a file.
    fn pad(&mut self, size: u64) -> Result<()> {
        let padding = usize::try_from(size.next_multiple_of(512) - size)?;
        self.put(&[0; 512][..padding])
    }

    /// The end of a tar; its SHA-256 and size.
    fn end(mut self) -> Result<(String, u64)> {
        self.put(&[0; 1024])?;
        self.inner.flush()?;
        Ok((hex(&self.hash.finalize()), self.size))
    }
}

/// A tar of the files; its SHA-256 and size.
fn write_tar(path: &Path, files: &[Known]) -> Result<(String, u64)> {
    let mut out = Hashed::create(path)?;
    for directory in 0..7 {
        out.put(&header(&format!("d{directory}/"), 0, b'5'))?;
    }
    let mut buffer = vec![0; 128 << 10];
    for file in files {
        out.put(&header(&file.name, file.size, b'0'))?;
        let mut at = 0;
        while at < file.size {
            let len = usize::try_from(file.size - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            file.fill(at, &mut buffer[..len]);
            out.put(&buffer[..len])?;
            at += len as u64;
        }
        out.pad(file.size)?;
    }
    out.end()
}

/// A ustar header.
fn header(name: &str, size: u64, kind: u8) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, name);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "14700000000");
    put(148, "        ");
    put(257, "ustar\0");
    put(263, "00");
    block[156] = kind;
    let sum: u32 = block.iter().copied().map(u32::from).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_the_same_wherever_reading_begins() {
        let file = Known {
            name: "f".to_owned(),
            size: 100,
            seed: 7,
        };
        let mut whole = [0; 100];
        file.fill(0, &mut whole);
        for offset in 0..50 {
            let mut part = [0; 37];
            file.fill(offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + 37]);
        }
        assert!(whole.windows(8).all(|window| window != [0; 8]));
    }
}
