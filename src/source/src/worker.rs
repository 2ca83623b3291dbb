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

use crate::arena::Mapping;
use crate::privileges::{READ, WRITE, keep_only};
use crate::wire::{HELLO, MAX_REQUEST, WireReply, WireRequest};
use crate::{ALIGNMENT, Operation, RequestId};
use io_uring::{IoUring, opcode, squeue, types};
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
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
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
/// Marks the completion of a read for several jobs; the rest is the number of the [`Run`].
const RUN: u64 = 1 << 62;
/// Marks the completion that says "the socket has something".
const SOCKET: u64 = u64::MAX;
/// Marks that of opening the directory anew.
const ROOT: u64 = u64::MAX - 1;
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
    let result = worker.serve();
    // The kernel may still be using paths and slots of operations in flight:
    // their memory stays until the process is gone.
    std::mem::forget(worker);
    result
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
    /// `path` as the kernel wants it, and how to open it; both must stay where
    /// they are while an open is in flight, which is why jobs are boxed.
    c_path: CString,
    how: types::OpenHow,
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

    /// Sets how the file is to be opened.
    fn open_with(&mut self, access: OFlags, direct: bool) {
        let extra = if direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        self.direct = direct;
        self.how = types::OpenHow::new()
            .flags(u64::from((FLAGS | access | extra).bits()))
            .resolve(RESOLVE.bits());
    }
}

