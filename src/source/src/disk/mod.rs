//! A tier on local disk, before the sources: verified chunks by their content.
//!
//! ```text
//! submit ─► known here? ─ no ──────────────────────────────► inner sources
//!              │ yes                                              ▲
//!              ▼                                                  │
//!         reader process ─ bytes ─► done ─► verified by the asker │
//!              ├─ error, late: leave the disk alone for a while ──┤
//!              └─ wrong bytes (rejected by the asker): forget ────┘
//!
//! verified ─► copy ─► writer process ─► slot; then, now and then, the index
//! ```
//!
//! A [`DiskCache`] is a [`Source`] in front of another. It holds what its user has
//! verified, and its user verifies what it gives: a byte that changed on disk is
//! fetched again from the sources, and so is what a full or broken disk cannot give.
//! A reader never sees an error of the disk, and never waits for it longer than
//! [`ATTEMPT`].
//!
//! Reading and writing are done by a worker process each (see the crate), so the
//! daemon hangs in neither. The writer owns the directory: it holds its lock, so that
//! two daemons never share one. It has buffers of its own, and what finds none free is
//! not kept.
//!
//! The files have a fixed size: `chunks`, 128 KiB per slot, and `index`
//! ([`table`]). Nothing is synced: what a crash tears does not match its name.
//!
//! Locking: one mutex, for bookkeeping only.

mod asked;
mod health;
mod standing;
mod stored;
mod table;
pub mod worker;

use crate::arena::CHUNK_SLOT;
use crate::{
    Arena, Content, Done, FileName, Filled, Operation, Origin, Patience, Pool, Request, Slot,
    Source, SourceError, StartError, WorkerCommand, WorkerSource,
};
use asked::Asked;
use health::Health;
pub use standing::{DiskCounters, DiskError, DiskStanding};
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use table::{Key, PAGE, Place, RECORD, Table};

/// Bytes of a slot: a chunk.
const SLOT: usize = CHUNK_SLOT;
const CHUNKS: &str = "chunks";
const INDEX: &str = "index";
const LOCK: &str = "lock";
const TAKEN: &str = "another daemon uses this directory as its disk cache";
/// The smallest cache, in bytes.
const SMALLEST: u64 = 16 << 20;

/// How long a read of the disk may take before the sources are asked.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How long a write may take before the disk is left alone.
const WRITE_ATTEMPT: Duration = Duration::from_secs(10);
/// What may be on its way to the disk: chunks, and pages of the index.
const BUFFERS: usize = 64;
/// How often the index is written, and what failed is looked at.
const FLUSH: Duration = Duration::from_secs(1);
/// Pause of a request that finds no memory to be asked elsewhere.
const MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// How long the index may take to be read at start, or written at the end.
const INDEX_PATIENCE: Duration = Duration::from_secs(30);
/// The last daemon's worker may take a moment to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Marks what this tier gave: no member of the sources.
const DISK: usize = usize::MAX;

/// How a disk cache is set up.
#[derive(Debug)]
pub struct DiskOptions {
    /// Its directory, for messages.
    pub name: String,
    /// Bytes that its files may have.
    pub size: u64,
    /// Starts a worker that reads the directory: [`run`](crate::worker::run).
    pub reader: WorkerCommand,
    /// Starts the worker that writes it, with as many slots as [`disk_slots`] says:
    /// [`run`](crate::disk_worker::run).
    pub writer: WorkerCommand,
}

/// How many slots a cache of `size` bytes has.
pub fn disk_slots(size: u64) -> usize {
    let room = size.saturating_sub(2 * PAGE as u64);
    usize::try_from(room / (SLOT + RECORD) as u64).unwrap_or(usize::MAX)
}

/// A tier on local disk in front of sources.
pub struct DiskCache {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    size: u64,
    inner: Arc<dyn Source>,
    arena: Arc<Arena>,
    buffers: Arc<Arena>,
    reader_command: WorkerCommand,
    /// There when the index has been read.
    reader: OnceLock<WorkerSource>,
    writer: WorkerSource,
    state: Mutex<State>,
    /// Signalled when a request finds no memory, when a page of the index was written,
    /// and at the end.
    changed: Condvar,
    counters: DiskCounters,
    me: Weak<Self>,
}

