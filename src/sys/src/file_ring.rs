//! Opening, reading and writing files without waiting for them (io_uring), into and out of
//! memory that processes share.
//!
//! What makes it safe to use: whatever an operation points to (paths, lists of places)
//! belongs to the ring from submission to completion, places are checked to lie in the
//! memory, and both outlive a ring that is dropped with operations under way.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::SharedMemory;

/// A ring whose operations bear tags of the type `T`.
pub struct FileRing<T> {
    ring: IoUring,
    memory: Arc<SharedMemory>,
    /// Operations under way; `user_data` is the place in here.
    under_way: Vec<Option<Operation<T>>>,
    free: Vec<usize>,
}

struct Operation<T> {
    tag: T,
    needs: Needs,
}

/// What the kernel may look at until the operation is done.
#[expect(dead_code, reason = "the kernel reads it")]
enum Needs {
    /// Nothing but the shared memory.
    Nothing,
    Path(Box<(CString, types::OpenHow)>),
    Places(Box<[libc::iovec]>),
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Done<T> {
    /// The tag that it was begun with.
    pub tag: T,
    /// How it ended.
    pub result: Result<Outcome, Errno>,
}

/// What came of an operation.
#[derive(Debug)]
pub enum Outcome {
    /// The file that was opened.
    Opened(OwnedFd),
    /// The bytes that were read or written; the events of a poll.
    Count(u32),
}

impl<T> FileRing<T> {
    /// A ring for `entries` operations at a time, of which at most `workers` keep a kernel
    /// thread waiting, where the kernel lets that be chosen (since 5.15).
    ///
    /// # Errors
    /// io_uring cannot be had, or (`Unsupported`) lacks an operation, which is named.
    pub fn new(entries: u32, workers: u32, memory: Arc<SharedMemory>) -> io::Result<Self> {
        let ring = IoUring::new(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for (name, code) in [
            ("READ", opcode::Read::CODE),
            ("READV", opcode::Readv::CODE),
            ("WRITE", opcode::Write::CODE),
            ("OPENAT2", opcode::OpenAt2::CODE),
            ("POLL_ADD", opcode::PollAdd::CODE),
        ] {
            if !probe.is_supported(code) {
                let why = format!("this kernel's io_uring has no {name}");
                return Err(io::Error::new(io::ErrorKind::Unsupported, why));
            }
        }
        let _ = ring
            .submitter()
            .register_iowq_max_workers(&mut [workers, workers]);
        Ok(Self {
            ring,
            memory,
            under_way: Vec::new(),
            free: Vec::new(),
        })
    }

    /// The memory that it reads into and writes from.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Opens `path`, which begins at the directory `at`, as openat2(2) does.
    ///
    /// # Errors
    /// The ring takes nothing.
    pub fn open(
        &mut self,
        tag: T,
        at: BorrowedFd<'_>,
        path: CString,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> io::Result<()> {
        let how = types::OpenHow::new()
            .flags(u64::from(flags.bits()))
            .resolve(resolve.bits());
        let path = Box::new((path, how));
        let at = types::Fd(at.as_raw_fd());
        let entry = opcode::OpenAt2::new(at, path.0.as_ptr(), &raw const path.1).build();
        self.push(tag, Needs::Path(path), entry)
    }

    /// Reads from `file`, from `offset` on, into `place` of the memory.
    ///
    /// # Errors
    /// The place does not lie in the memory, or the ring takes nothing.
    pub fn read(
        &mut self,
        tag: T,
        file: BorrowedFd<'_>,
        offset: u64,
        place: Range<usize>,
    ) -> io::Result<()> {
        let (address, len) = self.locate(place)?;
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), address, len).offset(offset);
        self.push(tag, Needs::Nothing, entry.build())
    }

    /// Reads from `file`, from `offset` on, into one place of the memory after the other.
    ///
    /// # Errors
    /// As [`FileRing::read`].
    pub fn read_places(
        &mut self,
        tag: T,
        file: BorrowedFd<'_>,
        offset: u64,
        places: impl Iterator<Item = Range<usize>>,
    ) -> io::Result<()> {
        let places = places.map(|place| {
            let (address, len) = self.locate(place)?;
            Ok(libc::iovec {
                iov_base: address.cast(),
                iov_len: len as usize,
            })
        });
        let places = places.collect::<io::Result<Box<[_]>>>()?;
        let count = u32::try_from(places.len()).map_err(io::Error::other)?;
        let file = types::Fd(file.as_raw_fd());
        let entry = opcode::Readv::new(file, places.as_ptr(), count).offset(offset);
        self.push(tag, Needs::Places(places), entry.build())
    }

