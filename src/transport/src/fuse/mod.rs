//! Files through FUSE: the transport for kernels without ublk.
//!
//! Every export is a connection of its own, to a file system whose root *is* a
//! regular file: it is mounted on a file, and EROFS is mounted from that (by
//! itself since Linux 6.12, through a loop device before).
//!
//! The protocol is spoken here directly, because a connection outlives the
//! daemon: its file descriptor is opened and mounted by the client
//! ([`mount_file`]), kept by a holder, and given to the next daemon, which must
//! go on without the INIT handshake ([`FuseTransport::adopt`]). So nothing of
//! what INIT settles is remembered: every request can be answered knowing only
//! the export. There are no file handles either: OPEN is answered by ENOSYS,
//! after which the kernel opens without asking.
//!
//! INTERRUPT is ignored. It is sent for every signal, also harmless ones, and a
//! read of the page cache that ends early is an I/O error for whoever waits for
//! the same page.

mod abi;
mod mount;
mod request;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use rustix::event::{EventfdFlags, epoll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

pub use mount::{MountError, mount_file, unmount_file};
pub use request::FuseRequest;

use crate::request::Reader;
use abi::{AttrOut, InHeader, InitIn, InitOut, OutHeader, ReadIn, StatfsOut, op};
use request::{Pool, reply, send};

/// How a [`FuseTransport`] works.
#[derive(Debug, Clone)]
pub struct FuseOptions {
    /// Threads that serve connections; each serves many.
    pub queue_threads: usize,
}

impl Default for FuseOptions {
    fn default() -> Self {
        FuseOptions { queue_threads: 2 }
    }
}

/// An export of a [`FuseTransport`]; not used twice by the same transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FuseId(u64);

impl fmt::Display for FuseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why something could not be done to a FUSE export.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// This kernel has no FUSE.
    #[error("no /dev/fuse: {0} (load the driver with `modprobe fuse`)")]
    Unavailable(#[source] io::Error),
    /// A thread could not be started.
    #[error("starting a FUSE queue thread: {0}")]
    Start(#[source] io::Error),
    /// The descriptor is not a connection.
    #[error("serving a FUSE connection: {0} (is the descriptor an open /dev/fuse?)")]
    Connection(#[source] io::Error),
    /// No such export.
    #[error("FUSE export {0} is not served here")]
    Unknown(FuseId),
    /// What was asked for makes no sense.
    #[error("an export has a multiple of 4096 bytes, not {0}")]
    Size(u64),
    /// A thread of ours is gone.
    #[error("the FUSE queue thread has ended; restart the daemon")]
    Ended,
}

/// Whether this kernel has FUSE.
pub fn probe() -> Result<(), FuseError> {
    match File::options().read(true).write(true).open(mount::DEVICE) {
        Ok(_) => Ok(()),
        Err(error) => Err(FuseError::Unavailable(error)),
    }
}

/// Serves files over FUSE. Dropping it closes its copies of the connections;
/// those that are not kept elsewhere end.
pub struct FuseTransport<R> {
    queues: Vec<Queue<R>>,
    exports: Mutex<HashMap<FuseId, usize>>,
    next: AtomicU64,
}

impl<R> fmt::Debug for FuseTransport<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FuseTransport")
            .field("queue_threads", &self.queues.len())
            .finish_non_exhaustive()
    }
}

impl<R: Reader> FuseTransport<R> {
    /// Starts the threads.
    pub fn start(options: &FuseOptions) -> Result<Self, FuseError> {
        let queues = (0..options.queue_threads.max(1))
            .map(Queue::start)
            .collect::<io::Result<_>>()
            .map_err(FuseError::Start)?;
        Ok(FuseTransport {
            queues,
            exports: Mutex::default(),
            next: AtomicU64::new(0),
        })
    }

    /// Serves a connection that [`mount_file`] made.
    pub fn add(&self, connection: OwnedFd, reader: Arc<R>) -> Result<FuseId, FuseError> {
        self.serve(connection, reader, false)
    }

    /// Serves a connection that another daemon served before, which has ended.
    /// What it had read and not answered is sent again (Linux 6.9; on older
    /// kernels those reads wait until the connection ends).
    pub fn adopt(&self, connection: OwnedFd, reader: Arc<R>) -> Result<FuseId, FuseError> {
        self.serve(connection, reader, true)
    }

