//! The least that a ublk server with `USER_COPY` can do: no cache, no digest, no
//! device but one, no thread beside its queue's. One turn of its loop is one
//! `io_uring_enter`, which hands over all answers and waits, and one `pwrite` for each
//! request. What the ublk driver allows, to measure `ublk-server` against.
//!
//! ```text
//! copy-only IMAGE [--queues N] [--threads N] [--batch] [--spin MICROSECONDS]
//!           [--ring defer|coop|plain] [--memory heap|shared|huge] [--io-opt BYTES]
//! ```
//!
//! `--threads` has so many serve each queue: with `UBLK_F_PER_IO_DAEMON` (6.16) each of
//! them its share of the tags. `--batch` uses `UBLK_F_BATCH_IO` (7.0): see [`batch`].
//!
//! `--memory shared` has the image in a memfd, as `ublk-server` has its cache, and `huge`
//! has the kernel put that together from huge pages.
//!
//! `--io-opt` is the device's optimal request, a power of two; the kernel reads ahead
//! twice as much. What is not said is as `ublk-server` has it.
//!
//! Prints the block device; ends with standard input.

mod batch;
mod tags;

use std::error::Error;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use batch::Batch;
use io_uring::IoUring;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkFlags, sys};
use rustix::mm::{MapFlags, ProtFlags};
use tags::Tags;

const DEPTH: u16 = 64;
const BATCH: u64 = sys::UBLK_F_BATCH_IO as u64;

#[derive(Debug, Clone)]
struct Options {
    queues: u16,
    threads: u16,
    batch: bool,
    spin: Duration,
    /// Log2 of bytes.
    io_opt: u8,
    ring: String,
    memory: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut path = None;
    let mut options = Options {
        queues: 1,
        threads: 1,
        batch: false,
        spin: Duration::ZERO,
        io_opt: 17,
        ring: "defer".to_owned(),
        memory: "heap".to_owned(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or("an option needs a value");
        match arg.as_str() {
            "--queues" => options.queues = value()?.parse()?,
            "--threads" => options.threads = value()?.parse::<u16>()?.clamp(1, DEPTH),
            "--batch" => options.batch = true,
            "--io-opt" => options.io_opt = log2(value()?.parse()?)?,
            "--spin" => options.spin = Duration::from_micros(value()?.parse()?),
            "--ring" => options.ring = value()?,
            "--memory" => options.memory = value()?,
            _ => path = Some(arg),
        }
    }
    let path = path.ok_or("usage: copy-only IMAGE [OPTIONS]")?;
    let image: Box<[u8]> = std::fs::read(path)?.into();
    let image: &'static [u8] = match options.memory.as_str() {
        "heap" => Box::leak(image),
        kind => shared(&image, kind == "huge")?,
    };
    let size = image.len() as u64;
    let ctrl = UblkCtrlBuilder::default()
        .name("copy-only")
        .id(-1)
        .nr_queues(options.queues)
        .depth(DEPTH)
        .io_buf_bytes(512 << 10)
        .ctrl_flags(u64::from(sys::UBLK_F_USER_COPY) | if options.batch { BATCH } else { 0 })
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()?;
    // The driver tells what it has of what was asked for.
    let (needed, what) = match (options.batch, options.threads) {
        (true, _) => (BATCH, "--batch needs UBLK_F_BATCH_IO (Linux 7.0)"),
        (false, 1) => (0, ""),
        _ => {
            let per_io = u64::from(sys::UBLK_F_PER_IO_DAEMON);
            (per_io, "--threads needs UBLK_F_PER_IO_DAEMON (Linux 6.16)")
        }
    };
    if ctrl.dev_info().flags & needed != needed {
        ctrl.del_dev()?;
        return Err(what.into());
    }
    let io_opt = options.io_opt;
    ctrl.run_target(
        |dev: &mut UblkDev| {
            dev.set_default_params(size);
            // As ublk-server has it.
            let basic = &mut dev.tgt.params.basic;
            basic.attrs = sys::UBLK_ATTR_READ_ONLY;
            basic.logical_bs_shift = 12;
            basic.physical_bs_shift = 12;
            basic.io_opt_shift = io_opt;
            basic.io_min_shift = 12;
            Ok(())
        },
        move |queue, dev| {
            if let Err(error) = serve(queue, dev, image, &options) {
                eprintln!("copy-only: {error}");
            }
        },
        |ctrl: &UblkCtrl| {
            println!("{}", ctrl.get_bdev_path());
            let _ = io::stdout().flush();
            let _ = io::stdin().read_to_end(&mut Vec::new());
            let _ = ctrl.kill_dev();
        },
    )?;
    ctrl.del_dev()?;
    Ok(())
}

