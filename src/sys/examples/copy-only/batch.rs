//! `UBLK_F_BATCH_IO`: commands for a queue instead of a tag. One that goes on and on puts the
//! tags of requests, as many as there are, into a buffer of ours; one takes all answers that
//! are there. Any thread may answer any request.

use super::{Commands, DEPTH, Event};
use io_uring::types::{BufRingEntry, Fixed};
use io_uring::{IoUring, cqueue, opcode, squeue};
use libublk::sys;
use std::io;
use std::mem::transmute;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, Ordering::Release};

/// Buffers for tags, a power of two, and tags in each: the driver gives no more at a time.
const BUFFERS: u16 = 16;
const TAGS: usize = 128;
const GROUP: u16 = 1;
const FETCH: u64 = u64::MAX;
const MULTISHOT: u32 = 1 << 1;

/// What a command says of one tag.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Element {
    tag: u16,
    buffer: u16,
    result: i32,
}

/// The ring of buffers, where the kernel looks for one.
#[repr(C, align(4096))]
struct Ring([[u8; size_of::<BufRingEntry>()]; BUFFERS as usize]);

pub(super) struct Batch {
    queue: u16,
    /// Buffers that the kernel writes tags to. It may until the thread's ring is gone, so
    /// they are never freed.
    buffers: &'static [[AtomicU16; TAGS]; BUFFERS as usize],
    given: *mut Ring,
    tail: u16,
    answers: Vec<Element>,
    /// Answers that the driver is reading, by command, and those that it has read.
    under_way: Vec<Vec<Element>>,
    free: Vec<usize>,
}

/// A command for the queue; `change` sees to what the crate has no names for.
fn command(
    number: u32,
    queue: u16,
    elements: u16,
    size: usize,
    change: impl FnOnce(&mut [u8; 64]),
) -> squeue::Entry {
    let mut body = [0; 16];
    body[0..2].copy_from_slice(&queue.to_ne_bytes());
    body[4..6].copy_from_slice(&elements.to_ne_bytes());
    // 2 or 8.
    body[6] = size.to_le_bytes()[0];
    let entry = opcode::UringCmd16::new(Fixed(0), number).cmd(body).build();
    // SAFETY: an entry is the kernel's `struct io_uring_sqe`, 64 bytes without padding.
    let mut bytes: [u8; 64] = unsafe { transmute(entry) };
    change(&mut bytes);
    // SAFETY: as above; any bytes are an entry.
    unsafe { transmute(bytes) }
}

/// Has the command refer to these elements.
fn refer(bytes: &mut [u8; 64], elements: &[Element]) {
    // `addr` and `len`.
    bytes[16..24].copy_from_slice(&(elements.as_ptr() as u64).to_ne_bytes());
    let len = u32::try_from(size_of_val(elements)).unwrap_or(0);
    bytes[24..28].copy_from_slice(&len.to_ne_bytes());
}

/// Tells the driver that all tags of the queue are there, as it has to know before the
/// device starts.
pub(super) fn prepare(fd: RawFd, queue: u16) -> io::Result<()> {
    let elements = (0..DEPTH).map(|tag| Element {
        tag,
        buffer: 0,
        result: 0,
    });
    let elements: Vec<_> = elements.collect();
    let number = sys::UBLK_U_IO_PREP_IO_CMDS;
    let entry = command(number, queue, DEPTH, size_of::<Element>(), |bytes| {
        refer(bytes, &elements);
    });
    let mut ring = IoUring::new(4)?;
    ring.submitter().register_files(&[fd])?;
    // SAFETY: the elements are there until the command has ended, which is waited for.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|event| event.result()) {
        Some(0) => Ok(()),
        result => Err(io::Error::other(format!("PREP_IO_CMDS: {result:?}"))),
    }
}

