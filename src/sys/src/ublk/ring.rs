//! The two io_uring rings of the ublk transport, and the shared descriptors. What makes
//! the wrappers safe to use:
//!
//! * [`ControlRing`] owns the buffer of each command, which is the one that the driver
//!   expects with it, from submission to completion; it is given back with the completion
//!   and never before. A ring that is dropped with commands under way leaks their buffers.
//! * [`QueueRing`] submits only commands without buffers: with `USER_COPY` an
//!   I/O command carries a tag and a result, and the wake-up is a poll.
//! * [`Descriptors`] reads a mapping that it owns.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::event::EventfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::abi::{self, Ask, ControlOp, Payload, RawDescriptor};

/// Wakes a thread that waits in its ring.
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// One that wakes nobody yet.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Wake(rustix::event::eventfd(0, flags)?))
    }

    /// Wakes the thread, now or when it next waits.
    pub fn wake(&self) {
        // The ring polls for edges and nobody reads the counter: it would overflow
        // (and then still be readable) only after 2^64 wakes.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// What becomes readable with each wake.
    pub fn file(&self) -> &OwnedFd {
        &self.0
    }

    fn poll<E: From<squeue::Entry>>(&self) -> E {
        let poll_in = u32::from(rustix::event::PollFlags::IN.bits());
        opcode::PollAdd::new(types::Fd(self.0.as_raw_fd()), poll_in)
            .multi(true)
            .build()
            .user_data(WAKE)
            .into()
    }
}

/// `user_data` of the poll for wakes.
const WAKE: u64 = u64::MAX;
/// `user_data` of cancellations, whose own results matter to nobody.
const CANCEL: u64 = u64::MAX - 1;

/// What a [`ControlRing`] reports.
#[derive(Debug)]
pub enum ControlEvent {
    /// Somebody called [`Wake::wake`].
    Woken,
    /// A command is done; its buffer is back.
    Done {
        /// What [`ControlRing::start`] returned.
        token: u64,
        /// The driver's answer; negative: an errno.
        result: i32,
        /// The command's buffer.
        payload: Payload,
    },
}

/// A ring for control commands. They are always handed to a kernel thread, so
/// that submitting never blocks, however long the command takes.
pub struct ControlRing {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    in_flight: HashMap<u64, Payload>,
    next: u64,
}

impl ControlRing {
    /// A ring that `wake` interrupts.
    ///
    /// # Errors
    /// io_uring cannot be had.
    pub fn new(wake: &Wake) -> io::Result<Self> {
        let ring = IoUring::<squeue::Entry128>::builder().build(32)?;
        let mut ring = ControlRing {
            ring,
            in_flight: HashMap::new(),
            next: 0,
        };
        ring.push(&wake.poll())?;
        Ok(ring)
    }

    fn push(&mut self, entry: &squeue::Entry128) -> io::Result<()> {
        // SAFETY: the only buffer an entry refers to is a payload on the heap,
        // which `in_flight` keeps until its completion and `drop` leaks.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(entry) }
                .map_err(|_| io::Error::other("the submission ring stays full"))?;
        }
        Ok(())
    }

    /// Queues a command; returns the token that its completion bears.
    ///
    /// # Errors
    /// The payload is not one of this command's, or the ring takes nothing.
    pub fn start(
        &mut self,
        control: BorrowedFd<'_>,
        op: ControlOp,
        device: u32,
        data: u64,
        mut payload: Payload,
    ) -> io::Result<u64> {
        if !payload.is_for(op) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (number, body) = abi::control_command(op, device, data, &mut payload);
        let token = self.next;
        let entry = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), number)
            .cmd(body)
            .build()
            .user_data(token)
            .flags(squeue::Flags::ASYNC);
        self.next += 1;
        self.in_flight.insert(token, payload);
        if let Err(error) = self.push(&entry) {
            self.in_flight.remove(&token);
            return Err(error);
        }
        Ok(token)
    }

    /// Asks the kernel to interrupt a command; whether it obeys shows in the
    /// command's own completion.
    ///
    /// # Errors
    /// The ring takes nothing.
    pub fn cancel(&mut self, token: u64) -> io::Result<()> {
        let entry = opcode::AsyncCancel::new(token).build().user_data(CANCEL);
        self.push(&entry.into())
    }

    /// Waits for at least one event.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn wait(&mut self, wake: &Wake, events: &mut Vec<ControlEvent>) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if retry(&error) => {}
            Err(error) => return Err(error),
        }
        let mut rearm = false;
        for cqe in self.ring.completion() {
            match cqe.user_data() {
                WAKE => {
                    rearm |= !cqueue::more(cqe.flags());
                    events.push(ControlEvent::Woken);
                }
                CANCEL => {}
                token => {
                    if let Some(payload) = self.in_flight.remove(&token) {
                        events.push(ControlEvent::Done {
                            token,
                            result: cqe.result(),
                            payload,
                        });
                    }
                }
            }
        }
        if rearm {
            self.push(&wake.poll())?;
        }
        Ok(())
    }
}

impl fmt::Debug for ControlRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ControlRing({} in flight)", self.in_flight.len())
    }
}

impl Drop for ControlRing {
    fn drop(&mut self) {
        for (_, payload) in self.in_flight.drain() {
            std::mem::forget(payload);
        }
    }
}

