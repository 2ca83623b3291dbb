//! Pushing accelerated images: of several platforms, and against registries that
//! will not have them.

mod common;

use common::network::BadLine;
use common::services::{Access, Harm, Proxy, Registry, push, tool};
use common::{Image, Ufs, good, mkfs_accel, sample_tar};
use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Output};
use tempfile::TempDir;

const ORIGINAL: &str = "io.image-accel.original";
const ROOT: &str = "containerd.io/snapshot/accel.root";
const IMAGE: &str = "containerd.io/snapshot/accel.image";

/// An image for `architecture` whose first layer all of them have.
fn image_for(os: &str, architecture: &str, seed: u64) -> Image {
    let mut image = Image::gzipped(&[sample_tar(1), sample_tar(seed)]);
    image.config["os"] = json!(os);
    image.config["architecture"] = json!(architecture);
    image.write();
    image
}

/// One OCI layout with all of the images, each with what its entry says more, in an
/// index tagged "all".
fn index_of(images: &[(&Image, Value)]) -> (TempDir, Value) {
    let directory = TempDir::new().unwrap();
    let blobs = directory.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let entries = images.iter().map(|(image, more)| {
        for (path, bytes) in common::files(&image.directory.path().join("blobs/sha256")) {
            fs::write(blobs.join(path), bytes).unwrap();
        }
        let index = fs::read(image.directory.path().join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let mut entry = index["manifests"][0].clone();
        entry.as_object_mut().unwrap().remove("annotations");
        for (key, value) in more.as_object().unwrap() {
            entry[key] = value.clone();
        }
        entry
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": entries.collect::<Vec<_>>(),
        "annotations": {"org.example.kept": "yes"},
    });
    let text = index.to_string();
    let digest = accel_oci::Digest::of(text.as_bytes());
    fs::write(blobs.join(digest.hex()), &text).unwrap();
    let top = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": index["mediaType"], "digest": digest.to_string(), "size": text.len(),
        "annotations": {"org.opencontainers.image.ref.name": "all"},
    }]});
    fs::write(directory.path().join("index.json"), top.to_string()).unwrap();
    fs::write(
        directory.path().join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )
    .unwrap();
    (directory, json!(digest.to_string()))
}

fn raw(image: &str) -> Value {
    let output = Command::new("skopeo")
        .args(["inspect", "--raw", "--tls-verify=false", image])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{error}"))
}

