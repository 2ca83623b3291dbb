//! What lies on UFS, the file system that all nodes share.
//!
//! * [`index`]: the chunk index that lets a reader verify any 128 KiB of an
//!   image knowing only its root and size. Bytes in, bytes out, no I/O.
//! * [`names`]: the path of everything on UFS.
//! * [`record`]: image records and the smaller records beside them.
//! * [`annotations`]: what an accelerated manifest says of a layer.
//! * [`publish`]: how files get their final names: complete, durable, and never
//!   replacing anything.
//! * [`lease`]: which processes are at work, so that what the others left can go.
//! * [`start`]: what mounting an image reads first, in one file.
//! * [`claim`]: who needs which images and layers; [`node`]: which layers nodes use;
//!   [`removal`]: how what neither needs goes.
//! * [`canary`]: what a node reads to see whether it can serve; [`health`]: what came of it.
//! * [`turn`]: which process converts a layer, when several could.
//! * [`resolve`]: from what a user calls an image to its record.
//!
//! The bytes and names are specified in `ARCHITECTURE.md`, "Formats"; this is
//! layout 1.

pub mod annotations;
pub mod canary;
pub mod claim;
pub mod health;
pub mod index;
pub mod lease;
pub mod names;
pub mod node;
pub mod publish;
pub mod record;
pub mod removal;
pub mod resolve;
pub mod start;
pub mod turn;

mod error;
mod hex;

pub use error::UfsError;