    fn serve(&self, fd: OwnedFd, reader: Arc<R>, resend: bool) -> Result<FuseId, FuseError> {
        let size = reader.size();
        if size == 0 || !size.is_multiple_of(4096) {
            return Err(FuseError::Size(size));
        }
        let id = FuseId(self.next.fetch_add(1, Ordering::Relaxed));
        let (index, queue) = self
            .queues
            .iter()
            .enumerate()
            .min_by_key(|(_, queue)| queue.exports.load(Ordering::Relaxed))
            .ok_or(FuseError::Ended)?;
        self.exports().insert(id, index);
        let attached = queue.run(|done| Order::Attach {
            id,
            export: Export {
                fd: Arc::new(fd),
                reader,
                size,
            },
            resend,
            done,
        });
        let result = attached.map_err(|_| FuseError::Ended).and_then(|result| {
            result.map_err(|errno| FuseError::Connection(io::Error::from(errno)))
        });
        if let Err(error) = result {
            self.exports().remove(&id);
            return Err(error);
        }
        Ok(id)
    }

    /// Stops serving an export and closes the connection. Unless a copy of it
    /// is kept elsewhere, the kernel fails what is under way and all later
    /// reads: unmount first.
    pub fn remove(&self, id: FuseId) -> Result<(), FuseError> {
        let index = self.exports().remove(&id).ok_or(FuseError::Unknown(id))?;
        self.queues[index]
            .run(|done| Order::Detach { id, done })
            .map_err(|_| FuseError::Ended)
    }

    /// Whether the kernel still has the connection; it has not after unmounting.
    pub fn is_connected(&self, id: FuseId) -> Result<bool, FuseError> {
        let exports = self.exports();
        let index = *exports.get(&id).ok_or(FuseError::Unknown(id))?;
        drop(exports);
        self.queues[index]
            .run(|done| Order::Ask { id, done })
            .map_err(|_| FuseError::Ended)
    }

    /// Takes no more requests, and waits for at most `bound` until those that were
    /// taken are answered; says whether they are. For handing connections over to
    /// another process: requests that were not taken are its, and a kernel before
    /// 6.9 does not send those again that were. Nothing is served any more after this.
    pub fn hand_over(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let mut idle = true;
        for queue in &self.queues {
            idle &= queue.run(|done| Order::Pause { done }).is_ok();
        }
        for queue in &self.queues {
            while idle && !queue.run(|done| Order::IsIdle { done }).unwrap_or(true) {
                idle = Instant::now() < until;
                thread::sleep(Duration::from_millis(1));
            }
        }
        idle
    }

    fn exports(&self) -> MutexGuard<'_, HashMap<FuseId, usize>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection and who serves it.
struct Export<R> {
    fd: Arc<OwnedFd>,
    reader: Arc<R>,
    size: u64,
}

enum Order<R> {
    Attach {
        id: FuseId,
        export: Export<R>,
        resend: bool,
        done: SyncSender<Result<(), Errno>>,
    },
    Detach {
        id: FuseId,
        done: SyncSender<()>,
    },
    Ask {
        id: FuseId,
        done: SyncSender<bool>,
    },
    Pause {
        done: SyncSender<()>,
    },
    IsIdle {
        done: SyncSender<bool>,
    },
    Stop,
}

/// A queue thread, seen from the others.
struct Queue<R> {
    orders: mpsc::Sender<Order<R>>,
    wake: Arc<OwnedFd>,
    exports: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl<R> Queue<R> {
    fn send(&self, order: Order<R>) {
        // If the thread is gone, whoever waits for the answer sees it.
        let _ = self.orders.send(order);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Has the thread do something between two requests, and waits for it. No
    /// bound is needed: the thread never blocks.
    fn run<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order<R>) -> Result<T, mpsc::RecvError> {
        let (done, answer) = mpsc::sync_channel(1);
        self.send(order(done));
        answer.recv()
    }
}

impl<R: Reader> Queue<R> {
    fn start(index: usize) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(rustix::event::eventfd(0, flags)?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        let exports = Arc::new(AtomicUsize::new(0));
        let (orders, inbox) = mpsc::channel();
        let mut worker = Worker {
            epoll,
            wake: Arc::clone(&wake),
            exports: HashMap::new(),
            count: Arc::clone(&exports),
            pool: Arc::new(Pool::default()),
            buffer: vec![0; abi::REQUEST_BUFFER],
            paused: false,
        };
        let thread = thread::Builder::new()
            .name(format!("fuse-queue-{index}"))
            .spawn(move || {
                if let Err(errno) = worker.run(&inbox) {
                    tracing::error!(%errno, "a FUSE queue thread cannot wait for requests and ends");
                }
            })?;
        Ok(Queue {
            orders,
            wake,
            exports,
            thread: Some(thread),
        })
    }
}

impl<R> Drop for Queue<R> {
    fn drop(&mut self) {
        self.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `data` of the wake-up among the ids.
const WAKE: u64 = u64::MAX;

/// Requests taken from one connection before the others have their turn.
const TURN: usize = 32;

struct Worker<R> {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    exports: HashMap<u64, Export<R>>,
    /// Number of exports, for the others.
    count: Arc<AtomicUsize>,
    pool: Arc<Pool>,
    buffer: Vec<u8>,
    /// Takes no more requests.
    paused: bool,
}

impl<R: Reader> Worker<R> {
    fn run(&mut self, inbox: &Receiver<Order<R>>) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(64);
        loop {
            let buffer = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, buffer, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    WAKE => {
                        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
                        while let Ok(order) = inbox.try_recv() {
                            if !self.obey(order) {
                                return Ok(());
                            }
                        }
                    }
                    id => self.serve(id),
                }
            }
        }
    }

