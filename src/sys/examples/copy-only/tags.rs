//! A command for each tag: it waits in the driver until there is a request, and the answer
//! to that is the next.

use super::{Commands, Event};
use io_uring::{IoUring, opcode, types};
use libublk::sys;
use std::io;

pub(super) struct Tags<I> {
    queue: u16,
    tags: I,
}

impl<I: Iterator<Item = u16>> Tags<I> {
    /// These tags of a queue.
    pub(super) fn new(queue: u16, tags: I) -> Self {
        Self { queue, tags }
    }

    fn push(&self, ring: &mut IoUring, tag: u16, commit: Option<i32>) -> io::Result<()> {
        let number = match commit {
            None => sys::UBLK_U_IO_FETCH_REQ,
            Some(_) => sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ,
        };
        let mut body = [0; 16];
        body[0..2].copy_from_slice(&self.queue.to_ne_bytes());
        body[2..4].copy_from_slice(&tag.to_ne_bytes());
        body[4..8].copy_from_slice(&commit.unwrap_or(0).to_ne_bytes());
        let entry = opcode::UringCmd16::new(types::Fixed(0), number)
            .cmd(body)
            .build()
            .user_data(u64::from(tag));
        // SAFETY: with USER_COPY a command refers to no memory.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
    }
}

impl<I: Iterator<Item = u16>> Commands for Tags<I> {
    fn begin(&mut self, ring: &mut IoUring) -> io::Result<()> {
        while let Some(tag) = self.tags.next() {
            self.push(ring, tag, None)?;
        }
        Ok(())
    }

    fn came(&mut self, _: &mut IoUring, event: Event, tags: &mut Vec<u16>) -> io::Result<bool> {
        tags.extend(
            u16::try_from(event.user_data)
                .ok()
                .filter(|_| event.result >= 0),
        );
        Ok(event.result >= 0)
    }

    fn served(&mut self, ring: &mut IoUring, tag: u16, result: i32) -> io::Result<()> {
        self.push(ring, tag, Some(result))
    }

    fn all_served(&mut self, _: &mut IoUring) -> io::Result<()> {
        Ok(())
    }
}
