//! Conversion from registries: a real one on loopback, and one that stalls.

mod common;

use common::services::{FailingRegistry, Failure, Registry, push, umoci_image};
use common::{Image, Ufs, good, mkfs_accel, sample_tar};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

fn convert(ufs: &Ufs, source: &str, more: &[&str]) -> Value {
    let output = mkfs_accel()
        .args(["convert", source, "--plain-http", "--json", "--ufs"])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refuse(ufs: &Ufs, source: &str, more: &[&str]) -> String {
    let output = mkfs_accel()
        .args(["convert", source, "--ufs"])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    error
}

#[test]
fn registry_and_layout_give_the_same_image() {
    let directory = TempDir::new().unwrap();
    let layout = directory.path().join("layout");
    umoci_image(&layout);
    let local = format!("oci:{}:v1", layout.display());
    let registry = Registry::start(false);
    let remote = registry.image("team/tool:v1");
    push(&local, &remote, &[]);

    let (from_layout, from_registry) = (Ufs::new(), Ufs::new());
    let a = from_layout.convert(&local);
    let b = convert(&from_registry, &remote, &[]);
    assert_eq!(a["manifest"], b["manifest"]);
    assert_eq!(a["layers"].as_array().unwrap().len(), 2);
    assert_eq!(from_layout.layers(), from_registry.layers());
    for (number, layer) in a["layers"].as_array().unwrap().iter().enumerate() {
        let image = fs::read(from_layout.image(&a, number)).unwrap();
        let root = blake3::hash(&image).to_hex().to_string();
        assert_eq!(layer["erofs"]["root"], root);
    }

    // By digest, and as Docker's schema 2, whose layers are the same tars.
    let manifest = a["manifest"].as_str().unwrap();
    let by_digest = registry.image(&format!("team/tool@{manifest}"));
    convert(&from_registry, &by_digest, &[]);
    for source in [&remote, &by_digest] {
        good(&[&"verify", source, &"--ufs", &from_registry.path()]);
    }
    let docker = registry.image("team/docker");
    push(&local, &docker, &["--format", "v2s2"]);
    let c = convert(&from_registry, &docker, &[]);
    assert_ne!(c["manifest"], a["manifest"]);
    for layer in c["layers"].as_array().unwrap() {
        assert_eq!(layer["fate"], "present");
        let media_type = layer["media_type"].as_str().unwrap();
        assert!(media_type.contains("docker"), "{media_type}");
    }
    let fresh = Ufs::new();
    convert(&fresh, &docker, &[]);
    let mut images = fresh.layers();
    let mut wanted = from_layout.layers();
    // Pushed anew, the blobs may have been compressed anew.
    for files in [&mut images, &mut wanted] {
        files.retain(|path, _| !path.starts_with("by-digest"));
    }
    assert_eq!(images, wanted);
}

/// A layer large enough to come in many pieces.
#[test]
fn large_layers_come_whole() {
    let tar = common::Tar::new()
        .file("large", &common::noise(5, 24 << 20))
        .finish();
    let image = Image::gzipped(&[tar]);
    let registry = Registry::start(false);
    let remote = registry.image("large");
    push(&image.source(), &remote, &[]);
    let (a, b) = (Ufs::new(), Ufs::new());
    a.convert(&image.source());
    convert(&b, &remote, &[]);
    assert_eq!(a.layers(), b.layers());
}

#[test]
fn a_registry_says_why_not() {
    let registry = Registry::start(false);
    let ufs = Ufs::new();
    let error = refuse(&ufs, &registry.image("no/such:tag"), &["--plain-http"]);
    assert!(
        error.contains("404") && error.contains("no/such"),
        "{error}"
    );
    assert!(error.contains(&registry.address), "{error}");
    let error = refuse(&ufs, &registry.image("no/such:tag"), &[]);
    assert!(error.contains("--plain-http"), "{error}");
    let closed = format!("docker://127.0.0.1:{}/x", free_port());
    let error = refuse(&ufs, &closed, &["--plain-http"]);
    assert!(error.contains("refused"), "{error}");
    let absent = "docker://no-such-host.invalid/x";
    let error = refuse(&ufs, absent, &["--plain-http"]);
    assert!(error.contains("no-such-host.invalid"), "{error}");
    assert!(ufs.is_empty());
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn credentials_are_those_of_the_login() {
    let registry = Registry::start(true);
    let image = Image::gzipped(&[sample_tar(1)]);
    let remote = registry.image("private");
    push(&image.source(), &remote, &["--dest-creds", "user:secret"]);
    let ufs = Ufs::new();
    let error = refuse(&ufs, &remote, &["--plain-http"]);
    assert!(error.contains("login") && error.contains("401"), "{error}");
    let login = |password: &str| {
        // base64 of "user:<password>", from the tool that everybody has.
        let pair = format!("printf user:{password} | base64");
        let output = std::process::Command::new("sh")
            .args(["-c", &pair])
            .output();
        let auth = String::from_utf8(output.unwrap().stdout).unwrap();
        let json = serde_json::json!({"auths": {&registry.address: {"auth": auth.trim()}}});
        let directory = TempDir::new().unwrap();
        fs::write(directory.path().join("config.json"), json.to_string()).unwrap();
        directory
    };
    let try_with = |password: &str| {
        let config = login(password);
        mkfs_accel()
            .args(["convert", &remote, "--plain-http", "--ufs"])
            .arg(ufs.path())
            .env("DOCKER_CONFIG", config.path())
            .output()
            .unwrap()
    };
    let output = try_with("wrong");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("refuses the credentials"), "{error}");
    assert!(!error.contains("wrong"), "{error}");
    let output = try_with("secret");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

#[test]
fn a_multi_platform_image_is_chosen_from() {
    // Two images for two platforms in one index, as a registry holds them.
    let registry = Registry::start(false);
    let image = Image::gzipped(&[sample_tar(1)]);
    let mut other = Image::gzipped(&[sample_tar(2)]);
    other.config["architecture"] = serde_json::json!("s390x");
    other.write();
    let entry = |image: &Image, platform: Value| {
        let index = fs::read(image.directory.path().join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let mut entry = index["manifests"][0].clone();
        entry["platform"] = platform;
        entry.as_object_mut().unwrap().remove("annotations");
        entry
    };
    let host = accel_oci::Platform::host();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            entry(&other, serde_json::json!({"os": "linux", "architecture": "s390x"})),
            entry(&image, serde_json::to_value(&host).unwrap()),
        ],
    });
    let merged = TempDir::new().unwrap();
    merge(merged.path(), &[&image, &other], &index);
    let local = format!("oci:{}:all", merged.path().display());
    let remote = registry.image("multi:v1");
    push(&local, &remote, &["--all"]);
    let ufs = Ufs::new();
    let ours = convert(&ufs, &remote, &[]);
    assert_eq!(ours["manifest"], ufs.convert(&image.source())["manifest"]);
    let theirs = convert(&ufs, &remote, &["--platform", "linux/s390x"]);
    assert_ne!(theirs["manifest"], ours["manifest"]);
    let error = refuse(&ufs, &remote, &["--plain-http", "--platform", "linux/mips"]);
    assert!(error.contains("linux/s390x"), "{error}");
    let locally = ufs.convert(&local);
    assert_eq!(locally["manifest"], ours["manifest"]);
}

