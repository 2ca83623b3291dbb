//! What a disk cache tells of itself.

use crate::StartError;
use std::sync::atomic::AtomicU64;

/// A disk cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It would be too small.
    #[error("a disk cache has at least 16M, not {0} bytes")]
    Small(u64),
    /// Another daemon has it.
    #[error("{0}: choose another --disk-cache directory, or stop that daemon")]
    Taken(String),
    /// Its processes cannot be supervised.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something of this process is missing.
    #[error("cannot set the disk cache up: {0}")]
    Setup(String),
}

/// What a disk cache has done so far.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Requests answered from it.
    pub hits: AtomicU64,
    /// Requests for what it does not hold.
    pub misses: AtomicU64,
    /// Pieces written to it.
    pub written: AtomicU64,
    /// Pieces not written: too much was on its way, or the disk was left alone.
    pub skipped: AtomicU64,
    /// Pieces whose bytes had changed on disk: dropped, and fetched again.
    pub damaged: AtomicU64,
    /// Reads and writes that failed or took too long.
    pub failed: AtomicU64,
}

/// How a disk cache stands.
#[derive(Debug, Clone)]
pub struct DiskStanding {
    /// Its directory.
    pub name: String,
    /// In words.
    pub state: String,
    /// Whether it is read and written.
    pub in_use: bool,
    /// Bytes that its files may have.
    pub size: u64,
    /// Bytes of slots that hold something.
    pub used: u64,
    /// Pieces evicted so far.
    pub evicted: u64,
    /// Whether the index on disk knows of all that is there.
    pub saved: bool,
}
