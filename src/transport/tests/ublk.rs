//! The ublk transport against the kernel's driver.
//!
//! On a kernel without the driver these tests say so and pass, unless
//! `ACCEL_REQUIRE_UBLK=1`.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use accel_transport::ublk::{
    self, DeviceState, Features, Inventory, Removal, UblkError, UblkOptions, UblkSpec,
    UblkTransport,
};
use accel_transport::{Place, ReadError, Reader, Request};
use common::{
    Answers, CHUNK, Image, Lazy, PatternReader, Random, assert_pattern, buffered,
    check_random_reads, contents, direct, open_files, pattern, read_at,
};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

/// One test at a time: some of them count what is on the machine.
static MACHINE: Mutex<()> = Mutex::new(());

type Transport = UblkTransport<PatternReader>;

/// `None`, with the reason printed, where there is no ublk.
fn machine() -> Option<MutexGuard<'static, ()>> {
    let guard = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    match ublk::probe() {
        Ok(_) => Some(guard),
        Err(error) if env::var("ACCEL_REQUIRE_UBLK").as_deref() == Ok("1") => {
            panic!("ublk is required: {error}")
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn start() -> Transport {
    let options = UblkOptions {
        drain_timeout: Duration::from_secs(60),
        ..UblkOptions::default()
    };
    UblkTransport::start(options).unwrap()
}

fn add(transport: &Transport, reader: PatternReader) -> (ublk::UblkDevice, Arc<PatternReader>) {
    let reader = Arc::new(reader);
    let device = transport
        .add(&UblkSpec::default(), Arc::clone(&reader), |_| Ok(()))
        .unwrap();
    (device, reader)
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
}

/// Files of ublk devices in /dev.
fn nodes() -> Vec<String> {
    let mut nodes: Vec<_> = fs::read_dir("/dev")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("ublkb") || name.starts_with("ublkc"))
        .collect();
    nodes.sort();
    nodes
}

/// Removes it when udev has closed it.
fn remove<R: Reader>(transport: &UblkTransport<R>, id: u32) {
    let since = Instant::now();
    loop {
        match transport.remove(id, Removal::IfUnused) {
            Err(UblkError::InUse { .. }) if since.elapsed() < Duration::from_secs(60) => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result.unwrap(),
        }
    }
}

#[test]
fn the_first_bytes_are_right() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let (device, reader) = add(&transport, PatternReader::new(1, 1 << 20, Answers::Inline));
    let got = read_at(&buffered(&device.path), 0, 4096).unwrap();
    assert_pattern(1, 0, &got);
    assert!(reader.reads.load(Ordering::Relaxed) > 0);
    remove(&transport, device.id);
}

#[test]
fn a_device_has_the_geometry_that_was_asked_for() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let size = 3 * CHUNK + 4096;
    let spec = UblkSpec {
        id: Some(4321),
        queue_depth: 17,
        max_io_bytes: 256 << 10,
    };
    let reader = Arc::new(PatternReader::new(2, size, Answers::Inline));
    let mut prepared = None;
    let device = transport
        .add(&spec, reader, |device| {
            prepared = Some(device.clone());
            assert!(!device.path.exists());
            Ok(())
        })
        .unwrap();
    assert_eq!(prepared.as_ref(), Some(&device));
    assert_eq!(device.id, 4321);
    assert_eq!(device.path, Path::new("/dev/ublkb4321"));
    let info = transport.state(device.id).unwrap().unwrap();
    assert_eq!(info.state, DeviceState::Live);
    assert_eq!(info.queue_depth, 17);
    assert_eq!(info.max_io_bytes, 256 << 10);
    assert_eq!(info.daemon.cast_unsigned(), std::process::id());
    assert!(info.features.contains(Features::REQUIRED));
    let sysfs = |name: &str| {
        let text = fs::read_to_string(ublk::sysfs(device.id).join(name)).unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    assert_eq!(sysfs("size"), size / 512);
    assert_eq!(sysfs("ro"), 1);
    assert_eq!(sysfs("queue/logical_block_size"), 4096);
    assert_eq!(sysfs("queue/physical_block_size"), 4096);
    assert_eq!(sysfs("queue/optimal_io_size"), CHUNK);
    assert_eq!(sysfs("queue/max_hw_sectors_kb"), 256);
    let cache = fs::read_to_string(ublk::sysfs(device.id).join("queue/write_cache")).unwrap();
    assert_eq!(cache.trim(), "write through");
    remove(&transport, device.id);
}

