//! Conversion from archives: those that skopeo writes, and `docker save`'s old and
//! new forms.

mod common;

use accel_oci::Digest;
use common::services::{tool, umoci_image};
use common::{Image, Tar, Ufs, files, good, gzip, sample_tar, zstd};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The images and indexes of layers.
fn layers(ufs: &Ufs) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = files(ufs.path());
    all.retain(|path, _| path.starts_with("layers") || path.starts_with("chains"));
    all
}

fn verify(ufs: &Ufs, source: &str) {
    good(&[&"verify", &source, &"--ufs", &ufs.path()]);
}

#[test]
fn what_skopeo_writes_is_read() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    umoci_image(Path::new(&path("layout")));
    let layout = format!("oci:{}:v1", path("layout"));
    let wanted = Ufs::new();
    let a = wanted.convert(&layout);
    let copy = |to: &str| tool("skopeo", &["--insecure-policy", "copy", &layout, to]);

    let archive = format!("oci-archive:{}", path("o.tar"));
    copy(&format!("{archive}:v1"));
    for source in [&archive, &format!("{archive}:v1")] {
        let ufs = Ufs::new();
        let b = ufs.convert(source);
        assert_eq!(b["manifest"], a["manifest"]);
        assert_eq!(layers(&ufs), layers(&wanted));
        verify(&ufs, source);
    }

    let archive = format!("docker-archive:{}", path("d.tar"));
    copy(&format!("{archive}:team/app:v1"));
    for name in ["", ":team/app:v1", ":docker.io/team/app:v1", ":@0"] {
        let source = format!("{archive}{name}");
        let ufs = Ufs::new();
        let c = ufs.convert(&source);
        assert_eq!(layers(&ufs), layers(&wanted));
        // The same name from whichever place.
        assert_eq!(ufs.convert(&archive)["manifest"], c["manifest"]);
        verify(&ufs, &source);
    }
    let error = wanted.refuse(&format!("{archive}:other"));
    assert!(
        error.contains("\"other\"") && error.contains("team/app:v1"),
        "{error}"
    );
}

/// An archive as docker writes it, entry by entry.
struct Archive {
    builder: tar::Builder<Vec<u8>>,
    directory: TempDir,
}

impl Archive {
    fn new() -> Self {
        Self {
            builder: tar::Builder::new(Vec::new()),
            directory: TempDir::new().unwrap(),
        }
    }

    fn file(&mut self, name: &str, bytes: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.builder.append_data(&mut header, name, bytes).unwrap();
    }

    fn link(&mut self, name: &str, target: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        self.builder.append_link(&mut header, name, target).unwrap();
    }

    fn json(&mut self, name: &str, json: &Value) {
        self.file(name, json.to_string().as_bytes());
    }

    fn finish(self) -> (TempDir, PathBuf) {
        let path = self.directory.path().join("image.tar");
        fs::write(&path, self.builder.into_inner().unwrap()).unwrap();
        (self.directory, path)
    }
}

fn config(tars: &[&Vec<u8>]) -> Value {
    let diff_ids = tars.iter().map(|tar| Digest::of(tar).to_string());
    json!({
        "os": "linux", "architecture": accel_oci::Platform::host().architecture,
        "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids.collect::<Vec<_>>()},
    })
}

/// Before version 25: a directory per layer, one of them a link to another.
fn old_docker_save(tars: &[&Vec<u8>; 3]) -> (TempDir, PathBuf) {
    let mut archive = Archive::new();
    for (id, tar) in ["aa", "bb"].iter().zip(tars) {
        archive.file(&format!("{id}/VERSION"), b"1.0");
        archive.json(&format!("{id}/json"), &json!({"id": id}));
        archive.file(&format!("{id}/layer.tar"), tar);
    }
    archive.link("cc/layer.tar", "../aa/layer.tar");
    archive.json("cfg.json", &config(tars));
    archive.json(
        "manifest.json",
        &json!([{
            "Config": "cfg.json", "RepoTags": ["app:v1"],
            "Layers": ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"],
        }]),
    );
    archive.json("repositories", &json!({"app": {"v1": "cc"}}));
    archive.finish()
}

