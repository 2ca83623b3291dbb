//! Names of the OCI world: digests, diffIDs, chain IDs, platforms and image sources, and why
//! registries say no.
//!
//! Everything here is a value: parsing and printing, no I/O. Specified in the
//! [image specification](https://github.com/opencontainers/image-spec)
//! (descriptors, `rootfs.diff_ids`, chain IDs) and in containers-transports(5)
//! (image sources).

mod digest;
mod platform;
mod problem;
mod source;

pub use digest::{ChainId, DiffId, Digest, DigestError};
pub use platform::{Platform, PlatformError};
pub use problem::Problem;
pub use source::{
    ArchiveReference, ImageSource, OciReference, RegistryReference, SourceError, Version,
};