/// A copy of the image in shared memory, mapped for good.
fn shared(image: &[u8], huge: bool) -> io::Result<&'static [u8]> {
    let fd = rustix::fs::memfd_create("copy-only", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(image)?;
    // Huge pages need the mapping to begin at a multiple of theirs.
    const HUGE: usize = 2 << 20;
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody unmaps.
    let room = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            image.len() + HUGE,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )?
    };
    let start = room.wrapping_byte_add(room.addr().next_multiple_of(HUGE) - room.addr());
    // SAFETY: it replaces part of the mapping just made, which nobody uses; nobody unmaps
    // or writes it: the file is not given to anybody.
    let memory = unsafe {
        rustix::mm::mmap(
            start,
            image.len(),
            ProtFlags::READ,
            MapFlags::SHARED | MapFlags::POPULATE | MapFlags::FIXED,
            &file,
            0,
        )?
    };
    if huge {
        const MADV_COLLAPSE: i32 = 25;
        // SAFETY: it changes where the pages lie, and none of their bytes.
        let result = unsafe { libc::madvise(memory, image.len(), MADV_COLLAPSE) };
        if result != 0 {
            eprintln!("copy-only: no huge pages: {}", io::Error::last_os_error());
        }
    }
    // SAFETY: as above: `image.len()` bytes, mapped for good, and written by nobody.
    Ok(unsafe { std::slice::from_raw_parts(memory.cast(), image.len()) })
}

/// The mapping of the descriptors. As long as it is there the driver counts the device's
/// file as open, and deleting the device waits.
struct Mapping(*const sys::ublksrv_io_desc, usize);

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody reads it any more.
        let _ = unsafe { rustix::mm::munmap(self.0.cast_mut().cast(), self.1) };
    }
}

fn log2(bytes: u64) -> Result<u8, &'static str> {
    match bytes.is_power_of_two() && (4096..=1 << 30).contains(&bytes) {
        true => Ok(bytes.trailing_zeros().to_le_bytes()[0]),
        false => Err("--io-opt is a power of two from 4096 to 1073741824, in bytes"),
    }
}

/// How requests come from the driver, and answers go to it.
trait Commands {
    /// Hands over the first commands.
    fn begin(&mut self, ring: &mut IoUring) -> io::Result<()>;

    /// Something came: adds the tags of requests to `tags`. False if the device ends.
    fn came(&mut self, ring: &mut IoUring, event: Event, tags: &mut Vec<u16>) -> io::Result<bool>;

    /// A request was served, with so many bytes or an error.
    fn served(&mut self, ring: &mut IoUring, tag: u16, result: i32) -> io::Result<()>;

    /// All requests that had come were served.
    fn all_served(&mut self, ring: &mut IoUring) -> io::Result<()>;
}

