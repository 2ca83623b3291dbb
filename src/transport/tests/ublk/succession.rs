//! A daemon that is killed has a successor.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, thread};

use super::common::{
    Answers, CHUNK, PatternReader, Random, assert_pattern, check_random_reads, direct, read_at,
};
use super::{Transport, add, machine, nodes, remove, start};
use accel_transport::ublk::{
    DeviceState, Inventory, Removal, UblkError, UblkOptions, UblkSpec, UblkTransport,
};
use accel_transport::{Reader, Request};

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
            .args(["--exact", "succession::daemon_process", "--nocapture"])
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
            .args(["--exact", "succession::mortal_process"])
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
