//! UFS as others see it: killed converters, full and vanished file systems, gc.

mod common;

use accel_ufs::node::{NodeLease, NodeName};
use accel_ufs::publish::Ufs as Opened;
use common::{Image, Tar, Ufs, bad, files, good, mkfs_accel, noise, sample_tar};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

fn start(image: &Image, ufs: &Path) -> Child {
    mkfs_accel()
        .args(["convert", "--jobs", "3", &image.source(), "--ufs"])
        .arg(ufs)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Layers that need others and layers that do not.
fn image() -> Image {
    let mut tars: Vec<_> = (0..4).map(sample_tar).collect();
    tars.insert(2, Tar::new().file("opt/a/x", &noise(7, 300_000)).finish());
    tars.push(Tar::new().file("opt/b/x", b"x").finish());
    Image::gzipped(&tars)
}

/// Everything but the names of sources, which carry the time.
fn published(ufs: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = files(ufs);
    all.retain(|path, _| !path.starts_with("names"));
    all
}

fn is_final(path: &Path) -> bool {
    let mut passing = ["tmp", "leases", "turns"].iter();
    !passing.any(|room| path.starts_with(room))
}

fn gc(ufs: &Path, more: &[&str]) -> Value {
    let output = mkfs_accel()
        .args(["gc", "--json", "--ufs"])
        .arg(ufs)
        .args(more)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Whether somebody has begun something in `tmp`.
fn has_temporaries(ufs: &Path) -> bool {
    fs::read_dir(ufs.join("tmp")).is_ok_and(|mut all| all.next().is_some())
}

/// Two converters of one image, both killed at any moment, again and again: until enough of
/// them were killed with something in hand.
#[test]
fn killed_converters_leave_nothing_half_and_nothing_for_ever() {
    let image = image();
    let wanted = Ufs::new();
    let began = Instant::now();
    wanted.convert(&image.source());
    let took = began.elapsed();
    let wanted = published(wanted.path());
    let rounds = 16;
    let mut at_work = 0;
    for round in 0.. {
        if round >= rounds && at_work >= 8 {
            break;
        }
        assert!(round < 10 * rounds, "{at_work} were killed at work");
        let ufs = Ufs::new();
        let mut both = [0, 1].map(|_| start(&image, ufs.path()));
        // From the very start to about when a converter alone would be done.
        thread::sleep(took * (round % rounds) / rounds * 3 / 2);
        for converter in &mut both {
            converter.kill().unwrap();
        }
        let ends = both.map(|mut converter| converter.wait().unwrap());
        if has_temporaries(ufs.path()) {
            assert!(ends.iter().any(|end| !end.success()), "round {round}");
            at_work += 1;
        }
        // What has a final name is right, down to the last byte.
        for (path, bytes) in published(ufs.path()) {
            if is_final(&path) {
                assert!(wanted.get(&path) == Some(&bytes), "round {round}: {path:?}");
            }
        }
        ufs.convert(&image.source());
        good(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
        gc(ufs.path(), &[]);
        assert!(published(ufs.path()) == wanted, "round {round}");
    }
}

/// A converter that does not outlive its test, whatever becomes of that.
struct Living(Option<Child>);

impl Drop for Living {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One is at work, stopped so that it stays so; gc must leave it alone.
#[test]
fn gc_leaves_living_converters_alone() {
    let image = image();
    let ufs = Ufs::new();
    let mut living = Living(Some(start(&image, ufs.path())));
    let pid = living.0.as_ref().unwrap().id().to_string();
    let tmp = ufs.path().join("tmp");
    let signal = |name: &str| {
        common::services::tool("kill", &[name, &pid]);
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while !has_temporaries(ufs.path()) {
        assert!(Instant::now() < deadline, "the converter does not begin");
        thread::sleep(Duration::from_millis(1));
    }
    signal("-STOP");
    // Threads that are in a system call stop when they come out of it.
    let tasks = format!("/proc/{pid}/task");
    let is_stopped = |task: io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status"));
        status.unwrap().contains("State:\tT")
    };
    while !fs::read_dir(&tasks).unwrap().all(is_stopped) {
        assert!(Instant::now() < deadline, "the converter does not stop");
        thread::sleep(Duration::from_millis(1));
    }
    let before = files(&tmp);
    assert!(
        gc(ufs.path(), &[])["removed"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert_eq!(files(&tmp), before);
    signal("-CONT");
    let converter = living.0.take().unwrap();
    let output = converter.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    assert!(!files(ufs.path()).keys().any(|path| !is_final(path)));
}

/// A UFS with temporaries and leases made by hand.
struct Workshop(Ufs);

impl Workshop {
    fn new() -> Self {
        let ufs = Ufs::new();
        fs::create_dir(ufs.path().join("tmp")).unwrap();
        fs::create_dir(ufs.path().join("leases")).unwrap();
        Self(ufs)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn old(&self, name: &str, age: Duration) -> PathBuf {
        let path = self.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
        path
    }

    /// A lease of this age and two temporaries of its holder.
    fn worker(&self, owner: &str, age: Duration) -> [PathBuf; 3] {
        let old = Duration::from_hours(48);
        [
            self.old(&format!("leases/{owner}"), age),
            self.old(&format!("tmp/{owner}.1.erofs"), old),
            self.old(&format!("tmp/{owner}.2.idx"), old),
        ]
    }
}

#[test]
fn gc_goes_by_leases() {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let here = boot.trim();
    let shop = Workshop::new();
    let (now, long) = (Duration::ZERO, Duration::from_hours(1));
    // Nobody holds its lock, whatever the host is called.
    let gone = shop.worker(&format!("h.{here}.1.00"), now);
    let held = shop.worker(&format!("h.{here}.1.01"), long);
    let lock = File::open(&held[0]).unwrap();
    lock.lock().unwrap();
    let there = shop.worker("h.other-boot.1.02", now);
    let silent = shop.worker("h.other-boot.1.03", long);
    let later = shop.worker("h.other-boot.1.04", long);
    let [stranger, young] = [long, now].map(|age| {
        let name = format!("tmp/{}", age.as_secs());
        shop.old(&name, age)
    });
    let all = || [&gone, &held, &there, &silent, &later].map(|w| w.each_ref().map(|p| p.exists()));

    let report = gc(shop.path(), &["--dry-run", "--watch", "0"]);
    assert_eq!(report["removed"].as_array().unwrap().len(), 7);
    assert_eq!(all(), [[true; 3]; 5]);

    // A clock that is an hour behind still goes on.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&later[0]).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.set_modified(SystemTime::now() - long).unwrap();
                thread::sleep(Duration::from_millis(20));
            }
        });
        gc(shop.path(), &["--watch", "1"]);
        stop.store(true, Ordering::Relaxed);
    });
    let (keeps, goes) = ([true; 3], [false; 3]);
    assert_eq!(all(), [goes, keeps, keeps, goes, keeps]);
    assert!(!stranger.exists() && young.exists());
    drop(lock);
}

/// Its maker was killed between the two, and nobody converts it again.
#[test]
fn gc_removes_images_without_an_index_unless_somebody_is_at_work() {
    let shop = Workshop::new();
    let long = Duration::from_hours(1);
    fs::create_dir_all(shop.path().join("layers/sha256/ab")).unwrap();
    let orphan = shop.old("layers/sha256/ab/ab.erofs", long);
    let young = shop.old("layers/sha256/ab/ac.erofs", Duration::ZERO);
    let whole = shop.old("layers/sha256/ab/ad.erofs", long);
    shop.old("layers/sha256/ab/ad.idx", long);
    let worker = shop.worker("h.other-boot.1.02", Duration::ZERO);
    gc(shop.path(), &[]);
    assert!(orphan.exists());
    for path in worker {
        fs::remove_file(path).unwrap();
    }
    let report = gc(shop.path(), &[]);
    assert_eq!(report["removed"].as_array().unwrap().len(), 1);
    assert!(!orphan.exists() && young.exists() && whole.exists());
}

/// Nodes that come and go leave what they read to see whether they can.
#[test]
fn gc_removes_canaries_of_nodes_that_are_gone() {
    let ufs = Ufs::new();
    let opened = Opened::open(ufs.path()).unwrap();
    let node = |name: &str| NodeName::new("c", name).unwrap();
    opened.put_canary(&node("gone")).unwrap();
    let all = files(&ufs.path().join("nodes"));
    assert_eq!(all.len(), 3);
    for name in all.keys() {
        let path = ufs.path().join("nodes").join(name);
        let file = File::options().write(true).open(path).unwrap();
        let yesterday = SystemTime::now() - Duration::from_hours(25);
        file.set_modified(yesterday).unwrap();
    }
    let mut lease = NodeLease::open(opened.clone(), node("gone")).unwrap();
    lease.say(BTreeSet::new(), BTreeSet::new()).unwrap();
    opened.put_canary(&node("here")).unwrap();
    gc(ufs.path(), &[]);
    let left = files(&ufs.path().join("nodes"));
    assert!(!left.keys().any(|name| all.contains_key(name)), "{left:?}");
    // The other node's, and what a node says that it uses.
    assert_eq!(left.len(), 3 + 1, "{left:?}");
}

/// Runs a script in which `$mkfs` converts onto `$ufs`, a tmpfs of `size` that
/// only this script sees.
fn on_tmpfs(image: &Image, size: &str, script: &str) -> Output {
    let directory = tempfile::TempDir::new().unwrap();
    let prologue = "mount -t tmpfs -o size=$size tmpfs $ufs\n";
    Command::new("unshare")
        .args(["--mount", "sh", "-eu", "-c", &format!("{prologue}{script}")])
        .env("mkfs", env!("CARGO_BIN_EXE_mkfs-accel"))
        .env("source", image.source())
        .env("size", size)
        .env("ufs", directory.path())
        .output()
        .unwrap()
}

#[test]
fn a_full_file_system_is_said_and_left_clean() {
    let image = Image::gzipped(&[
        sample_tar(1),
        Tar::new().file("x", &noise(3, 6 << 20)).finish(),
    ]);
    let script = "status=0; $mkfs convert --jobs 1 $source --ufs $ufs || status=$?
        find $ufs -type f | sort
        mount -o remount,size=32m $ufs; $mkfs convert $source --ufs $ufs
        $mkfs verify $source --ufs $ufs; exit $status";
    let output = on_tmpfs(&image, "5m", script);
    let (text, error) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(!matches!(output.status.code(), None | Some(0)), "{error}");
    assert!(
        error.contains("full") && error.contains("make room"),
        "{error}"
    );
    // The first layer stays, nothing unfinished does.
    assert!(
        text.contains(".idx") && !text.contains("/tmp/tmp"),
        "{text}"
    );
    assert!(!text.contains("/leases/"), "{text}");
    assert!(
        text.contains("layer 1/2") && text.contains("already on UFS"),
        "{text}"
    );
    assert!(text.contains(": good, "), "{text}");
}

/// The file system goes away between two layers; what it hid must not get them.
#[test]
fn a_file_system_that_is_unmounted_under_way_is_said() {
    let mut tars: Vec<_> = (0..3).map(sample_tar).collect();
    tars.push(Tar::new().file("x", &noise(3, 64 << 20)).finish());
    let image = Image::gzipped(&tars);
    let script = "$mkfs convert --jobs 1 $source --ufs $ufs >$ufs.out 2>&1 & converter=$!
        until [ -n \"$(ls $ufs/layers 2>/dev/null)\" ]; do
            kill -0 $converter || { cat $ufs.out; exit 99; }
        done
        umount -l $ufs
        status=0; wait $converter || status=$?
        cat $ufs.out; rm $ufs.out; find $ufs -mindepth 1; exit $status";
    let output = on_tmpfs(&image, "256m", script);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        !matches!(output.status.code(), None | Some(0 | 99)),
        "{text}"
    );
    assert!(text.contains("not the one any more"), "{text}");
    // Nothing was written where the file system had been.
    let last = text.lines().last().unwrap();
    assert!(last.contains("mkfs-accel"), "{text}");
}

#[test]
fn a_ufs_that_may_not_be_written_is_said() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let script = "mount -o remount,ro $ufs; $mkfs convert $source --ufs $ufs";
    let output = on_tmpfs(&image, "1m", script);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("read-only"), "{error}");
    // As nobody, who may look but not write.
    let script = "image=${source#oci:}; image=${image%:v1}
        cp -r $image $ufs/image; cp $mkfs $ufs/mkfs; mkdir -m 755 $ufs/ufs
        chmod -R a+rX $ufs/image $ufs/mkfs
        exec setpriv --reuid 65534 --regid 65534 --clear-groups \
            $ufs/mkfs convert oci:$ufs/image:v1 --ufs $ufs/ufs";
    let output = on_tmpfs(&image, "512m", script);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("owner and mode"), "{error}");
    let ufs = Ufs::new();
    let error = bad(&[&"gc", &"--ufs", &ufs.path().join("none")]);
    assert!(error.contains("does not exist"), "{error}");
}
