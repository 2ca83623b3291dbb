//! The worker process: reads files of one directory tree into the arena.
//!
//! Started by [`WorkerSource`](crate::WorkerSource) with the socket as standard
//! input and the arena as standard output. One thread, one ring: opening and
//! reading are io_uring operations, so a slow file holds up nobody else.
//! Listings (rare) get a thread each. The process ends when the socket closes,
//! and dies with the daemon.
//!
//! Every path is opened beneath the directory with `RESOLVE_BENEATH`,
//! `RESOLVE_NO_SYMLINKS` and `RESOLVE_NO_MAGICLINKS`. A bounded number of files
//! stays open. After an error the directory itself is opened anew, by its path:
//! another file system may have been mounted there. A file is read with O_DIRECT where its file system takes it, so
//! that the node does not cache a chunk twice.

mod neighbours;
mod process;

pub use process::part_from_daemon;

use crate::privileges::{READ, WRITE, keep_only};
use crate::wire::{HELLO, MAX_REQUEST, WireReply, WireRequest};
use crate::{ALIGNMENT, Operation, RequestId};
use accel_sys::{Done, FileRing, Outcome, SharedMemory};
use neighbours::Run;
use process::{enter, part};
use rustix::fs::{Advice, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Entries of the ring; more than the daemon ever has in flight.
const RING_ENTRIES: u32 = 256;
/// Files that stay open.
const OPEN_FILES: usize = 256;
/// Kernel threads for operations that block.
const KERNEL_WORKERS: u32 = 64;
/// The directory is not opened more often.
const REOPEN: Duration = Duration::from_secs(1);

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

const FLAGS: OFlags = OFlags::CLOEXEC
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK);
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Why the worker could not work.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct WorkerError {
    what: String,
    source: io::Error,
}

fn submitting(error: io::Error) -> WorkerError {
    failed("cannot submit to io_uring")(error)
}

pub(crate) fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> WorkerError {
    move |error| WorkerError {
        what: what.into(),
        source: error.into(),
    }
}

/// Runs the worker for `directory` until the daemon closes the socket. With a
/// `namespace` (a file such as `/proc/PID/ns/mnt`), the directory is that of this
/// mount namespace, whatever is mounted there later.
pub fn run(directory: &Path, namespace: Option<&Path>) -> Result<(), WorkerError> {
    run_with(directory, namespace, OFlags::RDONLY, |_| Ok(()))
}

/// The same for a directory that is made ready first, and whose files are opened as
/// `access` says.
pub(crate) fn run_with(
    directory: &Path,
    namespace: Option<&Path>,
    access: OFlags,
    prepare: impl FnOnce(&Path) -> Result<(), WorkerError>,
) -> Result<(), WorkerError> {
    part()?;
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(failed("standard input is not the daemon's socket"))?;
    let socket = Arc::new(socket);
    let started = enter(namespace)
        .and_then(|()| {
            // Who converted a layer may own its files, and let nobody else read them.
            let kept = match access == OFlags::RDONLY {
                true => READ,
                false => WRITE,
            };
            keep_only(kept).map_err(failed("cannot drop capabilities"))
        })
        .and_then(|()| prepare(directory))
        .and_then(|()| Worker::start(directory, access, Arc::clone(&socket)));
    let hello = match &started {
        Ok(_) => Ok(0),
        Err(error) => {
            let errno = Errno::from_io_error(&error.source).unwrap_or(Errno::IO);
            Err((errno, error.to_string()))
        }
    };
    let mut worker = match reply(
        &socket,
        &WireReply {
            id: HELLO,
            operations: 0,
            result: hello,
        },
    ) {
        // The daemon has the reason, and says it to whoever asked.
        Ok(()) => match started {
            Ok(worker) => worker,
            Err(_) => return Ok(()),
        },
        Err(error) => return Err(failed("cannot answer the daemon")(error)),
    };
    worker.serve()
}

