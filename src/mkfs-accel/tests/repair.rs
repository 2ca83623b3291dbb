//! Layers made again: from a real registry, from OCI layouts, after any damage.

mod common;

use common::services::{Access, Registry, push};
use common::{Image, Tar, Ufs, bad, files, good, mkfs_accel, noise, sample_tar};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Instant;

/// Two layers of their own, two that depend on those below.
fn image() -> Image {
    let mut tars: Vec<_> = (0..2).map(sample_tar).collect();
    tars.push(Tar::new().file("opt/a/x", &noise(7, 300_000)).finish());
    tars.push(Tar::new().file("etc/b/x", b"x").finish());
    Image::gzipped(&tars)
}

fn repair(ufs: &Path, image: &str, more: &[&str]) -> Output {
    mkfs_accel()
        .args(["repair", image, "--json", "--ufs"])
        .arg(ufs)
        .args(more)
        .output()
        .unwrap()
}

#[track_caller]
fn repaired(ufs: &Path, image: &str, more: &[&str]) -> Value {
    let output = repair(ufs, image, more);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn states(report: &Value) -> Vec<&str> {
    let layers = report["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["state"].as_str().unwrap())
        .collect()
}

/// What readers see: everything that has a final name.
fn published(ufs: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = files(ufs);
    all.retain(|path, _| !path.starts_with("quarantine"));
    all
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn index(image: &Path) -> PathBuf {
    image.with_extension("idx")
}

#[test]
fn damage_of_every_kind_is_undone() {
    let image = image();
    let registry = Registry::start(&Access::Open);
    let remote = registry.image("team/app:v1");
    push(&image.source(), &remote, &[]);
    let ufs = Ufs::new();
    let report = ufs.convert_with(&remote, &["--plain-http"]);
    let before = published(ufs.path());
    // The tag moves on: it is the manifest that counts.
    push(&Image::gzipped(&[sample_tar(9)]).source(), &remote, &[]);

    let nothing = repaired(ufs.path(), &remote, &["--plain-http"]);
    assert_eq!(states(&nothing), ["good"; 4]);

    let file = |number| ufs.image(&report, number);
    fs::remove_file(file(0)).unwrap();
    let half = fs::metadata(file(1)).unwrap().len() / 2;
    let cut = File::options().write(true).open(file(1)).unwrap();
    cut.set_len(half).unwrap();
    flip(&file(2), 200_000);
    fs::write(index(&file(3)), noise(3, 9000)).unwrap();
    // Who has the damaged file open keeps it.
    let mut reader = File::open(file(2)).unwrap();

    let dry = repair(ufs.path(), &remote, &["--dry-run"]);
    assert_eq!(dry.status.code(), Some(3));
    let dry: Value = serde_json::from_slice(&dry.stdout).unwrap();
    assert_eq!(states(&dry), ["damaged"; 4]);
    let quick = repair(ufs.path(), &remote, &["--dry-run", "--quick"]);
    let quick: Value = serde_json::from_slice(&quick.stdout).unwrap();
    assert_eq!(states(&quick), ["damaged", "damaged", "good", "damaged"]);

    let done = repaired(ufs.path(), &remote, &["--plain-http"]);
    assert_eq!(states(&done), ["repaired"; 4]);
    assert!(published(ufs.path()) == before, "the same bytes");
    good(&[&"verify", &remote, &"--ufs", &ufs.path()]);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert!(bytes != fs::read(file(2)).unwrap());

    // What was damaged lies aside until gc.
    let aside: Vec<_> = fs::read_dir(ufs.path().join("quarantine"))
        .unwrap()
        .collect();
    assert_eq!(aside.len(), 3, "{done}");
    good(&[&"gc", &"--ufs", &ufs.path()]);
    let aside = fs::read_dir(ufs.path().join("quarantine")).unwrap();
    assert_eq!(aside.count(), 0);
    assert!(published(ufs.path()) == before);
}

#[test]
fn one_layer_and_what_it_needs() {
    let image = image();
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let before = published(ufs.path());
    let layers = report["layers"].as_array().unwrap();
    let name = |number: usize, field: &str| layers[number][field].as_str().unwrap().to_owned();
    for number in [1, 3] {
        fs::remove_file(ufs.image(&report, number)).unwrap();
    }
    // A layer of its own is made alone.
    let done = repaired(ufs.path(), &name(1, "diff_id"), &[]);
    assert_eq!(states(&done), ["repaired"]);
    // One that depends on others is looked at with them.
    flip(&ufs.image(&report, 0), 5000);
    let done = repaired(ufs.path(), &name(3, "chain_id"), &[]);
    assert_eq!(states(&done), ["repaired", "good", "good", "repaired"]);
    assert!(published(ufs.path()) == before);
    let none = repair(ufs.path(), &format!("sha256:{}", "0".repeat(64)), &[]);
    assert_eq!(none.status.code(), Some(4));
}

/// Without any record: the accelerated image's manifest says what is right.
#[test]
fn an_accelerated_image_is_enough() {
    let image = image();
    let out = tempfile::tempdir().unwrap();
    let accelerated = format!("oci:{}:v1", out.path().join("layout").display());
    let ufs = Ufs::new();
    let report = ufs.convert_with(&image.source(), &["--out", &accelerated]);
    let before = ufs.layers();
    for room in ["images", "names"] {
        fs::remove_dir_all(ufs.path().join(room)).unwrap();
    }
    for number in [0, 2] {
        fs::remove_file(ufs.image(&report, number)).unwrap();
        fs::remove_file(index(&ufs.image(&report, number))).unwrap();
    }
    flip(&ufs.image(&report, 1), 4096 * 9);
    let done = repaired(ufs.path(), &accelerated, &[]);
    assert_eq!(states(&done), ["repaired", "repaired", "repaired", "good"]);
    let mut after = ufs.layers();
    after.retain(|path, _| !path.starts_with("quarantine"));
    assert!(after == before);
    // It counts against a record on UFS that was changed, too.
    ufs.convert(&image.source());
    let changed = ufs.path().join("images/sha256");
    let changed = fs::read_dir(changed)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let root = report["layers"][0]["erofs"]["root"].as_str().unwrap();
    let text = fs::read_to_string(&changed).unwrap();
    fs::write(&changed, text.replace(root, &"0".repeat(64))).unwrap();
    let source = image.source();
    let refused = repair(ufs.path(), &source, &[]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{error}");
    assert!(
        error.contains("nothing was published") && error.contains(root),
        "{error}"
    );
    let done = repaired(ufs.path(), &source, &["--accelerated", &accelerated]);
    assert_eq!(states(&done), ["good"; 4]);
    // An ordinary image says nothing.
    let error = bad(&[
        &"repair",
        &source,
        &"--accelerated",
        &source,
        &"--ufs",
        &ufs.path(),
    ]);
    assert!(error.contains("no accelerated image"), "{error}");
}

/// Killed at any moment and repeated, by two at a time.
#[test]
fn it_can_be_interrupted_anywhere() {
    let image = image();
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let before = published(ufs.path());
    let damage = || {
        fs::remove_file(ufs.image(&report, 0)).unwrap();
        flip(&ufs.image(&report, 1), 4096);
        flip(&ufs.image(&report, 2), 4096);
        fs::write(index(&ufs.image(&report, 2)), b"short").unwrap();
        fs::remove_file(index(&ufs.image(&report, 3))).unwrap();
    };
    damage();
    let began = Instant::now();
    repaired(ufs.path(), &image.source(), &[]);
    let took = began.elapsed();
    let start = || {
        mkfs_accel()
            .args(["repair", &image.source(), "--ufs"])
            .arg(ufs.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let rounds = 10;
    for round in 0..rounds {
        damage();
        let mut both = [start(), start()];
        std::thread::sleep(took * round / rounds);
        for child in &mut both {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // Whatever has its name and is not what it was is what was there, damaged.
        for child in [start(), start()] {
            let done = child.wait_with_output().unwrap();
            let error = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "round {round}: {error}");
        }
        good(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
        good(&[&"gc", &"--ufs", &ufs.path()]);
        assert!(published(ufs.path()) == before, "round {round}");
    }
}

#[test]
fn a_name_leads_nowhere_else() {
    let image = image();
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let before = published(ufs.path());
    let outside = tempfile::tempdir().unwrap();
    // Names that lead to good bytes elsewhere: nodes do not follow them.
    let path = ufs.image(&report, 0);
    let target = outside.path().join("image");
    fs::copy(&path, &target).unwrap();
    fs::remove_file(&path).unwrap();
    symlink(&target, &path).unwrap();
    let done = repaired(ufs.path(), &image.source(), &[]);
    assert_eq!(states(&done)[0], "repaired");
    assert!(!path.is_symlink() && published(ufs.path()) == before);
    assert!(fs::read(&target).unwrap() == before[path.strip_prefix(ufs.path()).unwrap()]);
    // Directories on the way, and the quarantine.
    let quarantine = ufs.path().join("quarantine");
    fs::remove_dir_all(&quarantine).unwrap();
    symlink(outside.path(), &quarantine).unwrap();
    flip(&path, 4096);
    let listed = || fs::read_dir(outside.path()).unwrap().count();
    let count = listed();
    let error = bad(&[&"repair", &image.source(), &"--ufs", &ufs.path()]);
    assert!(error.contains("quarantine"), "{error}");
    fs::remove_file(&quarantine).unwrap();
    let shard = path.parent().unwrap();
    let moved = outside.path().join("shard");
    fs::rename(shard, &moved).unwrap();
    symlink(&moved, shard).unwrap();
    let error = bad(&[&"repair", &image.source(), &"--ufs", &ufs.path()]);
    assert!(error.contains("layers/sha256"), "{error}");
    assert_eq!(listed(), count + 1, "nothing was put there");
    let left: Vec<_> = fs::read_dir(&moved).unwrap().collect();
    assert_eq!(left.len(), 2);
}

/// A password is in nothing that is said or written.
#[test]
fn a_password_is_told_to_nobody_but_the_registry() {
    let image = image();
    let registry = Registry::start(&Access::Password);
    let remote = registry.image("team/app:v1");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
    let ufs = Ufs::new();
    let scratch = tempfile::tempdir().unwrap();
    let config = scratch.path().join("config.json");
    let address = &registry.address;
    // "user:s3kr1t"
    let auth = format!(r#"{{"auths": {{"{address}": {{"auth": "dXNlcjpzM2tyMXQ="}}}}}}"#);
    fs::write(&config, auth).unwrap();
    let login = [
        "--plain-http",
        "--registry-config",
        config.to_str().unwrap(),
    ];
    let report = ufs.convert_with(&remote, &login);
    fs::remove_file(ufs.image(&report, 0)).unwrap();
    let mut said = Vec::new();
    let mut hear = |output: Output| {
        said.extend(output.stdout);
        said.extend(output.stderr);
        output.status
    };
    let run = |more: &[&str]| {
        mkfs_accel()
            .env("RUST_LOG", "trace")
            .args(["repair", &remote, "--ufs"])
            .arg(ufs.path())
            .args(more)
            .output()
            .unwrap()
    };
    // Without a login, with a wrong one, with a file that is not there.
    for more in [
        &["--plain-http"][..],
        &["--plain-http", "--registry-config", "/nonexistent"],
    ] {
        let status = hear(run(more));
        assert_eq!(status.code(), Some(4));
    }
    let wrong = scratch.path().join("wrong");
    fs::write(&wrong, "not-the-secret\n").unwrap();
    let wrong = [
        "--plain-http",
        "--username",
        "user",
        "--password-file",
        wrong.to_str().unwrap(),
    ];
    assert_eq!(hear(run(&wrong)).code(), Some(4));
    assert!(hear(run(&login)).success());
    assert!(!said.is_empty());
    let mut told = files(ufs.path());
    told.insert("what was said".into(), said);
    for (path, bytes) in told {
        for secret in [&b"s3kr1t"[..], b"dXNlcjpzM2tyMXQ"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "{path:?} has the password");
        }
    }
}
