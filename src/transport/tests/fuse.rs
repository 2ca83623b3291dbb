//! The FUSE transport against this machine's kernel (needs root).

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::{env, thread};

use accel_transport::Reader;
use accel_transport::fuse::{FuseId, FuseOptions, FuseTransport, mount_file, unmount_file};
use common::{
    Answers, CHUNK, Image, Lazy, PatternReader, Random, assert_pattern, buffered,
    check_random_reads, contents, direct, read_at,
};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

/// One test at a time: a process that one of them starts holds, until it has
/// become its program, whatever the others have open, and keeps it mounted.
static MACHINE: Mutex<()> = Mutex::new(());

fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start<R: Reader>() -> FuseTransport<R> {
    FuseTransport::start(&FuseOptions::default()).unwrap()
}

/// A file that is mounted, unmounted whatever happens.
struct Mounted {
    path: PathBuf,
    _dir: TempDir,
}

impl Mounted {
    fn new() -> (Self, OwnedFd) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("layer.erofs");
        File::create(&path).unwrap();
        let connection = mount_file(&path).unwrap();
        (Mounted { path, _dir: dir }, connection)
    }

    fn is_mounted(&self) -> bool {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(self.path.to_str().unwrap())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
    }
}

fn serve(
    transport: &FuseTransport<PatternReader>,
    reader: PatternReader,
) -> (Mounted, FuseId, Arc<PatternReader>) {
    let (mounted, connection) = Mounted::new();
    let reader = Arc::new(reader);
    let id = transport.add(connection, Arc::clone(&reader)).unwrap();
    (mounted, id, reader)
}

#[test]
fn the_root_is_a_read_only_file_of_the_right_size() {
    let _machine = machine();
    let transport = start();
    let size = 5 * CHUNK + 4096;
    let (mounted, id, _) = serve(&transport, PatternReader::new(1, size, Answers::Inline));
    let metadata = fs::metadata(&mounted.path).unwrap();
    assert!(metadata.is_file());
    assert_eq!(metadata.len(), size);
    assert_eq!(metadata.mode(), 0o100_400);
    assert_eq!(metadata.blocks(), size / 512);
    assert_pattern(1, 0, &fs::read(&mounted.path).unwrap());
    let error = File::options().write(true).open(&mounted.path).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::ROFS.raw_os_error())
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.contains(mounted.path.to_str().unwrap()))
        .unwrap();
    assert!(line.contains("fuse.image-accel image-accel"), "{line}");
    unmount_file(&mounted.path).unwrap();
    transport.remove(id).unwrap();
}

#[test]
fn reads_of_every_size_and_place_are_right() {
    let _machine = machine();
    let transport = start();
    let mut random = Random(11);
    let size = 24 * CHUNK + 3 * 4096;
    for answers in [
        Answers::Inline,
        Answers::InlinePieces,
        Answers::InlineGathered,
        Answers::Elsewhere,
    ] {
        let seed = random.next();
        let (mounted, id, _) = serve(&transport, PatternReader::new(seed, size, answers));
        let direct = direct(&mounted.path);
        check_random_reads(&direct, seed, size, 4096, 500, &mut random);
        // Direct reads of FUSE may have any alignment.
        check_random_reads(&direct, seed, size, 1, 500, &mut random);
        check_random_reads(&buffered(&mounted.path), seed, size, 1, 500, &mut random);
        thread::scope(|scope| {
            for reader in 0..8 {
                let path = &mounted.path;
                scope.spawn(move || {
                    let mut random = Random(reader);
                    check_random_reads(&common::direct(path), seed, size, 512, 100, &mut random);
                });
            }
        });
        drop(direct);
        unmount_file(&mounted.path).unwrap();
        transport.remove(id).unwrap();
    }
}

