//! Queue threads: from a tag that comes out of the driver to its commit.
//!
//! A thread serves the queues of many devices through one ring. (Kernels before
//! 6.16 want all commands of a queue from one task, so a device stays with its
//! thread.) One turn:
//!
//! 1. take what lies in the mailbox: results to commit, devices to attach;
//! 2. queue a COMMIT_AND_FETCH for each result;
//! 3. with one system call, submit them all and wait for a tag to come out;
//! 4. for each tag that came out, call the reader; of several large requests some by
//!    other threads ([`helpers`](super::helpers)).
//!
//! What a reader has at hand is served inside step 4, and its COMMIT_AND_FETCH queued at
//! once: neither is a [`UblkRequest`] made for it, nor is anything shared with another
//! thread. Otherwise a reader may still finish inside step 4; its result is kept by the
//! thread itself until the next step 2. Both are committed together with those of all
//! other tags that came out with them. A result from another thread lies in the mailbox,
//! and wakes the queue thread only if it waits.
//!
//! While requests follow each other closely the thread looks for the next one before it
//! waits ([`pace`](super::pace)): step 3 is then without the wait, and with it only if
//! nothing came meanwhile.
//!
//! # Invariant
//!
//! A tag is either with the driver (its command is under way or queued), or being served
//! by this thread, or with the reader (exactly one [`UblkRequest`] stands for it), or its
//! result is kept. So a device whose `depth` tags have all been taken back by the driver has no
//! request left, and is forgotten.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, io::IoSlice, thread};

use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::error::{UblkError, Unavailable};
use super::helpers::{Pile, Work};
use super::mailbox::{Done, Mailbox, Own, lock};
use super::pace::{LookedFor, Pace, Polling};
use super::place::{OwnPlace, TagPlace};
use crate::request::{Place, ReadError, Reader, Request};
use accel_sys::ublk::{self as driver, Ask};
use accel_sys::ublk::{Descriptors, QueueEvent, QueueRing};

/// Requests of so many bytes are worth a second thread: copying one takes longer than
/// waking it.
const LARGE: u32 = 256 << 10;

/// Where a device stands with its queue thread.
#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    /// Tags that the driver has not taken back.
    tags: u16,
    /// The driver's answer to a command that it refused.
    refused: Option<Errno>,
    /// The queue thread has forgotten the device.
    detached: bool,
}

/// A device as its queue thread, its requests and the control side share it.
#[derive(Debug)]
pub(super) struct Served {
    pub id: u32,
    cdev: OwnedFd,
    mailbox: Arc<Mailbox>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Served {
    fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.progress));
        self.changed.notify_all();
    }

    /// Why the device cannot work, if so.
    pub fn failure(&self) -> Option<UblkError> {
        let progress = *lock(&self.progress);
        match progress {
            Progress {
                refused: Some(errno),
                ..
            } => Some(UblkError::Queue {
                device: self.id,
                errno,
            }),
            Progress { detached: true, .. } => Some(UblkError::Ended {
                what: "queue thread",
            }),
            _ => None,
        }
    }

    /// Waits until the queue thread has forgotten the device; otherwise says
    /// how many tags are out.
    pub fn wait_detached(&self, bound: Duration) -> Result<(), u16> {
        let until = Instant::now() + bound;
        let mut progress = lock(&self.progress);
        while !progress.detached {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(progress.tags);
            }
            progress = self
                .changed
                .wait_timeout(progress, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

/// A read that waits at a tag of a ublk device.
#[derive(Debug)]
pub struct UblkRequest {
    device: Arc<Served>,
    offset: u64,
    len: u32,
    slot: u32,
    tag: u16,
    filled: AtomicU32,
    finished: bool,
}

impl UblkRequest {
    fn commit(&mut self, result: i32) {
        self.finished = true;
        self.device.mailbox.answer(Done {
            slot: self.slot,
            tag: self.tag,
            result,
        });
    }

    fn place(&self) -> TagPlace<'_> {
        TagPlace {
            cdev: self.device.cdev.as_fd(),
            tag: self.tag,
            len: self.len,
        }
    }

    fn filled(&self, len: usize) {
        // No larger than the request, which is an u32.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.filled.fetch_add(len, Ordering::Relaxed);
    }
}

impl Place for UblkRequest {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.place().fill(at, bytes)?;
        self.filled(bytes.len());
        Ok(())
    }

    fn fill_from(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len = self.place().fill_from(parts)?;
        self.filled(len);
        Ok(())
    }
}

