//! Where images come from: OCI layouts, archives and registries; and where accelerated
//! ones go.
//!
//! [`open`] goes from an [`ImageSource`](accel_oci::ImageSource) to an
//! [`Image`]: the manifest for one platform, its config, and the descriptors of
//! its layers, whose blobs [`Image::open_layer`] streams.
//!
//! Manifests and configs are small; they are read whole, within limits, and
//! verified against the digest that led to them. Only what a tag points to has
//! nothing to be verified against. A layer's blob is *not* verified here but by
//! whoever reads it to its end (`accel-layer`), which hashes it anyway.
//!
//! OCI and Docker's schema 2 are read, indexes and manifest lists included.
//! Attestations in an index are passed over. Media types that are no plain image
//! (encrypted layers, artifacts, Docker's schema 1) are refused by name.
//!
//! [`check_login`] asks a registry whether it takes the login that there is for it.
//! [`Target`] writes an accelerated image: the same config and layers under a
//! manifest that says more of the layers; [`remove_tag`] takes one's tag away again.

mod accelerated;
mod archive;
mod config;
mod docker_archive;
mod error;
mod image;
mod layout;
mod layout_write;
mod manifest;
mod registry;
mod target;

pub use accel_oci::Problem;
pub use accelerated::{Accelerated, Annotations};
pub use config::ProcessConfig;
pub use error::ImageError;
pub use image::{Credentials, Image, Images, Layer, OpenOptions, Platforms, open, open_all};
pub use registry::{Untagged, check_login, logins};
pub use target::Target;
pub use target::remove_tag;