fn reply(socket: &OwnedFd, reply: &WireReply) -> io::Result<()> {
    loop {
        match rustix::net::send(socket, &reply.encode(), SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

struct OpenFile {
    fd: OwnedFd,
    direct: Cell<bool>,
}

/// One read on its way: open if need be, then read until full or at the end.
struct Job {
    id: u64,
    /// For the log.
    request: RequestId,
    path: Rc<str>,
    /// `path` as the kernel wants it.
    c_path: CString,
    direct: bool,
    fresh: bool,
    file: Option<Rc<OpenFile>>,
    position: usize,
    offset: u64,
    want: usize,
    filled: usize,
    /// Bytes go from the slot into the file.
    write: bool,
    /// It is not read together with its neighbours.
    alone: bool,
    /// It failed, and is repeated with the directory opened anew.
    again: bool,
    /// A read ended here, which is no whole block: the file's end, if another says
    /// the same.
    ended: Option<usize>,
}

impl Job {
    /// What to read: `want` rounded up to whole blocks.
    fn span(&self) -> usize {
        self.want.next_multiple_of(ALIGNMENT)
    }
}

/// What an operation of the ring is for.
#[derive(Debug, Clone, Copy)]
enum Tag {
    /// The socket has something.
    Socket,
    /// The directory is opened anew.
    Root,
    /// A job, at its place.
    Job(usize),
    /// A read for several jobs: the number of its [`Run`].
    Run(usize),
}

struct Worker {
    ring: FileRing<Tag>,
    socket: Arc<OwnedFd>,
    root: Arc<OwnedFd>,
    /// For reading, or for writing too.
    access: OFlags,
    /// Where that is, as the kernel wants it.
    directory: Arc<CString>,
    /// When it was last opened.
    opened: Instant,
    /// What waits for it to be opened anew, while it is.
    parked: Option<Vec<Job>>,
    jobs: Vec<Option<Box<Job>>>,
    free: Vec<usize>,
    /// Places of jobs that are to be read next, together with their neighbours.
    ready: Vec<usize>,
    runs: Vec<Option<Run>>,
    free_runs: Vec<usize>,
    /// Reads and writes sent since the last answer.
    operations: u32,
    files: HashMap<Rc<str>, Rc<OpenFile>>,
    /// Paths in the order in which they were opened.
    order: VecDeque<Rc<str>>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl Worker {
    fn start(directory: &Path, access: OFlags, socket: Arc<OwnedFd>) -> Result<Self, WorkerError> {
        let root = open_directory(directory)
            .map_err(failed(format!("cannot open {}", directory.display())))?;
        let path = std::path::absolute(directory)
            .map_err(failed(format!("cannot find {}", directory.display())))?;
        let path = CString::new(path.into_os_string().into_encoded_bytes())
            .map_err(|error| failed(format!("{}", directory.display()))(io::Error::from(error)))?;
        let _ = rustix::process::chdir("/");
        let memory = rustix::stdio::stdout();
        let size = rustix::fs::fstat(memory)
            .map_err(failed("cannot size the shared memory"))?
            .st_size;
        let size = usize::try_from(size).unwrap_or(0);
        let arena =
            SharedMemory::map(memory, size).map_err(failed("cannot map the shared memory"))?;
        let ring = FileRing::new(RING_ENTRIES, KERNEL_WORKERS, Arc::new(arena)).map_err(failed(
            "io_uring is not available (Linux 5.6 or newer is needed, \
             and sysctl kernel.io_uring_disabled must be 0 or 1)",
        ))?;
        Ok(Self {
            ring,
            socket,
            root: Arc::new(root),
            access,
            directory: Arc::new(path),
            opened: Instant::now(),
            parked: None,
            jobs: Vec::new(),
            free: Vec::new(),
            ready: Vec::new(),
            runs: Vec::new(),
            free_runs: Vec::new(),
            operations: 0,
            files: HashMap::new(),
            order: VecDeque::new(),
        })
    }

    fn serve(&mut self) -> Result<(), WorkerError> {
        self.watch_socket()?;
        let mut ended = Vec::new();
        loop {
            self.send_ready()?;
            self.ring.turn(&mut ended).map_err(submitting)?;
            for Done { tag, result } in ended.drain(..) {
                match tag {
                    Tag::Socket => {
                        if !self.take_requests()? {
                            return Ok(());
                        }
                        self.watch_socket()?;
                    }
                    Tag::Root => self.reopened(result)?,
                    Tag::Job(index) => self.advance(index, result)?,
                    Tag::Run(number) => {
                        let read = match result {
                            Ok(Outcome::Count(read)) => Some(read),
                            _ => None,
                        };
                        self.run_ended(number, read)?;
                    }
                }
            }
        }
    }

    fn watch_socket(&mut self) -> Result<(), WorkerError> {
        let polled = self.ring.poll(Tag::Socket, self.socket.as_fd());
        polled.map_err(submitting)
    }

    /// Takes every waiting request; false when the daemon has closed the socket.
    fn take_requests(&mut self) -> Result<bool, WorkerError> {
        let mut buffer = [0; MAX_REQUEST];
        loop {
            let len = match rustix::net::recv(&*self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Ok(false),
                Ok((len, _)) => len,
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(false),
                Err(error) => return Err(failed("cannot hear the daemon")(error)),
            };
            let Some(request) = WireRequest::decode(&buffer[..len]) else {
                let error = io::Error::from(io::ErrorKind::InvalidData);
                return Err(failed("the daemon sent a malformed request")(error));
            };
            self.begin(request)?;
        }
    }

    fn begin(&mut self, request: WireRequest) -> Result<(), WorkerError> {
        let id = request.id;
        let room = request.room.next_multiple_of(ALIGNMENT);
        let (true, Ok(c_path)) = (
            self.ring.memory().holds(request.position, room),
            CString::new(request.path.as_str()),
        ) else {
            return self.answer(id, Err(Errno::INVAL));
        };
        let (offset, want, fresh, write) = match request.operation {
            Operation::Read { offset, len, fresh } => (offset, len, fresh, false),
            Operation::Write { .. } if self.access != OFlags::RDWR => {
                return self.answer(id, Err(Errno::ROFS));
            }
            Operation::Write { offset, len } => (offset, len, false, true),
            Operation::List => {
                self.list(request);
                return Ok(());
            }
        };
        let path: Rc<str> = request.path.as_str().into();
        if fresh {
            self.forget(&path);
        }
        tracing::debug!(request = %request.request, file = %path, offset, len = want, fresh, "reads");
        let job = Box::new(Job {
            id,
            request: request.request,
            file: self.files.get(&path).cloned(),
            path,
            c_path,
            direct: true,
            fresh,
            position: request.position,
            offset,
            want,
            filled: 0,
            write,
            alone: false,
            again: false,
            ended: None,
        });
        let index = self.place();
        self.issue(index, job)
    }

    /// Sends the next operation of `job`, soon, and keeps it at `index` meanwhile.
    fn issue(&mut self, index: usize, job: Box<Job>) -> Result<(), WorkerError> {
        if job.may_join() {
            self.jobs[index] = Some(job);
            self.ready.push(index);
            return Ok(());
        }
        self.send(index, job)
    }

    /// Sends the next operation of `job` and keeps it at `index` meanwhile.
    fn send(&mut self, index: usize, job: Box<Job>) -> Result<(), WorkerError> {
        let tag = Tag::Job(index);
        let sent = match &job.file {
            None => {
                let direct = match job.direct {
                    true => OFlags::DIRECT,
                    false => OFlags::empty(),
                };
                let flags = FLAGS | self.access | direct;
                let path = job.c_path.clone();
                self.ring.open(tag, self.root.as_fd(), path, flags, RESOLVE)
            }
            Some(file) => {
                self.operations += 1;
                let place = job.position + job.filled..job.position + job.span();
                let (fd, offset) = (file.fd.as_fd(), job.offset + job.filled as u64);
                match job.write {
                    true => self.ring.write(tag, fd, offset, place),
                    false => self.ring.read(tag, fd, offset, place),
                }
            }
        };
        self.jobs[index] = Some(job);
        sent.map_err(submitting)
    }

    /// The operation of the job at `index` has ended.
    fn advance(&mut self, index: usize, result: Result<Outcome, Errno>) -> Result<(), WorkerError> {
        let Some(mut job) = self.jobs.get_mut(index).and_then(Option::take) else {
            return Ok(());
        };
        match (job.file.clone(), result) {
            (_, Err(Errno::INTR | Errno::AGAIN)) => self.issue(index, job),
            (_, Ok(Outcome::Opened(fd))) => match self.keep(&job, fd) {
                Ok(file) => {
                    job.file = Some(file);
                    self.issue(index, job)
                }
                Err(error) => self.end(index, &job, Err(error)),
            },
            (None, Err(Errno::INVAL)) if job.direct => {
                job.direct = false;
                self.issue(index, job)
            }
            (None, Err(error)) => self.fail(index, job, error),
            (Some(file), Err(Errno::INVAL)) if file.direct.get() => {
                file.direct.set(false);
                match rustix::fs::fcntl_setfl(&file.fd, OFlags::empty()) {
                    Ok(()) => self.issue(index, job),
                    Err(error) => self.end(index, &job, Err(error)),
                }
            }
            (Some(_), Err(error)) => {
                // Whatever is wrong with this descriptor (ESTALE), the next
                // attempt opens the file again.
                self.forget(&job.path);
                self.fail(index, job, error)
            }
            (_, Ok(Outcome::Count(read))) => {
                let end = job.filled + read as usize;
                let at_the_end = read == 0 || job.ended == Some(end);
                if end < job.want && !at_the_end {
                    // Reads of network file systems may be cut short anywhere, and
                    // go on only from a whole block.
                    job.filled = end / ALIGNMENT * ALIGNMENT;
                    job.ended = (job.filled < end).then_some(end);
                    return self.issue(index, job);
                }
                let len = end.min(job.want);
                self.end(index, &job, Ok(len))
            }
        }
    }

    /// A job met an error. What is mounted at the directory may be another file
    /// system by now: it is opened anew, and the job tried once more.
    fn fail(&mut self, index: usize, mut job: Box<Job>, error: Errno) -> Result<(), WorkerError> {
        if job.again || (self.parked.is_none() && self.opened.elapsed() < REOPEN) {
            return self.end(index, &job, Err(error));
        }
        self.free.push(index);
        (job.again, job.file, job.filled, job.ended) = (true, None, 0, None);
        job.direct = true;
        if let Some(parked) = &mut self.parked {
            parked.push(*job);
            return Ok(());
        }
        self.parked = Some(vec![*job]);
        let (path, anywhere) = (CString::clone(&self.directory), ResolveFlags::empty());
        self.ring
            .open(Tag::Root, rustix::fs::CWD, path, DIRECTORY, anywhere)
            .map_err(submitting)
    }

    /// The directory was opened anew, or cannot be.
    fn reopened(&mut self, result: Result<Outcome, Errno>) -> Result<(), WorkerError> {
        self.opened = Instant::now();
        if let Ok(Outcome::Opened(root)) = result {
            self.root = Arc::new(root);
            self.files.clear();
            self.order.clear();
        }
        for job in self.parked.take().unwrap_or_default() {
            let index = self.place();
            self.issue(index, Box::new(job))?;
        }
        Ok(())
    }

    /// A place for a job.
    fn place(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        })
    }

    /// Puts a file just opened into the table, unless another job was faster.
    fn keep(&mut self, job: &Job, fd: OwnedFd) -> Result<Rc<OpenFile>, Errno> {
        if !job.fresh
            && let Some(file) = self.files.get(&job.path)
        {
            return Ok(Rc::clone(file));
        }
        let stat = rustix::fs::fstat(&fd)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        // NONBLOCK was for the open alone (of a FIFO). io_uring takes it as a
        // promise that reads never wait: it would begin them on this thread, and
        // wait here where a file system has no such notion, as NFS, or hand back
        // EAGAIN instead of waiting elsewhere.
        let flags = if job.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        rustix::fs::fcntl_setfl(&fd, flags)?;
        if job.fresh {
            // Only a hint: a file system may ignore it.
            let _ = rustix::fs::fadvise(&fd, 0, None, Advice::DontNeed);
        }
        let file = Rc::new(OpenFile {
            fd,
            direct: Cell::new(job.direct),
        });
        self.forget(&job.path);
        self.files.insert(Rc::clone(&job.path), Rc::clone(&file));
        self.order.push_back(Rc::clone(&job.path));
        while self.files.len() > OPEN_FILES {
            match self.order.pop_front() {
                Some(oldest) => self.files.remove(&oldest),
                None => break,
            };
        }
        Ok(file)
    }

    fn forget(&mut self, path: &Rc<str>) {
        if self.files.remove(path).is_some() {
            self.order.retain(|other| other != path);
        }
    }

    fn end(
        &mut self,
        index: usize,
        job: &Job,
        result: Result<usize, Errno>,
    ) -> Result<(), WorkerError> {
        match &result {
            Ok(len) => tracing::debug!(request = %job.request, file = %job.path, len, "has read"),
            Err(error) => {
                tracing::debug!(request = %job.request, file = %job.path, %error, "cannot read");
            }
        }
        self.free.push(index);
        self.answer(job.id, result)
    }

    fn answer(&mut self, id: u64, result: Result<usize, Errno>) -> Result<(), WorkerError> {
        let result = result.map_err(|errno| (errno, String::new()));
        let operations = std::mem::take(&mut self.operations);
        let answer = WireReply {
            id,
            operations,
            result,
        };
        reply(&self.socket, &answer).map_err(failed("cannot answer the daemon"))
    }

    /// Lists a directory on a thread of its own: io_uring cannot.
    fn list(&self, request: WireRequest) {
        let (root, socket) = (Arc::clone(&self.root), Arc::clone(&self.socket));
        let directory = Arc::clone(&self.directory);
        let arena = Arc::clone(self.ring.memory());
        std::thread::spawn(move || {
            let result = list(&root, &request, &arena).or_else(|error| {
                // Another file system may be mounted there by now.
                let root = open_directory(&*directory).map_err(|_| error)?;
                list(&root, &request, &arena)
            });
            let result = result.map_err(|errno| (errno, String::new()));
            let id = request.id;
            let answer = WireReply {
                id,
                operations: 0,
                result,
            };
            if let Err(error) = reply(&socket, &answer) {
                tracing::warn!(%error, "cannot answer the daemon");
            }
        });
    }
}

fn open_directory<P: rustix::path::Arg>(path: P) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, DIRECTORY, Mode::empty())
}

fn list(root: &OwnedFd, request: &WireRequest, arena: &SharedMemory) -> Result<usize, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::openat2(root, &*request.path, flags, Mode::empty(), RESOLVE)?;
    let mut names = Vec::new();
    for entry in Dir::read_from(fd.as_fd())? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && !name.contains(&b'\n') {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    let mut text = Vec::new();
    for name in names {
        if text.len() + name.len() + 1 > request.room {
            break;
        }
        text.extend(name);
        text.push(b'\n');
    }
    // The request owns the slot, and the daemon neither reads nor lends it before the reply.
    if !arena.write(request.position, &text) {
        return Err(Errno::INVAL);
    }
    Ok(text.len())
}
