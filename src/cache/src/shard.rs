//! One shard: its entries, and the three queues that decide which one leaves.

use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

/// Content in memory.
pub(crate) struct Entry<S> {
    pub slot: S,
    pub len: usize,
    /// Bytes served from it so far.
    pub served: AtomicU64,
}

impl<S> Entry<S> {
    /// How many times as many bytes were served as there are.
    fn uses(&self) -> u64 {
        self.served.load(Ordering::Relaxed) / self.len.max(1) as u64
    }
}

enum State<S, W> {
    Loading(Vec<W>),
    Resident(Resident<S>),
}

struct Resident<S> {
    entry: Arc<Entry<S>>,
    /// Uses that have already bought a round.
    counted: u64,
    /// Served in part, it has had its second round in the small queue.
    second: bool,
}

pub(crate) struct Shard<K, S, W> {
    states: HashMap<K, State<S, W>>,
    small: VecDeque<K>,
    main: VecDeque<K>,
    /// Keys that left the small queue, oldest first.
    ghosts: VecDeque<K>,
    is_ghost: HashSet<K>,
    capacity: usize,
}

impl<K: Copy + Eq + Hash, S, W> Shard<K, S, W> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            states: HashMap::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            is_ghost: HashSet::new(),
            capacity: capacity.max(1),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.small.len() + self.main.len()
    }

    pub(crate) fn knows(&self, key: &K) -> bool {
        self.states.contains_key(key)
    }

    pub(crate) fn get(&self, key: &K) -> Option<Arc<Entry<S>>> {
        match self.states.get(key)? {
            State::Resident(resident) => Some(Arc::clone(&resident.entry)),
            State::Loading(_) => None,
        }
    }

    /// Adds a waiter for a key that is not resident; true if it is the first.
    pub(crate) fn join(&mut self, key: K, waiter: W) -> bool {
        if let Some(State::Loading(waiters)) = self.states.get_mut(&key) {
            waiters.push(waiter);
            return false;
        }
        self.states.insert(key, State::Loading(vec![waiter]));
        true
    }

    pub(crate) fn complete(&mut self, key: K, slot: S, len: usize) -> (Arc<Entry<S>>, Vec<W>) {
        let entry = Arc::new(Entry {
            slot,
            len,
            served: AtomicU64::new(0),
        });
        let resident = State::Resident(Resident {
            entry: Arc::clone(&entry),
            counted: 0,
            second: false,
        });
        let waiters = match self.states.insert(key, resident) {
            Some(State::Loading(waiters)) => waiters,
            _ => Vec::new(),
        };
        if self.is_ghost.remove(&key) {
            self.ghosts.retain(|ghost| *ghost != key);
            self.main.push_back(key);
        } else {
            self.small.push_back(key);
        }
        (entry, waiters)
    }

    pub(crate) fn fail(&mut self, key: &K) -> Vec<W> {
        match self.states.remove(key) {
            Some(State::Loading(waiters)) => waiters,
            Some(resident) => {
                self.states.insert(*key, resident);
                Vec::new()
            }
            None => Vec::new(),
        }
    }

    /// Takes out the entry that is least worth keeping.
    pub(crate) fn evict(&mut self) -> Option<Arc<Entry<S>>> {
        // Every entry moves at most twice before one has to go, whatever is
        // served meanwhile.
        let mut moves = 2 * self.len();
        loop {
            let from_small = self.main.is_empty() || self.small.len() * 10 >= self.capacity.max(10);
            let queue = if from_small {
                &mut self.small
            } else {
                &mut self.main
            };
            let key = queue.pop_front()?;
            let Some(State::Resident(resident)) = self.states.get_mut(&key) else {
                continue;
            };
            let uses = resident.entry.uses();
            let stays = moves > 0;
            moves = moves.saturating_sub(1);
            if from_small {
                if stays && uses >= 2 {
                    resident.counted = uses;
                    self.main.push_back(key);
                    continue;
                }
                if stays && uses == 0 && !resident.second {
                    resident.second = true;
                    self.small.push_back(key);
                    continue;
                }
                self.remember(key);
            } else if stays && uses > resident.counted {
                resident.counted = uses;
                self.main.push_back(key);
                continue;
            }
            return match self.states.remove(&key) {
                Some(State::Resident(resident)) => Some(resident.entry),
                _ => None,
            };
        }
    }

    fn remember(&mut self, key: K) {
        if self.is_ghost.insert(key) {
            self.ghosts.push_back(key);
        }
        while self.ghosts.len() > self.capacity {
            if let Some(oldest) = self.ghosts.pop_front() {
                self.is_ghost.remove(&oldest);
            }
        }
    }
}