struct State {
    table: Table,
    /// The index was read.
    ready: bool,
    /// Why it cannot be.
    trouble: Option<String>,
    reading: Health,
    writing: Health,
    /// Pages of the index on their way to the disk.
    flushing: usize,
    /// Requests that are to be asked elsewhere and found no memory for it.
    homeless: Vec<Asked>,
    closed: bool,
}

impl DiskCache {
    /// Puts a cache in `options`' directory before `inner`, whose requests' memory is
    /// in `arena`. Whatever is wrong with the directory, other than that it is
    /// another's, is no error: the cache tries again and says so.
    pub fn start(
        inner: Arc<dyn Source>,
        arena: Arc<Arena>,
        options: &DiskOptions,
    ) -> Result<Self, DiskError> {
        if options.size < SMALLEST {
            return Err(DiskError::Small(options.size));
        }
        let slots = disk_slots(options.size);
        let setup = |error: &dyn fmt::Display| DiskError::Setup(error.to_string());
        let buffers = Arc::new(Arena::new(BUFFERS, BUFFERS).map_err(|error| setup(&error))?);
        let name = format!("disk cache {}", options.name);
        let command = options.writer.clone();
        let writer = WorkerSource::start(&name, command, Arc::clone(&buffers))?;
        let shared = Arc::new_cyclic(|me| Shared {
            name,
            size: options.size,
            inner,
            arena,
            buffers,
            reader_command: options.reader.clone(),
            reader: OnceLock::new(),
            writer,
            state: Mutex::new(State {
                table: Table::new(slots),
                ready: false,
                trouble: None,
                reading: Health::new(),
                writing: Health::new(),
                flushing: 0,
                homeless: Vec::new(),
                closed: false,
            }),
            changed: Condvar::new(),
            counters: DiskCounters::default(),
            me: Weak::clone(me),
        });
        let kept = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("disk-cache".to_owned())
            .spawn(move || kept.keep())
            .map_err(|error| setup(&error))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Waits until it is known that the directory is ours, or cannot be used.
    ///
    /// # Errors
    /// Another daemon has it.
    pub fn claim(&self) -> Result<(), DiskError> {
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.shared.writer.wait_ready(left) {
                Err(StartError::Worker { reason, .. }) if reason.contains(TAKEN) => {
                    if left.is_zero() {
                        return Err(DiskError::Taken(reason));
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                // The thread tells, and tries again.
                _ => return Ok(()),
            }
        }
    }

    /// What it has done so far.
    pub fn counters(&self) -> &DiskCounters {
        &self.shared.counters
    }

    /// How it stands.
    pub fn standing(&self) -> DiskStanding {
        let now = Instant::now();
        let state = self.shared.lock();
        let off = |what: &str, health: &Health| {
            let (why, left) = health.trouble(now)?;
            Some(format!(
                "{what}: {why}; tried again in {} s",
                left.as_secs()
            ))
        };
        let trouble = off("not read", &state.reading);
        let trouble = trouble.or_else(|| off("not written to", &state.writing));
        let words = match (&state.trouble, state.ready, trouble) {
            (_, true, None) => "in use".to_owned(),
            (_, true, Some(trouble)) => trouble,
            (None, false, _) => "reading its index".to_owned(),
            (Some(trouble), false, _) => format!("not used: {trouble}; tried again"),
        };
        DiskStanding {
            name: self.shared.name.clone(),
            in_use: words == "in use",
            state: words,
            size: self.shared.size,
            used: state.table.len() as u64 * SLOT as u64,
            evicted: state.table.evicted(),
            saved: state.ready && !state.table.is_dirty() && state.flushing == 0,
        }
    }

    /// Has the index written, and waits for that: what is here now is known after a
    /// restart.
    pub fn save(&self) {
        self.shared.save();
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        self.shared.save();
        let homeless = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.homeless)
        };
        self.shared.changed.notify_all();
        for asked in homeless {
            let origin = self.shared.name.as_str().into();
            (asked.done)(Err(SourceError::Closed { origin }));
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the disk cache's thread panicked");
        }
    }
}

impl fmt::Debug for DiskCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskCache({})", self.shared.name)
    }
}

