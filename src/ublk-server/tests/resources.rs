//! What a daemon costs: memory, CPU time, descriptors, threads; over FUSE and over ublk.
//! Needs what `daemon.rs` needs.
//!
//! On a kernel without ublk the tests over it say so and pass, unless
//! `ACCEL_REQUIRE_UBLK=1`.

mod common;

use accel_client::paths::Paths;
use accel_sys::HugePages;
use accel_transport::ublk::probe;
use common::node::{Node, await_that, base, big, check_big, drop_caches, kill};
use common::{Entry, noise, publish_image, publish_tree};
use rustix::fs::OFlags;
use rustix::process::Signal;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ublk_server::client;

const MIB: u64 = 1 << 20;
/// What all processes may take beside the cache.
const BESIDE: u64 = 64 * MIB;

/// Each test with each transport, by its name.
macro_rules! over {
    ($transport:ident: $($test:ident),+ $(,)?) => {
        mod $transport {
            $(
                #[test]
                fn $test() {
                    if super::is_there(stringify!($transport)) {
                        super::$test(stringify!($transport));
                    }
                }
            )+
        }
    };
}

over!(fuse:
    memory_with_100_devices_is_bounded_and_a_cache_of_16_mib_serves_them,
    huge_pages_take_no_more_memory_also_when_workers_die,
    an_idle_daemon_uses_no_cpu,
    nothing_is_left_of_1000_attaches,
    a_slow_chunk_does_not_hold_up_what_is_in_memory,
    a_layer_is_detached_while_it_is_read,
);
// A thousand attaches take too long in an emulated guest: `tools/bench-many` sees what is
// left of many devices there. Of a block device that is open the driver waits for the end:
// `removing_a_device_with_a_held_read_is_bounded_and_can_be_repeated` of the transport.
over!(ublk:
    memory_with_100_devices_is_bounded_and_a_cache_of_16_mib_serves_them,
    huge_pages_take_no_more_memory_also_when_workers_die,
    an_idle_daemon_uses_no_cpu,
    requests_that_follow_closely_are_looked_for,
    a_slow_chunk_does_not_hold_up_what_is_in_memory,
);

fn is_there(transport: &str) -> bool {
    match probe() {
        Err(error) if transport == "ublk" => {
            let required = env::var("ACCEL_REQUIRE_UBLK").as_deref() == Ok("1");
            assert!(!required, "ublk is required: {error}");
            println!("skipped: {error}");
            false
        }
        _ => true,
    }
}

/// A daemon that exports layers so.
fn start(transport: &str, fill: impl FnOnce(&Path)) -> Node {
    Node::start_with(&["--transport".as_ref(), transport.as_ref()], fill)
}

/// CPU time of these processes so far, in ticks of 10 ms.
fn ticks(processes: &[u32]) -> u64 {
    let of = |pid: &u32| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        // utime and stime are fields 14 and 15; after the name comes field 3.
        let times = fields.skip(11).take(2);
        times.map(|time| time.parse::<u64>().unwrap()).sum()
    };
    processes.iter().map(of).sum()
}

fn files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// What it is when it does not change any more: threads that answered clients end soon.
fn settled(measure: impl Fn() -> Vec<usize>) -> Vec<usize> {
    let mut last = measure();
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(20));
        let now = measure();
        if now == last {
            break;
        }
        last = now;
    }
    last
}

