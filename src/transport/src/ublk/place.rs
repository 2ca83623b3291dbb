//! Where the bytes of a request go: USER_COPY takes them by `pwrite` on the device's character
//! device, at an offset for each tag.

use rustix::io::Errno;
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use crate::request::Place;
use accel_sys::ublk as driver;

/// Where the driver takes the bytes of a tag's request.
#[derive(Debug, Clone, Copy)]
pub(super) struct TagPlace<'a> {
    pub cdev: BorrowedFd<'a>,
    pub tag: u16,
    /// Of the request, in bytes.
    pub len: u32,
}

impl TagPlace<'_> {
    /// Copies `bytes` to offset `at` of the request.
    pub fn fill(self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len());
        if end.is_none_or(|end| end > self.len as usize) {
            return Err(self.misfit(at, bytes.len()));
        }
        let mut offset = driver::data_offset(self.tag) + at as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::io::pwrite(self.cdev, rest, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    rest = &rest[written..];
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Copies parts that follow each other to its beginning: the sum of their lengths, bytes.
    pub fn fill_from(self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if let [part] = parts {
            return self.fill(0, part).map(|()| part.len());
        }
        let len = parts.iter().map(|part| part.len()).sum();
        if len > self.len as usize {
            return Err(self.misfit(0, len));
        }
        let offset = driver::data_offset(self.tag);
        match rustix::io::pwritev(self.cdev, parts, offset) {
            Ok(written) if written == len => {}
            // Cut short: one part after the other.
            Ok(_) | Err(Errno::INTR) => {
                let mut at = 0;
                for part in parts {
                    self.fill(at, part)?;
                    at += part.len();
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(len)
    }

    fn misfit(self, at: usize, len: usize) -> io::Error {
        let own = self.len;
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {at} do not fit a request of {own} bytes"),
        )
    }
}

/// The same for a request that no other thread fills: the queue thread serves it at once.
#[derive(Debug)]
pub(super) struct OwnPlace<'a> {
    place: TagPlace<'a>,
    filled: Cell<usize>,
}

impl<'a> OwnPlace<'a> {
    pub fn new(place: TagPlace<'a>) -> Self {
        Self {
            place,
            filled: Cell::new(0),
        }
    }

    /// How many bytes were copied.
    pub fn copied(&self) -> usize {
        self.filled.get()
    }

    fn filled(&self, len: usize) {
        self.filled.set(self.filled.get().saturating_add(len));
    }
}

impl Place for OwnPlace<'_> {
    fn fill(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.place.fill(at, bytes)?;
        self.filled(bytes.len());
        Ok(())
    }

    fn fill_from(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len = self.place.fill_from(parts)?;
        self.filled(len);
        Ok(())
    }
}
