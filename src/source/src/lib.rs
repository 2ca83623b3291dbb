//! The border to a storage source, and the worker process behind it.
//!
//! The daemon never opens a file on UFS: a process with a thread stuck in an
//! uninterruptible read cannot finish dying, and the kernel lets no successor
//! recover its devices before it has. So every source has a worker process
//! ([`worker`]) that reads through io_uring into memory which both share
//! ([`Arena`]), and the daemon holds only a [`WorkerSource`].
//!
//! ```text
//!  Source::submit(Request { slot, .. }, done)
//!        ▼
//!  Sources ── which source, deadlines, retries
//!        │  id, path, offset, place in the arena         SOCK_SEQPACKET
//!        ▼                                                     │
//!  WorkerSource ── one attempt, restarts of the worker ────────┼──► worker process
//!        ▲                                                     │    openat2 + io_uring
//!        └── done(Filled { slot, len }) ◄── id, length or errno┘         │
//!                         └────────── Arena (memfd) ◄────────────────────┘
//! ```
//!
//! **Invariant**: a [`Slot`] that the daemon holds is written by nobody. A read
//! in flight owns its slot; one whose attempt ran out of time keeps it until the
//! worker has answered or is gone, and then leaves the old pages behind, as soon as the
//! kernel lets them go.
//!
//! What a source delivers is *not* trusted here: digests are checked by whoever
//! asked, who gives back what was wrong ([`Rejected`]) to have another source asked. [`Faulty`] decorates any source with faults, for tests.

mod arena;
mod blocking;
mod disk;
mod faulty;
mod handle;
mod health;
mod huge;
mod latency;
pub mod privileges;
mod request;
mod sources;
mod supervise;
mod wire;
pub mod worker;

pub use arena::{Arena, ArenaError, Pool, Slot};
pub use blocking::{list, read_checked, read_file, see_to};
pub use disk::{
    DiskCache, DiskCounters, DiskError, DiskOptions, DiskStanding, disk_slots,
    worker as disk_worker,
};
pub use faulty::{Fault, Faulty};
pub use handle::{Counters, StartError, WorkerCommand, WorkerSource};
pub use health::{Condition, Fault as SourceFault, Standing};
pub use latency::{BOUNDS as LATENCY_BOUNDS, Latencies, Latency};
pub use request::{
    Content, Done, FileName, Filled, Late, Operation, Origin, Patience, Readiness, Rejected,
    Request, RequestId, Source, SourceError,
};
pub use sources::{Sources, Tally};

/// Reads start and end on multiples of this in file and memory, so that
/// O_DIRECT is possible.
pub const ALIGNMENT: usize = 4096;
