//! Whether the node can serve, as one check after the other tells.

use accel_oci::ChainId;
use accel_ufs::UfsError;
use accel_ufs::health::Health;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How many checks in a row have to go well before a node is taken for healthy, or have to
/// fail before it is not any more: one alone may be chance.
const SURE: u32 = 2;

/// Why a check has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In words.
    pub why: String,
    /// Whether nothing could be read from UFS, so that perhaps UFS is away.
    pub ufs_unread: bool,
}

impl Failure {
    /// One that says nothing of UFS.
    pub fn of_node(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            ufs_unread: false,
        }
    }
}

/// What is to be said of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict(Health);

impl Verdict {
    /// What another agent has written, if it ended just now: one that is started again changes
    /// nothing about the node.
    pub fn resume(path: &Path) -> Self {
        let fresh = Health::is_fresh(path).then(|| Health::read(path).ok());
        Self(fresh.flatten().unwrap_or_default())
    }

    /// Another check.
    pub fn observe(&mut self, result: Result<(), Failure>) {
        let well = result.is_ok();
        let said = &mut self.0;
        (said.message, said.ufs_unread) = match result {
            Ok(()) => {
                let what = "reads from UFS, and what it reads is right";
                (what.to_owned(), false)
            }
            Err(failure) => (failure.why, failure.ufs_unread),
        };
        said.checks += 1;
        if well == said.healthy {
            said.in_a_row = 0;
            return;
        }
        said.in_a_row += 1;
        if said.in_a_row >= SURE {
            said.healthy = well;
            said.in_a_row = 0;
        }
    }

    /// What containers run on; it stays said until something else is known.
    pub fn uses(&mut self, used: Option<BTreeSet<ChainId>>) {
        if used.is_some() {
            self.0.used_chain_ids = used;
        }
    }

    /// Whether the next check should follow at once: the last one disagrees with what is said.
    pub const fn is_unsure(&self) -> bool {
        self.0.in_a_row > 0
    }

    /// What is said.
    pub const fn said(&self) -> &Health {
        &self.0
    }

    /// Writes it down for who tells the cluster.
    ///
    /// # Errors
    /// As [`Health::write`].
    pub fn write(&self, path: &Path) -> Result<(), UfsError> {
        self.0.write(path)
    }
}

/// Something that is checked again and again, on threads that may hang.
#[derive(Debug)]
pub struct Watched<T>(State<T>);

type Checked<T> = (T, Result<(), Failure>);

#[derive(Debug)]
enum State<T> {
    /// No check is under way.
    Idle(T),
    /// One is that took too long.
    Hanging(Receiver<Checked<T>>),
}

impl<T: Default + Send + 'static> Watched<T> {
    /// Nothing was checked yet.
    pub fn new() -> Self {
        Self(State::Idle(T::default()))
    }

    /// What came of a check, which may take so long. One that takes longer has failed. What
    /// comes of it at last says nothing any more: as soon as it has ended another is begun, in
    /// what is left of the patience; as long as it hangs each call fails.
    pub fn check(
        &mut self,
        check: impl FnOnce(&mut T) -> Result<(), Failure> + Send + 'static,
        patience: Duration,
    ) -> Result<(), Failure> {
        let until = Instant::now() + patience;
        let late = Err(Failure {
            why: format!(
                "UFS or ublk-server does not answer: a check takes longer than {} s",
                patience.as_secs()
            ),
            ufs_unread: true,
        });
        let what = match std::mem::replace(&mut self.0, State::Idle(T::default())) {
            State::Idle(what) => what,
            State::Hanging(answer) => match answer.recv_timeout(patience) {
                Ok((what, _)) => what,
                Err(RecvTimeoutError::Timeout) => {
                    self.0 = State::Hanging(answer);
                    return late;
                }
                Err(RecvTimeoutError::Disconnected) => T::default(),
            },
        };
        let answer = begin(what, check)?;
        match answer.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok((what, checked)) => {
                self.0 = State::Idle(what);
                checked
            }
            Err(RecvTimeoutError::Timeout) => {
                self.0 = State::Hanging(answer);
                late
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Failure::of_node("a check has ended by itself"))
            }
        }
    }
}

fn begin<T: Send + 'static>(
    mut what: T,
    check: impl FnOnce(&mut T) -> Result<(), Failure> + Send + 'static,
) -> Result<Receiver<Checked<T>>, Failure> {
    let (sender, answer) = mpsc::channel();
    let checking = thread::Builder::new().name("check".to_owned());
    let spawned = checking.spawn(move || {
        let checked = check(&mut what);
        // Nobody hears it if the process ends.
        let _ = sender.send((what, checked));
    });
    spawned.map_err(|error| Failure::of_node(format!("cannot start a thread: {error}")))?;
    Ok(answer)
}