/// From version 25 on: an OCI layout with docker's manifest beside it.
fn new_docker_save(blobs: &[&Vec<u8>; 3], tars: &[&Vec<u8>; 3]) -> (TempDir, PathBuf) {
    let mut archive = Archive::new();
    let path = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    archive.file(&path(blobs[0]), blobs[0]);
    archive.file(&path(blobs[1]), blobs[1]);
    let config = config(tars).to_string();
    archive.file(&path(config.as_bytes()), config.as_bytes());
    archive.json("index.json", &json!({"schemaVersion": 2, "manifests": []}));
    archive.json(
        "manifest.json",
        &json!([{
            "Config": path(config.as_bytes()), "RepoTags": ["app:v1"],
            "Layers": blobs.map(|blob| path(blob)),
            "LayerSources": {"x": {"mediaType": "y"}},
        }]),
    );
    archive.json("oci-layout", &json!({"imageLayoutVersion": "1.0.0"}));
    archive.finish()
}

#[test]
fn both_forms_of_docker_save_are_read() {
    let (a, b) = (sample_tar(1), sample_tar(2));
    let tars = [&a, &b, &a];
    let wanted = Ufs::new();
    wanted.convert(&Image::gzipped(&tars.map(Vec::clone)).source());
    let (packed_a, packed_b) = (gzip(&a), zstd(&b));
    let manifests = [
        old_docker_save(&tars),
        new_docker_save(&tars, &tars),
        new_docker_save(&[&packed_a, &packed_b, &packed_a], &tars),
    ]
    .map(|(_directory, path)| {
        let source = format!("docker-archive:{}:app:v1", path.display());
        let ufs = Ufs::new();
        let report = ufs.convert(&source);
        assert_eq!(report["layers"][2]["fate"], "present");
        assert_eq!(layers(&ufs), layers(&wanted));
        verify(&ufs, &source);
        report["manifest"].clone()
    });
    // The same config and plain layers are the same image.
    assert_eq!(manifests[0], manifests[1]);
    assert_ne!(manifests[0], manifests[2]);
}

#[test]
fn archives_that_cannot_be_used_are_said() {
    let (a, b) = (sample_tar(1), sample_tar(2));
    let (directory, path) = old_docker_save(&[&a, &b, &a]);
    let good = fs::read(&path).unwrap();
    let ufs = Ufs::new();
    let refuse = |scheme: &str, bytes: &[u8]| {
        let path = directory.path().join("bad.tar");
        fs::write(&path, bytes).unwrap();
        let error = ufs.refuse(&format!("{scheme}:{}", path.display()));
        assert!(error.contains("bad.tar"), "{error}");
        error
    };
    for scheme in ["docker-archive", "oci-archive"] {
        let error = refuse(scheme, &gzip(&good));
        assert!(error.contains("gunzip"), "{error}");
        assert!(refuse(scheme, &[b'x'; 2000]).contains("is no tar"));
    }
    assert!(refuse("oci-archive", &good).contains("oci-layout"));
    let other = Tar::new().file("x", b"x").finish();
    assert!(refuse("docker-archive", &other).contains("manifest.json"));
    // Within the second layer.
    let error = refuse("docker-archive", &good[..good.len() / 2]);
    assert!(error.contains("bad.tar"), "{error}");
    let mut broken = good.clone();
    let middle = broken.len() / 4;
    broken[middle] ^= 1;
    fs::write(directory.path().join("broken.tar"), &broken).unwrap();
    let source = format!(
        "docker-archive:{}",
        directory.path().join("broken.tar").display()
    );
    let error = ufs.refuse(&source);
    assert!(error.contains(&Digest::of(&a).to_string()), "{error}");
    assert!(
        !files(ufs.path())
            .keys()
            .any(|path| path.starts_with("images"))
    );
    let error = ufs.refuse("docker-archive:/dev/null");
    assert!(error.contains("not a regular file"), "{error}");
}
