//! The least that a ublk server with `USER_COPY` can do: no cache, no digest, no
//! device but one, no thread beside its queue's. One turn of its loop is one
//! `io_uring_enter`, which hands over all answers and waits, and one `pwrite` for each
//! request. What the ublk driver allows, to measure `ublk-server` against.
//!
//! ```text
//! copy-only IMAGE [--queues N] [--spin MICROSECONDS] [--ring defer|coop|plain]
//!           [--memory heap|shared|huge]
//! ```
//!
//! `--memory shared` has the image in a memfd, as `ublk-server` has its cache, and `huge`
//! has the kernel put that together from huge pages.
//!
//! Prints the block device; ends with standard input.

use std::error::Error;
use std::io::{self, Read as _, Write as _};

use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkFlags, sys};
use rustix::mm::{MapFlags, ProtFlags};

const DEPTH: u16 = 64;

#[derive(Debug, Clone)]
struct Options {
    queues: u16,
    spin: Duration,
    ring: String,
    memory: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut path = None;
    let mut options = Options {
        queues: 1,
        spin: Duration::ZERO,
        ring: "defer".to_owned(),
        memory: "heap".to_owned(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or("an option needs a value");
        match arg.as_str() {
            "--queues" => options.queues = value()?.parse()?,
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
        .ctrl_flags(u64::from(sys::UBLK_F_USER_COPY))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()?;
    ctrl.run_target(
        |dev: &mut UblkDev| {
            dev.set_default_params(size);
            // As ublk-server has it.
            let basic = &mut dev.tgt.params.basic;
            basic.attrs = sys::UBLK_ATTR_READ_ONLY;
            basic.logical_bs_shift = 12;
            basic.physical_bs_shift = 12;
            basic.io_opt_shift = 17;
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

fn serve(queue: u16, dev: &UblkDev, image: &[u8], options: &Options) -> io::Result<()> {
    let fd = dev.tgt.fds[0];
    // SAFETY: libublk keeps the device's file open for as long as `dev` lives.
    let cdev = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
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
    let push = |ring: &mut IoUring, tag: u16, commit: Option<i32>| {
        let number = match commit {
            None => sys::UBLK_U_IO_FETCH_REQ,
            Some(_) => sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ,
        };
        let mut body = [0; 16];
        body[0..2].copy_from_slice(&queue.to_ne_bytes());
        body[2..4].copy_from_slice(&tag.to_ne_bytes());
        body[4..8].copy_from_slice(&commit.unwrap_or(0).to_ne_bytes());
        let entry = opcode::UringCmd16::new(types::Fixed(0), number)
            .cmd(body)
            .build()
            .user_data(u64::from(tag));
        // SAFETY: with USER_COPY a command refers to no memory.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
    };
    for tag in 0..DEPTH {
        push(&mut ring, tag, None)?;
    }
    let mut tags = Vec::new();
    let mut wait = 1;
    loop {
        match ring.submit_and_wait(wait) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        for event in ring.completion() {
            if event.result() < 0 {
                return Ok(());
            }
            tags.extend(u16::try_from(event.user_data()));
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
            push(&mut ring, tag, Some(i32::try_from(written).unwrap_or(-5)))?;
        }
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
