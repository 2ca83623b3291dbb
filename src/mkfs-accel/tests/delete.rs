//! What is deleted, and what is not, while others convert and nodes read.

mod common;

use accel_ufs::node::{NodeLease, NodeName};
use accel_ufs::publish::Ufs as Opened;
use common::services::{Access, Registry, push};
use common::{Image, Ufs, files, good, mkfs_accel, noise, sample_tar};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

/// With `more` arguments, and no pause for nodes.
fn delete(ufs: &Ufs, more: &[&str]) -> Output {
    mkfs_accel()
        .args(["delete", "--settle", "0", "--json", "--plain-http", "--ufs"])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap()
}

#[track_caller]
fn deleted(ufs: &Ufs, more: &[&str]) -> Value {
    report(&delete(ufs, more))
}

/// What a command that has done it says.
#[track_caller]
fn report(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn in_use(ufs: &Ufs, more: &[&str]) -> (Value, String) {
    let output = delete(ufs, more);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{error}");
    (serde_json::from_slice(&output.stdout).unwrap(), error)
}

/// What is on UFS of images: indexes and EROFS images of layers, and records.
fn there(ufs: &Ufs) -> BTreeSet<PathBuf> {
    let mut all: BTreeSet<_> = files(ufs.path()).into_keys().collect();
    all.retain(|path| !path.starts_with("leases") && !path.starts_with("nodes"));
    all
}

fn without(room: &str, mut all: BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    all.retain(|path| !path.starts_with(room));
    all
}

fn verify(ufs: &Ufs, image: &Image) {
    good(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
}

/// Two images with a layer in common.
fn images() -> (Image, Image) {
    let (shared, tar) = (sample_tar(1), |seed| {
        common::Tar::new()
            .file(&format!("opt/{seed}"), &noise(seed, 200_000))
            .finish()
    });
    (
        Image::gzipped(&[shared.clone(), tar(2)]),
        Image::gzipped(&[shared, tar(3), tar(4)]),
    )
}

#[test]
fn exactly_what_no_other_image_needs_goes() {
    let (one, other) = images();
    let alone = Ufs::new();
    alone.convert_with(&other.source(), &["--claim", "c/other"]);
    let ufs = Ufs::new();
    ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    ufs.convert_with(&other.source(), &["--claim", "c/other"]);
    let report = deleted(&ufs, &["--claim", "c/one"]);
    assert_eq!(report["removed"]["layers"], 1, "{report}");
    assert_eq!(report["removed"]["kept"], 1, "{report}");
    // Names of sources have the time.
    assert_eq!(
        without("names", there(&ufs)),
        without("names", there(&alone))
    );
    verify(&ufs, &other);
    let error = common::bad(&[&"verify", &one.source(), &"--ufs", &ufs.path()]);
    assert!(error.contains("is not on UFS"), "{error}");
    // What is gone is converted again.
    ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    verify(&ufs, &one);
    for claim in ["c/one", "c/other"] {
        deleted(&ufs, &["--claim", claim]);
    }
    assert_eq!(there(&ufs), BTreeSet::new());
    // Nothing is left to be done.
    let report = deleted(&ufs, &["--claim", "c/one"]);
    assert_eq!(report["removed"]["layers"], 0, "{report}");
}

#[test]
fn what_others_need_as_well_is_told() {
    let (one, other) = images();
    let ufs = Ufs::new();
    let shared = |image: &Image, claim: &str| -> Vec<_> {
        let report = match claim {
            "" => ufs.convert(&image.source()),
            claim => ufs.convert_with(&image.source(), &["--claim", claim]),
        };
        let layers = report["images"][0]["layers"].as_array().unwrap().clone();
        let shared = layers
            .iter()
            .map(|layer| layer["shared"].as_bool().unwrap());
        shared.collect()
    };
    assert_eq!(shared(&one, "c/one"), [false; 2]);
    assert_eq!(shared(&other, ""), [true, false, false]);
    // That it was converted before is nobody else's.
    assert_eq!(shared(&other, ""), [true, false, false]);
    assert_eq!(shared(&one, "c/one"), [true, false]);
    assert_eq!(shared(&one, "c/two"), [true, true]);
}

#[test]
fn an_image_stays_as_long_as_anybody_has_claimed_it() {
    let (one, _) = images();
    let ufs = Ufs::new();
    ufs.convert_with(&one.source(), &["--claim", "cluster-1/a"]);
    ufs.convert_with(&one.source(), &["--claim", "cluster-2/b"]);
    let before = there(&ufs);
    let report = deleted(&ufs, &["--claim", "cluster-1/a"]);
    assert_eq!(report["removed"]["layers"], 0, "{report}");
    assert_eq!(there(&ufs).len(), before.len() - 1);
    verify(&ufs, &one);
    // By hand, too: before and after.
    ufs.convert(&one.source());
    deleted(&ufs, &["--claim", "cluster-2/b"]);
    verify(&ufs, &one);
    ufs.convert_with(&one.source(), &["--claim", "cluster-1/a"]);
    deleted(&ufs, &["--claim", "cluster-1/a"]);
    verify(&ufs, &one);
    deleted(&ufs, &[&one.source()]);
    assert_eq!(there(&ufs), BTreeSet::new());
}

/// Images from before there were claims are somebody's.
#[test]
fn what_nobody_has_claimed_stays_until_it_is_deleted_by_hand() {
    let (one, other) = images();
    let ufs = Ufs::new();
    ufs.convert(&one.source());
    ufs.convert(&other.source());
    fs::remove_dir_all(ufs.path().join("claims")).unwrap();
    for _ in 0..2 {
        ufs.convert_with(&one.source(), &["--claim", "c/one"]);
        deleted(&ufs, &["--claim", "c/one"]);
        verify(&ufs, &one);
        verify(&ufs, &other);
    }
    let manifest = ufs.convert_with(&other.source(), &["--claim", "c/o"])["manifest"].clone();
    deleted(&ufs, &["--claim", "c/o"]);
    verify(&ufs, &other);
    deleted(&ufs, &[manifest.as_str().unwrap()]);
    verify(&ufs, &one);
    deleted(&ufs, &[&one.source()]);
    assert_eq!(there(&ufs), BTreeSet::new());
    let error = delete(&ufs, &[&one.source()]);
    assert_eq!(error.status.code(), Some(4));
    // What is somebody else's is not deleted by hand.
    ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    let error = String::from_utf8(delete(&ufs, &[&one.source()]).stderr).unwrap();
    assert!(error.contains("--claim c/one"), "{error}");
    verify(&ufs, &one);
}

#[test]
fn what_a_node_uses_stays_and_the_node_is_named() {
    let (one, other) = images();
    let ufs = Ufs::new();
    let report = ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    ufs.convert_with(&other.source(), &["--claim", "c/other"]);
    let root = |number: usize| {
        let root = &report["layers"][number]["erofs"]["root"];
        root.as_str().unwrap().parse().unwrap()
    };
    let (shared, own) = ([root(0)].into(), [root(0), root(1)].into());
    let name = NodeName::new("c", "n1.example").unwrap();
    let opened = Opened::open(ufs.path()).unwrap();
    let mut node = NodeLease::open(opened, name).unwrap();
    node.say(BTreeSet::clone(&own), own.clone()).unwrap();
    let before = there(&ufs);
    let (report, error) = in_use(&ufs, &["--claim", "c/one"]);
    assert_eq!(report["in_use"][0]["node"], "n1.example", "{report}");
    assert_eq!(report["in_use"][0]["expired"], false, "{report}");
    assert!(error.contains("n1.example of cluster c"), "{error}");
    assert_eq!(there(&ufs), before);
    // It still has it mounted, and is silent: who knows what it uses.
    node.say(shared, own.clone()).unwrap();
    let said = files(&ufs.path().join("nodes")).into_keys().next().unwrap();
    let said = File::options()
        .write(true)
        .open(ufs.path().join("nodes").join(said))
        .unwrap();
    let past = SystemTime::now() - Duration::from_secs(3600);
    said.set_times(FileTimes::new().set_modified(past)).unwrap();
    let (report, error) = in_use(&ufs, &["--claim", "c/one"]);
    assert_eq!(report["in_use"][0]["expired"], true, "{report}");
    assert!(error.contains("silent"), "{error}");
    assert_eq!(there(&ufs), before);
    // It is another one that is no more.
    in_use(
        &ufs,
        &[
            "--claim",
            "c/one",
            "--gone",
            "c/n2",
            "--gone",
            "d/n1.example",
        ],
    );
    let again = ["--claim", "c/one", "--gone", "c/n1.example"];
    assert_eq!(deleted(&ufs, &again)["removed"]["layers"], 1);
    verify(&ufs, &other);
    assert!(files(&ufs.path().join("nodes")).is_empty());
}

/// A node begins to use a layer while it is being removed.
#[test]
fn what_a_node_begins_to_use_meanwhile_is_put_back() {
    let (one, _) = images();
    let ufs = Ufs::new();
    let report = ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    let root = report["layers"][1]["erofs"]["root"].as_str().unwrap();
    let used: BTreeSet<_> = [root.parse().unwrap()].into();
    let opened = Opened::open(ufs.path()).unwrap();
    let mut node = NodeLease::open(opened, NodeName::new("c", "n1").unwrap()).unwrap();
    node.say(BTreeSet::new(), used.clone()).unwrap();
    let mut removing = begin_delete(&ufs, "c/one");
    node.say(used.clone(), used).unwrap();
    assert_eq!(removing.wait().unwrap().code(), Some(6));
    verify(&ufs, &one);
    node.say(BTreeSet::new(), BTreeSet::new()).unwrap();
    deleted(&ufs, &["--claim", "c/one"]);
    assert_eq!(there(&ufs), BTreeSet::new());
}

/// A converter has claimed a layer that is being removed, and seen that it is there.
#[test]
fn what_is_claimed_meanwhile_is_put_back() {
    // Also under the name that is being removed.
    for late in ["c/late", "c/one"] {
        claim_while_removing(late);
    }
}

fn claim_while_removing(late: &str) {
    let (one, _) = images();
    let ufs = Ufs::new();
    ufs.convert_with(&one.source(), &["--claim", "c/one"]);
    let opened = Opened::open(ufs.path()).unwrap();
    // As long as there are nodes there is a pause.
    let name = NodeName::new("c", "n1").unwrap();
    let mut node = NodeLease::open(opened.clone(), name).unwrap();
    node.say(BTreeSet::new(), BTreeSet::new()).unwrap();
    let before = files(&ufs.path().join("layers"));
    let mut removing = begin_delete(&ufs, "c/one");
    let claimed = opened.claims().unwrap()[0].record.clone();
    opened.claim(&late.parse().unwrap(), &claimed).unwrap();
    assert_eq!(removing.wait().unwrap().code(), Some(0));
    assert!(files(&ufs.path().join("layers")) == before);
    verify(&ufs, &one);
    deleted(&ufs, &["--claim", late]);
    assert_eq!(there(&ufs), BTreeSet::new());
}

/// Begins to delete, until the first file is hidden.
fn begin_delete(ufs: &Ufs, claim: &str) -> Child {
    let removing = mkfs_accel()
        .args([
            "delete", "--settle", "3", "--json", "--claim", claim, "--ufs",
        ])
        .arg(ufs.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let room = ufs.path().join("removing").join(claim.replace('/', "."));
    while fs::read_dir(&room).map_or(true, |mut files| files.next().is_none()) {
        thread::sleep(Duration::from_millis(5));
    }
    removing
}

/// Converters and removals of images with common layers, side by side, some of them killed:
/// what was converted is whole as long as it is claimed.
#[test]
fn who_converts_and_who_deletes_do_not_harm_each_other() {
    let images = [images().0, images().1];
    let ufs = Ufs::new();
    let turn = |number: usize, round: u64| {
        let image = &images[number];
        let claim = format!("c/{number}");
        ufs.convert_with(&image.source(), &["--claim", &claim]);
        verify(&ufs, image);
        // At whatever moment.
        let mut removal = mkfs_accel()
            .args(["delete", "--settle", "0", "--claim", &claim, "--ufs"])
            .arg(ufs.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        if round.is_multiple_of(2) {
            let pause = 1 + (round * 7 + u64::try_from(number).unwrap() * 3) % 40;
            thread::sleep(Duration::from_millis(pause));
            let _ = removal.kill();
        }
        let ended = removal.wait().unwrap();
        assert!(ended.success() || ended.code().is_none(), "{ended}");
    };
    // What is left is seen only after the last turn of all.
    for start in (0..40).step_by(4) {
        thread::scope(|scope| {
            for number in 0..images.len() {
                let turn = &turn;
                scope.spawn(move || (start..start + 4).for_each(|round| turn(number, round)));
            }
        });
        for number in 0..images.len() {
            deleted(&ufs, &["--claim", &format!("c/{number}")]);
        }
        good(&[&"gc", &"--watch", &"0", &"--ufs", &ufs.path()]);
        assert_eq!(there(&ufs), BTreeSet::new());
    }
}

/// Three layers, of which the last cannot be converted until its blob is put back.
fn half_converted(ufs: &Ufs, more: &[&str]) -> (Image, Vec<u8>) {
    let tars: Vec<_> = (10..13).map(sample_tar).collect();
    let image = Image::gzipped(&tars);
    let path = image.blob_path(&image.layer(2));
    let blob = fs::read(&path).unwrap();
    fs::write(&path, &blob[1..]).unwrap();
    let failed = mkfs_accel()
        .args(["convert", &image.source(), "--jobs", "1", "--ufs"])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap();
    assert!(common::failed(failed.status), "{failed:?}");
    (image, blob)
}

fn gc(ufs: &Ufs, more: &[&str]) -> Output {
    mkfs_accel()
        .args(["gc", "--watch", "0", "--json", "--ufs"])
        .arg(ufs.path())
        .args(more)
        .output()
        .unwrap()
}

#[track_caller]
fn collected(ufs: &Ufs, more: &[&str]) -> Value {
    report(&gc(ufs, more))
}

#[test]
fn what_a_failed_conversion_had_finished_is_named_and_goes_when_asked() {
    let ufs = Ufs::new();
    let (one, other) = images();
    ufs.convert(&one.source());
    ufs.convert_with(&other.source(), &["--claim", "c/other"]);
    let before = there(&ufs);
    let (image, blob) = half_converted(&ufs, &[]);
    let half = there(&ufs);
    let kept = |report: &Value| report["kept"].as_array().unwrap().len();
    let report = collected(&ufs, &[]);
    // Two layers of two files each.
    assert_eq!(kept(&report), 4, "{report}");
    assert!(
        report["kept"][0]["why"]
            .as_str()
            .unwrap()
            .contains("--unclaimed")
    );
    let report = collected(&ufs, &["--unclaimed", "--dry-run"]);
    assert_eq!(report["removed"].as_array().unwrap().len(), 4, "{report}");
    assert_eq!(there(&ufs), half);
    // The next attempt uses them, and they are somebody's then.
    let path = image.blob_path(&image.layer(2));
    let broken = fs::read(&path).unwrap();
    fs::write(&path, &blob).unwrap();
    let report = ufs.convert(&image.source());
    assert_eq!(report["layers"][1]["fate"], "present", "{report}");
    assert_eq!(kept(&collected(&ufs, &[])), 0);
    let removed = |report: &Value| report["unclaimed"]["layers"].as_u64();
    let report = collected(&ufs, &["--unclaimed", "--settle", "0"]);
    assert_eq!(removed(&report), Some(0), "{report}");
    verify(&ufs, &image);
    deleted(&ufs, &[&image.source()]);
    fs::write(&path, broken).unwrap();
    // One after the other, so that two are there when the third fails.
    let source = image.source();
    common::bad(&[&"convert", &source, &"--jobs", &"1", &"--ufs", &ufs.path()]);
    let report = collected(&ufs, &["--unclaimed", "--settle", "0"]);
    assert_eq!(removed(&report), Some(2), "{report}");
    // What was learnt of blobs stays.
    assert_eq!(
        without("by-digest", there(&ufs)),
        without("by-digest", before)
    );
    verify(&ufs, &one);
    verify(&ufs, &other);
}

/// Who needs what is not known then; everything else that `gc` does has nothing to do with it.
#[test]
fn a_damaged_claim_is_in_the_way_of_unclaimed_alone() {
    let ufs = Ufs::new();
    half_converted(&ufs, &[]);
    fs::create_dir_all(ufs.path().join("claims")).unwrap();
    fs::write(ufs.path().join("claims/c.one.0123456789abcdef.json"), "{").unwrap();
    let half = there(&ufs);
    assert_eq!(collected(&ufs, &[])["kept"], serde_json::json!([]));
    let output = gc(&ufs, &["--unclaimed", "--settle", "0"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(common::failed(output.status), "{error}");
    assert!(error.contains("c.one.0123456789abcdef.json"), "{error}");
    assert_eq!(there(&ufs), half);
}

/// A cluster tries again: what it has claimed is its own, with or without an image.
#[test]
fn what_is_claimed_is_not_unclaimed_when_its_conversion_fails() {
    let ufs = Ufs::new();
    half_converted(&ufs, &["--claim", "c/one"]);
    let half = there(&ufs);
    assert_eq!(collected(&ufs, &[])["kept"], serde_json::json!([]));
    let report = collected(&ufs, &["--unclaimed", "--settle", "0"]);
    assert_eq!(report["unclaimed"]["layers"], 0, "{report}");
    assert_eq!(there(&ufs), half);
    let report = deleted(&ufs, &["--claim", "c/one"]);
    assert_eq!(report["removed"]["layers"], 2, "{report}");
}

/// A snapshot that was unpacked before may be mounted from a layer that no image has.
#[test]
fn unclaimed_layers_that_a_node_uses_stay() {
    let ufs = Ufs::new();
    half_converted(&ufs, &[]);
    let half = there(&ufs);
    let index = half
        .iter()
        .find(|path| path.extension() == Some("idx".as_ref()));
    let index = fs::read(ufs.path().join(index.unwrap())).unwrap();
    let page: &[u8; 4096] = index.first_chunk().unwrap();
    let used: BTreeSet<_> = [accel_ufs::index::Header::parse(page).unwrap().root()].into();
    let opened = Opened::open(ufs.path()).unwrap();
    let mut node = NodeLease::open(opened, NodeName::new("c", "n1").unwrap()).unwrap();
    node.say(used.clone(), used).unwrap();
    let ask = ["--unclaimed", "--settle", "0"];
    let output = gc(&ufs, &ask);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{error}");
    assert!(error.contains("n1 of cluster c"), "{error}");
    assert_eq!(without("claims", there(&ufs)), half);
    node.say(BTreeSet::new(), BTreeSet::new()).unwrap();
    let report = collected(&ufs, &ask);
    assert_eq!(report["unclaimed"]["layers"], 2, "{report}");
    assert_eq!(collected(&ufs, &ask)["unclaimed"]["layers"], 0);
}

#[test]
fn tags_go_where_the_registry_removes_them() {
    let (one, other) = images();
    for (access, removes) in [(Access::Deleting, true), (Access::Open, false)] {
        let registry = Registry::start(&access);
        let (source, target) = (registry.image("team/a:v1"), registry.image("team/a:acc"));
        push(&one.source(), &source, &[]);
        let ufs = Ufs::new();
        let convert = |claim: &str, target: &str| {
            ufs.convert_with(
                &source,
                &["--plain-http", "--push", target, "--claim", claim],
            )
        };
        let has = |target: &str| {
            let found = mkfs_accel()
                .args(["convert", "--plain-http", target, "--ufs"])
                .arg(Ufs::new().path())
                .output()
                .unwrap();
            match found.status.code() {
                Some(0) => true,
                Some(4) => false,
                _ => panic!("{found:?}"),
            }
        };
        convert("c/a", &target);
        assert!(has(&target));
        let report = deleted(&ufs, &["--claim", "c/a"]);
        assert_eq!(has(&target), !removes, "{report}");
        assert_eq!(
            report["warnings"].as_array().unwrap().is_empty(),
            removes,
            "{report}"
        );
        assert_eq!(there(&ufs), BTreeSet::new());
        if !removes {
            let warning = report["warnings"][0].as_str().unwrap();
            assert!(warning.contains("removes no tags"), "{warning}");
            continue;
        }
        // The original is none of ours; a tag that is another image by now is not either.
        assert!(has(&source));
        convert("c/a", &target);
        push(&other.source(), &target, &[]);
        let report = deleted(&ufs, &["--claim", "c/a"]);
        assert!(has(&target));
        let warning = report["warnings"][0].as_str().unwrap();
        assert!(warning.contains("another image"), "{warning}");
        // One manifest, two tags, and one of them is needed.
        let second = registry.image("team/a:acc2");
        convert("c/a", &target);
        convert("c/b", &second);
        deleted(&ufs, &["--claim", "c/a"]);
        assert!(has(&second));
        deleted(&ufs, &["--claim", "c/b"]);
        assert!(!has(&second));
        assert!(has(&source));
    }
}
