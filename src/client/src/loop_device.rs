//! Loop devices, for kernels whose EROFS mounts no files.
//!
//! No safe wrapper exists for these ioctls: this is the crate's only unsafe code.
#![allow(unsafe_code)]

use rustix::fs::{FlockOperation, flock};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter};
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// How long a lock of others is waited for.
const LOCKED: Duration = Duration::from_secs(1);

/// `struct loop_config` of `linux/loop.h`, with its `struct loop_info64`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    /// lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit
    places: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// LOOP_CTL_GET_FREE: the answer is the call's result.
struct GetFree;

// SAFETY: the command takes no argument and writes no memory; its result is a
// number.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// A read-only loop device over `file` that goes away with its last user. Keep
/// the returned file open until the device is mounted. It is locked: udev waits with
/// devices that others have locked (systemd's "Block Device Locking").
pub(crate) fn loop_device(file: &Path) -> io::Result<(PathBuf, File)> {
    let backing = File::open(file)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    let started = Instant::now();
    loop {
        // SAFETY: `GetFree` describes the command as linux/loop.h does.
        let number = unsafe { rustix::ioctl::ioctl(&control, GetFree) }?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::open(&path)?;
        // Before udev hears of the device. Who has it locked makes it too, or is udev that
        // looks at what it was: in the end it is as good without the lock.
        while flock(&device, FlockOperation::NonBlockingLockExclusive).is_err()
            && started.elapsed() < LOCKED
        {
            thread::sleep(Duration::from_millis(10));
        }
        let config = LoopConfig {
            fd: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
            block_size: 0,
            places: [0; 5],
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            // The file's page cache would hold everything twice, and its read-ahead would
            // ask for much more than what is read of the device.
            flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which
        // `LoopConfig` is, field by field.
        let setter = unsafe { Setter::<LOOP_CONFIGURE, LoopConfig>::new(config) };
        // SAFETY: as above; the command keeps no pointer.
        match unsafe { rustix::ioctl::ioctl(&device, setter) } {
            Ok(()) => return Ok((path, device)),
            // Another was faster with this number.
            Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