#[test]
fn large_reads_come_in_one_piece() {
    let _machine = machine();
    let transport = start();
    let (mounted, id, reader) = serve(&transport, PatternReader::new(2, 8 << 20, Answers::Inline));
    let file = direct(&mounted.path);
    assert_pattern(2, 1 << 20, &read_at(&file, 1 << 20, 1 << 20).unwrap());
    // One for an aligned buffer; the kernel never needs more than two.
    let reads = reader.reads.load(Ordering::Relaxed);
    assert!(reads <= 2, "{reads} reads for 1 MiB");
    drop(file);
    unmount_file(&mounted.path).unwrap();
    transport.remove(id).unwrap();
}

#[test]
fn errors_hit_exactly_the_reads_that_touch_them() {
    let _machine = machine();
    let transport = start();
    let size = 16 * CHUNK;
    let bad = 5 * CHUNK..5 * CHUNK + 4096;
    let reader = PatternReader::new(4, size, Answers::Inline).failing(bad.clone());
    let (mounted, id, _) = serve(&transport, reader);
    let file = direct(&mounted.path);
    for block in 0..size / 4096 {
        let offset = block * 4096;
        match read_at(&file, offset, 4096) {
            Ok(got) => {
                assert!(!bad.contains(&offset), "{offset} should have failed");
                assert_pattern(4, offset, &got);
            }
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(rustix::io::Errno::IO.raw_os_error())
                );
                assert!(bad.contains(&offset), "{offset} should not have failed");
            }
        }
    }
    assert!(read_at(&file, bad.start, 4096).is_err());
    drop(file);
    unmount_file(&mounted.path).unwrap();
    transport.remove(id).unwrap();
}

#[test]
fn bytes_that_nobody_filled_are_never_served() {
    let _machine = machine();
    let transport = start();
    let (mounted, connection) = Mounted::new();
    let id = transport.add(connection, Arc::new(Lazy)).unwrap();
    let file = direct(&mounted.path);
    for chunk in 0..4 {
        let error = read_at(&file, chunk * CHUNK, 4096).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::IO.raw_os_error())
        );
    }
    drop(file);
    unmount_file(&mounted.path).unwrap();
    transport.remove(id).unwrap();
}

#[test]
fn a_removed_export_ends_its_connection_even_with_reads_under_way() {
    let _machine = machine();
    let transport = start();
    let (held, was_held) = mpsc::channel();
    let held = Mutex::new(held);
    let reader = PatternReader::new(5, 4 * CHUNK, Answers::Inline).holding(
        2 * CHUNK..2 * CHUNK + 4096,
        move || {
            held.lock().unwrap().send(()).unwrap();
        },
    );
    let (mounted, id, _reader) = serve(&transport, reader);
    let path = mounted.path.clone();
    let waiting = thread::spawn(move || read_at(&direct(&path), 2 * CHUNK, 4096));
    was_held.recv().unwrap();
    assert!(transport.is_connected(id).unwrap());
    transport.remove(id).unwrap();
    assert!(waiting.join().unwrap().is_err());
    // ENOTCONN once the connection has ended. A file opened just before that reads through the page
    // cache, which tells of the end as EIO on kernels that fill it through iomap.
    let error = File::open(&mounted.path).and_then(|file| read_at(&file, 0, 4096));
    let errno = error.unwrap_err().raw_os_error();
    assert!(
        [rustix::io::Errno::NOTCONN, rustix::io::Errno::IO]
            .map(|errno| Some(errno.raw_os_error()))
            .contains(&errno),
        "{errno:?}"
    );
    assert!(transport.remove(id).is_err());
    unmount_file(&mounted.path).unwrap();
    assert!(!mounted.is_mounted());
}

#[test]
fn an_unmounted_export_is_noticed() {
    let _machine = machine();
    let transport = start();
    let (mounted, id, _) = serve(&transport, PatternReader::new(6, CHUNK, Answers::Inline));
    assert_pattern(6, 0, &fs::read(&mounted.path).unwrap());
    assert!(transport.is_connected(id).unwrap());
    unmount_file(&mounted.path).unwrap();
    while transport.is_connected(id).unwrap() {
        thread::yield_now();
    }
    transport.remove(id).unwrap();
}