impl<T: Default + Send + 'static> Default for Watched<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_oci::Digest;
    use accel_ufs::health::SILENCE;
    use std::fs::{self, FileTimes};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Arc, Mutex};
    use std::time::SystemTime;

    /// For what comes in any case.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn it_takes_two_in_a_row_to_change_anything() {
        let mut verdict = Verdict::default();
        let mut after = |results: &str| -> String {
            let said = results.chars().map(|result| {
                verdict.observe(match result {
                    '+' => Ok(()),
                    _ => Err(Failure::of_node("why")),
                });
                if verdict.said().healthy { '1' } else { '0' }
            });
            said.collect()
        };
        assert_eq!(after("+++"), "011");
        assert_eq!(after("-+-+-+"), "111111");
        assert_eq!(after("--"), "10");
        assert_eq!(after("+-+-+"), "00000");
        assert_eq!(after("+"), "1");
    }

    #[test]
    fn whether_it_is_ufs_that_cannot_be_read_is_said_of_the_last_check() {
        let mut verdict = Verdict::default();
        let mut unread = |result| {
            verdict.observe(result);
            verdict.said().ufs_unread
        };
        let ufs = Failure {
            why: "why".to_owned(),
            ufs_unread: true,
        };
        assert!(unread(Err(ufs.clone())));
        assert!(!unread(Err(Failure::of_node("why"))));
        assert!(unread(Err(ufs)));
        assert!(!unread(Ok(())));
    }

    #[test]
    fn what_is_used_stays_said_while_nobody_knows_better() {
        let mut verdict = Verdict::default();
        let one = BTreeSet::from([ChainId(Digest::of(b"one"))]);
        let mut said = |used| {
            verdict.uses(used);
            verdict.observe(Err(Failure::of_node("why")));
            verdict.said().used_chain_ids.clone()
        };
        assert_eq!(said(None), None);
        assert_eq!(said(Some(one.clone())).as_ref(), Some(&one));
        assert_eq!(said(None), Some(one));
        // That there is nothing is known, too.
        assert_eq!(said(Some(BTreeSet::new())), Some(BTreeSet::new()));
    }

    #[test]
    fn an_agent_that_starts_again_goes_on_unless_it_was_away_for_long() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("health.json");
        assert_eq!(Verdict::resume(&path), Verdict::default());
        let mut verdict = Verdict::default();
        verdict.observe(Ok(()));
        verdict.observe(Ok(()));
        verdict.write(&path).unwrap();
        assert_eq!(Verdict::resume(&path), verdict);
        let file = fs::File::options().write(true).open(&path).unwrap();
        let past = SystemTime::now().checked_sub(SILENCE).unwrap();
        file.set_times(FileTimes::new().set_modified(past)).unwrap();
        assert_eq!(Verdict::resume(&path), Verdict::default());
        fs::write(&path, "{").unwrap();
        assert_eq!(Verdict::resume(&path), Verdict::default());
    }

    #[test]
    fn a_check_that_hangs_has_failed_and_another_begins_once_it_has_ended() {
        let mut watched = Watched::<u32>::new();
        let begun = Arc::new(AtomicUsize::new(0));
        let (let_go, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let hanging = || {
            let (begun, gate) = (Arc::clone(&begun), Arc::clone(&gate));
            move |what: &mut u32| {
                begun.fetch_add(1, Relaxed);
                *what += 1;
                gate.lock()
                    .unwrap()
                    .recv()
                    .map_err(|error| Failure::of_node(error.to_string()))
            }
        };
        let soon = Duration::from_millis(20);
        for _ in 0..3 {
            let failed = watched.check(hanging(), soon).unwrap_err();
            assert!(failed.why.contains("does not answer"), "{failed:?}");
            assert!(failed.ufs_unread);
        }
        assert!(begun.load(Relaxed) <= 1, "more than one hangs");
        // What was checked is there again once it has ended, and the next check counts: one
        // that was slow is one failure.
        let_go.send(()).unwrap();
        let seen = |what: &mut u32| Err(Failure::of_node(format!("seen {what}")));
        assert_eq!(watched.check(seen, LONG), Err(Failure::of_node("seen 1")));
        assert_eq!(watched.check(|_| Ok(()), LONG), Ok(()));
    }

    #[test]
    fn a_check_that_panics_has_failed_and_the_next_one_begins_from_nothing() {
        let mut watched = Watched::<u32>::new();
        let panics = |what: &mut u32| {
            *what = 7;
            panic!("the test's");
        };
        watched.check(panics, LONG).unwrap_err();
        let seen = |what: &mut u32| Err(Failure::of_node(format!("seen {what}")));
        assert_eq!(watched.check(seen, LONG), Err(Failure::of_node("seen 0")));
    }
}
