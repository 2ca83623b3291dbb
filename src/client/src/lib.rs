//! What every program that mounts layers on a node needs: the admin protocol of
//! `ublk-server`, and the mounts themselves.
//!
//! * [`protocol`] and [`wire`]: one question per connection, with its answer.
//! * [`paths`]: where daemon and clients keep things; [`lock`]: one of them at a
//!   time.
//! * [`exports`]: from what the daemon exports to a file or device that can be
//!   mounted, and back.
//! * [`notify`]: what a service manager is told.
//! * [`output`]: what commands print.
//! * [`system`]: EROFS, overlay and FUSE mounts; [`mountinfo`]: which there are.
//!
//! The daemon itself never mounts, so that it does not have to unmount what it
//! serves when it ends.

pub mod exports;
pub mod idmapped;
pub mod lock;
mod loop_device;
pub mod mountinfo;
pub mod notify;
pub mod output;
pub mod paths;
pub mod protocol;
pub mod system;
pub mod wire;
