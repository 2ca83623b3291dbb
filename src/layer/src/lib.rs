//! From an OCI layer's bytes to a validated tree and its data.
