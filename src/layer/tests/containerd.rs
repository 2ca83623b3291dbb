//! Awkward layers, as containerd's overlayfs snapshotter unpacks them and as the
//! kernel shows our images of them: entry by entry the same.
//!
//! Each layer is compared with what containerd put into its snapshot, whiteouts and
//! marks of opaque directories included; images of several layers also as a whole.
//! Left out is the time of what containerd makes on its own account (the root,
//! implied directories, whiteouts): it is that of the unpacking.

#[path = "common/cases/mod.rs"]
mod cases;
mod common;
#[path = "common/containerd.rs"]
mod containerd;
#[path = "common/seen.rs"]
mod seen;
#[path = "../../erofs/tests/common/tools.rs"]
mod tools;

use accel_layer::{ErofsLower, LayerOptions, LowerStack};
use accel_oci::ChainId;
use cases::{
    Case,
    Expect::{Lenient, Refused, Same, Stricter},
};
use common::{chain, convert_with};
use seen::Seen;
use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

/// Layers converted one on top of the other, or why one is refused.
fn convert_all(case: &Case, directory: &Path) -> Result<Vec<PathBuf>, String> {
    let mut images: Vec<PathBuf> = vec![];
    let mut parent = None;
    for layer in &case.layers {
        let below = images.iter().rev();
        let mut lower = LowerStack(
            below
                .map(|path| ErofsLower::open_file(path).unwrap())
                .collect(),
        );
        let mut options = LayerOptions::new("test");
        options.parent = parent;
        options.max_image_size = 1 << 30;
        let (summary, image) =
            convert_with(layer, &options, &mut lower).map_err(|error| chain(&error))?;
        parent = Some(ChainId::new(parent, summary.diff_id));
        let path = directory.join(format!("{}.erofs", images.len()));
        fs::write(&path, image).unwrap();
        images.push(path);
    }
    Ok(images)
}

/// What we give to entries that have the time of the unpacking with containerd: 1970, or
/// the time of a lower directory, which in all these layers is that of [`header`].
const FIXED: [(i64, i64); 2] = [(0, 0), (3, 0)];

/// What differs; an entry that containerd touched while it unpacked, within `run` (seconds
/// since 1970), has one of [`FIXED`] here.
fn difference(
    wanted: &BTreeMap<PathBuf, Seen>,
    found: &BTreeMap<PathBuf, Seen>,
    run: &RangeInclusive<i64>,
) -> String {
    let mut text = String::new();
    for (path, wanted) in wanted {
        match found.get(path) {
            None => writeln!(text, "    missing:    {path:?} {wanted:?}").unwrap(),
            Some(found) => {
                let mut found = found.clone();
                if run.contains(&wanted.mtime.0) && FIXED.contains(&found.mtime) {
                    found.mtime = wanted.mtime;
                }
                if found != *wanted {
                    writeln!(
                        text,
                        "    containerd: {path:?} {wanted:?}\n    ours:       {path:?} {found:?}"
                    )
                    .unwrap();
                }
            }
        }
    }
    for (path, found) in found {
        if !wanted.contains_key(path) {
            writeln!(text, "    too much:   {path:?} {found:?}").unwrap();
        }
    }
    text
}

/// Compares trees layer by layer, then as a whole.
fn compare(
    unpacked: &containerd::Unpacked,
    images: &[PathBuf],
    run: &RangeInclusive<i64>,
) -> String {
    let mut text = String::new();
    if let Some(fsck) = tools::fsck() {
        for image in images {
            tools::check_with_fsck(&fsck, image);
        }
    }
    let mounts: Vec<_> = images
        .iter()
        .map(|image| tools::try_mount(image).expect("the image mounts"))
        .collect();
    assert_eq!(unpacked.layers.len(), mounts.len());
    for (number, (theirs, ours)) in unpacked.layers.iter().zip(&mounts).enumerate() {
        let different = difference(&seen::look(theirs), &seen::look(ours.0.path()), run);
        if !different.is_empty() {
            write!(text, "  layer {number}:\n{different}").unwrap();
        }
    }
    if mounts.len() > 1 {
        let merged = tempfile::tempdir().unwrap();
        let lower: Vec<_> = mounts
            .iter()
            .rev()
            .map(|m| m.0.path().display().to_string())
            .collect();
        let options = format!("ro,lowerdir={}", lower.join(":"));
        let status = Command::new("mount")
            .args(["-t", "overlay", "-o", &options, "overlay"])
            .arg(merged.path())
            .status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "mounting the overlay"
        );
        let different = difference(
            &seen::look(unpacked.path()),
            &seen::look(merged.path()),
            run,
        );
        if !different.is_empty() {
            write!(text, "  all layers:\n{different}").unwrap();
        }
        let status = Command::new("umount").arg(merged.path()).status();
        assert!(status.is_ok_and(|status| status.success()), "umount failed");
    }
    text
}

/// Whether the case came out as expected; if not, how.
fn judge(
    case: &Case,
    theirs: Result<&containerd::Unpacked, &String>,
    run: &RangeInclusive<i64>,
) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    let ours = convert_all(case, directory.path());
    match (theirs, ours, case.expect) {
        (Ok(theirs), Ok(ours), Same) => {
            Some(compare(theirs, &ours, run)).filter(|text| !text.is_empty())
        }
        (Err(_), Err(ours), Refused(text)) | (Ok(_), Err(ours), Stricter(text))
            if ours.contains(text) =>
        {
            None
        }
        (Err(_), Ok(_), Lenient) => None,
        (theirs, ours, _) => Some(format!(
            "    containerd: {}\n    ours:       {}\n",
            theirs.map_or_else(String::as_str, |_| "takes it"),
            ours.map_or_else(|error| error, |_| "takes it".into()),
        )),
    }
}

fn run(cases: &[Case]) {
    let only = std::env::var("ONLY").unwrap_or_default();
    let cases: Vec<&Case> = cases.iter().filter(|c| c.name.contains(&only)).collect();
    let Some(()) = tools::root() else { return };
    let Some(containerd) = containerd::Containerd::start() else {
        return;
    };
    let now = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        since.as_secs().cast_signed()
    };
    let start = now();
    let images: Vec<_> = cases
        .iter()
        .map(|case| (case.name.as_str(), &case.layers[..]))
        .collect();
    containerd.import(&images);
    let mut wrong = String::new();
    for case in &cases {
        let theirs = containerd.mount(&case.name);
        if let Some(text) = judge(case, theirs.as_ref(), &(start..=now())) {
            writeln!(wrong, "{}\n{text}", case.name).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn awkward_layers_are_what_containerd_unpacks() {
    run(&cases::awkward());
}

#[test]
fn tars_of_others_are_what_containerd_unpacks() {
    if let Some(cases) = cases::of_others() {
        run(&cases);
    }
}
