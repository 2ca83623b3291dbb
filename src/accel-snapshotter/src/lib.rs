//! containerd's snapshotter for converted images: layers are mounted, not unpacked.
//!
//! ```text
//! containerd ──gRPC──► service ──► snapshotter ──► store      which snapshots there are
//!                                    │  │  └─────► mounts     what containerd mounts
//!                                    │  └────────► remote     what may be lazy
//!                                    └───────────► layers ──► ublk-server, kernel
//! ```
//!
//! An image's layers come in two kinds, which mix: ordinary ones, unpacked by
//! containerd into directories as with its overlayfs snapshotter, and lazy ones,
//! which are mounts of EROFS. [`snapshotter`] has the rules for what may wait and
//! what must not.

pub mod agent;
pub mod canary;
pub mod config;
pub mod doctor;
pub mod edit;
pub mod filter;
pub mod health;
pub mod idmap;
pub mod layers;
pub mod mounts;
pub mod remote;
pub mod serve;
pub mod service;
pub mod settings;
pub mod snapshot;
pub mod snapshotter;
pub mod status;
pub mod store;
pub mod ufs_place;
pub mod usage;
pub mod watch;