impl Request for UblkRequest {
    fn finish(mut self, result: Result<(), ReadError>) {
        // The request's pages hold whatever was in them before.
        let filled = *self.filled.get_mut();
        let result =
            result.and_then(|()| ReadError::unless_full(filled as usize, self.len as usize));
        let result = answer(self.device.id, self.offset, self.len, result);
        self.commit(result);
    }
}

impl Drop for UblkRequest {
    fn drop(&mut self) {
        if !self.finished {
            tracing::warn!(
                device = self.device.id,
                offset = self.offset,
                len = self.len,
                "read was dropped by its reader"
            );
            self.commit(failure(Errno::IO));
        }
    }
}

/// A request that came out of the driver, with who serves it.
#[derive(Debug)]
pub(super) struct Task<R> {
    reader: Arc<R>,
    request: UblkRequest,
}

impl<R: Reader> Work for Task<R> {
    fn run(self) {
        serve(&*self.reader, self.request);
    }
}

/// Has a request read. Unwinding drops it, which fails it: one read is lost, not all
/// devices of this thread.
fn serve<R: Reader>(reader: &R, request: UblkRequest) {
    let (device, offset, len) = (request.device.id, request.offset, request.len);
    let read = || reader.read(offset, len as usize, request);
    if catch_unwind(AssertUnwindSafe(read)).is_err() {
        tracing::error!(device, offset, len, "a reader panicked");
    }
}

/// What the driver is told of a read.
fn answer(device: u32, offset: u64, len: u32, result: Result<(), ReadError>) -> i32 {
    match result {
        // At most what `max_io_bytes`, an u32 far below i32::MAX, allows.
        Ok(()) => len.cast_signed(),
        Err(error) => {
            tracing::warn!(device, offset, len, %error, "read failed");
            failure(Errno::IO)
        }
    }
}

fn failure(errno: Errno) -> i32 {
    -errno.raw_os_error()
}

enum Order<R> {
    Attach {
        served: Arc<Served>,
        descriptors: Descriptors,
        depth: u16,
        reader: Arc<R>,
    },
    Stop,
}

