//! What is asked of a source, and what comes back.

use crate::Slot;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A file of a source: a relative path, with `/` between its components.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileName(Arc<str>);

impl FileName {
    /// Wraps `path`. Workers open it beneath the source's directory and follow
    /// no symlink, so a strange path is an error there, never a way out.
    pub fn new(path: &str) -> Self {
        Self(path.into())
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to do with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read up to `len` bytes (at most the slot) from `offset`. Fewer arrive
    /// only where the file ends. `offset` is a multiple of
    /// [`ALIGNMENT`](crate::ALIGNMENT).
    Read {
        /// From where, in bytes.
        offset: u64,
        /// How many bytes.
        len: usize,
        /// Open the file again and drop what this machine has cached of it:
        /// what it gave before was wrong.
        fresh: bool,
    },
    /// Write the slot's first `len` bytes, a multiple of
    /// [`ALIGNMENT`](crate::ALIGNMENT), at `offset`, which is one too. Only the worker
    /// of a [`DiskCache`](crate::DiskCache) does that.
    Write {
        /// Where to, in bytes.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
    /// Write the names in a directory into the slot, greatest first, each
    /// followed by a newline, as many as fit.
    List,
}

/// How long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// One attempt at one source, from when its worker has it.
    pub attempt: Duration,
    /// The whole request, all attempts at all sources; `None` for ever.
    pub whole: Option<Duration>,
    /// Whether a file that no source has may still appear. If not, `ENOENT` is
    /// an answer.
    pub await_file: bool,
    /// Whether it can be done without: nobody counts it as a failure then.
    pub optional: bool,
}

impl Patience {
    /// For the data of a mounted image: 5 s an attempt, 10 min in all, and a
    /// missing file may come back.
    pub const DATA: Self = Self {
        attempt: Duration::from_secs(5),
        whole: Some(Duration::from_secs(600)),
        await_file: true,
        optional: false,
    };

    /// For an operator who waits for an answer.
    pub const LOOKUP: Self = Self {
        attempt: Duration::from_secs(5),
        whole: Some(Duration::from_secs(20)),
        await_file: false,
        optional: false,
    };

    /// For what makes things faster: a second, and then without it.
    pub const HELP: Self = Self {
        attempt: Duration::from_secs(5),
        whole: Some(Duration::from_secs(1)),
        await_file: false,
        optional: true,
    };

    /// [`LOOKUP`](Self::LOOKUP) with attempts as long as these: all sources can
    /// be asked a few times.
    pub fn lookup(self) -> Self {
        Self {
            attempt: self.attempt,
            whole: Some(self.attempt * 4),
            await_file: false,
            optional: false,
        }
    }
}

/// Names one request in the log, from the kernel's queue to the source and back:
/// which export of this daemon, and which of its requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RequestId(u64);

impl RequestId {
    /// Bits for the number of the request.
    const NUMBER: u32 = 40;

    /// The request `number` of the export `export`; number 0 is for what the daemon
    /// does for the export by itself.
    pub fn new(export: u64, number: u64) -> Self {
        Self((export << Self::NUMBER) | (number & ((1 << Self::NUMBER) - 1)))
    }

    /// Whether the daemon does it by itself, in the background.
    pub fn is_background(self) -> bool {
        self.0.trailing_zeros() >= Self::NUMBER
    }

    pub(crate) fn to_bits(self) -> u64 {
        self.0
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0 & ((1 << Self::NUMBER) - 1);
        write!(f, "{}-{number}", self.0 >> Self::NUMBER)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One request to a source.
pub struct Request {
    /// For the log.
    pub id: RequestId,
    /// Which file, or directory.
    pub file: FileName,
    /// What to do.
    pub operation: Operation,
    /// Where the bytes go. Another slot of the same pool may come back.
    pub slot: Slot,
    /// How long to try.
    pub patience: Patience,
    /// Answers to the same request that were no good.
    pub rejected: Rejected,
    /// Called when the source has not answered within an attempt's time. It may
    /// still answer, and `done` is called in any case.
    pub late: Option<Late>,
    /// What the bytes are, if they have a name by themselves.
    pub content: Option<Content>,
}

/// Bytes by what they are: content that has the same name is the same, wherever it
/// lies. The value is what they are verified against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// A chunk of an image.
    Chunk([u8; 32]),
    /// A page of an index.
    Page([u8; 32]),
}

impl Request {
    /// A first request.
    pub fn new(file: FileName, operation: Operation, slot: Slot, patience: Patience) -> Self {
        Self {
            id: RequestId::default(),
            file,
            operation,
            slot,
            patience,
            rejected: Rejected::default(),
            late: None,
            content: None,
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request({}, {:?})", self.file, self.operation)
    }
}

/// Who gave an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Name of the source.
    pub name: Arc<str>,
    /// Its place among several.
    pub(crate) member: usize,
    /// Whether it had been asked to look again.
    pub(crate) fresh: bool,
}

/// Answers that were no good, and why. A request that carries them is not
/// answered in the same way by the same source again.
#[derive(Debug, Clone, Default)]
pub struct Rejected {
    /// When the first request was made.
    pub(crate) since: Option<Instant>,
    pub(crate) answers: Vec<(Origin, String)>,
}

impl Rejected {
    /// The last answer: who gave it.
    pub(crate) fn last(&self) -> Option<&Origin> {
        self.answers.last().map(|(origin, _)| origin)
    }

