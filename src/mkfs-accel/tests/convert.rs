//! Conversion from OCI layouts: what is published, and what is not.

mod common;

use accel_ufs::record::ImageRecord;
use common::{GZIP, Image, PLAIN, Tar, Ufs, ZSTD, good, gzip, run, sample_tar, zstd};
use serde_json::json;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

/// Roots in the record and the bytes of the images agree.
fn check_roots(ufs: &Ufs, manifest: &str) {
    let hex = manifest.strip_prefix("sha256:").unwrap();
    let path = ufs.path().join(format!("images/sha256/{hex}.json"));
    let record = ImageRecord::parse(&fs::read(path).unwrap()).unwrap();
    assert!(!record.layers.is_empty());
    for layer in &record.layers {
        let image = fs::read(layer.erofs.path.beneath(ufs.path())).unwrap();
        let root = *blake3::hash(&image).as_bytes();
        assert_eq!(layer.erofs.root.0, root, "{}", layer.erofs.path);
        assert_eq!(layer.erofs.size.bytes(), image.len() as u64);
        // The superblock's UUID, at byte 48 of it.
        assert_eq!(layer.erofs.uuid.0, image[1024 + 48..][..16]);
    }
}

#[test]
fn an_image_is_published_and_found_by_every_name() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let manifest = report["manifest"].as_str().unwrap();
    check_roots(&ufs, manifest);
    let by_digest = image.layer(0).replace("sha256:", "");
    let by_digest = format!("by-digest/sha256/{}/{by_digest}.json", &by_digest[..2]);
    assert!(ufs.path().join(by_digest).exists());
    assert!(
        fs::read_dir(ufs.path().join("tmp"))
            .unwrap()
            .next()
            .is_none()
    );

    let directory = image.directory.path();
    let parent = directory.parent().unwrap();
    let relative = format!(
        "oci:./{}:v1",
        directory.file_name().unwrap().to_str().unwrap()
    );
    for name in [manifest, &image.source(), &relative] {
        let output = common::mkfs_accel()
            .args(["inspect", name, "--json", "--ufs"])
            .arg(ufs.path())
            .current_dir(parent)
            .output()
            .unwrap();
        let record = ImageRecord::parse(&output.stdout).unwrap();
        assert_eq!(record.manifest.to_string(), manifest);
        assert_eq!(record.process.cmd, ["sh"]);
    }
    let text = good(&[&"inspect", &manifest, &"--ufs", &ufs.path()]);
    assert!(text.contains(report["layers"][1]["erofs"]["root"].as_str().unwrap()));
    let text = good(&[&"list", &"--ufs", &ufs.path()]);
    assert!(
        text.contains(manifest) && text.contains("2 layers"),
        "{text}"
    );
    let text = good(&[&"verify", &manifest, &"--ufs", &ufs.path()]);
    assert!(text.contains("good"), "{text}");
}

