//! The ublk driver: its commands, the rings that carry them, and what it shares by mmap.

mod abi;
mod ring;

pub use abi::{
    Ask, ControlOp, DeviceInfo, DeviceState, Features, Geometry, IO_RES_ABORT, MAX_DEVICE_ID,
    NewDevice, Payload, data_offset,
};
pub use ring::{ControlEvent, ControlRing, Descriptors, QueueEvent, QueueRing, Wake};
