//! Damage is an error where it is touched, and heals.

use super::common::{noise, publish};
use super::{CHUNK, Setup, image, read, setup, setup_patient, setup_with, start};
use accel_source::{Fault, Faulty, Operation, Patience};
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use ublk_server::engine::Export;

#[test]
fn a_flipped_bit_fails_its_chunk_alone_and_heals() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.image().beneath(ufs.path());
    let flip = |bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
        file.write_all_at(bytes, CHUNK as u64 + 1000).unwrap();
    };
    flip(&[image[CHUNK + 1000] ^ 1]);
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, CHUNK).unwrap() == image[..CHUNK]);
    for (offset, len) in [(CHUNK, 512), (0, 3 * CHUNK), (2 * CHUNK - 512, 1024)] {
        let error = read(&reader, offset, len).unwrap_err();
        for part in [
            layer.name.to_string().as_str(),
            "chunk 1",
            "the test's UFS",
            ".erofs",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
    assert!(read(&reader, 2 * CHUNK, CHUNK).unwrap() == image[2 * CHUNK..3 * CHUNK]);
    flip(&[image[CHUNK + 1000]]);
    assert!(read(&reader, 0, 3 * CHUNK).unwrap() == image[..3 * CHUNK]);
}

/// What a source says of files that are not there, as often as it is asked.
fn asked_in_vain(setup: &Setup, times: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    let failed = || setup.worker.counters().failed_attempts.load(Relaxed);
    while failed() < times {
        assert!(Instant::now() < until, "asked {} times", failed());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_read_waits_for_files_that_are_gone_and_not_for_ever() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 9);
    let layer = publish(ufs.path(), "a", &image);
    let (there, gone) = (ufs.path().join("layers"), ufs.path().join("gone"));
    let patient = setup(ufs.path(), 16, 16);
    // Only so that the test ends: on a slow machine, too, it is asked several times meanwhile.
    let whole = Some(Duration::from_secs(5));
    let patience = Patience {
        whole,
        ..Patience::DATA
    };
    let impatient = setup_patient(ufs.path(), 16, 16, patience, |source| source);
    let [reader, other] = [&patient, &impatient].map(|setup| setup.open(&layer));
    // As when another directory, or none, is where UFS was.
    fs::rename(&there, &gone).unwrap();
    let waiting = start(&reader, CHUNK, 4096);
    let given_up = start(&other, CHUNK, 4096);
    asked_in_vain(&patient, 3);
    asked_in_vain(&impatient, 3);
    assert!(matches!(waiting.try_recv(), Err(mpsc::TryRecvError::Empty)));
    let error = given_up.recv().unwrap().unwrap_err().reason;
    for part in ["chunk 1", ".erofs", "the test's UFS"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(matches!(waiting.try_recv(), Err(mpsc::TryRecvError::Empty)));
    fs::rename(&gone, &there).unwrap();
    assert!(waiting.recv().unwrap().unwrap() == image[CHUNK..CHUNK + 4096]);
    assert!(read(&other, CHUNK, 4096).unwrap() == image[CHUNK..CHUNK + 4096]);
}

#[test]
fn truncation_fails_what_is_gone_and_heals() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(5 * CHUNK, 3);
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.image().beneath(ufs.path());
    fs::write(&file, &image[..2 * CHUNK + 4096]).unwrap();
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, 2 * CHUNK).unwrap() == image[..2 * CHUNK]);
    assert!(read(&reader, 2 * CHUNK, 512).is_err());
    assert!(read(&reader, 4 * CHUNK, 512).is_err());
    // Put right by replacing the file: another inode.
    let new = ufs.path().join("new");
    fs::write(&new, &image).unwrap();
    fs::rename(&new, &file).unwrap();
    assert!(read(&reader, 0, 5 * CHUNK).unwrap() == image);
}

#[test]
fn a_wrong_index_never_lets_wrong_bytes_through() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let file = layer.name.index().beneath(ufs.path());
    let index = fs::read(&file).unwrap();
    // Every page but the header, one bit each: in the zero map it is a wrong hint,
    // in the tree an error.
    for page in 1..index.len() / 4096 {
        let mut wrong = index.clone();
        wrong[page * 4096] ^= 1;
        fs::write(&file, &wrong).unwrap();
        let setup = setup(ufs.path(), 16, 16);
        let reader = setup.open(&layer);
        match read(&reader, 0, CHUNK) {
            Ok(bytes) => assert!(bytes == image[..CHUNK]),
            Err(error) => assert!(error.contains(".idx"), "{error}"),
        }
    }
    // A header that is about something else is refused at once.
    let setup = setup(ufs.path(), 16, 16);
    let mut wrong = index;
    wrong[24] ^= 1;
    fs::write(&file, &wrong).unwrap();
    let (name, root, size) = (layer.name, layer.root, layer.size);
    Export::open(&setup.engine, name, root, size, Patience::LOOKUP).unwrap_err();
}

#[test]
fn one_lie_of_the_source_is_forgiven() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 5);
    let layer = publish(ufs.path(), "a", &image);
    let lies = |file: &str, operation| match operation {
        Operation::Read { fresh: true, .. } | Operation::List | Operation::Write { .. } => {
            Fault::None
        }
        Operation::Read { len, .. } if len == CHUNK => Fault::Flip(77),
        Operation::Read { .. } if file.ends_with(".idx") => Fault::Truncate(4096),
        Operation::Read { .. } => Fault::None,
    };
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, Box::new(lies)))
    });
    let reader = setup.open(&layer);
    assert!(read(&reader, 0, 4 * CHUNK).unwrap() == image);
}

#[test]
fn killed_workers_are_not_noticed() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(64 * CHUNK, 6);
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 4, 4);
    let reader = setup.open(&layer);
    for _ in 0..3 {
        let waiting: Vec<_> = (0..64)
            .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
            .collect();
        if let Some(pid) = setup.worker.worker_pid() {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        for (chunk, answer) in waiting.into_iter().enumerate() {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
        }
    }
    assert!(setup.worker.counters().workers.load(Relaxed) > 1);
}

#[test]
fn layers_that_share_a_chunk_do_not_share_its_damage() {
    let ufs = tempfile::tempdir().unwrap();
    let (mut one, mut two) = (noise(2 * CHUNK, 8), noise(2 * CHUNK, 8));
    one[CHUNK] ^= 1;
    two[CHUNK] ^= 2;
    let (one_layer, two_layer) = (
        publish(ufs.path(), "1", &one),
        publish(ufs.path(), "2", &two),
    );
    let file = one_layer.name.image().beneath(ufs.path());
    fs::write(&file, vec![1; 2 * CHUNK]).unwrap();
    let setup = setup(ufs.path(), 8, 8);
    let (one_reader, two_reader) = (setup.open(&one_layer), setup.open(&two_layer));
    for _ in 0..20 {
        let first = start(&one_reader, 0, CHUNK);
        let second = start(&two_reader, 0, CHUNK);
        let _ = first.recv().unwrap();
        assert!(second.recv().unwrap().unwrap() == two[..CHUNK]);
    }
}