#[test]
fn what_is_on_ufs_is_not_read_again_and_nothing_changes() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    let ufs = Ufs::new();
    let fates = |report: &serde_json::Value| {
        let layers = report["layers"].as_array().unwrap().clone();
        layers
            .into_iter()
            .map(|l| l["fate"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        fates(&ufs.convert(&image.source())),
        ["converted", "converted"]
    );
    let before = common::files(ufs.path());
    // Not even the blobs are needed any more.
    for number in 0..2 {
        fs::remove_file(image.blob_path(&image.layer(number))).unwrap();
    }
    assert_eq!(fates(&ufs.convert(&image.source())), ["present", "present"]);
    assert_eq!(common::files(ufs.path()), before);
    let text = good(&[&"convert", &image.source(), &"--ufs", &ufs.path()]);
    assert_eq!(text.matches("already on UFS").count(), 2, "{text}");
}

#[test]
fn compression_does_not_matter() {
    let tar = sample_tar(3);
    let mut all = Vec::new();
    for (blob, media_type) in [
        (tar.clone(), PLAIN),
        (gzip(&tar), GZIP),
        (zstd(&tar), ZSTD),
        (tar.clone(), "application/vnd.docker.image.rootfs.diff.tar"),
        (
            gzip(&tar),
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ),
        // As in containerd, what it says counts less than what it is.
        (zstd(&tar), GZIP),
        (gzip(&tar), "application/vnd.docker.image.rootfs.diff.tar"),
    ] {
        let image = Image::new(&[(&tar, &blob, media_type)]);
        let ufs = Ufs::new();
        let report = ufs.convert(&image.source());
        check_roots(&ufs, report["manifest"].as_str().unwrap());
        let mut layers = ufs.layers();
        layers.retain(|path, _| !path.starts_with("by-digest"));
        assert_eq!(layers.len(), 2, "{media_type}");
        all.push(layers);
    }
    for other in &all[1..] {
        assert_eq!(other, &all[0]);
    }
}

#[test]
fn the_same_image_from_two_places_has_one_record() {
    let first = Image::gzipped(&[sample_tar(1)]);
    let second = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    assert_eq!(
        ufs.convert(&first.source())["manifest"],
        ufs.convert(&second.source())["manifest"],
    );
    for image in [&first, &second] {
        good(&[&"inspect", &image.source(), &"--ufs", &ufs.path()]);
    }
}

/// A layer with "opt/new" but no "opt/": its tree depends on what lies below.
#[test]
fn a_layer_that_depends_on_those_below_is_named_by_its_chain() {
    let implied = Tar::new().file("opt/new", b"x").finish();
    let ufs = Ufs::new();
    let above = ufs.convert(&Image::gzipped(&[sample_tar(1), implied.clone()]).source());
    let alone = ufs.convert(&Image::gzipped(&[implied]).source());
    let path = |report: &serde_json::Value, number: usize| {
        let path = &report["layers"][number]["erofs"]["path"];
        path.as_str().unwrap().to_owned()
    };
    assert!(path(&above, 0).starts_with("layers/"));
    assert!(path(&above, 1).starts_with("chains/"));
    assert!(path(&alone, 0).starts_with("chains/"));
    assert_ne!(path(&above, 1), path(&alone, 0));
    let mode = |report: &serde_json::Value, number: usize| {
        use accel_layer::{ErofsLower, LowerDirectory, LowerLookup};
        let image = ImageFile(fs::File::open(ufs.image(report, number)).unwrap());
        let mut lower = ErofsLower::open(image).unwrap();
        match lower.directory(&[b"opt"]).unwrap() {
            LowerDirectory::Found(attributes) => format!("{:?}", attributes.permissions),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(mode(&above, 1), mode(&above, 0));
    assert_ne!(mode(&alone, 0), mode(&above, 0));
}

/// The lowest layer's whiteouts hide nothing; on top of others they must.
#[test]
fn a_layer_with_whiteouts_is_another_one_as_the_lowest() {
    let hiding = Tar::new().file(".wh.hello", b"").finish();
    let above = Image::gzipped(&[sample_tar(1), hiding.clone()]);
    let alone = Image::gzipped(&[hiding]);
    for order in [[&above, &alone], [&alone, &above]] {
        let ufs = Ufs::new();
        for image in order {
            let report = ufs.convert(&image.source());
            let layers = report["layers"].as_array().unwrap();
            let layer = layers.last().unwrap();
            assert_eq!(layer["fate"], "converted");
            let path = layer["erofs"]["path"].as_str().unwrap();
            let expected = match layers.len() {
                1 => "chains/",
                _ => "layers/",
            };
            assert!(path.starts_with(expected), "{path}");
        }
        for image in order {
            let report = ufs.convert(&image.source());
            let layers = report["layers"].as_array().unwrap();
            assert_eq!(layers.last().unwrap()["fate"], "present");
        }
    }
}

/// Also if it was converted from another blob, and nothing is noted of this one.
#[test]
fn a_lowest_layer_with_whiteouts_is_never_that_of_another_blob() {
    let hiding = Tar::new().file(".wh.hello", b"").finish();
    let above = Image::gzipped(&[sample_tar(1), hiding.clone()]);
    let alone = Image::new(&[(&hiding, &zstd(&hiding), ZSTD)]);
    let middle = [
        (sample_tar(1), gzip(&sample_tar(1)), GZIP),
        (hiding.clone(), zstd(&hiding), ZSTD),
    ];
    let middle = Image::new(
        &middle
            .each_ref()
            .map(|(tar, blob, kind)| (&**tar, &**blob, *kind)),
    );
    for before in [&[&above][..], &[&above, &middle]] {
        let ufs = Ufs::new();
        for image in before {
            ufs.convert(&image.source());
        }
        let report = ufs.convert(&alone.source());
        let path = report["layers"][0]["erofs"]["path"].as_str().unwrap();
        assert!(path.starts_with("chains/"), "{path}");
    }
}

/// An image's file as `accel-erofs` reads it.
struct ImageFile(fs::File);

impl accel_erofs::Input for ImageFile {
    type Error = std::io::Error;

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }
}

#[test]
fn a_damaged_layer_below_is_noticed_when_it_is_asked() {
    let implied = Tar::new().file("opt/new", b"x").finish();
    let ufs = Ufs::new();
    let report = ufs.convert(&Image::gzipped(&[sample_tar(1)]).source());
    let path = ufs.image(&report, 0);
    // The last block is metadata.
    let size = fs::metadata(&path).unwrap().len();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", size - 4096).unwrap();
    let error = ufs.refuse(&Image::gzipped(&[sample_tar(1), implied]).source());
    assert!(
        error.contains("damaged") && error.contains(path.to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn a_wrong_diff_id_is_an_error_that_names_the_layer_and_publishes_nothing() {
    let mut image = Image::gzipped(&[sample_tar(1)]);
    let wrong = format!("sha256:{}", "0".repeat(64));
    image.config["rootfs"]["diff_ids"][0] = json!(wrong);
    image.write();
    let ufs = Ufs::new();
    let error = ufs.refuse(&image.source());
    assert!(error.contains(&image.layer(0)), "{error}");
    assert!(
        error.contains(&format!("the image's config says {wrong}")),
        "{error}"
    );
    assert!(ufs.is_empty());
}

#[test]
fn damaged_blobs_are_errors_that_name_the_layer_and_publish_nothing() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 3] = [
        ("bytes", |path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(100_000).unwrap();
        }),
        ("", |path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[0xff; 64], 200_000).unwrap();
        }),
        ("No such file", |path| fs::remove_file(path).unwrap()),
    ];
    for compress in [gzip, zstd, <[u8]>::to_vec] {
        for (said, damage) in cases {
            let tar = sample_tar(1);
            let blob = compress(&tar);
            let media_type = match blob[0] {
                0x1f => GZIP,
                0x28 => ZSTD,
                _ => PLAIN,
            };
            let image = Image::new(&[(&tar, &blob, media_type)]);
            damage(&image.blob_path(&image.layer(0)));
            let ufs = Ufs::new();
            let error = ufs.refuse(&image.source());
            let name = image.layer(0).replace("sha256:", "");
            assert!(error.contains(&name), "{media_type}: {error}");
            assert!(error.contains(said), "{media_type}: {error}");
            assert!(ufs.is_empty(), "{media_type}: {said}");
        }
    }
}

