//! Exported devices: how a layer's bytes reach the kernel.
//!
//! A transport turns kernel requests into calls of a [`Reader`] and hands what
//! it gets back to the kernel. It knows nothing of caches, sources or digests.

mod request;
pub mod ublk;

pub use request::{ReadError, Reader, Request};
