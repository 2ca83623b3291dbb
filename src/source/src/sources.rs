//! Several sources of the same files, asked in turn.
//!
//! ```text
//! submit ─► ask the first source in use ─┬─ bytes ─────────────────► done
//!              ▲                         ├─ error, or late: set it aside, next
//!              │                         └─ none left ─┬─ all wrong ─► done(error)
//!              └── a pause; a source came back ◄───────┘
//! ```
//!
//! * Sources have an order: the first that is in use is asked. One that is set
//!   aside because it *answers* badly is asked when no other can be; one that does
//!   *not answer* is waited for, but not asked until a probe of ours came back.
//! * One attempt at a time; but when one takes longer than half a second, and another
//!   source is prompt, that is asked as well, and until the slow one has answered
//!   something it is asked after those that are prompt. An attempt that is late is not
//!   called off: its answer, if it is good, still counts.
//! * Bytes that the caller rejects are asked for once more from the same source,
//!   afresh (what this machine had cached may have been the fault), and then from
//!   the others.
//! * A source may be a last resort for a file ([`Readiness::After`]): it is asked when
//!   no other can be, and the request has waited for a while. As long as it is at work
//!   on the file, the request's deadline moves.
//! * A request ends with an error when every source has given a final answer, or
//!   at its deadline.
//!
//! Locking: one mutex, never held while a source is called, but for
//! [`Source::readiness`] and [`Source::is_at_work`], which only look. Sources call back
//! from threads of their own, or at once.

mod pending;

use crate::health::{Due, Fault, Health, Probe};
use crate::{
    Done, Filled, Latency, Operation, Patience, Pool, Readiness, Request, Slot, Source,
    SourceError, Standing,
};
use pending::{Pending, Try, Verdict};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Attempts of one request that may be out, unanswered, at one source.
const UNANSWERED: usize = 3;
/// Pause before sources that failed are asked again; doubles up to
/// [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Pause of a request that finds no memory for its next attempt.
const MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// How far the deadline of a request moves at a time.
const EXTENSION: Duration = Duration::from_secs(1);
/// Bytes that a probe reads.
const PROBE: usize = 4096;

/// Several sources, used as one.
pub struct Sources {
    shared: Arc<Shared>,
    timer: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    members: Vec<Arc<dyn Source>>,
    /// What each of them has done.
    tallies: Vec<Tally>,
    state: Mutex<State>,
    /// Signalled when there is something to do earlier than was thought.
    changed: Condvar,
    failed: AtomicU64,
    me: Weak<Self>,
}

/// What one of several sources has done, probes included.
#[derive(Debug, Default)]
pub struct Tally {
    /// From when it was asked until it gave bytes, or an error.
    pub latency: Latency,
    /// Answers that did not pass the check of whoever had asked.
    pub wrong: AtomicU64,
}

struct State {
    operations: BTreeMap<u64, Pending>,
    health: Vec<Health>,
    /// Attempts that have not ended, those of requests that are over among them.
    out: BTreeSet<u64>,
    last_id: u64,
    /// When the timer wakes; `None`: not by itself.
    wake: Option<Instant>,
    closed: bool,
}

/// Something to be done without the lock.
enum Action {
    Send(usize, Request, Done),
    /// And whether it can be done without.
    Finish(Done, Result<Filled, SourceError>, bool),
}

impl Sources {
    /// Uses `members`, best first.
    pub fn new(members: Vec<Arc<dyn Source>>) -> io::Result<Self> {
        let names: Vec<_> = members.iter().map(|member| member.name()).collect();
        let name = names.join(", ");
        let shared = Arc::new_cyclic(|me| Shared {
            name,
            state: Mutex::new(State {
                operations: BTreeMap::new(),
                health: members.iter().map(|_| Health::default()).collect(),
                out: BTreeSet::new(),
                last_id: 0,
                wake: None,
                closed: false,
            }),
            tallies: members.iter().map(|_| Tally::default()).collect(),
            members,
            changed: Condvar::new(),
            failed: AtomicU64::new(0),
            me: Weak::clone(me),
        });
        let timed = Arc::clone(&shared);
        let timer = thread::Builder::new()
            .name("sources".to_owned())
            .spawn(move || timed.keep_time())?;
        Ok(Self {
            shared,
            timer: Some(timer),
        })
    }

