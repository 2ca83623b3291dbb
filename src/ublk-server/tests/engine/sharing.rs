//! What is under way is shared, what is beside it comes along, and nothing holds up the rest.

use super::common::{noise, publish};
use super::{CHUNK, read, setup, setup_with, start};
use accel_source::{
    Done, Fault, Faulty, Filled, Operation, Request as SourceRequest, Source, SourceError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The source as the engine sees it, with its reads of images counted.
#[allow(clippy::type_complexity)] // it is what `Faulty` takes
fn counted(
    reads: &Arc<AtomicUsize>,
    fault: fn(u64) -> Fault,
) -> Box<dyn Fn(&str, Operation) -> Fault + Send + Sync> {
    let reads = Arc::clone(reads);
    Box::new(move |file, operation| match operation {
        Operation::Read { offset, .. } if file.ends_with(".erofs") => {
            reads.fetch_add(1, Relaxed);
            fault(offset)
        }
        _ => Fault::None,
    })
}

#[test]
fn many_readers_of_one_missing_chunk_cause_one_read() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(4 * CHUNK, 11);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let slow = |_| Fault::Delay(Duration::from_secs(2));
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, counted(&reads, slow)))
    });
    // Two exports of one layer: what is cached has no owner.
    let readers = [setup.open(&layer), setup.open(&layer)];
    let waiting: Vec<_> = (0..32)
        .map(|at| start(&readers[at % 2], 2 * CHUNK + at * 4096, 4096))
        .collect();
    for (at, answer) in waiting.into_iter().enumerate() {
        let from = 2 * CHUNK + at * 4096;
        assert!(answer.recv().unwrap().unwrap() == image[from..from + 4096]);
    }
    assert_eq!(reads.load(Relaxed), 1);
    let totals = setup.engine.totals();
    assert_eq!(
        (totals.requests, totals.misses, totals.joined),
        (32, 32, 31)
    );
    // The time of a wait is noted when its answer is out.
    let since = Instant::now();
    while setup.engine.totals().waited.count() < 32 && since.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(setup.engine.totals().waited.count(), 32);
}

#[test]
fn a_chunk_that_never_comes_holds_up_no_other_and_nothing_in_memory() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(8 * CHUNK, 12);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let one = |offset| match offset {
        0 => Fault::Stall,
        _ => Fault::None,
    };
    let setup = setup_with(ufs.path(), 8, 8, |source| {
        Arc::new(Faulty::new(source, counted(&reads, one)))
    });
    let reader = setup.open(&layer);
    assert!(read(&reader, 7 * CHUNK, 512).unwrap() == image[7 * CHUNK..7 * CHUNK + 512]);
    let stuck = start(&reader, 0, 512);
    // What is cached is answered before `read` returns; this thread is the queue.
    let cached = start(&reader, 7 * CHUNK + 4096, 512);
    assert!(cached.try_recv().is_ok());
    for chunk in 1..7 {
        let bytes = read(&reader, chunk * CHUNK, CHUNK).unwrap();
        assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
    }
    assert!(stuck.try_recv().is_err(), "it was not stuck");
}

#[test]
fn a_scan_of_one_image_leaves_the_hot_set_of_another() {
    const HOT: usize = 24;
    const SCAN: usize = 300;
    let ufs = tempfile::tempdir().unwrap();
    let (hot, cold) = (noise(HOT * CHUNK, 13), noise(SCAN * CHUNK, 14));
    let hot_layer = publish(ufs.path(), "hot", &hot);
    let cold_layer = publish(ufs.path(), "cold", &cold);
    let setup = setup(ufs.path(), 60, 64);
    let (hot_reader, cold_reader) = (setup.open(&hot_layer), setup.open(&cold_layer));
    for _ in 0..3 {
        for chunk in 0..HOT {
            read(&hot_reader, chunk * CHUNK, CHUNK).unwrap();
        }
    }
    for chunk in 0..SCAN {
        read(&cold_reader, chunk * CHUNK, CHUNK).unwrap();
    }
    let fetched = || hot_reader.export().counters.source_bytes.load(Relaxed);
    let before = fetched();
    for chunk in 0..HOT {
        assert!(
            read(&hot_reader, chunk * CHUNK, CHUNK).unwrap()
                == hot[chunk * CHUNK..(chunk + 1) * CHUNK]
        );
    }
    let again = usize::try_from(fetched() - before).unwrap();
    assert!(
        again <= HOT / 8 * CHUNK,
        "{again} bytes of the hot set had to be read again"
    );
}

