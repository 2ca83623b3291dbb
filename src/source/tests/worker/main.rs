//! The worker process as the daemon uses it: this test binary is its own worker.

mod huge;
mod several;

use accel_source::{
    Arena, Fault, Faulty, FileName, Filled, Operation, Patience, Request, Source, SourceError,
    Sources, WorkerCommand, WorkerSource, list, read_file, worker,
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const CHUNK: usize = 128 << 10;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if arguments
        .get(1)
        .is_some_and(|first| first == "source-worker")
    {
        return match worker::run(Path::new(&arguments[2]), None) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let tests: [(&str, fn()); 27] = [
        ("reads_every_range", reads_every_range),
        ("neighbours_are_read_together", neighbours),
        ("who_has_nothing_else_to_hear_says_so", alone),
        ("small_files_and_listings", small_files_and_listings),
        (
            "nothing_outside_the_directory",
            nothing_outside_the_directory,
        ),
        ("missing_files_are_an_answer_or_awaited", missing_files),
        ("a_replaced_file_is_seen_when_fresh", replaced_file),
        ("a_killed_worker_is_not_noticed", killed_worker),
        ("a_stopped_worker_is_replaced", stopped_worker),
        ("no_patience_is_endless", gives_up),
        ("a_missing_directory_is_named", missing_directory),
        ("faults_decorate", faults),
        ("files_are_read_by_waiting", waiting_reads),
        ("memory_is_not_awaited_for_ever", no_memory),
        ("late_slots_are_announced", late_slots),
        ("the_next_source_is_asked", several::next_source),
        ("wrong_bytes_are_asked_for_elsewhere", several::wrong_bytes),
        ("a_stalled_source_stops_nobody", several::stalled_source),
        ("a_slow_source_is_not_waited_for", several::slow_source),
        (
            "a_stall_is_noticed_although_another_answers",
            several::stalled_beside_another,
        ),
        ("late_answers_count", several::late_answers),
        ("all_stalled_ends_at_the_deadline", several::all_stalled),
        (
            "the_last_resort_is_asked_last_and_awaited",
            several::last_resort,
        ),
        ("full_pieces_become_huge_pages", huge::full_pieces),
        (
            "reads_are_right_while_pieces_are_moved",
            huge::moved_meanwhile,
        ),
        (
            "a_slot_of_a_held_huge_page_waits_for_who_holds_it",
            huge::held_pages,
        ),
        (
            "no_worker_follows_while_as_many_slots_wait_as_it_could_use",
            huge::no_room,
        ),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok::<_, Failed>(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

fn start(directory: &Path, chunks: usize) -> (Arc<Arena>, Arc<WorkerSource>) {
    let arena = Arc::new(Arena::new(chunks, 4).unwrap());
    let source = source("the test's directory", directory, &arena);
    (arena, source)
}

fn source(name: &str, directory: &Path, arena: &Arc<Arena>) -> Arc<WorkerSource> {
    let command = WorkerCommand {
        program: "/proc/self/exe".into(),
        arguments: vec!["source-worker".into(), directory.into()],
    };
    Arc::new(WorkerSource::start(name, command, Arc::clone(arena)).unwrap())
}

/// The source with deadlines and retries.
fn patient(source: &Arc<WorkerSource>) -> Sources {
    Sources::new(vec![Arc::<WorkerSource>::clone(source)]).unwrap()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

type Outcome = Result<Filled, SourceError>;

fn submit(
    arena: &Arena,
    source: &dyn Source,
    file: &str,
    operation: Operation,
    patience: Patience,
) -> mpsc::Receiver<Outcome> {
    let slot = loop {
        match arena.chunks().take() {
            Some(slot) => break slot,
            None => std::thread::yield_now(),
        }
    };
    let (sender, receiver) = mpsc::channel();
    let request = Request::new(FileName::new(file), operation, slot, patience);
    source.submit(request, Box::new(move |outcome| drop(sender.send(outcome))));
    receiver
}

fn at(offset: u64, len: usize) -> Operation {
    Operation::Read {
        offset,
        len,
        fresh: false,
    }
}

fn reads_every_range() {
    let directory = tempfile::tempdir().unwrap();
    let data = noise(5 * CHUNK + 3 * 4096 + 17);
    fs::create_dir(directory.path().join("sub")).unwrap();
    fs::write(directory.path().join("sub/file"), &data).unwrap();
    let (arena, source) = start(directory.path(), 8);
    let mut waiting = Vec::new();
    for round in 0..4 {
        for chunk in 0..8 {
            let len = [CHUNK, 4096, 100, CHUNK - 4095][round];
            let offset = chunk * CHUNK;
            let read = at(offset as u64, len);
            let receiver = submit(&arena, &source, "sub/file", read, Patience::DATA);
            waiting.push((offset, len, receiver));
            if waiting.len() == 8 {
                for (offset, len, receiver) in waiting.drain(..) {
                    let filled = receiver.recv().unwrap().unwrap();
                    let from = offset.min(data.len());
                    let expected = &data[from..(offset + len).min(data.len()).max(from)];
                    assert_eq!(&filled.slot.bytes()[..filled.len], expected);
                }
            }
        }
    }
    assert_eq!(source.counters().workers.load(Ordering::Relaxed), 1);
}

fn neighbours() {
    const CHUNKS: usize = 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let data = noise(CHUNKS * CHUNK + 5000);
    fs::write(&path, &data).unwrap();
    let arena = Arc::new(Arena::new(64, 64).unwrap());
    let source = source("the test's directory", directory.path(), &arena);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    let worker = source.worker_pid().unwrap();
    let ask = |chunk: usize| {
        let read = at((chunk * CHUNK) as u64, CHUNK);
        (
            chunk,
            submit(&arena, &*source, "file", read, Patience::DATA),
        )
    };
    // These wait at the worker's door, in no order, and come in together.
    let together = |chunks: &[usize], size: usize| {
        let before = source.counters().operations.load(Ordering::Relaxed);
        kill(worker, rustix::process::Signal::STOP);
        let asked: Vec<_> = chunks.iter().map(|&chunk| ask(chunk)).collect();
        kill(worker, rustix::process::Signal::CONT);
        for (chunk, receiver) in asked {
            let filled = receiver.recv().unwrap().unwrap();
            let (from, to) = (chunk * CHUNK, (chunk + 1) * CHUNK);
            let expected = &data[from.min(size)..to.min(size)];
            assert!(&filled.slot.bytes()[..filled.len] == expected, "{chunk}");
        }
        source.counters().operations.load(Ordering::Relaxed) - before
    };
    // The first of a file opens it.
    together(&[0], data.len());
    // 1 MiB each at most.
    assert_eq!(together(&[7, 0, 3, 9, 1, 2, 6, 5, 4, 8], data.len()), 2);
    assert_eq!(together(&[4, 2, 9, 3], data.len()), 2);
    assert_eq!(together(&[5, 1, 3], data.len()), 3);
    together(&[9, 10], data.len());
    // What a file that became shorter still has is given, and no more.
    for size in [6 * CHUNK, 5 * CHUNK + 8192, 5 * CHUNK + 100, 0] {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(size as u64).unwrap();
        together(&[8, 7, 4, 5, 6, 3], size);
    }
}

fn alone() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), noise(3 * CHUNK)).unwrap();
    let (arena, source) = start(directory.path(), 4);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    let worker = source.worker_pid().unwrap();
    // Those that wait at the worker's door are answered one after the other.
    let alone = |reads: usize| {
        kill(worker, rustix::process::Signal::STOP);
        let ask = |chunk| at((chunk * CHUNK) as u64, CHUNK);
        let asked = (0..reads).map(|chunk| {
            let (file, patience) = ("file", Patience::DATA);
            submit(&arena, &*source, file, ask(chunk), patience)
        });
        let asked: Vec<_> = asked.collect();
        kill(worker, rustix::process::Signal::CONT);
        let answers = asked.into_iter().map(|answer| answer.recv().unwrap());
        answers
            .filter(|answer| answer.as_ref().unwrap().alone)
            .count()
    };
    for reads in [1, 2, 3, 1] {
        assert_eq!(alone(reads), 1, "of {reads}");
    }
}

fn small_files_and_listings() {
    let directory = tempfile::tempdir().unwrap();
    let (arena, source) = start(directory.path(), 1);
    let data = noise(CHUNK * 2 + 5);
    fs::write(directory.path().join("big"), &data).unwrap();
    fs::write(directory.path().join("empty"), b"").unwrap();
    let read = |name, limit| {
        let name = FileName::new(name);
        read_file(&source, arena.chunks(), &name, limit, Patience::LOOKUP).unwrap()
    };
    assert_eq!(read("big", 1 << 20), data);
    assert_eq!(read("big", 10), &data[..10]);
    assert_eq!(read("empty", 10), b"");
    let names = list(
        &source,
        arena.chunks(),
        &FileName::new("."),
        Patience::LOOKUP,
    )
    .unwrap();
    assert_eq!(names, ["empty", "big"]);
}

fn nothing_outside_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    let directory = outside.path().join("ufs");
    fs::create_dir(&directory).unwrap();
    symlink("../secret", directory.join("link")).unwrap();
    symlink("..", directory.join("up")).unwrap();
    let (arena, source) = start(&directory, 1);
    for path in ["link", "up/secret", "../secret", "/etc/passwd", "."] {
        let receiver = submit(&arena, &source, path, at(0, 4096), Patience::DATA);
        let error = receiver.recv().unwrap().unwrap_err();
        assert!(error.to_string().starts_with(path), "{error}");
    }
}

fn missing_files() {
    let directory = tempfile::tempdir().unwrap();
    let (arena, worker) = start(directory.path(), 2);
    let source = patient(&worker);
    let now = submit(&arena, &source, "late", at(0, 4096), Patience::LOOKUP);
    assert!(now.recv().unwrap().unwrap_err().is_not_found());
    let awaited = submit(&arena, &source, "late", at(0, 4096), Patience::DATA);
    while worker.counters().failed_attempts.load(Ordering::Relaxed) < 3 {
        std::thread::yield_now();
    }
    fs::write(directory.path().join("late"), b"here").unwrap();
    let filled = awaited.recv().unwrap().unwrap();
    assert_eq!(&filled.slot.bytes()[..filled.len], b"here");
}

fn replaced_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, b"old").unwrap();
    let (arena, source) = start(directory.path(), 2);
    let read = |fresh| {
        let operation = Operation::Read {
            offset: 0,
            len: 3,
            fresh,
        };
        let receiver = submit(&arena, &source, "file", operation, Patience::DATA);
        receiver.recv().unwrap().unwrap().slot.bytes()[..3].to_vec()
    };
    assert_eq!(read(false), b"old");
    fs::write(directory.path().join("new"), b"new").unwrap();
    fs::rename(directory.path().join("new"), &file).unwrap();
    assert_eq!(read(false), b"old");
    assert_eq!(read(true), b"new");
    assert_eq!(read(false), b"new");
}