struct Worker {
    ring: IoUring,
    socket: Arc<OwnedFd>,
    root: Arc<OwnedFd>,
    /// For reading, or for writing too.
    access: OFlags,
    /// Where that is, as the kernel wants it, and how to open it: the kernel may
    /// look at both whenever it is opened anew.
    directory: Arc<CString>,
    how: Box<types::OpenHow>,
    /// When it was last opened.
    opened: Instant,
    /// What waits for it to be opened anew, while it is.
    parked: Option<Vec<Job>>,
    arena: Arc<Mapping>,
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
        let arena = Mapping::new(memory, size).map_err(failed("cannot map the shared memory"))?;
        let ring = IoUring::new(RING_ENTRIES).map_err(failed(
            "io_uring is not available (Linux 5.6 or newer is needed, \
             and sysctl kernel.io_uring_disabled must be 0 or 1)",
        ))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(failed("cannot ask what io_uring supports"))?;
        for (name, code) in [
            ("READ", opcode::Read::CODE),
            ("READV", opcode::Readv::CODE),
            ("WRITE", opcode::Write::CODE),
            ("OPENAT2", opcode::OpenAt2::CODE),
            ("POLL_ADD", opcode::PollAdd::CODE),
        ] {
            if !probe.is_supported(code) {
                let error = io::Error::from(io::ErrorKind::Unsupported);
                return Err(failed(format!("this kernel's io_uring has no {name}"))(
                    error,
                ));
            }
        }
        // Since 5.15; without it the kernel's own bounds hold.
        let _ = ring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_WORKERS, KERNEL_WORKERS]);
        Ok(Self {
            ring,
            socket,
            root: Arc::new(root),
            access,
            directory: Arc::new(path),
            how: Box::new(types::OpenHow::new().flags(u64::from(DIRECTORY.bits()))),
            opened: Instant::now(),
            parked: None,
            arena: Arc::new(arena),
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
        loop {
            self.send_ready()?;
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed("cannot submit to io_uring")(error)),
            }
            let done: Vec<_> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (tag, result) in done {
                if tag == SOCKET {
                    if !self.take_requests()? {
                        return Ok(());
                    }
                    self.watch_socket()?;
                } else if tag == ROOT {
                    self.reopened(result)?;
                } else if tag & RUN != 0 {
                    self.run_ended(usize::try_from(tag & !RUN).unwrap_or(usize::MAX), result)?;
                } else {
                    self.advance(usize::try_from(tag).unwrap_or(usize::MAX), result)?;
                }
            }
        }
    }

    fn watch_socket(&mut self) -> Result<(), WorkerError> {
        let fd = types::Fd(self.socket.as_raw_fd());
        let events = rustix::event::PollFlags::IN.bits();
        let entry = opcode::PollAdd::new(fd, u32::from(events)).build();
        self.push(&entry.user_data(SOCKET))
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), WorkerError> {
        // SAFETY: what entries point to outlives their operation: the directory's
        // path and its `OpenHow` in this worker, which is never dropped; paths and
        // `OpenHow` in a boxed job that stays in `jobs` until its completion, and so
        // do the parts of a run in `runs`; slots in the arena's mapping, which is never unmapped while the
        // worker runs, and files in the job's `Rc`.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring
                .submit()
                .map_err(failed("cannot submit to io_uring"))?;
        }
        Ok(())
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
        let (Some(_), Ok(c_path)) = (
            self.arena.at(request.position, room),
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
        let mut job = Box::new(Job {
            id,
            request: request.request,
            file: self.files.get(&path).cloned(),
            path,
            c_path,
            how: types::OpenHow::new(),
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
        job.open_with(self.access, true);
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
        let entry = match &job.file {
            None => opcode::OpenAt2::new(
                types::Fd(self.root.as_raw_fd()),
                job.c_path.as_ptr(),
                &raw const job.how,
            )
            .build(),
            Some(file) => {
                let (at, len) = (job.position + job.filled, job.span() - job.filled);
                let Some(address) = self.arena.at(at, len) else {
                    return self.end(index, &job, Err(Errno::INVAL));
                };
                // A slot is far smaller than 4 GiB.
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                let (fd, offset) = (
                    types::Fd(file.fd.as_raw_fd()),
                    job.offset + job.filled as u64,
                );
                self.operations += 1;
                if job.write {
                    opcode::Write::new(fd, address.as_ptr(), len)
                        .offset(offset)
                        .build()
                } else {
                    opcode::Read::new(fd, address.as_ptr(), len)
                        .offset(offset)
                        .build()
                }
            }
        };
        self.jobs[index] = Some(job);
        self.push(&entry.user_data(index as u64))
    }

    /// The operation of the job at `index` has ended with `result`.
    fn advance(&mut self, index: usize, result: i32) -> Result<(), WorkerError> {
        let Some(mut job) = self.jobs.get_mut(index).and_then(Option::take) else {
            return Ok(());
        };
        let outcome = match u32::try_from(result) {
            Ok(value) => Ok(value),
            Err(_) => Err(Errno::from_raw_os_error(-result)),
        };
        match (job.file.clone(), outcome) {
            (_, Err(Errno::INTR | Errno::AGAIN)) => self.issue(index, job),
            (None, Ok(_)) => {
                // SAFETY: the kernel has just opened this descriptor for us.
                let fd = unsafe { OwnedFd::from_raw_fd(result) };
                match self.keep(&job, fd) {
                    Ok(file) => {
                        job.file = Some(file);
                        self.issue(index, job)
                    }
                    Err(error) => self.end(index, &job, Err(error)),
                }
            }
            (None, Err(Errno::INVAL)) if job.direct => {
                job.open_with(self.access, false);
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
            (Some(_), Ok(read)) => {
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
        job.open_with(self.access, true);
        if let Some(parked) = &mut self.parked {
            parked.push(*job);
            return Ok(());
        }
        self.parked = Some(vec![*job]);
        let at = types::Fd(rustix::fs::CWD.as_raw_fd());
        let entry = opcode::OpenAt2::new(at, self.directory.as_ptr(), &raw const *self.how);
        self.push(&entry.build().user_data(ROOT))
    }

    /// The directory was opened anew, or cannot be.
    fn reopened(&mut self, result: i32) -> Result<(), WorkerError> {
        self.opened = Instant::now();
        if result >= 0 {
            // SAFETY: the kernel has just opened this descriptor for us.
            self.root = Arc::new(unsafe { OwnedFd::from_raw_fd(result) });
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
        let arena = Arc::clone(&self.arena);
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

fn list(root: &OwnedFd, request: &WireRequest, arena: &Mapping) -> Result<usize, Errno> {
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
    let place = arena.at(request.position, text.len()).ok_or(Errno::INVAL)?;
    // SAFETY: the range lies in the mapping; the request owns the slot, and the
    // daemon neither reads nor lends it before the reply.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), place.as_ptr(), text.len()) };
    Ok(text.len())
}
