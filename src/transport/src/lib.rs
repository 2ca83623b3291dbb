//! Exported devices: how a layer's bytes reach the kernel.
//!
//! A transport turns kernel requests into calls of a [`Reader`] and hands what
//! it gets back to the kernel. It knows nothing of caches, sources or digests.
//!
//! * [`ublk`]: a block device, where the kernel has the driver;
//! * [`fuse`]: a file, elsewhere;
//! * [`choose`] says which.

mod choose;
pub mod fuse;
mod request;
pub mod ublk;

pub use choose::{Choice, NoTransport, Transport, Wanted, choose};
pub use request::{Place, ReadError, Reader, Request};

/// Transports are shared by all threads of the daemon.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    struct Any;
    impl Reader for Any {
        type Kept = ();
        fn size(&self) -> u64 {
            0
        }
        fn read<R: Request>(&self, _: u64, _: usize, _: R) {}
    }
    shared::<ublk::UblkTransport<Any>>();
    shared::<fuse::FuseTransport<Any>>();
};