fn killed_worker() {
    let directory = tempfile::tempdir().unwrap();
    let data = noise(16 * CHUNK);
    let file = fs::File::create(directory.path().join("file")).unwrap();
    file.write_all_at(&data, 0).unwrap();
    let (arena, source) = start(directory.path(), 16);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    for _ in 0..5 {
        let offsets = (0..16).map(|chunk| chunk * CHUNK);
        let waiting: Vec<_> = offsets
            .map(|offset| {
                let read = at(offset as u64, CHUNK);
                let receiver = submit(&arena, &source, "file", read, Patience::DATA);
                if offset == 8 * CHUNK
                    && let Some(pid) = source.worker_pid()
                {
                    kill(pid, rustix::process::Signal::KILL);
                }
                (offset, receiver)
            })
            .collect();
        for (offset, receiver) in waiting {
            let filled = receiver.recv().unwrap().unwrap();
            assert!(filled.slot.bytes()[..filled.len] == data[offset..offset + CHUNK]);
        }
    }
    assert!(source.counters().workers.load(Ordering::Relaxed) > 1);
    // Every slot is back once the dead are buried.
    let mut all = Vec::new();
    while all.len() < 16 {
        all.extend(arena.chunks().take());
    }
}

fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn stopped_worker() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), noise(CHUNK)).unwrap();
    let (arena, source) = start(directory.path(), 1);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    kill(source.worker_pid().unwrap(), rustix::process::Signal::STOP);
    let patience = Patience {
        attempt: Duration::from_millis(50),
        ..Patience::DATA
    };
    let sources = patient(&source);
    let receiver = submit(&arena, &sources, "file", at(0, CHUNK), patience);
    let filled = receiver.recv().unwrap().unwrap();
    assert!(filled.slot.bytes() == noise(CHUNK));
    // More than one follows it when they are slow to start.
    assert!(source.counters().workers.load(Ordering::Relaxed) >= 2);
}