#[test]
fn a_failing_layer_leaves_the_good_ones_below_it_but_no_image() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    fs::remove_file(image.blob_path(&image.layer(1))).unwrap();
    let ufs = Ufs::new();
    let one = [
        &"convert" as &dyn AsRef<_>,
        &image.source(),
        &"--jobs",
        &"1",
    ];
    common::bad(&[&one[..], &[&"--ufs", &ufs.path()]].concat());
    let left = common::files(ufs.path());
    assert!(left.keys().any(|path| path.starts_with("layers")));
    assert!(!left.keys().any(|path| path.starts_with("images")));
    assert!(!left.keys().any(|path| path.starts_with("tmp")));
    let error = common::bad(&[&"inspect", &image.source(), &"--ufs", &ufs.path()]);
    assert!(error.contains("convert it first"), "{error}");
}

#[test]
fn images_that_are_none_are_refused_with_their_reason() {
    let check = |change: fn(&mut Image), named: &str| {
        let mut image = Image::gzipped(&[sample_tar(1)]);
        change(&mut image);
        image.write();
        let ufs = Ufs::new();
        let error = ufs.refuse(&image.source());
        assert!(error.contains(named), "{named}: {error}");
        assert!(ufs.is_empty());
    };
    check(
        |image| image.config["rootfs"]["diff_ids"] = json!([]),
        "1 layers, but its config 0 diffIDs",
    );
    check(
        |image| image.manifest["layers"][0]["mediaType"] = json!("application/x-unknown"),
        "application/x-unknown",
    );
    check(
        |image| image.config["architecture"] = json!("vax"),
        "linux/vax",
    );
    check(
        |image| {
            image.manifest["layers"] = json!([]);
            image.config["rootfs"]["diff_ids"] = json!([]);
        },
        "no layers",
    );
    check(
        |image| image.manifest["layers"][0]["mediaType"] = json!(PLAIN),
        "gzip",
    );
}

