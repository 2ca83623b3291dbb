//! The arena in huge pages: that reads are right all the same, and which slots are in use.
//! Where the kernel makes none they say so and pass.

use crate::{CHUNK, at, kill, source, submit};
use accel_source::{Arena, Filled, Patience, Slot, Source};
use accel_sys::{HUGE_PAGE, HugePages};
use rustix::pipe::SpliceFlags;
use rustix::process::Signal;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read as _};
use std::iter::repeat_n;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::TempDir;

/// Slots of a piece. As many are in an arena's reserve.
const PIECE: usize = HUGE_PAGE / CHUNK;

fn are_there() -> bool {
    let made = HugePages::probe();
    if let Err(error) = &made {
        println!("skipped: no huge pages of shared memory here: {error}");
    }
    made.is_ok()
}

fn await_that(what: impl Fn() -> bool) {
    for _ in 0..6000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it did not happen");
}

/// A file of as many chunks, each of one byte: the first of `first`, the next of the one
/// that follows.
fn file(first: u8, chunks: usize) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let bytes = (first..)
        .take(chunks)
        .flat_map(|byte| repeat_n(byte, CHUNK));
    fs::write(directory.path().join("file"), bytes.collect::<Vec<_>>()).unwrap();
    directory
}

fn huge(chunks: usize) -> Arc<Arena> {
    let arena = Arc::new(Arena::new(chunks, 4).unwrap());
    arena.use_huge_pages().unwrap();
    arena
}

/// Reads these chunks of a file that begins with `first`, and looks at them.
fn read(
    arena: &Arena,
    source: &dyn Source,
    first: u8,
    chunks: std::ops::Range<usize>,
) -> Vec<Filled> {
    let ask = |chunk| {
        let read = at((chunk * CHUNK) as u64, CHUNK);
        (chunk, submit(arena, source, "file", read, Patience::DATA))
    };
    let asked: Vec<_> = chunks.map(ask).collect();
    let answers = asked.into_iter().map(|(chunk, receiver)| {
        let filled = receiver.recv().unwrap().unwrap();
        let byte = first + u8::try_from(chunk).unwrap();
        assert!(filled.bytes() == [byte; CHUNK], "{chunk}");
        filled
    });
    answers.collect()
}

/// The arena's memfd, which has a page of these there.
fn memory(offset: u64, byte: u8) -> File {
    let names = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let arenas = names.filter(|name| {
        let target = fs::read_link(name.path()).unwrap_or_default();
        target.to_string_lossy().contains("image-accel-cache")
    });
    let mut files = arenas.filter_map(|name| File::open(name.path()).ok());
    let ours = files.find(|file| {
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, offset).is_ok() && page == [byte; 4096]
    });
    ours.unwrap()
}

/// Only what is full, so that it takes no memory.
pub(crate) fn full_pieces() {
    if !are_there() {
        return;
    }
    let directory = file(10, 3 * PIECE);
    let arena = huge(2 * PIECE);
    let source = source("the test's directory", directory.path(), &arena);
    // Half of the first piece, and after it all of the second.
    let unused: Vec<_> = (0..PIECE / 2).map(|_| arena.chunks().take()).collect();
    let mut all = read(&arena, &*source, 10, 0..PIECE + PIECE / 2);
    let memory = memory((PIECE / 2 * CHUNK) as u64, 10);
    let size = || memory.metadata().unwrap().blocks() * 512;
    await_that(|| arena.huge_bytes() > 0);
    assert_eq!(arena.huge_bytes(), HUGE_PAGE as u64);
    assert_eq!(size(), (HUGE_PAGE / 2 + HUGE_PAGE) as u64);
    drop(unused);
    all.extend(read(&arena, &*source, 10, PIECE + PIECE / 2..2 * PIECE));
    await_that(|| arena.huge_bytes() == 2 * HUGE_PAGE as u64);
    for (filled, byte) in all.iter().zip(10..) {
        assert!(filled.bytes() == [byte; CHUNK], "{byte}");
    }
    // They stay, with other content, and nothing is added.
    drop(all);
    let all = read(&arena, &*source, 10, PIECE..3 * PIECE);
    for (filled, byte) in all.iter().zip(26..) {
        assert!(filled.bytes() == [byte; CHUNK], "{byte}");
    }
    assert_eq!(arena.huge_bytes(), 2 * HUGE_PAGE as u64);
    assert_eq!(size(), 2 * HUGE_PAGE as u64);
}