#[test]
fn reads_of_every_size_and_place_are_right() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let mut random = Random(7);
    let size = 8 * CHUNK + 3 * 4096;
    for answers in [
        Answers::Inline,
        Answers::InlinePieces,
        Answers::InlineGathered,
        Answers::Elsewhere,
    ] {
        let seed = random.next();
        let (device, _) = add(&transport, PatternReader::new(seed, size, answers));
        let direct = direct(&device.path);
        check_random_reads(&direct, seed, size, 4096, 200, &mut random);
        let buffered = buffered(&device.path);
        for _ in 0..4 {
            drop_caches();
            check_random_reads(&buffered, seed, size, 1, 50, &mut random);
        }
        drop((direct, buffered));
        remove(&transport, device.id);
    }
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let size = 64 * CHUNK;
    for answers in [Answers::Inline, Answers::Elsewhere] {
        let (device, _) = add(&transport, PatternReader::new(3, size, answers));
        thread::scope(|scope| {
            for reader in 0..16 {
                let path = &device.path;
                scope.spawn(move || {
                    let file = direct(path);
                    check_random_reads(&file, 3, size, 4096, 40, &mut Random(reader));
                });
            }
        });
        remove(&transport, device.id);
    }
}

#[test]
fn bytes_that_nobody_filled_are_never_served() {
    let Some(_machine) = machine() else { return };
    let transport = UblkTransport::start(UblkOptions::default()).unwrap();
    let device = transport
        .add(&UblkSpec::default(), Arc::new(Lazy), |_| Ok(()))
        .unwrap();
    let file = direct(&device.path);
    for chunk in 0..4 {
        let error = read_at(&file, chunk * CHUNK, 4096).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::IO.raw_os_error())
        );
    }
    drop(file);
    remove(&transport, device.id);
}

#[test]
fn erofs_mounts_the_device() {
    let Some(_machine) = machine() else { return };
    let dir = TempDir::new().unwrap();
    let (tree, image) = common::erofs_image(dir.path());
    let transport = UblkTransport::start(UblkOptions::default()).unwrap();
    let device = transport
        .add(&UblkSpec::default(), Arc::new(Image(image)), |_| Ok(()))
        .unwrap();
    let target = dir.path().join("mnt");
    fs::create_dir_all(&target).unwrap();
    let flags = MountFlags::RDONLY;
    rustix::mount::mount(&device.path, &target, "erofs", flags, None).unwrap();
    let same = contents(&target) == contents(&tree);
    let removed = transport.remove(device.id, Removal::IfUnused);
    rustix::mount::unmount(&target, UnmountFlags::empty()).unwrap();
    assert!(same, "the mounted tree differs");
    assert!(
        matches!(removed, Err(UblkError::InUse { .. })),
        "{removed:?}"
    );
    remove(&transport, device.id);
}

#[test]
fn errors_hit_exactly_the_reads_that_touch_them() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let size = 16 * CHUNK;
    let bad = 5 * CHUNK..5 * CHUNK + 4096;
    let reader = PatternReader::new(4, size, Answers::Inline).failing(bad.clone());
    let (device, _) = add(&transport, reader);
    let file = direct(&device.path);
    let mut failed = 0;
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
                failed += 1;
            }
        }
    }
    assert_eq!(failed, 1);
    // A large read that only crosses it fails as well; the next one does not.
    assert!(read_at(&file, 4 * CHUNK, 256 << 10).is_err());
    assert_pattern(4, 6 * CHUNK, &read_at(&file, 6 * CHUNK, 256 << 10).unwrap());
    drop(file);
    remove(&transport, device.id);
}

#[test]
fn writes_are_refused_and_dropped_requests_fail() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let (held, was_held) = mpsc::channel();
    let held = Mutex::new(held);
    let reader = PatternReader::new(5, 4 * CHUNK, Answers::Inline).holding(
        2 * CHUNK..2 * CHUNK + 4096,
        move || {
            held.lock().unwrap().send(()).unwrap();
        },
    );
    let (device, reader) = add(&transport, reader);
    // Some kernels refuse to open it for writing, others to write.
    let written = fs::File::options()
        .write(true)
        .open(&device.path)
        .and_then(|file| file.write_at(&[0; 4096], 0));
    let errno = written.unwrap_err().raw_os_error();
    assert!(matches!(errno, Some(1 | 13 | 30)), "{errno:?}");
    let path = device.path.clone();
    let waiting = thread::spawn(move || read_at(&direct(&path), 2 * CHUNK, 4096));
    was_held.recv().unwrap();
    // The device goes on while one of its requests waits.
    assert_pattern(5, 0, &read_at(&direct(&device.path), 0, 4096).unwrap());
    assert!(!waiting.is_finished());
    reader.drop_held();
    assert!(waiting.join().unwrap().is_err());
    remove(&transport, device.id);
}