/// Sees to it that nothing is more than before, once everything has had time to end.
fn assert_at_most(before: &[usize], measure: impl Fn() -> Vec<usize>) {
    let mut now = measure();
    for _ in 0..500 {
        if now.iter().zip(before).all(|(now, before)| now <= before) {
            println!("{before:?} -> {now:?}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
        now = measure();
    }
    panic!("{before:?} -> {now:?}");
}

fn memory_with_100_devices_is_bounded_and_a_cache_of_16_mib_serves_them(transport: &str) {
    let contents: Vec<_> = (0..100).map(|seed| noise(1 << 20, seed + 1)).collect();
    let mut image = None;
    let node = start(transport, |ufs| {
        let layers: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(number, content)| {
                let name = format!("f{number}");
                publish_tree(ufs, &name, &[(&name, Some(content))])
            })
            .collect();
        let first = layers[0].name.digest().to_string();
        image = Some((publish_image(ufs, &layers).to_string(), first));
    });
    let (image, first) = image.unwrap();
    let pid = node.child.id();
    node.ask(&["attach", &first]);
    let of_one = settled(|| vec![threads(pid)]);
    let devices = node.ask(&["attach", &image]);
    let devices: Vec<_> = devices.lines().map(PathBuf::from).collect();
    assert_eq!(devices.len(), 100);
    let ufs = node.path("ufs");
    rustix::fs::sync();
    drop_caches();
    // Six times as much as the cache holds, twice, and by several at once.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (devices, contents) = (&devices, &contents);
            scope.spawn(move || {
                for round in 0..200 {
                    let at = (round * 7 + thread * 25) % devices.len();
                    let mut options = File::options();
                    options
                        .read(true)
                        .custom_flags(OFlags::DIRECT.bits().cast_signed());
                    let mut device = options.open(&devices[at]).unwrap();
                    let len = device.seek(SeekFrom::End(0)).unwrap();
                    let len = usize::try_from(len).unwrap();
                    // Past the cache a block device reads to whole pages.
                    let mut room = vec![0; len + 4096];
                    let from = room.as_ptr().align_offset(4096);
                    let bytes = &mut room[from..from + len];
                    device.read_exact_at(bytes, 0).unwrap();
                    let found = bytes
                        .windows(64)
                        .position(|some| some == &contents[at][..64]);
                    let from = found.unwrap();
                    assert!(
                        bytes[from..from + contents[at].len()] == contents[at],
                        "{at}"
                    );
                }
            });
        }
    });
    // As many threads as with one.
    assert_at_most(&of_one, || vec![threads(pid)]);
    let memory = node.memory();
    println!(
        "{} MiB with 100 devices and a cache of 16 MiB",
        memory / MIB
    );
    assert!(memory <= 16 * MIB + BESIDE, "{memory} bytes");
    let status = node.status();
    assert_eq!(status["exports"].as_array().unwrap().len(), 100);
    assert!(status["cache"]["evicted"].as_u64() > Some(500), "{status}");
    // The worker reads past the page cache.
    let worker = status["sources"][0]["worker"].as_u64().unwrap();
    let mut open = 0;
    for entry in fs::read_dir(format!("/proc/{worker}/fd")).unwrap() {
        let entry = entry.unwrap();
        let file = fs::read_link(entry.path()).unwrap();
        if file.starts_with(&ufs) && file.extension() == Some(OsStr::new("erofs")) {
            let info = format!("/proc/{worker}/fdinfo/{}", entry.file_name().display());
            let info = fs::read_to_string(info).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            assert!(flags & OFlags::DIRECT.bits() != 0, "{}", file.display());
            open += 1;
        }
    }
    assert!(open > 50, "{open} files are open");
    node.ask(&["detach", &image]);
    node.ask(&["detach", &first]);
    node.stop();
}

/// Nor are there any where they are not wanted.
fn huge_pages_take_no_more_memory_also_when_workers_die(transport: &str) {
    let possible = HugePages::probe();
    for wanted in [true, false] {
        let mut made = None;
        let options = ["--transport", transport, "--no-huge-pages"].map(OsStr::new);
        let options = &options[..if wanted { 2 } else { 3 }];
        let node = Node::start_with(options, |ufs| made = Some(big(ufs)));
        let (image, contents) = made.unwrap();
        let root = node.directory("root");
        node.ask(&["mount", &image, &root]);
        for round in 0..6 {
            if round % 2 == 1 {
                let worker = node.status()["sources"][0]["worker"].clone();
                kill(&worker, Signal::STOP);
                drop_caches();
                std::thread::scope(|scope| {
                    scope.spawn(|| check_big(&root, &contents));
                    let none = "\nimage_accel_requests_in_flight 0\n";
                    await_that(|| !node.ask(&["metrics"]).contains(none));
                    kill(&worker, Signal::KILL);
                });
            }
            check_big(&root, &contents);
            match &possible {
                Ok(()) if wanted => await_that(|| {
                    let (told, mapped) = node.huge();
                    told > 0 && told == mapped
                }),
                _ => assert_eq!(node.huge(), (0, 0)),
            }
            let (memory, (told, _)) = (node.memory(), node.huge());
            println!("{} MiB, {} MiB huge", memory / MIB, told / MIB);
            assert!(memory <= 16 * MIB + BESIDE, "{memory} bytes");
        }
        if let Err(error) = &possible {
            println!("the kernel makes no huge pages of shared memory: {error}");
        }
        node.ask(&["unmount", &root]);
        node.stop();
    }
}

