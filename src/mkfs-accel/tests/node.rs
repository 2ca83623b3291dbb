//! A node that has lost its UFS: layers made again under a mounted image, and what a
//! disk cache has kept. Needs root, FUSE as Linux 6.12 has it, EROFS and overlayfs, and
//! `ublk-server` beside the program under test.

mod common;

use common::services::{Access, Registry, push};
use common::{Image, Tar, Ufs, files, noise};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// For what must come sometime; machines are slow.
const PATIENCE: Duration = Duration::from_secs(120);

fn server() -> PathBuf {
    let server = Path::new(env!("CARGO_BIN_EXE_mkfs-accel")).with_file_name("ublk-server");
    if !server.exists() {
        // Only this package was built.
        let built = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
            .args(["build", "--locked", "-p", "ublk-server", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .status()
            .unwrap();
        assert!(built.success());
    }
    server
}

/// A daemon with its UFS, and a place for mounts.
struct Node {
    child: Child,
    ufs: Ufs,
    directory: TempDir,
    options: Vec<String>,
}

impl Node {
    fn start(ufs: Ufs, options: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let options: Vec<_> = options.iter().map(|word| (*word).to_owned()).collect();
        let child = serve(directory.path(), ufs.path(), &options);
        let node = Self {
            child,
            ufs,
            directory,
            options,
        };
        node.await_daemon();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn client(&self, words: &[&str]) -> Output {
        Command::new(server())
            .args(words)
            .arg("--socket")
            .arg(self.path("socket"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ask(&self, words: &[&str]) -> String {
        let output = self.client(words);
        assert!(
            output.status.success(),
            "{words:?}: {output:?}\n{}",
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ask(&["status", "--json"])).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    #[track_caller]
    fn await_daemon(&self) {
        await_that(|| self.client(&["list"]).status.success());
    }

    fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = serve(self.directory.path(), self.ufs.path(), &self.options);
        self.await_daemon();
    }

    #[track_caller]
    fn mount(&self, image: &str) -> PathBuf {
        let path = self.path("mnt");
        fs::create_dir_all(&path).unwrap();
        self.ask(&["mount", image, path.to_str().unwrap()]);
        path
    }

    #[track_caller]
    fn unmount(&self) {
        self.ask(&["unmount", self.path("mnt").to_str().unwrap()]);
    }

    /// Ends the daemon, which must have nothing left to serve.
    fn stop(mut self) -> String {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        let log = self.log();
        assert!(!log.contains("panicked"), "{log}");
        log
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let here = self.directory.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut points: Vec<_> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
        points.reverse();
        for point in points.iter().filter(|point| point.starts_with(here)) {
            let _ = Command::new("umount").args(["--lazy", point]).status();
        }
    }
}

fn serve(directory: &Path, ufs: &Path, options: &[String]) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"));
    let log = log.unwrap();
    Command::new(server())
        .arg("serve")
        .arg("--ufs")
        .arg(ufs)
        .arg("--socket")
        .arg(directory.join("socket"))
        .args(["--transport", "fuse", "--cache-size", "16M"])
        .args(options)
        .env("DOCKER_CONFIG", "/nonexistent")
        .env("RUST_LOG", "debug")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

#[track_caller]
fn await_that(mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "it never came to that");
        thread::sleep(Duration::from_millis(20));
    }
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Two layers of their own and one that depends on them; files larger than the cache.
fn image() -> (Image, Vec<(&'static str, Vec<u8>)>) {
    let contents = vec![
        ("opt/first", noise(1, 9 << 20)),
        ("opt/second", noise(2, 9 << 20)),
        ("opt/deep/third", noise(3, 3 << 20)),
    ];
    let tar = |number: usize| {
        let (path, bytes) = &contents[number];
        match number {
            2 => Tar::new().file(path, bytes).finish(),
            _ => Tar::new()
                .directory("opt/", 0o711)
                .file(path, bytes)
                .finish(),
        }
    };
    (Image::gzipped(&[tar(0), tar(1), tar(2)]), contents)
}

/// The images of layers beneath a directory.
fn erofs_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(erofs_files(&path));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "erofs")
        {
            found.push(path);
        }
    }
    found
}

#[track_caller]
fn check(root: &Path, contents: &[(&str, Vec<u8>)]) {
    for (path, bytes) in contents {
        let read = fs::read(root.join(path));
        let read = read.unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(read == *bytes, "{path} has wrong bytes");
    }
}

/// The whole tree of layers goes, under readers. A worker has files open, which on this
/// file system live on: it ends.
fn lose_layers(node: &Node) {
    let ufs = node.ufs.path();
    for room in ["layers", "chains"] {
        fs::rename(ufs.join(room), ufs.join(format!("lost-{room}"))).unwrap();
    }
    let worker = node.status()["sources"][0]["worker"].clone();
    let worker = i32::try_from(worker.as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
}

fn bring_layers_back(ufs: &Path) {
    for room in ["layers", "chains"] {
        fs::rename(ufs.join(format!("lost-{room}")), ufs.join(room)).unwrap();
    }
}

/// The images of layers in a directory that is laid out as UFS.
fn layers_in(directory: &Path) -> usize {
    let all = files(directory);
    let images = all
        .keys()
        .filter(|path| path.extension() == Some("erofs".as_ref()));
    images.count()
}

/// Files with their bytes, also of a directory that has sockets and mounts in it.
fn regular_files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let listed = Command::new("find")
        .arg(directory)
        .args(["-xdev", "-type", "f"])
        .output()
        .unwrap();
    let paths = String::from_utf8(listed.stdout).unwrap();
    let paths = paths.lines().map(PathBuf::from);
    paths
        .filter_map(|path| Some((path.clone(), fs::read(path).ok()?)))
        .collect()
}

fn script(directory: &Path, text: &str) -> String {
    let path = directory.join("program");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Also: the password for the registry is in nothing that is said or written.
#[test]
fn lost_layers_are_made_again_under_readers() {
    let (image, contents) = image();
    let registry = Registry::start(&Access::Password);
    let remote = registry.image("team/app:v1");
    push(&image.source(), &remote, &["--dest-creds", "user:s3kr1t"]);
    let scratch = TempDir::new().unwrap();
    let config = scratch.path().join("config.json");
    // "user:s3kr1t"
    let auth = format!(
        r#"{{"auths": {{"{}": {{"auth": "dXNlcjpzM2tyMXQ="}}}}}}"#,
        registry.address
    );
    fs::write(&config, auth).unwrap();
    let config = config.to_str().unwrap();
    let ufs = Ufs::new();
    ufs.convert_with(&remote, &["--plain-http", "--registry-config", config]);
    let remade = scratch.path().join("remade");
    let mut node = Node::start(
        ufs,
        &[
            "--remake",
            remade.to_str().unwrap(),
            "--remake-after",
            "100ms",
            "--remake-plain-http",
            "--registry-config",
            config,
        ],
    );
    let root = node.mount(&remote);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut said = String::new();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    check(&root, &contents);
                    rounds.fetch_add(1, Relaxed);
                }
            });
        }
        await_that(|| rounds.load(Relaxed) > 2);
        lose_layers(&node);
        let made = |node: &Node| node.status()["remake"]["made"].as_u64().unwrap();
        await_that(|| {
            drop_caches();
            made(&node) >= 3
        });
        let before = rounds.load(Relaxed);
        await_that(|| {
            drop_caches();
            rounds.load(Relaxed) > before + 2
        });
        // The next daemon knows where they came from, too.
        node.kill_and_restart();
        let before = rounds.load(Relaxed);
        await_that(|| {
            drop_caches();
            rounds.load(Relaxed) > before + 4
        });
        said += &node.ask(&["status"]);
        said += &node.ask(&["status", "--json"]);
        said += &node.ask(&["metrics"]);
        stop.store(true, Relaxed);
    });
    assert!(said.contains("made again from docker://"), "{said}");
    assert!(
        said.contains("\nimage_accel_remake_known_layers 3\n"),
        "{said}"
    );
    assert!(
        said.contains("\nimage_accel_remade_layers_total "),
        "{said}"
    );
    let errors = node.status()["exports"].clone();
    for export in errors.as_array().unwrap() {
        assert_eq!(export["errors"], 0, "{export}");
    }
    assert_eq!(layers_in(&remade), 3);
    // Every file of the daemon's own, and all that it was made of.
    let mut told = regular_files(&node.path("socket.d"));
    told.extend(files(&remade));
    told.extend(files(node.ufs.path()));
    told.insert("status".into(), said.into_bytes());
    assert!(
        told.keys()
            .any(|path| path.to_str().unwrap().contains("journal"))
    );
    told.insert("log".into(), node.log().into_bytes());
    for (path, bytes) in told {
        for secret in [&b"s3kr1t"[..], b"dXNlcjpzM2tyMXQ"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "{path:?} has the password");
        }
    }
    // What nobody needs any more goes.
    node.unmount();
    await_that(|| layers_in(&remade) == 0);
    assert!(files(&remade).keys().all(|path| !path.starts_with("tmp")));
    node.stop();
}

