//! The daemon's end of a worker: attempts in flight, and their time.
//!
//! A request here is one attempt. It owns its slot from `submit` to `done`. If the
//! worker has it and does not answer in time, whoever asked is told (`late`), and
//! the attempt stays: the worker may still write its slot, and a late answer may
//! still be good. It ends when the worker answers, or is given up. Slots held by a
//! worker that died come back, with fresh pages, when the process is really gone and the
//! kernel has let go of the old ones.
//!
//! Attempts of a worker that died are sent to the next one, unless they are late.
//! Errors are passed on as they come: whether to try again is not decided here.
//!
//! Locking: one mutex per source, held for bookkeeping and one non-blocking
//! `send`; callbacks run outside it.

use crate::request::Errno as SourceErrno;
use crate::supervise::{self, Worker};
use crate::wire::{WireReply, WireRequest};
use crate::{Arena, Done, FileName, Filled, Late, Operation, Origin, Request, RequestId, Slot};
use crate::{Source, SourceError};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Attempts that a worker has at once, at least and at most. In between, those of
/// one source may hold a quarter of the memory: what a source that stalls keeps
/// must not be missing elsewhere.
const FEWEST_IN_FLIGHT: usize = 8;
const MOST_IN_FLIGHT: usize = 128;

/// How to start a worker. Standard input and output are taken.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// The program: usually `/proc/self/exe`.
    pub program: PathBuf,
    /// Its arguments, which make it call [`worker::run`](crate::worker::run).
    pub arguments: Vec<OsString>,
}

/// A source cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    /// The worker said why.
    #[error("the worker that reads {origin} cannot start: {reason}")]
    Worker {
        /// Name of the source.
        origin: Arc<str>,
        /// The worker's words.
        reason: String,
    },
    /// It has not answered yet; it goes on trying.
    #[error("the worker that reads {origin} has not answered within {seconds} s")]
    Silent {
        /// Name of the source.
        origin: Arc<str>,
        /// How long we waited.
        seconds: u64,
    },
    /// This process cannot supervise it.
    #[error("cannot supervise the worker that reads {origin}: {reason}")]
    Supervisor {
        /// Name of the source.
        origin: Arc<str>,
        /// What failed.
        reason: String,
    },
}

/// What a source has done so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes delivered.
    pub bytes: AtomicU64,
    /// Requests answered well.
    pub reads: AtomicU64,
    /// Reads and writes of files that its worker has sent: fewer than requests where
    /// neighbours were read together.
    pub operations: AtomicU64,
    /// Attempts that failed or ran out of time.
    pub failed_attempts: AtomicU64,
    /// Workers started.
    pub workers: AtomicU64,
    /// Workers that were killed and have not ended yet.
    pub dying: AtomicUsize,
    /// Slots of workers that have ended, which the kernel may still write for them.
    pub held: AtomicUsize,
}

/// A source that is read by a worker process.
pub struct WorkerSource {
    shared: Arc<Shared>,
    supervisor: Option<JoinHandle<()>>,
}

impl fmt::Debug for WorkerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkerSource({})", self.shared.name)
    }
}

impl WorkerSource {
    /// Starts a worker, and a thread that keeps one running.
    pub fn start(
        name: &str,
        command: WorkerCommand,
        arena: Arc<Arena>,
    ) -> Result<Self, StartError> {
        let name: Arc<str> = name.into();
        let failed = |what: &str, error: &dyn fmt::Display| StartError::Supervisor {
            origin: Arc::clone(&name),
            reason: format!("{what}: {error}"),
        };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| failed("cannot make an eventfd", &error))?;
        let least = arena.chunks().capacity().min(arena.pages().capacity());
        let shared = Arc::new(Shared {
            name: Arc::clone(&name),
            in_flight: (least / 4).clamp(FEWEST_IN_FLIGHT, MOST_IN_FLIGHT),
            arena,
            command,
            wake,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            counters: Counters::default(),
        });
        let supervised = Arc::clone(&shared);
        let supervisor = thread::Builder::new()
            .name("source".to_owned())
            .spawn(move || supervise::run(&supervised))
            .map_err(|error| failed("cannot start a thread", &error))?;
        Ok(Self {
            shared,
            supervisor: Some(supervisor),
        })
    }

    /// Waits until the worker is ready, or says why it is not.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), StartError> {
        let state = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| {
                state.refused.is_none() && !state.worker.as_ref().is_some_and(|worker| worker.ready)
            });
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        let origin = Arc::clone(&self.shared.name);
        if timeout.timed_out() {
            let seconds = limit.as_secs();
            return Err(StartError::Silent { origin, seconds });
        }
        match state.refused.clone() {
            Some(reason) => Err(StartError::Worker { origin, reason }),
            None => Ok(()),
        }
    }

    /// Process id of the worker that runs now.
    pub fn worker_pid(&self) -> Option<u32> {
        self.shared.lock().worker.as_ref().map(Worker::pid)
    }

    /// What the source has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