fn gives_up() {
    let directory = tempfile::tempdir().unwrap();
    let (arena, source) = start(directory.path(), 1);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    // Enough for an answer on a busy machine; the reason is that of the last attempt.
    let patience = Patience {
        whole: Some(Duration::from_secs(3)),
        ..Patience::DATA
    };
    let source = patient(&source);
    let receiver = submit(&arena, &source, "never", at(0, CHUNK), patience);
    let error = receiver.recv().unwrap().unwrap_err().to_string();
    for part in ["never", "the test's directory", "No such file"] {
        assert!(error.contains(part), "{error}");
    }
}

fn missing_directory() {
    let (_arena, source) = start(Path::new("/nonexistent/ufs"), 1);
    let error = source.wait_ready(Duration::from_secs(30)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nonexistent/ufs"), "{text}");
    assert!(text.contains("No such file"), "{text}");
}

fn faults() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), [0; 8]).unwrap();
    let (arena, source) = start(directory.path(), 1);
    let count = AtomicUsize::new(0);
    let plan = move |_: &str, _| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Fault::Flip(3),
        1 => Fault::Truncate(5),
        2 => Fault::Error(5),
        3 => Fault::Delay(Duration::from_millis(1)),
        _ => Fault::None,
    };
    let source = Faulty::new(source, Box::new(plan));
    let next = || {
        let receiver = submit(&arena, &source, "file", at(0, 8), Patience::DATA);
        let filled = receiver.recv().unwrap()?;
        Ok::<_, SourceError>(filled.slot.bytes()[..filled.len].to_vec())
    };
    assert_eq!(next().unwrap(), [0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(next().unwrap(), [0; 5]);
    assert!(next().unwrap_err().to_string().contains("os error 5"));
    assert_eq!(next().unwrap(), [0; 8]);
    assert_eq!(next().unwrap(), [0; 8]);
}

fn waiting_reads() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, [1; 4096]).unwrap();
    let (arena, source) = start(directory.path(), 1);
    let receiver = submit(&arena, &source, "file", at(0, 4096), Patience::DATA);
    receiver.recv().unwrap().unwrap();
    let process = format!("/proc/{}", source.worker_pid().unwrap());
    let open = fs::read_dir(format!("{process}/fd")).unwrap();
    let open = open.map(|entry| entry.unwrap());
    let open = open.filter(|entry| fs::read_link(entry.path()).is_ok_and(|path| path == file));
    let numbers: Vec<_> = open.map(|entry| entry.file_name()).collect();
    assert_eq!(numbers.len(), 1);
    let info = format!("{process}/fdinfo/{}", numbers[0].to_str().unwrap());
    let info = fs::read_to_string(info).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
    assert_eq!(flags & rustix::fs::OFlags::NONBLOCK.bits(), 0, "{info}");
}