#[test]
fn when_nobody_can_have_it_the_reason_is_told() {
    let (image, contents) = image();
    let ufs = Ufs::new();
    ufs.convert(&image.source());
    let scratch = TempDir::new().unwrap();
    let remade = scratch.path().join("remade");
    let node = Node::start(
        ufs,
        &[
            "--remake",
            remade.to_str().unwrap(),
            "--remake-after",
            "0",
            "--request-timeout",
            "3s",
        ],
    );
    let root = node.mount(&image.source());
    lose_layers(&node);
    let layout = image.directory.path();
    let away = layout.with_extension("away");
    fs::rename(layout, &away).unwrap();
    drop_caches();
    let error = fs::read(root.join("opt/first")).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    let said = node.ask(&["status"]);
    assert!(
        said.contains("cannot be made again") && said.contains("No such file"),
        "{said}"
    );
    let log = node.log();
    assert!(
        log.lines().any(|line| line.contains("cannot be served")
            && line.contains("making the layer again failed")
            && line.contains("No such file")),
        "{log}"
    );
    // The original comes back: so do the bytes.
    fs::rename(&away, layout).unwrap();
    await_that(|| fs::read(root.join("opt/first")).is_ok());
    check(&root, &contents[..1]);
    // UFS comes back: nothing more is made.
    bring_layers_back(node.ufs.path());
    await_that(|| fs::read(root.join("opt/second")).is_ok());
    check(&root, &contents);
    node.unmount();
    node.stop();
}

