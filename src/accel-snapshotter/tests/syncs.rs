//! How often the store waits for the disk: whoever starts a container waits as well.

use accel_snapshotter::snapshot::Kind;
use accel_snapshotter::store::{New, Store};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Where the traced run has its database.
const DIRECTORY: &str = "ACCEL_TEST_SYNCS";
const CONTAINERS: usize = 50;

/// A container's snapshot is on disk before it is answered for, and forgotten there before
/// that is; each takes one sync, half of what containerd's own databases take for each of
/// their transactions. (Where the file has to grow, that is one more.)
#[test]
fn each_change_waits_for_the_disk_once() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let output = Command::new("strace")
        .args(["-f", "-qq", "-e", "signal=none", "-o"])
        .arg(&log)
        .args([
            "-e",
            "trace=fsync,fdatasync,sync,syncfs,msync,sync_file_range,?mkdir,mkdirat",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "containers_come_and_go"])
        .env(DIRECTORY, directory.path())
        .output()
        .unwrap_or_else(|error| panic!("strace: {error}; apt-get install strace"));
    assert!(output.status.success(), "{output:?}");
    let log = fs::read_to_string(log).unwrap();
    let between = log.split("/begin\"").nth(1).expect("a beginning");
    let between = between.split("/end\"").next().expect("an end");
    // What another thread interrupts is on two lines.
    let calls = between.lines().filter(|line| !line.contains(" resumed>"));
    let made = calls.clone().filter(|line| line.contains("mkdir")).count();
    let synced = calls.filter(|line| line.contains("sync(")).count();
    // The last one makes `end`.
    assert_eq!(made, CONTAINERS + 1, "{log}");
    let changes = 2 * CONTAINERS;
    assert!((changes..changes + 5).contains(&synced), "{synced}: {log}");
}

#[test]
#[ignore = "run by the one before, under strace"]
fn containers_come_and_go() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).expect("where to"));
    let store = Store::open(&directory.join("database")).unwrap();
    let key = |number: usize| format!("k8s.io/{number}/container");
    fs::create_dir(directory.join("begin")).unwrap();
    for number in 0..CONTAINERS {
        let prepare = |id: accel_snapshotter::snapshot::SnapshotId| {
            let files = directory.join(id.0.to_string());
            fs::create_dir(&files).map(|()| files)
        };
        let made = store.create(Kind::Active, &key(number), None, New::default(), prepare);
        made.unwrap();
    }
    for number in 0..CONTAINERS {
        store.remove(&key(number)).unwrap();
    }
    fs::create_dir(directory.join("end")).unwrap();
}
