//! Several sources as one: who is asked next, and when.

use super::{CHUNK, at, kill, noise, source, submit};
use accel_source::{
    Arena, Condition, Fault, Faulty, FileName, Filled, Operation, Patience, Readiness, Rejected,
    Request, Source, SourceError, SourceFault, Sources, WorkerSource, read_checked,
};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Two directories with the same file, and what goes wrong with the first one's.
fn two(plan: impl Fn(&str, Operation) -> Fault + Send + Sync + 'static) -> Two {
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for directory in &directories {
        fs::write(directory.path().join("file"), noise(CHUNK)).unwrap();
    }
    let arena = Arc::new(Arena::new(4, 4).unwrap());
    let first = source("first", directories[0].path(), &arena);
    let second = source("second", directories[1].path(), &arena);
    let sources = Sources::new(vec![
        Arc::new(Faulty::new(first, Box::new(plan))),
        Arc::<WorkerSource>::clone(&second),
    ]);
    Two {
        directories,
        arena,
        second,
        sources: sources.unwrap(),
    }
}

struct Two {
    directories: [tempfile::TempDir; 2],
    arena: Arc<Arena>,
    second: Arc<WorkerSource>,
    sources: Sources,
}

/// Attempts that are over soon, although the machine may be busy.
const HASTY: Patience = Patience {
    attempt: Duration::from_millis(200),
    ..Patience::DATA
};

/// Attempts that are never late.
const LASTING: Patience = Patience {
    attempt: Duration::from_secs(300),
    ..Patience::DATA
};

impl Two {
    fn read(&self) -> Filled {
        let read = submit(&self.arena, &self.sources, "file", at(0, CHUNK), HASTY);
        read.recv().unwrap().unwrap()
    }

    fn first_fault(&self) -> Option<SourceFault> {
        match &self.sources.standings()[0].condition {
            Condition::InUse => None,
            Condition::Aside { fault, .. } => Some(*fault),
        }
    }
}

pub(crate) fn next_source() {
    for (errno, fault) in [
        (5, SourceFault::Failing),
        (116, SourceFault::Wrong),
        (2, SourceFault::Wrong),
    ] {
        let two = two(move |_, _| Fault::Error(errno));
        for _ in 0..3 {
            let filled = two.read();
            assert_eq!(&*filled.origin.name, "second");
            assert!(filled.bytes() == noise(CHUNK));
        }
        let standing = &two.sources.standings()[0];
        if two.first_fault().is_some() {
            assert_eq!(two.first_fault(), Some(fault), "{standing:?}");
            let words = standing.condition.to_string();
            assert!(words.contains("file in first"), "{words}");
        }
        assert!(standing.times > 0);
        assert_eq!(two.sources.failed(), 0);
    }
}

/// A source that has to make a file first.
struct Maker {
    made: Arc<WorkerSource>,
    after: Duration,
    /// Answers until it is there, and how many there were.
    answers: usize,
    asked: AtomicUsize,
    fails: bool,
}

impl Source for Maker {
    fn submit(&self, request: Request, done: accel_source::Done) {
        if self.asked.fetch_add(1, Ordering::Relaxed) >= self.answers {
            return self.made.submit(request, done);
        }
        let (file, origin, reason) = (request.file, "maker".into(), "not yet".to_owned());
        drop(request.slot);
        done(Err(match self.fails {
            true => SourceError::NotMade {
                file,
                origin,
                reason,
                lasting: true,
            },
            false => SourceError::Making {
                file,
                origin,
                reason,
            },
        }));
    }

    fn name(&self) -> &str {
        "maker"
    }

    fn readiness(&self, _: &FileName) -> Readiness {
        Readiness::After(self.after)
    }

    fn is_at_work(&self, _: &FileName) -> bool {
        !self.fails && self.asked.load(Ordering::Relaxed) > 0
    }
}