/// Waits until nothing more becomes huge pages, which takes the daemon some time.
fn await_huge_pages(node: &Node) {
    let mut last = None;
    while last != Some(node.huge()) {
        last = Some(node.huge());
        std::thread::sleep(Duration::from_secs(3));
    }
}

fn an_idle_daemon_uses_no_cpu(transport: &str) {
    let mut made = None;
    let node = start(transport, |ufs| made = Some(big(ufs)));
    let (image, contents) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    check_big(&root, &contents[..2]);
    let ready = || node.status()["holders"][0]["ready"]["metadata_ms"].is_u64();
    while !ready() {
        std::thread::sleep(Duration::from_millis(20));
    }
    await_huge_pages(&node);
    let processes = node.processes();
    // Over FUSE there is one that keeps connections.
    assert_eq!(processes.len(), if transport == "fuse" { 3 } else { 2 });
    let before = ticks(&processes);
    std::thread::sleep(Duration::from_secs(4));
    let used = ticks(&processes) - before;
    assert!(used <= 1, "{used} ticks of 10 ms in 4 s");
    node.ask(&["unmount", &root]);
    node.stop();
}

/// Only if it is told to; and the metrics say so, as documented.
fn requests_that_follow_closely_are_looked_for(transport: &str) {
    let names = [
        "image_accel_polls_total{result=\"found\"}",
        "image_accel_polls_total{result=\"missed\"}",
        "image_accel_poll_seconds_total",
    ];
    let documentation = include_str!("../../../ARCHITECTURE.md");
    for name in names {
        let name = name.split('{').next().unwrap();
        assert!(
            documentation.contains(&format!("| `{name}` | counter |")),
            "{name}"
        );
    }
    // An emulated machine is slow.
    for longest in ["1000", "0"] {
        let mut made = None;
        let further = ["--transport", transport, "--poll-us", longest].map(OsStr::new);
        let node = Node::start_with(&further, |ufs| made = Some(base(ufs).0));
        let layer = made.unwrap().name.digest().to_string();
        let device = node.ask(&["attach", &layer]);
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed());
        let device = options.open(device.trim()).unwrap();
        let read = || {
            let mut room = vec![0; 8192];
            let from = room.as_ptr().align_offset(4096);
            for _ in 0..500 {
                device
                    .read_exact_at(&mut room[from..from + 4096], 0)
                    .unwrap();
            }
            let text = node.ask(&["metrics"]);
            let value = |name| -> f64 {
                let line = text.lines().find(|line| line.starts_with(name));
                line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
            };
            names.map(value)
        };
        if longest == "0" {
            assert_eq!(read(), [0.0; 3]);
        } else {
            await_that(|| {
                let [found, missed, seconds] = read();
                println!("found {found}, missed {missed}, in {seconds} s");
                found > 0.0 && seconds > 0.0
            });
        }
        drop(device);
        node.ask(&["detach", &layer]);
        node.stop();
    }
}