/// Notes which threads bring requests, and takes its time, so that several are there at
/// once.
struct Noting {
    reader: PatternReader,
    /// Of requests of 256 KiB and more, and of others.
    threads: Mutex<[BTreeSet<String>; 2]>,
}

impl Reader for Noting {
    type Kept = ();

    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        let name = thread::current().name().unwrap_or_default().to_owned();
        let small = usize::from(len < 256 << 10);
        self.threads.lock().unwrap()[small].insert(name);
        thread::sleep(Duration::from_millis(2));
        self.reader.read(offset, len, request);
    }
}

#[test]
fn large_requests_of_one_device_are_served_by_several_threads() {
    let Some(_machine) = machine() else { return };
    if thread::available_parallelism().unwrap().get() < 2 {
        println!("skipped: there is one processor");
        return;
    }
    let transport: UblkTransport<Noting> = UblkTransport::start(UblkOptions::default()).unwrap();
    let (seed, size) = (11, 32 * CHUNK);
    let reader = Arc::new(Noting {
        reader: PatternReader::new(seed, size, Answers::InlineGathered),
        threads: Mutex::default(),
    });
    let device = transport
        .add(&UblkSpec::default(), Arc::clone(&reader), |_| Ok(()))
        .unwrap();
    let since = Instant::now();
    let names = || reader.threads.lock().unwrap().clone();
    thread::scope(|scope| {
        for number in 0..8 {
            let (path, names) = (&device.path, &names);
            scope.spawn(move || {
                let (file, mut random) = (direct(path), Random(number));
                while names()[0].len() < 2 {
                    assert!(since.elapsed() < Duration::from_secs(120), "{:?}", names());
                    check_random_reads(&file, seed, size, 4096, 4, &mut random);
                    let offset = random.below(7) * 4 * CHUNK;
                    let got = read_at(&file, offset, 512 << 10).unwrap();
                    assert_pattern(seed, offset, &got);
                }
            });
        }
    });
    let [_, small] = names();
    assert!(
        small.iter().all(|name| name.starts_with("ublk-queue-")),
        "{small:?}"
    );
    remove(&transport, device.id);
}

/// Has some bytes at hand: what becomes of a request depends on the chunk it begins in.
struct AtHand {
    reader: PatternReader,
    seed: u64,
    /// Requests that were served at once and settled.
    settled: AtomicU64,
}

impl AtHand {
    const NOT_THERE: u64 = 1;
    const FAILS: u64 = 2;
    const PANICS: u64 = 3;
    const TOO_SHORT: u64 = 4;
}

impl Reader for AtHand {
    /// Requests that were served at once and not settled, and by whom.
    type Kept = (u64, u64);

    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn read_at_once(
        &self,
        offset: u64,
        len: usize,
        kept: &mut Self::Kept,
        place: &impl Place,
    ) -> Result<bool, ReadError> {
        let bytes = pattern(self.seed, offset, len);
        match offset / CHUNK {
            Self::NOT_THERE => return Ok(false),
            Self::FAILS => {
                let reason = "it fails".to_owned();
                return Err(ReadError { reason });
            }
            Self::PANICS => panic!("the test wants it"),
            Self::TOO_SHORT => place.fill(0, &bytes[..len - 512]).unwrap(),
            _ => place.fill(0, &bytes).unwrap(),
        }
        assert!(kept.0 == 0 || kept.1 == self.seed, "not settled");
        *kept = (kept.0 + 1, self.seed);
        Ok(true)
    }

    fn settle(&self, kept: &mut Self::Kept) {
        self.settled.fetch_add(kept.0, Ordering::Relaxed);
        kept.0 = 0;
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        self.reader.read(offset, len, request);
    }
}

