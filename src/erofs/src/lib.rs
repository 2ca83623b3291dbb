//! The EROFS on-disk format and its writer, without I/O.
