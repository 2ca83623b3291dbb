//! How a source stands: in use, or set aside, and until when. No clock, no I/O.
//!
//! A source that does not answer, or answers badly, is *set aside*: others are
//! asked before it. After a pause it is looked at again; the pause doubles as long
//! as nothing gets better.

use crate::{FileName, Operation, Patience, Pool, SourceError};
use rustix::io::Errno;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause before a source is looked at again; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Why a source is set aside, from bad to worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// It lacks a file, or gave wrong bytes. It comes back after the pause.
    Wrong,
    /// It answers with errors. It comes back when it answers well.
    Failing,
    /// It does not answer. It comes back when it answers, and is not waited for
    /// until then.
    Stalled,
}

impl Fault {
    /// What an error says of its source.
    pub(crate) fn of(error: &SourceError) -> Option<Self> {
        match error {
            SourceError::Silent { .. } => Some(Self::Stalled),
            SourceError::Failed { error, .. } => match error.0 {
                Errno::NOENT
                | Errno::STALE
                | Errno::ISDIR
                | Errno::NOTDIR
                | Errno::LOOP
                | Errno::XDEV => Some(Self::Wrong),
                _ => Some(Self::Failing),
            },
            SourceError::Unavailable { .. } => Some(Self::Failing),
            SourceError::Exhausted { .. }
            | SourceError::Closed { .. }
            | SourceError::Making { .. }
            | SourceError::NotMade { .. } => None,
        }
    }
}

/// What to look at a source with: what it last failed to give.
#[derive(Debug, Clone)]
pub(crate) struct Probe {
    pub file: FileName,
    pub operation: Operation,
    pub pool: Arc<Pool>,
    pub patience: Patience,
}

#[derive(Debug)]
struct Aside {
    fault: Fault,
    why: String,
    since: Instant,
    due: Instant,
    probe: Probe,
    /// A probe is out.
    probing: bool,
}

/// The standing of one source.
#[derive(Debug)]
pub(crate) struct Health {
    aside: Option<Aside>,
    /// It owes somebody an answer for longer than usual, and has given none since.
    slow: bool,
    /// The next pause, and when the source last came back.
    pause: Duration,
    returned: Option<Instant>,
    times: u64,
}

/// What is due.
#[derive(Debug)]
pub(crate) enum Due {
    Returned,
    Probe(Probe),
}

impl Default for Health {
    fn default() -> Self {
        Self {
            aside: None,
            slow: false,
            pause: FIRST_PAUSE,
            returned: None,
            times: 0,
        }
    }
}

impl Health {
    pub(crate) fn is_good(&self) -> bool {
        self.aside.is_none()
    }

    /// Whether it is in use and not slow either.
    pub(crate) fn is_prompt(&self) -> bool {
        self.is_good() && !self.slow
    }

    /// It has not answered as soon as others might have.
    pub(crate) fn is_slow(&mut self) {
        self.slow = true;
    }

    /// It has answered, whatever.
    pub(crate) fn answered(&mut self) {
        self.slow = false;
    }

    /// Whether asking costs little, although others come first.
    pub(crate) fn answers(&self) -> bool {
        let aside = self.aside.as_ref();
        aside.is_none_or(|aside| aside.fault != Fault::Stalled)
    }

    /// Sets the source aside; true if it was in use.
    pub(crate) fn set_aside(
        &mut self,
        now: Instant,
        fault: Fault,
        why: String,
        probe: Probe,
    ) -> bool {
        self.slow = false;
        if let Some(aside) = &mut self.aside {
            if fault >= aside.fault {
                (aside.fault, aside.why, aside.probe) = (fault, why, probe);
            }
            return false;
        }
        let lately = self.returned.is_some_and(|at| now < at + self.pause * 2);
        self.pause = if lately {
            (self.pause * 2).min(LONGEST_PAUSE)
        } else {
            FIRST_PAUSE
        };
        self.times += 1;
        self.aside = Some(Aside {
            fault,
            why,
            since: now,
            due: now + self.pause,
            probe,
            probing: false,
        });
        true
    }

    /// The source gave something; true if that brings it back.
    pub(crate) fn gave(&mut self, now: Instant) -> bool {
        let back = self
            .aside
            .as_ref()
            .is_some_and(|aside| aside.fault != Fault::Wrong);
        if back {
            self.come_back(now);
        }
        back
    }

