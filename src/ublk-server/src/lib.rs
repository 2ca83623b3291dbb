//! The node daemon: serves layers as block devices, on demand and verified.

pub mod catalog;
pub mod devices;
pub mod engine;
pub mod journal;
pub mod protocol;
pub mod registry;
pub mod size;