#[test]
fn every_platform_is_converted_and_pushed_as_an_index() {
    let host = accel_oci::Platform::host().architecture;
    let (ours, other) = (image_for("linux", &host, 2), image_for("linux", "s390x", 3));
    let arm = image_for("linux", "arm", 4);
    let windows = image_for("windows", "amd64", 5);
    let attestation = image_for("unknown", "unknown", 6);
    let (layout, original) = index_of(&[
        (
            &other,
            json!({"platform": {"os": "linux", "architecture": "s390x"}}),
        ),
        (
            &arm,
            json!({"platform": {"os": "linux", "architecture": "arm", "variant": "v7"},
                      "annotations": {"org.example.entry": "kept"}}),
        ),
        (
            &ours,
            json!({"platform": {"os": "linux", "architecture": host}}),
        ),
        (
            &windows,
            json!({"platform": {"os": "windows", "architecture": "amd64", "os.version": "10"}}),
        ),
        (
            &attestation,
            json!({"platform": {"os": "unknown", "architecture": "unknown"},
                              "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}),
        ),
    ]);
    let local = format!("oci:{}:all", layout.path().display());
    let registry = Registry::start(&Access::Open);
    let (remote, target) = (registry.image("multi:v1"), registry.image("made/multi:acc"));
    push(&local, &remote, &["--all"]);
    let digest = |image: &Image| {
        let index = fs::read(image.directory.path().join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        index["manifests"][0]["digest"].clone()
    };

    let ufs = Ufs::new();
    let more = ["--plain-http", "--platform", "all", "--push", &target];
    let report = ufs.convert_with(&remote, &more);
    let images = report["images"].as_array().unwrap();
    let platforms: Vec<_> = images.iter().map(|image| &image["platform"]).collect();
    assert_eq!(
        platforms,
        ["linux/s390x", "linux/arm", &format!("linux/{host}")]
    );
    assert_eq!(report["left_out"], json!(["windows/amd64"]));
    // What they share is converted once.
    let fates = images.iter().map(|image| {
        let layers = image["layers"].as_array().unwrap().iter();
        layers
            .map(|layer| layer["fate"].as_str().unwrap())
            .collect::<Vec<_>>()
    });
    let fates: Vec<_> = fates.collect();
    assert_eq!(fates[0], ["converted"; 2]);
    assert!(
        fates[1..]
            .iter()
            .all(|fates| fates == &["present", "converted"]),
        "{fates:?}"
    );
    // The name means this machine's image.
    assert_eq!(report["manifest"], digest(&ours));
    let inspect = |name: &str| good(&[&"inspect", &name, &"--json", &"--ufs", &ufs.path()]);
    let named = inspect(digest(&ours).as_str().unwrap());
    assert_eq!(inspect(&remote), named);
    assert_eq!(inspect(original.as_str().unwrap()), named);

    let index = raw(&target);
    assert_eq!(
        index["mediaType"],
        "application/vnd.oci.image.index.v1+json"
    );
    assert_eq!(index["annotations"][ORIGINAL], original);
    assert_eq!(index["annotations"]["org.example.kept"], "yes");
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    assert_eq!(entries[1]["platform"]["variant"], "v7");
    assert_eq!(entries[1]["annotations"]["org.example.entry"], "kept");
    for (entry, original) in entries.iter().zip([&other, &arm, &ours]) {
        let member = entry["digest"].as_str().unwrap();
        let manifest = raw(&registry.image(&format!("made/multi@{member}")));
        assert_eq!(manifest["annotations"][ORIGINAL], digest(original));
        assert_eq!(manifest["config"], original.manifest["config"]);
        for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
            assert_eq!(layer["digest"], original.layer(number));
            assert!(layer["annotations"][ROOT].is_string(), "{layer}");
            assert_eq!(layer["annotations"][IMAGE], digest(original));
        }
    }
    // All of it is there: others can copy it, and the same comes into a layout.
    let out = TempDir::new().unwrap();
    let copy = format!("oci:{}:copy", out.path().join("copy").display());
    let from = ["copy", "--all", "--src-tls-verify=false", &target, &copy];
    tool("skopeo", &[&["--insecure-policy"], &from[..]].concat());
    let written = format!("oci:{}:acc", out.path().join("out").display());
    ufs.convert_with(
        &remote,
        &["--plain-http", "--platform", "all", "--out", &written],
    );
    assert_eq!(raw(&written), index);

    // Two of them, and one.
    let more = [
        "--plain-http",
        "--platform",
        "linux/s390x",
        "--platform",
        "linux/arm/v7",
    ];
    ufs.convert_with(&remote, &[&more[..], &["--push", &target]].concat());
    assert_eq!(raw(&target)["manifests"].as_array().unwrap().len(), 2);
    let output = convert_and_push(&remote, &target, &ufs);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("left out: linux/s390x, linux/arm/v7, windows/amd64"),
        "{said}"
    );
    assert!(said.contains("left out: an attestation"), "{said}");
    assert_eq!(raw(&target)["annotations"][ORIGINAL], digest(&ours));
    assert!(raw(&target)["layers"].is_array());
}

/// Converts the image and pushes it.
fn convert_and_push(image: &str, target: &str, ufs: &Ufs) -> Output {
    mkfs_accel()
        .args(["convert", image, "--plain-http", "--push", target, "--ufs"])
        .arg(ufs.path())
        .output()
        .unwrap()
}

/// Tries to push, from a layout, and fails before anything is converted.
#[track_caller]
fn refused(target: &str, more: &[&str]) -> String {
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let output = mkfs_accel()
        .args([
            "convert",
            &image.source(),
            "--plain-http",
            "--push",
            target,
            "--ufs",
        ])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(ufs.is_empty());
    assert!(error.contains("cannot push to \"x\""), "{error}");
    error
}

#[test]
fn registries_that_take_no_push_say_so_before_anything_is_converted() {
    let closed = Registry::start(&Access::Password);
    let error = refused(&closed.image("x:acc"), &[]);
    assert!(
        error.contains("401") && error.contains("wants a login"),
        "{error}"
    );
    let data = TempDir::new().unwrap();
    let read_only = Registry::start(&Access::ReadOnly(data.path().to_owned()));
    let error = refused(&read_only.image("x:acc"), &[]);
    assert!(
        error.contains("405") && error.contains("read-only"),
        "{error}"
    );

    let registry = Registry::start(&Access::Open);
    for (answer, parts) in [
        (
            "403 Forbidden",
            ["403", "does not allow it without a login"],
        ),
        ("404 Not Found", ["404", "no such repository"]),
        (
            "429 Too Many Requests\r\nRetry-After: 3600",
            ["429", "3600 s"],
        ),
        (
            "429 Too Many Requests\r\nRetry-After: Fri, 31 Dec 2100 23:59:59 GMT",
            ["429", "too many requests: the registry wants"],
        ),
    ] {
        let proxy = Proxy::start(&registry, "/uploads/", Harm::Refuse(99, answer));
        let error = refused(&proxy.image("x:acc"), &[]);
        for part in parts {
            assert!(error.contains(part), "{part:?}: {error}");
        }
        assert!(error.contains(&proxy.address), "{error}");
    }
    let error = refused("docker://127.0.0.1:9/x:acc", &[]);
    assert!(error.contains("refused"), "{error}");
}

#[test]
fn a_push_that_breaks_off_is_sent_again() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = Registry::start(&Access::Open);
    let line = BadLine::start(&registry.address, 2, 400_000);
    let target = format!("docker://{}/x:acc", line.address);
    Ufs::new().convert_with(&image.source(), &["--plain-http", "--push", &target]);
    assert!(*line.cut.lock().unwrap() >= 2);
    let made = raw(&registry.image("x:acc"));
    assert_eq!(made["layers"][0]["digest"], image.layer(0));
    let blob = fs::read(registry.blob(&image.layer(0))).unwrap();
    assert!(blob == fs::read(image.blob_path(&image.layer(0))).unwrap());

    // One that always breaks: the tag is not made.
    let line = BadLine::start(&registry.address, usize::MAX, 400_000);
    let target = format!("docker://{}/y:acc", line.address);
    let ufs = Ufs::new();
    let output = convert_and_push(&image.source(), &target, &ufs);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{error}");
    let what = format!("cannot push the layer {}", image.layer(0));
    assert!(
        error.contains(&what) && error.contains(&line.address),
        "{error}"
    );
    let there = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", &registry.image("y:acc")])
        .output()
        .unwrap();
    assert!(!there.status.success());
}

