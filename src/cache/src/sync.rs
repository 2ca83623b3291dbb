//! What threads share the cache by. `tests/shuttle.rs` includes this crate's source
//! with other primitives in this place, whose every interleaving can be tried.

pub(crate) use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic};
