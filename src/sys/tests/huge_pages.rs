//! What the kernel does with huge pages of a memfd, as far as the cache relies on it.
//!
//! Where it makes none they say so and pass; that it has to is known from its version and
//! what it was told.

use accel_sys::{HUGE_PAGE, HugePages, Part, SharedMemory};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};

const SLOT: usize = 128 << 10;

/// Memory of whole pieces, all of it used, as `mappings` of it see it.
struct Memory {
    name: String,
    file: OwnedFd,
    parts: Vec<Part>,
    pages: HugePages,
}

/// `None` where this kernel makes no huge pages.
fn memory(name: &str, pieces: usize) -> Option<Memory> {
    if let Err(error) = HugePages::probe() {
        println!("skipped: no huge pages of shared memory here: {error}");
        return None;
    }
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, (pieces * HUGE_PAGE) as u64).unwrap();
    let (mut parts, pages) = map(&file, pieces);
    for (part, byte) in parts.iter_mut().zip(1..) {
        part.bytes_mut().fill(byte);
    }
    Some(Memory {
        name: name.to_owned(),
        file,
        parts,
        pages,
    })
}

fn map(file: &OwnedFd, pieces: usize) -> (Vec<Part>, HugePages) {
    let memory = SharedMemory::map(file.as_fd(), pieces * HUGE_PAGE).unwrap();
    memory.into_parts(std::iter::repeat_n(SLOT, pieces * HUGE_PAGE / SLOT))
}

impl Memory {
    /// Makes a piece huge, which nobody holds but perhaps the kernel, for a moment.
    fn collapse(&self, piece: usize) {
        let passing = |error: &io::Error| {
            let errno = Errno::from_io_error(error);
            matches!(errno, Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM))
        };
        for _ in 0..1000 {
            match self.pages.collapse(piece) {
                Err(error) if passing(&error) => std::thread::yield_now(),
                result => return result.unwrap(),
            }
        }
        panic!("it stays in ordinary pages");
    }

    /// Bytes that this process has mapped by huge pages, in all mappings.
    fn huge(&self) -> usize {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut ours, mut sum) = (false, 0);
        for line in smaps.lines() {
            if line
                .split_once(' ')
                .is_some_and(|(word, _)| word.contains('-'))
            {
                ours = line.contains(&format!("/memfd:{} ", self.name));
            } else if let Some(size) = line.strip_prefix("ShmemPmdMapped:")
                && ours
            {
                let kib: usize = size.trim().trim_end_matches(" kB").parse().unwrap();
                sum += kib << 10;
            }
        }
        sum
    }

    /// Bytes of memory that the file has.
    fn size(&self) -> usize {
        let stat = rustix::fs::fstat(&self.file).unwrap();
        usize::try_from(stat.st_blocks).unwrap() * 512
    }

    /// Whether a slot has no memory.
    fn is_hole(&self, slot: usize) -> bool {
        let (start, len) = ((slot * SLOT) as u64, SLOT as u64);
        match rustix::fs::seek(&self.file, SeekFrom::Data(start)) {
            Ok(data) => data >= start + len,
            Err(error) => error == Errno::NXIO,
        }
    }

    fn punch(&self, slot: usize) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, hole, (slot * SLOT) as u64, SLOT as u64).unwrap();
    }

    /// Holds the first page of a slot, as a read into it does.
    fn hold(&self, slot: usize) -> Held {
        let (reader, writer) = io::pipe().unwrap();
        let (mut from, flags) = ((slot * SLOT) as u64, SpliceFlags::empty());
        let held = rustix::pipe::splice(&self.file, Some(&mut from), &writer, None, 4096, flags);
        assert_eq!(held.unwrap(), 4096);
        Held {
            reader,
            _writer: writer,
        }
    }

    /// Whether slots, by their numbers, still hold what they held.
    fn is_intact(&self, slots: std::ops::Range<usize>) -> bool {
        let mut ours = self
            .parts
            .iter()
            .zip(1..)
            .skip(slots.start)
            .take(slots.len());
        ours.all(|(part, byte)| part.bytes().iter().all(|&b| b == byte))
    }
}

/// Somebody who holds a page.
struct Held {
    reader: PipeReader,
    _writer: PipeWriter,
}

impl Held {
    /// Lets it go; what is in it.
    fn let_go(mut self) -> [u8; 4096] {
        let mut page = [0; 4096];
        self.reader.read_exact(&mut page).unwrap();
        page
    }
}

#[test]
fn the_kernel_makes_them_unless_told_otherwise() {
    let told = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|word| word.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap_or(0));
    let expected = version >= (6, 1) && told.as_ref().is_ok_and(|told| !told.contains("[deny]"));
    let made = HugePages::probe();
    println!("{release}{told:?}: {made:?}");
    assert_eq!(made.is_ok(), expected);
}