/// Whether the registry has an image of this name.
fn is_there(image: &str) -> bool {
    let inspect = ["inspect", "--raw", "--tls-verify=false", image];
    let output = Command::new("skopeo").args(inspect).output().unwrap();
    output.status.success()
}

#[test]
fn a_push_outlasts_refusals_that_pass() {
    let image = Image::gzipped(&[sample_tar(1)]);
    for (request, answer) in [
        ("POST /v2/x/blobs/uploads/", "503 Service Unavailable"),
        (
            "HEAD /v2/x/blobs/",
            "429 Too Many Requests\r\nRetry-After: 1",
        ),
        ("PUT /v2/x/blobs/uploads/", "502 Bad Gateway"),
        (
            "PUT /v2/x/blobs/uploads/",
            "429 Too Many Requests\r\nRetry-After: 1",
        ),
        ("PUT /v2/x/manifests/", "500 Internal Server Error"),
        ("PUT /v2/x/manifests/", "429 Too Many Requests"),
    ] {
        let registry = Registry::start(&Access::Open);
        let proxy = Proxy::start(&registry, request, Harm::Refuse(2, answer));
        let output = convert_and_push(&image.source(), &proxy.image("x:acc"), &Ufs::new());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{request} {answer}: {error}");
        assert!(proxy.count(request) > 2, "{request} {answer}");
        let made = raw(&registry.image("x:acc"));
        assert_eq!(made["layers"][0]["digest"], image.layer(0));
        let blob = fs::read(registry.blob(&image.layer(0))).unwrap();
        assert!(blob == fs::read(image.blob_path(&image.layer(0))).unwrap());
    }
}