#[test]
fn layouts_and_tags_that_are_not_there_are_said() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let directory = image.directory.path().display();
    let error = ufs.refuse(&format!("oci:{directory}:v2"));
    assert!(
        error.contains("\"v2\"") && error.contains("it has v1"),
        "{error}"
    );
    let error = ufs.refuse("oci:/nonexistent");
    assert!(
        error.contains("/nonexistent") && error.contains("oci-layout"),
        "{error}"
    );
    // The only image needs no tag.
    ufs.convert(&format!("oci:{directory}"));
    let output = run(&[&"convert", &"nonsense", &"--ufs", &ufs.path()]);
    assert_eq!(output.status.code(), Some(2));
    let missing = ufs.path().join("mnt");
    let error = common::bad(&[&"convert", &image.source(), &"--ufs", &missing]);
    assert!(error.contains("does not exist"), "{error}");
    assert!(!missing.exists());
}

#[test]
fn converters_at_once_do_not_disturb_each_other() {
    let tars: Vec<_> = (0..3).map(sample_tar).collect();
    let image = Image::gzipped(&tars);
    let ufs = Ufs::new();
    let start = || {
        common::mkfs_accel()
            .args(["convert", &image.source(), "--ufs"])
            .arg(ufs.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let all: Vec<_> = (0..4).map(|_| start()).collect();
    for converter in all {
        let output = converter.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
    }
    assert!(
        fs::read_dir(ufs.path().join("tmp"))
            .unwrap()
            .next()
            .is_none()
    );
    let alone = Ufs::new();
    alone.convert(&image.source());
    assert_eq!(ufs.layers(), alone.layers());
    good(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
}

/// A converter died between image and index: the next one finishes its work.
#[test]
fn an_image_without_an_index_is_completed_unless_it_is_another() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let erofs = ufs.image(&report, 0);
    let index = erofs.with_extension("idx");
    let bytes = fs::read(&index).unwrap();
    fs::remove_file(&index).unwrap();
    ufs.convert(&image.source());
    assert_eq!(fs::read(&index).unwrap(), bytes);

    fs::remove_file(&index).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&erofs).unwrap();
    file.write_all_at(b"x", 5000).unwrap();
    let error = ufs.refuse(&image.source());
    assert!(error.contains(erofs.to_str().unwrap()), "{error}");
    assert!(!index.exists());
}

#[test]
fn lines_of_json_tell_how_far_the_work_is_and_end_with_the_report() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2), sample_tar(3)]);
    let ufs = Ufs::new();
    let lines = |source: &str| -> Vec<serde_json::Value> {
        let said = good(&[&"convert", &source, &"--json-lines", &"--ufs", &ufs.path()]);
        let parse = |line| serde_json::from_str(line).unwrap();
        said.lines().map(parse).collect()
    };
    let said = lines(&image.source());
    // First, that the image can be had.
    let (checked, said) = said.split_first().unwrap();
    assert_eq!(checked["checked"]["source"], image.source());
    let (report, progress) = said.split_last().unwrap();
    assert_eq!(report["layers"].as_array().unwrap().len(), 3);
    let sizes: u64 = (0..3)
        .map(|number| {
            fs::metadata(image.blob_path(&image.layer(number)))
                .unwrap()
                .len()
        })
        .sum();
    let mut done = 0;
    for line in progress {
        let line = &line["progress"];
        assert_eq!(line["layers"], 3);
        assert_eq!(line["bytes"], sizes);
        let now = line["layers_done"].as_u64().unwrap();
        assert!(now >= done, "{progress:?}");
        done = now;
    }
    let last = &progress.last().unwrap()["progress"];
    assert_eq!(
        (&last["layers_done"], &last["bytes_done"]),
        (&json!(3), &json!(sizes))
    );

    // Nothing has to be read any more.
    let again = lines(&image.source());
    let last = &again[again.len() - 2]["progress"];
    assert_eq!(
        (&last["layers_done"], &last["bytes"]),
        (&json!(3), &json!(0))
    );
}