impl Source for DiskCache {
    fn submit(&self, mut request: Request, done: Done) {
        let shared = &self.shared;
        let (Some(content), Operation::Read { len, .. }) = (request.content, request.operation)
        else {
            return shared.inner.submit(request, done);
        };
        let key = Key::of(&content);
        if !request.rejected.answers.is_empty() {
            let before = request.rejected.answers.len();
            let answers = &mut request.rejected.answers;
            answers.retain(|(origin, _)| origin.member != DISK);
            if answers.len() < before {
                shared.counters.damaged.fetch_add(1, Relaxed);
                shared.lock().table.forget(key);
                tracing::warn!(
                    cache = shared.name,
                    file = %request.file,
                    "what was kept of it has changed on disk; fetching it again"
                );
            }
            return shared.inner.submit(request, done);
        }
        let Some(reader) = shared.reader.get() else {
            return shared.inner.submit(request, done);
        };
        let place = {
            let mut state = shared.lock();
            let found = match state.reading.may(Instant::now()) {
                true => state.table.find(key),
                false => None,
            };
            match found {
                Some(place) if place.len != len => {
                    state.table.release(place);
                    state.table.forget(key);
                    None
                }
                found => found,
            }
        };
        match place {
            Some(place) => shared.read(reader, place, key, request, done),
            None => {
                shared.counters.misses.fetch_add(1, Relaxed);
                shared.inner.submit(request, done);
            }
        }
    }

    fn name(&self) -> &str {
        self.shared.inner.name()
    }

