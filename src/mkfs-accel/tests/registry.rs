//! Conversion from a real registry on loopback, and through a proxy that does it harm.

mod common;

use common::services::{
    Access, Certificate, Harm, Proxy, Registry, TokenServer, push, umoci_image,
};
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
    assert!(common::failed(output.status), "{error}");
    error
}

#[test]
fn registry_and_layout_give_the_same_image() {
    let directory = TempDir::new().unwrap();
    let layout = directory.path().join("layout");
    umoci_image(&layout);
    let local = format!("oci:{}:v1", layout.display());
    let registry = Registry::start(&Access::Open);
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

    // Without TLS nobody's certificate is looked at: a machine without any will do.
    let output = mkfs_accel()
        .args(["convert", &remote, "--plain-http", "--ufs"])
        .arg(Ufs::new().path())
        .env("SSL_CERT_FILE", "/dev/null")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");

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
    let registry = Registry::start(&Access::Open);
    let remote = registry.image("large");
    push(&image.source(), &remote, &[]);
    let (a, b) = (Ufs::new(), Ufs::new());
    a.convert(&image.source());
    convert(&b, &remote, &[]);
    assert_eq!(a.layers(), b.layers());
}

#[test]
fn a_registry_says_why_not() {
    let registry = Registry::start(&Access::Open);
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
    let registry = Registry::start(&Access::Password);
    let image = Image::gzipped(&[sample_tar(1)]);
    let remote = registry.image("private");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
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
    let output = try_with("s3kr1t");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

#[test]
fn credentials_can_be_given() {
    let registry = Registry::start(&Access::Password);
    let image = Image::gzipped(&[sample_tar(1)]);
    let remote = registry.image("private");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("password");
    fs::write(&file, "s3kr1t\n").unwrap();
    let file = file.to_str().unwrap();
    convert(
        &Ufs::new(),
        &remote,
        &["--username", "user", "--password-file", file],
    );
    let with_input = |input: &str| {
        let mut child = mkfs_accel()
            .args(["convert", &remote, "--plain-http", "--username", "user"])
            .args(["--password-stdin", "--ufs"])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        use std::io::Write;
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    };
    let output = with_input("wrong");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("refuses the credentials of user \"user\""),
        "{error}"
    );
    assert!(!error.contains("wrong"), "{error}");
    let output = with_input("s3kr1t");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let output = mkfs_accel()
        .args(["convert", &remote, "--username", "user", "--ufs"])
        .arg(directory.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

/// docker's configuration in a directory, and beside it a helper called "test".
fn docker_config(json: &Value, helper: &str) -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("config.json"), json.to_string()).unwrap();
    let path = directory.path().join("docker-credential-test");
    fs::write(&path, helper).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

#[test]
fn credential_helpers_are_asked() {
    let registry = Registry::start(&Access::Password);
    let image = Image::gzipped(&[sample_tar(1)]);
    let remote = registry.image("private");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
    let try_with = |helper: &str| {
        let json = serde_json::json!({"credHelpers": {&registry.address: "test"}});
        let config = docker_config(&json, &format!("#!/bin/sh\ncat >/dev/null\n{helper}\n"));
        let path = std::env::var("PATH").unwrap();
        let ufs = Ufs::new();
        let output = mkfs_accel()
            .args(["convert", &remote, "--plain-http", "--ufs"])
            .arg(ufs.path())
            .env("DOCKER_CONFIG", config.path())
            .env("PATH", format!("{}:{path}", config.path().display()))
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), error)
    };
    let (good, error) = try_with("echo no keychain here >&2; exit 1");
    assert!(!good && error.contains("no keychain here"), "{error}");
    assert!(error.contains("wants a login"), "{error}");
    let answer = r#"{"ServerURL": "", "Username": "user", "Secret": "s3kr1t"}"#;
    let (good, error) = try_with(&format!("echo '{answer}'"));
    assert!(good, "{error}");
}

