//! The ioctls of loop devices (`linux/loop.h`).

use rustix::io::{Errno, Result};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter};
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd as _;

const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

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

/// The number of a loop device that nobody uses yet; `control` is `/dev/loop-control`.
///
/// # Errors
/// Those of the ioctl LOOP_CTL_GET_FREE.
pub fn free_number(control: &File) -> Result<i32> {
    // SAFETY: `GetFree` describes the command as linux/loop.h does.
    unsafe { rustix::ioctl::ioctl(control, GetFree) }
}

/// Makes the loop device `device` one over `backing`: read-only, without the file's page
/// cache, gone with its last user.
///
/// # Errors
/// EBUSY when another was faster with this device; else those of the ioctl LOOP_CONFIGURE.
pub fn configure(device: &File, backing: &File) -> Result<()> {
    let config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::BADF)?,
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
    unsafe { rustix::ioctl::ioctl(device, setter) }
}
