//! What the kernel is asked for that has no safe wrapper, and the wrappers: all unsafe code
//! of the product is here, the other crates forbid it.
//!
//! Whoever adds something keeps its interface safe whatever its caller does: memory that
//! the kernel may touch belongs to the wrapper until the kernel is done with it.
//!
//! * [`ublk`]: the driver's commands, its rings and its descriptors;
//! * [`FileRing`]: opening, reading and writing files through io_uring, into
//!   [`SharedMemory`], of which [`HugePages`] can be made;
//! * [`inherited`], [`close_inherited`]: the descriptors a process was started with;
//! * [`map_mount_ids`], [`unshare_mounts`], [`loop_devices`]: mounts.

mod descriptors;
mod file_ring;
pub mod loop_devices;
mod memory;
mod mounts;
pub mod ublk;

pub use descriptors::{close_inherited, inherited};
pub use file_ring::{Done, FileRing, Outcome};
pub use memory::{HUGE_PAGE, HugePages, Part, SharedMemory};
pub use mounts::{map_mount_ids, unshare_mounts};