#[test]
fn tokens_are_got_for_passwords_and_for_identity_tokens() {
    let access = Access::Token(TokenServer::start());
    let registry = Registry::start(&access);
    let image = Image::gzipped(&[sample_tar(1)]);
    let remote = registry.image("x");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
    let try_with = |login: Value| {
        let json = serde_json::json!({"auths": {&registry.address: login}});
        let config = docker_config(&json, "");
        let ufs = Ufs::new();
        let output = mkfs_accel()
            .args(["convert", &remote, "--plain-http", "--ufs"])
            .arg(ufs.path())
            .env("DOCKER_CONFIG", config.path())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), error)
    };
    for login in [
        serde_json::json!({"username": "user", "password": "s3kr1t"}),
        // As docker login writes it.
        serde_json::json!({"auth": "dXNlcjo=", "identitytoken": "refresh"}),
    ] {
        let (good, error) = try_with(login);
        assert!(good, "{error}");
    }
    let (good, error) = try_with(serde_json::json!({"identitytoken": "expired"}));
    assert!(
        !good && error.contains("identity token of your login"),
        "{error}"
    );
    assert!(
        error.contains("who are you?") && !error.contains("expired\""),
        "{error}"
    );
}

#[test]
fn a_multi_platform_image_is_chosen_from() {
    // Two images for two platforms in one index, as a registry holds them.
    let registry = Registry::start(&Access::Open);
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
    // The index names what was converted from it last.
    let index = accel_oci::Digest::of(index.to_string().as_bytes()).to_string();
    let inspect = |name: &str| good(&[&"inspect", &name, &"--json", &"--ufs", &ufs.path()]);
    assert_eq!(inspect(&index), inspect(ours["manifest"].as_str().unwrap()));
    convert(&ufs, &remote, &["--platform", "linux/s390x"]);
    assert_eq!(
        inspect(&index),
        inspect(theirs["manifest"].as_str().unwrap())
    );
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

/// A registry with `image` as "x".
fn with_image(image: &Image) -> Registry {
    let registry = Registry::start(&Access::Open);
    push(&image.source(), &registry.image("x"), &[]);
    registry
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let wanted = Ufs::new();
    wanted.convert(&image.source());
    let registry = with_image(&image);
    // The blob is a bit more than 1 MiB: it breaks twice.
    for harm in [Harm::Cut(400_000), Harm::CutWithoutRanges(400_000)] {
        let proxy = Proxy::start(&registry, "/blobs/", harm);
        let ufs = Ufs::new();
        convert(&ufs, &proxy.image("x"), &[]);
        assert_eq!(ufs.layers(), wanted.layers());
        assert_eq!(proxy.count(&image.layer(0)), 3);
    }
}

#[test]
fn a_connection_that_always_breaks_is_an_error_that_says_so() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    let proxy = Proxy::start(&registry, &image.layer(0), Harm::CutBody);
    let ufs = Ufs::new();
    let error = refuse(&ufs, &proxy.image("x"), &["--plain-http"]);
    assert!(
        error.contains("broke 5 times in a row after 0 of"),
        "{error}"
    );
    assert!(
        error.contains(&image.layer(0)) && error.contains(&proxy.address),
        "{error}"
    );
    assert!(ufs.is_empty());
}

#[test]
fn registries_are_talked_to_over_tls() {
    let access = Access::Tls(Certificate::new());
    let registry = Registry::start(&access);
    let image = Image::gzipped(&[sample_tar(1)]);
    push(&image.source(), &registry.image("x"), &[]);
    let ufs = Ufs::new();
    let error = refuse(&ufs, &registry.image("x"), &[]);
    assert!(error.contains("update-ca-certificates"), "{error}");
    let Access::Tls(certificate) = &access else {
        unreachable!();
    };
    let output = mkfs_accel()
        .args(["convert", &registry.image("x"), "--ufs"])
        .arg(ufs.path())
        .env("SSL_CERT_FILE", certificate.certificate())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

#[test]
fn what_may_pass_is_asked_for_again() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    for (path, answer) in [
        ("/manifests/", "429 Too Many Requests\r\nRetry-After: 1"),
        ("/blobs/", "503 Service Unavailable"),
    ] {
        let proxy = Proxy::start(&registry, path, Harm::Refuse(2, answer));
        convert(&Ufs::new(), &proxy.image("x"), &[]);
        assert!(proxy.count(path) >= 3, "{:?}", proxy.requests);
    }
}

