//! Requests are answered with the right bytes, or with errors where they belong.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{fs, thread};

use super::common::{
    Answers, CHUNK, Image, Lazy, PatternReader, Random, assert_pattern, buffered,
    check_random_reads, contents, direct, pattern, read_at,
};
use super::{add, drop_caches, machine, nodes, remove, start};
use accel_transport::ublk::{
    self, DeviceState, Features, Removal, UblkError, UblkOptions, UblkSpec, UblkTransport,
};
use accel_transport::{Place, ReadError, Reader, Request};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

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
    let (tree, image) = super::common::erofs_image(dir.path());
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
