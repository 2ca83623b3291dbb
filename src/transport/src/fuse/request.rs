//! A read that waits for its bytes on a FUSE connection.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::OutHeader;
use crate::request::{Place, ReadError, Request};

/// Buffers for replies that come in pieces, kept for the next such reply.
#[derive(Default)]
pub(super) struct Pool(Mutex<Vec<Vec<u8>>>);

/// Buffers kept at most.
const POOLED: usize = 8;

impl Pool {
    fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = lock(&self.0).pop().unwrap_or_default();
        // Every byte is overwritten before it is sent (see `finish`), so only
        // growth costs anything.
        buffer.resize(len, 0);
        buffer
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut buffers = lock(&self.0);
        if buffers.len() < POOLED {
            buffers.push(buffer);
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can leave half a change behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a reply. A connection that is gone, or a request that was aborted
/// meanwhile, needs none.
pub(super) fn reply(fd: &OwnedFd, unique: u64, error: Option<Errno>, payload: &[u8]) {
    let error = error.map_or(0, |errno| -errno.raw_os_error());
    send(fd, OutHeader::new(unique, error, payload.len()), payload);
}

pub(super) fn send(fd: &OwnedFd, header: OutHeader, payload: &[u8]) {
    if payload.is_empty() {
        send_parts(fd, header, &[]);
    } else {
        send_parts(fd, header, &[IoSlice::new(payload)]);
    }
}

/// Parts of a payload that are sent from where they lie.
const PARTS: usize = 16;

/// The same with a payload of at most [`PARTS`] parts.
fn send_parts(fd: &OwnedFd, header: OutHeader, payload: &[IoSlice<'_>]) {
    let mut parts = [IoSlice::new(&[]); PARTS + 1];
    parts[0] = IoSlice::new(header.as_bytes());
    parts[1..=payload.len()].copy_from_slice(payload);
    let parts = &parts[..=payload.len()];
    loop {
        match rustix::io::writev(fd, parts) {
            Err(Errno::INTR) => {}
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => return,
            Err(errno) => {
                tracing::error!(?header, %errno, "the kernel refused a FUSE reply");
                return;
            }
        }
    }
}

#[derive(Debug, Default)]
struct Gathered {
    buffer: Option<Vec<u8>>,
    filled: usize,
}

/// A read that waits on a FUSE connection.
///
/// What covers it at once goes to the kernel from where it lies; pieces that come one
/// by one are gathered first. A connection that was removed answers
/// nothing and is not kept open by its requests.
#[derive(Debug)]
pub struct FuseRequest {
    fd: Weak<OwnedFd>,
    pool: Arc<Pool>,
    export: u64,
    unique: u64,
    offset: u64,
    len: usize,
    gathered: Mutex<Gathered>,
    answered: bool,
}

impl FuseRequest {
    pub(super) fn new(
        fd: &Arc<OwnedFd>,
        pool: &Arc<Pool>,
        export: u64,
        unique: u64,
        offset: u64,
        len: usize,
    ) -> Self {
        FuseRequest {
            fd: Arc::downgrade(fd),
            pool: Arc::clone(pool),
            export,
            unique,
            offset,
            len,
            gathered: Mutex::default(),
            answered: false,
        }
    }

    fn answer(&self, error: Option<Errno>, payload: &[u8]) {
        if let Some(fd) = self.fd.upgrade() {
            reply(&fd, self.unique, error, payload);
        }
    }
}

impl Place for FuseRequest {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len()).filter(|end| *end <= self.len);
        let Some(end) = end else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes at {at} do not fit a request of {} bytes",
                    bytes.len(),
                    self.len
                ),
            ));
        };
        let mut gathered = lock(&self.gathered);
        gathered.filled += bytes.len();
        if bytes.len() == self.len {
            drop(gathered);
            self.answer(None, bytes);
        } else {
            let buffer = gathered
                .buffer
                .get_or_insert_with(|| self.pool.take(self.len));
            buffer[at..end].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn fill_from(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if parts.len() > PARTS || len != self.len {
            let mut at = 0;
            for part in parts {
                self.fill(at, part)?;
                at += part.len();
            }
            return Ok(());
        }
        lock(&self.gathered).filled += len;
        if let Some(fd) = self.fd.upgrade() {
            send_parts(&fd, OutHeader::new(self.unique, 0, len), parts);
        }
        Ok(())
    }
}

impl Request for FuseRequest {
    fn finish(mut self, result: Result<(), ReadError>) {
        self.answered = true;
        let Gathered { buffer, filled } = std::mem::take(&mut *lock(&self.gathered));
        let result = result.and_then(|()| ReadError::unless_full(filled, self.len));
        match (result, &buffer) {
            (Ok(()), Some(buffer)) => self.answer(None, buffer),
            // Answered by the piece that covered it.
            (Ok(()), None) => {}
            (Err(error), _) => {
                tracing::warn!(
                    export = self.export,
                    offset = self.offset,
                    len = self.len,
                    %error,
                    "read failed"
                );
                self.answer(Some(Errno::IO), &[]);
            }
        }
        if let Some(buffer) = buffer {
            self.pool.give(buffer);
        }
    }
}

impl Drop for FuseRequest {
    fn drop(&mut self) {
        if !self.answered {
            tracing::warn!(
                export = self.export,
                offset = self.offset,
                len = self.len,
                "read was dropped by its reader"
            );
            self.answer(Some(Errno::IO), &[]);
        }
    }
}