#[test]
fn refusals_give_their_reason_and_what_to_do() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    let ufs = Ufs::new();
    for (answer, said) in [
        (
            "429 Too Many Requests\r\nRetry-After: 3600",
            &["too many requests", "3600 s", "429"][..],
        ),
        (
            "403 Forbidden",
            &["does not allow it without a login", "403", "\"no\""],
        ),
        (
            "404 Not Found",
            &["does not have it", "404", &image.layer(0)],
        ),
        ("501 Not Implemented", &["itself has failed", "501"]),
        ("418 I'm a teapot", &["not understood", "418"]),
    ] {
        let proxy = Proxy::start(&registry, &image.layer(0), Harm::Refuse(usize::MAX, answer));
        let error = refuse(&ufs, &proxy.image("x"), &["--plain-http"]);
        for part in said {
            assert!(error.contains(part), "{part:?}: {error}");
        }
        assert!(error.contains(&proxy.address), "{error}");
        assert_eq!(proxy.count(&image.layer(0)), 1, "{answer}");
        assert!(ufs.is_empty());
    }
}

#[test]
fn a_layer_that_the_registry_has_not_whole_is_an_error() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    let path = registry.blob(&image.layer(0));
    let blob = fs::metadata(&path).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(blob - 1).unwrap();
    let ufs = Ufs::new();
    let error = refuse(&ufs, &registry.image("x"), &["--plain-http"]);
    let gave = format!("gave {} of the {blob} bytes", blob - 1);
    assert!(error.contains(&gave), "{error}");
    assert!(ufs.is_empty());
}

/// One layer never comes; the other is broken, and that is the end.
#[test]
fn the_error_of_a_layer_ends_the_download_of_another() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    let registry = with_image(&image);
    let path = registry.blob(&image.layer(1));
    let mut blob = fs::read(&path).unwrap();
    blob[300_000] ^= 1;
    fs::write(&path, blob).unwrap();
    let proxy = Proxy::start(&registry, &image.layer(0), Harm::Stall(300_000));
    let ufs = Ufs::new();
    let error = refuse(&ufs, &proxy.image("x"), &["--plain-http", "--jobs", "2"]);
    assert!(error.contains(&image.layer(1)), "{error}");
    assert!(ufs.is_empty());
}

/// A layer that registries need not hold lies at a web address.
#[test]
fn foreign_layers_come_from_where_the_manifest_says() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    let wanted = Ufs::new();
    wanted.convert(&image.source());
    let mut foreign = Image::gzipped(&[sample_tar(1)]);
    let layer = &mut foreign.manifest["layers"][0];
    layer["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into();
    let url = format!("http://{}/v2/x/blobs/{}", registry.address, image.layer(0));
    let gone = format!("http://{}/gone", registry.address);
    layer["urls"] = serde_json::json!([gone, url]);
    foreign.write();
    push(&foreign.source(), &registry.image("y"), &[]);
    let ufs = Ufs::new();
    convert(&ufs, &registry.image("y"), &[]);
    assert_eq!(ufs.layers(), wanted.layers());
}

/// Ends a converter that waits for a layer that does not come.
#[test]
fn a_signal_ends_a_waiting_converter_and_leaves_nothing() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let registry = with_image(&image);
    let proxy = Proxy::start(&registry, &image.layer(0), Harm::Stall(100_000));
    for signal in ["INT", "TERM"] {
        let ufs = Ufs::new();
        let child = mkfs_accel()
            .args(["convert", "--plain-http"])
            .arg(proxy.image("x"))
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