/// Takes `CAP_SYS_ADMIN` from this thread alone.
///
/// Without `NO_AUTO_PART_SCAN` (7.0) START_DEV looks for partitions, inside the call, if
/// whoever serves the queues has that capability. A daemon that is killed just then
/// cannot finish dying: its call waits for a read that only its successor could answer,
/// and no successor can recover any device before it is dead. A thread without the
/// capability has START_DEV read nothing. All files were opened before; the thread
/// needs it for nothing else.
fn give_up_admin() -> io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    let admin = CapabilitySet::SYS_ADMIN;
    sets.effective.remove(admin);
    sets.permitted.remove(admin);
    sets.inheritable.remove(admin);
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// A queue thread, seen from the others.
#[derive(Debug)]
pub(super) struct Queue<R> {
    mailbox: Arc<Mailbox>,
    orders: Sender<Order<R>>,
    devices: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl<R: Reader> Queue<R> {
    pub fn start(
        index: usize,
        polling: &Polling,
        pile: &Arc<Pile<Task<R>>>,
    ) -> Result<Self, Unavailable> {
        let ring_error = |source| Unavailable::Ring { source };
        let mailbox = Arc::new(Mailbox::new().map_err(ring_error)?);
        let devices = Arc::new(AtomicUsize::new(0));
        let (orders, inbox) = mpsc::channel();
        let (ready, started) = mpsc::sync_channel(1);
        let (its_mailbox, its_devices) = (Arc::clone(&mailbox), Arc::clone(&devices));
        let (polling, pile) = (polling.clone(), Arc::clone(pile));
        let thread = thread::Builder::new()
            .name(format!("ublk-queue-{index}"))
            .spawn(move || match give_up_admin().and_then(|()| QueueRing::new(&its_mailbox.wake)) {
                Ok(ring) => {
                    let _ = ready.send(Ok(()));
                    let mut worker = Worker {
                        mailbox: its_mailbox,
                        ring,
                        slots: Vec::new(),
                        devices: its_devices,
                        pace: polling.pace(),
                        polling,
                        large: Vec::new(),
                        pile,
                        kept: Kept::default(),
                    };
                    if let Err(error) = worker.run(&inbox) {
                        tracing::error!(%error, "a ublk queue thread cannot use its ring and ends");
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })
            .map_err(ring_error)?;
        match started.recv() {
            Ok(Ok(())) => Ok(Queue {
                mailbox,
                orders,
                devices,
                thread: Some(thread),
            }),
            Ok(Err(source)) => Err(ring_error(source)),
            Err(_) => Err(ring_error(io::Error::other("the queue thread ended"))),
        }
    }

    /// Number of devices served.
    pub fn devices(&self) -> usize {
        self.devices.load(Ordering::Relaxed)
    }

    /// Hands all tags of a device to the driver and serves what comes out.
    pub fn attach(
        &self,
        id: u32,
        cdev: OwnedFd,
        depth: u16,
        reader: Arc<R>,
    ) -> io::Result<Arc<Served>> {
        let descriptors = Descriptors::map(cdev.as_fd(), depth)?;
        let served = Arc::new(Served {
            id,
            cdev,
            mailbox: Arc::clone(&self.mailbox),
            progress: Mutex::new(Progress {
                tags: depth,
                ..Progress::default()
            }),
            changed: Condvar::new(),
        });
        let order = Order::Attach {
            served: Arc::clone(&served),
            descriptors,
            depth,
            reader,
        };
        self.devices.fetch_add(1, Ordering::Relaxed);
        if self.orders.send(order).is_err() {
            self.devices.fetch_sub(1, Ordering::Relaxed);
            return Err(io::Error::other("the queue thread has ended"));
        }
        self.mailbox.order();
        Ok(served)
    }
}

impl<R> Drop for Queue<R> {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        self.mailbox.order();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Slot<R> {
    served: Arc<Served>,
    descriptors: Descriptors,
    reader: Arc<R>,
    size: u64,
    /// Tags that the driver has not taken back.
    tags: u16,
}

impl<R> Slot<R> {
    fn cdev(&self) -> BorrowedFd<'_> {
        self.served.cdev.as_fd()
    }
}

/// What the thread keeps for the readers.
struct Kept<R: Reader> {
    kept: R::Kept,
    /// The slot whose reader was the last to have it, and has not settled.
    slot: Option<u32>,
}

impl<R: Reader> Default for Kept<R> {
    fn default() -> Self {
        Kept {
            kept: R::Kept::default(),
            slot: None,
        }
    }
}

impl<R: Reader> Kept<R> {
    /// For the reader of this slot; another's settles first.
    fn of(&mut self, number: u32, slots: &[Option<Slot<R>>]) -> &mut R::Kept {
        if self.slot != Some(number) {
            self.settle(slots);
            self.slot = Some(number);
        }
        &mut self.kept
    }

    fn settle(&mut self, slots: &[Option<Slot<R>>]) {
        let Some(number) = self.slot.take() else {
            return;
        };
        if let Some(Some(slot)) = slots.get(number as usize) {
            slot.reader.settle(&mut self.kept);
        }
    }
}

/// What a queue thread looks for.
struct Next<'a> {
    ring: &'a mut QueueRing,
    mailbox: &'a Mailbox,
    events: &'a mut Vec<QueueEvent>,
}

impl LookedFor for Next<'_> {
    fn seems_there(&mut self) -> bool {
        self.ring.is_ready() || self.mailbox.has_mail()
    }

    fn take(&mut self) -> io::Result<bool> {
        self.ring.turn(&self.mailbox.wake, false, self.events)?;
        Ok(!self.events.is_empty() || self.mailbox.has_mail())
    }
}

/// The queue thread. The ring stands before the slots: dropped in this order,
/// the driver's commands end before the devices' files are closed.
struct Worker<R: Reader> {
    ring: QueueRing,
    slots: Vec<Option<Slot<R>>>,
    mailbox: Arc<Mailbox>,
    devices: Arc<AtomicUsize>,
    pace: Pace,
    polling: Polling,
    /// Large requests that came out with the others.
    large: Vec<Task<R>>,
    pile: Arc<Pile<Task<R>>>,
    kept: Kept<R>,
}

impl<R: Reader> Drop for Worker<R> {
    fn drop(&mut self) {
        for slot in self.slots.iter().flatten() {
            slot.served.update(|progress| progress.detached = true);
        }
    }
}

impl<R: Reader> Worker<R> {
    fn run(&mut self, inbox: &Receiver<Order<R>>) -> io::Result<()> {
        let mut done = Vec::new();
        let mut events = Vec::new();
        Own::begin(&self.mailbox);
        loop {
            Own::take(&mut done);
            let orders = self.mailbox.collect(&mut done);
            for Done { slot, tag, result } in done.drain(..) {
                if let Some(Some(served)) = self.slots.get(slot as usize) {
                    self.ring
                        .hand_over(served.cdev(), slot, tag, Some(result))?;
                }
            }
            if orders {
                while let Ok(order) = inbox.try_recv() {
                    match order {
                        Order::Attach {
                            served,
                            descriptors,
                            depth,
                            reader,
                        } => self.attach(served, descriptors, depth, reader)?,
                        Order::Stop => return Ok(()),
                    }
                }
            }
            if orders {
                self.ring.turn(&self.mailbox.wake, false, &mut events)?;
            } else {
                self.wait(&mut events)?;
            }
            for event in events.drain(..) {
                match event {
                    QueueEvent::Woken => {}
                    QueueEvent::Tag { slot, tag, result } => self.tag(slot, tag, result)?,
                }
            }
            self.kept.settle(&self.slots);
            self.pile.share(&mut self.large);
        }
    }