/// What a [`QueueRing`] reports.
#[derive(Debug, Clone, Copy)]
pub enum QueueEvent {
    /// Somebody called [`Wake::wake`].
    Woken,
    /// The driver completed the command of a tag.
    Tag {
        /// As it was handed over.
        slot: u32,
        /// As it was handed over.
        tag: u16,
        /// 0: a request has come; else [`super::IO_RES_ABORT`], or an errno, negative.
        result: i32,
    },
}

/// A ring for I/O commands. It belongs to the thread that made it.
pub struct QueueRing {
    ring: IoUring,
}

impl QueueRing {
    /// A ring that `wake` interrupts.
    ///
    /// # Errors
    /// io_uring cannot be had.
    pub fn new(wake: &Wake) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            // Says in the ring that something has come: see `is_ready`.
            .setup_taskrun_flag()
            .setup_cqsize(4096)
            .build(256)?;
        // Saves a look-up of the ring's descriptor in every system call; kernels
        // before 5.18 have none of it.
        let _ = ring.submitter().register_ring_fd();
        let mut ring = QueueRing { ring };
        ring.push(&wake.poll())?;
        Ok(ring)
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: neither I/O commands nor polls refer to any memory.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(entry) }
                .map_err(|_| io::Error::other("the submission ring stays full"))?;
        }
        Ok(())
    }

    /// Queues the command that hands `tag` to the driver, after answering its
    /// request when there is a result to `commit`: the number of bytes or an errno,
    /// negative. `slot` is the caller's name for the device.
    ///
    /// # Errors
    /// The ring takes nothing.
    pub fn hand_over(
        &mut self,
        cdev: BorrowedFd<'_>,
        slot: u32,
        tag: u16,
        commit: Option<i32>,
    ) -> io::Result<()> {
        let (number, body) = abi::io_command(commit, tag);
        let entry = opcode::UringCmd16::new(types::Fd(cdev.as_raw_fd()), number)
            .cmd(body)
            .build()
            .user_data(u64::from(slot) << 16 | u64::from(tag));
        self.push(&entry)
    }

    /// Whether the next [`hand_over`](Self::hand_over) submits what is queued before it
    /// finds room.
    pub fn is_full(&mut self) -> bool {
        self.ring.submission().is_full()
    }

    /// Whether a [`turn`](Self::turn) may find something without waiting; costs no system
    /// call. It may find nothing: the kernel queues its work first and then says so, and
    /// another turn may have taken it in between.
    pub fn is_ready(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Submits what is queued, waits for at least one event if `sleep`, and
    /// collects what has come.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn turn(
        &mut self,
        wake: &Wake,
        sleep: bool,
        events: &mut Vec<QueueEvent>,
    ) -> io::Result<()> {
        match self.enter(u32::from(sleep)) {
            Ok(_) => {}
            Err(error) if retry(&error) => {}
            Err(error) => return Err(error),
        }
        let mut rearm = false;
        for cqe in self.ring.completion() {
            let data = cqe.user_data();
            if data == WAKE {
                rearm |= !cqueue::more(cqe.flags());
                events.push(QueueEvent::Woken);
                continue;
            }
            let (Ok(slot), Ok(tag)) = (u32::try_from(data >> 16), u16::try_from(data & 0xffff))
            else {
                continue;
            };
            events.push(QueueEvent::Tag {
                slot,
                tag,
                result: cqe.result(),
            });
        }
        if rearm {
            self.push(&wake.poll())?;
        }
        Ok(())
    }

    /// Not `submit_and_wait`: that does not look at what has come if it is not to wait.
    fn enter(&mut self, least: u32) -> io::Result<usize> {
        /// IORING_ENTER_GETEVENTS.
        const GET_EVENTS: u32 = 1;
        let queued = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
        let submitter = self.ring.submitter();
        // SAFETY: there is no argument that could be wrong. What is submitted refers to no
        // memory.
        unsafe { submitter.enter::<libc::sigset_t>(queued, least, GET_EVENTS, None) }
    }
}

impl fmt::Debug for QueueRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QueueRing")
    }
}

/// Interrupted, or the completion ring must be emptied first.
fn retry(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::INTR, Errno::BUSY, Errno::AGAIN]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// The descriptors of a device's queue, written by the driver.
#[derive(Debug)]
pub struct Descriptors {
    base: NonNull<RawDescriptor>,
    bytes: usize,
    depth: u16,
}

// SAFETY: a read-only mapping is as good in one thread as in another.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps the descriptors of queue 0.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn map(cdev: BorrowedFd<'_>, depth: u16) -> io::Result<Self> {
        let bytes = (usize::from(depth) * abi::DESCRIPTOR_SIZE)
            .next_multiple_of(rustix::param::page_size());
        // SAFETY: a new mapping at an address of the kernel's choice touches no
        // memory of ours.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                cdev,
                0,
            )?
        };
        let base = NonNull::new(base.cast())
            .ok_or_else(|| io::Error::other("the descriptors were mapped at address zero"))?;
        Ok(Descriptors { base, bytes, depth })
    }

    /// What the request at `tag` asks for; `None` if the queue has no such tag.
    /// Meaningful between the completion of the tag's command and its commit.
    pub fn get(&self, tag: u16) -> Option<Ask> {
        if tag >= self.depth {
            return None;
        }
        // SAFETY: `tag < depth`, and `depth` descriptors fit the mapping, which
        // lives as long as `self`. Every bit pattern is a descriptor, and the
        // driver, which alone writes here, does so before it completes the
        // tag's command; reading the completion was an acquire.
        let raw = unsafe { self.base.add(usize::from(tag)).read_volatile() };
        Some(Ask::from_raw(raw))
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it exists: `get`
        // copies.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
