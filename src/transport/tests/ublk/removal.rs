//! Devices come and go, and nothing is left of them.

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use super::common::{Answers, CHUNK, PatternReader, assert_pattern, direct, open_files, read_at};
use super::{Transport, add, machine, nodes, remove, start};
use accel_transport::ublk::{
    DeviceState, Removal, UblkError, UblkOptions, UblkSpec, UblkTransport,
};

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