    /// Hands over what is queued and waits for something to happen, which may be that
    /// there is mail.
    fn wait(&mut self, events: &mut Vec<QueueEvent>) -> io::Result<()> {
        if self.pace.is_off() {
            return self.sleep(events);
        }
        let mut since = None;
        if let Some(window) = self.pace.window() {
            self.ring.turn(&self.mailbox.wake, false, events)?;
            if !events.is_empty() || self.mailbox.has_mail() {
                // There is no pause between requests that one could look into.
                return Ok(());
            }
            since = Some(self.polling.now());
            let mut next = Next {
                ring: &mut self.ring,
                mailbox: &self.mailbox,
                events,
            };
            if self.polling.look(&mut self.pace, window, &mut next)? {
                return Ok(());
            }
        }
        let since = since.unwrap_or_else(|| self.polling.now());
        self.sleep(events)?;
        let waited = self.polling.now().saturating_sub(since);
        self.pace.slept(waited);
        Ok(())
    }

    /// Hands over what is queued and sleeps until something comes, unless there is mail.
    fn sleep(&mut self, events: &mut Vec<QueueEvent>) -> io::Result<()> {
        let sleep = self.mailbox.may_sleep();
        self.ring.turn(&self.mailbox.wake, sleep, events)?;
        if sleep {
            self.mailbox.awake();
        }
        Ok(())
    }

    fn attach(
        &mut self,
        served: Arc<Served>,
        descriptors: Descriptors,
        depth: u16,
        reader: Arc<R>,
    ) -> io::Result<()> {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let number = u32::try_from(index).map_err(io::Error::other)?;
        let slot = self.slots[index].insert(Slot {
            size: reader.size(),
            served,
            descriptors,
            reader,
            tags: depth,
        });
        for tag in 0..depth {
            self.ring
                .hand_over(slot.served.cdev.as_fd(), number, tag, None)?;
        }
        Ok(())
    }