impl Source for WorkerSource {
    fn submit(&self, request: Request, done: Done) {
        let mut state = self.shared.lock();
        let refused = state.refused.clone();
        if state.closed || refused.is_some() {
            drop(state);
            let origin = Arc::clone(&self.shared.name);
            drop(request.slot);
            return done(Err(match refused {
                Some(reason) => SourceError::Unavailable { origin, reason },
                None => SourceError::Closed { origin },
            }));
        }
        let mut wake = !state.watched;
        state.waiting.push_back(Pending {
            id: request.id,
            file: request.file,
            operation: request.operation,
            attempt: request.patience.attempt,
            since: Instant::now(),
            slot: request.slot,
            late: request.late,
            done,
        });
        state.send_waiting(&self.shared);
        wake |= state.blocked;
        drop(state);
        if wake {
            self.shared.wake();
        }
    }

    fn name(&self) -> &str {
        &self.shared.name
    }
}

impl Drop for WorkerSource {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake();
        // A callback on that thread may have been the last to know this source.
        if let Some(thread) = self.supervisor.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!(source = %self.shared.name, "the source's thread panicked");
        }
    }
}

pub(crate) struct Shared {
    pub name: Arc<str>,
    pub arena: Arc<Arena>,
    pub command: WorkerCommand,
    pub wake: OwnedFd,
    state: Mutex<State>,
    /// Signalled when the worker becomes ready or fails.
    pub changed: Condvar,
    pub counters: Counters,
    /// Attempts that the worker may have at once.
    pub in_flight: usize,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// An attempt that is not over.
pub(crate) struct Pending {
    id: RequestId,
    file: FileName,
    operation: Operation,
    attempt: Duration,
    /// When it was made; once a worker has it, when it was sent.
    since: Instant,
    slot: Slot,
    late: Option<Late>,
    done: Done,
}

/// An attempt that a worker has.
pub(crate) struct Sent {
    pending: Pending,
    /// Its time ran out, and whoever asked knows.
    late: bool,
}

#[derive(Default)]
pub(crate) struct State {
    pub closed: bool,
    /// Attempts to be sent, oldest first.
    waiting: VecDeque<Pending>,
    /// Attempts by their id, oldest first.
    sent: BTreeMap<u64, Sent>,
    pub worker: Option<Worker>,
    /// Why no worker can be had: its own words, or the system's.
    pub refused: Option<String>,
    /// The socket was full: send again when it has room.
    pub blocked: bool,
    /// Slots that workers hold which are dying, or that may be written after their end.
    pub buried: usize,
    /// When a worker was last heard of, or started.
    pub heard: Option<Instant>,
    /// The supervisor wakes soon by itself: it need not be woken for a request, which would
    /// cost whoever reads one piece after the other as much as the answer does.
    pub watched: bool,
    last_id: u64,
}

/// A callback and its argument, to be run without the lock.
pub(crate) enum Event {
    Late(Late),
    Over(Done, Result<Filled, SourceError>),
}

impl Event {
    pub(crate) fn run(self) {
        match self {
            Self::Late(late) => late(),
            Self::Over(done, outcome) => done(outcome),
        }
    }
}

impl Pending {
    fn over(self, error: SourceError) -> Event {
        drop(self.slot);
        Event::Over(self.done, Err(error))
    }
}

impl State {
    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.sent.is_empty()
    }