pub(crate) fn last_resort() {
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    fs::write(directories[1].path().join("file"), noise(CHUNK)).unwrap();
    fs::write(directories[0].path().join("other"), noise(CHUNK)).unwrap();
    let start = |answers, fails| {
        let arena = Arc::new(Arena::new(4, 4).unwrap());
        let maker = Arc::new(Maker {
            made: source("made", directories[1].path(), &arena),
            after: Duration::from_millis(300),
            answers,
            asked: AtomicUsize::new(0),
            fails,
        });
        let first = source("first", directories[0].path(), &arena);
        let members: Vec<Arc<dyn Source>> = vec![first, Arc::<Maker>::clone(&maker)];
        (arena, maker, Sources::new(members).unwrap())
    };
    let short = Patience {
        whole: Some(Duration::from_millis(800)),
        ..HASTY
    };
    // It takes longer than a request may: it gets on with it.
    let (arena, maker, sources) = start(5, false);
    let before = Instant::now();
    let read = submit(&arena, &sources, "file", at(0, CHUNK), short).recv();
    assert!(read.unwrap().unwrap().bytes() == noise(CHUNK));
    assert!(before.elapsed() > Duration::from_millis(800), "too soon");
    // Nobody asks it for what another has, or only looks up.
    let asked = maker.asked.load(Ordering::Relaxed);
    assert_eq!(asked, 6);
    let read = submit(&arena, &sources, "other", at(0, CHUNK), Patience::DATA).recv();
    assert_eq!(&*read.unwrap().unwrap().origin.name, "first");
    let lookup = submit(&arena, &sources, "nowhere", at(0, CHUNK), Patience::LOOKUP).recv();
    assert!(lookup.unwrap().unwrap_err().is_not_found());
    assert_eq!(maker.asked.load(Ordering::Relaxed), asked);
    // It cannot: the request ends at its time, and says why.
    let (arena, _, sources) = start(usize::MAX, true);
    let read = submit(&arena, &sources, "file", at(0, CHUNK), short).recv();
    let error = read.unwrap().unwrap_err().to_string();
    // A slow machine may not have heard yet that it is not done yet.
    assert!(
        error.contains("maker") && error.contains("yet") && error.contains("first"),
        "{error}"
    );
}

pub(crate) fn wrong_bytes() {
    let two = two(|_, operation| match operation {
        Operation::Read { .. } => Fault::Flip(7),
        Operation::List | Operation::Write { .. } => Fault::None,
    });
    let mut rejected = Rejected::default();
    let mut read = |filled: Option<Filled>| {
        if let Some(filled) = &filled {
            rejected.add(filled, "it is wrong".to_owned());
        }
        let slot = filled.map(|filled| filled.slot);
        let slot = slot.unwrap_or_else(|| two.arena.chunks().take().unwrap());
        let request = Request {
            rejected: rejected.clone(),
            ..Request::new(FileName::new("file"), at(0, CHUNK), slot, Patience::DATA)
        };
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |outcome| drop(sender.send(outcome)));
        two.sources.submit(request, done);
        receiver.recv().unwrap()
    };
    let mut filled = None;
    // Once more from the same source, then from the other.
    for name in ["first", "first", "second"] {
        let next: Filled = read(filled).unwrap();
        assert_eq!(&*next.origin.name, name);
        filled = Some(next);
    }
    assert!(filled.as_ref().unwrap().bytes() == noise(CHUNK));
    // Nobody has anything better: that is said at once.
    filled = Some(read(filled).unwrap());
    let error = read(filled).unwrap_err().to_string();
    assert!(
        error.contains("first: it is wrong; second: it is wrong"),
        "{error}"
    );
    // Whole files are read in the same way.
    let name = FileName::new("file");
    let check = |bytes: &[u8], _: &_| match bytes == noise(CHUNK) {
        true => Ok(()),
        false => Err("no"),
    };
    let pool = two.arena.chunks();
    read_checked(&two.sources, pool, &name, CHUNK, Patience::LOOKUP, check)
        .unwrap()
        .unwrap();
    let never = |_: &[u8], _: &_| Err::<(), _>("never");
    let read = read_checked(&two.sources, pool, &name, CHUNK, Patience::LOOKUP, never);
    assert_eq!(read.unwrap(), Err("never"));
}