    fn verified(&self, content: Content, bytes: &[u8], origin: &Origin) {
        if origin.member == DISK {
            if self.shared.lock().reading.good() {
                tracing::info!(cache = self.shared.name, "the disk cache is read again");
            }
            return;
        }
        self.shared.keep_content(content, bytes);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bad_read(&self, why: String) {
        self.counters.failed.fetch_add(1, Relaxed);
        let told = self.lock().reading.bad(Instant::now(), why);
        if let Some(why) = told {
            tracing::warn!(
                cache = self.name,
                why,
                "the disk cache cannot be read; going on without it for a while"
            );
        }
    }

    fn bad_write(&self, why: String) {
        self.counters.failed.fetch_add(1, Relaxed);
        let told = self.lock().writing.bad(Instant::now(), why);
        if let Some(why) = told {
            tracing::warn!(
                cache = self.name,
                why,
                "the disk cache cannot be written to; nothing is added to it for a while"
            );
        }
    }

    fn good_write(&self) {
        if self.lock().writing.good() {
            tracing::info!(cache = self.name, "the disk cache is written to again");
        }
    }

    /// Reads from the disk, and asks the sources if that fails.
    fn read(&self, reader: &WorkerSource, place: Place, key: Key, request: Request, done: Done) {
        let (asked, slot) = Asked::new(request, done);
        let operation = Operation::Read {
            offset: place.offset(),
            len: place.len,
            fresh: false,
        };
        let patience = Patience {
            attempt: ATTEMPT.min(asked.patience.attempt),
            ..asked.patience
        };
        let id = asked.id;
        let asked = Arc::new(Mutex::new(Some(asked)));
        let take = |asked: &Mutex<Option<Asked>>| {
            asked.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        let (me, late) = (Weak::clone(&self.me), Arc::clone(&asked));
        let request = Request {
            id,
            late: Some(Box::new(move || {
                let Some(shared) = me.upgrade() else {
                    return;
                };
                shared.bad_read(format!("no answer within {:?}", patience.attempt));
                if let Some(asked) = take(&late) {
                    shared.ask_elsewhere(asked, None);
                }
            })),
            ..Request::new(FileName::new(CHUNKS), operation, slot, patience)
        };
        let me = Weak::clone(&self.me);
        let over = Box::new(move |outcome: Result<Filled, SourceError>| {
            let asked = take(&asked);
            let Some(shared) = me.upgrade() else {
                if let Some(asked) = asked {
                    let origin = "the disk cache".into();
                    (asked.done)(Err(SourceError::Closed { origin }));
                }
                return;
            };
            {
                let mut state = shared.lock();
                state.table.release(place);
                if outcome.as_ref().is_ok_and(|filled| filled.len < place.len) {
                    state.table.forget(key);
                }
            }
            match outcome {
                Ok(mut filled) => match asked {
                    Some(asked) if filled.len == place.len => {
                        shared.counters.hits.fetch_add(1, Relaxed);
                        filled.origin.member = DISK;
                        (asked.done)(Ok(filled));
                    }
                    Some(asked) => shared.ask_elsewhere(asked, Some(filled.slot)),
                    None => Pool::take_back(filled.slot),
                },
                Err(error) => {
                    shared.bad_read(error.to_string());
                    if let Some(asked) = asked {
                        shared.ask_elsewhere(asked, None);
                    }
                }
            }
        });
        reader.submit(request, over);
    }

    /// Asks the sources.
    fn ask_elsewhere(&self, asked: Asked, slot: Option<Slot>) {
        match slot.or_else(|| asked.pool.take_reserved()) {
            Some(slot) => asked.ask(&*self.inner, slot),
            None => {
                let mut state = self.lock();
                if state.closed {
                    drop(state);
                    let origin = self.name.as_str().into();
                    return (asked.done)(Err(SourceError::Closed { origin }));
                }
                state.homeless.push(asked);
                drop(state);
                self.changed.notify_all();
            }
        }
    }

    /// Has bytes written that were verified.
    fn keep_content(&self, content: Content, bytes: &[u8]) {
        let key = Key::of(&content);
        let len = bytes.len();
        let padded = len.next_multiple_of(crate::ALIGNMENT);
        let skip = || {
            self.counters.skipped.fetch_add(1, Relaxed);
        };
        let Some(mut buffer) = self.buffers.chunks().take() else {
            return skip();
        };
        if len == 0 || padded > buffer.size() {
            return;
        }
        let slot = {
            let mut state = self.lock();
            if !state.ready || !state.writing.may(Instant::now()) {
                drop(state);
                return skip();
            }
            match state.table.allocate(key) {
                Some(slot) => slot,
                None => return,
            }
        };
        let (there, rest) = buffer.bytes_mut()[..padded].split_at_mut(len);
        there.copy_from_slice(bytes);
        rest.fill(0);
        let offset = Place { slot, len }.offset();
        let over = move |shared: &Self, wrote: bool| {
            shared.lock().table.written(slot, key, wrote.then_some(len));
            if wrote {
                shared.counters.written.fetch_add(1, Relaxed);
            }
        };
        self.write(CHUNKS, offset, buffer, padded, over);
    }

    /// Writes the first `len` bytes of `buffer`, and tells how that went.
    fn write(
        &self,
        file: &str,
        offset: u64,
        buffer: Slot,
        len: usize,
        over: impl FnOnce(&Self, bool) + Send + 'static,
    ) {
        let patience = Patience {
            attempt: WRITE_ATTEMPT,
            ..Patience::DATA
        };
        let me = Weak::clone(&self.me);
        let late = Box::new(move || {
            if let Some(shared) = me.upgrade() {
                shared.bad_write(format!("no answer within {WRITE_ATTEMPT:?}"));
            }
        });
        let operation = Operation::Write { offset, len };
        let request = Request {
            late: Some(late),
            ..Request::new(FileName::new(file), operation, buffer, patience)
        };
        let me = Weak::clone(&self.me);
        let done = Box::new(move |outcome: Result<Filled, SourceError>| {
            let Some(shared) = me.upgrade() else {
                return;
            };
            let wrote = match outcome {
                Ok(filled) if filled.len == len => {
                    shared.good_write();
                    true
                }
                Ok(filled) => {
                    shared.bad_write(format!("only {} of {len} bytes were written", filled.len));
                    false
                }
                Err(error) => {
                    shared.bad_write(error.to_string());
                    false
                }
            };
            over(&shared, wrote);
        });
        self.writer.submit(request, done);
    }

    /// The cache's thread: reads the index, writes it, and finds memory for those who
    /// have none.
    fn keep(&self) {
        loop {
            let (homeless, ready) = {
                let state = self.lock();
                let pause = match state.homeless.is_empty() {
                    true => FLUSH,
                    false => MEMORY_PAUSE,
                };
                // Not before the first time: the index is to be read at once.
                let pause = match state.ready || state.trouble.is_some() {
                    true => pause,
                    false => MEMORY_PAUSE,
                };
                let closed = |state: &mut State| !state.closed && state.homeless.is_empty();
                let waited = self.changed.wait_timeout_while(state, pause, closed);
                let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
                if state.closed {
                    return;
                }
                (std::mem::take(&mut state.homeless), state.ready)
            };
            let waits = !homeless.is_empty();
            for asked in homeless {
                self.ask_elsewhere(asked, None);
            }
            if waits {
                thread::sleep(MEMORY_PAUSE);
            }
            if ready {
                self.flush();
            } else {
                self.make_ready();
            }
        }
    }
}