#[test]
fn what_is_at_hand_is_served_and_settled_before_anybody_hears_of_it() {
    let Some(_machine) = machine() else { return };
    // All devices share what one thread keeps.
    let options = UblkOptions {
        queue_threads: 1,
        ..UblkOptions::default()
    };
    let transport: UblkTransport<AtHand> = UblkTransport::start(options).unwrap();
    let size = 16 * CHUNK;
    let devices: Vec<_> = (20..24)
        .map(|seed| {
            let reader = Arc::new(AtHand {
                reader: PatternReader::new(seed, size, Answers::Elsewhere),
                seed,
                settled: AtomicU64::new(0),
            });
            let spec = UblkSpec::default();
            let device = transport.add(&spec, Arc::clone(&reader), |_| Ok(()));
            (device.unwrap(), reader)
        })
        .collect();
    thread::scope(|scope| {
        for (device, reader) in &devices {
            scope.spawn(|| {
                let (file, mut random) = (direct(&device.path), Random(reader.seed));
                let settled = || reader.settled.load(Ordering::Relaxed);
                for number in 0..300 {
                    let (chunk, before) = (random.below(6), settled());
                    // It tells of each panic.
                    let chunk = match chunk {
                        AtHand::PANICS if number > 10 => 0,
                        chunk => chunk,
                    };
                    let offset = chunk * CHUNK + random.below(CHUNK / 4096 - 1) * 4096;
                    let got = read_at(&file, offset, 4096);
                    let wrong = [AtHand::FAILS, AtHand::PANICS, AtHand::TOO_SHORT];
                    assert_eq!(got.is_err(), wrong.contains(&chunk), "chunk {chunk}");
                    if let Ok(got) = &got {
                        assert_pattern(reader.seed, offset, got);
                    }
                    if got.is_ok() && chunk != AtHand::NOT_THERE {
                        // No less: it was settled before the read returned.
                        assert!(settled() > before, "chunk {chunk}");
                    }
                }
            });
        }
    });
    for (device, _) in &devices {
        remove(&transport, device.id);
    }
}

#[test]
fn twenty_devices_at_once_do_not_mix() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let size = 4 * CHUNK + 4096;
    let devices: Vec<_> = (0..20)
        .map(|seed| {
            let answers = if seed % 2 == 0 {
                Answers::Inline
            } else {
                Answers::Elsewhere
            };
            (
                seed,
                add(&transport, PatternReader::new(seed, size, answers)).0,
            )
        })
        .collect();
    thread::scope(|scope| {
        for (seed, device) in &devices {
            scope.spawn(move || {
                let file = direct(&device.path);
                check_random_reads(&file, *seed, size, 4096, 20, &mut Random(*seed));
            });
        }
    });
    for (_, device) in devices {
        remove(&transport, device.id);
    }
    assert_eq!(nodes(), Vec::<String>::new());
}

#[test]
fn adding_and_removing_leaves_nothing() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let cycle = |seed: u64| {
        let (device, _) = add(
            &transport,
            PatternReader::new(seed, 2 * CHUNK, Answers::Inline),
        );
        let got = read_at(&direct(&device.path), CHUNK, 4096).unwrap();
        assert_pattern(seed, CHUNK, &got);
        remove(&transport, device.id);
        assert_eq!(transport.state(device.id).unwrap(), None);
    };
    cycle(0);
    let before = open_files();
    for seed in 1..=50 {
        cycle(seed);
    }
    assert_eq!(open_files(), before);
    assert_eq!(nodes(), Vec::<String>::new());
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("ublkc"), "{maps}");
}

#[test]
fn a_device_whose_preparation_fails_is_gone() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let reader = Arc::new(PatternReader::new(6, CHUNK, Answers::Inline));
    let error = transport
        .add(&UblkSpec::default(), Arc::clone(&reader), |_| {
            Err(io::Error::other("the journal is full"))
        })
        .unwrap_err();
    assert!(matches!(error, UblkError::Prepare { .. }), "{error}");
    assert_eq!(nodes(), Vec::<String>::new());
    // An id that is taken is said to be taken, and its owner stays.
    let spec = UblkSpec {
        id: Some(99),
        ..UblkSpec::default()
    };
    let device = transport
        .add(&spec, Arc::clone(&reader), |_| Ok(()))
        .unwrap();
    let error = transport
        .add(&spec, Arc::clone(&reader), |_| Ok(()))
        .unwrap_err();
    assert!(error.to_string().contains("id is taken"), "{error}");
    assert_pattern(6, 0, &read_at(&direct(&device.path), 0, 4096).unwrap());
    remove(&transport, 99);
}

