//! A daemon over FUSE on this machine, and images for it. Needs root, FUSE, overlayfs,
//! EROFS and Debian's mkfs.erofs.

use super::{Entry, Layer, Stalled, noise, publish_image, publish_tree};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ublk-server");

/// A UFS directory, a daemon on it, and a place for mounts.
pub struct Node {
    pub child: Child,
    pub directory: TempDir,
}

impl Node {
    pub fn start(fill: impl FnOnce(&Path)) -> Self {
        Self::start_with(&[], fill)
    }

    /// With further options for the daemon.
    pub fn start_with(further: &[&OsStr], fill: impl FnOnce(&Path)) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount: run them as root"
        );
        let directory = tempfile::tempdir().unwrap();
        let ufs = directory.path().join("ufs");
        fs::create_dir(&ufs).unwrap();
        fill(&ufs);
        let child = serve_with(directory.path(), further);
        let node = Self { child, directory };
        node.await_daemon();
        node
    }

    /// Starts the daemon anew, with a UFS that takes requests and never answers; what
    /// was there is a replica now.
    pub fn stall_ufs(&mut self, stalled: &Stalled) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let (ufs, replica) = (self.path("ufs"), self.path("replica"));
        fs::rename(&ufs, &replica).unwrap();
        std::os::unix::fs::symlink(stalled.path(), &ufs).unwrap();
        let further: [&OsStr; 4] = [
            "--replica".as_ref(),
            replica.as_os_str(),
            "--attempt-timeout".as_ref(),
            "300ms".as_ref(),
        ];
        self.child = serve_with(self.directory.path(), &further);
        self.await_daemon();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn directory(&self, name: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn client(&self, words: &[&str]) -> Output {
        Command::new(PROGRAM)
            .args(words)
            .arg("--socket")
            .arg(self.path("socket"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    pub fn ask(&self, words: &[&str]) -> String {
        let output = self.client(words);
        let log = fs::read_to_string(self.path("log")).unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}\n{log}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn refused(&self, words: &[&str]) -> String {
        let output = self.client(words);
        assert!(!output.status.success(), "{words:?} went well");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(!message.contains("panicked"), "{message}");
        message
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.ask(&["status", "--json"])).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The daemon, and the processes that it has started.
    pub fn processes(&self) -> Vec<u32> {
        let status = self.status();
        let sources = status["sources"].as_array().unwrap().iter();
        let workers = sources.filter_map(|source| source["worker"].as_u64());
        let others = workers.chain(status["keeper"].as_u64());
        let others = others.map(|pid| u32::try_from(pid).unwrap());
        [self.child.id()].into_iter().chain(others).collect()
    }

    /// What all of them have in memory, bytes; what they share is counted once.
    pub fn memory(&self) -> u64 {
        self.memory_of("Pss:")
    }

    /// The same without the program's own pages: how much of them counts depends on
    /// how many other processes run it.
    pub fn memory_of_its_own(&self) -> u64 {
        self.memory_of("Pss_Anon:") + self.memory_of("Pss_Shmem:")
    }

    fn memory_of(&self, kind: &str) -> u64 {
        let of = |pid| mapped(pid, kind);
        self.processes().into_iter().map(of).sum()
    }

    /// What of the cache lies in huge pages, bytes: as the daemon says, and as the kernel
    /// has it mapped for the daemon.
    pub fn huge(&self) -> (u64, u64) {
        let name = "image_accel_cache_huge_bytes ";
        let metrics = self.ask(&["metrics"]);
        let told = metrics.lines().find_map(|line| line.strip_prefix(name));
        let mapped = mapped(self.child.id(), "ShmemPmdMapped:");
        (told.unwrap().parse().unwrap(), mapped)
    }

    /// Mounts beneath this node's directory.
    pub fn mounts(&self) -> Vec<String> {
        let here = self.directory.path().to_str().unwrap();
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = all.lines().filter(|line| line.contains(here));
        ours.map(str::to_owned).collect()
    }

    /// Ends the daemon and starts another on the same UFS.
    pub fn restart(mut self) -> Self {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        self.child = serve(self.directory.path());
        self.await_daemon();
        self
    }

    /// Kills the daemon, whatever it is doing, and starts another.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = serve(self.directory.path());
        self.await_daemon();
    }

    pub fn await_daemon(&self) {
        while !self.client(&["list"]).status.success() {
            std::thread::yield_now();
        }
    }

    /// Ends the daemon; nothing but what the test made may be left.
    pub fn stop(mut self) {
        assert_eq!(self.mounts(), [""; 0]);
        let before: Vec<_> = fs::read_dir(self.path("socket.d"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(
            before
                .iter()
                .all(|name| name == "daemon.lock" || name == "journal"),
            "{before:?}"
        );
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        let log = fs::read_to_string(self.path("log")).unwrap();
        assert!(status.success(), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(!self.path("socket.d").exists() && !self.path("socket").exists());
    }
}

/// A line of what a process has mapped, bytes.
fn mapped(pid: u32, kind: &str) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with(kind));
    let words = line.unwrap().split_whitespace().nth(1);
    words.unwrap().parse::<u64>().unwrap() << 10
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!(
                "{}",
                fs::read_to_string(self.path("log")).unwrap_or_default()
            );
        }
        // After a failed test: the daemon first, so that nothing waits for it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            // Block devices outlive it; so do those who wait for them.
            let _ = self.client(&["rescue"]);
        }
        let mut mounts = self.mounts();
        mounts.reverse();
        for line in mounts {
            if let Some(point) = line.split(' ').nth(4) {
                let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}

pub fn serve(directory: &Path) -> Child {
    serve_with(directory, &[])
}

pub fn serve_with(directory: &Path, further: &[&OsStr]) -> Child {
    serve_by(Command::new(PROGRAM), directory, further)
}

/// By a command that runs the program with the arguments that follow.
pub fn serve_by(mut command: Command, directory: &Path, further: &[&OsStr]) -> Child {
    let mut log = File::options();
    let log = log.create(true).append(true).open(directory.join("log"));
    let log = log.unwrap();
    command.arg("serve");
    if !further.contains(&OsStr::new("--transport")) {
        command.args(["--transport", "fuse"]);
    }
    command.arg("--ufs").arg(directory.join("ufs"));
    command.arg("--socket").arg(directory.join("socket"));
    if !further.contains(&OsStr::new("--cache-size")) {
        command.args(["--cache-size", "16M"]);
    }
    command.args(further).stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

pub fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// The base layer: files of many sizes.
pub fn base(ufs: &Path) -> (Layer, Vec<(String, Vec<u8>)>) {
    let sizes = [0, 1, 4095, 4096, 100_000, 131_072, 3_000_001];
    let files: Vec<_> = (1..)
        .zip(sizes)
        .map(|(seed, size)| (format!("data/{size}"), noise(size, seed)))
        .collect();
    let mut entries: Vec<Entry<'_>> = files
        .iter()
        .map(|(path, content)| (path.as_str(), Some(content.as_slice())))
        .collect();
    entries.push(("etc/name", Some(b"base\n")));
    entries.push(("empty", None));
    (publish_tree(ufs, "base", &entries), files)
}

/// An image of eight files, 4 MiB each: as much as the daemon's cache twice over.
pub fn big(ufs: &Path) -> (String, Vec<Vec<u8>>) {
    let files: Vec<_> = (1..=8).map(|seed| noise(4 << 20, seed)).collect();
    let names: Vec<_> = (1..=8).map(|number| format!("f{number}")).collect();
    let entries: Vec<Entry<'_>> = names
        .iter()
        .zip(&files)
        .map(|(name, file)| (name.as_str(), Some(file.as_slice())))
        .collect();
    let layer = publish_tree(ufs, "big", &entries);
    (publish_image(ufs, &[layer]).to_string(), files)
}

/// Reads the files in `root` past the page cache, and compares.
pub fn check_big(root: &str, files: &[Vec<u8>]) {
    for (number, content) in (1..).zip(files) {
        check_one(root, number, content);
    }
}

/// Reads the file of this number, from 1, past the page cache, and compares.
pub fn check_one(root: &str, number: usize, content: &[u8]) {
    drop_caches();
    let file = File::open(Path::new(root).join(format!("f{number}"))).unwrap();
    let mut bytes = vec![0; content.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == *content, "f{number}");
}

pub fn kill(pid: &serde_json::Value, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid.as_i64().unwrap()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Waits for something that is to happen soon.
pub fn await_that(what: impl Fn() -> bool) {
    for _ in 0..6000 {
        if what() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("it did not happen");
}

/// Between two looks.
pub fn nap() {
    std::thread::sleep(std::time::Duration::from_millis(20));
}

/// A node with the image of eight large files mounted.
pub fn mounted() -> (Node, String, String, Vec<Vec<u8>>) {
    let mut made = None;
    let node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    (node, image, root, files)
}

fn status_of(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
}

/// A line of `/proc/PID/status`.
pub fn field(pid: &str, name: &str) -> String {
    let status = status_of(pid);
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(key, _)| *key == name).unwrap();
    value.trim().to_owned()
}

/// The processes that a process has begun.
pub fn children(pid: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let texts =
        tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    texts
        .flat_map(|text| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect()
}