    /// A tag came out of the driver.
    fn tag(&mut self, number: u32, tag: u16, result: i32) -> io::Result<()> {
        if result < 0 {
            self.came_back(number, tag, result);
            return Ok(());
        }
        let Some(Some(slot)) = self.slots.get(number as usize) else {
            return Ok(());
        };
        let Some(ask) = slot.descriptors.get(tag) else {
            tracing::error!(
                device = slot.served.id,
                tag,
                "the ublk driver named a tag that is not there"
            );
            return Ok(());
        };
        let answer = match ask {
            Ask::Read { offset, len } => {
                let within = offset.checked_add(len).is_some_and(|end| end <= slot.size);
                match u32::try_from(len).ok().filter(|_| within) {
                    Some(len) if len >= LARGE => {
                        self.large.push(slot.request(number, tag, offset, len));
                        return Ok(());
                    }
                    Some(len) => {
                        let kept = self.kept.of(number, &self.slots);
                        let Some(result) = slot.read_at_once(tag, offset, len, kept) else {
                            slot.request(number, tag, offset, len).run();
                            return Ok(());
                        };
                        result
                    }
                    None => {
                        tracing::warn!(device = slot.served.id, offset, len, "read beyond the end");
                        failure(Errno::IO)
                    }
                }
            }
            Ask::Flush => 0,
            Ask::Write => failure(Errno::PERM),
            Ask::Other(op) => {
                tracing::debug!(device = slot.served.id, op, "refused an operation");
                failure(Errno::OPNOTSUPP)
            }
        };
        if self.ring.is_full() {
            self.kept.settle(&self.slots);
        }
        self.ring.hand_over(slot.cdev(), number, tag, Some(answer))
    }

    /// The driver has taken a tag back.
    fn came_back(&mut self, number: u32, tag: u16, result: i32) {
        // The slot may go.
        self.kept.settle(&self.slots);
        let Some(entry) = self.slots.get_mut(number as usize) else {
            return;
        };
        let Some(slot) = entry else { return };
        slot.tags -= 1;
        let tags = slot.tags;
        let refused = (result != driver::IO_RES_ABORT).then(|| Errno::from_raw_os_error(-result));
        if let Some(errno) = refused {
            tracing::error!(device = slot.served.id, tag, %errno, "the ublk driver refused an I/O command");
        }
        let served = Arc::clone(&slot.served);
        if tags == 0 {
            *entry = None;
            self.devices.fetch_sub(1, Ordering::Relaxed);
        }
        served.update(|progress| {
            progress.tags = tags;
            progress.refused = progress.refused.or(refused);
            progress.detached = tags == 0;
        });
    }
}

impl<R: Reader> Slot<R> {
    /// The request at a tag, for whoever serves it.
    fn request(&self, number: u32, tag: u16, offset: u64, len: u32) -> Task<R> {
        Task {
            reader: Arc::clone(&self.reader),
            request: UblkRequest {
                device: Arc::clone(&self.served),
                offset,
                len,
                slot: number,
                tag,
                filled: AtomicU32::new(0),
                finished: false,
            },
        }
    }

    /// Serves the request at a tag, if the reader has its bytes at hand: what to answer.
    fn read_at_once(&self, tag: u16, offset: u64, len: u32, kept: &mut R::Kept) -> Option<i32> {
        let cdev = self.cdev();
        let place = OwnPlace::new(TagPlace { cdev, tag, len });
        let read = || self.reader.read_at_once(offset, len as usize, kept, &place);
        let result = match catch_unwind(AssertUnwindSafe(read)) {
            Ok(Ok(false)) => return None,
            // The request's pages hold whatever was in them before.
            Ok(Ok(true)) => ReadError::unless_full(place.copied(), len as usize),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let reason = "a reader panicked".to_owned();
                Err(ReadError { reason })
            }
        };
        Some(answer(self.served.id, offset, len, result))
    }
}