/// What makes layers stalls, takes longer than a request may, or makes something else.
#[test]
fn what_makes_layers_is_not_relied_on() {
    let (image, contents) = image();
    let scratch = TempDir::new().unwrap();
    let remade = scratch.path().join("remade");
    let real = env!("CARGO_BIN_EXE_mkfs-accel");
    let start = |text: &str, further: &[&str]| {
        let ufs = Ufs::new();
        ufs.convert(&image.source());
        let program = script(scratch.path(), text);
        let mut options = vec!["--remake-program", &program, "--remake-after", "0"];
        options.extend(["--remake", remade.to_str().unwrap()]);
        options.extend(further);
        let node = Node::start(ufs, &options);
        let root = node.mount(&image.source());
        lose_layers(&node);
        drop_caches();
        (node, root)
    };
    let finish = |node: Node| {
        node.unmount();
        node.stop()
    };

    // It takes three times as long as a request may, and says that it gets on.
    let slow = format!(
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo progress $i; sleep 0.5; done\nexec {real} \"$@\""
    );
    let (node, root) = start(&slow, &["--request-timeout", "2s"]);
    check(&root, &contents[..1]);
    finish(node);
    fs::remove_dir_all(&remade).unwrap();

    // It says nothing: it is ended, and the daemon answers all the while.
    let marker = scratch.path().join("pid");
    let (score, status) = (scratch.path().join("score"), scratch.path().join("status"));
    let stalls = format!(
        "echo $$ > {}; cat /proc/self/oom_score_adj > {}; cat /proc/self/status > {}; \
         cat > /dev/null; exec sleep 1000",
        marker.display(),
        score.display(),
        status.display()
    );
    let further = ["--request-timeout", "4s", "--remake-stall", "8s"];
    let (node, root) = start(&stalls, &further);
    let reading = thread::spawn(move || fs::read(root.join("opt/first")));
    await_that(|| node.ask(&["status"]).contains("being made again"));
    reading.join().unwrap().unwrap_err();
    let said = node.ask(&["status"]);
    assert!(said.contains("stood still"), "{said}");
    // Rather it than others, if memory is short.
    assert_eq!(fs::read_to_string(&score).unwrap(), "500\n");
    // Of what root may it has DAC_OVERRIDE and DAC_READ_SEARCH, and can gain nothing.
    let status = fs::read_to_string(&status).unwrap();
    for line in [
        "CapPrm:\t0000000000000006",
        "CapEff:\t0000000000000006",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.lines().any(|other| other == line), "{status}");
    }
    let pid = fs::read_to_string(&marker).unwrap();
    await_that(|| !Path::new("/proc").join(pid.trim()).exists());
    let log = finish(node);
    assert!(log.contains("stood still"), "{log}");

    // It makes something else of the right size. Nobody is given a byte of it.
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let erofs = &report["layers"][0]["erofs"];
    let path = remade.join(erofs["path"].as_str().unwrap());
    let size = &erofs["size"];
    let wrong = format!(
        "cat > /dev/null; mkdir -p {}; head -c {size} /dev/urandom > {}; cp {} {}",
        path.parent().unwrap().display(),
        path.display(),
        ufs.image(&report, 0).with_extension("idx").display(),
        path.with_extension("idx").display(),
    );
    let (node, root) = start(&wrong, &["--request-timeout", "3s"]);
    let error = fs::read(root.join("opt/first")).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    assert!(node.log().contains("wrong bytes"), "{}", node.log());
    finish(node);
}

