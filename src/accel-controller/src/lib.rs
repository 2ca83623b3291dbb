//! Converts images on a Kubernetes cluster, as its resources ask for.
//!
//! ```text
//!  AcceleratedImage ──┐                     ┌──► status, Events
//!  ImageAcceleration ─┼─► observe ──► plan ─┼──► Jobs: mkfs-accel convert … --push
//!  Jobs, pods, log  ──┘               pure  └──► finalizers
//! ```
//!
//! [`plan`] decides from what is observed, and nothing else; [`run`] looks and does what
//! was planned. So the same is decided again after a restart: nothing is kept anywhere
//! but in the cluster.

pub mod check;
pub mod command;
pub mod conditions;
pub mod job;
pub mod labels;
pub mod lead;
pub mod login;
pub mod metrics;
pub mod node;
pub mod obstacles;
pub mod plan;
pub mod purge;
pub mod reference;
pub mod report;
pub mod resource;
pub mod run;
pub mod service;
pub mod users;
mod yaml;
