//! Images, UFS directories and converters for the tests.
#![allow(dead_code, reason = "not every test binary uses everything")]

pub mod network;
pub mod services;

use accel_oci::Digest;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::{fs, io};
use tempfile::TempDir;

/// The program under test.
pub fn mkfs_accel() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mkfs-accel"));
    // No credentials and no proxies but those that a test gives.
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
        command.env_remove(name);
        command.env_remove(name.to_ascii_lowercase());
    }
    command
        .env("DOCKER_CONFIG", "/nonexistent")
        .env_remove("REGISTRY_AUTH_FILE")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null());
    command
}

pub fn run(arguments: &[&dyn AsRef<OsStr>]) -> Output {
    mkfs_accel().args(arguments).output().unwrap()
}

/// Runs the program, which must succeed, and gives its standard output.
#[track_caller]
pub fn good(arguments: &[&dyn AsRef<OsStr>]) -> String {
    let output = run(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, which must fail by itself, and gives its standard error.
#[track_caller]
pub fn bad(arguments: &[&dyn AsRef<OsStr>]) -> String {
    let output = run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(failed(output.status), "{}: {error}", output.status);
    error
}

/// Whether a command failed by itself: no wrong usage, no signal, no panic.
pub fn failed(status: ExitStatus) -> bool {
    matches!(status.code(), Some(1 | 3..=5))
}

/// Every file below `directory` with its bytes. Some may come and go meanwhile.
pub fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut rest = vec![directory.to_owned()];
    while let Some(current) = rest.pop() {
        for entry in fs::read_dir(&current).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().to_owned();
                match fs::read(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    bytes => drop(found.insert(name, bytes.unwrap())),
                }
            }
        }
    }
    found
}

/// A tar, entry by entry.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, name: &str, kind: tar::EntryType, mode: u32, data: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_mtime(1_700_000_000);
        self.0.append_data(&mut header, name, data).unwrap();
        self
    }

    pub fn directory(self, name: &str, mode: u32) -> Self {
        self.entry(name, tar::EntryType::Directory, mode, b"")
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, tar::EntryType::Regular, 0o644, data)
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A tree with a bit of everything: about 1.5 MiB.
pub fn sample_tar(seed: u64) -> Vec<u8> {
    Tar::new()
        .directory("etc/", 0o755)
        .file("etc/hostname", b"sample\n")
        .directory("opt/", 0o700)
        .file("opt/large", &noise(seed, 1 << 20))
        .file("opt/zeros", &vec![0; 400 << 10])
        .file("opt/small", &noise(seed ^ 1, 5000))
        .finish()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

pub const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// An image in an OCI layout directory, made here so that it can be wrong.
pub struct Image {
    pub directory: TempDir,
    pub config: Value,
    pub manifest: Value,
}

impl Image {
    /// An image of layers given as tar, blob and media type.
    pub fn new(layers: &[(&[u8], &[u8], &str)]) -> Self {
        let mut image = Self {
            directory: TempDir::new().unwrap(),
            config: Value::Null,
            manifest: Value::Null,
        };
        let descriptors = layers.iter().map(|(_, blob, media_type)| {
            let digest = image.blob(blob);
            json!({"mediaType": media_type, "digest": digest, "size": blob.len()})
        });
        let descriptors: Vec<_> = descriptors.collect();
        let diff_ids = layers.iter().map(|(tar, ..)| Digest::of(tar).to_string());
        image.config = json!({
            "os": "linux",
            "architecture": accel_oci::Platform::host().architecture,
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids.collect::<Vec<_>>()},
        });
        image.manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "layers": descriptors,
        });
        image.write();
        image
    }

    /// An image of gzipped layers.
    pub fn gzipped(tars: &[Vec<u8>]) -> Self {
        let blobs: Vec<_> = tars.iter().map(|tar| gzip(tar)).collect();
        let layers = tars.iter().zip(&blobs);
        let layers: Vec<_> = layers.map(|(t, b)| (&t[..], &b[..], GZIP)).collect();
        Self::new(&layers)
    }

    /// Writes config, manifest and index after they were changed.
    pub fn write(&mut self) {
        let config = self.config.to_string();
        self.manifest["config"] = json!({
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": self.blob(config.as_bytes()),
            "size": config.len(),
        });
        let manifest = self.manifest.to_string();
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": self.manifest["mediaType"],
            "digest": self.blob(manifest.as_bytes()),
            "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "v1"},
        }]});
        let write = |name: &str, json: Value| {
            fs::write(self.directory.path().join(name), json.to_string()).unwrap();
        };
        write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}));
        write("index.json", index);
    }

    fn blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        let path = self.blob_path(&digest.to_string());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        digest.to_string()
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.directory.path().join("blobs/sha256").join(hex)
    }

    /// The digest of layer `number`'s blob.
    pub fn layer(&self, number: usize) -> String {
        let digest = &self.manifest["layers"][number]["digest"];
        digest.as_str().unwrap().to_owned()
    }

    pub fn source(&self) -> String {
        format!("oci:{}:v1", self.directory.path().display())
    }
}

/// An empty UFS.
#[derive(Clone)]
pub struct Ufs(pub Arc<TempDir>);

impl Ufs {
    pub fn new() -> Self {
        Self(Arc::new(TempDir::new().unwrap()))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    #[track_caller]
    pub fn convert(&self, source: &str) -> Value {
        self.convert_with(source, &[])
    }

    #[track_caller]
    pub fn convert_with(&self, source: &str, more: &[&str]) -> Value {
        let mut arguments: Vec<&dyn AsRef<OsStr>> = vec![&"convert", &source, &"--json"];
        let ufs = self.path();
        arguments.extend([&"--ufs" as &dyn AsRef<OsStr>, &ufs]);
        arguments.extend(more.iter().map(|one| one as &dyn AsRef<OsStr>));
        serde_json::from_str(&good(&arguments)).unwrap()
    }

    #[track_caller]
    pub fn refuse(&self, source: &str) -> String {
        bad(&[&"convert", &source, &"--ufs", &self.path()])
    }

    /// Everything but what names the source or the time: who needs an image, and where it
    /// came from.
    pub fn layers(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = files(self.path());
        let named = ["names", "images", "claims"];
        all.retain(|path, _| !named.iter().any(|room| path.starts_with(room)));
        all
    }

    pub fn is_empty(&self) -> bool {
        files(self.path()).is_empty()
    }

    /// The image file of layer `number`.
    pub fn image(&self, report: &Value, number: usize) -> PathBuf {
        let path = &report["layers"][number]["erofs"]["path"];
        self.path().join(path.as_str().unwrap())
    }
}