fn nothing_is_left_of_1000_attaches(transport: &str) {
    let mut made = None;
    let node = start(transport, |ufs| {
        let other: &[Entry<'_>] = &[("other", Some(b"other"))];
        let layers = [base(ufs).0, publish_tree(ufs, "other", other)];
        made = Some(layers.map(|layer| layer.name.digest().to_string()));
    });
    let layers = made.unwrap();
    let paths = Paths::new(&node.path("socket"), None);
    let pid = node.child.id();
    let turn = |number: usize| {
        let layer = &layers[number % 2];
        let files = client::attach(&paths, layer).unwrap();
        let mut superblock = [0; 4];
        File::open(&files[0])
            .unwrap()
            .read_exact_at(&mut superblock, 1024)
            .unwrap();
        assert_eq!(superblock, 0xE0F5_E1E2_u32.to_le_bytes());
        client::detach(&paths, layer).unwrap();
    };
    (0..50).for_each(turn);
    let worker = node.processes()[1];
    let measure = || vec![files(pid), threads(pid), files(worker), threads(worker)];
    let (before, memory) = (settled(measure), node.memory_of_its_own());
    (0..1000).for_each(turn);
    assert_at_most(&before, measure);
    let now = node.memory_of_its_own();
    println!("{} -> {} KiB", memory >> 10, now >> 10);
    assert!(now <= memory + 2 * MIB, "{memory} -> {now} bytes");
    let journal = fs::read_dir(node.path("socket.d").join("journal")).unwrap();
    assert_eq!(journal.count(), 0);
    assert_eq!(node.processes().len(), 2);
    node.stop();
}

fn a_slow_chunk_does_not_hold_up_what_is_in_memory(transport: &str) {
    let mut made = None;
    let node = start(transport, |ufs| made = Some(base(ufs).0));
    let layer = made.unwrap();
    let path = node.ask(&["attach", &layer.name.digest().to_string()]);
    let read = |offset: u64| {
        let file = File::open(path.trim()).unwrap();
        file.read_exact_at(&mut [0; 512], offset).unwrap();
    };
    read(8 * (128 << 10));
    let status = node.status();
    let worker = status["sources"][0]["worker"].clone();
    let served = || node.status()["exports"][0]["hits"].as_u64().unwrap();
    kill(&worker, Signal::STOP);
    drop_caches();
    std::thread::scope(|scope| {
        let misses = || node.status()["exports"][0]["misses"].as_u64().unwrap();
        let before = misses();
        let slow = scope.spawn(|| read(16 * (128 << 10)));
        while misses() == before {
            std::thread::yield_now();
        }
        // The same file, so the same connection and the same queue thread.
        let before = served();
        read(8 * (128 << 10) + 4096);
        assert!(served() > before && !slow.is_finished());
        kill(&worker, Signal::CONT);
    });
    node.ask(&["detach", &layer.name.digest().to_string()]);
    node.stop();
}

fn a_layer_is_detached_while_it_is_read(transport: &str) {
    let mut made = None;
    let node = start(transport, |ufs| {
        let (layer, files) = base(ufs);
        made = Some((publish_image(ufs, &[layer]).to_string(), files, big(ufs).0));
    });
    let (image, files, digest) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    for round in 0..4 {
        let path = node.ask(&["attach", &digest]);
        let file = File::open(path.trim()).unwrap();
        let worker = node.status()["sources"][0]["worker"].clone();
        kill(&worker, Signal::STOP);
        let flying = || {
            let metrics = node.ask(&["metrics"]);
            let line = metrics
                .lines()
                .find(|line| line.starts_with("image_accel_requests_in_flight "));
            line.unwrap().ends_with(" 0")
        };
        std::thread::scope(|scope| {
            let reads = (0..8_u64).map(|number| {
                let file = &file;
                scope.spawn(move || {
                    file.read_exact_at(&mut [0; 512], (round * 32 + number * 3) * (256 << 10))
                })
            });
            let reads: Vec<_> = reads.collect();
            while flying() {
                std::thread::yield_now();
            }
            node.client(&["detach", &digest]);
            kill(&worker, Signal::CONT);
            // They end, whichever way.
            for read in reads {
                let _ = read.join().unwrap();
            }
        });
        drop(file);
        // What could not end then ends now.
        node.client(&["detach", &digest]);
        assert!(!Path::new(path.trim()).exists());
        drop_caches();
        for (path, content) in &files {
            assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
        }
    }
    node.ask(&["unmount", &root]);
    let metrics = node.ask(&["metrics"]);
    assert!(
        metrics.contains("\nimage_accel_requests_in_flight 0\n"),
        "{metrics}"
    );
    node.stop();
}