#[test]
fn a_layer_that_the_registry_does_not_mount_is_copied() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let sent = [
        (0, ""),
        (99, "405 Method Not Allowed"),
        (99, "404 Not Found"),
    ]
    .map(|(times, answer)| {
        let registry = Registry::start(&Access::Open);
        push(&image.source(), &registry.image("x:1"), &[]);
        let proxy = Proxy::start(&registry, "mount=", Harm::Refuse(times, answer));
        let output = convert_and_push(&proxy.image("x:1"), &proxy.image("y:acc"), &Ufs::new());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{answer}: {error}");
        assert_eq!(proxy.count("mount="), 1, "{answer}");
        let made = raw(&registry.image("y:acc"));
        assert_eq!(made["layers"][0]["digest"], image.layer(0));
        // The repository has all of it.
        let pulled = TempDir::new().unwrap();
        let to = format!("dir:{}", pulled.path().display());
        let fixed = ["--insecure-policy", "copy", "--src-tls-verify=false"];
        tool(
            "skopeo",
            &[&fixed[..], &[&registry.image("y:acc"), &to]].concat(),
        );
        proxy.count("PUT /v2/y/blobs/uploads/")
    });
    // The layer as well.
    assert_eq!(sent, [sent[0], sent[0] + 1, sent[0] + 1]);
}

#[test]
fn a_manifest_that_is_refused_after_the_conversion_can_be_pushed_later() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = Registry::start(&Access::Open);
    let ufs = Ufs::new();
    for (answer, part) in [
        ("403 Forbidden", "does not allow it without a login"),
        ("405 Method Not Allowed", "405"),
        ("400 Bad Request", "400"),
    ] {
        let proxy = Proxy::start(&registry, "PUT /v2/x/manifests/", Harm::Refuse(99, answer));
        let output = convert_and_push(&image.source(), &proxy.image("x:acc"), &ufs);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{error}");
        assert!(
            error.contains("cannot push the tag \"acc\"") && error.contains(part),
            "{answer}: {error}"
        );
        // It is not asked again what it has refused for good.
        assert_eq!(proxy.count("PUT /v2/x/manifests/"), 1, "{answer}");
        assert!(!is_there(&registry.image("x:acc")));
    }
    // What was converted is on UFS, and is not converted again.
    let target = registry.image("x:acc");
    let report = ufs.convert_with(&image.source(), &["--plain-http", "--push", &target]);
    assert_eq!(report["images"][0]["layers"][0]["fate"], "present");
    assert!(is_there(&target));
}

#[test]
fn a_conversion_that_fails_pushes_nothing() {
    let mut image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    // The second layer is another one than the config says.
    let other = accel_oci::Digest::of(&sample_tar(3));
    image.config["rootfs"]["diff_ids"][1] = json!(other.to_string());
    image.write();
    let registry = Registry::start(&Access::Open);
    let proxy = Proxy::watching(&registry);
    let output = convert_and_push(&image.source(), &proxy.image("x:acc"), &Ufs::new());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(common::failed(output.status), "{error}");
    assert!(error.contains(&image.layer(1)), "{error}");
    // The right to push was tried, and that was all.
    assert_eq!(proxy.count("POST /v2/x/blobs/uploads/"), 1);
    assert_eq!(proxy.count("PUT "), 0);
    assert!(!is_there(&registry.image("x:acc")));
}