/// A restart, and a daemon that was killed, read nothing from UFS of what was read
/// before.
#[test]
fn a_disk_cache_is_warm_after_a_restart() {
    let (image, contents) = image();
    let ufs = Ufs::new();
    ufs.convert(&image.source());
    let scratch = TempDir::new().unwrap();
    let cache = scratch.path().join("cache");
    let options = [
        "--disk-cache",
        cache.to_str().unwrap(),
        "--disk-cache-size",
        "64M",
    ];
    let mut node = Node::start(ufs, &options);
    let root = node.mount(&image.source());
    let disk = |node: &Node, field: &str| node.status()["disk_cache"][field].clone();
    // All chunks but the first of each layer (it has the superblock alone, which the mount
    // has from the start file), and of each index the only page: each takes a slot. What comes
    // too fast to be written is read of UFS and offered once more.
    let layers = ["layers", "chains"].map(|kind| erofs_files(&node.ufs.path().join(kind)));
    let sizes = layers
        .iter()
        .flatten()
        .map(|path| fs::metadata(path).unwrap().len());
    let slots: u64 = sizes.map(|size| size.div_ceil(128 << 10)).sum();
    await_that(|| {
        drop_caches();
        check(&root, &contents);
        disk(&node, "saved") == true && disk(&node, "used").as_u64() >= Some(slots * (128 << 10))
    });
    // Another daemon has no business there.
    let other = TempDir::new().unwrap();
    let options: Vec<_> = options.iter().map(|word| (*word).to_owned()).collect();
    let mut second = serve(other.path(), node.ufs.path(), &options);
    assert!(!second.wait().unwrap().success());
    let said = fs::read_to_string(other.path().join("log")).unwrap();
    assert!(said.contains("another daemon"), "{said}");

    node.kill_and_restart();
    await_that(|| disk(&node, "in_use") == true);
    drop_caches();
    check(&root, &contents);
    let sources = node.status()["sources"].clone();
    assert_eq!(sources[0]["bytes"], 0, "{sources}");
    assert!(disk(&node, "hits").as_u64() > Some(100));
    // UFS is not needed for that at all.
    lose_layers(&node);
    drop_caches();
    check(&root, &contents);
    assert_eq!(disk(&node, "damaged"), 0);
    bring_layers_back(node.ufs.path());
    node.unmount();
    node.stop();
}