#[test]
fn a_full_piece_becomes_one_and_keeps_its_bytes_wherever_it_is_mapped() {
    let Some(mut memory) = memory("moved", 3) else {
        return;
    };
    let size = memory.size();
    assert_eq!(size, 3 * HUGE_PAGE);
    // As a worker has it.
    let (mut others, _) = map(&memory.file, 3);
    assert!(others[20].bytes() == memory.parts[20].bytes());
    assert_eq!(memory.huge(), 0);
    memory.collapse(1);
    assert_eq!(memory.huge(), HUGE_PAGE);
    assert_eq!(memory.size(), size);
    assert!(memory.is_intact(0..48));
    for (other, part) in others.iter().zip(&memory.parts) {
        assert!(other.bytes() == part.bytes());
    }
    // Both mappings go on being of the same memory, the other by a huge page, too.
    others[20].bytes_mut().fill(99);
    assert!(memory.parts[20].bytes().iter().all(|&byte| byte == 99));
    memory.parts[21].bytes_mut().fill(98);
    assert!(others[21].bytes().iter().all(|&byte| byte == 98));
    assert_eq!(memory.huge(), 2 * HUGE_PAGE);
    // Once more changes nothing.
    memory.collapse(1);
    assert_eq!(memory.size(), size);
}

#[test]
fn what_is_missing_of_a_piece_gets_memory() {
    let Some(memory) = memory("missing", 1) else {
        return;
    };
    memory.punch(3);
    assert!(memory.is_hole(3) && !memory.is_hole(2) && !memory.is_hole(4));
    assert_eq!(memory.size(), HUGE_PAGE - SLOT);
    memory.collapse(0);
    assert_eq!(memory.size(), HUGE_PAGE);
    assert!(memory.is_intact(0..3) && memory.is_intact(4..16));
}

#[test]
fn there_are_no_others_than_whole_pieces() {
    let file = rustix::fs::memfd_create("outside", MemfdFlags::CLOEXEC).unwrap();
    let len = HUGE_PAGE + HUGE_PAGE / 2;
    rustix::fs::ftruncate(&file, len as u64).unwrap();
    let memory = SharedMemory::map(file.as_fd(), len).unwrap();
    let (_parts, pages) = memory.into_parts([len]);
    assert_eq!(pages.pieces(), 1);
    for piece in [1, 2, usize::MAX / HUGE_PAGE, usize::MAX] {
        let error = pages.collapse(piece).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{piece}");
        assert_eq!(
            error.raw_os_error(),
            None,
            "the kernel was asked for {piece}"
        );
    }
}

#[test]
fn a_page_that_somebody_holds_keeps_its_piece_in_ordinary_pages() {
    let Some(memory) = memory("held", 2) else {
        return;
    };
    let held = memory.hold(5);
    for _ in 0..10 {
        let error = memory.pages.collapse(0).unwrap_err();
        let errno = Errno::from_io_error(&error);
        assert!(matches!(errno, Some(Errno::AGAIN | Errno::BUSY)), "{error}");
    }
    memory.collapse(1);
    assert_eq!(memory.huge(), HUGE_PAGE);
    assert_eq!(held.let_go(), [6; 4096]);
    memory.collapse(0);
    assert_eq!(memory.huge(), 2 * HUGE_PAGE);
    assert!(memory.is_intact(0..32));
}

#[test]
fn a_hole_in_ordinary_pages_leaves_them_to_who_holds_them() {
    let Some(memory) = memory("ordinary", 1) else {
        return;
    };
    let held = memory.hold(5);
    memory.punch(5);
    assert!(memory.is_hole(5));
    assert_eq!(held.let_go(), [6; 4096]);
}

#[test]
fn a_hole_takes_a_huge_page_apart_that_nobody_holds() {
    let Some(mut memory) = memory("apart", 1) else {
        return;
    };
    memory.collapse(0);
    memory.punch(5);
    assert!(memory.is_hole(5));
    assert_eq!(memory.size(), HUGE_PAGE - SLOT);
    assert!(memory.is_intact(0..5) && memory.is_intact(6..16));
    assert_eq!(memory.huge(), 0);
    // And it becomes one again.
    memory.parts[5].bytes_mut().fill(6);
    memory.collapse(0);
    assert_eq!(memory.huge(), HUGE_PAGE);
    assert!(memory.is_intact(0..16));
}

/// Whoever holds any page of it: what is written through that would be seen in the slot.
#[test]
fn a_hole_in_a_huge_page_that_somebody_holds_is_zeroed_in_place() {
    let Some(memory) = memory("in-place", 1) else {
        return;
    };
    memory.collapse(0);
    let (same, other) = (memory.hold(5), memory.hold(9));
    memory.punch(5);
    assert!(!memory.is_hole(5));
    assert!(memory.parts[5].bytes().iter().all(|&byte| byte == 0));
    assert_eq!(memory.size(), HUGE_PAGE);
    // It is the page of who holds it.
    assert_eq!(same.let_go(), [0; 4096]);
    memory.punch(5);
    assert!(!memory.is_hole(5), "another slot of the huge page is held");
    assert_eq!(other.let_go(), [10; 4096]);
    memory.punch(5);
    assert!(memory.is_hole(5));
    assert_eq!(memory.size(), HUGE_PAGE - SLOT);
    assert!(memory.is_intact(0..5) && memory.is_intact(6..16));
}