    /// Writes `place` of the memory into `file`, from `offset` on.
    ///
    /// # Errors
    /// As [`FileRing::read`].
    pub fn write(
        &mut self,
        tag: T,
        file: BorrowedFd<'_>,
        offset: u64,
        place: Range<usize>,
    ) -> io::Result<()> {
        let (address, len) = self.locate(place)?;
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), address, len).offset(offset);
        self.push(tag, Needs::Nothing, entry.build())
    }

    /// Ends as soon as something can be read from `file`.
    ///
    /// # Errors
    /// The ring takes nothing.
    pub fn poll(&mut self, tag: T, file: BorrowedFd<'_>) -> io::Result<()> {
        let events = u32::from(rustix::event::PollFlags::IN.bits());
        let entry = opcode::PollAdd::new(types::Fd(file.as_raw_fd()), events).build();
        self.push(tag, Needs::Nothing, entry)
    }

    /// Begins what was asked for, waits until something has ended, unless a signal comes
    /// before, and collects what has.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn turn(&mut self, done: &mut Vec<Done<T>>) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        }
        for entry in self.ring.completion() {
            let at = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(operation) = self.under_way.get_mut(at).and_then(Option::take) else {
                continue;
            };
            self.free.push(at);
            let result = match (u32::try_from(entry.result()), operation.needs) {
                (Err(_), _) => Err(Errno::from_raw_os_error(-entry.result())),
                (Ok(_), Needs::Path(_)) => {
                    // SAFETY: the kernel has just opened this descriptor for us.
                    let file = unsafe { OwnedFd::from_raw_fd(entry.result()) };
                    Ok(Outcome::Opened(file))
                }
                (Ok(count), _) => Ok(Outcome::Count(count)),
            };
            let tag = operation.tag;
            done.push(Done { tag, result });
        }
        Ok(())
    }

    fn locate(&self, place: Range<usize>) -> io::Result<(*mut u8, u32)> {
        let len = u32::try_from(place.len()).map_err(io::Error::other)?;
        let address = self.memory.address(place);
        let address = address.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok((address.as_ptr(), len))
    }

    fn push(&mut self, tag: T, needs: Needs, entry: squeue::Entry) -> io::Result<()> {
        let at = self.free.pop().unwrap_or_else(|| {
            self.under_way.push(None);
            self.under_way.len() - 1
        });
        self.under_way[at] = Some(Operation { tag, needs });
        let entry = entry.user_data(at as u64);
        // SAFETY: what entries point to is boxed in `under_way` until their completion, or
        // lies in the memory; `drop` leaves both alone while anything is under way. That a
        // descriptor is open when it is looked at is for the kernel to find out.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            if let Err(error) = self.ring.submit() {
                self.under_way[at] = None;
                self.free.push(at);
                return Err(error);
            }
        }
        Ok(())
    }
}

impl<T> fmt::Debug for FileRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let under_way = self.under_way.len() - self.free.len();
        write!(f, "FileRing({under_way} under way)")
    }
}

impl<T> Drop for FileRing<T> {
    fn drop(&mut self) {
        for operation in self.under_way.drain(..).flatten() {
            std::mem::forget(operation);
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    fn ring() -> FileRing<u8> {
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 8192).unwrap();
        let memory = SharedMemory::map(memory.as_fd(), 8192).unwrap();
        FileRing::new(2, 2, Arc::new(memory)).unwrap()
    }

    fn one(ring: &mut FileRing<u8>) -> Done<u8> {
        let mut done = Vec::new();
        while done.is_empty() {
            ring.turn(&mut done).unwrap();
        }
        done.remove(0)
    }

    #[test]
    fn files_are_opened_read_and_written() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), [7; 100]).unwrap();
        let at = rustix::fs::open(directory.path(), OFlags::PATH, rustix::fs::Mode::empty());
        let at = at.unwrap();
        let mut ring = ring();
        let beneath = ResolveFlags::BENEATH;
        ring.open(1, at.as_fd(), c"a".into(), OFlags::RDWR, beneath)
            .unwrap();
        let Done {
            tag: 1,
            result: Ok(Outcome::Opened(file)),
        } = one(&mut ring)
        else {
            panic!("not opened");
        };
        ring.read_places(2, file.as_fd(), 0, [0..60, 4096..4196].into_iter())
            .unwrap();
        let Done {
            tag: 2,
            result: Ok(Outcome::Count(100)),
        } = one(&mut ring)
        else {
            panic!("not read");
        };
        ring.write(3, file.as_fd(), 100, 4096..4136).unwrap();
        assert!(matches!(
            one(&mut ring),
            Done {
                tag: 3,
                result: Ok(Outcome::Count(40))
            }
        ));
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), [7; 140]);
        ring.open(4, at.as_fd(), c"../a".into(), OFlags::RDONLY, beneath)
            .unwrap();
        assert!(matches!(
            one(&mut ring),
            Done {
                tag: 4,
                result: Err(Errno::XDEV)
            }
        ));
    }

    #[test]
    fn places_outside_the_memory_are_refused() {
        let mut ring = ring();
        let file = tempfile::tempfile().unwrap();
        for place in [8191..8193, 8193..8193, usize::MAX - 1..usize::MAX] {
            assert!(
                ring.read(0, file.as_fd(), 0, place.clone()).is_err(),
                "{place:?}"
            );
            assert!(
                ring.write(0, file.as_fd(), 0, place.clone()).is_err(),
                "{place:?}"
            );
            let places = [0..10, place].into_iter();
            assert!(ring.read_places(0, file.as_fd(), 0, places).is_err());
        }
    }

    /// More than the ring has entries.
    #[test]
    fn what_is_under_way_may_be_dropped() {
        let mut ring = ring();
        let (reader, mut writer) = std::io::pipe().unwrap();
        for tag in 0..5 {
            ring.poll(tag, reader.as_fd()).unwrap();
        }
        writer.write_all(b"x").unwrap();
        let _ = one(&mut ring);
        let silent = std::io::pipe().unwrap();
        ring.read(9, silent.0.as_fd(), 0, 0..10).unwrap();
        ring.poll(10, reader.as_fd()).unwrap();
        let _ = one(&mut ring);
        drop(ring);
    }
}