/// A completion.
#[derive(Debug, Clone, Copy)]
struct Event {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// Serves one queue, until the device ends.
fn serve(queue: u16, dev: &UblkDev, image: &[u8], options: &Options) -> io::Result<()> {
    let fd = dev.tgt.fds[0];
    if options.batch {
        batch::prepare(fd, queue)?;
    }
    let part = |thread: u16| match options.batch {
        true => serve_by(Batch::new(queue), queue, fd, image, options),
        false => {
            let tags = (thread..DEPTH).step_by(usize::from(options.threads));
            serve_by(Tags::new(queue, tags), queue, fd, image, options)
        }
    };
    let part = &part;
    std::thread::scope(|scope| {
        let others = (1..options.threads).map(|thread| scope.spawn(move || part(thread)));
        let others: Vec<_> = others.collect();
        let mut result = part(0);
        for other in others {
            let failed = || Err(io::Error::other("a thread panicked"));
            result = result.and(other.join().unwrap_or_else(|_| failed()));
        }
        result
    })
}

fn serve_by(
    mut commands: impl Commands,
    queue: u16,
    fd: RawFd,
    image: &[u8],
    options: &Options,
) -> io::Result<()> {
    // SAFETY: libublk keeps the device's file open for as long as its queues are served.
    let cdev = unsafe { BorrowedFd::borrow_raw(fd) };
    let room = usize::from(DEPTH) * size_of::<sys::ublksrv_io_desc>();
    let per_queue = 4096 * size_of::<sys::ublksrv_io_desc>();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let descriptors: *const sys::ublksrv_io_desc = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            room.next_multiple_of(4096),
            ProtFlags::READ,
            MapFlags::SHARED | MapFlags::POPULATE,
            cdev,
            u64::from(queue) * per_queue as u64,
        )?
    }
    .cast();
    let _mapping = Mapping(descriptors, room.next_multiple_of(4096));
    let mut builder = IoUring::builder();
    builder.setup_single_issuer();
    match options.ring.as_str() {
        "defer" => builder.setup_defer_taskrun().setup_taskrun_flag(),
        "coop" => builder.setup_coop_taskrun().setup_taskrun_flag(),
        _ => &mut builder,
    };
    let mut ring: IoUring = builder.build(256)?;
    ring.submitter().register_files(&[fd])?;
    ring.submitter().register_ring_fd().or_else(|error| {
        eprintln!("copy-only: the ring's descriptor is not registered: {error}");
        Ok::<_, io::Error>(())
    })?;
    commands.begin(&mut ring)?;
    let (mut tags, mut events) = (Vec::new(), Vec::new());
    let mut wait = 1;
    loop {
        match ring.submit_and_wait(wait) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        events.extend(ring.completion().map(|event| Event {
            user_data: event.user_data(),
            result: event.result(),
            flags: event.flags(),
        }));
        for event in events.drain(..) {
            if !commands.came(&mut ring, event, &mut tags)? {
                return Ok(());
            }
        }
        wait = 1;
        if tags.is_empty() && !options.spin.is_zero() {
            continue;
        }
        for tag in tags.drain(..) {
            // SAFETY: the tag is one of ours, and its descriptor lies in the mapping.
            let asked = unsafe { descriptors.add(usize::from(tag)).read_volatile() };
            let from = usize::try_from(asked.start_sector).unwrap_or(usize::MAX) * 512;
            let len = asked.nr_sectors as usize * 512;
            let place = u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
                + (u64::from(queue) << sys::UBLK_QID_OFF)
                + (u64::from(tag) << sys::UBLK_TAG_OFF);
            let written = rustix::io::pwrite(cdev, &image[from..from + len], place)?;
            let written = i32::try_from(written).unwrap_or(-5);
            commands.served(&mut ring, tag, written)?;
        }
        commands.all_served(&mut ring)?;
        if !options.spin.is_zero() {
            // Hand over first, then look for a while before sleeping.
            ring.submit_and_wait(0)?;
            let until = Instant::now() + options.spin;
            loop {
                let more = ring.submission().taskrun() || !ring.completion().is_empty();
                if more {
                    wait = 0;
                    break;
                }
                if Instant::now() >= until {
                    break;
                }
                std::hint::spin_loop();
            }
        }
    }
}
