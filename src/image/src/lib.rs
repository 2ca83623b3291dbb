//! Where images come from: OCI layouts and registries.