    /// A probe was answered: `good` if by anything that shows that the source is
    /// there. True if it comes back.
    pub(crate) fn probed(&mut self, now: Instant, good: bool) -> bool {
        let Some(aside) = &mut self.aside else {
            return false;
        };
        if good {
            self.come_back(now);
            return true;
        }
        aside.probing = false;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        aside.due = now + self.pause;
        false
    }

    fn come_back(&mut self, now: Instant) {
        self.aside = None;
        self.returned = Some(now);
    }

    /// When [`due`](Self::due) has something to say.
    pub(crate) fn next(&self) -> Option<Instant> {
        let aside = self.aside.as_ref().filter(|aside| !aside.probing)?;
        Some(aside.due)
    }

    /// What is to be done now.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Due> {
        let aside = self.aside.as_mut()?;
        if aside.probing || now < aside.due {
            return None;
        }
        if aside.fault == Fault::Wrong {
            self.come_back(now);
            return Some(Due::Returned);
        }
        aside.probing = true;
        Some(Due::Probe(aside.probe.clone()))
    }

    pub(crate) fn standing(&self, name: &str, now: Instant) -> Standing {
        let condition = self.aside.as_ref().map_or(Condition::InUse, |aside| {
            let left = aside.due.saturating_duration_since(now);
            Condition::Aside {
                fault: aside.fault,
                why: aside.why.clone(),
                ago: now.saturating_duration_since(aside.since),
                next: (!aside.probing).then_some(left),
            }
        });
        Standing {
            name: name.to_owned(),
            condition,
            times: self.times,
        }
    }
}

/// How a source stands, for an operator.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Its name.
    pub name: String,
    /// Whether it is in use.
    pub condition: Condition,
    /// How often it was set aside.
    pub times: u64,
}

/// Whether a source is in use.
#[derive(Debug, Clone)]
pub enum Condition {
    /// It is.
    InUse,
    /// It is not, unless nothing else is left.
    Aside {
        /// In what way it fails.
        fault: Fault,
        /// What it did.
        why: String,
        /// For how long it has been set aside.
        ago: Duration,
        /// When it is looked at again; `None` while that is done.
        next: Option<Duration>,
    },
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Aside {
            fault,
            why,
            ago,
            next,
        } = self
        else {
            return f.write_str("in use");
        };
        let what = match fault {
            Fault::Wrong => "gives wrong or missing files",
            Fault::Failing => "answers with errors",
            Fault::Stalled => "does not answer",
        };
        write!(f, "set aside {} s ago, {what}: {why}; ", ago.as_secs())?;
        match next {
            Some(next) => write!(f, "asked again in {} s", next.as_secs()),
            None => f.write_str("being asked again now"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arena;

    fn probe() -> Probe {
        let arena = Arena::new(1, 1).unwrap();
        Probe {
            file: FileName::new("x"),
            operation: Operation::List,
            pool: Arc::clone(arena.pages()),
            patience: Patience::DATA,
        }
    }

    #[test]
    fn pauses_grow_while_nothing_gets_better() {
        let mut now = Instant::now();
        let mut health = Health::default();
        assert!(health.set_aside(now, Fault::Failing, "EIO".to_owned(), probe()));
        assert!(!health.set_aside(now, Fault::Stalled, "slow".to_owned(), probe()));
        assert!(!health.answers());
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let next = health.next().unwrap();
            pauses.push(next - now);
            assert!(health.due(now).is_none());
            now = next;
            assert!(matches!(health.due(now), Some(Due::Probe(_))));
            assert!(health.next().is_none(), "one probe at a time");
            assert!(!health.probed(now, false));
        }
        assert!(pauses.is_sorted() && pauses[6] == LONGEST_PAUSE);
        assert!(health.gave(now) && health.is_good());
    }

    #[test]
    fn a_source_that_lies_comes_back_after_the_pause_alone() {
        let mut now = Instant::now();
        let mut health = Health::default();
        let mut last = Duration::ZERO;
        for times in 1..4 {
            health.set_aside(now, Fault::Wrong, "digest".to_owned(), probe());
            assert!(health.answers() && !health.gave(now));
            let next = health.next().unwrap();
            assert!(next - now > last, "it lies again and again");
            (last, now) = (next - now, next);
            assert!(matches!(health.due(now), Some(Due::Returned)));
            assert_eq!(health.standing("x", now).times, times);
        }
        assert!(health.is_good());
    }
}