pub(crate) fn stalled_source() {
    let two = two(|_, _| Fault::Stall);
    two.second.wait_ready(Duration::from_secs(30)).unwrap();
    let asked = || two.second.counters().reads.load(Ordering::Relaxed);
    for count in 1..=20 {
        assert_eq!(&*two.read().origin.name, "second");
        // More when it is late itself, on a slow machine.
        assert!(asked() >= count);
    }
    assert_eq!(two.first_fault(), Some(SourceFault::Stalled));
    assert_eq!(two.sources.standings()[0].times, 1);
    // The other one fails as well for a while: the request waits, and goes on.
    let away = two.directories[1].path().join("away");
    let file = two.directories[1].path().join("file");
    fs::rename(&file, &away).unwrap();
    fs::write(&file, b"").unwrap();
    fs::remove_file(&file).unwrap();
    kill(
        two.second.worker_pid().unwrap(),
        rustix::process::Signal::KILL,
    );
    let waiting = submit(&two.arena, &two.sources, "file", at(0, CHUNK), HASTY);
    while two
        .second
        .counters()
        .failed_attempts
        .load(Ordering::Relaxed)
        < 3
    {
        std::thread::yield_now();
    }
    fs::rename(&away, &file).unwrap();
    assert!(waiting.recv().unwrap().unwrap().bytes() == noise(CHUNK));
}

/// One that takes its time is not set aside, but waited for no longer than need be.
pub(crate) fn slow_source() {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let two = two(move |_, _| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Fault::Delay(Duration::from_secs(10)),
        _ => Fault::None,
    });
    two.second.wait_ready(Duration::from_secs(30)).unwrap();
    let read = || {
        let read = submit(&two.arena, &two.sources, "file", at(0, CHUNK), LASTING);
        read.recv().unwrap().unwrap()
    };
    for _ in 0..4 {
        let filled = read();
        assert_eq!(&*filled.origin.name, "second");
        assert!(filled.bytes() == noise(CHUNK));
        // The first owes an answer, and is asked for no more.
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(two.first_fault(), None);
    }
    // When it has given that, it comes first again.
    while &*read().origin.name != "first" {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(two.sources.standings()[0].times, 0);
}

/// What another source has answered for it meanwhile hides nothing.
pub(crate) fn stalled_beside_another() {
    let two = two(|_, _| Fault::Stall);
    two.second.wait_ready(Duration::from_secs(30)).unwrap();
    // Longer than another is waited for.
    let patience = Patience {
        attempt: Duration::from_secs(3),
        ..Patience::DATA
    };
    let read = submit(&two.arena, &two.sources, "file", at(0, CHUNK), patience);
    assert_eq!(&*read.recv().unwrap().unwrap().origin.name, "second");
    // Only a bound: it comes after 3 s.
    let since = Instant::now();
    while two.first_fault() != Some(SourceFault::Stalled) {
        assert!(since.elapsed() < Duration::from_secs(120), "nobody notices");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn late_answers() {
    let two = two(|_, _| Fault::Delay(Duration::from_millis(400)));
    fs::remove_file(two.directories[1].path().join("file")).unwrap();
    let filled = two.read();
    assert_eq!(&*filled.origin.name, "first");
    assert!(two.sources.standings()[0].times > 0);
}

pub(crate) fn all_stalled() {
    let arena = Arc::new(Arena::new(4, 4).unwrap());
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), noise(CHUNK)).unwrap();
    let worker = source("first", directory.path(), &arena);
    let stall = Faulty::new(worker, Box::new(|_: &str, _| Fault::Stall));
    let sources = Sources::new(vec![Arc::new(stall)]).unwrap();
    let patience = Patience {
        attempt: Duration::from_millis(50),
        // Long enough to be asked on a busy machine.
        whole: Some(Duration::from_secs(3)),
        await_file: true,
        optional: false,
    };
    let read = submit(&arena, &sources, "file", at(0, CHUNK), patience);
    let error = read.recv().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("first: file: no answer within 50ms"),
        "{error}"
    );
    // One that comes later waits for the source, and is told so.
    let read = submit(&arena, &sources, "other", at(0, CHUNK), patience);
    let error = read.recv().unwrap().unwrap_err().to_string();
    assert!(error.contains("not asked, set aside"), "{error}");
    assert_eq!(sources.failed(), 2);
}