/// One OCI layout with all of the images' blobs and `index` tagged "all".
fn merge(directory: &Path, images: &[&Image], index: &Value) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    for image in images {
        for (path, bytes) in common::files(&image.directory.path().join("blobs/sha256")) {
            fs::write(blobs.join(path), bytes).unwrap();
        }
    }
    let json = index.to_string();
    let digest = accel_oci::Digest::of(json.as_bytes());
    fs::write(blobs.join(digest.hex()), &json).unwrap();
    let top = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": index["mediaType"], "digest": digest.to_string(), "size": json.len(),
        "annotations": {"org.opencontainers.image.ref.name": "all"},
    }]});
    fs::write(directory.join("index.json"), top.to_string()).unwrap();
    let version = serde_json::json!({"imageLayoutVersion": "1.0.0"});
    fs::write(directory.join("oci-layout"), version.to_string()).unwrap();
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let wanted = Ufs::new();
    wanted.convert(&image.source());
    // The blob is a bit more than 1 MiB: it breaks twice.
    for failure in [
        Failure::Break(400_000),
        Failure::BreakWithoutRanges(400_000),
    ] {
        let registry = FailingRegistry::start(&image, failure);
        let ufs = Ufs::new();
        convert(&ufs, &format!("docker://{}/x", registry.address), &[]);
        assert_eq!(ufs.layers(), wanted.layers());
    }
}

#[test]
fn a_layer_that_the_registry_has_not_whole_is_an_error() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = FailingRegistry::start(&image, Failure::Short);
    let source = format!("docker://{}/x", registry.address);
    let ufs = Ufs::new();
    let error = refuse(&ufs, &source, &["--plain-http"]);
    let blob = fs::read(image.blob_path(&image.layer(0))).unwrap().len();
    let gave = format!("gave {} of the {blob} bytes", blob - 1);
    assert!(error.contains(&gave), "{error}");
    assert!(ufs.is_empty());
}

/// Ends a converter that waits for a layer that does not come.
#[test]
fn a_signal_ends_a_waiting_converter_and_leaves_nothing() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = FailingRegistry::start(&image, Failure::Stall);
    for signal in ["INT", "TERM"] {
        let ufs = Ufs::new();
        let child = mkfs_accel()
            .args(["convert", "--plain-http"])
            .arg(format!("docker://{}/x", registry.address))
            .arg("--ufs")
            .arg(ufs.path())
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let tmp = ufs.path().join("tmp");
        let waiting = || fs::read_dir(&tmp).is_ok_and(|mut files| files.next().is_some());
        for _ in 0..600 {
            if waiting() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        assert!(waiting(), "the converter did not come to the layer");
        let kill = format!("-{signal}");
        common::services::tool("kill", &[&kill, &child.id().to_string()]);
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{error}");
        assert!(error.contains("interrupted"), "{error}");
        assert!(ufs.is_empty(), "{signal}");
    }
}
