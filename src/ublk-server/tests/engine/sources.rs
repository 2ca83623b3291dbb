//! What one source does not have another one gives.

use super::common::{Layer, Stalled, noise, publish};
use super::{CHUNK, image, read, setup_two, setup_with, start, worker};
use accel_source::{Arena, Fault, Faulty, Operation, Patience, Source, Sources};
use accel_ufs::canary::{self, Canary};
use accel_ufs::names::LayerName;
use accel_ufs::node::NodeName;
use accel_ufs::publish::Ufs;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use ublk_server::engine::{Engine, Export, ExportReader};

#[test]
fn what_one_ufs_gives_wrongly_another_gives() {
    let image = image();
    for damage in 0..5 {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let layer = publish(first.path(), "a", &image);
        publish(second.path(), "a", &image);
        let file = layer.name.image().beneath(first.path());
        let index = layer.name.index().beneath(first.path());
        match damage {
            0 => fs::write(&file, noise(image.len(), 77)).unwrap(),
            1 => fs::write(&file, &image[..CHUNK / 2]).unwrap(),
            2 => fs::remove_file(&file).unwrap(),
            3 => fs::write(&index, noise(64 << 10, 78)).unwrap(),
            _ => fs::remove_dir_all(first.path()).unwrap(),
        }
        let setup = setup_two([first.path(), second.path()], 16, 16);
        let reader = setup.open(&layer);
        assert!(read(&reader, 0, image.len()).unwrap() == image, "{damage}");
        assert_eq!(reader.export().counters.errors.load(Relaxed), 0);
        assert_eq!(setup.sources.failed(), 0);
        assert!(setup.sources.standings()[0].times > 0, "{damage}");
    }
}

#[test]
fn a_ufs_that_never_answers_is_passed_over() {
    let (stalled, ufs) = (Stalled::new(), tempfile::tempdir().unwrap());
    let image = noise(40 * CHUNK, 9);
    let layer = publish(ufs.path(), "a", &image);
    // Less memory than the reads under way want, a part of it held by a worker
    // that cannot even be killed.
    let setup = setup_two([stalled.path(), ufs.path()], 8, 8);
    let reader = setup.open(&layer);
    for _ in 0..3 {
        let waiting: Vec<_> = (0..40)
            .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
            .collect();
        for (chunk, answer) in waiting.into_iter().enumerate() {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
        }
    }
    let standing = &setup.sources.standings()[0];
    let words = standing.condition.to_string();
    assert!(words.contains("does not answer"), "{words}");
    assert_eq!(setup.sources.failed(), 0);
}

#[test]
fn all_memory_held_by_a_stalled_ufs_is_an_error_in_time() {
    let (stalled, ufs) = (Stalled::new(), tempfile::tempdir().unwrap());
    let image = noise(8 * CHUNK, 10);
    let layer = publish(ufs.path(), "a", &image);
    let arena = Arc::new(Arena::new(2, 2).unwrap());
    let source = worker("stalled", stalled.path(), &arena);
    let sources = Arc::new(Sources::new(vec![source]).unwrap());
    let patience = Patience {
        attempt: Duration::from_millis(50),
        whole: Some(Duration::from_millis(500)),
        await_file: true,
        optional: false,
    };
    let engine = Engine::start(sources, arena, patience).unwrap();
    let export = Export::recovered(layer.name, layer.root, layer.size);
    let reader = ExportReader::new(&engine, &Arc::new(export));
    let waiting: Vec<_> = (0..8)
        .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
        .collect();
    for answer in waiting {
        let error = answer.recv().unwrap().unwrap_err().reason;
        assert!(
            error.contains("stalled") || error.contains("memory"),
            "{error}"
        );
    }
}

#[test]
fn each_read_of_a_canary_goes_to_the_source() {
    let ufs = tempfile::tempdir().unwrap();
    let node = NodeName::new("c", "n").unwrap();
    let canary = Ufs::open(ufs.path()).unwrap().put_canary(&node).unwrap();
    let layer = Layer {
        name: LayerName::Canary(canary.digest),
        root: canary.root,
        size: canary.size,
    };
    // So far away that as much as ever is read around what is wanted.
    let slow = |inner: Arc<dyn Source>| -> Arc<dyn Source> {
        let plan = |_: &str, _: Operation| Fault::Delay(Duration::from_millis(9));
        Arc::new(Faulty::new(inner, Box::new(plan)))
    };
    let setup = setup_with(ufs.path(), 512, 32, slow);
    let reader = setup.open(&layer);
    setup.engine.expect_mount(reader.export());
    let until = Instant::now() + Duration::from_secs(60);
    while setup.engine.cached_chunks() < 1 {
        assert!(Instant::now() < until, "its beginning does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
    let counters = &reader.export().counters;
    for number in 0..canary::READS {
        let before = counters.misses.load(Relaxed);
        let at = usize::try_from(Canary::offset(number)).unwrap();
        let bytes = read(&reader, at, canary::READ).unwrap();
        assert!(bytes == canary.content(number), "read {number}");
        assert_eq!(counters.misses.load(Relaxed), before + 1, "read {number}");
    }
    assert_eq!(counters.hits.load(Relaxed), 0);
}

#[test]
fn a_canary_that_is_missing_is_missed_at_once_and_held_against_no_source() {
    let [ufs, replica] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let node = NodeName::new("c", "n").unwrap();
    let opened = Ufs::open(ufs.path()).unwrap();
    let canary = opened.put_canary(&node).unwrap();
    let layer = Layer {
        name: LayerName::Canary(canary.digest),
        root: canary.root,
        size: canary.size,
    };
    let setup = setup_two([ufs.path(), replica.path()], 512, 32);
    let reader = setup.open(&layer);
    opened.remove_canary(&node).unwrap();
    // Not after the ten minutes that a file of an image is waited for.
    let at = usize::try_from(Canary::offset(0)).unwrap();
    let error = read(&reader, at, canary::READ).unwrap_err();
    assert!(error.contains(".canary"), "{error}");
    for standing in setup.sources.standings() {
        assert_eq!(standing.times, 0, "{standing:?}");
    }
}
