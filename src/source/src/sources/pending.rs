//! A request that is not answered yet, and what each source has said to it.

use super::Action;
use crate::health::{Health, Probe};
use crate::request::Errno as SourceErrno;
use crate::{
    Done, FileName, Operation, Patience, Pool, Readiness, RequestId, Slot, Source, SourceError,
};
use rustix::io::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one source is waited for before another is asked as well, if there is one
/// that is prompt.
pub(super) const PROMPT: Duration = Duration::from_millis(500);

/// A request that is not answered yet.
pub(super) struct Pending {
    pub(super) id: RequestId,
    pub(super) file: FileName,
    pub(super) operation: Operation,
    pub(super) pool: Arc<Pool>,
    /// None while an attempt that is out has it.
    pub(super) slot: Option<Slot>,
    pub(super) patience: Patience,
    pub(super) done: Done,
    pub(super) started: Instant,
    /// By source.
    pub(super) tries: Vec<Try>,
    pub(super) pause: Duration,
    /// Nothing is to be asked before.
    pub(super) until: Option<Instant>,
    /// The deadline, if it has moved.
    pub(super) extended: Option<Instant>,
}

/// What one source has said to a request.
#[derive(Default)]
pub(super) struct Try {
    /// Attempts that are out.
    pub(super) out: usize,
    /// The one that has time left, and when it began.
    pub(super) live: Option<u64>,
    pub(super) asked: Option<Instant>,
    /// It has taken so long that another source may be asked beside it.
    pub(super) slow: bool,
    pub(super) verdict: Verdict,
    /// It gave wrong bytes: it is to look again.
    pub(super) fresh: bool,
    /// What it last said, for people.
    pub(super) last: Option<String>,
    pub(super) not_found: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// To be asked.
    #[default]
    Open,
    /// It has not answered in time.
    Late,
    /// It may do better after a pause.
    Failed,
    /// It will not do better.
    Final,
}

impl Try {
    /// When a live attempt becomes slow.
    fn slow_at(&self) -> Option<Instant> {
        let asked = self.asked.filter(|_| self.live.is_some() && !self.slow)?;
        Some(asked + PROMPT)
    }
}

impl Pending {
    /// Notes attempts that have become slow; the sources that make them.
    pub(super) fn slowed(&mut self, now: Instant) -> Vec<usize> {
        let mut slowed = Vec::new();
        if self.tries.len() > 1 {
            for (member, attempt) in self.tries.iter_mut().enumerate() {
                if attempt.slow_at().is_some_and(|at| now >= at) {
                    attempt.slow = true;
                    slowed.push(member);
                }
            }
        }
        slowed
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let deadline = self.started + self.patience.whole?;
        Some(self.extended.map_or(deadline, |later| later.max(deadline)))
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|over| now >= over)
    }

    /// When it is to be looked at.
    pub(super) fn next(&self) -> Option<Instant> {
        let slow = self.tries.iter().filter_map(Try::slow_at);
        let slow = slow.filter(|_| self.tries.len() > 1);
        let known = self.until.into_iter().chain(self.deadline());
        known.chain(slow).min()
    }

    pub(super) fn probe(&self) -> Probe {
        Probe {
            file: self.file.clone(),
            operation: self.operation,
            pool: Arc::clone(&self.pool),
            patience: self.patience,
        }
    }

    pub(super) fn give_up(self, members: &[Arc<dyn Source>], health: &[Health]) -> Action {
        let now = Instant::now();
        // Those that cannot have it say nothing.
        let asked = |member: &Arc<dyn Source>| match member.readiness(&self.file) {
            Readiness::Ready => true,
            Readiness::After(_) => self.patience.await_file,
            Readiness::Never => false,
        };
        let asked: Vec<_> = members.iter().map(asked).collect();
        let mut tries = self.tries.iter().zip(&asked);
        let error = if tries.all(|(attempt, asked)| attempt.not_found || !asked) {
            SourceError::Failed {
                file: self.file,
                origin: members.first().map_or("", |member| member.name()).into(),
                error: SourceErrno(Errno::NOENT),
            }
        } else {
            let answers = self.tries.into_iter().zip(members.iter().zip(health));
            let answers = answers.zip(asked).filter(|(_, asked)| *asked);
            let answers = answers.map(|((attempt, (member, health)), _)| {
                let said = attempt.last.unwrap_or_else(|| {
                    if attempt.out > 0 {
                        return "asked, no answer yet".to_owned();
                    }
                    let condition = health.standing(member.name(), now).condition;
                    format!("not asked, {condition}")
                });
                format!("{}: {said}", member.name())
            });
            SourceError::Exhausted {
                answers: answers.collect::<Vec<_>>().join("; "),
                file: self.file,
                seconds: self.started.elapsed().as_secs(),
            }
        };
        // The slot is free before the request is over: who fails may wait for it.
        drop(self.slot);
        Action::Finish(self.done, Err(error), self.patience.optional)
    }
}