/// Reads while the kernel moves what they read into; and a worker dies meanwhile.
pub(crate) fn moved_meanwhile() {
    if !are_there() {
        return;
    }
    let directory = file(80, 4 * PIECE);
    for round in 0..3 {
        let arena = huge(4 * PIECE);
        let source = source("the test's directory", directory.path(), &arena);
        await_that(|| {
            drop(read(&arena, &*source, 80, round..round + 3 * PIECE));
            arena.huge_bytes() > 0
        });
        std::thread::scope(|scope| {
            scope.spawn(|| drop(read(&arena, &*source, 80, 0..3 * PIECE)));
            if let Some(pid) = source.worker_pid() {
                kill(pid, Signal::KILL);
            }
        });
        // Nothing is lost.
        let mut all: Vec<Slot> = Vec::new();
        while all.len() < 4 * PIECE {
            all.extend(arena.chunks().take());
        }
    }
}

/// Holds the first page of a slot, as a read into it does.
fn hold(memory: &File, slot: usize) -> (PipeReader, PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let (mut from, flags) = ((slot * CHUNK) as u64, SpliceFlags::empty());
    let held = rustix::pipe::splice(memory, Some(&mut from), &writer, None, 4096, flags);
    assert_eq!(held.unwrap(), 4096);
    (reader, writer)
}

/// What a worker was to fill when it was killed is not used again before the kernel has let
/// go of its pages, which it may write. Of a huge page any part counts.
pub(crate) fn held_pages() {
    if !are_there() {
        return;
    }
    let directory = file(200, PIECE);
    let arena = huge(PIECE);
    let source = source("the test's directory", directory.path(), &arena);
    let mut all = read(&arena, &*source, 200, 0..PIECE);
    let memory = memory(0, 200);
    await_that(|| arena.huge_bytes() == HUGE_PAGE as u64);
    let (same, other) = (hold(&memory, 7), hold(&memory, 2));
    // The worker has one slot, and dies.
    kill(source.worker_pid().unwrap(), Signal::STOP);
    drop(all.remove(7));
    let receiver = submit(&arena, &*source, "file", at(0, CHUNK), Patience::DATA);
    kill(source.worker_pid().unwrap(), Signal::KILL);
    // The next one reads into one of the reserve.
    let filled = receiver.recv().unwrap().unwrap();
    assert!(filled.bytes() == [200; CHUNK]);
    drop(filled);
    let held = || source.counters().held.load(Ordering::Relaxed);
    await_that(|| held() == 1);
    assert!(arena.chunks().take().is_none(), "it may still be written");
    // They hold what is the slot's memory.
    let content = |(mut reader, _): (PipeReader, PipeWriter)| {
        let mut page = [1; 4096];
        reader.read_exact(&mut page).unwrap();
        page
    };
    assert_eq!(content(same), [0; 4096]);
    assert!(held() == 1 && arena.chunks().take().is_none());
    assert_eq!(content(other), [202; 4096]);
    await_that(|| held() == 0);
    let slot = arena.chunks().take().unwrap();
    assert!(arena.chunks().take().is_none());
    // Taken apart for that; the others have kept what they held.
    assert_eq!(arena.huge_bytes(), 0);
    for (filled, byte) in all.iter().zip((200..207).chain(208..)) {
        assert!(filled.bytes() == [byte; CHUNK], "{byte}");
    }
    drop(slot);
    all.extend(read(&arena, &*source, 200, 0..1));
    await_that(|| arena.huge_bytes() == HUGE_PAGE as u64);
}

/// As many as a source may use wait: what never ends must not get all memory.
pub(crate) fn no_room() {
    const IN_FLIGHT: usize = 8;
    if !are_there() {
        return;
    }
    let directory = file(170, PIECE);
    let arena = huge(PIECE);
    let source = source("the test's directory", directory.path(), &arena);
    let mut all = read(&arena, &*source, 170, 0..PIECE);
    await_that(|| arena.huge_bytes() == HUGE_PAGE as u64);
    let somebody = hold(&memory(0, 170), 0);
    kill(source.worker_pid().unwrap(), Signal::STOP);
    drop(all.split_off(PIECE - IN_FLIGHT));
    let hasty = Patience {
        attempt: Duration::from_millis(500),
        ..Patience::DATA
    };
    let ask = || submit(&arena, &*source, "file", at(0, CHUNK), hasty);
    let asked: Vec<_> = (0..IN_FLIGHT).map(|_| ask()).collect();
    kill(source.worker_pid().unwrap(), Signal::KILL);
    let held = || source.counters().held.load(Ordering::Relaxed);
    await_that(|| held() == IN_FLIGHT);
    // There may be one that was started before the other had ended.
    if let Some(pid) = source.worker_pid() {
        kill(pid, Signal::KILL);
    }
    await_that(|| source.worker_pid().is_none());
    drop((all, asked));
    let error = ask().recv().unwrap().unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error}");
    drop(somebody);
    await_that(|| held() == 0);
    drop(read(&arena, &*source, 170, 0..PIECE));
}