/// A daemon that is killed inside a call which reads its own device could not die.
#[test]
fn starting_a_device_reads_nothing_of_it() {
    let Some(_machine) = machine() else { return };
    let transport: Transport = UblkTransport::start(UblkOptions {
        control_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(60),
        ..UblkOptions::default()
    })
    .unwrap();
    // Whoever reads the start of the device waits, as long as this test likes: udev,
    // which looks at every new device, and a scan for partitions.
    let reader =
        Arc::new(PatternReader::new(9, 4 * CHUNK, Answers::Inline).holding(0..CHUNK, || ()));
    let device = transport.add(&UblkSpec::default(), Arc::clone(&reader), |_| Ok(()));
    let device = device.expect("START_DEV waits for a read");
    assert_eq!(
        transport.state(device.id).unwrap().unwrap().state,
        DeviceState::Live
    );
    let since = Instant::now();
    loop {
        reader.drop_held();
        match transport.remove(device.id, Removal::IfUnused) {
            Ok(()) => break,
            Err(error) => assert!(since.elapsed() < Duration::from_secs(120), "{error}"),
        }
    }
    assert_eq!(nodes(), Vec::<String>::new());
}

#[test]
fn a_device_in_use_is_not_removed_unless_forced() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let (device, _) = add(
        &transport,
        PatternReader::new(8, 4 * CHUNK, Answers::Inline),
    );
    // Pre-7.0 kernels offer only the test by exclusive open, so use it as a mount does.
    let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let user = {
        use std::os::unix::fs::OpenOptionsExt;
        fs::File::options()
            .read(true)
            .custom_flags(flags)
            .open(&device.path)
            .unwrap()
    };
    let error = transport.remove(device.id, Removal::IfUnused).unwrap_err();
    assert!(matches!(error, UblkError::InUse { .. }), "{error}");
    assert_pattern(8, CHUNK, &read_at(&user, CHUNK, 4096).unwrap());
    // Whoever has it open is not waited for: he may be a mount, for ever.
    transport.remove(device.id, Removal::Always).unwrap();
    assert_eq!(nodes(), Vec::<String>::new());
    drop(user);
    let since = Instant::now();
    while transport.state(device.id).unwrap().is_some() {
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "it is still there"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn removing_a_device_with_a_held_read_is_bounded_and_can_be_repeated() {
    let Some(_machine) = machine() else { return };
    let transport: Transport = UblkTransport::start(UblkOptions {
        drain_timeout: Duration::from_millis(500),
        ..UblkOptions::default()
    })
    .unwrap();
    let (held, was_held) = mpsc::channel();
    let held = Mutex::new(held);
    let reader = PatternReader::new(9, 4 * CHUNK, Answers::Inline).holding(
        2 * CHUNK..2 * CHUNK + 4096,
        move || {
            held.lock().unwrap().send(()).unwrap();
        },
    );
    let (device, reader) = add(&transport, reader);
    let path = device.path.clone();
    let waiting = thread::spawn(move || read_at(&direct(&path), 2 * CHUNK, 4096));
    was_held.recv().unwrap();
    let error = transport.remove(device.id, Removal::Always).unwrap_err();
    assert!(matches!(error, UblkError::Timeout { .. }), "{error}");
    reader.drop_held();
    assert!(waiting.join().unwrap().is_err());
    let since = Instant::now();
    loop {
        match transport.remove(device.id, Removal::Always) {
            Ok(()) => break,
            Err(error) => assert!(since.elapsed() < Duration::from_secs(60), "{error}"),
        }
    }
    assert_eq!(nodes(), Vec::<String>::new());
}

// --- a daemon that is killed ---------------------------------------------------------------------

const DAEMON: &str = "ACCEL_TEST_UBLK_DAEMON";
const HELD: std::ops::Range<u64> = 3 * CHUNK..3 * CHUNK + 4096;
const SEED: u64 = 77;
const SIZE: u64 = 8 * CHUNK;

/// Not a test: the other tests run it in a process of its own, to be killed.
#[test]
fn daemon_process() {
    let Ok(devices) = env::var(DAEMON) else {
        return;
    };
    let transport = start();
    for id in 0..devices.parse::<u32>().unwrap() {
        let spec = UblkSpec {
            id: Some(200 + id),
            queue_depth: 32,
            ..UblkSpec::default()
        };
        let reader = PatternReader::new(SEED + u64::from(id), SIZE, Answers::Inline)
            .holding(HELD, || println!("\nheld"));
        transport.add(&spec, Arc::new(reader), |_| Ok(())).unwrap();
    }
    println!("\nready");
    loop {
        thread::park();
    }
}

struct Daemon {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Daemon {
    fn spawn(devices: u32) -> Daemon {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "daemon_process", "--nocapture"])
            .env(DAEMON, devices.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut daemon = Daemon { child, lines };
        daemon.wait_for("ready");
        daemon
    }

    fn wait_for(&mut self, word: &str) {
        for line in self.lines.by_ref() {
            if line.unwrap() == word {
                return;
            }
        }
        panic!("the daemon ended before it said {word:?}");
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Newer kernels notice a daemon's death a little after `wait` does.
fn wait_for_state(transport: &Transport, id: u32, wanted: DeviceState) {
    let since = Instant::now();
    loop {
        let state = transport.state(id).unwrap().unwrap().state;
        if state == wanted {
            return;
        }
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "{id} stays {state:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_killed_daemon_is_succeeded_and_its_readers_go_on() {
    let Some(_machine) = machine() else { return };
    let mut daemon = Daemon::spawn(3);
    let paths: Vec<_> = (200..203).map(|id| format!("/dev/ublkb{id}")).collect();
    assert_pattern(
        SEED,
        0,
        &read_at(&direct(paths[0].as_ref()), 0, 4096).unwrap(),
    );
    // One reader of each device waits in the daemon, one more comes after its death.
    let read = |offset| {
        let paths = paths.clone();
        (0..3).map(move |index: usize| {
            let path = paths[index].clone();
            thread::spawn(move || read_at(&direct(path.as_ref()), offset, 64 << 10))
        })
    };
    let mut waiting: Vec<_> = read(HELD.start - 8192).collect();
    for _ in 0..3 {
        daemon.wait_for("held");
    }
    daemon.kill();
    waiting.extend(read(CHUNK));

    let transport = start();
    for id in 200..203 {
        // A successor that would serve something else is refused.
        let other = PatternReader::new(0, SIZE + 4096, Answers::Inline);
        let error = transport.recover(id, Arc::new(other)).unwrap_err();
        assert!(matches!(error, UblkError::Unsuitable { .. }), "{error}");
        wait_for_state(&transport, id, DeviceState::Quiesced);
        let reader = PatternReader::new(SEED + u64::from(id) - 200, SIZE, Answers::Inline);
        let device = transport.recover(id, Arc::new(reader)).unwrap();
        assert_eq!(device.queue_depth, 32);
        assert_eq!(
            transport.state(id).unwrap().unwrap().state,
            DeviceState::Live
        );
    }
    for (index, reader) in waiting.into_iter().enumerate() {
        let got = reader.join().unwrap().unwrap();
        let offset = if index < 3 { HELD.start - 8192 } else { CHUNK };
        assert_pattern(SEED + index as u64 % 3, offset, &got);
    }
    for id in 200..203 {
        let mut random = Random(u64::from(id));
        let file = direct(format!("/dev/ublkb{id}").as_ref());
        check_random_reads(
            &file,
            SEED + u64::from(id) - 200,
            SIZE,
            4096,
            50,
            &mut random,
        );
        drop(file);
        remove(&transport, id);
    }
    assert_eq!(nodes(), Vec::<String>::new());
}

const MORTAL: &str = "ACCEL_TEST_UBLK_MORTAL";

/// Whoever serves it is killed when its size is asked for this many times more.
struct Mortal {
    reader: PatternReader,
    lives: AtomicU64,
}

impl Reader for Mortal {
    type Kept = ();

    fn size(&self) -> u64 {
        if self.lives.fetch_sub(1, Ordering::Relaxed) == 1 {
            let myself = rustix::process::getpid();
            rustix::process::kill_process(myself, rustix::process::Signal::KILL).unwrap();
        }
        self.reader.size()
    }

    fn read<R: Request>(&self, offset: u64, len: usize, request: R) {
        self.reader.read(offset, len, request);
    }
}

/// Not a test: a successor that is killed when it has the device's descriptors mapped
/// and the driver has none of its tags.
#[test]
fn mortal_process() {
    if env::var(MORTAL).is_err() {
        return;
    }
    let transport: UblkTransport<Mortal> = UblkTransport::start(UblkOptions::default()).unwrap();
    let reader = PatternReader::new(SEED, SIZE, Answers::Inline);
    // Recovery compares the size, then the queue thread wants it.
    let lives = AtomicU64::new(2);
    let recovered = transport.recover(200, Arc::new(Mortal { reader, lives }));
    panic!("it lives: {recovered:?}");
}

#[test]
fn successors_that_die_while_they_recover_are_succeeded() {
    let Some(_machine) = machine() else { return };
    let mut daemon = Daemon::spawn(1);
    let reader = thread::spawn(|| read_at(&direct("/dev/ublkb200".as_ref()), HELD.start, 4096));
    daemon.wait_for("held");
    daemon.kill();
    for _ in 0..2 {
        let mortal = Command::new(env::current_exe().unwrap())
            .args(["--exact", "mortal_process"])
            .env(MORTAL, "1")
            .output()
            .unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&mortal.status);
        assert_eq!(signal, Some(9), "{mortal:?}");
    }
    let transport = start();
    let again = PatternReader::new(SEED, SIZE, Answers::Inline);
    transport.recover(200, Arc::new(again)).unwrap();
    assert_pattern(SEED, HELD.start, &reader.join().unwrap().unwrap());
    remove(&transport, 200);
    assert_eq!(nodes(), Vec::<String>::new());
}

#[test]
fn dropping_the_transport_leaves_the_device_to_the_next_one() {
    let Some(_machine) = machine() else { return };
    let transport = start();
    let (device, _) = add(
        &transport,
        PatternReader::new(10, 4 * CHUNK, Answers::Inline),
    );
    let file = direct(&device.path);
    assert_pattern(10, 0, &read_at(&file, 0, 4096).unwrap());
    drop(transport);
    let transport = start();
    let reader = PatternReader::new(10, 4 * CHUNK, Answers::Elsewhere);
    let again = transport.recover(device.id, Arc::new(reader)).unwrap();
    assert_eq!(again, device);
    assert_pattern(10, CHUNK, &read_at(&file, CHUNK, 4096).unwrap());
    drop(file);
    remove(&transport, device.id);
}

#[test]
fn what_a_dead_daemon_left_can_be_removed_without_recovery() {
    let Some(_machine) = machine() else { return };
    let mut daemon = Daemon::spawn(1);
    let reader = thread::spawn(|| read_at(&direct("/dev/ublkb200".as_ref()), HELD.start, 4096));
    daemon.wait_for("held");
    let transport = start();
    // Not while it lives.
    let error = transport.remove(200, Removal::Always).unwrap_err();
    assert!(matches!(error, UblkError::Unsuitable { .. }), "{error}");
    daemon.kill();
    let since = Instant::now();
    loop {
        match transport.remove(200, Removal::Always) {
            Ok(()) => break,
            Err(error) => {
                assert!(since.elapsed() < Duration::from_secs(60), "{error}");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    assert!(reader.join().unwrap().is_err());
    assert_eq!(nodes(), Vec::<String>::new());
    let error = transport
        .recover(200, Arc::new(PatternReader::new(0, SIZE, Answers::Inline)))
        .unwrap_err();
    assert!(matches!(error, UblkError::Unsuitable { .. }), "{error}");
}

#[test]
fn what_somebody_has_open_is_removed_without_waiting_for_them() {
    let Some(_machine) = machine() else { return };
    let asynchronous = Inventory::open(Duration::from_secs(60)).unwrap();
    let before_6_9 = Inventory::open(Duration::from_secs(60)).unwrap();
    for inventory in [asynchronous, before_6_9.without_async_deletion()] {
        let mut daemon = Daemon::spawn(1);
        let path = Path::new("/dev/ublkb200");
        let file = direct(path);
        let reader = thread::spawn(move || read_at(&direct(path), HELD.start, 4096));
        daemon.wait_for("held");
        let error = inventory.remove(200, Removal::Always).unwrap_err();
        assert!(matches!(error, UblkError::Unsuitable { .. }), "{error}");
        daemon.kill();
        // Returns, although the file that would have to be closed is closed only then.
        inventory.remove(200, Removal::Always).unwrap();
        assert!(reader.join().unwrap().is_err());
        assert!(read_at(&file, 0, 4096).unwrap_or_default().is_empty());
        drop(file);
        let since = Instant::now();
        while !nodes().is_empty() {
            assert!(since.elapsed() < Duration::from_secs(60), "{:?}", nodes());
            thread::sleep(Duration::from_millis(5));
        }
    }
}
