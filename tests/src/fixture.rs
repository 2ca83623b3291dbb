//! What `tests/fixtures` left behind:
//!
//! ```text
//! ufs/                     a UFS directory with all images converted
//! images/NAME/source       the SOURCE that was converted, e.g. oci:/tmp/x/tiny:sample
//! images/NAME/digest       its manifest digest, sha256:<hex>
//! images/NAME/tree         manifest of an ordinary unpack (see the module tree)
//! images/NAME/program      a command for /bin/sh in the image
//! images/NAME/output       what it printed in the ordinary unpack
//! large/source, digest     an image with a layer of 7 GiB, which is only converted
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::Setting;

/// An image that was converted, and what it is known to be.
#[derive(Debug, Clone)]
pub struct Image {
    /// Directory name below `images/`.
    pub name: String,
    /// SOURCE as it was given to `mkfs-accel convert`.
    pub source: String,
    /// `sha256:<hex>` of the manifest.
    pub digest: String,
    /// Command for `/bin/sh -c`.
    pub program: String,
    directory: PathBuf,
}

impl Image {
    /// Manifest of the ordinary unpack.
    ///
    /// # Errors
    /// When the fixture is incomplete.
    pub fn tree(&self) -> Result<Vec<String>> {
        Ok(self.text("tree")?.lines().map(String::from).collect())
    }

    /// What the program printed in the ordinary unpack.
    ///
    /// # Errors
    /// When the fixture is incomplete.
    pub fn output(&self) -> Result<String> {
        self.text("output")
    }

    fn text(&self, name: &str) -> Result<String> {
        text(&self.directory.join(name))
    }
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading the fixture {}", path.display()))
}

/// All images, by name.
///
/// # Errors
/// When the fixtures are missing or incomplete.
pub fn images(setting: &Setting) -> Result<Vec<Image>> {
    let parent = setting.fixtures.join("images");
    let mut images = Vec::new();
    for entry in fs::read_dir(&parent).with_context(|| {
        format!(
            "no fixtures in {}; tests/fixtures makes them",
            parent.display()
        )
    })? {
        let directory = entry?.path();
        let line = |name: &str| -> Result<String> {
            Ok(text(&directory.join(name))?.trim_end().to_owned())
        };
        images.push(Image {
            name: directory
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            source: line("source")?,
            digest: line("digest")?,
            program: line("program")?,
            directory,
        });
    }
    ensure!(!images.is_empty(), "no images in {}", parent.display());
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

/// The image of that name.
///
/// # Errors
/// When there is none.
pub fn image(setting: &Setting, name: &str) -> Result<Image> {
    images(setting)?
        .into_iter()
        .find(|image| image.name == name)
        .with_context(|| format!("no image {name} in {}", setting.fixtures.display()))
}

/// The digest of the image with a layer of 7 GiB.
///
/// # Errors
/// When the fixture is missing.
pub fn large(setting: &Setting) -> Result<String> {
    let digest = text(&setting.fixtures.join("large/digest"))?;
    Ok(digest.trim_end().to_owned())
}

/// A layer as published on UFS.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its diffID.
    pub diff_id: String,
    /// The EROFS image.
    pub erofs: PathBuf,
    /// Its chunk index.
    pub index: PathBuf,
}

/// The layers that the image's record on `ufs` names, lowest first.
///
/// # Errors
/// When the record is missing or does not say.
pub fn layers(ufs: &Path, digest: &str) -> Result<Vec<Layer>> {
    let record = record(ufs, digest)?;
    let layers = record["layers"]
        .as_array()
        .context("the image record has no layers")?;
    layers
        .iter()
        .map(|layer| {
            let erofs = ufs.join(
                layer["erofs"]["path"]
                    .as_str()
                    .context("no erofs.path in the image record")?,
            );
            Ok(Layer {
                diff_id: layer["diff_id"]
                    .as_str()
                    .context("no diff_id in the image record")?
                    .to_owned(),
                index: erofs.with_extension("idx"),
                erofs,
            })
        })
        .collect()
}

/// The image's record on `ufs`.
///
/// # Errors
/// When it is missing or no JSON.
pub fn record(ufs: &Path, digest: &str) -> Result<serde_json::Value> {
    let path = record_path(ufs, digest);
    serde_json::from_str(&text(&path)?).with_context(|| format!("parsing {}", path.display()))
}

fn record_path(ufs: &Path, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    ufs.join("images/sha256").join(hex).with_extension("json")
}

/// Where the image's start file is on `ufs`: what mounting it reads of its layers.
pub fn start_path(ufs: &Path, digest: &str) -> PathBuf {
    record_path(ufs, digest).with_extension("start")
}

/// A UFS directory of its own in `to`, with this image alone, for a check that damages
/// it. It is an ordinary copy: nothing is shared with the fixtures.
///
/// # Errors
/// When something cannot be copied.
pub fn private_ufs(setting: &Setting, image: &Image, to: &Path) -> Result<()> {
    let from = setting.ufs();
    let copy = |path: &Path| -> Result<()> {
        let target = to.join(path.strip_prefix(&from)?);
        fs::create_dir_all(target.parent().context("a path without parent")?)?;
        fs::copy(path, &target)
            .with_context(|| format!("copying {} to {}", path.display(), target.display()))?;
        // Published files may be read-only.
        fs::set_permissions(&target, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok(())
    };
    copy(&record_path(&from, &image.digest))?;
    copy(&start_path(&from, &image.digest))?;
    for layer in layers(&from, &image.digest)? {
        copy(&layer.erofs)?;
        copy(&layer.index)?;
    }
    for directory in ["names", "by-digest"] {
        for path in files_below(&from.join(directory))? {
            copy(&path)?;
        }
    }
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in
            fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))?
        {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}