    /// Adds an answer: bytes that `problem` is wrong with.
    pub fn add(&mut self, filled: &Filled, problem: String) {
        self.add_origin(filled.origin.clone(), filled.asked, problem);
    }

    pub(crate) fn add_origin(&mut self, origin: Origin, asked: Instant, problem: String) {
        self.since = self.since.or(Some(asked));
        self.answers.push((origin, problem));
    }
}

/// Bytes from a source, unverified.
#[derive(Debug)]
pub struct Filled {
    /// Holds them, from its start.
    pub slot: Slot,
    /// How many bytes are valid.
    pub len: usize,
    /// Who gave them.
    pub origin: Origin,
    /// How long the source took: from when its worker had the request until it answered.
    /// What the request waited for before, and what becomes of the bytes, is not in it.
    pub took: Duration,
    /// Nothing else was asked of the source then: whoever gets this may work on it in the thread
    /// that calls back, which has nothing else to hear, instead of waking another.
    pub alone: bool,
    /// When they were first asked for.
    pub(crate) asked: Instant,
}

impl Filled {
    /// The valid bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.slot.bytes()[..self.len]
    }
}

/// Why a source gave nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// The source answered with an error.
    #[error("{file} in {origin}: {error}")]
    Failed {
        /// Which file.
        file: FileName,
        /// Name of the source.
        origin: Arc<str>,
        /// What the source said.
        error: Errno,
    },
    /// The source did not answer.
    #[error("{file} in {origin}: {reason}")]
    Silent {
        /// Which file.
        file: FileName,
        /// Name of the source.
        origin: Arc<str>,
        /// What is known about why.
        reason: String,
    },
    /// The source cannot be read at all.
    #[error("{origin}: {reason}")]
    Unavailable {
        /// Name of the source.
        origin: Arc<str>,
        /// Why.
        reason: String,
    },
    /// No source has good bytes.
    #[error("{file}: {answers} (asked for {seconds} s)")]
    Exhausted {
        /// Which file.
        file: FileName,
        /// What each source said, by name.
        answers: String,
        /// Time spent.
        seconds: u64,
    },
    /// The source is making what was asked for: it is to be asked again.
    #[error("{file} in {origin}: {reason}")]
    Making {
        /// Which file.
        file: FileName,
        /// Name of the source.
        origin: Arc<str>,
        /// How far it is.
        reason: String,
    },
    /// The source cannot make what was asked for.
    #[error("{file} in {origin}: {reason}")]
    NotMade {
        /// Which file.
        file: FileName,
        /// Name of the source.
        origin: Arc<str>,
        /// Why.
        reason: String,
        /// Whether trying again would not help.
        lasting: bool,
    },
    /// The source was shut down.
    #[error("{origin} was shut down")]
    Closed {
        /// Name of the source.
        origin: Arc<str>,
    },
}

impl SourceError {
    /// Whether the source said that the file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Failed { error, .. } if error.0 == rustix::io::Errno::NOENT)
    }
}

/// An error number that prints as the system's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub rustix::io::Errno);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(self.0).fmt(f)
    }
}

/// Called once with the outcome, from a thread of the source: it must not block.
pub type Done = Box<dyn FnOnce(Result<Filled, SourceError>) + Send>;

/// Called at most once, before [`Done`], from a thread of the source: it must not
/// block.
pub type Late = Box<dyn FnOnce() + Send>;

/// How gladly a source gives a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// As any source.
    Ready,
    /// Only if no other can, and the request has been waiting for so long.
    After(Duration),
    /// Not at all: it need not be asked.
    Never,
}

/// Where bytes come from.
pub trait Source: Send + Sync + 'static {
    /// Starts `request`; never blocks. `done` is called exactly once.
    fn submit(&self, request: Request, done: Done);

    /// What to call this source in messages.
    fn name(&self) -> &str;

    /// How gladly it gives a file. Costs little, never blocks, calls nobody.
    fn readiness(&self, file: &FileName) -> Readiness {
        let _ = file;
        Readiness::Ready
    }

    /// Whether it is making a file and gets on with it: who waits for that waits longer.
    /// Costs little, never blocks, calls nobody.
    fn is_at_work(&self, file: &FileName) -> bool {
        let _ = file;
        false
    }

    /// Bytes that came from `origin` were verified to be `content`. Costs little and
    /// never blocks.
    fn verified(&self, content: Content, bytes: &[u8], origin: &Origin) {
        let _ = (content, bytes, origin);
    }
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn submit(&self, request: Request, done: Done) {
        (**self).submit(request, done);
    }

    fn name(&self) -> &str {
        (**self).name()
    }

    fn readiness(&self, file: &FileName) -> Readiness {
        (**self).readiness(file)
    }

    fn is_at_work(&self, file: &FileName) -> bool {
        (**self).is_at_work(file)
    }

    fn verified(&self, content: Content, bytes: &[u8], origin: &Origin) {
        (**self).verified(content, bytes, origin);
    }
}