    /// How each source stands, best first.
    pub fn standings(&self) -> Vec<Standing> {
        let now = Instant::now();
        let state = self.shared.lock();
        let members = self.shared.members.iter().zip(&state.health);
        members
            .map(|(member, health)| health.standing(member.name(), now))
            .collect()
    }

    /// What each source has done, in the order of [`standings`](Self::standings).
    pub fn tallies(&self) -> &[Tally] {
        &self.shared.tallies
    }

    /// Requests that failed at every source.
    pub fn failed(&self) -> u64 {
        self.shared.failed.load(Relaxed)
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sources({})", self.shared.name)
    }
}

impl Source for Sources {
    fn submit(&self, request: Request, done: Done) {
        self.shared.submit(request, done);
    }

    fn name(&self) -> &str {
        &self.shared.name
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        let operations = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.operations)
        };
        self.shared.changed.notify_all();
        for pending in operations.into_values() {
            let origin = self.shared.name.as_str().into();
            (pending.done)(Err(SourceError::Closed { origin }));
        }
        if let Some(timer) = self.timer.take()
            && timer.join().is_err()
        {
            tracing::error!("the thread that times the sources panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(member, request, done) => self.members[member].submit(request, done),
                Action::Finish(done, outcome, optional) => {
                    // A name that is looked up need not exist.
                    let failed = outcome.as_ref().is_err_and(|error| !error.is_not_found());
                    if failed && !optional {
                        self.failed.fetch_add(1, Relaxed);
                    }
                    done(outcome);
                }
            }
        }
    }

    fn submit(&self, request: Request, done: Done) {
        let now = Instant::now();
        if let Some(origin) = request.rejected.last()
            && let Some(tally) = self.tallies.get(origin.member)
        {
            tally.wrong.fetch_add(1, Relaxed);
        }
        let mut pending = Pending {
            id: request.id,
            pool: Arc::clone(request.slot.pool()),
            file: request.file,
            operation: request.operation,
            slot: Some(request.slot),
            patience: request.patience,
            done,
            started: request.rejected.since.unwrap_or(now),
            tries: self.members.iter().map(|_| Try::default()).collect(),
            pause: FIRST_PAUSE,
            until: None,
            extended: None,
        };
        let mut lied = None;
        for (origin, problem) in request.rejected.answers {
            let Some(attempt) = pending.tries.get_mut(origin.member) else {
                continue;
            };
            lied = origin.fresh.then(|| (origin.member, problem.clone()));
            attempt.last = Some(problem);
            if origin.fresh {
                attempt.verdict = Verdict::Final;
            }
            attempt.fresh = true;
        }
        let mut actions = Vec::new();
        let mut state = self.lock();
        if state.closed {
            drop(state);
            let origin = self.name.as_str().into();
            return (pending.done)(Err(SourceError::Closed { origin }));
        }
        // What is only a help may be of a form that a newer program has, or left wrong: it
        // says nothing of the rest.
        if let Some((member, problem)) = lied
            && !pending.patience.optional
        {
            let why = format!("{}: {problem}", pending.file);
            let probe = pending.probe();
            self.set_aside(&mut state, member, now, Fault::Wrong, &why, probe);
        }
        let wake = pending.deadline();
        state.last_id += 1;
        let id = state.last_id;
        state.operations.insert(id, pending);
        self.step(&mut state, id, now, &mut actions);
        self.wake_by(&state, wake);
        drop(state);
        self.run(actions);
    }

    /// Makes sure that the timer looks at `at`.
    fn wake_by(&self, state: &State, at: Option<Instant>) {
        if at.is_some_and(|at| state.wake.is_none_or(|wake| at < wake)) {
            self.changed.notify_all();
        }
    }

    fn set_aside(
        &self,
        state: &mut State,
        member: usize,
        now: Instant,
        fault: Fault,
        why: &str,
        probe: Probe,
    ) {
        let name = self.members[member].name();
        let health = &mut state.health[member];
        if health.set_aside(now, fault, why.to_owned(), probe) {
            tracing::warn!(source = name, ?fault, why, "a source is set aside");
        }
        let next = health.next();
        self.wake_by(state, next);
    }

    /// Does what can be done for a request now.
    fn step(&self, state: &mut State, id: u64, now: Instant, actions: &mut Vec<Action>) {
        let State {
            operations,
            health,
            out,
            last_id,
            ..
        } = state;
        let Some(pending) = operations.get_mut(&id) else {
            return;
        };
        let waits = pending.until.is_some_and(|until| now < until);
        let mut live = pending
            .tries
            .iter()
            .filter(|attempt| attempt.live.is_some());
        if waits || live.any(|attempt| !attempt.slow) {
            return;
        }
        // One that is slow may still answer; beside it only such are asked that may be
        // quicker.
        let beside = pending.tries.iter().any(|attempt| attempt.live.is_some());
        pending.until = None;
        // From when each may be asked; `None`: never.
        let (started, patient) = (pending.started, pending.patience.await_file);
        let whens = self.members.iter().map(|member| {
            match member.readiness(&pending.file) {
                Readiness::Ready => Some((false, started)),
                Readiness::After(time) if patient => Some((true, started + time)),
                // What is only looked up is not worth it.
                Readiness::After(_) | Readiness::Never => None,
            }
        });
        let whens: Vec<_> = whens.collect();
        let find = |last: bool, usable: fn(&Health) -> bool| {
            let all = pending.tries.iter().zip(health.iter()).zip(&whens);
            all.enumerate()
                .find_map(|(member, ((attempt, health), when))| {
                    let due = when.is_some_and(|(late, when)| late == last && now >= when);
                    let open = match attempt.verdict {
                        Verdict::Open => attempt.live.is_none(),
                        Verdict::Late => health.is_good() && attempt.out < UNANSWERED,
                        Verdict::Failed | Verdict::Final => false,
                    };
                    (due && open && usable(health)).then_some(member)
                })
        };
        let mut found = find(false, Health::is_prompt);
        if !beside {
            found = found
                .or_else(|| find(false, Health::is_good))
                .or_else(|| find(false, Health::answers))
                .or_else(|| find(true, Health::answers));
        }
        if let Some(member) = found {
            let slot = pending.slot.take();
            let Some(slot) = slot.or_else(|| pending.pool.take_reserved()) else {
                if beside {
                    return;
                }
                pending.until = Some(now + MEMORY_PAUSE);
                let until = pending.until;
                return self.wake_by(state, until);
            };
            *last_id += 1;
            let attempt = *last_id;
            out.insert(attempt);
            actions.push(self.attempt(pending, id, member, attempt, slot));
            let next = pending.next();
            return self.wake_by(state, next);
        }
        if beside {
            return;
        }
        let mut tries = pending.tries.iter().zip(&whens);
        if tries.all(|(attempt, when)| attempt.verdict == Verdict::Final || when.is_none()) {
            if let Some(pending) = operations.remove(&id) {
                actions.push(pending.give_up(&self.members, health));
            }
            return;
        }
        let failed = pending.tries.iter_mut();
        let failed = failed.filter(|attempt| attempt.verdict == Verdict::Failed);
        let mut again = false;
        for attempt in failed {
            (attempt.verdict, again) = (Verdict::Open, true);
        }
        // Otherwise it waits for a source to come back, or for its deadline.
        let until = again.then(|| now + pending.pause);
        if again {
            pending.pause = (pending.pause * 2).min(LONGEST_PAUSE);
        }
        let last = pending.tries.iter().zip(&whens);
        let last = last.filter(|(attempt, _)| attempt.verdict == Verdict::Open);
        let last = last.filter_map(|(_, when)| Some(when.as_ref()?.1).filter(|when| *when > now));
        pending.until = last.chain(until).min();
        let until = pending.until;
        self.wake_by(state, until);
    }

    /// One attempt of a request at one source.
    fn attempt(
        &self,
        pending: &mut Pending,
        id: u64,
        member: usize,
        attempt: u64,
        slot: Slot,
    ) -> Action {
        let this = &mut pending.tries[member];
        this.live = Some(attempt);
        (this.asked, this.slow) = (Some(Instant::now()), false);
        this.out += 1;
        this.verdict = Verdict::Open;
        let operation = match pending.operation {
            Operation::Read { offset, len, .. } => Operation::Read {
                offset,
                len,
                fresh: this.fresh,
            },
            other => other,
        };
        let (me, shared, asker) = (Weak::clone(&self.me), Weak::clone(&self.me), pending.id);
        let name = self.members[member].name();
        tracing::debug!(request = %pending.id, source = name, file = %pending.file, ?operation, "asked");
        let (asked, probe) = (Instant::now(), pending.probe());
        let request = Request {
            id: pending.id,
            late: Some(Box::new(move || {
                if let Some(shared) = shared.upgrade() {
                    shared.late(id, member, attempt, probe);
                }
            })),
            ..Request::new(pending.file.clone(), operation, slot, pending.patience)
        };
        let done = Box::new(move |outcome: Result<Filled, SourceError>| {
            if let Some(shared) = me.upgrade() {
                let took = asked.elapsed();
                shared.tallies[member].latency.record(took);
                let (source, ok) = (shared.members[member].name(), outcome.is_ok());
                tracing::debug!(request = %asker, source, ok, ?took, "answered");
                shared.over(id, member, attempt, outcome);
            }
        });
        Action::Send(member, request, done)
    }

    /// An attempt was not answered in time.
    fn late(&self, id: u64, member: usize, attempt: u64, probe: Probe) {
        let now = Instant::now();
        let mut actions = Vec::new();
        let mut state = self.lock();
        if !state.out.contains(&attempt) {
            return;
        }
        let why = format!(
            "{}: no answer within {:?}",
            probe.file, probe.patience.attempt
        );
        // Another source may have answered the request meanwhile.
        if let Some(pending) = state.operations.get_mut(&id) {
            let this = &mut pending.tries[member];
            if this.live != Some(attempt) {
                return;
            }
            this.live = None;
            this.verdict = Verdict::Late;
            this.last = Some(why.clone());
        }
        self.set_aside(&mut state, member, now, Fault::Stalled, &why, probe);
        self.step(&mut state, id, now, &mut actions);
        drop(state);
        self.run(actions);
    }

    /// An attempt has ended, in time or late.
    fn over(&self, id: u64, member: usize, attempt: u64, outcome: Result<Filled, SourceError>) {
        let now = Instant::now();
        let mut actions = Vec::new();
        let mut state = self.lock();
        state.out.remove(&attempt);
        state.health[member].answered();
        match outcome {
            Ok(mut filled) => {
                if state.health[member].gave(now) {
                    self.came_back(&mut state, member, now, &mut actions);
                }
                match state.operations.remove(&id) {
                    Some(pending) => {
                        filled.origin.member = member;
                        filled.asked = pending.started;
                        // It may have taken another slot by now.
                        if let Some(spare) = pending.slot {
                            Pool::take_back(spare);
                        }
                        let optional = pending.patience.optional;
                        actions.push(Action::Finish(pending.done, Ok(filled), optional));
                    }
                    None => Pool::take_back(filled.slot),
                }
            }
            Err(error) => {
                if let Some(pending) = state.operations.get_mut(&id) {
                    let this = &mut pending.tries[member];
                    this.out -= 1;
                    let was_live = this.live == Some(attempt);
                    if was_live {
                        this.live = None;
                    }
                    // A late attempt that failed says nothing new if another is out.
                    if was_live || (this.verdict == Verdict::Late && this.out == 0) {
                        this.verdict = if is_final(&error, pending.patience) {
                            Verdict::Final
                        } else {
                            Verdict::Failed
                        };
                        this.not_found = error.is_not_found();
                        this.last = Some(error.to_string());
                    }
                    let fault = Fault::of(&error).filter(|_| {
                        // Names that are looked up need not exist.
                        pending.patience.await_file || !error.is_not_found()
                    });
                    if let Some(fault) = fault.filter(|_| was_live) {
                        let (why, probe) = (error.to_string(), pending.probe());
                        self.set_aside(&mut state, member, now, fault, &why, probe);
                    }
                    self.step(&mut state, id, now, &mut actions);
                }
            }
        }
        drop(state);
        self.run(actions);
    }

    /// A source is in use again: whoever waits may ask it.
    fn came_back(&self, state: &mut State, member: usize, now: Instant, actions: &mut Vec<Action>) {
        tracing::info!(
            source = self.members[member].name(),
            "a source is in use again"
        );
        let ids: Vec<_> = state.operations.keys().copied().collect();
        for id in ids {
            if let Some(pending) = state.operations.get_mut(&id) {
                let this = &mut pending.tries[member];
                if this.verdict == Verdict::Failed {
                    this.verdict = Verdict::Open;
                }
                pending.until = None;
            }
            self.step(state, id, now, actions);
        }
    }

    /// The timer's thread: deadlines, pauses, probes.
    fn keep_time(&self) {
        let mut state = self.lock();
        while !state.closed {
            let now = Instant::now();
            let mut actions = Vec::new();
            self.tick(&mut state, now, &mut actions);
            if !actions.is_empty() {
                drop(state);
                self.run(actions);
                state = self.lock();
                continue;
            }
            let health = state.health.iter().filter_map(Health::next);
            let operations = state.operations.values().filter_map(Pending::next);
            let wake = health.chain(operations).min();
            state.wake = wake;
            state = match wake {
                Some(at) => {
                    let time = at.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, time);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    fn tick(&self, state: &mut State, now: Instant, actions: &mut Vec<Action>) {
        for member in 0..self.members.len() {
            match state.health[member].due(now) {
                None => {}
                Some(Due::Returned) => self.came_back(state, member, now, actions),
                Some(Due::Probe(probe)) => match probe.pool.take_reserved() {
                    Some(slot) => actions.push(self.probe(member, &probe, slot)),
                    // No memory to spare; later.
                    None => drop(state.health[member].probed(now, false)),
                },
            }
        }
        let due = state.operations.iter().filter(|(_, pending)| {
            let next = pending.next();
            next.is_some_and(|next| now >= next)
        });
        let due: Vec<_> = due.map(|(id, _)| *id).collect();
        for id in due {
            let pending = state.operations.get_mut(&id);
            for member in pending.map_or_else(Vec::new, |pending| pending.slowed(now)) {
                let name = self.members[member].name();
                tracing::debug!(source = name, "slow; others are asked as well");
                state.health[member].is_slow();
            }
            if let Some(pending) = state.operations.get_mut(&id)
                && pending.is_over(now)
            {
                // What one makes that has given wrong bytes is not worth it.
                let mut makers = self.members.iter().zip(&pending.tries);
                if pending.patience.await_file
                    && makers.any(|(member, attempt)| {
                        attempt.verdict != Verdict::Final && member.is_at_work(&pending.file)
                    })
                {
                    pending.extended = Some(now + EXTENSION);
                }
            }
            let over = state
                .operations
                .get(&id)
                .map(|pending| pending.is_over(now));
            if over == Some(true) {
                if let Some(pending) = state.operations.remove(&id) {
                    actions.push(pending.give_up(&self.members, &state.health));
                }
            } else {
                self.step(state, id, now, actions);
            }
        }
    }

    /// Asks a source that was set aside for a little of what it did not give.
    fn probe(&self, member: usize, probe: &Probe, slot: Slot) -> Action {
        let operation = match probe.operation {
            Operation::Read { offset, len, .. } => Operation::Read {
                offset,
                len: len.min(PROBE),
                fresh: false,
            },
            other => other,
        };
        let me = Weak::clone(&self.me);
        // Nobody waits for it: it ends with an answer, or with its worker.
        let request = Request::new(probe.file.clone(), operation, slot, probe.patience);
        let done = Box::new(move |outcome: Result<Filled, SourceError>| {
            let Some(shared) = me.upgrade() else {
                return;
            };
            let now = Instant::now();
            let good = match &outcome {
                Ok(_) => true,
                Err(error) => Fault::of(error).is_none_or(|fault| fault == Fault::Wrong),
            };
            let mut actions = Vec::new();
            let mut state = shared.lock();
            if state.health[member].probed(now, good) {
                shared.came_back(&mut state, member, now, &mut actions);
            }
            let next = state.health[member].next();
            shared.wake_by(&state, next);
            drop(state);
            if let Ok(filled) = outcome {
                Pool::take_back(filled.slot);
            }
            shared.run(actions);
        });
        Action::Send(member, request, done)
    }
}

/// Whether no later attempt mends this.
fn is_final(error: &SourceError, patience: Patience) -> bool {
    match error {
        SourceError::Failed { error, .. } => match error.0 {
            Errno::NOENT => !patience.await_file,
            Errno::ACCESS
            | Errno::PERM
            | Errno::LOOP
            | Errno::XDEV
            | Errno::INVAL
            | Errno::ISDIR
            | Errno::NOTDIR
            | Errno::NAMETOOLONG => true,
            _ => false,
        },
        SourceError::NotMade { lasting, .. } => *lasting,
        SourceError::Closed { .. } => true,
        _ => false,
    }
}