fn no_memory() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), [1; 4096]).unwrap();
    let (arena, worker) = start(directory.path(), 1);
    worker.wait_ready(Duration::from_secs(30)).unwrap();
    kill(worker.worker_pid().unwrap(), rustix::process::Signal::STOP);
    // One per read, so that each has a stalled attempt.
    let sources: Vec<_> = (0..20).map(|_| patient(&worker)).collect();
    let short = Patience {
        attempt: Duration::from_secs(60),
        whole: Some(Duration::from_millis(300)),
        await_file: false,
        optional: false,
    };
    // Attempts that are given up while nobody answers hold all slots there are.
    let name = FileName::new("file");
    let errors: Vec<_> = sources
        .iter()
        .map(|source| {
            let read = read_file(source, arena.chunks(), &name, 4096, short);
            read.unwrap_err().to_string()
        })
        .collect();
    assert!(errors[0].contains("(asked for "), "{errors:?}");
    assert!(errors[19].contains("all memory is held"), "{errors:?}");
    kill(worker.worker_pid().unwrap(), rustix::process::Signal::KILL);
    let last = patient(&worker);
    while read_file(&last, arena.chunks(), &name, 4096, short).is_err() {}
}

fn late_slots() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), [1; 4096]).unwrap();
    let (arena, source) = start(directory.path(), 1);
    source.wait_ready(Duration::from_secs(30)).unwrap();
    let (sender, returned) = mpsc::channel();
    let count = Arc::downgrade(arena.chunks());
    arena.chunks().when_returned(move || {
        let free = count.upgrade().and_then(|pool| pool.take()).is_some();
        sender.send(free).unwrap();
    });
    kill(source.worker_pid().unwrap(), rustix::process::Signal::STOP);
    let patience = Patience {
        attempt: Duration::from_secs(60),
        whole: Some(Duration::from_millis(100)),
        await_file: false,
        optional: false,
    };
    let sources = patient(&source);
    let receiver = submit(&arena, &sources, "file", at(0, 4096), patience);
    assert!(receiver.recv().unwrap().is_err());
    assert!(arena.chunks().take().is_none(), "it may still be written");
    kill(source.worker_pid().unwrap(), rustix::process::Signal::CONT);
    assert!(returned.recv().unwrap(), "the slot is not free yet");
}
