//! The daemon's end of a worker: requests in flight, deadlines, retries.
//!
//! A request owns its slot from `submit` to `done`. When an attempt runs out of
//! time its slot stays with that attempt ([`Sent`]), because the worker may
//! still write it; the request goes on with a slot from the pool's reserve, or
//! waits for one. A late answer that is good still counts. Slots held by a worker
//! that died come back, with fresh pages, when the process is really gone.
//!
//! Locking: one mutex per source, held for bookkeeping and one non-blocking
//! `send`; callbacks run outside it.

use crate::request::Errno as SourceErrno;
use crate::supervise::{self, Worker};
use crate::wire::{WireReply, WireRequest};
use crate::{Arena, Done, FileName, Filled, Operation, Patience, Pool, Request, Slot};
use crate::{Source, SourceError};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Attempts that a worker has at once.
const IN_FLIGHT: usize = 128;
/// Attempts of one request that may be out, unanswered, in one worker.
pub(crate) const UNANSWERED: usize = 3;
/// Pause after a failed attempt; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

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
    /// Attempts that failed or ran out of time.
    pub failed_attempts: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Workers started.
    pub workers: AtomicU64,
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
        let shared = Arc::new(Shared {
            name: Arc::clone(&name),
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
                state.trouble.is_none() && !state.worker.as_ref().is_some_and(|worker| worker.ready)
            });
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        let origin = Arc::clone(&self.shared.name);
        if timeout.timed_out() {
            let seconds = limit.as_secs();
            return Err(StartError::Silent { origin, seconds });
        }
        match state.trouble.clone() {
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
        if state.closed {
            drop(state);
            return done(Err(SourceError::Closed {
                origin: Arc::clone(&self.shared.name),
            }));
        }
        // The supervisor sleeps without a timeout while nothing is under way.
        let mut wake = state.operations.is_empty();
        let id = state.new_id();
        let operation = Pending {
            file: request.file,
            operation: request.operation,
            pool: Arc::clone(request.slot.pool()),
            slot: Some(request.slot),
            patience: request.patience,
            done,
            started: Instant::now(),
            attempts: 0,
            last: "not sent".to_owned(),
            pause: FIRST_PAUSE,
            until: None,
        };
        state.operations.insert(id, operation);
        state.queue.push_back(id);
        state.send_queued();
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
        if let Some(thread) = self.supervisor.take()
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

/// A request that is not answered yet.
pub(crate) struct Pending {
    file: FileName,
    operation: Operation,
    pool: Arc<Pool>,
    /// None while an attempt that is out has it.
    slot: Option<Slot>,
    patience: Patience,
    done: Done,
    started: Instant,
    attempts: u32,
    /// What the last attempt met.
    last: String,
    pause: Duration,
    /// Not to be sent before.
    until: Option<Instant>,
}

/// An attempt that a worker has.
pub(crate) struct Sent {
    /// The request it is for, which may be over by now.
    request: u64,
    pub slot: Slot,
    since: Instant,
    attempt: Duration,
    /// Its time ran out; the request goes on without it.
    late: bool,
}

#[derive(Default)]
pub(crate) struct State {
    pub closed: bool,
    /// Requests by id, oldest first.
    pub operations: BTreeMap<u64, Pending>,
    /// Ids of requests to be sent; some may be over.
    queue: VecDeque<u64>,
    /// Attempts by their id.
    pub sent: BTreeMap<u64, Sent>,
    pub worker: Option<Worker>,
    /// Why there is no worker.
    pub trouble: Option<String>,
    /// The socket was full: send again when it has room.
    pub blocked: bool,
    last_id: u64,
}

/// A callback and its argument, to be run without the lock.
pub(crate) type Ending = (Done, Result<Filled, SourceError>);

impl State {
    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Sends what waits, as far as worker and slots allow.
    pub(crate) fn send_queued(&mut self) {
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.ready) else {
            return;
        };
        while self.sent.len() < IN_FLIGHT
            && let Some(&id) = self.queue.front()
        {
            let Some(pending) = self.operations.get_mut(&id) else {
                self.queue.pop_front();
                continue;
            };
            let Some(slot) = pending.slot.take().or_else(|| pending.pool.take_reserved()) else {
                // Waits for a slot; let others pass that have one.
                let Some(at) = self.queue.iter().position(|id| {
                    let other = self.operations.get(id);
                    other.is_some_and(|other| other.slot.is_some())
                }) else {
                    return;
                };
                self.queue.swap(0, at);
                continue;
            };
            self.last_id += 1;
            let attempt = self.last_id;
            let request = WireRequest {
                id: attempt,
                operation: pending.operation,
                room: slot.size(),
                position: slot.position(),
                path: pending.file.as_str().to_owned(),
            };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if let Err(error) = rustix::net::send(&*worker.socket, &request.encode(), flags) {
                // Full, or the worker is gone: the supervisor sees to both.
                pending.slot = Some(slot);
                self.blocked = error == Errno::AGAIN;
                return;
            }
            self.queue.pop_front();
            pending.attempts += 1;
            let sent = Sent {
                request: id,
                slot,
                since: Instant::now(),
                attempt: pending.patience.attempt,
                late: false,
            };
            self.sent.insert(attempt, sent);
        }
    }

    /// A slot is free again: a request without one gets it, else its pool.
    pub(crate) fn give(&mut self, slot: Slot) {
        let needy = self.operations.iter_mut().find(|(id, pending)| {
            pending.slot.is_none()
                && Arc::ptr_eq(&pending.pool, slot.pool())
                && !self.sent.values().any(|s| s.request == **id && !s.late)
        });
        match needy {
            Some((_, pending)) => pending.slot = Some(slot),
            None => Pool::take_back(slot),
        }
    }

    /// Takes in what the worker answered.
    pub(crate) fn answered(&mut self, reply: &WireReply, shared: &Shared) -> Option<Ending> {
        let sent = self.sent.remove(&reply.id)?;
        let late = sent.late;
        match &reply.result {
            Ok(len) => {
                let Some(pending) = self.operations.remove(&sent.request) else {
                    self.give(sent.slot);
                    return None;
                };
                // The request may have taken a second slot by now.
                let spare = pending.slot;
                let len = (*len).min(sent.slot.size());
                shared.counters.reads.fetch_add(1, Relaxed);
                shared.counters.bytes.fetch_add(len as u64, Relaxed);
                if let Some(spare) = spare {
                    self.give(spare);
                }
                let filled = Filled {
                    slot: sent.slot,
                    len,
                };
                Some((pending.done, Ok(filled)))
            }
            Err((errno, _)) => {
                let errno = *errno;
                shared.counters.failed_attempts.fetch_add(1, Relaxed);
                let Some(pending) = self.operations.get_mut(&sent.request).filter(|_| !late) else {
                    self.give(sent.slot);
                    return None;
                };
                pending.slot = Some(sent.slot);
                if is_final(errno, pending.patience) {
                    let pending = self.operations.remove(&sent.request)?;
                    shared.counters.failed.fetch_add(1, Relaxed);
                    let error = SourceError::Failed {
                        file: pending.file,
                        origin: Arc::clone(&shared.name),
                        error: SourceErrno(errno),
                    };
                    return Some((pending.done, Err(error)));
                }
                if pending.attempts == 1 {
                    tracing::warn!(
                        file = %pending.file, source = %shared.name, error = %SourceErrno(errno),
                        "a read failed; trying again"
                    );
                }
                pending.last = SourceErrno(errno).to_string();
                pending.until = Some(Instant::now() + pending.pause);
                pending.pause = (pending.pause * 2).min(LONGEST_PAUSE);
                None
            }
        }
    }

    /// Lets time pass: attempts that are late, requests out of patience, pauses
    /// that are over.
    pub(crate) fn tick(&mut self, now: Instant, shared: &Shared) -> Vec<Ending> {
        for sent in self.sent.values_mut() {
            if !sent.late && now >= sent.since + sent.attempt {
                sent.late = true;
                shared.counters.failed_attempts.fetch_add(1, Relaxed);
                if let Some(pending) = self.operations.get_mut(&sent.request) {
                    tracing::warn!(
                        file = %pending.file, source = %shared.name, attempt = pending.attempts,
                        "no answer within {:?}; trying again", sent.attempt
                    );
                    pending.last = format!("no answer within {:?}", sent.attempt);
                    pending.until = Some(now);
                }
            }
        }
        let mut over = Vec::new();
        for (&id, pending) in &mut self.operations {
            let given_up = |limit| now >= pending.started + limit;
            if pending.patience.whole.is_some_and(given_up) {
                over.push(id);
            } else if pending.until.is_some_and(|until| now >= until) {
                let out = self.sent.values().filter(|sent| sent.request == id);
                if out.count() < UNANSWERED {
                    pending.until = None;
                    self.queue.push_back(id);
                } else {
                    pending.until = Some(now + LONGEST_PAUSE);
                }
            }
        }
        let give_up = |id| {
            let pending = self.operations.remove(&id)?;
            shared.counters.failed.fetch_add(1, Relaxed);
            let error = SourceError::GaveUp {
                file: pending.file,
                origin: Arc::clone(&shared.name),
                attempts: pending.attempts,
                seconds: pending.started.elapsed().as_secs(),
                last: pending.last,
            };
            Some((pending.done, Err(error)))
        };
        over.into_iter().filter_map(give_up).collect()
    }

    /// When `tick` has something to do next.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        let late = self.sent.values().filter(|sent| !sent.late);
        let late = late.map(|sent| sent.since + sent.attempt);
        let pauses = self.operations.values().filter_map(|p| p.until);
        let limits = self.operations.values().filter_map(|pending| {
            let limit = pending.patience.whole?;
            Some(pending.started + limit)
        });
        late.chain(pauses).chain(limits).min()
    }

    /// Whether the worker has stopped answering: for three attempts' time it has
    /// said nothing, or one request has all its attempts out and late.
    pub(crate) fn is_stuck(&self, now: Instant) -> bool {
        let Some(worker) = &self.worker else {
            return false;
        };
        let mut out = BTreeMap::new();
        for sent in self.sent.values() {
            let silence = now.saturating_duration_since(sent.since.max(worker.heard));
            if silence >= sent.attempt * 3 {
                return true;
            }
            *out.entry(sent.request).or_insert(0) += usize::from(sent.late);
        }
        out.iter()
            .any(|(id, &late)| late >= UNANSWERED && self.operations.contains_key(id))
    }

    /// The worker is gone or given up: its attempts are to be sent again. What
    /// it may still write is returned, to be kept until the process has ended.
    pub(crate) fn abandon_worker(&mut self) -> Vec<Slot> {
        let sent = std::mem::take(&mut self.sent);
        let mut held = Vec::with_capacity(sent.len());
        let mut again = Vec::new();
        for sent in sent.into_values() {
            held.push(sent.slot);
            if let Some(pending) = self.operations.get_mut(&sent.request)
                && !again.contains(&sent.request)
                && !self.queue.contains(&sent.request)
            {
                pending.until = None;
                again.push(sent.request);
            }
        }
        for id in again.into_iter().rev() {
            self.queue.push_front(id);
        }
        self.blocked = false;
        held
    }

    /// Ends every request: the source closes.
    pub(crate) fn end_all(&mut self, shared: &Shared) -> Vec<Ending> {
        let all = std::mem::take(&mut self.operations);
        let closed = |pending: Pending| {
            let origin = Arc::clone(&shared.name);
            (pending.done, Err(SourceError::Closed { origin }))
        };
        all.into_values().map(closed).collect()
    }
}

/// Errors that no later attempt mends.
fn is_final(errno: Errno, patience: Patience) -> bool {
    match errno {
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
    }
}