    /// Says whether to go on.
    fn obey(&mut self, order: Order<R>) -> bool {
        match order {
            Order::Attach {
                id,
                export,
                resend,
                done,
            } => {
                let _ = done.send(self.attach(id, export, resend));
            }
            Order::Detach { id, done } => {
                self.forget(id.0);
                let _ = done.send(());
            }
            Order::Ask { id, done } => {
                let _ = done.send(self.exports.contains_key(&id.0));
            }
            Order::Pause { done } => {
                for export in self.exports.values() {
                    let _ = epoll::delete(&self.epoll, &*export.fd);
                }
                self.paused = true;
                let _ = done.send(());
            }
            Order::IsIdle { done } => {
                // Each request that is not answered has one.
                let idle = |export: &Export<R>| Arc::weak_count(&export.fd) == 0;
                let _ = done.send(self.exports.values().all(idle));
            }
            Order::Stop => return false,
        }
        true
    }

    fn attach(&mut self, id: FuseId, export: Export<R>, resend: bool) -> Result<(), Errno> {
        let fd = &*export.fd;
        let flags = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(id.0);
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?;
        if resend {
            send(fd, OutHeader::resend(), &[]);
        }
        self.exports.insert(id.0, export);
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn forget(&mut self, id: u64) {
        if let Some(export) = self.exports.remove(&id) {
            // Copies elsewhere would keep it in the epoll set.
            let _ = epoll::delete(&self.epoll, &*export.fd);
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Takes requests from a connection that has some.
    fn serve(&mut self, id: u64) {
        // Events of a pause's turn may be left.
        if self.paused {
            return;
        }
        for _ in 0..TURN {
            let Some(export) = self.exports.get(&id) else {
                return;
            };
            match rustix::io::read(&*export.fd, &mut self.buffer[..]) {
                Ok(len) => export.request(id, &self.pool, &self.buffer[..len]),
                // Interrupted, or the request was aborted before it was read.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(Errno::AGAIN) => return,
                Err(Errno::NODEV | Errno::CONNABORTED) => {
                    tracing::debug!(export = id, "FUSE export was unmounted");
                    return self.forget(id);
                }
                Err(errno) => {
                    tracing::error!(export = id, %errno, "reading FUSE requests; the export ends");
                    return self.forget(id);
                }
            }
        }
    }
}

impl<R: Reader> Export<R> {
    fn request(&self, id: u64, pool: &Arc<Pool>, bytes: &[u8]) {
        let Ok((header, body)) = InHeader::read_from_prefix(bytes) else {
            tracing::error!(
                export = id,
                len = bytes.len(),
                "the kernel sent half a FUSE header"
            );
            return;
        };
        let unique = header.unique;
        let answer = |payload: &[u8]| reply(&self.fd, unique, None, payload);
        let refuse = |errno| reply(&self.fd, unique, Some(errno), &[]);
        match header.opcode {
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => {}
            op::INIT => match InitIn::read_from_prefix(body) {
                Ok((offer, _)) if offer.major == abi::MAJOR && offer.minor >= abi::MINOR => {
                    answer(InitOut::new(&offer).as_bytes());
                }
                _ => refuse(Errno::PROTO),
            },
            _ if header.node != abi::ROOT => refuse(Errno::STALE),
            op::GETATTR => answer(AttrOut::new(self.size).as_bytes()),
            op::STATFS => answer(StatfsOut::new(self.size).as_bytes()),
            op::RELEASE | op::DESTROY => answer(&[]),
            op::READ => match ReadIn::read_from_prefix(body) {
                Ok((read, _)) => self.read(id, pool, unique, &read),
                Err(_) => refuse(Errno::INVAL),
            },
            // Tells the kernel not to ask again, for each of them.
            _ => refuse(Errno::NOSYS),
        }
    }

    fn read(&self, id: u64, pool: &Arc<Pool>, unique: u64, read: &ReadIn) {
        let left = self.size.saturating_sub(read.offset);
        let len = u64::from(read.size).min(left);
        // At most 32 bits.
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len == 0 {
            return reply(&self.fd, unique, None, &[]);
        }
        let request = FuseRequest::new(&self.fd, pool, id, unique, read.offset, len);
        // Unwinding drops the request, which fails it: one read is lost, not
        // all exports of this thread.
        let read = || self.reader.read(read.offset, len, request);
        if catch_unwind(AssertUnwindSafe(read)).is_err() {
            tracing::error!(export = id, "a reader panicked");
        }
    }
}