/// An image of so many layers, each of several chunks with metadata in another one than
/// the superblock is in; and what is in it.
fn image_of(layers: usize) -> (Image, Vec<(String, Vec<u8>)>) {
    let content = |number: usize| {
        let seed = number as u64;
        (
            format!("opt/layer-{number}"),
            noise(seed, (160 << 10) + number),
        )
    };
    let contents: Vec<_> = (0..layers).map(content).collect();
    let tars = contents.iter().map(|(path, bytes)| {
        let tar = Tar::new().directory("opt/", 0o755).file(path, bytes);
        let mut tar = tar.file("opt/zeros", &vec![0; 1 << 20]);
        for file in 0..100 {
            tar = tar.file(&format!("opt/{file}-of-{}", &path[4..]), b"small");
        }
        tar.finish()
    });
    let tars: Vec<_> = tars.collect();
    (Image::gzipped(&tars), contents)
}

/// The start file of the only image on UFS.
fn start_file(ufs: &Path) -> PathBuf {
    let all = files(&ufs.join("images"));
    let mut starts = all
        .keys()
        .filter(|path| path.extension() == Some("start".as_ref()));
    ufs.join("images").join(starts.next().unwrap())
}

/// Mounts the image with nothing in memory and gives the bytes that UFS gave up for that
/// (as `status` has them, counted where the sources are), and the daemon's log.
#[track_caller]
fn mount_and_count(ufs: &Ufs, image: &str, contents: &[(String, Vec<u8>)]) -> (u64, String) {
    let node = Node::start(ufs.clone(), &[]);
    drop_caches();
    let root = node.mount(image);
    let ready = |node: &Node| node.status()["holders"][0]["ready"].clone();
    await_that(|| ready(&node)["metadata_ms"].is_u64());
    let until = ready(&node)["mounted_bytes"].as_u64().unwrap();
    for (path, bytes) in contents {
        assert!(fs::read(root.join(path)).unwrap() == *bytes, "{path}");
    }
    assert!(fs::read(root.join("opt/zeros")).unwrap() == vec![0; 1 << 20]);
    let read = node.status()["fetched_bytes"].as_u64().unwrap();
    let most = contents.len() as u64 * (6 * (128 << 10) + (64 << 10)) + until;
    assert!(read <= most, "{read} bytes: zeros were read of UFS");
    node.unmount();
    (until, node.stop())
}

#[test]
fn a_mount_takes_at_most_1_mib_of_ufs_however_many_layers() {
    for layers in [1, 3, 10, 70, 100] {
        let (image, contents) = image_of(layers);
        let ufs = Ufs::new();
        ufs.convert(&image.source());
        let (until, log) = mount_and_count(&ufs, &image.source(), &contents);
        println!("{layers} layers: {until} bytes");
        assert!(until <= 1 << 20, "{layers} layers: {until} bytes\n{log}");
    }
}

#[test]
fn without_a_start_file_or_with_a_wrong_one_a_mount_works() {
    let (image, contents) = image_of(10);
    let ufs = Ufs::new();
    ufs.convert(&image.source());
    let start = start_file(ufs.path());
    let good = fs::read(&start).unwrap();
    let mut wrong = good.clone();
    wrong[100] ^= 1;
    fs::write(&start, &wrong).unwrap();
    let (more, log) = mount_and_count(&ufs, &image.source(), &contents);
    assert!(more > 1 << 20 && log.contains("checksum"), "{more}\n{log}");
    // It is only a help: what else UFS has is not doubted for it.
    assert!(!log.contains("set aside"), "{log}");
    // Nobody but the layers' roots is believed.
    let (checked, checksum) = wrong.split_last_chunk_mut::<32>().unwrap();
    *checksum = *blake3::hash(checked).as_bytes();
    fs::write(&start, &wrong).unwrap();
    let (more, log) = mount_and_count(&ufs, &image.source(), &contents);
    assert!(
        more > 1 << 20 && log.contains("does not match"),
        "{more}\n{log}"
    );
    fs::remove_file(&start).unwrap();
    let (more, _) = mount_and_count(&ufs, &image.source(), &contents);
    assert!(more > 1 << 20, "{more}");
    // An image that was converted before there were such files gets its own.
    ufs.convert(&image.source());
    assert!(fs::read(&start).unwrap() == good);
}
