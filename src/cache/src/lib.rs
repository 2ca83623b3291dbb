//! The cache of verified chunks: keys, single flight, eviction; no I/O.