impl Batch {
    pub(super) fn new(queue: u16) -> Self {
        let buffers = Box::new([const { [const { AtomicU16::new(0) }; TAGS] }; BUFFERS as usize]);
        let entries = [[0; size_of::<BufRingEntry>()]; BUFFERS as usize];
        Self {
            queue,
            buffers: Box::leak(buffers),
            given: Box::into_raw(Box::new(Ring(entries))),
            tail: 0,
            answers: Vec::new(),
            under_way: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Gives a buffer to the kernel.
    fn give(&mut self, buffer: u16) {
        let entries: *mut BufRingEntry = self.given.cast();
        let at = usize::from(self.tail % BUFFERS);
        // SAFETY: the entry lies in the ring, which is never freed; the kernel reads it only
        // once the tail is past it.
        let entry = unsafe { &mut *entries.add(at) };
        let bytes = &self.buffers[usize::from(buffer)];
        entry.set_addr(bytes.as_ptr() as u64);
        entry.set_len(u32::try_from(size_of_val(bytes)).unwrap_or(0));
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the first entry has been written at least once, and holds the tail, which
        // nobody else writes.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        tail.store(self.tail, Release);
    }

    fn fetch(&self, ring: &mut IoUring) -> io::Result<()> {
        let number = sys::UBLK_U_IO_FETCH_IO_CMDS;
        let entry = command(number, self.queue, 0, size_of::<u16>(), |bytes| {
            bytes[28..32].copy_from_slice(&MULTISHOT.to_ne_bytes());
            bytes[40..42].copy_from_slice(&GROUP.to_ne_bytes());
        });
        let entry = entry.flags(squeue::Flags::BUFFER_SELECT).user_data(FETCH);
        // SAFETY: it refers to buffers that are never freed.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
    }
}

impl Commands for Batch {
    fn begin(&mut self, ring: &mut IoUring) -> io::Result<()> {
        // SAFETY: the memory is never freed.
        unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(self.given as u64, BUFFERS, GROUP, 0)?;
        }
        for buffer in 0..BUFFERS {
            self.give(buffer);
        }
        self.fetch(ring)
    }

    fn came(&mut self, ring: &mut IoUring, event: Event, tags: &mut Vec<u16>) -> io::Result<bool> {
        if event.user_data != FETCH {
            let place = usize::try_from(event.user_data).unwrap_or(usize::MAX);
            let wanted = size_of_val(&*self.under_way[place]);
            if usize::try_from(event.result) != Ok(wanted) {
                if event.result == -rustix::io::Errno::NODEV.raw_os_error() {
                    return Ok(false);
                }
                let got = event.result;
                return Err(io::Error::other(format!(
                    "COMMIT_IO_CMDS: {got} of {wanted}"
                )));
            }
            self.free.push(place);
            return Ok(true);
        }
        if let Some(buffer) = cqueue::buffer_select(event.flags) {
            let count = usize::try_from(event.result).unwrap_or(0) / size_of::<u16>();
            let all = &self.buffers[usize::from(buffer)];
            tags.extend(
                all[..count]
                    .iter()
                    .map(|tag| tag.load(std::sync::atomic::Ordering::Relaxed)),
            );
            self.give(buffer);
        }
        if !cqueue::more(event.flags) {
            // Without a buffer left it ends, and begins anew.
            let short = -rustix::io::Errno::NOBUFS.raw_os_error();
            if event.result < 0 && event.result != short {
                return Ok(false);
            }
            self.fetch(ring)?;
        }
        Ok(true)
    }

    fn served(&mut self, _: &mut IoUring, tag: u16, result: i32) -> io::Result<()> {
        self.answers.push(Element {
            tag,
            buffer: 0,
            result,
        });
        Ok(())
    }

    fn all_served(&mut self, ring: &mut IoUring) -> io::Result<()> {
        if self.answers.is_empty() {
            return Ok(());
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.under_way.push(Vec::new());
            self.under_way.len() - 1
        });
        self.under_way[place].clear();
        std::mem::swap(&mut self.under_way[place], &mut self.answers);
        let elements = &self.under_way[place];
        let count = u16::try_from(elements.len()).map_err(io::Error::other)?;
        let number = sys::UBLK_U_IO_COMMIT_IO_CMDS;
        let entry = command(number, self.queue, count, size_of::<Element>(), |bytes| {
            refer(bytes, elements);
        });
        let entry = entry.user_data(place as u64);
        // SAFETY: the elements stay where they are until the command has ended.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
    }
}