    /// Sends what waits, as far as the worker allows.
    pub(crate) fn send_waiting(&mut self, shared: &Shared) {
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.ready) else {
            return;
        };
        let room = shared.in_flight.saturating_sub(self.buried);
        while self.sent.len() < room.max(FEWEST_IN_FLIGHT)
            && let Some(pending) = self.waiting.front_mut()
        {
            let id = self.last_id + 1;
            let request = WireRequest {
                id,
                operation: pending.operation,
                room: pending.slot.size(),
                position: pending.slot.position(),
                request: pending.id,
                path: pending.file.as_str().to_owned(),
            };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if let Err(error) = rustix::net::send(&*worker.socket, &request.encode(), flags) {
                // Full, or the worker is gone: the supervisor sees to both.
                self.blocked = error == Errno::AGAIN;
                return;
            }
            self.last_id = id;
            pending.since = Instant::now();
            if let Some(pending) = self.waiting.pop_front() {
                let late = false;
                self.sent.insert(id, Sent { pending, late });
            }
        }
    }

    /// Takes in what the worker answered.
    pub(crate) fn answered(&mut self, reply: &WireReply, shared: &Shared) -> Option<Event> {
        let operations = u64::from(reply.operations);
        shared.counters.operations.fetch_add(operations, Relaxed);
        let Sent { mut pending, late } = self.sent.remove(&reply.id)?;
        let alone = self.is_idle();
        let origin = Arc::clone(&shared.name);
        match &reply.result {
            Ok(len) => {
                let len = (*len).min(pending.slot.size());
                pending.slot.filled(len);
                shared.counters.reads.fetch_add(1, Relaxed);
                shared.counters.bytes.fetch_add(len as u64, Relaxed);
                let filled = Filled {
                    len,
                    origin: Origin {
                        name: origin,
                        member: 0,
                        fresh: matches!(pending.operation, Operation::Read { fresh: true, .. }),
                    },
                    took: pending.since.elapsed(),
                    alone,
                    asked: pending.since,
                    slot: pending.slot,
                };
                Some(Event::Over(pending.done, Ok(filled)))
            }
            Err((errno, _)) => {
                if !late {
                    shared.counters.failed_attempts.fetch_add(1, Relaxed);
                }
                let (file, error) = (pending.file.clone(), SourceErrno(*errno));
                Some(pending.over(SourceError::Failed {
                    file,
                    origin,
                    error,
                }))
            }
        }
    }

    /// Lets time pass: attempts that are late, and those that no worker took.
    pub(crate) fn tick(&mut self, now: Instant, shared: &Shared) -> Vec<Event> {
        let mut events = Vec::new();
        for sent in self.sent.values_mut() {
            if !sent.late && now >= sent.pending.since + sent.pending.attempt {
                sent.late = true;
                shared.counters.failed_attempts.fetch_add(1, Relaxed);
                events.extend(sent.pending.late.take().map(Event::Late));
            }
        }
        let refused = self.refused.clone();
        let heard = self.heard;
        let in_vain = |pending: &Pending| {
            let since = heard.map_or(pending.since, |heard| pending.since.max(heard));
            refused.is_some() || now >= since + pending.attempt
        };
        while let Some(pending) = self.waiting.pop_front() {
            if !in_vain(&pending) {
                self.waiting.push_front(pending);
                break;
            }
            shared.counters.failed_attempts.fetch_add(1, Relaxed);
            let (file, origin) = (pending.file.clone(), Arc::clone(&shared.name));
            let error = match refused.clone() {
                Some(reason) => SourceError::Unavailable { origin, reason },
                None => SourceError::Silent {
                    file,
                    origin,
                    reason: format!("no answer to anything within {:?}", pending.attempt),
                },
            };
            events.push(pending.over(error));
        }
        events
    }

    /// When `tick` has something to do next.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let late = self.sent.values().filter(|sent| !sent.late);
        let late = late.map(|sent| sent.pending.since + sent.pending.attempt);
        let waiting = self.waiting.front().map(|pending| {
            let since = self.heard.map_or(pending.since, |at| at.max(pending.since));
            since + pending.attempt
        });
        late.chain(waiting).min()
    }

    /// Whether the worker has stopped answering: for three attempts' time it has
    /// said nothing, or something is unanswered for twelve and no other worker is
    /// stuck yet.
    pub(crate) fn is_stuck(&self, now: Instant, alone: bool) -> bool {
        let Some(worker) = &self.worker else {
            return false;
        };
        self.sent.values().any(|Sent { pending, .. }| {
            let silence = now.saturating_duration_since(pending.since.max(worker.heard));
            let age = now.saturating_duration_since(pending.since);
            silence >= pending.attempt * 3 || (alone && age >= pending.attempt * 12)
        })
    }

    /// The worker is gone or given up: its attempts are to be sent again, unless
    /// they were late already. What it may still write is returned, to be kept
    /// until the process has ended.
    pub(crate) fn abandon_worker(&mut self, shared: &Shared) -> (Vec<Slot>, Vec<Event>) {
        let sent = std::mem::take(&mut self.sent);
        let (mut held, mut events) = (Vec::with_capacity(sent.len()), Vec::new());
        for Sent { mut pending, late } in sent.into_values().rev() {
            let other = pending.slot.pool().take_reserved().filter(|_| !late);
            match other {
                Some(slot) => {
                    held.push(std::mem::replace(&mut pending.slot, slot));
                    self.waiting.push_front(pending);
                }
                None => {
                    let Pending {
                        slot, done, file, ..
                    } = pending;
                    held.push(slot);
                    let error = SourceError::Silent {
                        file,
                        origin: Arc::clone(&shared.name),
                        reason: "its worker process stopped answering and was replaced".to_owned(),
                    };
                    events.push(Event::Over(done, Err(error)));
                }
            }
        }
        self.blocked = false;
        self.buried += held.len();
        (held, events)
    }

    /// Ends every attempt: the source closes.
    pub(crate) fn end_all(&mut self, shared: &Shared) -> Vec<Event> {
        let closed = |slot, done| {
            // The worker may still write it: it is not used again.
            std::mem::forget::<Option<Slot>>(slot);
            let origin = Arc::clone(&shared.name);
            Event::Over(done, Err(SourceError::Closed { origin }))
        };
        let sent = std::mem::take(&mut self.sent).into_values();
        let sent = sent.map(|sent| closed(Some(sent.pending.slot), sent.pending.done));
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let waiting = waiting.map(|pending| closed(None, pending.done));
        sent.chain(waiting).collect()
    }
}