#[test]
fn reads_that_are_under_way_end_when_their_export_does() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(16 * CHUNK, 15);
    let layer = publish(ufs.path(), "a", &image);
    let reads = Arc::new(AtomicUsize::new(0));
    let slow = |_| Fault::Delay(Duration::from_millis(100));
    let setup = setup_with(ufs.path(), 4, 4, |source| {
        Arc::new(Faulty::new(source, counted(&reads, slow)))
    });
    let reader = setup.open(&layer);
    let waiting: Vec<_> = (0..16)
        .map(|chunk| start(&reader, chunk * CHUNK, CHUNK))
        .collect();
    let export = Arc::downgrade(reader.export());
    drop(reader);
    for (chunk, answer) in waiting.into_iter().enumerate() {
        let bytes = answer.recv().unwrap().unwrap();
        assert!(bytes == image[chunk * CHUNK..(chunk + 1) * CHUNK]);
    }
    // Nothing of it stays; what it did is still in the sum.
    while export.upgrade().is_some() || setup.engine.unanswered() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(setup.engine.totals().requests, 16);
}

#[test]
fn what_lies_beside_comes_with_it_from_a_source_far_away() {
    let ufs = tempfile::tempdir().unwrap();
    let mut image = noise(96 * CHUNK, 5);
    // Zeros among them.
    image[93 * CHUNK..94 * CHUNK].fill(0);
    let layer = publish(ufs.path(), "a", &image);
    let slow = |inner: Arc<dyn Source>| -> Arc<dyn Source> {
        let plan = |file: &str, _: Operation| match file.ends_with(".erofs") {
            true => Fault::Delay(Duration::from_millis(20)),
            false => Fault::None,
        };
        Arc::new(Faulty::new(inner, Box::new(plan)))
    };
    let setup = setup_with(ufs.path(), 256, 16, slow);
    let reader = setup.open(&layer);
    let counters = &reader.export().counters;
    let wanted = |chunk: usize| {
        let bytes = read(&reader, chunk * CHUNK + 4096, 4096).unwrap();
        assert!(bytes == image[chunk * CHUNK + 4096..][..4096]);
    };
    // One after the other, far from each other: how slow it is has to be seen.
    for group in 0..8 {
        wanted(group * 8);
    }
    assert_eq!(counters.background_bytes.load(Relaxed), 0);
    // Its group begins at 80.
    wanted(83);
    let until = Instant::now() + Duration::from_secs(60);
    while setup.engine.cached_chunks() < 8 + 4 {
        assert!(Instant::now() < until, "{}", setup.engine.cached_chunks());
        std::thread::sleep(Duration::from_millis(1));
    }
    let (misses, read) = (
        counters.misses.load(Relaxed),
        counters.source_bytes.load(Relaxed),
    );
    for chunk in 80..84 {
        wanted(chunk);
    }
    assert_eq!(counters.source_bytes.load(Relaxed), read);
    assert_eq!(counters.misses.load(Relaxed), misses);
    // What is asked for goes across groups, and is not asked for twice; zeros are not read.
    let answer = start(&reader, 71 * CHUNK, 2 * CHUNK).recv().unwrap();
    assert!(answer.unwrap() == image[71 * CHUNK..73 * CHUNK]);
    wanted(95);
    while setup.engine.cached_chunks() < 12 + 8 + 3 {
        assert!(Instant::now() < until, "{}", setup.engine.cached_chunks());
        std::thread::sleep(Duration::from_millis(1));
    }
    let all = counters.source_bytes.load(Relaxed) - read;
    assert_eq!(all, (8 + 3) * CHUNK as u64);
}

/// A source near by, each of whose answers waits in the daemon before anybody hears of it:
/// as for a verifier that has much to do.
struct Held<S>(S);

impl<S: Source> Source for Held<S> {
    fn submit(&self, request: SourceRequest, done: Done) {
        let held = move |outcome: Result<Filled, SourceError>| {
            let outcome = outcome.map(|mut filled| {
                filled.took = Duration::from_micros(300);
                filled
            });
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                done(outcome);
            });
        };
        self.0.submit(request, Box::new(held));
    }

    fn name(&self) -> &str {
        self.0.name()
    }
}

#[test]
fn what_waits_in_the_daemon_does_not_come_from_far_away() {
    let ufs = tempfile::tempdir().unwrap();
    let image = noise(96 * CHUNK, 6);
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup_with(ufs.path(), 256, 16, |source| Arc::new(Held(source)));
    let reader = setup.open(&layer);
    for group in 0..10 {
        let bytes = read(&reader, group * 8 * CHUNK, 4096).unwrap();
        assert!(bytes == image[group * 8 * CHUNK..][..4096]);
    }
    // What is read around misses before the read returns.
    assert_eq!(reader.export().counters.misses.load(Relaxed), 10);
}
