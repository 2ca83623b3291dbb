//! The border to a storage source, and the worker process behind it.