#[test]
fn mounting_needs_a_regular_file() {
    let _machine = machine();
    let dir = TempDir::new().unwrap();
    let error = mount_file(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("is not a regular file"),
        "{error}"
    );
    assert!(mount_file(&dir.path().join("absent")).is_err());
}

// --- EROFS over it -------------------------------------------------------------------------------

#[test]
fn erofs_mounts_the_file_itself() {
    let _machine = machine();
    let dir = TempDir::new().unwrap();
    let (tree, image) = common::erofs_image(dir.path());

    for options in [None, Some(c"directio")] {
        let transport = start();
        let (mounted, connection) = Mounted::new();
        let id = transport
            .add(connection, Arc::new(Image(image.clone())))
            .unwrap();
        let target = dir.path().join("mnt");
        fs::create_dir_all(&target).unwrap();
        // Not mount(8), which would attach a loop device.
        rustix::mount::mount(&mounted.path, &target, "erofs", MountFlags::RDONLY, options).unwrap();
        let same = contents(&target) == contents(&tree);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = format!("{} {} erofs", mounted.path.display(), target.display());
        let found = mounts.contains(&line);
        rustix::mount::unmount(&target, UnmountFlags::empty()).unwrap();
        assert!(same, "the mounted tree differs");
        assert!(found, "{line:?} is not in {mounts}");
        unmount_file(&mounted.path).unwrap();
        transport.remove(id).unwrap();
    }
}

// --- a daemon that is killed ---------------------------------------------------------------------

const DAEMON: &str = "ACCEL_TEST_FUSE_DAEMON";
const SEED: u64 = 78;
const SIZE: u64 = 8 * CHUNK;
const HELD: std::ops::Range<u64> = 3 * CHUNK..3 * CHUNK + 4096;

/// Not a test: another test runs it in a process of its own, to be killed.
#[test]
fn daemon_process() {
    if env::var_os(DAEMON).is_none() {
        return;
    }
    let transport = start();
    // The connection is standard input.
    let connection = rustix::io::dup(rustix::stdio::stdin()).unwrap();
    let reader =
        PatternReader::new(SEED, SIZE, Answers::Inline).holding(HELD, || println!("\nheld"));
    transport.add(connection, Arc::new(reader)).unwrap();
    println!("\nready");
    loop {
        thread::park();
    }
}

#[test]
fn a_killed_daemon_is_succeeded_and_its_readers_go_on() {
    let _machine = machine();
    let (mounted, connection) = Mounted::new();
    let mut daemon = Command::new(env::current_exe().unwrap())
        .args(["--exact", "daemon_process", "--nocapture"])
        .env(DAEMON, "1")
        .arg0("fuse-test-daemon")
        .stdin(Stdio::from(connection.try_clone().unwrap()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let mut wait_for = |word: &str| {
        assert!(
            lines.by_ref().any(|line| line.unwrap() == word),
            "no {word:?}"
        );
    };
    wait_for("ready");
    assert_pattern(SEED, 0, &read_at(&direct(&mounted.path), 0, 4096).unwrap());
    let read = |offset| {
        let path = mounted.path.clone();
        thread::spawn(move || read_at(&direct(&path), offset, 64 << 10))
    };
    let before = read(HELD.start - 8192);
    wait_for("held");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let after = read(CHUNK);

    let transport = start();
    let reader = PatternReader::new(SEED, SIZE, Answers::Inline);
    let id = transport.adopt(connection, Arc::new(reader)).unwrap();
    assert_pattern(SEED, HELD.start - 8192, &before.join().unwrap().unwrap());
    assert_pattern(SEED, CHUNK, &after.join().unwrap().unwrap());
    check_random_reads(
        &direct(&mounted.path),
        SEED,
        SIZE,
        512,
        100,
        &mut Random(13),
    );
    unmount_file(&mounted.path).unwrap();
    transport.remove(id).unwrap();
}
