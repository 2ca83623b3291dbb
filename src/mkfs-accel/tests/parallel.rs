//! Layers at the same time: what they wait for, and what an error does.

mod common;

use common::{GZIP, Image, Tar, Ufs, bad, files, good, gzip, sample_tar};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::process::Stdio;

fn fates(report: &Value) -> Vec<&str> {
    let layers = report["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["fate"].as_str().unwrap())
        .collect()
}

/// Layers of which every second needs those below it: "opt/N" without "opt/".
fn dependent_layers() -> Vec<Vec<u8>> {
    (0..6)
        .map(|seed| match seed % 2 {
            0 => sample_tar(seed),
            _ => Tar::new().file(&format!("opt/{seed}/x"), b"x").finish(),
        })
        .collect()
}

#[test]
fn the_number_of_jobs_does_not_show() {
    let image = Image::gzipped(&dependent_layers());
    let all = ["1", "2", "4", "16"].map(|jobs| {
        let ufs = Ufs::new();
        let report = ufs.convert_with(&image.source(), &["--jobs", jobs]);
        assert_eq!(fates(&report), ["converted"; 6]);
        let mut all = files(ufs.path());
        all.retain(|path, _| !path.starts_with("names"));
        assert!(all.keys().any(|path| path.starts_with("chains")));
        all
    });
    for other in &all[1..] {
        assert!(other == &all[0]);
    }
    let ufs = Ufs::new();
    let help = good(&[&"convert", &"--help"]);
    assert!(help.contains("--jobs"), "{help}");
    let none = [&"convert" as &dyn AsRef<OsStr>, &image.source(), &"--jobs"];
    let output = common::run(&[&none[..], &[&"0", &"--ufs", &ufs.path()]].concat());
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_layer_that_an_image_has_twice_is_converted_once() {
    let [first, second] = [sample_tar(1), sample_tar(2)];
    let tars = [&first, &second, &first, &first].map(Vec::clone);
    for jobs in ["1", "4"] {
        let ufs = Ufs::new();
        let report = ufs.convert_with(&Image::gzipped(&tars).source(), &["--jobs", jobs]);
        let wanted = ["converted", "converted", "present", "present"];
        assert_eq!(fates(&report), wanted, "--jobs {jobs}");
        assert_eq!(ufs.image(&report, 0), ufs.image(&report, 3));
    }
}

/// The layer below fails while the one above waits for it.
#[test]
fn the_error_is_that_of_the_layer_that_failed_first() {
    let below = sample_tar(1);
    let mut broken = gzip(&below);
    let half = broken.len() / 2;
    broken[half] ^= 1;
    let above = Tar::new().file("opt/x", b"x").finish();
    let image = Image::new(&[(&below, &broken, GZIP), (&above, &gzip(&above), GZIP)]);
    let ufs = Ufs::new();
    let arguments = [&"convert" as &dyn AsRef<OsStr>, &image.source(), &"--jobs"];
    for jobs in ["1", "4"] {
        let error = bad(&[&arguments[..], &[&jobs, &"--ufs", &ufs.path()]].concat());
        assert!(error.contains(&image.layer(0)), "{error}");
        assert!(!error.contains("another layer"), "{error}");
        assert!(ufs.is_empty());
    }
}

/// What the others have finished by then stays, and is not done again.
#[test]
fn after_an_error_the_next_run_goes_on() {
    let mut tars: Vec<_> = (0..5).map(sample_tar).collect();
    tars.push(Tar::new().file("last", b"x").finish());
    let image = Image::gzipped(&tars);
    let path = image.blob_path(&image.layer(5));
    let blob = fs::read(&path).unwrap();
    fs::write(&path, &blob[1..]).unwrap();
    let ufs = Ufs::new();
    let arguments = [&"convert" as &dyn AsRef<OsStr>, &image.source(), &"--jobs"];
    bad(&[&arguments[..], &[&"3", &"--ufs", &ufs.path()]].concat());
    let left = files(ufs.path());
    assert!(!left.keys().any(|path| path.starts_with("tmp")));
    let there = left
        .keys()
        .filter(|path| path.extension() == Some("idx".as_ref()));
    let there = there.count();
    fs::write(&path, blob).unwrap();
    let report = ufs.convert_with(&image.source(), &["--jobs", "3"]);
    let present = fates(&report).into_iter().filter(|fate| *fate == "present");
    assert_eq!(present.count(), there);
    good(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
}

/// Several converters of images with layers in common, one of them killed in the middle.
#[test]
fn converters_side_by_side_convert_each_layer_once() {
    let layers = dependent_layers();
    let images: Vec<_> = (0..3)
        .map(|number| {
            let own = Tar::new().file(&format!("opt/own/{number}"), b"x").finish();
            Image::gzipped(&[layers.clone(), vec![own]].concat())
        })
        .collect();
    let ufs = Ufs::new();
    let convert = |image: &Image| {
        common::mkfs_accel()
            .args(["convert", "--json", "--jobs", "2", &image.source(), "--ufs"])
            .arg(ufs.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut killed = convert(&images[0]);
    let turns = ufs.path().join("turns");
    while fs::read_dir(&turns).map_or(true, |mut turns| turns.next().is_none()) {
        std::thread::yield_now();
    }
    let others: Vec<_> = images.iter().map(&convert).collect();
    killed.kill().unwrap();
    killed.wait().unwrap();
    let mut converted = std::collections::BTreeMap::new();
    for other in others {
        let output = other.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        for layer in report["layers"].as_array().unwrap() {
            let times: &mut u32 = converted.entry(layer["chain_id"].to_string()).or_default();
            *times += u32::from(layer["fate"] != "present");
        }
    }
    assert_eq!(converted.len(), 6 + 3);
    assert!(converted.values().all(|times| *times <= 1), "{converted:?}");
    assert!(
        files(ufs.path())
            .keys()
            .all(|path| !path.starts_with("turns"))
    );
}
