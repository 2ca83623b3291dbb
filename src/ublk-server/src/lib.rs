//! The node daemon: serves layers as block devices, on demand and verified.
//!
//! ```text
//! client ──wire, protocol──► admin ──► registry ──► devices ──► transport
//!   │ mounts                               │  │                    │ reads
//!   ▼                                      │  └─► journal          ▼
//! kernel                              catalog ─► source ◄──────── engine
//! ```
//!
//! * [`serve`] puts the daemon together; [`namespace`] keeps its mounts apart.
//! * [`registry`] knows what is exported and who needs it; [`journal`] makes
//!   that survive the daemon, and [`keeper`] the connections of FUSE files.
//! * [`handover`] puts another program in the daemon's place; [`orphans`] are devices
//!   that no journal knows.
//! * [`engine`] turns requests of the kernel into verified bytes.
//! * [`threads`] are there for whoever needs one: where memory is short none is made.
//! * [`metrics`] tells Prometheus what all of it does.
//! * [`client`] asks and mounts.

pub mod admin;
pub mod catalog;
pub mod client;
pub mod devices;
pub mod disk_cache;
pub mod engine;
pub mod handover;
pub mod journal;
pub mod keeper;
pub mod log;
pub mod metrics;
pub mod namespace;
pub mod orphans;
pub mod registry;
pub mod remake;
pub mod rescue;
pub mod serve;
pub mod size;
pub mod threads;
pub mod time;

pub use accel_client::{lock, mountinfo, notify, paths, protocol, wire};
