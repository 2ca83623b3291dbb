//! Whatever range is asked for is right, and read no oftener than needed.

use super::common::publish;
use super::{CHUNK, buffer, image, read, setup, start};
use accel_transport::{Reader, Request};
use std::sync::atomic::Ordering::Relaxed;
use ublk_server::engine::{ExportReader, Kept, TIMED};

#[test]
fn every_range_is_right_also_with_little_memory() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    // Fewer slots than reads under way: loads wait for memory.
    let setup = setup(ufs.path(), 2, 1);
    let reader = setup.open(&layer);
    assert_eq!(reader.size(), image.len() as u64);
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % below
    };
    for _ in 0..20 {
        let waiting: Vec<_> = (0..32)
            .map(|_| {
                let offset = random(image.len() / 512) * 512;
                let len = (random(1024) + 1) * 512;
                let len = len.min(image.len() - offset);
                (offset, len, start(&reader, offset, len))
            })
            .collect();
        for (offset, len, answer) in waiting {
            let bytes = answer.recv().unwrap().unwrap();
            assert!(
                bytes == image[offset..offset + len],
                "{len} bytes at {offset}"
            );
        }
    }
}

#[test]
fn zeros_are_not_fetched_and_hits_read_nothing() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 16, 16);
    let reader = setup.open(&layer);
    let fetched = || reader.export().counters.source_bytes.load(Relaxed);
    let before = fetched();
    let zeros = read(&reader, 3 * CHUNK, 127 * CHUNK).unwrap();
    assert!(zeros.iter().all(|&byte| byte == 0));
    // Pages of the index and nothing else.
    assert!(
        fetched() - before <= 4 * 4096,
        "{} bytes",
        fetched() - before
    );
    assert!(read(&reader, 0, CHUNK).unwrap() == image[..CHUNK]);
    let before = fetched();
    assert!(read(&reader, 512, 1024).unwrap() == image[512..1536]);
    assert_eq!(fetched(), before);
}

#[test]
fn what_is_at_hand_is_counted_when_it_is_settled() {
    let ufs = tempfile::tempdir().unwrap();
    let image = image();
    let layer = publish(ufs.path(), "a", &image);
    let setup = setup(ufs.path(), 16, 16);
    let readers = [setup.open(&layer), setup.open(&layer)];
    let mut kept = Kept::default();
    // Whether it was at hand.
    let at_once = |reader: &ExportReader, kept: &mut Kept, offset: usize, len| {
        let (request, answer) = buffer(len);
        if !reader
            .read_at_once(offset as u64, len, kept, &request)
            .unwrap()
        {
            assert_eq!(request.filled.into_inner(), 0);
            return false;
        }
        request.finish(Ok(()));
        let bytes = answer.recv().unwrap().unwrap();
        assert!(bytes == image[offset..offset + len], "{len} at {offset}");
        true
    };
    let counted = |reader: &ExportReader| {
        let counters = &reader.export().counters;
        [&counters.requests, &counters.hits, &counters.served_bytes]
            .map(|counter| counter.load(Relaxed))
    };
    let all = || {
        let (totals, cache) = (setup.engine.totals(), setup.engine.chunk_counters());
        let cached = cache.hits.load(Relaxed);
        [totals.requests, totals.hits, totals.served_bytes, cached]
    };
    for reader in &readers {
        // Nothing is known yet, and that counts for nothing.
        for (offset, len) in [(0, 4096), (CHUNK - 4096, 8192), (4 * CHUNK, 4096)] {
            assert!(!at_once(reader, &mut kept, offset, len));
        }
        reader.settle(&mut kept);
        assert_eq!(counted(reader), [0; 3]);
        for (offset, len) in [(0, 2 * CHUNK), (4 * CHUNK, 4096), (0, 2 * CHUNK)] {
            let (request, answer) = buffer(len);
            reader.read(offset as u64, len, request);
            answer.recv().unwrap().unwrap();
        }
    }
    for reader in &readers {
        let (before, sum) = (counted(reader), all());
        // One chunk, two, and zeros, which are no hits.
        for (offset, len) in [(4096, 4096), (CHUNK - 4096, 8192), (4 * CHUNK, 4096)] {
            assert!(at_once(reader, &mut kept, offset, len));
        }
        assert_eq!((counted(reader), all()), (before, sum));
        reader.settle(&mut kept);
        let more = [3, 3, 4 * 4096];
        let after: [u64; 3] = std::array::from_fn(|at| before[at] + more[at]);
        assert_eq!(counted(reader), after);
        let more = [3, 3, 4 * 4096, 3];
        assert_eq!(all(), std::array::from_fn(|at| sum[at] + more[at]));
        // Once.
        reader.settle(&mut kept);
        assert_eq!(counted(reader), after);
    }
    let timed = || setup.engine.totals().from_memory.count();
    let before = timed();
    (0..10 * TIMED).for_each(|_| assert!(at_once(&readers[0], &mut kept, 0, 4096)));
    readers[0].settle(&mut kept);
    assert_eq!(timed(), before + 10);
}
